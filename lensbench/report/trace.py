"""What every layer predicts next in one text, through any lens; of a predictive-coding model also what its errors did.

In the terminal and as a page by itself. The trajectory is tuned-lens's own, for any model and lens.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from tuned_lens.nn.lenses import Lens, LogitLens
from tuned_lens.plotting import PredictionTrajectory

from lensbench.data.reading import Document
from lensbench.data.windows import check_ids, tokenize
from lensbench.errors import LensbenchError
from lensbench.lenses.trajectory import prediction_trajectory
from lensbench.lenses.tuned import SharedLens, load_tuned_lens
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer
from lensbench.models.pretrained import Pretrained, check_context, check_source, named
from lensbench.report.page import SCRIPT, STYLE, shade
from lensbench.results.manifest import Manifest, read_manifest
from lensbench.streams.stream import ResidualStream
from lensbench.suite.files import name_of

OF_A_RUN = ("tuned", "shared", "shared_bias", "tuned_headline")
"""Lenses that a run leaves in its stages."""


MOST = 10
"""Tokens and errors that are told."""


OWN_STYLE = """
h1,p{overflow-wrap:anywhere}
th[scope=col]{white-space:pre}
th[scope=row]{position:sticky;left:0;background:var(--paper);z-index:1}
td.cell,.key span{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.key span{padding:.1rem .5rem;white-space:pre}
@page{size:landscape}
@media print{.wide{overflow:visible}table{font-size:7.5pt}th,td,td.cell{padding:.1rem .2rem}}
"""
"""Beyond the style of reports: layers stay in sight where one scrolls aside, and colours are printed."""


@dataclass(frozen=True)
class Subject:
    """A model to trace, the view of its stream, and the lens to read it with: sources as elsewhere."""

    model: str
    view: str
    lens: str | None


def subject_of(model: str, lens: str | None, run: Path | None, seed: int | None) -> Subject:
    """What MODEL and LENS name, alone or in a run's folder.

    In a run MODEL is one of its models' names, or a source whose lenses the run fitted; the lens is the run's shared one
    where none is named, the seed its first. Raises :class:`LensbenchError` for what is not there.
    """
    if run is None:
        if lens in OF_A_RUN:
            raise LensbenchError(f"--lens {lens} is one that a run fitted: give its folder with --run")
        if seed is not None:
            raise LensbenchError("--seed chooses among the trainings of a run: give its folder with --run")
        try:
            check_source(model)
        except LensbenchError as error:
            hint = "" if ":" in model else "; the name of a run's model needs that run's folder, --run FOLDER"
            raise LensbenchError(f"{error}{hint}") from error
        return Subject(model, "state", None if lens == "logit" else lens)
    manifest = read_manifest(run)
    if manifest.sweep is not None:
        raise LensbenchError(f"{run} holds a sweep, which has no lenses: give a folder of `lensbench run`")
    if manifest.suite.images is not None:
        raise LensbenchError(f"the models of {run} classify images: there is no text to trace")
    known = {m.name: m.content() for m in manifest.suite.models}
    name = _name_in(run, manifest, model)
    told = known[name]
    if told.get("rotated"):
        raise LensbenchError(f"model {name!r} is a rotated view: what its lenses read is no state of the model; trace "
                             f"{told['view_of']!r}")  # fmt: skip
    owner = known[told.get("view_of") or name]
    seed = (owner.get("seeds") or manifest.seeds)[0] if seed is None else seed
    lens = lens or "shared"
    if lens in OF_A_RUN:
        lens = f"path:{_stage(run, 'fit', name, seed, 'lenses of') / lens}"
    source = model
    if ":" not in model and owner.get("source"):
        source = owner["source"]
        if source.startswith(("path:", "gguf:")):
            raise LensbenchError(f"model {name!r} was read from {source}, and results hold nobody's folders: give "
                                 f"{source.partition(':')[0]}: and its place instead of its name")  # fmt: skip
        # Results tell the file that a package ships, too.
        source = source.partition("/")[0] if source.startswith("package:") else source
    elif ":" not in model:
        source = f"path:{_stage(run, 'train', owner['name'], seed, 'training of')}"
    return Subject(source, told.get("view", "state"), None if lens == "logit" else lens)


def _name_in(run: Path, manifest: Manifest, model: str) -> str:
    """The name that a run has for MODEL: a name, or a source, which it may have given a name of another kind."""
    models = [m.content() for m in manifest.suite.models]
    name = model
    if ":" in model:
        name, told = name_of(model), named(model)
        same = [m["name"] for m in models if m.get("source") == told]
        if len(same) > 1 and name not in same:
            raise LensbenchError(f"{run} has {told} under several names; give one of them: {', '.join(same)}")
        name = same[0] if same and name not in same else name
    if name not in {m["name"] for m in models}:
        raise LensbenchError(f"{run} has no model {name!r}; it has {', '.join(manifest.models)}")
    return name


def _stage(run: Path, kind: str, name: str, seed: int, what: str) -> Path:
    """The folder of a finished stage; raises :class:`LensbenchError` naming the seeds that there are."""
    folder = run / "stages" / f"{kind}-{name}-seed{seed}"
    if not (folder / "stage.json").is_file():
        there = sorted(p.parent.name for p in (run / "stages").glob(f"{kind}-{name}-seed*/stage.json"))
        more = f"; it has {', '.join(there)}" if there else ": its stages are not there"
        raise LensbenchError(f"{run} holds no {what} {name!r} at seed {seed}{more}")
    return folder


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
        size = f"width {width}" + ("" if layers is None else f" and {layers} layers")
        other = f"{source}: the lens is of another model: it has {size}, the model {stream.d_model} and {stream.layers}"
        if stream.view == "state" and width == stream.readout.weight.shape[1] != stream.d_model:
            other += "; was it fitted to predictions alone? then name model and lens in their run, with --run"
        raise LensbenchError(other)
    return lens.to(stream.device)


def token_ids(loaded: Pretrained, text: str) -> Tensor:
    """Ids ``[T]`` of a text behind the beginning-of-text token.

    Raises :class:`LensbenchError` for an empty text, and for one that the model cannot read.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of bytes that are no UTF-8
        raise LensbenchError("the text is no valid UTF-8: it holds half a character")
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
    words, which a softmax does not see). Exactly additive, the final norm's scale held fixed: ``moved[l].sum()`` is what
    layer l's update did to that logit, and ``start`` (of z_0) + ``moved.sum()`` + ``written`` (of the relaxed form's MLPs)
    is the logit.
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
def colours(share: float) -> tuple[str, str]:
    """Colours of a cell, light to dark as in reports, and of text on it: black or white, which differs more (WCAG)."""
    fill, _ = shade(share)
    linear = [
        (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for c in (b / 255 for b in bytes.fromhex(fill[1:]))
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return fill, "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def trace_tables(trajectory: PredictionTrajectory, tokens: int, width: int) -> list[Table]:
    """Per layer (the model itself last) its most probable next word behind each of the last ``tokens`` tokens.

    Coloured by its probability, the same ramp as on the page. More than fit beside each other in ``width`` characters go
    into further tables.
    """
    shown = min(tokens, trajectory.num_tokens)
    words = words_of(trajectory, trajectory.input_ids[-shown:])
    log_probs = trajectory.log_probs[:, -shown:]  # [L+1, n, V]
    rows = []
    for layer, row in enumerate(log_probs.argmax(-1)):
        chances = np.exp(np.take_along_axis(log_probs[layer], row[:, None], -1)[:, 0])
        cells = []
        for word, chance in zip(words_of(trajectory, row), chances, strict=True):
            fill, ink = colours(float(chance))
            cells.append(Text(f"{word} {chance:.2f}", style=f"{ink} on {fill}"))
        rows.append((_name(layer, len(log_probs)), cells))
    return _beside(Text("next word"), "behind", words, rows, width)


def error_tables(errors: Errors, words: Sequence[str], word: str, tokens: int, width: int) -> list[RenderableType]:
    """Sizes and surprisals of the last tokens' errors, and which errors moved the last prediction, ``word``, most."""
    shown = min(tokens, len(words))
    rows = []
    for layer, (sizes, nats) in enumerate(zip(errors.size, errors.surprisal, strict=True)):
        told = zip(sizes[-shown:], nats[-shown:], strict=True)
        rows.append((f"layer {layer}", [Text("" if np.isnan(n) else f"{s:.2f} ({n:.2f})") for s, n in told]))
    title = Text("size of the prediction error that each token revealed (nats of surprise under that layer)")
    moves = Table("layer", "error revealed by", "position", "logit")
    for layer, s, change in largest_moves(errors):
        moves.add_row(str(layer), Text(words[s]), str(s), f"{change:+.3f}")
    return [*_beside(title, "error at", words[-shown:], rows, width), Text(moved_title(errors, words, word)), moves]


def moved_title(errors: Errors, words: Sequence[str], word: str) -> str:
    """What the logit of ``word``, the model's next one, is made of."""
    written = f", {errors.written:+.3f} from MLPs" if errors.written else ""
    layers = " ".join(f"{change:+.3f}" for change in errors.moved.sum(1))
    return (
        f'what moved the logit (less the mean logit of all words) of the next word "{word}": {errors.moved.sum():+.3f} by '
        f"errors in all (by layer {layers}), {errors.start:+.3f} from the start{written}; behind {len(words)} tokens"
    )


def _beside(
    title: Text, corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]], width: int
) -> list[Table]:
    """A table of a column per token, cut into several where it is wider than ``width``: no cell is to lose its number."""
    wide = [max(Text(head).cell_len, *(cells[k].cell_len for _, cells in rows)) + 3 for k, head in enumerate(heads)]
    front = max(len(corner), *(len(name) for name, _ in rows)) + 4
    tables, start = [], 0
    while start < len(heads):
        end, used = start + 1, front + wide[start]
        while end < len(heads) and used + wide[end] <= width:
            used += wide[end]
            end += 1
        columns = (Column(Text(head), no_wrap=True) for head in heads[start:end])
        table = Table(Column(corner, no_wrap=True), *columns, title=None if start else title)
        for name, cells in rows:
            table.add_row(name, *cells[start:end])
        tables.append(table)
        start = end
    return tables


