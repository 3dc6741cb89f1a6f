"""From indices to a verdict: refinement, carry-along, re-representation, or cannot tell.

The rule is a suite's own, written down before it runs; ``benchmarks/calibration.toml`` measures how often it is wrong on
streams of known answer. What it looks at are the intervals of three indices: gain visibility and movement of the headline
matrix, and shared consistency.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Answer = Literal["refinement", "carry-along", "re-representation", "cannot tell"]


CANNOT_TELL: Answer = "cannot tell"


SCOPES = {"all layers": "", "without layer 0": "_without_layer0"}
"""What a verdict is on -> suffix of the indices that it is made of."""


class VerdictRule(BaseModel):
    """Thresholds on whole intervals: an interval that reaches across one does not tell."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    visible: float = Field(0.61, description="refinement: gain visibility lies above this ...")
    consistent: float = Field(0.56, description="... and consistency above this")
    still: float = Field(0.1, gt=0, description="carry-along: movement lies below this, gain visibility within +- this")
    inconsistent: float = Field(0.17, description="re-representation: consistency lies below this ...")
    unseen: float = Field(0.0, description="... and gain visibility below this")

    @model_validator(mode="after")
    def _apart(self) -> "VerdictRule":
        if self.inconsistent > self.consistent:
            raise ValueError("inconsistent must not exceed consistent: a stream could be both")
        if self.unseen > self.visible:
            raise ValueError("unseen must not exceed visible: a stream could be both")
        return self


@dataclass(frozen=True)
class Span:
    """An index with its interval; None where it is undefined."""

    value: float
    low: float
    high: float

    def wider(self, low: float | None, high: float | None) -> "Span":
        """Widened by a second range, that of refits."""
        return Span(
            self.value,
            self.low if low is None else min(self.low, low),
            self.high if high is None else max(self.high, high),
        )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    """``answer``, and ``reason`` in words and numbers."""

    answer: Answer
    reason: str


INDEX_OF = {"visibility": "gain_visibility", "movement": "movement", "consistency": "shared_consistency"}


NAMES = {"visibility": "gain visibility", "movement": "movement", "consistency": "consistency"}


def decide(rule: VerdictRule, spans: Mapping[str, Span | None]) -> Verdict:
    """The verdict on ``visibility``, ``movement`` and ``consistency``; the last is not needed where nothing moves."""
    told = in_numbers(spans)
    visibility, movement, consistency = (spans.get(name) for name in NAMES)
    if visibility is None or movement is None:
        return Verdict(CANNOT_TELL, told)
    if movement.high < rule.still and -rule.still < visibility.low and visibility.high < rule.still:
        return Verdict("carry-along", f"nothing moves under fixed lenses: {told}")
    if consistency is None:
        return Verdict(CANNOT_TELL, told)
    if visibility.low > rule.visible and consistency.low > rule.consistent:
        return Verdict("refinement", f"fixed lenses see gains, in one representation: {told}")
    if consistency.high < rule.inconsistent and visibility.high < rule.unseen:
        return Verdict("re-representation", f"layers share little more than random bases would: {told}")
    return Verdict(CANNOT_TELL, f"no region of the rule holds the intervals: {told}")


def in_numbers(spans: Mapping[str, Span | None]) -> str:
    return ", ".join(f"{NAMES[k]} {spans.get(k) or 'undefined'}" for k in NAMES)


def spans_on(scope: str, span: Callable[[str], Span | None]) -> dict[str, Span | None]:
    """What a verdict on one of :data:`SCOPES` looks at; ``span`` gives the interval of an index by its name."""
    return {name: span(f"{index}{SCOPES[scope]}") for name, index in INDEX_OF.items()}


def decide_on(rule: VerdictRule, scope: str, span: Callable[[str], Span | None]) -> Verdict:
    """The verdict on one of :data:`SCOPES`."""
    return decide(rule, spans_on(scope, span))


def over_seeds(verdicts: list[Verdict], means: Mapping[str, Span | None]) -> Verdict:
    """One verdict for a model: that of its seeds where they agree. ``means``: over seeds, for the reason."""
    answers = [v.answer for v in verdicts]
    counts = ", ".join(f"{answers.count(a)} {a}" for a in dict.fromkeys(answers))
    agree = len(set(answers)) == 1
    who = f"all {len(answers)} seeds" if agree else f"seeds differ: {counts}"
    return Verdict(answers[0] if agree else CANNOT_TELL, f"{who}; means over seeds: {in_numbers(means)}")
