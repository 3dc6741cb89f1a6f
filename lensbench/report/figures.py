"""The pictures of a run, drawn with seaborn from its tables and from nothing else.

One function per figure: a tidy frame in, a :class:`matplotlib.figure.Figure` out. :func:`draw_figures` writes them all.
Nothing here leaves a setting of matplotlib changed, and the same tables give the same bytes.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator
from matplotlib.transforms import Bbox

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import ONE_STANDARD_ERROR
from lensbench.measures.indices import tolerance_order
from lensbench.results.folder import Run
from lensbench.results.schema import unit
from lensbench.runtime.files import write_atomically
from lensbench.studies.curves import ALL, BOUND, shown_curves
from lensbench.studies.regression import shown

DPI, LOWEST_DPI, HIGHEST_DPI = 150, 50, 1200


ANNOTATED_LAYERS = 10  # the numbers of a larger heatmap could not be read


CLIP_PERCENTILE = 95


SMALLEST_KL = 1e-6  # nats/token; a log axis has no zero


MOVEMENTS = {0: "0", 2: "2", 4: "4 or more"}  # legend of the sizes in the plane, which grow up to the last


GREY = "#666666"


BLUE, ORANGE, GREEN, VERMILION, PURPLE = sns.color_palette("colorblind").as_hex()[:5]


LENSES = {
    "logit": "logit lens",
    "tuned": "tuned lens, one per layer",
    "shared": "shared lens",
    "shared_bias": "shared lens, one bias per layer",
    "shared_loo": "shared lens, layer left out",
    "rotated": "shared lens, rotated view",
}


LENS_COLOURS = dict(zip(LENSES, ("#222222", BLUE, VERMILION, ORANGE, GREEN, PURPLE), strict=True))


DASHES = {"none": "", "refined": "", "closed": (4, 1.5), "rotated": (1, 1)}


VISIBILITIES = {
    "gain_visibility": "all pairs of layers",
    "gain_visibility_adjacent": "adjacent layers",
    "gain_visibility_without_layer0": "without layer 0",
}


STYLE = resources.files("lensbench.report").joinpath("lensbench.mplstyle")


FORMATS = {
    # What tells when and by what a file was made would make two of the same figure differ.
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Sheet:
    """What figures are drawn for: ``width`` inches of a page, or (None) a screen, each figure as wide as it wants."""

    width: float | None = None
    abreast: int = 3
    """Panels side by side, at most"""
    scale: float = 1.0
    """Of all sizes of letters"""


SHEETS = {None: Sheet(), 1: Sheet(3.35, 2, 0.8), 2: Sheet(6.9, 3, 0.8)}
"""Columns of a paper -> its sheet."""


SMALLEST, LARGEST = 6.0, 8.0
"""Points of letters in a paper."""


_sheet: ContextVar[Sheet] = ContextVar("sheet", default=SHEETS[None])


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, whatever the user's matplotlibrc says; all settings are restored afterwards."""
    with matplotlib.style.context("default"), resources.as_file(STYLE) as file:
        own = matplotlib.rc_params_from_file(file, use_default_template=False)
        with sns.axes_style("whitegrid"), sns.plotting_context("paper", _sheet.get().scale), matplotlib.rc_context(own):
            yield


@contextmanager
def on(sheet: Sheet) -> Iterator[None]:
    """Figures are made for this sheet while it lasts."""
    before = _sheet.set(sheet)
    try:
        yield
    finally:
        _sheet.reset(before)


def pt(size: float) -> float:
    """A size of letters on the sheet, in points."""
    sheet = _sheet.get()
    return size if sheet.width is None else min(max(size * sheet.scale, SMALLEST), LARGEST)


def new_figure(width: float, height: float, paper: float | None = None) -> Figure:
    """A figure of so many inches on a screen; on a sheet as wide as that, and ``paper`` inches high.

    What is written above and below a figure on a sheet makes it higher: see :func:`beside` and :func:`write_around`.
    """
    wide = _sheet.get().width
    if wide is not None:
        width, height = wide, min(0.62 * wide, 3.0) if paper is None else paper
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def abreast(count: int, most: int | None = None) -> int:
    """How many of ``count`` panels stand side by side; on a sheet no row is much shorter than another."""
    sheet = _sheet.get()
    most = most or sheet.abreast
    return min(count, most) if sheet.width is None else math.ceil(count / math.ceil(count / most))


