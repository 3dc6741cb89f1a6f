"""All models in a plane, as SVG: what they add in place against clarity, and what lenses held fixed see.

The models of the runs are coloured. Landmarks are grey: those made of each model's own states, and the suite's models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from lensbench.report.figures.plane import VIEWS, Region, View, regions_of, thresholds_of
from lensbench.report.formatting import shown_seeds, with_interval, written
from lensbench.report.landmarks import QUANTITIES, SUITE, landmarks_for
from lensbench.report.render import render
from lensbench.report.svg import Tick
from lensbench.report.verdicts import rule_of
from lensbench.results.folder import Run

UPDATES, FIXED = VIEWS[-1], VIEWS[0]

GREY = "#808080"

BEYOND = 1e9
"""A value beyond every axis"""

LETTER, BOLD = 0.56, 0.64
"""The width of a letter and of a bold one, in units of its size"""


@dataclass(frozen=True)
class Place:
    """A model or landmark in a plane. ``x`` and ``y``: value, and the ends of its interval; x not a number: undetermined.

    ``shape``: ``circle`` (a model), ``square`` (one known by construction), ``diamond`` (made of a model's own states) or
    ``dot`` (of the suite).
    """

    name: str
    colour: str
    shape: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    tip: str

    @property
    def own(self) -> bool:
        """Whether it is a model of the runs."""
        return self.shape in ("circle", "square")


@dataclass(frozen=True)
class Mark:
    """A place as it is drawn, in pixels: its centre, its intervals along both axes, and where its name is written.

    ``label`` is empty where there is no room for the name.
    """

    place: Place
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"
    size: float = 9.0


def squeezed(value: float) -> float:
    """A visibility on its axis: linear between -1 and 1, logarithmic beyond (they reach from -50 to 1)."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


@dataclass(frozen=True)
class Plane:
    """The axes of a plane: what they span, whether x is :func:`squeezed`, and pixels. ``gutter``: its width, at the left."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    squeezes: bool
    gutter: int
    width: int = 430
    height: int = 330
    left: int = 46
    bottom: int = 36

    @classmethod
    def around(cls, places: Sequence[Place], *, squeezes: bool) -> "Plane":
        """Axes that hold all intervals of ``places``, and 0 and 1."""
        scale = squeezed if squeezes else float
        x = [scale(v) for p in places for v in p.x if not math.isnan(v)] + [-0.1, 1.12]
        y = [v for p in places for v in p.y if not math.isnan(v)] + [-0.06, 1.08]
        gutter = 34 if any(math.isnan(p.x[0]) for p in places) else 0
        return cls(min(x), max(x), min(y), max(y), squeezes, gutter)

    @property
    def start(self) -> int:
        """Pixels to the left end of the x axis, right of the gutter."""
        return self.left + self.gutter

    @property
    def floor(self) -> int:
        """Pixels from the top to the x axis."""
        return self.height - self.bottom

    def across(self, x: float) -> float:
        """Pixels from the left; the middle of the gutter for what has no x."""
        if math.isnan(x):
            return round(self.left + self.gutter / 2, 1)
        at = squeezed(x) if self.squeezes else x
        share = (min(max(at, self.low_x), self.high_x) - self.low_x) / (self.high_x - self.low_x)
        return round(self.start + share * (self.width - self.start - 10), 1)

    def down(self, y: float) -> float:
        """Pixels from the top; the floor for what has no y."""
        if math.isnan(y):
            return float(self.floor)
        share = (min(max(y, self.low_y), self.high_y) - self.low_y) / (self.high_y - self.low_y)
        return round(self.floor - share * (self.floor - 8), 1)

    @property
    def ticks_x(self) -> list[Tick]:
        """Some round values within the axis, not too near to each other."""
        wanted = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5) if self.squeezes else np.arange(-4, 5) / 2
        shown = [Tick(self.across(float(v)), f"{float(v):g}") for v in wanted if self.holds(float(v))]
        kept: list[Tick] = []
        for tick in sorted(shown, key=lambda tick: tick.label not in ("0", "1")):
            if all(abs(tick.at - other.at) > 24 for other in kept):
                kept.append(tick)
        return sorted(kept, key=lambda tick: tick.at)

    def holds(self, x: float) -> bool:
        """Whether a value lies within the x axis."""
        return self.low_x <= (squeezed(x) if self.squeezes else x) <= self.high_x

    @property
    def ticks_y(self) -> list[Tick]:
        """Every quarter."""
        values = np.arange(math.ceil(self.low_y * 4) / 4, self.high_y, 0.25)
        return [Tick(self.down(float(v)), f"{v:g}") for v in values]


@dataclass(frozen=True)
class Area:
    """A region of the rule in pixels, with its name and where that is written."""

    name: str
    x: float
    y: float
    width: float
    height: float
    colour: str
    text_x: float
    text_y: float
    anchor: str


def areas(plane: Plane, regions: Sequence[Region]) -> Iterator[Area]:
    """The regions of the rule, in pixels."""
    for region in regions:
        left = float(plane.left) if region.x[0] == -math.inf else plane.across(region.x[0])
        right, top, low = plane.across(region.x[1]), plane.down(region.y[1]), plane.down(region.y[0])
        if right - left < 1 or low - top < 1:
            continue
        at_top = region.where != "bottom"
        text_x, anchor = (right - 4, "end") if at_top else (left + 4, "start")
        yield Area(
            region.name, left, top, round(right - left, 1), round(low - top, 1), region.colour, text_x,
            top + 11 if at_top else low - 5, anchor,
        )  # fmt: skip


# What is drawn
def places_of(runs: Sequence[Run], names: Sequence[dict[str, str]], view: View, colours: dict[str, str]) -> list[Place]:
    """The models of ``runs`` that have a y in this view; ``names``: of each run, model -> its name on the page."""
    found = []
    for run, called in zip(runs, names, strict=True):
        rows = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
        verdicts = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model")
        known = dict(zip(verdicts["model"], verdicts["known"], strict=True))
        for model, name in called.items():
            x, y = (row_of(rows, model, index) for index in (view.x, view.y))
            if y is None or pd.isna(y["value"]):
                continue
            said = [f"{plain(view.labels[0])} {told(x)}", f"{plain(view.labels[1])} {told(y)}"]
            built = [f"by construction: {known[model]}"] if model in known else []
            shape = "square" if model in known else "circle"
            found.append(Place(name, colours[name], shape, span(x), span(y), "\n".join([name, *said, *built])))
    return found


def row_of(rows: pd.DataFrame, model: str, index: str) -> Any:
    """The row of an index of a model; None where it was not measured."""
    return rows.loc[(model, index)] if (model, index) in rows.index else None


def told(row: Any) -> str:
    """An index with its interval, or that it is undetermined."""
    return "undetermined" if row is None or pd.isna(row["value"]) else with_interval(row)


def plain(label: str) -> str:
    """The label of an axis without the marks of a formula."""
    return label.replace("$", "")


def span(row: Any) -> tuple[float, float, float]:
    """A value with the ends of its interval, or twice itself where it has none."""
    if row is None or pd.isna(row["value"]):
        return (math.nan,) * 3
    value = float(row["value"])
    low, high = (value if pd.isna(row[k]) else float(row[k]) for k in ("ci_low", "ci_high"))
    return value, low, high


def own_landmarks(runs: Sequence[Run], names: Sequence[dict[str, str]], view: View) -> list[Place]:
    """The landmarks that are made of the models' own states, means over seeds."""
    found = []
    for run, called in zip(runs, names, strict=True):
        table = run.tables["landmarks.csv"]
        table = table[table["model"].isin(list(called))].astype({"value": float})
        means = table.groupby(["model", "landmark", "index"], sort=False)["value"].mean()
        for model, landmark in dict.fromkeys(zip(table["model"], table["landmark"], strict=True)):
            x, y = (float(means.get((model, landmark, index), math.nan)) for index in (view.x, view.y))
            if not math.isnan(y):
                found.append(landmark_place(f"+{landmark}", f"states of {called[model]}, {landmark}", "diamond", x, y))
    return found


def landmark_place(name: str, what: str, shape: str, x: float, y: float) -> Place:
    """A grey mark without intervals."""
    in_place = "undetermined" if math.isnan(x) else written(x, 2)
    tip = f"{what}\n{plain(UPDATES.labels[0])} {in_place}\n{plain(UPDATES.labels[1])} {written(y, 2)}"
    return Place(name, GREY, shape, (x,) * 3, (y,) * 3, tip)


def landmarks_of_suite(runs: Sequence[Run]) -> list[Place]:
    """The models of the suite of landmarks."""
    rows = landmarks_for(runs).dropna(subset=["clarity"]).to_dict("records")
    return [
        landmark_place(
            str(row["model"]),
            f"{row['model']} of {SUITE}" + (f", by construction: {row['known']}" if row["known"] else ""),
            "dot", *(float(row[column]) for column in QUANTITIES),
        )
        for row in rows
    ]  # fmt: skip


# Names beside marks
def labelled(marks: Sequence[Mark], plane: Plane, regions: Sequence[Area]) -> list[Mark]:
    """Marks with their names, each where it covers no mark and no other name; landmarks of one name are named once."""
    taken = [(mark.x - 6, mark.y - 6, mark.x + 6, mark.y + 6) for mark in marks]
    for mark in marks:
        if mark.place.own:
            taken.append((min(mark.x_ends), mark.y - 2, max(mark.x_ends), mark.y + 2))
            taken.append((mark.x - 2, min(mark.y_ends), mark.x + 2, max(mark.y_ends)))
    for region in regions:
        wide = LETTER * 9 * len(region.name)
        left = region.text_x - (wide if region.anchor == "end" else 0)
        taken.append((left, region.text_y - 9, left + wide, region.text_y + 2))
    named: set[str] = set()
    found = {}
    for at, mark in sorted(enumerate(marks), key=lambda pair: not pair[1].place.own):
        found[at] = mark
        if not mark.place.own and mark.place.name in named:
            continue
        size = 10.0 if mark.place.own else 8.0
        placed = room_for(mark, size, plane, taken)
        if placed is not None:
            found[at], box = placed
            taken.append(box)
            named.add(mark.place.name)
    return [found[at] for at in range(len(marks))]


Box = tuple[float, float, float, float]


def room_for(mark: Mark, size: float, plane: Plane, taken: Sequence[Box]) -> tuple[Mark, Box] | None:
    """The mark with its name at the nearest free place, and the box of the name; None where nothing near is free."""
    text = mark.place.name
    wide = (BOLD if mark.place.own else LETTER) * size * len(text)
    for far in (8, 12, 18, 26, 36, 48):
        for right, up in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)):
            middle = mark.x + far * right + (right * wide / 2)
            base = mark.y - far * up + size / 3
            box = (middle - wide / 2 - 1, base - size, middle + wide / 2 + 1, base + 2)
            inside = box[0] >= plane.left and box[2] <= plane.width and box[1] >= 0 and box[3] <= plane.floor
            if inside and not any(overlap(box, other) for other in taken):
                placed = replace(
                    mark, label=text, label_x=round(middle, 1), label_y=round(base, 1), anchor="middle", size=size
                )
                return placed, box
    return None


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share a point."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# The drawings
def plane_drawing(runs: Sequence[Run], names: Sequence[dict[str, str]], colours: dict[str, str], view: View) -> Markup:
    """One plane; empty where no model has a place in it."""
    own = places_of(runs, names, view, colours)
    if not own:
        return Markup()
    grey = own_landmarks(runs, names, view) + landmarks_of_suite(runs) if view is UPDATES else []
    plane = Plane.around([*own, *grey], squeezes=bool(view.size))
    marks = [mark_of(plane, place) for place in (*grey, *own)]
    regions = regions_of(
        view, thresholds_of(rule_of(runs[0])), (-math.inf, -BEYOND, BEYOND), (plane.low_y, plane.high_y)
    )
    shaded = list(areas(plane, regions))
    missing = [n for called in names for n in called.values() if n not in {p.name for p in own}]
    alt = "; ".join(p.tip.replace("\n", ", ") for p in own)
    return render(
        "plane.html", plane=plane, marks=labelled(marks, plane, shaded), areas=shaded, alt=alt,
        title=plain(view.title), labels=[plain(label) for label in view.labels], missing=missing, suite=SUITE,
        kinds={place.shape for place in (*grey, *own)}, squeezes=plane.squeezes,
    )  # fmt: skip


def mark_of(plane: Plane, place: Place) -> Mark:
    """The mark of a place, without its name."""
    x_ends = (plane.across(place.x[1]), plane.across(place.x[2]))
    y_ends = (plane.down(place.y[1]), plane.down(place.y[2]))
    return Mark(place, plane.across(place.x[0]), plane.down(place.y[0]), x_ends, y_ends)


def planes(runs: Sequence[Run], names: Sequence[dict[str, str]], colours: dict[str, str]) -> tuple[Markup, Markup]:
    """The plane of the update decomposition, and that of lenses held fixed; empty ones where no model has a place."""
    return plane_drawing(runs, names, colours, UPDATES), plane_drawing(runs, names, colours, FIXED)
