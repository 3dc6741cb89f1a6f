"""Trends: how much an index changes as training tokens or parameters double, with an interval and a p.

A trend is the least-squares slope of an index on log2 of the tokens or parameters: a sum of the models' values with fixed
weights. Nothing is supposed of how values lie about the line; intervals are those of that sum, by what is drawn anew:

- checkpoints of several seeds: a slope of each seed, Student's t over seeds;
- sizes, some of several seeds: the variances of their means over seeds, Welch's t; where a size has one seed, all have the
  pooled variance of the others;
- one seed: bootstrap draws over documents, paired where all models scored the same text; where the run kept no draws, the
  models' own intervals, taken as independent. Then p is that of a normal estimate with the standard error that the half of
  the interval towards zero has, as of a claim about one seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.table import Column, Table
from scipy import stats

from lensbench.errors import LensbenchError, nearest
from lensbench.report.claims import holm, normal_test, p_text
from lensbench.report.comparable import refuse_unlike
from lensbench.report.compare import ComparedModel, compared_models, read_distinct, why_unpaired
from lensbench.report.figures.style import style, write_figure
from lensbench.report.figures.trends import FIGURE_OVER, trend_panels
from lensbench.report.formatting import number, with_interval
from lensbench.report.joining import together
from lensbench.report.series import HEADLINES, OVER, TOKENS, Series, points_of, series_of, values_of
from lensbench.results.folder import Run
from lensbench.results.schema import unit
from lensbench.runtime.files import write_atomically
from lensbench.statistics import Array, interval, mean_over_seeds

TREND_COLUMNS = (
    "over", "series", "index", "models", "x_low", "x_high", "seeds", "first", "last", "slope", "ci_low", "ci_high", "p",
    "p_holm", "note",
)  # fmt: skip

FEWEST_DRAWS = 0.9
"""Share of the bootstrap draws that must give a slope"""


@dataclass(frozen=True)
class Slope:
    """The change of an index per doubling."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Trends:
    """``table``: a row for each series and index, columns :data:`TREND_COLUMNS`; ``points``: what they are read from."""

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
    rows = [row for one in series for row in _rows(one, values, chosen, drawn)]
    points = points_of(values[values["index"].isin(chosen)], series)
    return Trends(pd.DataFrame(rows, columns=list(TREND_COLUMNS)), points, run)


def _all_have_seeds(series: Sequence[Series], values: pd.DataFrame) -> bool:
    """Whether seeds give every interval, so that no draws over documents are needed."""
    seeds = values.groupby("model")["seed"].nunique()
    return all(max(seeds.get(model, 0) for model in one.models) > 1 for one in series)


def _rows(
    one: Series, values: pd.DataFrame, chosen: Sequence[str], drawn: Mapping[tuple[str, int], ComparedModel]
) -> list[dict[str, Any]]:
    """A row for each index of a series that two of its models have."""
    found: list[dict[str, Any]] = []
    for index in chosen:
        of_index = values[(values["index"] == index) & values["model"].isin(list(one.models)) & values["value"].notna()]
        by_model = {m: of_index[of_index["model"] == m].set_index("seed") for m in one.models}
        by_model, note = _at_common_seeds(one, by_model)
        x = np.log2([one.models[m] for m in by_model])
        if len(set(x)) < 2:
            continue
        slope = slope_of(one, index, by_model, drawn)
        means = [float(rows["value"].mean()) for rows in by_model.values()]
        found.append(
            {
                "over": one.over, "series": one.name, "index": index, "models": len(x), "x_low": 2.0 ** x[0],
                "x_high": 2.0 ** x[-1], "seeds": max(len(rows) for rows in by_model.values()), "first": means[0],
                "last": means[-1], "slope": slope.value, "ci_low": slope.low, "ci_high": slope.high, "p": slope.p,
                "note": "; ".join(filter(None, [note, slope.note])),
            }
        )  # fmt: skip
    for row, corrected in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = corrected
    return found


def _at_common_seeds(one: Series, by_model: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], str]:
    """Without models at which the index is undefined; over tokens, at the seeds that all that are left have."""
    absent = [model for model, rows in by_model.items() if rows.empty]
    kept = {model: rows for model, rows in by_model.items() if not rows.empty}
    if one.over == TOKENS and kept:
        most = set().union(*(rows.index for rows in kept.values()))
        common = set.intersection(*(set(rows.index) for rows in kept.values()))
        if common < most and len(common) < 2:  # a seed at which it is undefined early leaves that model out
            absent += [model for model, rows in kept.items() if set(rows.index) != most]
            kept = {model: rows for model, rows in kept.items() if set(rows.index) == most}
            common = most
        kept = {model: rows.loc[sorted(common)] for model, rows in kept.items()}
    return kept, f"undefined at {', '.join(absent)}" if absent else ""


def slope_weights(x: Array) -> Array:
    """Weights ``[P]`` of values at ``x`` whose sum is the least-squares slope."""
    centred = x - x.mean()
    weights: Array = centred / np.square(centred).sum()
    return weights


