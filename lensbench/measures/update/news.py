"""News: the share of a gain that lies in directions of the prediction that the earlier lens does not read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.measures.update.products import TOKEN_BLOCK, Covariances, Pairs, blocks
from lensbench.statistics import Array

UNREAD = 0.1
"""A lens that explains less than this share of a direction of the final state does not read it"""


@dataclass(frozen=True)
class NewsSums:
    """Gains in explained power of all pairs, summed by cluster, ``[clusters, P]`` each.

    Sorted into read and unread on the very tokens that they are measured on, directions look unread too often, by about
    c / tokens. Directions that are sorted on half of the clusters show it twice, so that it can be taken off.
    """

    all: Array
    """In directions that are unread over all clusters"""
    halves: Array
    """In directions that are unread over those clusters that are of the same half"""
    whole: Array
    """In all directions"""

    def share(self, weights: Array, pairs: NDArray[np.bool_]) -> tuple[Array, Array]:
        """News of some pairs together, and the gain that it is a share of, for weights ``[..., clusters]``."""
        whole = weights @ self.whole[:, pairs].sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            share: Array = (weights @ (2 * self.all - self.halves)[:, pairs].sum(1)) / whole
        return share, whole

    def doubt(self, pairs: NDArray[np.bool_]) -> float:
        """What is taken off for the sorting of directions: how far off the correction itself may be."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.abs((self.halves - self.all)[:, pairs].sum() / self.whole[:, pairs].sum()))


def unread_directions(explained: Tensor) -> Tensor:
    """Projections ``[n, k, k]`` of the whitened final state on what the lens of each layer does not read."""
    found = torch.empty_like(explained)
    for k, one in enumerate(explained):
        values, vectors = torch.linalg.eigh((one + one.T) / 2)
        found[k] = vectors[:, values < UNREAD] @ vectors[:, values < UNREAD].T
    return found


def explained_power(moments: Covariances, lenses: AffineMaps, factor: Tensor) -> Tensor:
    """What the lens of each layer explains of the whitened final state T, ``[n, k, k]``, in float64.

    ``Cov(T_i, T) + Cov(T, T_i) - Cov T_i`` for ``T_i`` that lens i reads. Along a unit vector that is ``1 - E (T - T_i)^2``,
    but where a lens reads nothing all its products are small, whatever the sample of T: directions that it reads and
    directions that it does not are told apart at a few thousand tokens. ``factor`` ``[k, d]`` whitens the final state.
    """
    found = []
    for own, goal, lens in zip(moments.own, moments.goal, lenses.matrix, strict=True):
        maps = factor @ lens.double().cpu()
        across = maps @ goal @ factor.T
        found.append(across + across.T - maps @ own @ maps.T)
    return torch.stack(found)


def news_of_moments(moments: Covariances, lenses: AffineMaps, factor: Tensor, pairs: Pairs) -> tuple[Array, Array]:
    """Gains in explained power of pairs, means over tokens: those in unread directions, and all; ``[P]`` each."""
    explained = explained_power(moments, lenses, factor)
    unread, whole = unread_directions(explained), explained.diagonal(dim1=-1, dim2=-2).sum(-1).numpy()
    # A pair at a time: gains of all of them would take a matrix each.
    new = [float((unread[i] * (explained[j] - explained[i])).sum()) for i, j in zip(*pairs, strict=True)]
    return np.array(new), whole[pairs[1]] - whole[pairs[0]]


@torch.no_grad()
def news_sums(
    states: Tensor,
    layers: Sequence[int],
    means: Tensor,
    cluster: Tensor,
    clusters: int,
    lenses: AffineMaps,
    factor: Tensor,
) -> NewsSums:
    """The gains of all pairs i < j of ``layers`` in the final state T, whitened by ``factor`` ``[k, d]``.

    The power that lens i explains along a direction v is ``1 - E (v.(T - T_i))^2``. Directions are the eigenvectors of
    :func:`explained_power`. ``lenses``: one for each of ``layers``; ``means`` ``[n + 1, d]`` are taken off their states and
    off the last one.
    """
    like = states[-1]
    maps, goal = (factor @ lenses.matrix.double().cpu()).to(like), factor.to(like)
    rows, half = [*layers, len(states) - 1], cluster % 2
    count, k = len(layers), len(factor)
    explained = torch.zeros(2, count, k, k, dtype=torch.float64)
    for at, (read, final) in _whitened(states, rows, means, maps, goal):
        for side in (0, 1):
            mine = half[at] == side
            t, r = final[mine], read[:, mine]
            across = (r.transpose(-1, -2) @ t).double().cpu()
            explained[side] += across + across.transpose(-1, -2) - (r.transpose(-1, -2) @ r).double().cpu()
    sizes = torch.bincount(half, minlength=2)
    unread = unread_directions(explained.sum(0) / len(cluster)).to(like)
    of_half = torch.stack([unread_directions(e / max(1, int(n))) for e, n in zip(explained, sizes, strict=True)]).to(
        like
    )
    pairs = count * (count - 1) // 2
    sums = NewsSums(*(np.zeros((clusters, pairs)) for _ in range(3)))
    for at, (read, final) in _whitened(states, rows, means, maps, goal):
        number = cluster[at].numpy()
        _add_gains(sums.all, final - read, unread, number)
        _add_gains(sums.whole, final - read, None, number)
        for side in (0, 1):
            mine = half[at] == side
            _add_gains(sums.halves, (final - read)[:, mine], of_half[side], number[mine.numpy()])
    return sums


def _whitened(
    states: Tensor, rows: Sequence[int], means: Tensor, maps: Tensor, goal: Tensor
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Block by block: the tokens, what lenses read there ``[n, tokens, k]``, and the whitened final state."""
    for number, centred in enumerate(blocks(states, rows, means)):
        at = slice(number * TOKEN_BLOCK, (number + 1) * TOKEN_BLOCK)
        yield at, (centred[:-1] @ maps.transpose(-1, -2), centred[-1] @ goal.T)


def _add_gains(sums: Array, missed: Tensor, unread: Tensor | None, cluster: NDArray[np.int64]) -> None:
    """Add the gains of all pairs, in unread directions of the earlier lens or in all, to the sums of their clusters.

    ``missed`` ``[n, tokens, k]``: what each lens misses of the final state.
    """
    column, count = 0, len(missed)
    for i in range(count - 1):
        left = missed[i:] if unread is None else missed[i:] @ unread[i]
        squares = left.double().square().sum(-1).cpu()
        gains = (squares[0] - squares[1:]).numpy()
        np.add.at(sums[:, column : column + count - 1 - i], cluster, gains.T)
        column += count - 1 - i
