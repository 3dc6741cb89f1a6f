"""A corpus of several sources, ``stdlib + package:numpy + file:FOLDER``: read in this order, without near-duplicates."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lensbench.data.duplicates import duplicate_groups
from lensbench.data.installed import installed_version
from lensbench.data.reading import Document, Say, read_documents, refuse_absent, unknown_spec, warn
from lensbench.errors import LensbenchError

JOIN = " + "
"""What stands between two sources of a corpus"""


@dataclass(frozen=True)
class Source:
    """A part of a corpus, by what it held."""

    spec: str
    checksum: str
    """SHA-256 (hex) over names and texts of its documents, independent of their order"""
    documents: int
    bytes: int
    """Of its texts in UTF-8"""
    duplicates: int = 0
    """Documents that were left out: near-duplicates of another, of this or an earlier source"""
    version: str | None = None
    """Of an installed package"""


@dataclass(frozen=True)
class Read:
    """What reading a corpus gave."""

    documents: list[Document]
    sources: tuple[Source, ...]


def sources_of(spec: str) -> list[str]:
    """The sources that a corpus names, joined by `` + ``; a path may hold that, too, where no source follows."""
    return [part.strip() for part in re.split(r"\s\+\s+(?=stdlib\b|file:|hf:|package:)", spec)]


def refuse_missing(spec: str) -> None:
    """Raise :class:`LensbenchError` where a corpus names a kind of source, a file or a package that there is not."""
    for source in sources_of(spec):
        kind, _, rest = source.partition(":")
        if source != "stdlib" and (kind not in ("file", "hf", "package") or not rest):
            raise LensbenchError(unknown_spec(source))
        if kind == "file":
            refuse_absent(rest)
    refuse_missing_packages(spec)


def refuse_missing_packages(spec: str) -> None:
    """Raise :class:`LensbenchError` where a corpus names a package that is not installed."""
    for source in sources_of(spec):
        if source.startswith("package:"):
            installed_version(source.removeprefix("package:"))


def read_sources(spec: str, max_bytes: int | None = None, *, say: Say = warn, strict: bool = False) -> Read:
    """The documents of all sources of ``spec``, in its order, and what each held.

    Of several sources one document of each group of near-duplicates is kept, the first; of a single one all are. Reading
    stops at ``max_bytes`` in all. A name that an earlier source has is followed by the number of its source. Arguments and
    errors are those of :func:`lensbench.data.reading.read_documents`.
    """
    names = sources_of(spec)
    parts: list[list[Document]] = []
    left = max_bytes
    for number, name in enumerate(names, start=1):
        if left is not None and left < 1:
            raise LensbenchError(
                f"{max_bytes} bytes end before {name}; raise corpus.max_bytes, or leave that source out"
            )
        parts.append(read_documents(name, left, say=say, strict=strict))
        if left is not None:
            left -= sum(len(document.text.encode()) for document in parts[-1])
        taken = {document.name for part in parts[:-1] for document in part}
        parts[-1] = [Document(f"{d.name} ({number})", d.text) if d.name in taken else d for d in parts[-1]]
    documents = [document for part in parts for document in part]
    kept = np.ones(len(documents), dtype=bool)
    if len(parts) > 1:
        kept[:] = False
        kept[np.unique(duplicate_groups([d.text for d in documents]), return_index=True)[1]] = True
    ends = np.cumsum([len(part) for part in parts])
    sources = tuple(
        described(name, part, int((~kept[end - len(part) : end]).sum()))
        for name, part, end in zip(names, parts, ends, strict=True)
    )
    return Read([document for document, keep in zip(documents, kept, strict=True) if keep], sources)


def described(spec: str, documents: list[Document], duplicates: int) -> Source:
    """What a source held."""
    kind, _, rest = spec.partition(":")
    return Source(
        spec,
        checksum(documents),
        len(documents),
        sum(len(document.text.encode()) for document in documents),
        duplicates,
        installed_version(rest) if kind == "package" else None,
    )


def checksum(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over names and texts of documents, independent of their order."""

    # Names and texts are hashed to a fixed size first, so that no text can imitate a border between two of them.
    def digest(text: str) -> bytes:  # file names that are not UTF-8 hold surrogates
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    return hashlib.sha256(b"".join(sorted(digest(d.name) + digest(d.text) for d in documents))).hexdigest()
