"""The look of every figure: sheets, letters, colours, legends, and files that are the same to the byte."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator
from matplotlib.transforms import Bbox

DPI, LOWEST_DPI, HIGHEST_DPI = 150, 50, 1200


ANNOTATED_LAYERS = 10  # the numbers of a larger heatmap could not be read


GREY = "#666666"


BLUE, ORANGE, GREEN, VERMILION, PURPLE = sns.color_palette("colorblind").as_hex()[:5]


STYLE = resources.files("lensbench.report").joinpath("lensbench.mplstyle")


FORMATS = {
    # What tells when and by what a file was made would make two of the same figure differ.
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Sheet:
    """What figures are drawn for: ``width`` inches of a page, or (None) a screen, each figure as wide as it wants."""

    width: float | None = None
    abreast: int = 3
    """Panels side by side, at most"""
    scale: float = 1.0
    """Of all sizes of letters"""


SHEETS = {None: Sheet(), 1: Sheet(3.35, 2, 0.8), 2: Sheet(6.9, 3, 0.8)}
"""Columns of a paper -> its sheet."""


SMALLEST, LARGEST = 6.0, 8.0
"""Points of letters in a paper."""


_sheet: ContextVar[Sheet] = ContextVar("sheet", default=SHEETS[None])


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, whatever the user's matplotlibrc says; all settings are restored afterwards."""
    with matplotlib.style.context("default"), resources.as_file(STYLE) as file:
        own = matplotlib.rc_params_from_file(file, use_default_template=False)
        with sns.axes_style("whitegrid"), sns.plotting_context("paper", _sheet.get().scale), matplotlib.rc_context(own):
            yield


@contextmanager
def on(sheet: Sheet) -> Iterator[None]:
    """Figures are made for this sheet while it lasts."""
    before = _sheet.set(sheet)
    try:
        yield
    finally:
        _sheet.reset(before)


def pt(size: float) -> float:
    """A size of letters on the sheet, in points."""
    sheet = _sheet.get()
    return size if sheet.width is None else min(max(size * sheet.scale, SMALLEST), LARGEST)


def new_figure(width: float, height: float, paper: float | None = None) -> Figure:
    """A figure of so many inches on a screen; on a sheet as wide as that, and ``paper`` inches high.

    What is written above and below a figure on a sheet makes it higher: see :func:`beside` and :func:`write_around`.
    """
    wide = _sheet.get().width
    if wide is not None:
        width, height = wide, min(0.62 * wide, 3.0) if paper is None else paper
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def abreast(count: int, most: int | None = None) -> int:
    """How many of ``count`` panels stand side by side; on a sheet no row is much shorter than another."""
    sheet = _sheet.get()
    most = most or sheet.abreast
    return min(count, most) if sheet.width is None else math.ceil(count / math.ceil(count / most))


def beside(figure: Figure, handles: Any, labels: Any, **look: Any) -> None:
    """The legend of a whole figure: to its right on a screen, above it on a sheet, which has no width to spare."""
    look = {"frameon": False, "fontsize": pt(8), **look}
    if _sheet.get().width is None:
        figure.legend(handles, labels, loc="outside right center", **look)
        return
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    # A letter is 0.56 of its size wide; beside its label an entry has a handle and gaps.
    fits = figure.get_figwidth() * 72 / (pt(8) * (0.56 * longest + look.get("handlelength", 2) + 2))
    columns = abreast(len(labels), max(1, int(fits))) if len(labels) else 1
    rows = math.ceil(len(labels) / columns)
    look = {"labelspacing": 0.3, "columnspacing": 1.2, "borderpad": 0.2, **look}
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, **look)
    grow(figure, pt(8) * (1.5 * rows + 1))


def grow(figure: Figure, points: float) -> None:
    figure.set_figheight(figure.get_figheight() + points / 72)


def write_figure(figure: Figure, path: Path, *, kind: str = "png", dpi: int = DPI) -> None:
    """The same figure gives the same bytes; letters are in the file itself (PDF: TrueType, SVG: outlines)."""
    with style():
        figure.savefig(path, format=kind, dpi=dpi, metadata=FORMATS[kind])


