"""The profile over depth as SVG, the first drawing of a page: what each block keeps, adds and brings, with its tips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from lensbench.report.figures.blocks import gate_text, profile_frame
from lensbench.report.figures.profile import FILLS
from lensbench.report.formatting import number, with_interval
from lensbench.report.render import render
from lensbench.report.svg import Tick
from lensbench.results.folder import Run

STRIPS = {"clarity": ("keeps", 8, 62), "in_place": ("adds", 92, 62), "news": ("news", 176, 34)}
"""Quantity -> the name of its strip, and where it begins and how high it is, in pixels"""

NAMES = {"clarity": "keeps (clarity)", "in_place": "adds in place", "news": "news"}

OVER = 0.12
"""How far a value beyond 0 or 1 is drawn"""


@dataclass(frozen=True)
class Bar:
    """A part of a bar in pixels, with its colour ('' for an open one that is undetermined), tip and text."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    pale: bool
    tip: str
    text: str = ""


@dataclass(frozen=True)
class Whisker:
    """An interval: x, and both ends along y, in pixels."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class GreyLine:
    """A landmark: its height, and its name where there is room for it."""

    y: float
    name: str
    text_y: float


@dataclass(frozen=True)
class ProfileAxes:
    """The x axis of one model: layers, a gap, and the bar of all blocks from layer 1 on."""

    layers: int
    width: int = 430
    height: int = 236
    left: int = 44
    right: int = 62

    @property
    def end(self) -> int:
        """The last layer of a block."""
        return max(self.layers - 1, 1)

    @property
    def wide(self) -> float:
        """The width of the bar of all, in layers."""
        return max(1.0, 0.12 * self.end)

    def across(self, layer: float) -> float:
        """Pixels from the left."""
        share = layer / (self.end + 0.6 + self.wide)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    @property
    def ticks(self) -> list[Tick]:
        """At most nine layers, and all."""
        layers = range(0, self.layers, max(1, -(-self.layers // 9)))
        whole = self.end + 0.6 + self.wide / 2
        shown = [Tick(self.across(layer), str(layer)) for layer in layers if whole - layer > 0.08 * self.end]
        return [*shown, Tick(self.across(whole), "all")]


def down(quantity: str, value: float) -> float:
    """Pixels from the top of a value in the strip of its quantity."""
    _, top, high = STRIPS[quantity]
    return round(top + high * (1 - min(max(value, -OVER), 1 + OVER)), 1)


def profiles(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> Markup:
    """The profiles of all models of ``runs`` that were decomposed, and the names of the others; empty where none was.

    ``names``: of each run, model -> its name on the page.
    """
    drawn, missing = [], []
    for run, called in zip(runs, names, strict=True):
        frame = profile_frame(run)
        for model, name in called.items():
            own = frame[frame["model"] == model]
            if (own["part"] == "block").any():
                drawn.append(profile(own, name))
            else:
                reason = "not measured" if own.empty else own["reason"].iloc[0]
                missing.append(f"{name} ({reason})")
    if not drawn:
        return Markup()
    key = [(colour, label.replace("$", "")) for colour, label in FILLS.values()]
    return render("profiles.html", drawings=drawn, missing=missing, key=key)


def profile(frame: pd.DataFrame, name: str) -> Markup:
    """The profile of one model. ``frame``: its rows of :func:`lensbench.report.figures.blocks.profile_frame`."""
    axes = ProfileAxes(int(frame["layers"].iloc[0]))
    whole = frame[frame["part"] == "overall"].iloc[0]
    bars: list[Bar] = []
    whiskers: list[Whisker] = []
    for _, row in frame[frame["part"].isin(["block", "overall"])].iterrows():
        of_all = row["part"] == "overall"
        ends = (axes.end + 0.6, axes.end + 0.6 + axes.wide) if of_all else (row["from_layer"], row["to_layer"])
        left, right = axes.across(ends[0]) + 0.8, axes.across(ends[1]) - 0.8
        where = "all from layer 1 on" if of_all else f"layers {row['from_layer']:.0f} to {row['to_layer']:.0f}"
        tip = "\n".join([f"{name}, {where}", *facts(row)])
        bars += row_bars(row, left, right - left, tip)
        for quantity in STRIPS:
            if pd.notna(row[f"{quantity}_low"]):
                low, high = (down(quantity, row[f"{quantity}{end}"]) for end in ("_low", "_high"))
                whiskers.append(Whisker(round((left + right) / 2, 1), low, high))
    seeds = [
        (axes.across(row["from_layer"]), axes.across(row["to_layer"]), down(quantity, row[quantity]))
        for _, row in frame[frame["part"] == "seed"].iterrows()
        for quantity in STRIPS
        if pd.notna(row[quantity])
    ]
    said = "; ".join([*filter(None, [whole["verdict"]]), *facts(whole)])
    alt = f"What each block of {name} keeps and adds. From layer 1 on: {said}"
    strips = [(label, top, top + high) for label, top, high in STRIPS.values()]
    lines = [line for quantity in ("clarity", "in_place") for line in grey_lines(frame, quantity)]
    return render(
        "profile.html", name=name, axes=axes, bars=bars, whiskers=whiskers, seeds=seeds, strips=strips, lines=lines,
        alt=alt, said=said,
    )  # fmt: skip


def facts(row: Any) -> list[str]:
    """What is known of a block, a line for each quantity."""
    lines = []
    for quantity, name in NAMES.items():
        value = {"value": row[quantity], "ci_low": row[f"{quantity}_low"], "ci_high": row[f"{quantity}_high"]}
        gate = gate_text(row) if quantity == "in_place" else ""
        lines.append(f"{name} {f'undetermined: {gate}' if gate and pd.isna(row[quantity]) else with_interval(value)}")
    if pd.notna(row["in_place"]):
        lines.insert(2, f"adds elsewhere {number(1 - row['in_place'])}")
    if pd.notna(row["kept_high"]):
        drowned = "" if pd.isna(row["drowned"]) else f", drowned {number(row['drowned'])}"
        lines.insert(1, f"kept between {number(row['kept_low'])} and {number(row['kept_high'])}{drowned}")
    return lines


def row_bars(row: Any, x: float, width: float, tip: str) -> Iterator[Bar]:
    """The parts of one bar in all strips; an open one where a quantity is undetermined or undefined."""
    lost = "turned" if pd.isna(row["drowned"]) else "drowned"
    parts = {"clarity": ("kept", lost), "in_place": ("in place", "elsewhere"), "news": ("news", "")}
    pale = row["from_layer"] == 0
    for quantity, (first, rest) in parts.items():
        value = row[quantity]
        top, bottom = down(quantity, 1.0), down(quantity, 0.0)
        if pd.isna(value):
            text = gate_text(row) if quantity == "in_place" and width > 12 else ""
            yield Bar(x, top, round(width, 1), round(bottom - top, 1), "", False, tip, text)
            continue
        middle = down(quantity, min(max(value, 0.0), 1.0))
        yield Bar(x, middle, round(width, 1), round(bottom - middle, 1), FILLS[first][0], pale, tip)
        if rest:
            yield Bar(x, top, round(width, 1), round(middle - top, 1), FILLS[rest][0], pale, tip)


def grey_lines(frame: pd.DataFrame, quantity: str) -> Iterator[GreyLine]:
    """The landmarks of a strip, their names so far apart that none lies on another."""
    rows = frame[(frame["part"] == "landmark") & frame[quantity].notna()].sort_values(quantity, ascending=False)
    at = 0.0
    for _, row in rows.iterrows():
        y = down(quantity, row[quantity])
        at = max(at, y + 3.0) if at else y + 3.0
        yield GreyLine(y, f"+{row['name']}", round(at, 1))
        at += 10.0
