"""Tables that are made from the catalogues of the package, for templates."""

import inspect
from collections.abc import Callable
from pathlib import Path

from lensbench.probes import PROBES
from lensbench.probes.catalogue import probes_markdown, quantities_markdown
from lensbench.report.figures import draw as _registers_figures  # noqa: F401
from lensbench.report.figures.registry import FIGURES
from lensbench.results.schema import indices_text, tables_text


def table_of_quantities(*names: str) -> str:
    """The quantities of some probes, as Markdown."""
    return quantities_markdown(PROBES[name] for name in names).rstrip()


def table_of_probes() -> str:
    """All probes, what they measure, and their nulls."""
    return probes_markdown(PROBES.values()).rstrip()


def gallery(results: Path) -> str:
    """Every figure that a run draws: what it shows, its command, and, of a folder in ``results``, the figure itself."""
    drawn = {path.stem: path for path in sorted(results.rglob("*.png"), reverse=True) if path.parent.name in PLACES}
    parts = []
    for name, figure in sorted(FIGURES.items()):
        says = " ".join((inspect.getdoc(figure.draw) or "").partition("\n\n")[0].split())
        command = f"lensbench figures FOLDER --figure {name} --out OUT"
        shown = f"\n\n![{says}]({drawn[name].relative_to(results).as_posix()})" if name in drawn else ""
        needs = ", ".join(f"`{table}`" for table in figure.needs)
        parts.append(f"## {name}\n\n{says} Drawn from {needs}.\n\n```bash\n{command}\n```{shown}")
    return "\n\n".join(parts)


PLACES = ("figures", "gallery")
"""Folders of ``results/`` that hold figures of runs"""


CATALOGUES: dict[str, Callable[..., str]] = {
    "text_of_tables": lambda: tables_text().rstrip(),
    "text_of_indices": lambda: indices_text().rstrip(),
    "table_of_quantities": table_of_quantities,
    "table_of_probes": table_of_probes,
}
