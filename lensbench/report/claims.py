"""What became of the claims that a suite declared: each tested on the tables of a run, all corrected together (Holm)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
from pydantic import ValidationError
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lensbench.errors import LensbenchError
from lensbench.measures.means import Estimate
from lensbench.report.formatting import with_interval
from lensbench.results.folder import Run
from lensbench.statistics import mean_over_seeds
from lensbench.suite.claims import Claim

FEWEST_SEEDS = 5
"""A claim over fewer seeds is marked."""


LEVEL = 0.05
"""A claim holds where its p, corrected by Holm, is below this."""


SMALLEST_SHOWN = 1e-4
"""Tables show no smaller p than this: a tail so far out is more than an interval tells"""


ERRORS_TO_END = float(stats.norm.ppf(0.975))
"""Standard errors from a value to an end of its 95 % interval"""


LOSSES = ("ce", "bits_per_byte")
"""Quantities that ``models.csv`` has, not ``indices.csv``"""


BySeed = Mapping[str, Estimate]
"""Seed -> value with its interval over documents and refits"""


@dataclass(frozen=True)
class Tested:
    """What a test of one claim came to; ``p`` is None where it was not tested, and ``reason`` says why."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    p: float | None = None
    reason: str = ""
    counted: bool = True
    """Whether it counts among the tests that are corrected together"""
    note: str = ""


def declared(run: Run) -> list[Claim]:
    """The claims of a run's suite; what other versions of lensbench say of them is left aside.

    Raises :class:`LensbenchError` for a manifest with a claim that is none.
    """
    found = []
    for settings in run.manifest.suite.claims:
        content = {key: value for key, value in settings.content().items() if key in Claim.model_fields}
        try:
            found.append(Claim.model_validate(content))
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise LensbenchError(f"{run.folder}: its manifest's claims are damaged: {message}") from error
    return found


def claim_rows(run: Run) -> list[dict[str, Any]]:
    """A row for each statement that a run's suite claims, whether it could be tested or not.

    Holm's correction is over all that was declared: what is undefined, or of a model that is not there yet, counts as a test
    that found nothing. Only a landmark on which the decomposition may not speak (its gates) does not count.
    """
    claims = [(claim, of) for claim in declared(run) for of in claim.statements]
    tested = [tested_claim(run, claim, of) for claim, of in claims]
    corrected = holm([test.p for test in tested if test.counted])
    rows = []
    for (claim, of), test in zip(claims, tested, strict=True):
        p_holm = next(corrected) if test.counted else None
        row: dict[str, Any] = {
            "kind": "claim",
            "run": str(run.folder),
            "model": claim.model,
            "seed": "all",
            "index": of,
        }
        row |= {"landmark": claim.landmark, "probe": claim.probe, "claim": claim.in_words(of), "status": claim.status}
        if claim.against is not None:
            row |= {
                "against_run": str(run.folder),
                "against_model": claim.against,
                "against_seed": "all",
                "paired": True,
            }
        row |= {"value": test.value, "ci_low": test.low, "ci_high": test.high, "seeds": test.seeds or None}
        row |= {"p": test.p, "p_holm": p_holm, "outcome": outcome(claim, test, p_holm), "note": noted(test)}
        rows.append(row)
    return rows


def holm(p: list[float | None]) -> Any:
    """An iterator over ``p`` as Holm corrects it; None where there was no test, which counts with a p of 1."""
    if not any(one is not None for one in p):
        return iter([None] * len(p))
    corrected = multipletests([1.0 if one is None else one for one in p], method="holm")[1]
    return iter([None if one is None else float(new) for one, new in zip(p, corrected, strict=True)])


def outcome(claim: Claim, test: Tested, p_holm: float | None) -> str:
    """``holds``, ``does not hold``, or ``not tested`` with the reason."""
    if test.p is None or p_holm is None or test.value is None:
        return f"not tested: {test.reason}"
    right_side = claim.direction is None or (test.value > 0) == (claim.direction == "above")
    return "holds" if p_holm < LEVEL and right_side else "does not hold"


