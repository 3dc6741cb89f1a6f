"""The layout of a figure: its panels, legend, colour bar, title and caption, and how they all find room on a narrow page."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from lensbench.report.figures.style import DPI, GREY, pt, sheet


def new_figure(width: float, height: float, paper: float | None = None) -> Figure:
    """An empty figure: ``width`` by ``height`` inches on a screen; on a page as wide as the page and ``paper`` inches high.

    On a page, a legend and a caption add to its height: see :func:`legend_outside` and :func:`title_and_caption`.
    """
    wide = sheet().width
    if wide is not None:
        width, height = wide, min(0.62 * wide, 3.0) if paper is None else paper
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panels_per_row(count: int, most: int | None = None) -> int:
    """How many of ``count`` panels stand side by side; on a page no row is much shorter than another."""
    most = most or sheet().most_per_row
    return math.ceil(count / math.ceil(count / most)) if sheet().on_paper else min(count, most)


def subplots(figure: Figure, count: int, columns: int, *, sharey: bool = False) -> list[Axes]:
    """``count`` panels in rows of ``columns``."""
    rows = max(1, math.ceil(count / columns))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for panel in panels[count:]:
        panel.remove()
    return list(panels[:count])


def panel_for_each(
    names: list[str], size: float, extra: float, *, sharey: bool, square: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each name, ``size`` inches wide and high, and ``extra`` inches to their right.

    On a page the panels fill its width, and are lower than wide unless ``square``.
    """
    columns = panels_per_row(len(names))
    rows = math.ceil(len(names) / columns)
    wide, high = max(columns * size + extra, 5), rows * size + 0.4
    page = sheet().width
    if page is not None:
        each = page / columns
        wide, high = page, rows * (min(each, 3.2) if square else min(0.8 * each, 1.9)) + 0.2
    figure = Figure(figsize=(wide, high), dpi=DPI, layout="constrained")
    return figure, subplots(figure, len(names), columns, sharey=sharey)


def make_higher(figure: Figure, points: float) -> None:
    """Add so many points to the height of a figure."""
    figure.set_figheight(figure.get_figheight() + points / 72)


def legend_of_panels(figure: Figure, panels: Iterable[Axes]) -> None:
    """Draw one legend of all that panels name, each name once (:func:`legend_outside`); none where they name nothing."""
    named = {label: line for on in panels for line, label in zip(*on.get_legend_handles_labels(), strict=True)}
    if named:
        legend_outside(figure, named.values(), named.keys())


def legend_outside(figure: Figure, handles: Any, labels: Any, **look: Any) -> None:
    """Draw the legend of a whole figure: to its right on a screen, above it on a page, which has no width to spare."""
    look = {"frameon": False, "fontsize": pt(8), **look}
    if not sheet().on_paper:
        figure.legend(handles, labels, loc="outside right center", **look)
        return
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    # A letter is 0.56 of its size wide; an entry has a handle and gaps next to its label.
    fitting = figure.get_figwidth() * 72 / (pt(8) * (0.56 * longest + look.get("handlelength", 2) + 2))
    columns = panels_per_row(len(labels), max(1, int(fitting))) if len(labels) else 1
    rows = math.ceil(len(labels) / columns)
    look = {"labelspacing": 0.3, "columnspacing": 1.2, "borderpad": 0.2, **look}
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, **look)
    make_higher(figure, pt(8) * (1.5 * rows + 1))


def colour_bar(figure: Figure, panels: list[Axes], label: str, **look: Any) -> None:
    """Draw one colour bar for all heatmaps: to their right on a screen, below them on a page."""
    look |= {"ax": panels, "aspect": 12 * len(panels), "pad": 0.02}
    if sheet().on_paper:
        look |= {"location": "bottom", "aspect": 40, "shrink": 0.8}
        make_higher(figure, 40)
    figure.colorbar(panels[0].collections[0], **look).set_label(label, size=pt(8))


