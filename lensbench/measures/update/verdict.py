"""From an update decomposition to a verdict: added up, carried along, re-represented, mixed, or undetermined.

A suite declares its :class:`UpdateRule` before it runs. Every condition is about a whole interval: one that reaches across
a threshold leaves both sides possible, and a verdict is given only where a single answer is left. So widening an
interval never adds a verdict. Words are in :mod:`lensbench.measures.update.sentences`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lensbench.measures.means import Estimate
from lensbench.measures.update.gates import FEWEST_PAIRS, NO_FALL, NOT_KEPT, REASONS, SMALLEST_SHARE, Gate, pairs_needed
from lensbench.measures.update.summary import REACH

UpdateAnswer = Literal[
    "added up in one representation", "carried along", "re-represented", "mixed", "undetermined"
]  # fmt: skip

ADDED: UpdateAnswer = "added up in one representation"
CARRIED: UpdateAnswer = "carried along"
REPRESENTED: UpdateAnswer = "re-represented"
MIXED: UpdateAnswer = "mixed"
UNDETERMINED: UpdateAnswer = "undetermined"

ANSWERS: tuple[UpdateAnswer, ...] = (ADDED, CARRIED, REPRESENTED, MIXED, UNDETERMINED)

NOT_MEASURED = "not measured"
UNDEFINED = "undefined"
BETWEEN = "between two answers"
FEW_PAIRS = "few pairs"
NO_INTERVAL = "no interval"
NOT_CLEAR = "not clear"
NOT_READABLE = "not readable"
NOT_REACHED = "not reached"
UNEVEN = "tokens differ"
SEEDS_DIFFER = "seeds differ"

VERDICT_GATES: dict[str, str] = {
    NOT_MEASURED: "the run has no update decomposition",
    UNDEFINED: "the decomposition is undefined here",
    **REASONS,
    FEW_PAIRS: "there are too few pairs of layers",
    NO_INTERVAL: "there are too few clusters of documents for an interval",
    NOT_CLEAR: "what the earlier lens reads at later layers is drowned in interference, or its basis changed",
    NOT_READABLE: "the earlier lens can read too little of the fall in cross-entropy",
    NOT_REACHED: "linear lenses read too little of the model's prediction, up to the last layer",
    UNEVEN: "loud tokens differ from the others",
    BETWEEN: "an interval reaches across a threshold of the rule",
    SEEDS_DIFFER: "seeds get different verdicts",
}
"""Why a verdict is undetermined -> what it means; the gates of pairs are among them"""


class UpdateRule(BaseModel):
    """Thresholds of the verdict on the update decomposition, on whole intervals."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    added: float = Field(0.85, description="added up: what is added in place lies above this")
    carried: float = Field(0.37, description="carried along: it lies below this; mixed: between the two")
    changed: float = Field(0.31, description="a block changes the basis: it keeps less than this, by S and by clarity")
    kept: float = Field(0.87, description="mixed: every block keeps less than this, by S and by clarity")
    changing: float = Field(
        0.5,
        ge=0,
        le=1,
        description="re-represented: more than this share of blocks, of those that can be told, change the basis",
    )
    drowned: float = Field(1.0, description="no change is claimed of a block where chance (2 sd of S) reaches this")
    clear: float = Field(0.7, description="added up: clarity lies above this, so that half of the power is explained")
    readable: float = Field(0.1, description="added up: readable gain lies above this, where it was measured")
    reach: float = Field(0.4, description="... and the last lens removes more than this share of the constant's KL")
    # Fewer leave shares undefined, whatever a rule says.
    fewest_pairs: int = Field(
        FEWEST_PAIRS, ge=FEWEST_PAIRS, description="how many pairs of layers must pass the gates ..."
    )
    smallest_share: float = Field(SMALLEST_SHARE, ge=SMALLEST_SHARE, le=1, description="... and which share of pairs")

    @model_validator(mode="after")
    def _apart(self) -> "UpdateRule":
        if self.carried > self.added:
            raise ValueError("carried must not exceed added: a stream could be both")
        if self.changed > self.kept:
            raise ValueError("changed must not exceed kept: a block could be both")
        return self

    def pairs_needed(self, asked: int) -> int:
        """How many of ``asked`` pairs of layers must pass the gates."""
        return pairs_needed(asked, self.fewest_pairs, self.smallest_share)


