"""Numbers and intervals as tables print them."""

from typing import Any

import pandas as pd


def number(value: float) -> str:
    """Three decimals, or three digits where that would hide a large number's size."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 100 else f"{value:.3g}"  # + 0.0: no minus before a zero


def with_interval(row: Any, value: str = "value", low: str = "ci_low", high: str = "ci_high") -> str:
    """``value [low, high]`` of a row; the value alone where it has no interval."""
    if pd.isna(row[value]):
        return "undefined"
    if pd.isna(row[low]):
        return f"{row[value]:g}"
    return f"{number(row[value])} [{number(row[low])}, {number(row[high])}]"


def with_refits(row: Any) -> str:
    """Value and interval, and below them the range over refits."""
    if pd.isna(row["value"]) or pd.isna(row["fit_low"]):
        return with_interval(row)
    return f"{with_interval(row)}\n      ({number(row['fit_low'])}, {number(row['fit_high'])})"


def shown_seeds(indices: pd.DataFrame) -> pd.DataFrame:
    """Of models with several seeds the rows over all of them, of others those of their one seed."""
    several = indices.groupby("model")["seed"].transform(lambda seeds: (seeds == "all").any())
    return indices[(indices["seed"] == "all") | ~several]