def title_and_caption(figure: Figure, title: str, caption: str) -> None:
    """Write the title (on a screen) and the caption. On a page nothing but names of points may be drawn after this."""
    if not sheet().on_paper:  # a paper says what its figure shows in the text below it
        break_title(figure, figure.suptitle(title, x=0.01, ha="left", size=10.5, weight="bold"))
        fit_numbers(figure)
    # A letter of 7 points is a seventeenth of an inch wide.
    text = textwrap.fill(caption, int(17 * figure.get_figwidth() * 7 / pt(7)))
    figure.supxlabel(text, x=0.01, ha="left", size=pt(7), color=GREY)
    if sheet().on_paper:
        make_higher(figure, pt(7) * (1.3 * (text.count("\n") + 1) + 0.5))
        declutter(figure)


def break_title(figure: Figure, title: Text) -> None:
    """Break a title into lines no longer than the figure is wide."""
    text, room = title.get_text(), 0.98 * figure.get_figwidth() * figure.dpi
    lines = 1
    while title.get_window_extent().width > room and lines < 8:
        lines += 1
        width = math.ceil(1.1 * len(text) / lines)
        title.set_text(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))
    make_higher(figure, 10.5 * 1.2 * title.get_text().count("\n"))


SMALLEST_NUMBERS = 4.0
"""Points, of numbers in a heatmap"""


def fit_numbers(figure: Figure) -> None:
    """Make the numbers of each heatmap so small that they lie within their cells."""
    maps = [panel for panel in figure.axes if any(isinstance(c, QuadMesh) for c in panel.collections) and panel.texts]
    if not maps:
        return
    figure.draw_without_rendering()
    for panel in maps:
        cell = 0.94 * panel.bbox.width / abs(np.subtract(*panel.get_xlim()))
        widest = max(text.get_window_extent().width for text in panel.texts)
        for text in panel.texts if widest > cell else ():
            text.set_fontsize(max(text.get_fontsize() * cell / widest, SMALLEST_NUMBERS))


