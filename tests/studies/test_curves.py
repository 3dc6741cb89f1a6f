"""Learning curves: every position against a plain loop, intervals, pairing by seed, and the suite that draws them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.suites import write_suite
from scipy import stats
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.data.windows import Windows
from lensbench.models import build
from lensbench.results.folder import read_run
from lensbench.results.manifest import write_manifest
from lensbench.runtime import files
from lensbench.studies.curves import (
    CurvePoint,
    CurveRecipe,
    PositionSums,
    curve_table,
    differences,
    names_of,
    score_positions,
)
from lensbench.suite.files import load_suite, load_sweep

ROOT = Path(__file__).resolve().parents[2]


def windows_of_lengths(lengths, length=24):
    ids = np.random.default_rng(0).integers(0, 40, (len(lengths), length))
    for row, n in enumerate(lengths):
        ids[row, n:] = 0
    zero = np.zeros((len(lengths), 1), dtype=np.int64)
    names = tuple(f"d{k}" for k in range(len(lengths)))
    every = np.arange(len(lengths))
    return Windows(ids, np.array(lengths), zero, zero == 0, every, names, every * 0, zero.astype(np.int32))


@pytest.mark.parametrize("family", ["gpt-conv", "predictive-coding"])
def test_sums_by_position_are_those_of_a_plain_loop_over_tokens(family):
    model = build(family, parameters=9_000, vocab_size=40, d_model=16, layers=2, heads=2, context=24).eval()
    windows, first = windows_of_lengths([24, 7, 2, 16]), (1, 4, 10)
    scored = score_positions(model, windows, first)
    nats, counts = np.zeros((4, 3)), np.zeros((4, 3))
    with torch.no_grad():
        for row, length in enumerate(windows.lengths):
            ids = torch.from_numpy(windows.ids[row, :length])[None]
            logits = model(ids).logits[0]
            for n in range(length - 1):
                if n >= first[0]:
                    part = sum(n >= f for f in first) - 1
                    nats[row, part] += F.cross_entropy(logits[n], ids[0, n + 1]).item()
                    counts[row, part] += 1
    np.testing.assert_array_equal(scored.tokens, counts)
    np.testing.assert_allclose(scored.nats, nats, rtol=1e-5, atol=1e-5)
    assert names_of(first, 24) == ["1-3", "4-9", "10-22"]


def points(values, clusters=80):
    """Curve points of models whose every cluster has the given mean plus what all models share."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 0.3, (clusters, 2))
    tokens = np.full((clusters, 2), 10.0)
    return [
        CurvePoint(model, seed, budget, 5.0, PositionSums((mean + shared) * tokens, tokens, np.arange(clusters)))
        for (model, seed, budget), mean in values.items()
    ]


def test_the_interval_of_a_seed_is_over_clusters_and_that_of_the_mean_is_student_t_over_seeds():
    means = {("a", 0, 100): 2.0, ("a", 1, 100): 2.1, ("a", 2, 100): 2.4}
    table = curve_table(points(means), (1, 8), 20, 2000)
    cells = table.set_index(["seed", "positions"])
    assert list(cells.loc["0"].index) == ["all", "1-7", "8-18"]
    sums = points(means)[0].scored
    per_cluster = sums.nats.sum(1) / sums.tokens.sum(1)
    width = cells.loc[("0", "all"), "ce_ci_high"] - cells.loc[("0", "all"), "ce_ci_low"]
    assert width == pytest.approx(2 * 1.96 * per_cluster.std() / len(per_cluster) ** 0.5, rel=0.1)
    each = [cells.loc[(s, "all"), "ce"] for s in "012"]
    low, high = stats.t.interval(0.95, 2, np.mean(each), stats.sem(each))
    mean = cells.loc[("all", "all")]
    assert (mean["ce"], mean["ce_ci_low"], mean["ce_ci_high"]) == pytest.approx((np.mean(each), low, high))


def test_few_clusters_are_said_and_one_seed_has_no_mean_over_seeds():
    table = curve_table(points({("a", 0, 100): 2.0}, clusters=12), (1, 8), 20, 200)
    assert set(table["seed"]) == {"0"}
    assert table["reason"].str.contains("12 clusters").all()


def test_differences_are_paired_by_seed_and_only_of_common_seeds():
    values = {("a", s, 100): 2 + 0.5 * s for s in range(4)} | {
        ("b", s, 100): 2.1 + 0.5 * s + 0.01 * s for s in range(3)
    }
    curves = curve_table(points(values), (1, 8), 20, 200)
    (found,) = [g for g in differences(curves, "b", "a") if g["positions"] == "all"]
    gaps = [0.1, 0.11, 0.12]
    low, high = stats.t.interval(0.95, 2, np.mean(gaps), stats.sem(gaps))
    assert found["seeds"] == 3
    assert (found["value"], found["ci_low"], found["ci_high"]) == pytest.approx((np.mean(gaps), low, high))
    assert found["p"] == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert list(differences(curves, "b", "nobody")) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"budgets": (5, 3)}, "budgets"), ({"positions": (0, 4)}, "positions"), ({"positions": (4, 4)}, "positions")],
)
def test_budgets_and_positions_must_rise(wrong, said):
    with pytest.raises(ValueError, match=said):
        CurveRecipe(**wrong)


@pytest.fixture(scope="module")
def curve_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    curve = "[curve]\nbudgets = [2_048, 4_096]\npositions = [1, 20]\n\n[fit]"
    seeds = 'seeds = [0, 1]\nprobes = ["known_places"]\n[corpus]'
    quick = {"refits = 2": "refits = 0", "rotations = 2": "rotations = 1", "refine_passes = 8": "refine_passes = 0"}
    suite = write_suite(folder, **{"[fit]": curve, "\n[corpus]": seeds, **quick})
    result = CliRunner().invoke(app, ["run", str(suite), "--out", str(folder / "run")])
    assert result.exit_code == 0, result.output
    return folder / "run", suite, result.output


