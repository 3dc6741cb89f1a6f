"""The update decomposition: of what later layers add to the prediction, how much shows where it was kept before."""

from lensbench.measures.update.decomposition import STEPS, Decomposition, decompose
from lensbench.measures.update.recipe import UpdateRecipe
from lensbench.measures.update.result import UpdateResult, landmark_results
from lensbench.measures.update.summary import block_rows, index_estimates, pair_rows
from lensbench.measures.update.undefined import Undefined
from lensbench.measures.update.verdict import UpdateFacts, UpdateRule, UpdateVerdict, decide_update

__all__ = [
    "STEPS",
    "Decomposition",
    "Undefined",
    "UpdateFacts",
    "UpdateRecipe",
    "UpdateResult",
    "UpdateRule",
    "UpdateVerdict",
    "block_rows",
    "decide_update",
    "decompose",
    "index_estimates",
    "landmark_results",
    "pair_rows",
]
