"""The benchmark of whole runs: rows by stage, with what was predicted and the floor."""

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speed import whole
from lensbench.run.costs import Cost, Work
from lensbench.run.forecast import Forecast, PlannedStage
from lensbench.runtime.rates import Rates


def test_rows_have_the_stages_that_were_predicted_and_those_that_took_time():
    rates = Rates(model=2e9, single=1e9, double=1e9, eigen=1e9, words=1e9, copied=1e9)
    stage = PlannedStage("update-m-seed0", 7.0, Cost(Work(model=6e9), 0.0), finished=False, floor=3.0)
    rows = whole.stage_rows(Forecast([stage], {"float32": rates}), {"update-m-seed0": 8.5, "figures": 0.5})
    assert rows[0] == {"stage": "update-m-seed0", "seconds": 8.5, "predicted": 7.0, "floor": 3.0}
    assert rows[1] == {"stage": "figures", "seconds": 0.5, "predicted": None, "floor": None}


@pytest.mark.run
def test_a_whole_run_is_predicted_and_measured(tmp_path, tiny_run, tiny_suite):
    given = {
        "fit.sequences": 64, "fit.positions": 8, "fit.dev_sequences": 64, "fit.dev_positions": 4, "evaluate.sequences": 64,
        "evaluate.positions": 4, "evaluate.length": 32,
    }  # fmt: skip
    changes = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    where = ["--model", f"path:{tiny_run}/stages/train-gpt-seed0", "--text", f"file:{tiny_suite.parent}/texts"]
    app = typer.Typer()
    app.command()(whole.main)
    result = CliRunner().invoke(
        app, [*where, "--device", "cpu", "--presets", "glance", "--out", str(tmp_path), *changes]
    )
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "whole.csv").set_index("stage")
    total = table.loc[whole.WHOLE]
    stages = table.drop(whole.WHOLE)
    assert {stage.split("-")[0] for stage in stages.index} >= {"begin", "update", "fit", "score"}
    assert total["seconds"] > stages["seconds"].max()
    assert total["predicted"] == pytest.approx(stages["predicted"].sum(), rel=1e-3)
    assert (stages["floor"].dropna() <= stages["predicted"].dropna() + 1e-9).all()
    assert 0 < total["peak_gib"] < 24
