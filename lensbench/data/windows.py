"""Windows of tokenised documents, which models read and lenses are scored on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lensbench.data.corpus import clusters_of
from lensbench.data.samples import fingerprint_of
from lensbench.data.tokens import TokenizedDocument
from lensbench.errors import LensbenchError

MIN_WINDOW = 32

Turns = Literal["document", "cluster"]
"""What windows are taken from in turn"""

DOCUMENT_SHARE = 0.02
"""Share of the windows that one document gives at most, unless asked otherwise, where windows are taken in turn"""


@dataclass(frozen=True)
class Windows:
    """S windows of at most T tokens, with at most P scored positions each. Each lies in one document; none overlap."""

    ids: NDArray[np.int64]
    """int64 [S, T], padded on the right with 0"""
    lengths: NDArray[np.int64]
    """int64 [S]: tokens in the window"""
    positions: NDArray[np.int64]
    """int64 [S, P]: sorted; a token of the same window follows each. Invalid entries repeat the last valid one."""
    valid: NDArray[np.bool_]
    """bool [S, P]: False where a short window has fewer than P positions"""
    documents: NDArray[np.int64]
    """int64 [S]: index into ``document_names``"""
    document_names: tuple[str, ...]
    """The documents of at least one window, and no others"""
    sequence: NDArray[np.int64]
    """int64 [S]: number of the window within its document"""
    next_bytes: NDArray[np.int32]
    """int32 [S, P]: bytes of the scored token, at position + 1; 0 where invalid"""

    def scored(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids ``[s, T]`` of some windows, and for each scored position its window (from 0) and place, ``[n]`` each."""
        row, column = np.nonzero(self.valid[rows])
        return self.ids[rows], row, self.positions[rows][row, column]

    def targets(self, rows: slice) -> NDArray[np.int64]:
        """The next token's id at each scored position of some windows, ``[n]``."""
        row, column = np.nonzero(self.valid[rows])
        return self.ids[rows][row, self.positions[rows][row, column] + 1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the windows, their documents and their positions"""
        arrays = (self.ids, self.lengths, self.positions, self.valid, self.documents, self.sequence, self.next_bytes)
        return fingerprint_of(arrays, self.document_names)

    def __len__(self) -> int:
        """Number S of windows."""
        return len(self.ids)

    @property
    def positions_read(self) -> int:
        """Tokens that a model reads in one window, padding included"""
        return int(self.ids.shape[1])

    @property
    def inside(self) -> NDArray[np.bool_]:
        """bool [S, T]: False at padding"""
        return np.arange(self.ids.shape[1]) < self.lengths[:, None]

    def take(self, rows: NDArray[np.int64]) -> Windows:
        """The windows with these indices."""
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
        """``count`` windows, or all if there are fewer, evenly spread over their order."""
        return self.take(np.unique(np.linspace(0, len(self.ids) - 1, min(count, len(self.ids))).astype(np.int64)))

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64 [S]: number of the cluster of each window's document, see :func:`clusters_of`"""
        of = clusters_of(self.document_names)
        _, number = np.unique([of[name] for name in self.document_names], return_inverse=True)
        return number.astype(np.int64)[self.documents]


def sample_windows(
    documents: Sequence[TokenizedDocument],
    *,
    n_sequences: int,
    length: int,
    positions: int,
    seed: int,
    max_share: float | None = None,
    turns: Turns = "document",
    first_position: int = 1,
) -> Windows:
    """Windows drawn without replacement, with random positions to score in each.

    A document is cut into consecutive windows of ``length`` tokens. The ids that it begins with stand in front of every
    window, where the document says so, and take places in it; else in its first window alone. They are never scored.
    Windows shorter than 32 tokens are left out. Positions lie between ``first_position`` and the last but one token.

    Without ``max_share`` each window is equally likely. With it, windows are taken in turn from as many documents as there
    are, and no document gives more than that share of the windows drawn. A document may always give one, and with fewer
    documents than ``1 / max_share`` each may give twice an equal share. With ``turns`` of clusters, windows are taken in
    turn from as many clusters as there are (:func:`clusters_of` the documents that have a window), and within a cluster in
    turn from its documents: intervals resample clusters, and are narrowest where these are of one size.

    Where fewer than ``n_sequences`` windows are available, all are taken; the caller reports how many. Raises
    LensbenchError where there are none.
    """
    front = max((d.front for d in documents), default=0)
    earliest = max(first_position, front - 1)
    _check_window_arguments(n_sequences, length, positions, max_share, first_position, earliest)
    rng = np.random.default_rng(seed)
    pieces = [document.pieces(length) for document in documents]
    cut = _long_enough(documents, pieces, max(MIN_WINDOW, earliest + 2))
    windows = np.array(cut, dtype=np.int64)[rng.permutation(len(cut))]  # [windows, (document, sequence)]
    if max_share is None:
        windows = windows[:n_sequences]
    else:
        there = sorted({d for d, _ in cut})
        # With fewer than 1 / max_share documents some must give more: at most twice an equal share.
        share = max_share if len(there) * max_share >= 1 else min(1.0, 2 / len(there))
        clusters = _numbered_clusters(documents, there) if turns == "cluster" else None
        windows = _take_in_turn(windows, n_sequences, share, rng.permutation(len(documents)), clusters)

    shape = (len(windows), positions)
    ids = np.zeros((len(windows), length), dtype=np.int64)
    lengths = np.zeros(len(windows), dtype=np.int64)
    scored = np.zeros(shape, dtype=np.int64)
    valid = np.zeros(shape, dtype=np.bool_)
    next_bytes = np.zeros(shape, dtype=np.int32)
    for row, (d, k) in enumerate(windows):
        document, piece = documents[d], pieces[d][k]
        tokens = document.window(piece)
        ids[row, : len(tokens)] = tokens
        lengths[row] = len(tokens)
        eligible = np.arange(earliest, len(tokens) - 1)
        chosen = np.sort(rng.choice(eligible, size=min(positions, len(eligible)), replace=False))
        scored[row] = chosen[-1]
        scored[row, : len(chosen)] = chosen
        valid[row, : len(chosen)] = True
        next_bytes[row, : len(chosen)] = document.n_bytes[piece[0] - document.repeated + chosen + 1]
    used, index = np.unique(windows[:, 0], return_inverse=True)
    names = tuple(documents[d].name for d in used)
    return Windows(ids, lengths, scored, valid, index.astype(np.int64), names, windows[:, 1].copy(), next_bytes)


def _check_window_arguments(
    n_sequences: int, length: int, positions: int, max_share: float | None, first_position: int, earliest: int
) -> None:
    if n_sequences < 1 or positions < 1:
        raise LensbenchError(f"n_sequences is {n_sequences} and positions {positions}: both must be at least 1")
    if length < MIN_WINDOW:
        raise LensbenchError(f"length is {length}: windows must have at least {MIN_WINDOW} tokens")
    if not 0 <= first_position <= length - 2:
        raise LensbenchError(f"first_position is {first_position}: it must lie between 0 and length - 2 = {length - 2}")
    if positions > length - 1 - earliest:
        from_where = (
            f"from first_position {first_position} on" if earliest == first_position else "after those in front"
        )
        raise LensbenchError(
            f"positions is {positions}: a window of {length} tokens has {max(0, length - 1 - earliest)} {from_where}"
        )
    if max_share is not None and not 0 < max_share <= 1:
        raise LensbenchError(f"max_share is {max_share}: it must be above 0 and at most 1")


def _long_enough(
    documents: Sequence[TokenizedDocument], pieces: Sequence[Sequence[tuple[int, int]]], shortest: int
) -> list[tuple[int, int]]:
    """Document and number of each piece of at least ``shortest`` tokens.

    Raises :class:`LensbenchError` where there is none.
    """
    cut = [
        (d, k)
        for d, document in enumerate(documents)
        for k, (begin, end) in enumerate(pieces[d])
        if document.repeated + end - begin >= shortest
    ]
    if not cut:
        longest = max((len(d.ids) for d in documents), default=0)
        raise LensbenchError(
            f"no windows: one needs {shortest} tokens, and the longest of {len(documents)} document(s) has {longest}"
        )
    return cut


def _numbered_clusters(documents: Sequence[TokenizedDocument], there: Sequence[int]) -> NDArray[np.int64]:
    """The number of the cluster of each document that is ``there``, -1 of the others, ``[documents]``."""
    of = clusters_of(documents[d].name for d in there)
    number = {name: k for k, name in enumerate(sorted(set(of.values())))}
    found = np.full(len(documents), -1)
    found[there] = [number[of[documents[d].name]] for d in there]
    return found


def _take_in_turn(
    windows: NDArray[np.int64],
    wanted: int,
    max_share: float,
    turn: NDArray[np.int64],
    clusters: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """``wanted`` rows, taken from one document after the other in the order ``turn`` [documents], each within its share.

    With ``clusters`` [documents], one cluster after the other, in the order of their first documents.
    """
    counts = np.bincount(windows[:, 0], minlength=len(turn))
    while True:  # the share is one of the windows drawn: if the cap leaves fewer windows, it shrinks too
        cap = max(1, math.floor(max_share * wanted + 1e-9))
        available = int(np.minimum(counts, cap).sum())
        if available >= wanted:
            break
        wanted = available
    by_document = np.argsort(windows[:, 0], kind="stable")
    round_of = np.empty(len(windows), dtype=np.int64)  # number of each window among those of its document
    round_of[by_document] = np.arange(len(windows)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.argsort(turn)
    order = np.lexsort((place[windows[:, 0]], round_of))
    order = order[round_of[order] < cap]
    if clusters is not None:
        of = clusters[windows[order, 0]]
        firsts = {int(cluster): int(place[clusters == cluster].min()) for cluster in np.unique(of)}
        seen: Counter[int] = Counter()
        keys = []
        for cluster in of.tolist():
            keys.append((seen[cluster], firsts[cluster]))
            seen[cluster] += 1
        order = order[np.lexsort(np.array(keys).T[::-1])]
    return windows[order[:wanted]]
