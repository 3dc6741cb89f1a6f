"""What every layer predicts next in one text, through any lens: tuned-lens's trajectory, for any model."""

from pathlib import Path

import numpy as np
import torch
from rich.table import Column, Table
from tuned_lens.nn.lenses import Lens, LogitLens
from tuned_lens.plotting import PredictionTrajectory

from lensbench.corpus import Document, tokenize
from lensbench.errors import LensbenchError
from lensbench.lenses import SharedLens, load_tuned_lens, prediction_trajectory
from lensbench.models.pretrained import Pretrained, check_context, check_ids
from lensbench.stream import ResidualStream


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


def traced(loaded: Pretrained, text: str, lens: str | None = None, last: int | None = None) -> PredictionTrajectory:
    """The trajectory of ``text``, behind the beginning-of-text token, under a lens named as in :func:`load_lens`.

    The model reads all of the text; with ``last`` only the states of so many tokens at its end are read out.

    Raises :class:`LensbenchError` for an empty text and one beyond the model's context.
    """
    encoded = tokenize(loaded.tokenizer, [Document("text", text)])
    if not encoded:
        raise LensbenchError("the text is empty: give one that has a token")
    ids = torch.from_numpy(encoded[0].ids.astype(np.int64))
    check_context(loaded.source, loaded.model.config, len(ids), "give a text of at most {} tokens")
    check_ids(loaded.source, ids, loaded.model.config.get_text_config().vocab_size)
    stream = ResidualStream(loaded.model)
    return prediction_trajectory(load_lens(stream, lens), stream, ids, loaded.tokenizer, last=last)


def trace_table(trajectory: PredictionTrajectory, tokens: int) -> Table:
    """Per layer (the model itself last) its most probable next word behind each of the last ``tokens`` tokens."""
    shown = min(tokens, trajectory.num_tokens)
    words = _readable(trajectory, np.asarray(trajectory.input_ids[-shown:]))
    table = Table(Column("behind", no_wrap=True), *(Column(word, no_wrap=True) for word in words), title="next word")
    log_probs = trajectory.log_probs[:, -shown:]  # [L+1, n, V]
    best = log_probs.argmax(-1)
    for layer, row in enumerate(best):
        name = f"layer {layer}" if layer < len(best) - 1 else "model"
        chances = np.exp(np.take_along_axis(log_probs[layer], row[:, None], -1)[:, 0])
        cells = [f"{w} {p:.2f}" for w, p in zip(_readable(trajectory, row), chances, strict=True)]
        table.add_row(name, *cells)
    return table


def _readable(trajectory: PredictionTrajectory, ids: np.ndarray) -> list[str]:
    tokenizer = trajectory.tokenizer
    assert tokenizer is not None
    return [repr(tokenizer.decode([int(i)]))[1:-1].replace("[", r"\[") for i in ids]
