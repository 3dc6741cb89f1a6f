"""The calibration of the update decomposition, and the study of its tokens, as tables of the terminal."""

from collections.abc import Mapping

import pandas as pd
from rich.table import Column, Table

from lensbench.report.formatting import number, with_interval
from lensbench.studies.update_tables import BRACKET, COVERAGE, QUANTITIES, RIGHT
from lensbench.studies.update_token_tables import AT_MOST, MEASURED, NEEDED, TOKENS

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


def update_tokens_tables(written: Mapping[str, pd.DataFrame]) -> list[Table]:
    """How many tokens an interval of what is added in place takes, and the intervals at each number of tokens."""
    return [_tokens(written[TOKENS]), _needed(written[NEEDED])]


def _tokens(table: pd.DataFrame) -> Table:
    columns = (
        Column(name)
        for name in (
            "family", "width", "tokens", "per width", "pairs that pass", "intervals", "half-width", "of refits", "covered",
            "rms", "seconds",
        )
    )  # fmt: skip
    made = Table(*columns, title="half-width of the interval of in_place by fitting tokens: mean over streams [95 %]")
    for _, row in table.iterrows():
        cells = [
            with_interval(row, name, f"{name}_ci_low", f"{name}_ci_high") if pd.notna(row[name]) else ""
            for name in ("half_width", "covered")
        ]
        of_refits, rms = (number(row[name]) if pd.notna(row[name]) else "" for name in ("of_refits", "rms"))
        made.add_row(
            str(row["family"]), f"{row['d']}", f"{row['fit_tokens']:,}", f"{row['per_d']:g}", f"{row['passed']:.1f}",
            f"{row['intervals']} of {row['streams']}", cells[0], of_refits, cells[1], rms, f"{row['seconds']:.0f}",
        )  # fmt: skip
    return made


def _needed(table: pd.DataFrame) -> Table:
    columns = (
        Column(name) for name in ("family", "width", "asked", "tokens [95 %]", "per width", "slope", "a pair passes at")
    )
    made = Table(*columns, title="fitting tokens that an interval of in_place takes")
    for _, row in table.iterrows():
        answer, per_d = str(row["reason"]), ""
        if pd.notna(row["tokens"]):
            answer, per_d = counted(row["tokens"]), f"{row['per_d']:.3g}"
            if pd.notna(row["tokens_ci_low"]):
                answer += f" [{counted(row['tokens_ci_low'])}, {counted(row['tokens_ci_high'])}]"
            answer = {MEASURED: answer, AT_MOST: f"at most {answer}"}.get(row["how"], f"{answer}, {row['how']}")
        slope = with_interval(row, "slope", "slope_ci_low", "slope_ci_high") if pd.notna(row["slope"]) else ""
        made.add_row(str(row["family"]), f"{row['d']}", f"+-{row['asked']:g}", answer, per_d, slope, _first_pair(row))
    return made


def _first_pair(row: "pd.Series[float]") -> str:
    if pd.isna(row["a_pair_at"]):
        return f"none up to {counted(row['no_pair_at'])}"
    below = f", none at {counted(row['no_pair_at'])}" if pd.notna(row["no_pair_at"]) else " or fewer"
    return counted(row["a_pair_at"]) + below


def counted(tokens: float) -> str:
    """A number of tokens with three digits."""
    return f"{float(f'{tokens:.3g}'):,.0f}"
