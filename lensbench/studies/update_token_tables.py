"""Tables of the study of tokens: intervals by number of tokens, and how many tokens an interval takes.

All numbers of tokens are of fitting tokens; dev and held-out tokens are a fixed share of them.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from lensbench.statistics import Array, mean_over_seeds
from lensbench.studies.update_tables import TINY, Row, share

POINTS, TOKENS, NEEDED = "points.csv", "tokens.csv", "needed.csv"

FURTHEST = 4
"""A number of tokens beyond the largest that was measured is named up to this factor, and called extrapolated"""

NEAR = 10
"""Numbers of tokens whose mean half-width is further than this factor from what is asked do not enter the line: half-widths
fall faster where tokens are few"""

MEASURED, EXTRAPOLATED, AT_MOST = "measured", "extrapolated", "at most"
"""How a number of tokens is known: between those measured, beyond them, or no more than the fewest with an interval"""


def points_table(rows: list[Row]) -> pd.DataFrame:
    """A row per stream and number of tokens: everything else follows from it."""
    return pd.DataFrame([_point(row) for row in rows])


def _point(row: Row) -> Row:
    job, value, truth = row["job"], row["in_place"], row["truth"]
    low, high = row["in_place_ci_low"], row["in_place_ci_high"]
    held = None if low is None or truth is None else int(low - TINY <= truth <= high + TINY)
    return {
        "family": job["family"], "d": job["d"], "number": job["number"], "fit_tokens": job["fit_tokens"],
        "dev_tokens": row["dev_tokens"], "eval_tokens": row["eval_tokens"], "gates": row["gates"],
        "passed": row["gates"].count("."), "in_place": value, "in_place_ci_low": low, "in_place_ci_high": high,
        "half_width": None if low is None else (high - low) / 2, "of_refits": row["of_refits"],
        "in_place_population": truth, "error": None if value is None or truth is None else value - truth,
        "covered": held, "reason": row["reason"], "seconds": row["seconds"], "peak_gib": row["peak_gib"],
    }  # fmt: skip


def summaries(points: pd.DataFrame, half_width: float) -> dict[str, pd.DataFrame]:
    """Intervals by number of tokens, and how many tokens an interval of +-``half_width`` takes."""
    return {TOKENS: tokens_table(points), NEEDED: needed_table(points, half_width)}


def tokens_table(points: pd.DataFrame) -> pd.DataFrame:
    """A row per family, width and number of tokens: means over the streams that have an interval.

    ``half_width``: with its 95 % Student-t interval over streams. ``of_refits``: the share of the variance behind intervals
    that lens refits bring. ``passed``: mean number of pairs that pass the gates, of all streams. ``rms``, ``bias``: of value
    less truth. ``covered``: the share of intervals that hold the truth, of ``truths``.
    """
    return pd.DataFrame(
        [
            {
                "family": family,
                "d": d,
                "fit_tokens": tokens,
                "per_d": of["fit_tokens"].iloc[0] / of["d"].iloc[0],
                **_means(of),
            }
            for (family, d, tokens), of in points.groupby(["family", "d", "fit_tokens"], sort=False)
        ]
    )


def _means(of: pd.DataFrame) -> Row:
    known = of[of["half_width"].notna()]
    errors = of["error"].dropna().to_numpy(float)
    held = of["covered"].dropna()
    mean, low, high = _mean(known["half_width"].to_numpy(float))
    row: Row = {
        "streams": len(of), "passed": float(of["passed"].mean()), "intervals": len(known),
        "half_width": mean, "half_width_ci_low": low, "half_width_ci_high": high,
        "of_refits": _mean(known["of_refits"].dropna().to_numpy(float))[0], "truths": len(held),
        "rms": float((errors**2).mean() ** 0.5) if len(errors) else None,
        "bias": float(errors.mean()) if len(errors) else None,
    }  # fmt: skip
    return row | share("covered", int(held.sum()), len(held)) | {"seconds": float(of["seconds"].median())}


def _mean(values: Array) -> tuple[float | None, float | None, float | None]:
    """Mean with its interval over streams; without one for a single stream."""
    if len(values) < 2:
        return (float(values[0]) if len(values) else None), None, None
    return mean_over_seeds(values.tolist())


@dataclass(frozen=True)
class Needed:
    """How many tokens an interval takes: a number with its 95 % interval and how it is known, or the reason why none."""

    tokens: float | None = None
    low: float | None = None
    high: float | None = None
    how: str = ""
    reason: str = ""
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None


def needed_table(points: pd.DataFrame, half_width: float) -> pd.DataFrame:
    """A row per family and width: how many tokens an interval of +-``half_width`` takes, and from how many on pairs pass.

    Numbers of tokens at which fewer than half of the streams have an interval do not count: those that have one are no fair
    sample. ``interval_at``: the fewest that count. ``no_pair_at``: the most tokens at which no pair of any stream passes the
    gates; ``a_pair_at``: the fewest at which one does.
    """
    rows = []
    for (family, d), of in points.groupby(["family", "d"], sort=False):
        has = of["half_width"].notna()
        known = of[has & (has.groupby(of["fit_tokens"]).transform("mean") >= 0.5)]
        one = needed(known["fit_tokens"].to_numpy(float), known["half_width"].to_numpy(float), half_width)
        passes = of.groupby("fit_tokens")["passed"].max() > 0
        rows.append(
            {
                "family": family, "d": d, "asked": half_width, "points": len(of), "intervals": len(known),
                "tokens": one.tokens, "tokens_ci_low": one.low, "tokens_ci_high": one.high,
                "per_d": None if one.tokens is None else one.tokens / of["d"].iloc[0], "how": one.how, "reason": one.reason,
                "slope": one.slope, "slope_ci_low": one.slope_low, "slope_ci_high": one.slope_high,
                "interval_at": _end(known["fit_tokens"].min()),
                "no_pair_at": _end(passes.index[~passes].max()), "a_pair_at": _end(passes.index[passes].min()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _end(tokens: float) -> float | None:
    return None if pd.isna(tokens) else float(tokens)


def needed(tokens: Array, half_widths: Array, asked: float) -> Needed:
    """How many tokens make half-widths ``[n]`` at ``tokens`` ``[n]`` fall to ``asked``: by a straight line of logarithms.

    The line is through the numbers of tokens whose mean half-width is within a factor :data:`NEAR` of ``asked``.
    The interval is Fieller's (1954), of the place where the line crosses: all numbers of tokens at which a t-test does not
    tell the line from ``asked``. No number is given more than :data:`FURTHEST` times beyond the largest one measured.
    """
    sizes = np.unique(tokens)
    if not len(sizes):
        return Needed(reason="not reached: at no number of tokens do half of the streams have an interval")
    means = np.array([half_widths[tokens == size].mean() for size in sizes])
    if (means <= asked).all():
        return Needed(float(sizes[0]), how=AT_MOST)
    near = np.isin(tokens, sizes[np.abs(np.log(np.maximum(means, 1e-300) / asked)) <= np.log(NEAR)])
    tokens, half_widths = tokens[near], half_widths[near]
    if len(np.unique(tokens)) < 2 or len(tokens) < 3:
        return Needed(
            reason=f"not reached: three intervals at two numbers of tokens, within a factor {NEAR} of {asked:g}, are needed"
        )
    if not (half_widths > 0).all():
        return Needed(reason="not reached: an interval of no width has no logarithm")
    x, y = np.log(tokens), np.log(half_widths) - np.log(asked)
    u, middle = x - x.mean(), y.mean()
    spread = (u**2).sum()
    slope = (u * y).sum() / spread
    doubt = stats.t.ppf(0.975, len(x) - 2) ** 2 * ((y - middle - slope * u) ** 2).sum() / (len(x) - 2)
    reach = np.sqrt(doubt / spread)
    line = Needed(slope=float(slope), slope_low=float(slope - reach), slope_high=float(slope + reach))
    if slope + reach >= 0:
        return replace(line, reason="not reached: half-widths do not surely fall with the number of tokens")
    crossing = np.exp(x.mean() - middle / slope)
    if crossing > FURTHEST * sizes[-1]:
        return replace(line, reason=f"not reached: more than {FURTHEST} times the {sizes[-1]:,.0f} tokens measured")
    # (middle + slope u)^2 = doubt (1 / n + u^2 / spread), solved for u
    a, root = slope**2 - reach**2, np.sqrt(doubt * ((slope**2 - reach**2) / len(x) + middle**2 / spread))
    low, high = (np.exp(x.mean() + (-middle * slope + sign * root) / a) for sign in (-1, 1))
    how = MEASURED if sizes[0] <= crossing <= sizes[-1] else EXTRAPOLATED
    return replace(line, tokens=float(crossing), low=float(low), high=float(high), how=how)
