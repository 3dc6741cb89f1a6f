"""Unbiased estimates of lens losses: cheap values for all tokens, exact log-partitions for a sample of them.

Two-phase sampling with a control variate (Cochran 1977, section 12.9):

- Every token gets a cheap value, from a subset of the vocabulary (:class:`Words`). What they miss of the model's own
  prediction is known for every token; near that prediction it mends the cheap value (:class:`Missed`).
- A simple random sample, n of N tokens, gets the exact value as well.
- y = exact - cheap on the sample, and B is its mean.
- The estimate of a token is ``cheap + B``; of a sampled token it is ``cheap + B + (N / n) (y - B)``.

The mean over tokens is then ``mean cheap + B``. For given tokens and words, its expectation over samples is the exact
mean. Sums over clusters contain the spread of y, so a bootstrap over clusters includes the variance of the estimate. All
lenses of a layer share one sample, so differences between them stay paired. Layers may ask for samples of different sizes:
each is then the beginning of one random order of the tokens, so that the smaller lies in the larger. An estimated KL may be
negative.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import Reference, Scores, ScoresAt, exact_scores, score
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture, room_for
from lensbench.streams.kl import ROW_BLOCK, TOKEN_BLOCK
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

USUAL_SHARE = 0.125
"""Share of the tokens that get exact values where no share is found for their layer: of gates, and of readable gains"""

SEARCH_SHARE = 1 / 16
"""That of a search"""

FEWEST_PAIRED = 32
"""Tokens at least where alike lenses are compared on the same tokens: what words miss of one they miss of the other"""


def drawn_in_search(tokens: int) -> int:
    """How many of some tokens get exact values in a search."""
    return min(tokens, max(FEWEST_PAIRED, round(SEARCH_SHARE * tokens)))


def usually_drawn(tokens: int) -> int:
    """How many of some tokens get exact values at :data:`USUAL_SHARE`."""
    return min(tokens, max(FEWEST_DRAWN, round(USUAL_SHARE * tokens)))


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
class Missed:
    """What words miss of the model's own log-partition at every token, to first order in the normalised state.

    With f the exact log-partition, g that of the words and m the model's normalised state it is
    ``f(m) - g(m) + (f - g)'(m) (n - m)`` at n. Added to g(n), it leaves of a KL to the model what the words make of it, a
    Bregman divergence, without an error of first order. Far from m it tells nothing: it is weighted by ``exp(-D)``, D that
    divergence.
    """

    kl: Tensor
    """What a KL lacks at ``n = 0``, ``[N]``"""
    ce: Tensor
    """What a cross-entropy lacks there, ``[N]``: the same, but where logits are capped and expected logits are by words"""
    slope: Tensor | None
    """``(f - g)'(m)``, ``[N, d_read]``; None where logits are capped: there the first term alone is added"""

    @classmethod
    @torch.no_grad()
    def of(cls, words: Words, captured: Capture) -> "Missed":
        """For all tokens of a capture."""
        readout, targets = words.readout, captured.targets
        m = readout.final_norm(captured.states[-1])
        aim = (readout.weight[targets] * m).sum(-1)
        exact = captured.model_ce + readout.cap_(aim if readout.bias is None else aim + readout.bias[targets])
        if readout.linear:
            moment, entropy = words.softmax_moment(m)  # g(m) = moment m - entropy
            slope = captured.expected - moment
            at_zero = exact + entropy - (captured.expected * m).sum(-1)
            return cls(at_zero, at_zero, slope)
        by_words = words.partition_and_largest(m)[0]
        return cls(words.expected_logit(m, m) - by_words - captured.entropy_term, exact - by_words, None)

    def near(self, rows: slice, kl: Tensor, along: Tensor | None) -> tuple[Tensor, Tensor]:
        """What KL and cross-entropy lack at some tokens, ``[R]`` each.

        ``kl``: the KL by the words alone; ``along``: the slopes times the normalised states.
        """
        lacks = self.kl[rows] if along is None else self.kl[rows] + along
        near = (kl + lacks).clamp(min=0).neg_().exp_()
        return near * lacks, near * (self.ce[rows] if along is None else lacks)


