"""The first figure of a run: what each block keeps, adds in place, adds elsewhere, drowns, and the news it brings."""

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from lensbench.report.figures.blocks import gate_text, profile_frame
from lensbench.report.figures.findings import verdicts_said
from lensbench.report.figures.layout import legend_outside, new_figure, panels_per_row, subplots, title_and_caption
from lensbench.report.figures.registry import figure
from lensbench.report.figures.style import BLUE, GREEN, GREY, MINUS, ORANGE, PURPLE, pt, sheet

INK = "#222222"


@dataclass(frozen=True)
class Strip:
    """A horizontal strip of a panel with an axis from 0 to 1 of its own: ``base`` and ``height`` in units of the panel."""

    quantity: str
    """What has an interval in it"""
    label: str
    base: float
    height: float
    over: float = 0.12
    """How far a value beyond 0 or 1 is drawn; what lies further ends there"""

    def at(self, value: Any) -> Any:
        """The place of a value, or of an array of them."""
        return self.base + self.height * np.clip(value, -self.over, 1 + self.over)


KEEPS = Strip("clarity", "keeps", 2.3, 1.0)
ADDS = Strip("in_place", "adds", 1.0, 1.0)
NEWS = Strip("news", "news", 0.2, 0.5)
STRIPS = (KEEPS, ADDS, NEWS)

FILLS = {
    "kept": (BLUE, "kept (clarity)"),
    "drowned": ("#D4D4D4", "drowned (1 - clarity), signal still there"),
    "turned": ("#F3C6A5", "re-represented or drowned"),
    "in place": (GREEN, "added in place"),
    "elsewhere": (ORANGE, "added elsewhere"),
    "news": (PURPLE, "news: in directions not read before"),
}
"""Part of a bar -> its colour, and its name in the legend"""

HATCHES = {"no fall": "////", "no room": "....", "not kept": "xxxx"}
"""Gate -> how a block that it stops is hatched; of another kind of gap: see :data:`OTHER_HATCH`"""

OTHER_HATCH = "\\\\\\\\"

LANDMARK_DASHES = {"rotated": (0, (1, 1.2)), "carried": (0, (4, 1.5)), "drifting": (0, (5, 1.2, 1, 1.2))}

GAP = 0.14
"""Between two blocks, in layers"""


@figure("profile_over_depth", needs=("blocks.csv",), frame=profile_frame)
def profile_over_depth(frame: pd.DataFrame) -> Figure:
    """One panel per model, three strips over depth: what each block keeps, where it adds, and its news.

    ``frame``: as of :func:`lensbench.report.figures.blocks.profile_frame`.
    """
    models = list(frame.loc[frame["part"] == "block", "model"].unique())
    columns = panels_per_row(len(models))
    rows = math.ceil(len(models) / columns)
    deepest = int(frame["layers"].max())
    wide = min(max(3.3, 0.28 * deepest), 8 / columns + 1.2)
    drawing = new_figure(columns * wide + 2.6, rows * 2.9 + 0.7, rows * (1.9 if rows < 3 else 1.5))
    panels = subplots(drawing, len(models), columns)
    seen: dict[str, Any] = {}
    for place, (panel, model) in enumerate(zip(panels, models, strict=True)):
        seen |= draw_model(panel, frame[frame["model"] == model])
        panel.set_title(title_of(frame[frame["model"] == model]), fontsize=pt(8.5), loc="left")
        panel.set_xlabel("layer" if place + columns >= len(models) else "", fontsize=pt(8))
        if place % columns:
            panel.set_yticklabels([])
    order = [label for _, label in FILLS.values()]
    labels = [label for label in order if label in seen] + sorted(set(seen) - set(order))
    legend_outside(drawing, [seen[label] for label in labels], labels, handlelength=1.6)
    title_and_caption(drawing, finding(frame), caption_of(frame))
    fit_texts(drawing, panels)
    return drawing


