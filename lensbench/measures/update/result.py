"""What is kept of an update decomposition: rows, indices, and the draws that paired comparisons need."""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.means import Estimate
from lensbench.measures.update.decomposition import Decomposition, decompose
from lensbench.measures.update.metric import MetricKind
from lensbench.measures.update.summary import (
    NAMES,
    WITHOUT_LAYER_0,
    block_rows,
    drawn_indices,
    index_estimates,
    pair_rows,
)
from lensbench.measures.update.views import LANDMARKS, fit_view
from lensbench.runtime.files import write_json
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.views.spectrum import spectrum

RESULT = "update.json"


class LandmarkResult(BaseModel):
    """The decomposition's indices of a view of the model, and what a reader has to know of the view."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = ""
    indices: dict[str, tuple[float | None, float | None, float | None, str]] = {}
    participation: list[float | None] = []
    """Participation ratio of the covariance of each layer of the view, and of its end; None for a state without variance"""


class UpdateResult(BaseModel):
    """The tables' rows of one model and seed; empty, with a ``reason``, where the decomposition is undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str = ""
    pairs: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    indices: dict[str, tuple[float | None, float | None, float | None, str]] = {}
    """Name -> value, lower and upper end of its interval, reason"""
    landmarks: dict[str, LandmarkResult] = {}
    """Name of a view -> its indices"""
    draws: dict[str, list[float]] = {}
    """Name -> its draws, of those that have an interval"""

    @classmethod
    def of(cls, found: Decomposition) -> "UpdateResult":
        """All that is kept of a decomposition."""
        drawn, pairs = drawn_indices(found), pair_rows(found)
        return cls(
            pairs=pairs,
            blocks=block_rows(found, pairs),
            indices=_written({name: one.estimate for name, one in drawn.items()}),
            draws={
                name: [float(f"{x:.6g}") for x in one.draws]
                for name, one in drawn.items()
                if one.draws is not None and one.estimate.low is not None
            },
        )

    @classmethod
    def undefined(cls, reason: str) -> "UpdateResult":
        """No pair, and every index without a value."""
        names = [name + suffix for suffix in ("", WITHOUT_LAYER_0) for name in NAMES]
        return cls(reason=reason, indices=dict.fromkeys(names, (None, None, None, reason)))

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


def _written(estimates: dict[str, Estimate]) -> dict[str, tuple[float | None, float | None, float | None, str]]:
    return {name: (one.value, one.low, one.high, one.reason) for name, one in estimates.items()}


def landmark_results(
    readout: ReadOut, fit: Capture, dev: Capture, held_out: Capture, recipe: FitRecipe, *, metric: MetricKind, seed: int
) -> dict[str, LandmarkResult]:
    """The decomposition of every landmark of a model, at 8 of its layers at most (``recipe.layers``)."""
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
                readout, seen[0], seen[1], seen[2], recipe, metric=metric, refits=0, readable=False, seed=seed
            )
        except LensbenchError as error:
            reason = str(error)
            found[name] = LandmarkResult(note=reason, indices=UpdateResult.undefined(reason).indices)
        else:
            ratios = [_known(layer.participation) for layer in spectrum(seen[0])]
            found[name] = LandmarkResult(
                note=fitted.note,
                indices=_written(index_estimates(one)),
                participation=ratios,
            )
    return found


def _known(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