def _name(layer: int, layers: int) -> str:
    return f"layer {layer}" if layer < layers - 1 else "model"


def words_of(trajectory: PredictionTrajectory, ids: Iterable[int]) -> list[str]:
    """Tokens as they are shown: escapes for what is no printable character, nothing that cannot be seen."""
    tokenizer: Any = trajectory.tokenizer
    shown = []
    for token in map(int, ids):
        # Decoding leaves special tokens out, and rows of the head beyond the vocabulary have no name.
        word = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens([token])[0] or f"#{token}"
        shown.append(repr(word)[1:-1] if word.strip(" ") else "\u2423" * len(word))
    return shown


# As a page
def kl_to_model(trajectory: PredictionTrajectory) -> NDArray[np.float64]:
    """``KL(p_final || q_layer)`` at each layer and token, nats ``[L+1, n]``."""
    log_p = trajectory.log_probs[-1].astype(np.float64)
    with np.errstate(invalid="ignore"):  # of a word that cannot come, which counts nothing
        return np.stack([_mean_of(log_p, log_p - log_q) for log_q in trajectory.log_probs])


def entropies(trajectory: PredictionTrajectory) -> NDArray[np.float64]:
    """Entropy of what each layer predicts behind each token, nats ``[L+1, n]``."""
    # tuned-lens's own are the same, but NaN where a word cannot come; and it names ten words of each on the way.
    return np.stack([_mean_of(log_q, -log_q.astype(np.float64)) for log_q in trajectory.log_probs])


