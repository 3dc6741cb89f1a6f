"""The update decomposition of one model in tables and words, without a run folder."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lensbench.measures.update import UpdateResult, UpdateRule, decide_update
from lensbench.measures.update.sentences import sentence
from lensbench.measures.update.verdict import SUFFIXES, WITHOUT_FIRST
from lensbench.measures.verdict import VerdictRule
from lensbench.results.folder import numbered
from lensbench.results.schema import no_rows
from lensbench.results.tables import update_rows


@dataclass(frozen=True, repr=False)
class Updates:
    """What :func:`lensbench.decompose` found: of what later layers add to the prediction, how much shows where it was kept.

    Tables have the columns of :data:`lensbench.results.schema.SCHEMA`; shares have no unit.
    """

    name: str
    """Of the model"""
    seed: int
    layers: int
    """How many blocks the model has"""
    result: UpdateResult
    rule: UpdateRule
    """What the verdict is made by"""

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Updates({self.name!r}, {self.layers} layer{'s' * (self.layers != 1)}, seed {self.seed}: {self.verdict})"
        )

    @property
    def verdict(self) -> str:
        """From layer 1 on: added up in one representation, carried along, re-represented, mixed or undetermined"""
        return str(self._on(WITHOUT_FIRST)["verdict"])

    @property
    def sentence(self) -> str:
        """The verdict in words and numbers; it says what was measured where the verdict is undetermined, too"""
        return str(self._on(WITHOUT_FIRST)["sentence"])

    @property
    def indices(self) -> pd.DataFrame:
        """A row per index, with its interval: ``in_place_without_layer0`` is the headline number"""
        return self.tables["indices.csv"]

    @property
    def pairs(self) -> pd.DataFrame:
        """A row for each pair of layers (``update.csv``)"""
        return self.tables["update.csv"]

    @property
    def blocks(self) -> pd.DataFrame:
        """A row for each block, neighbours merged until there is room (``blocks.csv``)"""
        return self.tables["blocks.csv"]

    @property
    def landmarks(self) -> pd.DataFrame:
        """The indices of nulls and landmarks made of the model's own states (``landmarks.csv``)"""
        return self.tables["landmarks.csv"]

    @property
    def verdicts(self) -> pd.DataFrame:
        """The verdict, its sentence and its gate over all layers, and from layer 1 on"""
        return self.tables["verdicts.csv"]

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names that a run gives them; indices, models and verdicts with the columns known here"""
        who = {"model": self.name, "seed": self.seed}
        rows = update_rows(self.result, VerdictRule(update=self.rule))
        found = {
            name: numbered(name, pd.DataFrame([who | row for row in content]) if content else no_rows(name))
            for name, content in rows.items()
        }
        indices = [
            who | {"index": name, "value": one.value, "ci_low": one.low, "ci_high": one.high, "reason": one.reason}
            for name, one in self.result.estimates().items()
        ]
        numbers = dict.fromkeys(("value", "ci_low", "ci_high"), float)
        found["indices.csv"] = pd.DataFrame(indices).astype(numbers)
        found["models.csv"] = pd.DataFrame([who | {"layers": self.layers}])
        found["verdicts.csv"] = pd.DataFrame([who | self._on(scope) for scope in SUFFIXES])
        return found

    def _on(self, scope: str) -> dict[str, Any]:
        facts = self.result.facts(scope)
        found = decide_update(self.rule, facts)
        null, massive = self.result.null(scope), self.result.without_massive(scope)
        said = sentence(self.rule, facts, found, null=null, massive=massive)
        gate = found.gate or None
        return {
            "scope": scope, "verdict": found.verdict, "sentence": said, "gate": gate, "of_refits": facts.of_refits,
        }  # fmt: skip
