"""GGUF files in parts, joined into one file in a cache folder: shards of gguf-split, and pieces of a file's bytes."""

import hashlib
import itertools
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from lensbench.errors import LensbenchError
from lensbench.models.gguf import quick_reading

SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""The end of the name of a file that llama.cpp's gguf-split wrote: a GGUF file of some of the tensors"""

PIECE = re.compile(
    r"(\.gguf[._-]?(part|split|chunk)?[._-]?(?P<behind>\d+|[a-z]{2})|[._-]part[._-]?(?P<before>\d+)\.gguf)$"
)
"""The end of the name of a piece of a GGUF file's bytes"""

OF_SHARDS = ("split.no", "split.count", "split.tensors.count")
"""What the metadata of a shard say of its set, and those of a whole file do not"""


@dataclass(frozen=True)
class _Part:
    """A file that holds a part of another."""

    path: Path
    whole: str
    """The name of the whole file"""
    number: int
    count: int | None
    """How many parts there are; None where the name does not say"""
    lettered: bool = False
    """Whether letters number it: aa, ab and so on"""

    @classmethod
    def of(cls, path: Path) -> "_Part | None":
        """What the name of a file says; None where it is no part."""
        shard = SHARD.search(path.name)
        if shard is not None and int(shard["count"]) > 1:
            return cls(path, SHARD.sub(".gguf", path.name), int(shard["number"]), int(shard["count"]))
        if (piece := PIECE.search(path.name)) is None:
            return None
        said = piece["behind"] or piece["before"]
        number = int(said) if said.isdigit() else 26 * (ord(said[0]) - ord("a")) + ord(said[1]) - ord("a")
        return cls(path, PIECE.sub(".gguf", path.name), number, None, lettered=not said.isdigit())


def is_part(path: Path) -> bool:
    """Whether the name of a file says that it holds a part of a GGUF file."""
    return _Part.of(path) is not None


def joined(source: str, files: Sequence[Path]) -> Path | None:
    """The whole GGUF file of those of ``files`` that are parts of one; None where none is, or a file is whole.

    It is joined once, in ``lensbench/gguf`` of the user's cache folder. Raises :class:`LensbenchError` for parts of several
    files, for those that lack one, and where there is no whole file when all are joined.
    """
    found = [part for part in map(_Part.of, files) if part is not None]
    if not found or any(f.suffix == ".gguf" and not is_part(f) for f in files):
        return None
    parts = _one_set(source, found)
    facts = [(str(p.path.resolve()), p.path.stat().st_size, p.path.stat().st_mtime_ns) for p in parts]
    place = _cache() / hashlib.sha256(repr(facts).encode()).hexdigest()[:16] / parts[0].whole
    if not place.is_file():
        _write(source, place, parts)
    return place


def siblings(path: Path) -> list[Path]:
    """The parts in the folder of a part that are of the same file."""
    part = _Part.of(path)
    others = map(_Part.of, sorted(path.parent.iterdir()))
    return [
        o.path for o in others if part is not None and o is not None and (o.whole, o.count) == (part.whole, part.count)
    ]


def files_of_packages(name: str) -> list[Path]:
    """The files of an installed package; of one that ships a part, those of the packages of the other parts, too.

    Their names differ in the number at their end alone. Raises :class:`importlib.metadata.PackageNotFoundError`.
    """
    files = _files_of(name)
    numbered = re.fullmatch(r"(.*?)(\d+)", name)
    if numbered is None or not any(map(is_part, files)) or any(f.suffix == ".gguf" and not is_part(f) for f in files):
        return files
    for number in itertools.count():
        other = f"{numbered[1]}{number}"
        try:
            files += _files_of(other) if number != int(numbered[2]) else []
        except metadata.PackageNotFoundError:
            if number > int(numbered[2]):
                return files
    return files


def _files_of(package: str) -> list[Path]:
    return [Path(str(file.locate())) for file in metadata.files(package) or []]


def _one_set(source: str, found: list[_Part]) -> list[_Part]:
    """The parts of the one file that there is, in their order; raises :class:`LensbenchError` for others."""
    sets = sorted({(part.whole, -1 if part.count is None else part.count) for part in found})
    if len(sets) > 1:
        said = [whole if count < 0 else f"{whole} in {count}" for whole, count in sets]
        raise LensbenchError(
            f"{source} holds parts of {len(sets)} GGUF files ({', '.join(said)}): name a part of one of them, gguf:FILE"
        )
    parts = sorted(found, key=lambda part: (part.number, part.path.name))
    numbers = [part.number for part in parts]
    if twice := next((a for a, b in itertools.pairwise(parts) if a.number == b.number), None):
        raise LensbenchError(f"{source} holds part {twice.number} of {twice.whole} twice")
    count = parts[0].count
    first = 1 if count is not None else 0 if parts[0].lettered else min(numbers[0], 1)
    wanted = range(first, first + (count or numbers[-1] - first + 1))
    if missing := sorted(set(wanted) - set(numbers)):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        last = f" of {count}" if count is not None else ""
        raise LensbenchError(
            f"{source} lacks part {missing[0]}{last} of {parts[0].whole}{others}; it has {parts[0].path.name}"
            + (f" to {parts[-1].path.name}" if len(parts) > 1 else "")
        )
    return parts


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "lensbench" / "gguf"