# Room on a narrow page
def declutter(figure: Figure) -> None:
    """Make everything in a narrow figure legible.

    A label that the panels of a row or column share is written once, long labels are broken into lines, and ticks and
    numbers that would touch each other are left out.
    """
    places = {panel: place for panel in figure.axes if (place := panel.get_subplotspec()) is not None}
    drop_repeated_labels(places)
    break_long_labels(figure, list(places))
    # All are measured before the first changes: panels share axes.
    for axis, ticks in [(axis, ticks_apart(axis)) for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
        if ticks is not None:
            axis.set_major_locator(ticks)
    drop_crowded_numbers(list(places))


def drop_repeated_labels(places: dict[Axes, SubplotSpec]) -> None:
    """Leave the label of an axis to the first panel of a row, and to the last of a column, where others say the same."""
    for panel, place in places.items():
        left = [p for p, at in places.items() if at.rowspan == place.rowspan and at.colspan.stop <= place.colspan.start]
        below = [
            p for p, at in places.items() if at.colspan == place.colspan and at.rowspan.start >= place.rowspan.stop
        ]
        if any(p.get_ylabel() == panel.get_ylabel() for p in left):
            panel.set_ylabel("")
        if any(p.get_xlabel() == panel.get_xlabel() for p in below):
            panel.set_xlabel("")


def break_long_labels(figure: Figure, panels: list[Axes]) -> None:
    """Break each label that is longer than its axis into lines."""
    labels = [(panel, axis.label, side) for panel in panels for side, axis in enumerate((panel.xaxis, panel.yaxis))]
    for _, label, _ in labels:
        label.set_in_layout(False)  # one that is too long would shrink the panels that it is measured by
    figure.draw_without_rendering()
    for panel, label, side in labels:
        label.set_in_layout(True)
        break_label(label, panel.bbox.size[side], side)
    figure.draw_without_rendering()


def break_label(label: Text, room: float, side: int) -> None:
    """Break a label into lines no longer than ``room`` pixels, along x (``side`` 0) or y (1); never within a formula."""
    whole = re.sub(r"\$[^$]*\$", lambda formula: formula[0].replace(" ", "\u00a0"), label.get_text())
    for lines in range(2, 5):
        if label.get_window_extent().size[side] <= room:
            return
        each = (textwrap.wrap(whole, width, break_long_words=False) for width in range(1, len(whole) + 1))
        label.set_text("\n".join(next(parts for parts in each if len(parts) <= lines)).replace("\u00a0", " "))


def ticks_apart(axis: Axis) -> Locator | None:
    """Fewer ticks for an axis whose labels would touch, else None; a logarithmic axis keeps the roundest numbers."""
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
    kept: list[float] = []
    for at in sorted(boxes, key=roundness):
        if not any(boxes[at].overlaps(boxes[other]) for other in kept):
            kept.append(at)
    return FixedLocator(sorted(kept))


def roundness(at: float) -> tuple[int, float]:
    """A key that sorts round numbers first: zero, then 1, 5 and 2 times a power of ten, the largest first."""
    if at == 0:
        return 0, 0.0
    first = round(abs(at) / 10 ** math.floor(math.log10(abs(at)) + 1e-9))
    return {1: 1, 5: 2, 2: 3}.get(first, 4), -abs(at)


def drop_crowded_numbers(panels: list[Axes]) -> None:
    """Take the numbers out of all heatmaps where one is wider than its cell.

    All or none: a heatmap with numbers next to one without would look like another kind.
    """
    maps = [panel for panel in panels if any(isinstance(c, QuadMesh) for c in panel.collections) and panel.texts]
    cells = {panel: panel.bbox.width / abs(np.subtract(*panel.get_xlim())) for panel in maps}
    if any(text.get_window_extent().width > cells[panel] for panel in maps for text in panel.texts):
        for text in [text for panel in maps for text in panel.texts]:
            text.remove()


def label_points(figure: Figure, panel: Axes, points: pd.DataFrame, taken: list[Any]) -> None:
    """Write the name of each point next to it, at the nearest place where it covers neither ``taken`` nor another name.

    Where there is no such place it covers a mark rather than a name. ``points``: a row per name; its first two columns are
    x and y.
    """
    figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in taken]
    boxes += [Bbox([centre - 15, centre + 15]) for centre in panel.transData.transform(points.iloc[:, :2])]
    fixed = list(boxes)
    names = [artist.get_window_extent() for artist in taken if isinstance(artist, Text)]
    far: list[Annotation] = []
    # Those at the edge first: they have the fewest places.
    centres = panel.transAxes.inverted().transform(panel.transData.transform(points.iloc[:, :2]))
    room = np.minimum(centres, 1 - centres).min(1)
    for name, x, y, *_ in points.iloc[np.argsort(room, kind="stable")].itertuples(name=None):
        text = panel.annotate(
            name, (x, y), (0, 0), textcoords="offset points", size=pt(8.5), weight="bold", va="center"
        )
        text.set_in_layout(False)  # a name must not move the panel that it was placed in
        if place_name(panel, text, boxes, names, [leader_of(panel, other) for other in far]) > 1:
            far.append(text)
        names.append(text.get_window_extent().padded(3))
        boxes.append(names[-1])
    uncross(panel, far, fixed)
    for text in far:
        line = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkB": 4}
        arrow = panel.annotate("", text.xy, text.get_position(), textcoords="offset points", arrowprops=line)
        arrow.set_in_layout(False)


def uncross(panel: Axes, names: list[Annotation], boxes: list[Bbox]) -> None:
    """Let two names change their places where their lines cross, unless they would cover more, or leave the panel."""
    points = panel.figure.dpi / 72
    kept: set[tuple[int, int]] = set()

    def covered(pair: tuple[int, int]) -> int:
        others = [name.get_window_extent() for k, name in enumerate(names) if k not in pair]
        there = [names[k].get_window_extent() for k in pair]
        outside = sum(not all(panel.bbox.contains(*corner) for corner in box.corners()) for box in there)
        return len(boxes) * outside + sum(box.count_overlaps([*boxes, *others]) for box in there)

    for _ in range(len(names) ** 2):
        leaders = [leader_of(panel, name) for name in names]
        pairs = itertools.combinations(range(len(names)), 2)
        pair = next((p for p in pairs if p not in kept and cross(leaders[p[0]], leaders[p[1]])), None)
        if pair is None:
            return
        before, places = covered(pair), [(names[k].get_position(), names[k].get_horizontalalignment()) for k in pair]
        for k, other, (_, side) in zip(pair, reversed(pair), reversed(places), strict=True):
            names[k].set(position=tuple((leaders[other][1] - leaders[k][0]) / points), ha=side)
        if covered(pair) > before:
            kept.add(pair)
            for k, (place, side) in zip(pair, places, strict=True):
                names[k].set(position=place, ha=side)


