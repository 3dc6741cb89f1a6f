"""KL and accuracy of every kind of lens by layer."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.report.figures.frames import LENSES
from lensbench.report.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, beside, panels_of, write_around

LENS_COLOURS = dict(zip(LENSES, ("#222222", BLUE, VERMILION, ORANGE, GREEN, PURPLE), strict=True))


DASHES = {"none": "", "refined": "", "closed": (4, 1.5), "rotated": (1, 1)}


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
