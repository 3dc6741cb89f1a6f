"""Tables that are made from the catalogues of the package, for templates."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.texts.numbers import markdown
from lensbench.probes import PROBES
from lensbench.probes.catalogue import probes_markdown, quantities_markdown
from lensbench.report.figures import draw as _registers_figures  # noqa: F401
from lensbench.report.figures.registry import FIGURES
from lensbench.results.schema import indices_text, tables_text
from lensbench.run.costs import GIB, Shape
from lensbench.run.forecast import stage_costs
from lensbench.suite.changes import Changes


def table_of_quantities(*names: str) -> str:
    """The quantities of some probes, as Markdown."""
    return quantities_markdown(PROBES[name] for name in names).rstrip()


def table_of_probes() -> str:
    """All probes, what they measure, and their nulls."""
    return probes_markdown(PROBES.values()).rstrip()


LLAMAS = {
    "135 million": Shape(30, 576, 49_152, 106_203_456, 28_311_552),
    "1.2 billion": Shape(16, 2048, 49_152, 973_146_112, 201_326_592),
    "6.9 billion": Shape(32, 4096, 49_152, 6_476_271_616, 402_653_184),
}
"""Parameters -> the sizes of a model of Llama's form, with the vocabulary of SmolLM2"""


def table_of_glances() -> str:
    """What a dry run predicts of a glance at models of several sizes, in float32 and bfloat16, as Markdown."""
    suite = Changes(preset="glance").of("pretrained")
    rows = []
    for parameters, shape in LLAMAS.items():
        both = [stage_costs(suite, suite.models[0], replace(shape, bytes_each=size), ()) for size in (4, 2)]
        most = [max(cost.memory for cost in found.values()) / GIB for found in both]
        disk = sum(cost.disk for cost in both[0].values()) / GIB
        rows.append([parameters, str(shape.layers), str(shape.width), *(f"{each:.1f}" for each in (*most, disk))])
    return markdown(["parameters", "layers", "width", "GiB, float32", "GiB, bfloat16", "GiB on disk"], rows)


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
    "table_of_glances": table_of_glances,
}