Leader = NDArray[np.floating]
"""The line from a point to its name: its two ends, ``[2, 2]``, pixels"""


def leader_of(panel: Axes, name: Annotation) -> Leader:
    """The line from the point of an annotation to its text."""
    point = panel.transData.transform(name.xy)
    return np.array([point, point + np.array(name.get_position()) * panel.figure.dpi / 72])


def cross(one: Leader, other: Leader) -> bool:
    """Whether two lines cross between their ends; lines from one point do not."""

    def side(line: Leader, point: NDArray[np.floating]) -> float:
        (x, y), (a, b) = line[1] - line[0], point - line[0]
        return float(x * b - y * a)

    return side(one, other[0]) * side(one, other[1]) < -1e-9 and side(other, one[0]) * side(other, one[1]) < -1e-9


def diagonals(box: Bbox) -> list[Leader]:
    """The diagonals of a box: a line that runs through it crosses one of them."""
    (left, low), (right, high) = box.get_points()
    return [np.array([[left, low], [right, high]]), np.array([[left, high], [right, low]])]


NEAR, FAR = (1, 2, 3.5, 5, 7, 9), (11, 13, 15, 18, 21)
"""How far from its point a name may lie, in steps; far away only where nothing near is free of other names"""

CROSSED = 2
"""Boxes that a name may rather cover than have a line that crosses another"""

STEP = np.array([9.0, 12.0])
"""A step along x and y, in points"""


def place_name(panel: Axes, text: Annotation, boxes: list[Bbox], names: list[Bbox], leaders: list[Leader]) -> float:
    """Move a name to the nearest place in the panel that covers none of ``boxes``, or the fewest; return how far it is.

    To cover one of the ``names`` is worse than to cover all other boxes. A line to it that crosses one of the ``leaders``,
    or runs through a name, is as bad as :data:`CROSSED` boxes.
    """
    sides = [*((right, up) for up, right in itertools.product((1, -1), (1, -1))), (1, 0), (-1, 0)]
    between = [(right, up) for up, right in itertools.product((0.5, -0.5, 1, -1), (1, -1, 0.4, -0.4))]
    best: tuple[float, float, Any] | None = None
    for reach, directions in ((NEAR, sides), (NEAR[1:], between), (FAR, [*sides, *between])):
        if best is not None and best[0] <= len(boxes):
            break  # it covers no name
        for far, (right, up) in itertools.product(reach, directions):
            at = STEP * (right, up) * far
            text.set(position=tuple(at), ha="left" if right > 0 else "right")
            box = text.get_window_extent()
            if not all(panel.bbox.contains(*corner) for corner in box.corners()):
                continue
            crossed = CROSSED * met(leader_of(panel, text), names, leaders) if far > 1 else 0
            covered = box.count_overlaps(boxes) + (len(boxes) + 1) * box.count_overlaps(names) + crossed
            if best is None or covered < best[0]:
                best = covered, far, {"position": tuple(at), "ha": text.get_horizontalalignment()}
            if not covered:
                break
        if best is not None and not best[0]:
            break
    if best is not None:
        text.set(**best[2])
    return 1 if best is None else best[1]


def met(leader: Leader, names: list[Bbox], leaders: list[Leader]) -> int:
    """How many lines a line crosses, and how many names it runs through."""
    through = sum(any(cross(leader, line) for line in diagonals(box)) for box in names)
    return through + sum(cross(leader, other) for other in leaders)
