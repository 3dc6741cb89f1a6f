"""A number with its 95 % interval: how it is written, and what can be said of it."""

from dataclasses import dataclass

from lensbench.errors import LensbenchError
from lensbench.report.formatting import MOST_DECIMALS, decimals_within, written
from lensbench.statistics import overlap


class TextError(LensbenchError):
    """A template asks for something that the results do not have, or says something that they do not support."""


class UndefinedNumber(TextError):
    """The results have the row, but no value in it; they say why."""


@dataclass(frozen=True)
class Condition:
    """Whether something holds of a number, and the statement in words."""

    holds: bool
    text: str

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True)
class Number:
    """A value with its interval; ``low`` and ``high`` are None where it has none. ``what`` names it in messages."""

    value: float
    low: float | None
    high: float | None
    what: str

    @property
    def decimals(self) -> int:
        """The fewest decimals whose unit is at most half of the interval's half-width, three at most."""
        return MOST_DECIMALS if self.low is None or self.high is None else decimals_within(self.low, self.high)

    def __str__(self) -> str:
        """The value and its interval, ``0.58 [0.52, 0.64]``."""
        return self.alone if self.low is None else f"{self.alone} {self.range}"

    @property
    def alone(self) -> str:
        """The value without its interval."""
        return written(self.value, self.decimals)

    @property
    def range(self) -> str:
        """The interval, ``[0.52, 0.64]``."""
        if self.low is None or self.high is None:
            raise TextError(f"{self.what} has no interval")
        return f"[{written(self.low, self.decimals)}, {written(self.high, self.decimals)}]"

    @property
    def percent(self) -> str:
        """The value as a percentage, ``58 %``."""
        return f"{written(100 * self.value, max(0, self.decimals - 2))} %"

    @property
    def whole_percent(self) -> str:
        """The value as a percentage without decimals."""
        return f"{written(100 * self.value, 0)} %"

    @property
    def percent_range(self) -> str:
        """The percentage and its interval, ``58 % [52, 64]``."""
        if self.low is None or self.high is None:
            return self.percent
        places = max(0, self.decimals - 2)
        return f"{self.percent} [{written(100 * self.low, places)}, {written(100 * self.high, places)}]"

    def above(self, bound: float) -> Condition:
        """Whether the whole interval lies above a bound."""
        return self._condition(self._low > bound, f"does not lie above {bound:g} with its whole interval")

    def below(self, bound: float) -> Condition:
        """Whether the whole interval lies below a bound."""
        return self._condition(self._high < bound, f"does not lie below {bound:g} with its whole interval")

    def near(self, low: float, high: float) -> Condition:
        """Whether the value, not its interval, lies within two bounds."""
        return self._condition(low <= self.value <= high, f"does not lie within {low:g} to {high:g}")

    def holds(self, bound: float) -> Condition:
        """Whether the interval holds a value: it cannot be told from it."""
        return self._condition(self._low <= bound <= self._high, f"has an interval that leaves {bound:g} out")

    def apart_from(self, other: "Number") -> Condition:
        """Whether the two intervals do not overlap."""
        return self._condition(self._apart(other), f"and {other.what} ({other}) have intervals that overlap")

    def meets(self, other: "Number") -> Condition:
        """Whether the two intervals overlap, so that no difference is sure."""
        return self._condition(not self._apart(other), f"and {other.what} ({other}) have intervals that do not overlap")

    def _apart(self, other: "Number") -> bool:
        return not overlap((self._low, self._high), (other._low, other._high))

    def _condition(self, holds: bool, failure: str) -> Condition:
        return Condition(bool(holds), "" if holds else f"{self.what} ({self}) {failure}")

    @property
    def _low(self) -> float:
        return self.value if self.low is None else self.low

    @property
    def _high(self) -> float:
        return self.value if self.high is None else self.high


def claim(words: str, *conditions: Condition | bool) -> str:
    """The words, where every condition holds; raises :class:`TextError` with those that do not."""
    if not conditions:
        raise TextError(f"{words!r} is claimed without a condition")
    failed = [
        str(getattr(condition, "text", "")) or "what it says is not so" for condition in conditions if not condition
    ]
    if failed:
        raise TextError(f"the results no longer support {words!r}: {'; '.join(failed)}")
    return words


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
