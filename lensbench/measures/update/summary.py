"""The results of the update decomposition: a row for each pair and each block, and the model's indices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lensbench.measures.means import Estimate
from lensbench.measures.update.decomposition import NORMED, Decomposition, Variant, spread_by_refits
from lensbench.measures.update.gates import LARGEST_BASELINE, REASONS, pairs_needed
from lensbench.measures.update.quantities import Quantities
from lensbench.statistics import Array, few_clusters, few_tokens, small_sample_interval, too_few_clusters

EXTRA_SPREAD = 0.1
"""Added to the spread of the share of every pair before pairs are weighted, so that no pair decides alone"""

REFITS_OF_A_VARIANCE, VARIANCE_OF_T = 4, 3
"""Fewest refits with which Student's t, of one degree of freedom less, has a variance, and that variance"""

WITHOUT_LAYER_0 = "_without_layer0"

PAIR_COLUMNS = ("carried", "persistence", "clarity", "room", "kept_low", "kept_high")
"""Quantities of a pair that have an interval in its row"""


def pair_rows(found: Decomposition) -> list[dict[str, Any]]:
    """A row for each pair of layers: its gate, and every quantity with its interval. Undefined values are None."""
    i, j = found.pairs
    drawn = {name: _drawn(found, name) for name in PAIR_COLUMNS}
    news = [found.news(np.arange(len(i)) == at) for at in range(len(i))]
    gained = _readable_by_pair(found)
    nothing = Estimate(None, None, None)
    rows = []
    for at in range(len(i)):
        row: dict[str, Any] = {
            "from_layer": found.layers[i[at]],
            "to_layer": found.layers[j[at]],
            "metric": found.metric,
            "ridge": found.ridges[i[at]],
            "gate": found.gate[at],
        }
        for name in PAIR_COLUMNS:
            value = getattr(found.point, name)[at]
            row |= _columns(name, estimate(value, drawn[name][:, at], found, share=name in SHARES))
        row["carried_chance"] = _number(found.chance.carried[at])
        row["persistence_chance"] = _number(found.chance.persistence[at])
        row["drowned"] = _number(found.point.drowned[at])
        row |= _columns("news", estimate(*news[at], found))
        of_pair = gained.get((int(i[at]), int(j[at])))
        row |= _columns("readable_gain", nothing if of_pair is None else of_pair)
        row["commission"] = _number(found.point.commission[i[at]])
        rows.append(row)
    return rows


def _readable_by_pair(found: Decomposition) -> dict[tuple[int, int], Estimate]:
    """The readable gain of each pair that was looked at."""
    gains = found.gains
    if gains is None:
        return {}
    return {pair: _ratio(found, gains.old[:, q], gains.new[:, q]).estimate for q, pair in enumerate(gains.pairs)}


