"""What is kept of an update decomposition: rows, indices, and the draws that paired comparisons need."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.search import Choice
from lensbench.measures.means import Estimate
from lensbench.measures.update.decomposition import Decomposition, decompose
from lensbench.measures.update.massive import WithoutMassive
from lensbench.measures.update.metric import MetricKind
from lensbench.measures.update.summary import (
    LOSSES_ASIDE,
    NAMES,
    REACH,
    WITHOUT_LAYER_0,
    block_rows,
    distance_rows,
    drawn_indices,
    in_place_losses_aside,
    index_estimates,
    pair_rows,
)
from lensbench.measures.update.variants import variant_rows
from lensbench.measures.update.verdict import SUFFIXES, UpdateFacts
from lensbench.measures.update.views import LANDMARKS, fit_view
from lensbench.runtime.files import write_json
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.views import BasisView, View
from lensbench.streams.views.spectrum import spectrum

RESULT = "update.json"

GATE_COLUMNS = ("from_layer", "to_layer", "gate")

Triples = dict[str, tuple[float | None, float | None, float | None, str]]
"""Name -> value, lower and upper end of its interval, reason"""


class LandmarkResult(BaseModel):
    """The decomposition's indices of a view of the model, and what a reader has to know of the view."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = ""
    indices: Triples = {}
    pairs: list[dict[str, Any]] = []
    """Rows of :data:`GATE_COLUMNS`: which pairs pass"""
    blocks: list[dict[str, Any]] = []
    """Rows as those of ``blocks.csv``"""
    losses_aside: Triples = {}
    """What is added in place, whether losses fall or not: of a view without a gain no pair passes the gates"""
    participation: list[float | None] = []
    """Participation ratio of the covariance of each layer of the view, and of its end; None for a state without variance"""

    def facts(self, scope: str) -> UpdateFacts:
        """What a verdict on the view looks at, on one of :data:`~lensbench.measures.update.verdict.SUFFIXES`."""
        indices = {name: Estimate(*values) for name, values in self.indices.items()}
        return UpdateFacts.of(scope, indices, self.pairs, self.blocks, reason="" if self.pairs else self.note)


class UpdateResult(BaseModel):
    """The tables' rows of one model and seed; empty, with a ``reason``, where the decomposition is undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str = ""
    pairs: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    indices: Triples = {}
    landmarks: dict[str, LandmarkResult] = {}
    """Name of a view -> its indices"""
    variants: list[dict[str, Any]] = []
    """Rows of the decomposition at other settings"""
    distances: list[dict[str, Any]] = []
    """Rows of its means by the distance of two layers"""
    of_refits: dict[str, float] = {}
    """Name of an index -> the share of lens refits in the variance behind its interval"""
    draws: dict[str, list[float]] = {}
    """Name -> its draws, of those that have an interval"""

    @classmethod
    def of(cls, found: Decomposition, massive: Sequence[dict[str, Any]] = ()) -> "UpdateResult":
        """All that is kept of a decomposition; ``massive``: rows that say how many tokens have massive activations."""
        drawn, pairs = drawn_indices(found), pair_rows(found)
        return cls(
            pairs=pairs,
            blocks=block_rows(found, pairs),
            variants=[*massive, *variant_rows(found)],
            distances=list(distance_rows(found)),
            indices=_written({name: one.estimate for name, one in drawn.items()}),
            of_refits={name: float(f"{one.of_refits:.3g}") for name, one in drawn.items() if one.of_refits is not None},
            draws={
                name: [float(f"{x:.6g}") for x in one.draws]
                for name, one in drawn.items()
                if one.draws is not None and one.estimate.low is not None
            },
        )

    @classmethod
    def undefined(cls, reason: str) -> "UpdateResult":
        """No pair, and every index without a value."""
        names = [*(name + suffix for suffix in ("", WITHOUT_LAYER_0) for name in NAMES), REACH]
        return cls(reason=reason, indices=dict.fromkeys(names, (None, None, None, reason)))

    def facts(self, scope: str) -> UpdateFacts:
        """What a verdict on one of :data:`~lensbench.measures.update.verdict.SUFFIXES` looks at."""
        of_refits = self.of_refits.get("in_place" + SUFFIXES[scope])
        indices = self.estimates()
        return UpdateFacts.of(scope, indices, self.pairs, self.blocks, of_refits=of_refits, reason=self.reason)

    def null(self, scope: str) -> Estimate | None:
        """What is added in place in the model's own states with shuffled updates; None where it is unknown."""
        shuffled = self.landmarks.get("shuffled")
        one = None if shuffled is None else shuffled.losses_aside.get(LOSSES_ASIDE + SUFFIXES[scope])
        return None if one is None or one[0] is None else Estimate(*one)

    def without_massive(self, scope: str) -> WithoutMassive | None:
        """What is added in place without massive activations; None where it is unknown."""
        return WithoutMassive.of(self.variants, SUFFIXES[scope])

    def beside(self, landmarks: dict[str, LandmarkResult]) -> "UpdateResult":
        """The same with landmarks."""
        return self.model_copy(update={"landmarks": landmarks})

    def estimates(self) -> dict[str, Estimate]:
        """The indices."""
        return {name: Estimate(*values) for name, values in self.indices.items()}

    def save(self, folder: Path) -> None:
        """Write :data:`RESULT` into a folder."""
        write_json(folder / RESULT, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "UpdateResult":
        """Inverse of :meth:`save`; raises :class:`LensbenchError` for a damaged file."""
        path = folder / RESULT
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError, ValidationError) as error:
            raise LensbenchError(f"{path} is damaged; delete its folder to compute it anew") from error


