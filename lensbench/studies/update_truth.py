"""True values of the update decomposition of a synthetic stream: from its second moments, and from what it declares.

``lenses``: the stream's own lenses, on its population: what no more held-out text could change. ``population``: lenses that
are fitted to the population at the stream's own ridges, measured on the population: what no more text of any kind could
change. ``declared``: what the construction says (:mod:`lensbench.studies.shares`); no lens is fitted. Gates, the pairs that
count, and their weights are those of the stream's own decomposition, so that the same mean is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.measures.update.chance import chance_and_products
from lensbench.measures.update.decomposition import Decomposition, Fitted
from lensbench.measures.update.folds import Readings, readings
from lensbench.measures.update.metric import whitening
from lensbench.measures.update.news import UNREAD
from lensbench.measures.update.products import Pairs
from lensbench.measures.update.quantities import Quantities, quantities
from lensbench.measures.update.summary import WITHOUT_LAYER_0, pair_weights, passing, undetermined
from lensbench.statistics import Array
from lensbench.streams.readout import ReadOut
from lensbench.studies.population import Population
from lensbench.studies.shares import DeclaredShares

TRUTHS = ("lenses", "population", "declared")
"""Names of the truths, as columns have them"""

OF_POPULATION = (
    "in_place", "carried", "clarity", "persistence", "kept_low", "kept_high", "news", "commission", "drowned",
)  # fmt: skip
"""Indices that have a true value in second moments"""

Values = dict[str, float | None]


@dataclass(frozen=True)
class Selection:
    """The pairs, layers and weights that the stream's own decomposition used."""

    found: Decomposition
    pairs: NDArray[np.bool_]
    passed: NDArray[np.bool_]
    weights: Array | None
    """Of the pairs that pass; None where the shares are undetermined"""

    @classmethod
    def of(cls, found: Decomposition, first: int) -> "Selection":
        """Those of pairs from layer ``first`` on."""
        pairs = np.array([found.layers[i] >= first for i in found.pairs[0]])
        passed = passing(found, pairs)
        return cls(found, pairs, passed, None if undetermined(found, pairs) else pair_weights(found, passed))

    def shares(self, values: Array) -> float | None:
        """The weighted mean of values ``[P]`` over the pairs that pass."""
        return None if self.weights is None else _known(float(values[self.passed] @ self.weights))

    def plain(self, values: Array) -> float | None:
        """The mean of values ``[P]`` over all pairs."""
        return _known(values[self.pairs].mean())


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def selections(found: Decomposition) -> dict[str, Selection]:
    """The pairs of all layers, and of those without layer 0, by the suffix of their names."""
    return {"": Selection.of(found, 0), WITHOUT_LAYER_0: Selection.of(found, 1)}


def true_values(
    found: Decomposition, fitted: Fitted, population: Population, readout: ReadOut, seed: int
) -> dict[str, Values]:
    """Truth -> index -> value, by second moments; None where the stream's own decomposition has no such mean.

    The ridges of the population's lenses have the lengths of the stream's own. Their unit, a median eigenvalue, is not taken
    anew: where a spectrum has two levels, the median of a sample lies between them and the population's on one of them.
    """
    metric, moments, n = population.metric(readout, seed=seed), population.moments, len(found.layers)
    path, lenses = RidgePath(moments.layer(range(n)), "zero"), fitted.lenses
    of_folds = torch.stack([_unit(fitted.parts[fold], n) for fold in (0, 1)]).mean(0)
    ridges = torch.tensor(lenses.ridges, dtype=torch.float64) * of_folds / path.unit
    best = torch.tensor(lenses.best_ridges, dtype=torch.float64) * _unit(fitted.moments, n) / path.unit
    at_best = path.solve(best)
    many = readings([moments] * 3, metric, ridges.tolist())
    return {
        "lenses": _values(found, population, fitted.maps, fitted.lenses.best),
        "population": _values(found, population, many, at_best),
    }


