"""The suites that come with lensbench, found without importing what it takes to check them."""

import tomllib
from importlib import resources
from pathlib import Path


def suites_folder() -> Path:
    """The folder of the suites that come with lensbench: ``benchmarks/`` of a checkout, or its copy in a wheel."""
    packaged = Path(str(resources.files("lensbench"))) / "benchmarks"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "benchmarks"


def named_files() -> dict[str, Path]:
    """The files that come with lensbench, by name."""
    return {path.stem: path for path in sorted(suites_folder().glob("*.toml"))}


def asks_for_several(name: str) -> bool:
    """Whether a suite, given by name or path, asks for several models at once; False where it cannot be read."""
    try:
        content = tomllib.loads((named_files().get(name) or Path(name)).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # told where the suite is checked
        return False
    workers = content.get("workers", 1)
    return isinstance(workers, int) and workers > 1
