"""Formulas of the indices: functions of :class:`Means`. What each is called and how to read it stands in ``indices``.

Leading axes of the means are free: one call serves the point estimate and all bootstrap draws.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lensbench.measures.means import Means, Value
from lensbench.statistics import Array

Layers = NDArray[np.int64]
Keep = Callable[[Layers, Layers], NDArray[np.bool_]]
"""Which pairs of layers (i, j) an index is made of."""


def _pairs(layers: int, keep: Keep | None = None) -> tuple[Layers, Layers]:
    """All i < j of layers 0..L-1, or those to keep."""
    i, j = (k.astype(np.int64) for k in np.triu_indices(layers, k=1))
    if keep is None:
        return i, j
    kept = keep(i, j)
    return i[kept], j[kept]


# Lenses for all layers
def retention(own: Array, shared: Array, constant: Array) -> Value:
    """``1 - sum_j (K_shared,j - K_jj) / sum_j (K_0 - K_jj)``: share of the per-layer lenses' information kept."""
    gained = (constant[..., None] - own).sum(-1)
    return Value(1 - (shared - own).sum(-1) / gained, gained)


def retention_by_view(m: Means, first: int = 0) -> Value:
    """:func:`retention` in each of the random bases, read from layer ``first`` on: ``[..., views]``.

    The per-layer KL is that of the plain basis (with prior zero it cannot change).
    """
    return retention(m.own[..., None, first:], m.rotated[..., first:], m.constant[..., None])


def rotated_retention(m: Means, first: int = 0) -> Value:
    """Mean of :func:`retention_by_view` over the random bases."""
    each = retention_by_view(m, first)
    return Value(each.value.mean(-1), None if each.denominator is None else each.denominator[..., 0])


def loo_retention(m: Means) -> Value:
    """:func:`retention` of lenses that never saw the layer they read, over the layers that have one."""
    there = np.isfinite(m.shared_loo).reshape(-1, m.shared_loo.shape[-1]).all(0)
    return retention(m.own[..., there], m.shared_loo[..., there], m.constant)


def consistency(kept: Value, null: Value) -> Value:
    """``(R - R_rot) / (1 - R_rot)``, R the retention."""
    return Value((kept.value - null.value) / (1 - null.value), kept.denominator)


def gain_tracking(m: Means) -> Value:
    """Least-squares slope of the shared lens's step ``K_shared,j+1 - K_shared,j`` on the per-layer lenses' own step."""
    own, shared = np.diff(m.own, axis=-1), np.diff(m.shared, axis=-1)
    centred = own - own.mean(-1, keepdims=True)
    spread = (centred**2).sum(-1)
    # The slope's denominator is a sum of squares; its root is in nats and can be held against K_0.
    return Value((centred * (shared - shared.mean(-1, keepdims=True))).sum(-1) / spread, np.sqrt(spread))


# Lenses for two layers
def pair_penalty(own: Array, pair: Array) -> Array:
    """``M_ij = ((K(T_ij, i) - K_ii) + (K(T_ij, j) - K_jj)) / 2`` of all pairs i < j: ``[..., L (L-1) / 2]``.

    NaN for a pair without a lens.
    """
    excess = pair - own[..., None, :]
    i, j = _pairs(pair.shape[-1])
    return (excess[..., i, j] + excess[..., j, i]) / 2


def _mean_of_known(values: Array) -> Array:
    """Mean along the last axis of what is known; NaN where nothing is."""
    known = np.isfinite(values).all(axis=tuple(range(values.ndim - 1)))
    mean: Array = values[..., known].mean(-1) if known.any() else np.full(values.shape[:-1], np.nan)
    return mean


def mean_pair_penalty(m: Means, first: int = 0) -> Value:
    """Mean of M_ij over the pairs from layer ``first`` on that have a lens."""
    return Value(_mean_of_known(pair_penalty(m.own[..., first:], m.pair[..., first:, first:])))


def mean_rotated_pair_penalty(m: Means, first: int = 0) -> Value:
    """:func:`mean_pair_penalty` in random bases, mean over them."""
    each = pair_penalty(m.own[..., None, first:], m.pair_rotated[..., first:, first:])
    return Value(_mean_of_known(each).mean(-1))