def beside(figure: Figure, handles: Any, labels: Any, **look: Any) -> None:
    """The legend of a whole figure: to its right on a screen, above it on a sheet, which has no width to spare."""
    look = {"frameon": False, "fontsize": pt(8), **look}
    if _sheet.get().width is None:
        figure.legend(handles, labels, loc="outside right center", **look)
        return
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    # A letter is 0.56 of its size wide; beside its label an entry has a handle and gaps.
    fits = figure.get_figwidth() * 72 / (pt(8) * (0.56 * longest + look.get("handlelength", 2) + 2))
    columns = abreast(len(labels), max(1, int(fits))) if len(labels) else 1
    rows = math.ceil(len(labels) / columns)
    look = {"labelspacing": 0.3, "columnspacing": 1.2, "borderpad": 0.2, **look}
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, **look)
    grow(figure, pt(8) * (1.5 * rows + 1))


def grow(figure: Figure, points: float) -> None:
    figure.set_figheight(figure.get_figheight() + points / 72)


def draw_figures(
    run: Run, folder: Path, *, formats: Sequence[str] = ("png",), dpi: int = DPI, columns: int | None = None
) -> list[Path]:
    """Write every figure of ``run`` into ``folder`` and return their paths.

    ``formats``: of :data:`FORMATS`; ``dpi`` is that of PNG; ``columns``: 1 or 2, of a paper that they are to fit into.
    All are drawn before the first is written: a table that cannot be drawn leaves the folder as it was.
    """
    if strange := [kind for kind in formats if kind not in FORMATS]:
        raise LensbenchError(f"unknown format {strange[0]!r}; figures are {', '.join(FORMATS)}")
    if not LOWEST_DPI <= dpi <= HIGHEST_DPI:
        raise LensbenchError(f"{dpi} dots per inch: {LOWEST_DPI} to {HIGHEST_DPI} can be drawn")
    if columns not in SHEETS:
        raise LensbenchError(f"{columns} columns: figures are as wide as 1 or 2")
    transfer, lenses, indices = transfer_frame(run), lens_frame(run), index_frame(run)
    of = unit(run.tables["models.csv"])
    with on(SHEETS[columns]), style():
        figures = {
            "transfer_penalty.png": transfer_penalty(transfer, of),
            "kl_by_layer.png": kl_by_layer(lenses, of),
            "penalty_by_distance.png": penalty_by_distance(transfer, of),
            "gain_visibility.png": gain_visibility(indices),
            "plane.png": plane(indices),
            "tolerances.png": tolerances(tolerance_frame(run)),
            "pair_penalty.png": pair_penalty(pair_frame(run), of),
            "visibility_by_distance.png": visibility_by_distance(distance_frame(run)),
        }
        if len(run.tables["probes.csv"]):
            figures["probes.png"] = probes(probe_frame(run), of)
            accuracies = accuracy_frame(run)
            if len(accuracies):
                figures["accuracy_by_layer.png"] = accuracy_by_layer(accuracies)
            heads = head_frame(run)
            if len(heads):
                figures["error_transport.png"] = error_transport(heads)
        if len(run.tables["curves.csv"]):
            figures["learning_curves.png"] = learning_curves(curve_frame(run))
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, figure in figures.items():
            for kind in formats:
                paths.append((folder / name).with_suffix(f".{kind}"))
                write_atomically(paths[-1], partial(write_figure, figure, kind=kind, dpi=dpi))
    return paths


def draw_plane(run: Run, path: Path) -> None:
    """Write the plane alone as a PNG."""
    with style():
        figure = plane(index_frame(run))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(write_figure, figure))


def write_figure(figure: Figure, path: Path, *, kind: str = "png", dpi: int = DPI) -> None:
    """The same figure gives the same bytes; letters are in the file itself (PDF: TrueType, SVG: outlines)."""
    with style():
        figure.savefig(path, format=kind, dpi=dpi, metadata=FORMATS[kind])


