"""The catalogue of indices: what each is called, how it is computed, where it compares, how to read it.

To add an index, add one :class:`Index` to :data:`INDICES`. ``indices.csv``, the terminal, ``compare``, the claims that a
suite may make and the pages about indices are made from the catalogue.
"""

import hashlib
import re
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.measures.formulas import (
    Keep,
    Layers,
    consistency,
    distance_trend,
    explained_by_distance,
    gain_tracking,
    gain_visibility,
    loo_retention,
    mean_pair_penalty,
    mean_rotated_pair_penalty,
    movement,
    pair_consistency,
    retention,
    retention_by_view,
    rotated_retention,
    similarity_correlation,
    similarity_correlation_given_distance,
)
from lensbench.measures.index import WITHOUT_LAYER_0, Index
from lensbench.measures.means import Estimate, Means, Value, estimate, nothing_to_gain
from lensbench.measures.update.catalogue import OF_UPDATES
from lensbench.statistics import Array, interval

LARGEST_ROTATED_RETENTION = 0.9
"""Consistency is undefined where the null's upper bound exceeds this: one map then serves all random bases."""


def _pairs_from_1(i: Layers, j: Layers) -> NDArray[np.bool_]:
    return i > 0


def _pairs_apart(k: int) -> Keep:
    return lambda i, j: j - i == k


