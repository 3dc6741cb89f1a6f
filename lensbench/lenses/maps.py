"""Stacked affine maps: what fitting returns and transfer evaluates, and the file that keeps them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lensbench.streams.rotated import RotatedView


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
