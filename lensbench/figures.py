"""The pictures of a run, drawn from its tables and from nothing else.

One function per figure: a tidy frame in, a :class:`matplotlib.figure.Figure` out. :func:`draw_figures` writes them all.
Nothing here touches pyplot or leaves a setting of matplotlib changed, and the same tables give the same bytes.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from lensbench.errors import LensbenchError
from lensbench.results import Run, write_atomically

DPI = 150
ROTATED = "+rotated"
HEADLINE_TOLERANCE = 0.02  # measures.md: the headline matrix gives away at most 2 % of K_0 - best
ANNOTATED_LAYERS = 10  # the numbers of a larger heatmap could not be read
CLIP_PERCENTILE = 95
EDGE = 0.12  # inches
HEATMAP_COLUMNS, KL_COLUMNS = 4, 3

# Okabe and Ito's colour-blind-safe set without its yellow, which vanishes on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p"]  # 8 against 7 colours: 56 models before a pair repeats
GREY = "#666666"
WHITE_BOX = {"facecolor": "white", "linewidth": 0, "pad": 1.0}  # behind text that may lie on a line

LENSES = {
    "logit": ("logit lens", "#000000"),
    "tuned": ("tuned lens, one per layer", "#0072B2"),
    "shared": ("shared lens", "#D55E00"),
    "shared_bias": ("shared lens, one bias per layer", "#E69F00"),
    "shared_loo": ("shared lens, fitted without the layer", "#009E73"),
}
INTERVAL = ["ci_low", "ci_high", "fit_low", "fit_high"]
STAGES = {"refined": "-", "none": "-", "closed": "--"}  # in order of preference where only one can be drawn

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "axes.grid.axis": "both",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.axisbelow": True,
}


@contextmanager
def _style() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults, whatever the user's matplotlibrc says; all restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return styled


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """Write every figure of ``run`` as a PNG into ``folder`` and return their paths.

    All are drawn before the first is written: a table that cannot be drawn leaves the folder as it was.
    """
    transfer, lenses, indices = transfer_frame(run), lens_frame(run), index_frame(run)
    figures = {
        "transfer_penalty.png": transfer_penalty(transfer),
        "kl_by_layer.png": kl_by_layer(lenses),
        "penalty_by_distance.png": penalty_by_distance(transfer),
        "gain_visibility.png": gain_visibility(indices),
        "plane.png": plane(indices),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        write_atomically(folder / name, functools.partial(_save, figure))
        paths.append(folder / name)
    return paths


def _save(figure: Figure, path: Path) -> None:
    with _style():
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


# Tables to tidy frames: one seed or the mean, one setting, models in the order of models.csv.


def transfer_frame(run: Run) -> pd.DataFrame:
    """One row per model and cell of its (L+1) x (L+1) grid: ``penalty_ce`` of the headline setting, and ``layers``."""
    table = run.tables["transfer.csv"]
    chosen = _one_setting(
        table,
        ["stage", "prior", "tolerance"],
        lambda stage, prior, tolerance: (_distance(tolerance), prior != "identity", _stage_rank(stage)),
    )
    depths = run.tables["models.csv"].groupby("model", sort=False)["layers"].first()
    for (model, seed), cells in chosen.groupby(["model", "seed"], sort=False):
        known = depths.get(model, depths.get(_base(model)))
        layers = int(known) if known is not None else int(cells[["lens_layer", "stream_layer"]].to_numpy().max())
        finite = cells[np.isfinite(cells["penalty_ce"])]
        inside = finite[finite["lens_layer"].between(0, layers) & finite["stream_layer"].between(0, layers)]
        pairs = inside[["lens_layer", "stream_layer"]].drop_duplicates()
        missing = (layers + 1) ** 2 - len(pairs)
        where = f"transfer.csv, model {model}, seed {seed}"
        if missing:
            raise LensbenchError(f"{where}: {missing} of the {layers + 1} x {layers + 1} cells have no penalty_ce")
        if len(cells) != len(pairs):
            raise LensbenchError(f"{where}: {len(cells) - len(pairs)} cells too many for its {layers} layers")
        chosen.loc[cells.index, "layers"] = layers
    keys = ["model", "lens_layer", "stream_layer", "stage", "prior", "tolerance", "layers"]
    frame = _over_seeds(chosen, keys, ["penalty_ce"])
    return _ordered(frame.astype({"lens_layer": int, "stream_layer": int, "layers": int}), run)


def lens_frame(run: Run) -> pd.DataFrame:
    """One row per model, lens, stage and layer: ``kl`` and its interval; per stage the one prior most lenses have."""
    table = run.tables["lenses.csv"]
    table = table[table["lens"].isin(LENSES) & np.isfinite(table["kl"])].fillna({"stage": "none", "prior": "none"})
    if table.empty:
        raise LensbenchError(f"lenses.csv has no kl of any of the lenses {', '.join(LENSES)}")
    table = table.assign(stage=table["stage"].where(table["lens"] != "logit", "none"))
    per_stage = []
    for _, rows in table.groupby(["stage", table["lens"] == "logit"], sort=False):
        per_stage.append(_one_setting(rows, ["prior"], lambda prior: (prior != "zero",), per=["model", "lens"]))
    keys = ["model", "lens", "stage", "prior", "layer"]
    frame = _over_seeds(pd.concat(per_stage), keys, ["kl", "kl_ci_low", "kl_ci_high"])
    return _ordered(frame.astype({"layer": int}), run)


def index_frame(run: Run) -> pd.DataFrame:
    """One row per model and index: ``value`` (NaN where undefined), its interval and its spread over refits."""
    table = run.tables["indices.csv"]
    wanted = ["gain_visibility", "shared_consistency", "movement", "gain_visibility_adjacent"]
    for index in wanted[:3]:
        if not (table["index"] == index).any():
            raise LensbenchError(f"indices.csv has no row of {index}: figures need it, if only as undefined")
    table = table[table["index"].isin(wanted)].fillna({"stage": "none"})
    table = _one_setting(table, ["stage"], lambda stage: (_stage_rank(stage),), per=["model", "index"])
    table = pd.concat(
        _one_setting(rows, ["tolerance"], lambda tolerance: (_distance(tolerance),))
        for _, rows in table.groupby("index", sort=False)
    )
    table = _means_first(table, ["model", "index"])
    for (model, name), rows in table.groupby(["model", "index"], sort=False):
        if len(rows) > 1:
            seeds = ", ".join(rows["seed"])
            raise LensbenchError(f"indices.csv: {name} of {model} has seeds {seeds} but no row with seed all")
    columns = ["model", "index", "stage", "tolerance", "seed", "value", *INTERVAL]
    return _ordered(table[columns].reset_index(drop=True), run)


def _base(model: Any) -> str:
    return str(model).removesuffix(ROTATED)


def _stage_rank(stage: str) -> int:
    return list(STAGES).index(stage) if stage in STAGES else len(STAGES)


def _distance(tolerance: float) -> float:
    return math.inf if pd.isna(tolerance) else abs(tolerance - HEADLINE_TOLERANCE)


def _one_setting(
    table: pd.DataFrame, columns: list[str], rank: Callable[..., tuple], per: Sequence[str] = ("model",)
) -> pd.DataFrame:
    """The rows of the one setting of ``columns`` that covers most models; between equals the lowest ``rank``."""
    settings = pd.Series(
        [tuple(None if pd.isna(x) else x for x in row) for row in table[columns].itertuples(index=False, name=None)],
        index=table.index,
    )
    best = min(
        settings.unique(),
        key=lambda setting: (-len(table.loc[settings == setting, list(per)].drop_duplicates()), *rank(*setting)),
    )
    return table[[setting == best for setting in settings]].copy()


def _means_first(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Drop the single seeds wherever there is a row with seed 'all'."""
    is_mean = table["seed"] == "all"
    has_mean = is_mean.groupby([table[key] for key in keys], dropna=False).transform("any")
    return table[is_mean | ~has_mean]


