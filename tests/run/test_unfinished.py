"""Results appear as they are finished, each with what is still missing, and the finished run is what it would have been."""

import html
import math
import re
import shutil

import pytest
from helpers.commands import csv_bytes, run
from test_run_folder import copied

from lensbench.report.unfinished import ASIDE, ModelSoFar, write_unfinished
from lensbench.results.folder import read_run, read_table
from lensbench.run import suite as run_module


@pytest.fixture(scope="module")
def committed(request):
    return read_run(request.config.rootpath / "results" / "quick")


def tables_of(run, model):
    return {
        name: table[table["model"] == model] for name, table in run.tables.items() if "model" in table and len(table)
    }


def text_of(page):
    return " ".join(
        html.unescape(re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]+>", " ", page, flags=re.S)).split()
    )


def test_a_page_of_an_unfinished_run_says_what_is_there_and_what_is_missing(committed, tmp_path):
    models = [
        ModelSoFar("gpt", ["probe block_order"], tables_of(committed, "gpt")),
        ModelSoFar("pc", ["the update decomposition", "lenses"]),
    ]
    write_unfinished(tmp_path, "Does it?", models, "lensbench run quick --limit 64", "Not finished.")
    text = text_of((tmp_path / "report.html").read_text())
    for said in (
        "Does it?",
        "Not finished. lensbench run quick --limit 64 goes on",
        "gpt Still missing: probe block_order.",
        "pc Still missing: the update decomposition, lenses.",
    ):
        assert said in text
    verdicts = committed.tables["verdicts.csv"]
    for sentence in verdicts[verdicts["model"] == "gpt"]["sentence"]:
        assert " ".join(sentence.split()) in text
    row = committed.tables["indices.csv"].query("model == 'gpt' and index == 'shared_consistency'").iloc[0]
    digits = math.ceil(-math.log10((row["ci_high"] - row["ci_low"]) / 4))
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    assert re.search(rf"shared_consistency\s+{value}\s+\[{low}, {high}\]", text)


def test_the_tables_so_far_lie_aside(committed, tmp_path):
    write_unfinished(tmp_path, "?", [ModelSoFar("gpt", (), tables_of(committed, "gpt"))], "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", ASIDE}
    lenses = read_table(tmp_path / ASIDE / "lenses.csv")
    expected = committed.tables["lenses.csv"]
    assert len(lenses) == (expected["model"] == "gpt").sum()


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_run_leaves_its_numbers_and_the_command_that_goes_on(
    tiny_suite, tiny_run, tmp_path, monkeypatch
):
    out = copied(tiny_run, tmp_path / "run")
    (out / "manifest.json").unlink()  # it was cut short before its tables
    shutil.rmtree(out / "stages" / "score-pc-seed0")
    given = ["run", str(tiny_suite), "--out", str(out)]
    with monkeypatch.context() as patched:
        scoring = run_module.scoring

        def interrupted(context, model, seed):
            if model.name == "pc":
                raise KeyboardInterrupt
            return scoring(context, model, seed)

        patched.setattr(run_module, "scoring", interrupted)
        result = run(*given)
    assert result.exit_code == 130
    assert "score-gpt-seed0: " in result.output
    text = text_of((out / "report.html").read_text())
    assert "interrupted before it finished" in text
    assert " ".join(["lensbench", *given, "goes on"]) in text
    assert "gpt Measured" in text
    assert "pc Still missing: lenses by layer" in text
    assert "pc+state Still missing: the update decomposition" in text
    assert len(read_table(out / ASIDE / "models.csv")) == 1
    assert run(*given).exit_code == 0
    assert csv_bytes(out) == csv_bytes(tiny_run)
    assert not (out / ASIDE).exists()
    assert "unfinished" not in (out / "report.html").read_text()


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_the_page_of_a_finished_run_stands_until_the_next_one_is_finished(tiny_suite, tiny_run, tmp_path, monkeypatch):
    out = copied(tiny_run, tmp_path / "run")
    page = (out / "report.html").read_bytes()
    shutil.rmtree(out / "stages" / "score-pc-seed0")
    monkeypatch.setattr(run_module, "probing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("run", tiny_suite, "--out", out).exit_code == 130
    assert (out / "report.html").read_bytes() == page
    assert not (out / ASIDE).exists()
