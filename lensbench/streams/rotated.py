"""The random-basis null: every layer before the last seen in its own random basis."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lensbench.runtime.sealed import read_tensors
from lensbench.streams.capture import Capture


@dataclass(frozen=True)
class RotatedView:
    """A model with every h_l, l < L, rotated by its own random orthogonal map of the pooled principal subspace.

    The model does not change, nor does what a lens fitted at one layer (with prior zero) can read there. What layers have
    in common is destroyed.
    """

    maps: Tensor
    """Float64 ``[L, d, d]``: rotations Q_l within the first r principal directions, identity outside of them"""
    rank: int
    """r, the number of principal directions"""

    @classmethod
    def random(
        cls,
        covariances: Tensor,
        *,
        seed: int,
        variance: float = 0.99,
        room: Callable[[tuple[int, ...]], Tensor] | None = None,
    ) -> "RotatedView":
        """Rotations drawn from the Haar measure, for layers with ``covariances`` ``[L, d, d]`` (float64).

        They act on the principal directions that hold ``variance`` of the layers' pooled within-layer variance. ``room``
        makes the float64 tensor that they lie in.
        """
        values, vectors = torch.linalg.eigh(covariances.mean(0))
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = min(len(values), int((share < variance).sum()) + 1)
        basis = vectors[:, -rank:]  # [d, r]
        generator = torch.Generator().manual_seed(seed)
        maps = torch.empty(covariances.shape, dtype=torch.float64) if room is None else room(tuple(covariances.shape))
        for layer in range(len(covariances)):
            gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            q = q * r.diagonal().sign()  # without the signs QR does not sample the Haar measure
            maps[layer] = (
                torch.eye(len(values), dtype=torch.float64) + basis @ (q - torch.eye(rank, dtype=q.dtype)) @ basis.T
            )
        return cls(maps, rank)

    def save(self, path: Path) -> None:
        """Write the view to a safetensors file."""
        save_file({"maps": self.maps.contiguous(), "rank": torch.tensor(self.rank)}, path)

    @classmethod
    def load(cls, path: Path) -> "RotatedView":
        """The view that :meth:`save` wrote."""
        kept = read_tensors(path)
        return cls(kept["maps"], int(kept["rank"]))

    def apply(self, captured: Capture) -> Capture:
        """The capture with the states of layers 0..L-1 rotated; layer L and everything else do not change."""
        maps = self.maps.to(captured.states)
        rotated = torch.einsum("lde,lne->lnd", maps, captured.states[:-1])
        return Capture(**{**vars(captured), "states": torch.cat([rotated, captured.states[-1:]])})
