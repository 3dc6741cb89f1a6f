"""Results as they are finished: the page and the tables of a run that goes on, and the numbers on the terminal."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from lensbench.measures.indices import INDICES
from lensbench.measures.update import UpdateResult
from lensbench.report.formatting import with_interval
from lensbench.report.unfinished import ASIDE, ModelSoFar, write_unfinished
from lensbench.results import tables
from lensbench.results.folder import earlier_manifest
from lensbench.results.tables import Part
from lensbench.results.updates import Updates
from lensbench.run.context import Context
from lensbench.suite.recipes import ModelRecipe

RUNNING = (
    "This run has not finished: what is missing was still to come when this page was written. If it no longer runs,"
)

INTERRUPTED = "This run was interrupted before it finished:"

DECOMPOSITION, LENSES = (
    "the update decomposition",
    "lenses by layer, the shared lens, the transfer matrix and its indices",
)
"""What a run measures of a model, in words, next to probes"""

SAID = ("shared_consistency", "gain_visibility", "gain_visibility_without_layer0")
"""Indices of lenses that the terminal prints of a model as soon as it is scored"""


@dataclass
class Unfinished:
    """What is there of a run that goes on, by model and seed."""

    context: Context
    command: str
    """The command that goes on where the run is interrupted"""
    shows: bool
    """Whether there is a page: not where the folder holds a finished run, whose page and tables stay as they are"""
    found: dict[tuple[str, int], ModelSoFar] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context, models: Sequence[ModelRecipe], command: str) -> "Unfinished":
        """Of a run of ``models`` that begins; of several processes the first one shows it."""
        shows = context.ranks.first and earlier_manifest(context.folder) is None
        found = {}
        for model in models:
            seeds = context.suite.seeds_of(model)
            for seed in seeds:
                name = model.name if len(seeds) == 1 else f"{model.name}, seed {seed}"
                found[model.name, seed] = ModelSoFar(name, (*decomposed(context), LENSES, *probes_of(context)))
        return cls(context, command, shows, found)

    def decomposed(self, model: ModelRecipe, seed: int, result: UpdateResult | None) -> None:
        """Show the update decomposition of a model."""
        if self.shows and result is not None:
            layers = 1 + max((int(row["to_layer"]) for row in result.pairs), default=0)
            found = Updates(model.name, seed, layers, result, self.context.suite.verdict.update).tables
            self._show(model, seed, (LENSES, *probes_of(self.context)), found)

    def scored(self, model: ModelRecipe, part: Part) -> None:
        """Show what the lenses of a model say, on the terminal too; probes are still missing."""
        if not self.shows:
            return
        suite = self.context.suite
        found = tables.tables(
            [part], draws=suite.evaluate.draws, largest_ridge=suite.fit.ridges[-1], rule=suite.verdict
        )
        rows = found["indices.csv"].set_index("index")
        numbers = "; ".join(f"{INDICES[name].label} {with_interval(rows.loc[name])}" for name in SAID)
        self.context.progress.say(f"score-{model.name}-seed{part.seed}: {numbers}")
        self._show(model, part.seed, probes_of(self.context), found)

    def measured(self, model: ModelRecipe, seed: int) -> None:
        """Nothing is missing of a model at a seed from here on."""
        if (before := self.found.get((model.name, seed))) is not None:
            self._show(model, seed, (), before.tables)

    def interrupted(self) -> None:
        """Say on the page that the run was interrupted, where there is anything on it."""
        if self.shows and any(one.tables for one in self.found.values()):
            self._write(INTERRUPTED)

    def finished(self) -> None:
        """Remove the tables of the unfinished run: the finished ones are there."""
        if self.context.ranks.first:
            shutil.rmtree(self.context.folder / ASIDE, ignore_errors=True)

    def _show(self, model: ModelRecipe, seed: int, missing: Sequence[str], found: Mapping[str, pd.DataFrame]) -> None:
        """Write the page with a model as it stands now; not where nothing is missing, since the finished page follows."""
        self.found[model.name, seed] = ModelSoFar(self.found[model.name, seed].name, tuple(missing), found)
        if self.shows and any(one.missing for one in self.found.values()):
            self._write(RUNNING)

    def _write(self, state: str) -> None:
        write_unfinished(
            self.context.folder, self.context.suite.question, list(self.found.values()), self.command, state
        )


def decomposed(context: Context) -> list[str]:
    """The update decomposition, where the suite asks for it."""
    return [DECOMPOSITION] if context.suite.update is not None else []


def probes_of(context: Context) -> list[str]:
    """The probes that are computed, in words."""
    return [f"probe {name}" for name in context.probes or context.suite.probes]
