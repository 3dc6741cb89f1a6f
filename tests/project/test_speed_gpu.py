"""The benchmark of a GPU, tried on the processor with small sizes: its tables, its time and what it does without a GPU."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.speed import gpu
from lensbench.runtime import files

SMALL = {"positions": 64, "width": 32, "vocabulary": 1600, "sequences": 16}


def small(out, **more):
    return gpu.Settings(**{"out": out, "device": "cpu", "model": "m", "text": "t", "changes": (), **SMALL, **more})


def command(*arguments):
    app = typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, [str(word) for word in arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path):
    result = command("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "torch sees none here" in result.output
    assert not (tmp_path / "out").exists()
    result = command("--device", "cpu", "--parts", "partition,speed", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no part 'speed'; there are agreement, partition" in result.output


def test_every_way_is_held_against_float64_and_against_the_machines_own_rate(tmp_path):
    gpu.partition(small(tmp_path))
    table = pd.read_csv(tmp_path / "gpu-partition.csv").set_index("way")
    assert list(table.index) == list(gpu.ways(torch.device("cpu")))
    made = table[table["note"] != "not installed here"]
    few, more = "1 product in bfloat16", "2 products in bfloat16"
    whole, fine = "1 product in float32", "1 product in float16"
    assert {few, more, whole, fine} < set(made.index)
    assert not [name for name in made.index if "compiled" in name]
    assert table.loc["cut-cross-entropy in bfloat16", "note"] == "not installed here"
    flops = 2 * 64 * 32 * 1600
    np.testing.assert_allclose(made["tflops"], flops / made["seconds"] / 1e12, rtol=1e-2)
    np.testing.assert_allclose(made["share"], made["tflops"] / made["bfloat16_tflops_of_the_card"], rtol=1e-2)
    assert (made["reached"] == (made["share"] >= 0.65)).all()
    # Weights are bfloat16 numbers: states of two terms leave hardly an error.
    error = made["mean_error"]
    assert error[whole] < 1e-5
    assert error[more] < 1e-4 < error[fine] < error[few] / 4 < 0.01
    assert (made["agrees"] == (error <= 1e-3)).all()
    sizes = pd.read_csv(tmp_path / "gpu-workspace.csv").groupby("way")["words"].apply(list)
    assert set(sizes.index) == set(made.index)
    assert sizes[whole] == [200, 400, 800, 1600]


def test_a_log_partition_by_definition_is_that_of_all_words():
    readout = gpu.random_head(8, 9000, torch.device("cpu"))
    n = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits = n.numpy().astype(float) @ readout.weight.numpy().astype(float).T
    np.testing.assert_allclose(gpu.exact(readout, n), np.log(np.exp(logits).sum(1)), rtol=1e-12)
    assert torch.equal(readout.weight, readout.weight.bfloat16().float())


def test_parts_that_are_done_are_not_measured_again_and_the_time_left_decides_on_the_others(tmp_path, monkeypatch):
    clock, asked = [0.0], []

    def worker(part, arguments, seconds):
        asked.append((part, seconds))
        clock[0] += 50.0
        return ("done", "fine") if part != "partition" else ("failed", "no")

    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu, "in_a_process", worker)
    order = ["agreement", "partition", "capture", "default"]
    table = gpu.run_parts(small(tmp_path), order, [], 200.0).set_index("part")
    assert asked == [("agreement", 200.0), ("partition", 150.0), ("capture", 100.0)]
    assert table["status"].to_dict() == dict(zip(order, ["done", "failed", "done", "skipped"], strict=True))
    assert table.loc["default", "remark"] == "50 s left; it is not begun below 60"
    assert table.loc["agreement", "seconds"] == 50
    asked.clear()
    again = gpu.run_parts(small(tmp_path), order, [], 400.0)
    assert [part for part, _ in asked] == ["partition", "default"]
    assert len(again) == 4
    asked.clear()
    gpu.run_parts(small(tmp_path, width=64), ["agreement"], [], 400.0)
    assert [part for part, _ in asked] == ["agreement"], "other settings are measured anew"


def test_a_part_is_stopped_when_its_time_is_over():
    status, remark = gpu.in_a_process("partition", ["--device", "cpu"], 0.01)
    assert status == "stopped"
    assert "goes on" in remark


@pytest.mark.run
def test_the_whole_command_runs_on_the_processor(tmp_path, tiny_run, tiny_suite):
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    given = {
        "fit.sequences": 64, "fit.positions": 8, "fit.dev_sequences": 64, "fit.dev_positions": 4, "evaluate.sequences": 64,
        "evaluate.positions": 4, "evaluate.length": 32, "fit.layers": 2, "fit.refits": 0, "fit.refine_passes": 0,
        "fit.rotations": 1, "update.landmarks": "false", "update.refits": 0, "probes": "[]", "claims": "[]",
    }  # fmt: skip
    changes = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    where = ["--device", "cpu", "--model", f"path:{tiny_run}/stages/train-gpt-seed0"]
    where += ["--text", f"file:{tiny_suite.parent}/texts", "--out", tmp_path, "--seconds", 3000]
    parts = ["--parts", "partition,capture,glance,default"]
    result = command(*where, *sizes, *parts, *changes)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "gpu-parts.csv")
    assert list(table["status"]) == ["done"] * 4
    glance = pd.read_csv(tmp_path / "gpu-glance.csv").set_index("stage")["seconds"]
    assert {stage.split("-")[0] for stage in glance.index} >= {"update", "fit", "score", "tables", "figures"}
    assert glance["the whole command"] > glance.drop("the whole command").max()
    states = pd.read_csv(tmp_path / "gpu-capture.csv").set_index("part")
    assert states.loc["capture", "tokens_per_second"] > 0
    described = json.loads((tmp_path / "gpu.json").read_text())
    assert described["hardware"]["device"] == "cpu"
    for name, checksum in described["tables"].items():
        assert files.sha256(tmp_path / name) == checksum
    assert {"gpu-parts.csv", "gpu-partition.csv", "gpu-default.csv"} <= set(described["tables"])
