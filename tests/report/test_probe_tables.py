"""Tables of probes: what a reader of the terminal is shown of the heads of a model."""

import io

import pandas as pd
from rich.console import Console

from lensbench.report.probe_tables import SHOWN_HEADS, heads_table


def rows(quantity, values):
    return pd.DataFrame(
        [
            {"model": "m", "quantity": quantity, "layer": float(k), "other": 0.0, "value": value, "ci_low": None}
            | {"ci_high": None, "reason": ""}
            for k, value in enumerate(values)
        ]
    )


def heads_shown(scores, found):
    table = heads_table(rows("error_score", scores), rows("error_transport_found", found))
    console = Console(file=io.StringIO(), width=300)
    console.print(table)
    return [line.split("│")[2].strip() for line in console.file.getvalue().splitlines() if "│ m" in line]


def test_a_found_head_is_shown_however_low_its_score():
    scores = [10.0 - k for k in range(9)]
    shown = heads_shown(scores, [0.0] * 8 + [1.0])
    assert shown == ["L8.H0", *(f"L{k}.H0" for k in range(SHOWN_HEADS))]


def test_where_all_heads_are_found_those_of_highest_score_stand_once():
    assert heads_shown([1.0, 3.0, 2.0, 5.0, 4.0, 0.0], [1.0] * 6) == [f"L{k}.H0" for k in (3, 4, 1, 2, 0)]
