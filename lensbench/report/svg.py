"""The drawings of a report as SVG: the ruler of all models, the matrix of one, and its KL by layer.

Each computes where its marks lie and what they say when the pointer is over them; templates write the markup.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from lensbench.lenses.kinds import layer_kinds
from lensbench.report.figures.frames import NULL
from lensbench.report.figures.lenses import lens_colours
from lensbench.report.formatting import number, shown_seeds, with_interval
from lensbench.report.render import render, shade
from lensbench.results.folder import Run

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's colours, which the colour-blind tell apart; shapes and names say the same."""


@dataclass(frozen=True)
class Tick:
    """A place along an axis, in pixels, and what is written there."""

    at: float
    label: str


# The ruler
@dataclass(frozen=True)
class Place:
    """A model on the ruler: rows of ``indices.csv`` for x and y, and the verdict that is known by construction, or ''."""

    name: str
    x: Any
    y: Any
    known: str

    @property
    def defined(self) -> bool:
        """Whether both of its indices are."""
        return bool(pd.notna(self.x["value"]) and pd.notna(self.y["value"]))

    @property
    def in_words(self) -> str:
        """Its indices, with their intervals."""
        return f"gain visibility {with_interval(self.x)}, consistency {with_interval(self.y)}"


def places_on_ruler(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> list[Place]:
    """A place for each model of ``runs``, in their order; ``names``: of each run, model -> its name on the page."""
    places = []
    for run, called in zip(runs, names, strict=True):
        rows = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
        known = shown_seeds(run.tables["verdicts.csv"]).dropna(subset=["known"]).drop_duplicates("model")
        built = dict(zip(known["model"], known["known"], strict=True))
        for model, name in called.items():
            x, y = (rows.loc[(model, index)] for index in ("gain_visibility", "shared_consistency"))
            places.append(Place(name, x, y, built.get(model, "")))
    return places


def squeezed(value: float) -> float:
    """A visibility on the axis of the ruler: linear between -1 and 1, logarithmic beyond (they reach from -50 to 1)."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def ends(row: Any) -> tuple[float, float]:
    """The interval of an index, or twice its value where it has none."""
    low, high = (row["value"] if pd.isna(row[k]) else float(row[k]) for k in ("ci_low", "ci_high"))
    return low, high


@dataclass(frozen=True)
class Plane:
    """The axes of the ruler: what they span (x as :func:`squeezed`), and pixels."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    width: int = 720
    height: int = 400
    pad: int = 46

    @classmethod
    def around(cls, places: Sequence[Place]) -> "Plane":
        """Axes that hold all intervals of ``places``, and 0 and 1."""
        x, y = [ends(p.x) for p in places], [ends(p.y) for p in places]
        return cls(
            min(-1.1, *(squeezed(low) for low, _ in x)), max(1.15, *(squeezed(high) for _, high in x)),
            min(-0.1, *(low for low, _ in y)), max(1.1, *(high for _, high in y)),
        )  # fmt: skip

    def across(self, x: float) -> float:
        """Pixels from the left."""
        share = (squeezed(x) - self.low_x) / (self.high_x - self.low_x)
        return round(self.pad + share * (self.width - self.pad - 14), 1)

    def down(self, y: float) -> float:
        """Pixels from the top."""
        share = (y - self.low_y) / (self.high_y - self.low_y)
        return round(self.height - self.pad + 12 - share * (self.height - self.pad - 8), 1)

    @property
    def ticks_x(self) -> list[Tick]:
        """Those of gain visibility within the axis."""
        values = (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1)
        return [Tick(self.across(v), f"{v:g}") for v in values if self.low_x <= squeezed(v) <= self.high_x]

    @property
    def ticks_y(self) -> list[Tick]:
        """Those of consistency: every quarter."""
        values = np.arange(math.ceil(self.low_y * 4) / 4, self.high_y, 0.25)
        return [Tick(self.down(float(v)), f"{v:g}") for v in values]


@dataclass(frozen=True)
class PlaneMark:
    """A model as it is drawn: its centre, its intervals along both axes, and its tip."""

    name: str
    colour: str
    known: bool
    tip: str
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]


def plane_mark(plane: Plane, place: Place, colour: str) -> PlaneMark:
    """The mark of one model."""
    tip = f"{place.name}\ngain visibility {with_interval(place.x)}\nconsistency {with_interval(place.y)}"
    tip += f"\nby construction: {place.known}" if place.known else ""
    (left, right), (bottom, top) = ends(place.x), ends(place.y)
    return PlaneMark(
        place.name, colour, bool(place.known), tip, plane.across(place.x["value"]), plane.down(place.y["value"]),
        (plane.across(left), plane.across(right)), (plane.down(bottom), plane.down(top)),
    )  # fmt: skip


