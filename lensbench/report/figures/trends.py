"""Indices over training tokens and over parameters: each seed, and the mean over seeds with its interval."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lensbench.measures.indices import INDICES
from lensbench.report.claims import LEVEL
from lensbench.report.figures.findings import sure_trends
from lensbench.report.figures.layout import legend_outside, panel_for_each, title_and_caption
from lensbench.report.figures.palette import model_looks
from lensbench.report.figures.registry import figure, nats_per
from lensbench.report.figures.style import pt
from lensbench.report.series import HEADLINES, OVER, PARAMETERS, TOKENS, points_of, series_of, values_of
from lensbench.report.slopes import corrected_over, trend_table
from lensbench.results.folder import Run

MOST_TICKS = 4
"""Models are marked along x where they are so few"""

FEW_POWERS = 50
"""Where the largest model is less than so many times the smallest, powers of ten would mark one place or two"""

FIGURE_OVER = {TOKENS: "over_training", PARAMETERS: "over_parameters"}
"""What models differ in -> name of the figure"""


def tokens_frame(run: Run) -> pd.DataFrame:
    """The headline indices of every series over training tokens, as :func:`points_of` has them."""
    return headline_frame(run, TOKENS)


def parameters_frame(run: Run) -> pd.DataFrame:
    """The headline indices of every series over parameters."""
    return headline_frame(run, PARAMETERS)


def headline_frame(run: Run, over: str) -> pd.DataFrame:
    """The points of the headlines in their order, with their slopes; empty for a run without a series.

    Of one seed, the models' own intervals give those of slopes: a run's tables hold no draws over documents.
    """
    series = [one for one in series_of(run.tables["models.csv"]) if one.over == over]
    values = values_of(run) if series else pd.DataFrame({"index": []})
    values = values[values["index"].isin(HEADLINES)]
    there = list(dict.fromkeys(values["index"]))
    return points_with_slopes(points_of(values, series), trend_table(series, values, there, {}))


def points_with_slopes(points: pd.DataFrame, trends: pd.DataFrame) -> pd.DataFrame:
    """Points with the ``slope`` of their series and index, and its ``p_holm``: corrected over the indices of the points."""
    slopes = corrected_over(trends, list(points["index"].unique()))
    keys = ["over", "series", "index"]
    return points.merge(slopes[[*keys, "slope", "p_holm"]], on=keys, how="left")


@figure("over_training", needs=("models.csv", "indices.csv"), frame=tokens_frame)
def over_training(frame: pd.DataFrame) -> Figure:
    """A panel for each index over the tokens that models were trained on, a line for each series."""
    return trend_panels(frame, TOKENS, HEADLINES)


@figure("over_parameters", needs=("models.csv", "indices.csv"), frame=parameters_frame)
def over_parameters(frame: pd.DataFrame) -> Figure:
    """A panel for each index over the parameters of models, a line for each series."""
    return trend_panels(frame, PARAMETERS, HEADLINES)


def trend_panels(frame: pd.DataFrame, over: str, indices: Sequence[str]) -> Figure:
    """Panels of ``indices`` over one of :data:`OVER`, on a scale of doublings; ``frame``: of :func:`points_with_slopes`."""
    there = [name for name in indices if name in set(frame["index"])]
    drawing, panels = panel_for_each(there, 2.9, 1.2, sharey=False)
    names = list(dict.fromkeys(frame["series"]))
    for panel, index in zip(panels, there, strict=True):
        for name, look in model_looks(names).items():
            rows = frame[(frame["index"] == index) & (frame["series"] == name)]
            draw_series(panel, rows, name, look)
        doublings_axis(panel, frame["x"])
        panel.set(xlabel=OVER[over], ylabel=label_of(index, frame))
        panel.yaxis.label.set_fontsize(pt(8))
    legend_outside(drawing, *panels[0].get_legend_handles_labels())
    called = {index: plain_name(index, frame) for index in there}
    caption = (
        "Faint: each seed. Bars: 95 % intervals, Student's t over seeds; of one seed, over documents. The title counts "
        f"slopes per doubling whose p, corrected over these {len(there)} indices (Holm), is below {LEVEL:g}."
    )
    title_and_caption(drawing, sure_trends(frame, called, OVER[over]), caption)
    return drawing


def doublings_axis(panel: Axes, x: pd.Series) -> None:
    """Make x logarithmic, over all models of the figure in every panel; mark enough round numbers to read a size."""
    low, high = float(x.min()), float(x.max())
    panel.set_xscale("log")
    panel.set_xlim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    if x.nunique() <= MOST_TICKS:
        panel.set_xticks(sorted(x.unique()))
    elif high < FEW_POWERS * low:
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))


def draw_series(panel: Axes, rows: pd.DataFrame, name: str, look: dict[str, Any]) -> None:
    """A line through the means (or the one seed's values) with their intervals, and a faint line for each seed."""
    several = rows.groupby("model")["seed"].transform(lambda seeds: (seeds.astype(str) == "all").any())
    shown = rows[(rows["seed"].astype(str) == "all") | ~several].sort_values("x")
    for _, seed in rows[several & (rows["seed"].astype(str) != "all")].groupby("seed"):
        ordered = seed.sort_values("x")
        panel.plot(ordered["x"], ordered["value"], color=look["color"], lw=0.7, alpha=0.35)
    panel.plot(shown["x"], shown["value"], lw=1.4, ms=4, label=name, **look)
    panel.vlines(shown["x"], shown["ci_low"], shown["ci_high"], color=look["color"], lw=1.4)


def plain_name(index: str, frame: pd.DataFrame) -> str:
    """The name of a quantity in a sentence: without its unit, its probe and its layers."""
    text = label_of(index, frame).replace("\n", " ").partition(" (")[0]
    return text.rpartition(": ")[2].replace(", without layer 0", "").replace(" without layer 0", "")


def label_of(index: str, frame: pd.DataFrame) -> str:
    """What an axis calls a quantity."""
    if index in ("ce", "bits_per_byte"):
        return f"cross-entropy ({nats_per(frame)})" if index == "ce" else "bits per byte"
    if index in INDICES:
        return INDICES[index].label.replace(", ", ",\n")
    return index.replace(": ", ":\n").replace("_without_layer0", ",\nwithout layer 0").replace("_", " ")
