"""What the committed ruler and calibration have to show, and that they are what the project's commands write."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.committed import settings_of

from lensbench.results.folder import Run, read_run
from lensbench.results.manifest import MANIFEST
from lensbench.results.study_folder import read_study_table, study_files
from lensbench.studies.calibration import JUDGED, midpoints, summarise
from lensbench.suite.files import load_calibration, load_suite

pytestmark = pytest.mark.results

ROOT = Path(__file__).resolve().parents[2]
STANDARD = ROOT / "results" / "standard"
CALIBRATION = ROOT / "results" / "calibration"
PARTS = [STANDARD / name for name in ("gpt", "pc", "controls")]


@pytest.fixture(scope="module")
def parts() -> list[Run]:
    return [read_run(folder) for folder in PARTS]


@pytest.fixture(scope="module")
def indices(parts) -> pd.DataFrame:
    return pd.concat([run.tables["indices.csv"] for run in parts])


def value(indices, index, model, seed):
    return indices.loc[(indices["index"] == index) & (indices["model"] == model) & (indices["seed"] == seed), "value"]


def test_the_parts_are_the_suite_and_its_rule_is_the_one_that_was_calibrated(parts):
    suite = load_suite("standard")
    models = [name for run in parts for name in run.manifest.models]
    assert sorted(models) == sorted(m.name for m in suite.models)
    for run in parts:
        ran, asked = settings_of(run.manifest, suite)
        assert ran == asked
        assert not run.manifest.git_revision.endswith("dirty")
        assert sum(run.manifest.seconds.values()) < 75 * 60 * 2, "75 minutes on two cores, of one thread each"
    assert load_calibration("calibration").rule == suite.verdict


def test_models_are_alike_in_parameters_and_trained_to_twenty_tokens_of_each(parts):
    models = pd.concat([run.tables["models.csv"] for run in parts])
    trained = models[models["model"] != "gpt-untrained"]
    assert (models["parameters"] / 64_000 - 1).abs().max() < 0.01
    assert (trained["train_tokens"] >= 0.99 * 20 * trained["parameters"]).all()
    seeds = trained.groupby("model")["seed"].nunique()
    for model in ("gpt", "gpt-conv", "gpt-ds", "pc", "pc+state", "pc-ds", "pc-ds+state"):
        assert seeds[model] == 5
    assert seeds.min() >= 3


def test_models_of_known_answer_come_out_as_they_must(parts, indices):
    seeds = [str(seed) for seed in (0, 1, 2)]
    for seed in seeds:
        for index in ("gain_visibility", "movement"):
            assert value(indices, index, "gpt-partitioned", seed).abs().max() < 1e-5
        assert value(indices, "gain_visibility", "gpt-untrained", seed).isna().all()
    for model in ("gpt-conv+rotated", "pc+state+rotated"):
        rows = indices[
            (indices["model"] == model) & (indices["index"] == "gain_visibility") & (indices["seed"] == "all")
        ]
        assert rows["ci_high"].iloc[0] < -1, "far below 0"
    verdicts = pd.concat([run.tables["verdicts.csv"] for run in parts])
    known = verdicts[verdicts["known"].isin(["carry-along", "re-representation", "nothing learned"])]
    wrong = known[(known["fixed_lens_verdict"] != "cannot tell") & (known["fixed_lens_verdict"] != known["known"])]
    assert wrong.empty, wrong.to_string()


def test_the_diagonal_of_a_rotated_view_is_that_of_the_plain_one(parts):
    lenses = pd.concat([run.tables["lenses.csv"] for run in parts])
    own = lenses[(lenses["lens"] == "tuned") & (lenses["stage"] == "closed") & (lenses["prior"] == "zero")]
    own = own.set_index(["model", "seed", "layer"])
    for plain in ("gpt-conv", "pc+state"):
        here, turned = own.loc[plain], own.loc[f"{plain}+rotated"]
        assert len(here) == len(turned) == 30
        inside = (turned["kl"] >= here["kl_ci_low"]) & (turned["kl"] <= here["kl_ci_high"])
        assert inside.all()
        np.testing.assert_allclose(turned["kl"], here["kl"], rtol=0.02, atol=2e-3)


def test_no_seed_flips_a_verdict(parts):
    verdicts = pd.concat([run.tables["verdicts.csv"] for run in parts])
    for (_, _), rows in verdicts.groupby(["model", "scope"]):
        committed = set(rows["fixed_lens_verdict"]) - {"cannot tell"}
        whole = rows.loc[rows["seed"] == "all", "fixed_lens_verdict"].iloc[0]
        each = rows.loc[rows["seed"] != "all", "fixed_lens_verdict"]
        assert whole == "cannot tell" or set(each) == {whole}
        assert len(committed) <= 1


def test_the_papers_correlation_is_tested_on_every_model_that_learned_something(parts, indices):
    rows = indices[(indices["index"] == "similarity_correlation") & (indices["seed"] == "all")]
    told = rows[rows["value"].notna() & rows["ci_low"].notna()]
    models = {name for run in parts for name in run.manifest.models} - {"gpt-untrained"}
    assert models - set(told["model"]) <= set(rows.loc[rows["reason"].notna(), "model"])


def test_claims_are_of_all_seeds_and_corrected_together(standard_comparison):
    table = standard_comparison.table
    claims = table[table["kind"] == "claim"]
    suite = load_suite("standard")
    seeds = {m.name: len(suite.seeds_of(m)) for m in suite.models}
    paired = claims["against_model"].notna()
    assert set(claims.loc[paired, "model"]) == {"pc+state", "pc-ds+state", "gpt-noskip"}
    for claim in claims.to_dict("records"):
        others = [claim["against_model"]] if isinstance(claim["against_model"], str) else []
        assert claim["seeds"] == min(seeds[name] for name in (claim["model"], *others)), claim["claim"]
    assert claims["p_holm"].notna().all()
    assert (claims["p_holm"] >= claims["p"] - 1e-12).all()


def verdicts_of(parts, model):
    rows = pd.concat([run.tables["verdicts.csv"] for run in parts])
    rows = rows[(rows["model"] == model) & (rows["seed"] != "all")]
    return set(rows.loc[rows["scope"] == "without layer 0", "verdict"])


def test_the_decomposition_tells_models_of_known_answer(parts):
    assert verdicts_of(parts, "gpt-partitioned") == {"carried along"}
    for model in ("gpt-conv+rotated", "pc+state+rotated"):
        assert verdicts_of(parts, model) == {"re-represented"}
    assert verdicts_of(parts, "gpt-untrained") == {"undetermined"}


def test_the_decomposition_tells_every_models_own_states_made_into_something_known(parts):
    """No landmark gets a wrong verdict; the share of sure ones is what the findings say."""
    table = pd.concat([run.tables["landmarks.csv"] for run in parts])
    table = table[(table["index"] == "in_place_without_layer0") & (table["model"] != "gpt-untrained")]
    found = table.groupby("landmark")["verdict"].agg(lambda verdicts: verdicts.value_counts().to_dict())
    assert set(found["carried"]) <= {"carried along", "undetermined"}
    assert found["carried"]["carried along"] == 47
    assert found["rotated"] == {"re-represented": 50}
    assert found["shuffled"] == {"undetermined": 50}


def test_the_instrument_check_holds_for_every_gpt_with_whole_skips(standard_comparison):
    claims = standard_comparison.table
    claims = claims[(claims["kind"] == "claim") & claims["claim"].str.contains("in_place_without_layer0 lies above")]
    assert set(claims["model"]) == {"gpt", "gpt-conv", "gpt-ds", "gpt2"}
    assert set(claims["outcome"]) == {"holds"}


def test_the_committed_calibration_is_what_its_streams_say_and_reaches_what_was_asked_of_it(tmp_path):
    recipe = load_calibration("calibration")
    manifest = json.loads((CALIBRATION / MANIFEST).read_text())
    asked = recipe.model_dump(mode="json")
    if "update" not in manifest["calibration"]["rule"]:  # written before the rule for the update decomposition
        del asked["rule"]["update"]
    assert manifest["calibration"] == asked
    names = ("streams.csv", "calibration.csv", "thresholds.csv")
    assert manifest["files"] == study_files(CALIBRATION, names)
    streams, table, _ = (read_study_table(CALIBRATION, name) for name in names)
    summarise(streams).to_csv(tmp_path / "again.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "again.csv"), table, rtol=1e-9)
    thresholds = midpoints(streams).set_index("threshold")["midpoint"]
    for name, midpoint in thresholds.items():
        assert abs(getattr(recipe.rule, str(name)) - midpoint) < 0.02, (
            "frozen before, and still what the streams ask for"
        )
    rows = table.set_index(["set", "by"])
    assert rows.loc[("held_out", "all"), "right_when_committed"] >= 0.95
    assert rows.loc[("held_out", "pure"), "cannot_tell"] < 0.5
    for name in JUDGED:
        known = streams[streams[f"{name}_true"].notna() & streams[name].notna()]
        inside = known[f"{name}_true"].between(known[f"{name}_ci_low"], known[f"{name}_ci_high"])
        assert len(known) >= 200, name
        assert 0.92 <= inside.mean() <= 0.98, name
