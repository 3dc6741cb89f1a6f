"""``verdicts.csv`` from the other tables of a run, those of earlier versions included."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateResult, decide_update, decompose
from lensbench.measures.update.result import LandmarkResult
from lensbench.measures.update.sentences import NOT_RUN
from lensbench.measures.update.summary import LOSSES_ASIDE, in_place_losses_aside
from lensbench.measures.update.verdict import ADDED, CARRIED, MIXED, NOT_MEASURED, SUFFIXES, UNDETERMINED
from lensbench.measures.verdict import INDEX_OF, SCOPES, VerdictRule
from lensbench.results.folder import read_run, read_table, write_table
from lensbench.results.schema import SCHEMA
from lensbench.results.tables import landmark_rows
from lensbench.results.verdicts import verdict_table
from lensbench.studies.synthetic import Shape, SyntheticStream

RESULTS = Path(__file__).resolve().parents[2] / "results"
RULE = VerdictRule()
FIXED = {"gain_visibility": 0.9, "movement": 1.0, "shared_consistency": 0.9}


def frame(name, rows):
    """A table with its columns."""
    return pd.DataFrame([dict.fromkeys(SCHEMA[name]) | row for row in rows], columns=list(SCHEMA[name]))


def spread(name, value, width=0.03):
    """The columns of a quantity with its interval."""
    return {name: value, f"{name}_ci_low": value - width, f"{name}_ci_high": value + width}


def index_rows(who, values, width=0.03):
    """Rows of ``indices.csv``, each on both scopes."""
    return [
        who | {"index": f"{name}{suffix}", "value": value, "ci_low": value - width, "ci_high": value + width}
        for suffix in SUFFIXES.values()
        for name, value in values.items()
    ]


def run_tables(shares, seeds=(0,), *, updates=True):
    """The tables of a run with a model for each share that is added in place; ``shares``: model -> one for each seed."""
    indices, pairs = [], []
    for model, of_seed in shares.items():
        for seed, in_place in zip((*seeds, "all") if len(seeds) > 1 else seeds, of_seed, strict=True):
            who = {"model": model, "seed": seed}
            values = {"in_place": in_place, "clarity": 0.95, "readable_gain": 0.6, "news": 0.1, "kept_high": 1.0}
            indices += index_rows(who, FIXED | (values if updates else {}))
            if not updates or seed == "all":
                continue
            for i, j in itertools.combinations(range(4), 2):
                row = who | {"from_layer": i, "to_layer": j, "gate": "", "persistence_chance": 0.05}
                pairs.append(row | spread("persistence", 1.0) | spread("clarity", 0.9) | spread("kept_high", 1.0))
    blocks = [row for row in pairs if row["to_layer"] == row["from_layer"] + 1]
    found = {name: frame(name, []) for name in SCHEMA}
    found["indices.csv"], found["update.csv"] = frame("indices.csv", indices), frame("update.csv", pairs)
    found["blocks.csv"] = frame("blocks.csv", blocks)
    return found


def test_each_model_and_scope_has_a_verdict_with_its_sentence():
    table = verdict_table(run_tables({"gpt": [0.98], "copied": [0.02]}), {"copied": "carry-along"}, RULE)
    assert list(table.columns) == list(SCHEMA["verdicts.csv"])
    assert list(table["scope"]) == [*SCOPES] * 2
    assert list(table["verdict"]) == [ADDED, ADDED, CARRIED, CARRIED]
    assert list(table["known"].dropna()) == ["carry-along", "carry-along"]
    assert list(table["fixed_lens_verdict"]) == ["refinement"] * 4
    assert table["sentence"][0].startswith("Over all layers 98 % [95, 101] of what later layers add")
    assert table["sentence"][1].startswith("From layer 1 on 98 % [95, 101] of what later layers add")
    assert table["gate"].isna().all()


def test_seeds_that_agree_give_the_model_its_verdict_and_others_none():
    tables = run_tables({"same": [0.98, 0.99, 0.985], "other": [0.98, 0.5, 0.74]}, seeds=(0, 1))
    found = verdict_table(tables, {}, RULE).set_index(["model", "seed", "scope"])
    scope = "without layer 0"
    assert found.loc[("same", "all", scope), "verdict"] == ADDED
    differs = found.loc[("other", "all", scope)]
    assert (differs["verdict"], differs["gate"]) == (UNDETERMINED, "seeds differ")
    assert "seeds differ: added up in one representation and mixed" in differs["sentence"]
    assert found.loc[("other", 1, scope), "verdict"] == MIXED


def test_a_run_without_the_decomposition_says_so_and_keeps_the_verdict_of_fixed_lenses():
    table = verdict_table(run_tables({"gpt": [0.9]}, updates=False), {}, RULE)
    assert set(table["verdict"]) == {UNDETERMINED}
    assert set(table["gate"]) == {NOT_MEASURED}
    assert set(table["sentence"]) == {NOT_RUN}
    assert set(table["fixed_lens_verdict"]) == {"refinement"}


def test_an_undefined_decomposition_has_its_reason_in_the_sentence():
    tables = run_tables({"gpt": [0.9]}, updates=False)
    reason = "undefined: the norm has no gain"
    rows = [{"model": "gpt", "seed": 0, "index": f"in_place{s}", "reason": reason} for s in SUFFIXES.values()]
    tables["indices.csv"] = pd.concat([tables["indices.csv"], frame("indices.csv", rows)], ignore_index=True)
    table = verdict_table(tables, {}, RULE)
    assert set(table["gate"]) == {"undefined"}
    assert table["sentence"][1] == "From layer 1 on nothing can be said: the norm has no gain."


def test_another_rule_gives_another_verdict():
    strict = VerdictRule(update={"added": 1.2})
    assert set(verdict_table(run_tables({"gpt": [0.98]}), {}, strict)["verdict"]) == {MIXED}


def test_the_null_of_shuffled_updates_stands_in_the_sentence():
    tables = run_tables({"gpt": [0.98]})
    row = {"model": "gpt", "seed": 0, "landmark": "shuffled", "index": f"{LOSSES_ASIDE}_without_layer0", "value": 0.991}
    tables["landmarks.csv"] = frame("landmarks.csv", [row])
    every, later = verdict_table(tables, {}, RULE)["sentence"]
    assert "(its own updates shuffled: 99 %)" in later
    assert "shuffled" not in every


def test_what_becomes_of_errors_is_said_where_the_probe_has_measured_it():
    tables = run_tables({"gpt": [0.98], "unmeasured": [0.98]})
    names = ["mean_survival_error", "mean_error_minus_signal", "mean_error_minus_noise", "mean_survival_signal"]
    rows = [
        {"model": "gpt", "seed": 0, "probe": "injection_survival", "quantity": f"{name}_without_layer0"}
        | {"value": value, "ci_low": value - 0.02, "ci_high": value + 0.02}
        for name, value in zip(names, (1.01, -0.1, 0.0, 1.11), strict=True)
    ]
    tables["probes.csv"] = frame("probes.csv", rows)
    found = verdict_table(tables, {}, RULE).set_index(["model", "scope"])["sentence"]
    said = "injected errors are not corrected (1.01 [0.99, 1.03] of each is left)"
    assert said in found["gpt", "without layer 0"]
    assert "injected" not in found["gpt", "all layers"] + found["unmeasured", "without layer 0"]


def test_a_table_of_an_earlier_version_is_read_with_its_verdicts_as_those_of_fixed_lenses(tmp_path):
    old = pd.DataFrame(
        [{"model": "gpt", "seed": 0, "scope": "all layers", "verdict": "refinement", "reason": "because"}]
    )
    old.to_csv(tmp_path / "verdicts.csv", index=False)
    read = read_table(tmp_path / "verdicts.csv")
    assert read.loc[0, ["fixed_lens_verdict", "fixed_lens_reason"]].to_list() == ["refinement", "because"]
    assert read.loc[0, ["verdict", "gate", "sentence"]].to_list() == [UNDETERMINED, NOT_MEASURED, NOT_RUN]


def test_what_is_written_is_read_back(tmp_path):
    table = verdict_table(run_tables({"gpt": [0.98]}), {}, RULE)
    write_table(tmp_path, "verdicts.csv", table)
    read = read_table(tmp_path / "verdicts.csv")
    for column in ("scope", "verdict", "sentence", "fixed_lens_verdict", "fixed_lens_reason"):
        assert list(read[column]) == list(table[column])


def test_committed_runs_of_earlier_versions_are_read():
    table = read_run(RESULTS / "vision").tables["verdicts.csv"]
    assert {"verdict", "sentence", "gate", "fixed_lens_verdict"} <= set(table.columns)
    assert set(table["fixed_lens_verdict"]) <= {"refinement", "carry-along", "re-representation", "cannot tell"}


def test_landmarks_have_verdicts_of_their_own():
    named = {f"{name}{s}": (v, v - 0.03, v + 0.03, "") for s in SUFFIXES.values() for name, v in (("in_place", 0.02),)}
    pairs = [{"from_layer": i, "to_layer": j, "gate": ""} for i, j in itertools.combinations(range(4), 2)]
    view = LandmarkResult(indices=named, pairs=pairs)
    rows = list(landmark_rows(UpdateResult(landmarks={"carried": view}), RULE))
    assert [row["verdict"] for row in rows] == [CARRIED, CARRIED]
    assert rows[0]["known"] == CARRIED


@pytest.fixture(scope="module")
def added():
    """The decomposition of a small stream that is added up."""
    stream = SyntheticStream("added", Shape(d=8, layers=4, vocab=20), seed=0)
    fit = stream.capture(1200, seed=1)
    dev, held_out = (stream.capture(1000, seed=seed, constant=fit.mean_p) for seed in (2, 3))
    recipe = FitRecipe(ridges=(1e-3, 1e-1), pads=(0.0, 0.5), refits=2, layers=8)
    return decompose(stream.readout, fit, dev, held_out, recipe)


def test_facts_of_a_result_and_of_its_tables_are_judged_alike(added):
    result = UpdateResult.model_validate_json(UpdateResult.of(added).model_dump_json())
    who = {"model": "m", "seed": 0}
    fixed = {"index": "", "value": 0.9, "ci_low": 0.9, "ci_high": 0.9}
    indices = [who | fixed | {"index": f"{name}{s}"} for name in INDEX_OF.values() for s in SUFFIXES.values()]
    indices += [
        who | {"index": name, "value": value, "ci_low": low, "ci_high": high, "reason": reason}
        for name, (value, low, high, reason) in result.indices.items()
    ]
    tables = {name: frame(name, []) for name in SCHEMA} | {"indices.csv": frame("indices.csv", indices)}
    tables["update.csv"] = pd.DataFrame([who | row for row in result.pairs])
    tables["blocks.csv"] = pd.DataFrame([who | row for row in result.blocks])
    table = verdict_table(tables, {}, RULE).set_index("scope")
    for scope in SUFFIXES:
        own = decide_update(RULE.update, result.facts(scope))
        assert (table.loc[scope, "verdict"], table.loc[scope, "gate"] or "") == (own.verdict, own.gate)
    assert table.loc["without layer 0", "verdict"] in (ADDED, UNDETERMINED)


def test_the_share_of_refits_in_a_variance_lies_between_0_and_1(added):
    shares = UpdateResult.of(added).of_refits
    assert set(shares) >= {"in_place", "in_place_without_layer0"}
    assert all(0 <= share <= 1 for share in shares.values())


def test_in_place_losses_aside_is_that_of_passing_pairs_where_losses_fall(added):
    """Additions pass the gates, so both are over the same pairs, but for those decided on dev and on eval."""
    aside, gated = in_place_losses_aside(added), UpdateResult.of(added).estimates()
    for suffix in SUFFIXES.values():
        value = aside[f"{LOSSES_ASIDE}{suffix}"].value
        assert np.isfinite(value)
        assert value == pytest.approx(gated[f"in_place{suffix}"].value, abs=0.1)
