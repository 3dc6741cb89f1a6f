"""Numbers of a page's tables: as many digits as the interval allows, and the decimal points of a column below each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lensbench.report.figures.style import MINUS
from lensbench.report.formatting import MOST_DECIMALS, decimals_within, written

FIGURE_SPACE, POINT_SPACE = "\u2007", "\u2008"
"""Blanks as wide as a digit and as a point"""


@dataclass(frozen=True)
class NumberCell:
    """A number of a table: its text, with blanks around it for its column, its interval, and its value."""

    text: str
    interval: str = ""
    value: float | None = None


def aligned(spans: Sequence[Any]) -> list[NumberCell]:
    """Cells of one column, of ``(value, low, high)`` each; missing ones (None or not a number) are empty."""
    found: list[NumberCell] = []
    for span in spans:
        value, low, high = (None, None, None) if span is None else span
        if value is None or pd.isna(value):
            found.append(NumberCell(""))
            continue
        interval, digits = "", plain_decimals(float(value))
        if low is not None and high is not None and pd.notna(low):
            digits = decimals_within(float(low), float(high))
            interval = f"[{signed(float(low), digits)}, {signed(float(high), digits)}]"
        found.append(NumberCell(signed(float(value), digits), interval, float(value)))
    wholes, decimals = zip(*(parts(cell.text) for cell in found), strict=True) if found else ((), ())
    return [replace(cell, text=padded(cell.text, max(wholes), max(decimals))) for cell in found]


def signed(value: float, digits: int) -> str:
    """A number with so many decimals, and a minus that is as wide as a digit."""
    return written(value, digits).replace("-", MINUS)


def parts(text: str) -> tuple[int, int]:
    """How many characters stand before the point, and how many behind it."""
    whole, _, decimals = text.partition(".")
    return len(whole), len(decimals)


def padded(text: str, whole: int, decimals: int) -> str:
    """A number with the blanks that put its point below one of so many characters before and behind it."""
    if not text:
        return ""
    before, behind = parts(text)
    after = FIGURE_SPACE * (decimals - behind) + (POINT_SPACE if decimals and not behind else "")
    return f"{FIGURE_SPACE * (whole - before)}{text}{after}"


def plain_decimals(value: float) -> int:
    """Decimals of a number without an interval: none of a whole one, three at most of others, none from 1,000."""
    if value.is_integer() or abs(value) >= 1000:
        return 0
    return MOST_DECIMALS if abs(value) < 100 else 1
