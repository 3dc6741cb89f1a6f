"""A suite of controls end to end: rotated views, probes, and what is known of each model shows in its tables."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.suites import without_figures, write_texts
from scipy import stats
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.results import schema as results
from lensbench.results.folder import SEQUENCES, SUMS, read_run
from lensbench.suite.files import load_suite

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("no_figures")]

SUITE = """
name = "known"
question = "Do models of known answer come out as they must?"
seeds = [0, 1]
probes = ["representation", "matched_transfer", "gradient_alignment", "block_paths"]

[corpus]
spec = "file:{texts}"
vocab_size = 300

[training]
tokens = 65_536
length = 64
batch = 8

[fit]
sequences = 64
positions = 24
dev_sequences = 32
dev_positions = 8
ridges = [1e-3, 1e-2, 0.1, 1.0, 10.0]
pads = [0.0, 0.2, 0.4, 0.6]
rotations = 2
refits = 1
refine_passes = 0
tolerances = [0.1]

[evaluate]
sequences = 96
positions = 8
draws = 200
probe_sequences = 24

[[claims]]
model = "gpt-conv"
against = "gpt-partitioned"
indices = ["shared_retention", "gain_visibility", "ce"]

[[claims]]
model = "gpt-conv+rotated"
against = "gpt-conv"
indices = ["shared_retention"]

[[models]]
name = "gpt-conv"
family = "gpt-conv"
d_model = 32
layers = 3
heads = 2
parameters = 40_000
training = {{ deep_supervision = 0.3 }}

[[models]]
name = "gpt-conv+rotated"

[[models]]
name = "gpt-partitioned"
family = "gpt-partitioned"
d_model = 32
layers = 3
heads = 2
parameters = 30_000
settings = {{ read_size = 12 }}

[[models]]
name = "gpt-untrained"
family = "gpt-conv"
d_model = 32
layers = 3
heads = 2
parameters = 40_000
untrained = true
seeds = [1]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("known")
    texts = write_texts(base / "texts")
    suite = base / "known.toml"
    suite.write_text(SUITE.format(texts=texts))
    with without_figures():
        result = run("run", suite, "--out", base / "run")
    assert result.exit_code == 0, result.output
    return base / "run"


@pytest.fixture(scope="module")
def tables(folder):
    return {name: t.astype({"seed": str}) if "seed" in t else t for name, t in read_run(folder).tables.items()}


def index(tables, name, model, seed="0"):
    rows = tables["indices.csv"]
    (value,) = rows[(rows["index"] == name) & (rows["model"] == model) & (rows["seed"] == seed)]["value"]
    return value


def test_the_rotated_view_is_the_same_model_read_through_other_bases(tables):
    models = tables["models.csv"].set_index(["model", "seed"])
    lenses = tables["lenses.csv"]
    for seed in ("0", "1"):
        plain, turned = models.loc[("gpt-conv", seed)], models.loc[("gpt-conv+rotated", seed)]
        assert plain.equals(turned), "same model, same logits, same cross-entropy"
        kl = {}
        for model in ("gpt-conv", "gpt-conv+rotated"):
            rows = lenses[(lenses["model"] == model) & (lenses["seed"] == seed) & (lenses["lens"] == "tuned")]
            kl[model] = rows[rows["stage"] == "closed"].set_index("layer")["kl"]
            assert len(kl[model]) == 3, "one row per layer: the null's first view does not stand among the model's own"
        np.testing.assert_allclose(kl["gpt-conv"], kl["gpt-conv+rotated"], atol=2e-3)
    assert index(tables, "shared_retention", "gpt-conv+rotated") < index(tables, "shared_retention", "gpt-conv")


def test_a_model_at_its_initial_weights_has_nothing_to_compare(tables):
    """There is next to nothing to gain on it, so its indices are undefined, and the table says why."""
    models = tables["models.csv"]
    row = models[models["model"] == "gpt-untrained"].iloc[0]
    assert row["train_tokens"] == 0
    assert row["seed"] == "1"
    indices = tables["indices.csv"]
    rows = indices[
        (indices["model"] == "gpt-untrained") & indices["index"].isin(["shared_retention", "gain_visibility"])
    ]
    assert list(rows["seed"]) == ["1", "1"]
    assert rows["value"].isna().all()
    assert rows["reason"].str.contains("undefined").all()
    verdicts = tables["verdicts.csv"]
    assert set(verdicts.loc[verdicts["model"] == "gpt-untrained", "fixed_lens_verdict"]) == {"cannot tell"}


