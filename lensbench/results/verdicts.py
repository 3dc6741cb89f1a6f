"""``verdicts.csv`` from a run's other tables, so that another rule can judge a finished run without computing anything."""

from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd

from lensbench.measures.means import Estimate
from lensbench.measures.update.massive import MASSIVE, WithoutMassive
from lensbench.measures.update.sentences import NOT_RUN, errors_in_words, sentence
from lensbench.measures.update.summary import LOSSES_ASIDE
from lensbench.measures.update.verdict import (
    NOT_MEASURED,
    SUFFIXES,
    UNDETERMINED,
    UpdateFacts,
    UpdateVerdict,
    agreement,
    decide_update,
)
from lensbench.measures.verdict import SCOPES, Span, Verdict, VerdictRule, agreement_of_seeds, decide_on, spans_on
from lensbench.probes.injection_quantities import fate_of_errors
from lensbench.statistics import mean_over_seeds

COLUMNS = (
    "model", "seed", "scope", "known", "verdict", "sentence", "gate", "of_refits", "fixed_lens_verdict",
    "fixed_lens_reason",
)  # fmt: skip

EARLIER_NAMES = {"verdict": "fixed_lens_verdict", "reason": "fixed_lens_reason"}
"""Columns of tables that were written before the update decomposition -> their names now"""

Tables = Mapping[str, pd.DataFrame]
Who = tuple[Any, Any]
"""Model and seed"""


def verdict_table(
    tables: Tables,
    known: Mapping[str, str | None],
    rule: VerdictRule,
    of_refits: Mapping[tuple[Any, Any, str], float | None] | None = None,
) -> pd.DataFrame:
    """``verdicts.csv`` from indices, pairs, blocks, landmarks and probes; seeds must agree.

    ``known``: model -> what its construction says of it. ``of_refits``: by model, seed and scope, the share of lens refits
    in the variance of what is added in place, which no other table has.
    """
    rows: list[dict[str, Any]] = []
    seeds: dict[tuple[Any, str], list[tuple[UpdateFacts, UpdateVerdict]]] = {}
    for key, indexed in tables["indices.csv"].groupby(["model", "seed"], sort=False):
        model, seed = who = cast(Who, key)
        by_index = indexed.set_index("index")
        for scope in SCOPES:
            if seed == "all":
                each = seeds[model, scope]
                facts = UpdateFacts.over_seeds([one for one, _ in each], estimates_of(by_index))
                found = agreement([one for _, one in each])
            else:
                share = (of_refits or {}).get((model, seed, scope))
                facts = facts_of(tables, who, scope, by_index, share)
                found = decide_update(rule.update, facts)
                seeds.setdefault((model, scope), []).append((facts, found))
            null, errors = null_of(tables, who, scope), errors_of(tables, who, scope)
            massive = without_massive_of(tables, who, scope)
            said = sentence(rule.update, facts, found, null=null, errors=errors, massive=massive)
            row = {"model": model, "seed": seed, "scope": scope, "known": known.get(model)}
            row |= {
                "verdict": found.verdict,
                "sentence": said,
                "gate": found.gate or None,
                "of_refits": facts.of_refits,
            }
            rows.append(row | fixed_lens_columns(rule, rows, by_index, row))
    return pd.DataFrame(rows, columns=list(COLUMNS))


# The update decomposition
def facts_of(tables: Tables, who: Who, scope: str, by_index: pd.DataFrame, of_refits: float | None) -> UpdateFacts:
    """What a verdict looks at, read from the tables; ``by_index``: the model and seed's rows of ``indices.csv``."""
    pairs, blocks = (records(tables[name], who) for name in ("update.csv", "blocks.csv"))
    reason = ""
    if not pairs:
        name = "in_place" + SUFFIXES[scope]
        reason = str(by_index.loc[name, "reason"]) if name in by_index.index else NOT_MEASURED
    return UpdateFacts.of(scope, estimates_of(by_index), pairs, blocks, of_refits=of_refits, reason=reason)


def records(table: pd.DataFrame, who: Who) -> list[dict[Hashable, Any]]:
    """The rows of one model and seed."""
    found: list[dict[Hashable, Any]] = table[(table["model"] == who[0]) & (table["seed"] == who[1])].to_dict("records")
    return found


def estimates_of(by_index: pd.DataFrame) -> dict[str, Estimate]:
    """The indices with their intervals over documents, by name; unknown numbers are None."""
    rows = by_index[["value", "ci_low", "ci_high", "reason"]].itertuples(name=None)
    return {
        name: Estimate(known_number(value), known_number(low), known_number(high), _text(reason))
        for name, value, low, high, reason in rows
    }


