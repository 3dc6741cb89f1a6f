"""Tables that fit the width of a terminal or a log: one that is too wide is printed in parts, and nothing is cut."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

WRAPPED = 26
"""Text of a cell longer than this may be broken between words"""

BORDER, PADDING = 1, 3


@dataclass(frozen=True)
class _Column:
    head: str
    cells: list[str]
    keeps_lines: bool

    @property
    def least(self) -> int:
        """The width below which a word, an interval or a line that is to stay whole would be broken."""
        head = max((cell_len(word) for word in self.head.split()), default=0)
        return max([head, *(least_of(cell, self.keeps_lines) for cell in self.cells)])


def least_of(cell: str, keeps_lines: bool) -> int:
    """The least width of a cell: of its longest line where lines are kept or short, else of its longest word."""
    lines = cell.splitlines() or [""]
    return max(
        cell_len(line)
        if keeps_lines or cell_len(line) <= WRAPPED
        else max(WRAPPED, *(cell_len(word) for word in line.split()))
        for line in lines
    )


def show(table: Table, console: Console, keys: int = 1) -> None:
    """Print a table, in parts where it is wider than the console; the first ``keys`` columns stand in each part."""
    for part in in_width(table, console.width, keys):
        console.print(part)


def show_line(line: str, console: Console) -> None:
    """Print a line as it is, however long: paths and commands in it are to be copied whole."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def in_width(table: Table, width: int, keys: int = 1) -> Iterator[Table]:
    """A table as it is where it fits ``width``, else tables of as many of its columns as fit, none of them cut.

    The first ``keys`` columns stand in every part. An interval goes below its value where that makes a column fit.
    """
    plain = [_plain(column, stacked=False) for column in table.columns]
    if BORDER + sum(PADDING + max([one.least, *map(_longest, one.cells)]) for one in plain) <= width:
        yield _part(table, plain, list(range(len(plain))), width, keys, "")
        return
    columns = [_plain(column, stacked=True) for column in table.columns]
    own = BORDER + sum(PADDING + one.least for one in columns[:keys])
    parts: list[list[int]] = [[]]
    used = own
    for k in range(keys, len(columns)):
        needed = PADDING + columns[k].least
        if parts[-1] and used + needed > width:
            parts.append([])
            used = own
        parts[-1].append(k)
        used += needed
    for number, part in enumerate(parts):
        of = f" ({number + 1} of {len(parts)})" if len(parts) > 1 else ""
        yield _part(table, columns, [*range(keys), *part], width, keys, of)


def _longest(cell: str) -> int:
    return min(max((cell_len(line) for line in cell.splitlines()), default=0), WRAPPED)


def _plain(column: Column, *, stacked: bool) -> _Column:
    cells = [str(cell) for cell in column.cells]
    if stacked:
        cells = [_stacked(cell) for cell in cells]
    return _Column(str(column.header), cells, bool(column.no_wrap))


def _stacked(cell: str) -> str:
    """``value [low, high]`` with the interval, and what follows, on lines of their own."""
    first, *more = cell.splitlines() or [""]
    value, bracket, ends = first.partition(" [")
    if bracket and ends.removesuffix(" *").endswith("]") and " " not in value:
        return "\n".join([value, f"[{ends}", *(line.strip() for line in more)])
    return cell


def _part(table: Table, columns: list[_Column], chosen: list[int], width: int, keys: int, of: str) -> Table:
    title = None if table.title is None else f"{table.title}{of}"
    part = Table(title=title, title_justify="left")
    for k, wide in zip(chosen, _widths([columns[k] for k in chosen], width), strict=True):
        # A column that folds breaks a long word rather than to lose its end.
        part.add_column(columns[k].head, overflow="fold", width=wide)
    for number, row in enumerate(table.rows):
        cells = [columns[k].cells[number] for k in chosen]
        if any(cells[keys:]) or not any(column.cells[number] for column in columns[keys:]):
            part.add_row(*cells, end_section=row.end_section)
    return part


def _widths(columns: list[_Column], width: int) -> list[int]:
    """The width of each column: the least it needs, and of the room left over what its longest lines would fill."""
    found = [min(one.least, max(1, width - BORDER - PADDING)) for one in columns]
    wanted = [
        max(cell_len(line) for text in [one.head, *one.cells] for line in text.splitlines() or [""]) for one in columns
    ]
    room = width - BORDER - sum(PADDING + one for one in found)
    while room > 0 and any(want > have for want, have in zip(wanted, found, strict=True)):
        # The column that lacks most gets the next cell.
        lacking = max(range(len(found)), key=lambda k: wanted[k] - found[k])
        found[lacking] += 1
        room -= 1
    return found
