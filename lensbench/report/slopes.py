"""Slopes of indices over doublings of training tokens or parameters, with their intervals and p.

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
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats

from lensbench.report.claims import holm, normal_test
from lensbench.report.compare import ComparedModel, why_unpaired
from lensbench.report.series import TOKENS, Series
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


def trend_table(
    series: Sequence[Series],
    values: pd.DataFrame,
    chosen: Sequence[str],
    drawn: Mapping[tuple[str, int], ComparedModel],
) -> pd.DataFrame:
    """A row for each series and chosen index, columns :data:`TREND_COLUMNS`; p is corrected (Holm) within each series.

    ``values``: as of :func:`lensbench.report.series.values_of`. ``drawn``: model and seed -> its draws over documents, where
    there are any.
    """
    rows = [row for one in series for row in slope_rows(one, values, chosen, drawn)]
    return corrected_over(pd.DataFrame(rows, columns=list(TREND_COLUMNS)), chosen)


def corrected_over(table: pd.DataFrame, indices: Sequence[str]) -> pd.DataFrame:
    """The rows of these indices, p corrected (Holm) over them alone within each series."""
    found = table[table["index"].isin(list(indices))].astype({"p_holm": object})
    for _, rows in found.groupby(["over", "series"], sort=False):
        p = [None if pd.isna(one) else float(one) for one in rows["p"]]
        found.loc[rows.index, "p_holm"] = np.array(list(holm(p)), dtype=object)
    return found


def slope_rows(
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
