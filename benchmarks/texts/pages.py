"""Pages from templates: all of them written, or compared with what is committed."""

import re
from collections.abc import Iterator
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from benchmarks.texts.between import Transfers
from benchmarks.texts.catalogues import CATALOGUES, gallery
from benchmarks.texts.families import Families
from benchmarks.texts.lenses import LensResults, in_words, named
from benchmarks.texts.numbers import TextError, claim, markdown
from benchmarks.texts.rates import Rates
from benchmarks.texts.studies import Studies
from benchmarks.texts.tables import Results
from lensbench.data.corpus import MIN_DOCUMENTS, MIN_LONE_BYTES
from lensbench.errors import LensbenchError
from lensbench.results.folder import read_run
from lensbench.runtime.files import write_atomically
from lensbench.statistics import FEWEST_CLUSTERS
from lensbench.suite.changes import Changes

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = ".j2"

NEEDS = re.compile(r"\{# needs (.+?) #\}")
"""The first line of a template of runs that are not there from the beginning"""


def page_names(results: Path, templates: Path = TEMPLATES) -> list[str]:
    """The paths of all pages that have a template, relative to the root of the repository.

    A template whose first line is ``{# needs NAME NAME #}`` is of run folders of ``results``: as long as one of them is not
    there, neither is the page.
    """
    found = [path for path in templates.rglob(f"*{SUFFIX}") if not missing_runs(path, results)]
    return sorted(path.relative_to(templates).as_posix().removesuffix(SUFFIX) for path in found)


def missing_runs(template: Path, results: Path) -> list[str]:
    """The run folders that a template needs and that ``results`` has not."""
    with template.open() as lines:
        said = NEEDS.fullmatch(lines.readline().strip())
    return (
        [] if said is None else [name for name in said[1].split() if not (results / name / "manifest.json").is_file()]
    )


def environment(results: Path, templates: Path = TEMPLATES) -> Environment:
    """What templates may use; numbers are read from the folder ``results``."""
    made = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    of = cache(lambda *names: Results(results, names))
    made.globals |= {
        "results": of,
        "families": cache(lambda *names: Families(results, names)),
        "transfers": cache(lambda name: Transfers(results / name)),
        "rates": cache(lambda *names: Rates(results, names)),
        "folders": lambda within: folders(results, within),
        "file": lambda name: (results / name).is_file(),
        "suite": cache(lambda name, preset=None: Changes(preset=preset).of(name)),
        "fewest_clusters": FEWEST_CLUSTERS,
        "least_bytes": MIN_LONE_BYTES,
        "least_documents": MIN_DOCUMENTS,
        "exists": lambda name: (results / name / "manifest.json").is_file(),
        "lenses": cache(lambda *names: LensResults(results, names)),
        "figure": partial(figure, results),
        "in_words": in_words,
        "named": named,
        "studies": Studies(results),
        "claim": claim,
        "gallery": lambda: gallery(results),
        "markdown": markdown,
        **CATALOGUES,
    }
    return made


def figure(results: Path, path: str, says: str) -> str:
    """A figure of ``results`` as a page of findings shows it; nothing where the run was committed without it."""
    return f"![{says}](../{path})" if (results / path).is_file() else ""


def folders(results: Path, within: str) -> list[str]:
    """The run folders directly within a folder, the one with the smallest models first."""
    found = [path.parent for path in (results / within).glob("*/manifest.json")]
    sizes = {path: read_run(path).tables["models.csv"]["parameters"].min() for path in found}
    return [path.relative_to(results).as_posix() for path in sorted(found, key=lambda path: (sizes[path], path.name))]


def rendered(made: Environment, name: str) -> str:
    """The text of one page; raises :class:`TextError` with the line of its template that cannot be filled in."""
    said = f"Written by `python -m benchmarks.texts` from benchmarks/texts/templates/{name}{SUFFIX}"
    opening = f"# {said}\n" if name.endswith(".csv") else f"<!-- {said} -->\n"
    try:
        return opening + made.get_template(f"{name}{SUFFIX}").render()
    except (LensbenchError, TemplateError, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        raise TextError(f"{name}{SUFFIX}, line {line_of(error)}: {error}") from error


def line_of(error: BaseException) -> int:
    """The line of a template at which it failed."""
    line, trace = getattr(error, "lineno", 0) or 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(SUFFIX):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def write_pages(
    names: list[str] | None = None, root: Path = ROOT, results: Path = ROOT / "results", templates: Path = TEMPLATES
) -> Iterator[str]:
    """Write pages (all, or those named) under ``root``; give a line for each that changed, or that cannot be written."""
    for name, text in texts(results, templates, names):
        page = root / name
        if isinstance(text, TextError):
            yield f"failed: {text}"
        elif not page.is_file() or page.read_text() != text:
            page.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(page, partial(Path.write_text, data=text))
            yield f"written: {name}"


def differing_pages(root: Path = ROOT, results: Path = ROOT / "results", templates: Path = TEMPLATES) -> Iterator[str]:
    """A line for each page under ``root`` that is not what its template gives."""
    for name, text in texts(results, templates):
        if isinstance(text, TextError):
            yield str(text)
            continue
        there = (root / name).read_text().splitlines() if (root / name).is_file() else []
        pairs = enumerate(zip_longest(there, text.splitlines()), 1)
        line = next((number for number, (one, other) in pairs if one != other), None)
        if line is not None:
            yield f"{name}, line {line}: not what its template and results/ give; run python -m benchmarks.texts"


def texts(results: Path, templates: Path, names: list[str] | None = None) -> Iterator[tuple[str, str | TextError]]:
    """Every page with its text, or with why it has none."""
    made = environment(results, templates)
    for name in names or page_names(results, templates):
        try:
            yield name, rendered(made, name)
        except TextError as error:
            yield name, error
