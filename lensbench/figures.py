"""The pictures of a run, drawn with seaborn from its tables and from nothing else.

One function per figure: a tidy frame in, a :class:`matplotlib.figure.Figure` out. :func:`draw_figures` writes them all.
Nothing here leaves a setting of matplotlib changed, and the same tables give the same bytes.
"""

import functools
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from lensbench.errors import LensbenchError
from lensbench.results import Run, write_atomically

DPI = 150
ANNOTATED_LAYERS = 10  # the numbers of a larger heatmap could not be read
CLIP_PERCENTILE = 95
SMALLEST_KL = 1e-6  # nats/token; a log axis has no zero
LARGEST_MARKER = 4.0  # movement from which markers of the plane grow no more
GREY = "#666666"

BLUE, ORANGE, GREEN, VERMILION, PURPLE = sns.color_palette("colorblind").as_hex()[:5]
LENSES = {
    "logit": ("logit lens", "#222222"),
    "tuned": ("tuned lens, one per layer", BLUE),
    "shared": ("shared lens", VERMILION),
    "shared_bias": ("shared lens, one bias per layer", ORANGE),
    "shared_loo": ("shared lens, layer left out", GREEN),
    "rotated": ("shared lens, rotated view", PURPLE),
}
DASHES: dict[str, Any] = {"none": "", "refined": "", "closed": (4, 1.5)}  # by stage
VISIBILITIES = {
    "gain_visibility": "all pairs of layers",
    "gain_visibility_adjacent": "adjacent layers",
    "gain_visibility_without_layer0": "without layer 0",
}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, whatever the user's matplotlibrc says; all settings are restored afterwards."""
    own = {"font.sans-serif": ["DejaVu Sans"], "grid.color": "#E6E6E6", "axes.edgecolor": "#888888"}
    with matplotlib.style.context("default"), sns.axes_style("whitegrid", own), sns.plotting_context("paper"):
        yield


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """Write every figure of ``run`` as a PNG into ``folder`` and return their paths.

    All are drawn before the first is written: a table that cannot be drawn leaves the folder as it was.
    """
    transfer, lenses, indices = transfer_frame(run), lens_frame(run), index_frame(run)
    with style():
        figures = {
            "transfer_penalty.png": transfer_penalty(transfer),
            "kl_by_layer.png": kl_by_layer(lenses),
            "penalty_by_distance.png": penalty_by_distance(transfer),
            "gain_visibility.png": gain_visibility(indices),
            "plane.png": plane(indices),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save = functools.partial(figure.savefig, format="png", dpi=DPI, metadata={"Software": None})
            write_atomically(folder / name, save)
    return [folder / name for name in figures]


# Tables to tidy frames: means over seeds, models in the order of models.csv.


def transfer_frame(run: Run) -> pd.DataFrame:
    """``model, lens_layer, stream_layer, penalty_ce``, and ``layers``; no cell of the (L+1) x (L+1) grid is missing."""
    cell = ["lens_layer", "stream_layer"]
    table = run.tables["transfer.csv"]
    table = table[np.isfinite(table["penalty_ce"])]
    frames = []
    for _, (model, seed, layers) in run.tables["models.csv"][["model", "seed", "layers"]].iterrows():
        rows = table[(table["model"] == model) & (table["seed"] == seed)]
        missing = (layers + 1) ** 2 - len(rows[cell].drop_duplicates())
        if missing:
            size = f"{layers + 1} x {layers + 1}"
            raise LensbenchError(f"transfer.csv, model {model}, seed {seed}: {missing} of {size} penalty_ce are missing")
        frames.append(rows.assign(layers=layers))
    return pd.concat(frames).groupby(["model", "layers", *cell], sort=False, as_index=False)["penalty_ce"].mean()


def lens_frame(run: Run) -> pd.DataFrame:
    """``model, lens, stage, layer, kl`` and its interval: each lens refined where it was, closed elsewhere.

    The shared lens of the rotated view is the lens ``rotated``. The logit lens at L, the model itself, is left out.
    """
    table = run.tables["lenses.csv"]
    layers = run.tables["models.csv"].groupby("model", sort=False)["layers"].first()
    frames = []
    for model, depth in layers.items():
        own = table[(table["model"] == model) & (table["layer"] < depth)]
        rotated = table[(table["model"] == f"{model}+rotated") & (table["lens"] == "shared")]
        rows = pd.concat([own, rotated.assign(lens="rotated", model=model)])
        rows = rows[rows["lens"].isin(LENSES)].fillna({"stage": "none"})
        if rows["kl"].isna().any() or rows.empty:
            raise LensbenchError(f"lenses.csv, model {model}: {rows['kl'].isna().sum()} of {len(rows)} kl are missing")
        refined = rows["lens"].isin(rows.loc[rows["stage"] == "refined", "lens"])
        frames.append(rows[~refined | (rows["stage"] == "refined")])
    numbers = ["kl", "kl_ci_low", "kl_ci_high"]
    means = pd.concat(frames).groupby(["model", "lens", "stage", "layer"], sort=False)[numbers].mean()
    return means.clip(lower=SMALLEST_KL).reset_index()


def index_frame(run: Run) -> pd.DataFrame:
    """One row per index and model, undefined ones too: ``value`` and its intervals, of seed ``all`` where there is one."""
    table = run.tables["indices.csv"]
    table = table.iloc[(table["seed"] == "all").argsort(kind="stable")].drop_duplicates(["index", "model"], keep="last")
    names = [*VISIBILITIES, "movement", "shared_consistency"]
    every = pd.MultiIndex.from_product([names, run.tables["models.csv"]["model"].unique()], names=["index", "model"])
    numbers = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    return table.set_index(["index", "model"])[numbers].reindex(every).astype(float).reset_index()


# What the figures have in common.


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panels_of(models: list[str], columns: int, size: float, extra: tuple[float, float], **kwargs: Any) -> tuple:
    """A figure with one titled panel per model, ``size`` inches wide and high, and ``extra`` inches around them."""
    columns = min(len(models), columns)
    rows = math.ceil(len(models) / columns)
    figure = new_figure(max(columns * size + extra[0], 5), rows * size + extra[1], kwargs.pop("layout", "constrained"))
    panels = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for panel in panels[len(models) :]:
        panel.remove()
    for panel, model in zip(panels, models, strict=False):
        panel.set_title(model, size=9)
    return figure, list(panels[: len(models)])


def write_around(figure: Figure, title: str, caption: str = "") -> None:
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(10.5 * width)), x=0.01, ha="left", size=10.5, weight="bold")
    if caption:
        caption = "\n".join(textwrap.fill(line, int(17 * width)) for line in caption.split("\n"))
        figure.supxlabel(caption, x=0.01, ha="left", size=7, color=GREY)


