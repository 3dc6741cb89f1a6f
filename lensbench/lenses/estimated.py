"""Unbiased estimates of lens losses: cheap values for all tokens, exact log-partitions for a sample of them.

Two-phase sampling with a control variate (Cochran 1977, section 12.9):

- Every token gets a cheap value, from a subset of the vocabulary (:class:`lensbench.lenses.by_words.ByWords`).
- A simple random sample, n of N tokens, gets the exact value as well.
- y = exact - cheap on the sample, and B is its mean.
- The estimate of a token is ``cheap + B``; of a sampled token it is ``cheap + B + (N / n) (y - B)``.

The mean over tokens is then ``mean cheap + B``. For given tokens and words, its expectation over samples is the exact
mean. Sums over clusters contain the spread of y, so a bootstrap over clusters includes the variance of the estimate. All
lenses of a layer share one sample, so differences between them stay paired. Layers may ask for samples of different
sizes: each is then the beginning of one random order of the tokens, so that the smaller lies in the larger. An estimated
KL may be negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.by_words import ByWords
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import Reference, Scores, ScoresAt, exact_scores, normalised_on_own, score
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture
from lensbench.streams.kl import ROW_BLOCK
from lensbench.streams.readout import ReadOut
from lensbench.streams.words import Words

WORDS = 4096
"""How many words stand for the vocabulary"""

WORDS_FROM = 4096
"""How many read-outs the words are chosen from"""


STRIDE = 7919
"""Step between the tokens that the words are chosen from. A prime, so that they come from all parts of a text"""


def worth_estimating(vocabulary: int) -> bool:
    """Whether :data:`WORDS` words are less than half of the vocabulary, so that an estimate saves time."""
    return vocabulary > 2 * WORDS


Shares = float | Sequence[float]
"""Shares of exact log-partitions: one for all layers 0..L, or one of each"""

FEWEST_DRAWN = 64
"""Tokens at least that get exact values: a bootstrap tells nothing of fewer"""

USUAL_SHARE = 1 / 16
"""Share of the tokens that get exact values in searches and gates"""

FEWEST_PAIRED = 32
"""Tokens at least where alike lenses are compared on the same tokens: what words miss of one they miss of the other"""


def drawn_of(tokens: int, share: float = USUAL_SHARE, fewest: int = FEWEST_DRAWN) -> int:
    """How many of some tokens get exact values at a share, ``fewest`` at least."""
    return min(tokens, max(fewest, round(share * tokens)))


@dataclass(frozen=True)
class Drawn:
    """A sample of the tokens, for the lenses of one layer."""

    at: Tensor
    """Positions of the sampled tokens among those of this process, ``[n]``, ascending"""
    share: float
    """The share of tokens that is sampled, over all processes"""
    of_largest: Tensor | None = None
    """Where they stand in the largest sample, ``[n]``; None: it is that sample"""

    def rows(self, x: Tensor) -> Tensor:
        """What ``x`` ``[M, n', ...]`` of the largest sample holds of this one."""
        return x if self.of_largest is None else x[:, self.of_largest]


@dataclass(frozen=True)
class Estimator:
    """Cheap values of all tokens, and for every layer the sample of tokens that gets exact values."""

    by_words: ByWords
    captured: Capture
    """All tokens of this process"""
    drawn: Tensor
    """Positions of the tokens of the largest sample, ``[n]``, ascending"""
    place: Tensor
    """Where each of them stands in the random order of the tokens of all processes, ``[n]``"""
    few: Capture
    """The capture of the largest sample"""
    counts: tuple[int, ...]
    """Tokens of all processes that are sampled for layers 0..L"""
    shares: tuple[float, ...]
    """What was asked for, by layer"""
    seed: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        readout: ReadOut,
        captured: Capture,
        per_layer: AffineMaps,
        *,
        share: Shares,
        seed: Sequence[int],
        words: int | None = None,
    ) -> "Estimator":
        """A simple random sample of ``share`` of the tokens, and words chosen from what the lenses ``per_layer`` read out.

        ``words``: how many stand for the vocabulary, :data:`WORDS` if left out. Raises :class:`LensbenchError` for a share
        that is not above 0 and at most 1, or not one of every layer.
        """
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        # The words do not depend on the sampled tokens: this keeps the estimate unbiased.
        chosen = Words.draw(readout, mean_read_out(readout, captured, per_layer), words or WORDS, generator)
        return cls.drawn_with(chosen, captured, share=share, seed=seed)

    @classmethod
    def where_it_saves(
        cls, readout: ReadOut, captured: Capture, per_layer: AffineMaps, *, share: Shares, seed: Sequence[int]
    ) -> "Estimator | None":
        """As :meth:`of`; None where every share is 1, and for a vocabulary so small that nothing would be saved."""
        if min(by_layer(share, captured.layers)) == 1 or not worth_estimating(len(readout.weight)):
            return None
        return cls.of(readout, captured, per_layer, share=share, seed=seed)

    @classmethod
    def usual(cls, readout: ReadOut, captured: Capture) -> "Estimator | None":
        """Words by what the model itself predicts, and the sample of :func:`drawn_of`; None where nothing is saved.

        For lenses whose read-outs are like the model's own.
        """
        if not worth_estimating(len(readout.weight)) or drawn_of(captured.tokens) >= captured.tokens:
            return None
        words = Words.draw(readout, captured.mean_p, WORDS, torch.Generator().manual_seed(0))
        return cls.drawn_with(words, captured, share=USUAL_SHARE, seed=(0,), fewest=FEWEST_DRAWN)

    @classmethod
    def drawn_with(
        cls, words: Words, captured: Capture, *, share: Shares, seed: Sequence[int], fewest: int = 2
    ) -> "Estimator":
        """Samples for given words, which must not depend on them, of ``fewest`` tokens at least."""
        shares = by_layer(share, captured.layers)
        total = captured.tokens
        counts = tuple(drawn_of(total, one, fewest) for one in shares)
        order = torch.from_numpy(np.random.default_rng(tuple(seed)).permutation(total))[: max(counts)]
        drawn, place = order.sort()
        before, _ = captured.ranks.span(len(captured))
        here = (drawn >= before) & (drawn < before + len(captured))
        device = captured.states.device
        at = (drawn[here] - before).to(device)
        few, by_words = captured.take(at), ByWords.of(words, captured)
        return cls(by_words, captured, at, place[here].to(device), few, counts, shares, tuple(seed))

    def again(self, captured: Capture, number: int) -> "Estimator":
        """The same words and shares for other tokens, with a new sample, for refits; ``number`` seeds it."""
        words, seed = self.by_words.words, (*self.seed, number)
        return Estimator.drawn_with(words, captured, share=self.shares, seed=seed, fewest=FEWEST_PAIRED)

    def sample(self, layer: int) -> Drawn:
        """The sample of a layer."""
        count = self.counts[layer]
        share = count / self.captured.tokens
        if count == max(self.counts):
            return Drawn(self.drawn, share)
        which = (self.place < count).nonzero()[:, 0]
        return Drawn(self.drawn[which], share, which)

    def references(
        self, lenses: Sequence[int], maps: AffineMaps, memory_gib: float = float("inf")
    ) -> tuple[Reference, Reference]:
        """References for movement: lens k on layer ``lenses[k]``, cheap at all tokens and exact at the sampled ones."""
        readout, few = self.by_words.words.readout, self.few
        normalised = normalised_on_own(readout, few, lenses, maps)
        if len(few):
            exact = Reference.of(readout, normalised, len(lenses), memory_gib)
        else:  # one of many processes may have no sampled token
            exact = Reference(torch.stack(list(normalised)), few.states.new_zeros(len(lenses), 0))
        return self.by_words.reference(lenses, maps, memory_gib), exact

    @torch.no_grad()
    def score(self, layer: int, maps: AffineMaps, references: tuple[Reference, Reference] | None = None) -> Scores:
        """Estimates of what :func:`score` computes, for M lenses on the states of one layer: float64 ``[M, N]``."""
        cheap, exact = self.both(layer, maps, references)
        drawn = self.sample(layer)
        moved = None
        if cheap.movement is not None and exact.movement is not None:
            moved = mended(cheap.movement, exact.movement, drawn, self.captured.ranks)
        kl, ce, top1 = (
            mended(getattr(cheap, name), getattr(exact, name), drawn, self.captured.ranks)
            for name in ("kl", "ce", "top1")
        )
        return Scores(kl, ce, moved, top1)

    @torch.no_grad()
    def both(
        self, layer: int, maps: AffineMaps, references: tuple[Reference, Reference] | None = None
    ) -> tuple[Scores, Scores]:
        """Cheap values of all tokens ``[M, N]``, and exact values of the tokens sampled for this layer ``[M, n]``."""
        of_cheap, of_exact = (None, None) if references is None else references
        drawn, few = self.sample(layer), replace(self.few, states=self.few.states[[layer, -1]])
        if drawn.of_largest is not None:
            few = few.take(drawn.of_largest)
            if of_exact is not None:
                of_exact = Reference(drawn.rows(of_exact.moment), drawn.rows(of_exact.negative_entropy))
        exact = score(self.by_words.words.readout, few.states[0], maps, few, of_exact)
        return self.by_words.scores(layer, maps, of_cheap), exact


