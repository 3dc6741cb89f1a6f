"""A trace as one HTML page that asks for nothing outside itself: hover or focus a cell for its most probable words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tuned_lens.plotting import PredictionTrajectory

from lensbench.report.render import render, shade
from lensbench.report.trace import Growth, block_name, layer_name, next_words, words_of
from lensbench.report.trace_errors import PredictionErrors, largest_moves, moved_title

ADDED = "PuOr"
"""The colours of what blocks add: purple is more, orange less"""

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
    hit: bool = False
    """Whether it is the true next token of the text"""


@dataclass(frozen=True)
class ErrorRows:
    """Prediction errors on the page: cells by layer (None: nothing was revealed), the largest moves, and their title."""

    heads: list[str]
    rows: list[tuple[str, list[ColouredCell | None]]]
    moves: list[tuple[int, str, int, float]]
    title: str


@dataclass(frozen=True)
class TracedText:
    """One text of a page: its trajectory, how its predictions grow, and the errors of a predictive-coding model.

    ``ids``: of all its tokens. ``note``: why there are no errors.
    """

    text: str
    trajectory: PredictionTrajectory
    growth: Growth | None = None
    errors: PredictionErrors | None = None
    ids: Sequence[int] = ()
    note: str | None = None


def trace_page(texts: Sequence[TracedText], *, title: str) -> str:
    """Trajectories as one HTML page."""
    content = render(
        "trace.html",
        title=title,
        texts=[page_text(one, place) for place, one in enumerate(texts)],
        key=[(share, *shade(share)) for share in (0, 0.25, 0.5, 0.75, 1)],
    )
    return f"{content}\n"


def page_text(one: TracedText, place: int) -> dict[str, Any]:
    """What the template shows of one text; ``place``: its number on the page."""
    trajectory, growth = one.trajectory, one.growth
    return {
        "place": place,
        "text": one.text,
        "heads": words_of(trajectory, trajectory.input_ids),
        "next": next_words(trajectory),
        "targets": words_of(trajectory, np.asarray(trajectory.targets)),
        "rows": prediction_rows(trajectory),
        "growth": [] if growth is None else growth_rows(trajectory, growth),
        "fixed": growth is not None and growth.fixed,
        "errors": None if one.errors is None else error_rows(trajectory, one.errors, one.ids),
        "note": one.note,
    }


def levels(targets: Sequence[str], nats: NDArray[np.float64], where: str) -> list[ColouredCell | None]:
    """Cells of the log-probability of each target, without a colour."""
    return [
        ColouredCell(f"{x:.2f}", f"{word}\nlog-probability {where}: {x:.3f} nats", "", "")
        for word, x in zip(targets, nats, strict=True)
    ]


def growth_rows(trajectory: PredictionTrajectory, growth: Growth) -> list[tuple[str, list[ColouredCell | None]]]:
    """What each block adds to the log-probability of each next token, and how much of it in place."""
    targets = words_of(trajectory, np.asarray(trajectory.targets))
    largest = float(np.abs(growth.added).max(initial=0.0)) or 1.0
    rows = [("layer 0", levels(targets, growth.start, "at layer 0"))]
    for block, added in enumerate(growth.added):
        name = block_name(block, len(growth.added))
        cells: list[ColouredCell | None] = []
        for at, nats in enumerate(added):
            tip = [f"{targets[at]}, {name}", f"adds {nats:+.3f} nats"]
            text = f"{nats:+.2f}"
            if block < len(growth.in_place) and not growth.fixed:
                tip.append(f"of them in place {growth.in_place[block, at]:+.3f}")
                text += f" ({growth.in_place[block, at]:+.2f})"
            cells.append(ColouredCell(text, "\n".join(tip), *shade(0.5 + 0.4 * float(nats) / largest, ADDED)))
        rows.append((name, cells))
    rows.append(("model", levels(targets, growth.start + growth.added.sum(0), "of the model")))
    return rows


def prediction_rows(trajectory: PredictionTrajectory) -> list[tuple[str, list[ColouredCell]]]:
    """Rows of cells, one per layer with the model itself at the end, one cell per token."""
    entropy, kl = entropies(trajectory), kl_to_model(trajectory)
    after = words_of(trajectory, trajectory.input_ids)
    rows = []
    true = next_words(trajectory)
    targets = np.asarray(trajectory.targets)
    for layer, log_probs in enumerate(trajectory.log_probs):
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
            hit = False
            if true[at]:
                hit = int(best[0]) == int(targets[at])
                rank = int((log_q > log_q[targets[at]]).sum()) + 1
                tip.append(f"next in the text: {true[at]}, number {rank}, {float(np.exp(log_q[targets[at]])):.3f}")
            cells.append(ColouredCell(words[0], "\n".join(tip), *shade(float(chances[0])), hit))
        rows.append((name, cells))
    return rows


def error_rows(trajectory: PredictionTrajectory, errors: PredictionErrors, ids: Sequence[int]) -> ErrorRows:
    """Sizes and surprisals of the errors of the tokens on the page, what each moved, and the largest moves of all."""
    words = words_of(trajectory, ids)
    shown = range(len(words) - trajectory.num_tokens, len(words))
    largest = float(np.nanmax(errors.size)) or 1.0
    rows = [
        (f"layer {layer}", [error_cell(errors, layer, s, words[s], largest) for s in shown])
        for layer in range(len(errors.size))
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
