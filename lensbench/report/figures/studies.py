"""Learning curves, tasks of known Bayes predictor, and regression in context."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from lensbench.report.figures.findings import lowest_loss, nearest_rival, nearest_to_bayes
from lensbench.report.figures.frames import curve_frame
from lensbench.report.figures.layout import legend_outside, new_figure, panel_for_each, title_and_caption
from lensbench.report.figures.palette import model_looks
from lensbench.report.figures.registry import figure, looks_of
from lensbench.report.figures.style import GREY, line_looks, sheet, style
from lensbench.studies.curves import ALL, BOUND, shown_curves
from lensbench.studies.regression import shown


@figure("learning_curves", needs=("curves.csv",), frame=curve_frame)
def learning_curves(frame: pd.DataFrame) -> Figure:
    """Held-out cross-entropy against tokens and seconds of training, and by position in the context."""
    rows = 3 if sheet().most_per_row < 3 else 1
    drawing = new_figure(11.5, 3.6, 1.7 * rows + 0.3)
    against_tokens, against_seconds, by_position = drawing.subplots(rows, 3 // rows, sharey=True)
    whole = frame[frame["positions"] == ALL]
    parts = [name for name in dict.fromkeys(frame["positions"]) if name != ALL]
    last = frame[frame["train_tokens"] == frame["train_tokens"].max()]
    looks = looks_of(frame)
    models = list(looks)
    for k, (model, look) in enumerate(looks.items()):
        of = whole[whole["model"] == model].sort_values("train_tokens")
        at = last[(last["model"] == model) & (last["positions"] != ALL)].set_index("positions").reindex(parts)
        for panel, x, points in (
            (against_tokens, of["train_tokens"], of),
            (against_seconds, of["seconds"], of),
            (by_position, next_to_each_other(len(parts), k, len(models)), at),
        ):
            spread = [points["ce"] - points["ce_ci_low"], points["ce_ci_high"] - points["ce"]]
            panel.errorbar(x, points["ce"], yerr=spread, label=model, lw=1.4, ms=4, capsize=2, **look)
    against_tokens.set(xscale="log", xlabel="training tokens", ylabel="held-out cross-entropy (nats/token)")
    against_seconds.set(xscale="log", xlabel="seconds of training, as measured")
    by_position.set(xlabel="position in the context, largest budget", xticks=range(len(parts)), xticklabels=parts)
    logarithmic_ticks(against_tokens, sorted(whole["train_tokens"].unique()))
    logarithmic_ticks(against_seconds, powers_of_two(whole["seconds"].clip(lower=1e-3)))
    legend_outside(drawing, *by_position.get_legend_handles_labels())
    caption = (
        "Bars: 95 %, over seeds (all on the same documents) where there are several, else over documents. Each budget has a "
        "schedule of its own. Seconds: median step times steps, with another process beside it; no benchmark."
    )
    title_and_caption(drawing, lowest_loss(last[last["positions"] == ALL], "nats/token"), caption)
    return drawing


def next_to_each_other(places: int, k: int, count: int) -> NDArray[np.floating]:
    """Where line ``k`` of ``count`` has its points, along an axis of named ``places``: no bar covers another."""
    return np.arange(places) + 0.06 * (k - (count - 1) / 2)


def logarithmic_ticks(panel: Axes, values: list[float]) -> None:
    """Put ticks at these values alone."""
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    panel.xaxis.set_minor_formatter("")
    panel.xaxis.set_major_locator(FixedLocator(values))


def powers_of_two(values: "pd.Series[float]") -> list[float]:
    """The powers of two between the smallest and the largest value."""
    low, high = np.log2(values.min()), np.log2(values.max())
    return [float(2**k) for k in range(math.ceil(low), math.floor(high) + 1)]


def in_context(table: pd.DataFrame, parts: list[str]) -> Figure:
    """Cross-entropy above the exact Bayes predictor's by position in the document, one panel per task."""
    with style():
        tasks = list(dict.fromkeys(table["task"]))
        drawing, panels = panel_for_each(tasks, 3.2, 2.0, sharey=False)
        table = shown_curves(table, "task").drop_duplicates(["task", "model", "positions"])
        models = [name for name in dict.fromkeys(table["model"]) if name != BOUND]
        for panel, task in zip(panels, tasks, strict=True):
            for k, (model, look) in enumerate(model_looks(models).items()):
                rows = table[(table["task"] == task) & (table["model"] == model)]
                rows = rows.set_index("positions").reindex(parts)
                spread = [rows["excess"] - rows["excess_ci_low"], rows["excess_ci_high"] - rows["excess"]]
                places = next_to_each_other(len(parts), k, len(models))
                panel.errorbar(places, rows["excess"], yerr=spread, label=model, lw=1.4, ms=4, capsize=2, **look)
            panel.axhline(0, color=GREY, lw=0.8, zorder=1)
            panel.set(title=task, xlabel="position", ylabel="CE above the Bayes predictor's (nats/token)")
            panel.set(xticks=range(len(parts)), xticklabels=parts)
        legend_outside(drawing, *panels[0].get_legend_handles_labels())
        caption = "0: nothing more can be learned from the document. Bars: 95 %, over seeds where there are several."
        last = table[(table["positions"] == parts[-1]) & table["model"].isin(models)]
        title_and_caption(drawing, nearest_to_bayes(last, parts[-1]), caption)
    return drawing


def regression(table: pd.DataFrame) -> Figure:
    """Squared error of trained attention and its rivals, and the cosine of their sensitivities."""
    with style():
        rows = shown(table)
        shapes = dict.fromkeys(zip(rows["layers"], rows["attention"], strict=True))
        of_model = {key: f"{key[1]}, {key[0]} layer{'s' * (key[0] > 1)}" for key in shapes}
        drawing = new_figure(9.0, 0.55 * len(of_model) + 1.9)
        left, right = drawing.subplots(1, 2, sharey=True)
        kinds = {"": "trained", "gd": "gradient steps, best rates", "gd++": "gd++, best rates", "bayes": "Bayes"}
        kinds |= {"gd, another task": "steps of another task", "gd++, another task": "gd++ of another task"}
        for panel, quantity in ((left, "squared_error"), (right, "sensitivity_cosine")):
            of = rows[rows["quantity"] == quantity]
            for k, ((kind, label), look) in enumerate(zip(kinds.items(), line_looks(len(kinds)), strict=True)):
                each = of[of["against"] == kind]
                place = [list(of_model).index(key) for key in zip(each["layers"], each["attention"], strict=True)]
                y = np.array(place) + 0.1 * (k - 2.5)
                spread = [each["value"] - each["ci_low"], each["ci_high"] - each["value"]]
                look = {**look, "ls": ""}
                panel.errorbar(each["value"], y, xerr=spread, label=label, ms=5, lw=1.4, capsize=2, **look)
            panel.grid(False, axis="y")
        left.set(yticks=range(len(of_model)), yticklabels=list(of_model.values()), ylim=(len(of_model) - 0.5, -0.5))
        left.set(xlabel="squared error on new tasks")
        right.set(xlabel="cosine of sensitivities with the trained model")
        legend_outside(drawing, *left.get_legend_handles_labels())
        caption = "Bars: 95 %, over seeds where there are several. Sensitivity: the answer's gradient by the question."
        cosines = rows[rows["quantity"] == "sensitivity_cosine"]
        short = {(layers, kind): f"{layers}-layer {kind}" for layers, kind in of_model}
        title_and_caption(drawing, nearest_rival(cosines, {k: v for k, v in kinds.items() if k}, short), caption)
    return drawing
