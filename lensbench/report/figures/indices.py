"""Indices: gain visibility, and its dependence on the ridge and on distance."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.measures.indices import tolerance_order
from lensbench.report.figures.findings import seen_at_distances
from lensbench.report.figures.frames import VISIBILITIES, distance_frame, index_frame, tolerance_frame
from lensbench.report.figures.layout import (
    legend_outside,
    new_figure,
    panel_for_each,
    panels_per_row,
    title_and_caption,
)
from lensbench.report.figures.registry import figure, looks_of
from lensbench.report.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, pt, sheet, use_symlog

WITHOUT_FIRST = "gain_visibility_without_layer0"


@figure("gain_visibility", needs=("indices.csv",), frame=index_frame)
def gain_visibility(frame: pd.DataFrame) -> Figure:
    """Per model how much of the later layers' gain a fixed lens sees, and next to it how much moves under that lens."""
    models = list(frame["model"].unique())
    stacked = panels_per_row(2, 3 * sheet().most_per_row // 4) == 1
    drawing = new_figure(8.2, 0.55 * len(models) + 1.7, (0.32 * len(models) + 0.6) * (1 + stacked))
    left, right = drawing.subplots(2, 1) if stacked else drawing.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    draw_intervals(left, frame, dict(zip(VISIBILITIES, (BLUE, ORANGE, GREEN), strict=True)))
    left.set_xlabel("gain visibility (share of the own gain)")
    draw_intervals(right, frame, {"movement": PURPLE})
    right.set_xlabel("movement (share of the own gain)")
    for panel in (left, right) if stacked else (left,):
        panel.set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5), ylabel="")
    if left.get_legend_handles_labels()[0] and sheet().on_paper:
        legend_outside(drawing, *left.get_legend_handles_labels(), handletextpad=0)
    elif left.get_legend_handles_labels()[0]:
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handletextpad=0, columnspacing=1)
    caption = "Thick: 95 % interval with the lenses held fixed; thin: range over refits. Linear within ±1, log beyond."
    seen = frame.loc[(frame["index"] == WITHOUT_FIRST) & frame["value"].notna()]
    title = "Does a fixed lens see the later layers' gain, and does anything move?"
    if len(seen):
        clear = int((seen["ci_low"] > 0).sum())
        if len(seen) > 1:
            title = f"From layer 1 on, a fixed lens surely sees later layers' gain in {clear} of {len(seen)} models"
        else:
            sees = "surely sees" if clear else "does not surely see"
            title = f"From layer 1 on, a fixed lens {sees} the later layers' gain"
    title_and_caption(drawing, title, caption)
    return drawing


def draw_intervals(panel: Axes, frame: pd.DataFrame, colours: dict[str, str]) -> None:
    """Draw indices (name -> colour) in a row per model: the value, its interval (thick) and its range over refits."""
    for k, (index, colour) in enumerate(colours.items()):
        rows = frame[frame["index"] == index]
        y = np.arange(len(rows)) + 0.25 * (k - (len(colours) - 1) / 2)
        panel.hlines(y, rows["ci_low"], rows["ci_high"], color=colour, lw=2.6)
        panel.hlines(y, rows["fit_low"], rows["fit_high"], color=colour, lw=0.9)
        look: dict[str, Any] = {"color": colour, "marker": "osX"[k], "label": VISIBILITIES.get(index)}
        sns.scatterplot(x=rows["value"], y=y, s=30, linewidth=0, zorder=3, legend=False, ax=panel, **look)
        for at in y[rows["value"].isna()]:
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "size": pt(7)}
            panel.annotate("undefined", (0.015, at), color=colour, bbox={"fc": "w", "lw": 0, "pad": 0.5}, **place)
    panel.axvline(0, color=GREY, lw=0.9, zorder=1)
    panel.axvline(1, color=GREY, lw=0.9, zorder=1, ls=":")
    panel.grid(False, axis="y")
    use_symlog(panel, "x", 1.0)