def _over_seeds(table: pd.DataFrame, keys: list[str], numbers: list[str]) -> pd.DataFrame:
    """The row with seed 'all' where there is one, else the mean over seeds; ``seed`` says which."""
    groups = _means_first(table, keys).groupby(keys, sort=False, dropna=False)
    frame = groups[numbers].mean()
    frame["seed"] = groups["seed"].agg(lambda seeds: seeds.iloc[0] if len(seeds) == 1 else "mean")
    return frame.reset_index()


def _ordered(frame: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Models as in models.csv, a rotated view behind its model, unknown ones last."""
    order = list(dict.fromkeys(run.tables["models.csv"]["model"]))
    seen = list(dict.fromkeys(frame["model"]))

    def place(model: str) -> tuple[int, int, int]:
        if model in order:
            return order.index(model), 0, 0
        known = _base(model) in order
        return (order.index(_base(model)) if known else len(order)), 1, seen.index(model)

    position = {model: at for at, model in enumerate(sorted(seen, key=place))}
    return frame.sort_values("model", key=lambda models: models.map(position), kind="stable", ignore_index=True)


def _models(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["model"]))


# What the figures have in common.


class _Frame(NamedTuple):
    title: str
    subtitle: str
    caption: str = ""


def _layout(figure: Figure, words: _Frame, legend: Sequence[Artist] = (), compress: bool = False) -> None:
    """Title and subtitle on top, legend and caption at the bottom, the axes in what is left; nothing overlaps."""
    width, height = figure.get_size_inches()
    renderer = FigureCanvasAgg(figure).get_renderer()

    def inches(artist: Any) -> Bbox:
        return artist.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted())

    def write(text: str, size: float, y: float, va: str, **kwargs: Any) -> Bbox:
        written = figure.text(EDGE / width, y / height, "", size=size, va=va, ha="left", **kwargs)
        for characters in range(int(200 * width / size), 20, -4):  # generous at first, then until it fits
            written.set_text("\n".join(textwrap.fill(line, characters) for line in text.split("\n")))
            if inches(written).width <= width - 2 * EDGE:
                break
        return inches(written)

    top = write(words.title, 12, height - EDGE, "top", weight="bold").y0 - 0.06
    top = write(words.subtitle, 8.5, top, "top", color="#444444").y0 - 0.08
    bottom = EDGE
    if words.caption:
        bottom = write(words.caption, 7.5, bottom, "bottom", color=GREY).y1 + 0.08
    for columns in range(len(legend), 0, -1):
        place: dict[str, Any] = {"bbox_to_anchor": (0.5, bottom / height), "borderpad": 0.2}
        box = figure.legend(handles=list(legend), ncols=columns, loc="lower center", **place)
        box.set_in_layout(False)
        extent = inches(box)
        if extent.width <= width - 2 * EDGE or columns == 1:
            bottom = extent.y1 + 0.08
            break
        box.remove()
    rect = (0, bottom / height, 1, (top - bottom) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=EDGE, h_pad=0.06, wspace=0.02, rect=rect, compress=compress))


def _panels(
    count: int, columns: int, size: tuple[float, float], extra: tuple[float, float], **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """A grid of ``count`` panels of ``size`` inches, with room of ``extra`` inches for what surrounds them."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.6, columns * size[0] + extra[0]), rows * size[1] + extra[1]), dpi=DPI)
    grid = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for empty in grid[count:]:
        empty.remove()
    return figure, list(grid[:count])


def _looks(models: Iterable[str]) -> dict[str, tuple[str, str]]:
    return {model: (COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]) for k, model in enumerate(models)}