def block_rows(found: Decomposition, of_pair: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each block, or group of neighbours that were merged on dev, out of the rows of all pairs."""
    at_pair = {(int(i), int(j)): at for at, (i, j) in enumerate(zip(*found.pairs, strict=True))}
    rows = []
    for i, j in found.blocks:
        row = dict(of_pair[at_pair[i, j]])
        row["blocks"] = found.layers[j] - found.layers[i]
        rows.append(row)
    return rows


def distance_rows(found: Decomposition) -> Iterator[dict[str, Any]]:
    """A row for each distance j - i of the layers' positions, without layer 0: how many pairs there are and pass, and means.

    Shares are over the pairs that pass, clarity, persistence and news over all pairs of that distance.
    """
    i, j = found.pairs
    later = pairs_from(found, 1)
    for distance in np.unique((j - i)[later]):
        pairs = later & (j - i == distance)
        passed = passing(found, pairs)
        row: dict[str, Any] = {"distance": int(distance), "pairs": int(pairs.sum()), "passed": int(passed.sum())}
        nothing = Estimate(None, None, None, "undetermined: no pair of this distance passes the gates")
        in_place = nothing
        if passed.any():
            mean = mean_carried(found, passed)
            in_place = _of(found, lambda q, mean=mean: 1 - mean(q)).estimate  # type: ignore[misc]
        row |= _columns("in_place", in_place)
        for name in ("clarity", "persistence"):
            row |= _columns(name, _plain(found, name, pairs).estimate)
        news = news_of(found, pairs).estimate
        reasons = dict.fromkeys(reason for reason in (in_place.reason, news.reason) if reason)
        yield row | _columns("news", news) | {"reason": "; ".join(reasons)}


@dataclass(frozen=True)
class DrawnIndex:
    """An index with its interval, and its draws ``[draws]`` where it has any."""

    estimate: Estimate
    draws: Array | None = None
    of_refits: float | None = None
    """The share of the variance behind the interval that lens refits bring; None where there are none"""


def index_estimates(found: Decomposition) -> dict[str, Estimate]:
    """Every index of the decomposition, over all pairs of layers and over those without layer 0."""
    return {name: one.estimate for name, one in drawn_indices(found).items()}


def drawn_indices(found: Decomposition) -> dict[str, DrawnIndex]:
    """The same with their draws, which are over the same documents for every model."""
    estimates: dict[str, DrawnIndex] = {}
    for suffix, first in (("", 0), (WITHOUT_LAYER_0, 1)):
        estimates |= {name + suffix: value for name, value in _indices(found, pairs_from(found, first)).items()}
    reach = found.reach.share(found.weights)
    whole = float(found.reach.share(np.ones(found.weights.shape[1])))
    return estimates | {REACH: DrawnIndex(estimate(whole, reach, found), reach)}


def pairs_from(found: Decomposition, first: int) -> NDArray[np.bool_]:
    """Which pairs have an earlier layer of at least ``first``, ``[P]``."""
    return np.array([found.layers[i] >= first for i in found.pairs[0]], dtype=bool)


def passing(found: Decomposition, pairs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of some pairs pass the gates, ``[P]``."""
    passed: NDArray[np.bool_] = pairs & np.array([not gate for gate in found.gate])
    return passed


def pair_weights(found: Decomposition, passed: NDArray[np.bool_]) -> Array:
    """Weights of the carried shares of the pairs that pass, which sum to 1: a sure share counts more than a vague one."""
    weight = 1 / (found.chance.carried[passed] ** 2 + _variance_of_carried(found, passed) + EXTRA_SPREAD**2)
    result: Array = weight / weight.sum()
    return result


def _variance_of_carried(found: Decomposition, passed: NDArray[np.bool_]) -> Array:
    """The variance of the carried share of each pair that passes, over documents and refits.

    That of draws with Student's t in them, but for fewer than :data:`REFITS_OF_A_VARIANCE` refits: then t has no variance. A
    few draws of thousands of deviations would decide it, and pairs whose refits happen to agree would get all the weight.
    """
    refits = None if found.refits is None else found.refits.carried
    if refits is None or len(refits) < 2 or len(refits) >= REFITS_OF_A_VARIANCE:
        drawn: Array = np.nanvar(_drawn(found, "carried")[:, passed], axis=0)
        return drawn
    of_documents: Array = np.nanvar(found.draws.carried[:, passed], axis=0)
    variance: Array = of_documents + VARIANCE_OF_T * refits[:, passed].var(0, ddof=1)
    return variance


def undetermined(found: Decomposition, pairs: NDArray[np.bool_]) -> str:
    """Why the shares over some pairs are undetermined, with the gate that stops most of them; empty where they are not."""
    passed, asked = int(passing(found, pairs).sum()), int(pairs.sum())
    needed = pairs_needed(asked)
    if passed >= needed:
        return ""
    stopped = [gate for gate, inside in zip(found.gate, pairs, strict=True) if inside and gate]
    most = max(REASONS, key=stopped.count) if stopped else ""
    why = f"; at {stopped.count(most)} of them {REASONS[most]}" if most else ""
    return f"undetermined: {passed} of {asked} pairs of layers pass the gates and {needed} are needed{why}"


def _indices(found: Decomposition, pairs: NDArray[np.bool_]) -> dict[str, DrawnIndex]:
    none = _without("undetermined: one layer is left")
    passed = passing(found, pairs)
    if not pairs.any():
        return dict.fromkeys(NAMES, none)
    reason = undetermined(found, pairs)
    carried = in_place = _without(reason)
    normed = _in_norm_units(found, pairs, reason)
    if not reason:
        mean = mean_carried(found, passed)
        carried = _of(found, mean)
        in_place = _of(found, _in_place(mean))
    plain = {name: _plain(found, name, pairs) for name in ("clarity", "persistence", "kept_low", "kept_high")}
    layers = np.unique(found.pairs[0][pairs])
    return {
        "in_place": in_place,
        "carried": carried,
        **plain,
        **normed,
        "news": news_of(found, pairs),
        "readable_gain": _readable(found, pairs),
        "commission": _of(found, lambda q: q.commission[..., layers].mean(-1)),
        "drowned": _drowned(found, pairs),
        "pairs_passed": DrawnIndex(
            Estimate(float(passed.sum() / pairs.sum()), None, None, f"{passed.sum()} of {pairs.sum()} pairs")
        ),
    }


def _in_norm_units(found: Decomposition, pairs: NDArray[np.bool_], reason: str) -> dict[str, DrawnIndex]:
    """:data:`IN_NORM_UNITS` over some pairs; ``reason``: why the shares over them are undetermined.

    Pairs that pass, and their weights, are those of the reported units, and so is the spread of lens refits.
    """
    other = next((one for one in found.variants if one.setting == NORMED), None)
    if other is None:
        return dict.fromkeys(IN_NORM_UNITS, _without("not measured: of landmarks and other settings it is left out"))
    made = {"clarity_normed": _of(found, plain_mean("clarity", pairs), share=True, variant=other)}
    if reason:
        return made | {"in_place_normed": _without(reason)}
    mean = mean_carried(found, passing(found, pairs))
    return made | {"in_place_normed": _of(found, _in_place(mean), variant=other)}


def mean_carried(found: Decomposition, pairs: NDArray[np.bool_]) -> Callable[[Quantities], Array]:
    """c over some pairs; those of a wide spread, by documents or by chance, weigh less."""
    weight = pair_weights(found, pairs)

    def mean(q: Quantities) -> Array:
        result: Array = q.carried[..., pairs] @ weight
        return result

    return mean


LOSSES_ASIDE = "in_place_losses_aside"
"""The index of :func:`in_place_losses_aside`, without a suffix"""


def in_place_losses_aside(found: Decomposition) -> dict[str, Estimate]:
    """What is added in place, whether losses fall or not: what a null without a gain has to say.

    Over the pairs that have room and keep the signal, by point estimates.
    """
    estimates = {}
    point = found.point
    kept = (1 - point.room <= LARGEST_BASELINE) & (point.persistence > 2 * found.chance.persistence)
    for suffix, first in (("", 0), (WITHOUT_LAYER_0, 1)):
        pairs = kept & np.array([found.layers[i] >= first for i in found.pairs[0]])
        one = _without("undetermined: no pair of layers has room and keeps the signal")
        if pairs.any():
            one = _of(found, _in_place(mean_carried(found, pairs)))
        estimates[LOSSES_ASIDE + suffix] = one.estimate
    return estimates


def _in_place(mean: Callable[[Quantities], Array]) -> Callable[[Quantities], Array]:
    return lambda q: 1 - mean(q)


IN_NORM_UNITS = ("in_place_normed", "clarity_normed")
"""Indices in the units of the final norm, without a suffix"""

REACH = "reach"
"""The index of :class:`~lensbench.measures.update.reach.Reach`, of the last layer and so of all layers alike"""

NAMES = (
    "in_place", *IN_NORM_UNITS, "carried", "clarity", "persistence", "kept_low", "kept_high", "news", "readable_gain",
    "commission", "drowned", "pairs_passed",
)  # fmt: skip
"""The indices that have one over all layers and one with :data:`WITHOUT_LAYER_0` at its end; beside them, :data:`REACH`"""

SHARES = ("clarity", "kept_low", "kept_high", "drowned")
"""Quantities from 0 to 1 by definition: no interval reaches beyond"""


def plain_mean(name: str, pairs: NDArray[np.bool_]) -> Callable[[Quantities], Array]:
    """The mean of a quantity over some pairs."""

    def mean(q: Quantities) -> Array:
        result: Array = getattr(q, name)[..., pairs].mean(-1)
        return result

    return mean


def _plain(found: Decomposition, name: str, pairs: NDArray[np.bool_]) -> DrawnIndex:
    return _of(found, plain_mean(name, pairs), share=name in SHARES)


def _without(reason: str) -> DrawnIndex:
    return DrawnIndex(Estimate(None, None, None, reason))


def _drowned(found: Decomposition, pairs: NDArray[np.bool_]) -> DrawnIndex:
    """The mean of 1 - R over pairs whose signal did not shrink: there a basis that changed and interference look alike."""
    grown = pairs & (found.point.persistence >= 1)
    if not grown.any():
        return _without("undefined: the signal of every pair shrinks (S < 1)")
    return _of(found, lambda q: (1 - q.clarity[..., grown]).mean(-1), share=True)


def news_of(found: Decomposition, pairs: NDArray[np.bool_]) -> DrawnIndex:
    """News of all pairs together: gains are added up first, so that a pair with hardly any gain does not decide."""
    sums = found.news_sums
    _, total = sums.share(found.weights, pairs)
    if not sums.whole[:, pairs].sum() > 0 or np.percentile(total, 2.5) <= 0:
        return _without("undetermined: later lenses do not surely explain more of the final state")
    value, drawn = found.news(pairs)
    return DrawnIndex(estimate(value, drawn, found), drawn)


def _readable(found: Decomposition, pairs: NDArray[np.bool_]) -> DrawnIndex:
    """The share of the cross-entropy gain of some pairs that the earlier lens itself can read: a lower bound."""
    if found.gains is None:
        return _without("not measured: the suite leaves it out")
    inside = {(int(i), int(j)) for i, j in np.stack(found.pairs, 1)[pairs]}
    at = [number for number, pair in enumerate(found.gains.pairs) if pair in inside]
    if not at:
        return _without("not measured: no pair of these layers was looked at")
    return _ratio(found, found.gains.old[:, at].sum(1), found.gains.new[:, at].sum(1))


def _ratio(found: Decomposition, old: Array, new: Array) -> DrawnIndex:
    """``sum old / sum new`` over clusters; undetermined unless the gain is above 0 with its interval."""
    whole = found.weights @ new
    if not new.sum() > 0 or np.percentile(whole, 2.5) <= 0:
        return _without("undetermined: no cross-entropy gain of the later lens over the earlier one, with its interval")
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without a gain
        drawn = (found.weights @ old) / whole
    return DrawnIndex(estimate(old.sum() / new.sum(), drawn, found), drawn)


def _of(
    found: Decomposition, value: Callable[[Quantities], Array], *, share: bool = False, variant: Variant | None = None
) -> DrawnIndex:
    """An index that is a function of quantities, with documents and refits in its interval; see :func:`estimate`.

    Of a variant, documents are its own; refits are those of the reported setting, so that no share of them is told.
    """
    quantities = found if variant is None else variant
    refits, of_documents = None if found.refits is None else value(found.refits), value(quantities.draws)
    draws = spread_by_refits(of_documents, refits, found.spread)
    one = estimate(float(value(quantities.point)), draws, found, share=share)
    return DrawnIndex(one, draws, _share_of(refits, of_documents) if variant is None else None)


def _share_of(refits: Array | None, of_documents: Array) -> float | None:
    """The share of refits in the variance of an index over both."""
    if refits is None or len(refits) < 2:
        return None
    both = refits.var(ddof=1) + of_documents.var(ddof=1)
    return float(refits.var(ddof=1) / both) if np.isfinite(both) and both > 0 else None


def _drawn(found: Decomposition, name: str) -> Array:
    refits = None if found.refits is None else getattr(found.refits, name)
    return spread_by_refits(getattr(found.draws, name), refits, found.spread)


def estimate(value: float, draws: Array, found: Decomposition, *, share: bool = False) -> Estimate:
    """A value with the interval of its draws ``[draws]`` over the clusters of a decomposition.

    ``share``: the quantity lies between 0 and 1 by definition, and so does its interval.
    """
    if not np.isfinite(value) or not np.isfinite(draws).all():
        return Estimate(None, None, None, "undefined: its denominator is zero")
    if reason := too_few_clusters(found.clusters):
        return Estimate(float(value), None, None, reason)
    low, high = small_sample_interval(np.asarray([value]), draws[:, None], found.clusters)
    if share:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    warning = few_clusters(found.clusters) or few_tokens(found.per_direction)
    return Estimate(float(value), float(low[0]), float(high[0]), warning)


def _columns(name: str, one: Estimate) -> dict[str, float | None]:
    return {name: one.value, f"{name}_ci_low": one.low, f"{name}_ci_high": one.high}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
