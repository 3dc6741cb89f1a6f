"""What a model predicted of every token of its windows, batch by batch: expectations and surprises.

``e_x`` is the unembedding row of token x. ``ebar_s = sum_x p_s(x) e_x`` is the expectation of the token after position s,
and ``eps_s = e_{x_s} - ebar_{s-1}`` is the error that token s reveals.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from lensbench.data.ngram import KneserNeyBigram
from lensbench.data.windows import Windows
from lensbench.measures.means import SMALLEST_CONSTANT
from lensbench.probes.tools.heads import Heads, reading_heads
from lensbench.runtime.progress import QUIET, Task
from lensbench.streams.partition import probabilities_
from lensbench.streams.stream import ResidualStream

LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**28}
"""Largest size of the logits ``[B, T, V]`` of a batch, by device"""


RANK = 128
"""Number of principal directions of the unembedding rows in which expectations and errors are seen"""


@dataclass(frozen=True)
class Directions:
    """The r principal directions of the unembedding rows ``e_x``, over the tokens of a text.

    ``rows`` ``[V, r]`` are all ``e_x`` in these directions, about their ``mean`` ``[d_read]`` over the text. ``share`` is
    the share of the rows' variance over the text that the directions hold.
    """

    rows: Tensor
    mean: Tensor
    basis: Tensor  # [d_read, r]
    share: float

    @classmethod
    def of(cls, stream: ResidualStream, windows: Windows, rank: int = RANK) -> "Directions":
        """The first ``rank`` principal directions over the tokens of the windows."""
        return cls._first(stream, windows, lambda _: rank)

    @classmethod
    def holding(cls, stream: ResidualStream, windows: Windows, share: float) -> "Directions":
        """As many principal directions as hold a share of the variance, and no fewer than :data:`RANK` (or all)."""
        # A share of 1 - 1e-12 is all of it: rounding must not ask for directions that do not exist.
        return cls._first(stream, windows, lambda held: max(RANK, int((held < min(share, 1 - 1e-12)).sum()) + 1))

    @classmethod
    def _first(cls, stream: ResidualStream, windows: Windows, number: Callable[[Tensor], int]) -> "Directions":
        """The first directions, as many as ``number`` says of the shares ``[d_read]`` that the first 1, 2, ... hold."""
        weight = stream.readout.weight.detach().float().cpu()
        counts = torch.from_numpy(np.bincount(windows.ids[windows.inside], minlength=len(weight))).double()
        used = counts > 0
        kept, share = weight[used].double(), (counts[used] / counts.sum())[:, None]
        mean = (share * kept).sum(0)
        about = kept - mean
        values, vectors = torch.linalg.eigh(about.T @ (share * about))
        held = values.clamp(min=0).flip(0).cumsum(0) / values.clamp(min=0).sum()
        rank = min(number(held), len(held))
        basis = vectors[:, -rank:].flip(1)
        rows = (weight - mean.float()) @ basis.float()
        on = stream.device
        basis = basis.float().contiguous().to(on)
        return cls(rows.to(on), mean.float().to(on), basis, float(held[rank - 1]))

    @property
    def rank(self) -> int:
        """Number r of directions."""
        return self.rows.shape[1]

    @classmethod
    def none(cls, stream: ResidualStream) -> "Directions":
        """One direction of zeros, for a pass over heads that needs no expectations."""
        size, width = stream.readout.weight.shape
        on = stream.device
        return cls(
            torch.zeros(size, 1, device=on), torch.zeros(width, device=on), torch.zeros(width, 1, device=on), 0.0
        )

    def seen(self, x: Tensor) -> Tensor:
        """Expectations ``[..., d_read]`` in the directions: ``[..., r]``."""
        return (x - self.mean) @ self.basis


@dataclass(frozen=True)
class PredictionBatch:
    """Tokens of B windows and what the model predicted of them, all on one device; T is the longest window."""

    rows: slice
    ids: Tensor  # [B, T]
    inside: Tensor  # [B, T]: whether it is a token, not padding
    states: Tensor  # [L+1, B, T, d]
    expected: Tensor  # [B, T, r]: ebar_s in the directions
    surprise: Tensor  # [B, T]: -log p_{s-1}(x_s), nats; 0 at position 0
    heads: list[Heads]
    sum_p: Tensor  # [V]: sum of p over all tokens
    entropy: Tensor  # [B, T]: of p_s, nats


@torch.no_grad()
def batches(
    stream: ResidualStream,
    windows: Windows,
    directions: Directions,
    *,
    heads: bool = False,
    task: Task = QUIET,
) -> Iterator[PredictionBatch]:
    """Predictions of all windows, batch by batch, from one forward pass; with ``heads`` also what the heads did.

    ``task`` counts windows.
    """
    length = windows.ids.shape[1]
    room = LOGITS_AT_ONCE.get(stream.device.type, 2**25)
    size = max(1, min(16, room // (length * stream.vocab_size)))
    with ExitStack() as stack:
        found = stack.enter_context(reading_heads(stream)) if heads else []
        for start in range(0, len(windows.ids), size):
            rows = slice(start, min(start + size, len(windows.ids)))
            ids = torch.from_numpy(windows.ids[rows]).to(stream.device)
            states, logits = stream.forward(ids)
            logits = logits.float()
            log_z = logits.logsumexp(-1, keepdim=True)
            surprise = (log_z[:, :-1] - logits[:, :-1].gather(-1, ids[:, 1:, None]))[..., 0]
            p = probabilities_(logits.sub_(log_z))  # in place: fresh memory of this size costs as much as filling it
            inside = torch.from_numpy(windows.inside[rows]).to(stream.device)
            yield PredictionBatch(
                rows,
                ids,
                inside,
                states.float(),
                p @ directions.rows,
                torch.nn.functional.pad(surprise, (1, 0)),
                list(found),
                (inside.flatten().to(p) @ p.flatten(0, 1)).double(),
                torch.special.entr(p).sum(-1),
            )
            found.clear()
            task.update(rows.stop)


class Constant:
    """K_0 of all batches that were added: mean KL of a model's predictions from their mean, nats/token."""

    def __init__(self) -> None:
        self.sum_p: Tensor | float = 0.0
        self.entropy, self.tokens = 0.0, 0

    def add(self, batch: PredictionBatch) -> None:
        """Add a batch to the sums."""
        self.sum_p = self.sum_p + batch.sum_p
        self.entropy += float(batch.entropy[batch.inside].double().sum())
        self.tokens += int(batch.inside.sum())

    def warning(self) -> str:
        """A warning where the model predicts nearly the same everywhere; empty elsewhere."""
        assert isinstance(self.sum_p, Tensor)
        k_0 = float(torch.special.entr(self.sum_p / self.tokens).sum()) - self.entropy / self.tokens
        if k_0 >= SMALLEST_CONSTANT:
            return ""
        return f"the model predicts nearly the same everywhere (K_0 = {k_0:.2g} nats): there is hardly a prediction"