def usual_scores(readout: ReadOut, captured: Capture) -> ScoresAt:
    """Scores by :meth:`Estimator.usual`, exact ones where that saves nothing; all lenses share words and sample."""
    estimator = Estimator.usual(readout, captured)
    return exact_scores(readout, captured) if estimator is None else estimator.score


def mended(cheap: Tensor, exact: Tensor, drawn: Drawn, ranks: Ranks = ALONE) -> Tensor:
    """Estimates ``[M, N]`` from cheap values ``[M, N]`` and exact values ``[M, n]`` of the sampled tokens."""
    total = cheap.double()
    difference = exact.double() - total[:, drawn.at]
    mean = ranks.sum(difference.sum(1)) / ranks.span(len(drawn.at))[1]
    found = total + mean[:, None]
    found[:, drawn.at] += (difference - mean[:, None]) / drawn.share
    return found


def by_layer(share: Shares, layers: int) -> tuple[float, ...]:
    """The shares of layers 0..L; raises :class:`LensbenchError` for one that is not above 0 and at most 1."""
    shares = (float(share),) * (layers + 1) if isinstance(share, int | float) else tuple(map(float, share))
    if len(shares) != layers + 1:
        raise LensbenchError(f"{len(shares)} shares of exact log-partitions for {layers + 1} layers")
    for one in shares:
        if not 0 < one <= 1:
            raise LensbenchError(f"exact_share is {one}: it must be above 0 and at most 1")
    return shares