def test_nothing_moves_under_fixed_lenses_of_a_partitioned_stream(tables):
    transfer = tables["transfer.csv"]
    rows = transfer[transfer["model"] == "gpt-partitioned"]
    later = rows[(rows["lens_layer"] < rows["stream_layer"]) & (rows["stream_layer"] < 3)]
    assert len(later) == 6
    assert (later["movement_kl"].abs() < 1e-6).all()
    own = rows[rows["lens_layer"] == rows["stream_layer"]].set_index(["seed", "lens_layer"])["kl"]
    for _, row in later.iterrows():
        assert row["kl"] == pytest.approx(own[row["seed"], row["lens_layer"]], abs=1e-6)


def test_probes_have_a_row_per_seed_and_one_for_all(tables):
    probes = tables["probes.csv"]
    what = ["model", "probe", "quantity", "layer", "other"]
    for _, rows in probes[probes["model"] != "gpt-untrained"].groupby(what, dropna=False):
        assert list(rows["seed"]) == ["0", "1", "all"]
        one, two, mean = rows["value"]
        assert (np.isnan(one) and np.isnan(mean)) or mean == pytest.approx((one + two) / 2)
    reasons = probes[(probes["model"] == "gpt-conv+rotated") & probes["value"].isna()]
    assert set(reasons["quantity"]) >= {"gradient_alignment", "block_paths"}
    assert reasons["reason"].notna().all()
    verdicts = tables["verdicts.csv"].set_index(["model", "scope", "seed"])["fixed_lens_verdict"]
    assert verdicts["gpt-partitioned", "all layers", "all"] == "carry-along"
    carried = probes[(probes["model"] == "gpt-partitioned") & (probes["quantity"] == "carried_share")]
    assert len(carried) == 9
    assert (carried["value"] > 0.99).all()


def test_similarity_goes_with_transfer_as_its_definition_says(tables):
    """Spearman over i != j by scipy; the partial one by residuals of ranks."""
    transfer, probes = tables["transfer.csv"], tables["probes.csv"]
    for model in ("gpt-conv", "gpt-conv+rotated"):
        found = probes[(probes["model"] == model) & (probes["seed"] == "0")]
        alike = found[found["quantity"] == "covariance_similarity"].set_index(["layer", "other"])["value"]
        rows = transfer[(transfer["model"] == model) & (transfer["seed"] == "0")]
        rows = rows[
            (rows["lens_layer"] != rows["stream_layer"]) & (rows[["lens_layer", "stream_layer"]].max(axis=1) < 3)
        ]
        pair = [tuple(sorted((a, b))) for a, b in zip(rows["lens_layer"], rows["stream_layer"], strict=True)]
        similarity = np.array([alike[p] for p in pair])
        distance = np.array([abs(a - b) for a, b in pair])
        rho = stats.spearmanr(rows["penalty_ce"], similarity).statistic
        assert index(tables, "similarity_correlation", model) == pytest.approx(rho, abs=1e-9)
        ranks = [stats.rankdata(x) for x in (rows["penalty_ce"], similarity)]
        design = np.column_stack([np.ones(6), stats.rankdata(distance)])
        left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks]
        partial = np.corrcoef(left)[0, 1]
        assert index(tables, "similarity_correlation_given_distance", model) == pytest.approx(partial, abs=1e-9)


def test_a_second_run_reuses_every_probe(folder):
    before = {p.name: p.read_bytes() for p in folder.glob("*.csv")}
    suite = folder.parent / "known.toml"
    again = run("run", suite, "--out", folder)
    assert again.exit_code == 0
    assert ": done in" not in again.stderr.replace("corpus: done in", "")
    assert {p.name: p.read_bytes() for p in folder.glob("*.csv")} == before
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() >= {"probes.csv"}


