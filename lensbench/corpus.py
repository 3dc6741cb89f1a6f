"""Text to documents in four splits, token ids, and windows with scored positions.

A corpus is named by a spec: ``stdlib`` (sources and documentation of the running interpreter's standard library: needs
no network), ``file:PATH[#FIELD]`` (a text, a ``.jsonl``, or a folder of them) or ``hf:NAME[/CONFIG][@SPLIT][#FIELD]``
(a Hugging Face dataset, streamed). Splits are disjoint by document, and near-duplicates share a split.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import detect_encoding
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lensbench.errors import LensbenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "fit", "dev", "eval")
FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.62, "fit": 0.12, "dev": 0.06, "eval": 0.20})
END_OF_TEXT = "<|endoftext|>"

MIN_DOCUMENTS = 20  # with fewer, documents are cut into blocks as a lone text is
BLOCK_BYTES = 8192  # about 2048 tokens of 4 bytes
MIN_LONE_BYTES = 8 * BLOCK_BYTES  # four splits and the three blocks dropped between them, with one to spare
LARGEST_GROUP = 0.25  # of the smallest split
MIN_WINDOW = 32
GRAM_WORDS = 13
MAX_JACCARD = 0.5
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


@dataclass(frozen=True)
class Corpus:
    """Documents in four splits."""

    spec: str
    """What the corpus was loaded from."""
    checksum: str
    """SHA-256 (hex) over names and texts of all documents read, whatever their order."""
    splits: dict[str, tuple[Document, ...]]
    """The documents of each of ``SPLITS``; empty where the fraction is 0."""


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document, its beginning-of-text id (where the tokenizer has one) in front."""

    name: str
    ids: NDArray[np.int32]
    """int32 [n]"""
    n_bytes: NDArray[np.int32]
    """int32 [n]: bytes of text each token stands for, 0 for the beginning-of-text id; the sum is the text's size."""


