"""What the documentation shows runs: the README's example, the guide's model, lens and measure, the tour, the schema."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.gpt_windows import windows
from matplotlib.figure import Figure

import lensbench
from lensbench.lenses import KINDS
from lensbench.models import FAMILIES
from lensbench.probes.registry import PROBES
from lensbench.report.figures.blocks import frame_of, profile_frame
from lensbench.results import schema as results
from lensbench.results.folder import numbered
from lensbench.suite.files import load_suite

ROOT = Path(__file__).resolve().parents[2]


def blocks(name: str, heading: str) -> list[str]:
    """Blocks of Python behind a heading, or the words that lead up to them."""
    text = (ROOT / name).read_text().partition(heading)[2]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_readmes_example_gives_a_verdict_a_matrix_and_their_figures(
    tiny_run, tiny_suite, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("README.md", "# lensbench")
    assert len([line for line in example.splitlines() if line.strip()]) == 6
    example = example.replace("runs/quick", str(tiny_run)).replace(
        '"stdlib"', f'"file:{tiny_suite.parent}/texts", length=64, recipe=recipe'
    )
    names: dict = {"recipe": load_suite(str(tiny_suite)).fit}
    exec(example, names)
    for name in ("profile.png", "transfer.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == names["found"].sentence


def of_gpt(run: Path, name: str) -> pd.DataFrame:
    """The rows of a table of the tiny run that are about ``gpt``."""
    table = lensbench.read_run(run).tables[name]
    return table[table["model"] == "gpt"].reset_index(drop=True)


def same(ours: pd.DataFrame, written: pd.DataFrame) -> None:
    """Whether a table has the rows that a run wrote, in whatever order.

    A file has 9 digits, seeds as text, and nothing for an empty text.
    """
    ours = ours.assign(seed=ours["seed"].astype(str)).replace({"": None})
    keys = [name for name in ("landmark", "setting", "index", "from_layer", "to_layer", "distance") if name in ours]
    ours, written = (
        table.astype(object).where(table.notna(), None).sort_values(keys, ignore_index=True)
        for table in (ours, written[list(ours.columns)])
    )
    pd.testing.assert_frame_equal(ours, written, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def tiny_gpt(tiny_run):
    return lensbench.load(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")


def test_what_is_measured_in_python_is_what_a_run_writes_of_the_same_tokens(tiny_gpt, tiny_run, tiny_suite):
    suite = load_suite(str(tiny_suite))
    lenses = lensbench.fit(tiny_gpt, suite.corpus.spec, length=64, recipe=suite.fit, name="gpt")
    assert repr(lenses) == "Lenses('gpt', 3 layers of width 16, " + repr(lenses).partition("16, ")[2]
    assert "\n" not in repr(lenses)
    found = lensbench.evaluate(
        lenses, sequences=96, positions=8, draws=200, update=lensbench.UpdateRecipe(landmarks=False)
    )
    ours, written = found["transfer.csv"], of_gpt(tiny_run, "transfer.csv")
    for column in ("kl", "ce", "penalty_ce", "penalty_ce_ci_low", "movement_kl"):
        assert ours[column].to_numpy() == pytest.approx(written[column].to_numpy(), rel=1e-5, abs=1e-7), column
    matrix = lensbench.transfer_matrix(lenses, sequences=96, positions=8, draws=200)
    assert len(matrix) == 16
    assert set(matrix.columns) == set(results.SCHEMA["transfer.csv"]) - set(results.ASKED_COLUMNS["transfer.csv"])
    pd.testing.assert_frame_equal(matrix[list(ours.columns)], ours, check_dtype=False, rtol=1e-6, atol=1e-9)
    assert isinstance(lensbench.plot(ours), Figure)
    same(numbered("update.csv", found["update.csv"]), of_gpt(tiny_run, "update.csv"))
    assert found["landmarks.csv"].empty
    columns = ["scope", "verdict", "gate", "fixed_lens_verdict"]
    pd.testing.assert_frame_equal(found["verdicts.csv"][columns], of_gpt(tiny_run, "verdicts.csv")[columns])
    drawn = lensbench.plot_profile(found)
    assert [panel.get_title(loc="left").partition(":")[0] for panel in drawn.axes] == ["gpt"]
    without = lensbench.evaluate(lenses, sequences=16, positions=4, draws=20, update=False)
    assert "update.csv" not in without
    with pytest.raises(lensbench.LensbenchError, match=r"the tables have no row in blocks\.csv"):
        lensbench.plot_profile(without)


def test_updates_in_python_are_those_that_a_run_writes_of_the_same_tokens(tiny_gpt, tiny_run, tiny_suite):
    suite = load_suite(str(tiny_suite))
    found = lensbench.decompose(
        tiny_gpt, suite.corpus.spec, length=64, recipe=suite.fit, sequences=96, positions=8, name="gpt"
    )
    for name in results.OF_UPDATES:
        same(found.tables[name], of_gpt(tiny_run, name))
    written = of_gpt(tiny_run, "indices.csv").set_index("index").loc[found.indices["index"]].reset_index()
    same(found.indices, written)
    assert {"in_place", "in_place_without_layer0", "readable_gain"} <= set(found.indices["index"])
    verdicts = of_gpt(tiny_run, "verdicts.csv")
    same(found.verdicts.assign(index=found.verdicts["scope"]), verdicts.assign(index=verdicts["scope"]))
    (later,) = verdicts[verdicts["scope"] == "without layer 0"].to_dict("records")
    assert (found.verdict, found.sentence) == (later["verdict"], later["sentence"])
    assert repr(found) == f"Updates('gpt', 3 layers, seed 0: {later['verdict']})"
    assert len(found.pairs) == 3
    assert len(found.blocks) in (1, 2)
    assert set(found.landmarks["landmark"]) == {"rotated", "carried", "drifting", "shuffled"}
    ours, theirs = frame_of(found.tables), profile_frame(lensbench.read_run(tiny_run)).query("model == 'gpt'")
    pd.testing.assert_frame_equal(
        ours.drop(columns="name"), theirs.drop(columns="name").reset_index(drop=True), check_dtype=False, rtol=1e-6
    )
    assert isinstance(lensbench.plot_profile(found), Figure)


def test_the_matrix_alone_reads_no_other_lens(tiny_gpt, tiny_suite, monkeypatch):
    monkeypatch.setattr("lensbench.api.evaluate_lenses", lambda *_, **__: pytest.fail("more than the matrix"))
    suite = load_suite(str(tiny_suite))
    lenses = lensbench.fit(tiny_gpt, suite.corpus.spec, length=64, recipe=suite.fit, progress=False)
    assert len(lensbench.transfer_matrix(lenses, sequences=8, positions=4, draws=10)) == 16


def test_the_commands_are_there_before_anything_heavy_is_imported():
    code = (
        "import sys, lensbench.cli; print(sorted({'torch', 'transformers', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_lensbench_takes_no_time_and_no_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import lensbench; spent = time.perf_counter() - start\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules), 'a heavy import'\n"
        "assert set(lensbench.__all__) <= set(dir(lensbench))\n"
        "print(spent)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(found.stdout) < 0.3
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lensbench.nonsense


def test_every_public_name_says_what_it_is():
    for name in lensbench.__all__:
        assert getattr(lensbench, name).__doc__, name


def test_the_guides_model_lens_and_measure_work(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt-quiet", FAMILIES["gpt"])  # removed again after the test
    monkeypatch.setitem(PROBES, "state_length", PROBES["accuracy"])
    monkeypatch.setitem(KINDS, "mean_shift", KINDS["tuned"])
    names: dict = {"windows": windows()}
    for block in blocks("benchmarks/extending.md", "# Adding a model, a lens, a measure")[:3]:
        exec(block, names)
    assert names["model"].num_parameters() == pytest.approx(20_000, rel=0.01)
    assert names["kl"].shape == (3,)
    assert (names["kl"] >= -1e-6).all()
    from lensbench.probes.subject import Subject

    stream, maps = names["stream"], names["lenses"]
    subject = Subject(stream, windows(), [0], maps, False, lambda split: names["seen"], maps, maps)
    table = PROBES["state_length"].measure(subject).frame(200)
    assert len(table) == 3
    assert (table["ci_low"] <= table["value"]).all()
    assert table["value"].notna().all()
    held = names["seen"].states
    own = (held[1].square().mean(-1) / held[-1].square().mean(-1)).sqrt().mean()
    assert table["value"].iloc[1] == pytest.approx(float(own), rel=1e-5)
    torch.testing.assert_close(maps.offset[0], held[-1].mean(0) - held[0].mean(0), rtol=0, atol=1e-6)


def test_a_file_of_the_package_imports_as_the_guide_says_from_modules_and_not_from_the_package_that_lists_it():
    block = blocks("benchmarks/extending.md", "## Making it part of lensbench")[0]
    exec(block, {})
    for module in re.findall(r"^from (\S+) import", block, re.M):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_schema_that_is_told_is_that_of_the_code():
    text = results.tables_text()
    assert text in (ROOT / "results" / "columns.md").read_text()
    assert results.indices_text() in (ROOT / "results" / "indices.md").read_text()
    for name, columns in results.SCHEMA.items():
        section = text.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
        assert section, name
        there = section + (text.partition("## `update.csv`\n")[2].partition("\n## ")[0] if name == "blocks.csv" else "")
        assert [c for c in columns if f"`{c}`" not in there] == [], name


def test_the_committed_tour_ran_whole_and_shows_no_interval_that_is_not_to_be_trusted():
    cells = [
        cell for cell in json.loads((ROOT / "benchmarks" / "tour.ipynb").read_text())["cells"] if "outputs" in cell
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "it ran whole, in order"
    assert (ROOT / "benchmarks" / "tour.ipynb").stat().st_size <= 150_000
    told = json.dumps([cell["outputs"] for cell in cells])
    assert '"output_type": "error"' not in told
    assert "not to be trusted" not in told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tour_runs_from_its_first_cell_to_its_last_on_a_small_model(tiny_run, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "benchmarks" / "tour.ipynb", as_version=4)
    (setting,) = [cell for cell in notebook.cells if cell.source.startswith("# A model is")]
    small = tiny_run / "stages" / "train-gpt-seed0"
    few = " ".join(f"--set {key}=8" for key in ("fit.positions", "fit.dev_positions", "evaluate.positions"))
    options = f"--preset glance --limit 64 --set evaluate.length=32 {few}"
    setting.source = f'MODEL, OPTIONS = "path:{small}", "{options}"'
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output for output in told), "the figure is shown"
    assert "report.html" in told[-1]
    assert (tmp_path / "trace.html").is_file()


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_probe_of_a_script_is_measured_on_a_finished_run_as_the_guide_says(tiny_suite, tiny_run, tmp_path):
    """Nothing but the probe is computed."""
    text = (ROOT / "benchmarks" / "extending.md").read_text().partition("A **probe** is")[2]
    probe, command_line = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    (shown,) = re.findall(r"^python my_probe\.py (run quick --set .*) --out runs/quick$", text, re.M)
    assert "state_length" in shown
    (tmp_path / "my_probe.py").write_text(f"{probe}\n{command_line}")
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    before = {path.name for path in (tmp_path / "run" / "stages").iterdir()}
    words = [str(tiny_suite) if word == "quick" else word for word in shlex.split(shown)]
    done = subprocess.run(
        [sys.executable, "my_probe.py", *words, "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    new = {path.name for path in (tmp_path / "run" / "stages").iterdir()} - before
    assert {name for name in new if "probe" not in name} == set()
    table = lensbench.read_run(tmp_path / "run").tables["probes.csv"]
    measured = table[table["quantity"] == "state_length"]
    assert {f"probe-state_length-{model}-seed0" for model in measured["model"]} == new
    assert set(measured["model"]) == {"gpt", "pc", "pc+state"}


def test_the_tour_is_written_without_what_differs_from_run_to_run(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(str(ROOT))  # where benchmarks/ lies
    from benchmarks.texts.tour import KEPT, TOUR, without_times

    notebook = nbformat.read(TOUR, as_version=4)
    before = nbformat.writes(notebook)
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99"}
    notebook.cells[1].metadata = {"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}}
    assert nbformat.writes(without_times(notebook)) == before
    assert notebook.metadata["kernelspec"] == KEPT["kernelspec"]
