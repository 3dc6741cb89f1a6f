"""Documents read from the standard library, installed packages, files, folders and the Hugging Face hub."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from glob import glob, has_magic
from logging import CRITICAL
from pathlib import Path
from typing import Any

from lensbench.data.columns import check_column
from lensbench.data.installed import package_texts, standard_library
from lensbench.errors import LensbenchError
from lensbench.runtime.environment import needs
from lensbench.runtime.texts import NoText, decode, kind_of, lines_of, parse_json, printable, read_bytes, reason

BLOCK_BYTES = 8192  # about 2048 tokens of 4 bytes


MIN_LONE_BYTES = 8 * BLOCK_BYTES  # four splits, three blocks dropped between them, and one more


HF_MAX_BYTES = 50_000_000


TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".py")


JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One text: a split has the whole of it, and intervals resample it as a unit."""

    name: str
    text: str


Say = Callable[[str], None]


def warn(line: str) -> None:
    """Say a line as a warning of Python."""
    warnings.warn(line, stacklevel=3)


@dataclass
class Oddities:
    """What reading leaves out or changes: counted, and said in one line."""

    nulls: int = 0
    halves: int = 0
    others: list[str] = field(default_factory=list)
    """Files of other kinds"""
    unread: list[str] = field(default_factory=list)
    """Files of a folder that are named like text and are none"""

    def line(self, spec: str) -> str:
        """What was left out and changed; empty where nothing was."""
        found = [
            *counted((self.nulls, "text(s) that are null, left out")),
            *counted((self.halves, "text(s) with half of a surrogate pair, replaced by U+FFFD")),
            *self.not_text(", left out"),
        ]
        return f"{printable(spec)}: {'; '.join(found)}" if found else ""

    def not_text(self, done: str = "") -> list[str]:
        """The files that are not text, by what is wrong with them; ``done`` says what became of them."""
        return counted(
            (len(self.others), f"file(s) of other kinds{done}: {listed(self.others)}"),
            (len(self.unread), f"file(s) that are not UTF-8 text{done}: {listed(self.unread)}"),
        )


def counted(*counts: tuple[int, str]) -> list[str]:
    """Each thing with its number; none that are 0."""
    return [f"{count} {what}" for count, what in counts if count]


MOST_LISTED = 8
"""Files that a line names"""


