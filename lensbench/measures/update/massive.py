"""What is added in place without the tokens that have massive activations, next to what is reported."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lensbench.measures.means import Estimate
from lensbench.statistics import mean_over_seeds

MASSIVE = "massive"
"""The setting of the variant without massive activations; its value is the cap"""

LEFT_OUT = "tokens_left_out"
"""End of the name of the row that says which share of a split's tokens has them; the split stands in front"""


@dataclass(frozen=True)
class WithoutMassive:
    """What is added in place over the tokens without massive activations, on one scope of one model."""

    in_place: Estimate
    left_out: float
    """Which share of the held-out tokens has them"""

    @classmethod
    def of(cls, variants: Iterable[Mapping[Any, Any]], suffix: str) -> "WithoutMassive | None":
        """From the rows of variants of one model, of one or several seeds; None where a seed has no value."""
        rows = [row for row in variants if row["setting"] == MASSIVE]
        found = [row for row in rows if row["index"] == f"in_place{suffix}"]
        shares = [float(row["value"]) for row in rows if row["index"] == f"eval_{LEFT_OUT}"]
        values, lows, highs = ([_number(row[name]) for row in found] for name in ("value", "ci_low", "ci_high"))
        if not (found and shares) or not np.isfinite(values).all():
            return None
        if len(values) > 1:
            return cls(Estimate(*mean_over_seeds(values)), float(np.mean(shares)))
        if np.isnan(lows[0]) or np.isnan(highs[0]):
            return cls(Estimate(values[0], None, None), shares[0])
        return cls(Estimate(values[0], lows[0], highs[0]), shares[0])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