def _seeds(frame: pd.DataFrame) -> str:
    """How the rows came from seeds, for a subtitle."""
    seeds = list(dict.fromkeys(frame["seed"]))
    single = [seed for seed in seeds if seed not in ("all", "mean")]
    if not single:
        return "mean over seeds"
    text = f"seed {single[0]}" if len(single) == 1 else f"seeds {', '.join(single)}"
    return text if len(single) == len(seeds) else f"mean over seeds, or {text}"


def _setting(frame: pd.DataFrame) -> str:
    """Stage, prior and tolerance in words."""
    words = []
    stages = [stage for stage in dict.fromkeys(frame["stage"]) if stage != "none"]
    if stages:
        words.append(f"stage {' and '.join(stages)}")
    if "prior" in frame:
        words.append(f"prior {' and '.join(dict.fromkeys(map(str, frame['prior'])))}")
    tolerances = [f"{100 * tolerance:g} %" for tolerance in frame["tolerance"].dropna().unique()]
    if tolerances:
        words.append(f"tolerance {' and '.join(tolerances)} of $K_0$ − best")
    return ", ".join(words)


def _use_symlog(panel: Axes, which: str, threshold: float, largest: float) -> None:
    """Linear up to ``threshold``, logarithmic beyond."""
    factors = (1, 3) if largest < 1e4 * threshold else (1,)
    steps = [threshold * factor * 10.0**power for power in range(0, 12) for factor in factors]
    ticks = [-step for step in reversed(steps)] + [-threshold / 2, 0, threshold / 2] + steps
    getattr(panel, f"set_{which}scale")("symlog", linthresh=threshold, linscale=1)
    axis: Axis = getattr(panel, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def _short(value: float) -> str:
    """At most two significant digits, three characters and a sign; whole nats from 10."""
    size = abs(value)
    if size < 0.005:
        return "0"
    digits = 2 if size < 0.995 else 1 if size < 9.95 else 0
    text = f"{value:.{digits}f}" if size < 9999.5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−")


# The figures.


@_styled
def transfer_penalty(frame: pd.DataFrame) -> Figure:
    """One heatmap per model, all on one colour scale: lens of layer i (rows) read at layer j (columns)."""
    models = _models(frame)
    cells = frame.loc[frame["lens_layer"] != frame["stream_layer"], "penalty_ce"].to_numpy()
    vmin, vmax, extend = _penalty_limits(cells)
    norm, colours = Normalize(vmin, vmax), _penalty_colours(vmin, vmax)
    annotated = [layers for layers in frame["layers"].unique() if layers <= ANNOTATED_LAYERS]
    side = min(3.9, max(2.6, 0.36 * (max(annotated, default=10) + 1)))
    figure, panels = _panels(len(models), HEATMAP_COLUMNS, (side + 0.45, side + 0.5), (1.3, 0.8))
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        layers = int(rows["layers"].iloc[0])
        grid = rows.pivot(index="lens_layer", columns="stream_layer", values="penalty_ce").to_numpy()  # (L+1, L+1)
        image = panel.imshow(grid, cmap=colours, norm=norm, interpolation="nearest", aspect="equal")
        step = 1 if layers <= ANNOTATED_LAYERS else math.ceil(layers / 8)
        ticks = [layer for layer in range(0, layers, step) if layers - layer > 0.6 * step] + [layers]
        panel.set_xticks(ticks)
        panel.set_yticks(ticks, [*map(str, ticks[:-1]), "logit"])
        panel.tick_params(length=2)
        panel.spines[:].set_visible(False)
        panel.set_title(textwrap.fill(model, 26))
        panel.set_xlabel("stream layer $j$")
        panel.set_ylabel("lens of layer $i$")
        if layers <= ANNOTATED_LAYERS:
            for (i, j), value in np.ndenumerate(grid):
                panel.text(
                    j, i, _short(value), ha="center", va="center", size=6.5, color=_ink(colours(float(norm(value))))
                )
    slender: dict[str, Any] = {"fraction": 0.05, "pad": 0.02, "aspect": 22 * math.ceil(len(models) / HEATMAP_COLUMNS)}
    bar = figure.colorbar(image, ax=panels, extend=extend, extendfrac=0.04, **slender)
    label = "transfer penalty $C_{ij} - C_{jj}$ (nats/token)"
    if extend in ("max", "both"):
        label += f"\nclipped at {_short(vmax)}: {CLIP_PERCENTILE}th percentile off the diagonal"
    if extend in ("min", "both"):
        label += f"{', and' if extend == 'both' else chr(10) + 'clipped'} at {_short(vmin)}"
    bar.set_label(label, size=8, linespacing=1.5)
    bar.outline.set_visible(False)
    words = _Frame(
        "Transfer penalty: cost of reading layer $j$ through the lens of layer $i$",
        f"{_setting(frame)}; {_seeds(frame)}. Above the diagonal the lens comes from an earlier layer than the stream.",
    )
    _layout(figure, words, compress=True)
    return figure


def _penalty_limits(cells: np.ndarray) -> tuple[float, float, str]:
    """One scale for all models, clipped where a few cells would stretch it; negatives only where they matter."""
    ceiling = float(np.percentile(cells, CLIP_PERCENTILE, method="lower"))
    highest, lowest = float(cells.max()), float(cells.min())
    vmax = max(highest if highest <= 2.5 * ceiling else ceiling, 1e-3)
    vmin = max(lowest, -vmax) if lowest < -0.05 * vmax else 0.0
    over, under = highest > vmax, lowest < vmin < 0
    return vmin, vmax, "both" if over and under else "max" if over else "min" if under else "neither"


def _penalty_colours(vmin: float, vmax: float) -> Colormap:
    """Sequential from 0, or a diverging map cut so that a nat is one step of colour everywhere and 0 stays white."""
    if vmin == 0:
        return matplotlib.colormaps["magma_r"]
    return LinearSegmentedColormap.from_list(
        "penalty", matplotlib.colormaps["RdBu_r"](np.linspace(0.5 + 0.5 * vmin / vmax, 1.0, 256))
    )


def _ink(rgba: Sequence[float]) -> str:
    """Black or white, whichever stands out (WCAG relative luminance)."""
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in rgba[:3]]
    return "#000000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "#FFFFFF"


