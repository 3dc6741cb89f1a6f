"""The update decomposition of a stream: how much of what later layers add shows in the readings of earlier lenses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from lensbench.lenses.estimated import usual_scores
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.read import own_layer_sums
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.room import IN_MEMORY, SHARE, Room, spilling
from lensbench.lenses.search import Choice, DevSearch, pad_direction
from lensbench.measures.update.chance import chance_and_products, chance_of_persistence
from lensbench.measures.update.folds import (
    Readings,
    deal_documents,
    folds_and_halves,
    pooled_folds,
    readings,
    resampled,
)
from lensbench.measures.update.gates import Losses, falls, gates, has_room, merged_blocks
from lensbench.measures.update.held import HeldOut
from lensbench.measures.update.metric import Metric, MetricKind, whitening
from lensbench.measures.update.news import NewsSums, news_of_moments, news_sums
from lensbench.measures.update.norm_units import norm_units
from lensbench.measures.update.products import Pairs, Products, SecondMoments, pairs_of
from lensbench.measures.update.quantities import Chance, Quantities, quantities
from lensbench.measures.update.reach import Reach
from lensbench.measures.update.readable import FURTHER_PAIRS, Gains, readable_gains
from lensbench.measures.update.undefined import Undefined
from lensbench.runtime.mapped import give_back_pages
from lensbench.statistics import Array, effective_clusters
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut

STEPS = ("moments", "ridges", "gates", "products", "refits", "units of the final norm", "news", "readable gain")
"""What :func:`decompose` says that it does, in this order"""

NORMED = "units"
"""The setting of the variant in the units of the final norm"""

Say = Callable[[str], None]


@dataclass(frozen=True)
class FullLenses:
    """The lenses of all fitting documents, prior zero, one per layer."""

    best: AffineMaps
    """At the best ridge on dev, without a pad"""
    within: AffineMaps
    """At the strongest ridge that the tolerance allows, with its pad: what the gates judge"""
    choices: tuple[tuple[Choice, Choice], ...]
    """What dev chose for each layer: of ``best``, and of ``within``"""
    climbs: tuple[list[Choice], ...] = ()
    """What dev tried for each layer from the best ridge on (:meth:`DevSearch.climb`); none where the choices were known"""

    @property
    def ridges(self) -> tuple[float, ...]:
        """The ridges of ``within``, in median eigenvalues."""
        return tuple(choice.ridge for _, choice in self.choices)

    @property
    def best_ridges(self) -> tuple[float, ...]:
        """Those of ``best``."""
        return tuple(choice.ridge for choice, _ in self.choices)


@dataclass(frozen=True)
class Gating:
    """What is decided on dev and held fixed: the gate of each pair, and the blocks, merged until there is room."""

    gate: list[str]
    blocks: list[tuple[int, int]]


@dataclass(frozen=True)
class Variant:
    """The decomposition at another setting, of the same pairs and documents."""

    setting: str
    """``tolerance``, ``metric``, ``massive`` or ``units``"""
    value: str
    point: Quantities
    draws: Quantities
    paired: bool = True
    """Whether its draws are of the same clusters"""
    news: tuple[NewsSums, Array] | None = None
    """Sums for news, and the weights of the draws, where news are another at this setting"""


@dataclass(frozen=True)
class Decomposition:
    """Everything that the update decomposition of one stream says, with its draws.

    Pairs are positions in ``layers``. Draws ``[draws, P]`` are over clusters of eval; refits ``[refits, P]`` are the
    estimates with lenses of resampled documents.
    """

    layers: tuple[int, ...]
    metric: str
    pairs: Pairs
    point: Quantities
    draws: Quantities
    refits: Quantities | None
    chance: Chance
    gate: list[str]
    blocks: list[tuple[int, int]]
    """Pairs of positions: neighbours, merged on dev until there is room"""
    news_sums: NewsSums
    news_refits: tuple[Array, Array] | None
    """Gains in unread and in all directions with lenses of resampled documents, means over tokens: ``[refits, P]``"""
    gains: Gains | None
    """Cross-entropy gains of some pairs, and what of them the earlier lens can read; None where nobody asked"""
    choices: tuple[tuple[Choice, Choice], ...]
    """What dev chose for the lens of each layer: at its best, and within the tolerance"""
    weights: Array
    """``[draws, clusters]``: how often a draw takes each cluster of eval"""
    clusters: float
    """Effective number of clusters of eval"""
    per_direction: float
    """Tokens of eval for each direction of the stream"""
    spread: tuple[int, ...]
    """Seed of what refits add to the draws"""
    reach: Reach
    """Of the lens of the last of ``layers``"""
    variants: tuple[Variant, ...] = ()

    @property
    def ridges(self) -> tuple[float, ...]:
        """The ridges of the lenses, in median eigenvalues."""
        return tuple(choice.ridge for _, choice in self.choices)

    @property
    def gating(self) -> Gating:
        """What was decided on dev."""
        return Gating(self.gate, self.blocks)

    def news(self, pairs: NDArray[np.bool_]) -> tuple[float, Array]:
        """The share of the gain of some pairs together that is news, and its draws; NaN or infinite without a gain.

        The doubt about the sorting of directions enters the draws as a normal deviation.
        """
        one, _ = self.news_sums.share(np.ones(len(self.news_sums.whole)), pairs)
        draws, _ = self.news_sums.share(self.weights, pairs)
        refits = None
        if self.news_refits is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                refits = self.news_refits[0][:, pairs].sum(1) / self.news_refits[1][:, pairs].sum(1)
        deviation = np.random.default_rng([*self.spread, 1]).standard_normal(len(draws))
        return float(one), spread_by_refits(draws, refits, self.spread) + deviation * self.news_sums.doubt(pairs)


def full_lenses(
    search: DevSearch,
    moments: Moments,
    layers: Sequence[int],
    tolerance: float,
    known: Sequence[tuple[Choice, Choice]] | None = None,
    others: Sequence[float] = (),
) -> FullLenses:
    """The lens of each layer at its best ridge, and at the strongest ridge that the tolerance allows.

    ``known``: both choices for each layer, where they need no search. ``others``: tolerances that will be asked for, too.
    """
    best, within, choices, climbs = [], [], [], []
    near: Choice | None = None
    for at, layer in enumerate(layers):
        path = RidgePath(moments.layer([at]), "zero")
        if known is None:
            climb = search.climb(path.solve, [layer], max(tolerance, *others, 0.0), near)
            near, chosen = climb[0], search.end_of(climb, tolerance)
            climbs.append(climb)
        else:
            near, chosen = known[at]
        best.append(path.solve(near.ridge))
        within.append(search.padded(path.solve(chosen.ridge), chosen.pad))
        choices.append((near, chosen))
        give_back_pages()
    return FullLenses(AffineMaps.stack(best), AffineMaps.stack(within), tuple(choices), tuple(climbs))


@dataclass(frozen=True)
class Fitted:
    """What is fitted to the tokens of fit, and chosen on dev, before anything is measured."""

    layers: tuple[int, ...]
    metric: Metric
    folds: NDArray[np.int64]
    parts: Sequence[Moments]
    """Of each fold"""
    halves: tuple[Moments, Moments]
    """Of the two halves of the last fold"""
    moments: Moments
    """Of all folds"""
    lenses: FullLenses
    maps: Readings
    search: DevSearch
    room: Room = IN_MEMORY
    """Where moments and maps lie"""

    @classmethod
    def of(
        cls,
        readout: ReadOut,
        fit: Capture,
        dev: Capture,
        recipe: FitRecipe,
        layers: tuple[int, ...],
        metric: MetricKind,
        tolerance: float,
        seed: int,
        say: Say,
        known: Sequence[tuple[Choice, Choice]] | None = None,
        others: Sequence[float] = (),
    ) -> "Fitted":
        """See :func:`decompose`; ``others``: tolerances that :meth:`at` will be asked for."""
        coordinates, folds = Metric.of(metric, readout, fit), deal_documents(fit, seed)
        say("moments")
        room = spilling(recipe.memory_gib)
        moments, halves = folds_and_halves(fit, layers, folds, room=room)
        sizes = [int((folds[fit.document] == fold).sum()) for fold in range(len(moments))]
        pooled = pooled_folds(moments, sizes, room)
        search = DevSearch(readout, dev, recipe, pad_direction(readout, fit.states[-1]))
        say("ridges")
        lenses = full_lenses(search, pooled, layers, tolerance, known, others)
        maps = readings(moments, coordinates, lenses.ridges, halves, room)
        return cls(layers, coordinates, folds, moments, halves, pooled, lenses, maps, search, room)

    def at(self, tolerance: float) -> Readings:
        """The maps at the strongest ridges that another tolerance allows, one of those that were announced."""
        ridges = tuple(self.search.end_of(climb, tolerance).ridge for climb in self.lenses.climbs)
        return readings(self.parts, self.metric, ridges, self.halves, self.room)

    def by(self, metric: Metric) -> Readings:
        """The maps of the same lenses in another metric."""
        return readings(self.parts, metric, self.lenses.ridges, self.halves, self.room)

    def again(self, fit: Capture, seed: tuple[int, ...]) -> tuple[Readings, AffineMaps]:
        """The maps fitted to documents that are drawn anew within each fold, and the best lenses of all of them.

        At the same ridges.
        """
        counts = resampled(self.folds, seed)
        moments, halves = folds_and_halves(fit, self.layers, self.folds, counts, self.room)
        fold_of = self.folds[fit.document]
        pooled = pooled_folds(
            moments, [int(counts[fit.document][fold_of == fold].sum()) for fold in range(len(moments))], self.room
        )
        path = RidgePath(pooled.layer(range(len(self.layers))), "zero")
        best = path.solve(torch.tensor(self.lenses.best_ridges, dtype=torch.float64))
        return readings(moments, self.metric, self.lenses.ridges, halves, self.room), best


@torch.no_grad()
def decompose(
    readout: ReadOut,
    fit: Capture,
    dev: Capture,
    held_out: Capture,
    recipe: FitRecipe,
    *,
    layers: Sequence[int] | None = None,
    metric: MetricKind = "fisher",
    tolerance: float | None = None,
    refits: int | None = None,
    readable: bool = True,
    tolerances: Sequence[float] = (),
    metrics: Sequence[MetricKind] = (),
    gating: Gating | None = None,
    known: Sequence[tuple[Choice, Choice]] | None = None,
    normed: bool = True,
    variant: bool = False,
    seed: int = 0,
    spread: Sequence[int] = (0,),
    say: Say = lambda _: None,
) -> Decomposition:
    """The decomposition of the layers ``layers`` (all before the last, by default) of one stream.

    Lenses are fitted on ``fit``, ridges chosen and gates decided on ``dev``, everything else is measured on ``held_out``.
    ``tolerance`` and ``refits``: in place of the recipe's. ``seed`` deals and resamples the fitting documents; the draws of
    the held-out documents are the same for every model. ``readable`` asks for the readable gain, which takes most of the
    time. ``tolerances`` and ``metrics``: of variants beside it, with the same pairs. ``gating``: what an earlier
    decomposition decided, in place of deciding it on ``dev``. ``known``: the choices that a search on ``dev`` would make for
    each layer, where an earlier one has made them. ``normed``, ``variant``: see :func:`measured`. ``spread``: the seed of
    what refits add to the draws, a model's own.

    Raises :class:`Undefined` where the norm is no gain over a scale, and where there are fewer than three fitting
    documents or two layers.
    """
    chosen = tuple(range(fit.layers)) if layers is None else tuple(layers)
    if len(chosen) < 2:
        raise Undefined("undefined: an update needs two layers before the last")
    tolerance = recipe.tolerance if tolerance is None else tolerance
    fitted = Fitted.of(readout, fit, dev, recipe, chosen, metric, tolerance, seed, say, known, tolerances)
    return measured(
        readout, fitted, fit, dev, held_out, recipe.refits if refits is None else refits,
        others=[
            *(("tolerance", f"{value:g}", fitted.at(value)) for value in tolerances),
            *(("metric", kind, fitted.by(Metric.of(kind, readout, fit))) for kind in metrics),
        ],
        readable=readable, gating=gating, normed=normed, variant=variant, seed=seed, spread=spread, say=say,
    )  # fmt: skip


@torch.no_grad()
def measured(
    readout: ReadOut,
    fitted: Fitted,
    fit: Capture,
    dev: Capture,
    held_out: Capture,
    refits: int,
    *,
    others: Sequence[tuple[str, str, Readings]] = (),
    readable: bool = True,
    gating: Gating | None = None,
    further: int = FURTHER_PAIRS,
    seed: int = 0,
    spread: Sequence[int] = (0,),
    normed: bool = True,
    variant: bool = False,
    say: Say = lambda _: None,
) -> Decomposition:
    """The decomposition by lenses that are fitted already, on the same ``fit`` and ``dev``; see :func:`decompose`.

    ``others``: setting, value and maps of variants. ``further``: how many pairs at most that are not of neighbours are
    asked for their readable gain. ``normed``: the variant in the units of the final norm too. ``variant``: it is itself a
    variant of another decomposition, whose weights of pairs count; then the chance of c is NaN.
    """
    chosen = fitted.layers
    pairs = pairs_of(len(chosen))
    if gating is None:
        say("gates")
        gating = _gates(readout, dev, fitted, pairs)
    say("products")
    held = HeldOut.of(held_out, chosen)
    sums = held.products(fitted.maps)
    say("refits")
    moments = SecondMoments.of(held_out.states, chosen, held.means, fitted.room)
    chance = _chance(held, sums, moments, fitted.maps, fitted.room, of_carried=not variant)
    point, draws = held.quantities(sums, chance)
    white, refitted, news_again = whitening(moments.last), [], []
    for number in range(refits):  # the maps of one at a time
        maps, lenses = fitted.again(fit, (seed, number))
        refitted.append(quantities(chance_and_products(moments, [], [maps], fitted.room)[1][0], pairs, chance))
        news_again.append(news_of_moments(moments, lenses, white, pairs, fitted.room))
        del maps, lenses
    variants = tuple(
        Variant(setting, value, *_at_another_setting(held, moments, maps, fitted.room))
        for setting, value, maps in others
    )
    del moments  # as large as the states of many tokens
    if normed:
        say("units of the final norm")
        variants += (in_norm_units(fitted, readout, fit, held_out, chosen),)
    say("news")
    gains = news_sums(
        held.states, chosen, held.means, held.cluster, held.clusters, fitted.lenses.best, white,
        fitted.search.recipe.memory_gib / SHARE,
    )  # fmt: skip
    gained = None
    if readable:
        say("readable gain")
        gained = readable_gains(
            readout, dev, held_out, chosen, fitted.lenses.within, fitted.moments, fitted.metric, fitted.search.pad,
            held.cluster, held.clusters, further=further,
        )  # fmt: skip
    return Decomposition(
        layers=chosen, metric=fitted.metric.name, pairs=pairs, point=point, draws=draws, chance=chance, gate=gating.gate,
        refits=_stacked(refitted) if refitted else None, blocks=gating.blocks, news_sums=gains, gains=gained,
        news_refits=_both(news_again), choices=fitted.lenses.choices, weights=held.weights, spread=tuple(spread),
        clusters=effective_clusters(held.cluster.numpy()), per_direction=len(held_out) / held.states.shape[-1],
        variants=variants, reach=Reach.of(readout, held_out, fitted.lenses.within[[len(chosen) - 1]], chosen[-1], held),
    )  # fmt: skip


def in_norm_units(
    fitted: Fitted, readout: ReadOut, fit: Capture, held_out: Capture, layers: tuple[int, ...]
) -> Variant:
    """The decomposition in which every token counts as the final norm lets it count, not by the square of its length.

    Lenses are fitted anew, at the same ridges in median eigenvalues.
    """
    memory_gib = fitted.search.recipe.memory_gib
    scaled = norm_units(fit, readout, layers, memory_gib)
    layers = tuple(range(len(layers)))
    moments, halves = folds_and_halves(scaled, layers, fitted.folds, room=fitted.room)
    maps = readings(moments, fitted.metric, fitted.lenses.ridges, halves, fitted.room)
    del moments, halves
    scaled = norm_units(held_out, readout, fitted.layers, memory_gib)
    held = HeldOut.of(scaled, layers)
    of_held = SecondMoments.of(scaled.states, layers, held.means, fitted.room)
    return Variant(NORMED, "final norm", *_at_another_setting(held, of_held, maps, fitted.room))


def _at_another_setting(
    held: HeldOut, moments: SecondMoments, maps: Readings, room: Room
) -> tuple[Quantities, Quantities]:
    """Quantities and draws of a variant. Its pairs weigh as the reported ones do, so that no chance of c is needed."""
    sums = held.products(maps)
    return held.quantities(sums, _chance(held, sums, moments, maps, room))


def _chance(
    held: HeldOut, sums: Products, moments: SecondMoments, maps: Readings, room: Room, *, of_carried: bool = False
) -> Chance:
    """Of persistence, by the signals of ``sums``; with ``of_carried`` that of c, too."""
    if of_carried:
        return chance_and_products(moments, [maps], [], room)[0][0]
    return chance_of_persistence(moments, maps, sums.total().layer["rf"] / held.states.shape[1], room)


def _stacked(parts: Sequence[Quantities]) -> Quantities:
    return Quantities(**{f.name: np.stack([getattr(p, f.name) for p in parts]) for f in fields(Quantities)})


def _both(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array] | None:
    return (np.stack([one for one, _ in parts]), np.stack([two for _, two in parts])) if parts else None


def _gates(
    readout: ReadOut,
    dev: Capture,
    fitted: Fitted,
    pairs: Pairs,
) -> Gating:
    """The gate of each pair, and the blocks merged until there is room; all on dev.

    Losses of a large vocabulary are unbiased estimates, whose variance is in the bounds of the gates.
    """
    layers, lenses, maps = fitted.layers, fitted.lenses, fitted.maps
    held = HeldOut.of(dev, layers)
    sums = held.products(maps, old=False)
    moments = SecondMoments.of(dev.states, layers, held.means, fitted.room)
    chance = _chance(held, sums, moments, maps, fitted.room)
    point, draws = held.quantities(sums, chance)
    room = has_room(point, draws)
    kl, ce = own_layer_sums(readout, dev, lenses.within, layers, usual_scores(readout, dev))
    tokens = np.bincount(held.cluster.numpy(), minlength=held.clusters).astype(float)
    losses = Losses(held.by_cluster(dev, kl), held.by_cluster(dev, ce), tokens)
    fall = falls(losses, pairs, held.weights)
    return Gating(gates(fall, room, point, chance), merged_blocks(room, pairs, len(layers)))


def spread_by_refits(draws: Array, refits: Array | None, seed: Sequence[int]) -> Array:
    """Draws ``[draws, ...]`` with the spread of refits ``[R, ...]`` in them, as a Student-t deviation for each."""
    if refits is None or len(refits) < 2:
        return draws
    deviation = _deviations(len(draws), len(refits), tuple(seed))
    spread = refits.std(0, ddof=1)
    result: Array = draws + deviation.reshape(-1, *[1] * (draws.ndim - 1)) * spread
    return result


@lru_cache(maxsize=8)
def _deviations(draws: int, refits: int, seed: tuple[int, ...]) -> Array:
    """Student's t of ``refits`` - 1 degrees of freedom, ``[draws]``: the same for every quantity of a model."""
    made: Array = stats.t.ppf(np.random.default_rng(list(seed)).uniform(size=draws), refits - 1)
    return made
