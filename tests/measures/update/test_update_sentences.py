"""The sentence that goes with a verdict on the update decomposition, read as English."""

from dataclasses import replace

import pytest

from benchmarks.texts.numbers import Number
from lensbench.measures.means import Estimate
from lensbench.measures.update.massive import WithoutMassive
from lensbench.measures.update.sentences import errors_in_words, percent, sentence, share, update_rule_in_words
from lensbench.measures.update.verdict import (
    ANSWERS,
    SUFFIXES,
    BlockFact,
    PairFact,
    UpdateFacts,
    UpdateRule,
    agreement,
    decide_update,
)

RULE = UpdateRule(added=0.8, carried=0.3, changed=0.5, kept=0.9, clear=0.5)
UNKNOWN = Estimate(None, None, None)
NULL = Estimate(0.99, None, None)


def about(value, width=0.03):
    """An estimate with an interval around it."""
    return Estimate(value, value - width, value + width)


def block(first, kept=1.0, clarity=0.95, gate="", chance=0.05):
    """A block with these values."""
    return BlockFact(first, first + 1, gate, about(kept), about(clarity), about(kept), chance)


DROWNED = BlockFact(0, 1, "", about(16.7, 5), about(0.26), about(1.0, 0), 5.1)


def facts(gate="", blocks=None, **named):
    """The facts of a stream of five layers from layer 1 on; ``gate`` stops every pair."""
    indices = {
        "in_place": Estimate(0.98, 0.95, 1.01), "clarity": Estimate(0.954, 0.952, 0.956),
        "readable_gain": about(0.6), "news": about(0.33), "kept_high": about(0.1),
    } | named  # fmt: skip
    return UpdateFacts(
        "without layer 0",
        indices,
        tuple(PairFact(i, j, gate) for i in range(1, 5) for j in range(i + 1, 6)),
        tuple(block(i, gate=gate) for i in range(1, 5)) if blocks is None else blocks,
        DROWNED,
    )


def said(of, **others):
    """The sentence on facts by the default rule."""
    return sentence(RULE, of, decide_update(RULE, of), **others)


def test_additions_are_said_with_their_null_and_what_is_not_known_of_them():
    assert said(facts(), null=NULL, errors=errors_in_words("unchanged", Estimate(1.01, 0.99, 1.02))) == (
        "From layer 1 on 98 % [95, 101] of what later layers add shows in the reading of earlier lenses, as in any stack "
        "of additions (its own updates shuffled: 99 %), and cross-entropy falls at every step; 60 % [57, 63] of "
        "that fall can be read by the earlier lens itself; clarity 0.954 [0.952, 0.956]; 33 % [30, 36] of the "
        "gain is news to the earlier lens; injected errors are not corrected (1.01 [0.99, 1.02] of each is left); "
        "layer 0 is drowned."
    )


@pytest.mark.parametrize(
    ("share_of_null", "alike"),
    [(Estimate(0.99, 0.98, 1.0), True), (Estimate(1.04, 1.02, 1.06), False), (Estimate(1.04, 1.0, 1.08), True)],
)
def test_as_in_a_stack_of_additions_is_said_where_intervals_overlap(share_of_null, alike):
    found = said(facts(), null=share_of_null)
    assert ("as in any stack of additions" in found) == alike
    assert "its own updates shuffled" in found


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ((0.5, 0.4, 0.6), (0.7, 0.6, 0.8), True),
        ((0.5, 0.4, 0.59), (0.7, 0.6, 0.8), False),
        ((0.5, None, None), (0.7, 0.4, 0.8), True),
        ((0.5, None, None), (0.5, None, None), True),
        ((0.5, None, None), (0.51, None, None), False),
    ],
)
def test_intervals_that_meet_do_so_for_sentences_and_for_pages(one, other, meet):
    for first, second in ((one, other), (other, one)):
        assert Estimate(*first).meets(Estimate(*second)) == meet
        assert bool(Number(*first, "a").meets(Number(*second, "b"))) == meet
        assert bool(Number(*first, "a").apart_from(Number(*second, "b"))) != meet
    assert not Estimate(None, None, None).meets(Estimate(*one))


