"""Tokens of documents, and the windows of them that models read and lenses are scored on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from lensbench.data.corpus import Corpus, clusters_of
from lensbench.data.reading import Document
from lensbench.errors import LensbenchError

END_OF_TEXT = "<|endoftext|>"


MIN_WINDOW = 32


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


def check_ids(who: str, ids: Any, vocab_size: int) -> None:
    """Raise :class:`LensbenchError` where a text's token ids name a token that the model has no embedding for."""
    largest = int(ids.max()) if len(ids) else 0
    if largest >= vocab_size:
        raise LensbenchError(
            f"{who}: its tokenizer gives the text a token {largest}, but the model has {vocab_size} "
            "entries: the tokenizer belongs to another model"
        )