def test_a_rotated_view_by_name_inherits_the_view_it_is_of(tmp_path):
    text = SUITE.format(texts=tmp_path)
    text += '\n[[models]]\nname = "part"\nview_of = "gpt-partitioned"\nview = "prediction"\n'
    text += '\n[[models]]\nname = "part+rotated"\n'
    path = tmp_path / "it.toml"
    path.write_text(text)
    models = {m.name: m for m in load_suite(str(path)).models}
    turned = models["part+rotated"]
    assert (turned.view_of, turned.view, turned.rotated) == ("gpt-partitioned", "prediction", True)
    assert models["gpt-conv+rotated"].view_of == "gpt-conv"
    assert models["gpt-conv+rotated"].view == "state"
    path.write_text(text + '\n[[models]]\nname = "nobody+rotated"\n')
    with pytest.raises(LensbenchError, match="nobody\\+rotated"):
        load_suite(str(path))
    path.write_text(text.replace('"block_paths"]', '"block_path"]'))
    with pytest.raises(LensbenchError, match="unknown probe 'block_path'; did you mean 'block_paths'"):
        load_suite(str(path))


def test_tables_of_a_run_hold_nothing_but_finite_numbers_and_reasons(tables):
    probes = tables["probes.csv"]
    empty = probes["value"].isna()
    assert probes.loc[empty, "reason"].notna().all()
    fixed = probes["reason"] == "the same for every document"  # a value without an interval
    constant = probes["reason"] == "the same for every seed"  # likewise, over seeds
    # Similarities of the fitting tokens, and what is exactly zero.
    assert ((probes["quantity"] == "covariance_similarity") | (probes["value"] == 0))[fixed].all()
    assert np.isfinite(probes.loc[~empty, "value"].to_numpy(float)).all()
    assert np.isfinite(probes.loc[~empty & ~fixed & ~constant, ["ci_low", "ci_high"]].to_numpy(float)).all()
    assert isinstance(probes, pd.DataFrame)


def part_of(folder, target, suite, models, others):
    """A run folder that holds some of the models alone, from the stages of the whole."""
    shutil.copytree(folder, target)
    (target / "manifest.json").unlink()  # else the run would refuse to lose the others' rows
    for stage in (target / "stages").iterdir():
        if any(f"-{name}-seed" in stage.name for name in others):
            shutil.rmtree(stage)
    result = run("run", suite, "--out", target, "--only", ",".join(models))
    assert result.exit_code == 0, result.output
    return target


def by_hand(tables, model, against, index):
    """Seed-paired differences of one index."""
    if index == "ce":
        values = tables["models.csv"].set_index(["model", "seed"])["ce"]
    else:
        rows = tables["indices.csv"]
        values = rows[rows["index"] == index].set_index(["model", "seed"])["value"]
    return np.array([values[model, seed] - values[against, seed] for seed in ("0", "1")])


