"""Readable gain: a lower bound on the share of a cross-entropy gain that an earlier lens itself can read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.estimated import WORDS, Drawn, drawn_of, mended, worth_estimating
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.measures.update.folds import pseudo_inverse
from lensbench.measures.update.metric import Metric
from lensbench.measures.update.products import means_of
from lensbench.measures.update.stacking import NextTokens, stacked
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import log_partition, target_logits
from lensbench.streams.readout import ReadOut
from lensbench.streams.words import Words

FURTHER_PAIRS = 12
"""Pairs at most that are not of neighbours"""

DEV_TOKENS, HELD_OUT_TOKENS = 1024, 4096
"""Tokens at most that coefficients are fitted on, and that losses are measured on"""

EXACT_SHARE = 1 / 8
"""Share of the latter that get exact log-partitions: with half of it some intervals become visibly wider"""


@dataclass(frozen=True)
class Gains:
    """Cross-entropy gains of some pairs of layers over the base, summed by cluster: ``[clusters, Q]`` each, nats."""

    pairs: list[tuple[int, int]]
    """Positions (i, j) of the layers"""
    old: Array
    """Of what lens i reads at layer j"""
    new: Array
    """Of what lens j reads there"""
    tokens: Array
    """``[clusters]``"""


def chosen_pairs(count: int, most: int = FURTHER_PAIRS) -> list[tuple[int, int]]:
    """All neighbours among ``count`` layers, and at most ``most`` others, evenly spread."""
    neighbours = [(i, i + 1) for i in range(count - 1)]
    further = [(i, j) for i in range(count) for j in range(i + 2, count)]
    if len(further) > most:
        at = np.unique(np.linspace(0, len(further) - 1, most).round().astype(int))
        further = [further[k] for k in at]
    return sorted(neighbours + further)


@dataclass(frozen=True)
class _Reader:
    """The readings of one split: what the lenses of some layers read at any layer, token by token."""

    captured: Capture
    tokens: Tensor
    """Of the split, ``[n]``"""
    layers: Sequence[int]
    means: Tensor
    lenses: AffineMaps

    @classmethod
    def of(cls, captured: Capture, layers: Sequence[int], lenses: AffineMaps, most: int) -> "_Reader":
        tokens = (
            torch.linspace(0, len(captured) - 1, min(most, len(captured)), dtype=torch.float64).round().long().unique()
        )
        return cls(captured, tokens, layers, means_of(captured.states, layers), lenses.to(captured.states))

    def at(self, i: int, j: int) -> Tensor:
        """``z_ij = A_i (h_j - mean)``, ``[n, d]``."""
        states = self.captured.states[self.layers[j]][self.tokens]
        states = states - self.means[j].to(states)
        return torch.nn.functional.linear(states, self.lenses.matrix[i])

    def parts(self, i: int, j: int, discount: Tensor) -> dict[str, Tensor]:
        """The readings of base, old and new, each with its discounted copy: ``[n, 2, d]``."""
        discount = discount.to(self.captured.states)
        return {
            name: torch.stack([x, x @ discount.T], 1)
            for name, x in (("base", self.at(i, i)), ("old", self.at(i, j)), ("new", self.at(j, j)))
        }


def discount_of(metric: Metric, moments: Moments, lens: Tensor, i: int, j: int) -> Tensor:
    """``M = F^+ Cov(F r_i) Cov(F z_ij)^+ F`` ``[d, d]``: the shrinkage that the noise at j asks for.

    From second moments of the fitting tokens alone: it knows nothing of how h_j and the prediction go together.
    """
    maps = metric.factor @ lens.double().cpu()
    before, after = (maps @ moments.covariance[k] @ maps.T for k in (i, j))
    middle = before @ pseudo_inverse(after)
    discount: Tensor = torch.linalg.pinv(metric.factor) @ middle @ metric.factor
    return discount


@torch.no_grad()
def readable_gains(
    readout: ReadOut,
    dev: Capture,
    held_out: Capture,
    layers: Sequence[int],
    lenses: AffineMaps,
    moments: Moments,
    metric: Metric,
    pad: Tensor,
    cluster: Tensor,
    clusters: int,
    say: Callable[[str], None] = lambda _: None,
    further: int = FURTHER_PAIRS,
) -> Gains:
    """Gains in next-token cross-entropy of what lens i, and of what lens j, read at layer j over what lens i read at i.

    Three readings ``R(mean h_L + sum theta_k x_k + pad)``: base ``(r_i, M r_i)``, old with ``(z_ij, M z_ij)`` added, new
    with ``(r_j, M r_j)`` added, M of :func:`discount_of`. Coefficients, those that are added at least 0, and the length of
    the pad are fitted to next tokens on ``dev``. Stacking on r_i lets interference cost nothing, and the discount in the
    base gives nothing to old and new for undoing shrinkage. ``lenses`` and ``moments`` are those of ``layers``;
    ``cluster`` ``[N]`` numbers the cluster of each held-out token.
    """
    pairs = chosen_pairs(len(layers), further)
    on_dev = _Reader.of(dev, layers, lenses, DEV_TOKENS)
    there = _Reader.of(held_out, layers, lenses, HELD_OUT_TOKENS)
    centre, losses = moments.target_mean, _Losses.of(readout, there)
    following = NextTokens.of(readout, dev, on_dev.tokens, centre, pad)
    at = cluster[there.tokens].numpy()
    gains = {name: np.zeros((clusters, len(pairs))) for name in ("old", "new")}
    for number, (i, j) in enumerate(pairs):
        say(f"readable gain of layers {layers[i]} and {layers[j]}")
        discount = discount_of(metric, moments, lenses.matrix[i], i, j)
        fitting = {name: following.part(x) for name, x in on_dev.parts(i, j, discount).items()}
        measured = there.parts(i, j, discount)
        start = np.array([1.0, 0.0, 0.0])
        base = following.fitted([fitting["base"]], start)
        loss = losses.at(stacked([measured["base"]], centre, pad, torch.from_numpy(base)))
        for name, into in gains.items():
            both = [fitting["base"], fitting[name]]
            theta = following.fitted(both, np.array([*base[:2], 0.0, 0.0, base[2]]))
            other = losses.at(stacked([measured["base"], measured[name]], centre, pad, torch.from_numpy(theta)))
            np.add.at(into[:, number], at, (loss - other).numpy())
    return Gains(pairs, gains["old"], gains["new"], np.bincount(at, minlength=clusters).astype(float))


@dataclass(frozen=True)
class _Losses:
    """Next-token cross-entropies of the held-out tokens.

    Of a large vocabulary they are unbiased estimates: some words stand for all of them, and a sample of the tokens has
    exact values (:mod:`lensbench.lenses.estimated`). All readings share words and sample, so that gains stay paired.
    """

    readout: ReadOut
    targets: Tensor
    words: Words | None
    """None: all values are exact"""
    drawn: Drawn
    """The tokens with exact values"""

    @classmethod
    def of(cls, readout: ReadOut, reader: _Reader) -> "_Losses":
        targets, count = reader.captured.targets[reader.tokens], len(reader.tokens)
        drawn = drawn_of(count, EXACT_SHARE)
        if drawn >= count or not worth_estimating(len(readout.weight)):
            return cls(readout, targets, None, Drawn(torch.arange(count), 1.0))
        generator = torch.Generator().manual_seed(0)
        words = Words.draw(readout, reader.captured.mean_p, WORDS, generator)
        at = torch.randperm(count, generator=generator)[:drawn].sort().values
        return cls(readout, targets, words, Drawn(at, drawn / count))

    def at(self, x: Tensor) -> Tensor:
        """Of readings ``[n, d]`` in the place of the final state: float64 ``[n]``."""
        n = self.readout.final_norm(x)
        aim = target_logits(self.readout, n, self.targets)
        if self.words is None:
            return (log_partition(self.readout, n) - aim).double().cpu()
        exact = log_partition(self.readout, n[self.drawn.at])
        cheap = self.words.partition_and_largest(n)[0]
        return (mended(cheap[None], exact[None], self.drawn)[0] - aim.double()).cpu()
