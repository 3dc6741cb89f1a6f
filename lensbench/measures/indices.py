"""Indices of a transfer matrix and their intervals: pure functions of arrays (definitions in the README's table).

Every function takes mean KLs whose leading axes are free, so that one call serves the point estimate and all bootstrap
draws. Layers are 0..L; per-layer arrays hold layers 0..L-1.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.statistics import Array, few_clusters, interval

Layers = NDArray[np.int64]


SMALLEST_DENOMINATOR = 0.02
"""An index is undefined where its denominator's interval reaches below this share of K_0."""


SMALLEST_CONSTANT = 0.05
"""K_0, nats/token, below which a model predicts nearly the same everywhere (as untrained ones do): nothing is compared."""


LARGEST_ROTATED_RETENTION = 0.9
"""Consistency is undefined where the null's upper bound exceeds this: one map then serves all random bases."""


@dataclass(frozen=True)
class Means:
    """Means, nats/token, of everything that an index needs: KL to the model's own distribution where not said otherwise.

    ``constant`` ``[...]`` K_0. ``transfer``, ``transfer_ce``, ``movement`` ``[..., L+1, L+1]``: K_ij, C_ij and D_ij of the
    headline matrix.
    ``own`` ``[..., L]``: per-layer lenses with prior zero; ``shared``, ``shared_loo`` ``[..., L]`` and ``rotated``
    ``[..., views, L]`` of the same prior and stage. ``own_refined``, ``shared_refined`` ``[..., L]``: the refined stage.
    ``pair`` ``[..., L, L]``: at [i, j], i != j, the lens of layers i and j as it reads j; ``pair_rotated``
    ``[..., views, L, L]``. NaN where there is no such lens.
    """

    constant: Array
    transfer: Array
    transfer_ce: Array
    movement: Array
    own: Array
    shared: Array
    shared_loo: Array
    rotated: Array
    own_refined: Array
    shared_refined: Array
    pair: Array
    pair_rotated: Array

    @classmethod
    def of_clusters(cls, sums: "Means", tokens: Array, weights: Array | None = None) -> "Means":
        """Weighted means over clusters: every field of ``sums`` is ``[clusters, ...]`` sums, ``tokens`` ``[clusters]``.

        ``weights`` ``[draws, clusters]`` gives ``[draws, ...]`` means; None the plain means.
        """
        w = np.ones((1, len(tokens))) if weights is None else weights
        total = w @ tokens
        means = {}
        for name, values in sums.items():
            flat = (w @ values.reshape(len(tokens), -1)) / total[:, None]
            shaped = flat.reshape(len(w), *values.shape[1:])
            means[name] = shaped[0] if weights is None else shaped
        return cls(**means)

    def items(self) -> list[tuple[str, Array]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


@dataclass(frozen=True)
class Value:
    """An index at every draw, with the denominator that decides whether it is defined (None: always)."""

    value: Array
    denominator: Array | None = None


def _pairs(layers: int) -> tuple[Layers, Layers]:
    """All i < j of layers 0..L-1."""
    i, j = np.triu_indices(layers, k=1)
    return i.astype(np.int64), j.astype(np.int64)


def retention(own: Array, shared: Array, constant: Array) -> Value:
    """``1 - sum_j (K_shared,j - K_jj) / sum_j (K_0 - K_jj)``: share of the per-layer lenses' information kept."""
    gained = (constant[..., None] - own).sum(-1)
    return Value(1 - (shared - own).sum(-1) / gained, gained)


def rotated_retention(m: Means, first: int = 0) -> Value:
    """Mean retention over the rotated views, read from layer ``first`` on.

    The per-layer KL is the plain view's (prior zero: it cannot change).
    """
    each = retention(m.own[..., None, first:], m.rotated[..., first:], m.constant[..., None])
    return Value(each.value.mean(-1), None if each.denominator is None else each.denominator[..., 0])


def loo_retention(m: Means) -> Value:
    """:func:`retention` of lenses that never saw the layer they read, over the layers that have one."""
    there = np.isfinite(m.shared_loo).reshape(-1, m.shared_loo.shape[-1]).all(0)
    return retention(m.own[..., there], m.shared_loo[..., there], m.constant)


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


def mean_pair_penalty(m: Means, *, rotated: bool = False, first: int = 0) -> Value:
    """Mean of M_ij over the pairs from layer ``first`` on that have a lens, in the plain view or over the rotated ones."""
    own = m.own[..., first:]
    if not rotated:
        return Value(_mean_of_known(pair_penalty(own, m.pair[..., first:, first:])))
    each = pair_penalty(own[..., None, :], m.pair_rotated[..., first:, first:])
    return Value(_mean_of_known(each).mean(-1))


def pair_consistency(m: Means, first: int = 0) -> Value:
    """``1 - mean M_ij / mean M_ij^rot``: 0 = a pair of layers has no more in common than in random bases."""
    null = mean_pair_penalty(m, rotated=True, first=first).value
    return Value(1 - mean_pair_penalty(m, first=first).value / null, null)


def consistency(kept: Value, null: Value) -> Value:
    """``(R - R_rot) / (1 - R_rot)``."""
    return Value((kept.value - null.value) / (1 - null.value), kept.denominator)


def gain_visibility(m: Means, keep: Callable[[Layers, Layers], NDArray[np.bool_]] | None = None) -> Value:
    """``sum V_ij / sum G_ij`` over i < j <= L-1: ``V = K_ii - K_ij``, ``G = K_ii - K_jj``."""
    seen, gained = _visible_and_own_gain(m, keep)
    return Value(seen.sum(-1) / gained.sum(-1), gained.sum(-1))


def movement(m: Means, keep: Callable[[Layers, Layers], NDArray[np.bool_]] | None = None) -> Value:
    """``sum D_ij / sum G_ij`` over i < j <= L-1."""
    _, gained = _visible_and_own_gain(m, keep)
    i, j = _pairs(m.transfer.shape[-1] - 1)
    if keep is not None:
        i, j = i[keep(i, j)], j[keep(i, j)]
    return Value(m.movement[..., i, j].sum(-1) / gained.sum(-1), gained.sum(-1))


def _visible_and_own_gain(
    m: Means, keep: Callable[[Layers, Layers], NDArray[np.bool_]] | None = None
) -> tuple[Array, Array]:
    i, j = _pairs(m.transfer.shape[-1] - 1)
    if keep is not None:
        kept = keep(i, j)
        i, j = i[kept], j[kept]
    k = m.transfer
    return k[..., i, i] - k[..., i, j], k[..., i, i] - k[..., j, j]


def gain_tracking(m: Means) -> Value:
    """Least-squares slope of the shared lens's step ``K_shared,j+1 - K_shared,j`` on the per-layer lenses' own."""
    own, shared = np.diff(m.own, axis=-1), np.diff(m.shared, axis=-1)
    centred = own - own.mean(-1, keepdims=True)
    spread = (centred**2).sum(-1)
    # The slope's denominator is a sum of squares; its root is in nats and can be held against K_0.
    return Value((centred * (shared - shared.mean(-1, keepdims=True))).sum(-1) / spread, np.sqrt(spread))


def distance_trend(m: Means, direction: str = "both") -> Value:
    """Spearman correlation of the published penalty ``C_ij - C_jj`` with ``|i - j|`` over i != j of layers 0..L-1.

    ``forward``: lens before stream, i < j; ``backward``: i > j.
    """
    layers = m.transfer.shape[-1] - 1
    penalty = m.transfer_ce - np.diagonal(m.transfer_ce, axis1=-2, axis2=-1)[..., None, :]
    i, j = np.nonzero(~np.eye(layers, dtype=bool))
    kept = {"both": i != j, "forward": i < j, "backward": i > j}[direction]
    i, j = i[kept], j[kept]
    return Value(_spearman(penalty[..., i, j], np.abs(i - j).astype(float)))


def _spearman(values: Array, against: Array) -> Array:
    """Rank correlation along the last axis; not a number where either is constant."""
    a, b = stats.rankdata(values, axis=-1), stats.rankdata(against)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum())


