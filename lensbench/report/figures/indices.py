"""Indices: gain visibility, its dependence on the ridge and on distance, and the plane of all models."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.measures.indices import tolerance_order
from lensbench.report.figures.frames import VISIBILITIES
from lensbench.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    _sheet,
    abreast,
    beside,
    grow,
    label_points,
    looks,
    new_figure,
    panels_of,
    pt,
    use_symlog,
    write_around,
)

MOVEMENTS = {0: "0", 2: "2", 4: "4 or more"}  # legend of the sizes in the plane, which grow up to the last


def gain_visibility(frame: pd.DataFrame) -> Figure:
    """Per model how much of the later layers' gain a fixed lens sees, and beside it how much moves under that lens."""
    models = list(frame["model"].unique())
    stacked = abreast(2, 3 * _sheet.get().abreast // 4) == 1
    figure = new_figure(8.2, 0.55 * len(models) + 1.7, (0.32 * len(models) + 0.6) * (1 + stacked))
    left, right = figure.subplots(2, 1) if stacked else figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kinds = dict(zip(VISIBILITIES, (BLUE, ORANGE, GREEN), strict=True))
    for panel, name, colours in ((left, "gain visibility", kinds), (right, "movement", {"movement": PURPLE})):
        for k, (index, colour) in enumerate(colours.items()):
            rows = frame[frame["index"] == index]
            y = np.arange(len(models)) + 0.25 * (k - (len(colours) - 1) / 2)
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
        panel.set_xlabel(f"{name} (share of the own gain)")
    for panel in (left, right) if stacked else (left,):
        panel.set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5), ylabel="")
    if left.get_legend_handles_labels()[0] and _sheet.get().width is not None:
        beside(figure, *left.get_legend_handles_labels(), handletextpad=0)
    elif left.get_legend_handles_labels()[0]:
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handletextpad=0, columnspacing=1)
    caption = "Thick: 95 % interval with the lenses held fixed; thin: range over refits. Linear within ±1, log beyond."
    write_around(figure, "Does a fixed lens see the later layers' gain, and does anything move?", caption)
    return figure


def tolerances(frame: pd.DataFrame) -> Figure:
    """Gain visibility over the dev loss that a lens's ridge may cost on its own layer, with and without layer 0."""
    models = list(frame["model"].unique())
    labels = sorted(frame["tolerance"].unique(), key=tolerance_order)
    names = {t: "1 s.e." if t == ONE_STANDARD_ERROR else f"{float(t):.0%}" if t[0].isdigit() else t for t in labels}
    figure, panels = panels_of(models or [""], 2.7, 0.0, sharey=True)
    look = {"gain_visibility": (BLUE, "o", "-"), "gain_visibility_without_layer0": (GREEN, "X", "--")}
    for panel, model in zip(panels, models, strict=False):
        for index, (colour, marker, dash) in look.items():
            rows = frame[(frame["model"] == model) & (frame["index"] == index)].set_index("tolerance")
            rows = rows.reindex([t for t in labels if t in rows.index])
            x = [labels.index(t) for t in rows.index]
            panel.plot(x, rows["value"], dash, marker=marker, color=colour, ms=4, lw=1.4, label=VISIBILITIES[index])
            panel.fill_between(x, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.18, lw=0)
        panel.axhline(0, color=GREY, lw=0.9, zorder=1)
        panel.axhline(1, color=GREY, lw=0.9, zorder=1, ls=":")
        panel.set(title=model, xlabel="allowed loss on the own layer", ylabel="gain visibility")
        panel.set_xticks(range(len(labels)), [names[t] for t in labels])
        panel.margins(x=0.1)
        use_symlog(panel, "y", 1.0)
    if models and _sheet.get().width is not None:
        beside(figure, *panels[0].get_legend_handles_labels())
    elif models:
        # In a panel: above the panels of a single model it would lie on the title.
        panels[0].legend(loc="best", fontsize=pt(7), handlelength=1.6)
    caption = "Share of K_0 - best, on dev; s.e.: of the paired difference. Bands: 95 % intervals, lenses held fixed."
    write_around(figure, "What a fixed lens sees depends on its ridge", caption)
    return figure


