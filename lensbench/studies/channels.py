"""Channels: ways in which the layers of a synthetic stream hold a part of the answer, with their moments in closed form.

A channel has n normal entries y of the answer and a room of w directions of the state. Layers 0..L-1 hold there

    x_l = keep_l * x_(l-1) + write_l y + noise_l v_l,    x_(-1) = 0,

with v_l standard normal and new at every layer and token. All moments follow from that line: ``x_l = B_l y + n_l`` with
``B_l = keep_l * B_(l-1) + write_l`` and ``Cov n_l = N_l = keep_l * N_(l-1) * keep_l + noise_l noise_l^T``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.studies.synthetic import orthogonal, turned

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Channel:
    """A part of the answer, and how the layers hold it. L layers, n entries, a room of w directions."""

    name: str
    size: Tensor  # [n]: standard deviations of the entries
    keep: Tensor  # [L, w]
    write: Tensor  # [L, w, n]
    noise: Tensor  # [L, w, n]
    shown: Array
    """``[L, L]``: of what layer j gains over layer i in this channel, the share that lens i reads as lens j does"""
    elsewhere: Array
    """``[L, L]``: the share that goes where lens i does not look, while what it read stays; the rest is re-represented"""
    predicts: bool = True
    """Whether next tokens depend on this channel"""

    @property
    def entries(self) -> int:
        """n: how many entries of the answer it holds."""
        return len(self.size)

    @property
    def room(self) -> int:
        """w: how many directions of the state it takes."""
        return self.keep.shape[1]

    def draw(self, answer: Tensor, random: torch.Generator) -> list[Tensor]:
        """x_0..x_(L-1), each ``[tokens, w]``, for entries ``[tokens, n]`` of the answer."""
        x, states = torch.zeros(len(answer), self.room), []
        for keep, write, noise in zip(self.keep, self.write, self.noise, strict=True):
            new = torch.randn(len(answer), self.entries, generator=random)
            x = keep * x + answer @ write.T + new @ noise.T
            states.append(x)
        return states

    @cached_property
    def moments(self) -> tuple[Array, Array]:
        """B ``[L, w, n]`` and N ``[L, w, w]`` of the module's text."""
        signal, covariance = np.zeros((self.room, self.entries)), np.zeros((self.room, self.room))
        signals, covariances = [], []
        for k, write, noise in zip(*(a.double().numpy() for a in (self.keep, self.write, self.noise)), strict=True):
            signal = k[:, None] * signal + write
            covariance = k[:, None] * covariance * k + noise @ noise.T
            signals.append(signal)
            covariances.append(covariance)
        return np.stack(signals), np.stack(covariances)

    @cached_property
    def readers(self) -> Array:
        """Matrices ``[L, n, w]`` of the best reading ``E[y | x_l]``: ``S B^T (B S B^T + N)^+``, S the variance of y."""
        signal, covariance = self.moments
        cross = (self.size.double().numpy() ** 2)[:, None] * signal.transpose(0, 2, 1)
        return cross @ np.linalg.pinv(signal @ cross + covariance, rcond=1e-10, hermitian=True)

    def explained_power(self, layer: int) -> float:
        """Share of the entries' power that the best reading of a layer explains."""
        signal, covariance = (a[layer] for a in self.moments)
        cross = (self.size.double().numpy() ** 2)[:, None] * signal.T
        explained = np.trace(cross @ np.linalg.pinv(signal @ cross + covariance, rcond=1e-10, hermitian=True) @ cross.T)
        return float(explained / self.size.double().square().sum())

    @cached_property
    def explained(self) -> Array:
        """``[L, n, n]``: covariance of ``E[y | x_l]``; the variance of y less that of the error that remains."""
        variance = self.size.double().numpy() ** 2
        made: Array = self.readers @ self.moments[0] * variance
        return made


def decay(size: Tensor, exponent: float, random: torch.Generator) -> Tensor:
    """Standard deviations whose squares fall as ``rank^-exponent``, in random order, of the same mean square as before."""
    n = len(size)
    variance = torch.arange(1, n + 1).double() ** -exponent
    variance = (variance / variance.mean())[torch.randperm(n, generator=random)]
    made: Tensor = size * variance.sqrt().float()
    return made


def _rms(size: Tensor) -> float:
    return float(size.square().mean().sqrt())


REFINED = ("fresh", "removed", "averaged", "added")
"""Ways to get better in place, by :func:`in_place`"""


