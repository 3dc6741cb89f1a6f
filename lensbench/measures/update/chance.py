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


def persistence_spread(
    moments: Covariances, i: int, maps: Readings, space: Tensor, signal: Array, folds: tuple[int, int]
) -> Tensor:
    """``U^T E[h_j f_i^T] F A_i U / <r_i, f_i>`` of layer i and itself and all later ones, ``[n - i, r, r]``.

    Its squared norm over r is the variance of S, were h_j in a basis of its own. ``signal`` ``[n]``: ``<r_i, f_i>``.
    """
    a, b = folds
    aimed = maps.signal[b, i].T @ (maps.read[a, i] @ space) / signal[i]
    found: Tensor = space.T @ moments.goal[i:] @ aimed
    return found


def spreads_of_persistence(moments: Covariances, i: int, maps: Readings, space: Tensor, signal: Array) -> Array:
    """Spreads of S for layer i and all later ones, ``[n - 1 - i]``; no product of two layers is needed."""
    square = sum(
        persistence_spread(moments, i, maps, space, signal, folds)[1:].square().sum((-1, -2)) for folds in ORDERS
    )
    assert isinstance(square, Tensor)
    return np.asarray((square / space.shape[1] / 2).sqrt().numpy())


def spreads_of(
    moments: Covariances, i: int, later: Tensor, maps: Readings, space: Tensor, signal: Array, loading: Array
) -> tuple[Array, Array]:
    """Spreads of S, and of c before it is divided by ``|a(r_i) - a(r_j)| |S|``, for layer i and all later ones, ``[n-1-i]``.

    ``signal`` ``[n]``: ``<r_i, f_i>``; ``loading`` ``[n]``: a(r_i). See :meth:`Covariances.later` for ``later``.
    """
    persistence, carried = torch.zeros(len(later)), torch.zeros(len(later))
    for a, b in ORDERS:
        of_signal = persistence_spread(moments, i, maps, space, signal, (a, b))
        aimed = maps.read[b, i].T @ (maps.read[a, i] @ space) / signal[i]
        moved = space.T @ (later - moments.own[i]) @ aimed
        persistence = persistence + of_signal[1:].square().sum((-1, -2))
        carried = carried + (moved - loading[i] * (of_signal[1:] - of_signal[0])).square().sum((-1, -2))
    rank = space.shape[1]
    return np.asarray((persistence / rank / 2).sqrt().numpy()), np.asarray((carried / rank / 2).sqrt().numpy())
