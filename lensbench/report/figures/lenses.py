"""KL and accuracy of every kind of lens by layer."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lensbench.lenses.kinds import layer_kinds
from lensbench.report.figures.findings import halfway_accuracy, lens_cost
from lensbench.report.figures.frames import NULL, accuracy_frame, lens_frame, lens_labels
from lensbench.report.figures.layout import legend_outside, panel_for_each, title_and_caption
from lensbench.report.figures.registry import figure, nats_per
from lensbench.report.figures.style import GREY

NULL_COLOUR = "#949494"
"""Grey, as of all that is drawn for comparison; no kind of lens has it"""


def lens_colours() -> dict[str, str]:
    """Name -> colour of every kind of lens that figures draw, and of the null."""
    return {kind.name: kind.colour for kind in layer_kinds()} | {NULL: NULL_COLOUR}


DASHES = {"none": "", "refined": "", "backward": "", "closed": (4, 1.5), "rotated": (1, 1)}


@figure("kl_by_layer", needs=("lenses.csv",), frame=lens_frame)
def kl_by_layer(frame: pd.DataFrame) -> Figure:
    """Per model the KL to its own output at every layer, one line per lens."""
    models = list(frame["model"].unique())
    lenses = frame.drop_duplicates("name").set_index("name")
    look: dict[str, Any] = {"hue": "name", "hue_order": list(lenses.index), "style": "name"}
    look |= {"palette": lenses["lens"].map(lens_colours()).to_dict(), "dashes": lenses["stage"].map(DASHES).to_dict()}
    # An axis for all would reach from the least to the largest KL of any model, and ten lines would lie on each other.
    drawing, panels = panel_for_each(models, 2.6, 2.6, sharey=False)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model].sort_values("layer")
        sns.lineplot(rows, x="layer", y="kl", errorbar=None, lw=1.6, marker="o", ms=2.5, mew=0, ax=panel, **look)
        for lens, line in rows.groupby("lens"):
            band = line["layer"], line["kl_ci_low"], line["kl_ci_high"]
            panel.fill_between(*band, color=lens_colours()[str(lens)], alpha=0.3, lw=0)
        lines, labels = panel.get_legend_handles_labels()
        panel.legend().remove()
        place = panel.get_subplotspec()
        label = f"KL to the output ({nats_per(frame)})" if place is None or place.is_first_col() else ""
        panel.set(title=model, yscale="log", xlabel="layer", ylabel=label)
        whole_layers(panel)
        log_ticks(panel)
    legend_outside(drawing, lines, labels, handlelength=3)
    caption = "Bands: 95 % intervals." + (" Each panel has its own scale." if len(models) > 1 else "")
    title_and_caption(drawing, lens_cost(frame, nats_per(frame)), caption)
    return drawing


@figure("accuracy_by_layer", needs=("probes.csv",), frame=accuracy_frame)
def accuracy_by_layer(frame: pd.DataFrame) -> Figure:
    """Per model the share of targets that each lens's most probable word is, at every layer, and the model's own share."""
    models = list(frame["model"].unique())
    drawing, panels = panel_for_each(models, 2.6, 1.8, sharey=True)
    for panel, model in zip(panels, models, strict=True):
        rows = frame[frame["model"] == model]
        own = rows[rows["lens"] == "model"].iloc[0]
        panel.axhline(own["value"], color=GREY, lw=1.2, ls=":", label="the model")
        panel.axhspan(own["ci_low"], own["ci_high"], color=GREY, alpha=0.15, lw=0)
        for lens in ("logit", "tuned", "shared"):
            line = rows[rows["lens"] == lens].sort_values("layer")
            colour = lens_colours()[lens]
            panel.plot(line["layer"], line["value"], "o-", color=colour, lw=1.5, ms=2.8, label=lens_labels()[lens])
            band = line["layer"].astype(float), line["ci_low"], line["ci_high"]
            panel.fill_between(*band, color=colour, alpha=0.18, lw=0)
        panel.set(title=model, xlabel="layer", ylabel="held-out accuracy")
        whole_layers(panel)
    legend_outside(drawing, *panels[0].get_legend_handles_labels())
    caption = "Bands: 95 % intervals. Lenses: closed form, prior zero."
    title_and_caption(drawing, halfway_accuracy(frame), caption)
    return drawing


MANY_POWERS = 100
"""Where an axis spans less, powers of ten would mark one place or two"""


def log_ticks(panel: Axes) -> None:
    """Mark round numbers along a logarithmic y: powers of ten, and their doubles and fives where few powers lie within."""
    low, high = panel.get_ylim()
    if high < MANY_POWERS * low:
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def whole_layers(panel: Axes) -> None:
    """Put ticks at whole layers only."""
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
