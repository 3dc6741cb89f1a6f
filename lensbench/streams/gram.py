"""Second moments of many rows, of which only one triangle is computed."""

from torch import Tensor

LEAST_COLUMNS = 96
"""Columns of a diagonal block that is no longer halved: narrower products run at a lower rate"""


def add_gram_(into: Tensor, rows: Tensor, scaled: Tensor | None = None) -> Tensor:
    """Add ``scaled^T rows`` ``[d, d]`` to ``into``, in place, and return it; ``scaled`` is ``rows`` if left out.

    ``rows`` ``[n, d]``; ``scaled`` are the same rows, each times a weight, so that the sum is symmetric; ``into`` has to be
    symmetric, too. Of each pair of blocks off the diagonal one is multiplied and the other copied: of many columns this
    takes little more than half of the multiplications.
    """
    _add(into, rows, rows if scaled is None else scaled, 0, rows.shape[1])
    return into


def _add(into: Tensor, rows: Tensor, scaled: Tensor, start: int, end: int) -> None:
    """The block of columns ``start`` to ``end`` on the diagonal."""
    if end - start < 2 * LEAST_COLUMNS:
        into[start:end, start:end].addmm_(scaled[:, start:end].T, rows[:, start:end])
        return
    middle = (start + end) // 2
    _add(into, rows, scaled, start, middle)
    _add(into, rows, scaled, middle, end)
    into[middle:end, start:middle].addmm_(scaled[:, middle:end].T, rows[:, start:middle])
    into[start:middle, middle:end] = into[middle:end, start:middle].T