@dataclass(frozen=True)
class Estimator:
    """The words for cheap values of all tokens, and for every layer the sample of tokens that gets exact values."""

    words: Words
    missed: Missed
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
        """Words by what the model itself predicts, and the sample of :func:`usually_drawn`; None where nothing is saved.

        For lenses whose read-outs are like the model's own.
        """
        if not worth_estimating(len(readout.weight)) or usually_drawn(captured.tokens) >= captured.tokens:
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
        counts = tuple(min(total, max(fewest, round(s * total))) for s in shares)
        order = torch.from_numpy(np.random.default_rng(tuple(seed)).permutation(total))[: max(counts)]
        drawn, place = order.sort()
        before, _ = captured.ranks.span(len(captured))
        here = (drawn >= before) & (drawn < before + len(captured))
        device = captured.states.device
        at = (drawn[here] - before).to(device)
        few, missed = captured.take(at), Missed.of(words, captured)
        return cls(words, missed, captured, at, place[here].to(device), few, counts, shares, tuple(seed))

    def again(self, captured: Capture, number: int) -> "Estimator":
        """The same words and shares for other tokens, with a new sample, for refits; ``number`` seeds it."""
        return Estimator.drawn_with(
            self.words, captured, share=self.shares, seed=(*self.seed, number), fewest=FEWEST_PAIRED
        )

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
        readout, words = self.words.readout, self.words

        def normalised(captured: Capture) -> Iterable[Tensor]:
            for k, layer in enumerate(lenses):
                yield readout.final_norm(captured.states[layer] @ maps.matrix[k].T + maps.offset[k])

        moment, entropies = torch.empty(0), []
        for k, n in enumerate(normalised(self.captured)):
            if k == 0:
                moment = room_for((len(lenses), *n.shape), n.device, memory_gib)
            if readout.linear:
                moment[k], entropy = words.softmax_moment(n)
            else:
                moment[k], entropy = n, words.expected_logit(n, n) - words.partition_and_largest(n)[0]
            entropies.append(entropy)
        if len(self.few):
            exact = Reference.of(readout, normalised(self.few), len(lenses), memory_gib)
        else:  # one of many processes may have no sampled token
            exact = Reference(moment[:, :0], entropies[0].new_zeros(len(lenses), 0))
        return Reference(moment, torch.stack(entropies)), exact

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
        """Cheap values of all tokens ``[M, N]``, and exact values of the tokens sampled for this layer ``[M, n]``.

        The logit lens of the last layer is the model itself, whose losses are known: there the cheap values are exact.
        """
        cheap_reference, exact_reference = (None, None) if references is None else references
        cheap = self._by_words(layer, maps, cheap_reference)
        drawn = self.sample(layer)
        few = replace(self.few, states=self.few.states[[layer, -1]])
        if drawn.of_largest is not None:
            few = few.take(drawn.of_largest)
            if exact_reference is not None:
                moment, negative_entropy = exact_reference.moment, exact_reference.negative_entropy
                exact_reference = Reference(drawn.rows(moment), drawn.rows(negative_entropy))
        exact = score(self.words.readout, few.states[0], maps, few, exact_reference)
        if layer == self.captured.layers:
            eye = torch.eye(maps.matrix.shape[-1]).to(maps.matrix)
            for k in range(len(maps)):
                if torch.equal(maps.matrix[k], eye) and not maps.offset[k].any():
                    cheap.kl[k], cheap.ce[k], cheap.top1[k] = 0.0, self.captured.model_ce, 1.0
        return cheap, exact

    def _by_words(self, layer: int, maps: AffineMaps, reference: Reference | None) -> Scores:
        """Cheap values of all tokens, in the form of :func:`score`."""
        readout, captured, words = self.words.readout, self.captured, self.words
        h = captured.states[layer]
        maps = maps.to(h)

        def of_lens(k: int, rows: slice, vectors: Tensor) -> tuple[Tensor, ...]:
            n = readout.final_norm(h[rows] @ maps.matrix[k].T + maps.offset[k])
            log_z, largest = words.partition_and_largest(n)
            seen, aim, best, *along = torch.einsum("nkd,nd->kn", vectors, n)
            if readout.bias is not None:
                aim, best = aim + readout.bias[captured.targets[rows]], best + readout.bias[captured.top[rows]]
            aim, best = readout.cap_(aim), readout.cap_(best)
            if not readout.linear:
                seen = words.expected_logit(n, readout.final_norm(captured.states[-1][rows]))
            hit = (best >= largest - 1e-5 * largest.abs().clamp(min=1)).float()
            moved: tuple[Tensor, ...] = ()
            if reference is not None:
                of, negative_entropy = reference.moment[k, rows], reference.negative_entropy[k, rows]
                logit = (of * n).sum(-1) if readout.linear else words.expected_logit(n, of)
                moved = (negative_entropy - logit + log_z,)
            kl = captured.entropy_term[rows] - seen + log_z
            lacks_kl, lacks_ce = self.missed.near(rows, kl, along[0] if along else None)
            return kl + lacks_kl, log_z - aim + lacks_ce, hit, *moved

        def one(rows: slice) -> tuple[Tensor, ...]:
            weight = readout.weight
            parts = [captured.expected[rows], weight[captured.targets[rows]], weight[captured.top[rows]]]
            vectors = torch.stack(parts if self.missed.slope is None else [*parts, self.missed.slope[rows]], 1)
            each = [of_lens(k, rows, vectors) for k in range(len(maps))]
            return tuple(torch.stack(of_all) for of_all in zip(*each, strict=True))

        if not len(h):
            none = h.new_zeros(len(maps), 0)
            return Scores(none, none, None if reference is None else none, none)
        kl, ce, top1, *movement = (
            torch.cat(parts, 1)
            for parts in zip(*in_pieces(slice(0, len(h)), TOKEN_BLOCK, one, what="a token of an estimate"), strict=True)
        )
        return Scores(kl, ce, movement[0] if movement else None, top1)


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
