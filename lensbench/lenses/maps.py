"""Stacked affine maps: what fitting returns and transfer evaluates, and the file that keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lensbench.streams.rotated import RotatedView


class Reads(Protocol):
    """Anything that reads states of some layers as a stack of affine maps does."""

    def read(self, k: int, h: Tensor) -> Tensor:
        """What it makes of states ``[n, d]`` of its k-th layer."""


@dataclass(frozen=True)
class AffineMaps:
    """M affine maps ``x = B h + c`` as stacked tensors: what fitting returns and transfer evaluates.

    The published parametrisation is ``h + A h + b``: ``A = B - I``, ``b = c``.
    """

    matrix: Tensor  # [M, d, d]
    offset: Tensor  # [M, d]

    def __len__(self) -> int:
        """How many maps there are."""
        return len(self.matrix)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> "AffineMaps":
        """Some of the maps, as a stack."""
        return AffineMaps(self.matrix[rows], self.offset[rows])

    def to(self, like: Tensor) -> "AffineMaps":
        """The same maps on the device and in the precision of ``like``."""
        return AffineMaps(self.matrix.to(like), self.offset.to(like))

    def read(self, k: int, h: Tensor) -> Tensor:
        """What map k (or the only one) makes of states ``[n, d]``, in their precision and where they are."""
        m = k if len(self) > 1 else 0
        x: Tensor = h @ self.matrix[m].to(h).T + self.offset[m].to(h)
        return x

    @classmethod
    def identity(cls, d: int) -> "AffineMaps":
        """One map, the logit lens."""
        return cls(torch.eye(d)[None], torch.zeros(1, d))

    @classmethod
    def stack(cls, parts: list["AffineMaps"]) -> "AffineMaps":
        """The maps of several stacks as one."""
        return cls(torch.cat([p.matrix for p in parts]), torch.cat([p.offset for p in parts]))


def rotated_maps(maps: AffineMaps, view: RotatedView) -> AffineMaps:
    """Maps of rotated states (one, or one per layer) as maps of the plain states, one per layer: ``B Q_l h + c``."""
    q = view.maps.to(maps.matrix)
    return AffineMaps(maps.matrix @ q, maps.offset.expand(len(q), -1))


@dataclass(frozen=True)
class TurnedMap:
    """One map of rotated states as it reads the plain states of some layers: ``B Q_l h + c``."""

    maps: AffineMaps
    """One map"""
    view: RotatedView
    layers: Sequence[int]

    def read(self, k: int, h: Tensor) -> Tensor:
        """What it makes of plain states ``[n, d]`` of the k-th layer."""
        q, matrix, offset = self.view.maps[self.layers[k]], self.maps.matrix[0], self.maps.offset[0].to(h)
        if len(h) < h.shape[-1]:  # turning the states is less work than turning the map
            x: Tensor = (h @ q.to(h).T) @ matrix.to(h).T + offset
            return x
        device = h.device if h.device.type == "cuda" else matrix.device
        turned = matrix.to(device) @ q.to(device, matrix.dtype)
        return h @ turned.to(h).T + offset
