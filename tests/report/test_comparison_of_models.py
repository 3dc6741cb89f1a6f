"""Comparisons: which models are held against which, when differences are paired, and the line that answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lensbench.report import compare
from lensbench.report.compare import ComparedModel, difference, differences_over_seeds, why_unpaired, worth_comparing
from lensbench.report.defined_once import defined_once, sentence
from lensbench.report.reproduction import answer, outside_interval, settings_that_differ
from lensbench.results.folder import Run
from lensbench.results.manifest import Manifest
from lensbench.statistics import bootstrap_weights


def compared(model, *, group=0, seed=0, corpus="text", tokens=(4, 6, 5), sizes=(40, 66, 53), shift=0.0, warnings=None):
    """A model whose index is a mean over three documents, drawn with the weights that all models share."""
    values = np.array([1.0, 5.0, 9.0]) + shift
    draws = bootstrap_weights(3, 400, 0) @ values / 3
    return ComparedModel(
        f"run{group}", group, corpus, model, seed, ("a", "b", "c"), np.array(tokens, float), np.array(sizes, float),
        {"x": values.mean()}, {"x": draws}, {}, {}, warnings or {},
    )  # fmt: skip


def test_losses_per_token_of_two_tokenizers_are_not_compared(monkeypatch):
    monkeypatch.setattr(compare, "compared_quantities", lambda: ["ce"])

    def told(tokens, corpus="text"):
        one = compared("a", corpus=corpus)
        values = {"ce": one.point["x"], "bits_per_byte": one.point["x"]}
        draws = dict.fromkeys(values, one.draws["x"])
        return replace(one, point=values, draws=draws, text_tokens=(("eval", tokens),) if tokens else ())

    first = told(100)
    assert "another tokenizer; bits_per_byte" in difference(first, told(120), "ce")["note"]
    assert "value" not in difference(first, told(120), "ce")
    assert difference(first, told(120), "bits_per_byte")["value"] == 0
    for same in (told(100), told(0), told(120, corpus="another")):  # the last: what is known is of two texts
        assert difference(first, same, "ce")["value"] == 0
    (over_seeds,) = differences_over_seeds([(first, told(120))] * 2)
    assert "another tokenizer" in over_seeds["note"]


def test_two_models_of_two_runs_on_the_same_text_have_a_paired_difference():
    one, other = compared("a"), compared("b", group=1, shift=2.0)
    assert worth_comparing(one, other, [one, other])
    row = difference(other, one, "x")
    assert row["paired"]
    # Draw by draw the two means differ by the shift alone: the interval of a paired difference has no length.
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((2, 2, 2))
    assert row["note"] == ""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"corpus": "another"}, "not paired: another corpus"),
        ({"sizes": (40, 66, 54)}, "not paired: other windows of the text were scored (as many tokens, other bytes)"),
        (
            {"tokens": (5, 6, 5), "sizes": (41, 66, 53)},
            "not paired: other windows of the text were scored (another tokenizer or other windows)",
        ),
    ],
)
def test_differences_on_other_text_are_unpaired_and_the_note_says_why(how, why):
    one, other = compared("a"), compared("b", group=1, shift=2.0, **how)
    row = difference(other, one, "x")
    assert not row["paired"]
    assert row["note"] == why
    assert row["ci_low"] < 0 < row["ci_high"]


@pytest.mark.parametrize(("corpus", "paired"), [("text", True), ("another", False)])
def test_over_seeds_two_texts_are_marked_as_unpaired_and_have_no_p(monkeypatch, corpus, paired):
    """Documents are common to all seeds: a spread over seeds holds nothing of what other documents would have given."""
    monkeypatch.setattr(compare, "compared_quantities", lambda: ["x"])
    pairs = [
        (compared("a", seed=seed, shift=shift), compared("a", group=1, seed=seed, corpus=corpus))
        for seed, shift in enumerate((0.9, 1.0, 1.1))
    ]
    (row,) = differences_over_seeds(pairs)
    assert row["value"] == pytest.approx(1.0)
    assert (row["seeds"], row["paired"]) == (3, paired)
    assert ("p" in row) == paired
    told = "not paired: another corpus; its interval is over seeds, and holds nothing of which documents were scored"
    assert row["note"] == ("" if paired else told)


def test_another_tokenizer_that_scored_the_same_bytes_is_paired():
    assert why_unpaired(compared("a"), compared("b", group=1, tokens=(8, 12, 10))) == ""


def test_images_are_paired_by_their_number():
    none = (0, 0, 0)
    assert why_unpaired(compared("a", sizes=none), compared("b", sizes=none)) == ""
    assert why_unpaired(compared("a", sizes=none), compared("b", sizes=none, tokens=(4, 6, 6)))


def test_of_two_runs_models_of_one_name_are_compared_and_those_without_a_namesake():
    models = [compared(name, group=group) for group, names in enumerate(("ab", "ac")) for name in names]
    a, b, again, c = models
    pairs = [(a, again, True), (a, c, False), (b, again, False), (b, c, True), (a, b, True), (again, c, True)]
    assert [worth_comparing(one, other, models) for one, other, _ in pairs] == [wanted for *_, wanted in pairs]


def test_seeds_of_two_runs_are_compared_with_the_same_seed_unless_they_share_none():
    models = [compared("a", group=0, seed=0), compared("a", group=1, seed=0), compared("a", group=1, seed=1)]
    assert worth_comparing(models[0], models[1], models)
    assert not worth_comparing(models[0], models[2], models)
    assert worth_comparing(models[0], models[2], [models[0], models[2]])


def test_warnings_of_the_tables_are_carried_into_differences():
    few = {"x": "only 34 clusters: interval not to be trusted"}
    row = difference(compared("b", shift=1.0, warnings=few), compared("a", warnings=few), "x")
    assert row["note"] == few["x"]


# The line that answers
def run_of(models=("gpt",), *, fit=None, checksum="t", checksums=None, tables=None, model_settings=None):
    bare = Manifest.of_tables(Path("runs/a"), list(models))
    suite = bare.suite.model_copy(update={"fit": fit or {"ridge": 1}})
    corpus = bare.corpus.model_copy(update={"checksum": checksum, "spec": "file:a.txt"})
    files = {"indices.csv": "1"} if checksums is None else checksums
    manifest = bare.model_copy(update={"suite": suite, "corpus": corpus, "files": files, "seeds": [0]})
    return Run(Path("runs/a"), manifest, tables or {})


def indices(value, verdict="mixed"):
    rows = pd.DataFrame([{"model": "gpt", "index": "x", "value": value, "ci_low": 0.4, "ci_high": 0.6}])
    verdicts = pd.DataFrame({"verdict": [verdict], "fixed_lens_verdict": ["cannot tell"]})
    return {"indices.csv": rows, "verdicts.csv": verdicts}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (run_of(), "reproduced: byte for byte"),
        (run_of(checksum="u"), "not the same: text"),
        (run_of(fit={"ridge": 2}), "not the same: settings: fit.ridge is 1 and 2"),
        (run_of(["pc"]), "other models, the same text and settings: gpt; pc"),
    ],
)
def test_the_first_line_answers_whether_it_is_the_same_run(other, said):
    assert answer(run_of(), other).startswith(said)


@pytest.mark.parametrize(
    ("value", "verdict", "said"),
    [
        (0.5001, "mixed", "reproduced within what another processor gives: the same verdicts"),
        (0.7, "mixed", "not the same: x of gpt is 0.700, outside the other run's 0.500 [0.400, 0.600]"),
        (0.5001, "undetermined", "not the same: verdicts.csv has other verdicts"),
    ],
)
def test_a_run_is_reproduced_where_verdicts_are_the_same_and_values_lie_within_intervals(value, verdict, said):
    one = run_of(tables=indices(0.5))
    files = {"indices.csv": "2", "verdicts.csv": "2"}
    assert answer(one, run_of(checksums=files, tables=indices(value, verdict))).startswith(said)


@pytest.mark.parametrize(("end", "said"), [(0.59, "reproduced within"), (0.61, "not the same: distance_trend")])
def test_a_rank_correlation_may_jump_as_far_as_intervals_overlap(end, said):
    one, other = indices(0.5), indices(0.7)
    for tables, ends in ((one, (0.4, 0.6)), (other, (end, 0.8))):
        tables["indices.csv"] = tables["indices.csv"].assign(index="distance_trend", ci_low=ends[0], ci_high=ends[1])
    files = {"indices.csv": "2", "verdicts.csv": "2"}
    assert answer(run_of(tables=one), run_of(checksums=files, tables=other)).startswith(said)


def with_a_gate(drowned, persistence, reason="undefined: the signal of every pair shrinks (S < 1)"):
    """A landmark of which one value may be missing next to another with an interval, which the gate reads."""
    row = {"model": "gpt", "seed": 0, "landmark": "rotated"}
    low, high = persistence
    rows = [
        row | {"index": "drowned", "value": drowned, "reason": "" if drowned else reason},
        row | {"index": "persistence", "value": (low + high) / 2, "ci_low": low, "ci_high": high},
        row | {"landmark": "carried", "index": "persistence", "value": low, "ci_low": low, "ci_high": low + 1},
    ]
    files = {"landmarks.csv": str(drowned)}
    return run_of(tables=indices(0.5) | {"landmarks.csv": pd.DataFrame(rows)}, checksums=files)


@pytest.mark.parametrize(
    ("persistence", "reason", "said"),
    [
        ((-2, 1.5), None, "reproduced within what another processor gives"),
        ((1.1, 1.5), None, "not the same: "),
        ((-2, 1.5), "", "not the same: "),
        ((-2, 1.5), "not measured: the suite leaves it out", "not the same: "),
    ],
)
def test_a_value_that_one_run_alone_defines_is_named_and_is_no_obstacle_at_a_near_tie(persistence, reason, said):
    """What the gate reads differs within its interval, or not: where it does not, the runs found different things."""
    known = {} if reason is None else {"reason": reason}
    one, other = with_a_gate(None, (-3, 1), **known), with_a_gate(1.0, persistence)
    for reference, run in ((one, other), (other, one)):
        line = answer(reference, run)
        assert line.startswith(said)
        assert "drowned of gpt, landmark rotated (landmarks.csv) is 1 in runs/a and missing in runs/a" in line
        assert ("at a near tie of a gate" in line) == said.startswith("reproduced")
        assert ("the signal of every pair shrinks" in line) == (reason is None)


def test_two_values_that_one_run_alone_defines_are_named_and_more_are_counted():
    rows = pd.DataFrame([{"model": "gpt", "seed": "all", "index": k, "value": 1.0, "reason": "r"} for k in "abcd"])
    one, other = (run_of(tables={"landmarks.csv": rows.assign(value=v)}) for v in (1.0, float("nan")))
    found = sentence(defined_once(one, other, "landmarks.csv"))
    assert found.count("seed all") == 2
    assert found.endswith("; and 2 more")


def test_of_many_settings_that_differ_four_are_named_and_the_rest_counted():
    one, other = run_of(fit=dict.fromkeys("abcdef", 1)), run_of(fit=dict.fromkeys("abcdef", 2))
    said = settings_that_differ(one.manifest, other.manifest)
    assert said == "fit.a is 1 and 2, fit.b is 1 and 2, fit.c is 1 and 2, fit.d is 1 and 2, and 2 more"


def test_tables_that_did_not_change_are_not_looked_at():
    assert outside_interval(run_of(tables=indices(0.5)), run_of(tables=indices(0.9)), []) == ""
