"""A corpus: documents in four splits, disjoint by document, with near-duplicates in the same split.

A spec names a corpus: ``stdlib`` (sources and documentation of the running interpreter's standard library, no network
needed), ``package:NAME`` (those of an installed package), ``file:PATH[#FIELD]`` (a text, a ``.jsonl`` file, or a folder of
these) or ``hf:NAME[/CONFIG][@SPLIT][#FIELD]`` (a Hugging Face dataset, streamed), or several of them, joined by `` + ``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lensbench.data.duplicates import duplicate_groups
from lensbench.data.reading import BLOCK_BYTES, MIN_LONE_BYTES, Document, Say, _n_bytes, warn
from lensbench.data.sources import Source, checksum, read_sources
from lensbench.errors import LensbenchError
from lensbench.statistics import FEWEST_CLUSTERS

SPLITS = ("train", "fit", "dev", "eval")


FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.62, "fit": 0.12, "dev": 0.06, "eval": 0.20})


MIN_DOCUMENTS = 20  # with fewer, documents are cut into blocks, as a single text is


LARGEST_GROUP = 0.25  # of the smallest split


@dataclass(frozen=True)
class Corpus:
    """Documents in four splits."""

    spec: str
    """The source of the corpus"""
    checksum: str
    """SHA-256 (hex) over names and texts of all documents read, independent of their order"""
    splits: dict[str, tuple[Document, ...]]
    """The documents of each of ``SPLITS``; empty where the fraction is 0"""
    sources: tuple[Source, ...] = ()
    """What each part of the spec held"""


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
    assigned to a split, near-duplicates together; of several sources one of them is kept. Fewer than 20 documents are cut
    into blocks of 8192 bytes. The blocks form four contiguous sections with one block dropped at each border; the seed then
    has no effect. ``say`` gets one line on texts that are left out; with ``strict`` files that are no text are refused.
    Raises LensbenchError for a corpus that cannot be read or is too short, and for fractions that are not shares.
    """
    _check_fractions(fractions)
    read = read_sources(spec, max_bytes, say=say, strict=strict)
    documents = read.documents
    if len(documents) < MIN_DOCUMENTS:
        splits = _split_blocks(spec, documents, fractions)
    else:
        splits = _split_documents(spec, documents, fractions, seed)
    return Corpus(spec, checksum(documents), splits, read.sources)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if set(fractions) != set(SPLITS):
        raise LensbenchError(f"fractions are given for {sorted(fractions)}: they must be given for {', '.join(SPLITS)}")
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise LensbenchError(f"fractions sum to {sum(fractions.values()):g}: they must sum to 1")
    if fractions["train"] < 0 or min(fractions[s] for s in SPLITS[1:]) <= 0:
        raise LensbenchError("fractions of fit, dev and eval must be above 0, and that of train at least 0")


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
