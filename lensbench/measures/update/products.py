"""Inner products of readings, the only thing that the update decomposition is made of.

Products are sums over tokens, kept by cluster: intervals and paired comparisons then need no states. States are read
once, block by block. A second way computes the same products from second moments, for many sets of lenses at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.room import IN_MEMORY, Room
from lensbench.measures.update.folds import PAGES_FOR, Readings
from lensbench.runtime.mapped import give_back_pages
from lensbench.statistics import Array
from lensbench.streams.gram import add_gram_

PAIR_PRODUCTS = ("ur", "uf", "uu", "uv", "vr", "vf", "vv")
"""Of two layers i < j: what a reading gains from i to j, in the old lens ``u = s_ij - r_i`` and in the new one
``v = r_j - r_i``, with r_i, f_i, and with one another. Where a block changes the stream little, a difference of products
with s_ij and r_j would lose what it changes."""

LAYER_PRODUCTS = ("rr", "rf", "ff", "rT", "fT")
"""Of one layer: r_i and its signal f_i, with themselves, with one another, and with T"""

TOKEN_BLOCK = 512

PAIR_BLOCK = 4096
"""Tokens at once in a covariance of two layers: few large products take half the time of many small ones"""

LATER_GIB = 4.0
"""Up to this size, covariances of pairs of layers are kept; above it, they are computed again for each set of lenses"""

Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Positions i and j of pairs of layers, i < j, each ``[P]``"""


def pairs_of(count: int) -> Pairs:
    """Positions (i, j), i < j, of all pairs among ``count`` layers, each ``[P]``."""
    first, second = np.triu_indices(count, 1)
    return first, second


@dataclass(frozen=True)
class Products:
    """Inner products: of pairs ``[..., P]``, of layers ``[..., n]``, of the final state ``[...]``.

    Every product is between the readings of two folds' lenses, the mean of both orders. Leading axes are clusters (sums),
    or draws, or none (means).
    """

    pair: dict[str, Array]
    layer: dict[str, Array]
    target: Array
    """T with T"""

    def drawn(self, weights: Array) -> "Products":
        """Sums over clusters, weighted: ``weights`` ``[draws, clusters]`` gives ``[draws, ...]``."""
        return Products(
            {name: weights @ values for name, values in self.pair.items()},
            {name: weights @ values for name, values in self.layer.items()},
            weights @ self.target,
        )

    def total(self) -> "Products":
        """Sums over clusters."""
        return Products(
            {name: values.sum(0) for name, values in self.pair.items()},
            {name: values.sum(0) for name, values in self.layer.items()},
            self.target.sum(0),
        )


