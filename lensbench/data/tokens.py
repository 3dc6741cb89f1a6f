"""Tokenised documents, and the ids that a model's text begins with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from lensbench.data.corpus import Corpus
from lensbench.data.reading import Document
from lensbench.errors import LensbenchError

END_OF_TEXT = "<|endoftext|>"


BeginSetting = Literal["auto", "every", "first"]
"""Which windows of a text begin with the model's beginning-of-text token.

``every`` window, the ``first`` window of each document alone, or ``auto``: every window where the tokenizer adds such a
token to a text by itself, else the first.
"""


@dataclass(frozen=True)
class Beginning:
    """The ids that a model's text begins with; they take places in a window, and are never scored."""

    ids: tuple[int, ...]
    """Empty where the tokenizer has no such token"""
    every_window: bool
    """Whether every window begins with them; else a document's first window alone"""
    text: str
    """The ids as the tokenizer spells them"""

    @property
    def front(self) -> tuple[int, ...]:
        """The ids that every window begins with; empty where only a document's first window has them."""
        return self.ids if self.every_window else ()

    @property
    def where(self) -> str:
        """``every window``, ``first window``, or ``none``."""
        return "none" if not self.ids else "every window" if self.every_window else "first window"

    @property
    def facts(self) -> dict[str, str | None]:
        """The columns of ``models.csv`` that name it."""
        return {"begin_token": self.text or None, "begin": self.where}


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document, after the ids that a text begins with."""

    name: str
    ids: NDArray[np.int32]
    """int32 [n]"""
    n_bytes: NDArray[np.int32]
    """int32 [n]: bytes of text of each token, 0 for the ids at the front; the sum is the size of the text"""
    front: int = 0
    """How many ids at the front are not of the text"""
    every_window: bool = False
    """Whether every window of the document begins with these ids; else its first window alone"""

    @property
    def repeated(self) -> int:
        """How many ids at the front stand in front of each window"""
        return self.front if self.every_window else 0

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """Where windows of ``length`` tokens begin and end in ``ids``, without what is repeated in front of each."""
        step, end = length - self.repeated, len(self.ids)
        return [(start, min(start + step, end)) for start in range(self.repeated, end, step)]

    def window(self, piece: tuple[int, int]) -> NDArray[np.int32]:
        """The ids of a window: those in front of it, and a piece of :meth:`pieces`."""
        return np.concatenate([self.ids[: self.repeated], self.ids[slice(*piece)]])


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


def tokenize(
    tokenizer: Tokenizer | PreTrainedTokenizerBase, documents: Iterable[Document], begin: BeginSetting = "auto"
) -> list[TokenizedDocument]:
    """The documents as token ids, with the bytes of text of each token; each begins with the ids of :func:`beginning`.

    ``tokenizer`` comes from :func:`train_tokenizer`, or is a model's own fast tokenizer. Special tokens that are spelled out
    in a text are encoded as ordinary text. The bytes of a character that several tokens share count for the first of them.
    Text that the tokenizer drops counts for the token after it, or for the last token. A document without tokens is left
    out. Raises LensbenchError for a slow tokenizer.
    """
    documents = list(documents)
    backend, begins = backend_of(tokenizer), beginning(tokenizer, begin)
    front = list(begins.ids)
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
        # Through an iterator: an array of pairs takes five times as long to make.
        ends = np.maximum.accumulate(np.fromiter(map(itemgetter(1), encoding.offsets), np.int64, len(encoding.ids)))
        ends[-1] = len(code_points)
        n_bytes = np.diff(offset[ends], prepend=0)
        result.append(
            TokenizedDocument(
                document.name,
                np.array(front + encoding.ids, dtype=np.int32),
                np.concatenate([np.zeros(len(front), dtype=np.int32), n_bytes.astype(np.int32)]),
                len(front),
                begins.every_window,
            )
        )
    return result


def beginning(tokenizer: Tokenizer | PreTrainedTokenizerBase, setting: BeginSetting = "auto") -> Beginning:
    """The ids that a model's text begins with, and whether every window begins with them.

    They are what the tokenizer puts in front of a text by itself (what it puts after it is left out). Where it adds nothing,
    they are its bos, else its eos, else ``<|endoftext|>``, else there are none. Raises LensbenchError for a slow tokenizer.
    """
    backend = fast_tokenizer(tokenizer)
    if backend.truncation is not None or backend.padding is not None:
        backend = backend_of(tokenizer)
    ids = added_in_front(backend)
    every_window = setting == "every" or (setting == "auto" and bool(ids))
    if not ids:
        special = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        known = next((i for i in (*special, backend.token_to_id(END_OF_TEXT)) if i is not None), None)
        ids = () if known is None else (known,)
    words = [backend.id_to_token(i) or f"#{i}" for i in ids]
    return Beginning(ids, every_window and bool(ids), "".join(words))


def spelled_out(tokenizer: Tokenizer | PreTrainedTokenizerBase, text: str) -> dict[str, int]:
    """How often a text spells out each special token, which is read as ordinary text here; others may read the token."""
    added = fast_tokenizer(tokenizer).get_added_tokens_decoder().values()
    counts = {token.content: text.count(token.content) for token in added if token.special and token.content}
    return {word: count for word, count in counts.items() if count}


def added_in_front(backend: Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer puts in front of every text by itself, whatever it puts after it."""
    # A template for one text puts the same ids in front of an empty one; the text tells front from back.
    for text in ("a", "1", "the"):
        plain = backend.encode(text, add_special_tokens=False).ids
        whole = backend.encode(text).ids
        starts = [k for k in range(len(whole) - len(plain) + 1) if whole[k : k + len(plain)] == plain]
        if plain and starts:
            return tuple(whole[: starts[0]])
    return ()


def fast_tokenizer(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of the tokenizers library itself; raises LensbenchError for a slow tokenizer, which has none."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise LensbenchError(
            f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer (tokenizers library) is needed"
        )
    return backend


def backend_of(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the fast tokenizer, without truncation or padding, for which special tokens in a text are plain text.

    Raises LensbenchError for a slow tokenizer.
    """
    # The caller's tokenizer keeps its truncation and padding. A copy of a large vocabulary takes seconds.
    copy = Tokenizer.from_str(fast_tokenizer(tokenizer).to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def training_stream(documents: Sequence[TokenizedDocument]) -> NDArray[np.int32]:
    """The token ids of all documents, one document after the other: int32 [tokens]."""
    if not documents:
        raise LensbenchError("there are no documents to train on: give the train split a fraction above 0")
    return np.concatenate([d.ids for d in documents])


def check_ids(who: str, ids: Any, vocab_size: int) -> None:
    """Raise :class:`LensbenchError` where a token id of the text has no embedding in the model."""
    largest = int(ids.max()) if len(ids) else 0
    if largest >= vocab_size:
        raise LensbenchError(
            f"{who}: its tokenizer gives the text a token {largest}, but the model has {vocab_size} "
            "entries: the tokenizer belongs to another model"
        )
