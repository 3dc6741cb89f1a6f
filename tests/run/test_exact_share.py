"""A suite that asks for a share of the exact log-partitions: what is scored, said and kept, and what stays as it was."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.suites import write_suite
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.lenses import estimated
from lensbench.results import manifest
from lensbench.suite.files import load_suite

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("no_figures")]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def manifest_of(folder):
    return json.loads((folder / manifest.MANIFEST).read_text())


def test_a_share_estimates_and_one_is_what_it_was(tmp_path, monkeypatch):
    path = write_suite(tmp_path)
    whole = path.read_text().split('[[models]]\nname = "pc"')[0]

    def suite(share):
        line = "" if share is None else f"exact_share = {share}\n"
        path.write_text(whole.replace("draws = 200\n", "draws = 200\n" + line))
        return path

    out = tmp_path / "run"
    answer = run("run", suite(None), "--out", out)
    assert answer.exit_code == 0, answer.output
    exact, before = pd.read_csv(out / "transfer.csv"), (out / "transfer.csv").read_bytes()
    assert "exact_share" not in manifest_of(out)["suite"]["evaluate"]

    # 1 is the default: nothing is computed again. So is a vocabulary that is too small, and that is said.
    again = run("run", suite(1), "--out", out)
    assert again.exit_code == 0, again.output
    assert (out / "transfer.csv").read_bytes() == before
    small = run("run", suite("0.3"), "--out", out)
    assert "too small for 4096 words" in " ".join(small.output.split())
    assert (out / "transfer.csv").read_bytes() == before

    monkeypatch.setattr(estimated, "WORDS", 100)
    monkeypatch.setattr("lensbench.run.sharing.WORDS", 100)
    answer = run("run", suite("0.3"), "--out", out)
    assert answer.exit_code == 0, answer.output
    assert "30.0% of the log-partitions are exact" in " ".join(answer.output.split())
    kept = manifest_of(out)
    assert kept["suite"]["evaluate"]["exact_share"] == 0.3
    assert kept["estimated"] == {"gpt-seed0": {"share": 0.3}}
    found = pd.read_csv(out / "transfer.csv")
    assert (found["kl"] != exact["kl"]).mean() > 0.8
    half = (found["penalty_kl_ci_high"] - found["penalty_kl_ci_low"]) / 2
    assert (np.abs(found["penalty_kl"] - exact["penalty_kl"]) <= 3 * half + 1e-6).mean() > 0.95

    monkeypatch.setattr("lensbench.measures.share.LARGEST_SHARE", 0.99)
    answer = run("run", suite('"auto"'), "--out", out)
    assert answer.exit_code == 0, answer.output
    of_model = manifest_of(out)["estimated"]["gpt-seed0"]
    assert 0 < of_model["share"] <= 1
    assert {"widest", "ratio", "tokens", "documents", "intervals"} <= set(of_model)


@pytest.mark.parametrize(("share", "known"), [("0", "exact_share"), ("1.5", "exact_share"), ('"most"', "exact_share")])
def test_bad_shares_are_refused_before_anything_starts(share, known, tmp_path):
    path = write_suite(tmp_path)
    path.write_text(path.read_text().replace("draws = 200\n", f"draws = 200\nexact_share = {share}\n"))
    answer = run("run", path, "--out", tmp_path / "run")
    assert answer.exit_code == 2
    assert known in answer.output
    assert "Traceback" not in answer.output


def test_the_shipped_suites_are_exact_but_for_the_pretrained_one():
    assert load_suite("quick").evaluate.exact_share == 1
    assert load_suite("standard").evaluate.exact_share == 1
    assert load_suite("pretrained").evaluate.exact_share == "auto"