def known_number(value: Any) -> float | None:
    """A number of a table, or None for an empty cell."""
    return None if value is None or np.isnan(value) else float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def null_of(tables: Tables, who: Who, scope: str) -> Estimate | None:
    """What is added in place in the model's own states with updates shuffled; of all seeds, the mean."""
    table, (model, seed) = tables["landmarks.csv"], who
    rows = table[(table["model"] == model) & (table["landmark"] == "shuffled")]
    rows = rows[(rows["index"] == LOSSES_ASIDE + SUFFIXES[scope]) & rows["value"].notna()]
    rows = rows if seed == "all" else rows[rows["seed"] == seed]
    return None if rows.empty else Estimate(float(rows["value"].astype(float).mean()), None, None)


def without_massive_of(tables: Tables, who: Who, scope: str) -> WithoutMassive | None:
    """What is added in place without massive activations; of all seeds, the mean; None where it is unknown."""
    table, (model, seed) = tables["variants.csv"], who
    rows = table[(table["model"] == model) & (table["setting"] == MASSIVE)]
    rows = rows[rows["seed"] != "all"] if seed == "all" else rows[rows["seed"] == seed]
    return WithoutMassive.of(rows.to_dict("records"), SUFFIXES[scope])


def errors_of(tables: Tables, who: Who, scope: str) -> str:
    """What becomes of injected errors, in words; empty where the run has no probe of it."""
    table, (model, seed) = tables["probes.csv"], who
    rows = table[(table["model"] == model) & (table["probe"] == "injection_survival")]
    rows = rows[rows["seed"] == seed] if (rows["seed"] == seed).any() or seed != "all" else rows
    name = f"mean_survival_error{SUFFIXES[scope]}"
    mine = rows[rows["quantity"] == name]
    if mine.empty or mine["value"].isna().all():
        return ""
    if len(mine) > 1:  # a table of several seeds without rows over them
        survival = Estimate(*mean_over_seeds(mine["value"].astype(float).to_list()))
        fates = {fate_of_errors(of_seed, SUFFIXES[scope]) for _, of_seed in rows.groupby("seed", sort=False)}
        return errors_in_words(fates.pop() if len(fates) == 1 else "undetermined", survival)
    value, low, high = (known_number(mine.iloc[0][column]) for column in ("value", "ci_low", "ci_high"))
    return errors_in_words(fate_of_errors(rows, SUFFIXES[scope]), Estimate(value, low, high))


def landmark_verdicts(rule: VerdictRule, updates: Any) -> Iterator[tuple[str, str, UpdateVerdict]]:
    """Name, scope and verdict of each landmark of a model and seed's :class:`UpdateResult`."""
    for name, found in updates.landmarks.items():
        for scope in SUFFIXES:
            yield name, scope, decide_update(rule.update, found.facts(scope))


# Lenses held fixed
def fixed_lens_columns(
    rule: VerdictRule, earlier: list[dict[str, Any]], by_index: pd.DataFrame, row: Mapping[str, Any]
) -> dict[str, str]:
    """The verdict on gain visibility, movement and consistency: intervals over documents, widened by what refits change.

    ``earlier``: the rows so far, which hold those of the model's seeds.
    """
    span, scope = partial(span_of, by_index), row["scope"]
    if row["seed"] == "all":
        each = [r for r in earlier if (r["model"], r["scope"]) == (row["model"], scope)]
        verdicts = [Verdict(r["fixed_lens_verdict"], r["fixed_lens_reason"]) for r in each]
        found = agreement_of_seeds(verdicts, spans_on(scope, span))
    else:
        found = decide_on(rule, scope, span)
    return {"fixed_lens_verdict": found.answer, "fixed_lens_reason": found.reason}


def span_of(indexed: pd.DataFrame, name: str) -> Span | None:
    """An index of one model and seed; ``indexed``: its rows of ``indices.csv`` by index."""
    columns = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    numbers = indexed.loc[[name], columns].to_numpy(float)[0].tolist()
    value, low, high, fit_low, fit_high = (None if np.isnan(x) else x for x in numbers)
    if value is None or low is None or high is None:
        return None
    return Span(value, low, high).wider(fit_low, fit_high)


# Tables of earlier versions
def as_now(table: pd.DataFrame) -> pd.DataFrame:
    """A table of an earlier version with the columns of this one: it says that it has no update decomposition."""
    if "sentence" in table:
        return table
    renamed = table.rename(columns=EARLIER_NAMES)
    return renamed.assign(verdict=UNDETERMINED, gate=NOT_MEASURED, sentence=NOT_RUN, of_refits=np.nan)