def test_too_few_clusters_are_said_in_the_sentence():
    warned = Estimate(0.98, 0.95, 1.01, "a gate; only 16.4 clusters: interval not to be trusted")
    assert "; only 16.4 clusters: interval not to be trusted" in said(facts(in_place=warned))
    assert "not to be trusted" not in said(facts())


def test_carrying_along_is_said_with_where_the_rest_is():
    of = facts(in_place=about(0.02), readable_gain=about(0.0), news=about(0.1))
    assert said(of, null=NULL) == (
        "From layer 1 on only 2 % [-1, 5] of what later layers add shows in the reading of earlier lenses (in a stack of "
        "additions, its own updates shuffled: 99 %), the rest in directions of its own while the earlier reading is "
        "carried along; cross-entropy falls at every step; no part of that fall can surely be read by the earlier lens "
        "itself (0 % [-3, 3]); clarity 0.954 [0.952, 0.956]; 10 % [7, 13] of the gain is news to the earlier "
        "lens; layer 0 is drowned."
    )


def test_changes_of_basis_are_counted():
    changed = tuple(block(i, 0.0, 0.0, gate="not kept") for i in range(1, 5))
    assert said(facts(gate="not kept", blocks=changed, in_place=UNKNOWN)).startswith(
        "From layer 1 on 4 of 4 blocks change the basis: later layers keep at most 10 % [7, 13] of an earlier reading; "
        "cross-entropy falls at every step; "
    )


def test_a_mixture_is_said_with_its_shares():
    assert said(facts(in_place=about(0.55))).startswith(
        "From layer 1 on 55 % [52, 58] of what later layers add shows in the reading of earlier lenses, 45 % [42, 48] goes "
        "elsewhere; cross-entropy falls at every step; "
    )


def test_a_mixture_is_said_with_its_changes_of_basis():
    of = facts(blocks=(block(1), block(2, 0.1, 0.1), block(3), block(4)))
    assert "earlier lenses, and 1 of 4 blocks changes the basis; " in said(of)


def test_a_part_lost_at_every_block_is_said():
    of = facts(blocks=tuple(block(i, 0.7, 0.6) for i in range(1, 5)))
    assert "but every block keeps only a part of the earlier reading (on average at most 10 % [7, 13]); " in said(of)


@pytest.mark.parametrize(
    ("gate", "why", "help_"),
    [
        ("no fall", "KL or cross-entropy does not surely fall from the earlier layer to the later one; cross-entropy "
         "surely falls at no step; clarity", "more dev text would make a small fall sure"),
        ("no room", "the later lens's error loading is not below the earlier one's by enough to share it out",
         "more fit text would make lenses better"),
        ("not kept", "the earlier lens reads no more of its signal at the later layer than it would by chance",
         "more fit text would raise what an earlier lens reads above chance"),
    ],
)  # fmt: skip
def test_a_gate_is_said_with_its_reason_and_what_would_help(gate, why, help_):
    found = said(facts(gate=gate, in_place=UNKNOWN))
    assert found.startswith(
        f"From layer 1 on 0 of 10 pairs of layers pass the gates and 3 are needed; at 10 of them {why}"
    )
    assert f"; {help_}" in found


def test_an_interval_across_a_threshold_is_said_with_both_answers_and_what_would_help():
    found = said(replace(facts(in_place=about(0.8)), of_refits=0.8), null=NULL)
    assert found.startswith(
        "From layer 1 on 80 % [77, 83] of what later layers add shows in the reading of earlier lenses (in a stack of "
        "additions, its own updates shuffled: 99 %): added up in one representation and mixed are both possible; "
    )
    assert found.endswith("; more fit text would narrow the interval, most of which comes from lens refits.")


def test_a_gain_elsewhere_is_not_hidden_by_what_is_in_place():
    found = said(facts(readable_gain=about(0.0), news=about(0.0)))
    assert "earlier lenses, but what lowers the cross-entropy may be something else; " in found
    assert "no part of that fall can surely be read by the earlier lens itself (0 % [-3, 3])" in found


