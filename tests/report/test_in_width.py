"""Tables of the terminal fit its width, and nothing of them is cut."""

import io

import pytest
from rich.console import Console
from rich.table import Column, Table

from lensbench.report.in_width import show

LONG = "added up in one representation or undetermined (between two answers)"
INTERVAL = "-10.155 [-11.480, -8.830]"


def printed(table, width, keys=1):
    console = Console(file=io.StringIO(), width=width)
    show(table, console, keys)
    return console.file.getvalue()


def wide_table():
    heads = [f"gain visibility without layer {k}" for k in range(7)]
    table = Table(Column("model", no_wrap=True), "verdict", *heads, title="the ruler")
    table.add_row("gpt-conv+rotated", LONG, *[INTERVAL] * 7)
    table.add_row("mean_survival_error_without_layer0", "cannot tell", *[""] * 7)
    return table


@pytest.mark.parametrize("width", [70, 80, 100, 160])
def test_no_line_is_wider_than_the_console_and_every_word_is_there(width):
    text = printed(wide_table(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("-10.155") == 7
    assert text.count("[-11.480, -8.830]") == 7
    for word in [*LONG.split(), "mean_survival_error_without_layer0", *map(str, range(7))]:
        assert word in text


def test_the_key_stands_in_every_part_and_parts_are_counted():
    text = printed(wide_table(), 80)
    parts = text.count("the ruler (")
    assert parts > 1
    assert f"the ruler (1 of {parts})" in text
    assert text.count("gpt-conv+rotated") == parts


def test_a_table_that_fits_is_printed_whole_with_values_next_to_their_intervals():
    text = printed(wide_table(), 400)
    assert INTERVAL in text
    assert "(1 of" not in text


def test_rows_that_a_part_has_nothing_of_are_left_out_of_it():
    table = Table("index", *(f"difference {k} of two models of a run" for k in range(4)))
    for k in range(4):
        table.add_row(f"index{k}", *(INTERVAL if k == column else "" for column in range(4)))
    text = printed(table, 60)
    assert [text.count(f"index{k}") for k in range(4)] == [1, 1, 1, 1]
