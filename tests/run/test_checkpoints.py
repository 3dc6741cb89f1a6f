"""Checkpoints of one training go all the way: rows of models.csv, models on the ruler, sources of their own."""

import shutil

import pandas as pd
import pytest
from helpers.commands import csv_bytes, run
from helpers.suites import write_suite

from lensbench.models.pretrained import load_pretrained
from lensbench.report.trace import traced_model
from lensbench.runtime.files import sha256

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("no_figures")]

ONLY = ("--only", "gpt@0,gpt@2048,gpt")


def kept_suite(folder, checkpoints="[0, 2_048]"):
    return write_suite(folder, **{"length = 64": f"checkpoints = {checkpoints}\nlength = 64"})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lensbench.run.suite.draw_side_by_side", lambda *_: [])
        result = run("run", kept_suite(folder), "--out", folder / "run", *ONLY)
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_each_checkpoint_is_a_row_with_its_tokens_and_a_verdict(kept):
    models = pd.read_csv(kept / "models.csv").set_index("model")
    assert models["train_tokens"].to_dict() == {"gpt@0": 0, "gpt@2048": 2_048, "gpt": 8_192}
    assert models["weights"].nunique() == 3
    assert models.loc["gpt", "ce"] < models.loc["gpt@2048", "ce"] < models.loc["gpt@0", "ce"]
    for name in ("verdicts.csv", "indices.csv", "transfer.csv"):
        assert set(pd.read_csv(kept / name)["model"]) == set(models.index)


def test_the_model_at_the_end_and_its_tables_are_those_of_a_run_without_checkpoints(kept, tiny_run):
    for name, table in {"models.csv": "ce", "indices.csv": "value"}.items():
        ours, theirs = (pd.read_csv(place / name, dtype=str).query("model == 'gpt'") for place in (kept, tiny_run))
        assert list(ours[table]) == list(theirs[table])
    weights = "stages/train-gpt-seed0/model.safetensors"
    assert sha256(kept / weights) == sha256(tiny_run / weights)


def test_other_checkpoints_train_again_and_measure_the_model_at_the_end_no_more(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    suite = kept_suite(tmp_path, "[0, 1_024, 2_048]")
    shutil.rmtree(tmp_path / "texts")
    shutil.copytree(kept.parent / "texts", tmp_path / "texts")
    result = run("run", suite, "--out", tmp_path / "run", "--only", "gpt@0,gpt@1024,gpt@2048,gpt")
    assert result.exit_code == 0, result.output
    computed = {line.split(":")[0] for line in result.stderr.splitlines() if ": done in" in line}
    assert {name for name in computed if "gpt-seed" in name and "capture" not in name} == {"train-gpt-seed0"}
    assert "fit-gpt@1024-seed0" in computed
    assert "fit-gpt@2048-seed0" not in computed


def test_a_checkpoint_is_a_source_with_the_tokenizer_of_its_run(kept):
    source = f"path:{kept}/stages/train-gpt-seed0/at-2048"
    assert load_pretrained(source).trained_here
    assert traced_model("gpt@2048", None, kept, None).model == source


def test_a_run_of_checkpoints_has_trends_over_its_tokens(kept, tmp_path):
    result = run("trends", kept, "--index", "ce", "--out", tmp_path / "out", "--figures", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Change per doubling of training tokens" in result.output
    (row,) = pd.read_csv(tmp_path / "out" / "trends.csv").to_dict("records")
    ce = pd.read_csv(kept / "models.csv").set_index("model")["ce"]
    # Two models, 2048 and 8192 tokens, are two doublings apart; the initial weights have no place on the axis.
    assert row["slope"] == pytest.approx((ce["gpt"] - ce["gpt@2048"]) / 2, rel=1e-4)
    assert row["ci_low"] < row["slope"] < row["ci_high"] < 0
    assert row["note"] == "one seed: over documents"
    assert (tmp_path / "over_training.png").is_file()


def test_the_same_run_again_computes_nothing(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    result = run("run", kept.parent / "tiny.toml", "--out", tmp_path / "run", *ONLY)
    assert result.exit_code == 0, result.output
    assert ": done in" not in result.stderr
    assert csv_bytes(tmp_path / "run") == csv_bytes(kept)