def similarity_correlation(m: Means, similarity: Array, *, given_distance: bool = False) -> Value:
    """Spearman correlation of the published penalty ``C_ij - C_jj`` with representation similarity ``[L, L]``, i != j.

    arXiv 2303.08112 (section 4.2) finds it negative. ``given_distance``: the partial rank correlation, with what both owe to
    the distance of the layers taken out.
    """
    layers = m.transfer.shape[-1] - 1
    penalty = m.transfer_ce - np.diagonal(m.transfer_ce, axis1=-2, axis2=-1)[..., None, :]
    i, j = np.nonzero(~np.eye(layers, dtype=bool))
    values, alike, apart = penalty[..., i, j], similarity[i, j], np.abs(i - j).astype(float)
    direct = _spearman(values, alike)
    if not given_distance:
        return Value(direct)
    of_penalty, of_similarity = _spearman(values, apart), _spearman(alike, apart)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((1 - of_penalty**2) * (1 - of_similarity**2))
        return Value((direct - of_penalty * of_similarity) / left)


OF_SIMILARITY = ("similarity_correlation", "similarity_correlation_given_distance")


def similarity_estimates(point: Means, draws: Means, similarity: Array, clusters: int) -> dict[str, "Estimate"]:
    """Both of them with their intervals over documents; the similarity is that of the fitting tokens, held fixed."""
    found = {}
    for name in OF_SIMILARITY:
        given = name != OF_SIMILARITY[0]
        here, there = (similarity_correlation(m, similarity, given_distance=given) for m in (point, draws))
        found[name] = estimate(here, there, float(point.constant), clusters)
    return found