def pair_consistency(m: Means, first: int = 0) -> Value:
    """``1 - mean M_ij / mean M_ij^rot``: 0 = a pair of layers has no more in common than in random bases."""
    null = mean_rotated_pair_penalty(m, first).value
    return Value(1 - mean_pair_penalty(m, first).value / null, null)


# The transfer matrix
def gain_visibility(m: Means, keep: Keep | None = None) -> Value:
    """``sum V_ij / sum G_ij`` over i < j <= L-1: ``V = K_ii - K_ij``, ``G = K_ii - K_jj``."""
    i, j = _pairs(m.transfer.shape[-1] - 1, keep)
    k = m.transfer
    gained = (k[..., i, i] - k[..., j, j]).sum(-1)
    return Value((k[..., i, i] - k[..., i, j]).sum(-1) / gained, gained)


def movement(m: Means, keep: Keep | None = None) -> Value:
    """``sum D_ij / sum G_ij`` over i < j <= L-1."""
    i, j = _pairs(m.transfer.shape[-1] - 1, keep)
    gained = (m.transfer[..., i, i] - m.transfer[..., j, j]).sum(-1)
    return Value(m.movement[..., i, j].sum(-1) / gained, gained)


def _published_penalty(m: Means, keep: Keep | None = None) -> tuple[Array, Layers, Layers]:
    """``C_ij - C_jj`` at i != j of layers 0..L-1 ``[..., pairs]``, and the layers i, j of each."""
    penalty = m.transfer_ce - np.diagonal(m.transfer_ce, axis1=-2, axis2=-1)[..., None, :]
    i, j = np.nonzero(~np.eye(m.transfer.shape[-1] - 1, dtype=bool))
    if keep is not None:
        kept = keep(i, j)
        i, j = i[kept], j[kept]
    return penalty[..., i, j], i, j


def distance_trend(m: Means, keep: Keep | None = None) -> Value:
    """Spearman correlation of the published penalty ``C_ij - C_jj`` with ``|i - j|`` over i != j of layers 0..L-1."""
    values, i, j = _published_penalty(m, keep)
    return Value(_spearman(values, np.abs(i - j).astype(float)))


def _spearman(values: Array, against: Array) -> Array:
    """Rank correlation along the last axis; not a number where either is constant."""
    a, b = stats.rankdata(values, axis=-1), stats.rankdata(against)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    with np.errstate(invalid="ignore"):
        correlation: Array = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum())
    return correlation


def similarity_correlation(m: Means, similarity: Array) -> Value:
    """Spearman correlation of the published penalty ``C_ij - C_jj`` with representation similarity ``[L, L]``, i != j.

    arXiv 2303.08112 (section 4.2) finds it negative.
    """
    values, i, j = _published_penalty(m)
    return Value(_spearman(values, similarity[i, j]))


def similarity_correlation_given_distance(m: Means, similarity: Array) -> Value:
    """The partial rank correlation: :func:`similarity_correlation` without what both owe to the layers' distance."""
    values, i, j = _published_penalty(m)
    alike, apart = similarity[i, j], np.abs(i - j).astype(float)
    direct, of_penalty, of_similarity = _spearman(values, alike), _spearman(values, apart), _spearman(alike, apart)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((1 - of_penalty**2) * (1 - of_similarity**2))
        return Value((direct - of_penalty * of_similarity) / left)


def explained_by_distance(kl: Array) -> Value:
    """Share of the variance of ``K_ij - K_jj`` over i != j < L that its mean at each distance ``|i - j|`` explains: R2.

    ``kl`` ``[..., L+1, L+1]``. Of L layers with no structure at all it is about ``(L - 2) / (L (L - 1) - 1)``: as many means
    as distances are fitted.
    """
    layers = kl.shape[-1] - 1
    penalty = kl - np.diagonal(kl, axis1=-2, axis2=-1)[..., None, :]
    i, j = np.nonzero(~np.eye(layers, dtype=bool))
    values, distance = penalty[..., i, j], np.abs(i - j)
    left = values.copy()
    for k in range(1, layers):
        left[..., distance == k] -= values[..., distance == k].mean(-1, keepdims=True)
    return Value(1 - (left**2).sum(-1) / ((values - values.mean(-1, keepdims=True)) ** 2).sum(-1))
