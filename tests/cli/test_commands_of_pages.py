"""Every command that a page shows is one that lensbench takes: its options, numbers, suites, presets, settings, folders."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from lensbench.cli import app
from lensbench.results.folder import SUMS
from lensbench.suite.changes import Changes
from lensbench.suite.shipped import named_files

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^ *```(?:bash)?\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"`lensbench ([^`]+)`")
COMMANDS = typer.main.get_command(app)


def shown(page: Path) -> list[str]:
    """The lines of lensbench in the blocks of a page, each without what a shell does around it."""
    lines = (line.strip() for block in BLOCK.findall(page.read_text()) for line in block.splitlines())
    parts = (part.strip().removeprefix("do ") for line in lines for part in re.split(r"&&|;", line.split(" #")[0]))
    return [
        re.sub(r"^(?:torchrun .*-m )?lensbench ", "", part)
        for part in parts
        if re.match(r"(?:torchrun .*-m )?lensbench ", part)
    ]


def parsed(line: str) -> dict:
    """What a command line gives each parameter; fails where the command would refuse it."""
    name, *words = shlex.split(line)
    with COMMANDS.make_context("lensbench", [name]) as context:
        command = COMMANDS.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        try:
            with command.make_context(name, list(words), parent=context) as inner:
                return {"command": name, **inner.params}
        except Exception as error:  # of Typer, whose classes differ between versions
            pytest.fail(f"lensbench {line}: {getattr(error, 'message', error)}")


PAGES = [p for p in sorted(ROOT.rglob("*.md")) if "templates" not in p.parts and shown(p)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_taken_as_written(page):
    for line in shown(page):
        given = parsed(line)
        suite = given.get("suite")
        if given["command"] != "run" or suite not in named_files():
            assert suite is None or suite.isupper() or suite in named_files() or suite.endswith(".toml")
            continue
        settings = [s for s in given["setting"] or [] if not s.startswith("models.NAME")]
        Changes(given["preset"], settings=tuple(settings), limit=given["limit"]).of(suite)


@pytest.mark.parametrize("page", sorted(ROOT.rglob("*.md")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_that_a_text_names_exists_with_the_options_that_it_names(page):
    for line in INLINE.findall(" ".join(page.read_text().split())):
        name, *words = line.split()
        if not re.fullmatch(r"[a-z-]+", name):
            continue  # --help, or a placeholder
        command = COMMANDS.commands.get(name)
        assert command is not None, f"{page.name}: lensbench {line}"
        known = {option for value in command.params for option in (*value.opts, *value.secondary_opts)} | {"--help"}
        assert [w for w in words if w.startswith("--") and w.partition("=")[0].rstrip(",.)") not in known] == [], line


ALL = [p for p in sorted(ROOT.rglob("*.md")) if "templates" not in p.parts]

SPEED = re.compile(r"^ *python -m (benchmarks\.speed\.\w+)((?:.*\\\n)*.*)", re.M)


def folders_named(page: Path, command: str) -> list[str]:
    """The folders of ``results/`` that a page gives a command to read, in blocks and in its text."""
    text = " ".join(page.read_text().split())
    lines = [*shown(page), *INLINE.findall(text)]
    read = [re.sub(r" --(out|figures) \S+", "", line).split() for line in lines]
    return [word for words in read if words[0] == command for word in words if word.startswith("results/")]


@pytest.mark.parametrize(
    "page", [p for p in ALL if "results/" in p.read_text()], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_every_folder_of_results_that_a_command_of_a_page_reads_can_be_read_by_it(page):
    for command in ("compare", "settings", "report", "ruler", "trends", "figures"):
        read = folders_named(page, command)
        assert [folder for folder in read if not (ROOT / folder / "manifest.json").is_file()] == [], command
        if command == "compare":
            assert [folder for folder in read if not (ROOT / folder / SUMS).is_file()] == [], "exported with --no-sums"


@pytest.mark.parametrize("page", [p for p in ALL if SPEED.search(p.read_text())], ids=lambda p: p.name)
def test_every_command_that_measures_speed_is_taken_as_a_page_has_it(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # where benchmarks/ lies
    for module, rest in SPEED.findall(page.read_text()):
        made = typer.Typer()
        made.command()(importlib.import_module(module).main)
        words = shlex.split(rest.replace("\\\n", " ").split(" #")[0])
        try:
            typer.main.get_command(made).make_context(module, words)
        except Exception as error:  # of Typer, whose classes differ between versions
            pytest.fail(f"{module} {rest}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "page", [p for p in ALL if "```python" in p.read_text()], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_python_of_a_page_imports_the_modules_that_it_uses(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    for use, name in {r"\bPath\(": "Path", r"\btorch\.": "torch", r"\bnp\.": "np", r"\bpd\.": "pd"}.items():
        assert not re.search(use, code) or re.search(rf"\b(import|as) {name}\b", code), f"{name} is not imported"


def test_the_folders_of_commands_are_found_in_blocks_and_in_the_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`lensbench compare\nresults/a results/b`\n\n```bash\nlensbench compare runs/x results/c --out results/d # e\n```\n"
    )
    assert sorted(folders_named(page, "compare")) == ["results/a", "results/b", "results/c"]


def test_the_pages_show_commands_at_all():
    assert len(PAGES) >= 8
    assert {line.split()[0] for page in PAGES for line in shown(page)} >= {"run", "compare", "export", "trace", "bits"}
