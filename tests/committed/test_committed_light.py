"""``results/`` is light: what it leaves out is made again from what it holds."""

import re
from pathlib import Path

import pytest

from lensbench.report.figures.draw import draw_figures
from lensbench.report.page import write_page
from lensbench.results.folder import SUMS, read_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
RUNS = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob(SUMS))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md")), *sorted(RESULTS.rglob("*.md"))]


def test_results_take_at_most_15_megabytes():
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) <= 15_000_000


def test_every_picture_is_shown_by_a_text():
    shown = {
        (text.parent / target).resolve()
        for text in TEXTS
        for target in re.findall(r"\]\(([^)#\s]+\.png)\)", text.read_text())
    }
    assert sorted(RESULTS.rglob("*.png")) == sorted(path for path in shown if RESULTS in path.parents)


def test_every_run_is_in_its_light_form():
    assert len(RUNS) >= 11
    for name in RUNS:
        run = read_run(RESULTS / name)
        held = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
        figures = {f"figures/{name}" for name in run.manifest.figures}
        assert run.manifest.exported is not None
        assert {*run.manifest.files, *figures, "manifest.json"} <= held
        assert not [name for name in held if name.endswith((".html", ".parquet")) and name not in run.manifest.files]


@pytest.mark.results
@pytest.mark.parametrize("name", RUNS)
def test_every_figure_and_the_page_are_made_from_the_folder_alone(name, tmp_path):
    run = read_run(RESULTS / name)
    drawn = {path.name: path for path in draw_figures(run, tmp_path / "figures")}
    suite = run.manifest.suite.content()
    whole = suite["evaluate"].get("matrix", True)
    placed = ["plane.png"] if whole or suite.get("update") else []  # a plane needs gain visibility, or shares in place
    assert {"kl_by_layer.png", *placed, *(["transfer_penalty.png"] if whole else [])} <= set(drawn)
    for figure in run.manifest.figures:
        assert drawn[figure].read_bytes() == (RESULTS / name / "figures" / figure).read_bytes(), figure
    write_page([RESULTS / name], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for table in run.manifest.exported.tables:
        assert table in page or run.tables[table].empty
