"""Centred second moments of a stream, layer by layer, from which every closed form follows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lensbench.lenses.algebra import algebra_device, ridge_unit
from lensbench.lenses.room import IN_MEMORY, Room
from lensbench.runtime.mapped import give_back_pages
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture
from lensbench.streams.gram import add_gram_
from lensbench.streams.rotated import RotatedView

MOMENT_BLOCK = 4096

KEPT_TARGETS = 2**28
"""Bytes of float64 that the targets of all regressions may take in memory; larger ones are made again for each layer"""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Moments:
    """Centred second moments of K regressions from ``[d]`` to ``[d]``, float64 on the CPU, in memory or mapped from a file.

    ``covariance`` ``[K, d, d]`` of the input, ``cross`` ``[K, d, d]`` = E (r - rbar)(h - hbar)^T, ``mean`` ``[K, d]`` of the
    input, ``target_mean`` ``[d]``.
    """

    mean: Tensor
    covariance: Tensor
    cross: Tensor
    target_mean: Tensor
    device: torch.device = CPU
    """Where regressions are solved"""
    units: dict[int, float] = field(default_factory=dict, repr=False)
    """Units that are known, which the regressions of some layers share with those of all"""
    numbers: tuple[int, ...] | None = None
    """Keys of these regressions in ``units``; 0..K-1 if left out"""

    @classmethod
    def of(cls, captured: Capture, token_weights: Tensor | None = None, room: Room = IN_MEMORY) -> "Moments":
        """One regression per layer 0..L-1, to h_L; ``token_weights`` ``[N]`` resample the tokens. Of all processes.

        ``room`` makes what the matrices of all layers lie in; beyond it this takes a few matrices ``[d, d]``.
        """
        return cls.at(captured, range(captured.layers), torch.arange(len(captured)), token_weights, room)

    @classmethod
    def at(
        cls,
        captured: Capture,
        rows: Sequence[int],
        tokens: Tensor,
        token_weights: Tensor | None = None,
        room: Room = IN_MEMORY,
    ) -> "Moments":
        """Regressions from the states ``rows`` (0..L) to h_L, of tokens ``[n]`` with ``token_weights`` ``[n]``."""
        ranks, device, d = captured.ranks, captured.states.device, captured.states.shape[-1]
        if token_weights is not None:  # of documents drawn with replacement a third is left out
            drawn = token_weights != 0
            tokens, token_weights = tokens[drawn], token_weights[drawn]
        weights = itertools.repeat(None) if token_weights is None else token_weights.to(device).split(MOMENT_BLOCK)
        parts = [part.to(device) for part in tokens.split(MOMENT_BLOCK)]
        blocks = [WeightedBlock.of(len(part), own) for part, own in zip(parts, weights, strict=False)]

        def states(row: int) -> Iterator[Tensor]:
            return (captured.states[row][part] for part in parts)

        def shift_of(row: int) -> Tensor:
            shift = ranks.told(next(states(row)).mean(0, dtype=torch.float64).cpu())
            return shift.nan_to_num().to(device)  # NaN where the first process has no token

        to_target = shift_of(-1)

        def targets() -> Iterator[Tensor]:
            return (block.centred(h, to_target) for block, h in zip(blocks, states(-1), strict=True))

        kept = list(targets()) if 8 * len(tokens) * d <= KEPT_TARGETS else None
        covariance, cross = room((len(rows), d, d)), room((len(rows), d, d))
        means = []
        for k, row in enumerate(rows):
            shift = shift_of(row)
            sums = MomentSums(ranks, torch.stack([shift, to_target]))
            for block, h, target in zip(blocks, states(row), kept or targets(), strict=True):
                sums.take(block, [block.centred(h, shift)], target)
            one = sums.moments()
            covariance[k], cross[k] = one.covariance[0], one.cross[0]
            means.append(one.mean[0])
            give_back_pages()
        return cls(torch.stack(means), covariance, cross, one.target_mean, one.device)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[K, d]`` and eigenvectors ``[K, d, d]`` of the covariances, found once."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    @property
    def repeated(self) -> bool:
        """Whether all regressions are the same but for the mean of the input."""
        return len(self.covariance) > 1 and self.covariance.stride(0) == 0 == self.cross.stride(0)

    def unit(self, regression: int) -> float:
        """The unit of a regression's ridge, found once: see :func:`lensbench.lenses.algebra.median_eigenvalue`."""
        k = 0 if self.repeated else regression
        key = k if self.numbers is None else self.numbers[k]
        if key not in self.units:
            self.units[key] = ridge_unit(self.covariance[k], self.device)
        return self.units[key]

    @classmethod
    def stack(cls, parts: "Sequence[Moments]") -> "Moments":
        """The regressions of several, one after the other; their target is the same."""
        return cls(
            torch.cat([p.mean for p in parts]),
            torch.cat([p.covariance for p in parts]),
            torch.cat([p.cross for p in parts]),
            parts[0].target_mean,
            parts[0].device,
        )

    def layer(self, rows: Sequence[int]) -> "Moments":
        """The regressions of some layers."""
        at = list(rows)
        keys = tuple(at) if self.numbers is None else tuple(self.numbers[k] for k in at)
        return replace(
            self, mean=self.mean[at], covariance=self.covariance[at], cross=self.cross[at], numbers=keys
        )  # fmt: skip

    def pooled(self, rows: Sequence[int]) -> "Moments":
        """One regression for several layers with equally many tokens: what a shared lens is fitted to."""
        return _pooled(self.mean, ((k, self.covariance[k], self.cross[k]) for k in rows), self)

    def pooled_within(self) -> "Moments":
        """One matrix for all layers, each layer's own mean: what a shared lens with a bias per layer is fitted to."""
        layers = len(self.mean)
        covariance, cross = self.covariance.mean(0), self.cross.mean(0)
        whole = covariance.expand(layers, -1, -1), cross.expand(layers, -1, -1)
        return Moments(self.mean, *whole, self.target_mean, self.device)

    def rotated(self, view: RotatedView) -> "Moments":
        """The moments of the rotated states, without rotating a state."""
        return RotatedMoments(self, view).layer(range(len(self.mean)))