@figure("tolerances", needs=("tolerances.csv",), frame=tolerance_frame)
def tolerances(frame: pd.DataFrame) -> Figure:
    """Gain visibility over the dev loss that a lens's ridge may cost on its own layer, with and without layer 0."""
    models = list(frame["model"].unique())
    labels = sorted(frame["tolerance"].unique(), key=tolerance_order)
    names = {t: "1 s.e." if t == ONE_STANDARD_ERROR else f"{float(t):.0%}" if t[0].isdigit() else t for t in labels}
    drawing, panels = panel_for_each(models, 2.7, 0.0, sharey=True)
    look = {"gain_visibility": (BLUE, "o", "-"), "gain_visibility_without_layer0": (GREEN, "X", "--")}
    for panel, model in zip(panels, models, strict=True):
        for index, (colour, marker, dash) in look.items():
            rows = frame[(frame["model"] == model) & (frame["index"] == index)].set_index("tolerance")
            rows = rows.reindex([t for t in labels if t in rows.index])
            x = [labels.index(t) for t in rows.index]
            panel.plot(x, rows["value"], dash, marker=marker, color=colour, ms=4, lw=1.4, label=VISIBILITIES[index])
            panel.fill_between(x, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.18, lw=0)
        visibility_axis(panel)
        panel.set(title=model, xlabel="allowed loss on the own layer", ylabel="gain visibility")
        panel.set_xticks(range(len(labels)), [names[t] for t in labels])
        panel.margins(x=0.1)
        use_symlog(panel, "y", 1.0)
    if sheet().on_paper:
        legend_outside(drawing, *panels[0].get_legend_handles_labels())
    else:
        # In a panel: above the panels of a single model it would lie on the title.
        panels[0].legend(loc="best", fontsize=pt(7), handlelength=1.6)
    caption = (
        "Allowed loss: on dev, as a share of what the best ridge gains over a constant read-out; 1 s.e.: one standard error "
        "of the difference from the best. Bands: 95 % intervals, lenses held fixed."
    )
    title_and_caption(drawing, change_in_words(frame), caption)
    return drawing


def change_in_words(frame: pd.DataFrame) -> str:
    """How much gain visibility from layer 1 on changes over the losses that a ridge may cost, the title of the figure."""
    rows = frame[(frame["index"] == "gain_visibility_without_layer0") & frame["value"].notna()]
    changes = rows.groupby("model")["value"].agg(lambda values: values.max() - values.min())
    if changes.empty:
        return "What a fixed lens sees depends on its ridge"
    least, most = f"{changes.min():.2g}", f"{changes.max():.2g}"
    by = least if least == most else f"{least} to {most}"
    return f"From layer 1 on, gain visibility changes by {by} with the loss that a ridge may cost"


def visibility_axis(panel: Axes) -> None:
    """Mark no gain (0) and all of the gain (1) along y."""
    panel.axhline(0, color=GREY, lw=0.9, zorder=1)
    panel.axhline(1, color=GREY, lw=0.9, zorder=1, ls=":")


@figure("visibility_by_distance", needs=("indices.csv",), frame=distance_frame)
def visibility_by_distance(frame: pd.DataFrame) -> Figure:
    """Gain visibility over pairs of layers that lie so many layers apart, one line per model."""
    models = list(frame["model"].unique())
    drawing = new_figure(7.2, 4.0)
    panel = drawing.subplots()
    for k, (model, look) in enumerate(looks_of(frame).items()):
        rows = frame[frame["model"] == model]
        x = rows["distance"] + 0.3 * ((k + 0.5) / len(models) - 0.5)
        panel.plot(x, rows["value"], lw=1.3, ms=4, label=model, **look)
        panel.vlines(x, rows["ci_low"], rows["ci_high"], color=look["color"], lw=1.6)
    visibility_axis(panel)
    use_symlog(panel, "y", 1.0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    panel.set(xlabel="distance $j - i$ (layers)", ylabel="gain visibility (linear within ±1)")
    if sheet().on_paper:
        legend_outside(drawing, *panel.get_legend_handles_labels())
    else:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    caption = "All pairs i < j of layers below L at this distance; bars: 95 % intervals."
    title_and_caption(drawing, seen_at_distances(frame), caption)
    return drawing
