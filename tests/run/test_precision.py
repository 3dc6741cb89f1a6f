"""Scoring to a stated precision: goes on until every penalty's interval is narrow enough, or says why it does not."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.suites import without_figures, write_suite
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.results import manifest

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("no_figures")]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    """A finished run of one model on few sequences, and a function that writes its suite with a precision."""
    folder = tmp_path_factory.mktemp("precision")
    path = write_suite(folder)
    content = path.read_text().split('[[models]]\nname = "pc"')[0].replace("sequences = 96\n", "sequences = 16\n")

    def suite(precision):
        line = "" if precision is None else f"precision = {precision}\n"
        path.write_text(content.replace("draws = 200\n", "draws = 200\n" + line))
        return path

    out = folder / "run"
    with without_figures():
        assert run("run", suite(None), "--out", out).exit_code == 0
    return suite, out


def widest(folder):
    table = pd.read_csv(folder / "transfer.csv")
    return max(float((table[f"penalty_{k}_ci_high"] - table[f"penalty_{k}_ci_low"]).max() / 2) for k in ("kl", "ce"))


def test_goes_on_until_the_precision_is_reached_and_says_what_it_took(one_model, tmp_path):
    suite, out = one_model
    before = widest(out)
    folder = shutil.copytree(out, tmp_path / "run")
    answer = run("run", suite(0.5 * before), "--out", folder)
    assert answer.exit_code == 0, answer.output
    kept = json.loads((folder / manifest.MANIFEST).read_text())
    plan = kept["precision"]["models"]["gpt-seed0"]
    assert plan["reached"]
    assert plan["half_width"] <= 0.5 * before
    assert plan["sequences"] > 16
    assert kept["scored"]["sequences"] == plan["sequences"]
    # The bootstrap of the tables and the linearised width of the plan are two estimates of one thing.
    assert widest(folder) == pytest.approx(plan["half_width"], rel=0.35)
    assert "predicted to take" in answer.output
    assert "half-width" in answer.output


def test_refuses_what_would_take_too_long_and_keeps_what_was_there(one_model, tmp_path):
    suite, out = one_model
    folder = shutil.copytree(out, tmp_path / "run")
    tables = {p.name: p.read_bytes() for p in folder.glob("*.csv")}
    answer = run("run", suite(1e-9), "--out", folder, "--max-hours", "0.001")
    assert answer.exit_code == 2
    assert "--max-hours 0.001" in answer.output
    assert "predicted" in answer.output
    assert "Traceback" not in answer.output
    assert {p.name: p.read_bytes() for p in folder.glob("*.csv")} == tables


def test_says_so_where_the_text_has_no_more(one_model, tmp_path):
    suite, out = one_model
    folder = shutil.copytree(out, tmp_path / "run")
    answer = run("run", suite(1e-4), "--out", folder, "--max-hours", "1000")
    assert answer.exit_code == 0, answer.output
    assert "the text has no more" in answer.output
    plan = json.loads((folder / manifest.MANIFEST).read_text())["precision"]["models"]["gpt-seed0"]
    assert not plan["reached"]
    assert plan["half_width"] > 1e-4
    assert np.isfinite(plan["half_width"])


@pytest.mark.parametrize("precision", ["0", "-0.1"])
def test_precision_has_to_be_above_zero(one_model, tmp_path, precision):
    suite, _ = one_model
    answer = run("run", suite(precision), "--out", tmp_path / "new")
    assert answer.exit_code == 2
    assert "precision" in answer.output
    assert "Traceback" not in answer.output
