"""The transfer matrix, its penalties by distance, and the cost of one lens for two layers."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.findings import by_model, change_with_distance, pair_cost
from lensbench.report.figures.frames import layer_pair_frame, pair_frame, transfer_frame
from lensbench.report.figures.layout import colour_bar, legend_outside, new_figure, panel_for_each, title_and_caption
from lensbench.report.figures.registry import figure, looks_of, nats_per
from lensbench.report.figures.style import ANNOTATED_LAYERS, GREY, cell_text, pt, sheet, use_symlog

CLIP_PERCENTILE = 95

COSTS = "rocket_r"
"""The colours of costs: dark where they are large, in the same order to the colour-blind and in print"""


@dataclass(frozen=True)
class CostScale:
    """The colours of penalties, from 0 to ``top``; ``highest`` and ``lowest``: of the cells off the diagonal."""

    top: float
    highest: float
    lowest: float

    @property
    def clipped(self) -> bool:
        """Whether the highest is far beyond the darkest colour."""
        return self.highest > 1.5 * self.top


def cost_scale(cells: pd.DataFrame) -> CostScale:
    """One scale for the matrices of all models: to the 95th percentile where a few cells are far above it."""
    penalties = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    ceiling = float(np.percentile(penalties, CLIP_PERCENTILE, method="lower"))
    highest = float(penalties.max())
    return CostScale(max(ceiling if highest > 1.5 * ceiling > 0 else highest, 1e-3), highest, float(penalties.min()))


@figure("transfer_penalty", needs=("transfer.csv",), frame=transfer_frame)
def transfer_penalty(cells: pd.DataFrame) -> Figure:
    """One heatmap per model, all on one colour scale: lens of layer i (rows) read at layer j (columns)."""
    models = list(cells["model"].unique())
    scale = cost_scale(cells)
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
        cost_heatmap(panel, grid, scale.top, **look)
        panel.set(title=model, xlabel="read at stream layer $j$", ylabel="lens of layer $i$")
    extend = ["neither", "max", "min", "both"][scale.clipped + 2 * (scale.lowest < -0.02 * scale.top)]
    clipped = f"\ncolours end at {scale.top:.2g}, the highest is {scale.highest:.3g}" if scale.clipped else ""
    label = f"$C_{{ij}} - C_{{jj}}$ ({nats_per(cells)}){clipped}"
    colour_bar(drawing, panels, label, extend=extend)
    caption = "Rows: the lens of layer $i$; columns: the layer $j$ that it reads. Last row: the logit lens."
    title_and_caption(drawing, cost_in_words(cells), caption)
    return drawing


def cost_in_words(cells: pd.DataFrame) -> str:
    """What reading a layer through another layer's lens costs, the title of the figure."""
    last = cells.groupby("model", sort=False)["lens_layer"].transform("max")
    off = cells[(cells["lens_layer"] != cells["stream_layer"]) & (cells["lens_layer"] < last)]
    if off.empty:
        return "Transfer penalty: layer $j$ through the lens of layer $i$"
    by = off.groupby("model", sort=False)["penalty_ce"]
    most = by_model(by.max(), "{:.3g}")
    return f"Another layer's lens costs a median of {by_model(by.median())} {nats_per(cells)}, at most {most}"


def cost_heatmap(panel: Axes, grid: pd.DataFrame, top: float, **look: Any) -> None:
    """Draw costs from 0 to ``top`` as a heatmap of square cells, dark where they are large."""
    sns.heatmap(grid, ax=panel, vmin=0, vmax=top, cmap=COSTS, cbar=False, square=True, **look)
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
    look |= {
        "palette": {model: one["color"] for model, one in looks_of(pairs).items()},
        "hue_order": models,
        "style_order": [*directions],
        "markers": ["o", "X"],
    }
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
    caption = "Points: pairs of layers below L; lines: means."
    title_and_caption(drawing, change_with_distance(pairs, nats_per(pairs)), caption)
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
    title_and_caption(drawing, pair_cost(frame, nats_per(frame)), caption)
    return drawing
