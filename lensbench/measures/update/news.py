"""News: the share of a gain that lies in directions of the prediction that the earlier lens does not read."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.measures.update.metric import covariance_of, whitening
from lensbench.measures.update.products import TOKEN_BLOCK
from lensbench.statistics import Array

UNREAD = 0.1
"""A lens that explains less than this share of a direction of the final state does not read it"""


@torch.no_grad()
def news_sums(
    states: Tensor, layers: Sequence[int], cluster: Tensor, clusters: int, lenses: AffineMaps
) -> tuple[Array, Array]:
    """Gains in explained power of all pairs i < j, summed by cluster: those in unread directions, and all of them.

    Two arrays ``[clusters, P]``. The final state T is whitened. The power that lens i explains along a direction v is
    ``1 - E (v.(T - T_i))^2``. Directions are the eigenvectors of explained power in one half of the clusters; what they
    explain, and so which of them are unread, is measured in the other half, and the halves change places. ``lenses``: one
    for each of ``layers``, with offset.
    """
    like = states[-1]
    factor = whitening(covariance_of(like)).to(like)
    count, k = len(layers), len(factor)
    lenses = lenses.to(like)
    half = cluster % 2
    missed = torch.zeros(2, count, k, k, dtype=torch.float64)  # Cov of T - T_i in each half
    for rows in torch.arange(states.shape[1]).split(TOKEN_BLOCK):
        for i, residual in enumerate(_residuals(states, layers, lenses, factor, rows)):
            for side in (0, 1):
                part = residual[half[rows] == side]
                missed[side, i] += (part.T @ part).double().cpu()
    sizes = [max(1, int((half == side).sum())) for side in (0, 1)]
    eye = torch.eye(k, dtype=torch.float64)
    unread = []  # of each half: per layer, the directions that its lens does not read there [k, m]
    for side in (0, 1):
        there, here = missed[1 - side] / sizes[1 - side], missed[side] / sizes[side]
        vectors = torch.linalg.eigh(eye - there)[1]
        explained = 1 - torch.einsum("nkm,nkl,nlm->nm", vectors, here, vectors)
        unread.append([v[:, share < UNREAD].to(like) for v, share in zip(vectors, explained, strict=True)])
    pairs = count * (count - 1) // 2
    new, whole = np.zeros((clusters, pairs)), np.zeros((clusters, pairs))
    for rows in torch.arange(states.shape[1]).split(TOKEN_BLOCK):
        residuals = list(_residuals(states, layers, lenses, factor, rows))
        for side in (0, 1):
            at = half[rows] == side
            _add_gains(new, whole, [r[at] for r in residuals], unread[side], cluster[rows][at])
    return new, whole


def _residuals(states: Tensor, layers: Sequence[int], lenses: AffineMaps, factor: Tensor, rows: Tensor) -> list[Tensor]:
    """What each lens misses of the whitened final state at some tokens: n of ``[tokens, k]``."""
    final = states[-1][rows]
    return [
        (final - states[layer][rows] @ lenses.matrix[i].T - lenses.offset[i]) @ factor.T
        for i, layer in enumerate(layers)
    ]


def _add_gains(new: Array, whole: Array, residuals: list[Tensor], unread: list[Tensor], cluster: Tensor) -> None:
    at, column = cluster.numpy(), 0
    squares = [r.double().square().sum(-1) for r in residuals]
    for i in range(len(residuals) - 1):
        before = (residuals[i] @ unread[i]).double().square().sum(-1)
        for j in range(i + 1, len(residuals)):
            after = (residuals[j] @ unread[i]).double().square().sum(-1)
            np.add.at(new[:, column], at, (before - after).cpu().numpy())
            np.add.at(whole[:, column], at, (squares[i] - squares[j]).cpu().numpy())
            column += 1
