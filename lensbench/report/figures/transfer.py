"""The transfer matrix, its penalties by distance, and the cost of one lens for two layers."""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.style import (
    ANNOTATED_LAYERS,
    GREY,
    _sheet,
    beside,
    cell_text,
    colour_bar,
    new_figure,
    panels_of,
    pt,
    use_symlog,
    write_around,
)

CLIP_PERCENTILE = 95


def transfer_penalty(cells: pd.DataFrame, of: str = "token") -> Figure:
    """One heatmap per model, all on one colour scale: lens of layer i (rows) read at layer j (columns)."""
    models = list(cells["model"].unique())
    penalties = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    ceiling = float(np.percentile(penalties, CLIP_PERCENTILE, method="lower"))
    lowest, highest = float(penalties.min()), float(penalties.max())
    clipped = highest > 1.5 * ceiling > 0
    top = max(ceiling if clipped else highest, 1e-3)
    figure, panels = panels_of(models, 2.9, 0.9, sharey=False, square=True)
    figure.set_layout_engine("compressed", h_pad=0.07)
    for panel, model in zip(panels, models, strict=True):
        grid = cells[cells["model"] == model].pivot(index="lens_layer", columns="stream_layer", values="penalty_ce")
        layers = len(grid) - 1
        step = math.ceil(layers / ANNOTATED_LAYERS)
        ticks = [str(k) if k % step == 0 and k + step <= layers else "" for k in range(layers)]
        look: dict[str, Any] = {"vmin": 0, "vmax": top, "cmap": "rocket_r", "cbar": False, "square": True}
        look |= {"xticklabels": [*ticks, str(layers)], "yticklabels": [*ticks, "logit"]}
        if layers <= ANNOTATED_LAYERS:
            texts = grid.map(partial(cell_text, largest=grid.abs().max(axis=None)))
            look |= {"annot": texts, "fmt": "", "annot_kws": {"size": pt(6.5)}, "linewidths": 0.4}
        sns.heatmap(grid, ax=panel, **look)
        panel.tick_params(rotation=0, length=0)
        panel.set(title=model, xlabel="read at stream layer $j$", ylabel="lens of layer $i$")
    extend = ["neither", "max", "min", "both"][clipped + 2 * (lowest < -0.02 * top)]
    label = f"$C_{{ij}} - C_{{jj}}$ (nats/{of})" + (f"\nclipped, maximum {highest:.3g}" if clipped else "")
    colour_bar(figure, panels, label, extend=extend)
    write_around(figure, "Transfer penalty: layer $j$ through the lens of layer $i$", "Last row: the logit lens.")
    return figure


def penalty_by_distance(cells: pd.DataFrame, of: str = "token") -> Figure:
    """Penalty against the distance |i - j| between fitted lenses, forward (lens of the earlier layer) and backward."""
    models = list(cells["model"].unique())
    i, j = cells["lens_layer"], cells["stream_layer"]
    aside = 0.4 * (cells["model"].map(models.index) + 0.5) / len(models) - 0.2
    directions: dict[str, Any] = {"forward ($i < j$)": "", "backward ($i > j$)": (4, 1.5)}
    rows = cells.assign(distance=(i - j).abs() + aside, direction=np.where(i < j, *directions))
    rows = rows[(i != j) & (np.maximum(i, j) < cells["layers"])]
    figure = new_figure(7.2, 4.0)
    panel = figure.subplots()
    look: dict[str, Any] = {"x": "distance", "y": "penalty_ce", "hue": "model", "style": "direction", "ax": panel}
    look |= {"palette": "colorblind", "hue_order": models, "style_order": [*directions], "markers": ["o", "X"]}
    if not rows.empty:
        dot, mark = (14, 6) if _sheet.get().width is None else (6, 4)
        sns.scatterplot(rows, s=dot, alpha=0.35, linewidth=0, legend=False, **look)
        sns.lineplot(rows, errorbar=None, lw=1.6, markersize=mark, dashes=directions, **look)
        if _sheet.get().width is None:
            sns.move_legend(panel, "upper left", bbox_to_anchor=(1, 1), frameon=False)
        else:
            handles, labels = panel.get_legend_handles_labels()
            panel.legend().remove()
            named = [k for k, label in enumerate(labels) if label not in ("model", "direction")]
            beside(figure, [handles[k] for k in named], [labels[k] for k in named])
    panel.axhline(0, color=GREY, lw=0.8, zorder=1)
    use_symlog(panel, "y", 0.1)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    panel.set(xlabel="distance $|i - j|$ (layers)", ylabel=f"$C_{{ij}} - C_{{jj}}$ (nats/{of}, linear below 0.1)")
    write_around(figure, "Transfer penalty by distance of layers", "Points: pairs of layers below L; lines: means.")
    return figure


def pair_penalty(frame: pd.DataFrame, of: str = "token") -> Figure:
    """One heatmap per model: cost of one lens for two layers; below the diagonal the same in random bases."""
    models = list(frame["model"].unique()) or [""]
    figure, panels = panels_of(models, 2.9, 0.9, sharey=False, square=True)
    figure.set_layout_engine("compressed", h_pad=0.07)
    title = "One lens for two layers: what it costs over two lenses"
    caption = "Above the diagonal: the model. Below: the null, each layer in a random basis of its own."
    if frame.empty:
        write_around(figure, title, "There are no two layers.")
        return figure
    top = max(float(frame[["penalty", "rotated_penalty"]].max().max()), 1e-3)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        layers = sorted({*rows["layer_i"], *rows["layer_j"]})
        grid = pd.DataFrame(np.nan, index=layers, columns=layers)
        for _, row in rows.iterrows():
            grid.loc[row["layer_i"], row["layer_j"]] = row["penalty"]
            grid.loc[row["layer_j"], row["layer_i"]] = row["rotated_penalty"]
        look: dict[str, Any] = {"vmin": 0, "vmax": top, "cmap": "rocket_r", "cbar": False, "square": True}
        look |= {
            "annot": grid.map(lambda v: "" if np.isnan(v) else cell_text(v, top)),
            "fmt": "",
            "annot_kws": {"size": pt(6.5)},
        }
        sns.heatmap(grid, ax=panel, linewidths=0.4, **look)
        panel.tick_params(rotation=0, length=0)
        panel.grid(False)
        panel.set(title=model, xlabel="layer", ylabel="layer")
    colour_bar(figure, panels, f"$M_{{ij}}$ (nats/{of})")
    write_around(figure, title, caption)
    return figure
