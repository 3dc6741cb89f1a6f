"""The plane of all models: where each stands, with and without layer 0, among the rule's regions and its own landmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from lensbench.measures.update.summary import WITHOUT_LAYER_0
from lensbench.measures.update.verdict import WITHOUT_FIRST
from lensbench.measures.verdict import VerdictRule
from lensbench.report.figures.blocks import verdict_on
from lensbench.report.figures.findings import verdicts_said
from lensbench.report.figures.frames import index_frame
from lensbench.report.figures.layout import (
    label_points,
    legend_outside,
    make_higher,
    new_figure,
    panels_per_row,
    subplots,
    title_and_caption,
)
from lensbench.report.figures.registry import figure, looks_of
from lensbench.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MINUS,
    ORANGE,
    VERMILION,
    pt,
    sheet,
    use_symlog,
)
from lensbench.report.formatting import is_left_out, shown_seeds
from lensbench.report.verdicts import rule_of
from lensbench.results.folder import Run


@dataclass(frozen=True)
class View:
    """A panel: its title, the indices along x and y, the one that sizes marks (or ''), and the names of its axes."""

    title: str
    x: str
    y: str
    size: str
    labels: tuple[str, str]


@dataclass(frozen=True)
class Gutter:
    """The strip at the left of a panel for what has no place along x: its ends, and where they lie on the axis' scale."""

    panel: Axes
    ends: tuple[float, float]

    @property
    def right(self) -> float:
        """Its right end along x."""
        return self.along(1.0)

    def along(self, share: float) -> float:
        """The x at a share of its width."""
        there = self.panel.xaxis.get_transform().inverted()
        return float(there.transform(np.array([self.ends[0] + share * (self.ends[1] - self.ends[0])]))[0])


LABELS = "gain visibility (linear within ±1)", "consistency of the shared lens"

VIEWS = (
    View("all layers", "gain_visibility", "shared_consistency", "movement", LABELS),
    View(
        "without layer 0", "gain_visibility_without_layer0", "shared_consistency_without_layer0",
        "movement_without_layer0", LABELS,
    ),
    View(
        "update decomposition, without layer 0", f"in_place{WITHOUT_LAYER_0}", f"clarity{WITHOUT_LAYER_0}", "",
        ("added in place", "clarity"),
    ),
)  # fmt: skip
"""The last is drawn where a model was decomposed"""

SIZES = {0: "0", 2: "2", 4: "4 or more"}
"""Movement -> its label in the legend; marks grow with movement up to the last."""

FIXED, UPDATES = "fixed lenses", "update decomposition"
"""What a verdict is of"""

GUTTER = 0.1
"""Share of a panel's width, at its left, that holds what has no place along x"""


def plane_frame(run: Run) -> pd.DataFrame:
    """One row per index and model, undefined ones too, as of :func:`index_frame`; ``part`` is ``model``.

    Further rows are the models' landmarks (part ``landmark``, their ``name``), the thresholds of the two rules that verdicts
    are given by (part ``rule``), and the verdicts of the table (part ``verdict``, their ``name``; ``index``: what of).
    """
    names = [name for view in VIEWS for name in (view.x, view.y, view.size) if name]
    models = index_frame(run, names)
    indices = run.tables["indices.csv"]
    written = indices[~is_left_out(indices)][["model", "index"]].drop_duplicates()
    for view in VIEWS:  # what was not measured has no place, not even that of the undetermined
        measured = set(written.loc[written["index"] == view.x, "model"])
        models = models[~models["index"].isin([view.x, view.y, view.size]) | models["model"].isin(measured)]
    if models.empty:
        return models
    own = run.tables["landmarks.csv"]
    own = own[own["index"].isin([VIEWS[-1].x, VIEWS[-1].y])].astype({"value": float})
    landmarks = own.groupby(["model", "landmark", "index"], sort=False)["value"].mean().reset_index()
    thresholds = thresholds_of(rule_of(run))
    return pd.concat(
        [
            models.assign(part="model", name=""),
            landmarks.rename(columns={"landmark": "name"}).assign(part="landmark", known="", images=False),
            pd.DataFrame({"index": list(thresholds), "value": list(thresholds.values())}).assign(
                part="rule", model="", name="", known="", images=False
            ),
            verdicts_of(run.tables, list(models["model"].unique())),
        ],
        ignore_index=True,
    )


