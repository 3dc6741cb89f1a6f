"""What lenses read at every layer, and what follows: transfer, indices, verdicts."""

from lensbench.measures.index import Index
from lensbench.measures.indices import INDICES
from lensbench.measures.means import Means, Value
from lensbench.measures.transfer import TransferSums, transfer_sums

__all__ = ["INDICES", "Index", "Means", "TransferSums", "Value", "transfer_sums"]