@dataclass(frozen=True)
class Windows:
    """S windows of at most T tokens, with at most P scored positions each; none crosses a document or overlaps."""

    ids: NDArray[np.int64]
    """int64 [S, T], padded on the right with 0"""
    lengths: NDArray[np.int64]
    """int64 [S]: tokens in the window"""
    positions: NDArray[np.int64]
    """int64 [S, P]: sorted; each is followed by a token of the same window. Invalid entries repeat the last valid."""
    valid: NDArray[np.bool_]
    """bool [S, P]: False where a short window has fewer than P positions"""
    documents: NDArray[np.int64]
    """int64 [S]: index into ``document_names``"""
    document_names: tuple[str, ...]
    """The documents that at least one window was drawn from, and no others"""

    def scored(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of some windows ``[s, T]``, and of each scored position its window (from 0) and place, ``[n]`` each."""
        row, column = np.nonzero(self.valid[rows])
        return self.ids[rows], row, self.positions[rows][row, column]

    def targets(self, rows: slice) -> NDArray[np.int64]:
        """Token id behind each scored position of some windows, ``[n]``."""
        row, column = np.nonzero(self.valid[rows])
        return self.ids[rows][row, self.positions[rows][row, column] + 1]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions_read(self) -> int:
        return self.ids.shape[1]

    @property
    def inside(self) -> NDArray[np.bool_]:
        """bool [S, T]: False where there is padding"""
        return np.arange(self.ids.shape[1]) < self.lengths[:, None]

    def take(self, rows: NDArray[np.int64]) -> Windows:
        """Some of the windows."""
        kept, documents = np.unique(self.documents[rows], return_inverse=True)
        return Windows(
            ids=self.ids[rows],
            lengths=self.lengths[rows],
            positions=self.positions[rows],
            valid=self.valid[rows],
            documents=documents,
            document_names=tuple(self.document_names[k] for k in kept),
            sequence=self.sequence[rows],
            next_bytes=self.next_bytes[rows],
        )

    def spread(self, count: int) -> Windows:
        """So many of them, or all, evenly spread over their order."""
        return self.take(np.unique(np.linspace(0, len(self.ids) - 1, min(count, len(self.ids))).astype(np.int64)))

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64 [S]: number of the cluster that a window's document belongs to, see :func:`clusters_of`"""
        of = clusters_of(self.document_names)
        _, number = np.unique([of[name] for name in self.document_names], return_inverse=True)
        return number.astype(np.int64)[self.documents]

    sequence: NDArray[np.int64]
    """int64 [S]: which window of its document it is; the one numbered k begins at token k * T"""
    next_bytes: NDArray[np.int32]
    """int32 [S, P]: bytes of the token at position + 1, the scored one; 0 where invalid"""


# Reading


FEWEST_CLUSTERS = 64
"""Of fewer clusters the intervals are not to be trusted."""


def clusters_of(names: Iterable[str]) -> dict[str, str]:
    """The cluster of each document, by name: what is resampled as one, since what it holds is alike.

    Files of one top folder (a package of the standard library, say) are one cluster where that leaves at least 64;
    elsewhere every document is its own.
    """
    known = sorted(set(names))
    folders = {name: name.partition("/")[0] for name in known}
    return folders if len(set(folders.values())) >= FEWEST_CLUSTERS else {name: name for name in known}


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


# Splitting


def load_corpus(
    spec: str, *, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0, max_bytes: int | None = None
) -> Corpus:
    """Read a corpus and split it.

    ``fractions`` are shares of the bytes, one for each of ``SPLITS``, of which only train may be 0. Whole documents are
    assigned, near-duplicates together; fewer than 20 documents are cut into blocks of 8192 bytes, laid out in four
    contiguous sections with a block dropped at each border (the seed then plays no part). Raises LensbenchError for a
    corpus that cannot be read or is too short, and for fractions that are not shares.
    """
    _check_fractions(fractions)
    documents = read_documents(spec, max_bytes)
    if len(documents) < MIN_DOCUMENTS:
        splits = _split_blocks(spec, documents, fractions)
    else:
        splits = _split_documents(spec, documents, fractions, seed)
    return Corpus(spec, _checksum(documents), splits)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if set(fractions) != set(SPLITS):
        raise LensbenchError(f"fractions are given for {sorted(fractions)}: they must be given for {', '.join(SPLITS)}")
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise LensbenchError(f"fractions sum to {sum(fractions.values()):g}: they must sum to 1")
    if fractions["train"] < 0 or min(fractions[s] for s in SPLITS[1:]) <= 0:
        raise LensbenchError("fractions of fit, dev and eval must be above 0, and that of train at least 0")


def _checksum(documents: Iterable[Document]) -> str:
    # Each name and text is hashed to a fixed size first, so that no text can imitate a border between two.
    def digest(text: str) -> bytes:  # file names that are not UTF-8 hold surrogates
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    return hashlib.sha256(b"".join(sorted(digest(d.name) + digest(d.text) for d in documents))).hexdigest()


def _n_bytes(document: Document) -> int:
    return len(document.text.encode())


def _split_documents(
    spec: str, documents: list[Document], fractions: Mapping[str, float], seed: int
) -> dict[str, tuple[Document, ...]]:
    groups = duplicate_groups([d.text for d in documents])
    sizes = np.bincount(groups, weights=[_n_bytes(d) for d in documents])  # [groups] bytes
    wanted = [s for s in SPLITS if fractions[s] > 0]
    if len(sizes) < len(wanted):
        raise LensbenchError(
            f"{spec}: near-duplicates joined, {len(documents)} documents are {len(sizes)}, "
            f"too few for {len(wanted)} splits"
        )
    targets = {s: fractions[s] * float(sizes.sum()) for s in wanted}
    filled = dict.fromkeys(wanted, 0.0)
    split_of: dict[int, str] = {}

    def assign(group: int, split: str) -> None:
        split_of[group] = split
        filled[split] += float(sizes[group])

    order = [int(g) for g in np.random.default_rng(seed).permutation(len(sizes))]
    # A group that would fill much of a small split goes to the first one. No more than those: were all long documents
    # kept out of eval, it would be another kind of text. What one document may add is capped when windows are drawn.
    limit = max(LARGEST_GROUP * min(targets.values()), 4 * sizes.mean())
    large = sorted((g for g in order if sizes[g] > limit), key=lambda g: -sizes[g])
    for group in large[: len(sizes) - len(wanted) + 1]:  # the other splits are left a group each
        if filled[wanted[0]] == 0 or filled[wanted[0]] + sizes[group] <= targets[wanted[0]]:
            assign(group, wanted[0])
    for group in order:
        if group not in split_of:
            # The split least full for its size: the empty ones first, so that none stays empty.
            assign(group, min(wanted, key=lambda s: filled[s] / targets[s]))
    return {s: tuple(d for d, g in zip(documents, groups, strict=True) if split_of[int(g)] == s) for s in SPLITS}


def _split_blocks(
    spec: str, documents: list[Document], fractions: Mapping[str, float]
) -> dict[str, tuple[Document, ...]]:
    total = sum(map(_n_bytes, documents))
    if total < MIN_LONE_BYTES:
        raise LensbenchError(
            f"{spec} is too short: {total} bytes in {len(documents)} document(s), "
            f"where {MIN_LONE_BYTES} bytes or {MIN_DOCUMENTS} documents are needed"
        )
    blocks = [block for document in documents for block in _cut_blocks(document)]
    wanted = [s for s in SPLITS if fractions[s] > 0]
    ends = np.cumsum([_n_bytes(b) for b in blocks])
    borders = np.searchsorted(ends, np.cumsum([fractions[s] for s in wanted])[:-1] * total)  # indices of dropped blocks
    for i in range(len(borders)):  # at least one block before each border ...
        borders[i] = max(borders[i], borders[i - 1] + 2 if i else 1)
    for i in reversed(range(len(borders))):  # ... and after it
        borders[i] = min(borders[i], borders[i + 1] - 2 if i + 1 < len(borders) else len(blocks) - 2)
    starts, stops = [0, *(borders + 1)], [*borders, len(blocks)]

    laid_out = [
        (rank, block if split == "train" else _with_gap(block))
        for rank, split in enumerate(wanted)
        for block in blocks[starts[rank] : stops[rank]]
    ]
    groups = duplicate_groups([block.text for _, block in laid_out])
    first_rank: dict[int, int] = {}
    for (rank, _), group in zip(laid_out, groups, strict=True):
        first_rank.setdefault(int(group), rank)  # laid_out is in the order of the splits
    splits: dict[str, tuple[Document, ...]] = dict.fromkeys(SPLITS, ())
    for (rank, block), group in zip(laid_out, groups, strict=True):
        if rank == first_rank[int(group)]:
            splits[wanted[rank]] += (block,)
    for split in wanted:
        if not splits[split]:
            raise LensbenchError(f"{spec} repeats itself: all blocks of {split} are near-duplicates of earlier ones")
    return splits


def _cut_blocks(document: Document) -> list[Document]:
    raw = document.text.encode()
    count = -(-len(raw) // BLOCK_BYTES)
    cuts = [0, *(_border(raw, i * len(raw) // count) for i in range(1, count)), len(raw)]
    texts = [raw[a:b].decode() for a, b in zip(cuts, cuts[1:], strict=False)]
    return [Document(f"{document.name}[{i:04d}]", text) for i, text in enumerate(texts)]


def _with_gap(block: Document) -> Document:
    raw = block.text.encode()
    return Document(block.name, raw[: _border(raw, len(raw) * 7 // 8)].decode())


def _border(raw: bytes, at: int) -> int:
    """The last border at or before ``at`` and not far from it: of a line, else of a word, else of a character."""
    for mark in (b"\n", b" "):
        found = raw.rfind(mark, max(at - BLOCK_BYTES // 4, 0), at)
        if found > 0:
            return found + 1
    while at > 0 and raw[at] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        at -= 1
    return at


def duplicate_groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of exact and near-duplicate texts: int64 [N], equal where texts are connected.

    Two texts are connected when their words are the same, or when the Jaccard index of their sets of 13-grams of
    whitespace-separated words is above 0.5. The index is exact (up to collisions of a 64-bit hash): no sketch.
    """
    # A gram's hash is linear in its word numbers with fixed random odd coefficients, modulo 2**64.
    coefficients = np.random.default_rng(13).integers(2**64, size=GRAM_WORDS, dtype=np.uint64) | np.uint64(1)
    numbers: dict[str, int] = {}
    first_with: dict[bytes, int] = {}
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    grams = [np.zeros(0, dtype=np.uint64)]
    sizes = np.zeros(len(texts), dtype=np.int64)  # 13-grams of each text
    for i, text in enumerate(texts):
        words = text.split()
        first = first_with.setdefault(hashlib.sha256(" ".join(words).encode()).digest(), i)
        if first != i:
            pairs.append(np.array([[first], [i]]))
        elif len(words) >= GRAM_WORDS:
            ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
            hashes = np.zeros(len(ids) - GRAM_WORDS + 1, dtype=np.uint64)
            for k, coefficient in enumerate(coefficients):
                hashes += coefficient * ids[k : k + len(hashes)]
            grams.append(np.unique(hashes))
            sizes[i] = len(grams[-1])

    _, columns, frequency = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    shared = frequency[columns] >= 2  # grams of one text alone are in no intersection
    rows = np.repeat(np.arange(len(texts)), sizes)
    ones = np.ones(int(shared.sum()), dtype=np.int32)
    has = csr_array((ones, (rows[shared], columns[shared])), shape=(len(texts), len(frequency)))
    transposed = has.T.tocsr()
    for start in range(0, len(texts), 512):  # in slices, for boilerplate that every text shares makes a dense product
        common = coo_array(has[start : start + 512] @ transposed)
        a, b = common.row + start, common.col
        near = (a < b) & (common.data > MAX_JACCARD * (sizes[a] + sizes[b] - common.data))
        pairs.append(np.stack([a[near], b[near]]))
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(len(texts), len(texts)))
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


# Tokens


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly ``vocab_size`` entries on the train split.

    Id 0 is ``<|endoftext|>``, the 256 bytes follow, so that every text can be encoded. Raises LensbenchError when
    ``vocab_size`` is below 257, when there is no train split, or when it is too short for that many entries.
    """
    if vocab_size < 257:
        raise LensbenchError(f"vocab_size is {vocab_size}: it must be at least 257, the 256 bytes and {END_OF_TEXT}")
    if not corpus.splits["train"]:
        raise LensbenchError(f"{corpus.spec} has no train split to train a tokenizer on: give train a fraction above 0")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in corpus.splits["train"]), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise LensbenchError(
            f"the train split of {corpus.spec} is too short for vocab_size {vocab_size}: "
            f"its repeated words give {tokenizer.get_vocab_size()} entries"
        )
    return tokenizer


def tokenize(tokenizer: Tokenizer | PreTrainedTokenizerBase, documents: Iterable[Document]) -> list[TokenizedDocument]:
    """Encode documents, each behind the beginning-of-text id, and count the bytes that each token stands for.

    ``tokenizer`` is one of `train_tokenizer`, or a model's own fast tokenizer; the id put in front is its bos, else its
    eos, else ``<|endoftext|>``, else none. Special tokens written out in a text are encoded as ordinary text. A
    character split over several tokens counts for the first; text that the tokenizer drops counts for the token after
    it (at the end, for the last). A document of which nothing is left is omitted. Raises LensbenchError for a slow
    tokenizer.
    """
    documents = list(documents)
    backend, begin = backend_and_begin(tokenizer)
    encoded = (
        pair
        for part in (documents[i : i + 256] for i in range(0, len(documents), 256))  # encodings are large
        for pair in zip(part, backend.encode_batch([d.text for d in part], add_special_tokens=False), strict=True)
    )
    result = []
    for document, encoding in encoded:
        if not encoding.ids:
            continue
        code_points = np.frombuffer(document.text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
        offset = np.concatenate([[0], np.cumsum(widths)])  # [characters + 1] bytes before each character
        ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
        ends[-1] = len(code_points)
        n_bytes = np.diff(offset[ends], prepend=0)
        front = [] if begin is None else [begin]
        result.append(
            TokenizedDocument(
                document.name,
                np.array(front + encoding.ids, dtype=np.int32),
                np.concatenate([np.zeros(len(front), dtype=np.int32), n_bytes.astype(np.int32)]),
            )
        )
    return result


def beginning(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> int | None:
    """The id that documents stand behind: beginning of text, else end of text; None where the tokenizer has neither."""
    return backend_and_begin(tokenizer)[1]


def backend_and_begin(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> tuple[Tokenizer, int | None]:
    begin = None
    if isinstance(tokenizer, Tokenizer):
        backend = tokenizer
    elif isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        backend = tokenizer.backend_tokenizer
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    else:
        raise LensbenchError(
            f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer (tokenizers library) is needed"
        )
    backend = Tokenizer.from_str(backend.to_str())  # the caller's keeps its own truncation and padding
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend, backend.token_to_id(END_OF_TEXT) if begin is None else begin


def training_stream(documents: Sequence[TokenizedDocument]) -> NDArray[np.int32]:
    """All documents one after the other, each beginning with its beginning-of-text id: int32 [tokens]."""
    if not documents:
        raise LensbenchError("there are no documents to train on: give the train split a fraction above 0")
    return np.concatenate([d.ids for d in documents])


# Windows


def sample_windows(
    documents: Sequence[TokenizedDocument],
    *,
    n_sequences: int,
    length: int,
    positions: int,
    seed: int,
    max_share: float | None = None,
    first_position: int = 1,
) -> Windows:
    """Draw windows without replacement, and positions to score in each.

    A document is cut into consecutive windows of ``length`` tokens (only its first one holds the beginning-of-text id);
    those shorter than 32 tokens are left out. Positions lie between ``first_position`` and the last but one token. With
    ``max_share``, no document gives more than that share of the windows drawn (but always one, and of fewer documents than
    ``1 / max_share`` twice an equal share), and windows are taken in turn from as many documents as there are; without,
    each window is equally likely. Where fewer are available than
    ``n_sequences``, all are taken: the caller reports how many. Raises LensbenchError when there are none.
    """
    _check_window_arguments(n_sequences, length, positions, max_share, first_position)
    rng = np.random.default_rng(seed)
    shortest = max(MIN_WINDOW, first_position + 2)
    cut = [
        (d, k)
        for d, document in enumerate(documents)
        for k in range(-(-len(document.ids) // length))
        if min(len(document.ids) - k * length, length) >= shortest
    ]
    if not cut:
        longest = max((len(d.ids) for d in documents), default=0)
        raise LensbenchError(
            f"no windows: one needs {shortest} tokens, and the longest of {len(documents)} document(s) has {longest}"
        )
    windows = np.array(cut, dtype=np.int64)[rng.permutation(len(cut))]  # [windows, (document, sequence)]
    if max_share is None:
        windows = windows[:n_sequences]
    else:
        there = len({d for d, _ in cut})
        # Of fewer than 1 / max_share documents some have to give more: at most twice an equal share.
        share = max_share if there * max_share >= 1 else min(1.0, 2 / there)
        windows = _take_in_turn(windows, n_sequences, share, rng.permutation(len(documents)))

    shape = (len(windows), positions)
    ids = np.zeros((len(windows), length), dtype=np.int64)
    lengths = np.zeros(len(windows), dtype=np.int64)
    scored = np.zeros(shape, dtype=np.int64)
    valid = np.zeros(shape, dtype=np.bool_)
    next_bytes = np.zeros(shape, dtype=np.int32)
    for row, (d, k) in enumerate(windows):
        tokens = documents[d].ids[k * length : (k + 1) * length]
        ids[row, : len(tokens)] = tokens
        lengths[row] = len(tokens)
        eligible = np.arange(first_position, len(tokens) - 1)
        chosen = np.sort(rng.choice(eligible, size=min(positions, len(eligible)), replace=False))
        scored[row] = chosen[-1]
        scored[row, : len(chosen)] = chosen
        valid[row, : len(chosen)] = True
        next_bytes[row, : len(chosen)] = documents[d].n_bytes[k * length + chosen + 1]
    used, index = np.unique(windows[:, 0], return_inverse=True)
    names = tuple(documents[d].name for d in used)
    return Windows(ids, lengths, scored, valid, index.astype(np.int64), names, windows[:, 1].copy(), next_bytes)


def _check_window_arguments(
    n_sequences: int, length: int, positions: int, max_share: float | None, first_position: int
) -> None:
    if n_sequences < 1 or positions < 1:
        raise LensbenchError(f"n_sequences is {n_sequences} and positions {positions}: both must be at least 1")
    if length < MIN_WINDOW:
        raise LensbenchError(f"length is {length}: windows must have at least {MIN_WINDOW} tokens")
    if not 0 <= first_position <= length - 2:
        raise LensbenchError(f"first_position is {first_position}: it must lie between 0 and length - 2 = {length - 2}")
    if positions > length - 1 - first_position:
        raise LensbenchError(
            f"positions is {positions}: a window of {length} tokens has {length - 1 - first_position} "
            f"from first_position {first_position} on"
        )
    if max_share is not None and not 0 < max_share <= 1:
        raise LensbenchError(f"max_share is {max_share}: it must be above 0 and at most 1")


def _take_in_turn(
    windows: NDArray[np.int64], wanted: int, max_share: float, turn: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The first ``wanted`` rows, a document at a time in the order ``turn`` [documents], each within its share."""
    counts = np.bincount(windows[:, 0], minlength=len(turn))
    while True:  # the share is of the windows drawn: when the cap leaves fewer, it shrinks with them
        cap = max(1, math.floor(max_share * wanted + 1e-9))
        available = int(np.minimum(counts, cap).sum())
        if available >= wanted:
            break
        wanted = available
    by_document = np.argsort(windows[:, 0], kind="stable")
    round_of = np.empty(len(windows), dtype=np.int64)  # the how-manieth of its document each window is
    round_of[by_document] = np.arange(len(windows)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((np.argsort(turn)[windows[:, 0]], round_of))
    return windows[order[:wanted]]
