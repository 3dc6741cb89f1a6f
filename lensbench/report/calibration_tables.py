"""The calibration of the update decomposition, as tables of the terminal."""

from collections.abc import Mapping

import pandas as pd
from rich.table import Column, Table

from lensbench.report.formatting import number, with_interval
from lensbench.studies.update_tables import BRACKET, COVERAGE, QUANTITIES, RIGHT

SHOWN = (
    *((name, "population") for name in QUANTITIES if name != "readable_gain"),
    *((name, "lenses") for name in ("in_place", "clarity", "persistence", "news", "commission")),
    *((name, "declared") for name in ("in_place", "readable_gain", BRACKET)),
)
"""Quantities with a truth; intervals claim to hold that of the population, or the declared one where there is no other"""


def update_calibration_tables(written: Mapping[str, pd.DataFrame]) -> list[Table]:
    """How often verdicts are right, and how often intervals hold a truth."""
    return [_right(written[RIGHT]), _coverage(written[COVERAGE])]


def _right(table: pd.DataFrame) -> Table:
    answers = [name for name in table.columns if name not in ("set", "family", "streams") and "committed" not in name]
    columns = (Column(name) for name in ("streams", "n", "committed", "right when committed", *answers))
    made = Table(*columns, title="verdicts without layer 0 on streams of known answer: share [95 %]")
    for _, row in table.iterrows():
        shares = [
            with_interval(row, name, f"{name}_ci_low", f"{name}_ci_high") if pd.notna(row[name]) else ""
            for name in ("committed", "right_when_committed")
        ]
        made.add_row(f"{row['set']}, {row['family']}", str(row["streams"]), *shares, *(str(row[a]) for a in answers))
    return made


def _coverage(table: pd.DataFrame) -> Table:
    """Of each quantity: all streams of each set and the family that is covered least."""
    columns = (Column(name) for name in ("quantity", "truth", "streams", "n", "covered", "rms", "bias", "median width"))
    made = Table(*columns, title="intervals that hold the truth: share [95 %]")
    for quantity, truth in SHOWN:
        of = table[(table["quantity"] == quantity) & (table["truth"] == truth)]
        for name, rows in of.groupby("set", sort=False):
            families = rows[~rows["family"].str.startswith("all")]
            shown = pd.concat([rows[rows["family"] == "all"], families.nsmallest(1, "covered")])
            for _, row in shown.iterrows():
                cells = [with_interval(row, "covered", "covered_ci_low", "covered_ci_high")]
                cells += [number(row[key]) for key in ("rms", "bias", "width")]
                made.add_row(quantity, truth, f"{name}, {row['family']}", str(row["streams"]), *cells)
    return made