def finding(frame: pd.DataFrame) -> str:
    """The verdicts on all models, the title of the figure; the question where there is none."""
    rows = frame[frame["part"] == "overall"]
    said = rows.set_index("model")["verdict"].str.partition(" (")[0]
    verdicts = {str(model): verdict for model, verdict in said.items() if verdict}
    if not verdicts:
        return "Does each block add to one prediction, in one representation?"
    title = verdicts_said(verdicts, len(rows))
    return title[0].upper() + title[1:]


def title_of(frame: pd.DataFrame) -> str:
    """The name of a model, the verdict on it, and what it adds in place from layer 1 on; on a page without the last."""
    row = frame[frame["part"] == "overall"].iloc[0]
    verdict = row["verdict"] or (f"undetermined ({row['gate']})" if row["gate"] else "")
    numbers = ""
    if pd.notna(row["in_place"]):
        low, high = (100 * row[f"in_place_{end}"] for end in ("low", "high"))
        numbers = f"{100 * row['in_place']:.0f} %" + ("" if pd.isna(low) else f" [{low:.0f}, {high:.0f}]") + " in place"
    if sheet().on_paper:
        return "\n".join([row["model"], *textwrap.wrap(verdict or numbers, 32)])
    clear = "" if pd.isna(row["clarity"]) else f"clarity {row['clarity']:.2f}"
    first = f"{row['model']}: {verdict}" if verdict else row["model"]
    return f"{first}\n{', '.join(filter(None, [numbers, clear]))}"


def caption_of(frame: pd.DataFrame) -> str:
    """How to read the figure, and what is missing from it."""
    several = (frame["part"] == "seed").any()
    caption = (
        "All: every pair from layer 1 on. Pale: from layer 0. Thick lines: 95 % intervals"
        + (" over seeds; thin steps: each seed. " if several else ". ")
        + "Blue frame: kept, between clarity and min(1, persistence). One wide bar: neighbours merged until there was room. "
        "Hatched: undetermined, with the gate that stops it."
    )
    reach = frame.loc[frame["part"] == "overall", "reach"].dropna() if "reach" in frame else pd.Series(dtype=float)
    if len(reach):
        low, high = (f"{100 * end:.0f} %" for end in (reach.min(), reach.max()))
        read = low if low == high else f"{low} to {high}"
        caption += f" The last block writes the output, of which the last lens reads {read}: nothing comes after it."
    landmarks = frame[frame["part"] == "landmark"]
    if leaves(frame):
        caption += " Arrowheads: a value (filled), or an end of its interval (open), beyond the strip."
    if len(landmarks):
        caption += " Grey: the model's own states, turned into something known, from layer 1 on."
        if names := sorted({f"+{name}" for name in landmarks.loc[landmarks["in_place"].isna(), "name"]}):
            caption += f" Undetermined in what they add: {', '.join(names)}."
    drawn = set(frame.loc[frame["part"] == "block", "model"])
    for reason, rows in frame[(frame["part"] == "overall") & ~frame["model"].isin(drawn)].groupby("reason", sort=False):
        caption += f" Without a panel: {', '.join(rows['model'])} ({reason})."
    return caption


def leaves(frame: pd.DataFrame) -> bool:
    """Whether a value or an interval of a bar leaves its strip."""
    bars = frame[frame["part"].isin(["block", "overall"])]
    ends = {strip: bars[[strip.quantity + end for end in ("", "_low", "_high")]] for strip in STRIPS}
    return any(((at < -strip.over) | (at > 1 + strip.over)).any(axis=None) for strip, at in ends.items())


