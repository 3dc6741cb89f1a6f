"""Pictures in ``results/`` that stand for several runs, or for a run elsewhere, show what the tables hold now."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.texts.families import DECLARED, Families
from benchmarks.texts.screenshots import SHOTS, SHOWN, shown_now
from lensbench.report.claims import LEVEL
from lensbench.report.figures.between import between_figure
from lensbench.report.figures.draw import draw_figures
from lensbench.report.figures.style import style, write_figure
from lensbench.report.joining import grouped, joined, together
from lensbench.report.light_between import DPI
from lensbench.report.trends import draw_trends, shown_indices, trends_of
from lensbench.results.folder import SUMS, read_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"

GALLERY_DPI = 90

OF_SEVERAL = {
    "standard/figures": ("standard/gpt", "standard/pc", "standard/controls"),
    "predictive-coding/figures": ("predictive-coding/gpt", "predictive-coding/pc"),
    "gallery": ("quick",),
}
"""Folder of figures -> the runs that they are drawn from, as CONTRIBUTING.md says"""

WITHOUT_SUMS = ("lenses", "probes/smollm2")
"""Runs with figures whose light form has no sums by cluster; of the others, see test_committed_light.py"""

OF_SERIES = {"scale": ("scale/16k", "scale/64k", "scale/250k"), "training": ("training",)}
"""Folder of trends -> its runs"""


def same_as_drawn(drawn: list[Path], folder: Path) -> None:
    """Fail where a picture in ``folder`` is not the one that was drawn."""
    for path in drawn:
        assert path.read_bytes() == (folder / path.name).read_bytes(), f"{folder / path.name} shows older numbers"


@pytest.mark.results
@pytest.mark.parametrize("folder", OF_SEVERAL)
def test_figures_of_several_runs_and_of_the_gallery_are_those_of_their_tables(folder, tmp_path):
    runs = [read_run(RESULTS / name) for name in OF_SEVERAL[folder]]
    names = sorted({path.stem for path in (RESULTS / folder).glob("*.png")} - set(SHOTS))
    dpi = {"dpi": GALLERY_DPI} if folder == "gallery" else {}
    assert f"results/{folder}" in (ROOT / "CONTRIBUTING.md").read_text()
    assert len(names) >= 2
    whole = together([joined(parts) for parts in grouped(runs)])
    same_as_drawn(draw_figures(whole, tmp_path, names=names, **dpi), RESULTS / folder)


@pytest.mark.results
@pytest.mark.parametrize("name", WITHOUT_SUMS)
def test_figures_of_a_run_without_sums_are_those_of_its_tables(name, tmp_path):
    run = read_run(RESULTS / name)
    names = [Path(figure).stem for figure in run.manifest.figures]
    same_as_drawn(draw_figures(run, tmp_path, names=names), RESULTS / name / "figures")


def test_every_picture_of_numbers_is_drawn_again_by_a_test():
    """But for the figure of a study, which its manifest has a checksum of."""
    held = {path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.png")}
    runs = {f"{path.parent.relative_to(RESULTS).as_posix()}/figures" for path in RESULTS.rglob(SUMS)}
    tested = {
        *OF_SEVERAL,
        *(f"{name}/figures" for name in (*OF_SERIES, *WITHOUT_SUMS)),
        "training-between",
        "vision",
        ".",
    }
    assert held - runs - tested == {"predictive-coding/in-context"}


@pytest.mark.results
@pytest.mark.parametrize("folder", OF_SERIES)
def test_figures_of_series_are_those_of_their_tables_and_their_titles_count_what_texts_say(folder, tmp_path):
    """A title that counts by another rule than the page contradicts it: consistency fell in three families, and in four."""
    trends = trends_of([RESULTS / name for name in OF_SERIES[folder]])
    shown = shown_indices(trends, [], everything=False)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lensbench.report.figures.trends.title_and_caption", lambda _, title, caption: said.append(title))
        draw_trends(trends, shown, tmp_path / "title")
    same_as_drawn(draw_trends(trends, shown, tmp_path), RESULTS / folder / "figures")
    assert set(shown) == set(DECLARED), "p is corrected over the same indices"
    texts = Families(RESULTS, OF_SERIES[folder]).trends
    sure = texts[texts["p_holm"].astype(float) < LEVEL]
    counts = {"rises": int((sure["slope"] > 0).sum()), "falls": int((sure["slope"] < 0).sum())}
    for way, count in counts.items():
        assert sum(int(number) for number in re.findall(rf"{way} in (\d+)", said[0])) == count, way


@pytest.mark.results
def test_the_figure_of_lenses_between_checkpoints_is_that_of_its_table(tmp_path):
    folder = RESULTS / "training-between"
    with style():
        write_figure(between_figure(pd.read_csv(folder / "between.csv.xz")), tmp_path / "between.png", dpi=DPI)
    same_as_drawn([tmp_path / "between.png"], folder)


def test_every_screenshot_shows_the_tables_as_they_are():
    """Taken before a run was made again it would show older numbers: run ``python -m benchmarks.texts.screenshots``."""
    assert json.loads(SHOWN.read_text()) == shown_now()
