"""The profile over depth as SVG, whole, small, or as a table's cell: what each block keeps, adds and brings, with tips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from markupsafe import Markup

from lensbench.report.figures.blocks import gate_text, profile_frame
from lensbench.report.figures.profile import FILLS
from lensbench.report.formatting import number, with_interval, written
from lensbench.report.render import render
from lensbench.report.svg import Tick
from lensbench.results.folder import Run

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
class Size:
    """What a drawing of a profile measures, in pixels. ``strips``: quantity -> its name, where it begins, how high it is."""

    width: int
    height: int
    left: int
    right: int
    strips: dict[str, tuple[str, int, int]] = field(hash=False)
    most_ticks: int = 9
    landmarks: bool = False

    @property
    def tiny(self) -> bool:
        """Whether there is room for bars alone."""
        return not self.most_ticks


WHOLE = Size(
    430, 236, 44, 62, {"clarity": ("keeps", 8, 62), "in_place": ("adds", 92, 62), "news": ("news", 176, 34)},
    landmarks=True,
)  # fmt: skip
SMALL = Size(340, 70, 44, 4, {"clarity": ("keeps", 4, 18), "in_place": ("adds", 30, 18)})
TINY = Size(120, 28, 0, 0, {"clarity": ("keeps", 2, 11), "in_place": ("adds", 15, 11)}, most_ticks=0)


@dataclass(frozen=True)
class ProfileAxes:
    """The x axis of one model: layers, a gap, and the bar of all blocks from layer 1 on."""

    layers: int
    size: Size

    @property
    def end(self) -> int:
        """The last layer of a block."""
        return max(self.layers - 1, 1)

    @property
    def wide(self) -> float:
        """The width of the bar of all, in layers."""
        return max(1.0, 0.12 * self.end)

    @property
    def last(self) -> int:
        """Pixels from the left to the right end of the strips."""
        return self.size.width - self.size.right

    def across(self, layer: float) -> float:
        """Pixels from the left."""
        share = layer / (self.end + 0.6 + self.wide)
        return round(self.size.left + share * (self.last - self.size.left), 1)

    def down(self, quantity: str, value: float) -> float:
        """Pixels from the top of a value in the strip of its quantity."""
        _, top, high = self.size.strips[quantity]
        return round(top + high * (1 - min(max(value, -OVER), 1 + OVER)), 1)

    @property
    def ticks(self) -> list[Tick]:
        """Some layers, the last of them always, and all."""
        if self.size.tiny:
            return []
        step = max(1, -(-self.layers // self.size.most_ticks))
        layers = [layer for layer in range(0, self.end, step) if self.end - layer >= 0.6 * step]
        shown = [Tick(self.across(layer), str(layer)) for layer in (*layers, self.end)]
        return [*shown, Tick(self.across(self.end + 0.6 + self.wide / 2), "all")]


def profiles(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> Markup:
    """The profiles of all models of ``runs`` that were decomposed, and the names of the others; empty where none was.

    ``names``: of each run, model -> its name on the page. A single model's profile is not drawn: its answer has it.
    """
    drawn, missing, reaches = [], [], []
    for run, called in zip(runs, names, strict=True):
        frame = profile_frame(run)
        for model, name in called.items():
            own = frame[frame["model"] == model]
            if (own["part"] == "block").any():
                drawn.append(profile(own, name))
                reaches += reach_of(own, name)
            else:
                reason = "not measured" if own.empty else own["reason"].iloc[0]
                missing.append(f"{name} ({reason})")
    if not drawn:
        return Markup()
    alone = sum(map(len, names)) == 1
    return render(
        "profiles.html", drawings=[] if alone else drawn, missing=missing, key=key_of_fills(), reaches=reaches
    )


def reach_of(frame: pd.DataFrame, name: str) -> list[str]:
    """``gpt 86 %``: how much of a model's prediction the lens of the last layer reads; nothing where that is unknown."""
    reach = frame.loc[frame["part"] == "overall", "reach"].iloc[0]
    return [] if pd.isna(reach) else [f"{name} {written(100 * float(reach), 0)} %"]


def key_of_fills() -> list[tuple[str, str]]:
    """Colour and name of every part of a bar."""
    return [(colour, label) for colour, label in FILLS.values()]


