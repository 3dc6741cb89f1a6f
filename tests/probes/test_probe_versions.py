"""Versions of probes: numbers of an older one are not reused, and not compared with those of a newer one."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers.suites import write_suite
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.probes.registry import PROBES
from lensbench.report.probe_versions import of_one_version
from lensbench.results.folder import Run, read_run
from lensbench.results.manifest import Manifest


def run_with(versions, probes=("few_shot", "accuracy")):
    bare = Manifest.of_tables(Path("a"), ["gpt"])
    manifest = bare.model_copy(update={"probe_versions": versions})
    return Run(Path("a"), manifest, {"probes.csv": pd.DataFrame({"probe": list(probes), "value": 1.0})})


def test_quantities_of_probes_whose_versions_differ_are_left_out_of_a_comparison_with_one_line():
    older, newer = run_with({}), run_with({"few_shot": 2, "accuracy": 1})
    kept, lines = of_one_version([older, newer])
    assert [list(run.tables["probes.csv"]["probe"]) for run in kept] == [["accuracy"], ["accuracy"]]
    assert lines == ["probe few_shot is left out: the runs hold its versions 1 and 2; run the older again"]
    same, none = of_one_version([newer, newer])
    assert none == []
    assert len(same[0].tables["probes.csv"]) == 2


def test_a_probe_that_only_one_run_has_is_not_left_out():
    kept, lines = of_one_version([run_with({}, ("accuracy",)), run_with({"few_shot": 2}, ("few_shot",))])
    assert lines == []
    assert [len(run.tables["probes.csv"]) for run in kept] == [1, 1]


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_probe_of_a_newer_version_is_measured_again_and_the_manifest_names_it(tmp_path, monkeypatch):
    asked = 'name = "tiny"\nthreads = 1\nprobes = ["gradient_steps", "accuracy"]'
    suite, out = write_suite(tmp_path, **{'name = "tiny"': asked}), tmp_path / "out"

    def once():
        result = CliRunner().invoke(app, ["run", str(suite), "--only", "gpt", "--out", str(out)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "probe-gradient_steps-gpt-seed0: done" in once()
    assert read_run(out).manifest.probe_versions == {"gradient_steps": 1, "accuracy": 1}
    monkeypatch.setitem(PROBES, "gradient_steps", replace(PROBES["gradient_steps"], version=7))
    again = once()
    assert "probe-gradient_steps-gpt-seed0: done" in again
    assert "probe-accuracy-gpt-seed0: done" not in again
    assert read_run(out).manifest.probe_versions["gradient_steps"] == 7
