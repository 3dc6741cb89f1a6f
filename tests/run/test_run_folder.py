"""What a command may do to a run folder, and to the process that calls it."""

import json
import shutil

import pytest
import torch
from helpers.commands import csv_bytes, refused, run
from helpers.suites import write_suite
from transformers.utils import logging as transformers_logging

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import without_progress_bars
from lensbench.results.folder import claimed, in_checkout_results, read_run
from lensbench.run.stage_names import stage_names
from lensbench.run.suite import run_suite
from lensbench.runtime.progress import Quiet
from lensbench.runtime.stages import Stages
from lensbench.suite.files import load_suite


class Recorded(Quiet):
    """Progress that keeps what it was told."""

    def __init__(self):
        self.lines, self.names, self.total = [], [], 0

    def stages(self, total, predicted=None, at_once=1):
        self.total = total

    def finished(self, name, seconds, reused):
        self.names.append(name)

    def say(self, line):
        self.lines.append(line)


def copied(tiny_run, folder):
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns(".lock"))
    return folder


def test_a_command_that_fails_before_its_first_stage_leaves_no_folder(tmp_path):
    broken = write_suite(tmp_path, **{"vocab_size = 300": "vocab_size = 300\nmax_bytes = 1"})
    assert run("run", broken, "--out", tmp_path / "deep" / "run").exit_code == 2
    assert not (tmp_path / "deep").exists()


def test_a_claim_sets_threads_and_restores_them_and_keeps_work(tmp_path):
    before = torch.get_num_threads()

    def fail_after_a_stage() -> None:
        assert torch.get_num_threads() == before + 1
        Stages(tmp_path / "run" / "stages").run("x", {}, lambda folder: (folder / "x").write_text("precious"))
        raise LensbenchError("wrong")

    with pytest.raises(LensbenchError, match="wrong"), claimed(tmp_path / "run", "a", before + 1):
        fail_after_a_stage()
    assert torch.get_num_threads() == before
    with pytest.raises(LensbenchError, match="holds a run of suite 'a', not 'b'"), claimed(tmp_path / "run", "b"):
        pass


def test_a_folder_without_work_is_free_for_another_suite(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(LensbenchError, match="wrong"), claimed(tmp_path / "run", "a"):
        raise LensbenchError("wrong")
    with claimed(tmp_path / "run", "b"):
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"suite": "b"}


def test_a_finished_run_is_not_replaced_by_one_on_another_text(tiny_suite, tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"another text of {k} words and more of them" for k in range(3000)))
    refused(run("run", tiny_suite, "--out", out, "--corpus", f"file:{other}"), "holds a finished run", "another text")
    assert csv_bytes(out) == csv_bytes(tiny_run)


