"""What a run prints at its end: no row of which nothing is known, and no interval called what it is not."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lensbench.report.terminal import print_run, undefined_line
from lensbench.results.folder import Run, read_run

QUICK = Path(__file__).resolve().parents[2] / "results" / "quick"


@pytest.fixture(scope="module")
def quick() -> Run:
    return read_run(QUICK)


def changed(run: Run, **values: object) -> Run:
    """The run with other values in the rows of ``reach``."""
    table = run.tables["indices.csv"].copy()
    table.loc[table["index"] == "reach", list(values)] = list(values.values())
    return replace(run, tables=run.tables | {"indices.csv": table})


def printed(run: Run) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_run(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_index_that_no_model_has_is_named_in_a_line_and_has_no_row(quick: Run) -> None:
    assert "│ reach " in printed(quick)
    assert not any("reach" in line for line in undefined_line(quick))
    text = printed(changed(quick, value=np.nan, ci_low=np.nan, ci_high=np.nan))
    assert "│ reach " not in text
    (line,) = [line for line in text.splitlines() if line.startswith("undefined in every model")]
    assert "reach" in line


def test_a_model_worse_than_word_counts_is_told_right_after_the_answer(quick: Run) -> None:
    models = quick.tables["models.csv"].assign(ce=99.0)
    lines = printed(replace(quick, tables=quick.tables | {"models.csv": models})).splitlines()
    first = next(k for k, line in enumerate(lines) if "than word frequencies do" in line)
    assert first < next(k for k, line in enumerate(lines) if "block by block" in line)
