"""The column of texts in a file of a local dataset: refused where the reader of datasets would turn or lose its texts."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet, types

from lensbench.errors import LensbenchError
from lensbench.runtime.texts import kind_of, lines_of, parse_json, printable

CHECKED_BYTES = 50_000_000
"""How much of a file of JSON is checked"""


def check_column(path: Path, place: str, field: str) -> None:
    """Raise :class:`LensbenchError` for a file at ``place`` whose ``field`` is one of numbers, or stands twice.

    Numbers in one file become texts where another file has texts, and of two columns the first is read. Files that are
    damaged, or have no such field, pass: the reader says what is wrong with them.
    """
    suffix, name = path.suffix.lower(), printable(place)
    if suffix == ".parquet" and (other := _type_in_parquet(path, field)):
        raise LensbenchError(f"field {field!r} of {name} is {other}, and must be a string")
    if suffix in (".csv", ".tsv") and _header(path, name, "," if suffix == ".csv" else "\t").count(field) > 1:
        raise LensbenchError(f"{name} has the column {field!r} twice: rename one of them")
    if suffix in (".json", ".jsonl", ".ndjson"):
        for number, row in _rows(path, name):
            value = _value(row, field)
            if value is not None and not isinstance(value, str):
                raise LensbenchError(f"{name} row {number}: field {field!r} is {kind_of(value)}, and must be a string")


def _type_in_parquet(path: Path, field: str) -> str | None:
    """The type of a column of a Parquet file where it is one of numbers; None for others and files that are damaged."""
    try:
        schema = parquet.read_schema(path)
    except (ArrowException, OSError):
        return None
    if schema.names.count(field) != 1:
        return None
    kind = schema.field(field).type
    primitive = types.is_primitive(kind) and not types.is_null(kind)
    return f"of type {kind}" if primitive else None


def _header(path: Path, name: str, delimiter: str) -> list[str]:
    """The names of the columns of a CSV file; none where it is damaged."""
    try:
        return next(csv.reader((f"{line}\n" for _, line in lines_of(path, name)), delimiter=delimiter), [])
    except (LensbenchError, csv.Error):
        return []


def _rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file of JSON, from 0: an array of them, or one on each line. It ends where the file is damaged."""
    read = 0
    try:
        for number, line in lines_of(path, name):
            if number == 1 and line.lstrip().startswith("["):
                yield from enumerate(parse_json("\n".join(line for _, line in lines_of(path, name)), name))
                return
            if line.strip():
                yield number - 1, parse_json(line, name)
            read += len(line)
            if read > CHECKED_BYTES:
                return
    except LensbenchError:
        return


def _value(row: Any, field: str) -> Any:
    """The value of a field of a row, ``a.b`` for one within another; None where there is none."""
    for key in [field] if isinstance(row, dict) and field in row else field.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row