Row = Mapping[Any, Any]
"""A row of ``update.csv`` or ``blocks.csv``; unknown numbers are None or NaN"""

NOTHING = Estimate(None, None, None)


@dataclass(frozen=True)
class PairFact:
    """A pair of layers and the gate that stops it; empty where it passes."""

    first: int
    last: int
    gate: Gate


@dataclass(frozen=True)
class BlockFact:
    """What a verdict looks at of a block, or of neighbours that were merged until there was room."""

    first: int
    last: int
    gate: Gate
    persistence: Estimate
    """S"""
    clarity: Estimate
    """How much of the earlier reading the two layers' own readings explain, beyond chance"""
    kept_high: Estimate
    """``min(1, S)``, 0 where S is within chance"""
    chance: float
    """Standard deviation of S, were the later layer in a random basis"""


IN_FACTS = (
    "in_place",
    "in_place_normed",
    "clarity_normed",
    "clarity",
    "persistence",
    "kept_low",
    "kept_high",
    "news",
    "readable_gain",
    "commission",
    "drowned",
)
"""The indices of the decomposition that verdicts and sentences look at"""

OF_ANY_SCOPE = (REACH,)
"""Those that are the same in either scope"""

ALL_LAYERS, WITHOUT_FIRST = "all layers", "without layer 0"

SUFFIXES = {ALL_LAYERS: "", WITHOUT_FIRST: "_without_layer0"}
"""What a verdict is on -> the suffix of its indices"""


@dataclass(frozen=True)
class UpdateFacts:
    """All that a verdict on one scope of one model and seed looks at."""

    scope: str
    indices: Mapping[str, Estimate]
    """Of :data:`IN_FACTS` and :data:`OF_ANY_SCOPE`, without a suffix"""
    pairs: tuple[PairFact, ...]
    blocks: tuple[BlockFact, ...]
    first_block: BlockFact | None = None
    """The block that begins at layer 0, in either scope"""
    of_refits: float | None = None
    """The share of the variance of what is added in place that lens refits bring; None where it is unknown"""
    reason: str = ""
    """Why the decomposition is undefined, or :data:`NOT_MEASURED`; empty where there is one"""
    seeds: int = 1
    """How many seeds these are the facts of: pairs and blocks of all of them, indices as means"""

    @classmethod
    def of(
        cls,
        scope: str,
        indices: Mapping[str, Estimate],
        pairs: Sequence[Row],
        blocks: Sequence[Row],
        *,
        of_refits: float | None = None,
        reason: str = "",
    ) -> "UpdateFacts":
        """The facts on one of :data:`SUFFIXES`, from all indices of a model and seed and its rows of pairs and blocks."""
        first = 0 if scope == ALL_LAYERS else 1
        suffix = SUFFIXES[scope]
        every = tuple(_block(row) for row in blocks)
        return cls(
            scope,
            _in_scope(indices, suffix),
            tuple(_pair(row) for row in pairs if int(row["from_layer"]) >= first),
            tuple(block for block in every if block.first >= first),
            next((block for block in every if block.first == 0), None),
            of_refits,
            reason,
        )

    @classmethod
    def over_seeds(cls, seeds: Sequence["UpdateFacts"], means: Mapping[str, Estimate]) -> "UpdateFacts":
        """The facts of several seeds together; ``means``: all indices as means over seeds."""
        first, suffix = seeds[0], SUFFIXES[seeds[0].scope]
        return cls(
            first.scope,
            _in_scope(means, suffix),
            tuple(pair for one in seeds for pair in one.pairs),
            tuple(block for one in seeds for block in one.blocks),
            first.first_block,
            None,
            next((one.reason for one in seeds if one.reason), ""),
            len(seeds),
        )

    def __getitem__(self, name: str) -> Estimate:
        return self.indices.get(name, NOTHING)

    @property
    def passed(self) -> int:
        """How many pairs pass the gates."""
        return sum(not pair.gate for pair in self.pairs)

    @property
    def most_stopped_by(self) -> Gate:
        """The gate that stops most pairs; empty where all pass."""
        stopped = [pair.gate for pair in self.pairs if pair.gate]
        return max(REASONS, key=stopped.count) if stopped else ""

    @property
    def steps(self) -> tuple[PairFact, ...]:
        """The pairs of neighbouring layers."""
        layers = sorted({layer for pair in self.pairs for layer in (pair.first, pair.last)})
        following = dict(itertools.pairwise(layers))
        return tuple(pair for pair in self.pairs if following.get(pair.first) == pair.last)


