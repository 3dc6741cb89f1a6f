"""What the committed runs of probes say, and what the README may therefore say of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from lensbench.results.folder import read_run
from lensbench.runtime import files

pytestmark = pytest.mark.results

PROBES = Path(__file__).resolve().parents[2] / "results" / "probes"


def committed(name):
    run = read_run(PROBES / name)
    assert not run.manifest.git_revision.endswith("dirty")
    return run.tables["probes.csv"]


def rows(table, model, quantity):
    of = table[(table["model"] == model) & (table["quantity"] == quantity)]
    assert len(of), (model, quantity)
    return of


@pytest.fixture(scope="module")
def small():
    return committed("small")


def test_errors_are_found_in_every_head_that_carries_them_by_construction_and_in_no_other(small):
    for model, share in {
        "pc+state": 1, "pc-linear+state": 1, "pc-none+state": 0, "gpt-conv": 0, "gpt2": 0, "gpt-untrained": 0,
    }.items():  # fmt: skip
        assert (rows(small, model, "heads_found")["value"] == share).all(), model
    assert rows(small, "pc+state", "error_ratio")["value"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert np.abs(rows(small, "pc-none+state", "error_ratio")["value"]).max() < 1e-3
    untrained = rows(small, "gpt-untrained", "error_score")
    assert (untrained["value"] < 1e-3).all(), "its null: expectations have the tokens' own sign, or none"
    assert (rows(small, "gpt-untrained", "heads_beyond_permutation")["value"] > 0.5).any()
    assert rows(small, "gpt-untrained", "error_score")["reason"].str.contains("predicts nearly the same").all()


def test_layer_0_tells_nothing_of_a_prediction_beyond_the_two_tokens(small):
    for table, models in ((small, ("gpt-conv", "gpt2", "pc+state")), (committed("smollm2"), ("smollm2-135m",))):
        for model in models:
            first = rows(table, model, "prediction_gain")
            assert (first[first["layer"] == 0]["value"] < 2e-3).all()


def test_a_linear_kernels_layers_are_gradient_steps(small):
    assert rows(small, "pc-linear+state", "gradient_step_error")["value"].max() < 1e-10
    assert rows(small, "pc+state", "gradient_step_error")["value"].min() > 0.1


def test_every_probe_of_the_pretrained_suite_has_rows_or_a_reason():
    run = read_run(PROBES / "smollm2")
    table = run.tables["probes.csv"]
    assert set(table["probe"]) == set(run.manifest.suite.content()["probes"])
    heads = table[table["quantity"] == "error_score"]
    assert len(heads) == 30 * 9
    parts = {k: v for k, v in run.manifest.seconds.items() if k.startswith(("fit-", "score-", "probe-"))}
    assert max(parts.values()) < 3600, "no stage of a part that can be stopped takes an hour"


def test_trained_attention_takes_the_best_tuned_step():
    import pandas as pd

    folder = PROBES / "in-context-regression"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert files.sha256(folder / "regression.csv") == manifest["files"]["regression.csv"]
    table = pd.read_csv(folder / "regression.csv").fillna({"against": ""})
    mean = table[table["seed"] == "all"].set_index(["attention", "layers", "against", "quantity"])["value"]
    assert mean["linear", 1, "gd", "sensitivity_cosine"] > 0.999
    assert mean["linear", 2, "gd++", "sensitivity_cosine"] > mean["linear", 2, "gd", "sensitivity_cosine"]
