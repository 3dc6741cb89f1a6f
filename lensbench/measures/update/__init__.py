"""The update decomposition: of what later layers add to the prediction, how much shows where it was kept before."""

from lensbench.measures.update.decomposition import Decomposition, decompose
from lensbench.measures.update.summary import block_rows, index_estimates, pair_rows

__all__ = ["Decomposition", "block_rows", "decompose", "index_estimates", "pair_rows"]