def use_symlog(axis: Axis, linear: float) -> None:
    """Linear up to ``linear``, logarithmic beyond."""
    axis._set_axes_scale("symlog", linthresh=linear)  # type: ignore[attr-defined]
    ticks = [linear * x for decade in (1, 10, 100, 1000) for x in (decade, 3 * decade)] + [linear / 2]
    axis.set_major_locator(FixedLocator([-x for x in ticks] + [0.0] + ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def colours_of(models: list[str]) -> dict[str, Any]:
    return dict(zip(models, sns.color_palette("colorblind", len(models)), strict=True))


# The figures.


def transfer_penalty(cells: pd.DataFrame) -> Figure:
    """One heatmap per model, all on one colour scale: lens of layer i (rows) read at layer j (columns)."""
    models = list(cells["model"].unique())
    off_diagonal = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    ceiling, highest = float(np.percentile(off_diagonal, CLIP_PERCENTILE)), float(off_diagonal.max())
    clipped = highest > 1.5 * ceiling
    top = max(ceiling if clipped else highest, 1e-3)
    figure, panels = panels_of(models, 3, 2.9, (0.9, 0.5), layout="compressed")
    for panel, model in zip(panels, models, strict=True):
        grid = cells[cells["model"] == model].pivot(index="lens_layer", columns="stream_layer", values="penalty_ce")
        layers = len(grid) - 1
        step = math.ceil(layers / ANNOTATED_LAYERS)
        ticks = [str(k) if k % step == 0 and k + step <= layers else "" for k in range(layers)]
        numbers = layers <= ANNOTATED_LAYERS and grid.map(cell_text)
        scale: dict[str, Any] = {"vmin": 0, "vmax": top, "cmap": "rocket_r", "cbar": False, "square": True}
        written: dict[str, Any] = {"annot": numbers, "fmt": "", "annot_kws": {"size": 6.5}}
        labels = {"xticklabels": [*ticks, str(layers)], "yticklabels": [*ticks, "logit"]}
        sns.heatmap(grid, ax=panel, linewidths=0.4, **scale, **written, **labels)
        panel.tick_params(axis="both", rotation=0, length=0)
        panel.set(xlabel="read at stream layer $j$", ylabel="lens of layer $i$")
    bar = figure.colorbar(
        panels[0].collections[0], ax=panels, extend="max" if clipped else "neither", aspect=25, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.set_label("$C_{ij} - C_{jj}$ (nats/token)" + (f"\nclipped; maximum {highest:.3g}" if clipped else ""), size=8)
    write_around(figure, "Transfer penalty: reading layer $j$ through the lens of layer $i$")
    return figure


def cell_text(value: float) -> str:
    """At most two significant digits and three characters, whole nats from 10."""
    size = abs(value)
    text = f"{value:.2f}" if size < 0.995 else f"{value:.1f}" if size < 9.95 else f"{value:.0f}"
    return "0" if size < 0.005 else text.replace("0.", ".").replace("-", "−")


def kl_by_layer(frame: pd.DataFrame) -> Figure:
    """Per model the KL to its own output at every layer, one line per lens."""
    models = list(frame["model"].unique())
    frame = frame.assign(label=[label_of(*row) for row in frame[["lens", "stage"]].itertuples(index=False, name=None)])
    looks: dict[str, tuple] = {}  # colour and dashes by label, in the order of LENSES
    for lens, (_, colour) in LENSES.items():
        for stage in frame.loc[frame["lens"] == lens, "stage"].unique():
            looks[label_of(lens, stage)] = (colour, (1, 1) if lens == "rotated" else DASHES.get(stage, (2, 2)))
    colours, dashes = ({label: look[k] for label, look in looks.items()} for k in (0, 1))
    figure, panels = panels_of(models, 3, 2.6, (2.6, 0.5), sharey=True)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        lines: dict[str, Any] = {"palette": colours, "dashes": dashes, "hue_order": looks, "style_order": looks}
        sns.lineplot(
            rows, x="layer", y="kl", hue="label", style="label", errorbar=None, lw=1.6, legend="full", ax=panel, **lines
        )
        for label, line in rows.sort_values("layer").groupby("label"):
            band = line["layer"], line["kl_ci_low"], line["kl_ci_high"]
            panel.fill_between(*band, color=colours[str(label)], alpha=0.18, lw=0)
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
        panel.set(yscale="log", xlabel="layer", ylabel="KL to the model's output (nats/token)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.label_outer(remove_inner_ticks=False)
        panel.xaxis.set_tick_params(labelbottom=True)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    write_around(figure, "How far each layer's read-out is from the model's output", "Bands: 95 % intervals.")
    return figure


def label_of(lens: str, stage: str) -> str:
    return LENSES[lens][0] + ("" if stage == "none" else f" ({stage})")


def penalty_by_distance(cells: pd.DataFrame) -> Figure:
    """Penalty against the distance |i - j| between fitted lenses, forward (lens of the earlier layer) and backward."""
    models = list(cells["model"].unique())
    i, j = cells["lens_layer"], cells["stream_layer"]
    rows = cells.assign(
        direction=np.where(i < j, "forward (i < j)", "backward (i > j)"),
        distance=(i - j).abs() + 0.4 * (cells["model"].map(models.index) + 0.5) / len(models) - 0.2,  # side by side
    )[(i != j) & (np.maximum(i, j) < cells["layers"])]
    figure = new_figure(7.2, 4.0)
    panel = figure.subplots()
    look: dict[str, Any] = {"hue": "model", "style": "direction", "palette": colours_of(models), "hue_order": models}
    look |= {"x": "distance", "y": "penalty_ce", "style_order": ["forward (i < j)", "backward (i > j)"], "ax": panel}
    look["markers"] = ["o", "X"]
    sns.scatterplot(rows, s=14, alpha=0.35, linewidth=0, legend=False, **look)
    sns.lineplot(rows, estimator="mean", errorbar=None, lw=1.6, dashes=["", (4, 1.5)], markersize=6, **look)
    panel.axhline(0, color=GREY, lw=0.8, zorder=1)
    use_symlog(panel.yaxis, 0.1)
    panel.grid(False, axis="x")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    panel.set(
        xlabel="distance $|i - j|$ between lens and stream (layers)",
        ylabel="$C_{ij} - C_{jj}$ (nats/token; linear below 0.1, log above)",
    )
    if panel.get_legend():
        sns.move_legend(panel, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    caption = "Lines: means; points: pairs of layers. Layers below L, without the logit lens."
    write_around(figure, "Transfer penalty by the distance between layers", caption)
    return figure


def gain_visibility(frame: pd.DataFrame) -> Figure:
    """Per model how much of the later layers' gain a fixed lens sees, and beside it how much moves under that lens."""
    models = list(frame["model"].unique())
    figure = new_figure(8.2, 0.55 * len(models) + 1.7)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kinds = dict(zip(VISIBILITIES, (BLUE, ORANGE, GREEN), strict=True))
    for panel, indices in ((left, kinds), (right, {"movement": PURPLE})):
        rows = frame[frame["index"].isin(list(indices))]
        offset = rows["index"].map({name: 0.25 * k for k, name in enumerate(indices)}) - 0.125 * (len(indices) - 1)
        rows = rows.assign(row=rows["model"].map(models.index) + offset, label=rows["index"].replace(VISIBILITIES))
        palette = {VISIBILITIES.get(name, name): colour for name, colour in indices.items()}
        for y, label, value, *bars in rows[["row", "label", "value", *BARS]].itertuples(index=False, name=None):
            if math.isnan(value):
                note: dict[str, Any] = {"size": 7, "style": "italic", "va": "center", "color": palette[label]}
                panel.text(0.01, y, "undefined", transform=panel.get_yaxis_transform(), backgroundcolor="w", **note)
            panel.hlines([y, y], bars[::2], bars[1::2], color=palette[label], lw=[2.6, 0.9])
        kind: dict[str, Any] = {"hue": "label", "style": "label", "palette": palette, "legend": panel is left}
        sns.scatterplot(rows, x="value", y="row", s=34, linewidth=0.5, zorder=3, ax=panel, **kind)
        panel.axvline(0, color="#333333", lw=0.9, zorder=1)
        panel.grid(False, axis="y")
        use_symlog(panel.xaxis, 1.0)
        limit(panel, rows, "x", low=0.0, high=1.0)
        panel.set(xlabel="movement (share of the own gain)", ylabel="")
    left.set_xlabel("gain visibility (share of the own gain)")
    left.set_yticks(range(len(models)), models)
    left.set_ylim(len(models) - 0.5, -0.5)
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "title": None, "frameon": False}
    if left.get_legend():
        sns.move_legend(left, handletextpad=0.2, columnspacing=1.2, **above)
    caption = "Thick: 95 % interval with the lenses held fixed; thin: range over refits. Linear within ±1, log beyond."
    write_around(figure, "Does a fixed lens see the later layers' gain, and does anything move?", caption)
    return figure
