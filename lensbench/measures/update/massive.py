"""What is added in place without the tokens that have massive activations, next to what is reported."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MASSIVE = "massive"
"""The setting of the variant without massive activations; its value is the cap"""

LEFT_OUT = "tokens_left_out"
"""End of the name of the row that says which share of a split's tokens has them; the split stands in front"""


@dataclass(frozen=True)
class WithoutMassive:
    """What is added in place over the tokens without massive activations, on one scope of one model.

    It has no interval here: that of the table is over documents alone, and would look narrower than the reported one, which
    holds lens refits too.
    """

    in_place: float
    left_out: float
    """Which share of a split's tokens has them, of the split with most"""

    @classmethod
    def of(cls, variants: Iterable[Mapping[Any, Any]], suffix: str) -> "WithoutMassive | None":
        """From the rows of variants of one model, means over its seeds; None where a seed has no value."""
        rows = [row for row in variants if row["setting"] == MASSIVE]
        values = [_number(row["value"]) for row in rows if row["index"] == f"in_place{suffix}"]
        shares = [_number(row["value"]) for row in rows if str(row["index"]).endswith(LEFT_OUT)]
        if not (values and shares) or not np.isfinite(values).all():
            return None
        return cls(float(np.mean(values)), max(shares))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