def _mean_of(log_p: NDArray[Any], value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean ``[n]`` of ``value`` ``[n, V]`` under ``p``; what cannot come counts nothing, even where it is infinite."""
    p = np.exp(log_p.astype(np.float64))
    mean: NDArray[np.float64] = np.multiply(p, value, out=np.zeros_like(p), where=p > 0).sum(-1)
    return mean


def _most_probable(log_probs: NDArray[np.float32]) -> NDArray[np.intp]:
    """The :data:`MOST` most probable of ``[V]``, the first of equals first."""
    most = min(MOST, len(log_probs))
    best = np.sort(np.argpartition(-log_probs, most - 1)[:most])
    return best[np.argsort(-log_probs[best], kind="stable")]


def trace_page(
    trajectory: PredictionTrajectory,
    *,
    title: str,
    errors: Errors | None = None,
    ids: Sequence[int] = (),
    note: str | None = None,
) -> str:
    """The trajectory as one HTML page that asks for nothing: hover or focus a cell for its ten most probable words.

    ``errors`` of the text with token ids ``ids`` (all of it) are shown below, or the ``note`` that says why there are none.
    """
    log_probs = trajectory.log_probs
    entropy, kl = entropies(trajectory), kl_to_model(trajectory)
    words = words_of(trajectory, trajectory.input_ids)
    rows = []
    for layer in reversed(range(len(log_probs))):  # the model itself on top
        cells = []
        for at in range(log_probs.shape[1]):
            best = _most_probable(log_probs[layer, at])
            names, chances = words_of(trajectory, best), np.exp(log_probs[layer, at, best])
            lines = [f"{name}  {chance:.3f}" for name, chance in zip(names, chances, strict=True)]
            tip = f"{_name(layer, len(log_probs))} behind {words[at]}\n" + "\n".join(lines)
            tip += f"\nentropy {entropy[layer, at]:.3f} nats\nKL to the model {kl[layer, at]:.3f} nats"
            fill, ink = colours(float(chances[0]))
            cells.append(_cell(names[0], tip, fill, ink))
        rows.append(f'<tr><th scope="row">{_name(layer, len(log_probs))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_text(w)}</th>' for w in words)
    key = "".join(
        f'<span style="background:{fill};color:{ink}">{share:g}</span>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        for fill, ink in [colours(share)]
    )
    body = [
        f"<header><p class=soft>lensbench trace</p><h1>{_text(title)}</h1><p>Columns: the token read last. Rows: layers, "
        "the model itself on top. A cell is the most probable next token there; dark is certain. Hover or focus a cell for "
        "its ten most probable tokens, the entropy of its prediction and its KL from the model's own.</p>"
        f'<p class="soft key">probability {key}</p></header><main>',
        f"<div class=wide><table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    ]
    if errors is not None:
        told = words_of(trajectory, [errors.word])[0]
        body.append(_errors_html(errors, words_of(trajectory, ids), told, log_probs.shape[1]))
    elif note is not None:
        body.append(f"<h2>Prediction errors</h2><p>{_text(note)}.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        'initial-scale=1"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{STYLE}{OWN_STYLE}</style></head><body>{''.join(body)}</main>"
        f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _errors_html(errors: Errors, words: Sequence[str], word: str, shown: int) -> str:
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
            fill, ink = colours(float(errors.size[layer, s]) / largest)
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
        f"embeddings of rms 1.</p><div class=wide><table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}"
        f"</tbody></table></div><h2>Which errors moved the last prediction most</h2>"
        f"<p>{_text(moved_title(errors, words, word))}.</p>"
        f'<div class=wide><table id="moves"><thead><tr>{heads}</tr></thead><tbody>{moves}</tbody></table></div>'
    )


def _cell(word: str, tip: str, fill: str, ink: str) -> str:
    return f'<td class="cell" tabindex="0" data-tip="{_text(tip)}" style="background:{fill};color:{ink}">{_text(word)}</td>'


def _text(value: Any) -> str:
    # Lone surrogates, which a tokenizer of bytes may give, no file can hold.
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)