def _darker(colour: str) -> tuple[float, ...]:
    """For text: the lighter colours are too pale on white."""
    return tuple(0.75 * x for x in to_rgb(colour))


@_styled
def kl_by_layer(frame: pd.DataFrame) -> Figure:
    """Per model the KL to its own output at every layer, one line per lens and stage."""
    all_models = _models(frame)
    models = [m for m in all_models if not (m.endswith(ROTATED) and _base(m) in all_models)]
    drawn = frame[frame["model"].isin(models) | (frame["lens"] == "shared")]
    positive = drawn.loc[drawn["kl"] > 1e-6, "kl"]
    log = bool(len(positive)) and positive.max() > 30 * positive.min()
    figure, panels = _panels(len(models), KL_COLUMNS, (2.9, 2.5), (0.6, 2.0), sharey=True)
    used: dict[tuple[str, str], Line2D] = {}
    hidden = False
    for k, (panel, model) in enumerate(zip(panels, models, strict=True)):
        views = [(model, lens, False) for lens in LENSES]
        if model + ROTATED in all_models:
            views.append((model + ROTATED, "shared", True))
        for name, lens, rotated in views:
            rows = frame[(frame["model"] == name) & (frame["lens"] == lens)]
            stages = sorted(rows["stage"].unique(), key=_stage_rank)
            for stage in stages[:1] if rotated else stages:
                line = rows[rows["stage"] == stage].sort_values("layer")
                if log:
                    hidden |= bool((line["kl"] <= 1e-6).any())
                    line = line[line["kl"] > 1e-6]
                label, colour = LENSES[lens]
                style = STAGES.get(stage, "-.")
                if rotated:
                    label, colour, style = "shared lens, rotated view", "#CC79A7", ":"
                label += f" ({stage})" if stage != "none" else ""
                width = 1.2 if stage == "closed" and not rotated else 1.8
                x, y = line["layer"], line["kl"]
                (curve,) = panel.plot(x, y, style, color=colour, lw=width, marker="o", ms=2.5, label=label)
                low = line["kl_ci_low"].clip(lower=positive.min() / 2) if log else line["kl_ci_low"]
                panel.fill_between(x, low, line["kl_ci_high"], color=colour, alpha=0.18, lw=0)
                used.setdefault((lens + ROTATED if rotated else lens, stage), curve)
        if log:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        panel.grid(True)
        panel.set_title(textwrap.fill(model, 30))
        panel.set_xlabel("layer")
        if k % KL_COLUMNS == 0:
            panel.set_ylabel("KL to the model's output\n(nats/token)")
    if not log:
        panels[0].set_ylim(bottom=0)
    keys = [(lens, stage) for lens in [*LENSES, "shared" + ROTATED] for stage in [*STAGES, *frame["stage"].unique()]]
    handles = [used[key] for key in dict.fromkeys(keys) if key in used]
    priors = frame.loc[frame["stage"] != "none"].groupby("stage", sort=False)["prior"].first()
    fits = ", ".join(f"{stage}: prior {prior}" for stage, prior in priors.items())
    caption = "Bands: 95 % intervals" + (", averaged over seeds." if "mean" in set(frame["seed"]) else ".")
    if hidden:
        caption += " On the log axis a KL of 0 is not drawn: the logit lens at the last layer is the model itself."
    words = _Frame("How far each layer's read-out is from the model's output", f"{fits}; {_seeds(frame)}", caption)
    _layout(figure, words, handles)
    return figure


