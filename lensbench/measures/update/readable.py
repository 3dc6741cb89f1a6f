"""Readable gain: a lower bound on the share of a cross-entropy gain that an earlier lens itself can read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lensbench.lenses.estimated import Drawn, mended, usually_drawn, worth_estimating
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.refine import LogPartition
from lensbench.measures.update.folds import pseudo_inverse
from lensbench.measures.update.metric import Metric
from lensbench.measures.update.products import means_of
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import Vocabulary, log_partition
from lensbench.streams.readout import ReadOut
from lensbench.streams.words import Words

FURTHER_PAIRS = 12
"""Pairs at most that are not of neighbours"""

DEV_TOKENS, HELD_OUT_TOKENS = 1024, 4096
"""Tokens at most that coefficients are fitted on, and that losses are measured on"""

WORDS = 4096
"""Rows of the unembedding that stand for all words while coefficients are fitted"""


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
    words, losses = _Words.of(readout, dev, on_dev.tokens), _Losses.of(readout, there)
    centre = moments.target_mean
    at = cluster[there.tokens].numpy()
    gains = {name: np.zeros((clusters, len(pairs))) for name in ("old", "new")}
    for number, (i, j) in enumerate(pairs):
        say(f"readable gain of layers {layers[i]} and {layers[j]}")
        discount = discount_of(metric, moments, lenses.matrix[i], i, j)
        fitting, measured = on_dev.parts(i, j, discount), there.parts(i, j, discount)
        start = np.array([1.0, 0.0, 0.0])
        base = words.fitted([fitting["base"]], centre, pad, start)
        loss = losses.at(_state([measured["base"]], centre, pad, torch.from_numpy(base)))
        for name, into in gains.items():
            both = [fitting["base"], fitting[name]]
            theta = words.fitted(both, centre, pad, np.array([*base[:2], 0.0, 0.0, base[2]]))
            other = losses.at(_state([measured["base"], measured[name]], centre, pad, torch.from_numpy(theta)))
            np.add.at(into[:, number], at, (loss - other).numpy())
    return Gains(pairs, gains["old"], gains["new"], np.bincount(at, minlength=clusters).astype(float))


def _state(parts: Sequence[Tensor], centre: Tensor, pad: Tensor, theta: Tensor) -> Tensor:
    """``mean h_L + sum theta_k x_k + pad`` ``[n, d]``; the last of ``theta`` is the length of the pad."""
    x = torch.cat(list(parts), 1)
    return centre.to(x) + torch.einsum("nkd,k->nd", x, theta[:-1].to(x)) + theta[-1].to(x) * pad.to(x)


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
        drawn = usually_drawn(count)
        if drawn >= count or not worth_estimating(len(readout.weight)):
            return cls(readout, targets, None, Drawn(torch.arange(count), 1.0))
        generator = torch.Generator().manual_seed(0)
        words = Words.draw(readout, reader.captured.mean_p, WORDS, generator)
        at = torch.randperm(count, generator=generator)[:drawn].sort().values
        return cls(readout, targets, words, Drawn(at, drawn / count))

    def at(self, x: Tensor) -> Tensor:
        """Of readings ``[n, d]`` in the place of the final state: float64 ``[n]``."""
        n = self.readout.final_norm(x)
        aim = _target_logits(self.readout, n, self.targets)
        if self.words is None:
            return (log_partition(self.readout, n) - aim).double().cpu()
        exact = log_partition(self.readout, n[self.drawn.at])
        cheap = self.words.partition_and_largest(n)[0]
        return (mended(cheap[None], exact[None], self.drawn)[0] - aim.double()).cpu()


def _target_logits(readout: ReadOut, n: Tensor, targets: Tensor) -> Tensor:
    logit = (readout.weight[targets] * n).sum(-1)
    if readout.bias is not None:
        logit = logit + readout.bias[targets]
    cap = readout.softcap
    return logit if cap is None else cap * torch.tanh(logit / cap)


@dataclass(frozen=True)
class _Words:
    """The cross-entropy that coefficients are fitted to: exact, or with some rows of the unembedding for all words."""

    readout: ReadOut
    targets: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, readout: ReadOut, dev: Capture, tokens: Tensor) -> "_Words":
        sample = Vocabulary(readout, dev.mean_p, WORDS, torch.Generator().manual_seed(0))
        weight, bias = sample.draw()
        return cls(readout, dev.targets[tokens], weight, bias)

    def fitted(self, parts: Sequence[Tensor], centre: Tensor, pad: Tensor, start: Array) -> Array:
        """The coefficients of least loss; those of parts after the first are at least 0."""
        count = 2 * len(parts)
        bounds = [(None, None)] * 2 + [(0.0, None)] * (count - 2) + [(None, None)]
        # Steps are taken where all coefficients move the state alike: their parts may differ in length by far.
        length = self._lengths(parts, pad)

        def loss(scaled: Array) -> tuple[float, Array]:
            with torch.enable_grad():
                free = torch.tensor(scaled / length, requires_grad=True)
                value = self._loss(_state(parts, centre, pad, free))
                (slope,) = torch.autograd.grad(value, free)
            return float(value.detach()), slope.double().numpy() / length

        found: Array = minimize(
            loss, start * length, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40, "ftol": 1e-6}
        ).x
        return found / length

    def _lengths(self, parts: Sequence[Tensor], pad: Tensor) -> Array:
        """How far a coefficient of 1 moves the state, by the read-out's gain: root mean squares in units of the first."""
        gain = self.readout.gain(len(pad))
        moved = [*torch.cat(list(parts), 1).unbind(1), pad[None].to(parts[0])]
        if gain is not None:
            moved = [x @ gain.T.to(x) for x in moved]
        squares = np.array([float(x.double().square().sum(-1).mean()) for x in moved])
        length: Array = np.sqrt(np.maximum(squares / (squares[0] or 1.0), 1e-24))
        return length

    def _loss(self, x: Tensor) -> Tensor:
        n = self.readout.final_norm(x)
        if (cap := self.readout.softcap) is None:
            log_z: Tensor = LogPartition.apply(n, self.weight, self.bias)  # type: ignore[no-untyped-call]
        else:
            log_z = (cap * torch.tanh(torch.nn.functional.linear(n, self.weight, self.bias) / cap)).logsumexp(-1)
        mean: Tensor = (log_z - _target_logits(self.readout, n, self.targets)).double().mean()
        return mean