def draw_model(panel: Axes, frame: pd.DataFrame) -> dict[str, Any]:
    """Draw the blocks, the overall bar and the landmarks of one model; return the legend's entries by their labels."""
    blocks = frame[frame["part"] == "block"]
    layers = int(frame["layers"].iloc[0])
    end = max(layers - 1, 1)
    wide = max(1.0, 0.12 * end)
    right = end + 0.6 + wide
    seen: dict[str, Any] = {}
    for strip in STRIPS:
        panel.hlines([strip.base, strip.base + strip.height], 0, right, color="#BBBBBB", lw=0.5, zorder=0)
    left, width = blocks["from_layer"].to_numpy(float), blocks["to_layer"].to_numpy(float)
    seen |= draw_bars(panel, blocks, left + GAP / 2, width - left - GAP)
    seen |= draw_bars(panel, frame[frame["part"] == "overall"], np.array([end + 0.6]), np.array([wide]))
    seen |= draw_seeds(panel, frame[frame["part"] == "seed"])
    draw_landmarks(panel, frame[frame["part"] == "landmark"], right)
    panel.grid(False)
    step = max(1, math.ceil(layers / (5 if sheet().on_paper and layers > 8 else 8)))
    whole = end + 0.6 + wide / 2
    ticks = [layer for layer in range(0, end, step) if end - layer >= 0.6 * step]
    ticks += [end] if whole - end > (0.1 if sheet().on_paper else 0.06) * right else []
    panel.set_xticks([*ticks, whole], [*map(str, ticks), "all"])
    panel.set_yticks([strip.base + strip.height / 2 for strip in STRIPS], [strip.label for strip in STRIPS])
    panel.tick_params(axis="both", length=0, labelsize=pt(8), pad=2)
    panel.set(xlim=(-0.02 * right, 1.01 * right), ylim=(0.1, KEEPS.base + 1.18))
    for side in panel.spines.values():
        side.set_visible(False)
    return seen


def draw_bars(panel: Axes, rows: pd.DataFrame, left: Any, width: Any) -> dict[str, Any]:
    """Draw what rows keep, add and bring, at ``left`` and as wide as ``width``; return the legend's entries."""
    seen: dict[str, Any] = {}
    where: dict[str, Any] = {"align": "edge", "lw": 0, "zorder": 1}
    pale = np.where(rows["from_layer"].to_numpy(float) == 0, 0.45, 1.0)

    def fill(part: str, strip: Strip, bottom: Any, top: Any) -> None:
        low, high = (np.clip(np.asarray(x, float), 0, 1) for x in (bottom, top))
        shown = high > low  # a missing value is not
        if not shown.any():
            return
        colour, label = FILLS[part]
        place = strip.base + strip.height * low
        bars = panel.bar(left, np.where(shown, (high - low) * strip.height, 0), width, place, color=colour, **where)
        bars.set_label(part)
        for bar, alpha in zip(bars, pale, strict=True):
            bar.set_alpha(alpha)
        seen[label] = Patch(color=colour, lw=0)

    zero = np.zeros(len(rows))
    fill("kept", KEEPS, zero, rows["clarity"])
    fill("drowned", KEEPS, rows["clarity"], np.where(rows["drowned"].notna(), 1.0, np.nan))
    fill("turned", KEEPS, rows["clarity"], np.where(rows["drowned"].isna() & rows["clarity"].notna(), 1.0, np.nan))
    fill("in place", ADDS, zero, rows["in_place"])
    fill("elsewhere", ADDS, rows["in_place"], np.where(rows["in_place"].notna(), 1.0, np.nan))
    fill("news", NEWS, zero, rows["news"])
    for (_, row), x, w in zip(rows.iterrows(), left, width, strict=True):
        draw_marks(panel, row, x, w)
        seen |= draw_gaps(panel, row, x, w)
    return seen


