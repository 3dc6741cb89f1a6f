"""What probes measured by layer and by head."""

import math
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.frames import head_frame, probe_frame
from lensbench.report.figures.layout import legend_outside, new_figure, panels_per_row, subplots, title_and_caption
from lensbench.report.figures.registry import figure, nats_per
from lensbench.report.figures.style import GREY, line_looks, pt, sheet, use_symlog

PROBE_PANELS = (
    ("gradient_alignment", "block (from 0)", "cosine with $-$gradient"),
    ("ce_rise_deleted", "block deleted (from 0)", "rise of CE (nats/token)"),
    ("ce_rise_swapped", "blocks swapped: first of two", "rise of CE (nats/token)"),
    ("ce_rise_skipped", "blocks skipped together", "rise of CE (nats/token)"),
    ("read_out_ce", "layer read out by the model's own head", "CE (nats/token)"),
    ("true_error_rms", "layer", "rms of the error at its place"),
    ("error_cosine", "block (from 0)", "cosine of carried and true error"),
    ("covariance_similarity", "distance of layers", "covariance similarity"),
    ("carried_share", "distance of layers, $i < j$", "share of $h_i$ in $h_j$ ($R^2$)"),
    ("prediction_gain", "layer", "gain of $R^2$: last prediction"),
    ("surprise_gain", "layer", "gain of $R^2$: surprise"),
    ("fidelity", "layer moved", "cosine of read and real change"),
    ("response_slope", "layer moved", "real by read change"),
)
"""Quantity -> what it is over, what it is called."""


OF_THE_MODEL = ("read_out_ce", "true_error_rms", "error_cosine")
"""Quantities that two views of a model have in common."""


