"""The whole path from a suite to tables and figures, and one clear line for everything that can be wrong on it."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import csv_bytes, refused, run
from helpers.suites import write_suite, write_texts
from safetensors.torch import load_file, save_file

from lensbench.results import schema as results
from lensbench.results.folder import read_run
from lensbench.results.manifest import write_manifest
from lensbench.runtime import files

# What a run leaves


def test_a_run_folder_holds_every_table_with_its_schema(tiny_run):
    finished = read_run(tiny_run)
    assert {"gpt", "pc", "pc+state"} == set(finished.tables["models.csv"]["model"])
    for name in results.WRITTEN:
        asked = results.ASKED_COLUMNS.get(name, ())
        columns = [column for column in results.SCHEMA[name] if column not in asked]
        assert list(pd.read_csv(tiny_run / name, nrows=0).columns) == columns
    transfer = finished.tables["transfer.csv"]
    assert (transfer.groupby("model").size() == 16).all()
    lenses = finished.tables["lenses.csv"]
    assert {"logit", "tuned", "shared", "shared_bias", "shared_loo"} == set(lenses["lens"])
    assert (lenses["kl_ci_low"] <= lenses["kl"]).all()
    assert (lenses["kl"] <= lenses["kl_ci_high"]).all()
    assert {p.name for p in (tiny_run / "figures").glob("*.png")} >= {
        "transfer_penalty.png",
        "kl_by_layer.png",
        "plane.png",
    }
    manifest = finished.manifest
    assert {"suite", "seeds", "versions", "hardware", "corpus", "git_revision", "seconds"} <= set(manifest.content())
    assert manifest.hardware["processor"]


def test_the_tables_are_sums_of_the_sequences(tiny_run):
    finished = read_run(tiny_run)
    sequences = pd.concat(map(pd.read_parquet, tiny_run.glob("stages/score-*/sequences.parquet")))
    transfer = finished.tables["transfer.csv"]
    tuned = sequences[sequences["lens"].isin(["tuned", "logit"]) & (sequences["prior"] != "zero")]
    sums = tuned.groupby(["model", "lens_layer", "layer"], observed=True)[["kl", "ce", "tokens"]].sum()
    for _, row in transfer.iterrows():
        here = sums.loc[(row["model"], row["lens_layer"], row["stream_layer"])]
        assert here["kl"] / here["tokens"] == pytest.approx(row["kl"], abs=1e-5)
        assert here["ce"] / here["tokens"] == pytest.approx(row["ce"], abs=1e-5)


def test_the_two_views_are_of_one_model(tiny_run):
    models = read_run(tiny_run).tables["models.csv"].set_index("model")
    assert models.loc["pc", "ce"] == models.loc["pc+state", "ce"]
    assert models.loc["pc+state", "d_model"] == 3 * models.loc["pc", "d_model"]


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_the_same_seed_twice_gives_the_same_bytes(tiny_suite, tiny_run, tmp_path):
    assert run("run", tiny_suite, "--out", tmp_path / "again").exit_code == 0
    assert csv_bytes(tmp_path / "again") == csv_bytes(tiny_run)
    result = run("compare", tiny_run, tmp_path / "again")
    assert "reproduced: byte for byte" in result.output


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_another_seed_gives_another_model(tiny_suite, tiny_run, tmp_path):
    assert run("run", tiny_suite, "--out", tmp_path / "other", "--seed", 1, "--only", "gpt").exit_code == 0
    other = read_run(tmp_path / "other").tables["models.csv"]
    assert set(other["seed"]) == {"1"}
    assert list(other["model"]) == ["gpt"]
    first = read_run(tiny_run).tables["models.csv"].set_index("model")
    assert other.iloc[0]["ce"] != first.loc["gpt", "ce"]


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_second_run_reuses_everything_and_a_changed_setting_reruns_what_depends_on_it(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    suite = write_suite(tmp_path)
    result = run("run", suite, "--out", folder)
    assert result.exit_code == 0
    assert "done in" not in result.output
    assert csv_bytes(folder) == csv_bytes(tiny_run)

    suite.write_text(suite.read_text().replace("sequences = 96", "sequences = 90"))
    done = [line.split(":")[0] for line in run("run", suite, "--out", folder).output.splitlines() if "done in" in line]
    assert sorted(name for name in done if not name.startswith("capture-")) == [
        "baselines", "score-gpt-seed0", "score-pc+state-seed0", "score-pc-seed0",
        "update-gpt-seed0", "update-pc+state-seed0", "update-pc-seed0",
    ]  # fmt: skip

    suite.write_text(suite.read_text().replace("draws = 200", "draws = 300"))
    result = run("run", suite, "--out", folder)
    assert result.exit_code == 0
    assert "done in" not in result.output

    suite.write_text(suite.read_text() + "\n[models.training]\nlearning_rate = 0.01\n".replace("[models", "[models"))
    refused(run("run", suite, "--out", folder), "is a view of 'pc' and cannot set training")


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_only_keeps_the_rows_of_models_that_are_finished(tiny_suite, tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    assert run("run", tiny_suite, "--out", folder, "--only", "gpt").exit_code == 0
    assert csv_bytes(folder) == csv_bytes(tiny_run)


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_several_seeds_are_summed_up_with_a_t_interval(tmp_path):
    suite = write_suite(tmp_path, **{'question = "Does': 'seeds = [0, 1]\nquestion = "Does'})
    result = run("run", suite, "--out", tmp_path / "run", "--only", "gpt")
    assert result.exit_code == 0, result.output
    indices = read_run(tmp_path / "run").tables["indices.csv"]
    assert set(indices["seed"]) == {"0", "1", "all"}
    rows = indices[indices["index"] == "constant_kl"].set_index("seed")["value"]
    assert rows["all"] == pytest.approx((rows["0"] + rows["1"]) / 2)


def test_lenses_are_left_in_tuned_lens_format(tiny_run):
    from transformers import AutoModelForCausalLM
    from tuned_lens.nn.lenses import TunedLens

    from lensbench.streams.stream import ResidualStream

    model = AutoModelForCausalLM.from_pretrained(tiny_run / "stages" / "train-gpt-seed0")
    stream = ResidualStream(model)
    lens = TunedLens.from_unembed_and_pretrained(stream.readout, str(tiny_run / "stages" / "fit-gpt-seed0" / "tuned"))
    h = torch.randn(5, 16)
    assert lens(h, idx=1).shape == (5, 300)


# Figures and comparisons read tables alone


@pytest.mark.slow
def test_figures_are_redrawn_from_csv_alone(tiny_run, tmp_path):
    folder = tmp_path / "csv"
    folder.mkdir()
    for name in results.WRITTEN:
        shutil.copy(tiny_run / name, folder)
    assert run("figures", folder).exit_code == 0
    for path in (tiny_run / "figures").glob("*.png"):
        assert (folder / "figures" / path.name).read_bytes() == path.read_bytes()


def test_compare_writes_paired_differences(tiny_run, tmp_path):
    out = tmp_path / "deep" / "out.csv"
    assert run("compare", tiny_run, "--out", out).exit_code == 0
    table = pd.read_csv(out)
    difference = table[(table["kind"] == "difference") & (table["model"] == "pc") & (table["against_model"] == "gpt")]
    values = table[table["kind"] == "value"].set_index(["model", "index"])["value"]
    row = difference[difference["index"] == "ce"].iloc[0]
    assert row["value"] == pytest.approx(values["pc", "ce"] - values["gpt", "ce"])
    assert row["paired"]
    assert row["ci_low"] <= row["value"] <= row["ci_high"]
    # Pairing must pay: the interval of a difference is far narrower than those of its sides together.
    sides = table[(table["kind"] == "value") & (table["index"] == "ce")].set_index("model")
    apart = np.hypot(*(sides.loc[m, "ci_high"] - sides.loc[m, "ci_low"] for m in ("gpt", "pc")))
    assert row["ci_high"] - row["ci_low"] < 0.8 * apart


def with_manifest(finished, folder, change) -> Path:
    """A copy of a finished run whose manifest, as a dictionary, is changed in place."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("stages"))
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)
    return folder