def test_readable_gain_that_was_not_measured_is_said():
    found = said(facts(readable_gain=Estimate(None, None, None, "not measured: the suite leaves it out")))
    assert "how much of that fall an earlier lens can read was not measured" in found


NO_GAIN = Estimate(None, None, None, "undetermined: no cross-entropy gain of the later lens over the earlier one")


@pytest.mark.parametrize("news", [about(0.33), about(0.0), about(-0.1)])
@pytest.mark.parametrize("without", [{"gate": "no fall"}, {"readable_gain": NO_GAIN}])
def test_news_are_not_quoted_where_no_gain_is_sure(news, without):
    """A share of nothing says nothing; an explained power may grow while the cross-entropy does not fall."""
    found = said(facts(news=news, **without))
    assert "news" not in found
    assert "the gain is" not in found
    assert "of the gain" not in found


@pytest.mark.parametrize(
    ("news", "words"),
    [
        (Estimate(1.46, 1.19, 1.73), "more than the whole gain is news to the earlier lens (146 % [119, 173])"),
        (Estimate(1.04, 0.998, 1.09), "the whole gain is news to the earlier lens (104 % [100, 109])"),
        (Estimate(1.04, None, None), "the whole gain is news to the earlier lens (104 %)"),
        (
            Estimate(1.48, 0.28, 2.72),
            "at least 28 % of the gain, and maybe all, is news to the earlier lens (148 % [28, 272])",
        ),
        (Estimate(2.09, -1.2, 6.1), "no part of the gain is surely news to the earlier lens (209 % [-120, 610])"),
    ],
)
def test_no_share_above_the_whole_is_called_a_share_of_the_gain(news, words):
    assert f"; {words}; " in said(facts(news=news))


@pytest.mark.parametrize(
    ("reported", "without", "told"),
    [
        (Estimate(0.798, 0.66, 0.88), 0.845, True),
        (Estimate(0.798, 0.66, 0.88), 0.83, False),
        (Estimate(0.798, 0.79, 0.81), 0.83, True),  # outside its interval
        (Estimate(0.798, None, None), 0.845, True),
        (UNKNOWN, 0.845, False),
    ],
)
def test_a_share_that_is_another_without_massive_activations_is_said_both_ways(reported, without, told):
    found = said(facts(in_place=reported), massive=WithoutMassive(without, 0.0088))
    assert ("massive" in found) == told
    if told:
        share = f"{100 * without:.0f} % of what is added shows in that reading; "
        assert f"; without massive activations (at most 0.88 % of the tokens) {share}" in found
    assert "massive" not in said(facts(in_place=reported))


def test_what_is_added_without_massive_activations_is_read_from_the_rows_of_its_scope():
    def rows(value):
        row = {"setting": "massive", "index": "in_place_without_layer0", "value": value}
        others = [
            row | {"index": "in_place", "value": 5.0},
            row | {"setting": "metric", "value": 6.0},
            row | {"index": "eval_tokens_left_out", "value": 0.02},
            row | {"index": "fit_tokens_left_out", "value": 0.03},
        ]
        return [*others, row]

    def of(rows):
        return WithoutMassive.of(rows, "_without_layer0")

    assert of(rows(0.7)) == WithoutMassive(0.7, 0.03)
    assert of([*rows(0.7), *rows(0.8)]).in_place == pytest.approx(0.75)
    assert of(rows(None)) is None
    assert of([*rows(0.7), *rows(float("nan"))]) is None
    assert of([]) is None


def test_news_are_quoted_where_readable_gain_was_not_measured():
    assert "33 % [30, 36] of the gain is news" in said(facts(readable_gain=Estimate(None, None, None, "not measured")))


