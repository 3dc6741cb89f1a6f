"""What probes measured by layer and by head."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lensbench.probes.catalogue import Panel
from lensbench.probes.registry import PROBES, quantities
from lensbench.report.figures.findings import heads_found
from lensbench.report.figures.frames import head_frame, probe_frame
from lensbench.report.figures.layout import legend_of_panels, new_figure, panels_per_row, subplots, title_and_caption
from lensbench.report.figures.registry import figure, looks_of, nats_per
from lensbench.report.figures.style import GREY, MINUS, pt, sheet, use_symlog


@figure("probes", needs=("probes.csv",), frame=probe_frame)
def probes(frame: pd.DataFrame) -> Figure:
    """What probes measured, one panel per quantity and one line per model; pairs of layers are averaged by distance."""
    measured = set(frame["quantity"])
    shown = [(q.name, q.panel) for q in quantities() if q.panel is not None and q.name in measured]
    columns = panels_per_row(max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    drawing = new_figure(3.0 * columns + 1.6, 2.4 * rows + 0.8, (1.3 if sheet().most_per_row < 3 else 1.6) * rows)
    axes = subplots(drawing, len(shown), columns)
    looks = looks_of(frame)
    for on, (quantity, panel) in zip(axes, shown, strict=True):
        draw_quantity(on, frame, quantity, panel, looks)
    legend_of_panels(drawing, axes)
    one = nats_per(frame).removeprefix("nats/")
    caption = f"Bars: 95 % intervals. Thin lines, the null: another {one}'s gradient, another direction's response."
    names = {quantity for quantity, _ in shown}
    topics = [probe.topic for probe in PROBES.values() if probe.topic and names & {q.name for q in probe.quantities}]
    title_and_caption(drawing, "What probes measured" + (": " + ", ".join(topics) if topics else ""), caption)
    return drawing


def draw_quantity(on: Axes, frame: pd.DataFrame, quantity: str, panel: Panel, looks: Mapping[str, Any]) -> None:
    """Draw a line per model, with its null and its intervals where the panel has them, and name the axes."""
    drawn: set[tuple[float, ...]] = set()
    for model, look in looks.items():
        of_model = frame[frame["model"] == model]
        if panel.null:
            null = of_model[of_model["quantity"] == panel.null]
            on.plot(null["layer"], null["value"], color=look["color"], lw=0.6, alpha=0.6)
        rows = of_model[of_model["quantity"] == quantity]
        if not len(rows):
            continue
        at = (rows["layer"] - rows["other"]).abs() if panel.at == "distance" else rows[panel.at]
        line = rows.assign(at=at.astype(float)).groupby("at")[["value", "ci_low", "ci_high"]].mean()
        if panel.one_view and tuple(line["value"]) in drawn:
            continue  # another view of the same model
        drawn.add(tuple(line["value"]))
        on.plot(line.index, line["value"], lw=1.2, ms=3.5, label=model, **look)
        if panel.at != "distance":
            on.vlines(line.index, line["ci_low"], line["ci_high"], color=look["color"], lw=1.4)
    if panel.zero:
        on.axhline(0, color=GREY, lw=0.8, zorder=1)
    on.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    on.set(xlabel=panel.over, ylabel=panel.name.replace("nats/token", nats_per(frame)))
    if panel.symlog:
        use_symlog(on, "y", 0.02)


TOP_HEADS = 3
"""Number of heads that are named in a heatmap"""


SMALLEST_SCORE = 1e-4
"""Smallest end of a colour scale"""

CLIP_PERCENTILE = 95
"""Of the sizes of scores: where a few heads lie far beyond it, colours end here, that others do not all look alike"""


@figure("error_transport", needs=("probes.csv",), frame=head_frame)
def error_transport(frame: pd.DataFrame) -> Figure:
    """One heatmap per model, layers by heads: the score of error transport; the top heads named, the found ones marked."""
    models = list(frame["model"].unique())
    deepest, widest = int(frame["layer"].max()) + 1, int(frame["head"].max()) + 1
    columns = panels_per_row(len(models), sheet().most_per_row - sheet().on_paper)  # their titles are long
    rows = math.ceil(len(models) / columns)
    size = max(2.6, 0.3 * widest), max(1.9, 0.17 * deepest)
    drawing = new_figure(columns * size[0] + 1.3, rows * size[1] + 1.0, rows * max(1.3, 0.09 * deepest + 0.6))
    panels = subplots(drawing, len(models), columns)
    # One colour scale for all would show only the strongest model: each model has its own, with its own bar.
    for panel, model in zip(panels, models, strict=True):
        draw_heads(panel, str(model), frame[frame["model"] == model])
    caption = (
        "Score: share of what a head mixes that expectations explain as tokens do with the sign turned, beyond a null of "
        "random signs. Circles: found at the 5 % level over all heads, by the alignment of both maps; a high score alone is "
        "no finding. Named: of those found, the highest scores."
    )
    if len(models) > 1:
        caption += " First seeds; each panel has its own scale."
    title_and_caption(drawing, heads_found(frame), caption)
    return drawing


def draw_heads(panel: Axes, model: str, heads: pd.DataFrame) -> None:
    """Draw the heatmap of one model, with circles at the heads found and the top ones in the title."""
    grid = heads.pivot(index="layer", columns="head", values="score")
    most, label, extend = score_scale(heads)
    look: dict[str, Any] = {"vmin": -most, "vmax": most, "cmap": "vlag", "cbar_kws": {"shrink": 0.8, "extend": extend}}
    sns.heatmap(grid, ax=panel, **look)
    panel.set_facecolor("#BBBBBB")  # a head without a score is no head with a score of 0
    panel.grid(False)
    bar = panel.collections[0].colorbar
    assert bar is not None
    bar.ax.tick_params(labelsize=pt(6.5))
    bar.set_label(label, size=pt(7))
    found = heads[heads["found"] > 0]
    places = {layer: k for k, layer in enumerate(grid.index)}, {head: k for k, head in enumerate(grid.columns)}
    for _, row in found.iterrows():
        at = places[1][row["head"]] + 0.5, places[0][row["layer"]] + 0.5
        panel.plot(*at, "o", mfc="none", color="#222222", ms=5)
    top = found.nlargest(TOP_HEADS, "score")
    named = ", ".join(
        f"L{layer}.H{head}" + ("" if math.isnan(ratio) else f" {ratio:.2f}")
        for layer, head, ratio in zip(top["layer"], top["head"], top["ratio"].astype(float), strict=True)
    )
    panel.set(xlabel="head", ylabel="layer")
    panel.set_title(
        f"{model}: {len(found)} of {len(heads)} found\n{f'beta / alpha: {named}' if named else 'none to name'}",
        fontsize=pt(8),
    )
    panel.tick_params(rotation=0, length=0, labelsize=pt(6.5))


def score_scale(heads: pd.DataFrame) -> tuple[float, str, str]:
    """Where the colours of a model's scores end, the label of its colour bar, and which ends go on (as of matplotlib)."""
    scores = heads["score"].dropna().astype(float)
    heads = heads.assign(size=heads["score"].astype(float).abs())
    sizes = scores.abs()
    if sizes.empty:
        return SMALLEST_SCORE, "score", "neither"
    ceiling = float(np.percentile(sizes, CLIP_PERCENTILE, method="lower"))
    if not sizes.max() > 1.5 * ceiling > 0:
        return max(float(sizes.max()), SMALLEST_SCORE), "score", "neither"
    most = max(ceiling, SMALLEST_SCORE)
    extend = ["neither", "max", "min", "both"][(scores.max() > most) + 2 * (scores.min() < -most)]
    far = heads.nlargest(1, "size").to_dict("records")[0]
    worst = f"{far['score']:.2g} (L{far['layer']}.H{far['head']})".replace("-", MINUS)
    return most, f"score; colours end at {most:.2g}, the farthest is {worst}", extend
