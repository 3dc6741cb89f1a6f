"""From indices to a verdict: refinement, carry-along, re-representation, or cannot tell; and the verdict in words.

A suite declares its rule before it runs; ``benchmarks/calibration.toml`` measures how often the rule is wrong on streams of
known answer. It looks at the intervals of three indices: gain visibility and movement of the transfer matrix, and shared
consistency. No other module says what a verdict is, or why.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lensbench.measures.indices import INDICES
from lensbench.measures.update.verdict import SUFFIXES, UpdateRule

Answer = Literal["refinement", "carry-along", "re-representation", "cannot tell"]


CANNOT_TELL: Answer = "cannot tell"


SCOPES = SUFFIXES
"""What a verdict is on -> the suffix of the indices that it is made of."""


class VerdictRule(BaseModel):
    """Thresholds on whole intervals: of lenses held fixed, and, in ``update``, of the update decomposition.

    Where an interval of the first reaches across a threshold, we cannot tell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    visible: float = Field(0.61, description="refinement: gain visibility lies above this ...")
    consistent: float = Field(0.56, description="... and consistency above this")
    still: float = Field(0.1, gt=0, description="carry-along: movement lies below this, gain visibility within +- this")
    inconsistent: float = Field(0.17, description="re-representation: consistency lies below this ...")
    unseen: float = Field(0.0, description="... and gain visibility below this, where movement lies above `still`")
    update: UpdateRule = Field(UpdateRule(), description="the rule for the update decomposition")

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
        """The value with its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    """``answer``, and ``reason`` in words and numbers."""

    answer: Answer
    reason: str


INDEX_OF = {"visibility": "gain_visibility", "movement": "movement", "consistency": "shared_consistency"}
"""What a verdict looks at -> the index it is."""


NAMES = {name: INDICES[index].label for name, index in INDEX_OF.items()}


@dataclass(frozen=True)
class Condition:
    """What an answer needs of one index: its whole interval lies above one threshold and below another."""

    name: str
    above: float = -math.inf
    below: float = math.inf

    def holds(self, spans: Mapping[str, Span | None]) -> bool:
        """Whether the interval lies there; an undefined index lies nowhere."""
        span = spans.get(self.name)
        return span is not None and self.above < span.low and span.high < self.below

    def __str__(self) -> str:
        """Where the interval must lie."""
        if self.above == -self.below:
            return f"within {self.below:g} of 0"
        return f"above {self.above:g}" if math.isfinite(self.above) else f"below {self.below:g}"

    def missed_by(self, spans: Sequence[Span]) -> str:
        """What an index would have to be, and how far it reaches on the wrong side of that: at worst, of several seeds."""
        low, high = min(span.low for span in spans), max(span.high for span in spans)
        ends = [f"down to {low:.3f}"] * (low <= self.above) + [f"up to {high:.3f}"] * (high >= self.below)
        reaches = f" (it reaches {' and '.join(ends)})" if ends else ""
        return f"{NAMES[self.name]} would have to lie {self}{reaches}"


def conditions(rule: VerdictRule) -> dict[Answer, tuple[Condition, ...]]:
    """What every answer needs; the first answer whose conditions all hold is the verdict."""
    return {
        "carry-along": (Condition("movement", below=rule.still), Condition("visibility", -rule.still, rule.still)),
        "refinement": (Condition("visibility", above=rule.visible), Condition("consistency", above=rule.consistent)),
        "re-representation": (
            Condition("consistency", below=rule.inconsistent),
            Condition("visibility", below=rule.unseen),
            Condition("movement", above=rule.still),  # else a wider interval of what does not move could be called this
        ),
    }


MEANINGS: dict[Answer, str] = {
    "carry-along": "nothing moves under fixed lenses",
    "refinement": "fixed lenses see gains, in one representation",
    "re-representation": "layers share little more than random bases would",
}


def decide(rule: VerdictRule, spans: Mapping[str, Span | None]) -> Verdict:
    """The verdict on ``visibility``, ``movement`` and ``consistency``; the last is not needed where nothing moves."""
    numbers = in_numbers(spans)
    if spans.get("visibility") is None or spans.get("movement") is None:
        return Verdict(CANNOT_TELL, numbers)
    for answer, needed in conditions(rule).items():
        if all(condition.holds(spans) for condition in needed):
            return Verdict(answer, f"{MEANINGS[answer]}: {numbers}")
    if spans.get("consistency") is None:
        return Verdict(CANNOT_TELL, numbers)
    return Verdict(CANNOT_TELL, f"no region of the rule holds the intervals: {numbers}")


def in_numbers(spans: Mapping[str, Span | None]) -> str:
    """The three indices with their intervals."""
    return ", ".join(f"{NAMES[k]} {spans.get(k) or 'undefined'}" for k in NAMES)


def spans_on(scope: str, span: Callable[[str], Span | None]) -> dict[str, Span | None]:
    """What a verdict on one of :data:`SCOPES` looks at; ``span`` gives the interval of an index by its name."""
    return {name: span(f"{index}{SCOPES[scope]}") for name, index in INDEX_OF.items()}


def decide_on(rule: VerdictRule, scope: str, span: Callable[[str], Span | None]) -> Verdict:
    """The verdict on one of :data:`SCOPES`."""
    return decide(rule, spans_on(scope, span))


def agreement_of_seeds(verdicts: list[Verdict], means: Mapping[str, Span | None]) -> Verdict:
    """One verdict for a model: that of its seeds where they agree. ``means``: over seeds, for the reason."""
    answers = [v.answer for v in verdicts]
    counts = ", ".join(f"{answers.count(a)} {a}" for a in dict.fromkeys(answers))
    agree = len(set(answers)) == 1
    who = f"all {len(answers)} seeds" if agree else f"seeds differ: {counts}"
    return Verdict(answers[0] if agree else CANNOT_TELL, f"{who}; means over seeds: {in_numbers(means)}")


# In words
def rule_in_words(rule: VerdictRule) -> str:
    """The rule in one sentence."""
    needs = {a: " and ".join(f"{NAMES[c.name]} lies {c}" for c in needed) for a, needed in conditions(rule).items()}
    regions = "; ".join(f"{answer} where {need}" for answer, need in needs.items())
    return f"{regions}; whole intervals, widened by refits, must lie there, at every seed."


def grounds(
    rule: VerdictRule, answer: Answer, by_seed: Sequence[Mapping[str, Span | None]], undefined: Mapping[str, str]
) -> str:
    """Why a verdict is what it is: which thresholds the intervals pass, or which they miss.

    ``by_seed``: what the verdict of each seed looked at. ``undefined``: why an index is, by ``visibility`` and so on.
    """
    if answer != CANNOT_TELL:
        needed = conditions(rule)[answer]
        at = f" at all {len(by_seed)} seeds" if len(by_seed) > 1 else ""
        return " and ".join(f"{NAMES[c.name]} lies {c}" for c in needed) + at
    reasons = []
    for reason in dict.fromkeys(undefined.values()):
        names = [NAMES[name] for name, why in undefined.items() if why == reason]
        reasons.append(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {reason}")
    return "; ".join([*reasons, *filter(None, [held_back(rule, by_seed)])])


def held_back(rule: VerdictRule, by_seed: Sequence[Mapping[str, Span | None]]) -> str:
    """What keeps a model from the answer of its other seeds, or from the nearest ones; no answer is named."""
    answers = [decide(rule, spans).answer for spans in by_seed]
    given = {answer for answer in answers if answer != CANNOT_TELL}
    if len(given) > 1:
        return "its seeds get different answers"
    open_ones = [spans for spans, answer in zip(by_seed, answers, strict=True) if answer == CANNOT_TELL]
    missed = {
        answer: [c for c in needed if not all(c.holds(spans) for spans in open_ones)]
        for answer, needed in conditions(rule).items()
        if answer in given or not given
    }
    fewest = min(len(conditions_missed) for conditions_missed in missed.values())
    ways = []
    for conditions_missed in missed.values():
        known = {c: [s for s in (spans.get(c.name) for spans in open_ones) if s is not None] for c in conditions_missed}
        texts = [c.missed_by(spans) for c, spans in known.items() if spans]
        if len(conditions_missed) == fewest and texts:
            ways.append(" and ".join(texts))
    at = f"at {len(open_ones)} of {len(by_seed)} seeds " if len(by_seed) > 1 else ""
    return at + ", or ".join(ways) if ways else ""


def sign_over_tolerances(at_tolerance: Sequence[tuple[str, Span]]) -> str:
    """What to add where the sign of gain visibility depends on the loss that a lens's ridge may cost; otherwise empty.

    ``at_tolerance``: the loss allowed, and gain visibility there, of every seed.
    """
    spans = [span for _, span in at_tolerance]
    if not spans or all(span.low > 0 for span in spans) or all(span.high < 0 for span in spans):
        return ""
    ordered = sorted(at_tolerance, key=lambda item: item[1].value)
    ends = ", ".join(f"{span} at {label}" for label, span in (ordered[0], ordered[-1]))
    return f"the sign of gain visibility is not the same at every loss that a lens's ridge may cost: {ends}"
