"""How the code is cut: sizes, where imports stand, what a wheel holds, one version."""

import ast
import itertools
import re
import tomllib
from pathlib import Path

import lensbench

ROOT = Path(__file__).resolve().parents[2]
MODULES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "lensbench").rglob("*.py"))}
LONG = {"lensbench/models/predictive_coding.py"}
OPTIONAL = {"accelerate", "datasets", "ray", "gguf"}
LATE = ("lensbench/__init__.py", "lensbench/cli/")
"""Where functions may import lensbench itself: torch takes seconds, and `lensbench --help` is to answer at once."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> list[Function]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]


def imported(function: Function) -> set[str]:
    """Names of the packages that a function imports."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_no_module_is_longer_than_500_lines():
    assert {path for path, text in MODULES.items() if len(text.splitlines()) > 500} - LONG == set()


def test_no_function_is_longer_than_70_lines():
    long = [
        f"{path}:{function.lineno} {function.name}"
        for path, text in MODULES.items()
        for function in functions(text)
        if function.end_lineno - function.lineno + 1 > 70
    ]
    assert long == []


def test_functions_import_optional_packages_alone_but_for_start_up_time():
    allowed = {path: OPTIONAL | ({"lensbench"} if path.startswith(LATE) else set()) for path in MODULES}
    allowed["lensbench/data/images.py"] |= {"sklearn"}  # for its digits alone: a second
    inside = {
        f"{path}: {function.name} imports {name}"
        for path, text in MODULES.items()
        for function in functions(text)
        for name in imported(function) - allowed[path]
    }
    assert inside == set()


def test_a_wheel_holds_every_package():
    """And ``lensbench.benchmarks``, the suites, which lie next to it."""
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {Path(path).parent.as_posix().replace("/", ".") for path in MODULES}
    assert sorted(packed) == sorted(there | {"lensbench.benchmarks"})
    assert all((ROOT / package.replace(".", "/") / "__init__.py").is_file() for package in there)


def test_every_file_gives_the_same_version_and_date():
    citation = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    changes = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes is not None
    assert (citation["version"], citation["date-released"]) == changes.groups()
    assert citation["version"] == lensbench.__version__


def test_every_extra_that_a_message_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [*MODULES.values(), *(p.read_text() for p in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")))]
    named = itertools.chain.from_iterable(
        re.findall(r"install (?:-e )?'(?:lensbench|\.)\[([a-z,]+)\]", t) for t in texts
    )
    assert {extra for group in named for extra in group.split(",")} <= set(extras)
    assert [text for text in texts if "'lensbench[" in text] == [], "lensbench is installed from a clone: -e '.[EXTRA]'"


def test_no_module_solves_batches_by_lu():
    """It fails with two threads of MKL from some 200 columns on, whatever the matrices: Cholesky or eigenvectors do not."""
    banned = re.compile(r"linalg\.(solve|inv|lu\w*)\(")
    lines = ((path, n, line) for path, text in MODULES.items() for n, line in enumerate(text.splitlines(), 1))
    found = [f"{path}:{n}" for path, n, line in lines if banned.search(line)]
    assert found == []
