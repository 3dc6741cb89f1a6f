"""``python -m benchmarks.texts``: write the pages; with ``--check``, say which are not what the templates give."""

import sys
from itertools import chain
from typing import Annotated

import typer

from benchmarks.texts.annotated import write_annotated
from benchmarks.texts.pages import ROOT, differing_pages, write_pages


def main(
    pages: Annotated[
        list[str] | None, typer.Argument(help="Pages to write, such as README.md; all if left out.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a page is not up to date.")] = False,
) -> None:
    """Write README.md, the findings and the guides from benchmarks/texts/templates and the numbers in results/."""
    failed = False
    of_readme = not check and (not pages or "README.md" in pages)
    figure = write_annotated(ROOT / "results") if of_readme else ()
    for line in chain(differing_pages() if check else write_pages(names=pages), figure):
        sys.stdout.write(f"{line}\n")
        failed = failed or check or line.startswith("failed")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
