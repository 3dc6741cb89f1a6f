"""Lenses: affine maps, their closed forms, the search on dev, the refinement, and the exchange format."""

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.trajectory import prediction_trajectory
from lensbench.lenses.tuned import SharedLens, load_tuned_lens, save_tuned_lens

__all__ = ["AffineMaps", "FitRecipe", "SharedLens", "load_tuned_lens", "prediction_trajectory", "save_tuned_lens"]