def _pooled(means: Tensor, parts: Iterable[tuple[int, Tensor, Tensor]], like: Moments) -> Moments:
    """The regression of several layers together, from the number, the covariance and the cross moment of each."""
    covariance, cross = (torch.zeros(like.covariance.shape[1:], dtype=torch.float64, device=like.device) for _ in "ab")
    at = []
    for k, own, to_target in parts:
        covariance += own.to(like.device)
        cross += to_target.to(like.device)
        at.append(k)
    mean = means[at].mean(0)
    shift = means[at] - mean
    covariance = covariance.cpu().div_(len(at)).addmm_(shift.T, shift, alpha=1 / len(at))
    return Moments(mean[None], covariance[None], cross.cpu().div_(len(at))[None], like.target_mean, like.device)


@dataclass(frozen=True)
class RotatedMoments:
    """The moments of a rotated view, made layer by layer when they are asked for: ``Q C Q^T`` and ``C_rh Q^T``.

    A rotation leaves eigenvalues, so that each layer's ridge has the unit that it has without the view.
    """

    plain: Moments
    view: RotatedView
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Covariance and cross moment of layers that are asked for many times"""

    @cached_property
    def mean(self) -> Tensor:
        """``[L, d]``: Q_l times the mean of layer l."""
        return torch.stack([q.to(m) @ m for q, m in zip(self.view.maps, self.plain.mean, strict=True)])

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Covariance and cross moment of one layer, ``[d, d]`` each, where regressions are solved."""
        if layer in self.known:
            return self.known[layer]
        device = self.plain.device
        q = self.view.maps[layer].to(device, torch.float64)
        return q @ self.plain.covariance[layer].to(device) @ q.T, self.plain.cross[layer].to(device) @ q.T

    def know(self, layers: Sequence[int], room: Room) -> None:
        """Keep what these layers have in ``room``."""
        d = self.plain.mean.shape[-1]
        for layer in layers:
            kept = room((2, d, d))
            kept[0], kept[1] = self.of_layer(layer)
            self.known[layer] = kept[0], kept[1]

    def layer(self, rows: Sequence[int]) -> Moments:
        """The regressions of some layers."""
        at, plain = list(rows), self.plain
        covariances, crosses = zip(*(self.of_layer(k) for k in at), strict=True)
        # Known before, and so the same to the last digit whatever is asked for first.
        units = {number: plain.unit(layer) for number, layer in enumerate(at)}
        matrices = torch.stack(covariances).cpu(), torch.stack(crosses).cpu()
        return Moments(self.mean[at], *matrices, plain.target_mean, plain.device, units)

    def pooled(self, rows: Sequence[int]) -> Moments:
        """One regression for several layers: what the shared lens of the view is fitted to."""
        return _pooled(self.mean, ((k, *self.of_layer(k)) for k in rows), self.plain)


