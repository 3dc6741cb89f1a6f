"""The drawings of a report as SVG: the matrix of a model, and its KL by layer.

Each computes where its marks lie and what they say when the pointer is over them; templates write the markup.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from markupsafe import Markup

from lensbench.lenses.kinds import layer_kinds
from lensbench.report.figures.frames import NULL
from lensbench.report.figures.lenses import lens_colours
from lensbench.report.figures.style import cell_text
from lensbench.report.figures.transfer import COSTS, CostScale
from lensbench.report.formatting import number, with_interval
from lensbench.report.render import render, shade


@dataclass(frozen=True)
class Tick:
    """A place along an axis, in pixels, and what is written there."""

    at: float
    label: str


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


def heatmap(cells: pd.DataFrame, model: str, scale: CostScale, unit: str) -> Markup:
    """The transfer matrix of one model: hover, or arrow keys, tell lens, layer, value and interval.

    ``cells``: as of :func:`lensbench.report.page.mean_cells`. ``scale``: that of all models.
    """
    size = int(cells["stream_layer"].max()) + 1
    side, edge = max(9, min(34, 300 // size)), 34
    columns = ["lens_layer", "stream_layer", "penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"]
    drawn, largest = [], float(cells["penalty_ce"].abs().max())
    for lens_layer, stream_layer, value, low, high in cells[columns].to_numpy(float).tolist():
        i, j = int(lens_layer), int(stream_layer)
        lens = f"lens of layer {i}" if i < size - 1 else "logit lens"
        interval = with_interval({"value": value, "ci_low": low, "ci_high": high})
        tip = f"{model}\n{lens}, read at layer {j}\n{interval} nats/{unit}"
        text = cell_text(value, largest) if side >= 24 else ""
        drawn.append(MatrixCell(i, j, edge + j * side, i * side + 4, *shade(value / scale.top, COSTS), text, tip))
    off = cells[cells["lens_layer"] != cells["stream_layer"]]
    worst = off.sort_values("penalty_ce").iloc[-1]
    return render(
        "heatmap.html", model=model, unit=unit, cells=drawn, size=size, side=side, edge=edge,
        step=max(1, math.ceil(size / 12)), median=number(float(off["penalty_ce"].median())),
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


def kl_curves(frame: pd.DataFrame, model: str, name: str, unit: str) -> Markup:
    """KL to the model's output by layer, a line per lens, on a logarithmic axis that all models of ``frame`` share.

    ``frame``: as of :func:`lensbench.report.figures.frames.lens_frame`. ``name``: of the model, on the page.
    """
    dashes, colours = shown_lenses(), lens_colours()
    frame = frame[frame["lens"].isin(list(dashes))]
    axes = replace(LayerAxes.around(frame), layers=max(1, int(frame.loc[frame["model"] == model, "layer"].max())))
    frame = frame[frame["model"] == model]
    curves, alt = [], []
    for (lens, label), rows in frame.groupby(["lens", "name"], sort=False):
        rows = rows.sort_values("layer")
        dots = []
        for layer, kl, low, high in rows[["layer", "kl", "kl_ci_low", "kl_ci_high"]].to_numpy(float).tolist():
            interval = with_interval({"value": kl, "ci_low": low, "ci_high": high})
            tip = f"{name}\n{label}, layer {layer:.0f}\n{interval} nats/{unit}"
            dots.append(Dot(axes.across(layer), axes.down(kl), tip))
        # The logit lens is as dark as text, or as light on a dark page.
        colour = "var(--text)" if lens == "logit" else colours[str(lens)]
        curves.append(Curve(str(label), colour, dashes[str(lens)], dots))
        alt.append(f"{label} from {number(float(rows['kl'].iloc[0]))} to {number(float(rows['kl'].iloc[-1]))}")
    return render("kl_curves.html", model=name, unit=unit, axes=axes, curves=curves, alt="; ".join(alt))
