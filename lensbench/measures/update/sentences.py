"""The verdict on an update decomposition in one graded sentence of plain words.

It says what was measured, whatever the verdict is, and for an undetermined one which gate stopped it and what would help.
Whether errors are corrected, the decomposition cannot say: :func:`errors_in_words` says it from injected errors.
"""

from lensbench.measures.means import Estimate
from lensbench.measures.update.gates import NO_FALL, NO_ROOM, NOT_KEPT
from lensbench.measures.update.massive import WithoutMassive
from lensbench.measures.update.verdict import (
    ADDED,
    ALL_LAYERS,
    BELOW,
    BETWEEN,
    CARRIED,
    CHANGES,
    FEW_PAIRS,
    MIXED,
    NO_INTERVAL,
    NOT_CLEAR,
    NOT_MEASURED,
    NOT_REACHED,
    NOT_READABLE,
    REPRESENTED,
    SEEDS_DIFFER,
    UNDEFINED,
    UNDETERMINED,
    UNEVEN,
    VERDICT_GATES,
    UpdateFacts,
    UpdateRule,
    UpdateVerdict,
    block_kinds,
    measured,
    sides,
)
from lensbench.statistics import warned_of_few_clusters

NO_TEXT_HELPS = (SEEDS_DIFFER, UNEVEN, NOT_REACHED)
"""Gates that narrower intervals do not open"""

MORE_TEXT = "more text to fit and to evaluate on would narrow the intervals"
MORE_FIT_TEXT = "more fit text would narrow the interval, most of which comes from lens refits"
MORE_EVAL_TEXT = "more eval text would narrow the interval, most of which comes from documents"

HELP = {
    NO_FALL: "more dev text would make a small fall sure, but without a fall there is no gain to speak of",
    NO_ROOM: "more fit text would make lenses better, and layers further apart have more room",
    NOT_KEPT: "more fit text would raise what an earlier lens reads above chance",
    NOT_CLEAR: "more fit text would lower the interference",
    FEW_PAIRS: "text does not help: between so few layers there are too few pairs",
    NOT_REACHED: "no amount of text helps: no linear lens reads the rest before the last block",
    UNEVEN: "no amount of text helps: decompose loud tokens and the others apart",
    NOT_READABLE: "no amount of text helps here: look for the channel that predicts",
    SEEDS_DIFFER: "more seeds, or more text for each, would help",
}
"""Gate -> what would open it"""

NEARLY_ALL = 0.9
"""Reach from which a sentence does not mention it"""

NOT_RUN = "The update decomposition was not measured."


def sentence(
    rule: UpdateRule,
    facts: UpdateFacts,
    found: UpdateVerdict,
    *,
    null: Estimate | None = None,
    errors: str = "",
    massive: WithoutMassive | None = None,
) -> str:
    """What the decomposition says on one scope of one model, in a sentence.

    ``null``: what is added in place when every block's update is one of another document. ``errors``: what becomes of
    injected errors, from :func:`errors_in_words`. ``massive``: what is added in place without massive activations.
    """
    if found.gate == NOT_MEASURED:
        return NOT_RUN
    if found.gate == UNDEFINED:
        why = facts.reason.removeprefix("undefined: ").removeprefix("undetermined: ") or "one layer is left"
        return f"{_where(facts)} nothing can be said: {why}."
    clauses = [
        _opening(rule, facts, found, null) + (", and " if found.verdict == ADDED else "; ") + _falls(facts),
        _readable(facts),
        _without_massive(facts, massive),
        _clear(facts),
        _new(facts),
        _reached(facts, found),
        errors,
        _first_layer(rule, facts),
        warned_of_few_clusters(facts["in_place"].reason),
        what_would_help(facts, found),
    ]
    return f"{'; '.join(clause for clause in clauses if clause)}."


