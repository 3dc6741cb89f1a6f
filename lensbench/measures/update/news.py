"""News: the share of a gain that lies in directions of the prediction that the earlier lens does not read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.room import IN_MEMORY, Room
from lensbench.measures.update.products import TOKEN_BLOCK, Covariances, Pairs, blocks
from lensbench.statistics import Array
from lensbench.streams.capture import room_for

UNREAD = 0.1
"""A lens that explains less than this share of a direction of the final state does not read it"""


@dataclass(frozen=True)
class NewsSums:
    """Gains in explained power of all pairs, summed by cluster, ``[clusters, P]`` each.

    Directions are sorted into read and unread. If they are sorted and measured on the same tokens, too many look unread,
    by about c / tokens for some constant c. Sorting on half of the clusters doubles this bias, so it can be estimated
    and subtracted."""

    all: Array
    """In directions that are unread over all clusters"""
    halves: Array
    """In directions that are unread over the clusters of the same half"""
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


@dataclass(frozen=True)
class Unread:
    """Directions of the whitened final state that a lens does not read, and those that it reads, orthonormal."""

    unread: Tensor
    """``[k, u]``"""
    read: Tensor
    """``[k, k - u]``"""

    @classmethod
    def of(cls, explained: Tensor) -> "Unread":
        """Of a lens that explains ``[k, k]`` of the whitened final state."""
        values, vectors = torch.linalg.eigh((explained + explained.T) / 2)
        return cls(vectors[:, values < UNREAD], vectors[:, values >= UNREAD])

    @property
    def projection(self) -> Tensor:
        """On what is unread, ``[k, k]``."""
        return self.unread @ self.unread.T

    def squares(self, vectors: Tensor, whole: Tensor) -> Tensor:
        """Squared lengths of the unread parts of ``vectors`` ``[m, n, k]``, float64 ``[m, n]``; ``whole``: of all of them.

        By whichever directions are fewer.
        """
        unread = self.unread.shape[1] <= self.read.shape[1]
        along = (self.unread if unread else self.read).to(vectors)
        part = torch.stack([(one @ along).square().sum(-1, dtype=torch.float64) for one in vectors])
        return part if unread else whole - part


def explained_power(moments: Covariances, lenses: AffineMaps, factor: Tensor, layer: int) -> Tensor:
    """What the lens of a layer explains of the whitened final state T, ``[k, k]``, in float64.

    ``Cov(T_i, T) + Cov(T, T_i) - Cov T_i`` for ``T_i`` that lens i reads. Along a unit vector that is ``1 - E (T - T_i)^2``,
    but where a lens reads nothing all its products are small, whatever the sample of T: directions that it reads and
    directions that it does not are told apart at a few thousand tokens. ``factor`` ``[k, d]`` whitens the final state.
    """
    maps = factor @ lenses.matrix[layer].double().cpu()
    across = maps @ moments.goal[layer] @ factor.T
    found: Tensor = across + across.T - maps @ moments.own[layer] @ maps.T
    return found


def news_of_moments(
    moments: Covariances, lenses: AffineMaps, factor: Tensor, pairs: Pairs, room: Room = IN_MEMORY
) -> tuple[Array, Array]:
    """Gains in explained power of pairs, means over tokens: those in unread directions, and all; ``[P]`` each.

    ``room``: where what each lens explains lies.
    """
    count, k = len(lenses), len(factor)
    explained = room((count, k, k))
    for layer in range(count):
        explained[layer] = explained_power(moments, lenses, factor, layer)
    whole = np.array([float(one.diagonal().sum()) for one in explained])
    new, unread, of_layer = [], torch.empty(0), -1
    for i, j in zip(*pairs, strict=True):  # in the order of i
        if i != of_layer:
            unread, of_layer = Unread.of(explained[i]).projection, i
        new.append(float((unread * (explained[j] - explained[i])).sum()))
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
    memory_gib: float = float("inf"),
) -> NewsSums:
    """The gains of all pairs i < j of ``layers`` in the final state T, whitened by ``factor`` ``[k, d]``.

    The power that lens i explains along a direction v is ``1 - E (v.(T - T_i))^2``. Directions are the eigenvectors of
    :func:`explained_power`. ``lenses``: one for each of ``layers``; ``means`` ``[n + 1, d]`` are taken off their states and
    off the last one. What lenses miss of T, as large as the states, lies in a file beyond ``memory_gib``; of matrices
    ``[k, k]`` those of one layer are held at a time.
    """
    like, count, k = states[-1], len(layers), len(factor)
    final = room_for((1, states.shape[1], k), states.device, memory_gib)[0].to(like.dtype)
    missed = room_for((count, states.shape[1], k), states.device, memory_gib).to(like.dtype)
    goal = factor.to(like)
    for number, (centred,) in enumerate(blocks(states, [len(states) - 1], means[[count]])):
        final[_block(number)] = centred.to(like) @ goal.T
    for i, row in enumerate(layers):
        read = (factor @ lenses.matrix[i].double().cpu()).to(like)
        for number, (centred,) in enumerate(blocks(states, [row], means[[i]])):
            at = _block(number)
            torch.sub(final[at], centred.to(like) @ read.T, out=missed[i, at])
    half, numbers = cluster % 2, cluster.numpy()
    sides = [torch.from_numpy(np.flatnonzero(half.numpy() == side)) for side in (0, 1)]
    squares = torch.stack([one.square().sum(-1, dtype=torch.float64) for one in missed])
    sums = NewsSums(*(np.zeros((clusters, count * (count - 1) // 2)) for _ in range(3)))
    column = 0
    for i in range(count - 1):
        columns = slice(column, column + count - 1 - i)
        explained = [_explained(final, missed[i], side) for side in sides]
        whole = Unread.of(sum(explained) / len(cluster))  # type: ignore[arg-type]
        for side, one in zip(sides, explained, strict=True):
            own = Unread.of(one / max(1, len(side)))
            for some in side.split(TOKEN_BLOCK):
                here = some.to(missed.device)
                left, of_all = missed[i:, here], squares[i:, here]
                each = (of_all, whole.squares(left, of_all), own.squares(left, of_all))
                for into, values in zip((sums.whole, sums.all, sums.halves), each, strict=True):
                    np.add.at(into[:, columns], numbers[some.numpy()], (values[0] - values[1:]).T.cpu().numpy())
        column = columns.stop
    return sums


def _block(number: int) -> slice:
    return slice(number * TOKEN_BLOCK, (number + 1) * TOKEN_BLOCK)


def _explained(final: Tensor, missed: Tensor, tokens: Tensor) -> Tensor:
    """What a lens explains of T summed over some tokens, ``[k, k]`` float64, from T and what the lens misses of it."""
    k = final.shape[-1]
    found = torch.zeros(k, k, dtype=torch.float64)
    for some in tokens.split(TOKEN_BLOCK):
        here = some.to(final.device)
        t = final[here]
        r = t - missed[here]
        across = (r.T @ t).double().cpu()
        found += across + across.T - (r.T @ r).double().cpu()
    return found