def verdicts_of(tables: Mapping[str, pd.DataFrame], models: Sequence[str]) -> pd.DataFrame:
    """Rows of part ``verdict``: what the update decomposition says of each model from layer 1 on, else lenses held fixed."""
    said = {model: verdict_on(tables, model).partition(" (")[0] for model in models}
    index = UPDATES
    if not any(said.values()):
        rows = shown_seeds(tables["verdicts.csv"]).dropna(subset=["fixed_lens_verdict"])
        rows = rows.iloc[(rows["scope"] == WITHOUT_FIRST).argsort(kind="stable")]  # the last of a model counts
        said, index = dict(zip(rows["model"], rows["fixed_lens_verdict"].map(str), strict=True)), FIXED
    found = [(model, said[model]) for model in models if said.get(model)]
    return pd.DataFrame(found, columns=["model", "name"]).assign(part="verdict", index=index, known="", images=False)


def thresholds_of(rule: VerdictRule) -> dict[str, float]:
    """The thresholds of both rules by name; those of the update decomposition begin with ``update_``."""
    found = {name: float(value) for name, value in rule.model_dump(exclude={"update"}).items()}
    return found | {f"update_{name}": float(value) for name, value in rule.update.model_dump().items()}


@dataclass(frozen=True)
class Region:
    """A region of the rule: its name, what it spans along both axes, its colour, and where its name is written."""

    name: str
    x: tuple[float, float]
    y: tuple[float, float]
    colour: str
    where: str


def regions_of(
    view: View, rule: Mapping[str, float], x: tuple[float, float, float], y: tuple[float, float]
) -> list[Region]:
    """The regions of the rule in a view; ``x``: where the panel begins, where its axis does, and where both end."""
    (left, start, right), (low, high) = x, y
    if view.size:
        still = rule["still"]
        return [
            Region("refinement", (rule["visible"], right), (rule["consistent"], high), GREEN, "top"),
            Region("re-representation", (start, rule["unseen"]), (low, rule["inconsistent"]), VERMILION, "bottom"),
            Region(f"carry-along (movement < {still:g})", (-still, still), (low, high), ORANGE, "band"),
        ]
    # What has changed its basis is re-represented, wherever it adds; and where it adds cannot be told then.
    changed, clear = rule["update_changed"], rule["update_clear"]
    return [
        Region("added up", (rule["update_added"], right), (clear, high), GREEN, "top"),
        Region("mixed", (rule["update_carried"], rule["update_added"]), (changed, high), BLUE, "top"),
        Region("carried along", (start, rule["update_carried"]), (changed, high), ORANGE, "top"),
        Region("re-represented", (left, right), (low, changed), VERMILION, "bottom right"),  # landmarks lie at its left
    ]


@dataclass(frozen=True)
class DrawnView:
    """What a panel holds: places of names (x and y), artists that no name may cover, and kinds of marks."""

    points: pd.DataFrame
    taken: list[Artist]
    kinds: frozenset[str]