CATALOGUE = (
    *OF_UPDATES,
    Index(
        "constant_kl", "K_0", "K_0",
        "KL of the model's prediction from the best one that does not depend on the input, its mean: what there is to gain.",
        stage="none", unit="nats", comparable="models with the same tokens", compute=lambda m: Value(m.constant),
    ),
    Index(
        "shared_retention", "retention", "1 - sum_j (K_shared,j - K_jj) / sum_j (K_0 - K_jj)",
        "The share of what lenses per layer read that one lens for all layers keeps.",
        compute=lambda m: retention(m.own, m.shared, m.constant), shown=14,
    ),
    Index(
        "rotated_retention", "retention in random bases",
        "retention by lenses fitted with every layer in a random basis; mean over bases",
        "The random-basis null: retention where every layer is in a random basis. It is not zero, because a wide stream can "
        "serve several bases at once.",
        compute=rotated_retention, each_view=retention_by_view, shown=15,
    ),
    Index(
        "loo_shared_retention", "retention, layer left out", "retention by lenses fitted without the layer they read",
        "Retention where the lens that reads a layer was fitted without data of this layer.",
        compute=loo_retention, shown=19,
    ),
    Index(
        "shared_retention_refined", "retention, refined", "retention by lenses refined on KL",
        "Retention by lenses that were refined on KL. It has no refined null.", stage="refined",
        compute=lambda m: retention(m.own_refined, m.shared_refined, m.constant),
        variant_of="shared_retention", variant="refined", shown=18,
    ),
    Index(
        "shared_retention_without_layer0", "retention without layer 0", "retention with sums over j >= 1",
        "Retention by the same lenses, fitted to all layers, read from layer 1 on.",
        compute=lambda m: retention(m.own[..., 1:], m.shared[..., 1:], m.constant),
        variant_of="shared_retention", variant=WITHOUT_LAYER_0,
    ),
    Index(
        "rotated_retention_without_layer0", "retention in random bases without layer 0",
        "retention in random bases with sums over j >= 1",
        "The random-basis null, read from layer 1 on.",
        compute=partial(rotated_retention, first=1), each_view=partial(retention_by_view, first=1),
        variant_of="rotated_retention", variant=WITHOUT_LAYER_0,
    ),
    Index(
        "pair_penalty", "pair penalty", "mean over i < j of M_ij = ((K(T_ij, i) - K_ii) + (K(T_ij, j) - K_jj)) / 2",
        "M: what one lens for two layers costs over a lens for each, mean over pairs.", unit="nats",
        comparable="models with the same tokens and the same layers chosen", compute=mean_pair_penalty, shown=20,
    ),
    Index(
        "pair_penalty_rotated", "pair penalty in random bases", "the mean M_ij in random bases",
        "M where each of the two layers is in a random basis.", unit="nats",
        comparable="models with the same tokens and the same layers chosen", compute=mean_rotated_pair_penalty,
        variant_of="pair_penalty", variant="in random bases", shown=21,
    ),
    Index(
        "pair_consistency", "pair consistency", "1 - mean M_ij / mean M_ij in random bases",
        "Near 1: two layers share a lens at no cost. 0: they have no more in common than in random bases. It does not "
        "depend on directions that a layer leaves undetermined.",
        comparable="models of like depth, with the same layers chosen", compute=pair_consistency, shown=22,
    ),
    Index(
        "pair_consistency_without_layer0", "pair consistency without layer 0", "pair consistency over 1 <= i < j",
        "Pair consistency from layer 1 on.", comparable="models of like depth, with the same layers chosen",
        compute=partial(pair_consistency, first=1), variant_of="pair_consistency", variant=WITHOUT_LAYER_0, shown=23,
    ),
    Index(
        "gain_tracking", "gain tracking", "slope of K_shared,j+1 - K_shared,j on K_j+1,j+1 - K_jj",
        "Slope of the shared lens's steps on the per-layer lenses' own. Never read it alone: it misorders synthetic streams "
        "of known answer.", unit="slope", compute=gain_tracking, shown=24,
    ),
    Index(
        "gain_visibility", "gain visibility", "sum (K_ii - K_ij) / sum (K_ii - K_jj) over i < j < L",
        "The share of later layers' gain that a lens fixed at an earlier layer sees. Above 0: fixed lenses see gains. Below "
        "0: the representation changes, or new information overlaps what is carried along.",
        stage="matrix", comparable="lenses of the same tolerance", compute=gain_visibility, variant="all pairs of layers",
        shown=25, on_the_curve=True,
    ),
    Index(
        "gain_visibility_adjacent", "gain visibility, adjacent layers", "gain visibility over j = i + 1",
        "Gain visibility between adjacent layers.", stage="matrix", comparable="lenses of the same tolerance",
        compute=partial(gain_visibility, keep=lambda i, j: j == i + 1),
        variant_of="gain_visibility", variant="adjacent layers", shown=26,
    ),
    Index(
        "gain_visibility_adjacent_without_layer0", "gain visibility, adjacent layers without layer 0",
        "gain visibility over j = i + 1, i >= 1",
        "Gain visibility between adjacent layers from layer 1 on.",
        stage="matrix", comparable="lenses of the same tolerance",
        compute=partial(gain_visibility, keep=lambda i, j: (j == i + 1) & (i > 0)),
        variant_of="gain_visibility", variant="adjacent layers without layer 0",
    ),
    Index(
        "gain_visibility_without_layer0", "gain visibility without layer 0", "gain visibility over 1 <= i < j < L",
        "Gain visibility from layer 1 on: the step away from the embedding is often most of the sum.",
        stage="matrix", comparable="lenses of the same tolerance", compute=partial(gain_visibility, keep=_pairs_from_1),
        variant_of="gain_visibility", variant=WITHOUT_LAYER_0, shown=27, on_the_curve=True,
    ),
    Index(
        "movement", "movement", "sum D_ij / sum (K_ii - K_jj) over i < j < L, D_ij = E KL(q_ii || q_ij)",
        "How much changes under fixed lenses, per nat of gain. Visibility 0 with movement 0: carry-along.",
        stage="matrix", unit="nats per nat", comparable="lenses of the same tolerance", compute=movement, shown=28,
        on_the_curve=True,
    ),
    Index(
        "movement_without_layer0", "movement without layer 0", "movement over 1 <= i < j < L",
        "Movement from layer 1 on.", stage="matrix", unit="nats per nat", comparable="lenses of the same tolerance",
        compute=partial(movement, keep=_pairs_from_1), variant_of="movement", variant=WITHOUT_LAYER_0,
    ),
    Index(
        "distance_trend", "penalty with distance", "Spearman correlation of C_ij - C_jj with |i - j|, i != j",
        "Rank correlation of the published transfer penalty with the distance between layers.", stage="matrix",
        unit="rank correlation", source="2303.08112", compute=distance_trend, shown=29,
    ),
    Index(
        "distance_trend_forward", "penalty with distance, forward", "distance trend over i < j",
        "Distance trend of lenses that read later layers than their own.", stage="matrix", unit="rank correlation",
        source="2303.08112",
        compute=partial(distance_trend, keep=lambda i, j: i < j), variant_of="distance_trend", variant="forward",
    ),
    Index(
        "distance_trend_backward", "penalty with distance, backward", "distance trend over i > j",
        "Distance trend of lenses that read earlier layers than their own.", stage="matrix", unit="rank correlation",
        source="2303.08112",
        compute=partial(distance_trend, keep=lambda i, j: i > j), variant_of="distance_trend", variant="backward",
    ),
    Index(
        "shared_consistency", "consistency", "(retention - the same in random bases) / (1 - the same in random bases)",
        "How much more one lens keeps than it would in random bases. 0: no more. 1: one lens does all. Above 1: it reads "
        "held-out text better than lenses per layer, which are fitted to less. Blind to information that is carried along "
        "unchanged.",
        compute=lambda m: consistency(retention(m.own, m.shared, m.constant), rotated_retention(m)),
        made_of=("shared_retention", "rotated_retention"), shown=16,
    ),
    Index(
        "shared_consistency_without_layer0", "consistency without layer 0", "consistency of the retentions without layer 0",
        "Consistency of the same lenses, read from layer 1 on.",
        compute=lambda m: consistency(
            retention(m.own[..., 1:], m.shared[..., 1:], m.constant), rotated_retention(m, first=1)
        ),
        made_of=("shared_retention_without_layer0", "rotated_retention_without_layer0"),
        variant_of="shared_consistency", variant=WITHOUT_LAYER_0, shown=17,
    ),
    Index(
        "gain_visibility_distance_K", "gain visibility at distance K", "gain visibility over j = i + K",
        "Gain visibility over all pairs of layers that lie K apart.", stage="matrix",
        comparable="lenses of the same tolerance", at_distance=lambda k: partial(gain_visibility, keep=_pairs_apart(k)),
        variant_of="gain_visibility", variant="at distance K",
    ),
    Index(
        "movement_distance_K", "movement at distance K", "movement over j = i + K",
        "Movement over all pairs of layers that lie K apart.", stage="matrix", unit="nats per nat",
        comparable="lenses of the same tolerance", at_distance=lambda k: partial(movement, keep=_pairs_apart(k)),
        variant_of="movement", variant="at distance K",
    ),
    Index(
        "similarity_correlation", "penalty with covariance similarity",
        "Spearman correlation of C_ij - C_jj with the cosine of the layers' covariances, i != j",
        "Rank correlation of the published transfer penalty with the cosine of the layers' covariances. Negative: lenses "
        "transfer between layers that look alike.", stage="matrix", unit="rank correlation", source="2303.08112",
        of_similarity=similarity_correlation,
    ),
    Index(
        "similarity_correlation_given_distance", "penalty with covariance similarity, given distance",
        "the partial rank correlation, given |i - j|",
        "Similarity correlation without what both owe to the distance between layers.", stage="matrix",
        unit="rank correlation",
        of_similarity=similarity_correlation_given_distance, variant_of="similarity_correlation", variant="given distance",
    ),
    Index(
        "explained_by_distance", "penalty explained by distance",
        "R2 of K_ij - K_jj, i != j < L, on its mean at each distance |i - j|",
        "The share of the matrix's structure that the distance of two layers alone explains. Near 1, the matrix says no "
        "more than that near layers are alike. Only in suites with `evaluate.jacobian_matrix`.", stage="matrix",
        of_matrix=explained_by_distance,
    ),
    Index(
        "explained_by_distance_jacobian", "penalty explained by distance, Jacobian lenses",
        "the same of Jacobian lenses", "The same of the matrix of Jacobian lenses.", stage="backward",
        of_matrix=explained_by_distance, variant_of="explained_by_distance", variant="Jacobian lenses",
    ),
    Index(
        "layers", "L", "L", "L: how many blocks the model has.", stage="none", unit="count", comparable="all models",
        fact=True,
    ),
    Index(
        "rotated_rank", "rank", "rank of the subspace that rotations act on",
        "The rank of the subspace with 99 % of the variance (`fit.variance`), which the random bases of the null act on.",
        stage="none", unit="count", comparable="all models", fact=True,
    ),
)  # fmt: skip


