"""What the committed runs of the predictive-coding suites have to show, and that they are what the commands write."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.committed import settings_of

from lensbench.results import folder
from lensbench.runtime import files
from lensbench.suite.files import load_suite
from lensbench.suite.recipes import Suite

pytestmark = pytest.mark.results

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "predictive-coding"


@pytest.fixture(scope="module")
def parts():
    return [folder.read_run(FOLDER / name) for name in ("gpt", "pc")]


@pytest.fixture(scope="module")
def curves(parts):
    return pd.concat([run.tables["curves.csv"] for run in parts])


def test_the_parts_are_the_suite(parts):
    suite = load_suite("predictive-coding")
    assert sorted(m for run in parts for m in run.manifest.models) == sorted(m.name for m in suite.models)
    for run in parts:
        ran, asked = settings_of(run.manifest, suite)
        assert ran == asked
        assert not run.manifest.git_revision.endswith("dirty")
    ablation = folder.read_run(FOLDER / "ablation").manifest
    ablated = Suite.model_validate(ablation.suite.content())
    assert ablated.described() == load_suite("predictive-coding-ablation").described()
    assert not ablation.git_revision.endswith("dirty")


def test_models_are_of_equal_size_and_reach_twenty_tokens_per_parameter(parts, curves):
    models = pd.concat([run.tables["models.csv"] for run in parts])
    assert (models["parameters"] / 64_000 - 1).abs().max() < 0.01
    assert curves["train_tokens"].max() >= 20 * 0.99 * models["parameters"].max()
    seeds = curves[curves["seed"] != "all"].groupby("model")["seed"].nunique()
    assert (seeds[["gpt-conv", "pc", "pc-none"]] == 5).all()
    assert seeds.min() >= 3


def test_the_strict_model_is_below_the_stronger_gpt_at_every_budget_and_seed(curves):
    whole = curves[(curves["positions"] == "all") & (curves["seed"] != "all")]
    ce = whole.pivot(index=["train_tokens", "seed"], columns="model", values="ce")
    assert len(ce) == 4 * 5
    assert (ce["pc"] < ce["gpt-conv"]).all()
    gap = (ce["gpt-conv"] - ce["pc"]).groupby("train_tokens").mean()
    assert gap.is_monotonic_decreasing, "the GPT catches up, as the README says"


def test_cross_entropy_read_out_falls_with_depth_on_every_seed(parts):
    probes = pd.concat([run.tables["probes.csv"] for run in parts])
    places = probes[(probes["quantity"] == "read_out_ce") & (probes["seed"] != "all")]
    assert set(places["model"]) == {"pc", "pc+state", "pc-none", "pc-relaxed", "pc-relaxed-none"}
    for who, rows in places.groupby(["model", "seed"]):
        assert (np.diff(rows.sort_values("layer")["value"]) < 0).all(), who


def test_tasks_were_run_as_their_file_says():
    manifest = json.loads((FOLDER / "in-context" / "manifest.json").read_text())
    for name, checksum in manifest["files"].items():
        assert files.sha256(FOLDER / "in-context" / name) == checksum
    from lensbench.suite.files import load_in_context

    asked = load_in_context("in-context")
    assert type(asked).model_validate(manifest["in_context"]) == asked
    assert not manifest["git_revision"].endswith("dirty")
