"""Cross-fitted lenses of the update decomposition: two lenses per layer and a signal, each from documents of its own.

Fitting documents are dealt into three folds. Two of them fit a lens for each layer, the third says which part of a reading
is signal. A product of two readings is taken between the lenses of two folds, so that what one lens has learnt of its own
documents by heart is in neither its own square nor its signal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.moments import MOMENT_BLOCK, Moments, MomentSums
from lensbench.lenses.ridge import RidgePath
from lensbench.measures.update.metric import SMALLEST_EIGENVALUE, Metric
from lensbench.measures.update.undefined import Undefined
from lensbench.streams.capture import Capture

FOLDS = 3
"""One for each of two lenses, one for the signal"""


@dataclass(frozen=True)
class Readings:
    """Maps from centred states to readings in the coordinates of a metric of rank k, of n layers and of two folds.

    ``read`` ``[2, n, k, d]``: ``F A_i``, the lens of layer i. ``signal`` ``[2, n, k, d]``: ``K_i F``, from the final state
    to the signal ``f_i`` in a reading. ``target`` ``[k, d]``: F, to the final state ``T`` itself.
    """

    read: Tensor
    signal: Tensor
    target: Tensor

    def to(self, like: Tensor) -> "Readings":
        """The same maps with the type and the place of ``like``."""
        return Readings(self.read.to(like), self.signal.to(like), self.target.to(like))


def deal_documents(captured: Capture, seed: int) -> NDArray[np.int64]:
    """The fold of each document, ``[documents]``: dealt at random, as many to each of :data:`FOLDS`.

    Raises :class:`Undefined` where there are fewer documents than folds.
    """
    documents = captured.ranks.most(int(captured.document.max())) + 1
    if documents < FOLDS:
        raise Undefined(f"undefined: {documents} fitting documents, and lenses and signal need {FOLDS} folds of them")
    order = np.random.default_rng([seed, documents]).permutation(documents)
    folds = np.empty(documents, dtype=np.int64)
    folds[order] = np.arange(documents) % FOLDS
    return folds


def fold_moments(
    captured: Capture, layers: Sequence[int], folds: NDArray[np.int64], counts: NDArray[np.int64] | None = None
) -> list[Moments]:
    """Moments of each fold, of the regressions from ``layers`` (and, last, from the final state itself) to the final state.

    ``counts`` ``[documents]``: how often each document was drawn; once each, if left out.
    """
    rows = [*layers, captured.layers, captured.layers]  # the last is the target
    fold_of = folds[captured.document]
    drawn = None if counts is None else counts[captured.document]
    found = []
    for fold in range(FOLDS):
        sums = MomentSums(captured.ranks)
        at = torch.from_numpy(np.flatnonzero(fold_of == fold))
        for tokens in at.split(MOMENT_BLOCK):
            weights = None if drawn is None else torch.from_numpy(drawn[tokens.numpy()])
            sums.add(torch.stack([captured.states[row][tokens] for row in rows]), weights)
        found.append(sums.moments())
    return found


def resampled(folds: NDArray[np.int64], seed: Sequence[int]) -> NDArray[np.int64]:
    """How often each document is drawn when the documents of every fold are drawn with replacement, ``[documents]``."""
    rng = np.random.default_rng(list(seed))
    counts = np.zeros(len(folds), dtype=np.int64)
    for fold in range(FOLDS):
        at = np.flatnonzero(folds == fold)
        counts[at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)))
    return counts


def readings(moments: Sequence[Moments], metric: Metric, ridges: Sequence[float]) -> Readings:
    """The maps of two folds' lenses, prior zero, at the given ridge for each layer, with the signal of the third fold.

    A ridge is in units of the median eigenvalue of the fold's own covariance.
    """
    factor = metric.factor
    layers = range(len(ridges))
    read, signal = [], []
    third = moments[2]
    target = third.covariance[-1]
    inverse = pseudo_inverse(factor @ target @ factor.T)
    for fold in (0, 1):
        own = moments[fold].layer(layers)
        lenses = RidgePath(own, "zero").solve(torch.tensor(ridges, dtype=torch.float64)).matrix
        maps = factor @ lenses.cpu()
        along = maps @ third.cross[: len(ridges)].transpose(-1, -2) @ factor.T  # Cov(r_i, T)
        read.append(maps)
        signal.append(along @ inverse @ factor)
    return Readings(torch.stack(read), torch.stack(signal), factor)


def pseudo_inverse(covariance: Tensor) -> Tensor:
    """Inverse of a covariance ``[k, k]`` on the directions in which it is not null."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    seen = values > SMALLEST_EIGENVALUE * values[-1]
    inverse: Tensor = (vectors[:, seen] / values[seen]) @ vectors[:, seen].T
    return inverse