INDICES: dict[str, Index] = {index.name: index for index in CATALOGUE}
"""Name -> index, in the order of ``indices.csv``. An index that is made of others stands after them."""


def find_index(name: str) -> Index:
    """The index of a row of ``indices.csv``; ``movement_distance_3`` is one of the family ``movement_distance_K``.

    Raises :class:`LensbenchError` for a name that the catalogue does not have.
    """
    found = INDICES.get(name) or INDICES.get(re.sub(r"_\d+$", "_K", name))
    if found is None:
        raise LensbenchError(f"there is no index {name!r}")
    return found


def shown_indices() -> tuple[str, ...]:
    """The names of the indices that tables print, in their order."""
    return tuple(sorted((i.name for i in INDICES.values() if i.shown is not None), key=lambda n: INDICES[n].shown or 0))


def compared_quantities() -> tuple[str, ...]:
    """What models are compared by, and what a suite may make claims about: losses, then the shown indices."""
    return ("ce", "bits_per_byte", *shown_indices())


def curve_indices() -> tuple[str, ...]:
    """The names of the indices that ``tolerances.csv`` follows."""
    return tuple(index.name for index in INDICES.values() if index.on_the_curve)


def similarity_indices() -> tuple[str, ...]:
    """The names of the indices that need the similarity of layers, which not every suite measures."""
    return tuple(index.name for index in INDICES.values() if index.of_similarity is not None)