def visibility_by_distance(frame: pd.DataFrame) -> Figure:
    """Gain visibility over pairs of layers that lie so many layers apart, one line per model."""
    models = list(frame["model"].unique())
    figure = new_figure(7.2, 4.0)
    panel = figure.subplots()
    for k, (model, look) in enumerate(zip(models, looks(len(models)), strict=True)):
        rows = frame[frame["model"] == model]
        x = rows["distance"] + 0.3 * ((k + 0.5) / len(models) - 0.5)
        panel.plot(x, rows["value"], lw=1.3, ms=4, label=model, **look)
        panel.vlines(x, rows["ci_low"], rows["ci_high"], color=look["color"], lw=1.6)
    panel.axhline(0, color=GREY, lw=0.9, zorder=1)
    panel.axhline(1, color=GREY, lw=0.9, zorder=1, ls=":")
    use_symlog(panel, "y", 1.0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    panel.set(xlabel="distance $j - i$ (layers)", ylabel="gain visibility (linear within ±1)")
    if models:
        if _sheet.get().width is None:
            panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
        else:
            beside(figure, *panel.get_legend_handles_labels())
    caption = "All pairs i < j of layers below L at this distance; bars: 95 % intervals."
    write_around(figure, "How far ahead does a fixed lens see?", caption)
    return figure


def plane(frame: pd.DataFrame) -> Figure:
    """The main figure: gain visibility (x) against consistency of the shared lens (y), sized by movement."""
    models = list(frame["model"].unique())
    colours = {m: look["color"] for m, look in zip(models, looks(len(models)), strict=True)}
    known = (
        frame.drop_duplicates("model").set_index("model")["known"] if "known" in frame else pd.Series("", index=models)
    )
    names = ["gain_visibility", "shared_consistency", "movement"]
    table = frame.pivot(index="model", columns="index", values=["value", "ci_low", "ci_high"])
    sees = frame.drop_duplicates("model").set_index("model").get("images", pd.Series(False, index=models))
    points = table["value"].loc[models, names]
    gaps = [f"{name} of {', '.join(points.index[points[name].isna()])}" for name in names if points[name].isna().any()]
    points = points[points[names[0]].notna() & points[names[1]].notna()].fillna(0.0)
    paper = _sheet.get().width
    figure = new_figure(7.6, 5.2, paper and min(0.85 * paper, 4.2))
    area = 1.0 if paper is None else 0.5
    panel = figure.subplots()
    most = max(MOVEMENTS)
    bars = []
    for model, x, y, moved in points.itertuples(name=None):
        # Landmarks, whose answer is known by their construction, are outlined diamonds.
        landmark: dict[str, Any] = {"linewidths": 0, "marker": "s" if sees[model] and not sees.all() else "o"}
        if known[model]:
            landmark = {"marker": "D", "linewidths": 1.4, "edgecolors": "#222222"}
        size = area * (30 + 450 * min(max(moved, 0.0), most) / most)
        panel.scatter(x, y, s=size, color=colours[model], alpha=0.45, **landmark)
        low, high = table["ci_low"].loc[model], table["ci_high"].loc[model]
        ends = [low[names[0]], high[names[0]]], [y, y], [x, x], [low[names[1]], high[names[1]]]
        bars += panel.plot(*ends, color=colours[model], lw=1.3)
        # How much of a model's place is the step out of its embedding.
        later = table["value"].loc[model, "gain_visibility_without_layer0"]
        if pd.notna(later):
            bars += panel.plot([x, later], [y, y], color=colours[model], lw=0.7, ls=":")
            bars += panel.plot(later, y, "o", color=colours[model], mfc="white", ms=4.5)
    for value, label in MOVEMENTS.items():
        panel.scatter([], [], s=area * (30 + 450 * value / most), color=GREY, alpha=0.4, lw=0, label=label)
    if sees.any() and not sees.all():
        panel.scatter([], [], s=70 * area, marker="s", color=GREY, alpha=0.4, lw=0, label="sees images")
    if known.any():
        panel.scatter(
            [], [], s=70 * area, marker="D", color="white", edgecolors="#222222", label="known by\nconstruction"
        )
    if _sheet.get().width is None:
        panel.legend(title="movement", loc="upper left", bbox_to_anchor=(1.01, 1), labelspacing=1.2, frameon=False)
    else:
        handles, labels = panel.get_legend_handles_labels()
        labels = [f"movement {label}" if label in MOVEMENTS.values() else label.replace("\n", " ") for label in labels]
        beside(figure, handles, labels, handleheight=1.8, borderpad=0.6)
        grow(figure, pt(8) * len(labels) / 2)
    panel.axvline(0, color=GREY, lw=0.8, zorder=1)
    panel.axhline(1, color=GREY, lw=0.8, zorder=1, ls=":")
    panel.update_datalim([(-1, 0), (1, 1)])
    panel.margins(0.1)
    use_symlog(panel, "x", 1.0)
    panel.set(xlabel="gain visibility (linear within ±1)", ylabel="consistency of the shared lens")
    caption = (
        "Bars: 95 % intervals. Open circles: gain visibility without layer 0."
        + f" Undefined: {'; '.join(gaps).replace('_', ' ')}." * bool(gaps)
    )
    write_around(figure, "Is one prediction refined in one representation?", caption)
    faint: dict[str, Any] = {"color": GREY, "style": "italic", "size": pt(8.5)}
    corners = [
        panel.text(0.98, 0.98, "refinement", ha="right", va="top", transform=panel.transAxes, **faint),
        panel.text(0.02, 0.02, "re-representation", transform=panel.transAxes, **faint),
        panel.text(-0.02, 0, "carry-along", rotation=90, ha="right", **faint),
    ]
    label_points(figure, panel, points, [*corners, *bars])
    return figure