def after(x: Tensor) -> Tensor:
    """``x`` ``[B, T, ...]`` shifted by one position: entry s is that of position s-1, and entry 0 is zero."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@dataclass(frozen=True)
class BigramPredictions:
    """What an interpolated bigram expects after each token, in the directions of the model's expectations."""

    bigram: KneserNeyBigram
    directions: Directions

    @cached_property
    def expected(self) -> Tensor:
        """``sum_x p(x | v) e_x`` of every token v of the vocabulary: ``[V, r]``."""
        size = self.bigram.vocab_size
        rows = self.directions.rows[:size].double().cpu().numpy()
        before, following = np.divmod(self.bigram.pairs, size)
        seen = csr_array((self.bigram.seen, (before, following)), shape=(size, size))
        following_v = seen @ rows + self.bigram.backoff[:, None] * (self.bigram.continuation @ rows)
        return torch.from_numpy(following_v).float().to(self.directions.rows.device)

    def surprise(self, ids: Tensor) -> Tensor:
        """``-log p(x_s | x_{s-1})`` ``[B, T]``, nats; 0 at position 0."""
        pairs = ids.cpu().numpy()
        nats = self.bigram.cross_entropy(pairs[:, :-1].ravel(), pairs[:, 1:].ravel()).reshape(len(pairs), -1)
        return torch.nn.functional.pad(torch.from_numpy(nats).float(), (1, 0)).to(ids.device)


SHRINKAGE = 2.0
"""How often a mean of all counts in the mean of a token or a pair"""


@dataclass(frozen=True)
class MeansByToken:
    """Means of what a model predicts of a token: by the token, and by the pair of the token before and the token.

    ``token`` ``[V, q]`` is by the token, ``before`` ``[V, q]`` by the token before. The mean of a pair is interpolated with
    that of the token before, and the mean of a token with the mean of all: what was seen n times has weight
    ``n / (n + 2)``.
    """

    token: Tensor
    before: Tensor
    pairs: Tensor  # [P]: x_{s-1} V + x_s, ascending
    of_pair: Tensor  # [P, q]
    weight: Tensor  # [P]

    @classmethod
    def of(cls, ids: Tensor, previous: Tensor, values: Tensor, vocab_size: int) -> "MeansByToken":
        """The means over N tokens: the tokens ``[N]``, those before them ``[N]``, and predictions of them ``[N, q]``."""
        mean = values.mean(0)

        def by(key: Tensor, size: int) -> tuple[Tensor, Tensor]:
            count = torch.zeros(size, device=key.device).index_add_(0, key, torch.ones(len(key), device=key.device))
            total = torch.zeros(size, values.shape[1], device=key.device).index_add_(0, key, values - mean)
            return total / (count + SHRINKAGE)[:, None], count / (count + SHRINKAGE)

        pairs, place = torch.unique(previous * vocab_size + ids, return_inverse=True)
        of_pair, weight = by(place, len(pairs))
        token, before = by(ids, vocab_size)[0], by(previous, vocab_size)[0]
        # Shrunk sums lack a share of the mean, which was subtracted: interpolation adds it.
        return cls(token + mean, before + mean, pairs, of_pair + mean * weight[:, None], weight)

    def at(self, ids: Tensor, previous: Tensor) -> Tensor:
        """Means ``[..., 2 q]`` of tokens ``[...]`` after tokens ``previous`` ``[...]``: by the token, and by the pair."""
        key = previous * len(self.token) + ids
        place = torch.searchsorted(self.pairs, key).clamp(max=len(self.pairs) - 1)
        known = (self.pairs[place] == key)[..., None]
        weight = torch.where(known, self.weight[place][..., None], 0.0)
        pair = torch.where(known, self.of_pair[place], 0.0) + (1 - weight) * self.before[previous]
        return torch.cat([self.token[ids], pair], -1)