def structure_indices() -> tuple[Index, ...]:
    """The indices of whole matrices, which are there where a suite asks for that of Jacobian lenses."""
    return tuple(index for index in INDICES.values() if index.of_matrix is not None)


def update_indices() -> tuple[str, ...]:
    """The names of the indices of the update decomposition."""
    return tuple(index.name for index in INDICES.values() if index.of_updates)


def fact_indices() -> tuple[str, ...]:
    """The names of the facts of a stream."""
    return tuple(index.name for index in INDICES.values() if index.fact)


def variants_of(name: str) -> list[Index]:
    """The variants of an index, in the catalogue's order."""
    return [index for index in INDICES.values() if index.variant_of == name]


def tolerance_order(label: str) -> tuple[float, str]:
    """A key that sorts tolerances: zero first, then one standard error, then rising."""
    return (1e-9 if label == ONE_STANDARD_ERROR else float(label) if label[0].isdigit() else 1.0), label


def seed_of_rotations(model: str, seed: int) -> list[int]:
    """The seed of what the rotations add to an interval: a model's own, where documents are drawn for all models together.

    With one seed for all, the spread of rotations that are independent would cancel in a difference of two models.
    """
    return [seed, int.from_bytes(hashlib.sha256(model.encode()).digest()[:8])]


# Values
def values_of(m: Means) -> dict[str, Value]:
    """Every index that is made of means alone: for the point estimate, for draws, for refits."""
    # A denominator of zero makes an index undefined, with its reason, further on.
    with np.errstate(divide="ignore", invalid="ignore"):
        return {index.name: index.value(m) for index in INDICES.values() if index.compute is not None}