@_styled
def penalty_by_distance(frame: pd.DataFrame) -> Figure:
    """Penalty against the signed distance j - i between fitted lenses: right of 0 the lens is the earlier layer's."""
    rows = frame[(frame["lens_layer"] != frame["stream_layer"])]
    rows = rows[(rows["lens_layer"] < rows["layers"]) & (rows["stream_layer"] < rows["layers"])]
    if rows.empty:
        raise LensbenchError("transfer.csv: no model has two layers below its last, so there is no distance to draw")
    rows = rows.assign(distance=rows["stream_layer"] - rows["lens_layer"])
    models = _models(rows)
    figure = Figure(figsize=(7.2, 4.8), dpi=DPI)
    panel = figure.subplots()
    sizes = rows["penalty_ce"].abs()
    typical = float(sizes.median())
    symlog = sizes.max() > 15 * max(typical, 0.02)
    if symlog:
        _use_symlog(panel, "y", 10.0 ** math.floor(math.log10(max(typical, 0.02))), float(sizes.max()))
    panel.axhline(0, color=GREY, lw=0.8, zorder=1)
    panel.axvline(0, color=GREY, lw=0.8, zorder=1)
    looks = _looks(models)
    for k, model in enumerate(models):
        colour, marker = looks[model]
        own = rows[rows["model"] == model]
        dodge = 0.3 * ((k + 0.5) / len(models) - 0.5)
        panel.scatter(own["distance"] + dodge, own["penalty_ce"], s=9, color=colour, marker=marker, alpha=0.28, lw=0)
        mean = own.groupby("distance")["penalty_ce"].mean()
        for side, style in ((mean[mean.index > 0], "-"), (mean[mean.index < 0], "--")):
            panel.plot(side.index + dodge, side, style, color=colour, marker=marker, ms=5, lw=1.8, mec="white", mew=0.6)
    reach = int(rows["distance"].abs().max())
    panel.set_xlim(-reach - 0.5, reach + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    panel.grid(True, axis="y")
    panel.set_xlabel("distance $|i - j|$ between lens and stream (layers)")
    scale = "; linear near 0, log beyond" if symlog else ""
    panel.set_ylabel(f"transfer penalty $C_{{ij}} - C_{{jj}}$\n(nats/token{scale})")
    panel.set_title("← backward: the lens is the later layer's", loc="left", size=8.5, color=GREY)
    panel.set_title("forward: the lens is the earlier layer's →", loc="right", size=8.5, color=GREY)
    handles = [Line2D([], [], color=looks[m][0], marker=looks[m][1], lw=1.8, ms=5, label=m) for m in models]
    styles = {"mean, forward": "-", "mean, backward": "--"}
    handles += [Line2D([], [], color=GREY, ls=style, label=label) for label, style in styles.items()]
    handles.append(Line2D([], [], color=GREY, ls="", marker="o", ms=3, alpha=0.5, label="one pair of layers"))
    words = _Frame(
        "Does the transfer penalty grow with the distance between layers?",
        f"{_setting(rows)}; {_seeds(rows)}. Layers 0 to L − 1, without the logit lens.",
    )
    _layout(figure, words, handles)
    return figure


@_styled
def gain_visibility(frame: pd.DataFrame) -> Figure:
    """Per model how much of the later layers' gain a fixed lens sees, and beside it how much moves under that lens."""
    models = _models(frame)
    figure = Figure(figsize=(8.2, 0.5 * len(models) + 2.6), dpi=DPI)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kinds = {
        "gain_visibility": (left, "gain visibility, all pairs of layers", "o", "#0072B2"),
        "gain_visibility_adjacent": (left, "gain visibility, adjacent layers", "s", "#D55E00"),
        "movement": (right, "movement, all pairs of layers", "D", "#009E73"),
    }
    handles = []
    undefined = False
    two = (frame["index"] == "gain_visibility_adjacent").any()
    for index, (panel, label, marker, colour) in kinds.items():
        rows = _by_model(frame, index)
        if not rows:
            continue
        shift = {"gain_visibility": -0.17, "gain_visibility_adjacent": 0.17}.get(index, 0.0) if two else 0.0
        for at, model in enumerate(models):
            row, height = rows.get(model, {}), [at + shift] * 2
            if not math.isfinite(row.get("value", math.nan)):
                undefined = True
                word = "undefined" if row else "not measured"
                note: dict[str, Any] = {"size": 7.5, "style": "italic", "color": colour, "bbox": WHITE_BOX}
                panel.text(0.02, at + shift, word, transform=panel.get_yaxis_transform(), va="center", **note)
                continue
            thick: dict[str, Any] = {"lw": 4.5, "alpha": 0.5, "solid_capstyle": "butt", "zorder": 2}
            panel.plot([row["fit_low"], row["fit_high"]], height, color=colour, lw=0.9, zorder=2)
            panel.plot([row["ci_low"], row["ci_high"]], height, color=colour, **thick)
            panel.plot(row["value"], at + shift, marker, color=colour, ms=5, mew=0, zorder=3)
        handles.append(Line2D([], [], color=colour, marker=marker, lw=0.9, ms=5, mew=0, label=label))
    for panel, indices in ((left, list(kinds)[:2]), (right, ["movement"])):
        numbers = frame[frame["index"].isin(indices)]
        panel.axvline(0, color="#333333", lw=0.9, zorder=1)
        panel.grid(True, axis="x")
        if _far(numbers["value"]):
            _use_symlog(panel, "x", 1.0, float(numbers["value"].abs().max()))
        _limit(panel, "x", numbers, include=(0.0, 1.0), pad=0.06)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    left.set_yticks(range(len(models)), models)
    left.set_ylim(len(models) - 0.5, -0.5)
    left.set_xlabel("gain visibility (share of the own gain)")
    right.set_xlabel("movement (share of the own gain)")
    read = frame[frame["index"] != "shared_consistency"]
    caption = "Thick: 95 % interval with the lenses held fixed (seed all: over seeds); thin: range over refits."
    caption += " Undefined: the reason is in indices.csv." if undefined else ""
    words = _Frame(
        "Does a fixed lens see the later layers' gain, and does anything move?",
        f"{_setting(read)}; {_seeds(read)}. Above 0: refinement shows; 0 without movement: carried along; "
        "0 with movement: no verdict; below 0: the representation changes.",
        caption,
    )
    _layout(figure, words, handles)
    return figure


def _by_model(frame: pd.DataFrame, index: str) -> dict[str, dict[str, float]]:
    """The numbers of one index, per model."""
    rows = frame[frame["index"] == index].set_index("model")[["value", *INTERVAL]].astype(float)
    return {str(model): {str(name): float(x) for name, x in row.items()} for model, row in rows.iterrows()}


def _far(values: pd.Series) -> bool:
    """Would a linear axis squeeze [-1, 1], where the verdicts are, into a corner?"""
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and float(finite.abs().max()) > 6


def _limit(panel: Axes, which: str, rows: pd.DataFrame, include: tuple[float, float], pad: float) -> None:
    """Limits that show every value; an interval may run off the frame, beyond the values' own spread."""
    rows = rows[np.isfinite(rows["value"])]
    low, high = min([*rows["value"], include[0]]), max([*rows["value"], include[1]])
    room = max(0.5, high - low)
    ends = rows[[column for column in INTERVAL if column in rows]].to_numpy(float)
    ends = np.clip(ends[np.isfinite(ends)], low - room, high + room)
    scale = getattr(panel, f"{which}axis").get_transform()
    start, end = scale.transform(np.array([min([low, *ends]), max([high, *ends])]))
    margin = pad * (end - start)
    getattr(panel, f"set_{which}lim")(*scale.inverted().transform(np.array([start - margin, end + margin])))


@_styled
def plane(frame: pd.DataFrame) -> Figure:
    """Consistency against visibility, movement as the marker's size: the models of known answer are its landmarks."""
    nowhere = dict.fromkeys(["value", *INTERVAL], math.nan)
    axes = {"x": ("gain_visibility", "visibility"), "y": ("shared_consistency", "consistency")}
    x, y = (_by_model(frame, index) for index, _ in axes.values())
    movement = {model: row["value"] for model, row in _by_model(frame, "movement").items()}
    drawn, left_out = [], []
    for model in _models(frame):
        missing = [
            name
            for (_, name), rows in zip(axes.values(), (x, y), strict=True)
            if not math.isfinite(rows.get(model, nowhere)["value"])
        ]
        if missing:
            left_out.append(f"{model} ({' and '.join(missing)})")
        else:
            drawn.append(model)

    figure = Figure(figsize=(8.0, 6.0), dpi=DPI)
    panel = figure.subplots()
    for which, (index, _) in axes.items():
        rows = frame[(frame["index"] == index) & frame["model"].isin(drawn)].drop(columns=["fit_low", "fit_high"])
        if _far(rows["value"]):
            _use_symlog(panel, which, 1.0, float(rows["value"].abs().max()))
        _limit(panel, which, rows, include=(-0.1, 1.0), pad=0.07 if which == "x" else 0.13)
    panel.grid(True)
    rulers = [
        panel.axvline(0, color="#999999", lw=0.9, zorder=1),
        panel.axhline(0, color="#999999", lw=0.9, zorder=1),
        panel.axhline(1, color="#999999", lw=0.9, ls=(0, (4, 3)), zorder=1),
    ]
    panel.set_xlabel("gain visibility (share of the later layers' gain that a fixed lens sees)")
    panel.set_ylabel("shared consistency (0 = random bases, 1 = one lens does all)")
    faint: dict[str, Any] = {"color": "#7A7A7A", "size": 8.5, "style": "italic", "zorder": 1.5, "bbox": WHITE_BOX}
    inside = panel.transAxes
    landmarks = [
        panel.text(0.985, 0.975, "refinement ↗", transform=inside, ha="right", va="top", **faint),
        panel.text(0.015, 0.025, "↙ re-representation", transform=inside, ha="left", va="bottom", **faint),
        panel.annotate(
            "carry-along\n(visibility 0, movement 0)",
            (0, 0.975),
            xycoords=panel.get_xaxis_transform(),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            **faint,
        ),
    ]

    moved = [movement[model] for model in drawn if math.isfinite(movement.get(model, math.nan))]
    top = _round_up(max([*moved, 0.1]))

    def area(value: float) -> float:
        """In points^2; linear in movement, with a smallest size that can still be seen."""
        return 18 + 260 * max(value, 0.0) / top if math.isfinite(value) else 40

    looks = _looks(_models(frame))
    points = {}
    for model in drawn:
        colour, _ = looks[model]
        here, size = (x[model]["value"], y[model]["value"]), movement.get(model, math.nan)
        points[model] = _Point(
            here,
            ((x[model]["ci_low"], here[1]), (x[model]["ci_high"], here[1])),
            ((here[0], y[model]["ci_low"]), (here[0], y[model]["ci_high"])),
            area(size),
            colour,
        )
        marker = "o" if math.isfinite(size) else "X"
        panel.scatter(*here, s=area(size), marker=marker, color=colour, alpha=0.4, lw=0, zorder=3)
        panel.scatter(*here, s=9, color=colour, lw=0, zorder=5)
        for bar in points[model].bars:
            panel.plot(*zip(*bar, strict=True), color=colour, lw=1.3, zorder=4)

    ghost: dict[str, Any] = {"ls": "", "color": GREY, "alpha": 0.45, "mew": 0}
    shown = (0.0, top / 2, top)
    sizes = [Line2D([], [], marker="o", ms=math.sqrt(area(value)), label=f"{value:g}", **ghost) for value in shown]
    if len(moved) < len(drawn):
        sizes.append(Line2D([], [], marker="X", ms=6, label="undefined", **ghost))
    title: dict[str, Any] = {"title": "movement\n(share of\nown gain)", "title_fontsize": 8, "alignment": "left"}
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "borderaxespad": 0}
    panel.legend(handles=sizes, labelspacing=1.1, handletextpad=0.9, **title, **where)
    read = frame[frame["index"].isin(["gain_visibility", "shared_consistency", "movement"])]
    caption = "Error bars: 95 % intervals with the lenses held fixed (seed all: over seeds)."
    if left_out:
        caption += f"\nNot drawn because undefined or not measured: {', '.join(left_out)}."
    words = _Frame(
        "Is one prediction refined in one representation?",
        f"{_setting(read)}; {_seeds(read)}. "
        "Refinement needs one lens that serves all layers and a gain that shows through a fixed lens.",
        caption,
    )
    _layout(figure, words)
    _label_points(figure, panel, points, landmarks, rulers)
    return figure


