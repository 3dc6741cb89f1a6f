"""Indices: gain visibility, its dependence on the ridge and on distance, and the plane of all models."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.measures.indices import tolerance_order
from lensbench.report.figures.frames import VISIBILITIES, distance_frame, index_frame, tolerance_frame
from lensbench.report.figures.layout import (
    label_points,
    legend_outside,
    make_higher,
    new_figure,
    panel_for_each,
    panels_per_row,
    title_and_caption,
)
from lensbench.report.figures.registry import figure
from lensbench.report.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, line_looks, pt, sheet, use_symlog


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
    title_and_caption(drawing, "Does a fixed lens see the later layers' gain, and does anything move?", caption)
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
    caption = "Share of K_0 - best, on dev; s.e.: of the paired difference. Bands: 95 % intervals, lenses held fixed."
    title_and_caption(drawing, "What a fixed lens sees depends on its ridge", caption)
    return drawing


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
    for k, (model, look) in enumerate(zip(models, line_looks(len(models)), strict=True)):
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
    title_and_caption(drawing, "How far ahead does a fixed lens see?", caption)
    return drawing


# The plane
PLACE = ["gain_visibility", "shared_consistency"]
"""The indices that give a model its place: x and y."""

SIZES = {0: "0", 2: "2", 4: "4 or more"}
"""Movement -> its label in the legend; marks grow with movement up to the last."""


@figure("plane", needs=("indices.csv",), frame=index_frame)
def plane(frame: pd.DataFrame) -> Figure:
    """The main figure: gain visibility (x) against consistency of the shared lens (y), sized by movement."""
    models = list(frame["model"].unique())
    table = frame.pivot(index="model", columns="index", values=["value", "ci_low", "ci_high"])
    values = pd.DataFrame(table["value"]).loc[models, [*PLACE, "movement"]]
    gaps = [f"{name} of {', '.join(values.index[of])}" for name, of in values.isna().items() if of.any()]
    points = values.dropna(subset=PLACE).fillna(0.0)
    page = sheet().width
    drawing = new_figure(7.6, 5.2, page and min(0.85 * page, 4.2))
    panel = drawing.subplots()
    bars = draw_models(panel, frame.drop_duplicates("model").set_index("model"), table, points)
    legend_of_plane(drawing, panel, frame)
    panel.axvline(0, color=GREY, lw=0.8, zorder=1)
    panel.axhline(1, color=GREY, lw=0.8, zorder=1, ls=":")
    panel.update_datalim([(-1, 0), (1, 1)])
    panel.margins(0.1)
    use_symlog(panel, "x", 1.0)
    panel.set(xlabel="gain visibility (linear within ±1)", ylabel="consistency of the shared lens")
    caption = "Bars: 95 % intervals. Open circles: gain visibility without layer 0."
    if gaps:
        caption += f" Undefined: {'; '.join(gaps).replace('_', ' ')}."
    title_and_caption(drawing, "Is one prediction refined in one representation?", caption)
    label_points(drawing, panel, points, [*name_corners(panel), *bars])
    return drawing


def draw_models(panel: Axes, facts: pd.DataFrame, table: pd.DataFrame, points: pd.DataFrame) -> list[Artist]:
    """Draw each model of ``points`` as a mark, with error bars and its place without layer 0; return the bars.

    ``facts``: ``known`` and ``images`` by model. ``table``: indices by model, under ``value``, ``ci_low`` and ``ci_high``.
    """
    colours = dict(zip(facts.index, (look["color"] for look in line_looks(len(facts))), strict=True))
    of_images = facts["images"] & (not facts["images"].all())
    bars: list[Artist] = []
    for model, x, y, moved in points.itertuples(name=None):
        colour = colours[model]
        # Landmarks, whose answer is known by their construction, are outlined diamonds.
        mark: dict[str, Any] = {"linewidths": 0, "marker": "s" if of_images[model] else "o"}
        if facts.loc[model, "known"]:
            mark = {"marker": "D", "linewidths": 1.4, "edgecolors": "#222222"}
        panel.scatter(x, y, s=mark_area(moved), color=colour, alpha=0.45, **mark)
        low, high = (table[end].loc[model, PLACE] for end in ("ci_low", "ci_high"))
        ends = [low.iloc[0], high.iloc[0]], [y, y], [x, x], [low.iloc[1], high.iloc[1]]
        bars += panel.plot(*ends, color=colour, lw=1.3)
        # How much of a model's place is the step out of its embedding.
        later = table["value"].loc[model, "gain_visibility_without_layer0"]
        if pd.notna(later):
            bars += panel.plot([x, later], [y, y], color=colour, lw=0.7, ls=":")
            bars += panel.plot(later, y, "o", color=colour, mfc="white", ms=4.5)
    return bars


def mark_area(moved: float) -> float:
    """The area of a model's mark in the plane, in square points: from 30 to 480 on a screen, half as much on a page."""
    largest = max(SIZES)
    return (0.5 if sheet().on_paper else 1.0) * (30 + 450 * min(max(moved, 0.0), largest) / largest)


def legend_of_plane(drawing: Figure, panel: Axes, frame: pd.DataFrame) -> None:
    """Draw the legend: sizes of marks, and their shapes where there are several."""
    for value, label in SIZES.items():
        panel.scatter([], [], s=mark_area(value), color=GREY, alpha=0.4, lw=0, label=label)
    area = 35.0 if sheet().on_paper else 70.0
    if frame["images"].any() and not frame["images"].all():
        panel.scatter([], [], s=area, marker="s", color=GREY, alpha=0.4, lw=0, label="sees images")
    if frame["known"].any():
        panel.scatter([], [], s=area, marker="D", color="white", edgecolors="#222222", label="known by\nconstruction")
    if not sheet().on_paper:
        panel.legend(title="movement", loc="upper left", bbox_to_anchor=(1.01, 1), labelspacing=1.2, frameon=False)
        return
    handles, labels = panel.get_legend_handles_labels()
    labels = [f"movement {label}" if label in SIZES.values() else label.replace("\n", " ") for label in labels]
    legend_outside(drawing, handles, labels, handleheight=1.8, borderpad=0.6)
    make_higher(drawing, pt(8) * len(labels) / 2)


def name_corners(panel: Axes) -> list[Artist]:
    """Write what each corner of the plane stands for; return the texts."""
    faint: dict[str, Any] = {"color": GREY, "style": "italic", "size": pt(8.5)}
    return [
        panel.text(0.98, 0.98, "refinement", ha="right", va="top", transform=panel.transAxes, **faint),
        panel.text(0.02, 0.02, "re-representation", transform=panel.transAxes, **faint),
        panel.text(-0.02, 0, "carry-along", rotation=90, ha="right", **faint),
    ]