def test_parts_of_a_suite_compare_as_the_whole_does_and_claims_are_corrected_together(folder, tables, tmp_path):
    suite = folder.parent / "known.toml"
    names = ["gpt-conv", "gpt-conv+rotated"], ["gpt-partitioned", "gpt-untrained"]
    parts = [part_of(folder, tmp_path / f"part{k}", suite, names[k], names[1 - k]) for k in (0, 1)]
    found = []
    for folders in ([folder], parts):
        result = run("compare", *folders, "--all", "--out", tmp_path / "out.csv", "--figures", tmp_path / "figures")
        assert result.exit_code == 0, result.output
        assert "known by" in result.output
        assert "carry-along" in result.output
        assert "one lens for all layers, for two" in result.output
        found.append(pd.read_csv(tmp_path / "out.csv"))
    assert "read as one run" in result.output
    pngs = {p.name for p in (tmp_path / "figures").glob("*.png")}
    assert {"plane.png", "probes.png", "visibility_by_distance.png"} <= pngs
    whole, of_parts = (t.drop(columns=["run", "against_run"]) for t in found)
    keys = ["kind", "model", "against_model", "seed", "index"]
    pd.testing.assert_frame_equal(
        *(t.sort_values(keys).reset_index(drop=True)[sorted(t)] for t in (whole, of_parts)), check_dtype=False
    )

    claims = whole[whole["kind"] == "claim"].set_index(["model", "against_model", "index"])
    assert len(claims) == 4
    assert set(claims["seeds"]) == {2}
    assert set(claims["note"]) == {"only 2 seeds"}
    p = {}
    for key, row in claims.iterrows():
        gaps = by_hand(tables, *key)
        assert row["value"] == pytest.approx(gaps.mean(), abs=1e-12)
        expected = stats.ttest_1samp(gaps, 0)
        low, high = expected.confidence_interval(0.95)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high))
        p[key] = expected.pvalue
        assert row["p"] == pytest.approx(expected.pvalue)
    # Holm, step by step: the smallest of m times m, the next times m - 1, none below the one before it.
    largest = 0.0
    for rank, (key, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        assert claims.loc[key, "p_holm"] == pytest.approx(largest)


def test_sums_by_sequence_are_kept_on_request_and_change_no_table_and_no_comparison(folder, tmp_path):
    suite = tmp_path / "known.toml"
    suite.write_text(
        (folder.parent / "known.toml").read_text().replace("draws = 200", 'draws = 200\nsums = "sequence"')
    )
    shutil.copytree(folder, tmp_path / "run")
    result = run("run", suite, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for name in (*results.WRITTEN, SUMS):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (folder / SEQUENCES).exists()
    whole, small = pd.read_parquet(tmp_path / "run" / SEQUENCES), pd.read_parquet(folder / SUMS)
    # Every document is a cluster of its own here, with one or two sequences of it.
    assert len(small) < 0.8 * len(whole)
    assert whole["lens"].astype(str).str.startswith("tuned@").any()
    assert not small["lens"].astype(str).str.startswith("tuned@").any()
    found = []
    for at in (folder, tmp_path / "run"):
        assert run("compare", at, "--out", tmp_path / "out.csv").exit_code == 0
        found.append(pd.read_csv(tmp_path / "out.csv").drop(columns=["run", "against_run"]))
    pd.testing.assert_frame_equal(*found)
    # Without the setting, the next run leaves no file that it did not write.
    assert run("run", folder.parent / "known.toml", "--out", tmp_path / "run").exit_code == 0
    assert not (tmp_path / "run" / SEQUENCES).exists()


def test_runs_are_judged_again_by_the_rule_of_another_suite(folder, tmp_path):
    rule = tmp_path / "other.toml"
    kind = "\n[verdict]\nvisible = -50.0\nconsistent = -50.0\ninconsistent = -51.0\nunseen = -51.0\n"
    rule.write_text((folder.parent / "known.toml").read_text().replace("\n[[claims]]", kind + "\n[[claims]]", 1))
    own, other = run("compare", folder), run("compare", folder, "--rule", rule)
    assert own.exit_code == other.exit_code == 0, other.output
    # Anything that moves is refinement by the other rule; a partitioned stream does not.
    assert "refinement" not in own.output.split("claims that")[0].replace("re-representation", "")
    assert other.output.split("claims that")[0].count("refinement") >= 2


def test_a_claim_about_what_is_not_there_is_refused(tmp_path):
    path = tmp_path / "it.toml"
    for wrong, says in (
        ('against = "gpt-partitioned"', "model 'gpt-partitionde'; did you mean 'gpt-partitioned'"),
        ('"ce"]', "index 'cee'; did you mean 'ce'"),
    ):
        text = SUITE.format(texts=tmp_path)
        path.write_text(text.replace(wrong, {"a": 'against = "gpt-partitionde"', '"': '"cee"]'}[wrong[0]]))
        with pytest.raises(LensbenchError, match=says):
            load_suite(str(path))


def test_claims_on_visibility_are_told_at_every_loss_that_a_ridge_may_cost(folder, tables, tmp_path):
    assert run("compare", folder, "--out", tmp_path / "out.csv").exit_code == 0
    table = pd.read_csv(tmp_path / "out.csv", dtype={"note": str})
    rows = table[table["kind"] == "claim at tolerance"].set_index("note")
    curve = tables["tolerances.csv"]
    curve = curve[curve["index"] == "gain_visibility"].set_index(["tolerance", "model", "seed"])["value"].sort_index()
    for label in ("1se", "0.02", "0.1"):
        one, other = (curve[label, model] for model in ("gpt-conv", "gpt-partitioned"))
        assert rows.loc[label, "value"] == pytest.approx((one - other).mean())
    # At the headline's tolerance it is the claim itself.
    claims = table[(table["kind"] == "claim") & (table["index"] == "gain_visibility")]
    assert claims["value"].iloc[0] == pytest.approx(rows.loc["0.02", "value"], abs=1e-6)
