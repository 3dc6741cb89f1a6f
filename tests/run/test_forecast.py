"""What a run would take is said before it runs, from configs and formulas alone."""

import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import refused, run
from rich.console import Console
from transformers import LlamaConfig

from lensbench.cli.forecast import busy_lines, forecast_table, rows_of
from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.run import costs, forecast
from lensbench.run.costs import Counts, Shape, Work
from lensbench.run.speeds import Speed, measured_speed
from lensbench.run.stage_names import stage_names
from lensbench.runtime import rates
from lensbench.runtime.rates import Rates, Stopwatch, measured_rates
from lensbench.suite.changes import Changes
from lensbench.suite.files import load_suite

CPU = torch.device("cpu")

RATES = Rates(model=1e11, single=1e11, double=5e10, eigen=4e9, words=1e9, copied=1e10)

EIGHT_B = Shape(
    layers=32, width=4096, vocabulary=128_256, body=6_979_588_096, outer=2 * 128_256 * 4096, bytes_each=2, heads=32
)
"""Llama 3.1 8B in bfloat16: 8,030,261,248 parameters, of which 1,050,673,152 are its embedding and its head"""


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(forecast, "measured_rates", lambda *_: RATES)
    monkeypatch.setattr(forecast, "measured_speed", lambda *_: Speed(sequences=1000, steps=10))
    monkeypatch.setattr(forecast, "refuse_short_text", lambda *_: [])  # reading a suite's text takes seconds