def test_a_figure_of_a_comparison_without_a_folder_for_it_is_refused():
    refused(run("compare", "nowhere", "--figure", "plane"), "say where with --figures FOLDER")


def test_compare_refuses_runs_that_measure_different_things(tiny_run, tmp_path):
    other = with_manifest(tiny_run, tmp_path / "other", lambda m: m["suite"]["fit"].update(tolerance=0.05))
    refused(run("compare", tiny_run, other), "not the same: fit.tolerance is 0.02 and 0.05")


def test_a_model_on_two_texts_is_compared_with_itself_unpaired(tiny_run, tmp_path):
    other = with_manifest(tiny_run, tmp_path / "other", lambda m: m["corpus"].update(checksum="another"))
    result = run("compare", tiny_run, other, "--out", tmp_path / "table.csv")
    assert result.exit_code == 0, result.output
    first = result.output.splitlines()[0]
    assert first.startswith("not the same: text")
    assert "differences are those of the texts" in first
    table = pd.read_csv(tmp_path / "table.csv")
    between = table[(table["kind"] == "difference") & (table["run"] != table["against_run"]) & (table["seed"] != "all")]
    assert len(between)
    assert (between["model"] == between["against_model"]).all()
    assert not between["paired"].any()
    told = between.dropna(subset=["value"])
    assert told["note"].str.contains("another corpus").all()
    np.testing.assert_allclose(told["value"], 0.0, atol=1e-12)  # both hold the same numbers ...
    wide = told[told["index"] == "ce"]
    assert (wide["ci_low"] < -1e-6).all()  # ... and their draws do not move together
    assert (wide["ci_high"] > 1e-6).all()


