"""Centred second moments of a stream in one pass, from which every closed form follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture
from lensbench.streams.rotated import RotatedView

MOMENT_BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """Centred second moments of K regressions from ``[d]`` to ``[d]``, float64.

    ``covariance`` ``[K, d, d]`` of the input, ``cross`` ``[K, d, d]`` = E (r - rbar)(h - hbar)^T, ``mean`` ``[K, d]`` of the
    input, ``target_mean`` ``[d]``.
    """

    mean: Tensor
    covariance: Tensor
    cross: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, captured: Capture, token_weights: Tensor | None = None) -> "Moments":
        """One regression per layer 0..L-1, to h_L; ``token_weights`` ``[N]`` resample the tokens. Of all processes."""
        sums = MomentSums(captured.ranks)
        for start in range(0, len(captured), MOMENT_BLOCK):
            rows = slice(start, start + MOMENT_BLOCK)
            sums.add(captured.states[:, rows], None if token_weights is None else token_weights[rows])
        return sums.moments()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[K, d]`` and eigenvectors ``[K, d, d]`` of the covariances, found once."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    @classmethod
    def stack(cls, parts: "Sequence[Moments]") -> "Moments":
        """The regressions of several, one after the other; their target is the same."""
        return cls(
            torch.cat([p.mean for p in parts]),
            torch.cat([p.covariance for p in parts]),
            torch.cat([p.cross for p in parts]),
            parts[0].target_mean,
        )

    def layer(self, rows: Sequence[int]) -> "Moments":
        """The regressions of some layers."""
        at = list(rows)
        return Moments(self.mean[at], self.covariance[at], self.cross[at], self.target_mean)

    def pooled(self, rows: Sequence[int]) -> "Moments":
        """One regression for several layers with equally many tokens: what a shared lens is fitted to."""
        at = list(rows)
        mean = self.mean[at].mean(0)
        shift = self.mean[at] - mean
        covariance = self.covariance[at].mean(0) + shift.T @ shift / len(at)
        return Moments(mean[None], covariance[None], self.cross[at].mean(0)[None], self.target_mean)

    def pooled_within(self) -> "Moments":
        """One matrix for all layers, each layer's own mean: what a shared lens with a bias per layer is fitted to."""
        layers = len(self.mean)
        covariance, cross = self.covariance.mean(0), self.cross.mean(0)
        return Moments(self.mean, covariance.expand(layers, -1, -1), cross.expand(layers, -1, -1), self.target_mean)

    def rotated(self, view: RotatedView) -> "Moments":
        """The moments of the rotated states, without rotating a state."""
        q = view.maps.to(self.mean)
        return Moments(
            torch.einsum("lde,le->ld", q, self.mean),
            q @ self.covariance @ q.transpose(-1, -2),
            self.cross @ q.transpose(-1, -2),
            self.target_mean,
        )


class MomentSums:
    """Sums from which :class:`Moments` follow, filled block by block: the stream is passed once and no state is kept.

    float64, around the first block's means, so that a large mean costs no digits. Those of several processes are taken
    around the first one's and added up at the end.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.shift: Tensor | None = None  # [L+1, d]
        self.weight = 0.0
        self.first: Tensor  # [L+1, d]
        self.second: Tensor  # [L, d, d]
        self.cross: Tensor  # [L, d, d]

    def add(self, states: Tensor, token_weights: Tensor | None = None) -> None:
        """Add states ``[L+1, n, d]``, weighted by ``token_weights`` ``[n]``."""
        layers, _, d = states.shape[0] - 1, *states.shape[1:]
        weights = None if token_weights is None else token_weights.to(states.device).double()
        if self.shift is None:
            self.shift = self.ranks.told(states.mean(1, dtype=torch.float64).cpu()).to(states.device)
            self.first = torch.zeros_like(self.shift)
            self.second = self.shift.new_zeros(layers, d, d)
            self.cross = self.shift.new_zeros(layers, d, d)

        def centred(layer: int) -> Tensor:
            return states[layer].double() - self.shift[layer]  # type: ignore[index]

        target = centred(layers)
        weighted = target if weights is None else target * weights[:, None]
        self.first[layers] += weighted.sum(0)
        self.weight += float(states.shape[1] if weights is None else weights.sum())
        for layer in range(layers):
            h = centred(layer)
            self.cross[layer].addmm_(weighted.T, h)
            scaled = h if weights is None else h * weights[:, None]
            self.second[layer].addmm_(scaled.T, h)
            self.first[layer] += scaled.sum(0)

    def moments(self) -> Moments:
        """The centred moments; on the CPU from here on, d x d algebra in float64 being no work for a GPU.

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
        return Moments(mean[:-1].cpu(), covariance.cpu(), cross.cpu(), mean[-1].cpu())