@figure("plane", needs=("indices.csv",), frame=plane_frame)
def plane(frame: pd.DataFrame) -> Figure:
    """Gain visibility against consistency, with and without layer 0; and what is added in place against clarity.

    ``frame``: as of :func:`plane_frame`.
    """
    own = frame[frame["part"] == "model"]
    views = [view for view in VIEWS if view.x in set(own["index"])]
    near = crowd(own, views[-1])
    page = sheet().width
    columns = panels_per_row(len(views) + bool(near), 1 if page and page < 5 else 2)
    rows = -(-(len(views) + bool(near)) // columns)
    wide, high = (5.6, 4.3) if own["model"].nunique() <= 8 else (6.6, 5.2)
    drawing = new_figure(columns * wide + 1.6, rows * high + 0.4, page and rows * min(0.72 * page, 2.6))
    panels = subplots(drawing, len(views) + bool(near), columns)
    drawn = [draw_view(panel, view, frame) for panel, view in zip(panels, views, strict=False)]
    if near:
        drawn[-1].points.drop(index=near, inplace=True)
        drawn.append(draw_close_up(panels[-2], panels[-1], views[-1], frame, near))
    legend_of_plane(drawing, panels[0], own, drawn)
    caption = (
        "Bars: 95 % intervals. Shaded: the rule's regions; a verdict needs whole intervals within one, at every seed, and "
        "passed gates. Open circles, at the left: what is undetermined or undefined along x."
    )
    if len(frame[frame["part"] == "landmark"]) and len(views) == len(VIEWS):
        caption += " Grey diamonds: landmarks made of each model's own states."
    decomposed = set(own.loc[own["index"] == VIEWS[-1].x, "model"])
    if decomposed and (others := [model for model in own["model"].unique() if model not in decomposed]):
        caption += f" Not decomposed: {', '.join(others)}."
    caption += without_place(own, views)
    title_and_caption(drawing, finding(frame), caption)
    for panel, one in zip(panels, drawn, strict=True):
        label_points(drawing, panel, one.points, one.taken)
    return drawing


CLOSE, CROWD = 0.2, 6
"""So many models that lie within so much of the middle one, along both axes, get a close-up"""


def crowd(own: pd.DataFrame, view: View) -> list[str]:
    """The models that lie so near to each other in a view of shares that their names need a panel of their own."""
    if view.size:
        return []
    places = own[own["index"].isin([view.x, view.y])].pivot(index="model", columns="index", values="value").dropna()
    near = (places - places.median()).abs().le(CLOSE).all(axis=1)
    return [model for model in own["model"].unique() if near.get(model, False)] if near.sum() >= CROWD else []


def draw_close_up(around: Axes, panel: Axes, view: View, frame: pd.DataFrame, models: list[str]) -> DrawnView:
    """Draw the part of a view that holds these models with their intervals, and its frame in the panel ``around`` it."""
    near = frame[frame["model"].isin(models) & (frame["part"] == "model") | (frame["part"] == "rule")]
    drawn = draw_view(panel, replace(view, title="close-up of the frame at the left"), near, whole=False)
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    around.add_patch(Rectangle((left, low), right - left, high - low, fc="none", ec=GREY, lw=0.8, zorder=4))
    return drawn


def without_place(own: pd.DataFrame, views: Sequence[View]) -> str:
    """Which models were measured but have no place in a view, since they have no y there; empty where all have one."""
    said = []
    for view in views:
        rows = own[(own["index"] == view.y) & own["model"].isin(own.loc[own["index"] == view.x, "model"])]
        if names := list(rows.loc[rows["value"].isna(), "model"]):
            said.append(f"{', '.join(names)} ({view.title})")
    return f" Undefined along y, and not drawn: {'; '.join(said)}." if said else ""


def finding(frame: pd.DataFrame) -> str:
    """The title of the figure: verdicts of the decomposition, else those of lenses held fixed; else the question."""
    rows = frame[frame["part"] == "verdict"]
    if rows.empty:
        return "Is one prediction refined in one representation?"
    title = verdicts_said(dict(zip(rows["model"], rows["name"], strict=True)), len(rows))
    return f"With lenses held fixed, {title}" if rows["index"].iloc[0] == FIXED else title[0].upper() + title[1:]


def draw_view(panel: Axes, view: View, frame: pd.DataFrame, *, whole: bool = True) -> DrawnView:
    """Draw regions, models and landmarks of one view: 0 and 1 as well where it is ``whole``, else what there is alone."""
    names = [name for name in (view.x, view.y, view.size) if name]
    own = frame[(frame["part"] == "model") & frame["index"].isin(names)]
    models = list(own["model"].unique())
    table = own.pivot(index="model", columns="index", values=["value", "ci_low", "ci_high"])
    # What is undefined along y has no place: at the bottom it would lie in the region of re-representation.
    table = table.reindex([model for model in models if pd.notna(table.get(("value", view.y), {}).get(model))])
    facts = frame[frame["part"] == "model"].drop_duplicates("model").set_index("model")
    landmarks = frame[(frame["part"] == "landmark") & frame["index"].isin([view.x, view.y])]
    landmarks = landmarks.pivot(index=["model", "name"], columns="index", values="value")
    landmarks = landmarks.reindex(columns=[view.x, view.y]).dropna(subset=[view.y])
    span = table.loc[:, [(end, view.x) for end in ("value", "ci_low", "ci_high")]].to_numpy(float)
    values = np.concatenate([span.ravel(), landmarks[view.x].to_numpy(float), [-0.1, 1.1] if whole else []])
    heights = table.loc[:, [(end, view.y) for end in ("value", "ci_low", "ci_high")]].to_numpy(float)
    up = np.concatenate([heights.ravel(), [-0.08, 1.12] if whole else []])
    panel.set(ylim=(np.nanmin(up) - 0.03, np.nanmax(up) + 0.03))
    if view.size:
        use_symlog(panel, "x", 1.0)
    places = pd.DataFrame(table["value"]).reindex(columns=[view.x, view.y])
    without = places[view.x].isna().any() or landmarks[view.x].isna().any()
    gutter = set_span(panel, float(np.nanmin(values)), float(np.nanmax(values)), open_at_left=bool(without))
    taken = draw_regions(panel, view, frame[frame["part"] == "rule"].set_index("index")["value"], gutter)
    bars, points = draw_models(panel, view, facts, table, gutter)
    taken += draw_landmarks(panel, view, landmarks, gutter)
    panel.set(xlabel=view.labels[0], ylabel=view.labels[1])
    panel.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", MINUS))
    panel.set_title(view.title, fontsize=pt(8.5), loc="left")
    kinds = {"landmark"} if len(landmarks) else set()
    return DrawnView(points, [*taken, *bars], frozenset(kinds))


def set_span(panel: Axes, low: float, high: float, *, open_at_left: bool) -> Gutter:
    """Set what x spans; return the gutter, which has no width unless the panel is ``open_at_left``."""
    there = panel.xaxis.get_transform()
    left, right = there.transform(np.array([low, high]))
    wide = right - left
    left, right = left - 0.05 * wide, right + 0.08 * wide
    gutter = Gutter(panel, (left - GUTTER * (right - left) if open_at_left else left, left))
    panel.set_xlim(gutter.along(0.0), float(there.inverted().transform(np.array([right]))[0]))
    linear = panel.get_xscale() == "linear"
    ticks = MaxNLocator(5).tick_values(low, high) if linear else panel.get_xticks()
    shown = gutter.right, panel.get_xlim()[1]
    panel.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if shown[0] <= tick <= shown[1]]))
    if open_at_left:
        panel.axvspan(gutter.along(0.0), gutter.right, color="#EEEEEE", lw=0, zorder=0)
    return gutter