@pytest.mark.run
def test_a_suite_trains_every_budget_anew_and_reports_the_curves(curve_run):
    folder, _, output = curve_run
    run = read_run(folder)
    curves, timings = run.tables["curves.csv"], run.tables["timings.csv"]
    assert set(curves["model"]) == {"gpt", "pc"}, "a view has the curve of its model"
    assert set(curves["train_tokens"]) == {2048, 4096, 8192}
    assert set(curves["positions"]) == {"all", "1-19", "20-62"}
    assert (timings["seconds"] > 0).all()
    assert len(timings) == 2 * 2 * 3
    assert {p.name for p in (folder / "stages").glob("train-gpt-seed0*")} == {
        "train-gpt-seed0", "train-gpt-seed0-2048", "train-gpt-seed0-4096"
    }  # fmt: skip
    whole = curves[(curves["seed"] == "all") & (curves["positions"] == "all")].set_index(["model", "train_tokens"])[
        "ce"
    ]
    for model in ("gpt", "pc"):
        assert whole[model, 8192] < whole[model, 2048]
    assert (folder / "figures" / "learning_curves.png").stat().st_size > 10_000
    assert "learning curves" in output
    probes = run.tables["probes.csv"]
    places = probes[(probes["model"] == "pc") & (probes["quantity"] == "read_out_ce") & (probes["seed"] == "all")]
    assert len(places) == 4
    assert places["value"].notna().all()


@pytest.mark.run
def test_the_last_point_of_a_curve_is_the_model_that_the_lenses_read(curve_run):
    """The table of models scores some positions of the same windows, the curve all of them."""
    folder, _, _ = curve_run
    run = read_run(folder)
    curves = run.tables["curves.csv"]
    last = curves[(curves["train_tokens"] == 8192) & (curves["positions"] == "all") & (curves["seed"] == "0")]
    models = run.tables["models.csv"]
    for model in ("gpt", "pc"):
        of_table = models[(models["model"] == model) & (models["seed"] == "0")]["ce"].iloc[0]
        assert last[last["model"] == model]["ce"].iloc[0] == pytest.approx(of_table, abs=0.1)


@pytest.mark.run
@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("sentence", "reproduced: every number is the same, but not the text of verdicts.csv"),
        ("verdict", "other verdicts"),
    ],
)
def test_tables_of_words_that_differ_are_compared_too(curve_run, tmp_path, column, said):
    folder, _, _ = curve_run
    again = shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("stages"))
    verdicts = pd.read_csv(again / "verdicts.csv", keep_default_na=False)
    verdicts.assign(**{column: "something else"}).to_csv(again / "verdicts.csv", index=False)
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["files"]["verdicts.csv"] = files.sha256(again / "verdicts.csv")
    write_manifest(again, manifest)
    result = CliRunner().invoke(app, ["compare", str(folder), str(again)])
    assert result.exit_code == 0
    assert said in result.output


@pytest.mark.run
def test_compare_pairs_curves_by_seed_and_timings_do_not_hinder_a_reproduction(curve_run, tmp_path):
    folder, _, _ = curve_run
    again = shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("stages"))
    timings = pd.read_csv(again / "timings.csv")
    timings.assign(seconds=timings["seconds"] * 3).to_csv(again / "timings.csv", index=False)
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["files"]["timings.csv"] = files.sha256(again / "timings.csv")
    write_manifest(again, manifest)
    result = CliRunner().invoke(app, ["compare", str(folder), str(again), "--out", str(tmp_path / "table.csv")])
    assert result.exit_code == 0, result.output
    assert "reproduced: byte for byte" in result.output
    table = pd.read_csv(tmp_path / "table.csv")
    rows = table[(table["kind"] == "learning curve") & (table["run"] == str(folder))]
    curves = read_run(folder).tables["curves.csv"].set_index(["model", "train_tokens", "positions", "seed"])["ce"]
    assert len(rows) == 3 * 3
    row = rows[rows["note"] == "4096 tokens, positions 20-62; p uncorrected"].iloc[0]
    gaps = [curves["pc", 4096, "20-62", s] - curves["gpt", 4096, "20-62", s] for s in "01"]
    assert (row["model"], row["against_model"], row["paired"]) == ("pc", "gpt", True)
    assert row["value"] == pytest.approx(np.mean(gaps))


@pytest.mark.parametrize("budget", [9_000, 100])
def test_budgets_beyond_the_training_or_below_a_step_are_refused(tmp_path, budget):
    suite = write_suite(tmp_path, **{"[fit]": f"[curve]\nbudgets = [{budget}]\n\n[fit]"})
    result = CliRunner().invoke(app, ["run", str(suite), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "curve.budgets" in result.output + (result.stderr or "")
    assert not (tmp_path / "run").exists()


@pytest.mark.results
def test_predictive_coding_trains_its_models_with_the_winners_of_its_committed_sweep_of_equal_trials():
    sweep, suite = load_sweep("predictive-coding-sweep"), load_suite("predictive-coding")
    table = pd.read_csv(ROOT / "results" / "predictive-coding" / "sweep" / "sweep.csv")
    assert len(table) == len(sweep.trials)
    assert table.groupby("model").size().nunique() == 1
    for model in suite.models:
        if model.view_of is None:
            best = table[table["model"] == model.name].set_index("trial")["dev_ce"].idxmin()
            won = sweep.trials[best]
            assert won.model == model.name
            assert (model.training, model.settings) == (won.training, won.settings)
