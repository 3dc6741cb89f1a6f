"""Pages as a reader of HTML and a browser see them."""

import shutil
from html.parser import HTMLParser

import pytest


class Read(HTMLParser):
    """Tags in their order, what is open, and tips."""

    VOID = frozenset({"meta", "link", "line", "rect", "circle", "polyline", "br"})

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tips: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if "data-tip" in dict(attrs):
            self.tips.append(dict(attrs)["data-tip"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if chromium is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, path, **options):
    told: list[str] = []
    asked: list[str] = []
    tab = browser.new_page(**options)
    tab.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"file://{path}")
    return tab, told, asked