def in_place(size: Tensor, sigma: Sequence[float], how: str, *, name: str = "in place") -> Channel:
    """One basis, the read-out's. ``sigma``: noise of each layer over the entries' root-mean-square.

    'fresh': new noise at every layer. 'removed': of one noise, each layer removes a part: ``n_l = r n_(l-1) + new`` with
    ``r = sigma_l^2 / sigma_(l-1)^2`` has ``Cov(n_l, n_(l-1)) = Var n_l``. 'averaged': layer l is the mean of l + 1 copies of
    noise sigma_0. 'added': layer l is the sum of l + 1 of L + 1 independent increments of equal variance whose whole sum is
    the answer; given the answer that is a random walk with a fixed end, and ``sigma`` is not used.
    """
    layers, eye, noise = len(sigma), torch.eye(len(size)), [s * _rms(size) for s in sigma]
    keep, new = np.zeros(layers), np.array(noise)
    scale = torch.ones(len(size))
    if how == "removed":
        var = np.array(noise) ** 2
        keep[1:] = var[1:] / var[:-1]
        new[1:] = np.sqrt(var[1:] - keep[1:] * var[1:])
    elif how == "averaged":
        keep = np.arange(layers) / np.arange(1, layers + 1)
        new = noise[0] / np.arange(1, layers + 1)
    elif how == "added":
        left = np.arange(layers + 1, 1, -1)  # increments that are missing before layer l's
        keep = 1 - 1 / left
        new, scale = np.sqrt((1 - 1 / left) / (layers + 1)), size
    elif how != "fresh":
        raise ValueError(f"{how!r} is no way to get better in place; there are {', '.join(REFINED)}")
    write = torch.stack([(1 - k) * eye for k in keep])
    return Channel(
        name=name,
        size=size,
        keep=torch.tensor(keep).float()[:, None].expand(-1, len(size)),
        write=write,
        noise=torch.stack([v * torch.diag(scale) for v in new]).float(),
        shown=np.ones((layers, layers)),
        elsewhere=np.zeros((layers, layers)),
    )


def turning(
    size: Tensor, sigma: Sequence[float], bases: Sequence[Tensor], shown: Array, *, name: str = "rebased"
) -> Channel:
    """The answer with fresh noise, layer l in the orthonormal basis ``bases[l]``; ``shown[i, j]``: what two bases share."""
    bases = [basis.float() for basis in bases]
    layers = len(bases)
    return Channel(
        name=name,
        size=size,
        keep=torch.zeros(layers, len(size)),
        write=torch.stack(bases),
        noise=torch.stack([s * _rms(size) * q for s, q in zip(sigma, bases, strict=True)]),
        shown=shown,
        elsewhere=np.zeros((layers, layers)),
    )


def rebased(size: Tensor, sigma: Sequence[float], random: torch.Generator) -> Channel:
    """Every layer in a random basis of its own: two bases share nothing but by chance."""
    bases = [orthogonal(len(size), random) for _ in sigma]
    return turning(size, sigma, bases, np.zeros((len(sigma), len(sigma))))


def drifting(size: Tensor, sigma: Sequence[float], angle: float, random: torch.Generator) -> Channel:
    """The basis turns evenly, by ``angle`` in all, in the same random planes; between layers lies ``cos`` of their angle."""
    layers = len(sigma)
    seed = int(torch.randint(2**31, (1,), generator=random))
    angles = np.linspace(0, angle, layers)
    bases = [turned(len(size), a, torch.Generator().manual_seed(seed)) for a in angles]
    # An entry of an odd number of entries has no plane to turn in.
    alone = len(size) % 2 / len(size)
    shown = alone + (1 - alone) * np.cos(angles[:, None] - angles)
    return turning(size, sigma, bases, shown, name="drifting")


STEP, TRIES = 0.01, 40


def copied(size: Tensor, sigma: Sequence[float], louder: float, room: int, random: torch.Generator) -> Channel:
    """Block l adds a copy, ``louder`` than the last one by that factor, in random directions of a room, over the others.

    Copies that lie across each other may cost more than the new one brings. Directions are therefore drawn again, at most
    :data:`TRIES` times, until the best reading explains at least :data:`STEP` more of the entries' power than before.
    """
    copies: list[Tensor] = []
    read = 0.0
    for layer in range(len(sigma)):
        found: list[tuple[float, Tensor]] = []
        for _ in range(TRIES):
            copy = louder**layer * orthogonal(room, random)[:, : len(size)]
            explained = _carried(size, sigma[: layer + 1], [*copies, copy], "copied").explained_power(layer)
            found.append((explained, copy))
            if explained >= read + STEP:
                break
        read, best = max(found, key=lambda pair: pair[0])
        copies.append(best)
    return _carried(size, sigma, copies, "copied")


def sliced(size: Tensor, sigma: Sequence[float], random: torch.Generator) -> Channel:
    """Block l writes a copy, in a random basis, to a slice of its own."""
    layers, n = len(sigma), len(size)
    copies = []
    for layer in range(layers):
        copy = torch.zeros(layers * n, n)
        copy[layer * n : (layer + 1) * n] = orthogonal(n, random)
        copies.append(copy)
    return _carried(size, sigma, copies, "sliced")


def _carried(size: Tensor, sigma: Sequence[float], copies: Sequence[Tensor], name: str) -> Channel:
    layers = len(sigma)
    return Channel(
        name=name,
        size=size,
        keep=torch.ones(layers, copies[0].shape[0]),
        write=torch.stack(list(copies)),
        noise=torch.stack([s * _rms(size) * copy for s, copy in zip(sigma, copies, strict=True)]),
        shown=np.zeros((layers, layers)),
        elsewhere=np.ones((layers, layers)),
    )


def arriving(size: Tensor, noise: float, layers: int) -> Channel:
    """New entries in place: the entries arrive in L - 1 equal groups, one at each layer 1..L-1, and stay as they are."""
    arrival = 1 + torch.arange(len(size)) * (layers - 1) // len(size)
    arrives = torch.stack([(arrival == layer).float() for layer in range(layers)])
    write = torch.diag_embed(arrives)
    return Channel(
        name="arriving",
        size=size,
        keep=torch.ones(layers, len(size)),
        write=write,
        noise=noise * _rms(size) * write,
        shown=np.ones((layers, layers)),
        elsewhere=np.zeros((layers, layers)),
    )