def means_of(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Mean state of each row of ``[L+1, N, d]``, float64 ``[n, d]``."""
    return torch.stack([states[row].mean(0, dtype=torch.float64) for row in rows])


@torch.no_grad()
def cluster_products(
    states: Tensor,
    layers: Sequence[int],
    means: Tensor,
    cluster: Tensor,
    clusters: int,
    maps: Readings,
    *,
    old: bool = True,
) -> Products:
    """The products of ``states`` ``[L+1, N, d]``, summed over the tokens of each of ``clusters``.

    ``cluster`` ``[N]`` numbers the cluster of each token; ``means`` ``[n + 1, d]`` are taken off the states of ``layers``
    and of the last one. Without the ``old`` readings of later layers, most of the work, products of u are NaN, except uf.
    """
    rows, count = [*layers, len(states) - 1], len(layers)
    wide, maps = maps.read.to(states.device, torch.float64), maps.to(states)
    give_back_pages()  # of maps that lie in files
    i_of, _ = pairs_of(count)
    pair = {name: np.zeros((clusters, len(i_of))) for name in PAIR_PRODUCTS}
    layer = {name: np.zeros((clusters, count)) for name in LAYER_PRODUCTS}
    target = np.zeros(clusters)
    first_of = np.searchsorted(i_of, np.arange(count))  # where the pairs (i, i + 1), (i, i + 2), ... begin
    for number, centred in enumerate(blocks(states, rows, means)):
        at = cluster[number * TOKEN_BLOCK : (number + 1) * TOKEN_BLOCK].numpy()
        own = read_by(wide, centred[:count])
        last = centred[-1].to(states.dtype)
        for name, values in _of_layers(own.to(states.dtype), last, maps).items():
            _add(layer[name], at, values)
        goal = last @ maps.target.T
        _add(target[:, None], at, (goal * goal).sum(-1)[None])
        pairs = _of_pairs(centred[:count], last, own, maps) if old else _of_new(centred[:count], last, own, maps)
        for i, values_of in enumerate(pairs):
            columns = slice(first_of[i], first_of[i] + count - 1 - i)
            together = torch.stack(list(values_of.values())).double().cpu()  # one copy from a GPU
            for name, values in zip(values_of, together, strict=True):
                _add(pair[name][:, columns], at, values)
    return Products(pair, layer, target)


def _add(sums: Array, at: NDArray[np.int64], values: Tensor) -> None:
    """Add values ``[Q, n]`` of n tokens to the sums ``[clusters, Q]`` of their clusters ``at``."""
    # Clusters are contiguous in a capture, so that a few sums of runs are added and not n rows.
    wide = values.double().cpu().numpy()
    starts = np.flatnonzero(np.r_[True, np.diff(at) != 0])
    np.add.at(sums, at[starts], np.add.reduceat(wide, starts, axis=1).T)


def _of_layers(own: Tensor, last: Tensor, maps: Readings) -> dict[str, Tensor]:
    """:data:`LAYER_PRODUCTS`, each ``[n, tokens]``, of readings r ``[2, n, tokens, k]`` and final states ``[tokens, d]``."""
    found: dict[str, list[Tensor]] = {name: [] for name in LAYER_PRODUCTS}
    goal = last @ maps.target.T
    for i in range(own.shape[1]):
        r = own[:, i]
        f = [last @ maps.signal[fold, i].T for fold in (0, 1)]
        found["rr"].append(_dot(r[0], r[1]))
        found["rf"].append((_dot(r[0], f[1]) + _dot(r[1], f[0])) / 2)
        found["ff"].append(_dot(*(last @ maps.apart[fold, i].T for fold in (0, 1))))
        found["rT"].append((_dot(r[0], goal) + _dot(r[1], goal)) / 2)
        found["fT"].append((_dot(f[0], goal) + _dot(f[1], goal)) / 2)
    return {name: torch.stack(values) for name, values in found.items()}


def _of_pairs(centred: Tensor, last: Tensor, own: Tensor, maps: Readings) -> Iterator[dict[str, Tensor]]:
    """:data:`PAIR_PRODUCTS` of each layer i with all later ones: each ``[n - 1 - i, tokens]``.

    Of centred states ``[n, tokens, d]`` and their readings ``[2, n, tokens, k]`` in float64, of which differences are taken,
    and of final states ``[tokens, d]``; products are in the type of these.
    """
    count = len(centred)
    at_once = count if last.is_cuda else 1  # of one pair a processor's cache holds everything
    for i in range(count - 1):
        r = own[:, i].to(last)
        f = torch.stack([last @ maps.signal[fold, i].T for fold in (0, 1)])
        parts = []
        for j in range(i + 1, count, at_once):
            some = slice(j, j + at_once)
            added = (centred[some] - centred[i]).to(last)
            u = torch.stack([added @ maps.read[fold, i].T for fold in (0, 1)])
            parts.append(_of_updates(u, (own[:, some] - own[:, i, None]).to(last), r, f))
        yield {name: torch.cat([part[name] for part in parts]) for name in PAIR_PRODUCTS}


def _of_new(centred: Tensor, last: Tensor, own: Tensor, maps: Readings) -> Iterator[dict[str, Tensor]]:
    """As :func:`_of_pairs`, with products of u left as NaN, but for uf: ``<A d, f> = <d, A^T f>`` needs no reading of d."""
    count = len(centred)
    at_once = count if last.is_cuda else 1
    for i in range(count - 1):
        r = own[:, i].to(last)
        f = torch.stack([last @ maps.signal[fold, i].T for fold in (0, 1)])
        back = (f[1] @ maps.read[0, i] + f[0] @ maps.read[1, i]) / 2
        parts = []
        for j in range(i + 1, count, at_once):
            some = slice(j, j + at_once)
            v = (own[:, some] - own[:, i, None]).to(last)
            part = {"uf": _dot((centred[some] - centred[i]).to(last), back), "vr": _crossed_dot(v, r)}
            parts.append(part | {"vf": _crossed_dot(v, f), "vv": _dot(v[0], v[1])})
        known = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        unknown = torch.full_like(known["uf"], torch.nan)
        yield {name: known.get(name, unknown) for name in PAIR_PRODUCTS}


def _crossed_dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the readings of two folds, each ``[2, ..., k]``, the mean of both orders."""
    return (_dot(left[0], right[1]) + _dot(left[1], right[0])) / 2


def _of_updates(u: Tensor, v: Tensor, r: Tensor, f: Tensor) -> dict[str, Tensor]:
    """:data:`PAIR_PRODUCTS` ``[m, tokens]`` of m updates, as the earlier lens reads them (u) and as readings change (v).

    u and v are ``[2, m, tokens, k]``; r and f, the earlier reading and its signal, ``[2, tokens, k]``.
    """
    return {
        "ur": _crossed_dot(u, r),
        "uf": _crossed_dot(u, f),
        "uu": _dot(u[0], u[1]),
        "uv": _crossed_dot(u, v),
        "vr": _crossed_dot(v, r),
        "vf": _crossed_dot(v, f),
        "vv": _dot(v[0], v[1]),
    }


class Covariances(Protocol):
    """Covariances of the states of n layers, with themselves, with later ones and with the final state."""

    @property
    def own(self) -> Tensor:
        """``[n, d, d]``: Cov h_j."""

    @property
    def goal(self) -> Tensor:
        """``[n, d, d]``: Cov(h_j, h_L)."""

    @property
    def last(self) -> Tensor:
        """``[d, d]``: Cov h_L."""

    def later(self, i: int) -> Tensor:
        """Cov(h_j, h_i) of the later layers j, ``[n - 1 - i, d, d]``."""

    def readings(self, read: Tensor) -> Array | None:
        """``<A_j h_j, A_i h_i>`` ``[n, n]`` of maps A ``[2, n, k, d]``; None where covariances say it with less work."""


@dataclass(frozen=True)
class SecondMoments:
    """Covariances of the states of n layers with themselves and with the final state; of two layers on demand."""

    states: Tensor
    layers: Sequence[int]
    means: Tensor
    own: Tensor
    """``[n, d, d]``: Cov h_j"""
    goal: Tensor
    """``[n, d, d]``: Cov(h_j, h_L)"""
    last: Tensor
    """``[d, d]``: Cov h_L"""
    room: Room = IN_MEMORY
    """Where those of two layers are kept"""
    _later: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, states: Tensor, layers: Sequence[int], means: Tensor, room: Room = IN_MEMORY) -> "SecondMoments":
        """Of ``states`` ``[L+1, N, d]``, ``means`` ``[n + 1, d]`` taken off those of ``layers`` and of the last one."""
        count, d, tokens = len(layers), states.shape[-1], states.shape[1]
        own, goal = room((count, d, d)), room((count, d, d))
        last = torch.zeros(d, d, dtype=torch.float64)
        for j, row in enumerate([*layers, len(states) - 1]):
            # Summed where the states are: a GPU hands over each sum once, not each block's.
            here, to_last = (states.new_zeros(d, d, dtype=torch.float64) for _ in range(2))
            for one, final in blocks(states, [row, len(states) - 1], means[[j, count]], PAIR_BLOCK):
                add_gram_(here, one)
                to_last.addmm_(one.T, final)
            if j == count:
                last = (here / tokens).cpu()
            else:
                own[j], goal[j] = here / tokens, to_last / tokens
            give_back_pages()
        return cls(states, layers, means, own, goal, last, room)

    def later(self, i: int) -> Tensor:
        """Cov(h_j, h_i) of the later layers j, ``[n - 1 - i, d, d]``: one pass over the states.

        Those of all i are kept where they take no more than :data:`LATER_GIB`.
        """
        if i % PAGES_FOR == 0:
            give_back_pages()
        if i in self._later:
            return self._later[i]
        count, d = len(self.layers), self.states.shape[-1]
        found = self.states.new_zeros(count - 1 - i, d, d, dtype=torch.float64)
        first = torch.cat([one for (one,) in blocks(self.states, [self.layers[i]], self.means[[i]], PAIR_BLOCK)])
        for at in range(count - 1 - i):
            j = i + 1 + at
            others = blocks(self.states, [self.layers[j]], self.means[[j]], PAIR_BLOCK)
            for (other,), one in zip(others, first.split(PAIR_BLOCK), strict=True):
                found[at].addmm_(other.T, one)
        found = found.div_(self.states.shape[1]).cpu()
        if 8 * count * (count - 1) // 2 * d * d > LATER_GIB * 2**30:
            return found
        self._later[i] = self.room(tuple(found.shape)).copy_(found)
        return self._later[i]

    def readings(self, read: Tensor) -> Array | None:
        """``<A_j h_j, A_i h_i>`` ``[n, n]`` of two folds' maps A ``[2, n, k, d]``, means over tokens and of both orders.

        From the readings of every token. None where so many tokens take more multiplications than ``A_j Cov(h_j, h_i)``
        of all pairs.
        """
        count, d, tokens = len(self.layers), self.states.shape[-1], self.states.shape[1]
        if 2 * tokens > (count - 1) * d:
            return None
        maps = read.to(self.states.device)
        found = self.states.new_zeros(count, count, dtype=torch.float64)
        for centred in blocks(self.states, self.layers, self.means[:count]):
            first, second = read_by(maps, centred).flatten(2)
            found.addmm_(first, second.T)
        together: Array = ((found + found.T) / (2 * tokens)).cpu().numpy()
        return together