def transfer_frame(run: Run) -> pd.DataFrame:
    """``model, lens_layer, stream_layer, penalty_ce``, and ``layers``; no cell of the (L+1) x (L+1) grid is missing."""
    cell = ["lens_layer", "stream_layer"]
    table = run.tables["transfer.csv"].loc[lambda table: np.isfinite(table["penalty_ce"])]
    frames = []
    for _, (model, seed, layers) in run.tables["models.csv"][["model", "seed", "layers"]].iterrows():
        rows = table[(table["model"] == model) & (table["seed"] == seed)]
        missing = (layers + 1) ** 2 - len(rows[cell].drop_duplicates())
        if missing:
            raise LensbenchError(f"transfer.csv: {missing} cells of model {model}, seed {seed}, have no penalty_ce")
        frames.append(rows.assign(layers=layers))
    return pd.concat(frames).groupby(["model", "layers", *cell], sort=False, as_index=False)["penalty_ce"].mean()


def lens_frame(run: Run) -> pd.DataFrame:
    """``model, lens, stage, name, layer, kl`` and its interval: refined lenses where there are, closed ones elsewhere.

    The shared lens of the rotated view is ``rotated``. The logit lens at L, the model itself, is left out.
    """
    table = run.tables["lenses.csv"].fillna({"stage": "none"})
    frames = []
    for model, layers in run.tables["models.csv"].groupby("model", sort=False)["layers"].first().items():
        rotated = table[(table["model"] == f"{model}+rotated") & (table["lens"] == "shared")]
        rotated = rotated.assign(model=str(model), lens="rotated", stage="rotated")
        rows = pd.concat([table[(table["model"] == model) & (table["layer"] < layers)], rotated])
        rows = pd.concat([rows[rows["lens"] == lens] for lens in LENSES])
        if rows["kl"].isna().any():
            raise LensbenchError(f"lenses.csv, model {model}: {rows['kl'].isna().sum()} of {len(rows)} kl are missing")
        refined = rows["lens"].isin(rows.loc[rows["stage"] == "refined", "lens"])
        frames.append(rows[~refined | (rows["stage"] == "refined")])
    groups = pd.concat(frames).groupby(["model", "lens", "stage", "layer"], sort=False)
    frame = groups[["kl", "kl_ci_low", "kl_ci_high"]].mean().clip(lower=SMALLEST_KL).reset_index()
    stages = frame["stage"].map({"closed": " (closed)", "refined": " (refined)"}).fillna("")
    return frame.assign(name=frame["lens"].map(LENSES) + stages)


def index_frame(run: Run) -> pd.DataFrame:
    """One row per index and model, undefined ones too: ``value`` and its intervals, of seed ``all`` where there is one."""
    table = run.tables["indices.csv"]
    table = table.iloc[(table["seed"] == "all").argsort(kind="stable")].drop_duplicates(["index", "model"], keep="last")
    names = [*VISIBILITIES, "movement", "shared_consistency"]
    numbers = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    every = pd.MultiIndex.from_product([names, run.tables["models.csv"]["model"].unique()], names=["index", "model"])
    frame = table.set_index(["index", "model"])[numbers].reindex(every).astype(float).reset_index()
    known = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model").set_index("model")["known"]
    models = run.tables["models.csv"].drop_duplicates("model").set_index("model")
    images = models["bits_per_byte"].isna()  # an image has no bytes of text
    return frame.assign(known=frame["model"].map(known).fillna(""), images=frame["model"].map(images))


