"""What lenses read at every layer, and what follows: transfer, indices, verdicts."""

from lensbench.measures.transfer import TransferSums, transfer_sums

__all__ = ["TransferSums", "transfer_sums"]
