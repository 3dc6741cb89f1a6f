"""Likelihood of a text under a model: nats per token and bits per byte, every token counted once."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lensbench.data.reading import Document
from lensbench.data.windows import beginning, check_ids, tokenize
from lensbench.errors import LensbenchError
from lensbench.runtime.progress import QUIET, Progress
from lensbench.streams.stream import refuse_non_finite


@dataclass(frozen=True)
class Likelihood:
    """Sums over each of the W windows of a text: ``nats``, ``tokens`` and ``bytes``, each ``[W]``."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy of the scored tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the scored text; does not depend on the tokenizer's vocabulary."""
        return float(self.nats.sum() / np.log(2) / self.bytes.sum())


@torch.no_grad()
def text_likelihood(
    model: PreTrainedModel,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    begin: bool = True,
    progress: Progress = QUIET,
) -> Likelihood:
    """The likelihood of ``text``, scored in windows of at most ``length`` tokens, each token exactly once.

    The text follows the beginning-of-text token, or the end-of-text token if the tokenizer has no other, so that its first
    token is scored too. With ``begin=False``, or without such a token, the first token of the text is not scored, and its
    bytes do not count. Every later window begins with the last token of the window before it, as its only context. This is
    the convention of rolling log-likelihoods in lm-evaluation-harness.

    Raises :class:`LensbenchError` for a text of fewer than
    two tokens, for token ids without an embedding, and for weights that are not finite.
    """
    encoded = tokenize(tokenizer, [Document("text", text)])
    ids = encoded[0].ids if encoded else np.zeros(0, np.int32)
    if not len(ids):
        raise LensbenchError("the text has no token to predict: give a longer one")
    check_ids("the model", ids, model.config.get_text_config().vocab_size)
    refuse_non_finite(model)
    sizes = encoded[0].n_bytes
    if not begin and beginning(tokenizer) is not None:
        ids, sizes = ids[1:], sizes[1:]
    if len(ids) < 2:
        raise LensbenchError("the text has no token to predict: give a longer one")
    device = model.get_input_embeddings().weight.device
    nats, tokens, lengths = [], [], []
    starts = range(0, len(ids) - 1, length - 1)
    with progress.task("scoring", len(starts), "windows") as task:
        for number, start in enumerate(starts):
            window = torch.from_numpy(ids[start : start + length].astype(np.int64)).to(device)  # type: ignore[arg-type]
            logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            target = window[1:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            nats.append(float(loss.double().sum()))
            tokens.append(len(target))
            lengths.append(int(sizes[start + 1 : start + len(window)].sum()))
            task.update(number + 1)
    return Likelihood(np.array(nats), np.array(tokens), np.array(lengths))