def _write(source: str, place: Path, parts: list[_Part]) -> None:
    """Join parts into ``place``, which is there whole or not at all; raises :class:`LensbenchError` where it is no file."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as aside:
            whole = Path(aside) / place.name
            with whole.open("wb") as file:
                (_join_bytes if parts[0].count is None else _join_shards)(file, [part.path for part in parts])
            _check_whole(source, whole)
            os.replace(whole, place)
    except ImportError as error:
        raise LensbenchError(
            f"{source}: joining the parts of a GGUF file needs the package gguf: pip install gguf"
        ) from error
    except OSError as error:
        raise LensbenchError(
            f"{source}: its parts cannot be joined in {place.parent}: {error.strerror or error}; set XDG_CACHE_HOME to a "
            "folder with room"
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LensbenchError(
            f"{source}: joined, its {len(parts)} parts are no whole GGUF file ({reason}): is one damaged, or the last "
            "missing? Parts may lie in packages or folders of their own"
        ) from error


def _join_bytes(into: BinaryIO, pieces: list[Path]) -> None:
    for piece in pieces:
        with piece.open("rb") as file:
            shutil.copyfileobj(file, into, 2**22)


def _join_shards(into: BinaryIO, shards: list[Path]) -> None:
    """One file of the metadata of the first shard and the tensors of all, as ``gguf-split --merge`` of llama.cpp does."""
    import gguf

    with quick_reading():
        readers = [gguf.GGUFReader(shard) for shard in shards]
    _check_shards(readers)
    first, tensors = readers[0], [(reader, tensor) for reader in readers for tensor in reader.tensors]
    fields = [field for name, field in first.fields.items() if not name.startswith("GGUF.")]
    begins = [field.offset for field in fields] + [_end_of_fields(first, fields)]
    metadata_of = [
        bytes(first.data[begin:end])
        for field, (begin, end) in zip(fields, itertools.pairwise(begins), strict=True)
        if field.name not in OF_SHARDS
    ]
    into.write(struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(tensors), len(metadata_of)))
    into.writelines(metadata_of)
    place, step = 0, first.alignment
    for _, tensor in tensors:
        name, shape = tensor.name.encode(), [int(n) for n in tensor.shape]
        into.write(struct.pack(f"<Q{len(name)}sI", len(name), name, len(shape)))
        into.write(struct.pack(f"<{len(shape)}QIQ", *shape, int(tensor.tensor_type), place))
        place += -(-int(tensor.n_bytes) // step) * step
    for reader, tensor in tensors:
        into.write(bytes(-into.tell() % step))
        into.write(reader.data[tensor.data_offset : tensor.data_offset + tensor.n_bytes].data)
    into.write(bytes(-into.tell() % step))


def _end_of_fields(reader: Any, fields: list[Any]) -> int:
    """Where the metadata of a file end: at its first tensor, or with its last value."""
    if reader.tensors:
        return int(reader.tensors[0].field.offset)
    last = fields[-1]
    key = 8 + len(last.name.encode()) + 4
    kind = struct.unpack_from("<I", reader.data, last.offset + key - 4)[0]
    return int(last.offset + key + reader._get_field_parts(last.offset + key, kind)[0])


def _check_shards(readers: list[Any]) -> None:
    """Raise ValueError where shards are not those of one file."""
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    if len(set(names)) < len(names):
        raise ValueError(f"two of them hold {next(n for n in names if names.count(n) > 1)}")
    said: Callable[[Any, str], int] = lambda reader, key: int(reader.fields[key].contents())  # noqa: E731
    for number, reader in enumerate(readers):
        if reader.byte_order != "I":
            raise ValueError("it is big-endian")
        if said(reader, "split.count") != len(readers) or said(reader, "split.no") != number:
            raise ValueError(
                f"part {number + 1} says that it is {said(reader, 'split.no') + 1} of {said(reader, 'split.count')}"
            )
        if said(reader, "split.tensors.count") != len(names):
            raise ValueError(f"they hold {len(names)} tensors of {said(reader, 'split.tensors.count')}")


def _check_whole(source: str, file: Path) -> None:
    """Raise where a file is no GGUF file, or ends before its tensors do; nothing without the package gguf."""
    try:
        import gguf
    except ImportError:
        return  # which loading it needs, and asks for
    with quick_reading():
        reader = gguf.GGUFReader(file)
    size = file.stat().st_size
    if any(tensor.data_offset + tensor.n_bytes > size for tensor in reader.tensors):
        raise ValueError("it ends before its last tensor does")
