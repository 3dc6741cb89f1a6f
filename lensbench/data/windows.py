"""Tokenised documents, and the windows of them that models read and lenses are scored on."""

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
    """Token ids of one document; the beginning-of-text id comes first, where the tokenizer has one."""

    name: str
    ids: NDArray[np.int32]
    """int32 [n]"""
    n_bytes: NDArray[np.int32]
    """int32 [n]: bytes of text of each token, 0 for the beginning-of-text id; the sum is the size of the text"""


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
    """int64 [S]: number of the window within its document; window k begins at token k * T"""
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


# Tokens
def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` entries, trained on the train split.

    Id 0 is ``<|endoftext|>``; the 256 bytes follow, so that every text can be encoded. Raises LensbenchError where
    ``vocab_size`` is below 257, and where the train split is empty or too short for that many entries.
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
    """The documents as token ids, with the bytes of text of each token; each begins with the beginning-of-text id.

    ``tokenizer`` comes from :func:`train_tokenizer`, or is a model's own fast tokenizer. The first id of a document is its
    bos, else its eos, else ``<|endoftext|>``, else there is none. Special tokens that are spelled out in a text are encoded
    as ordinary text. The bytes of a character that several tokens share count for the first of them. Text that the
    tokenizer drops counts for the token after it, or for the last token. A document without tokens is left out. Raises
    LensbenchError for a slow tokenizer.
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
    """The id that documents begin with: beginning of text, else end of text; None where the tokenizer has neither."""
    return backend_and_begin(tokenizer)[1]


def backend_and_begin(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> tuple[Tokenizer, int | None]:
    """A copy of the fast tokenizer without truncation or padding, and the id that documents begin with."""
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
    backend = Tokenizer.from_str(backend.to_str())  # a copy: the caller's tokenizer keeps its truncation and padding
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend, backend.token_to_id(END_OF_TEXT) if begin is None else begin


def training_stream(documents: Sequence[TokenizedDocument]) -> NDArray[np.int32]:
    """The token ids of all documents, one document after the other: int32 [tokens]."""
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
    """Windows drawn without replacement, with random positions to score in each.

    A document is cut into consecutive windows of ``length`` tokens; only the first has the beginning-of-text id, and
    windows shorter than 32 tokens are left out. Positions lie between ``first_position`` and the last but one token.

    Without ``max_share`` each window is equally likely. With it, windows are taken in turn from as many documents as there
    are, and no document gives more than that share of the windows drawn. A document may always give one, and with fewer
    documents than ``1 / max_share`` each may give twice an equal share. Where fewer than ``n_sequences`` windows are
    available, all are taken; the caller reports how many. Raises LensbenchError where there are none.
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
        # With fewer than 1 / max_share documents some must give more: at most twice an equal share.
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
    """``wanted`` rows, taken from one document after the other in the order ``turn`` [documents], each within its share."""
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
    order = np.lexsort((np.argsort(turn)[windows[:, 0]], round_of))
    return windows[order[:wanted]]


def check_ids(who: str, ids: Any, vocab_size: int) -> None:
    """Raise :class:`LensbenchError` where a token id of the text has no embedding in the model."""
    largest = int(ids.max()) if len(ids) else 0
    if largest >= vocab_size:
        raise LensbenchError(
            f"{who}: its tokenizer gives the text a token {largest}, but the model has {vocab_size} "
            "entries: the tokenizer belongs to another model"
        )
