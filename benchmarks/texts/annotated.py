"""The figure of the README: one model's profile over depth, with what every part of it means."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lensbench.report.figures.blocks import profile_frame
from lensbench.report.figures.profile import ADDS, INK, KEEPS, NEWS, draw_model, fit_texts
from lensbench.report.figures.style import DPI, style, write_figure
from lensbench.results.folder import read_run

RUN, MODEL = "quick", "gpt"
"""What is drawn"""

FILE = "annotated.png"


def annotated(run_folder: Path) -> Figure:
    """The profile of :data:`MODEL`, with words and arrows at its bars."""
    frame = profile_frame(read_run(run_folder))
    frame = frame[frame["model"] == MODEL]
    drawing = Figure(figsize=(9.2, 4.0), dpi=DPI)
    panel = drawing.add_axes((0.22, 0.11, 0.44, 0.81))
    draw_model(panel, frame)
    panel.set_yticks([])
    panel.set_xlabel("layer", fontsize=8)
    panel.set_title(f"What each block of {MODEL} keeps and adds (1: all)", fontsize=9, loc="left")
    fit_texts(drawing, [panel])
    blocks = frame[frame["part"] == "block"].set_index("from_layer")
    elsewhere = (1 - blocks["in_place"]).drop(index=0).idxmax()  # the block that adds most elsewhere
    end = float(frame["layers"].iloc[0]) - 1
    left, right = -0.24, 1.2
    write(panel, "keeps: the earlier prediction\ncan still be read (clarity)", left, 0.95, (1.2, KEEPS.at(0.85)))
    write(panel, "drowned: what the embedding\nsays is hidden by other things", left, 0.75, (0.5, KEEPS.at(0.6)))
    write(panel, "adds in place: it shows\nin the earlier lens", left, 0.46, (1.2, ADDS.at(0.4)))
    write(panel, "news: gain in directions that\nthe earlier lens does not read", left, 0.12, (1.2, NEWS.at(0.3)))
    write(panel, "the whole model, without\nthe embedding (pale)", right, 0.86, (end + 1.15, KEEPS.at(0.5)))
    write(panel, "grey: the model's own states,\nrebuilt so that the answer\nis known", right, 0.68)
    write(
        panel,
        "adds elsewhere: in directions\nother than those of\nthe earlier lens",
        right,
        0.5,
        (elsewhere + 0.75, ADDS.at((1 + blocks.loc[elsewhere, "in_place"]) / 2)),
    )
    low = float(blocks.loc[elsewhere, ["in_place", "in_place_low"]].min())
    said = "mark and line: value and\n95 % interval (arrowhead:\nit goes on)"
    write(panel, said, right, 0.33, (elsewhere + 0.5, ADDS.at(low)))
    return drawing


def write(panel: Axes, text: str, x: float, y: float, to: tuple[float, float] | None = None) -> None:
    """Write ``text`` at a fraction of the panel, with an arrow to a place in its data."""
    look = {"ha": "left" if x > 1 else "center", "va": "center", "size": 7.5, "color": INK, "zorder": 9}
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 0.7, "shrinkA": 2, "shrinkB": 0}
    panel.annotate(
        text, to or (x, y), (x, y), xycoords="data" if to else "axes fraction", textcoords="axes fraction",
        arrowprops=arrow if to else None, annotation_clip=False, **look,
    )  # fmt: skip


def write_annotated(results: Path) -> Iterator[str]:
    """Draw the figure from :data:`RUN` of the folder ``results`` into it; give a line where its bytes change."""
    path = results / FILE
    before = path.read_bytes() if path.is_file() else b""
    with style():
        drawing = annotated(results / RUN)
    write_figure(drawing, path)
    if path.read_bytes() != before:
        yield f"written: {path.parent.name}/{path.name}"