def shown_rows(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per model and ``keys``: of seed ``all`` where there is one."""
    table = table.iloc[(table["seed"] == "all").argsort(kind="stable")]
    return table.drop_duplicates(["model", *keys], keep="last")


def distance_frame(run: Run) -> pd.DataFrame:
    """``model, distance, value, ci_low, ci_high`` of gain visibility; not a number where undefined."""
    table = run.tables["indices.csv"]
    name = "gain_visibility_distance_"
    rows = shown_rows(table[table["index"].str.startswith(name)], ["index"])
    rows = rows.assign(distance=rows["index"].str.removeprefix(name).astype(int))
    order = {model: k for k, model in enumerate(run.tables["models.csv"]["model"].unique())}
    rows = rows.sort_values(["model", "distance"], key=lambda c: c.map(order) if c.name == "model" else c)
    numbers = ["value", "ci_low", "ci_high"]
    return rows[["model", "distance", *numbers]].astype(dict.fromkeys(numbers, float)).reset_index(drop=True)


def probe_frame(run: Run) -> pd.DataFrame:
    """``model, quantity, layer, other, value, ci_low, ci_high`` of what probes measured."""
    rows = shown_rows(run.tables["probes.csv"], ["quantity", "layer", "other"])
    rows = rows[rows["value"].notna()]
    return rows[["model", "quantity", "layer", "other", "value", "ci_low", "ci_high"]].reset_index(drop=True)


def head_frame(run: Run) -> pd.DataFrame:
    """``model, layer, head, score, ratio, found``: error transport of every head, of each model's first seed."""
    table = run.tables["probes.csv"]
    names = {"error_score": "score", "error_ratio": "ratio", "error_transport_found": "found"}
    rows = table[table["quantity"].isin(names)].drop_duplicates(["model", "quantity", "layer", "other"])
    if not len(rows):
        return pd.DataFrame(columns=["model", "layer", "head", *names.values()])
    wide = rows.pivot(index=["model", "layer", "other"], columns="quantity", values="value").reindex(
        columns=list(names)
    )
    frame = (
        wide.rename(columns=names).reset_index().rename(columns={"other": "head"}).astype({"layer": int, "head": int})
    )
    order = {model: k for k, model in enumerate(run.tables["models.csv"]["model"].unique())}
    return frame.sort_values(["model", "layer", "head"], key=lambda c: c.map(order) if c.name == "model" else c)


def accuracy_frame(run: Run) -> pd.DataFrame:
    """``model, lens, layer, value, ci_low, ci_high`` of accuracies; lens ``model``, without a layer, is the model itself."""
    table = run.tables["probes.csv"]
    rows = shown_rows(table[table["probe"] == "accuracy"], ["quantity", "layer"])
    lens = rows["quantity"].str.removesuffix("_accuracy").replace("accuracy", "model")
    return rows.assign(lens=lens)[["model", "lens", "layer", "value", "ci_low", "ci_high"]].reset_index(drop=True)


def tolerance_frame(run: Run) -> pd.DataFrame:
    """``model, index, tolerance, value, ci_low, ci_high``, means over seeds; not a number where undefined."""
    table = run.tables["tolerances.csv"]
    table = table[table["index"].isin(["gain_visibility", "gain_visibility_without_layer0"])]
    groups = table.groupby(["model", "index", "tolerance"], sort=False)
    return groups[["value", "ci_low", "ci_high"]].mean().reset_index()


def pair_frame(run: Run) -> pd.DataFrame:
    """``model, layer_i, layer_j, penalty, rotated_penalty``, means over seeds."""
    keys, values = ["model", "layer_i", "layer_j"], ["penalty", "rotated_penalty"]
    return run.tables["pairs.csv"].groupby(keys, sort=False)[values].mean().reset_index()


def curve_frame(run: Run) -> pd.DataFrame:
    """``model, train_tokens, positions, ce`` with its interval, over seeds where there are several, and mean ``seconds``."""
    seconds = run.tables["timings.csv"].groupby(["model", "train_tokens"], as_index=False)["seconds"].mean()
    frame = shown_curves(run.tables["curves.csv"]).merge(seconds, on=["model", "train_tokens"], how="left")
    if frame["ce"].isna().any():
        raise LensbenchError(f"curves.csv: {frame['ce'].isna().sum()} of {len(frame)} ce are missing")
    return frame


def panels_of(
    models: list[str], size: float, extra: float, *, sharey: bool, square: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per model, each ``size`` inches wide and high, and ``extra`` inches beside them.

    On a sheet the panels fill its width, and are lower than wide unless ``square``.
    """
    columns = abreast(len(models))
    rows = math.ceil(len(models) / columns)
    wide, high = max(columns * size + extra, 5), rows * size + 0.4
    sheet = _sheet.get()
    if sheet.width is not None:
        each = sheet.width / columns
        wide, high = sheet.width, rows * (min(each, 3.2) if square else min(0.8 * each, 1.9)) + 0.2
    figure = Figure(figsize=(wide, high), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for panel in panels[len(models) :]:
        panel.remove()
    return figure, list(panels[: len(models)])


def write_around(figure: Figure, title: str, caption: str) -> None:
    """The title and the caption. The last that is done to a figure on a sheet but for the names in the plane."""
    if _sheet.get().width is None:  # in a paper what a figure shows is said below it
        figure.suptitle(title, x=0.01, ha="left", size=10.5, weight="bold")
    # Letters of 7 points are an inch's seventeenth wide.
    text = textwrap.fill(caption, int(17 * figure.get_figwidth() * 7 / pt(7)))
    figure.supxlabel(text, x=0.01, ha="left", size=pt(7), color=GREY)
    if _sheet.get().width is not None:
        grow(figure, pt(7) * (1.3 * (text.count("\n") + 1) + 0.5))
        fit(figure)


def fit(figure: Figure) -> None:
    """On a narrow sheet: what is said twice is said once, long labels are broken, what would touch is left out."""
    places = {panel: place for panel in figure.axes if (place := panel.get_subplotspec()) is not None}
    for panel, place in places.items():
        left = [p for p, at in places.items() if at.rowspan == place.rowspan and at.colspan.stop <= place.colspan.start]
        below = [
            p for p, at in places.items() if at.colspan == place.colspan and at.rowspan.start >= place.rowspan.stop
        ]
        if any(p.get_ylabel() == panel.get_ylabel() for p in left):
            panel.set_ylabel("")
        if any(p.get_xlabel() == panel.get_xlabel() for p in below):
            panel.set_xlabel("")
    labels = [(panel, axis.label, k) for panel in places for k, axis in enumerate((panel.xaxis, panel.yaxis))]
    for _, label, _ in labels:
        label.set_in_layout(False)  # one that is too long would shrink the panels that it is measured by
    figure.draw_without_rendering()
    for panel, label, side in labels:
        label.set_in_layout(True)
        break_label(label, panel.bbox.size[side], side)
    figure.draw_without_rendering()
    # All are measured before the first changes: panels share axes.
    for axis, ticks in [(axis, ticks_apart(axis)) for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
        if ticks is not None:
            axis.set_major_locator(ticks)
    maps = [panel for panel in places if any(isinstance(c, QuadMesh) for c in panel.collections) and panel.texts]
    cells = {panel: panel.bbox.width / abs(np.subtract(*panel.get_xlim())) for panel in maps}
    # All or none: a heatmap with numbers beside one without would look like another kind.
    if any(text.get_window_extent().width > cells[panel] for panel in maps for text in panel.texts):
        for text in [text for panel in maps for text in panel.texts]:
            text.remove()


def break_label(label: Text, room: float, side: int) -> None:
    """Into as many lines as leave none longer than ``room`` pixels, along x (``side`` 0) or y (1); never in a formula."""
    whole = re.sub(r"\$[^$]*\$", lambda formula: formula[0].replace(" ", "\u00a0"), label.get_text())
    for lines in range(2, 5):
        if label.get_window_extent().size[side] <= room:
            return
        each = (textwrap.wrap(whole, width, break_long_words=False) for width in range(1, len(whole) + 1))
        label.set_text("\n".join(next(parts for parts in each if len(parts) <= lines)).replace("\u00a0", " "))


def ticks_apart(axis: Axis) -> Locator | None:
    """Fewer ticks for an axis whose labels would touch, else None; on a logarithmic one the roundest numbers stay."""
    low, high = sorted(axis.get_view_interval())
    ticks = [(tick.get_loc(), tick.label1) for tick in axis.get_major_ticks()]
    boxes = {
        at: label.get_window_extent().padded(2)
        for at, label in ticks
        if low <= at <= high and label.get_visible() and label.get_text()
    }
    if not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2)):
        return None
    if axis.get_scale() == "linear":
        whole = all(float(at).is_integer() for at in boxes)
        of_text = not isinstance(axis.get_major_locator(), MaxNLocator)
        return None if of_text else MaxNLocator(nbins=max(2, len(boxes) // 2), integer=whole)

    def roundness(at: float) -> tuple[int, float]:
        if at == 0:
            return 0, 0.0
        first = round(abs(at) / 10 ** math.floor(math.log10(abs(at)) + 1e-9))
        return {1: 1, 5: 2, 2: 3}.get(first, 4), -abs(at)

    stay: list[float] = []
    for at in sorted(boxes, key=roundness):
        if not any(boxes[at].overlaps(boxes[other]) for other in stay):
            stay.append(at)
    return FixedLocator(sorted(stay))


def colour_bar(figure: Figure, panels: list[Axes], label: str, **look: Any) -> None:
    """Of all heatmaps: beside them on a screen, below them on a sheet."""
    look |= {"ax": panels, "aspect": 12 * len(panels), "pad": 0.02}
    if _sheet.get().width is not None:
        look |= {"location": "bottom", "aspect": 40, "shrink": 0.8}
        grow(figure, 40)
    figure.colorbar(panels[0].collections[0], **look).set_label(label, size=pt(8))


def use_symlog(panel: Axes, axis: str, linear: float) -> None:
    """Linear up to ``linear``, logarithmic beyond. After plotting: seaborn would average on the scale of the axis."""
    getattr(panel, f"set_{axis}scale")("symlog", linthresh=linear, linscale=0.5)
    ticks = [linear * x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)]
    getattr(panel, f"{axis}axis").set_major_locator(FixedLocator([*(-x for x in ticks), 0.0, *ticks]))
    getattr(panel, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    panel.autoscale_view()


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


def cell_text(value: float, largest: float) -> str:
    """Three characters and a sign: two decimals below 1, whole nats from 10.

    Where the ``largest`` of a heatmap's cells is below 0.05 two decimals would tell nothing, so one digit and its power.
    """
    if largest < 0.05 and value != 0:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"
    return "0" if abs(value) < 0.005 else text.replace("0.", ".").replace("-", "−")


def kl_by_layer(frame: pd.DataFrame, of: str = "token") -> Figure:
    """Per model the KL to its own output at every layer, one line per lens."""
    models = list(frame["model"].unique())
    lenses = frame.drop_duplicates("name").set_index("name")
    look: dict[str, Any] = {"hue": "name", "hue_order": list(lenses.index), "style": "name"}
    look |= {"palette": lenses["lens"].map(LENS_COLOURS).to_dict(), "dashes": lenses["stage"].map(DASHES).to_dict()}
    figure, panels = panels_of(models, 2.6, 2.6, sharey=True)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model].sort_values("layer")
        sns.lineplot(rows, x="layer", y="kl", errorbar=None, lw=1.6, marker="o", ms=2.5, mew=0, ax=panel, **look)
        for lens, line in rows.groupby("lens"):
            band = line["layer"], line["kl_ci_low"], line["kl_ci_high"]
            panel.fill_between(*band, color=LENS_COLOURS[str(lens)], alpha=0.18, lw=0)
        lines, labels = panel.get_legend_handles_labels()
        panel.legend().remove()
        panel.set(title=model, yscale="log", xlabel="layer", ylabel=f"KL to the output (nats/{of})")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    beside(figure, lines, labels, handlelength=3)
    write_around(figure, "How far each layer's read-out is from the model's output", "Bands: 95 % intervals.")
    return figure


def accuracy_by_layer(frame: pd.DataFrame) -> Figure:
    """Per model the share of targets that each lens's most probable word is, at every layer, and the model's own share."""
    models = list(frame["model"].unique())
    figure, panels = panels_of(models, 2.6, 1.8, sharey=True)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        own = rows[rows["lens"] == "model"].iloc[0]
        panel.axhline(own["value"], color=GREY, lw=1.2, ls=":", label="the model")
        panel.axhspan(own["ci_low"], own["ci_high"], color=GREY, alpha=0.15, lw=0)
        for lens in ("logit", "tuned", "shared"):
            line = rows[rows["lens"] == lens].sort_values("layer")
            panel.plot(line["layer"], line["value"], "o-", color=LENS_COLOURS[lens], lw=1.5, ms=2.8, label=LENSES[lens])
            panel.fill_between(
                line["layer"].astype(float), line["ci_low"], line["ci_high"], color=LENS_COLOURS[lens], alpha=0.18, lw=0
            )
        panel.set(title=model, xlabel="layer", ylabel="held-out accuracy")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    handles = panels[0].get_legend_handles_labels()
    beside(figure, *handles)
    write_around(
        figure, "How often each layer's read-out is right", "Bands: 95 % intervals. Lenses: closed form, prior zero."
    )
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


def learning_curves(frame: pd.DataFrame) -> Figure:
    """Held-out cross-entropy against tokens and seconds of training, and by position in the context."""
    rows = 3 if _sheet.get().abreast < 3 else 1
    figure = new_figure(11.5, 3.6, 1.7 * rows + 0.3)
    against_tokens, against_seconds, by_position = figure.subplots(rows, 3 // rows, sharey=True)
    whole = frame[frame["positions"] == ALL]
    parts = [name for name in dict.fromkeys(frame["positions"]) if name != ALL]
    last = frame[frame["train_tokens"] == frame["train_tokens"].max()]
    models = list(dict.fromkeys(frame["model"]))
    for k, (model, look) in enumerate(zip(models, looks(len(models)), strict=True)):
        of = whole[whole["model"] == model].sort_values("train_tokens")
        at = last[(last["model"] == model) & (last["positions"] != ALL)].set_index("positions").reindex(parts)
        places = np.arange(len(parts)) + 0.06 * (k - (len(models) - 1) / 2)
        for panel, x, rows in (
            (against_tokens, of["train_tokens"], of),
            (against_seconds, of["seconds"], of),
            (by_position, places, at),
        ):
            spread = [rows["ce"] - rows["ce_ci_low"], rows["ce_ci_high"] - rows["ce"]]
            panel.errorbar(x, rows["ce"], yerr=spread, label=model, lw=1.4, ms=4, capsize=2, **look)
    against_tokens.set(xscale="log", xlabel="training tokens", ylabel="held-out cross-entropy (nats/token)")
    against_seconds.set(xscale="log", xlabel="seconds of training, as measured")
    by_position.set(xlabel="position in the context, largest budget", xticks=range(len(parts)), xticklabels=parts)
    for panel in (against_tokens, against_seconds):
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
        panel.xaxis.set_minor_formatter("")
        panel.xaxis.set_major_locator(FixedLocator(tick_values(whole, panel is against_tokens)))
    beside(figure, *by_position.get_legend_handles_labels())
    caption = (
        "Bars: 95 %, over seeds (all on the same documents) where there are several, else over documents. Each budget has a "
        "schedule of its own. Seconds: median step times steps, with another process beside it; no benchmark."
    )
    write_around(figure, "Who learns faster, by tokens and by seconds, and where in the context", caption)
    return figure


def in_context(table: pd.DataFrame, parts: list[str]) -> Figure:
    """Cross-entropy above the exact Bayes predictor's by position in the document, one panel per task."""
    with style():
        tasks = list(dict.fromkeys(table["task"]))
        figure, panels = panels_of(tasks, 3.2, 2.0, sharey=False)
        table = shown_curves(table, "task").drop_duplicates(["task", "model", "positions"])
        models = [name for name in dict.fromkeys(table["model"]) if name != BOUND]
        for panel, task in zip(panels, tasks, strict=True):
            for k, (model, look) in enumerate(zip(models, looks(len(models)), strict=True)):
                rows = table[(table["task"] == task) & (table["model"] == model)]
                rows = rows.set_index("positions").reindex(parts)
                spread = [rows["excess"] - rows["excess_ci_low"], rows["excess_ci_high"] - rows["excess"]]
                places = np.arange(len(parts)) + 0.06 * (k - (len(models) - 1) / 2)
                panel.errorbar(places, rows["excess"], yerr=spread, label=model, lw=1.4, ms=4, capsize=2, **look)
            panel.axhline(0, color=GREY, lw=0.8, zorder=1)
            panel.set(title=task, xlabel="position", ylabel="CE above the Bayes predictor's (nats/token)")
            panel.set(xticks=range(len(parts)), xticklabels=parts)
        beside(figure, *panels[0].get_legend_handles_labels())
        caption = "0: nothing more can be learned from the document. Bars: 95 %, over seeds where there are several."
        write_around(figure, "How much of its document a model fails to use", caption)
    return figure


def regression(table: pd.DataFrame) -> Figure:
    """Squared error of trained attention and its rivals, and the cosine of their sensitivities."""
    with style():
        rows = shown(table)
        shapes = dict.fromkeys(zip(rows["layers"], rows["attention"], strict=True))
        of_model = {key: f"{key[1]}, {key[0]} layer{'s' * (key[0] > 1)}" for key in shapes}
        figure = new_figure(9.0, 0.55 * len(of_model) + 1.9)
        left, right = figure.subplots(1, 2, sharey=True)
        kinds = {"": "trained", "gd": "gradient steps, best rates", "gd++": "gd++, best rates", "bayes": "Bayes"}
        kinds |= {"gd, another task": "steps of another task", "gd++, another task": "gd++ of another task"}
        for panel, quantity in ((left, "squared_error"), (right, "sensitivity_cosine")):
            of = rows[rows["quantity"] == quantity]
            for (kind, label), look in zip(kinds.items(), looks(len(kinds)), strict=True):
                each = of[of["against"] == kind]
                place = [list(of_model).index(key) for key in zip(each["layers"], each["attention"], strict=True)]
                y = np.array(place) + 0.1 * (list(kinds).index(kind) - 2.5)
                spread = [each["value"] - each["ci_low"], each["ci_high"] - each["value"]]
                panel.errorbar(
                    each["value"], y, xerr=spread, label=label, ms=5, lw=1.4, capsize=2, **{**look, "ls": ""}
                )
            panel.grid(False, axis="y")
        left.set(yticks=range(len(of_model)), yticklabels=list(of_model.values()), ylim=(len(of_model) - 0.5, -0.5))
        left.set(xlabel="squared error on new tasks")
        right.set(xlabel="cosine of sensitivities with the trained model")
        beside(figure, *left.get_legend_handles_labels())
        caption = "Bars: 95 %, over seeds where there are several. Sensitivity: the answer's gradient by the question."
        write_around(figure, "Is trained in-context regression a gradient step?", caption)
    return figure


def tick_values(whole: pd.DataFrame, of_tokens: bool) -> list[float]:
    """The budgets themselves; of seconds, powers of two that span them."""
    if of_tokens:
        return sorted(whole["train_tokens"].unique())
    seconds = whole["seconds"].clip(lower=1e-3)
    low, high = np.log2(seconds.min()), np.log2(seconds.max())
    return [float(2**k) for k in range(math.ceil(low), math.floor(high) + 1)]


def looks(count: int) -> list[dict[str, Any]]:
    """Colour, marker and dash of so many lines; no two are alike up to a hundred."""
    colours = sns.color_palette("colorblind").as_hex()
    marks, dashes = "osX^vDP*<>", ("-", "--", ":", "-.")
    return [
        {
            "color": colours[k % len(colours)],
            "marker": marks[k % len(marks)],
            "ls": dashes[k // len(colours) % len(dashes)],
        }
        for k in range(count)
    ]


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


def label_points(figure: Figure, panel: Axes, points: pd.DataFrame, taken: list[Any]) -> None:
    """Write each model's name beside its point, at the nearest place where it covers nothing that is there already."""
    figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in taken]
    boxes += [Bbox([centre - 15, centre + 15]) for centre in panel.transData.transform(points.iloc[:, :2])]
    for model, x, y, _ in points.itertuples(name=None):
        text = panel.annotate(
            model, (x, y), (0, 0), textcoords="offset points", size=pt(8.5), weight="bold", va="center"
        )
        for far, up, right in itertools.product((1, 2, 3.5, 5), (1, -1), (1, -1)):
            text.set(position=(9 * far * right, 12 * far * up), ha="left" if right > 0 else "right")
            box = text.get_window_extent()
            if all(panel.bbox.contains(*corner) for corner in box.corners()) and not box.count_overlaps(boxes):
                break
        if far > 1:
            line = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkB": 4}
            panel.annotate("", (x, y), text.get_position(), textcoords="offset points", arrowprops=line)
        boxes.append(box)
