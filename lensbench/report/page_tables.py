"""The tables of a page: one column for a quantity and its interval, sortable, with links to their CSV."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from lensbench.report.formatting import shown_seeds
from lensbench.report.number_cells import aligned
from lensbench.report.render import render
from lensbench.results.folder import Run, plain_name, table_bytes, table_file

LARGEST_CSV = 400_000
"""Bytes of a table that the page holds as a file; of a larger one it gives the name"""

MOST_ROWS = 400

LEFT_OUT = {"verdicts.csv": ("sentence", "fixed_lens_reason")}
"""Table -> columns that the page says in words elsewhere"""

OPENED = ("models.csv",)
"""Tables that are not folded"""

ENDS = {"_ci_low": "ci_low", "_ci_high": "ci_high"}

REFITS = "range over refits"


@dataclass(frozen=True)
class TableCell:
    """A cell: its text and interval, the number that it is sorted by (None: its text), and whether its lines may break."""

    text: str
    value: float | None = None
    interval: str = ""
    wraps: bool = False

    @property
    def whole(self) -> str:
        """The text with its interval."""
        return " ".join(filter(None, (self.text.strip(), self.interval)))


@dataclass(frozen=True)
class PageColumn:
    """A column of a page's table: its name, and a cell for each row."""

    name: str
    cells: list[TableCell]

    @property
    def same(self) -> bool:
        """Whether all rows say the same."""
        return len({(cell.text, cell.interval) for cell in self.cells}) == 1


def page_columns(table: pd.DataFrame) -> list[PageColumn]:
    """The columns of a table as a page shows them: each interval stands in the column of its quantity."""
    found = []
    taken: set[str] = set()
    for name in map(str, table):
        if name in taken:
            continue
        low, high = interval_of(name, table)
        if low:
            taken |= {low, high}
            spans = list(table[[name, low, high]].itertuples(index=False, name=None))
            found.append(PageColumn(f"{name} [95 %]", [number_cell(cell) for cell in aligned(spans)]))
        elif name == "fit_low" and "fit_high" in table:
            taken.add("fit_high")
            found.append(PageColumn(REFITS, refit_cells(table)))
        else:
            found.append(PageColumn(name, plain_cells(name, table[name])))
    return found


def interval_of(name: str, table: pd.DataFrame) -> tuple[str, str]:
    """The columns that hold the interval of a quantity; two empty names where it has none."""
    for low, high in ((f"{name}_ci_low", f"{name}_ci_high"), ("ci_low", "ci_high")):
        if low in table and high in table and (low != "ci_low" or name == "value"):
            return low, high
    return "", ""


def number_cell(cell: Any) -> TableCell:
    """A number's cell."""
    return TableCell(cell.text, cell.value, cell.interval)


def refit_cells(table: pd.DataFrame) -> list[TableCell]:
    """The range over refits: no interval of 95 %, and named so by its column."""
    spans = [
        (low, low, high) if pd.notna(low) else None
        for low, high in table[["fit_low", "fit_high"]].itertuples(index=False, name=None)
    ]
    return [TableCell(cell.interval.strip("[]").replace(", ", " to "), cell.value) for cell in aligned(spans)]


def plain_cells(name: str, values: "pd.Series[Any]") -> list[TableCell]:
    """Cells of a column without an interval; missing ones are empty."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return [number_cell(cell) for cell in aligned([(value, None, None) for value in values.astype(float)])]
    return [table_cell(name, value) for value in values]


def table_cell(column: object, value: Any) -> TableCell:
    """A value as a page shows it; missing ones are empty."""
    if pd.isna(value):
        return TableCell("")
    if isinstance(value, float | int | np.number) and not isinstance(value, bool):
        return number_cell(aligned([(float(value), None, None)])[0])
    return TableCell(str(value), wraps=column in ("reason", "verdict", "gate", "note"))


def sortable(identity: str, name: str, columns: Sequence[PageColumn], **how: Any) -> Markup:
    """A table that its heads sort; columns that say the same in each of several rows are named above it.

    ``how``: ``opened``, ``link`` and ``cut`` of the template.
    """
    several = bool(columns) and len(columns[0].cells) > 1
    same = [column for column in columns if several and column.same]
    shown = [column for column in columns if column not in same]
    return render(
        "table.html", id=identity, name=name, columns=[column.name for column in shown],
        same=[(column.name, column.cells[0].whole) for column in same],
        rows=list(zip(*(column.cells for column in shown), strict=True)),
        **{"opened": False, "link": "", "cut": None, **how},
    )  # fmt: skip


def csv_link(path: Path) -> Markup:
    """A link to a table that the page holds; of a large one its name and size. ``path``: its file, packed or not."""
    raw = table_bytes(path)
    data = None if len(raw) > LARGEST_CSV else base64.b64encode(raw).decode()
    return render("csv_link.html", name=plain_name(path.name), data=data, megabytes=len(raw) / 1e6)


def table_html(run: Run, name: str, place: int) -> Markup:
    """A sortable table with a link to its CSV: rows over seeds where there are, else each; empty for a missing table."""
    table, path = run.tables[name], table_file(run.folder, name)
    if table.empty or path is None:
        return Markup()
    rows = shown_seeds(table) if {"model", "seed"} <= set(table) and name != "models.csv" else table
    shown = rows.head(MOST_ROWS).dropna(axis=1, how="all").drop(columns=LEFT_OUT.get(name, ()), errors="ignore")
    return sortable(
        f"table-{place}-{name.partition('.')[0]}", name, page_columns(shown), link=csv_link(path), opened=name in OPENED,
        cut=MOST_ROWS if len(rows) > MOST_ROWS else None,
    )  # fmt: skip