def listed(names: list[str]) -> str:
    """Names in a line; of many the first ones, and how many more there are."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"{', '.join(names[:MOST_LISTED])}{more}"


def read_documents(spec: str, max_bytes: int | None = None, *, say: Say = warn, strict: bool = False) -> list[Document]:
    """The documents of a corpus, in a fixed order and without blank ones.

    Reading stops at ``max_bytes`` bytes of text (UTF-8) and cuts the last document between two characters. By default
    there is no limit; for ``hf:`` it is 50 MB. Texts that are null are left out; ``say`` gets one line on how many, by
    default a warning; files of a folder that are no text are left out and named, or with ``strict`` refused.
    Raises LensbenchError for a spec that cannot be read.
    """
    if max_bytes is not None and max_bytes < 1:
        raise LensbenchError(f"max_bytes is {max_bytes}: it must be at least 1")
    kind, _, rest = spec.partition(":")
    odd = Oddities()
    if spec == "stdlib":
        found: Iterator[Document] = (Document(*both) for both in standard_library())
    elif kind == "package" and rest:
        found = (Document(*both) for both in package_texts(rest))
    elif kind == "file" and rest:
        found = _read_path(rest, max_bytes, odd)
    elif kind == "hf" and rest:
        found = _read_hub(rest, odd)
        max_bytes = HF_MAX_BYTES if max_bytes is None else max_bytes
    else:
        raise LensbenchError(unknown_spec(spec))
    try:
        documents = list(_take_bytes((d for d in found if d.text and not d.text.isspace()), max_bytes))
    except OSError as error:
        raise LensbenchError(f"{printable(spec)} cannot be read: {reason(error)}") from error
    if strict and (odd.others or odd.unread):
        raise LensbenchError(
            f"{printable(spec)} is refused (--strict): {'; '.join(odd.not_text())}; remove them, name the texts by a "
            "pattern (file:FOLDER/*.txt), or leave out --strict, which then skips them"
        )
    if line := odd.line(spec):
        say(line)
    if not documents:
        raise LensbenchError(f"{printable(spec)} holds no text: every document is blank")
    return documents


def unknown_spec(spec: str) -> str:
    """What to say of a corpus that names no kind of text."""
    forms = {
        "stdlib": "stdlib", "file": "file:PATH[#FIELD]", "hf": "hf:NAME[/CONFIG][@SPLIT][#FIELD]", "package": "package:NAME",
    }  # fmt: skip
    nearest = difflib.get_close_matches(spec.partition(":")[0], forms, n=1, cutoff=0.4)
    if os.path.exists(spec):  # Path.exists raises for names that are too long
        hint = f": did you mean file:{spec}?"
    else:
        hint = f": did you mean {forms[nearest[0]]}?" if nearest else ""
        if not hint and ":" not in spec and Path(spec).name != Path(spec).stem:
            hint = ": there is no file of this name here"
    what = f"corpus is {', '.join(forms.values())}, or several, joined by ' + '"
    return f"unknown corpus {spec!r}{hint}{' A' if hint.endswith('?') else '; a'} {what}"


def _take_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = math.inf if max_bytes is None else max_bytes
    for document in documents:
        raw = document.text.encode()
        if len(raw) >= left:
            text = raw[: int(left)].decode(errors="ignore")  # ignores only the character that the limit cuts
            if text and not text.isspace():
                yield Document(document.name, text)
            return
        left -= len(raw)
        yield document


def _exists(path: Path) -> bool:
    """Whether a path leads to something; raises where the system does not let one look."""
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return False
        raise LensbenchError(f"{printable(str(path))} cannot be read: {reason(error)}") from error


def _expanded(rest: str) -> Path:
    try:
        return Path(rest).expanduser()
    except RuntimeError as error:  # ~nobody
        raise LensbenchError(f"file:{printable(rest)}: {error}") from error


def refuse_absent(rest: str) -> None:
    """Raise :class:`LensbenchError` where ``file:REST`` names no file, no folder and no pattern that matches one."""
    paths = [_expanded(part) for part in {rest, rest.rpartition("#")[0] or rest}]  # what follows a '#' may be a field
    if not any(_exists(path) or _matching(path) for path in paths):
        raise _absent(_expanded(rest), printable(rest))


def _absent(path: Path, whole: str) -> LensbenchError:
    what = "nothing matches this pattern" if has_magic(str(path)) else "there is no such file or folder"
    return LensbenchError(f"file:{whole}: {what}")


def _read_path(rest: str, max_bytes: int | None, odd: Oddities) -> Iterator[Document]:
    path, field = _expanded(rest), None
    if not _exists(path) and (found := _matching(path)):
        yield from _read_files(found, None, max_bytes, odd)
        return
    if not _exists(path) and "#" in rest:  # a '#' may belong to an existing path
        before, _, field = rest.rpartition("#")
        path = _expanded(before)
    name, whole = printable(path.name), printable(rest)
    matching = {} if _exists(path) else _matching(path)
    if not _exists(path) and not matching:
        raise _absent(path, whole)
    if field == "":
        raise LensbenchError(f"file:{whole}: the field after '#' is empty; give its name or leave the '#' out")
    if matching:
        yield from _read_files(matching, field, max_bytes, odd)
    elif path.is_dir():
        yield from _read_folder(path, field, max_bytes, odd)
    elif path.suffix.lower() in JSONL_SUFFIXES:
        yield from _read_jsonl(path, name, field or "text", max_bytes, odd)
    elif path.suffix.lower() == ".json":
        raise LensbenchError(f"{name} is one JSON document: give a .jsonl file, one object per line (jq -c '.[]')")
    elif field is not None:
        raise LensbenchError(f"file:{whole}: only .jsonl files have fields; leave '#{printable(field)}' out")
    else:
        yield _read_text(path, name, max_bytes)


def _read_text(path: Path, name: str, max_bytes: int | None) -> Document:
    text = decode(_beginning(path, name, max_bytes), name)
    if not text.strip():
        raise LensbenchError(f"{name} is empty: give a file that holds text")
    return _checked(text, name)


def _checked(text: str, name: str) -> Document:
    """The text as a document; raises :class:`LensbenchError` for lines of JSON under the name of a text."""
    first = text[: 1 << 20].lstrip().partition("\n")[0].strip()
    if first.startswith('{"') and first.endswith("}") and _is_object(first):
        raise LensbenchError(f"{name} holds lines of JSON: name it .jsonl, so that each is read as a document")
    return Document(name, text)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line, ""), dict)
    except LensbenchError:
        return False


def _read_folder(folder: Path, field: str | None, max_bytes: int | None, odd: Oddities) -> Iterator[Document]:
    found = _files_in(folder)
    if not any(_is_text(path) for path in found.values()):
        raise LensbenchError(
            f"folder {printable(folder.name)!r} holds no texts: expected {', '.join(TEXT_SUFFIXES)} or .jsonl"
        )
    yield from _read_files(found, field, max_bytes, odd)


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES)


def _matching(pattern: Path) -> dict[str, Path]:
    """The files that match a pattern (``**`` for folders in folders), by their place below what has no wildcard."""
    if not has_magic(str(pattern)):
        return {}
    wild = next(k for k, part in enumerate(pattern.parts) if has_magic(part))
    base = Path(*pattern.parts[:wild])
    found = (Path(path) for path in glob(str(pattern), recursive=True))
    return {path.relative_to(base).as_posix(): path for path in found if path.is_file()}


def _read_files(found: dict[str, Path], field: str | None, max_bytes: int | None, odd: Oddities) -> Iterator[Document]:
    """The texts among files, in the order of their places; other files are left out, and counted."""
    odd.others += [printable(place) for place in sorted(found) if not _is_text(found[place])]
    for place in sorted(place for place, path in found.items() if _is_text(path)):
        name, path = printable(place), found[place]
        if path.suffix.lower() not in JSONL_SUFFIXES:
            try:
                text = decode(_beginning(path, name, max_bytes), name)
            except NoText:
                odd.unread.append(name)
                continue
            yield _checked(text, name)
        elif _exists(path) and not path.stat().st_size:
            continue
        else:
            yield from _read_jsonl(path, name, field or "text", max_bytes, odd)


def _files_in(folder: Path) -> dict[str, Path]:
    """All that a folder holds other than folders and hidden things, by place; links are followed, each folder once."""
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        place = printable(os.path.relpath(error.filename or folder, folder.parent))
        raise LensbenchError(f"folder {place!r} cannot be read: {reason(error)}") from error

    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in seen:  # a link back
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in files if not name.startswith("."))
        found |= {path.relative_to(folder).as_posix(): path for path in paths}
    return found


def _beginning(path: Path, name: str, max_bytes: int | None) -> bytes:
    """The bytes of a file; of a long one slightly more than ``max_bytes``, up to the end of a character."""
    if max_bytes is None:
        return read_bytes(path, name)
    size = max_bytes + 8  # a byte order mark and the character that is cut
    raw = read_bytes(path, name, size)
    if len(raw) < size:
        return raw
    last = len(raw) - 1
    while raw[last] & 0xC0 == 0x80 and last > size - 4:  # a UTF-8 continuation byte
        last -= 1
    return raw[:last]


def _read_jsonl(path: Path, name: str, field: str, max_bytes: int | None, odd: Oddities) -> Iterator[Document]:
    empty = True
    once = frozenset((field, *field.split(".")))
    for number, line in lines_of(path, name, max_bytes):
        if not line.strip():
            continue
        empty, place = False, f"{name} line {number}"
        try:
            row = parse_json(line, place, once)
        except LensbenchError as error:
            raise LensbenchError(f"{error}; mend or remove it: each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise LensbenchError(f"{place} is a JSON {type(row).__name__}: expected an object on each line")
        text = _text_of(row, field, place, odd)
        if text is not None:
            yield Document(f"{name}:{number}", text)
    if empty:
        raise LensbenchError(f"{name} is empty: give one JSON object per line, with a field {field!r}")


def _text_of(row: Mapping[str, Any], field: str, place: str, odd: Oddities) -> str | None:
    """The text in a field of a row, ``a.b`` for one within another; None for null, which is counted."""
    found: Any = row
    for key in [field] if field in row else field.split("."):
        if found is None:
            break
        if not isinstance(found, Mapping) or key not in found:
            raise LensbenchError(f"{place} has no field {field!r}: {_fields_hint(row)}")
        found = found[key]
    if found is None:
        odd.nulls += 1
        return None
    if not isinstance(found, str):
        raise LensbenchError(f"{place}: field {field!r} is {kind_of(found)}, and must be a string")
    # JSON can escape half a character ("\\ud83d"), which UTF-8 cannot encode: it becomes U+FFFD.
    text = found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    odd.halves += any("\ud800" <= c <= "\udfff" for c in found) and "\ufffd" in text
    return text


def _fields_hint(row: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(repr, row)) or 'none'}; name the one to use after a '#'"


def _read_hub(rest: str, odd: Oddities) -> Iterator[Document]:
    match = re.fullmatch(r"(?P<path>[^@#]+)(@(?P<split>[^#]+))?(#(?P<field>.+))?", rest)
    parts = match["path"].split("/") if match else []
    if match and Path(match["path"]).is_dir():
        candidates: list[tuple[str, str | None]] = [(match["path"], None)]
    elif len(parts) == 1 and parts[0]:
        candidates = [(parts[0], None)]
    elif len(parts) == 2 and all(parts):  # ORG/NAME or NAME/CONFIG: only the hub can tell
        candidates = [("/".join(parts), None), (parts[0], parts[1])]
    elif len(parts) == 3 and all(parts):
        candidates = [("/".join(parts[:2]), parts[2])]
    else:
        raise LensbenchError(f"hf:{printable(rest)} is no dataset: expected hf:NAME[/CONFIG][@SPLIT][#FIELD]")
    assert match is not None
    split, field = match["split"] or "train", match["field"] or "text"
    if Path(match["path"]).is_dir():
        _check_folder(Path(match["path"]), rest, field, odd)
    with closing(_hub_rows(rest, candidates, split)) as rows:
        for number, row in enumerate(rows):
            text = _text_of(row, field, f"hf:{printable(rest)} row {number}", odd)
            if text is not None:
                yield Document(f"{split}:{number}", text)


def _hub_rows(
    rest: str, candidates: list[tuple[str, str | None]], split: str
) -> Generator[Mapping[str, Any], None, None]:
    needs("hub", "datasets")
    import datasets  # takes a second to import, and only this function needs it

    # The hub's client raises errors of its HTTP and file system libraries, of parsers and of its own, without a common
    # class. Every failure becomes one line; the cause is chained for --debug.
    reasons = []
    verbosity = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(CRITICAL)  # it would say errors in lines of its own
        for name, config in candidates:
            try:
                yield from datasets.load_dataset(name, config, split=split, streaming=True)
                return
            except datasets.exceptions.DatasetNotFoundError as error:
                reasons.append(_hub_reason(error))
            except Exception as error:
                what = _hub_reason(error)
                raise LensbenchError(f"hf:{printable(rest)} cannot be read: {type(error).__name__}: {what}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    raise LensbenchError(f"hf:{printable(rest)} cannot be read: {'; '.join(reasons)}")


UNCLEAR = {
    "BatchSize must be greater than 0": "a file of it has no rows: take the file away",
    "Multiple matches for FieldRef": "a column of that name stands twice in a file: rename one of them",
    "codec can't decode": "a file of it is not UTF-8: save it as UTF-8",
    "saved using `save_to_disk`": "it was written by save_to_disk: write it with to_parquet into a folder of its own",
    "column names don't match": "its files have different columns: keep files of the same columns in it",
    "maximum recursion depth": "a row of it is nested too deeply to be read",
}
"""Parts of messages of datasets that say nothing to a user -> what to say"""


def _hub_reason(error: Exception) -> str:
    """The reason that the reader of datasets gives, in one line."""
    line = printable(" ".join(str(error).split()))
    return next((said for part, said in UNCLEAR.items() if part in line), line[:300])


HF_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
}
"""Ending of a file in a local folder of ``hf:`` -> the kind that datasets reads it as; it reads files of one kind only"""


NO_DATA = frozenset(("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))


def _check_folder(folder: Path, rest: str, field: str, odd: Oddities) -> None:
    """Count the files of a local folder that datasets leaves out in silence, and refuse one whose texts it would turn.

    It reads the kind of file that most are of.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return  # it names its files itself
    found = {place: path for place, path in _files_in(folder).items() if path.name not in NO_DATA}
    kinds = Counter(kind for path in found.values() if (kind := HF_KINDS.get(path.suffix.lower())))
    most = max(kinds.values(), default=0)
    kept = next((kind for kind, count in kinds.items() if count == most), "")
    read = (HF_KINDS.get(path.suffix.lower()) for _, path in sorted(found.items()))
    odd.others += [
        printable(place) for place, kind in zip(sorted(found), read, strict=True) if kind not in (None, kept)
    ]
    for place, path in sorted(found.items()):
        if kinds[HF_KINDS.get(path.suffix.lower(), "")] != most:
            continue
        try:
            check_column(path, place, field)
        except LensbenchError as error:
            raise LensbenchError(f"hf:{printable(rest)}: {error}") from error


def _n_bytes(document: Document) -> int:
    return len(document.text.encode())