class _Point(NamedTuple):
    here: tuple[float, float]
    across: tuple[tuple[float, float], tuple[float, float]]
    along: tuple[tuple[float, float], tuple[float, float]]
    area: float  # of its marker, points^2
    colour: str

    @property
    def bars(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """The ends of its error bars, those that are defined."""
        return [bar for bar in (self.across, self.along) if np.isfinite(bar).all()]


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * unit >= value * (1 - 1e-9))


ANGLES = np.deg2rad([45, 135, 315, 225, 90, 270, 0, 180, 22, 158, 338, 202, 67, 113, 293, 247])


def _label_points(
    figure: Figure, panel: Axes, points: dict[str, _Point], fixed: Sequence[Any], rulers: Sequence[Line2D]
) -> None:
    """Write each model's name near its point where it touches no marker, error bar, landmark or other name.

    A name would rather not lie on a ruler either. Candidates go outward in rings; a name that had to go far gets a
    thin line to its point.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are measured in pixels: nothing may move any more
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = panel.get_window_extent(renderer)
    unit = figure.dpi / 72  # pixels per point
    to_pixels = panel.transData.transform

    taken = [text.get_window_extent(renderer) for text in fixed]
    avoided = [ruler.get_window_extent(renderer) for ruler in rulers]
    for point in points.values():
        centre, radius = to_pixels(point.here), math.sqrt(point.area) / 2 * unit
        taken.append(Bbox([centre - radius, centre + radius]))
        taken += [Bbox([to_pixels(low) - unit, to_pixels(high) + unit]) for low, high in point.bars]
    for model, point in points.items():
        home, radius = to_pixels(point.here), math.sqrt(point.area) / 2 * unit
        pixels: dict[str, Any] = {"xycoords": "figure pixels", "textcoords": "figure pixels", "zorder": 6}
        middle: dict[str, Any] = {"ha": "center", "va": "center", "size": 8.5, "weight": "bold"}
        text = panel.annotate(model, tuple(home), tuple(home), color=_darker(point.colour), **middle, **pixels)
        extent = text.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2
        best, best_ring, least = home, 0, math.inf
        for ring in range(9):
            for angle in ANGLES:
                way = np.array([math.cos(angle), math.sin(angle)])
                centre = home + way * ((4 + 9 * ring) * unit + radius) + half * np.clip(way * 1.6, -1, 1)
                spot = Bbox([centre - half - unit, centre + half + unit])
                outside = spot.x0 < frame.x0 or spot.x1 > frame.x1 or spot.y0 < frame.y0 or spot.y1 > frame.y1
                touched = sum(spot.overlaps(other) for other in taken)
                cost = ring + 100 * outside + 10 * touched + 1.5 * sum(spot.overlaps(other) for other in avoided)
                if cost < least:
                    best, best_ring, least = centre, ring, cost
        text.set_position((best[0], best[1]))
        taken.append(Bbox([best - half, best + half]))
        if best_ring >= 2:
            near = np.clip(home, best - half - unit, best + half + unit)
            line = panel.transData.inverted().transform([home, near])
            panel.plot(line[:, 0], line[:, 1], color=point.colour, lw=0.6, alpha=0.7, zorder=2)
