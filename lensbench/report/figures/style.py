"""The look of every figure: sheets, letters, colours, and files that are the same to the byte."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import matplotlib.style
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from PIL import Image

DPI, LOWEST_DPI, HIGHEST_DPI = 150, 50, 1200

PALETTE, KEPT = 128, 32
"""Colours of a PNG, and how many of them are the most frequent ones of the figure, kept as they are: those of areas"""

ANNOTATED_LAYERS = 10  # the numbers of a larger heatmap could not be read

GREY = "#666666"

BLUE, ORANGE, GREEN, VERMILION, PURPLE = sns.color_palette("colorblind").as_hex()[:5]

MINUS = "\N{MINUS SIGN}"

MATPLOTLIB_STYLE = resources.files("lensbench.report").joinpath("lensbench.mplstyle")

FORMATS = {
    # Dates and versions of programs would make two files of the same figure differ.
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
"""File format -> the metadata that is left out of it."""


@dataclass(frozen=True)
class Sheet:
    """What figures are drawn on: a page with room for ``width`` inches, or a screen (None: each figure sets its width)."""

    width: float | None = None
    most_per_row: int = 3
    """At most so many panels stand side by side"""
    scale: float = 1.0
    """Factor on all sizes of letters"""

    @property
    def on_paper(self) -> bool:
        """Whether this is a page and not a screen."""
        return self.width is not None


SHEETS = {None: Sheet(), 1: Sheet(3.35, 2, 0.8), 2: Sheet(6.9, 3, 0.8)}
"""Columns of a paper -> its sheet."""

SMALLEST_LETTERS, LARGEST_LETTERS = 6.0, 8.0
"""Points, in a paper."""

_current: ContextVar[Sheet] = ContextVar("sheet", default=SHEETS[None])


def sheet() -> Sheet:
    """The sheet that figures are drawn on now."""
    return _current.get()


@contextmanager
def on_sheet(other: Sheet) -> Iterator[None]:
    """Within this context, figures are drawn on another sheet."""
    before = _current.set(other)
    try:
        yield
    finally:
        _current.reset(before)


@contextmanager
def style() -> Iterator[None]:
    """Within this context, figures have our look, whatever the user's matplotlibrc says; it changes no setting for good."""
    with matplotlib.style.context("default"), resources.as_file(MATPLOTLIB_STYLE) as file:
        own = matplotlib.rc_params_from_file(file, use_default_template=False)
        with sns.axes_style("whitegrid"), sns.plotting_context("paper", sheet().scale), matplotlib.rc_context(own):
            yield


def pt(size: float) -> float:
    """The size of letters on the current sheet, in points; ``size`` is that on a screen."""
    if not sheet().on_paper:
        return size
    return min(max(size * sheet().scale, SMALLEST_LETTERS), LARGEST_LETTERS)


def write_figure(figure: Figure, path: Path, *, kind: str = "png", dpi: int = DPI) -> None:
    """Write a figure as one of :data:`FORMATS`; the same figure gives the same bytes.

    The file holds its letters: PDF as TrueType fonts, SVG as outlines. PNG has a palette of :data:`PALETTE` colours, which
    nobody tells from all of them and which take a quarter of the bytes.
    """
    with style():
        if kind != "png":
            figure.savefig(path, format=kind, dpi=dpi, metadata=FORMATS[kind])
            return
        pixels = io.BytesIO()
        pixels_alone = {"compress_level": 1}  # they are written again
        figure.savefig(pixels, format=kind, dpi=dpi, metadata=FORMATS[kind], pil_kwargs=pixels_alone)
    image = Image.open(pixels)
    few = of_few_colours(image.convert("RGB"))
    few.save(path, "PNG", optimize=True, dpi=image.info["dpi"])


def of_few_colours(image: Image.Image) -> Image.Image:
    """The image in :data:`PALETTE` colours, each pixel in the nearest of them.

    :data:`KEPT` are its most frequent ones, so that two pale areas never get one colour; the others are spread over all that
    there are, so that a colour bar has none that is not in it.
    """
    counted = cast(list[tuple[int, tuple[int, ...]]], image.getcolors(image.width * image.height))
    colours = np.array([colour for _, colour in sorted(counted, key=lambda pair: (-pair[0], pair[1]))])
    spread = image.quantize(PALETTE - KEPT, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    palette = np.concatenate([colours[:KEPT], np.array(spread.getpalette()).reshape(-1, 3)])
    nearest = [np.square(colour - palette).sum(1).argmin() for colour in colours]
    code = np.array([1 << 16, 1 << 8, 1])
    of_colour = np.zeros(1 << 24, np.uint8)
    of_colour[colours @ code] = nearest
    few = Image.fromarray(of_colour[np.asarray(image).astype(int) @ code], "P")
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def use_symlog(panel: Axes, axis: str, linear: float) -> None:
    """Make an axis linear up to ``linear`` and logarithmic beyond.

    Call it after plotting: seaborn takes averages on the scale of the axis.
    """
    getattr(panel, f"set_{axis}scale")("symlog", linthresh=linear, linscale=0.5)
    ticks = [linear * x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)]
    getattr(panel, f"{axis}axis").set_major_locator(FixedLocator([*(-x for x in ticks), 0.0, *ticks]))
    getattr(panel, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}".replace("-", MINUS))
    panel.autoscale_view()


def cell_text(value: float, largest: float) -> str:
    """The number in a cell of a heatmap: at most three characters and a sign.

    Two decimals below 1, whole nats from 10. Where the ``largest`` cell of the heatmap is below 0.05, two decimals would
    show nothing: then one digit and its power of ten.
    """
    if largest < 0.05 and value != 0:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", MINUS)
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"
    return "0" if abs(value) < 0.005 else text.replace("0.", ".").replace("-", MINUS)


COLOURS = 10
"""Colours of lines, before they come again with other markers and dashes"""


def line_look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of a line; no two are alike up to two hundred."""
    colours = sns.color_palette("colorblind", COLOURS).as_hex()
    marks, dashes = "osX^vDP*<>", ("-", "--", ":", "-.")
    row = number // COLOURS
    return {
        "color": colours[number % COLOURS],
        "marker": marks[(number + 3 * row) % len(marks)],
        "ls": dashes[row % len(dashes)],
    }


def line_looks(count: int) -> list[dict[str, Any]]:
    """The looks of lines that are no models: the first ``count`` of :func:`line_look`."""
    return [line_look(number) for number in range(count)]