def draw_values(point: Means, draws: Means, seed: int | list[int]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Every index of :func:`values_of` at the point estimate and at every bootstrap draw.

    The spread over the few random bases enters the draws of their mean as a Student-t deviation, drawn with ``seed``, and so
    the draws of what is made of it.
    """
    at_draws: dict[str, Value] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for index in INDICES.values():
            if index.made_of is not None:
                kept, null = (at_draws[name] for name in index.made_of)
                at_draws[index.name] = consistency(kept, null)
            elif index.compute is not None:
                drawn = index.compute(draws)
                if index.each_view is not None:
                    drawn = _spread_over_views(drawn, index.each_view(point).value, seed)
                at_draws[index.name] = drawn
    return values_of(point), at_draws


def _spread_over_views(drawn: Value, views: Array, seed: int | list[int]) -> Value:
    """Draws of a mean over random bases, with the spread of the bases ``views`` in them."""
    if len(views) < 2:
        return drawn
    rng = np.random.default_rng([*([seed] if isinstance(seed, int) else seed), len(views)])
    deviation = stats.t.ppf(rng.uniform(size=len(drawn.value)), len(views) - 1) * views.std(ddof=1)
    return Value(drawn.value + deviation / len(views) ** 0.5, drawn.denominator)


# Estimates
def estimates(point: Means, draws: Means, *, seed: int | list[int], clusters: int) -> dict[str, Estimate]:
    """Every index of :func:`values_of` with its interval, or the reason why it is undefined."""
    return estimates_from(*draw_values(point, draws, seed), point, clusters)


def estimates_from(
    at_point: dict[str, Value], at_draws: dict[str, Value], point: Means, clusters: int
) -> dict[str, Estimate]:
    """:func:`estimates` from the values of :func:`draw_values`."""
    return {
        name: estimate(
            here, at_draws[name], float(point.constant), clusters, _undefined(INDICES[name], at_draws, point)
        )
        for name, here in at_point.items()
    }


def _undefined(index: Index, at_draws: dict[str, Value], point: Means) -> str:
    """The reason why an index is undefined whatever its denominator is; otherwise empty."""
    if index.stage == "none":
        return ""
    if reason := nothing_to_gain(point):
        return reason
    if index.made_of is not None:
        null_high = float(interval(at_draws[index.made_of[1]].value)[1])
        if null_high > LARGEST_ROTATED_RETENTION:
            return f"undefined: one map serves random bases too (rotated retention up to {null_high:.2f})"
    if index.stage == "matrix":
        return without_the_matrix(point)
    if index.name in PAIR_INDICES and not np.isfinite(point.pair).any():
        return f"{LEFT_OUT}no lens was fitted to two layers (fit.pairs = false)"
    if index.stage == "refined" and not np.isfinite(point.own_refined).any():
        return "undefined: no lens was refined"
    return ""


LEFT_OUT = "left out: "
"""How the reason begins why an index is undefined because the suite did not ask for what it is made of"""


PAIR_INDICES = (
    "pair_penalty",
    "pair_penalty_rotated",
    "pair_consistency",
    "pair_consistency_without_layer0",
)
"""Those made of lenses for two layers"""


def without_the_matrix(point: Means) -> str:
    """The reason why what is read off the transfer matrix is undefined where a suite leaves it out; otherwise empty."""
    apart = ~np.eye(point.transfer.shape[-1], dtype=bool)
    apart[-1] = False  # the logit lens reads every layer whether there is a matrix or not
    if apart.any() and not np.isfinite(point.transfer[apart]).any():
        return f"{LEFT_OUT}lenses were read at their own layers alone (evaluate.matrix = false)"
    return ""


def similarity_estimates(point: Means, draws: Means, similarity: Array, clusters: int) -> dict[str, Estimate]:
    """The indices that need the similarity of layers ``[L, L]``, which is that of the fitting tokens and held fixed."""
    found = {}
    for index in INDICES.values():
        if index.of_similarity is not None:
            here, there = (index.of_similarity(m, similarity) for m in (point, draws))
            found[index.name] = estimate(here, there, float(point.constant), clusters, without_the_matrix(point))
    return found


def by_distance(layers: int) -> dict[str, Index]:
    """The families of indices over pairs of layers, written out: one index for each distance 1..L-1."""
    found = {}
    for k in range(1, layers):
        for family in INDICES.values():
            if family.at_distance is not None:
                name = f"{family.name.removesuffix('K')}{k}"
                found[name] = replace(family, name=name, at_distance=None, compute=family.at_distance(k))
    return found


def distance_estimates(point: Means, draws: Means, clusters: int) -> dict[str, Estimate]:
    """The indices of :func:`by_distance` with their intervals."""
    constant, reason = float(point.constant), nothing_to_gain(point) or without_the_matrix(point)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            name: estimate(index.value(point), index.value(draws), constant, clusters, reason)
            for name, index in by_distance(point.transfer.shape[-1] - 1).items()
        }


# Documentation
def indices_table() -> str:
    """How to read each index, as Markdown: a row for each, with the variants it has."""
    main = [index for index in INDICES.values() if not index.variant_of]
    main.sort(key=lambda index: (index.shown is None, index.shown or 0))
    lines = ["| index | reading |", "|---|---|"]
    for index in main:
        variants = ", ".join(f"`{v.name}`" for v in variants_of(index.name))
        also = f" Also {variants}" if variants else ""
        lines.append(f"| `{index.name}` | {index.reading}{also} |")
    return "\n".join(lines) + "\n"


def catalogue_table() -> str:
    """The whole catalogue as Markdown, for the schema: what each index is and where its values can be compared."""
    lines = ["| index | called | formula | unit | lenses | compares | defined in |", "|---|---|---|---|---|---|---|"]
    for i in INDICES.values():
        source = i.source if i.source == "lensbench" else f"arXiv {i.source}"
        formula = i.formula.replace("|", r"\|")
        lines.append(f"| `{i.name}` | {i.label} | {formula} | {i.unit} | {i.stage} | {i.comparable} | {source} |")
    return "\n".join(lines) + "\n"
