"""Texts from the standard library, files, folders and the Hugging Face hub, as documents."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import detect_encoding
from typing import Any

from lensbench.errors import LensbenchError
from lensbench.runtime.environment import needs

BLOCK_BYTES = 8192  # about 2048 tokens of 4 bytes


MIN_LONE_BYTES = 8 * BLOCK_BYTES  # four splits and the three blocks dropped between them, with one to spare


HF_MAX_BYTES = 50_000_000


MIN_STDLIB_BYTES = 200


TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".py")


STDLIB_SUFFIXES = (".py", ".txt", ".rst")


STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")
)


@dataclass(frozen=True)
class Document:
    """One text: the unit that splits keep whole and that intervals resample."""

    name: str
    text: str


def read_documents(spec: str, max_bytes: int | None = None) -> list[Document]:
    """Read the documents of a corpus, in a fixed order and without blank ones.

    Reading stops at ``max_bytes`` bytes of text (UTF-8), cutting the last document at a character border; the default
    is no limit, except for ``hf:`` 50 MB. Raises LensbenchError for a spec that cannot be read.
    """
    if max_bytes is not None and max_bytes < 1:
        raise LensbenchError(f"max_bytes is {max_bytes}: it must be at least 1")
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        found = _read_stdlib()
    elif kind == "file" and rest:
        found = _read_path(rest, max_bytes)
    elif kind == "hf" and rest:
        found = _read_hub(rest)
        max_bytes = HF_MAX_BYTES if max_bytes is None else max_bytes
    else:
        raise LensbenchError(_unknown_spec(spec))
    try:
        documents = list(_take_bytes((d for d in found if d.text and not d.text.isspace()), max_bytes))
    except OSError as error:
        raise LensbenchError(f"{spec} cannot be read: {error.strerror}") from error
    if not documents:
        raise LensbenchError(f"{spec} holds no text: every document is blank")
    return documents


def _unknown_spec(spec: str) -> str:
    forms = {"stdlib": "stdlib", "file": "file:PATH[#FIELD]", "hf": "hf:NAME[/CONFIG][@SPLIT][#FIELD]"}
    nearest = difflib.get_close_matches(spec.partition(":")[0], forms, n=1, cutoff=0.4)
    if os.path.exists(spec):  # of a pathlib.Path, it raises for names too long to be one
        hint = f"; did you mean file:{spec}?"
    else:
        hint = f"; did you mean {forms[nearest[0]]}?" if nearest else ""
    return f"unknown corpus {spec!r}: a corpus is {', '.join(forms.values())}{hint}"


def _take_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = math.inf if max_bytes is None else max_bytes
    for document in documents:
        raw = document.text.encode()
        if len(raw) >= left:
            text = raw[: int(left)].decode(errors="ignore")  # only the character that the limit cuts is ignored
            if text and not text.isspace():
                yield Document(document.name, text)
            return
        left -= len(raw)
        yield document


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.suffix in STDLIB_SUFFIXES and p.is_file()}
    for name in sorted(found):
        if STDLIB_LEFT_OUT.intersection(name.split("/")[:-1]):
            continue
        if found[name].name.startswith("_sysconfigdata"):  # generated when the interpreter was built: paths and flags
            continue
        raw = found[name].read_bytes()
        if len(raw) < MIN_STDLIB_BYTES:
            continue
        try:
            encoding = detect_encoding(iter(raw.splitlines(keepends=True)).__next__)[0]
            text = raw.decode(encoding)
        except (SyntaxError, UnicodeDecodeError):  # a file in no readable encoding is data, not text: leave it out
            continue
        yield Document(name, text.replace("\r\n", "\n"))


def _read_path(rest: str, max_bytes: int | None) -> Iterator[Document]:
    path, field = Path(rest).expanduser(), None
    if not os.path.exists(path) and "#" in rest:  # a '#' may belong to the path: only one that is not there is cut
        before, _, field = rest.rpartition("#")
        path = Path(before).expanduser()
    if not os.path.exists(path):
        raise LensbenchError(f"file:{rest}: there is no such file or folder")
    if field == "":
        raise LensbenchError(f"file:{rest}: the field after '#' is empty; give its name or leave the '#' out")
    if path.is_dir():
        yield from _read_folder(path, field, max_bytes)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, path.name, field or "text")
    elif field is not None:
        raise LensbenchError(f"file:{rest}: only .jsonl files have fields; leave '#{field}' out")
    else:
        text = _decode(_beginning(path, max_bytes), path.name)
        if not text.strip():
            raise LensbenchError(f"{path.name} is empty: a corpus needs at least {MIN_LONE_BYTES} bytes of text")
        yield Document(path.name, text)


def _read_folder(folder: Path, field: str | None, max_bytes: int | None) -> Iterator[Document]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    names = [n for n in sorted(found) if not any(part.startswith(".") for part in n.split("/"))]
    names = [n for n in names if found[n].suffix in (*TEXT_SUFFIXES, ".jsonl")]
    if not names:
        raise LensbenchError(f"folder {folder.name!r} holds no texts: expected {', '.join(TEXT_SUFFIXES)} or .jsonl")
    for name in names:
        if found[name].suffix != ".jsonl":
            yield Document(name, _decode(_beginning(found[name], max_bytes), name))
        elif found[name].stat().st_size:
            yield from _read_jsonl(found[name], name, field or "text")


def _beginning(path: Path, max_bytes: int | None) -> bytes:
    """A file, or somewhat more of it than ``max_bytes`` up to the end of a character."""
    if max_bytes is None:
        return path.read_bytes()
    size = max_bytes + 8  # a byte order mark and the character that is cut
    with path.open("rb") as file:
        raw = file.read(size)
    if len(raw) < size:
        return raw
    last = len(raw) - 1
    while raw[last] & 0xC0 == 0x80 and last > size - 4:  # a UTF-8 continuation byte
        last -= 1
    return raw[:last]


def _decode(raw: bytes, name: str) -> str:
    if b"\0" in raw:
        raise LensbenchError(f"{name} is binary (it holds NUL bytes): a corpus is UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LensbenchError(f"{name} is not UTF-8 (byte {error.start}): a corpus is UTF-8 text") from error


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    empty = True
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decode(raw, f"{name} line {number}")
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LensbenchError(f"{name} line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise LensbenchError(f"{name} line {number} is a JSON {type(row).__name__}: expected an object")
            if field not in row:
                raise LensbenchError(f"{name} line {number} has no field {field!r}: {_fields_hint(row)}")
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise LensbenchError(f"{name} line {number}: field {field!r} is a {kind}, and must be a string")
            yield Document(f"{name}:{number}", _mend_surrogates(row[field]))
    if empty:
        raise LensbenchError(f"{name} is empty: give one JSON object per line, with a field {field!r}")


def _fields_hint(row: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(repr, row)) or 'none'}; name the one to use after a '#'"


def _mend_surrogates(text: str) -> str:
    # JSON may escape half a character ("\ud83d"), which no UTF-8 text can hold: it becomes U+FFFD.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _read_hub(rest: str) -> Iterator[Document]:
    match = re.fullmatch(r"(?P<path>[^@#]+)(@(?P<split>[^#]+))?(#(?P<field>.+))?", rest)
    parts = match["path"].split("/") if match else []
    if match and Path(match["path"]).is_dir():
        candidates: list[tuple[str, str | None]] = [(match["path"], None)]
    elif len(parts) == 1 and parts[0]:
        candidates = [(parts[0], None)]
    elif len(parts) == 2 and all(parts):  # ORG/NAME, or NAME/CONFIG: only the hub knows
        candidates = [("/".join(parts), None), (parts[0], parts[1])]
    elif len(parts) == 3 and all(parts):
        candidates = [("/".join(parts[:2]), parts[2])]
    else:
        raise LensbenchError(f"hf:{rest} is no dataset: expected hf:NAME[/CONFIG][@SPLIT][#FIELD]")
    assert match is not None
    split, field = match["split"] or "train", match["field"] or "text"
    rows = _hub_rows(rest, candidates, split)
    for number, row in enumerate(rows):
        if field not in row:
            raise LensbenchError(f"hf:{rest} has no field {field!r}: {_fields_hint(row)}")
        if row[field] is None:  # datasets made from web pages have null texts here and there
            continue
        if not isinstance(row[field], str):
            kind = type(row[field]).__name__
            raise LensbenchError(f"hf:{rest} row {number}: field {field!r} is a {kind}, and must be a string")
        yield Document(f"{split}:{number}", _mend_surrogates(row[field]))


def _hub_rows(rest: str, candidates: list[tuple[str, str | None]], split: str) -> Iterator[Mapping[str, Any]]:
    needs("hub", "datasets")
    import datasets  # takes a second to import, and only this function needs it

    # The hub's client lets through errors of its HTTP and file system libraries, of parsers and its own, with no
    # common class: whatever fails in here is one line to the user, with the cause chained for --debug.
    reasons = []
    for name, config in candidates:
        try:
            yield from datasets.load_dataset(name, config, split=split, streaming=True)
            return
        except datasets.exceptions.DatasetNotFoundError as error:
            reasons.append(" ".join(str(error).split())[:300])
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise LensbenchError(f"hf:{rest} cannot be read: {type(error).__name__}: {reason}") from error
    raise LensbenchError(f"hf:{rest} cannot be read: {'; '.join(reasons)}")


def _n_bytes(document: Document) -> int:
    return len(document.text.encode())