@figure("probes", needs=("probes.csv",), frame=probe_frame)
def probes(frame: pd.DataFrame) -> Figure:
    """What probes measured, one panel per quantity and one line per model; means over equal distances."""
    models = list(frame["model"].unique())
    shown = [panel for panel in PROBE_PANELS if (frame["quantity"] == panel[0]).any()]
    columns = panels_per_row(max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    drawing = new_figure(3.0 * columns + 1.6, 2.4 * rows + 0.8, (1.3 if sheet().most_per_row < 3 else 1.6) * rows)
    panels = subplots(drawing, len(shown), columns)
    of_model = dict(zip(models, line_looks(len(models)), strict=True))
    for panel, (quantity, over, name) in zip(panels, shown, strict=True):
        drawn: set[tuple[float, ...]] = set()
        for model, look in of_model.items():
            rows_of = frame[(frame["quantity"] == quantity) & (frame["model"] == model)]
            if quantity == "gradient_alignment":
                rows_of = rows_of[rows_of["layer"].notna()]  # the mean over blocks has none
                null = frame[(frame["quantity"] == "gradient_alignment_null") & (frame["model"] == model)]
                panel.plot(null["layer"], null["value"], color=look["color"], lw=0.6, alpha=0.6)
            if quantity == "fidelity":
                null = frame[(frame["quantity"] == "fidelity_null") & (frame["model"] == model)]
                panel.plot(null["layer"], null["value"], color=look["color"], lw=0.6, alpha=0.6)
            if not len(rows_of):
                continue
            at = rows_of["other"] if quantity == "ce_rise_skipped" else rows_of["layer"]
            if over.startswith("distance"):
                at = (rows_of["layer"] - rows_of["other"]).abs()
            line = rows_of.assign(at=at.astype(float)).groupby("at")[["value", "ci_low", "ci_high"]].mean()
            if quantity in OF_THE_MODEL and tuple(line["value"]) in drawn:
                continue  # another view of a model that is there
            drawn.add(tuple(line["value"]))
            panel.plot(line.index, line["value"], lw=1.2, ms=3.5, label=model, **look)
            if not over.startswith("distance"):
                panel.vlines(line.index, line["ci_low"], line["ci_high"], color=look["color"], lw=1.4)
        if quantity != "read_out_ce":
            panel.axhline(0, color=GREY, lw=0.8, zorder=1)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        panel.set(xlabel=over, ylabel=name.replace("nats/token", nats_per(frame)))
        if name.startswith("rise"):
            use_symlog(panel, "y", 0.02)
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if named:
        legend_outside(drawing, named.values(), named.keys())
    one = nats_per(frame).removeprefix("nats/")
    caption = f"Bars: 95 % intervals. Thin lines, the null: another {one}'s gradient, another direction's response."
    titles = {"gradient_alignment": "gradients", "ce_rise_deleted": "blocks", "read_out_ce": "predictions and errors"}
    titles |= {
        "carried_share": "what is carried along",
        "prediction_gain": "what stays visible",
        "fidelity": "what is used",
    }
    told = [title for quantity, title in titles.items() if quantity in {panel[0] for panel in shown}]
    title_and_caption(drawing, "Beside the lenses" + (": " + ", ".join(told) if told else ""), caption)
    return drawing


TOP_HEADS = 3
"""Heads that are named in a heatmap."""


SMALLEST_SCORE = 1e-4
"""That a colour scale reaches at least."""


@figure("error_transport", needs=("probes.csv",), frame=head_frame)
def error_transport(frame: pd.DataFrame) -> Figure:
    """One heatmap per model, layers by heads: the score of error transport; the top heads named, the found ones marked."""
    models = list(frame["model"].unique())
    deepest, widest = int(frame["layer"].max()) + 1, int(frame["head"].max()) + 1
    columns = panels_per_row(len(models), sheet().most_per_row - sheet().on_paper)  # their titles are long
    rows = math.ceil(len(models) / columns)
    size = max(2.6, 0.3 * widest), max(1.9, 0.17 * deepest)
    drawing = new_figure(columns * size[0] + 1.3, rows * size[1] + 1.0, rows * max(1.3, 0.09 * deepest + 0.6))
    panels = subplots(drawing, len(models), columns)
    # One colour scale for all would show only the strongest model: each model has its own, with its own bar.
    for panel, model in zip(panels, models, strict=True):
        of = frame[frame["model"] == model]
        grid = of.pivot(index="layer", columns="head", values="score")
        most = max(float(grid.abs().max(axis=None)), SMALLEST_SCORE)
        look: dict[str, Any] = {"vmin": -most, "vmax": most, "cmap": "vlag", "cbar_kws": {"shrink": 0.8}}
        sns.heatmap(grid, ax=panel, **look)
        bar = panel.collections[0].colorbar
        assert bar is not None
        bar.ax.tick_params(labelsize=pt(6.5))
        found = of[of["found"] > 0]
        places = {layer: k for k, layer in enumerate(grid.index)}, {head: k for k, head in enumerate(grid.columns)}
        for _, row in found.iterrows():
            panel.plot(
                places[1][row["head"]] + 0.5, places[0][row["layer"]] + 0.5, "o", mfc="none", color="#222222", ms=5
            )
        top = found.nlargest(TOP_HEADS, "score")
        named = ", ".join(
            f"L{row.layer}.H{row.head}" + (f" ({row.ratio:.2f})" if pd.notna(row.ratio) else "")
            for row in top.itertuples()
        )
        panel.set(xlabel="head", ylabel="layer")
        panel.set_title(f"{model}: {len(found)} of {len(of)} found\n{named or 'none to name'}", fontsize=pt(8))
        panel.tick_params(rotation=0, length=0, labelsize=pt(6.5))
    caption = (
        "Share of what a head mixes that expectations explain as tokens do, signs turned, beyond coins for the signs. "
        "Named: of those found, the highest scores (beta / alpha). Circles: found at the 5 % level over all heads."
    )
    if len(models) > 1:
        caption += " First seeds; each panel has its own scale."
    title_and_caption(drawing, "Which heads carry prediction errors?", caption)
    return drawing
