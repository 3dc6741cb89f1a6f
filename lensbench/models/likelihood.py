"""Likelihood of a text under a model: nats per token and bits per byte, every token counted once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lensbench.data.reading import Document
from lensbench.data.tokens import BeginSetting, TokenizedDocument, check_ids, tokenize
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.runtime.progress import QUIET, Progress
from lensbench.streams.parts import evaluating
from lensbench.streams.stream import refuse_non_finite


@dataclass(frozen=True)
class Likelihood:
    """Sums over each of the W windows of a text: ``nats``, ``tokens`` and ``bytes``, each ``[W]``."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    document: NDArray[np.int64]
    """The number of the document that a window is of"""

    def by_document(self) -> "Likelihood":
        """The sums over each document in place of each window."""
        numbers, inverse = np.unique(self.document, return_inverse=True)

        def summed(values: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(inverse, values).astype(float)

        tokens, sizes = (summed(of).astype(np.int64) for of in (self.tokens, self.bytes))
        return Likelihood(summed(self.nats), tokens, sizes, numbers)

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy of the scored tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the scored text; does not depend on the tokenizer's vocabulary."""
        return float(self.nats.sum() / np.log(2) / self.bytes.sum())


def texts_likelihood(
    model: PreTrainedModel,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    begin: BeginSetting | None = "auto",
    progress: Progress = QUIET,
) -> Likelihood:
    """The likelihood of every text by itself, as :func:`text_likelihood` scores it, their windows one after another."""
    found = []
    with progress.task("texts", len(texts), "texts") as task:
        for number, text in enumerate(texts):
            one = text_likelihood(model, tokenizer, text, length=length, begin=begin, progress=progress)
            found.append(replace(one, document=np.full(len(one.nats), number)))
            task.update(number + 1)
    columns = ("nats", "tokens", "bytes", "document")
    return Likelihood(*(np.concatenate([getattr(one, name) for one in found]) for name in columns))


@torch.no_grad()
def text_likelihood(
    model: PreTrainedModel,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    begin: BeginSetting | None = "auto",
    progress: Progress = QUIET,
) -> Likelihood:
    """The likelihood of ``text``, scored in windows of at most ``length`` tokens, each token of the text exactly once.

    Where every window begins with the model's beginning-of-text token (see :func:`lensbench.data.tokens.beginning`), the
    text is cut into pieces of ``length - 1`` tokens, and each is read after that token. Else the first window alone begins
    with it, and every later one with the last token of the window before it, as its only context: the convention of rolling
    log-likelihoods in lm-evaluation-harness. With ``begin=None``, or without such a token, the first token of the text is
    not scored, and its bytes do not count.

    Raises :class:`LensbenchError` for a text without a token to predict, for windows that have no room for one, for token
    ids without an embedding, and for weights that are not finite.
    """
    encoded = tokenize(tokenizer, [Document("text", text)], begin or "first")
    ids = encoded[0].ids if encoded else np.zeros(0, np.int32)
    if not len(ids):
        raise LensbenchError("the text has no token to predict: give a longer one")
    check_ids("the model", ids, model.config.get_text_config().vocab_size)
    refuse_non_finite(model)
    document = encoded[0]
    if begin is None:
        document = replace(document, ids=ids[document.front :], n_bytes=document.n_bytes[document.front :], front=0)
    device: Any = model.get_input_embeddings().weight.device
    nats, tokens, lengths = [], [], []
    windows = scoring_windows(document, length)
    with progress.task("scoring", len(windows), "windows") as task:
        for number, (window, scored, sizes) in enumerate(windows):
            found = token_nats(model, torch.from_numpy(window.astype(np.int64)).to(device))[scored - 1 :]
            nats.append(float(found.sum()))
            tokens.append(len(found))
            lengths.append(int(sizes.sum()))
            task.update(number + 1)
    return Likelihood(np.array(nats), np.array(tokens), np.array(lengths), np.zeros(len(nats), np.int64))


def scoring_windows(document: TokenizedDocument, length: int) -> list[tuple[NDArray[np.int32], int, NDArray[np.int32]]]:
    """Windows that score each token once: their ids, the place of the first scored token, and the scored tokens' bytes.

    Raises :class:`LensbenchError` where there is no token to score, or no room for one.
    """
    ids, sizes, front, count = document.ids, document.n_bytes, document.front, len(document.ids)
    if length < front + 1:
        raise LensbenchError(f"windows of {length} tokens have no room after the {front} that a text begins with")
    if count < max(2, front + 1):
        raise LensbenchError("the text has no token to predict: give a longer one")
    if document.repeated:
        return [(document.window(piece), front, sizes[slice(*piece)]) for piece in document.pieces(length)]
    windows = []
    for start in range(0, count - 1, length - 1):
        scored = max(1, front) if start == 0 else 1
        windows.append((ids[start : start + length], scored, sizes[start + scored : start + length]))
    return windows


@torch.no_grad()
def token_nats(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-probability of ids ``[T]`` from the second on, each given those before it: nats ``[T - 1]``, float64."""
    with evaluating(model):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device), reduction="none").double()


def nats_with_and_without(
    model: PreTrainedModel, windows: Windows, front: int, progress: Progress = QUIET, name: str = "beginning"
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """What the ids in front of each of S windows are worth: sums of nats with them, without them, and tokens, ``[S]`` each.

    The same tokens are scored: all but the first token of text, which nothing stands before without the ``front`` ids.
    """
    device: Any = model.get_input_embeddings().weight.device
    given, taken = np.zeros(len(windows)), np.zeros(len(windows))
    with progress.task(name, len(windows), "windows") as task:
        for row, end in enumerate(windows.lengths):
            ids = torch.from_numpy(windows.ids[row, :end]).to(device)
            given[row] = float(token_nats(model, ids)[front:].sum())
            taken[row] = float(token_nats(model, ids[front:]).sum())
            task.update(row + 1)
    return given, taken, windows.lengths - front - 1