def profile(frame: pd.DataFrame, name: str, size: Size = WHOLE) -> Markup:
    """The profile of one model. ``frame``: its rows of :func:`lensbench.report.figures.blocks.profile_frame`."""
    axes = ProfileAxes(int(frame["layers"].iloc[0]), size)
    whole = frame[frame["part"] == "overall"].iloc[0]
    bars: list[Bar] = []
    whiskers: list[Whisker] = []
    for _, row in frame[frame["part"].isin(["block", "overall"])].iterrows():
        of_all = row["part"] == "overall"
        ends = (axes.end + 0.6, axes.end + 0.6 + axes.wide) if of_all else (row["from_layer"], row["to_layer"])
        aside = 0.4 if size.tiny else 0.8
        left, right = round(axes.across(ends[0]) + aside, 1), round(axes.across(ends[1]) - aside, 1)
        where = "all from layer 1 on" if of_all else f"layers {row['from_layer']:.0f} to {row['to_layer']:.0f}"
        tip = "\n".join([f"{name}, {where}", *facts(row)])
        bars += row_bars(row, axes, left, right - left, tip)
        for quantity in size.strips:
            if pd.notna(row[f"{quantity}_low"]) and not size.tiny:
                low, high = (axes.down(quantity, row[f"{quantity}{end}"]) for end in ("_low", "_high"))
                whiskers.append(Whisker(round((left + right) / 2, 1), low, high))
    seeds = [
        (axes.across(row["from_layer"]), axes.across(row["to_layer"]), axes.down(quantity, row[quantity]))
        for _, row in frame[frame["part"] == "seed"].iterrows()
        for quantity in size.strips
        if pd.notna(row[quantity]) and size.landmarks
    ]
    said = "; ".join([*filter(None, [whole["verdict"]]), *facts(whole)])
    strips = [(label, top, top + high) for label, top, high in size.strips.values()]
    lines = [line for quantity in ("clarity", "in_place") for line in grey_lines(frame, axes, quantity)]
    return render(
        "profile.html" if size.landmarks else "small_profile.html", name=name, axes=axes, size=size, bars=bars,
        whiskers=whiskers, seeds=seeds, strips=strips, lines=lines, said=said,
        alt=f"What each block of {name} keeps and adds. From layer 1 on: {said}",
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


def row_bars(row: Any, axes: ProfileAxes, x: float, width: float, tip: str) -> Iterator[Bar]:
    """The parts of one bar in all strips; an open one where a quantity is undetermined or undefined."""
    lost = "turned" if pd.isna(row["drowned"]) else "drowned"
    parts = {"clarity": ("kept", lost), "in_place": ("in place", "elsewhere"), "news": ("news", "")}
    pale = row["from_layer"] == 0
    for quantity in axes.size.strips:
        first, rest = parts[quantity]
        value = row[quantity]
        top, bottom = axes.down(quantity, 1.0), axes.down(quantity, 0.0)
        if pd.isna(value):
            text = gate_text(row) if quantity == "in_place" and width > 12 and axes.size.landmarks else ""
            yield Bar(x, top, round(width, 1), round(bottom - top, 1), "", False, tip, text)
            continue
        middle = axes.down(quantity, min(max(value, 0.0), 1.0))
        yield Bar(x, middle, round(width, 1), round(bottom - middle, 1), FILLS[first][0], pale, tip)
        if rest:
            yield Bar(x, top, round(width, 1), round(middle - top, 1), FILLS[rest][0], pale, tip)


def grey_lines(frame: pd.DataFrame, axes: ProfileAxes, quantity: str) -> Iterator[GreyLine]:
    """The landmarks of a strip, their names so far apart that none lies on another; none where there is no room."""
    if not axes.size.landmarks:
        return
    rows = frame[(frame["part"] == "landmark") & frame[quantity].notna()].sort_values(quantity, ascending=False)
    at = 0.0
    for _, row in rows.iterrows():
        y = axes.down(quantity, row[quantity])
        at = max(at, y + 3.0) if at else y + 3.0
        yield GreyLine(y, f"+{row['name']}", round(at, 1))
        at += 10.0