def noted(test: Tested) -> str:
    """What a reader has to know next to the outcome."""
    few = ""
    if test.p is not None and test.seeds < FEWEST_SEEDS:
        few = "one seed, by its own interval" if test.seeds == 1 else f"only {test.seeds} seeds"
    return "; ".join(filter(None, [few, test.note]))


CELLS = ("claim", "value [95 %]", "seeds", "p", "Holm", "outcome", "declared")
"""Headings of :func:`claim_cells`"""


def claim_cells(row: Mapping[Any, Any]) -> list[str]:
    """A row of :func:`claim_rows` as tables show it, under :data:`CELLS`."""
    p = [p_text(row[column]) for column in ("p", "p_holm")]
    value = with_interval(row) if pd.notna(row["value"]) else ""
    seeds = f"{row['seeds']:.0f}" if pd.notna(row["seeds"]) else ""
    said = f"{row['outcome']} ({row['note']})" if row["note"] else row["outcome"]
    return [row["claim"], value, seeds, *p, said, row["status"] if pd.notna(row["status"]) else ""]


def p_text(p: Any) -> str:
    """A p as tables show it; empty where there is none."""
    if pd.isna(p):
        return ""
    return f"{p:.2g}" if p >= SMALLEST_SHOWN else f"<{SMALLEST_SHOWN:g}"


# Tests
def tested_claim(run: Run, claim: Claim, of: str) -> Tested:
    """One statement of a claim, tested on the tables of a run."""
    models, sides = set(run.tables["models.csv"]["model"]), []
    for name in (name for name in (claim.model, claim.against) if name is not None):
        if name not in models:
            return Tested(reason=f"model {name} is not in these folders")
        sides.append(values_by_seed(run, claim, name, of))
        if not sides[-1]:
            who = name if claim.landmark is None else f"{name}+{claim.landmark}"
            return Tested(reason=f"{table_of(claim, of)} has no {of} of {who}")
    if claim.against is not None:
        return difference_of(*sides)
    (values,) = sides
    if claim.landmark is not None:
        return landmark_of(claim, values)
    return bound_of(claim, values)


def difference_of(values: BySeed, against: BySeed) -> Tested:
    """The difference of two models, two-sided, paired by seed, by Student's t."""
    common = [seed for seed in values if seed in against]
    if len(common) < 2:
        return Tested(reason=f"a difference is paired by seed: two seeds in common are needed, there are {len(common)}")
    if reason := undefined_at(values, common) or undefined_at(against, common):
        return Tested(seeds=len(common), reason=reason)
    gaps = [cast(float, values[seed].value) - cast(float, against[seed].value) for seed in common]
    mean, low, high = mean_over_seeds(gaps)
    if np.std(gaps) == 0:
        return Tested(mean, low, high, len(gaps), reason="the difference is the same at every seed")
    return Tested(mean, low, high, len(gaps), float(stats.ttest_1samp(gaps, 0.0).pvalue))


def landmark_of(claim: Claim, values: BySeed) -> Tested:
    """A bound on a landmark, over the seeds at which the decomposition may speak of it."""
    passed = {seed: one for seed, one in values.items() if one.value is not None}
    few = f"the gates pass for {len(passed)} of {len(values)} seeds"
    if not passed:
        said = list(dict.fromkeys(one.reason for one in values.values() if one.reason))
        return Tested(reason=said[0] if said else "no pair of layers passes the gates", counted=False)
    if len(passed) == 1 < len(values):
        return Tested(reason=f"{few}, and two are needed", counted=False)
    tested = bound_of(claim, passed)
    return tested if len(passed) == len(values) else replace(tested, note=few)