def ruler(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> Markup:
    """All models in the plane of gain visibility and consistency; a number stands for each name in the list below it."""
    places = places_on_ruler(runs, names)
    shown = [p for p in places if p.defined]
    missing = ", ".join(p.name for p in places if not p.defined)
    plane = Plane.around(shown) if shown else None
    marks = [plane_mark(plane, p, PALETTE[k % len(PALETTE)]) for k, p in enumerate(shown)] if plane else []
    alt = "; ".join(f"{p.name}: {p.in_words}" for p in shown)
    return render("ruler.html", plane=plane, marks=marks, missing=missing, alt=alt)


# The matrix of a model
@dataclass(frozen=True)
class MatrixCell:
    """A cell of a heatmap: its left upper corner in pixels, colours, the number in it (or ''), and its tip."""

    lens_layer: int
    stream_layer: int
    x: int
    y: int
    fill: str
    ink: str
    text: str
    tip: str


def penalty_text(value: float) -> str:
    """A penalty as it stands in a cell: two decimals below 1, one above."""
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"


def heatmap(cells: pd.DataFrame, model: str, top: float, unit: str) -> Markup:
    """The transfer matrix of one model: hover, or arrow keys, tell lens, layer, value and interval.

    ``cells``: as of :func:`lensbench.report.page.mean_cells`. ``top``: the penalty of the darkest colour.
    """
    size = int(cells["stream_layer"].max()) + 1
    side, edge = max(9, min(34, 300 // size)), 34
    columns = ["lens_layer", "stream_layer", "penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"]
    drawn = []
    for lens_layer, stream_layer, value, low, high in cells[columns].to_numpy(float).tolist():
        i, j = int(lens_layer), int(stream_layer)
        lens = f"lens of layer {i}" if i < size - 1 else "logit lens"
        interval = with_interval({"value": value, "ci_low": low, "ci_high": high})
        tip = f"{model}\n{lens}, read at layer {j}\n{interval} nats/{unit}"
        text = penalty_text(value) if side >= 24 else ""
        drawn.append(MatrixCell(i, j, edge + j * side, i * side + 4, *shade(value / top), text, tip))
    off = cells[cells["lens_layer"] != cells["stream_layer"]]
    worst = off.sort_values("penalty_ce").iloc[-1]
    return render(
        "heatmap.html", model=model, unit=unit, cells=drawn, size=size, side=side, edge=edge,
        step=max(1, math.ceil(size / 12)), top=number(top), median=number(float(off["penalty_ce"].median())),
        worst=number(float(worst["penalty_ce"])), worst_lens=int(worst["lens_layer"]),
        worst_layer=int(worst["stream_layer"]),
    )  # fmt: skip


# KL by layer
def shown_lenses() -> dict[str, str]:
    """The kinds of lens whose curves the page draws, with the dashes of their lines; the null last."""
    return {kind.name: kind.dash for kind in layer_kinds() if kind.on_page} | {NULL: "7 3"}


@dataclass(frozen=True)
class Dot:
    """A point of a curve, in pixels, and its tip."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Curve:
    """One lens as it is drawn: a line through dots."""

    name: str
    colour: str
    dash: str
    dots: list[Dot]

    @property
    def points(self) -> str:
        """The dots as SVG writes a line."""
        return " ".join(f"{dot.x},{dot.y}" for dot in self.dots)


@dataclass(frozen=True)
class LayerAxes:
    """Axes of layers and KL: the largest layer, powers of ten that KL spans, and pixels."""

    layers: int
    low: float
    high: float
    width: int = 330
    height: int = 210
    left: int = 44
    bottom: int = 30

    @classmethod
    def around(cls, frame: pd.DataFrame) -> "LayerAxes":
        """Axes that hold all of a frame's ``kl``, in half powers of ten."""
        low, high = (math.log10(float(f(frame["kl"]))) for f in (np.min, np.max))
        low = math.floor(low * 2) / 2
        return cls(max(1, int(frame["layer"].max())), low, max(math.ceil(high * 2) / 2, low + 0.5))

    def across(self, layer: float) -> float:
        """Pixels from the left."""
        return round(self.left + layer / self.layers * (self.width - self.left - 12), 1)

    def down(self, kl: float) -> float:
        """Pixels from the top."""
        share = (self.high - math.log10(kl)) / (self.high - self.low)
        return round(8 + share * (self.height - self.bottom - 16), 1)

    @property
    def ticks_x(self) -> list[Tick]:
        """At most eight layers."""
        layers = range(0, self.layers + 1, max(1, math.ceil((self.layers + 1) / 8)))
        return [Tick(self.across(layer), str(layer)) for layer in layers]

    @property
    def ticks_y(self) -> list[Tick]:
        """Whole powers of ten."""
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        return [Tick(self.down(10.0**power), f"{10.0**power:g}") for power in powers]


def kl_curves(frame: pd.DataFrame, model: str, unit: str) -> Markup:
    """KL to the model's output by layer, a line per lens, on a logarithmic axis.

    ``frame``: of one model, as of :func:`lensbench.report.figures.frames.lens_frame`.
    """
    dashes, colours = shown_lenses(), lens_colours()
    frame = frame[frame["lens"].isin(list(dashes))]
    axes = LayerAxes.around(frame)
    curves, alt = [], []
    for (lens, name), rows in frame.groupby(["lens", "name"], sort=False):
        rows = rows.sort_values("layer")
        dots = []
        for layer, kl, low, high in rows[["layer", "kl", "kl_ci_low", "kl_ci_high"]].to_numpy(float).tolist():
            interval = with_interval({"value": kl, "ci_low": low, "ci_high": high})
            tip = f"{model}\n{name}, layer {layer:.0f}\n{interval} nats/{unit}"
            dots.append(Dot(axes.across(layer), axes.down(kl), tip))
        # The logit lens is as dark as text, or as light on a dark page.
        colour = "var(--text)" if lens == "logit" else colours[str(lens)]
        curves.append(Curve(str(name), colour, dashes[str(lens)], dots))
        alt.append(f"{name} from {number(float(rows['kl'].iloc[0]))} to {number(float(rows['kl'].iloc[-1]))}")
    return render("kl_curves.html", model=model, unit=unit, axes=axes, curves=curves, alt="; ".join(alt))
