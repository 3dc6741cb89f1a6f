"""What probes measured by layer and by head."""

import math
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.style import (
    GREY,
    _sheet,
    abreast,
    beside,
    looks,
    new_figure,
    pt,
    use_symlog,
    write_around,
)

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


def probes(frame: pd.DataFrame, of: str = "token") -> Figure:
    """What probes measured beside the lenses, one panel per quantity and one line per model; means over equal distances."""
    models = list(frame["model"].unique())
    shown = [panel for panel in PROBE_PANELS if (frame["quantity"] == panel[0]).any()]
    columns = abreast(max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = new_figure(3.0 * columns + 1.6, 2.4 * rows + 0.8, (1.3 if _sheet.get().abreast < 3 else 1.6) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    of_model = dict(zip(models, looks(len(models)), strict=True))
    for panel, (quantity, over, name) in zip(panels, shown, strict=False):
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
        panel.set(xlabel=over, ylabel=name.replace("nats/token", f"nats/{of}"))
        if name.startswith("rise"):
            use_symlog(panel, "y", 0.02)
    for panel in panels[len(shown) :]:
        panel.remove()
    named = {
        label: line
        for panel in panels[: len(shown)]
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if named:
        beside(figure, named.values(), named.keys())
    caption = f"Bars: 95 % intervals. Thin lines, the null: another {of}'s gradient, another direction's response."
    titles = {"gradient_alignment": "gradients", "ce_rise_deleted": "blocks", "read_out_ce": "predictions and errors"}
    titles |= {
        "carried_share": "what is carried along",
        "prediction_gain": "what stays visible",
        "fidelity": "what is used",
    }
    told = [title for quantity, title in titles.items() if quantity in {panel[0] for panel in shown}]
    write_around(figure, "Beside the lenses" + (": " + ", ".join(told) if told else ""), caption)
    return figure


TOP_HEADS = 3
"""Heads that are named in a heatmap."""


SMALLEST_SCORE = 1e-4
"""That a colour scale reaches at least."""


def error_transport(frame: pd.DataFrame) -> Figure:
    """One heatmap per model, layers by heads: the score of error transport; the top heads named, the found ones marked."""
    models = list(frame["model"].unique())
    deepest, widest = int(frame["layer"].max()) + 1, int(frame["head"].max()) + 1
    sheet = _sheet.get()
    columns = abreast(len(models), sheet.abreast - (sheet.width is not None))  # their titles are long
    rows = math.ceil(len(models) / columns)
    size = max(2.6, 0.3 * widest), max(1.9, 0.17 * deepest)
    figure = new_figure(columns * size[0] + 1.3, rows * size[1] + 1.0, rows * max(1.3, 0.09 * deepest + 0.6))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    # One colour scale for all would show the strongest model alone: each model has its own, told beside it.
    for panel, model in zip(panels, models, strict=False):
        of = frame[frame["model"] == model]
        grid = of.pivot(index="layer", columns="head", values="score")
        most = max(float(grid.abs().max(axis=None)), SMALLEST_SCORE)
        look: dict[str, Any] = {"vmin": -most, "vmax": most, "cmap": "vlag", "cbar_kws": {"shrink": 0.8}}
        sns.heatmap(grid, ax=panel, **look)
        panel.collections[0].colorbar.ax.tick_params(labelsize=pt(6.5))
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
    for panel in panels[len(models) :]:
        panel.remove()
    caption = (
        "Share of what a head mixes that expectations explain as tokens do, signs turned, beyond coins for the signs. "
        "Named: of those found, the highest scores (beta / alpha). Circles: found at the 5 % level over all heads."
    )
    if len(models) > 1:
        caption += " First seeds; each panel has its own scale."
    write_around(figure, "Which heads carry prediction errors?", caption)
    return figure
