"""How the code is cut: what a wheel holds, one version."""

import itertools
import re
import tomllib
from pathlib import Path

import lensbench

ROOT = Path(__file__).resolve().parents[2]
MODULES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "lensbench").rglob("*.py"))}


def test_a_wheel_holds_every_package():
    """And ``lensbench.benchmarks``, the suites, which lie next to it."""
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {Path(path).parent.as_posix().replace("/", ".") for path in MODULES}
    assert sorted(packed) == sorted(there | {"lensbench.benchmarks"})
    assert all((ROOT / package.replace(".", "/") / "__init__.py").is_file() for package in there)


def test_every_file_gives_the_same_version():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    changes = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation is not None
    assert changes is not None
    assert {citation[1], changes[1]} == {lensbench.__version__}


def test_every_extra_that_a_message_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [*MODULES.values(), *(p.read_text() for p in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")))]
    named = itertools.chain.from_iterable(
        re.findall(r"install (?:-e )?'(?:lensbench|\.)\[([a-z,]+)\]", t) for t in texts
    )
    assert {extra for group in named for extra in group.split(",")} <= set(extras)