def panels_of(
    models: list[str], size: float, extra: float, *, sharey: bool, square: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per model, each ``size`` inches wide and high, and ``extra`` inches beside them.

    On a sheet the panels fill its width, and are lower than wide unless ``square``.
    """
    columns = abreast(len(models))
    rows = math.ceil(len(models) / columns)
    wide, high = max(columns * size + extra, 5), rows * size + 0.4
    sheet = _sheet.get()
    if sheet.width is not None:
        each = sheet.width / columns
        wide, high = sheet.width, rows * (min(each, 3.2) if square else min(0.8 * each, 1.9)) + 0.2
    figure = Figure(figsize=(wide, high), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for panel in panels[len(models) :]:
        panel.remove()
    return figure, list(panels[: len(models)])


def write_around(figure: Figure, title: str, caption: str) -> None:
    """The title and the caption. The last that is done to a figure on a sheet but for the names in the plane."""
    if _sheet.get().width is None:  # in a paper what a figure shows is said below it
        figure.suptitle(title, x=0.01, ha="left", size=10.5, weight="bold")
    # Letters of 7 points are an inch's seventeenth wide.
    text = textwrap.fill(caption, int(17 * figure.get_figwidth() * 7 / pt(7)))
    figure.supxlabel(text, x=0.01, ha="left", size=pt(7), color=GREY)
    if _sheet.get().width is not None:
        grow(figure, pt(7) * (1.3 * (text.count("\n") + 1) + 0.5))
        fit(figure)


def fit(figure: Figure) -> None:
    """On a narrow sheet: what is said twice is said once, long labels are broken, what would touch is left out."""
    places = {panel: place for panel in figure.axes if (place := panel.get_subplotspec()) is not None}
    for panel, place in places.items():
        left = [p for p, at in places.items() if at.rowspan == place.rowspan and at.colspan.stop <= place.colspan.start]
        below = [
            p for p, at in places.items() if at.colspan == place.colspan and at.rowspan.start >= place.rowspan.stop
        ]
        if any(p.get_ylabel() == panel.get_ylabel() for p in left):
            panel.set_ylabel("")
        if any(p.get_xlabel() == panel.get_xlabel() for p in below):
            panel.set_xlabel("")
    labels = [(panel, axis.label, k) for panel in places for k, axis in enumerate((panel.xaxis, panel.yaxis))]
    for _, label, _ in labels:
        label.set_in_layout(False)  # one that is too long would shrink the panels that it is measured by
    figure.draw_without_rendering()
    for panel, label, side in labels:
        label.set_in_layout(True)
        break_label(label, panel.bbox.size[side], side)
    figure.draw_without_rendering()
    # All are measured before the first changes: panels share axes.
    for axis, ticks in [(axis, ticks_apart(axis)) for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
        if ticks is not None:
            axis.set_major_locator(ticks)
    maps = [panel for panel in places if any(isinstance(c, QuadMesh) for c in panel.collections) and panel.texts]
    cells = {panel: panel.bbox.width / abs(np.subtract(*panel.get_xlim())) for panel in maps}
    # All or none: a heatmap with numbers beside one without would look like another kind.
    if any(text.get_window_extent().width > cells[panel] for panel in maps for text in panel.texts):
        for text in [text for panel in maps for text in panel.texts]:
            text.remove()


def break_label(label: Text, room: float, side: int) -> None:
    """Into as many lines as leave none longer than ``room`` pixels, along x (``side`` 0) or y (1); never in a formula."""
    whole = re.sub(r"\$[^$]*\$", lambda formula: formula[0].replace(" ", "\u00a0"), label.get_text())
    for lines in range(2, 5):
        if label.get_window_extent().size[side] <= room:
            return
        each = (textwrap.wrap(whole, width, break_long_words=False) for width in range(1, len(whole) + 1))
        label.set_text("\n".join(next(parts for parts in each if len(parts) <= lines)).replace("\u00a0", " "))


def ticks_apart(axis: Axis) -> Locator | None:
    """Fewer ticks for an axis whose labels would touch, else None; on a logarithmic one the roundest numbers stay."""
    low, high = sorted(axis.get_view_interval())
    ticks = [(tick.get_loc(), tick.label1) for tick in axis.get_major_ticks()]
    boxes = {
        at: label.get_window_extent().padded(2)
        for at, label in ticks
        if low <= at <= high and label.get_visible() and label.get_text()
    }
    if not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2)):
        return None
    if axis.get_scale() == "linear":
        whole = all(float(at).is_integer() for at in boxes)
        of_text = not isinstance(axis.get_major_locator(), MaxNLocator)
        return None if of_text else MaxNLocator(nbins=max(2, len(boxes) // 2), integer=whole)

    def roundness(at: float) -> tuple[int, float]:
        if at == 0:
            return 0, 0.0
        first = round(abs(at) / 10 ** math.floor(math.log10(abs(at)) + 1e-9))
        return {1: 1, 5: 2, 2: 3}.get(first, 4), -abs(at)

    stay: list[float] = []
    for at in sorted(boxes, key=roundness):
        if not any(boxes[at].overlaps(boxes[other]) for other in stay):
            stay.append(at)
    return FixedLocator(sorted(stay))


def colour_bar(figure: Figure, panels: list[Axes], label: str, **look: Any) -> None:
    """Of all heatmaps: beside them on a screen, below them on a sheet."""
    look |= {"ax": panels, "aspect": 12 * len(panels), "pad": 0.02}
    if _sheet.get().width is not None:
        look |= {"location": "bottom", "aspect": 40, "shrink": 0.8}
        grow(figure, 40)
    figure.colorbar(panels[0].collections[0], **look).set_label(label, size=pt(8))


def use_symlog(panel: Axes, axis: str, linear: float) -> None:
    """Linear up to ``linear``, logarithmic beyond. After plotting: seaborn would average on the scale of the axis."""
    getattr(panel, f"set_{axis}scale")("symlog", linthresh=linear, linscale=0.5)
    ticks = [linear * x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)]
    getattr(panel, f"{axis}axis").set_major_locator(FixedLocator([*(-x for x in ticks), 0.0, *ticks]))
    getattr(panel, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    panel.autoscale_view()


def cell_text(value: float, largest: float) -> str:
    """Three characters and a sign: two decimals below 1, whole nats from 10.

    Where the ``largest`` of a heatmap's cells is below 0.05 two decimals would tell nothing, so one digit and its power.
    """
    if largest < 0.05 and value != 0:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"
    return "0" if abs(value) < 0.005 else text.replace("0.", ".").replace("-", "−")


def looks(count: int) -> list[dict[str, Any]]:
    """Colour, marker and dash of so many lines; no two are alike up to a hundred."""
    colours = sns.color_palette("colorblind").as_hex()
    marks, dashes = "osX^vDP*<>", ("-", "--", ":", "-.")
    return [
        {
            "color": colours[k % len(colours)],
            "marker": marks[k % len(marks)],
            "ls": dashes[k // len(colours) % len(dashes)],
        }
        for k in range(count)
    ]


def label_points(figure: Figure, panel: Axes, points: pd.DataFrame, taken: list[Any]) -> None:
    """Write each model's name beside its point, at the nearest place where it covers nothing that is there already."""
    figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in taken]
    boxes += [Bbox([centre - 15, centre + 15]) for centre in panel.transData.transform(points.iloc[:, :2])]
    for model, x, y, _ in points.itertuples(name=None):
        text = panel.annotate(
            model, (x, y), (0, 0), textcoords="offset points", size=pt(8.5), weight="bold", va="center"
        )
        for far, up, right in itertools.product((1, 2, 3.5, 5), (1, -1), (1, -1)):
            text.set(position=(9 * far * right, 12 * far * up), ha="left" if right > 0 else "right")
            box = text.get_window_extent()
            if all(panel.bbox.contains(*corner) for corner in box.corners()) and not box.count_overlaps(boxes):
                break
        if far > 1:
            line = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkB": 4}
            panel.annotate("", (x, y), text.get_position(), textcoords="offset points", arrowprops=line)
        boxes.append(box)