def bound_of(claim: Claim, values: BySeed) -> Tested:
    """A claim about one model against a bound: of several seeds by Student's t, of one by its interval.

    Of several seeds, p is that of the t-test of their values against the bound, one-sided; for ``within`` it is the larger
    of the two one-sided p, for ``differs_from`` twice the smaller. Of one seed, the estimate is taken as normal, with the
    standard error that its 95 % interval has on the side of the bound, (value - end) / 1.96: a one-sided p is .025 where
    that end touches the bound. The interval is over documents and lens refits, whose range widens it where it is reported
    apart; that of a probe is over documents.
    """
    if reason := undefined_at(values, list(values)):
        return Tested(seeds=len(values), reason=reason)
    points = [cast(float, one.value) for one in values.values()]
    if len(points) > 1:
        mean, low, high = mean_over_seeds(points)
        tested = Tested(mean, low, high, len(points))
        if np.std(points) == 0:
            return replace(tested, reason="it is the same at every seed")
        return replace(tested, p=p_of(claim, partial(t_test, points)))
    (one,) = values.values()
    tested = Tested(one.value, one.low, one.high, 1)
    if one.low is None or one.high is None:
        return replace(tested, reason=one.reason or "it has no interval")
    if not one.low < points[0] < one.high:
        return replace(tested, reason="its interval has no length on each side of it")
    return replace(tested, p=p_of(claim, partial(normal_test, points[0], one.low, one.high)), note=one.reason)


def p_of(claim: Claim, above: Callable[[float, bool], float]) -> float:
    """The p of a bound; ``above(bound, True)`` is the p that the value lies above a bound, with False below it."""
    if claim.above is not None:
        return above(claim.above, True)
    if claim.below is not None:
        return above(claim.below, False)
    if claim.within is not None:
        return max(above(claim.within[0], True), above(claim.within[1], False))
    value = cast(float, claim.differs_from)
    return min(1.0, 2 * min(above(value, True), above(value, False)))


def t_test(points: list[float], bound: float, above: bool) -> float:
    """One-sided p of Student's t-test of one value per seed."""
    return float(stats.ttest_1samp(points, bound, alternative="greater" if above else "less").pvalue)


def normal_test(value: float, low: float, high: float, bound: float, above: bool) -> float:
    """One-sided p from a 95 % interval: its half on the side of the bound is 1.96 standard errors."""
    distance = (value - bound) / (value - low) if above else (bound - value) / (high - value)
    return float(stats.norm.sf(ERRORS_TO_END * distance))


def undefined_at(values: BySeed, seeds: list[str]) -> str:
    """Why there is no value at one of some seeds; empty where there are all."""
    seed = next((seed for seed in seeds if values[seed].value is None), None)
    if seed is None:
        return ""
    reason = values[seed].reason or "undefined"
    return reason if len(values) == 1 else f"undefined for seed {seed}: {reason}"


# Values
def table_of(claim: Claim, of: str) -> str:
    """The table that has what a claim is about."""
    if claim.probe is not None:
        return "probes.csv"
    if claim.landmark is not None:
        return "landmarks.csv"
    return "models.csv" if of in LOSSES else "indices.csv"


def values_by_seed(run: Run, claim: Claim, model: str, of: str) -> dict[str, Estimate]:
    """What a claim is about, of one model at each of its seeds; empty where the tables do not have it."""
    table = run.tables[table_of(claim, of)]
    if claim.probe is not None:
        of_probe = table[table["probe"] == claim.probe]
        # A probe that does not apply to a model has one row there, of its own name, with the reason.
        none = (of_probe["quantity"] == claim.probe) & of_probe["value"].isna()
        rows = of_probe[(of_probe["quantity"] == of) | none]
    elif claim.landmark is not None:
        rows = table[(table["landmark"] == claim.landmark) & (table["index"] == of)]
    elif of in LOSSES:
        names = {of: "value", f"{of}_ci_low": "ci_low", f"{of}_ci_high": "ci_high"}
        rows = table.rename(columns=names).assign(reason="")
    else:
        rows = table[table["index"] == of]
    rows = rows[(rows["model"] == model) & (rows["seed"].astype(str) != "all")]
    return {str(row["seed"]): estimate_of(row) for row in rows.to_dict("records")}


def estimate_of(row: Mapping[Any, Any]) -> Estimate:
    """A row's value with its interval, widened by the range of lens refits where there is one."""
    value, low, high, fit_low, fit_high = (
        None if pd.isna(row.get(column)) else float(row[column])
        for column in ("value", "ci_low", "ci_high", "fit_low", "fit_high")
    )
    if low is not None and high is not None:
        low, high = min(low, low if fit_low is None else fit_low), max(high, high if fit_high is None else fit_high)
    return Estimate(value, low, high, row["reason"] if isinstance(row["reason"], str) else "")
