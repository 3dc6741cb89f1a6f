"""How long a run still takes: what its stages were predicted to take, scaled by how wrong predictions were so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST = 1.0
"""Seconds that every stage is taken to last at least: what is not predicted (a tokenizer, tables) takes some"""

SCALES = 1 / 50, 50.0
"""How much faster or slower than predicted a machine may be; beyond that one odd stage would decide"""

OF_OTHERS = 10.0
"""How many times slower, or faster, stages of one kind may be than all are, measured by predictions"""

DOUBT_OF_ALL, MOST_DOUBT = 0.02, 10.0
"""Share of all predicted seconds, and seconds, below which what was measured hardly counts: the first stages are short"""

DOUBT_OF_KIND = 0.25
"""The same for stages of one kind, of what one of them is predicted to take"""

OUTLASTS = 1.25
"""A stage that takes longer than predicted is taken to last so many times what it has lasted"""


@dataclass(frozen=True)
class Ratios:
    """Measured over predicted seconds: logarithms, averaged over stages by what they were predicted to take.

    So one stage that waited for another program, or a kind of stage that is predicted badly, does not decide on all.
    """

    predicted: float = 0.0
    logarithms: float = 0.0
    """Weighted by predicted seconds, summed"""

    def __add__(self, other: "Ratios") -> "Ratios":
        return Ratios(self.predicted + other.predicted, self.logarithms + other.logarithms)

    @classmethod
    def of(cls, predicted: float, ratio: float) -> "Ratios":
        """Of one stage."""
        low, high = SCALES
        return cls(predicted, predicted * math.log(min(max(ratio, low), high)))

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return math.exp(self.logarithms / self.predicted)


@dataclass
class TimeLeft:
    """The stages of a run that are still to come, and what finished ones took over what they were predicted to take."""

    predicted: Mapping[str, float]
    """Stage -> seconds on some machine, in the order that stages run in; 0 where nothing is known"""
    at_once: int = 1
    """Stages that run side by side"""
    left: list[str] = field(init=False)
    kinds: dict[str, Ratios] = field(init=False, default_factory=dict)
    """Of the finished stages, by kind"""

    def __post_init__(self) -> None:
        self.left = list(self.predicted)

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """A stage is there; one of an earlier run, on whatever machine, says nothing of this one."""
        if name in self.left:
            self.left.remove(name)
            if not reused:
                self.kinds = self._with(name, seconds)

    def seconds(self, running: float = 0.0) -> float | None:
        """What the rest takes, of which the stage under way has taken ``running``; None before anything was measured."""
        if not self.left or not (self.kinds or running):
            return None
        now, *later = self.left
        kinds, expected = self.kinds, self._expected(now, self.kinds)
        if OUTLASTS * running > expected:
            # What lasts longer than expected here slows down what is expected of all others.
            expected = OUTLASTS * running
            kinds = self._with(now, expected)
        return expected - running + sum(self._expected(name, kinds) for name in later) / self.at_once

    def _with(self, name: str, seconds: float) -> dict[str, Ratios]:
        kind, predicted = kind_of(name), self._of(name)
        return {**self.kinds, kind: self.kinds.get(kind, Ratios()) + Ratios.of(predicted, seconds / predicted)}

    def _of(self, name: str) -> float:
        return max(self.predicted[name], LEAST)

    def _expected(self, name: str, kinds: Mapping[str, Ratios]) -> float:
        """What a stage is taken to last: its prediction, scaled as that of its kind was wrong, else as all were."""
        predicted = self._of(name)
        doubt = min(MOST_DOUBT, DOUBT_OF_ALL * sum(map(self._of, self.predicted)))
        every = sum(kinds.values(), Ratios.of(doubt, 1.0)).mean
        own = (kinds.get(kind_of(name), Ratios()) + Ratios.of(DOUBT_OF_KIND * predicted, every)).mean
        return predicted * min(max(own, every / OF_OTHERS), every * OF_OTHERS)


def kind_of(stage: str) -> str:
    """What stages of one kind have in common: the beginning of their names, of a probe with the name of the probe."""
    parts = stage.split("-")
    return "-".join(parts[:2]) if parts[0] == "probe" else parts[0]


def in_words(seconds: float | None) -> str:
    """``about 6 min left``; empty where nothing is known or left."""
    if seconds is None:
        return ""
    if seconds < 60:
        return "under a minute left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
