"""What persistence and the carried share would be by chance: the analytic spreads under random bases."""

import numpy as np
import torch
from torch import Tensor

from lensbench.measures.update.folds import Readings
from lensbench.measures.update.products import Covariances
from lensbench.statistics import Array

VARIANCE = 0.99
"""Share of the layers' pooled variance in the space that random bases turn"""


def principal_space(moments: Covariances) -> Tensor:
    """Directions ``[d, r]`` that hold :data:`VARIANCE` of the layers' pooled within-layer variance."""
    values, vectors = torch.linalg.eigh(moments.own.mean(0))
    values = values.clamp(min=0).flip(0)
    share = values.cumsum(0) / values.sum()
    rank = min(len(values), int((share < VARIANCE).sum()) + 1)
    space: Tensor = vectors[:, -rank:]
    return space


def spreads_of(
    moments: Covariances, i: int, later: Tensor, maps: Readings, space: Tensor, signal: Array, loading: Array
) -> tuple[Array, Array]:
    """Spreads of S, and of c before it is divided by ``|a(r_i) - a(r_j)| |S|``, for layer i and all later ones, ``[n-1-i]``.

    ``signal`` ``[n]``: ``<r_i, f_i>``; ``loading`` ``[n]``: a(r_i). See :meth:`Covariances.later` for ``later``.
    """
    rank = space.shape[1]
    persistence, carried = np.zeros(len(later)), np.zeros(len(later))
    for at in range(len(later)):
        j = i + 1 + at
        square_s = square_c = 0.0
        for a, b in ((0, 1), (1, 0)):
            right = maps.read[a, i] @ space  # F A_i U
            kept = space.T @ moments.goal[j] @ maps.signal[b, i].T @ right / signal[i]
            before = space.T @ moments.goal[i] @ maps.signal[b, i].T @ right / signal[i]
            moved = space.T @ (later[at] - moments.own[i]) @ maps.read[b, i].T @ right / signal[i]
            square_s += float(kept.square().sum()) / rank / 2
            square_c += float((moved - loading[i] * (kept - before)).square().sum()) / rank / 2
        persistence[at], carried[at] = square_s**0.5, square_c**0.5
    return persistence, carried