def config_alone(folder, **changes):
    """A folder of a model with nothing but its config."""
    settings = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = LlamaConfig(**settings | {"num_attention_heads": 4} | changes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return f"path:{folder}"


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize("name", ["quick", pytest.param("predictive-coding", marks=pytest.mark.run)])
def test_the_stages_that_are_forecast_are_those_of_the_run(name, tmp_path):
    suite = load_suite(name)
    found = forecast.forecast(suite, tmp_path / "none", device=CPU)
    assert {stage.name for stage in found.stages} == stage_names(suite, list(suite.models))
    assert found.missing == found.stages


@pytest.mark.usefixtures("known_rates")
def test_a_model_needs_nothing_but_its_config(tmp_path):
    suite = Changes(models=(config_alone(tmp_path / "m"),)).of("pretrained")
    found = forecast.forecast(suite, tmp_path / "run", device=CPU)
    assert {stage.name for stage in found.stages} == stage_names(suite, list(suite.models))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_context_that_is_too_short_as_the_run_does(tmp_path):
    short = config_alone(tmp_path / "m", max_position_embeddings=64)
    result = run("run", "pretrained", "--model", short, "--dry-run", "--out", tmp_path / "run")
    refused(result, "256 tokens are beyond its context of 64; add --set evaluate.length=64, or less")


def test_a_dry_run_refuses_a_text_that_is_missing_as_the_run_does(tmp_path):
    result = run("run", "quick", "--corpus", f"file:{tmp_path / 'none'}", "--dry-run", "--out", tmp_path / "run")
    refused(result, "none: there is no such file or folder")


@pytest.mark.parametrize(
    ("text", "said"), [("docs", "unknown corpus 'docs'"), ("package:no-such-package", "no-such-package")]
)
def test_a_dry_run_refuses_what_names_no_text_as_the_run_does(text, said, tmp_path):
    for more in (["--dry-run"], []):
        result = run("run", "quick", "--corpus", text, *more, "--out", tmp_path / "run")
        refused(result, said)


def test_the_shape_of_a_config_is_that_of_its_model(tmp_path):
    """Embedding and head of 1000 x 64 each; a block has 4 products of 64 x 64, 3 of 64 x 128 and two norms."""
    body = 4 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64
    untied = forecast.shape_of_source(config_alone(tmp_path / "a"), "bfloat16")
    assert untied == Shape(4, 64, 1000, body, 2 * 64_000, bytes_each=2, heads=4)
    tied = forecast.shape_of_source(config_alone(tmp_path / "b", tie_word_embeddings=True), "float32")
    assert tied == Shape(4, 64, 1000, body, 64_000, bytes_each=4, heads=4)


def test_of_models_that_are_built_alike_one_is_built(monkeypatch):
    """What the time left is told from stands before the first word of a run: 44 models are checkpoints of 4 trainings."""
    built = []
    monkeypatch.setattr(forecast, "build", lambda family, **shape: built.append(family) or build(family, **shape))
    suite, known = load_suite("training"), {}
    shapes = {model.name: forecast.shape_of(suite, model, known) for model in suite.models}
    assert len(shapes) == 44
    assert sorted(built) == [
        "gpt-conv",
        "gpt-looped",
        "predictive-coding",
        "predictive-coding",
    ]  # the last in two views
    for model in (m for m in suite.models if m.name in ("gpt-conv@20000", "pc", "pc+state")):
        assert shapes[model.name] == forecast.shape_of(suite, model)


def test_no_weight_of_a_large_model_is_made(tmp_path):
    source = config_alone(
        tmp_path / "m", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert forecast.shape_of_source(source, "bfloat16") == EIGHT_B


def test_ingredients_are_their_formulas():
    shape = Shape(layers=3, width=8, vocabulary=50, body=1000, outer=400)
    assert costs.forward(shape, windows=2, length=10, scored=4).model == 2 * 10 * (2 * 1000 + 4 * 3 * 10 * 8)
    assert costs.read_out(shape, 7) == Work(single=7 * 2 * 8 * 8, read=7 * 2 * 8 * 50, words=350)
    assert costs.moments(shape, 100, 3).double == 4 * 100 * 3 * 64
    assert costs.eigendecompositions(shape, 2) == Work(eigen=1024, double=2048)


def test_work_adds_up_and_takes_the_sum_of_its_kinds():
    work = Work(model=2e11) + 2 * Work(single=1e11, double=5e10, eigen=4e9, words=1e9)
    assert forecast.seconds(work, RATES) == pytest.approx(2 + 2 * 4)


def test_a_glance_costs_less_than_the_default_and_that_less_than_full():
    costly = []
    for preset in ("glance", "default", "full"):
        suite = Changes(preset=preset).of("pretrained")
        of = Counts.of(suite, EIGHT_B)
        stages = (costs.fit_cost, costs.score_cost, costs.update_cost)
        costly.append([forecast.seconds(stage(suite, EIGHT_B, of).work, RATES) for stage in stages])
    for less, more in itertools.pairwise(costly):
        assert all(a < b for a, b in zip(less, more, strict=True))


def test_a_share_of_the_log_partitions_costs_less_and_one_what_it_did():
    def seconds(share, shape=EIGHT_B):
        suite = Changes(settings=(f"evaluate.exact_share={share}",)).of("pretrained")
        return forecast.seconds(costs.score_cost(suite, shape, Counts.of(suite, shape)).work, RATES)

    assert seconds(0.05) < seconds(0.1) < 0.5 * seconds(1)
    small = Shape(layers=4, width=64, vocabulary=1000, body=10**5, outer=10**5)
    assert seconds(0.1, small) == seconds(1, small)


def test_rates_of_this_machine_are_measured_in_seconds():
    rates = measured_rates(CPU, torch.bfloat16, 64)
    assert all(value > 0 for name, value in vars(rates).items() if name not in ("read", "peak", "own"))
    assert rates.read == rates.peak == rates.own == 0, "as fast as others"


@pytest.mark.parametrize(("half", "fast"), [(1.0, False), (1.4, False), (1.6, True), (0.01, False)])
def test_whether_float16_is_fast_is_measured_by_one_thread(half, fast, monkeypatch):
    seen = []

    def rate(_watch, dtype, _width, least):
        seen.append((torch.get_num_threads(), least))
        return half if dtype == torch.float16 else 1.0

    monkeypatch.setattr(rates, "product_rate", rate)
    torch.set_num_threads(2)
    assert rates.half_is_fast.__wrapped__() is fast
    assert torch.get_num_threads() == 2
    assert seen == [(1, 0.05)] * 2


SMALL = Shape(layers=4, width=16, vocabulary=384, body=8_000, outer=384 * 16)


def speed_of(family, batch=4, **settings):
    """The measured speed of a model of width 16 on sequences of 32 tokens."""
    network = build(family, vocab_size=384, context=32, d_model=16, heads=2, parameters=10_000, **settings)
    recipe = TrainingRecipe(tokens=4096, length=32, batch=batch)
    return measured_speed(network, SMALL, recipe, RATES, CPU, True)


def test_a_training_is_predicted_from_its_steps_and_a_tied_model_costs_its_depth():
    """A layer that is applied 16 times has the parameters of one, and takes several times as long."""
    tied = {layers: speed_of("gpt-tied", layers=layers) for layers in (2, 16)}
    assert tied[16].steps < 0.5 * tied[2].steps
    assert tied[16].sequences < 0.5 * tied[2].sequences
    rates = tied[16].within(RATES, SMALL, 32)
    suite = load_suite("quick")
    taken = forecast.seconds(costs.train_cost(suite, SMALL, 100).work, rates)
    assert taken == pytest.approx(100 / tied[16].steps)
    passes = costs.forward(SMALL, windows=50, length=32, scored=0)
    assert forecast.seconds(passes, rates) == pytest.approx(50 / tied[16].sequences)


def test_what_other_processes_take_is_not_counted_and_said():
    watch = Stopwatch(CPU)
    assert watch.time(lambda: time.sleep(0.05)) < 0.02
    assert watch.at_hand < 0.5
    found = forecast.Forecast([], {"float32": replace(RATES, at_hand=0.25)})
    (line,) = busy_lines(found)
    assert "25% of its time" in line
    assert "about 4.0 times as long" in line
    assert busy_lines(forecast.Forecast([], {"float32": RATES})) == []


def test_suites_of_images_and_devices_that_are_missing_are_told(tmp_path):
    with pytest.raises(LensbenchError, match="--dry-run is for suites of text"):
        forecast.forecast(load_suite("vision"), tmp_path, device=CPU)
    if not torch.cuda.is_available():
        result = run("run", "quick", "--dry-run", "--device", "cuda", "--out", tmp_path / "run")
        refused(result, "there is no device 'cuda' here: torch sees 0 GPUs; give cpu")


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_prints_every_stage_with_totals_and_writes_nothing(tmp_path):
    result = run("run", "quick", "--dry-run", "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for name in stage_names(load_suite("quick"), list(load_suite("quick").models)):
        assert f" {name} " in result.output
    assert "13 of 13 stages" in " ".join(result.output.split())
    assert "Nothing was computed or written" in result.output
    assert list(tmp_path.iterdir()) == []


def planned(name, finished=False):
    return forecast.PlannedStage(name, 1090.0, costs.Cost(Work(), 2.0**31, 2.0**30), finished)


def shown(stages):
    console = Console(width=80, file=io.StringIO())
    found = forecast.Forecast(stages, {"float32": RATES})
    console.print(forecast_table(load_suite("standard"), Path("runs/standard"), found, "cpu"))
    return console.file.getvalue()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["pretrained-updates", "standard", "pythia-training"])
def test_the_table_fits_80_columns_and_cuts_and_wraps_nothing(name, finished):
    suite = load_suite(name)
    stages = [planned(stage, finished) for stage in sorted(stage_names(suite, list(suite.models)))]
    text = shown(stages)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    rows = [line for line in text.splitlines() if "│" in line]
    assert all(row.split("│")[0].strip() and row.split("│")[1].strip() for row in rows), "a row of one line each"
    assert len(rows) == len(rows_of(stages)) + 1


def test_many_stages_share_rows_by_kind_and_model_and_none_is_lost():
    suite = load_suite("pythia-training")
    stages = [planned(name) for name in sorted(stage_names(suite, list(suite.models)))]
    rows = rows_of(stages)
    assert len(rows) < 30 < len(stages)
    assert sorted(s.name for group in rows.values() for s in group) == [s.name for s in stages]
    of_70m = {m.name for m in suite.models if m.name.startswith("pythia-70m@")}
    assert len(rows[f"update-pythia-70m: {len(of_70m)} checkpoints"]) == len(of_70m)
    some = [replace(stage, finished=k < 40) for k, stage in enumerate(stages)]
    assert all(len({s.finished for s in group}) == 1 for group in rows_of(some).values())
    assert sum(map(len, rows_of(some).values())) == len(stages)


@pytest.mark.run
def test_finished_stages_are_reused_in_the_forecast_and_nothing_is_touched(tiny_suite, tiny_run):
    files = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    result = run("run", tiny_suite, "--dry-run", "--out", tiny_run, "--set", "fit.refits=1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[0].strip(): line for line in result.output.splitlines() if line.count("│") == 3}
    names = stage_names(load_suite(str(tiny_suite)), list(load_suite(str(tiny_suite)).models))
    for name in names:
        assert ("reused" in lines[name]) == (not name.startswith(("fit-", "score-"))), lines[name]
    took = json.loads((tiny_run / "manifest.json").read_text())["seconds"]
    assert f"{took['train-gpt-seed0']:.1f}" in lines["train-gpt-seed0"] or took["train-gpt-seed0"] >= 10
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == files
