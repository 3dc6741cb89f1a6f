"""A corpus: documents in four splits, disjoint by document, with near-duplicates in the same split.

A spec names a corpus: ``stdlib`` (sources and documentation of the running interpreter's standard library, no network
needed), ``file:PATH[#FIELD]`` (a text, a ``.jsonl`` file, or a folder of these) or ``hf:NAME[/CONFIG][@SPLIT][#FIELD]`` (a
Hugging Face dataset, streamed).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from lensbench.data.reading import BLOCK_BYTES, MIN_LONE_BYTES, Document, Say, _n_bytes, read_documents, warn
from lensbench.errors import LensbenchError
from lensbench.statistics import FEWEST_CLUSTERS

SPLITS = ("train", "fit", "dev", "eval")


FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.62, "fit": 0.12, "dev": 0.06, "eval": 0.20})


MIN_DOCUMENTS = 20  # with fewer, documents are cut into blocks, as a single text is


LARGEST_GROUP = 0.25  # of the smallest split


GRAM_WORDS = 13


MAX_JACCARD = 0.5


@dataclass(frozen=True)
class Corpus:
    """Documents in four splits."""

    spec: str
    """The source of the corpus"""
    checksum: str
    """SHA-256 (hex) over names and texts of all documents read, independent of their order"""
    splits: dict[str, tuple[Document, ...]]
    """The documents of each of ``SPLITS``; empty where the fraction is 0"""


def clusters_of(names: Iterable[str]) -> dict[str, str]:
    """The cluster of each document, by name. Intervals resample whole clusters, since their documents are alike.

    The files of one top folder (for example a package of the standard library) are one cluster if that gives at least 64
    clusters. Otherwise every document is its own cluster.
    """
    known = sorted(set(names))
    folders = {name: name.partition("/")[0] for name in known}
    return folders if len(set(folders.values())) >= FEWEST_CLUSTERS else {name: name for name in known}


# Splitting
def load_corpus(
    spec: str,
    *,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
    max_bytes: int | None = None,
    say: Say = warn,
    strict: bool = False,
) -> Corpus:
    """The corpus of ``spec``, read and split.

    ``fractions`` are shares of the bytes, one for each of ``SPLITS``; only that of train may be 0. Whole documents are
    assigned to a split, near-duplicates together. Fewer than 20 documents are cut into blocks of 8192 bytes. The blocks
    form four contiguous sections with one block dropped at each border; the seed then has no effect. ``say`` gets one line
    on texts that are left out; with ``strict`` files that are no text are refused. Raises LensbenchError for a corpus that
    cannot be read or is too short, and for fractions that are not shares.
    """
    _check_fractions(fractions)
    documents = read_documents(spec, max_bytes, say=say, strict=strict)
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
    # Names and texts are hashed to a fixed size first, so that no text can imitate a border between two of them.
    def digest(text: str) -> bytes:  # file names that are not UTF-8 hold surrogates
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    return hashlib.sha256(b"".join(sorted(digest(d.name) + digest(d.text) for d in documents))).hexdigest()


def _split_documents(
    spec: str, documents: list[Document], fractions: Mapping[str, float], seed: int
) -> dict[str, tuple[Document, ...]]:
    groups = duplicate_groups([d.text for d in documents])
    sizes = np.bincount(groups, weights=[_n_bytes(d) for d in documents])  # [groups] bytes
    wanted = [s for s in SPLITS if fractions[s] > 0]
    if len(sizes) < len(wanted):
        raise LensbenchError(
            f"{spec}: with near-duplicates joined, {len(documents)} documents are {len(sizes)}, "
            f"too few for {len(wanted)} splits"
        )
    targets = {s: fractions[s] * float(sizes.sum()) for s in wanted}
    filled = dict.fromkeys(wanted, 0.0)
    split_of: dict[int, str] = {}

    def assign(group: int, split: str) -> None:
        split_of[group] = split
        filled[split] += float(sizes[group])

    order = [int(g) for g in np.random.default_rng(seed).permutation(len(sizes))]
    # A group that would fill much of a small split goes to the first split. No other long documents do: without any, eval
    # would be another kind of text. How much one document may add is limited later, when windows are drawn.
    limit = max(LARGEST_GROUP * min(targets.values()), 4 * sizes.mean())
    large = sorted((g for g in order if sizes[g] > limit), key=lambda g: -sizes[g])
    for group in large[: len(sizes) - len(wanted) + 1]:  # the other splits are left a group each
        if filled[wanted[0]] == 0 or filled[wanted[0]] + sizes[group] <= targets[wanted[0]]:
            assign(group, wanted[0])
    for group in order:
        if group not in split_of:
            # The split that is least full for its size: empty splits come first, so that none stays empty.
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
    texts = [raw[a:b].decode() for a, b in itertools.pairwise(cuts)]
    return [Document(f"{document.name}[{i:04d}]", text) for i, text in enumerate(texts)]


def _with_gap(block: Document) -> Document:
    raw = block.text.encode()
    return Document(block.name, raw[: _border(raw, len(raw) * 7 // 8)].decode())


def _border(raw: bytes, at: int) -> int:
    """The last border at or before ``at``: of a line or else of a word, if one is near, else of a character."""
    for mark in (b"\n", b" "):
        found = raw.rfind(mark, max(at - BLOCK_BYTES // 4, 0), at)
        if found > 0:
            return found + 1
    while at > 0 and raw[at] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        at -= 1
    return at


def duplicate_groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """The group of each text, int64 [N]: exact and near-duplicates, and texts connected by them, have the same number.

    Two texts are near-duplicates when their words are the same, or when the Jaccard index of their sets of 13-grams of
    whitespace-separated words is above 0.5. The index is exact up to collisions of a 64-bit hash; there is no sketch.
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
    shared = frequency[columns] >= 2  # grams of a single text are in no intersection
    rows = np.repeat(np.arange(len(texts)), sizes)
    ones = np.ones(int(shared.sum()), dtype=np.int32)
    has = csr_array((ones, (rows[shared], columns[shared])), shape=(len(texts), len(frequency)))
    transposed = has.T.tocsr()
    for start in range(0, len(texts), 512):  # in slices: boilerplate that all texts share makes the product dense
        common = coo_array(has[start : start + 512] @ transposed)
        a, b = common.row + start, common.col
        near = (a < b) & (common.data > MAX_JACCARD * (sizes[a] + sizes[b] - common.data))
        pairs.append(np.stack([a[near], b[near]]))
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(len(texts), len(texts)))
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels
