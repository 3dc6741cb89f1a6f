"""What half and twice the learning rate of a rule are behind the best of three trials, for templates."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from benchmarks.texts.numbers import Number, TextError, markdown

TRIED = ("half", "the rule", "twice")
"""The three trials of each model, in their order"""

NEAR = 0.02
"""Nats/token behind the best trial that were declared as no loss"""


class Rates:
    """Sweeps of three learning rates for each model: half of the rule's, the rule's and twice of it."""

    def __init__(self, root: Path, names: Sequence[str]):
        self.paths = [root / name / "sweep.csv" for name in names]

    @cached_property
    def models(self) -> dict[str, list[Number]]:
        """How far each model's trials are behind the best one in cross-entropy on dev, nats/token; 0: it is the best."""
        found: dict[str, list[Number]] = {}
        for path in self.paths:
            for model, rows in pd.read_csv(path).groupby("model", sort=False):
                if len(rows) != len(TRIED):
                    raise TextError(f"{path} has {len(rows)} trials of {model}, not {len(TRIED)}")
                found[str(model)] = [
                    Number(
                        row["behind"], row["behind_ci_low"], row["behind_ci_high"], f"trial {row['trial']} of {model}"
                    )
                    for row in rows.sort_values("trial").to_dict("records")
                ]
        return found

    def table(self) -> str:
        """A row for each model: what half of the rule's rate, the rule's and twice of it are behind the best of them."""
        body = [
            [f"`{model}`", *("best" if trial.value == 0 else str(trial) for trial in trials)]
            for model, trials in self.models.items()
        ]
        return markdown(["nats/token behind", *TRIED], body)

    def far(self) -> list[str]:
        """The models of which the rule's rate is more than was declared behind the best trial."""
        return [model for model, trials in self.models.items() if trials[1].value > NEAR]

    def rule(self, model: str) -> Number:
        """How far the rule's rate is behind the best trial of a model."""
        return self.models[model][1]
