"""What persistence and the carried share would be by chance: the analytic spreads under random bases."""

import numpy as np
import torch
from torch import Tensor

from lensbench.measures.update.folds import Readings
from lensbench.measures.update.products import Covariances
from lensbench.statistics import Array

VARIANCE = 0.99
"""Share of the layers' pooled variance in the space that random bases turn"""

ORDERS = ((0, 1), (1, 0))
"""A product is taken between the lenses of two folds, in both orders"""


def principal_space(moments: Covariances) -> Tensor:
    """Directions ``[d, r]`` that hold :data:`VARIANCE` of the layers' pooled within-layer variance."""
    values, vectors = torch.linalg.eigh(moments.own.mean(0))
    values = values.clamp(min=0).flip(0)
    share = values.cumsum(0) / values.sum()
    rank = min(len(values), int((share < VARIANCE).sum()) + 1)
    space: Tensor = vectors[:, -rank:]
    return space


def aimed(left: Tensor, read: Tensor, space: Tensor, signal: float) -> Tensor:
    """``left^T F A_i U / <r_i, f_i>`` of one layer in both :data:`ORDERS`, ``[d, 2 r]``; the maps are ``[2, k, d]``."""
    return torch.cat([left[b].T @ (read[a] @ space) for a, b in ORDERS], 1) / signal


def spreads_of_persistence(moments: Covariances, i: int, maps: Readings, space: Tensor, signal: Array) -> Array:
    """Spreads of S for layer i and all later ones, ``[n - 1 - i]``; no product of two layers is needed.

    The variance of S, were h_j in a basis of its own, is the squared norm of ``U^T E[h_j f_i^T] F A_i U / <r_i, f_i>``
    over r. ``signal`` ``[n]``: ``<r_i, f_i>``.
    """
    by_signal = aimed(maps.signal[:, i], maps.read[:, i], space, signal[i])
    squares = [float((space.T @ moments.goal[j] @ by_signal).square().sum()) for j in range(i + 1, len(signal))]
    return np.sqrt(np.array(squares) / space.shape[1] / 2)


def spreads_of(
    moments: Covariances, i: int, later: Tensor, maps: Readings, space: Tensor, signal: Array, loading: Array
) -> tuple[Array, Array]:
    """Spreads of S, and of c before it is divided by ``|a(r_i) - a(r_j)| |S|``, for layer i and all later ones, ``[n-1-i]``.

    ``signal`` ``[n]``: ``<r_i, f_i>``; ``loading`` ``[n]``: a(r_i). See :meth:`Covariances.later` for ``later``.
    """
    by_signal = aimed(maps.signal[:, i], maps.read[:, i], space, signal[i])
    by_reading = aimed(maps.read[:, i], maps.read[:, i], space, signal[i])
    here = space.T @ moments.goal[i] @ by_signal
    persistence, carried = [], []
    for k, j in enumerate(range(i + 1, len(signal))):
        there = space.T @ moments.goal[j] @ by_signal
        moved = space.T @ (later[k] - moments.own[i]) @ by_reading
        persistence.append(float(there.square().sum()))
        carried.append(float((moved - loading[i] * (there - here)).square().sum()))
    scale = 2 * space.shape[1]
    return np.sqrt(np.array(persistence) / scale), np.sqrt(np.array(carried) / scale)
