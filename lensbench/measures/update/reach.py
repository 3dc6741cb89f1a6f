"""Reach: how much of a model's prediction the lens of the last layer reads at all."""

from dataclasses import dataclass

import numpy as np
import torch

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import score
from lensbench.measures.update.held import HeldOut
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut

TOKENS = 4096
"""Held-out tokens at most that it is measured on"""


@dataclass(frozen=True)
class Reach:
    """KL of the model's prediction from a lens, and from the best constant, summed by cluster: ``[clusters]`` each, nats."""

    left: Array
    constant: Array

    @classmethod
    def of(cls, readout: ReadOut, held_out: Capture, lens: AffineMaps, layer: int, held: HeldOut) -> "Reach":
        """Of the lens of one layer, on evenly spread held-out tokens."""
        count = min(TOKENS, len(held_out))
        tokens = torch.linspace(0, len(held_out) - 1, count, dtype=torch.float64).round().long().unique()
        seen = held_out.take(tokens.to(held_out.states.device))
        kl = score(readout, seen.states[layer], lens, seen).kl[0]
        at = held.cluster[tokens].numpy()
        sums = np.zeros((2, held.clusters))
        for into, values in zip(sums, (kl, seen.constant_kl), strict=True):
            np.add.at(into, at, values.double().cpu().numpy())
        return cls(sums[0], sums[1])

    def share(self, weights: Array) -> Array:
        """Share ``[...]`` of the constant's KL that the lens removes, by ``weights`` ``[..., clusters]``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share: Array = 1 - (weights @ self.left) / (weights @ self.constant)
        return share