def draw_marks(panel: Axes, row: pd.Series, x: float, width: float) -> None:
    """Draw the intervals and the bracket of one bar, and write its numbers where there is room (see :func:`fit_texts`)."""
    middle = x + width / 2
    for strip in STRIPS:
        value, low, high = (row[strip.quantity + end] for end in ("", "_low", "_high"))
        if pd.isna(value):
            continue
        if pd.notna(low):
            panel.vlines(middle, strip.at(low), strip.at(high), color=INK, lw=1.5, zorder=4)
        panel.plot(middle, strip.at(value), marker="_", ms=4, mew=1.1, color=INK, zorder=4, ls="none")
        draw_ends(panel, strip, middle, (value, low, high))
        hatched = strip is ADDS and bool(row["gate"])
        inside = strip is not NEWS and np.nanmin([value, low]) > 0.35
        place = strip.base + 0.06 if inside else strip.at(np.nanmax([value, high])) + 0.04
        text = panel.text(middle, place, share_text(value), ha="center", va="bottom", size=pt(6.5), zorder=6)
        text.set(color="white" if inside and not hatched else INK, gid=f"{row['part']} {width} {strip.base}")
        if not inside or hatched:
            text.set_bbox({"fc": "w", "alpha": 0.9 if hatched else 0.6, "lw": 0, "pad": 0.3})
    if pd.notna(row["kept_high"]):
        low, high = (float(KEEPS.at(row[name])) for name in ("kept_low", "kept_high"))
        panel.vlines(x, low, high, color=BLUE, lw=0.8, zorder=3).set_label("bracket")
        panel.hlines([low, high], x, x + width, color=BLUE, lw=0.8, zorder=3)


def draw_ends(panel: Axes, strip: Strip, middle: float, numbers: tuple[float, float, float]) -> None:
    """Draw a filled arrowhead where the value leaves its strip, and an open one where an end of its interval alone does."""
    value, low, high = numbers
    look: dict[str, Any] = {"color": INK, "zorder": 5, "ls": "none", "clip_on": False}
    for marker, side, edge, end in (("^", 1, 1 + strip.over, high), ("v", -1, -strip.over, low)):
        if side * value > side * edge:
            panel.plot(middle, strip.at(value), marker, ms=4, **look)
        elif side * end > side * edge:
            panel.plot(middle, strip.at(end), marker, ms=3.4, mfc="white", mew=0.8, **look)


def share_text(value: float) -> str:
    """Two decimals, without the zero before the point: above 1 a share is no less exact."""
    text = f"{round(value, 2) + 0.0:.2f}"
    return (text.replace("0.", ".", 1) if abs(value) < 0.995 else text).replace("-", MINUS)


def draw_gaps(panel: Axes, row: pd.Series, x: float, width: float) -> dict[str, Any]:
    """Draw what is undetermined or undefined of one bar as an open, hatched one; return the legend's entries."""
    seen: dict[str, Any] = {}
    look: dict[str, Any] = {"align": "edge", "fc": "none", "ec": GREY, "lw": 0.6, "zorder": 2}
    for strip in STRIPS:
        part = strip is ADDS and bool(row["gate"]) and row["passed"] > 0
        if pd.notna(row[strip.quantity]) and not part:
            continue
        gate = row["gate"] if strip is ADDS else ""
        hatch = HATCHES.get(gate, OTHER_HATCH)
        label = f"undetermined: {gate}" if gate else "undefined"
        bar = panel.bar(x, strip.height, width, strip.base, hatch=hatch, **look)
        bar.set_label(f"{label} at some seeds" if part else label)
        seen[label] = Patch(fc="none", ec=GREY, lw=0.6, hatch=hatch)
        if gate and not part:
            name = panel.text(x + width / 2, strip.base + 0.5, gate_text(row), rotation=90, ha="center", va="center")
            name.set(
                size=pt(6.5), color=INK, zorder=6, gid=f"{row['part']} {width}", bbox={"fc": "w", "lw": 0, "pad": 0.4}
            )
    return seen


def draw_seeds(panel: Axes, seeds: pd.DataFrame) -> dict[str, Any]:
    """Draw every seed as a thin line of steps; none of what was added where its gate stops it."""
    for _, blocks in seeds.groupby("name", sort=False):
        for strip in STRIPS:
            rows = blocks[blocks[strip.quantity].notna()]
            y = strip.at(rows[strip.quantity].to_numpy(float))
            panel.hlines(y, rows["from_layer"], rows["to_layer"], color=INK, lw=0.5, alpha=0.7, zorder=3)
    return {"each seed": Line2D([], [], color=INK, lw=0.5, alpha=0.7)} if len(seeds) else {}