def by_distance(layers: int) -> dict[str, Callable[[Means], Value]]:
    """``gain_visibility_distance_K`` and ``movement_distance_K`` for all pairs of layers 0..L-1 that lie K apart."""

    def of(k: int) -> tuple[Callable[[Means], Value], Callable[[Means], Value]]:
        def keep(i: Layers, j: Layers) -> NDArray[np.bool_]:
            return j - i == k

        return (lambda m: gain_visibility(m, keep)), (lambda m: movement(m, keep=keep))

    functions: dict[str, Callable[[Means], Value]] = {}
    for k in range(1, layers):
        functions[f"gain_visibility_distance_{k}"], functions[f"movement_distance_{k}"] = of(k)
    return functions


def distance_estimates(point: Means, draws: Means, clusters: int) -> dict[str, "Estimate"]:
    """All of :func:`by_distance` with their intervals over documents."""
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, function in by_distance(point.transfer.shape[-1] - 1).items():
            found[name] = estimate(
                function(point), function(draws), float(point.constant), clusters, nothing_to_gain(point)
            )
    return found


def nothing_to_gain(point: Means) -> str:
    """The reason why all indices of a model are undefined that predicts nearly the same everywhere; else nothing."""
    constant = float(point.constant)
    if constant >= SMALLEST_CONSTANT:
        return ""
    return f"undefined: the model predicts nearly the same everywhere (K_0 = {constant:.2g} nats)"


INDICES: dict[str, tuple[str, Callable[[Means], Value]]] = {
    "constant_kl": ("none", lambda m: Value(m.constant)),
    "shared_retention": ("closed", lambda m: retention(m.own, m.shared, m.constant)),
    "rotated_retention": ("closed", rotated_retention),
    "loo_shared_retention": ("closed", loo_retention),
    "shared_retention_refined": ("refined", lambda m: retention(m.own_refined, m.shared_refined, m.constant)),
    # The same lenses, fitted to all layers, read from layer 1 on: how much of a retention is the embedding's.
    "shared_retention_without_layer0": (
        "closed",
        lambda m: retention(m.own[..., 1:], m.shared[..., 1:], m.constant),
    ),
    "rotated_retention_without_layer0": ("closed", lambda m: rotated_retention(m, first=1)),
    "pair_penalty": ("closed", mean_pair_penalty),
    "pair_penalty_rotated": ("closed", lambda m: mean_pair_penalty(m, rotated=True)),
    "pair_consistency": ("closed", pair_consistency),
    "pair_consistency_without_layer0": ("closed", lambda m: pair_consistency(m, first=1)),
    "gain_tracking": ("closed", gain_tracking),
    "gain_visibility": ("closed", gain_visibility),
    "gain_visibility_adjacent": ("closed", lambda m: gain_visibility(m, lambda i, j: j == i + 1)),
    # Where the step away from the embedding is most of the sum.
    "gain_visibility_adjacent_without_layer0": (
        "closed",
        lambda m: gain_visibility(m, lambda i, j: (j == i + 1) & (i > 0)),
    ),
    "gain_visibility_without_layer0": ("closed", lambda m: gain_visibility(m, lambda i, j: i > 0)),
    "movement": ("closed", movement),
    "movement_without_layer0": ("closed", lambda m: movement(m, lambda i, j: i > 0)),
    "distance_trend": ("closed", distance_trend),
    "distance_trend_forward": ("closed", lambda m: distance_trend(m, "forward")),
    "distance_trend_backward": ("closed", lambda m: distance_trend(m, "backward")),
}
"""Name -> (stage of the lenses it compares, function). ``shared_consistency``, with and without
layer 0, is made of two of them."""


def of_the_matrix(name: str) -> bool:
    """Whether an index is read off the headline matrix."""
    return name.startswith(("gain_visibility", "movement", "distance"))


OF_THE_MATRIX = {name for name in INDICES if of_the_matrix(name)}


ON_THE_CURVE = ("gain_visibility", "gain_visibility_without_layer0", "movement")
"""What is followed over the allowed loss of the matrix's lenses."""


def tolerance_order(label: str) -> tuple[float, str]:
    """Zero first, then one standard error, then rising."""
    return (1e-9 if label == ONE_STANDARD_ERROR else float(label) if label[0].isdigit() else 1.0), label


def with_last(matrix: Array) -> Array:
    """A matrix ``[..., n, n]`` of lenses of layers, with an unknown logit lens and last layer: ``[..., n+1, n+1]``."""
    padded = np.full((*matrix.shape[:-2], matrix.shape[-2] + 1, matrix.shape[-1] + 1), np.nan)
    padded[..., :-1, :-1] = matrix
    return padded


