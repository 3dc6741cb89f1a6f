"""The page of a run: self-contained, right in its numbers, and working in a real browser."""

import json
import lzma
import math
import re
import shutil
from pathlib import Path

import pytest
from helpers.commands import refused, run
from helpers.pages import Read, browser, opened  # noqa: F401 (a fixture)
from scipy import stats

from lensbench.report.page import mean_cells, page, write_page
from lensbench.report.page_tables import csv_link
from lensbench.results import folder
from lensbench.results.manifest import write_manifest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


MODELS = "vit", "cnn-residual", "cnn-residual-slow", "cnn-plain"


@pytest.fixture(scope="module")
def vision() -> str:
    return page([folder.read_run(RESULTS / "vision")])


@pytest.mark.results
def test_a_page_asks_for_nothing_outside_itself_and_is_well_formed(vision):
    read = Read(vision)
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert "@import" not in vision
    assert "url(" not in vision
    assert "fetch(" not in vision
    assert vision == page([folder.read_run(RESULTS / "vision")])


@pytest.mark.results
def test_every_picture_has_an_alternative_text(vision):
    pictures = [a for tag, a in Read(vision).tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(pictures) == 4 + 4 + 2 + 2 * 4  # profiles, small and whole, two planes, and two of each model
    assert all(a["role"] == "img" and len(a["aria-label"]) > 60 for a in pictures)
    profiles, plane = [a["aria-label"] for a in pictures[4:8]], pictures[9]["aria-label"]
    assert profiles == [a["aria-label"] for a in pictures[:4]]
    assert all(f"each block of {m} keeps" in p for m, p in zip(MODELS, profiles, strict=True))
    assert "keeps (clarity) 0.025 [0.006, 0.045]" in profiles[3]
    assert "cnn-plain" in plane
    assert "[-0.07, 0.14]" in plane


@pytest.mark.results
def test_a_cell_tells_lens_layer_value_and_interval_of_the_table(vision):
    table = folder.read_table(RESULTS / "vision" / "transfer.csv")
    rows = table[(table["model"] == "cnn-residual") & (table["lens_layer"] == 7) & (table["stream_layer"] == 2)]
    values = rows["penalty_ce"]
    half = stats.t.ppf(0.975, 4) * values.std() / 5**0.5
    digits = math.ceil(-math.log10(half / 2))
    one, low, high = (f"{x:.{digits}f}" for x in (values.mean(), values.mean() - half, values.mean() + half))
    told = f"{one} [{low}, {high}] nats/image"
    assert f"cnn-residual\nlens of layer 7, read at layer 2\n{told}" in Read(vision).tips
    vit = table[(table["seed"] == "0") & (table["model"] == "vit")]
    ours = mean_cells(vit).set_index(["lens_layer", "stream_layer"]).loc[(1, 3)]
    first = vit.set_index(["lens_layer", "stream_layer"]).loc[(1, 3)]
    for column in ("penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"):
        assert ours[column] == pytest.approx(first[column])


@pytest.mark.results
def test_verdicts_settings_and_commands_are_told(vision):
    manifest = json.loads((RESULTS / "vision" / "manifest.json").read_text())
    assert "Do lenses transfer between the layers of image models" in vision
    assert re.search(
        r"<strong>vit</strong>((?!<strong>).)*all layers, lenses held fixed: <span class=verdict>refinement</span>\. Gain",
        vision,
        re.DOTALL,
    )
    assert f"git checkout {manifest['git_revision']}" in vision
    assert "lensbench run vision" in vision
    assert manifest["corpus"]["checksum"] in vision
    assert f"torch=={manifest['versions']['torch'].partition('+')[0]}" in vision


def test_names_are_escaped_and_two_runs_with_one_model_are_told_apart(tiny_run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("stages", "figures"))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["suite"]["question"] = '<script>alert("x")</script> & so'
    write_manifest(tmp_path / "a", manifest)
    write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text()
    Read(content)
    assert "<script>alert" not in content
    assert "&lt;script&gt;alert" in content
    assert "gpt (a)" in content
    assert "gpt (b)" in content


def test_a_large_table_is_named_and_not_put_into_the_page(tmp_path):
    (tmp_path / "transfer.csv").write_text("x" * 2_000_000)
    assert "in the run folder" in csv_link(tmp_path / "transfer.csv")


def test_a_run_writes_its_page_and_the_command_does_it_again(tiny_run, tmp_path):
    assert (tiny_run / "report.html").is_file()
    result = run("report", tiny_run, "--out", tmp_path / "sub" / "again.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sub" / "again.html").read_bytes() == (tiny_run / "report.html").read_bytes()
    refused(run("report", tmp_path), "not a run folder")
    refused(run("report", RESULTS / "vision-sweep", "--out", tmp_path / "x.html"), "holds a sweep")


# In a browser


@pytest.fixture(scope="module")
def file(vision, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(vision)
    return path


def test_hover_arrow_keys_and_sort_work_without_an_error(browser, file):  # noqa: F811
    tab, told, asked = opened(browser, file, viewport={"width": 1200, "height": 900})
    cell = tab.locator("svg[data-size] rect[data-cell='7,2']").nth(1)
    cell.scroll_into_view_if_needed()
    cell.hover()
    assert "cnn-residual\nlens of layer 7, read at layer 2\n" in tab.locator("#tip").text_content()
    assert tab.locator("#tip").evaluate("e => getComputedStyle(e).opacity") != "0"
    tab.locator("svg[data-size]").nth(1).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        tab.keyboard.press(key)
    assert "lens of layer 1, read at layer 2" in tab.locator("#tip").text_content()
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").get_attribute("class") == ""
    column = "ce [95 %]"
    head = tab.locator("#table-0-models th").filter(has_text=re.compile(f"^{re.escape(column)}$"))
    at = tab.locator("#table-0-models th").all_text_contents().index(column)

    def shown():
        cells = tab.locator(f"#table-0-models tbody td:nth-child({at + 1})").all()
        return [float(cell.get_attribute("data-value")) for cell in cells]

    before = shown()
    head.locator("button").click()
    assert shown() == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert shown() == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert told == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    tab.close()


def test_a_phone_scrolls_down_and_not_aside_and_dark_mode_is_dark(browser, file):  # noqa: F811
    tab, told, _ = opened(browser, file, viewport={"width": 375, "height": 800}, color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 23, 22)"
    assert told == []
    tab.close()


def test_print_opens_what_is_folded_and_the_tables_can_be_downloaded(browser, file):  # noqa: F811
    tab, told, _ = opened(browser, file, viewport={"width": 1000, "height": 900})
    with tab.expect_download() as download:
        tab.get_by_role("link", name="verdicts.csv").click()
    assert Path(download.value.path()).read_bytes() == lzma.decompress(
        (RESULTS / "vision" / "verdicts.csv.xz").read_bytes()
    )
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    assert len(tab.pdf()) > 20_000
    assert told == []
    tab.close()