def test_compare_refuses_other_models_on_different_texts(tiny_run, tmp_path):
    def renamed(m):
        m["corpus"].update(checksum="another")
        m["models"] = [f"other-{name}" for name in m["models"]]

    other = with_manifest(tiny_run, tmp_path / "other", renamed)
    refused(run("compare", tiny_run, other), "not the same: text", "held other documents")


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_compare_refuses_what_other_settings_and_texts_gave(tiny_run, tmp_path):
    suite = write_suite(tmp_path, **{"rotations = 2": "rotations = 2\ntolerance = 0.05"})
    write_texts(tmp_path / "texts", seed=5)
    assert run("run", suite, "--out", tmp_path / "other", "--only", "gpt").exit_code == 0
    refused(run("compare", tiny_run, tmp_path / "other"), "not the same: fit.tolerance is 0.02 and 0.05")
    corpus = read_run(tiny_run).manifest.corpus
    same = with_manifest(tmp_path / "other", tmp_path / "same", lambda m: m["corpus"].update(checksum=corpus.checksum))
    refused(run("compare", tiny_run, same), "not the same: fit.tolerance is 0.02 and 0.05")


def test_another_python_is_another_corpus_and_its_differences_are_unpaired(tiny_run, tmp_path):
    folders = [
        with_manifest(tiny_run, tmp_path / name, lambda m, n=name: m["corpus"].update(spec="stdlib", checksum=n))
        for name in ("here", "there")
    ]
    result = run("compare", *folders, "--out", tmp_path / "out.csv")
    assert result.exit_code == 0
    assert "another corpus" in result.output
    table = pd.read_csv(tmp_path / "out.csv")
    across = table[(table["kind"] == "difference") & (table["run"] != table["against_run"]) & table["value"].notna()]
    assert len(across)
    assert not across["paired"].astype(bool).any()
    assert all(note.startswith("not paired: another corpus") for note in across["note"])
    ce = across[across["index"] == "ce"].iloc[0]
    # The same numbers on both sides: the difference is 0, its interval that of two independent samples.
    assert ce["value"] == 0
    assert ce["ci_low"] < 0 < ce["ci_high"]


@pytest.mark.parametrize("command", ["figures", "compare"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "digit", "column", "empty"])
def test_a_corrupt_table_is_named(tiny_run, tmp_path, command, damage):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("stages"))
    path = folder / "transfer.csv"
    text = path.read_text()
    path.write_bytes(
        {
            "garbage": b"\x00\xff\x01" * 100,
            "truncated": text[: len(text) // 2].encode(),
            "digit": text.replace("0.", "1.", 1).encode(),
            "column": text.replace("penalty_ce", "penalty", 1).encode(),
            "empty": b"",
        }[damage]
    )
    before = (folder / "figures" / "plane.png").stat().st_mtime_ns
    refused(run(command, folder), "transfer.csv")
    assert (folder / "figures" / "plane.png").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["garbage", "column", "text"])
def test_a_corrupt_table_is_named_without_a_manifest_too(tiny_run, tmp_path, damage):
    folder = tmp_path / "csv"
    folder.mkdir()
    for name in results.WRITTEN:
        shutil.copy(tiny_run / name, folder)
    path = folder / "indices.csv"
    if damage == "garbage":
        path.write_bytes(b"\x00\xff\x01" * 100)
    elif damage == "column":
        path.write_text(path.read_text().replace("ci_low", "low", 1))
    else:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *(line.replace("0.", "zero", 1) for line in lines[1:])]))
    refused(run("figures", folder), "indices.csv")


def test_not_a_run_folder(tmp_path):
    refused(run("figures", tmp_path), "models.csv")
    refused(run("figures", tmp_path / "nowhere"), "no folder")
    refused(run("compare", tmp_path), "not a run folder")


# Bad input


def test_unknown_names(tmp_path):
    refused(run("run", "quikc"), "did you mean 'quick'?")
    refused(run("run", tmp_path / "my.toml"), "there is no suite file")
    refused(run("run", "quick", "--only", "rnn", "--out", tmp_path / "x"), "no model 'rnn'", "gpt, pc, pc+state")
    refused(run("run", "quick", "--device", "cuda:7", "--out", tmp_path / "x"), "cuda:7")
    refused(run("run", "quick", "--device", "abacus", "--out", tmp_path / "x"), "abacus")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "missing"), (b"", "empty"), (b"\x00\x01\x02" * 50_000, "binary"), (b"too short to split", "too short")],
)
def test_bad_texts(tmp_path, content, expected):
    suite = write_suite(tmp_path)
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    suite.write_text(suite.read_text().replace(f"file:{tmp_path / 'texts'}", f"file:{path}"))
    refused(run("run", suite, "--out", tmp_path / "run"), path.name, expected)


