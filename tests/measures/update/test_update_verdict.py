"""The rule that turns an update decomposition into a verdict."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lensbench.measures.means import Estimate
from lensbench.measures.update.sentences import what_would_help
from lensbench.measures.update.verdict import (
    ADDED,
    ANSWERS,
    BETWEEN,
    CARRIED,
    FEW_PAIRS,
    MIXED,
    NO_INTERVAL,
    NOT_CLEAR,
    NOT_REACHED,
    NOT_READABLE,
    REPRESENTED,
    SEEDS_DIFFER,
    SUFFIXES,
    UNDEFINED,
    UNDETERMINED,
    UNEVEN,
    VERDICT_GATES,
    BlockFact,
    PairFact,
    UpdateFacts,
    UpdateRule,
    UpdateVerdict,
    agreement,
    decide_update,
)

RULE = UpdateRule(added=0.8, carried=0.3, changed=0.5, kept=0.9, clear=0.5)
LAYERS = 6


def about(value, width=0.04):
    """An estimate with an interval around it."""
    return Estimate(value, value - width, value + width)


def block(first, kept=1.0, clarity=0.95, *, gate="", width=0.04, chance=0.05):
    """A block with these values, S as much as is kept."""
    return BlockFact(first, first + 1, gate, about(kept), about(clarity, width), about(kept, width), chance)


def facts(
    in_place=0.98,
    clarity=0.95,
    readable=0.6,
    news=0.05,
    *,
    normed=None,
    clear_normed=None,
    reach=None,
    width=0.04,
    gate="",
    blocks=None,
    **others,
):
    """The facts of a stream from layer 1 on; ``gate`` stops every pair."""
    named = {"in_place": in_place, "clarity": clarity, "readable_gain": readable, "news": news}
    named |= {} if normed is None else {"in_place_normed": normed}
    named |= {} if clear_normed is None else {"clarity_normed": clear_normed}
    named |= {} if reach is None else {"reach": reach}
    return UpdateFacts(
        "without layer 0",
        {name: value if isinstance(value, Estimate) else about(value, width) for name, value in named.items()},
        tuple(PairFact(i, j, gate) for i in range(1, LAYERS) for j in range(i + 1, LAYERS)),
        tuple(block(i, gate=gate) for i in range(1, LAYERS - 1)) if blocks is None else tuple(blocks),
        **others,
    )


def verdict(*args, **kwargs):
    """The verdict and its gate by the default rule."""
    found = decide_update(RULE, facts(*args, **kwargs))
    return found.verdict, found.gate


def test_additions_that_predict_are_added_up_in_one_representation():
    assert verdict() == (ADDED, "")


def test_what_does_not_show_in_earlier_readings_is_carried_along():
    assert verdict(in_place=0.02, readable=0.0, news=0.3, clarity=0.4) == (CARRIED, "")


def test_shares_between_the_two_thresholds_are_mixed():
    assert verdict(in_place=0.55) == (MIXED, "")


def test_most_blocks_in_a_new_basis_are_re_represented_with_their_number():
    # Losses fall, and nothing of the earlier reading is left: no pair passes, and that is the answer.
    found = decide_update(
        RULE, facts(gate="not kept", blocks=[block(i, 0.0, 0.0, gate="not kept") for i in range(1, 5)])
    )
    assert (found.verdict, found.changes, found.blocks) == (REPRESENTED, (4, 4), 4)


def test_half_of_the_reading_lost_at_every_block_is_re_represented():
    assert verdict(blocks=[block(i, 0.3, 0.2) for i in range(1, 5)]) == (REPRESENTED, "")


def test_one_change_of_basis_among_additions_is_mixed():
    assert verdict(blocks=[block(1), block(2, 0.1, 0.1), block(3), block(4)]) == (MIXED, "")


def test_one_change_of_basis_among_copies_is_mixed():
    assert verdict(in_place=0.0, blocks=[block(1), block(2, 0.1, 0.1), block(3), block(4)]) == (MIXED, "")


def test_a_part_lost_at_every_block_is_mixed():
    assert verdict(blocks=[block(i, 0.7, 0.6) for i in range(1, 5)]) == (MIXED, "")


def test_a_stream_that_shrinks_changes_no_basis():
    # S falls with the stream, clarity does not.
    assert verdict(blocks=[block(i, 0.4, 0.99) for i in range(1, 5)]) == (ADDED, "")


def test_interference_changes_no_basis():
    # Clarity falls, the signal persists.
    assert verdict(blocks=[block(i, 1.0, 0.3) for i in range(1, 5)]) == (ADDED, "")


def test_no_change_is_claimed_of_a_drowned_block():
    # Chance is so wide that a reading kept whole would not stand out.
    drowned = [block(i, 0.0, 0.2, gate="not kept", chance=5.1) for i in range(1, 5)]
    assert verdict(gate="not kept", blocks=drowned) == (UNDETERMINED, "not kept")


@pytest.mark.parametrize("gate", ["no fall", "no room", "not kept"])
def test_too_few_pairs_are_undetermined_with_the_gate_that_stops_most(gate):
    assert verdict(gate=gate, blocks=[block(i) for i in range(1, 5)]) == (UNDETERMINED, gate)


def test_no_change_of_basis_is_claimed_where_losses_do_not_fall():
    assert verdict(gate="no fall", blocks=[block(i, 0.0, 0.0, gate="no fall") for i in range(1, 5)]) == (
        UNDETERMINED,
        "no fall",
    )


def test_a_gain_in_a_small_channel_elsewhere_is_not_added_up():
    # Large increments of other tokens in place: all of c, none of the fall in cross-entropy.
    assert verdict(readable=0.0, news=0.02) == (UNDETERMINED, NOT_READABLE)


def test_news_do_not_stand_in_for_a_gain_that_nobody_can_read():
    assert verdict(readable=0.04, news=0.9) == (UNDETERMINED, NOT_READABLE)


def test_additions_need_a_last_lens_that_reads_the_prediction():
    few = {"reach": 0.25}
    assert verdict(**few) == (UNDETERMINED, NOT_REACHED)
    assert verdict(reach=0.9) == (ADDED, "")
    assert verdict(reach=0.4) == (UNDETERMINED, NOT_REACHED)  # its interval holds the threshold
    assert verdict(in_place=0.02, **few) == (CARRIED, "")
    assert verdict(in_place=0.55, **few) == (MIXED, "")


def test_the_units_of_the_final_norm_must_give_the_same_answer():
    assert verdict(normed=0.97) == (ADDED, "")
    assert verdict(normed=0.5) == (UNDETERMINED, UNEVEN)
    assert verdict(in_place=0.02, normed=0.98) == (UNDETERMINED, UNEVEN)
    assert verdict(in_place=0.55, normed=0.6) == (MIXED, "")
    # An interval that holds both sides is not sure to differ: text may bring them together.
    assert verdict(normed=Estimate(0.75, 0.65, 0.85)) == (UNDETERMINED, "between two answers")


def test_additions_are_clear_in_the_units_of_the_final_norm_too():
    assert verdict(normed=0.97, clear_normed=0.9) == (ADDED, "")
    assert verdict(normed=1.3, clear_normed=0.2) == (UNDETERMINED, UNEVEN)
    assert verdict(clarity=0.3, clear_normed=0.9) == (UNDETERMINED, NOT_CLEAR)
    assert verdict(in_place=0.02, normed=0.02, clear_normed=0.2) == (CARRIED, "")


def test_two_pairs_are_too_few_however_many_pass():
    of = facts()
    shallow = replace(of, pairs=of.pairs[:2], blocks=of.blocks[:1])
    found = decide_update(RULE, shallow)
    assert (found.verdict, found.gate) == (UNDETERMINED, FEW_PAIRS)
    stopped = replace(shallow, pairs=tuple(replace(pair, gate="no fall") for pair in shallow.pairs))
    assert decide_update(RULE, stopped).gate == FEW_PAIRS


def test_readable_gain_that_nobody_measured_does_not_stand_against_additions():
    assert verdict(readable=Estimate(None, None, None, "not measured: the suite leaves it out")) == (ADDED, "")


def test_readable_gain_without_a_gain_certifies_nothing():
    none = Estimate(None, None, None, "undetermined: no cross-entropy gain of the later lens over the earlier one")
    assert verdict(readable=none) == (UNDETERMINED, NOT_READABLE)


def test_a_drowned_reading_is_not_added_up():
    assert verdict(clarity=0.3) == (UNDETERMINED, NOT_CLEAR)


@pytest.mark.parametrize(
    ("in_place", "between"), [(0.8, (ADDED, MIXED)), (0.3, (CARRIED, MIXED)), ((0.55, 0.3), (ADDED, CARRIED, MIXED))]
)
def test_an_interval_across_a_threshold_names_the_answers_that_are_left(in_place, between):
    given_ = about(*in_place) if isinstance(in_place, tuple) else in_place
    found = decide_update(RULE, facts(in_place=given_))
    assert (found.verdict, found.gate, found.between, found.open) == (UNDETERMINED, BETWEEN, between, ("in_place",))


def test_blocks_that_may_change_the_basis_leave_the_answer_open():
    found = decide_update(RULE, facts(blocks=[block(i, 0.5, 0.3, width=0.2) for i in range(1, 5)]))
    assert (found.verdict, found.between, found.changes) == (UNDETERMINED, (REPRESENTED, MIXED), (0, 4))


def test_an_index_without_an_interval_has_no_verdict():
    assert verdict(in_place=Estimate(0.98, None, None, "too few clusters")) == (UNDETERMINED, NO_INTERVAL)


def test_a_decomposition_without_a_metric_has_no_verdict():
    assert verdict(reason="undefined: the read-out has no gain") == (UNDETERMINED, UNDEFINED)


def test_a_stream_of_two_layers_has_too_few_pairs():
    two = facts(blocks=[block(1)])
    assert decide_update(RULE, replace(two, pairs=two.pairs[:1])).gate == FEW_PAIRS


def test_a_stream_of_one_layer_has_no_verdict():
    assert decide_update(RULE, UpdateFacts("all layers", {}, (), ())).gate == UNDEFINED


@pytest.mark.parametrize(
    ("share", "help_"), [(0.9, "fit text"), (0.1, "eval text"), (None, "text to fit and to evaluate on")]
)
def test_what_would_help_follows_what_widens_the_interval(share, help_):
    wide = facts(in_place=0.8, of_refits=share)
    assert f"more {help_}" in what_would_help(wide, decide_update(RULE, wide))


def test_thresholds_that_overlap_are_refused():
    with pytest.raises(ValidationError, match="carried must not exceed added"):
        UpdateRule(carried=0.9, added=0.8)
    with pytest.raises(ValidationError, match="changed must not exceed kept"):
        UpdateRule(changed=0.95)


@pytest.mark.parametrize(("asked", "needed"), [(3, 3), (10, 3), (15, 3), (16, 4), (435, 87)])
def test_pairs_needed_are_three_or_a_fifth(asked, needed):
    assert RULE.pairs_needed(asked) == needed


# Several seeds
def test_seeds_that_agree_have_one_verdict():
    assert agreement([decide_update(RULE, facts())] * 3).verdict == ADDED


def test_seeds_that_differ_have_none():
    found = agreement([decide_update(RULE, facts()), decide_update(RULE, facts(in_place=0.5))])
    assert (found.verdict, found.gate, found.between) == (UNDETERMINED, SEEDS_DIFFER, (ADDED, MIXED))


def test_undetermined_seeds_name_the_gate_of_most():
    stopped, between = decide_update(RULE, facts(gate="no fall")), decide_update(RULE, facts(in_place=0.8))
    assert agreement([stopped, stopped, between]).gate == "no fall"


# From rows
def row(first, last, gate="", **values):
    """A row of update.csv or blocks.csv."""
    named = {"persistence": 1.0, "clarity": 0.9, "kept_high": 1.0} | values
    made = {"from_layer": first, "to_layer": last, "gate": gate, "persistence_chance": 0.05}
    for name, value in named.items():
        made |= {name: value, f"{name}_ci_low": value - 0.1, f"{name}_ci_high": value + 0.1}
    return made


def test_facts_of_a_scope_leave_layer_0_out_and_keep_its_block():
    rows = [row(i, j) for i in range(3) for j in range(i + 1, 3)]
    indices = {"in_place": about(0.4), "in_place_without_layer0": about(0.9)}
    every, later = (UpdateFacts.of(scope, indices, rows, [rows[0], rows[2]]) for scope in SUFFIXES)
    assert [(p.first, p.last) for p in every.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert [(p.first, p.last) for p in later.pairs] == [(1, 2)]
    assert (every["in_place"].value, later["in_place"].value) == (0.4, 0.9)
    assert [len(one.blocks) for one in (every, later)] == [2, 1]
    assert later.first_block == every.blocks[0]


def test_empty_cells_of_tables_are_unknown():
    nan = float("nan")
    read = UpdateFacts.of("all layers", {}, [row(0, 1, gate=nan)], [row(0, 1, gate=nan, kept_high=nan)])
    assert read.pairs[0].gate == ""
    assert read.blocks[0].kept_high == Estimate(None, None, None)


# For all facts
numbers = st.floats(-3, 3, allow_nan=False)


@st.composite
def estimates(draw):
    """Any estimate: undefined, without an interval, or with one."""
    if draw(st.integers(0, 9)) == 0:
        return Estimate(
            None, None, None, draw(st.sampled_from(["", "not measured: nobody asked", "undetermined: no gain"]))
        )
    low, value, high = sorted(draw(st.tuples(numbers, numbers, numbers)))
    return Estimate(value, low, high) if draw(st.integers(0, 9)) else Estimate(value, None, None)


gates = st.sampled_from(["", "", "", "no fall", "no room", "not kept"])


@st.composite
def any_facts(draw):
    """Facts of any kind, consistent or not."""
    names = ["in_place", "clarity", "readable_gain", "news", "drowned"]
    blocks = draw(st.lists(st.builds(
        BlockFact, st.integers(0, 5), st.integers(6, 9), gates, estimates(), estimates(), estimates(),
        st.floats(0, 3) | st.just(float("inf")),
    ), max_size=5))  # fmt: skip
    return UpdateFacts(
        draw(st.sampled_from(list(SUFFIXES))),
        {name: draw(estimates()) for name in draw(st.sets(st.sampled_from(names)))},
        tuple(draw(st.lists(st.builds(PairFact, st.integers(0, 3), st.integers(4, 7), gates), max_size=8))),
        tuple(blocks),
        draw(st.none() | st.sampled_from(blocks)) if blocks else None,
        draw(st.none() | st.floats(0, 1)),
        draw(st.sampled_from(["", "", "", "undefined: no gain"])),
    )


def widened(one, by):
    """The estimate with a wider interval."""
    return one if one.low is None or one.high is None else replace(one, low=one.low - by, high=one.high + by)


@settings(max_examples=50, deadline=None)
@given(any_facts())
def test_every_stream_gets_a_verdict_or_a_gate(given_):
    found = decide_update(RULE, given_)
    assert isinstance(found, UpdateVerdict)
    assert found.verdict in ANSWERS
    assert (found.verdict == UNDETERMINED) == (found.gate in VERDICT_GATES)
    assert found.verdict == UNDETERMINED or not found.gate


@settings(max_examples=50, deadline=None)
@given(any_facts(), st.floats(0, 1))
def test_a_wider_interval_commits_nowhere_that_a_narrower_one_did_not(given_, by):
    wide = replace(
        given_,
        indices={name: widened(one, by) for name, one in given_.indices.items()},
        blocks=tuple(
            replace(one, **{name: widened(getattr(one, name), by) for name in ("persistence", "clarity", "kept_high")})
            for one in given_.blocks
        ),
    )
    narrow, wider = decide_update(RULE, given_), decide_update(RULE, wide)
    assert wider.verdict in (UNDETERMINED, narrow.verdict)
