"""What a reader sees first, in a real browser: an answer for each model, and where its prediction grows; nothing hidden."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.pages import browser, opened  # noqa: F401 (a fixture)
from PIL import Image

from benchmarks.texts.screenshots import SHOTS
from lensbench.report.landmarks import SUITE, landmark_table, landmarks_for, suite_landmarks
from lensbench.report.number_cells import aligned
from lensbench.report.page import page
from lensbench.report.page_tables import page_columns
from lensbench.results.folder import Run, read_run

RESULTS = Path(__file__).resolve().parents[2] / "results"


PARTS = ("standard/gpt", "standard/pc", "standard/controls")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}

HIDDEN = """() => [...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('svg') && e.tagName !== 'svg' || e.id === 'tip') return false;
  const wide = e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline';
  return wide || e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.tagName + '.' + e.className)"""
"""Elements that reach beyond the screen, or that hold more than they show"""


@pytest.fixture(scope="module")
def quick() -> Run:
    return read_run(RESULTS / "quick")


@pytest.fixture(scope="module")
def pages(quick: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one model, of three, and of many."""
    one = {name: table[table["model"] == "gpt"] if "model" in table else table for name, table in quick.tables.items()}
    runs = {"one": [replace(quick, tables=one)], "three": [quick], "many": [read_run(RESULTS / part) for part in PARTS]}
    folder = tmp_path_factory.mktemp("pages")
    for name, of in runs.items():
        (folder / f"{name}.html").write_text(page(of))
    return {name: folder / f"{name}.html" for name in runs}


@pytest.mark.slow
@pytest.mark.parametrize("screen", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", ["one", "three"])
def test_a_sentence_and_the_blocks_of_each_model_are_on_the_first_screen(browser, pages, name, screen):  # noqa: F811
    tab, told, asked = opened(browser, pages[name], viewport=screen)
    answers = tab.locator("article.answer")
    assert answers.count() == (1 if name == "one" else 3)
    for answer in answers.all():
        assert re.search(r"\d+ % \[\d+, \d+\] of what later layers add", answer.text_content())
        box = answer.locator("svg").bounding_box()
        assert box["y"] + box["height"] <= screen["height"]
        assert answer.locator("svg rect[data-tip]").count() >= 10
    assert told == []
    assert asked == [f"file://{pages[name]}"]
    tab.close()


@pytest.mark.slow
def test_the_answers_on_fifteen_models_are_on_the_first_screen_with_what_their_colours_mean(browser, pages):  # noqa: F811
    tab, _, _ = opened(browser, pages["many"], viewport=DESK)
    rows = tab.locator("#table-answers tbody tr").all()
    assert len(rows) == 15
    for part in [*rows, tab.locator("#answers .key")]:
        box = part.bounding_box()
        assert box["y"] + box["height"] <= DESK["height"]
    verdict = tab.locator("#table-answers td.wrap span[data-tip]").first
    assert verdict.text_content() == "added up"
    verdict.hover()
    assert tab.locator("#tip").text_content().startswith("added up in one representation. From layer 1 on ")
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "three", "many"])
def test_a_phone_hides_nothing_beyond_its_edge(browser, pages, name):  # noqa: F811
    tab, told, _ = opened(browser, pages[name], viewport=PHONE)
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # opens what is folded
    assert tab.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    assert tab.evaluate(HIDDEN) == []
    assert told == []
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "three", "many"])
def test_paper_cuts_nothing_off_its_edge(browser, pages, name):  # noqa: F811
    tab, told, _ = opened(browser, pages[name], viewport={"width": 794, "height": 1123})  # A4
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(HIDDEN) == []
    assert told == []
    tab.close()


@pytest.mark.slow
def test_many_models_are_one_table_that_sorts_by_pointer_and_keyboard(browser, pages):  # noqa: F811
    tab, told, asked = opened(browser, pages["many"], viewport=DESK)
    table = tab.locator("#table-answers")
    assert table.bounding_box()["y"] < 200
    assert not tab.evaluate("(t => t.scrollWidth > t.parentNode.clientWidth)(document.querySelector('#table-answers'))")
    heads = [text.strip() for text in table.locator("thead th").all_text_contents()]
    assert len(set(heads)) == len(heads)
    at = heads.index("added in place")

    def values():
        cells = table.locator(f"tbody tr > :nth-child({at + 1})").all()
        found = [cell.get_attribute("data-value") for cell in cells]
        return [float(value) for value in found if value is not None]

    before = values()
    assert len(before) >= 10
    button = table.locator("thead button").nth(heads.index("model"))
    table.locator("thead th").nth(at).locator("button").click()
    assert values() == sorted(before)
    tab.keyboard.press("Enter")
    assert values() == sorted(before, reverse=True)
    button.focus()
    tab.keyboard.press("Space")
    names = [text.strip() for text in table.locator("tbody th").all_text_contents()]
    assert names[0] == "gpt"
    assert table.locator("thead th").nth(0).get_attribute("aria-sort") == "ascending"
    table.locator("tbody svg rect[data-tip]").first.hover()
    assert "adds in place" in tab.locator("#tip").text_content()
    assert told == []
    assert asked == [f"file://{pages['many']}"]
    tab.close()