def mean_read_out(readout: ReadOut, captured: Capture, per_layer: AffineMaps) -> Tensor:
    """The mean probability of every word ``[V]``, float64: half from the model, half from every layer's lens at every layer.

    The second half uses at most ``WORDS_FROM`` read-outs, equally many (at least one) of every lens and layer.
    """
    ranks, states = captured.ranks, captured.states
    identity = AffineMaps.identity(states.shape[-1])
    maps = AffineMaps.stack([per_layer.to(states), identity.to(states)])
    each = max(1, WORDS_FROM // (len(maps) * len(states) * ranks.size))
    total, parts = torch.zeros(len(readout.weight), dtype=torch.float64, device=states.device), []
    cells = [(i, j) for j in range(len(states)) for i in range(len(maps))] if len(captured) else []
    for number, (i, j) in enumerate(cells):
        at = (torch.arange(number * each, (number + 1) * each) * STRIDE) % len(captured)
        parts.append(readout.final_norm(states[j][at.to(states.device)] @ maps.matrix[i].T + maps.offset[i]))
    for n in torch.cat(parts).split(ROW_BLOCK // 4) if parts else ():
        total += readout.logits(n).softmax(-1).sum(0)
    total = ranks.sum(total)
    return (total / total.sum() + captured.mean_p.to(total)) / 2
