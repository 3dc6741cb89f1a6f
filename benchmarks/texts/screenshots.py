"""``python -m benchmarks.texts.screenshots``: pages of runs in a browser, for ``results/gallery.md``."""

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


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory() as folder:
        pages = {}
        for name, shot in SHOTS.items():
            pages[name] = Path(folder) / f"{name}.html"
            pages[name].write_text(page([read_run(ROOT / "results" / run) for run in shot.runs]), encoding="utf-8")
        for file in write_screenshots(pages, ROOT / "results" / "gallery"):
            sys.stdout.write(f"written: {file.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