def _written(estimates: dict[str, Estimate]) -> Triples:
    return {name: (one.value, one.low, one.high, one.reason) for name, one in estimates.items()}


def landmark_results(
    readout: ReadOut,
    fit: Capture,
    dev: Capture,
    held_out: Capture,
    recipe: FitRecipe,
    *,
    metric: MetricKind,
    seed: int,
    known: Mapping[int, tuple[Choice, Choice]] = MappingProxyType({}),
) -> dict[str, LandmarkResult]:
    """The decomposition of every landmark of a model, at 8 of its layers at most (``recipe.layers``).

    ``known``: layer of the model -> what dev chose for its lens, at its best and within the tolerance.
    """
    found = {}
    for name in LANDMARKS:
        try:
            fitted = fit_view(name, readout, fit, dev, recipe, seed=seed)
            room = recipe.memory_gib
            seen = (
                fitted.view.apply(fit, "fit", memory_gib=room),
                fitted.view.apply(dev, "dev", memory_gib=room),
                fitted.view.apply(held_out, "eval", memory_gib=room),
            )
            one = decompose(
                readout,
                seen[0],
                seen[1],
                seen[2],
                recipe,
                metric=metric,
                refits=0,
                readable=False,
                known=choices_in(fitted.view, known),
                normed=False,
                seed=seed,
            )
        except LensbenchError as error:
            reason = str(error)
            found[name] = LandmarkResult(note=reason, indices=UpdateResult.undefined(reason).indices)
        else:
            rows = pair_rows(one)
            ratios = [_known(layer.participation) for layer in spectrum(seen[0])]
            found[name] = LandmarkResult(
                note=fitted.note,
                indices=_written(index_estimates(one)),
                pairs=[{column: row[column] for column in GATE_COLUMNS} for row in rows],
                blocks=block_rows(one, rows),
                losses_aside=_written(in_place_losses_aside(one)),
                participation=ratios,
            )
    return found


def choices_in(view: View, known: Mapping[int, tuple[Choice, Choice]]) -> list[tuple[Choice, Choice]] | None:
    """What dev chooses for the lenses of a view, where the model's own ``known`` choices say it; None where they do not.

    A layer that is seen in another orthonormal basis has the same lens, turned, and the same loss at every ridge: with its
    prior at zero a ridge regression does not depend on the basis.
    """
    turned = isinstance(view, BasisView) and not view.carries
    return [known[layer] for layer in view.layers] if turned and set(view.layers) <= set(known) else None


def _known(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
