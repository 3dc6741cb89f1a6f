"""The transfer matrix, its penalties by distance, and the cost of one lens for two layers."""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.frames import layer_pair_frame, pair_frame, transfer_frame
from lensbench.report.figures.layout import colour_bar, legend_outside, new_figure, panel_for_each, title_and_caption
from lensbench.report.figures.registry import figure, nats_per
from lensbench.report.figures.style import ANNOTATED_LAYERS, GREY, cell_text, pt, sheet, use_symlog

CLIP_PERCENTILE = 95


@figure("transfer_penalty", needs=("transfer.csv",), frame=transfer_frame)
def transfer_penalty(cells: pd.DataFrame) -> Figure:
    """One heatmap per model, all on one colour scale: lens of layer i (rows) read at layer j (columns)."""
    models = list(cells["model"].unique())
    penalties = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    ceiling = float(np.percentile(penalties, CLIP_PERCENTILE, method="lower"))
    lowest, highest = float(penalties.min()), float(penalties.max())
    clipped = highest > 1.5 * ceiling > 0
    top = max(ceiling if clipped else highest, 1e-3)
    drawing, panels = panel_for_each(models, 2.9, 0.9, sharey=False, square=True)
    drawing.set_layout_engine("compressed", h_pad=0.07)
    for panel, model in zip(panels, models, strict=True):
        grid = cells[cells["model"] == model].pivot(index="lens_layer", columns="stream_layer", values="penalty_ce")
        layers = len(grid) - 1
        step = math.ceil(layers / ANNOTATED_LAYERS)
        ticks = [str(k) if k % step == 0 and k + step <= layers else "" for k in range(layers)]
        look: dict[str, Any] = {"xticklabels": [*ticks, str(layers)], "yticklabels": [*ticks, "logit"]}
        if layers <= ANNOTATED_LAYERS:
            texts = grid.map(partial(cell_text, largest=grid.abs().max(axis=None)))
            look |= {"annot": texts, "fmt": "", "annot_kws": {"size": pt(6.5)}, "linewidths": 0.4}
        cost_heatmap(panel, grid, top, **look)
        panel.set(title=model, xlabel="read at stream layer $j$", ylabel="lens of layer $i$")
    extend = ["neither", "max", "min", "both"][clipped + 2 * (lowest < -0.02 * top)]
    label = f"$C_{{ij}} - C_{{jj}}$ ({nats_per(cells)})" + (f"\nclipped, maximum {highest:.3g}" if clipped else "")
    colour_bar(drawing, panels, label, extend=extend)
    title_and_caption(drawing, "Transfer penalty: layer $j$ through the lens of layer $i$", "Last row: the logit lens.")
    return drawing


def cost_heatmap(panel: Axes, grid: pd.DataFrame, top: float, **look: Any) -> None:
    """Draw costs from 0 to ``top`` as a heatmap of square cells, dark where they are large."""
    sns.heatmap(grid, ax=panel, vmin=0, vmax=top, cmap="rocket_r", cbar=False, square=True, **look)
    panel.tick_params(rotation=0, length=0)


@figure("penalty_by_distance", needs=("transfer.csv",), frame=layer_pair_frame)
def penalty_by_distance(pairs: pd.DataFrame) -> Figure:
    """Penalty against the distance |i - j| between fitted lenses, forward (lens of the earlier layer) and backward."""
    models = list(pairs["model"].unique())
    i, j = pairs["lens_layer"], pairs["stream_layer"]
    aside = 0.4 * (pairs["model"].map(models.index) + 0.5) / len(models) - 0.2
    directions: dict[str, Any] = {"forward ($i < j$)": "", "backward ($i > j$)": (4, 1.5)}
    rows = pairs.assign(distance=(i - j).abs() + aside, direction=np.where(i < j, *directions))
    drawing = new_figure(7.2, 4.0)
    panel = drawing.subplots()
    look: dict[str, Any] = {"x": "distance", "y": "penalty_ce", "hue": "model", "style": "direction", "ax": panel}
    look |= {"palette": "colorblind", "hue_order": models, "style_order": [*directions], "markers": ["o", "X"]}
    dot, mark = (6, 4) if sheet().on_paper else (14, 6)
    sns.scatterplot(rows, s=dot, alpha=0.35, linewidth=0, legend=False, **look)
    sns.lineplot(rows, errorbar=None, lw=1.6, markersize=mark, dashes=directions, **look)
    if sheet().on_paper:
        handles, labels = panel.get_legend_handles_labels()
        panel.legend().remove()
        named = [k for k, label in enumerate(labels) if label not in ("model", "direction")]
        legend_outside(drawing, [handles[k] for k in named], [labels[k] for k in named])
    else:
        sns.move_legend(panel, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    panel.axhline(0, color=GREY, lw=0.8, zorder=1)
    use_symlog(panel, "y", 0.1)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    unit = f"({nats_per(pairs)}, linear below 0.1)"
    panel.set(xlabel="distance $|i - j|$ (layers)", ylabel=f"$C_{{ij}} - C_{{jj}}$ {unit}")
    title_and_caption(
        drawing, "Transfer penalty by distance of layers", "Points: pairs of layers below L; lines: means."
    )
    return drawing


@figure("pair_penalty", needs=("pairs.csv",), frame=pair_frame)
def pair_penalty(frame: pd.DataFrame) -> Figure:
    """One heatmap per model: cost of one lens for two layers; below the diagonal the same in random bases."""
    models = list(frame["model"].unique())
    drawing, panels = panel_for_each(models, 2.9, 0.9, sharey=False, square=True)
    drawing.set_layout_engine("compressed", h_pad=0.07)
    top = max(float(frame[["penalty", "rotated_penalty"]].max().max()), 1e-3)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        layers = sorted({*rows["layer_i"], *rows["layer_j"]})
        grid = pd.DataFrame(np.nan, index=layers, columns=layers)
        for _, row in rows.iterrows():
            grid.loc[row["layer_i"], row["layer_j"]] = row["penalty"]
            grid.loc[row["layer_j"], row["layer_i"]] = row["rotated_penalty"]
        texts = grid.map(lambda v: "" if np.isnan(v) else cell_text(v, top))
        cost_heatmap(panel, grid, top, annot=texts, fmt="", annot_kws={"size": pt(6.5)}, linewidths=0.4)
        panel.grid(False)
        panel.set(title=model, xlabel="layer", ylabel="layer")
    colour_bar(drawing, panels, f"$M_{{ij}}$ ({nats_per(frame)})")
    caption = "Above the diagonal: the model. Below: the null, each layer in a random basis of its own."
    title_and_caption(drawing, "One lens for two layers: what it costs over two lenses", caption)
    return drawing