def draw_landmarks(panel: Axes, landmarks: pd.DataFrame, right: float) -> None:
    """Draw what the model's own landmarks keep and add from layer 1 on: grey lines, with their names at the right."""
    for strip in (KEEPS, ADDS):
        rows = landmarks[landmarks[strip.quantity].notna()]
        for _, row in rows.iterrows():
            y = float(strip.at(row[strip.quantity]))
            line: dict[str, Any] = {
                "color": GREY,
                "lw": 0.9,
                "ls": LANDMARK_DASHES.get(row["name"], "-"),
                "zorder": 2.5,
            }
            panel.plot([0, right], [y, y], label=f"+{row['name']}", **line)
            name = panel.annotate(f"+{row['name']}", (1.01, y), xycoords=("axes fraction", "data"), va="center")
            name.set(size=pt(6.5), color=GREY, gid="landmark")


def fit_texts(drawing: Figure, panels: list[Axes]) -> None:
    """Turn numbers that are wider than their bars, take them out where that does not help; move landmarks' names apart.

    The numbers of all blocks, or none.
    """
    drawing.draw_without_rendering()
    for panel in panels:
        unit = panel.bbox.width / abs(np.subtract(*panel.get_xlim()))
        strip = panel.bbox.height / abs(np.subtract(*panel.get_ylim()))
        for part in ("block", "overall"):
            texts = [text for text in panel.texts if str(text.get_gid()).startswith(part)]
            room = {text: float(str(text.get_gid()).split()[1]) * unit for text in texts}
            numbers = [text for text in texts if not text.get_rotation()]
            fit_numbers(numbers, room)
            for text in set(texts) - set(numbers):  # the hatch of an undetermined block says the same as its text
                box = text.get_window_extent()
                if box.width > room[text] or box.height > strip:
                    text.remove()
        names = [text for text in panel.texts if text.get_gid() == "landmark"]
        move_apart(panel, names)


def fit_numbers(numbers: list[Text], room: Mapping[Text, float]) -> None:
    """Turn all numbers where one is wider than its room, in pixels; take all out where half of a room is too narrow then."""
    if not any(text.get_window_extent().width > room[text] for text in numbers):
        return
    for text in numbers:
        turn(text)
    if any(text.get_window_extent().width > room[text] / 2 for text in numbers):
        for text in numbers:
            text.remove()


def turn(number: Text) -> None:
    """Turn a number by a right angle; it then lies at the foot of its bar, left of the interval."""
    _, width, base = str(number.get_gid()).split()
    x, _ = number.get_position()
    number.set(rotation=90, position=(x - 0.25 * float(width), float(base) + 0.04), color=INK)
    number.set_bbox({"fc": "w", "alpha": 0.75, "lw": 0, "pad": 0.3})


def move_apart(panel: Axes, names: list[Text]) -> None:
    """Move texts along y until none lies on another; each stays as near to its place as that allows."""
    if not names:
        return
    unit = panel.bbox.height / abs(np.subtract(*panel.get_ylim()))
    high = max(text.get_window_extent().height for text in names) / unit
    names = sorted(names, key=lambda text: text.xy[1])  # type: ignore[attr-defined]
    places = [[text.xy[1]] for text in names]  # type: ignore[attr-defined]
    groups = [[y[0], 1] for y in places]  # the centre of a group, and how many names are in it
    k = 1
    while k < len(groups):
        (low, below), (up, above) = groups[k - 1], groups[k]
        if up - low >= high * (below + above) / 2 - 1e-9:
            k += 1
            continue
        groups[k - 1 : k + 1] = [[(low * below + up * above) / (below + above), below + above]]
        k = max(1, k - 1)
    y = [centre + high * (at - (count - 1) / 2) for centre, count in groups for at in range(int(count))]
    for text, place in zip(names, y, strict=True):
        text.set_position((1.01, place))