def _in_scope(indices: Mapping[str, Estimate], suffix: str) -> dict[str, Estimate]:
    found = {name: indices.get(name + suffix, NOTHING) for name in IN_FACTS}
    return found | {name: indices.get(name, NOTHING) for name in OF_ANY_SCOPE}


def _pair(row: Row) -> PairFact:
    return PairFact(int(row["from_layer"]), int(row["to_layer"]), _text(row["gate"]))


def _block(row: Row) -> BlockFact:
    pair, chance = _pair(row), _known(row["persistence_chance"])
    return BlockFact(
        pair.first,
        pair.last,
        pair.gate,
        persistence=_of_columns(row, "persistence"),
        clarity=_of_columns(row, "clarity"),
        kept_high=_of_columns(row, "kept_high"),
        chance=np.inf if chance is None else chance,
    )


def _of_columns(row: Row, name: str) -> Estimate:
    return Estimate(_known(row[name]), _known(row[f"{name}_ci_low"]), _known(row[f"{name}_ci_high"]))


def _known(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


# Decisions
@dataclass(frozen=True)
class UpdateVerdict:
    """A verdict on one scope; ``gate`` is one of :data:`VERDICT_GATES` where it is undetermined, else empty."""

    verdict: UpdateAnswer
    gate: str = ""
    between: tuple[UpdateAnswer, ...] = ()
    """The answers that are left where no single one is"""
    changes: tuple[int, int] = (0, 0)
    """How many blocks surely change the basis, and how many may"""
    blocks: int = 0
    open: tuple[str, ...] = ()
    """Indices whose intervals reach across a threshold and thereby leave the answer open"""


ABOVE, WITHIN, BELOW = "above", "within", "below"


def sides(one: Estimate, low: float, high: float | None = None) -> frozenset[str]:
    """Where the interval of an estimate has a part: above ``high``, below ``low``, within the two; all where it has none.

    Without ``high``: above or below ``low``.
    """
    high = low if high is None else high
    if one.low is None or one.high is None:
        return frozenset({ABOVE, BELOW} if low == high else {ABOVE, WITHIN, BELOW})
    found = set()
    if one.high > high:
        found.add(ABOVE)
    if one.low < low:
        found.add(BELOW)
    if low < high and one.low <= high and one.high >= low:
        found.add(WITHIN)
    # On the threshold itself, neither side is left out.
    return frozenset(found or {ABOVE, BELOW})


CHANGES, PARTIAL, KEEPS = "changes the basis", "keeps a part", "keeps"


def can_be_told(rule: UpdateRule, block: BlockFact) -> bool:
    """Whether anything is claimed of a block: its losses fall, and it is not drowned."""
    return block.gate != NO_FALL and 2 * block.chance < rule.drowned


def block_kinds(rule: UpdateRule, block: BlockFact) -> frozenset[str]:
    """What a block may be: it changes the basis, keeps a part of the earlier reading, or keeps it.

    The more that S and clarity leave of it counts: a stream that shrinks lowers S, interference lowers clarity. Nothing is
    claimed of a block whose losses do not fall, or that is drowned.
    """
    if not can_be_told(rule, block):
        return frozenset({KEEPS})
    by_s = sides(block.kept_high, rule.changed, rule.kept)
    if block.gate == NOT_KEPT:
        by_s = frozenset({BELOW})
    by_clarity = sides(block.clarity, rule.changed, rule.kept)
    order = (BELOW, WITHIN, ABOVE)
    most = {max(s, c, key=order.index) for s in by_s for c in by_clarity}
    return frozenset({BELOW: CHANGES, WITHIN: PARTIAL, ABOVE: KEEPS}[side] for side in most)


def decide_update(rule: UpdateRule, facts: UpdateFacts) -> UpdateVerdict:
    """The verdict on one scope: the only answer that the intervals leave, or *undetermined* with the gate."""
    if facts.reason == NOT_MEASURED:
        return UpdateVerdict(UNDETERMINED, NOT_MEASURED)
    if facts.reason or not facts.pairs:
        return UpdateVerdict(UNDETERMINED, UNDEFINED)
    kinds = [block_kinds(rule, block) for block in facts.blocks]
    changes, blocks = (sum(kind == {CHANGES} for kind in kinds), sum(CHANGES in kind for kind in kinds)), len(kinds)
    left = set(_possible(rule, facts, kinds, changes))
    gates = [gate for gate in VERDICT_GATES if (UNDETERMINED, gate) in left]
    answers = tuple(answer for answer in ANSWERS if any(answer == one for one, _ in left))
    if len(answers) == 1:
        return UpdateVerdict(answers[0], gates[0] if gates else "", changes=changes, blocks=blocks)
    named = tuple(answer for answer in answers if answer != UNDETERMINED)
    gate = BETWEEN if len(named) > 1 or not gates else gates[0]
    if gate == BETWEEN and uneven(rule, facts):
        gate = UNEVEN
    return UpdateVerdict(UNDETERMINED, gate, named, changes, blocks, _open(rule, facts, kinds))


def _possible(
    rule: UpdateRule, facts: UpdateFacts, kinds: Sequence[frozenset[str]], changes: tuple[int, int]
) -> Iterator[tuple[UpdateAnswer, str]]:
    """Every answer, with its gate, that some values within the intervals would get."""
    told = sum(can_be_told(rule, block) for block in facts.blocks)
    for count in range(changes[0], changes[1] + 1):
        if count > rule.changing * told:
            yield REPRESENTED, ""
        elif len(facts.pairs) < facts.seeds * rule.fewest_pairs:
            yield UNDETERMINED, FEW_PAIRS  # however many pass
        elif facts.passed < rule.pairs_needed(len(facts.pairs)):
            yield UNDETERMINED, facts.most_stopped_by or FEW_PAIRS
        elif facts["in_place"].low is None:
            yield UNDETERMINED, NO_INTERVAL
        elif count:
            yield MIXED, ""
        else:
            yield from _by_shares(rule, facts, kinds)


def _by_shares(
    rule: UpdateRule, facts: UpdateFacts, kinds: Sequence[frozenset[str]]
) -> Iterator[tuple[UpdateAnswer, str]]:
    """The answers where no block changes the basis and enough pairs pass."""
    where = share_sides(rule, facts)
    if BELOW in where:
        yield CARRIED, ""
    if WITHIN in where:
        yield MIXED, ""
    if ABOVE not in where:
        return
    # Blocks of which nothing is claimed say neither that a part is kept nor that all is.
    told = [kind - {CHANGES} for kind, block in zip(kinds, facts.blocks, strict=True) if can_be_told(rule, block)]
    if told and all(PARTIAL in kind for kind in told):
        yield MIXED, ""
    if told and all(kind == {PARTIAL} for kind in told):
        return
    clear = clear_sides(rule, facts)
    if BELOW in clear:
        yield UNDETERMINED, UNEVEN if ABOVE in sides(facts["clarity"], rule.clear) else NOT_CLEAR
    if ABOVE not in clear:
        return
    reached, seen = reaches(rule, facts), readings(rule, facts)
    if True in reached and True in seen:
        yield ADDED, ""
    if False in seen:
        yield UNDETERMINED, NOT_READABLE
    if False in reached:
        yield UNDETERMINED, NOT_REACHED


def measured(one: Estimate) -> bool:
    """Whether somebody looked: readable gain may be left out of a run, or be undetermined for want of a gain."""
    return one.value is not None or not (not one.reason or one.reason.startswith("not measured"))


def reaches(rule: UpdateRule, facts: UpdateFacts) -> frozenset[bool]:
    """Whether the last layer's lens reads enough of the prediction, as far as its interval tells; yes if not measured."""
    reach = facts[REACH]
    if reach.value is None:
        return frozenset({True})
    return frozenset(side == ABOVE for side in sides(reach, rule.reach))


def share_sides(rule: UpdateRule, facts: UpdateFacts) -> frozenset[str]:
    """Where what is added in place may lie, by power and, where it was measured, in the units of the final norm."""
    found = sides(facts["in_place"], rule.carried, rule.added)
    other = facts["in_place_normed"]
    return found if other.value is None else found | sides(other, rule.carried, rule.added)


def clear_sides(rule: UpdateRule, facts: UpdateFacts) -> frozenset[str]:
    """Where the lower of two clarities may lie: by power and, where it was measured, in the units of the final norm."""
    found, other = sides(facts["clarity"], rule.clear), facts["clarity_normed"]
    both = [found] if other.value is None else [found, sides(other, rule.clear)]
    return frozenset(BELOW if BELOW in pair else ABOVE for pair in itertools.product(*both))


def uneven(rule: UpdateRule, facts: UpdateFacts) -> bool:
    """Whether what is added in place surely lies elsewhere in the units of the final norm: no text would change that."""
    other = facts["in_place_normed"]
    if other.value is None:
        return False
    return not sides(facts["in_place"], rule.carried, rule.added) & sides(other, rule.carried, rule.added)


def readings(rule: UpdateRule, facts: UpdateFacts) -> frozenset[bool]:
    """Whether what is added in place is what predicts, as far as the interval of readable gain tells.

    Readable gain that was not measured does not stand against it.
    """
    gain = facts["readable_gain"]
    if not measured(gain):
        return frozenset({True})
    return frozenset({False} if gain.value is None else {side == ABOVE for side in sides(gain, rule.readable)})


def _open(rule: UpdateRule, facts: UpdateFacts, kinds: Sequence[frozenset[str]]) -> tuple[str, ...]:
    """The indices whose intervals reach across a threshold."""
    found = ["in_place"] * (len(share_sides(rule, facts)) > 1)
    found += ["kept_high"] * any(len(kind) > 1 for kind in kinds)
    found += ["clarity"] * (len(clear_sides(rule, facts)) > 1)
    found += ["readable_gain"] * (len(readings(rule, facts)) > 1)
    found += [REACH] * (len(reaches(rule, facts)) > 1)
    return tuple(found)


def agreement(verdicts: Sequence[UpdateVerdict]) -> UpdateVerdict:
    """One verdict for a model: that of its seeds where they agree."""
    first = verdicts[0]
    blocks = sum(one.blocks for one in verdicts)
    changes = sum(one.changes[0] for one in verdicts), sum(one.changes[1] for one in verdicts)
    answers = {one.verdict for one in verdicts}
    if len(answers) == 1:
        gates = [one.gate for one in verdicts]
        gate = max(VERDICT_GATES, key=gates.count) if first.verdict == UNDETERMINED else ""
        between = tuple(answer for answer in ANSWERS if any(answer in one.between for one in verdicts))
        opened = tuple(dict.fromkeys(name for one in verdicts for name in one.open))
        return UpdateVerdict(first.verdict, gate, between, changes, blocks, opened)
    between = tuple(answer for answer in ANSWERS if answer in answers)
    return UpdateVerdict(UNDETERMINED, SEEDS_DIFFER, between, changes, blocks)
