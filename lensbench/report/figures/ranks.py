"""How KL and precision of lenses fall and rise with the number of their directions."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lensbench.probes.lens_rank import SETS, SINGLE
from lensbench.report.figures.findings import ranks_needed
from lensbench.report.figures.frames import shown_rows
from lensbench.report.figures.layout import legend_of_panels, new_figure, subplots, title_and_caption
from lensbench.report.figures.lenses import lens_colours
from lensbench.report.figures.registry import figure, nats_per
from lensbench.results.folder import Run

DRAWN = ("kl", "top1")
"""Measures of the probe that are drawn, a row of panels for each"""

SINGLE_COLOUR = "#56b4e9"
"""The colour of the best lens of one layer, which is no kind of lens"""

NUMBERS = ["value", "ci_low", "ci_high"]


def rank_frame(run: Run) -> pd.DataFrame:
    """``model, what, kind, rank, value, ci_low, ci_high`` of lenses cut to a rank, means over layers."""
    table = run.tables["probes.csv"]
    names = {f"rank_{what}_{kind}": (what, kind) for what in DRAWN for kind in SETS}
    rows = shown_rows(table[table["quantity"].isin(names) & table["value"].notna()], ["quantity", "other"])
    parts = pd.DataFrame([names[q] for q in rows["quantity"]], columns=["what", "kind"], index=rows.index)
    rank = rows["other"].astype(float).rename("rank")
    frame = pd.concat([rows["model"], parts, rank, rows[NUMBERS].astype(float)], axis=1).reset_index(drop=True)
    return frame


@figure("lens_rank", needs=("probes.csv",), frame=rank_frame)
def lens_rank(frame: pd.DataFrame) -> Figure:
    """A column of panels per model: KL and top-1 against the rank, a line for each way of reading all layers."""
    models = list(frame["model"].unique())
    drawing = new_figure(2.4 * len(models) + 2.0, 2.2 * len(DRAWN) + 0.6, 1.6 * len(DRAWN))
    panels = subplots(drawing, len(models) * len(DRAWN), len(models))
    labels = {"kl": f"KL to the output ({nats_per(frame)})", "top1": "top-1 is the model's"}
    for number, what in enumerate(DRAWN):
        for panel, model in zip(panels[number * len(models) :], models, strict=False):
            draw_ranks(panel, frame[(frame["model"] == model) & (frame["what"] == what)])
            panel.set(ylabel=labels[what], xlabel="rank of the map")
            if number == 0:
                panel.set_title(model)
    legend_of_panels(drawing, panels)
    caption = (
        "Means over layers; bands: 95 % intervals. Rank 0: the constant that a lens reads on average. The best lens of one "
        "layer is chosen on dev at each rank."
    )
    title_and_caption(drawing, ranks_needed(frame, {kind: SETS[kind] for kind in ("tuned", "shared")}), caption)
    return drawing


def draw_ranks(panel: Axes, rows: pd.DataFrame) -> None:
    """Draw one measure of one model."""
    colours = {SINGLE: SINGLE_COLOUR} | lens_colours()
    for kind, label in SETS.items():
        line = rows[rows["kind"] == kind].sort_values("rank")
        if line.empty:
            continue
        panel.plot(line["rank"], line["value"], "o-", color=colours[kind], lw=1.4, ms=2.5, label=label)
        panel.fill_between(line["rank"], line["ci_low"], line["ci_high"], color=colours[kind], alpha=0.18, lw=0)
    panel.set_xscale("symlog", base=2, linthresh=1)
    ranks = sorted(rows["rank"].unique())
    panel.xaxis.set_major_locator(FixedLocator([ranks[0], *ranks[1::3]]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylim(bottom=0)
