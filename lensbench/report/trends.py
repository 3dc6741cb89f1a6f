"""Trends: how much an index changes as training tokens or parameters double (:mod:`lensbench.report.slopes`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from rich.table import Column, Table

from lensbench.errors import LensbenchError, nearest
from lensbench.report.claims import p_text
from lensbench.report.comparable import refuse_unlike
from lensbench.report.compare import compared_models, read_distinct
from lensbench.report.figures.style import style, write_figure
from lensbench.report.figures.trends import FIGURE_OVER, points_with_slopes, trend_panels
from lensbench.report.formatting import number, with_interval
from lensbench.report.joining import together
from lensbench.report.series import HEADLINES, OVER, Series, points_of, series_of, values_of
from lensbench.report.slopes import trend_table
from lensbench.results.folder import Run
from lensbench.results.schema import unit
from lensbench.runtime.files import write_atomically


@dataclass(frozen=True)
class Trends:
    """``table``: as of :func:`lensbench.report.slopes.trend_table`; ``points``: the values that its slopes are read from."""

    table: pd.DataFrame
    points: pd.DataFrame
    run: Run


def trends_of(folders: Sequence[Path], *, indices: Sequence[str] = (), named: Sequence[Sequence[str]] = ()) -> Trends:
    """The trends of all series in some runs; p is corrected by Holm over the ``indices`` (all, if left out) of a series.

    ``named``: names of models that are series over parameters, beside those that names tell. Raises
    :class:`LensbenchError` for damaged runs, those that measure other things, unknown names, and where there is no series.
    """
    runs = read_distinct(list(folders))
    for run in runs[1:]:
        refuse_unlike(runs[0], run)
    run = together(runs)
    known = list(run.tables["models.csv"]["model"].unique())
    for name in (name for several in named for name in several):
        if name not in known:
            raise LensbenchError(f"no run has a model {name!r}; {nearest(name, known)}")
    series, values = series_of(run.tables["models.csv"], named), values_of(run)
    if short := [several for several in named if len(set(several)) < 2]:
        raise LensbenchError(f"--series {','.join(short[0])}: name at least two models, A,B")
    there = list(dict.fromkeys(values["index"]))
    if unknown := [name for name in indices if name not in there]:
        raise LensbenchError(f"no run has an index {unknown[0]!r}; {nearest(unknown[0], there)}")
    for several in named:
        if ", ".join(several) not in {one.name for one in series}:
            raise LensbenchError(
                f"--series {','.join(several)}: these models are of one size, within half a doubling of parameters; "
                "name models of different sizes"
            )
    if not series:
        raise LensbenchError(
            "there is no series of models in these runs: models whose names differ in a size "
            "(gpt-16k, gpt-64k) or after @ (gpt@10000, gpt); --series A,B names one"
        )
    chosen = [name for name in there if not indices or name in indices]
    drawn = (
        {} if _all_have_seeds(series, values) else {(m.model, m.seed): m for r in runs for m in compared_models(r, 0)}
    )
    points = points_of(values[values["index"].isin(chosen)], series)
    return Trends(trend_table(series, values, chosen, drawn), points, run)


def _all_have_seeds(series: Sequence[Series], values: pd.DataFrame) -> bool:
    """Whether seeds give every interval, so that no draws over documents are needed."""
    seeds = values.groupby("model")["seed"].nunique()
    return all(max(seeds.get(model, 0) for model in one.models) > 1 for one in series)


def shown_indices(trends: Trends, indices: Sequence[str], everything: bool) -> list[str]:
    """The indices to show: those asked for, all, or the headlines that the runs have."""
    there = list(dict.fromkeys(trends.table["index"]))
    if indices or everything:
        return [name for name in there if not indices or name in indices]
    return [name for name in HEADLINES if name in there] or there


def trend_tables(trends: Trends, shown: Sequence[str]) -> list[Table]:
    """A table for the terminal of each thing that models differ in."""
    found = []
    for over, words in OVER.items():
        rows = trends.table[(trends.table["over"] == over) & trends.table["index"].isin(shown)]
        if rows.empty:
            continue
        title = f"Change per doubling of {words} [95 %]; Holm over the indices of a series"
        table = Table(
            Column("series", no_wrap=True), Column("index"), "models", "seeds", "first", "last", "slope", "p", "Holm",
            "note", title=title,
        )  # fmt: skip
        for row in rows.to_dict("records"):
            ends = (number(row["first"]), number(row["last"]))
            slope = with_interval(row, "slope") if pd.notna(row["ci_low"]) else number(row["slope"])
            cells = (str(row["models"]), str(row["seeds"]), *ends, slope, p_text(row["p"]), p_text(row["p_holm"]))
            table.add_row(row["series"], row["index"], *cells, row["note"])
        found.append(table)
    return found


def draw_trends(trends: Trends, shown: Sequence[str], folder: Path) -> list[Path]:
    """Write a figure of the shown indices over each thing that models differ in; return the paths."""
    paths = []
    for over, name in FIGURE_OVER.items():
        points = trends.points[(trends.points["over"] == over) & trends.points["index"].isin(shown)]
        if points.empty:
            continue
        frame = points_with_slopes(points, trends.table).assign(unit=unit(trends.run.tables["models.csv"]))
        with style():
            drawing = trend_panels(frame, over, shown)
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{name}.png")
            write_atomically(paths[-1], partial(write_figure, drawing))
    return paths
