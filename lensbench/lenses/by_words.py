"""Cheap values of the losses of lenses: some words stand for the vocabulary, mended by what they miss of the model.

They are biased. :mod:`lensbench.lenses.estimated` makes unbiased estimates of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import Reference, Scores, normalised_on_own
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture, room_for
from lensbench.streams.kl import TOKEN_BLOCK, target_logits
from lensbench.streams.words import Words

LENSES_AT_ONCE = 8
"""Lenses whose readings are multiplied together: a processor's cache holds them"""


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
        """For all tokens of a capture, of which a process may have none."""
        if not len(captured):
            return cls(captured.model_ce, captured.model_ce, captured.expected if words.readout.linear else None)
        readout = words.readout
        m = readout.final_norm(captured.states[-1])
        exact = captured.model_ce + target_logits(readout, m, captured.targets)
        if readout.linear:
            moment, entropy = words.softmax_moment(m)  # g(m) = moment m - entropy
            slope = captured.expected - moment
            at_zero = exact + entropy - (captured.expected * m).sum(-1)
            return cls(at_zero, at_zero, slope)
        by_words = words.partition_and_largest(m)[0]
        return cls(words.expected_logit(m, m) - by_words - captured.entropy_term, exact - by_words, None)

    def near(self, rows: slice, kl: Tensor, along: Tensor | None) -> tuple[Tensor, Tensor]:
        """What KL and cross-entropy of m lenses lack at some tokens, ``[m, R]`` each.

        ``kl``: the KL by the words alone; ``along``: the slopes times the normalised states.
        """
        lacks = self.kl[rows] if along is None else self.kl[rows] + along
        near = (kl + lacks).clamp(min=0).neg_().exp_()
        return near * lacks, near * (self.ce[rows] if along is None else lacks)


@dataclass(frozen=True)
class ByWords:
    """Some words of a read-out, and what they miss of the model's own predictions of some tokens."""

    words: Words
    missed: Missed
    captured: Capture

    @classmethod
    def of(cls, words: Words, captured: Capture) -> "ByWords":
        """For all tokens of a capture."""
        return cls(words, Missed.of(words, captured), captured)

    def reference(self, lenses: Sequence[int], maps: AffineMaps, memory_gib: float = float("inf")) -> Reference:
        """What movement is measured from: lens k on layer ``lenses[k]``."""
        readout, words = self.words.readout, self.words
        moment, entropies = torch.empty(0), []
        for k, n in enumerate(normalised_on_own(readout, self.captured, lenses, maps)):
            if k == 0:
                moment = room_for((len(lenses), *n.shape), n.device, memory_gib)
            if readout.linear:
                moment[k], entropy = words.softmax_moment(n)
            else:
                moment[k], entropy = n, words.expected_logit(n, n) - words.partition_and_largest(n)[0]
            entropies.append(entropy)
        return Reference(moment, torch.stack(entropies))

    @torch.no_grad()
    def scores(self, layer: int, maps: AffineMaps, reference: Reference | None = None) -> Scores:
        """Of M lenses on the states of one layer, in the form of :func:`lensbench.lenses.read.score`: ``[M, N]``.

        The logit lens of the last layer is the model itself, whose losses are known: there they are exact.
        """
        readout, captured, words = self.words.readout, self.captured, self.words
        h = captured.states[layer]
        maps = maps.to(h)

        def of_some(lenses: slice, rows: slice, vectors: Tensor) -> tuple[Tensor, ...]:
            m, d = len(maps.matrix[lenses]), h.shape[-1]
            x = (h[rows] @ maps.matrix[lenses].reshape(m * d, d).T).view(-1, m, d)
            n = readout.final_norm(x + maps.offset[lenses])  # [R, m, d_read]

            def each(values: Tensor) -> Tensor:
                """Of one row for each token and lens: ``[m, R]``."""
                return values.view(-1, m).T

            log_z, largest = map(each, words.partition_and_largest(n.flatten(0, 1)))
            seen, aim, best, *along = torch.bmm(vectors, n.transpose(1, 2)).permute(1, 2, 0)
            if readout.bias is not None:
                aim, best = aim + readout.bias[captured.targets[rows]], best + readout.bias[captured.top[rows]]
            aim, best = readout.cap_(aim), readout.cap_(best)
            if not readout.linear:
                model = readout.final_norm(captured.states[-1][rows])
                seen = each(words.expected_logit(n.flatten(0, 1), model.repeat_interleave(m, 0)))
            hit = (best >= largest - 1e-5 * largest.abs().clamp(min=1)).float()
            moved: tuple[Tensor, ...] = ()
            if reference is not None:
                of = reference.moment[lenses, rows].transpose(0, 1)
                if readout.linear:
                    logit = (of * n).sum(-1).T
                else:
                    logit = each(words.expected_logit(n.flatten(0, 1), of.flatten(0, 1)))
                moved = (reference.negative_entropy[lenses, rows] - logit + log_z,)
            kl = captured.entropy_term[rows] - seen + log_z
            lacks_kl, lacks_ce = self.missed.near(rows, kl, along[0] if along else None)
            return kl + lacks_kl, log_z - aim + lacks_ce, hit, *moved

        def one(rows: slice) -> tuple[Tensor, ...]:
            weight = readout.weight
            parts = [captured.expected[rows], weight[captured.targets[rows]], weight[captured.top[rows]]]
            vectors = torch.stack(parts if self.missed.slope is None else [*parts, self.missed.slope[rows]], 1)
            some = [of_some(slice(k, k + LENSES_AT_ONCE), rows, vectors) for k in range(0, len(maps), LENSES_AT_ONCE)]
            return tuple(torch.cat(of_all) for of_all in zip(*some, strict=True))

        if not len(h):
            none = h.new_zeros(len(maps), 0)
            return Scores(none, none, None if reference is None else none, none)
        kl, ce, top1, *movement = (
            torch.cat(parts, 1)
            for parts in zip(*in_pieces(slice(0, len(h)), TOKEN_BLOCK, one, what="a token of an estimate"), strict=True)
        )
        if layer == captured.layers:
            eye = torch.eye(maps.matrix.shape[-1]).to(maps.matrix)
            for k in range(len(maps)):
                if torch.equal(maps.matrix[k], eye) and not maps.offset[k].any():
                    kl[k], ce[k], top1[k] = 0.0, captured.model_ce, 1.0
        return Scores(kl, ce, movement[0] if movement else None, top1)
