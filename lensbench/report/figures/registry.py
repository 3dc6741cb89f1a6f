"""The registry of a run's figures: each registers itself under its file name, with the tables that it needs.

A new figure is one function in one of this package's files::

    @figure("movement", needs=("indices.csv",), frame=index_frame)
    def movement(frame: pd.DataFrame) -> Figure:
        ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lensbench.report.figures.palette import palette_numbers
from lensbench.report.figures.style import line_look
from lensbench.results.folder import Run
from lensbench.results.schema import unit

Frame = Callable[[Run], pd.DataFrame]

Draw = Callable[[pd.DataFrame], Figure]


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run: the tables that it needs, the tidy frame that is made of them, and how the frame is drawn."""

    name: str
    needs: tuple[str, ...]
    frame: Frame
    draw: Draw

    def of_run(self, run: Run) -> Figure | None:
        """The figure of ``run``; None where a table that it needs has no rows, or none that it can use.

        Raises :class:`LensbenchError` for a table whose rows are incomplete.
        """
        if any(run.tables[name].empty for name in self.needs):
            return None
        frame = self.frame(run)
        if frame.empty:
            return None
        models = run.tables["models.csv"]
        if "model" in frame:
            frame = frame.assign(palette_number=frame["model"].map(palette_numbers(models["model"])))
        return self.draw(frame.assign(unit=unit(models)))


FIGURES: dict[str, RunFigure] = {}
"""Name (that of the file, without its suffix) -> figure."""


def figure(name: str, *, needs: tuple[str, ...], frame: Frame) -> Callable[[Draw], Draw]:
    """Register the decorated function as the figure ``name`` of a run.

    It takes the tidy frame that ``frame`` makes of a run, with two more columns: ``unit``, what losses are given per
    (``token`` or ``image``), and ``palette_number``, which :func:`looks_of` makes colours of. It is called
    for runs whose tables ``needs`` have rows, and whose frame has some.
    """

    def register(draw: Draw) -> Draw:
        FIGURES[name] = RunFigure(name, needs, frame, draw)
        return draw

    return register


def looks_of(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Model -> the colour, marker and dash that it has in every figure; those of its name where there is no run."""
    models = list(dict.fromkeys(frame["model"]))
    numbers = frame.drop_duplicates("model")["palette_number"].tolist() if "palette_number" in frame else []
    if not numbers or pd.isna(numbers).any():
        numbers = list(palette_numbers(models).values())
    return {model: line_look(int(number)) for model, number in zip(models, numbers, strict=True)}


def nats_per(frame: pd.DataFrame) -> str:
    """The unit of a frame's losses: nats/token where it has no column ``unit``."""
    return f"nats/{frame['unit'].iloc[0]}" if "unit" in frame else "nats/token"
