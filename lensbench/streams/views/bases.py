"""Views in which the layers of a stream have bases of their own: rotated, carried along, drifting."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lensbench.streams.capture import Capture, room_for
from lensbench.streams.views.shuffled import Split

TOKENS = 4096
"""Tokens whose states are turned at a time"""


@dataclass(frozen=True)
class BasisView:
    """Layer k of the view is ``M_k h_k``, or with ``carries`` the sum of the ``M_m h_m``, m <= k; the last layer is h_L.

    h_0, h_1, ... are the states of the model's chosen ``layers``. ``M_k`` is a rotation, times the size of the copy.
    """

    layers: tuple[int, ...]
    maps: Tensor
    """float64 ``[n, d, d]``: M_k"""
    carries: bool = False

    def apply(self, captured: Capture, split: Split = "eval", *, memory_gib: float = float("inf")) -> Capture:
        """The capture ``[n+1, N, d]`` seen in these bases; everything but the states stays, for every split alike.

        States beyond ``memory_gib`` lie in a memory-mapped file.
        """
        shape = (len(self.layers) + 1, len(captured), captured.states.shape[-1])
        states = room_for(shape, captured.states.device, memory_gib).to(captured.states.dtype)
        maps = self.maps.to(captured.states)
        for start in range(0, len(captured), TOKENS):
            rows = slice(start, start + TOKENS)
            for k, layer in enumerate(self.layers):
                states[k, rows] = captured.states[layer, rows] @ maps[k].T
                if self.carries and k:
                    states[k, rows] += states[k - 1, rows]
            states[-1, rows] = captured.states[-1, rows]
        return replace(captured, states=states)

    def tensors(self) -> dict[str, Tensor]:
        """``layers`` ``[n]``, ``maps`` ``[n, d, d]`` and ``carries``."""
        return {"layers": torch.tensor(self.layers), "maps": self.maps, "carries": torch.tensor(self.carries)}

    @classmethod
    def of_tensors(cls, kept: dict[str, Tensor]) -> "BasisView":
        """The view that :meth:`tensors` describes."""
        return cls(tuple(kept["layers"].tolist()), kept["maps"], bool(kept["carries"]))


def principal_halves(covariances: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Bases ``[d, r]`` of the principal subspace with a share ``variance`` of all variance, ``[d, d - r]`` of the rest.

    ``covariances`` ``[n, d, d]`` of the layers, float64, are pooled. r is rounded up to an even number: planes turn.
    """
    values, vectors = torch.linalg.eigh(covariances.double().cpu().mean(0))
    values = values.flip(0).clamp(min=0)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank = int((share < variance).sum()) + 1
    rank = min(len(values), rank + rank % 2)
    vectors = vectors.flip(1)
    return vectors[:, :rank], vectors[:, rank:]


def random_bases(covariances: Tensor, *, seed: int, variance: float = 0.99) -> Tensor:
    """Rotations of n layers, float64 ``[n, d, d]``, for layers with ``covariances`` ``[n, d, d]``.

    Each is drawn from the Haar measure within the principal subspace that holds ``variance`` of the layers' pooled
    variance, and once more within the rest. So power stays where the stream has it and copies lie on top of each other
    (Haar in all of a wide space would keep them apart), and yet no direction is kept from one layer to the next.
    """
    halves = principal_halves(covariances, variance)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([within(halves, [haar(b.shape[1], generator) for b in halves]) for _ in covariances])


def turning_bases(covariances: Tensor, *, seed: int, variance: float = 0.99, angle: float = np.pi / 4) -> Tensor:
    """Rotations of n layers, float64 ``[n, d, d]``, that turn every plane by ``angle`` in all, in equal steps.

    The planes are random within the principal subspace of :func:`random_bases`, and within the rest. Where d is odd one
    direction stays.
    """
    generator = torch.Generator().manual_seed(seed)
    planes = [b @ haar(b.shape[1], generator) for b in principal_halves(covariances, variance)]
    angles = torch.linspace(0, angle, len(covariances), dtype=torch.float64)
    return torch.stack([within(planes, [turn(b.shape[1], a) for b in planes]) for a in angles.tolist()])


def within(halves: Sequence[Tensor], rotations: Sequence[Tensor]) -> Tensor:
    """The rotation ``[d, d]`` that acts by ``rotations`` in the coordinates of the bases ``halves``, ``[d, r]`` each."""
    return torch.stack([b @ q @ b.T for b, q in zip(halves, rotations, strict=True)]).sum(0)


def haar(d: int, generator: torch.Generator) -> Tensor:
    """A rotation or reflection of d dimensions from the Haar measure, float64 ``[d, d]``."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    result: Tensor = q * r.diagonal().sign()  # without the signs QR does not sample the Haar measure
    return result


def turn(d: int, angle: float) -> Tensor:
    """The rotation of the planes (0, 1), (2, 3), ... by ``angle``, float64 ``[d, d]``."""
    plane = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float64)
    result = torch.eye(d, dtype=torch.float64)
    for first in range(0, d - 1, 2):
        result[first : first + 2, first : first + 2] = plane
    return result


def sized(maps: Tensor, sizes: Sequence[float]) -> Tensor:
    """``maps`` ``[n, d, d]``, each times its size ``[n]``."""
    return maps * torch.tensor(sizes, dtype=maps.dtype)[:, None, None]
