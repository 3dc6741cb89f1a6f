"""What every layer predicts next in one text, through any lens; of a predictive-coding model also what its errors did.

In the terminal and as a page by itself. The trajectory is tuned-lens's own, for any model and lens.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from tuned_lens.nn.lenses import Lens, LogitLens
from tuned_lens.plotting import PredictionTrajectory

from lensbench import results
from lensbench.corpus import Document, tokenize
from lensbench.errors import LensbenchError
from lensbench.lenses import SharedLens, load_tuned_lens, prediction_trajectory
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer
from lensbench.models.pretrained import Pretrained, check_context, check_ids
from lensbench.page import SCRIPT, STYLE, shade
from lensbench.stream import ResidualStream
from lensbench.suite import name_of

OF_A_RUN = ("tuned", "shared", "shared_bias", "tuned_headline")
"""Lenses that a run leaves in its stages."""
MOST = 10
"""Tokens and errors that are told."""


@dataclass(frozen=True)
class Subject:
    """A model to trace, the view of its stream, and the lens to read it with: sources as elsewhere."""

    model: str
    view: str
    lens: str | None


def subject_of(model: str, lens: str | None, run: Path | None, seed: int | None) -> Subject:
    """What MODEL and LENS name, alone or in a run's folder.

    In a run MODEL is one of its models' names, or a source whose lenses the run fitted; the lens is the run's shared one
    where none is named. Raises :class:`LensbenchError` for what is not there.
    """
    if run is None:
        if lens in OF_A_RUN:
            raise LensbenchError(f"--lens {lens} is one that a run fitted: give its folder with --run")
        return Subject(model, "state", None if lens == "logit" else lens)
    manifest = results.read_manifest(run)
    known = {m["name"]: m for m in manifest["suite"]["models"]}
    name = name_of(model) if ":" in model else model
    if name not in known:
        raise LensbenchError(f"{run} has no model {name!r}; it has {', '.join(known)}")
    told = known[name]
    if told.get("rotated"):
        raise LensbenchError(f"model {name!r} is a rotated view: what its lenses read is no state of the model; trace "
                             f"{told['view_of']!r}")  # fmt: skip
    owner = known[told.get("view_of") or name]
    seed = manifest["seeds"][0] if seed is None else seed
    source = model
    if ":" not in model:
        trained = run / "stages" / f"train-{owner['name']}-seed{seed}"
        source = owner.get("source") or f"path:{trained}"
        source = source.partition("/")[0] if source.startswith("package:") else source
        if owner.get("source") and source.startswith(("path:", "gguf:")):
            raise LensbenchError(f"model {name!r} was read from {source}, and results hold nobody's folders: give "
                                 "path:FOLDER in place of its name")  # fmt: skip
    fitted = run / "stages" / f"fit-{name}-seed{seed}"
    if not fitted.is_dir():
        there = sorted(p.name for p in (run / "stages").glob(f"fit-{name}-seed*")) if (run / "stages").is_dir() else []
        raise LensbenchError(f"{run} holds no lenses of {name!r} at seed {seed}"
                             + (f"; it has {', '.join(there)}" if there else ": its stages are not there"))  # fmt: skip
    lens = lens or "shared"
    chosen = None if lens == "logit" else f"path:{fitted / lens}" if lens in OF_A_RUN else lens
    return Subject(source, told.get("view", "state"), chosen)


def load_lens(stream: ResidualStream, source: str | None) -> Lens:
    """A tuned lens, or a shared one, of a folder; a tuned one of the hub; the logit lens for None."""
    if source is None:
        return LogitLens(stream.readout)
    folder = Path(source.removeprefix("path:"))
    if source.startswith("path:") and (folder / "params.safetensors").is_file():
        lens: Lens = SharedLens.load(stream.readout, folder)
        width, layers = lens.translator.in_features, None if lens.layer_bias is None else len(lens.layer_bias)
    else:
        lens = load_tuned_lens(stream.readout, source)
        width, layers = lens.config.d_model, len(lens)
    if width != stream.d_model or layers not in (None, stream.layers):
        raise LensbenchError(f"{source}: the lens is of another model: its width is {width}, its layers {layers}")
    return lens.to(stream.device)


def token_ids(loaded: Pretrained, text: str) -> Tensor:
    """Ids ``[T]`` of a text behind the beginning-of-text token.

    Raises :class:`LensbenchError` for an empty text, and for one that the model cannot read.
    """
    encoded = tokenize(loaded.tokenizer, [Document("text", text)])
    if not encoded:
        raise LensbenchError("the text is empty: give one that has a token")
    ids = torch.from_numpy(encoded[0].ids.astype(np.int64))
    check_context(loaded.source, loaded.model.config, len(ids), "give a text of at most {} tokens")
    check_ids(loaded.source, ids, loaded.model.config.get_text_config().vocab_size)
    return ids


def traced(
    loaded: Pretrained, text: str, lens: str | None = None, last: int | None = None, view: str = "state"
) -> PredictionTrajectory:
    """The trajectory of ``text``, behind the beginning-of-text token, under a lens named as in :func:`load_lens`.

    The model reads all of the text; with ``last`` only the states of so many tokens at its end are read out.

    Raises :class:`LensbenchError` for an empty text and one beyond the model's context.
    """
    ids = token_ids(loaded, text)
    stream = ResidualStream(loaded.model, view)
    return prediction_trajectory(load_lens(stream, lens), stream, ids, loaded.tokenizer, last=last)


# What errors did


@dataclass(frozen=True)
class Errors:
    """Prediction errors of one text ``[T]`` in a predictive-coding model, and what they did to its last prediction.

    ``size`` ``[L, T]``: length of the error that token s reveals to layer l, of embeddings of rms 1. ``surprisal``
    ``[L, T]``: nats of token s under layer l's own prediction, made at s-1; NaN at 0. ``moved`` ``[L, T]``: what the error
    revealed by token s added, in layer l, to the logit of the model's own next token ``word`` (less the mean logit of all
    words, which a softmax does not see). Exactly additive, the final norm's scale held fixed: ``start`` (of z_0) +
    ``moved.sum()`` +
    ``written`` (of the relaxed form's MLPs) is that logit.
    """

    size: NDArray[np.float64]
    surprisal: NDArray[np.float64]
    moved: NDArray[np.float64]
    start: float
    written: float
    word: int


@torch.no_grad()
def errors_of(model: PredictiveCodingForCausalLM, ids: Tensor) -> Errors:
    """What errors did in a text of token ids ``[T]``.

    Raises :class:`LensbenchError` for variants whose update is no sum over errors.
    """
    config = model.config
    if config.error == "none":
        raise LensbenchError("this predictive-coding model is the control without errors: there is none to show")
    if config.delta_rule or not config.causal:
        raise LensbenchError("with the delta rule, or without causality, an update is no sum over earlier errors")
    output = model(ids[None].to(model.device), output_hidden_states=True)
    assert output.predictions is not None and output.errors is not None and output.hidden_states is not None
    final, d = output.predictions[-1][0, -1], config.hidden_size
    word = int(output.logits[0, -1].argmax())
    embedding = model.lm_head.weight
    scale = torch.rsqrt(final.pow(2).mean() + model.norm.eps)
    along = (embedding[word] - embedding.mean(0)) * model.norm.weight * scale  # [d]: of z to the centred logit
    size, surprisal, moved = [], [], []
    for number, (z, error) in enumerate(zip(output.predictions, output.errors, strict=False)):
        layer = cast(PredictiveCodingLayer, model.layers[number % len(model.layers)])
        u = output.hidden_states[number + 1][..., d : 2 * d]  # features are renewed before they weigh errors
        query, key = layer.queries_and_keys(u)
        last = query.shape[2] - 1
        weights = layer.weights(query[:, :, last:], key, last)[0, :, 0]  # [H, T]
        value = layer.split(layer.value_output(error))[0]  # [H, T, d/H]
        output_map = layer.value_output.weight if layer.output is None else layer.output.weight
        seen = (output_map @ along).view(layer.heads, -1)  # [H, d/H]
        moved.append((weights * torch.einsum("htk,hk->ht", value, seen)).sum(0))
        size.append(error[0].norm(dim=-1))
        chances = model.read_out(z)[0, :-1].float().log_softmax(-1)
        own = -chances.gather(-1, ids[1:, None].to(chances.device))[:, 0]
        surprisal.append(torch.cat([own.new_full((1,), torch.nan), own]))
    written = sum((w[0, -1] @ along for w in output.writes), torch.zeros(())) if output.writes else torch.zeros(())
    sizes, nats, moves = (torch.stack(x).double().cpu().numpy() for x in (size, surprisal, moved))
    return Errors(sizes, nats, moves, float(output.predictions[0][0, -1] @ along), float(written), word)


def largest_moves(errors: Errors, most: int = MOST) -> list[tuple[int, int, float]]:
    """(layer, position, change of the logit) of the errors that moved the last prediction most, the largest first."""
    order = np.argsort(-np.abs(errors.moved), axis=None, kind="stable")[:most]
    found = [divmod(int(k), errors.moved.shape[1]) for k in order]
    return [(layer, s, float(errors.moved[layer, s])) for layer, s in found if errors.moved[layer, s] != 0]


# In the terminal


def trace_table(trajectory: PredictionTrajectory, tokens: int) -> Table:
    """Per layer (the model itself last) its most probable next word behind each of the last ``tokens`` tokens.

    Coloured by its probability, the same ramp as on the page.
    """
    shown = min(tokens, trajectory.num_tokens)
    words = _readable(trajectory, np.asarray(trajectory.input_ids[-shown:]))
    columns = (Column(Text(word), no_wrap=True) for word in words)
    table = Table(Column("behind", no_wrap=True), *columns, title="next word")
    log_probs = trajectory.log_probs[:, -shown:]  # [L+1, n, V]
    best = log_probs.argmax(-1)
    for layer, row in enumerate(best):
        chances = np.exp(np.take_along_axis(log_probs[layer], row[:, None], -1)[:, 0])
        cells = []
        for word, chance in zip(_readable(trajectory, row), chances, strict=True):
            fill, ink = shade(float(chance))
            colour = "#000000" if ink == "#000" else "#ffffff"
            cells.append(Text(f"{word} {chance:.2f}", style=f"{colour} on {fill}"))
        table.add_row(_name(layer, len(best)), *cells)
    return table


def error_tables(errors: Errors, words: Sequence[str], tokens: int) -> list[Table]:
    """Sizes and surprisals of the last tokens' errors, and which errors moved the last prediction most."""
    shown = min(tokens, len(words))
    table = Table(
        Column("error at", no_wrap=True),
        *(Column(Text(w), no_wrap=True) for w in words[-shown:]),
        title="size of the prediction error that each token revealed (nats of surprise under that layer)",
    )
    for layer, (sizes, nats) in enumerate(zip(errors.size, errors.surprisal, strict=True)):
        cells = [
            "" if np.isnan(n) else f"{s:.2f} ({n:.2f})" for s, n in zip(sizes[-shown:], nats[-shown:], strict=True)
        ]
        table.add_row(f"layer {layer}", *cells)
    moves = Table("layer", "error revealed by", "position", "logit", title=moved_title(errors, words))
    for layer, s, change in largest_moves(errors):
        moves.add_row(str(layer), Text(words[s]), str(s), f"{change:+.3f}")
    return [table, moves]


def moved_title(errors: Errors, words: Sequence[str]) -> str:
    rest = errors.start + errors.written
    return (
        f"what moved the logit of the next word: {errors.moved.sum():+.3f} by errors in all, "
        f"{rest:+.3f} from the start, behind {len(words)} tokens"
    )


def _name(layer: int, layers: int) -> str:
    return f"layer {layer}" if layer < layers - 1 else "model"


def _readable(trajectory: PredictionTrajectory, ids: np.ndarray) -> list[str]:
    tokenizer = trajectory.tokenizer
    assert tokenizer is not None
    return [repr(tokenizer.decode([int(i)]))[1:-1] for i in ids]


def words_of(trajectory: PredictionTrajectory, ids: Sequence[int]) -> list[str]:
    """Tokens as they are shown: escapes for what is no printable character."""
    return _readable(trajectory, np.asarray(ids))


# As a page


def kl_to_model(trajectory: PredictionTrajectory) -> NDArray[np.float64]:
    """``KL(p_final || q_layer)`` at each layer and token, nats ``[L+1, n]``."""
    log_q = trajectory.log_probs.astype(np.float64)
    log_p = log_q[-1]
    kl: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return kl


def trace_page(
    trajectory: PredictionTrajectory, *, title: str, errors: Errors | None = None, ids: Sequence[int] = ()
) -> str:
    """The trajectory as one HTML page that asks for nothing: hover or focus a cell for its ten most probable words.

    ``errors`` of the text with token ids ``ids`` (all of it) are shown below.
    """
    log_probs = trajectory.log_probs
    entropy = trajectory.entropy().stats
    kl = kl_to_model(trajectory)
    words = words_of(trajectory, trajectory.input_ids)
    rows = []
    for layer in reversed(range(len(log_probs))):  # the model itself on top
        cells = []
        for at in range(log_probs.shape[1]):
            best = np.argsort(-log_probs[layer, at], kind="stable")[:MOST]
            names, chances = words_of(trajectory, best.tolist()), np.exp(log_probs[layer, at, best])
            lines = [f"{name}  {chance:.3f}" for name, chance in zip(names, chances, strict=True)]
            tip = f"{_name(layer, len(log_probs))} behind {words[at]}\n" + "\n".join(lines)
            tip += f"\nentropy {entropy[layer, at]:.3f} nats\nKL to the model {kl[layer, at]:.3f} nats"
            fill, ink = shade(float(chances[0]))
            cells.append(_cell(names[0], tip, fill, ink))
        rows.append(f'<tr><th scope="row">{_name(layer, len(log_probs))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_text(w)}</th>' for w in words)
    body = [
        f"<header><p class=soft>lensbench trace</p><h1>{_text(title)}</h1><p>Columns: the token read last. Rows: layers, "
        "the model itself on top. A cell is the most probable next token there; dark is certain. Hover or focus a cell for "
        "its ten most probable tokens, the entropy of its prediction and its KL from the model's own.</p></header><main>",
        f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    ]
    if errors is not None:
        body.append(_errors_html(errors, words_of(trajectory, ids), log_probs.shape[1]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        'initial-scale=1"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</main>"
        f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _errors_html(errors: Errors, words: Sequence[str], shown: int) -> str:
    """Sizes and surprisals of the last tokens' errors, what each moved, and the largest moves."""
    largest = float(np.nanmax(errors.size)) or 1.0
    rows = []
    for layer in reversed(range(len(errors.size))):
        cells = []
        for s in range(len(words) - shown, len(words)):
            if np.isnan(errors.surprisal[layer, s]):
                cells.append('<td class="cell"></td>')
                continue
            tip = (
                f"layer {layer}: error revealed by {words[s]}\nsize {errors.size[layer, s]:.3f}\nsurprise "
                f"{errors.surprisal[layer, s]:.3f} nats\nmoved the last prediction's logit by {errors.moved[layer, s]:+.4f}"
            )
            fill, ink = shade(float(errors.size[layer, s]) / largest)
            cells.append(_cell(f"{errors.size[layer, s]:.2f}", tip, fill, ink))
        rows.append(f'<tr><th scope="row">layer {layer}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_text(w)}</th>' for w in words[len(words) - shown :])
    moves = "".join(
        f'<tr><td>{layer}</td><td>{_text(words[s])}</td><td data-value="{s}">{s}</td>'
        f'<td data-value="{change!r}">{change:+.3f}</td></tr>'
        for layer, s, change in largest_moves(errors)
    )
    heads = "".join(
        f'<th scope="col"><button type="button">{name}</button></th>'
        for name in ("layer", "error revealed by", "position", "change of the logit")
    )
    return (
        "<h2>Prediction errors</h2><p>Length of the error that each token revealed of the prediction made before it, of "
        f"embeddings of rms 1.</p><div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}"
        f"</tbody></table></div><h2>Which errors moved the last prediction most</h2>"
        f"<p>{_text(moved_title(errors, words))}.</p>"
        f'<div class=wide><table id="moves"><thead><tr>{heads}</tr></thead><tbody>{moves}</tbody></table></div>'
    )


def _cell(word: str, tip: str, fill: str, ink: str) -> str:
    return f'<td class="cell" tabindex="0" data-tip="{_text(tip)}" style="background:{fill};color:{ink}">{_text(word)}</td>'


def _text(value: Any) -> str:
    # Lone surrogates, which a tokenizer of bytes may give, no file can hold.
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)
