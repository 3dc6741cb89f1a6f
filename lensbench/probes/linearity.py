"""How linear is the step from a layer to the next one, with the residual part and without it?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.moments import MOMENT_BLOCK, MomentSums
from lensbench.measures.update.folds import pseudo_inverse
from lensbench.probes.catalogue import ANYWHERE, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.statistics import Array
from lensbench.streams.kl import sum_by_window

NAME = "linearity"

LOUD = 0.99
"""Quantile of the lengths of fitting states above which a token is loud"""

NO_RESIDUAL = "undefined: in random bases of two layers the residual part is no difference of states"

NO_CHANGE = "undefined: nothing changes from token to token"


def linearity(subject: Subject) -> Measured:
    """Share of the next layer's state that a linear map of this one explains, on held-out tokens.

    The linearity score of arXiv 2405.12250 is ``1 - min_A |X A - Y|^2`` of centred states X, Y of length 1 (all tokens
    together): R2 of least squares. Here A is fitted on the fitting tokens, without a ridge, and scored on others. The same
    A, less the identity, is least squares of what the block adds: its residuals are the same, and the score without the
    residual part divides them by another variance. "Unchanged" is the score of ``A = I``: what h_l+1 = h_l explains.

    A few tokens with large states hold most of the variance of a layer. "Quiet" scores leave out, in fitting and scoring,
    those whose next state is longer than 99 % of the fitting tokens' states.
    """
    scored, layers = subject.eval, subject.stream.layers
    sums = Sums(NAME, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    found: dict[str, list[tuple[Array, Array]]] = {}
    named = f"{NAME}-{subject.name}" if subject.name else NAME
    with subject.progress.task(named, layers, "layers") as task:
        for layer in range(layers):
            for name, ratio in scores_of(subject, layer):
                found.setdefault(name, []).append(ratio)
                sums.add(name, *ratio, layer=layer)
            task.update(layer + 1)
    for name in SCORES:
        if name not in found:
            for layer in range(layers):
                sums.undefined(name, NO_RESIDUAL, layer=layer)
        some = [(top, bottom) for top, bottom in found.get(name, []) if bottom.sum() > 0]
        if some:
            sums.add(f"{name}_mean", mean_of_ratios(some, sums.tokens))
        else:
            sums.undefined(f"{name}_mean", NO_CHANGE if name in found else NO_RESIDUAL)
    return sums.measured()


def scores_of(subject: Subject, layer: int) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Name -> what is explained, and the whole, by window ``[S]``, of the step from a layer to the next."""
    x, y = subject.fit.states[layer], subject.fit.states[layer + 1]
    held_x, held_y = (subject.eval.states[k].double().cpu() for k in (layer, layer + 1))
    length = lengths(y, y.mean(0, dtype=torch.float64))
    loudest = length.quantile(LOUD)
    for ending, rows in (("", length.new_ones(len(y), dtype=torch.bool)), ("_quiet", length <= loudest)):
        step = Step.of(x, y, rows)
        error, whole, change = step.squares(held_x, held_y)
        among = torch.ones_like(whole)
        if ending:
            among = (lengths(held_y, y.mean(0, dtype=torch.float64)) <= loudest).double()
        left, total, changed = (sum_by_window(values * among, subject.eval) for values in (error, whole, change))
        yield f"{NAME}{ending}", (total - left, total)
        if subject.rotated:
            continue
        yield f"{NAME}_block{ending}", (changed - left, changed)
        yield f"{NAME}_unchanged{ending}", (total - changed, total)


def lengths(states: Tensor, mean: Tensor) -> Tensor:
    """Length of each of some states ``[N, d]`` less a mean ``[d]``: float64 ``[N]`` on the CPU."""
    found: Tensor = torch.linalg.vector_norm(states.double().cpu() - mean.cpu(), dim=1)
    return found


@dataclass(frozen=True)
class Step:
    """Least squares of a layer's state on the one before it, float64 on the CPU."""

    matrix: Tensor
    """A ``[d, d]``"""
    mean: Tensor
    """Of the inputs ``[d]``"""
    target_mean: Tensor
    """``[d]``"""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, rows: Tensor) -> "Step":
        """Of y on x, each ``[N, d]``, over some tokens (mask ``[N]``)."""
        sums, at = MomentSums(), rows.nonzero()[:, 0].to(x.device)
        for some in at.split(MOMENT_BLOCK):
            sums.add(torch.stack([x[some], y[some]]))
        moments = sums.moments()
        matrix = moments.cross[0].cpu() @ pseudo_inverse(moments.covariance[0].cpu())
        return cls(matrix, moments.mean[0].cpu(), moments.target_mean.cpu())

    def squares(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared lengths ``[N]`` of y less what A makes of x, of y, and of ``y - x``; all less their fitting means."""
        x, y = x - self.mean, y - self.target_mean
        error, change = y - x @ self.matrix.T, y - x
        return error.square().sum(1), y.square().sum(1), change.square().sum(1)


def mean_of_ratios(ratios: list[tuple[Array, Array]], tokens: Array) -> Array:
    """Values ``[S]`` whose sum by the number of tokens is the mean of some ratios, and varies as that mean does.

    Each ratio r = sum t / sum b stands for ``r n + N (t - r b) / sum b`` in a window of n of all N tokens: its value in
    first order around the whole text (delta method), so that a bootstrap over windows gives the mean's interval.
    """
    total, count = np.zeros(len(tokens)), tokens.sum()
    for top, bottom in ratios:
        ratio = top.sum() / bottom.sum()
        total += ratio * tokens + count * (top - ratio * bottom) / bottom.sum()
    mean: Array = total / len(ratios)
    return mean


SCORES = {
    f"{NAME}{part}{ending}": (f"{label}{', no loud tokens' if ending else ''}", formula, reading)
    for ending in ("", "_quiet")
    for part, label, formula, reading in (
        (
            "", "linearity to the next layer",
            "1 - E |y - A x|^2 / E |y|^2; x: `h_l`, y: `h_l+1`, less their fitting means; A: least squares on other text",
            "Published: 0.99. Compare with the score of no change at all.",
        ),
        (
            "_block", "the same without the residual part",
            "1 - E |y - A x|^2 / E |y - x|^2: of what the block adds",
            "What a linear map explains of the block itself; published: less than with the residual part.",
        ),
        (
            "_unchanged", "the same of no change",
            "1 - E |y - x|^2 / E |y|^2: A is the identity",
            "How much of the linearity says only that a block adds little.",
        ),
    )
}  # fmt: skip
"""Quantity -> label, formula and reading, of a layer and of the mean over layers"""

OF_QUIET = "; without tokens whose next state is longer than 99 % of the fitting tokens' ones"


def quantities() -> Iterator[Quantity]:
    """All quantities: each score at every layer, and its mean over layers."""
    for name, (label, formula, reading) in SCORES.items():
        quiet = OF_QUIET if name.endswith("_quiet") else ""
        panel = Panel("layer", "R2 of the next layer", null=f"{NAME}_unchanged") if name == NAME else None
        yield Quantity(name, label, formula + quiet, "layer", reading, ANYWHERE, panel=panel)
        yield Quantity(f"{name}_mean", f"{label}, mean", f"mean of `{name}` over layers", "model", reading, ANYWHERE)


LINEARITY = Probe(
    NAME,
    linearity,
    "per layer, how much of the next layer's state a linear map of this one explains, with and without the residual part",
    tuple(quantities()),
    images=True,
    control="the score of no change at all; the same without loud tokens",
    topic="linear steps between layers",
)
