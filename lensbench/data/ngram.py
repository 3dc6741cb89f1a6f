"""Unigram and bigram baselines, which a model must beat before its layers are worth reading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lensbench.errors import LensbenchError


def _token_ids(name: str, values: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.ndim != 1:
        raise LensbenchError(f"{name} has shape {ids.shape}: it must be one row of token ids")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size):
        raise LensbenchError(f"{name} must be integers between 0 and vocab_size - 1 = {vocab_size - 1}")
    return ids.astype(np.int64)


def _scored_ids(
    contexts: ArrayLike, targets: ArrayLike, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    before, scored = _token_ids("contexts", contexts, vocab_size), _token_ids("targets", targets, vocab_size)
    if before.shape != scored.shape:
        raise LensbenchError(f"{len(before)} contexts and {len(scored)} targets: there must be one context per target")
    return before, scored


def unigram_cross_entropy(
    train_stream: ArrayLike, contexts: ArrayLike, targets: ArrayLike, vocab_size: int
) -> NDArray[np.float64]:
    """Loss of the add-one smoothed unigram, -log((count + 1) / (tokens + vocab_size)), at each target, nats [N].

    ``contexts`` [N] (the tokens before) have no effect; the arguments are those of every baseline. Raises LensbenchError
    for ids outside the vocabulary and for contexts and targets of different lengths.
    """
    stream = _token_ids("train_stream", train_stream, vocab_size)
    _, scored = _scored_ids(contexts, targets, vocab_size)
    counts = np.bincount(stream, minlength=vocab_size)
    loss: NDArray[np.float64] = np.log(len(stream) + vocab_size) - np.log(counts[scored] + 1)
    return loss


def _discount(counts: NDArray[np.int64]) -> float:
    """n1 / (n1 + 2 n2), with n1 and n2 the numbers of entries counted once and twice (Ney, Essen and Kneser 1994)."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # If no entry is counted once the estimate is 0, and unseen tokens would have no probability.
    return once / (once + 2 * twice) if once else 0.5


@dataclass(frozen=True)
class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram model of V tokens (Chen and Goodman 1999, eq. 4.34), backed off to the uniform.

    With c the counts of pairs, N(v, .) and N(., w) the numbers of different tokens seen after v and before w:

        p(w | v) = max(c(v, w) - D, 0) / c(v, .)  +  D N(v, .) / c(v, .) q(w)
        q(w)     = max(N(., w) - E, 0) / N(., .)  +  E #{w: N(., w) > 0} / N(., .) / V

    D and E are each order's n1 / (n1 + 2 n2). After a token never seen as a context, p is q.
    """

    vocab_size: int
    pairs: NDArray[np.int64]
    """int64 [pairs]: v * V + w of the pairs seen, ascending"""
    seen: NDArray[np.float64]
    """float64 [pairs]: max(c(v, w) - D, 0) / c(v, .)"""
    backoff: NDArray[np.float64]
    """float64 [V]: the weight of q after each context, 1 after one never seen"""
    continuation: NDArray[np.float64]
    """float64 [V]: q"""

    @classmethod
    def fit(cls, train_stream: ArrayLike, vocab_size: int) -> KneserNeyBigram:
        """The model of a stream [tokens]. Raises LensbenchError for fewer than two tokens and for ids outside of V."""
        stream = _token_ids("train_stream", train_stream, vocab_size)
        if len(stream) < 2:
            raise LensbenchError(f"train_stream has {len(stream)} token(s): a bigram needs at least 2")
        pairs, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
        before, after = np.divmod(pairs, vocab_size)
        context_counts = np.bincount(stream[:-1], minlength=vocab_size)
        followers = np.bincount(before, minlength=vocab_size)  # N(v, .)
        preceders = np.bincount(after, minlength=vocab_size)  # N(., w)

        lower = _discount(preceders)
        spread = lower * np.count_nonzero(preceders) / vocab_size
        continuation = (np.maximum(preceders - lower, 0) + spread) / len(pairs)
        upper = _discount(counts)
        backoff = np.where(context_counts > 0, upper * followers / np.maximum(context_counts, 1), 1.0)
        seen = np.maximum(counts - upper, 0) / context_counts[before]
        return cls(vocab_size, pairs, seen, backoff, continuation)

    def cross_entropy(self, contexts: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
        """Loss at each of the targets [N] that follow contexts [N], nats [N]."""
        before, scored = _scored_ids(contexts, targets, self.vocab_size)
        wanted = before * self.vocab_size + scored
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        direct = np.where(self.pairs[at] == wanted, self.seen[at], 0.0)
        loss: NDArray[np.float64] = -np.log(direct + self.backoff[before] * self.continuation[scored])
        return loss

    def distribution(self, context: int) -> NDArray[np.float64]:
        """p(. | context): [V], summing to 1."""
        if not 0 <= context < self.vocab_size:
            raise LensbenchError(f"context is {context}: it must lie between 0 and {self.vocab_size - 1}")
        start, stop = np.searchsorted(self.pairs, [context * self.vocab_size, (context + 1) * self.vocab_size])
        p: NDArray[np.float64] = self.backoff[context] * self.continuation
        p[self.pairs[start:stop] - context * self.vocab_size] += self.seen[start:stop]
        return p