def update_rule_in_words(rule: UpdateRule) -> str:
    """The rule in one sentence."""
    return (
        f"{REPRESENTED} where more than {rule.changing:.0%} of the blocks whose losses fall keep less than {rule.changed:g} "
        f"of the earlier reading, by S and by clarity; {MIXED} where fewer do, where every block keeps less than "
        f"{rule.kept:g}, or where the share that is added in place lies between {rule.carried:g} and {rule.added:g}; "
        f"{CARRIED} where it lies below, {ADDED} where it lies above, clarity is above {rule.clear:g}, and readable gain "
        f"is above {rule.readable:g} and reach above {rule.reach:g}; shares need {rule.fewest_pairs} pairs of layers, and "
        f"{rule.smallest_share:.0%} of them, that pass the gates, and the same answer in the units of the final norm; "
        f"{UNDETERMINED} where an interval leaves more than one "
        "answer, or seeds differ."
    )


# Numbers
def percent(one: Estimate) -> str:
    """``98 % [95, 101]``, with as many digits as the interval allows."""
    if one.value is None:
        return "an unknown share"
    if one.low is None or one.high is None:
        return f"{_digits(100 * one.value, 0)} %"
    digits = 1 if 0 < one.high - one.low < 0.01 else 0
    low, value, high = (_digits(100 * x, digits) for x in (one.low, one.value, one.high))
    return f"{value} %" if low == value == high else f"{value} % [{low}, {high}]"


def share(one: Estimate) -> str:
    """``0.95 [0.93, 0.97]``, with as many digits as the interval allows."""
    if one.value is None:
        return "unknown"
    if one.low is None or one.high is None:
        return _digits(one.value, 2)
    digits = 3 if 0 < one.high - one.low < 0.01 else 2
    low, value, high = (_digits(x, digits) for x in (one.low, one.value, one.high))
    return value if low == value == high else f"{value} [{low}, {high}]"


