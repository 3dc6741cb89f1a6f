"""The random-basis null: every layer before the last seen in a random basis of its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensbench.streams.capture import Capture


@dataclass(frozen=True)
class RotatedView:
    """A model with every h_l, l < L, seen through its own random orthogonal map of the pooled principal subspace.

    The model itself is untouched, and so is what any lens fitted at one layer (with prior zero) can read there; what
    layers have in common is gone. ``maps`` is ``[L, d, d]``, float64: rotations Q_l of the top-r principal directions that
    hold ``variance`` of the layers' pooled within-layer variance, identity elsewhere.
    """

    maps: Tensor
    rank: int

    @classmethod
    def random(cls, covariances: Tensor, *, seed: int, variance: float = 0.99) -> "RotatedView":
        """Rotations drawn from the Haar measure for layers with ``covariances`` ``[L, d, d]`` (float64)."""
        values, vectors = torch.linalg.eigh(covariances.mean(0))
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = min(len(values), int((share < variance).sum()) + 1)
        basis = vectors[:, -rank:]  # [d, r]
        generator = torch.Generator().manual_seed(seed)
        maps = []
        for _ in covariances:
            gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            q = q * r.diagonal().sign()  # without the signs QR is not uniform over rotations
            maps.append(
                torch.eye(len(values), dtype=torch.float64) + basis @ (q - torch.eye(rank, dtype=q.dtype)) @ basis.T
            )
        return cls(torch.stack(maps), rank)

    def save(self, path: Path) -> None:
        save_file({"maps": self.maps.contiguous(), "rank": torch.tensor(self.rank)}, path)

    @classmethod
    def load(cls, path: Path) -> "RotatedView":
        kept = load_file(path)
        return cls(kept["maps"], int(kept["rank"]))

    def apply(self, captured: Capture) -> Capture:
        """The same tokens with rotated states; layer L and everything that is not a state stay as they are."""
        maps = self.maps.to(captured.states)
        rotated = torch.einsum("lde,lne->lnd", maps, captured.states[:-1])
        return Capture(**{**vars(captured), "states": torch.cat([rotated, captured.states[-1:]])})
