"""Cross-fitted lenses of the update decomposition: two lenses per layer and a signal, each from documents of its own.

Fitting documents are dealt into three folds. Two of them fit a lens for each layer, the third says which part of a reading
is signal. A product of two readings is taken between the lenses of two folds. So the noise that one lens has learnt from
its own documents enters neither a square nor the signal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.room import IN_MEMORY, Room
from lensbench.measures.update.metric import SMALLEST_EIGENVALUE, Metric
from lensbench.measures.update.undefined import Undefined
from lensbench.runtime.mapped import give_back_pages
from lensbench.streams.capture import Capture

PAGES_FOR = 2
"""Layers whose moments and maps may fill the memory where they lie in files; mapping them anew takes time, too"""

FOLDS = 3
"""One for each of two lenses, one for the signal"""


@dataclass(frozen=True)
class Readings:
    """Maps from centred states to readings in the coordinates of a metric of rank k, of n layers and of two folds.

    ``read`` ``[2, n, k, d]``: ``F A_i``, the lens of layer i. ``signal`` ``[2, n, k, d]``: ``K_i F``, from the final state
    to the signal ``f_i`` in a reading. ``target`` ``[k, d]``: F, to the final state ``T`` itself. ``apart``: as ``signal``,
    each from one half of the third fold's documents: the square of a signal is taken between the two, since what one sample
    has put into both of them by chance would make it too large, by a share of the error of k / tokens.
    """

    read: Tensor
    signal: Tensor
    target: Tensor
    apart: Tensor

    def to(self, like: Tensor) -> "Readings":
        """The same maps with the type and the place of ``like``."""
        return Readings(*(maps.to(like) for maps in (self.read, self.signal, self.target, self.apart)))


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
    captured: Capture,
    layers: Sequence[int],
    folds: NDArray[np.int64],
    counts: NDArray[np.int64] | None = None,
    room: Room = IN_MEMORY,
) -> list[Moments]:
    """Moments of each fold, of the regressions from ``layers`` (and, last, from the final state itself) to the final state.

    ``counts`` ``[documents]``: how often each document was drawn; once each, if left out. ``room``: where they lie.
    """
    return [_moments_of(captured, layers, folds == fold, counts, room) for fold in range(FOLDS)]


def folds_and_halves(
    captured: Capture,
    layers: Sequence[int],
    folds: NDArray[np.int64],
    counts: NDArray[np.int64] | None = None,
    room: Room = IN_MEMORY,
) -> tuple[list[Moments], tuple[Moments, Moments]]:
    """:func:`fold_moments`, and those of each half of the third fold's documents, in one pass over the tokens.

    Where the third fold has fewer than two documents (or none of them in one half was drawn), each half is the whole.
    """
    third = folds == FOLDS - 1
    side = np.cumsum(third) % 2
    sizes = np.ones(len(folds), dtype=np.int64) if counts is None else counts
    lenses = [_moments_of(captured, layers, folds == fold, counts, room) for fold in range(FOLDS - 1)]
    if third.sum() < 2 or min(sizes[third & (side == k)].sum() for k in (0, 1)) == 0:
        whole = _moments_of(captured, layers, third, counts, room)
        return [*lenses, whole], (whole, whole)
    first, second = (_moments_of(captured, layers, third & (side == k), counts, room) for k in (0, 1))
    tokens = [int(sizes[captured.document][(third & (side == k))[captured.document]].sum()) for k in (0, 1)]
    return [*lenses, pooled_folds([first, second], tokens, room)], (first, second)


def pooled_folds(moments: Sequence[Moments], sizes: Sequence[int], room: Room = IN_MEMORY) -> Moments:
    """The moments of several folds together, exactly, from each fold's own and its number of tokens."""
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = torch.stack([s * m.mean for s, m in zip(share, moments, strict=True)]).sum(0)
    target = torch.stack([s * m.target_mean for s, m in zip(share, moments, strict=True)]).sum(0)
    covariance, cross = (room(tuple(moments[0].covariance.shape)).zero_() for _ in range(2))
    for s, m in zip(share, moments, strict=True):
        shift, moved = m.mean - mean, m.target_mean - target
        for k, own in enumerate(shift):
            covariance[k] += s * (m.covariance[k] + own[:, None] * own)
            cross[k] += s * (m.cross[k] + moved[:, None] * own)
        give_back_pages()
    return Moments(mean, covariance, cross, target, moments[0].device)


def _moments_of(
    captured: Capture, layers: Sequence[int], chosen: NDArray[np.bool_], counts: NDArray[np.int64] | None, room: Room
) -> Moments:
    """The moments of some documents, ``chosen`` ``[documents]``, one layer after the other."""
    wanted = torch.from_numpy(np.flatnonzero(chosen[captured.document]))
    drawn = None if counts is None else torch.from_numpy(counts[captured.document])[wanted]
    return Moments.at(captured, [*layers, captured.layers], wanted, drawn, room)


def resampled(folds: NDArray[np.int64], seed: Sequence[int]) -> NDArray[np.int64]:
    """How often each document is drawn when the documents of every fold are drawn with replacement, ``[documents]``."""
    rng = np.random.default_rng(list(seed))
    counts = np.zeros(len(folds), dtype=np.int64)
    for fold in range(FOLDS):
        at = np.flatnonzero(folds == fold)
        counts[at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)))
    return counts


def readings(
    moments: Sequence[Moments],
    metric: Metric,
    ridges: Sequence[float],
    halves: tuple[Moments, Moments] | None = None,
    room: Room = IN_MEMORY,
) -> Readings:
    """The maps of two folds' lenses, prior zero, at the given ridge for each layer, with the signal of the third fold.

    A ridge is in units of the median eigenvalue of the fold's own covariance. ``halves``: those of the third fold
    (:func:`folds_and_halves`); its whole in their place, if left out. ``room``: where the maps lie.
    """
    factor = metric.factor
    shape = (2, len(ridges), *factor.shape)
    read, signal = room(shape), room(shape)
    apart = signal if halves is None else room(shape)
    of_target = _inverse_target(moments[2], factor)
    for fold in (0, 1):
        of_half = None if halves is None else _inverse_target(halves[fold], factor)
        for k, ridge in enumerate(ridges):
            lens = RidgePath(moments[fold].layer([k]), "zero").solve(ridge).matrix[0]
            read[fold, k] = factor @ lens
            # K_i F = Cov(r_i, T) Cov(T)^+ F
            signal[fold, k] = read[fold, k] @ moments[2].cross[k].T @ of_target
            if halves is not None:
                assert of_half is not None
                apart[fold, k] = read[fold, k] @ halves[fold].cross[k].T @ of_half
            if k % PAGES_FOR == 0:
                give_back_pages()
    return Readings(read, signal, factor, apart)


def _inverse_target(moments: Moments, factor: Tensor) -> Tensor:
    """``F^T Cov(T)^+ F`` of the final state ``T = F h_L``, ``[d, d]``."""
    return factor.T @ pseudo_inverse(factor @ moments.covariance[-1] @ factor.T) @ factor


def pseudo_inverse(covariance: Tensor) -> Tensor:
    """Inverse of a covariance ``[k, k]`` on the directions in which it is not null."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    seen = values > SMALLEST_EIGENVALUE * values[-1]
    inverse: Tensor = (vectors[:, seen] / values[seen]) @ vectors[:, seen].T
    return inverse