def test_unknown_corpus(tmp_path):
    suite = write_suite(tmp_path)
    suite.write_text(suite.read_text().replace(f"file:{tmp_path / 'texts'}", "stdlibb"))
    refused(run("run", suite, "--out", tmp_path / "run"), "stdlib")


def test_a_folder_of_something_else_is_left_alone(tiny_suite, tiny_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(run("run", tiny_suite, "--out", tmp_path), "not a run folder")
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = csv_bytes(folder)
    refused(run("run", "quick", "--out", folder), "holds a run of suite 'tiny', not 'quick'")
    assert csv_bytes(folder) == before


def test_a_damaged_model_is_named_and_not_overwritten(tiny_suite, tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    path = folder / "stages" / "train-gpt-seed0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    before = csv_bytes(folder)
    refused(run("run", tiny_suite, "--out", folder), "model.safetensors", "damaged")
    assert path.stat().st_size == 1000
    assert csv_bytes(folder) == before


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_damaged_checkpoint_is_named(tiny_suite, tmp_path, monkeypatch):
    from lensbench.run import training as run_module

    folder = tmp_path / "run"

    def interrupted(model, stream, recipe, *, checkpoints, report=None, **rest):
        from lensbench.models.training import train

        def stop(at):
            if at.step == 6:
                raise KeyboardInterrupt

        return train(model, stream, recipe, checkpoints=checkpoints, report=stop, **rest)

    monkeypatch.setattr(run_module, "train", interrupted)
    result = run("run", tiny_suite, "--out", folder)
    assert result.exit_code == 130
    assert "interrupted" in result.output
    monkeypatch.undo()
    path = folder / "stages" / "train-gpt-seed0.partial" / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(run("run", tiny_suite, "--out", folder), "checkpoint.safetensors", "damaged")
    path.write_bytes(whole)
    assert run("run", tiny_suite, "--out", folder).exit_code == 0


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_ends_with_the_same_bytes(tiny_suite, tiny_run, tmp_path, monkeypatch):
    from lensbench.models.training import train
    from lensbench.run import training as run_module

    def interrupted(model, stream, recipe, *, report=None, **rest):
        def stop(at):
            if at.step == 7:
                raise KeyboardInterrupt

        return train(model, stream, recipe, report=stop, **rest)

    folder = tmp_path / "run"
    monkeypatch.setattr(run_module, "train", interrupted)
    assert run("run", tiny_suite, "--out", folder).exit_code == 130
    monkeypatch.undo()
    assert run("run", tiny_suite, "--out", folder).exit_code == 0
    assert csv_bytes(folder) == csv_bytes(tiny_run)


def test_nan_in_the_weights_is_told_by_name(tiny_suite, tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    stage = folder / "stages" / "train-gpt-seed0"
    tensors = load_file(stage / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((stage / "stage.json").read_text())
    record["files"]["model.safetensors"] = files.sha256(stage / "model.safetensors")
    (stage / "stage.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "stages" / "fit-gpt-seed0")
    refused(run("run", tiny_suite, "--out", folder), "model.norm.weight", "NaN")


def test_a_full_disk_is_told_in_one_line(tiny_suite, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "stage.json")

    monkeypatch.setattr("lensbench.runtime.stages.write_json", full)
    refused(run("run", tiny_suite, "--out", tmp_path / "run"), "the disk is full")


def test_debug_shows_the_traceback():
    result = run("run", "quikc", "--debug")
    assert result.exit_code == 2
    assert "LensbenchError" in result.output


@pytest.mark.run
def test_ctrl_c_exits_with_130_and_keeps_finished_stages(tmp_path):
    suite = write_suite(tmp_path, **{"tokens = 8_192": "tokens = 4_000_000"})
    command = [sys.executable, "-m", "lensbench.cli", "run", str(suite), "--out", str(tmp_path / "run")]
    # A shell without job control starts its background jobs, and so perhaps these tests, with Ctrl-C ignored.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/stages/train-gpt-seed0.partial/checkpoint.safetensors")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # whatever went wrong, nothing is left to train for hours
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "stages" / "tokenizer" / "stage.json").exists()


def test_models_lists_what_can_be_named():
    output = run("models").output
    for name in ("quick", "quick-sweep", "predictive-coding", "stdlib", "file:PATH"):
        assert name in output
