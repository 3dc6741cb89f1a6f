"""What can be named, and what tables mean."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from lensbench.cli.app import Debug, answerable, app, console
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show, show_line


@app.command(short_help="What every column of every table means.")
@answerable
def schema(
    further: Annotated[
        bool, typer.Option("--further", help="Tables of commands other than run, and Parquet files.")
    ] = False,
    studies: Annotated[bool, typer.Option("--studies", help="Tables of calibrations, tasks and regressions.")] = False,
    debug: Debug = False,
) -> None:
    """What every column of every table means, as Markdown."""
    from lensbench.results.further import further_text
    from lensbench.results.schema import schema_text

    if further and studies:
        raise LensbenchError("--further and --studies are two lists: give one of them")
    sys.stdout.write(further_text(studies=studies) if further or studies else schema_text())


@app.command(short_help="What can be named: suites, models, corpora.")
@answerable
def models(debug: Debug = False) -> None:
    """What can be named: suites and their models, sweeps, model families, corpora."""
    from lensbench.data.images import SPECS
    from lensbench.models import FAMILIES
    from lensbench.suite.files import kind_of, read_toml
    from lensbench.suite.shipped import named_files

    named = Table(
        "name", "models or trials", "question", title="suites, sweeps, calibrations, tasks (benchmarks/*.toml)"
    )
    for name in named_files():
        _, content = read_toml(name)
        _, command = kind_of(content)
        if command == "sweep":
            inside = f"{len(content['trials'])} trials"
        elif command == "calibrate":
            named_families = (name for key in ("tune", "held_out", "families") for name in content.get(key, ()))
            inside = f"{len(set(named_families))} families of synthetic streams"
        elif command == "regression":
            inside = (
                f"{' and '.join(content['attention'])} attention, {' and '.join(map(str, content['layers']))} layers"
            )
        elif command == "in-context":
            inside = ", ".join(c["name"] for c in content["contestants"])
        else:
            inside = ", ".join(m["name"] for m in content["models"])
        named.add_row(name, inside, content["question"])
    show(named, console)
    families = Table("family", "settings", "what it is", title="model families")
    for name, family in FAMILIES.items():
        families.add_row(name, ", ".join(family.settings), family.description)
    show(families, console)
    corpora = "corpora: stdlib, file:PATH (.txt, .jsonl[#FIELD], folder), hf:NAME[/CONFIG][@SPLIT]"
    show_line(corpora, console)
    show_line(f"images: {SPECS}", console)
