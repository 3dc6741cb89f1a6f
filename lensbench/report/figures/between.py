"""What lenses of one model read in another: a matrix over training time, and penalties by layer next to their null."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lensbench.measures.between import NONE, STATES_HEAD
from lensbench.report.figures.findings import by_model
from lensbench.report.figures.layout import colour_bar, legend_outside, panel_for_each, title_and_caption
from lensbench.report.figures.style import ANNOTATED_LAYERS, BLUE, GREEN, GREY, cell_text, pt, style
from lensbench.report.figures.transfer import cost_heatmap
from lensbench.results.between import LATER

TIME = "over training"
"""The kind of a panel that is a matrix over the checkpoints of a training"""

LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "penalty": ("through the map", {"color": BLUE, "marker": "o", "ls": "-"}),
    "null_penalty": ("map of a random pairing", {"color": GREY, "marker": "s", "ls": ":"}),
    "same_tokens": ("the lens on its own model's states", {"color": GREEN, "marker": "^", "ls": "--"}),
}


def between_figure(table: pd.DataFrame) -> Figure:
    """``between.png`` from ``between.csv``: heatmaps of trainings, then a panel for each two models and each map."""
    with style():
        found = panels_of(table)
        drawing, panels = panel_for_each([name for name, _ in found], 2.9, 1.6, sharey=False, square=False)
        of_time = {name: matrix_of(rows) for name, rows in found if name.startswith(TIME)}
        top = max([1e-3, *(float(grid.max().max()) for grid in of_time.values())])  # one colour bar is for all of them
        heatmaps = []
        for panel, (name, rows) in zip(panels, found, strict=True):
            if name in of_time:
                draw_time(panel, of_time[name], top)
                heatmaps.append(panel)
            else:
                draw_layers(panel, rows)
            panel.set_title(name, fontsize=pt(8))
        if heatmaps:
            colour_bar(drawing, heatmaps, "penalty (nats/token)")
        if len(heatmaps) < len(panels):
            legend_outside(drawing, *panels[-1].get_legend_handles_labels())
        lines = [rows for name, rows in found if name not in of_time]
        title = late_lens_at_the_end(of_time) if of_time else maps_that_help(lines)
        title_and_caption(drawing, title, caption_of(matrices=bool(of_time), lines=bool(lines)))
    return drawing


def caption_of(*, matrices: bool, lines: bool) -> str:
    """What the panels show that are drawn."""
    said = ["KL beyond that of the states' own lens."]
    if matrices:
        said.append(
            "Over training the states' own head reads: mean over layers from 1 on, of several seeds over seeds."
        )
    if lines:
        said.append("Bars: 95 % intervals, over documents; of several seeds, over seeds.")
    return " ".join(said)


def late_lens_at_the_end(matrices: dict[str, pd.DataFrame]) -> str:
    """What the lens of the middle of each training costs at its end, in words; ``matrices``: panel -> its penalties."""
    costs, middles = {}, {}
    for name, grid in matrices.items():
        end = grid.columns[-1]
        earlier = [tokens for tokens in grid.index if tokens != end and pd.notna(grid.loc[tokens, end])]
        if earlier:
            middle = min(earlier, key=lambda tokens: abs(float(tokens) - float(end) / 2))
            model = name.removeprefix(f"{TIME}: ")
            costs[model], middles[model] = float(grid.loc[middle, end]), (float(middle), float(end))
    if not costs:
        return "What a lens reads of the same model at another time of its training"
    when = "from the middle"
    if len(set(middles.values())) == 1:
        when = "after {:,.0f} of {:,.0f} training tokens".format(*next(iter(middles.values())))
    return f"A lens fitted {when} costs {by_model(pd.Series(costs))} nats/token at the end"


def maps_that_help(panels: Sequence[pd.DataFrame]) -> str:
    """At how many layers a map between two models surely does better than that of a random pairing, in words."""
    rows = pd.concat(panels) if panels else pd.DataFrame(columns=["saved", "saved_ci_low"])
    rows = rows.dropna(subset=["saved"])
    if rows.empty:
        return "What a lens of one model reads in another"
    sure = int((rows["saved_ci_low"].astype(float) > 0).sum())
    layers = f"at {sure} of {len(rows)} layers"
    return f"Through its map, a lens surely reads another model better than by a random pairing {layers}"


def panels_of(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The panels of the figure, by name: rows of means over seeds where there are some, else of the first pair of seeds."""
    found = []
    training = table[(table["kind"] == "training") & (table["map"] == NONE) & (table["head"] == STATES_HEAD)]
    training = training[training["states_layer"].astype(str) == LATER]
    for root, rows in training.groupby(training["lens_model"].str.split("@").str[0], sort=False):
        found.append((f"{TIME}: {root}", one_of_seeds(rows)))
    others = table[(table["kind"] != "training") & (table["states_layer"].astype(str) != LATER)]
    for (kind, lens, states, through), rows in others.groupby(
        ["kind", "lens_model", "states_model", "map"], sort=False
    ):
        who = str(lens) if lens == states else f"{lens} on {states}"
        found.append((f"{kind}: {who}, {through}", one_of_seeds(rows)))
    return found


def one_of_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of means over seeds, or those of the first two seeds."""
    seeds = rows["lens_seed"].astype(str), rows["states_seed"].astype(str)
    mean = rows[seeds[0] == "all"]
    return mean if len(mean) else rows[(seeds[0] == seeds[0].iloc[0]) & (seeds[1] == seeds[1].iloc[0])]


def matrix_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The penalties of a training: lens of a checkpoint (rows) on the states of another (columns), 0 on its own."""
    grid = rows.astype({"penalty": float}).pivot(index="lens_tokens", columns="states_tokens", values="penalty")
    grid = grid.sort_index().sort_index(axis=1)
    for tokens in grid.index.intersection(grid.columns):
        grid.loc[tokens, tokens] = 0.0  # its own lens
    return grid


def draw_time(panel: Axes, grid: pd.DataFrame, top: float) -> None:
    """Draw the matrix of a training, in colours from 0 to ``top``."""
    ticks = [f"{tokens:,.0f}" for tokens in grid.index]
    look: dict[str, Any] = {"xticklabels": ticks, "yticklabels": ticks}
    if len(grid) <= ANNOTATED_LAYERS:
        texts = grid.map(lambda v: "" if math.isnan(v) else cell_text(v, top))
        look |= {"annot": texts, "fmt": "", "annot_kws": {"size": pt(6)}, "linewidths": 0.4}
    cost_heatmap(panel, grid, top, **look)
    panel.tick_params(axis="x", rotation=60)
    panel.set(xlabel="states after tokens", ylabel="lens after tokens")


def draw_layers(panel: Axes, rows: pd.DataFrame) -> None:
    """Draw the penalty of two models by layer, that of the null, and what the two models' predictions differ by."""
    layers = rows["states_layer"].astype(int)
    for name, (label, look) in LINES.items():
        values = rows[name].astype(float)
        if values.notna().any():
            panel.plot(layers, values, lw=1.2, ms=3.5, label=label, **look)
            low, high = (rows[f"{name}_ci_{end}"].astype(float) for end in ("low", "high"))
            panel.vlines(layers, low, high, color=look["color"], lw=1.2)
    panel.axhline(0, color=GREY, lw=0.8, zorder=1)
    panel.set(xlabel="layer of the states", ylabel="penalty (nats/token)")
