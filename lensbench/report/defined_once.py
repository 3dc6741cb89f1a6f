"""Values that one of two runs defines and a gate stops in the other: which they are, and whether it is a near tie."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lensbench.results.folder import Run

TELLS_ROWS_APART = (
    "landmark", "setting", "at", "probe", "tolerance", "distance", "lens", "lens_layer", "stream_layer", "layer_i",
    "layer_j", "from_layer", "to_layer", "quantity", "layer", "other", "budget", "positions",
)  # fmt: skip
"""Columns that say what a row is about, next to its model, its seed and its index"""

NEIGHBOURS = ("model", "seed", "landmark", "setting", "probe")
"""Rows that share these say something of the same states: of one model, and of one landmark of it"""

WHY_MISSING = ("reason", "gate")
"""Columns that say why a value is missing"""

MOST_NAMED = 2
"""Values that a line names, at most"""


@dataclass(frozen=True)
class DefinedOnce:
    """A row of a table that holds a value in one run and none in the other."""

    words: str
    """Which it is, where it is defined, and why it is not in the other run"""
    near_tie: bool
    """Whether a gate stops it that noise decides: what both runs define next to it agrees within intervals"""


def defined_once(reference: Run, run: Run, name: str) -> list[DefinedOnce]:
    """The rows of a table of which one run alone defines a value; both runs' tables have the same rows."""
    one, other = reference.tables[name].reset_index(drop=True), run.tables[name].reset_index(drop=True)
    numbers = one.select_dtypes("number").columns.intersection(other.select_dtypes("number").columns)
    differ = one[numbers].isna() != other[numbers].isna()
    return [_described(reference, run, name, int(row), differ) for row in np.flatnonzero(differ.any(axis=1))]


def sentence(found: list[DefinedOnce]) -> str:
    """The first of some values in words, and how many more there are."""
    more = len(found) - MOST_NAMED
    return "; ".join([one.words for one in found[:MOST_NAMED]] + [f"and {more} more"] * (more > 0))


def _described(reference: Run, run: Run, name: str, row: int, differ: pd.DataFrame) -> DefinedOnce:
    one, other = reference.tables[name], run.tables[name]
    columns = [column for column in differ.columns if differ[column].iloc[row]]
    first = next((c for c in columns if not c.endswith(("ci_low", "ci_high", "fit_low", "fit_high"))), columns[0])
    there, missing = (run, reference) if np.isnan(one[first].iloc[row]) else (reference, run)
    values, facts = (r.tables[name].iloc[row] for r in (there, missing))
    reason = next((str(facts[c]) for c in WHY_MISSING if c in facts and pd.notna(facts[c]) and facts[c]), "")
    words = (
        f"{_called(values, first)} ({name}) is {values[first]:.3g} in {there.folder} and missing in {missing.folder}"
    )
    # A value that a gate stops gives its reason; without one, or where it was not measured, nothing is near a tie.
    stopped = bool(reason) and not reason.startswith("not measured")
    tie = stopped and not any(_apart(a, b) for a, b in _neighbours(one, other, row))
    return DefinedOnce(words + (f', which says "{reason}"' if reason else ""), tie)


def _called(row: pd.Series, column: str) -> str:
    """What a value is of: its index or column, its model, and what else tells its row apart."""
    what = row["index"] if column == "value" and "index" in row else column
    seed = f" at seed {row['seed']}" if str(row.get("seed", "0")) != "0" else ""
    rest = [f"{key} {row[key]}" for key in TELLS_ROWS_APART if key in row and pd.notna(row[key])]
    return ", ".join([f"{what} of {row.get('model', 'the run')}{seed}", *rest])


def _neighbours(one: pd.DataFrame, other: pd.DataFrame, row: int) -> Iterator[tuple[pd.Series, pd.Series]]:
    """The rows of both runs that say something of the same states."""
    keys = [key for key in NEIGHBOURS if key in one.columns]
    alike = (one[keys].fillna("") == one[keys].fillna("").iloc[row]).all(axis=1)
    for at in np.flatnonzero(alike):
        yield one.iloc[at], other.iloc[at]


def _apart(one: pd.Series, other: pd.Series) -> bool:
    """Whether two rows hold a quantity whose intervals do not overlap; one that either of them lacks says nothing."""
    lows = [column for column in one.index if column.endswith("ci_low")]
    return any(
        one[low] > other[high] or other[low] > one[high] for low in lows if (high := f"{low[:-3]}high") in one.index
    )