def blocks(states: Tensor, rows: Sequence[int], means: Tensor, block: int = TOKEN_BLOCK) -> Iterator[Tensor]:
    """Centred states ``[n, tokens, d]`` of some rows, block by block, in float64: what two layers share may be far larger
    than what they differ in."""
    for start in range(0, states.shape[1], block):
        tokens = slice(start, start + block)
        yield torch.stack(
            [states[row][tokens].double() - mean.to(states.device) for row, mean in zip(rows, means, strict=True)]
        )


def read_by(maps: Tensor, centred: Tensor) -> Tensor:
    """Readings ``[2, n, tokens, k]`` of each layer's states ``[n, tokens, d]`` by its maps of two folds ``[2, n, k, d]``."""
    return torch.stack([torch.bmm(centred, of_fold.transpose(-1, -2)) for of_fold in maps])


def later_readings_of_moments(moments: Covariances, maps: Readings) -> dict[str, Array]:
    """``<s_ij, r_j>`` (sj) and ``<r_j, f_i>`` (jf), means over tokens, each ``[n, n]`` at [i, j], i < j.

    ``<A_i X, A_j X> = <A_i, A_j Cov X>``: the right side is made once for a layer j, whatever the number of earlier ones.
    And ``<r_j, r_i>`` (jr), where :meth:`Covariances.readings` gives it.
    """
    count = maps.read.shape[1]
    found = {name: np.full((count, count), np.nan) for name in ("sj", "jf")}
    for j in range(1, count):
        of_own, of_goal = maps.read[:, j] @ moments.own[j], maps.read[:, j] @ moments.goal[j]
        for i in range(j):
            found["sj"][i, j] = _crossed(maps.read[:, i], of_own)
            found["jf"][i, j] = _crossed(maps.signal[:, i], of_goal)
    together = moments.readings(maps.read)
    return found if together is None else {**found, "jr": together}


