"""The lenses through which a probe reads every layer, each with its null."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.algebra import right_divided
from lensbench.lenses.maps import AffineMaps, Reads
from lensbench.lenses.moments import MOMENT_BLOCK, MomentSums
from lensbench.probes.subject import Subject
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture
from lensbench.streams.partition import rows_at_once
from lensbench.streams.readout import ReadOut
from lensbench.streams.views.shuffled import donors

PROBED = {
    "logit": "logit lens",
    "tuned": "per-layer lenses",
    "shared": "shared lens",
    "jacobian": "Jacobian lenses",
    "shared_jacobian": "shared Jacobian lens",
}
"""Kind of lens -> its name in tables, in their order. Those after the third are read where a suite asks for them."""

FITTED_ALWAYS = ("logit", "tuned", "shared")
"""The kinds that every subject has; it holds the others in ``further``."""

NULL_OF = {
    "tuned": "lenses of shuffled targets",
    "shared": "shared lens of a random basis",
    "shared_jacobian": "shared Jacobian lens of a random basis",
}
"""Kind of lens -> its null"""

RIDGE = 1e-2
"""Ridge of the null of per-layer lenses, in median eigenvalues, of a subject that names none"""

ROWS = 256
"""Rows of logits in memory at once on a processor"""


@dataclass(frozen=True)
class LayerLens:
    """A lens that reads every layer 0..L-1, and its null."""

    reads: Reads
    null: Reads | None = None
    """It reads the same layers and cannot know what they hold; None where there is none."""


def layer_lenses(subject: Subject) -> dict[str, LayerLens]:
    """Kind -> lens, of the kinds in :data:`PROBED` that the subject has.

    The null of per-layer lenses has other tokens' final states as targets: see :class:`Uninformed`. That of the shared lens
    is the shared lens of a random basis. The logit lens and Jacobian lenses have none: nothing of them is fitted to targets.
    """
    found = {
        "logit": LayerLens(AffineMaps.identity(subject.stream.d_model)),
        "tuned": LayerLens(subject.own, Uninformed.of(subject)),
        "shared": LayerLens(subject.shared, subject.nulls.get("shared")),
    }
    found |= {kind: LayerLens(reads, subject.nulls.get(kind)) for kind, reads in subject.further.items()}
    return {kind: found[kind] for kind in PROBED if kind in found}


@dataclass(frozen=True)
class Uninformed:
    """Per-layer lenses fitted to the final states of tokens of other documents: ``B_l h + c_l``.

    ``B_l = C_rh (C_hh + lam I)^-1`` with shuffled targets r, at the ridge of the per-layer lens. Its mean reading over the
    fitting tokens is that of the per-layer lens. Such a lens learns what is frequent, and nothing of the token it reads.
    """

    captured: Capture
    """The fitting tokens"""
    donor: Tensor
    """``[N]``: the token whose final state is the target of each"""
    own: AffineMaps
    ridges: Sequence[float]

    @classmethod
    def of(cls, subject: Subject) -> "Uninformed | None":
        """Of a subject's own lenses; None where one document holds more than half of the fitting tokens."""
        captured = subject.fit
        if 2 * np.unique(captured.document, return_counts=True)[1].max() > len(captured):
            return None
        donor = torch.from_numpy(donors(captured.document, np.random.default_rng(0)))
        ridges = subject.ridges or (RIDGE,) * subject.stream.layers
        return cls(captured, donor.to(captured.states.device), subject.own, ridges)

    def maps(self, layer: int) -> AffineMaps:
        """The map of a layer."""
        sums, states = MomentSums(), self.captured.states
        for start in range(0, len(self.captured), MOMENT_BLOCK):
            rows = slice(start, start + MOMENT_BLOCK)
            sums.add(torch.stack([states[layer, rows], states[-1][self.donor[rows]]]))
        moments = sums.moments()
        covariance = moments.covariance[0].clone()
        covariance.diagonal().add_(self.ridges[layer] * moments.unit(0))
        matrix = right_divided(moments.cross[0], covariance)
        mean = moments.mean[0]
        reading = self.own.read(layer, mean[None])[0]
        return AffineMaps(matrix[None], (reading - matrix @ mean)[None])

    def read(self, k: int, h: Tensor) -> Tensor:
        """What the map of layer k makes of states ``[n, d]``."""
        return self.maps(k).read(0, h)


@torch.no_grad()
def top_words(readout: ReadOut, x: Tensor) -> NDArray[np.int64]:
    """The most probable word of states ``[n, d]`` before the final norm, ``[n]``; -1 where logits overflow."""

    def one(rows: slice) -> Tensor:
        highest, word = readout(x[rows]).max(-1)  # NaN if any is
        return torch.where(highest.isfinite(), word, -1)

    if not len(x):
        return np.zeros(0, dtype=np.int64)
    size = rows_at_once(x, len(readout.weight), ROWS)
    parts = in_pieces(slice(0, len(x)), size, one, what="a token of a read-out")
    words: NDArray[np.int64] = torch.cat(list(parts)).cpu().numpy()
    return words
