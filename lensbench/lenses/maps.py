"""Stacked affine maps: what fitting returns and transfer evaluates, and the file that keeps them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.streams.rotated import RotatedView


@dataclass(frozen=True)
class AffineMaps:
    """M affine maps ``x = B h + c`` as stacked tensors: what fitting returns and transfer evaluates.

    The published parametrisation is ``h + A h + b``: ``A = B - I``, ``b = c``.
    """

    matrix: Tensor  # [M, d, d]
    offset: Tensor  # [M, d]

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> "AffineMaps":
        return AffineMaps(self.matrix[rows], self.offset[rows])

    def to(self, like: Tensor) -> "AffineMaps":
        return AffineMaps(self.matrix.to(like), self.offset.to(like))

    @classmethod
    def identity(cls, d: int) -> "AffineMaps":
        """One map, the logit lens."""
        return cls(torch.eye(d)[None], torch.zeros(1, d))

    @classmethod
    def stack(cls, parts: list["AffineMaps"]) -> "AffineMaps":
        return cls(torch.cat([p.matrix for p in parts]), torch.cat([p.offset for p in parts]))


def save_maps(maps: dict[str, AffineMaps], path: Path) -> None:
    """All maps of a fit in one safetensors file, moved into place whole."""
    tensors = {}
    for name, stack in maps.items():
        # Copies: stacks may be slices of one another, and safetensors refuses tensors that share memory.
        tensors[f"{name}.matrix"], tensors[f"{name}.offset"] = (
            stack.matrix.clone(memory_format=torch.contiguous_format),
            stack.offset.clone(),
        )
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load_maps(path: Path) -> dict[str, AffineMaps]:
    """Inverse of :func:`save_maps`; raises :class:`LensbenchError` for a damaged file."""
    try:
        tensors = load_file(path)
        names = sorted({key.rpartition(".")[0] for key in tensors})
        return {name: AffineMaps(tensors[f"{name}.matrix"], tensors[f"{name}.offset"]) for name in names}
    except (OSError, KeyError, SafetensorError) as error:
        raise LensbenchError(f"lens file {path} is damaged ({error}); delete its folder to fit anew") from error


def rotated_maps(maps: AffineMaps, view: RotatedView) -> AffineMaps:
    """Maps of rotated states (one, or one per layer) as maps of the plain states, one per layer: ``B Q_l h + c``."""
    q = view.maps.to(maps.matrix)
    return AffineMaps(maps.matrix @ q, maps.offset.expand(len(q), -1))