def _digits(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


# Clauses
def _where(facts: UpdateFacts) -> str:
    return "Over all layers" if facts.scope == ALL_LAYERS else "From layer 1 on"


def _opening(rule: UpdateRule, facts: UpdateFacts, found: UpdateVerdict, null: Estimate | None) -> str:
    """What was found first of all: shares, changes of basis, or how few pairs pass."""
    where, shares = _where(facts), _shares(facts, found, null)
    if found.verdict == REPRESENTED:
        kept = facts["kept_high"]
        rest = "" if kept.value is None else f": later layers keep at most {percent(kept)} of an earlier reading"
        return f"{where} {_changes(found)}{rest}"
    if found.verdict == MIXED:
        return f"{where} {shares}{_why_mixed(rule, facts, found)}"
    if found.verdict == CARRIED:
        return f"{where} only {shares}, the rest in directions of its own while the earlier reading is carried along"
    if found.verdict == ADDED:
        return f"{where} {shares}"
    return f"{where} {_undecided(rule, facts, found, shares)}"


def _shares(facts: UpdateFacts, found: UpdateVerdict, null: Estimate | None) -> str:
    one = facts["in_place"]
    if one.value is None:
        return ""
    beside = ""
    if null is not None and null.value is not None:
        shuffled = f"its own updates shuffled: {percent(Estimate(null.value, None, None))}"
        like = found.verdict == ADDED and one.meets(null)
        beside = f", as in any stack of additions ({shuffled})" if like else f" (in a stack of additions, {shuffled})"
    return f"{percent(one)} of what later layers add shows in the reading of earlier lenses{beside}"


def _changes(found: UpdateVerdict) -> str:
    """How many blocks change the basis, and how many more may."""
    surely, maybe = found.changes
    if maybe > surely:
        return f"{surely} of {found.blocks} blocks surely change the basis, {maybe} may"
    return f"{surely} of {found.blocks} blocks {'changes' if surely == 1 else 'change'} the basis"


def _why_mixed(rule: UpdateRule, facts: UpdateFacts, found: UpdateVerdict) -> str:
    """What else than shares between the thresholds makes a verdict mixed."""
    if found.changes[0]:
        return f", and {_changes(found)}"
    one = facts["in_place"]
    if one.low is not None and one.low > rule.added:
        kept = facts["kept_high"]
        most = "" if kept.value is None else f" (on average at most {percent(kept)})"
        return f", but every block keeps only a part of the earlier reading{most}"
    return f", {percent(_rest(one))} goes elsewhere"


def _rest(one: Estimate) -> Estimate:
    if one.value is None or one.low is None or one.high is None:
        return one
    return Estimate(1 - one.value, 1 - one.high, 1 - one.low)


def _undecided(rule: UpdateRule, facts: UpdateFacts, found: UpdateVerdict, shares: str) -> str:
    """What is known where no verdict is given, and which gate stands in the way."""
    if found.gate in (NO_FALL, NO_ROOM, NOT_KEPT, FEW_PAIRS):
        passed, asked = facts.passed, len(facts.pairs)
        stopped = sum(pair.gate == found.gate for pair in facts.pairs)
        why = f"; at {stopped} of them {VERDICT_GATES[found.gate]}" if stopped else ""
        needed = rule.pairs_needed(asked // facts.seeds)
        each = f" at each of {facts.seeds} seeds" if facts.seeds > 1 else ""
        said = f"{passed} of {asked} pairs of layers pass the gates and {needed} are needed{each}{why}"
        return f"{said} ({_changes(found)})" if found.changes[1] else said
    if not shares:
        return f"the share that is added in place is unknown: {VERDICT_GATES[found.gate]}"
    if found.gate == SEEDS_DIFFER:
        return f"{shares}, but seeds differ: {_alternatives(found)}"
    if found.gate == BETWEEN:
        count = "both" if len(found.between) == 2 else "all"
        return f"{shares}: {_alternatives(found)} are {count} possible{_blocks_open(found)}"
    reason = {
        NO_INTERVAL: "without an interval: there are too few clusters of documents",
        NOT_CLEAR: f"but clarity is too low to call it one representation (above {rule.clear:g} is needed)",
        NOT_READABLE: "but what lowers the cross-entropy may be something else",
        NOT_REACHED: f"but the lens of the last layer reads only {percent(facts['reach'])} of the prediction",
        UNEVEN: f"but {_evenly(rule, facts)} where every token counts alike: loud tokens differ from others",
    }[found.gate]
    return f"{shares}, {reason}"


def _evenly(rule: UpdateRule, facts: UpdateFacts) -> str:
    clear = BELOW in sides(facts["clarity_normed"], rule.clear) and facts["clarity_normed"].value is not None
    return f"clarity is {share(facts['clarity_normed'])}" if clear else percent(facts["in_place_normed"])


def _alternatives(found: UpdateVerdict) -> str:
    return " and ".join(", ".join(found.between).rsplit(", ", 1)) if found.between else "none is left"


def _blocks_open(found: UpdateVerdict) -> str:
    surely, maybe = found.changes
    return f" ({_changes(found)})" if maybe > surely else ""


def _falls(facts: UpdateFacts) -> str:
    steps, fallen = facts.steps, _fallen(facts)
    if fallen == len(steps):
        return "cross-entropy falls at every step"
    if not fallen:
        return "cross-entropy surely falls at no step"
    return f"cross-entropy surely falls at {fallen} of {len(steps)} steps"


def _fallen(facts: UpdateFacts) -> int:
    return sum(step.gate != NO_FALL for step in facts.steps)


def _gains(facts: UpdateFacts) -> bool:
    """Whether later lenses surely have a gain in cross-entropy: at some step, and in all where that was measured."""
    readable = facts["readable_gain"]
    return _fallen(facts) > 0 and (readable.value is not None or not measured(readable))


def _readable(facts: UpdateFacts) -> str:
    one = facts["readable_gain"]
    if not _fallen(facts):
        return ""
    if not measured(one):
        return "how much of that fall an earlier lens can read was not measured"
    if one.value is None:
        return "how much of the fall an earlier lens can read is undetermined"
    if one.low is not None and one.low <= 0:
        return f"no part of that fall can surely be read by the earlier lens itself ({percent(one)})"
    return f"{percent(one)} of that fall can be read by the earlier lens itself"


def _clear(facts: UpdateFacts) -> str:
    one = facts["clarity"]
    return "" if one.value is None else f"clarity {share(one)}"


CHANGED_WITHOUT_MASSIVE = 0.04
"""A share that is added in place and moves by more without massive activations is said both ways"""


def _without_massive(facts: UpdateFacts, massive: WithoutMassive | None) -> str:
    """What is added in place without massive activations, where that is outside the reported interval or far from it."""
    one = facts["in_place"]
    if massive is None or one.value is None:
        return ""
    other = Estimate(massive.in_place, None, None)
    if abs(massive.in_place - one.value) <= CHANGED_WITHOUT_MASSIVE and one.meets(other):
        return ""
    tokens = f"{100 * massive.left_out:.2g} % of the tokens"
    return f"without massive activations (at most {tokens}) {percent(other)} of what is added shows in that reading"


def _new(facts: UpdateFacts) -> str:
    """News, which are news of a gain: nothing where the cross-entropy does not surely fall."""
    one = facts["news"]
    if one.value is None or not _gains(facts):
        return ""
    if one.value <= 0 or (one.low is not None and one.low <= 0):
        return f"no part of the gain is surely news to the earlier lens ({percent(one)})"
    if one.value > 1:
        return f"{_beyond_the_whole(one)} is news to the earlier lens ({percent(one)})"
    return f"{percent(one)} of the gain is news to the earlier lens"


def _beyond_the_whole(one: Estimate) -> str:
    """How much of a gain a share above 1 is: the directions left over, which the earlier lens reads, have a loss."""
    if one.low is not None and one.low > 1:
        return "more than the whole gain"
    least = 100 if one.low is None else round(100 * one.low)
    return "the whole gain" if least >= 100 else f"at least {least} % of the gain, and maybe all,"


def _reached(facts: UpdateFacts, found: UpdateVerdict) -> str:
    """How little of the prediction the verdict speaks of, where the last lens leaves much of it."""
    one = facts["reach"]
    if one.value is None or one.value >= NEARLY_ALL or found.gate == NOT_REACHED:
        return ""
    return f"all this is about the {percent(one)} of the prediction that the lens of the last layer reads"


def _first_layer(rule: UpdateRule, facts: UpdateFacts) -> str:
    """What is left of the reading of layer 0 after its block."""
    block = facts.first_block
    if block is None or block.clarity.value is None or block.persistence.value is None:
        return ""
    if block_kinds(rule, block) == {CHANGES}:
        return "the first block changes the basis"
    lost = block.clarity.high is not None and block.clarity.high < rule.clear
    return "layer 0 is drowned" if lost and not 0 <= block.persistence.value < 1 else ""


def what_would_help(facts: UpdateFacts, found: UpdateVerdict) -> str:
    """What an undetermined verdict needs; empty for a verdict, and where there is nothing to say."""
    if found.verdict != UNDETERMINED:
        return ""
    if found.gate == NO_INTERVAL or (found.open and found.gate not in NO_TEXT_HELPS):
        if facts.of_refits is None:
            return MORE_TEXT
        return MORE_FIT_TEXT if facts.of_refits > 0.5 else MORE_EVAL_TEXT
    return HELP.get(found.gate, "")


def without_advice(said: str) -> str:
    """A sentence of :func:`sentence` without what would help, which is its last clause where there is one."""
    advice = advice_in(said)
    return f"{said.removesuffix(f'; {advice}.')}." if advice else said


def advice_in(said: str) -> str:
    """What would help, from a sentence of :func:`sentence`; empty where it says nothing of that."""
    every = (MORE_TEXT, MORE_FIT_TEXT, MORE_EVAL_TEXT, *HELP.values())
    return next((advice for advice in every if said.endswith(f"; {advice}.")), "")


# Errors
def errors_in_words(fate: str, survival: Estimate) -> str:
    """What becomes of injected errors: ``fate`` as of the probe of injected errors, ``survival`` the share that is left."""
    if survival.value is None:
        return "what becomes of injected errors is undetermined"
    left = f"{share(survival)} of each is left"
    return {
        "corrected": f"injected errors are corrected: {left}, less than of signals and of noise",
        "shrunk": f"injected errors shrink, and so do signals ({left})",
        "unchanged": f"injected errors are not corrected ({left})",
        "neither": f"injected errors change, but are not corrected ({left})",
    }.get(fate, f"what becomes of injected errors is undetermined ({left})")