def test_a_finished_run_is_not_replaced_by_one_of_other_models(tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    fewer = write_suite(tmp_path, **{'[[models]]\nname = "gpt"': '[[models]]\nname = "other"'})
    shutil.rmtree(tmp_path / "texts")
    suite = load_suite(str(fewer))
    spec = "file:" + str(tmp_path / "texts")
    assert suite.corpus.spec == spec
    from helpers.suites import write_texts

    write_texts(tmp_path / "texts")
    refused(run("run", fewer, "--out", out), "holds a finished run", "model 'gpt'")
    assert csv_bytes(out) == csv_bytes(tiny_run)


def test_rows_of_a_damaged_model_that_is_not_asked_for_are_not_lost(tiny_suite, tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    (out / "stages" / "fit-pc-seed0" / "fit.json").unlink()
    refused(run("run", tiny_suite, "--out", out, "--only", "gpt"), "hold model pc", "fit.json is missing", "--only pc")
    assert csv_bytes(out) == csv_bytes(tiny_run)
    assert (out / "manifest.json").read_bytes() == (tiny_run / "manifest.json").read_bytes()


def test_rows_of_a_model_whose_stage_is_gone_are_not_lost(tiny_suite, tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "stages" / "score-pc-seed0")
    refused(run("run", tiny_suite, "--out", out, "--only", "gpt"), "hold model pc", "score-pc-seed0 is not finished")
    assert csv_bytes(out) == csv_bytes(tiny_run)


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_model_whose_rows_no_table_holds_is_left_out_by_name(tiny_suite, tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    (out / "manifest.json").unlink()  # a run that was cut short before its tables
    (out / "stages" / "fit-pc-seed0" / "fit.json").unlink()
    result = run("run", tiny_suite, "--out", out, "--only", "gpt")
    assert result.exit_code == 0
    assert "model pc is left out: " in result.output
    assert "fit.json is missing" in " ".join(result.output.split())
    finished = read_run(out)
    assert finished.manifest.models == ["gpt", "pc+state"]
    assert set(finished.manifest.left_out) == {"pc"}


@pytest.mark.usefixtures("no_figures")
def test_models_that_only_leaves_out_are_not_called_unfinished(tiny_suite, tiny_run, tmp_path):
    """Nobody began them: what is said is that they were not asked for, and the command that runs all."""
    out = copied(tiny_run, tmp_path / "run")
    (out / "manifest.json").unlink()
    for stage in (out / "stages").glob("*pc*"):
        shutil.rmtree(stage)
    result = run("run", tiny_suite, "--out", out, "--only", "gpt")
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert f"not run, as --only asks: pc, pc+state. All models: lensbench run {tiny_suite} --out {out}" in said
    assert "finished with these settings" not in said
    assert "is left out" not in said
    assert read_run(out).manifest.left_out == {"pc": "not asked for", "pc+state": "not asked for"}


@pytest.mark.usefixtures("no_figures")
def test_a_model_that_was_begun_and_is_not_asked_for_is_named_with_what_it_lacks(tiny_suite, tiny_run, tmp_path):
    out = copied(tiny_run, tmp_path / "run")
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "stages" / "score-pc-seed0")
    said = " ".join(run("run", tiny_suite, "--out", out, "--only", "gpt").output.split())
    assert "note: model pc is left out: stage score-pc-seed0 is not finished with these settings" in said
    assert "as --only asks" not in said


def test_weights_of_models_trained_here_are_told_apart(tiny_run):
    finished = read_run(tiny_run)
    told = finished.tables["models.csv"].set_index("model")["weights"]
    assert told["gpt"] != told["pc"] == told["pc+state"]
    assert finished.manifest.weights == {f"{name}-seed0": value for name, value in told.items()}


@pytest.mark.usefixtures("no_figures")
def test_every_stage_of_a_run_is_counted_beforehand(tiny_suite, tiny_run, tmp_path):
    suite, recorded = load_suite(str(tiny_suite)), Recorded()
    run_suite(suite, copied(tiny_run, tmp_path / "run"), device=torch.device("cpu"), progress=recorded)
    assert set(recorded.names) == stage_names(suite, list(suite.models))
    assert recorded.total == len(recorded.names) == len(set(recorded.names))


def test_transformers_has_its_settings_back(tmp_path):
    enabled = transformers_logging.is_progress_bar_enabled()
    assert enabled, "importing lensbench leaves them alone"
    with without_progress_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


def test_results_of_a_checkout_are_written_by_name_alone(tiny_suite, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "lensbench").mkdir(parents=True)
    (checkout / "lensbench" / "errors.py").write_text("")
    committed = checkout / "results" / "standard"
    committed.mkdir(parents=True)
    (committed / "manifest.json").write_text('{"suite_name": "standard"}')
    assert in_checkout_results(committed)
    assert not in_checkout_results(checkout / "runs" / "x")
    refused(run("run", tiny_suite, "--out", committed), "holds a run of suite 'standard', not 'tiny'")
    monkeypatch.chdir(checkout / "results")
    refused(run("run", tiny_suite), "lies in results/", "--out")