def test_blocks_that_may_change_the_basis_are_counted():
    wide = tuple(replace(block(i, 0.5, 0.3), kept_high=about(0.5, 0.2)) for i in range(1, 5))
    assert (
        "re-represented and mixed are both possible (0 of 4 blocks surely change the basis, 4 may); "
        in said(facts(blocks=wide))
    )  # fmt: skip


def test_an_undefined_decomposition_says_why():
    of = replace(facts(), reason="undefined: the read-out has no gain")
    assert said(of) == "From layer 1 on nothing can be said: the read-out has no gain."


def test_seeds_that_differ_are_said_with_their_answers():
    seeds = [facts(), facts(in_place=about(0.5))]
    whole = UpdateFacts.over_seeds(seeds, {"in_place_without_layer0": Estimate(0.74, 0.1, 1.4)})
    found = sentence(RULE, whole, agreement([decide_update(RULE, one) for one in seeds]))
    assert found.startswith(
        "From layer 1 on 74 % [10, 140] of what later layers add shows in the reading of earlier lenses, but seeds differ: "
        "added up in one representation and mixed; "
    )


def test_pairs_of_several_seeds_are_counted_together_and_needed_at_each():
    whole = UpdateFacts.over_seeds([facts(gate="no room", in_place=UNKNOWN)] * 2, {})
    found = sentence(RULE, whole, agreement([decide_update(RULE, one) for one in [facts(gate="no room")] * 2]))
    assert found.startswith(
        "From layer 1 on 0 of 20 pairs of layers pass the gates and 3 are needed at each of 2 seeds; at 20 of them "
    )


def test_a_fall_at_some_steps_is_counted():
    of = facts()
    pairs = tuple(replace(p, gate="no fall") if (p.first, p.last) == (2, 3) else p for p in of.pairs)
    assert ", and cross-entropy surely falls at 3 of 4 steps; " in said(replace(of, pairs=pairs))


def test_no_error_is_called_corrected_but_by_the_probe():
    assert "correct" not in said(facts())
    assert errors_in_words("corrected", about(0.5)) == (
        "injected errors are corrected: 0.50 [0.47, 0.53] of each is left, less than of signals and of noise"
    )
    assert (
        errors_in_words("shrunk", about(0.4))
        == "injected errors shrink, and so do signals (0.40 [0.37, 0.43] of each is left)"
    )
    assert "change, but are not corrected" in errors_in_words("neither", about(1.3))
    assert errors_in_words("undetermined", UNKNOWN) == "what becomes of injected errors is undetermined"


@pytest.mark.parametrize("scope", SUFFIXES)
@pytest.mark.parametrize("in_place", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("gate", ["", "no fall"])
def test_every_sentence_is_one_line_that_says_what_was_found(scope, in_place, gate):
    found = said(replace(facts(gate=gate, in_place=about(in_place)), scope=scope))
    assert found.endswith(".")
    assert "\n" not in found
    assert "  " not in found
    assert "None" not in found
    assert "nan" not in found
    assert len(found) > 100


@pytest.mark.parametrize(
    ("one", "as_percent", "as_share"),
    [
        (Estimate(0.98, 0.95, 1.01), "98 % [95, 101]", "0.98 [0.95, 1.01]"),
        (Estimate(0.9812, 0.9793, 0.9831), "98.1 % [97.9, 98.3]", "0.981 [0.979, 0.983]"),
        (Estimate(-0.0001, -0.02, 0.02), "0 % [-2, 2]", "0.00 [-0.02, 0.02]"),
        (Estimate(0.99, None, None), "99 %", "0.99"),
        (Estimate(1.0, 1.0, 1.0), "100 %", "1.00"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_allows(one, as_percent, as_share):
    assert (percent(one), share(one)) == (as_percent, as_share)


def test_the_rule_in_words_has_every_answer_and_threshold():
    words = update_rule_in_words(
        UpdateRule(added=0.81, carried=0.32, changed=0.53, kept=0.94, clear=0.55, readable=0.16)
    )
    assert all(answer in words for answer in ANSWERS)
    assert all(number in words for number in ("0.81", "0.32", "0.53", "0.94", "0.55", "0.16"))