def draw_regions(panel: Axes, view: View, rule: pd.Series, gutter: Gutter) -> list[Artist]:
    """Shade the regions of the rule, with their names; return the names."""
    (left, right), (low, high), start = panel.get_xlim(), panel.get_ylim(), gutter.right
    names: list[Artist] = []
    for region in regions_of(
        view, {str(name): float(at) for name, at in rule.items()}, (left, start, right), (low, high)
    ):
        name, colour, where, (y0, y1) = region.name, region.colour, region.where, region.y
        x0, x1 = max(region.x[0], left), min(region.x[1], right)
        if x1 <= x0 or y1 <= y0:
            continue
        panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fc=colour, alpha=0.13, lw=0, zorder=0.5, label=name))
        look: dict[str, Any] = {"color": GREY, "style": "italic", "size": pt(7.5), "zorder": 1}
        if where == "band":
            middle = (low + high) / 2
            names.append(panel.text((x0 + x1) / 2, middle, name, rotation=90, ha="center", va="center", **look))
        else:
            at: dict[str, Any] = {"ha": "left", "x": x0} if where == "bottom" else {"ha": "right", "x": x1}
            lift = high - 0.02 * (high - low) if where == "top" else low + 0.02 * (high - low)
            names.append(panel.text(at["x"], lift, f" {name} ", ha=at["ha"], va=where.split()[0], **look))
    if gutter.ends[0] < gutter.ends[1]:
        look = {"color": GREY, "style": "italic", "size": pt(7.5), "rotation": 90, "ha": "center", "va": "center"}
        names.append(panel.text(gutter.along(0.5), (low + high) / 2, "undetermined", **look))
    return names