def products_of_moments(
    moments: Covariances, i: int, later: Tensor, maps: Readings, known: dict[str, Array], layer: dict[str, Array]
) -> dict[str, Array]:
    """:data:`PAIR_PRODUCTS` of layer i with all later ones, means over tokens, each ``[n - 1 - i]``.

    ``later``: what :meth:`SecondMoments.later` gives for i; ``maps`` in float64. ``known``: what
    :func:`later_readings_of_moments` gives; ``layer``: :data:`LAYER_PRODUCTS` of :func:`layer_products_of_moments`.
    Moments are of float64, so that differences of whole products lose nothing that matters.
    """
    read, signal = maps.read, maps.signal
    # <A X, B> = <X, A^T B>: products with the maps of layer i alone are made once, whatever the number of later layers.
    both, turned = read[:, i].flatten(0, 1), read[:, i].flip(0).flatten(0, 1)  # of both folds, and in the other order
    f = signal[:, i].flip(0).flatten(0, 1)
    of_s, of_f = both.T @ turned / 2, both.T @ f / 2
    found: dict[str, list[float]] = {name: [] for name in ("sr", "sf", "ss")}
    for k, j in enumerate(range(i + 1, read.shape[1])):
        pairs = {"sr": (later[k], of_s), "sf": (moments.goal[j], of_f), "ss": (moments.own[j], of_s)}
        for name, (left, right) in pairs.items():
            found[name].append(float(torch.dot(left.reshape(-1), right.reshape(-1))))
    sr, sf, ss = (np.array(found[name]) for name in ("sr", "sf", "ss"))
    if "jr" in known:
        jr = known["jr"][i, i + 1 :]
    else:
        jr = np.array([_crossed(read[:, i], read[:, i + 1 + k] @ between) for k, between in enumerate(later)])
    sj, jf = (known[name][i, i + 1 :] for name in ("sj", "jf"))
    rr, rf, jj = layer["rr"][i], layer["rf"][i], layer["rr"][i + 1 :]
    return {
        "ur": sr - rr, "uf": sf - rf, "uu": ss - 2 * sr + rr, "uv": sj - sr - jr + rr, "vr": jr - rr, "vf": jf - rf,
        "vv": jj - 2 * jr + rr,
    }  # fmt: skip


