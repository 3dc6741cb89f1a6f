"""Lenses: affine maps, their kinds, closed forms, the search on dev, the refinement, and the exchange format."""

from lensbench.lenses.fit import Fit
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.lens import FittedLens, LensId, LensRecord
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.planning import FitContext, Job, LensKind, Phase
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.trajectory import prediction_trajectory
from lensbench.lenses.tuned import SharedLens, load_tuned_lens, save_tuned_lens

__all__ = [
    "KINDS",
    "AffineMaps",
    "Fit",
    "FitContext",
    "FitRecipe",
    "FittedLens",
    "Job",
    "LensId",
    "LensKind",
    "LensRecord",
    "Phase",
    "SharedLens",
    "load_tuned_lens",
    "prediction_trajectory",
    "save_tuned_lens",
]
