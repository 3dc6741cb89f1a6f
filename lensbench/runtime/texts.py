"""Text and JSON in files that a user gives: read right, or one line on what is wrong and what would be right."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lensbench.errors import LensbenchError

PIECE = 1 << 20


LINE_BYTES = 64 << 20
"""A longer line of a ``.jsonl`` file is refused where the caller limits what is read"""


MAGIC = {
    b"\x1f\x8b": "gzip-compressed: unpack it first (gunzip)",
    b"BZh": "bzip2-compressed: unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "xz-compressed: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "a Parquet file: give its folder as hf:FOLDER",
    b"ARROW1": "an Arrow file: give its folder as hf:FOLDER",
    b"%PDF-": "a PDF: extract its text first",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"SQLite format 3": "an SQLite database",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"\xff\xfe\0\0": "UTF-32 text: save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text: save it as UTF-8",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
"""How files that are no UTF-8 text begin, and what they are"""


class NoText(LensbenchError):
    """A file is no UTF-8 text."""


def printable(name: str) -> str:
    """A name of a file on one line, without control characters and without bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def reason(error: OSError | ValueError) -> str:
    """Why the system refuses a file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def open_file(path: Path, name: str) -> BinaryIO:
    """An ordinary file, opened; raises :class:`LensbenchError` for pipes and devices, which may never end."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise LensbenchError(f"{name} cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise LensbenchError(f"{name} is no file but a folder, pipe or device: write its text to a file first")
    return os.fdopen(number, "rb")


def read_bytes(path: Path, name: str, limit: int | None = None) -> bytes:
    """The first ``limit`` bytes of a file, or all; memory is taken for what is there, and binary files end it early."""
    parts: list[bytes] = []
    left = limit
    with open_file(path, name) as file:
        try:
            while piece := file.read(PIECE if left is None else min(PIECE, left)):
                refuse_binary(piece, name, first=not parts)
                parts.append(piece)
                left = None if left is None else left - len(piece)
            return b"".join(parts)
        except OSError as error:
            raise LensbenchError(f"{name} cannot be read: {reason(error)}") from error
        except MemoryError as error:
            raise LensbenchError(f"{name} is larger than the memory: read less of it with max_bytes") from error


def refuse_binary(raw: bytes, name: str, *, first: bool = True) -> None:
    """Raise :class:`NoText` for NUL bytes, which no text has; at the ``first`` of a file say what it is."""
    if b"\0" not in raw:
        return
    if first:
        refuse_known(raw, name)
        quarters = [raw[k:4096:4].count(0) >= len(raw[:4096]) // 4 for k in range(4)]
        if len(raw) >= 8 and 2 <= sum(quarters) <= 3:  # ASCII in UTF-16 or UTF-32: zeros at fixed places
            raise NoText(f"{name} looks like UTF-{16 if sum(quarters) == 2 else 32} text: save it as UTF-8")
    raise NoText(f"{name} is binary (it holds NUL bytes): expected UTF-8 text")


def refuse_known(raw: bytes, name: str) -> None:
    """Raise :class:`NoText` naming the kind of a file that is no UTF-8 text, where its beginning tells."""
    for start, what in MAGIC.items():
        if raw.startswith(start):
            raise NoText(f"{name} is {what}")


def decode(raw: bytes, name: str) -> str:
    """UTF-8 with or without a byte order mark; raises :class:`NoText` for anything else."""
    refuse_binary(raw, name)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse_known(raw, name)
        raise NoText(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def lines_of(path: Path, name: str, limit: int | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, ended by LF, CR LF or CR; none is longer than 64 MiB or 6 ``limit``.

    An escape of JSON takes at most six bytes for one of text. Without a limit there is none on lines either.
    """
    longest = None if limit is None else max(LINE_BYTES, 6 * limit)
    number = 0
    with open_file(path, name) as file:
        try:
            refuse_binary(file.read(PIECE), name)
            file.seek(0)
            while raw := file.readline(-1 if longest is None else longest + 1):
                for line in raw.splitlines():
                    number += 1
                    if longest is not None and len(line) > longest:
                        raise LensbenchError(
                            f"{name} line {number} is longer than {longest} bytes: end each object with a line feed"
                        )
                    yield number, decode(line, f"{name} line {number}")
        except OSError as error:
            raise LensbenchError(f"{name} cannot be read: {reason(error)}") from error
        except MemoryError as error:
            raise LensbenchError(f"{name} line {number + 1} is larger than the memory") from error


KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


def kind_of(value: Any) -> str:
    """What JSON calls a value; the name of its type where JSON has none like it."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


COPY_AGAIN = "copy the folder again, or repeat the command that wrote it"
"""What to do about a damaged file that lensbench wrote"""

DOWNLOAD_AGAIN = "copy or download it again"
"""What to do about a damaged file of another program"""


def read_json(path: Path, remedy: str | None = None, *, ours: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Raises :class:`LensbenchError` for anything else: it names the file and says what to do, the ``remedy`` where one is
    given. A file that is ``ours`` has no field twice.
    """
    remedy = remedy or (COPY_AGAIN if ours else DOWNLOAD_AGAIN)
    try:
        content = parse_json(decode(read_bytes(path, "it"), "it"), "it", None if ours else frozenset())
        if not isinstance(content, dict):
            raise LensbenchError(f"it holds {kind_of(content)} where an object is expected")
    except LensbenchError as error:
        raise LensbenchError(f"{path} is damaged: {error}; {remedy}") from error
    return content


def parse_json(text: str, name: str, once: frozenset[str] | None = frozenset()) -> Any:
    """A JSON document.

    Raises :class:`LensbenchError` for anything else, and where a key of ``once`` stands twice; None: where any does.

    Numbers of any length are read: of very long ones only the size is kept.
    """

    def row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            seen = Counter(keys)
            twice = next((key for key in keys if (once is None or key in once) and seen[key] > 1), None)
            if twice is not None:
                raise LensbenchError(f"{name} has the field {twice!r} twice")
        return found

    try:
        return json.loads(
            text,
            object_pairs_hook=row if once is None or once else None,
            parse_int=lambda digits: int(digits) if len(digits) < 400 else float(digits),
        )
    except RecursionError as error:
        raise LensbenchError(f"{name} is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        if not text.strip():
            raise LensbenchError(f"{name} is empty") from error
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        what = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        raise LensbenchError(f"{name} is not valid JSON ({what} at {line}column {error.colno})") from error
    except ValueError as error:
        raise LensbenchError(f"{name} is not valid JSON ({error})") from error