def _crossed(left: Tensor, right: Tensor) -> float:
    """Inner product of maps ``[2, k, d]`` of two folds, the mean of both orders."""
    first, second = (torch.dot(left[a].reshape(-1), right[1 - a].reshape(-1)) for a in (0, 1))
    return float(first + second) / 2


def layer_products_of_moments(moments: Covariances, maps: Readings) -> tuple[dict[str, Array], float]:
    """:data:`LAYER_PRODUCTS` ``[n]`` and the square of the final state, means over tokens."""
    read, signal, target = maps.read, maps.signal, maps.target
    found: dict[str, list[Tensor]] = {name: [] for name in LAYER_PRODUCTS}
    for i in range(read.shape[1]):
        along = [read[a, i] @ moments.goal[i] for a in (0, 1)]  # F A_i Cov(h_i, h_L)
        held = [signal[a, i] @ moments.last for a in (0, 1)]
        found["rr"].append(_inner(read[0, i] @ moments.own[i], read[1, i]))
        found["rf"].append((_inner(along[0], signal[1, i]) + _inner(along[1], signal[0, i])) / 2)
        found["ff"].append(_inner(maps.apart[0, i] @ moments.last, maps.apart[1, i]))
        found["rT"].append((_inner(along[0], target) + _inner(along[1], target)) / 2)
        found["fT"].append((_inner(held[0], target) + _inner(held[1], target)) / 2)
    square = float(_inner(target @ moments.last, target))
    return {name: torch.stack(values).numpy() for name, values in found.items()}, square


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the elementwise products of matrices ``[..., k, d]``."""
    return (left * right).sum((-1, -2))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(left, right)  # einsum makes a product of matrices for each row
    return found
