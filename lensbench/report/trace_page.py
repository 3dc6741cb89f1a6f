"""A trace as one HTML page that asks for nothing outside itself: hover or focus a cell for its most probable words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tuned_lens.plotting import PredictionTrajectory

from lensbench.report.render import render, shade
from lensbench.report.trace import layer_name, words_of
from lensbench.report.trace_errors import PredictionErrors, largest_moves, moved_title

MOST_WORDS = 10
"""Words that the tip of a cell names."""


def kl_to_model(trajectory: PredictionTrajectory) -> NDArray[np.float64]:
    """``KL(p_final || q_layer)`` at each layer and token, nats ``[L+1, n]``."""
    log_p = trajectory.log_probs[-1].astype(np.float64)
    with np.errstate(invalid="ignore"):  # of a word that cannot come, which counts nothing
        return np.stack([_mean_of(log_p, log_p - log_q) for log_q in trajectory.log_probs])


def entropies(trajectory: PredictionTrajectory) -> NDArray[np.float64]:
    """Entropy of what each layer predicts after each token, nats ``[L+1, n]``."""
    # tuned-lens's own are the same, but NaN where a word cannot come; and it looks up ten words of each.
    return np.stack([_mean_of(log_q, -log_q.astype(np.float64)) for log_q in trajectory.log_probs])


def _mean_of(log_p: NDArray[Any], value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean ``[n]`` of ``value`` ``[n, V]`` under ``p``; what cannot come counts nothing, even where it is infinite."""
    p = np.exp(log_p.astype(np.float64))
    mean: NDArray[np.float64] = np.multiply(p, value, out=np.zeros_like(p), where=p > 0).sum(-1)
    return mean


def _most_probable(log_probs: NDArray[np.float32]) -> NDArray[np.intp]:
    """The :data:`MOST_WORDS` most probable of ``[V]``, the first of equals first."""
    most = min(MOST_WORDS, len(log_probs))
    best = np.sort(np.argpartition(-log_probs, most - 1)[:most])
    return best[np.argsort(-log_probs[best], kind="stable")]


@dataclass(frozen=True)
class ColouredCell:
    """A cell of a page's table: its text, its tip, and the colours of the cell and of its text."""

    text: str
    tip: str
    fill: str
    ink: str


@dataclass(frozen=True)
class ErrorRows:
    """Prediction errors on the page: cells by layer (None: nothing was revealed), the largest moves, and their title."""

    heads: list[str]
    rows: list[tuple[str, list[ColouredCell | None]]]
    moves: list[tuple[int, str, int, float]]
    title: str


def trace_page(
    trajectory: PredictionTrajectory,
    *,
    title: str,
    errors: PredictionErrors | None = None,
    ids: Sequence[int] = (),
    note: str | None = None,
) -> str:
    """The trajectory as one HTML page.

    ``errors`` of the text with token ids ``ids`` (all of it) are shown below, or the ``note`` that says why there are none.
    """
    content = render(
        "trace.html",
        title=title,
        heads=words_of(trajectory, trajectory.input_ids),
        rows=prediction_rows(trajectory),
        key=[(share, *shade(share)) for share in (0, 0.25, 0.5, 0.75, 1)],
        errors=None if errors is None else error_rows(trajectory, errors, ids),
        note=note,
    )
    return f"{content}\n"


def prediction_rows(trajectory: PredictionTrajectory) -> list[tuple[str, list[ColouredCell]]]:
    """Rows of cells, one per layer with the model itself on top, one cell per token."""
    entropy, kl = entropies(trajectory), kl_to_model(trajectory)
    after = words_of(trajectory, trajectory.input_ids)
    rows = []
    for layer, log_probs in reversed(list(enumerate(trajectory.log_probs))):
        name = layer_name(layer, len(trajectory.log_probs))
        cells = []
        for at, log_q in enumerate(log_probs):
            best = _most_probable(log_q)
            words, chances = words_of(trajectory, best), np.exp(log_q[best])
            tip = [
                f"{name} after {after[at]}",
                *(f"{word}  {chance:.3f}" for word, chance in zip(words, chances, strict=True)),
                f"entropy {entropy[layer, at]:.3f} nats",
                f"KL to the model {kl[layer, at]:.3f} nats",
            ]
            cells.append(ColouredCell(words[0], "\n".join(tip), *shade(float(chances[0]))))
        rows.append((name, cells))
    return rows


def error_rows(trajectory: PredictionTrajectory, errors: PredictionErrors, ids: Sequence[int]) -> ErrorRows:
    """Sizes and surprisals of the errors of the tokens on the page, what each moved, and the largest moves of all."""
    words = words_of(trajectory, ids)
    shown = range(len(words) - trajectory.num_tokens, len(words))
    largest = float(np.nanmax(errors.size)) or 1.0
    rows = [
        (f"layer {layer}", [error_cell(errors, layer, s, words[s], largest) for s in shown])
        for layer in reversed(range(len(errors.size)))
    ]
    moves = [(layer, words[s], s, change) for layer, s, change in largest_moves(errors)]
    title = moved_title(errors, words, words_of(trajectory, [errors.word])[0])
    return ErrorRows([words[s] for s in shown], rows, moves, title)


def error_cell(errors: PredictionErrors, layer: int, s: int, word: str, largest: float) -> ColouredCell | None:
    """The error that token ``s``, ``word``, revealed to a layer; None where there was no prediction of it."""
    size, surprisal, moved = errors.size[layer, s], errors.surprisal[layer, s], errors.moved[layer, s]
    if np.isnan(surprisal):
        return None
    tip = (
        f"layer {layer}: error revealed by {word}\nsize {size:.3f}\nsurprise {surprisal:.3f} nats\n"
        f"moved the last prediction's logit by {moved:+.4f}"
    )
    return ColouredCell(f"{size:.2f}", tip, *shade(float(size) / largest))