def draw_models(
    panel: Axes, view: View, facts: pd.DataFrame, table: pd.DataFrame, gutter: Gutter
) -> tuple[list[Artist], pd.DataFrame]:
    """Draw each model as a mark with error bars; one that has no x as an open circle. Return bars, and places.

    ``facts``: ``known`` and ``images`` by model. ``table``: indices by model, under ``value``, ``ci_low`` and ``ci_high``.
    """
    colours = {model: look["color"] for model, look in looks_of(facts.reset_index()).items()}
    of_images = facts["images"] & (not facts["images"].all())
    bars: list[Artist] = []
    points: dict[str, tuple[float, float]] = {}
    without: list[str] = []
    for model, (_, row) in zip(map(str, table.index), table.iterrows(), strict=True):
        x, y = (float(row.get(("value", name), np.nan)) for name in (view.x, view.y))
        if pd.isna(x):
            without.append(model)
        points[model] = (x, y)
    for k, model in enumerate(without):
        points[model] = (gutter.along((k + 1) / (len(without) + 1)), points[model][1])
    for model, (_, row) in zip(map(str, table.index), table.iterrows(), strict=True):
        x, y = (float(row.get(("value", name), np.nan)) for name in (view.x, view.y))
        colour = colours[model]
        for k, name in enumerate((view.x, view.y)):
            low, high = row.get(("ci_low", name), np.nan), row.get(("ci_high", name), np.nan)
            if pd.notna(low):
                at = points[model][1 - k]
                ends = ([low, high], [at, at]) if k == 0 else ([at, at], [low, high])
                bars += panel.plot(*ends, color=colour, lw=1.3)
        if pd.isna(x):
            panel.plot(*points[model], "o", mfc="white", mec=colour, mew=1.4, ms=6, label="undetermined", zorder=3)
            continue
        # Models whose answer is known by their construction are outlined diamonds.
        mark: dict[str, Any] = {"linewidths": 0, "marker": "s" if of_images[model] else "o"}
        if facts.loc[model, "known"]:
            mark = {"marker": "D", "linewidths": 1.4, "edgecolors": "#222222"}
        moved = float(row.get(("value", view.size), 0.0)) if view.size else 0.6
        panel.scatter(x, y, s=mark_area(0.0 if np.isnan(moved) else moved), color=colour, alpha=0.45, **mark)
    places = pd.DataFrame.from_dict(points, orient="index", columns=["x", "y"])
    return bars, places


def draw_landmarks(panel: Axes, view: View, landmarks: pd.DataFrame, gutter: Gutter) -> list[Artist]:
    """Draw landmarks as grey diamonds, open ones where x is undetermined; of several models with one name; return names."""
    names: list[Artist] = []
    middle_of_panel = float(np.mean(panel.get_xlim()))
    for name, rows in landmarks.groupby("name", sort=False):
        for _, row in rows.iterrows():
            x, y = row[view.x], row[view.y]
            known = pd.notna(x)
            look: dict[str, Any] = {
                "mfc": GREY if known else "white",
                "mec": GREY,
                "ms": 4,
                "mew": 0.9,
                "alpha": 0.8,
                "zorder": 2,
            }
            panel.plot(x if known else gutter.along(0.5), y, "D", label=f"+{name}", **look)
        middle = rows.mean()
        at = middle[view.x] if pd.notna(middle[view.x]) else gutter.along(0.5)
        aside, ha = (5, "left") if at < middle_of_panel else (-5, "right")
        text = panel.annotate(f"+{name}", (at, middle[view.y]), (aside, -1), textcoords="offset points", va="top")
        text.set(size=pt(7), color=GREY, ha=ha)
        names.append(text)
    return names


def mark_area(moved: float) -> float:
    """The area of a model's mark in the plane, in square points: from 30 to 480 on a screen, half as much on a page."""
    largest = max(SIZES)
    return (0.5 if sheet().on_paper else 1.0) * (30 + 450 * min(max(moved, 0.0), largest) / largest)


def legend_of_plane(drawing: Figure, panel: Axes, frame: pd.DataFrame, drawn: Sequence[DrawnView]) -> None:
    """Draw the legend: sizes of marks, and their shapes where there are several."""
    handles: dict[str, Artist] = {}
    none: tuple[list[float], list[float]] = ([], [])
    for value, label in SIZES.items():
        handles[f"movement {label}"] = panel.scatter(*none, s=mark_area(value), color=GREY, alpha=0.4, lw=0)
    area = 35.0 if sheet().on_paper else 70.0
    if frame["images"].any() and not frame["images"].all():
        handles["sees images"] = panel.scatter(*none, s=area, marker="s", color=GREY, alpha=0.4, lw=0)
    if (frame["known"] != "").any():
        handles["known by construction"] = panel.scatter(*none, s=area, marker="D", color="white", edgecolors="#222222")
    if any("landmark" in one.kinds for one in drawn):
        handles["own landmark"] = panel.scatter(*none, s=area / 2.5, marker="D", color=GREY)
    handles["undetermined"] = panel.scatter(*none, s=area / 1.5, marker="o", facecolors="white", edgecolors=GREY)
    legend_outside(drawing, list(handles.values()), list(handles), handleheight=1.8, borderpad=0.6)
    if sheet().on_paper:
        make_higher(drawing, pt(8) * len(handles) / 2)
