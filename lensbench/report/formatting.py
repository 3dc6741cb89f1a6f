"""Numbers and intervals as tables print them."""

import math
from typing import Any

import pandas as pd

from lensbench.measures.indices import LEFT_OUT

MOST_DECIMALS = 3


def decimals_within(low: float, high: float) -> int:
    """The fewest decimals whose unit is at most half of the interval's half-width; three at most, and for an empty one."""
    if not high > low:
        return MOST_DECIMALS
    return min(MOST_DECIMALS, max(0, math.ceil(-math.log10((high - low) / 4) - 1e-9)))


def written(value: float, decimals: int) -> str:
    """A number with so many decimals, thousands separated; no minus before a zero."""
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"


def number(value: float) -> str:
    """Three decimals, or three digits where that would hide a large number's size."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 100 else f"{value:.3g}"  # + 0.0: no minus before a zero


def with_interval(row: Any, value: str = "value", low: str = "ci_low", high: str = "ci_high") -> str:
    """``value [low, high]`` of a row, with as many digits as the interval allows; the value alone where it has none."""
    if pd.isna(row[value]):
        return "undefined"
    if pd.isna(row[low]):
        return f"{row[value]:g}"
    return between(float(row[value]), float(row[low]), float(row[high]))


def between(value: float, low: float, high: float) -> str:
    """``0.58 [0.52, 0.64]``: a value and its interval, with as many digits as the interval allows."""
    places = decimals_within(low, high)
    return f"{written(value, places)} [{written(low, places)}, {written(high, places)}]"


def with_refits(row: Any) -> str:
    """Value and interval, and below them the range over refits."""
    if pd.isna(row["value"]) or pd.isna(row["fit_low"]):
        return with_interval(row)
    places = MOST_DECIMALS if pd.isna(row["ci_low"]) else decimals_within(row["ci_low"], row["ci_high"])
    return f"{with_interval(row)}\n      ({written(row['fit_low'], places)}, {written(row['fit_high'], places)})"


def is_left_out(indices: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of ``indices.csv`` are undefined because the suite did not ask for what they are made of."""
    return indices["reason"].fillna("").str.startswith(LEFT_OUT)


def shown_seeds(indices: pd.DataFrame) -> pd.DataFrame:
    """Of models with several seeds the rows over all of them, of others those of their one seed."""
    several = indices.groupby("model")["seed"].transform(lambda seeds: (seeds == "all").any())
    return indices[(indices["seed"] == "all") | ~several]