@dataclass(frozen=True)
class WeightedBlock:
    """The weights of n tokens, as what rows are multiplied by to have the second moments of weighted rows."""

    roots: Tensor | None
    """float64 ``[n]``; None where every token counts once"""
    weight: float
    """Their sum"""

    @classmethod
    def of(cls, count: int, token_weights: Tensor | None) -> "WeightedBlock":
        """Of ``token_weights`` ``[count]``."""
        if token_weights is None:
            return cls(None, float(count))
        own = token_weights.double()
        return cls(own.sqrt(), float(own.sum()))

    def centred(self, states: Tensor, shift: Tensor) -> Tensor:
        """States ``[n, d]`` around a shift ``[d]``, float64, each times its root."""
        h = states - shift  # float64, as the shift is: no conversion of its own
        return h if self.roots is None else h.mul_(self.roots[:, None])

    def summed(self, h: Tensor) -> Tensor:
        """The weighted sum ``[d]`` of centred states."""
        return h.sum(0) if self.roots is None else self.roots @ h


class MomentSums:
    """Sums from which :class:`Moments` follow, filled block by block: the stream is passed once and no state is kept.

    float64, around the first block's means, so that a large mean costs no digits. Those of several processes are taken
    around the first one's and added up at the end.
    """

    def __init__(self, ranks: Ranks = ALONE, shift: Tensor | None = None) -> None:
        self.ranks = ranks
        self.shift: Tensor | None = None  # [L+1, d]
        self.weight = 0.0
        self.first: Tensor  # [L+1, d]
        self.second: Tensor  # [L, d, d]
        self.cross: Tensor  # [L, d, d]
        if shift is not None:
            self._begin(shift)

    def _begin(self, shift: Tensor) -> None:
        layers, d = len(shift) - 1, shift.shape[1]
        self.shift, self.first = shift, torch.zeros_like(shift)
        self.second, self.cross = shift.new_zeros(layers, d, d), shift.new_zeros(layers, d, d)

    def add(self, states: Tensor, token_weights: Tensor | None = None) -> None:
        """Add states ``[L+1, n, d]``, weighted by ``token_weights`` ``[n]``."""
        if self.shift is None:
            self._begin(self.ranks.told(states.mean(1, dtype=torch.float64).cpu()).to(states.device))
        if token_weights is not None:
            drawn = (token_weights != 0).nonzero()[:, 0]  # of documents drawn with replacement a third is left out
            states, token_weights = states[:, drawn.to(states.device)], token_weights[drawn].to(states.device)
        block, shift = WeightedBlock.of(states.shape[1], token_weights), self.shift
        assert shift is not None
        inputs = (block.centred(h, own) for h, own in zip(states[:-1], shift, strict=False))
        self.take(block, inputs, block.centred(states[-1], shift[-1]))

    def take(self, block: "WeightedBlock", inputs: Iterable[Tensor], target: Tensor) -> None:
        """Add the centred states ``[n, d]`` of each layer, and those of the target."""
        self.first[-1] += block.summed(target)
        self.weight += block.weight
        for layer, h in enumerate(inputs):
            self.cross[layer].addmm_(target.T, h)
            add_gram_(self.second[layer], h)
            self.first[layer] += block.summed(h)

    def moments(self) -> Moments:
        """The centred moments, on the CPU.

        The sums are used up: of wide states they fill most of the memory, and a copy would fill as much again.
        """
        if self.shift is None:
            raise ValueError("no token was added")
        weight = float(self.ranks.sum(torch.tensor(self.weight, dtype=torch.float64)))
        if not weight > 0:
            raise ValueError("no token was added")
        mean = self.ranks.sum(self.first) / weight
        inputs, target = mean[:-1], mean[-1]
        covariance, cross = (self.ranks.sum(sums).div_(weight) for sums in (self.second, self.cross))
        for layer, own in enumerate(inputs):
            covariance[layer] -= torch.outer(own, own)
            cross[layer] -= torch.outer(target, own)
        mean = mean + self.shift
        self.shift, self.weight = None, 0.0
        found = mean[:-1].cpu(), covariance.cpu(), cross.cpu(), mean[-1].cpu()
        return Moments(*found, algebra_device(mean))
