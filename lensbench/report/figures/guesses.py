"""What early layers guess, and what becomes of it, through several lenses."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.probes.tools.layer_lenses import PROBED
from lensbench.report.figures.findings import guessed_words
from lensbench.report.figures.frames import shown_rows
from lensbench.report.figures.layout import legend_of_panels, new_figure, subplots, title_and_caption
from lensbench.report.figures.lenses import lens_colours
from lensbench.report.figures.registry import figure
from lensbench.report.figures.style import GREY, sheet
from lensbench.results.folder import Run

DRAWN = {
    "frequent": "top-1 is a frequent word",
    "frequent_revised": "frequent top-1 revised",
    "settled": "top-1 settled",
}
"""Quantities, without the name of the lens -> label of their axis"""

BESIDE = {"frequent": "null", "frequent_revised": "chance", "settled": "null"}
"""What thin lines are in the panels of each"""

TITLED = "tuned"
"""The lens that the title speaks of"""

NUMBERS = ["value", "ci_low", "ci_high"]


def guess_frame(run: Run) -> pd.DataFrame:
    """``model, what, lens, beside, layer, value, ci_low, ci_high``: ``beside`` is ``null``, ``chance`` or empty.

    ``what`` is one of :data:`DRAWN`, or ``model``: the share of frequent words in the model's own top-1, without a layer.
    """
    table = run.tables["probes.csv"]
    names = {f"{what}_{lens}": (what, lens, "") for what in DRAWN for lens in PROBED}
    names |= {f"{what}_{lens}_{b}": (what, lens, b) for what, b in BESIDE.items() for lens in PROBED}
    names["frequent_model"] = ("model", "", "")
    rows = shown_rows(table[table["quantity"].isin(names) & table["value"].notna()], ["quantity", "layer"])
    parts = pd.DataFrame([names[q] for q in rows["quantity"]], columns=["what", "lens", "beside"], index=rows.index)
    frame = pd.concat([rows[["model", "layer"]], parts, rows[NUMBERS].astype(float)], axis=1).reset_index(drop=True)
    return frame


@figure("guess_and_refine", needs=("probes.csv",), frame=guess_frame)
def guess_and_refine(frame: pd.DataFrame) -> Figure:
    """A column of panels per model: frequent words among the top-1, their revision, and how much is settled, by layer."""
    models = list(frame["model"].unique())
    drawing = new_figure(2.3 * len(models) + 2.0, 2.1 * len(DRAWN) + 0.6, 1.5 * len(DRAWN))
    panels = subplots(drawing, len(models) * len(DRAWN), len(models), sharey=False)
    for number, what in enumerate(DRAWN):
        for panel, model in zip(panels[number * len(models) :], models, strict=False):
            draw_guesses(panel, frame[frame["model"] == model], what)
            if number == 0:
                panel.set_title(model)
    legend_of_panels(drawing, panels)
    caption = (
        "Bands: 95 % intervals. Dotted, in the colour of its lens: the null (lenses of shuffled targets, the shared lens "
        "of a random basis), in the middle row what tokens of other documents give by chance."
    )
    title_and_caption(drawing, guessed_words(frame, TITLED, PROBED[TITLED]), caption)
    return drawing


def draw_guesses(panel: Axes, rows: pd.DataFrame, what: str) -> None:
    """Draw one quantity of one model through every lens, with its null or its chance."""
    for lens in PROBED:
        of_lens = rows[(rows["what"] == what) & (rows["lens"] == lens)].sort_values("layer")
        line, beside = of_lens[of_lens["beside"] == ""], of_lens[of_lens["beside"] != ""]
        if line.empty:
            continue
        colour = lens_colours()[lens]
        panel.plot(line["layer"], line["value"], "o-", color=colour, lw=1.4, ms=2.5, label=PROBED[lens])
        panel.fill_between(line["layer"].astype(float), line["ci_low"], line["ci_high"], color=colour, alpha=0.18, lw=0)
        panel.plot(beside["layer"], beside["value"], ":", color=colour, lw=1.0)
    if what == "frequent":
        for value in rows.loc[rows["what"] == "model", "value"]:
            panel.axhline(value, color=GREY, lw=1.0, ls="--", label="the model's own top-1")
    panel.set(xlabel="layer", ylabel=DRAWN[what], ylim=(-0.03, 1.03))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4 if sheet().on_paper else 6, min_n_ticks=1))