@pytest.mark.slow
def test_every_entry_of_the_contents_leads_to_a_section_and_no_question_stands_twice(browser, pages, quick):  # noqa: F811
    tab, _, _ = opened(browser, pages["three"], viewport=DESK)
    targets = [link.get_attribute("href") for link in tab.locator("nav a").all()]
    assert len(targets) >= 7
    assert all(tab.locator(target).count() == 1 for target in targets)
    text = tab.locator("body").evaluate("e => [...e.querySelectorAll('h1,h2,p')].map(x => x.textContent).join('\\n')")
    assert text.count(quick.manifest.suite.question) == 1
    for table in tab.locator("table.flow").all():
        heads = table.locator("thead th").all_text_contents()
        assert len(set(heads)) == len(heads)
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three", "many"])
def test_names_in_the_plane_lie_on_no_other_name(browser, pages, name):  # noqa: F811
    tab, _, _ = opened(browser, pages[name], viewport=DESK)
    boxes = tab.evaluate(
        "[...document.querySelectorAll('.plane g text')].map(t => { const b = t.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom, t.textContent, [...document.querySelectorAll('.plane')]"
        ".indexOf(t.closest('.plane'))]; })"
    )
    assert len(boxes) >= 6
    for k, (left, top, right, bottom, text, of) in enumerate(boxes):
        for left2, top2, right2, bottom2, text2, of2 in boxes[k + 1 :]:
            apart = right <= left2 + 2 or right2 <= left + 2 or bottom <= top2 + 3 or bottom2 <= top + 3
            assert apart or of != of2, (text, text2)
    tab.close()


# Without a browser


def test_decimal_points_of_a_column_stand_below_each_other_and_digits_follow_the_interval():
    cells = aligned(
        [(0.5803, 0.5223, 0.6381), (-10.155, -11.48, -8.83), None, (29.0, 25.0, 33.0), (1234.0, None, None)]
    )
    assert [cell.text.strip("\u2007\u2008") for cell in cells] == ["0.58", "\u221210.2", "", "29", "1,234"]
    assert [cell.interval for cell in cells] == ["[0.52, 0.64]", "[\u221211.5, \u22128.8]", "", "[25, 33]", ""]
    assert {len(cell.text) for cell in cells if cell.text} == {len("1,234") + len(".58")}
    assert {cell.text.index(".") for cell in cells if "." in cell.text} == {len("1,234")}
    assert [cell.value for cell in cells] == [0.5803, -10.155, None, 29.0, 1234.0]


def test_an_interval_stands_in_the_column_of_its_quantity_and_a_range_over_refits_is_named(quick):
    for name in ("models.csv", "indices.csv", "tolerances.csv", "lenses.csv"):
        names = [column.name for column in page_columns(quick.tables[name])]
        assert len(set(names)) == len(names)
        assert not [name for name in names if name.endswith(("ci_low", "ci_high")) or name in ("fit_low", "fit_high")]
    assert {"value [95 %]", "range over refits"} <= {c.name for c in page_columns(quick.tables["indices.csv"])}


@pytest.mark.results
def test_the_landmarks_of_the_package_are_the_models_of_standard(quick):
    runs = [read_run(RESULTS / part) for part in PARTS]
    table = suite_landmarks()
    assert table.equals(landmark_table(runs).reset_index(drop=True))
    assert set(table["known"]) >= {"one representation", "carry-along", "re-representation"}
    assert landmarks_for([quick]).equals(table)
    assert {run.manifest.suite_name for run in runs} == {SUITE}
    assert landmarks_for(runs).empty


def test_the_gallery_shows_every_screenshot_and_each_is_small():
    shown = (RESULTS / "gallery.md").read_text()
    for name, shot in SHOTS.items():
        file = RESULTS / "gallery" / f"{name}.png"
        assert f"](gallery/{name}.png)" in shown
        assert file.stat().st_size <= 80_000
        with Image.open(file) as picture:
            assert picture.size == (shot.width, shot.height)
        assert all((RESULTS / run / "manifest.json").is_file() for run in shot.runs)


@pytest.mark.slow
def test_a_screenshot_is_written_of_the_page_it_names(browser, pages, tmp_path):  # noqa: F811
    # In a process of its own: Playwright opens no second browser in one that has one.
    code = (
        "from pathlib import Path; from benchmarks.texts.screenshots import write_screenshots; "
        f"write_screenshots({{'page-on-a-phone': Path({str(pages['three'])!r})}}, Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=RESULTS.parent, check=True)
    with Image.open(tmp_path / "page-on-a-phone.png") as picture:
        assert picture.size == (390, 844)
        assert len(picture.getcolors()) > 8