def _unit(moments: Moments, layers: int) -> Tensor:
    return RidgePath(moments.layer(range(layers)), "zero").unit


def _values(found: Decomposition, population: Population, maps: Readings, lenses: AffineMaps) -> Values:
    (chance,), (products,) = chance_and_products(population, [maps], [maps])
    one = quantities(products, found.pairs, chance)
    gains = true_news(population, lenses, found.pairs)
    return {
        name + suffix: value
        for suffix, chosen in selections(found).items()
        for name, value in _indices(one, gains, chosen).items()
    }


def _indices(q: Quantities, gains: tuple[Array, Array], chosen: Selection) -> Values:
    carried = chosen.shares(q.carried)
    layers = np.unique(chosen.found.pairs[0][chosen.pairs])
    grown = chosen.pairs & (chosen.found.point.persistence >= 1)
    new, whole = (values[chosen.pairs].sum() for values in gains)
    return {
        "in_place": None if carried is None else 1 - carried,
        "carried": carried,
        "clarity": chosen.plain(q.clarity),
        "persistence": chosen.plain(q.persistence),
        "kept_low": chosen.plain(q.kept_low),
        "kept_high": chosen.plain(q.kept_high),
        "news": _known(new / whole) if whole > 0 else None,
        "commission": _known(q.commission[layers].mean()),
        "drowned": _known((1 - q.clarity[grown]).mean()) if grown.any() else None,
    }


def true_news(population: Population, lenses: AffineMaps, pairs: Pairs) -> tuple[Array, Array]:
    """Gains in explained power of the population: in directions that lens i does not read, and all; ``[P]`` each."""
    factor = whitening(population.last)
    missed = torch.stack([_missed(population, lenses, i, factor) for i in range(population.layers)])
    eye = torch.eye(len(factor), dtype=torch.float64)
    explained, vectors = torch.linalg.eigh(eye - missed)
    total = missed.diagonal(dim1=-1, dim2=-2).sum(-1)
    new, whole = [], []
    for i, j in zip(*pairs, strict=True):
        unread = vectors[i][:, explained[i] < UNREAD]
        new.append(float(((missed[i] - missed[j]) @ unread * unread).sum()))
        whole.append(float(total[i] - total[j]))
    return np.array(new), np.array(whole)


def _missed(population: Population, lenses: AffineMaps, i: int, factor: Tensor) -> Tensor:
    """Mean square of the whitened final state less what the lens of layer i reads, ``[k, k]``."""
    lens, offset = lenses.matrix[i].double(), lenses.offset[i].double()
    across = lens @ population.goal[i]
    missed = population.last - across - across.T + lens @ population.own[i] @ lens.T + torch.outer(offset, offset)
    found: Tensor = factor @ missed @ factor.T
    return (found + found.T) / 2


def declared_values(found: Decomposition, shares: DeclaredShares) -> Values:
    """Index -> what the construction declares: means over the pairs of the stream's own decomposition.

    ``in_place`` is that of gains whose basis stays, which is what the measure's ratio speaks of; ``kept`` is what the
    bracket ``kept_low``, ``kept_high`` must hold; ``represented`` is the share of the gain in another basis.
    """
    at = found.pairs
    made: Values = {}
    for suffix, chosen in selections(found).items():
        in_place = chosen.shares(shares.in_place_of_kept[at])
        made |= {
            f"in_place{suffix}": in_place,
            f"carried{suffix}": None if in_place is None else 1 - in_place,
            f"kept{suffix}": chosen.plain(shares.kept[at]),
            f"represented{suffix}": chosen.plain(shares.represented[at]),
            f"news{suffix}": chosen.plain(shares.news[at]),
            f"readable_gain{suffix}": _known(shares.in_place_of_cross_entropy),
        }
    return made


def named(truth: str, values: Values, names: Sequence[str]) -> dict[str, float | None]:
    """Columns ``INDEX_TRUTH`` of some indices."""
    return {f"{name}_{truth}": values.get(name) for name in names}