def of_layers(m: Means, transfer: Array, moved: Array) -> Means:
    """Means with the matrix ``[..., n, n]`` of some layers (and no logit lens) in place of their own."""
    return replace(m, transfer=with_last(transfer), movement=with_last(moved))


@dataclass(frozen=True)
class Estimate:
    """An index with its 95 % interval; ``value`` is None where undefined, and ``reason`` says why, or warns."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""


def seed_of_rotations(model: str, seed: int) -> list[int]:
    """The seed of what the rotations add to an interval: a model's own, where documents are drawn for all models together.

    With one seed for all, the spread of rotations that are independent would cancel in a difference of two models.
    """
    return [seed, int.from_bytes(hashlib.sha256(model.encode()).digest()[:8])]


def draw_values(point: Means, draws: Means, seed: int | list[int]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Every index at the point estimate and at every bootstrap draw, consistency included.

    The spread over the few rotated views enters the draws of ``rotated_retention`` as a Student-t deviation of their mean,
    drawn with ``seed``.
    """
    # A denominator of zero makes an index undefined, with its reason, further on.
    with np.errstate(divide="ignore", invalid="ignore"):
        return _draw_values(point, draws, [seed] if isinstance(seed, int) else seed)


def _draw_values(point: Means, draws: Means, seed: list[int]) -> tuple[dict[str, Value], dict[str, Value]]:
    at_point = {name: function(point) for name, (_, function) in INDICES.items()}
    at_draws = {name: function(draws) for name, (_, function) in INDICES.items()}
    for suffix, first in (("", 0), ("_without_layer0", 1)):
        null = f"rotated_retention{suffix}"
        views = retention(point.own[None, first:], point.rotated[:, first:], point.constant[None]).value
        if len(views) > 1:
            rng = np.random.default_rng([*seed, len(views)])
            deviation = stats.t.ppf(rng.uniform(size=len(draws.constant)), len(views) - 1) * views.std(ddof=1)
            spread = at_draws[null].value + deviation / len(views) ** 0.5
            at_draws[null] = Value(spread, at_draws[null].denominator)
        for values in (at_point, at_draws):
            values[f"shared_consistency{suffix}"] = consistency(values[f"shared_retention{suffix}"], values[null])
    return at_point, at_draws


def estimates(point: Means, draws: Means, *, seed: int | list[int], clusters: int) -> dict[str, Estimate]:
    """Every index with its interval, or the reason why it is undefined."""
    at_point, at_draws = draw_values(point, draws, seed)
    result = {}
    for name, here in at_point.items():
        reason = ""
        if name.startswith("shared_consistency"):
            null = at_draws[name.replace("shared_consistency", "rotated_retention")]
            null_high = float(interval(null.value)[1])
            if null_high > LARGEST_ROTATED_RETENTION:
                reason = f"undefined: one map serves random bases too (rotated retention up to {null_high:.2f})"
        if name == "shared_retention_refined" and not np.isfinite(point.own_refined).any():
            reason = "undefined: no lens was refined"
        if name != "constant_kl":
            reason = nothing_to_gain(point) or reason
        result[name] = estimate(here, at_draws[name], float(point.constant), clusters, reason)
    return result


def estimate(here: Value, drawn: Value, constant: float, clusters: int, undefined: str = "") -> Estimate:
    """One index with its interval, or the reason why it is undefined: its denominator first, then the one given."""
    floor = max(0.0, SMALLEST_DENOMINATOR * constant)
    reason = undefined
    if drawn.denominator is not None and float(interval(drawn.denominator)[0]) < floor:
        reason = f"undefined: the interval of its denominator reaches below {floor:.3g} nats (2 % of K_0)"
    if not reason and not (np.isfinite(here.value) and np.isfinite(drawn.value).all()):
        reason = "undefined: constant over layers"
    if reason:
        return Estimate(None, None, None, reason)
    low, high = interval(drawn.value)
    return Estimate(float(here.value), float(low), float(high), few_clusters(clusters))


SHOWN = (
    "shared_retention",
    "rotated_retention",
    "shared_consistency",
    "shared_consistency_without_layer0",
    "shared_retention_refined",
    "loo_shared_retention",
    "pair_penalty",
    "pair_penalty_rotated",
    "pair_consistency",
    "pair_consistency_without_layer0",
    "gain_tracking",
    "gain_visibility",
    "gain_visibility_adjacent",
    "gain_visibility_without_layer0",
    "movement",
    "distance_trend",
)


COMPARED = ("ce", "bits_per_byte", *SHOWN)
"""What models are held against each other by."""