def slope_of(
    one: Series, index: str, by_model: Mapping[str, pd.DataFrame], drawn: Mapping[tuple[str, int], ComparedModel]
) -> Slope:
    """The slope of an index per doubling; ``by_model``: model -> its values by seed, in the order of the series."""
    weights = slope_weights(np.log2([one.models[m] for m in by_model]))
    seeds = [rows["value"].to_numpy(float) for rows in by_model.values()]
    if max(map(len, seeds)) == 1:
        return of_one_seed(weights, by_model, index, drawn)
    if one.over == TOKENS:
        return over_paired_seeds(weights, np.stack(seeds))
    return over_separate_seeds(weights, seeds)


def over_paired_seeds(weights: Array, values: Array) -> Slope:
    """Student's t over the slopes of the seeds; ``values`` ``[P, S]``."""
    slopes = weights @ values
    mean, low, high = mean_over_seeds(list(slopes))
    if np.ptp(slopes) == 0:
        return Slope(mean, low, high, note="the same at every seed")
    return Slope(mean, low, high, float(stats.ttest_1samp(slopes, 0.0).pvalue))


def over_separate_seeds(weights: Array, values: Sequence[Array]) -> Slope:
    """Welch's t of a sum of means; a mean of one seed has the pooled variance of the others."""
    counts = np.array([len(v) for v in values])
    slope = float(weights @ [v.mean() for v in values])
    own = np.array([v.var(ddof=1) if len(v) > 1 else np.nan for v in values])
    several, note = counts > 1, ""
    if several.all():
        parts = weights**2 * own / counts
        freedom = parts.sum() ** 2 / (parts**2 / (counts - 1)).sum() if parts.sum() > 0 else 1.0
    else:
        freedom = float((counts - 1).sum())
        pooled = float(((counts - 1)[several] * own[several]).sum() / freedom)
        parts = weights**2 * pooled / counts
        note = "one seed of a size: its variance is that of the others"
    error = float(parts.sum() ** 0.5)
    if error == 0:
        return Slope(slope, slope, slope, note="the same at every seed")
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Slope(slope, slope - reach, slope + reach, float(2 * stats.t.sf(abs(slope) / error, freedom)), note)


def of_one_seed(
    weights: Array, by_model: Mapping[str, pd.DataFrame], index: str, drawn: Mapping[tuple[str, int], ComparedModel]
) -> Slope:
    """Over documents: draws where there are any, else the models' own intervals."""
    rows = {model: rows.iloc[0] for model, rows in by_model.items()}
    slope = float(weights @ [row["value"] for row in rows.values()])
    models = [drawn.get((m, int(by_model[m].index[0]))) for m in rows]
    draws = [one.draws.get(index) if one is not None else None for one in models]
    if all(d is not None and np.ptp(d[np.isfinite(d)] if np.isfinite(d).any() else [0.0]) > 0 for d in draws):
        return _of_draws(weights, slope, cast(list[ComparedModel], models), cast(list[Array], draws))
    widths = np.array([row["ci_high"] - row["ci_low"] for row in rows.values()], float)
    if not np.isfinite(widths).all() or not (widths > 0).any():
        return Slope(slope, note="one seed, and no intervals")
    reach = float(np.sqrt((weights**2 * (widths / 2) ** 2).sum()))
    found = Slope(slope, slope - reach, slope + reach, note="one seed: intervals taken as independent")
    return _with_p(found)


def _of_draws(weights: Array, slope: float, models: list[ComparedModel], draws: list[Array]) -> Slope:
    """Percentile interval of the slopes of the draws."""
    count, note = min(map(len, draws)), "one seed: over documents"
    kept = [d[:count] for d in draws]
    if any(why_unpaired(models[0], other) for other in models[1:]):
        # Unpaired draws must not move together: pair each with another's.
        kept = [np.roll(d, number * count // len(kept)) for number, d in enumerate(kept)]
        note += ", not paired"
    slopes = weights @ np.stack(kept)
    slopes = slopes[np.isfinite(slopes)]
    if len(slopes) < FEWEST_DRAWS * count:
        return Slope(slope, note=f"{note}; undefined in {count - len(slopes)} of {count} draws")
    low, high = (float(end) for end in interval(slopes))
    return _with_p(Slope(slope, low, high, note=note))


def _with_p(slope: Slope) -> Slope:
    """Two-sided, from the half of the interval towards zero."""
    low, high = cast(float, slope.low), cast(float, slope.high)
    if not low < slope.value < high:
        return replace(slope, note=f"{slope.note}; its interval has no length on each side of it")
    sides = [normal_test(slope.value, low, high, 0.0, above) for above in (True, False)]
    return replace(slope, p=min(1.0, 2 * min(sides)))


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
        with style():
            drawing = trend_panels(points.assign(unit=unit(trends.run.tables["models.csv"])), over, shown)
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{name}.png")
            write_atomically(paths[-1], partial(write_figure, drawing))
    return paths
