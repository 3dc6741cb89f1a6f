"""``python -m benchmarks.texts.screenshots``: pages of runs in a browser, for ``results/gallery.md``.

``results/gallery/screenshots.json`` holds what each shows: a test finds one whose runs have other tables by now.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.texts.pages import ROOT
from lensbench.report.page import page
from lensbench.results.folder import read_run
from lensbench.runtime.files import write_json

GALLERY = ROOT / "results" / "gallery"

SHOWN = GALLERY / "screenshots.json"
"""Name of each screenshot -> its runs -> :func:`tables_checksum` of what it shows"""

COLOURS = 48
"""Colours of a picture: enough for flat colours and the edges of letters, and a third of the bytes"""


@dataclass(frozen=True)
class Shot:
    """A picture: the runs whose page it shows, as folders of ``results/``, and the window."""

    runs: tuple[str, ...]
    width: int
    height: int
    dark: bool = False


SHOTS = {
    "page-of-one-model": Shot(("smollm2-updates",), 1280, 800),
    "page-of-many-models-dark": Shot(("standard/gpt", "standard/pc"), 1280, 800, dark=True),
    "page-on-a-phone": Shot(("quick",), 390, 844),
}
"""Name in ``results/gallery`` -> what it shows"""


def write_screenshots(pages: Mapping[str, Path], folder: Path) -> list[Path]:
    """Photograph pages (name of the shot -> HTML file) in Chromium into PNG files of a folder; return these."""
    from playwright.sync_api import sync_playwright  # not needed by any other page

    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    written = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, html in pages.items():
            shot, file = SHOTS[name], folder / f"{name}.png"
            size = {"width": shot.width, "height": shot.height}
            tab = browser.new_page(viewport=size, color_scheme="dark" if shot.dark else "light")
            tab.goto(f"file://{html.resolve()}")
            tab.screenshot(path=file)
            tab.close()
            with Image.open(file) as picture:
                small = picture.convert("RGB").quantize(COLOURS)
            small.save(file, optimize=True)
            written.append(file)
        browser.close()
    return written


def tables_checksum(run: str) -> str:
    """The SHA-256 of the checksums of all tables of a run in ``results/``."""
    exported = read_run(ROOT / "results" / run).manifest.exported
    assert exported is not None
    return hashlib.sha256(json.dumps(exported.tables, sort_keys=True).encode()).hexdigest()


def shown_now() -> dict[str, dict[str, str]]:
    """What :data:`SHOWN` holds of screenshots of the tables as they are."""
    return {name: {run: tables_checksum(run) for run in shot.runs} for name, shot in SHOTS.items()}


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory() as folder:
        pages = {}
        for name, shot in SHOTS.items():
            pages[name] = Path(folder) / f"{name}.html"
            pages[name].write_text(page([read_run(ROOT / "results" / run) for run in shot.runs]), encoding="utf-8")
        for file in write_screenshots(pages, GALLERY):
            sys.stdout.write(f"written: {file.relative_to(ROOT)}\n")
    write_json(SHOWN, shown_now())


if __name__ == "__main__":
    main()
