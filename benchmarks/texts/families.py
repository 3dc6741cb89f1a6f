"""What changes as models grow, and as they train: trends per doubling, and which layers come first, for templates."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.texts.numbers import Condition, Number, TextError, markdown
from lensbench.report.claims import LEVEL, p_text
from lensbench.report.joining import together
from lensbench.report.series import OVER, Series, series_of, values_of
from lensbench.report.trends import trends_of
from lensbench.results.folder import Run, read_run
from lensbench.statistics import mean_over_seeds

DECLARED = {
    "ce": "cross-entropy",
    "in_place_without_layer0": "added in place",
    "clarity_without_layer0": "clarity",
    "news_without_layer0": "news",
    "shared_consistency_without_layer0": "consistency",
    "injection_survival: mean_survival_error_without_layer0": "remaining injected error",
}
"""The indices whose trends were declared before any run -> words"""

UNTOLD = "-"
"""What tables show where a value is undefined"""


class Families:
    """Some run folders of one suite: models that differ in their parameters, or in their training tokens."""

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, names

    @cached_property
    def run(self) -> Run:
        """All models in one."""
        return together([read_run(self.root / name) for name in self.names])

    @cached_property
    def values(self) -> pd.DataFrame:
        """Every index of every model and seed."""
        return values_of(self.run)

    @cached_property
    def indices(self) -> list[str]:
        """The declared indices that the runs have."""
        there = set(self.values.loc[self.values["value"].notna(), "index"])
        return [name for name in DECLARED if name in there]

    @cached_property
    def series(self) -> dict[str, Series]:
        """The series of models, by name."""
        return {one.name: one for one in series_of(self.run.tables["models.csv"])}

    @cached_property
    def trends(self) -> pd.DataFrame:
        """The trends of the declared indices, as ``lensbench trends`` has them."""
        return trends_of([self.root / name for name in self.names], indices=self.indices).table

    def slope(self, series: str, index: str) -> tuple[Number, float | None] | None:
        """The change of an index per doubling, and p corrected over the declared ones; None where it has no slope."""
        rows = self.trends[(self.trends["series"] == series) & (self.trends["index"] == index)]
        if rows.empty:
            return None
        row = rows.iloc[0]
        ends = [None if pd.isna(row[end]) else float(row[end]) for end in ("ci_low", "ci_high")]
        p = None if pd.isna(row["p_holm"]) else float(row["p_holm"])
        return Number(float(row["slope"]), *ends, f"trend of {index} of {series}"), p

    def trend_table(self) -> str:
        """A row for each series: the change of each declared index per doubling, and its corrected p."""
        body = []
        for name in self.series:
            cells = []
            for index in self.indices:
                found = self.slope(name, index)
                cells.append(UNTOLD if found is None else f"{found[0]}, p {p_text(found[1])}")
            body.append([f"`{name}`", *cells])
        return markdown(["per doubling", *(DECLARED[name] for name in self.indices)], body)

    def sentences(self) -> list[str]:
        """For each series what rises, what falls, and what does not surely change, after Holm's correction."""
        found = []
        for name, one in self.series.items():
            kinds: dict[str, list[str]] = {"rise": [], "fall": [], "same": []}
            for index in self.indices:
                if (slope := self.slope(name, index)) is None:
                    continue
                surely = slope[1] is not None and slope[1] < LEVEL
                kinds[("rise" if slope[0].value > 0 else "fall") if surely else "same"].append(DECLARED[index])
            parts = [f"{listed(kinds[kind])} {verb(kinds[kind], kind)}" for kind in ("rise", "fall") if kinds[kind]]
            if kinds["same"]:
                parts.append(f"no change of {listed(kinds['same'], 'or')} can be told")
            found.append(f"**`{name}`** over {OVER[one.over]}: {'; '.join(parts)}.")
        return found

    def value_table(self, series: str) -> str:
        """A row for each model of a series: tokens or parameters, and the mean of each declared index over seeds."""
        body = []
        for model, x in self._one(series).models.items():
            cells = [str(self._mean(model, index) or UNTOLD) for index in self.indices]
            body.append([f"`{model}`", f"{x:,.0f}", *cells])
        heads = ["model", OVER[self._one(series).over], *(DECLARED[name] for name in self.indices)]
        return markdown(heads, body)

    def falls(self, *indices: str) -> list[Condition]:
        """For each series and index, whether the value of the largest model lies below that of the smallest."""
        found = []
        for name, one in self.series.items():
            models = list(one.models)
            for index in indices:
                first, last = (self._mean(model, index) for model in (models[0], models[-1]))
                assert first is not None
                assert last is not None
                fell = last.value < first.value
                found.append(Condition(fell, "" if fell else f"{index} of {name} goes from {first} to {last}"))
        return found

    def first_layers(self) -> str:
        """For each series over tokens and each two neighbouring layers: when the later one surely adds, and how in the end.

        *Surely*: the step passes the decomposition's gates, there and at all later checkpoints. Tokens are those of the
        first and the last seed, the share has its interval over seeds.
        """
        steps = self._steps()
        pairs = sorted({(row["from_layer"], row["to_layer"]) for row in steps.to_dict("records")})
        body = []
        for name, one in self.series.items():
            cells = []
            for low, high in pairs:
                of = steps[(steps["from_layer"] == low) & (steps["to_layer"] == high)]
                last = of[of["model"] == list(one.models)[-1]]
                since = [tokens_since(of[of["seed"] == seed], one) for seed in sorted(set(last["seed"]))]
                if not since:
                    cells.append("")
                    continue
                surely = [tokens for tokens in since if tokens is not None]
                if len(surely) < len(since):
                    cells.append(f"at {len(surely)} of {len(since)} seeds" if surely else "never surely")
                    continue
                when = " to ".join(f"{tokens:,.0f}" for tokens in dict.fromkeys((min(surely), max(surely))))
                cells.append(f"{when}; {number_of(1 - last['carried'], 'added in place')}")
            body.append([f"`{name}`", *cells])
        return markdown(["layers", *(f"{low:.0f} to {high:.0f}" for low, high in pairs)], body)

    def _one(self, series: str) -> Series:
        if series not in self.series:
            raise TextError(f"{' and '.join(self.names)} have no series {series}")
        return self.series[series]

    def _steps(self) -> pd.DataFrame:
        """Of each model and seed the decomposition of neighbouring layers."""
        table: pd.DataFrame = self.run.tables["update.csv"]
        return table[table["to_layer"] == table["from_layer"] + 1]

    def _mean(self, model: str, index: str) -> Number | None:
        of = self.values[(self.values["model"] == model) & (self.values["index"] == index)]
        of = of[of["value"].notna()]
        if of.empty:
            return None
        if len(of) == 1:
            row: Any = of.iloc[0]
            ends = [None if pd.isna(row[end]) else float(row[end]) for end in ("ci_low", "ci_high")]
            return Number(float(row["value"]), *ends, f"{index} of {model}")
        return number_of(of["value"], f"{index} of {model}")


def tokens_since(steps: pd.DataFrame, series: Series) -> float | None:
    """The tokens from which on the steps of one seed pass the gates at every checkpoint; None where the last does not."""
    since: float | None = None
    for model, tokens in reversed(list(series.models.items())):
        gates = steps.loc[steps["model"] == model, "gate"]
        if gates.empty or gates.notna().any():
            break
        since = tokens
    return since


def number_of(values: pd.Series, what: str) -> Number:
    """The mean over seeds with its interval; without one where there is one seed."""
    there = [float(x) for x in values if np.isfinite(x)]
    if not there:
        raise TextError(f"{what} is undefined at every seed")
    return Number(*mean_over_seeds(there), what) if len(there) > 1 else Number(there[0], None, None, what)


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def verb(words: Sequence[str], kind: str) -> str:
    """``rises``, or ``rise`` of several."""
    return kind if len(words) > 1 else f"{kind}s"
