"""The benchmark of products in float16: what it measures of a small model, and what it writes."""

import json

import pandas as pd
import pytest
import torch
import typer
from helpers.pretrained import save_model
from helpers.suites import write_texts
from typer.testing import CliRunner

from benchmarks.speed import half
from benchmarks.speed.half import in_turn, row_of
from benchmarks.speed.task import Task
from lensbench.streams.capture import capture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("half")
    texts = write_texts(root / "texts", documents=60)
    return save_model(root / "llama", "llama", texts, 300), texts


def test_ways_take_turns_and_the_least_of_the_rounds_counts(monkeypatch):
    clock = iter([0, 5, 5, 6, 6, 8, 8, 11])
    monkeypatch.setattr(half.time, "process_time", lambda: next(clock))
    asked = []
    assert in_turn(2, lambda: asked.append("a") or 1, lambda: asked.append("b") or 2) == [(2, 1), (1, 2)]
    assert asked == ["a", "b", "a", "b"]


def test_a_row_is_a_ratio_and_a_paired_difference_over_documents(model):
    task = Task.load(f"path:{model[0]}", f"file:{model[1]}", length=32)
    captured = capture(task.stream, task.windows("eval", 16, 8))
    nats = torch.linspace(1, 2, len(captured))
    row = row_of("passes", (6.0, nats), (2.0, nats + 0.01), captured)
    assert row["ratio"] == 3.0
    assert row["change"] == pytest.approx(0.01, abs=1e-6)
    assert row["change_ci_low"] <= row["change"] <= row["change_ci_high"]
    assert row["rms"] == pytest.approx(0.01, abs=1e-6)


def test_the_command_measures_passes_and_log_partitions_and_leaves_the_stream_as_it_is(model, tmp_path):
    app = typer.Typer()
    app.command()(half.main)
    given = {"--model": f"path:{model[0]}", "--text": f"file:{model[1]}", "--out": tmp_path, "--sequences": 8}
    given |= {"--positions": 8, "--length": 32, "--layers": 2, "--rounds": 1}
    result = CliRunner().invoke(app, [str(word) for pair in given.items() for word in pair])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "half.csv")
    assert table["part"].iloc[0] == "passes"
    assert table["part"].str.startswith("log-partitions, layer ").sum() == 2
    assert (table["ratio"] > 0).all()
    assert (table["rms"] < 0.05).all()
    described = json.loads((tmp_path / "half.json").read_text())
    assert described["agreement"]["kl"] < 1e-4
    assert described["log_partitions_of_a_run"] == "float32", "a small unembedding"
    refused = CliRunner().invoke(app, ["--model", "path:nowhere", "--out", str(tmp_path / "x")])
    assert refused.exit_code == 2
