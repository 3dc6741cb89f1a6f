"""What persistence and the share added elsewhere would be by chance: their analytic spreads under random bases."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.room import IN_MEMORY, Room
from lensbench.measures.update.folds import Readings
from lensbench.measures.update.products import (
    Covariances,
    Products,
    later_readings_of_moments,
    layer_products_of_moments,
    products_of_moments,
)
from lensbench.measures.update.quantities import Chance, loading_at
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


def goals_in(space: Tensor, moments: Covariances, room: Room = IN_MEMORY) -> Tensor:
    """``E[h_j h_L^T]^T U U^T E[h_j h_L^T]`` of every layer, ``[n, d, d]``: what spreads of S are made of."""
    count, d = len(moments.own), space.shape[0]
    found = room((count, d, d))
    for j in range(count):
        along = (space.T @ moments.goal[j]).float()
        found[j] = along.T @ along
    return found


def spreads_of_persistence(i: int, maps: Readings, space: Tensor, goals: Tensor, signal: Array) -> Array:
    """Spreads of S for layer i and all later ones, ``[n - 1 - i]``; no product of two layers is needed.

    The variance of S, were h_j in a basis of its own, is the squared norm of ``U^T E[h_j f_i^T] F A_i U / <r_i, f_i>``
    over r. ``signal`` ``[n]``: ``<r_i, f_i>``. ``goals``: of :func:`goals_in`.
    """
    by_signal = aimed(maps.signal[:, i], maps.read[:, i], space, signal[i]).float()
    return _persistence(by_signal @ by_signal.T, goals[i + 1 :], space)


def chance_of_persistence(moments: Covariances, maps: Readings, signal: Array, room: Room = IN_MEMORY) -> Chance:
    """The chance of persistence alone, which gates, clarity and what is kept ask for; that of c is NaN.

    ``signal`` ``[n]``: ``<r_i, f_i>``, means over tokens. It takes no covariance of two layers, and so little time.
    """
    space = principal_space(moments)
    goals = goals_in(space, moments, room)
    spread = np.concatenate([spreads_of_persistence(i, maps, space, goals, signal) for i in range(len(signal) - 1)])
    return Chance(spread, np.full(len(spread), np.nan))


def _persistence(of_s: Tensor, goals: Tensor, space: Tensor) -> Array:
    """Spreads of S of one layer and later ones from ``S S^T`` ``[d, d]`` and the goals of those, float32."""
    return np.sqrt(np.array([_inner(goal, of_s) for goal in goals]) / (2 * space.shape[1]))


def spreads_of(
    moments: Covariances,
    i: int,
    later: Tensor,
    maps: Readings,
    space: Tensor,
    goals: Tensor,
    signal: Array,
    loading: Array,
) -> tuple[Array, Array]:
    """Spreads of S, and of c before it is divided by ``|a(r_i) - a(r_j)| |S|``, for layer i and all later ones, ``[n-1-i]``.

    ``signal`` ``[n]``: ``<r_i, f_i>``; ``loading`` ``[n]``: a(r_i). See :meth:`Covariances.later` for ``later``, and
    :func:`goals_in` for ``goals``.

    They are norms of ``U^T G_j S`` and of ``U^T (D R - a E S)`` for wide matrices R and S of layer i alone, D and E
    differences of the covariances of the two layers with h_i and h_L. The first is made of ``S S^T``. The second is written
    out: where a layer changes the stream little, a difference of squares would lose it. In float32: a spread is needed to
    a few digits.
    """
    s = aimed(maps.signal[:, i], maps.read[:, i], space, signal[i])
    r = aimed(maps.read[:, i], maps.read[:, i], space, signal[i])
    persistence = _persistence((s @ s.T).float(), goals[i + 1 :], space)
    turned = torch.cat([r, -float(loading[i]) * s]).float()
    narrow, own, goal, carried = space.float(), moments.own[i], moments.goal[i], []
    for k, j in enumerate(range(i + 1, len(signal))):
        # Differences before float32: what is common to two layers may be far larger.
        changed = torch.cat([(later[k] - own).float(), (moments.goal[j] - goal).float()], 1)
        carried.append(float((narrow.T @ changed @ turned).square().sum(dtype=torch.float64)))
    return persistence, np.sqrt(np.array(carried) / (2 * space.shape[1]))


def _inner(left: Tensor, right: Tensor) -> float:
    """Inner product of two matrices."""
    return float((left * right).sum(dtype=torch.float64))


def chance_and_products(
    moments: Covariances, sets: Sequence[Readings], again: Sequence[Readings], room: Room = IN_MEMORY
) -> tuple[list[Chance], list[Products]]:
    """Chance under random bases for each of ``sets``, and the products of each of ``again``.

    One pass over the states for each layer, whatever the number of sets of lenses. ``room``: where what is kept for each
    layer lies.
    """
    space, count = principal_space(moments) if sets else None, len(moments.own)
    goals = goals_in(space, moments, room) if space is not None else None
    layer_of = [layer_products_of_moments(moments, one)[0] for one in sets]
    known = [later_readings_of_moments(moments, one) for one in (*sets, *again)]
    others = [layer_products_of_moments(moments, one) for one in again]
    rows: list[list[dict[str, Array]]] = [[] for _ in again]
    spreads: list[list[tuple[Array, Array]]] = [[] for _ in sets]
    for i in range(count - 1):
        later = moments.later(i)
        for into, maps, layer, of_later in zip(spreads, sets, layer_of, known[: len(sets)], strict=True):
            loading = layer["rr"] / layer["rf"]
            assert space is not None
            assert goals is not None
            of_s, of_c = spreads_of(moments, i, later, maps, space, goals, layer["rf"], loading)
            here = products_of_moments(moments, i, later, maps, of_later, layer)
            with np.errstate(divide="ignore", invalid="ignore"):
                new = loading_at("v", here, layer["rr"][i], layer["rf"][i])
                scale = np.abs(loading[i] - new) * np.abs(1 + here["uf"] / layer["rf"][i])
                into.append((of_s, of_c / scale))
        for rows_of, one, of_later, (layer, _) in zip(rows, again, known[len(sets) :], others, strict=True):
            rows_of.append(products_of_moments(moments, i, later, one, of_later, layer))
    chances = [Chance(*(np.concatenate(parts) for parts in zip(*of_set, strict=True))) for of_set in spreads]
    products = [
        Products(
            {name: np.concatenate([row[name] for row in of_rows]) for name in of_rows[0]}, values, np.asarray(target)
        )
        for of_rows, (values, target) in zip(rows, others, strict=True)
    ]
    return chances, products
