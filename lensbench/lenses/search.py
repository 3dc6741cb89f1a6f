"""The ridge and the pad of a lens, chosen by KL on the dev split."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.estimated import FEWEST_PAIRED, WORDS, Drawn, drawn_of, mended, worth_estimating
from lensbench.lenses.maps import AffineMaps, Reads
from lensbench.lenses.moments import MOMENT_BLOCK
from lensbench.lenses.recipe import FitRecipe
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.statistics import half_width
from lensbench.streams.capture import Capture
from lensbench.streams.kl import TOKEN_BLOCK, Tokens, sums_of_all, token_kl
from lensbench.streams.partition import (
    CUDA_LOGITS,
    CUDA_ROWS,
    VOCABULARY_BLOCK,
    exponentials_,
    online_log_partition,
)
from lensbench.streams.products import centred
from lensbench.streams.readout import ReadOut
from lensbench.streams.words import Words

IN_CACHE = 2**19
"""Logits of one block on a processor"""


def pad_direction(readout: ReadOut, final_states: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Pad of length 1: the direction that the unembedding sees least, ``[d]``, times the rms of the final states.

    Among the directions that the norm's scale depends on, the bottom eigenvector of ``G^T W^T W G`` (W centred over the
    vocabulary, which softmax cannot tell), with the sign of the mean final state along it. Zero where the norm is not a
    gain over a scale.
    """
    gain = readout.gain(final_states.shape[-1])
    if gain is None:
        return torch.zeros(final_states.shape[-1], dtype=torch.float64)
    gain = gain.double().cpu()
    # What norm(x) does not depend on (LayerNorm: the mean; parts of the state that it is blind to) cannot hold length.
    values, vectors = torch.linalg.eigh(gain.T @ gain)
    seen = vectors[:, values > 1e-6 * values[-1]]
    visible = gain @ seen  # [d_read, k]
    direction = seen @ torch.linalg.eigh(visible.T @ centred_gram(readout.weight) @ visible)[1][:, 0]
    count, squares, along = ranks.span(len(final_states))[1], torch.zeros(()).double(), torch.zeros(()).double()
    for rows in final_states.split(MOMENT_BLOCK):  # in float64, which all of them at once may have no room for
        h = rows.double().cpu()
        squares += (h @ seen).pow(2).sum()
        along += h.sum(0) @ direction
    rms = (ranks.sum(squares) / (count * seen.shape[1])).sqrt()
    sign = torch.where(ranks.sum(along) < 0, -1.0, 1.0)
    pad: Tensor = sign * direction * rms * seen.shape[1] ** 0.5
    return pad


def centred_gram(weight: Tensor) -> Tensor:
    """``W^T W`` of W ``[V, d_read]`` centred over the vocabulary, float64 on the CPU, in blocks of W's own precision."""
    centred = [rows - weight.mean(0) for rows in weight.split(4096)]
    return torch.stack([(rows.T @ rows).double() for rows in centred]).sum(0).cpu()


@dataclass(frozen=True)
class Choice:
    """What dev chose for one lens; ``dev_kl`` is its mean KL over the layers it was chosen for, nats/token."""

    ridge: float
    pad: float
    dev_kl: float


@torch.no_grad()
def padded_kl(readout: ReadOut, x: Tensor, tokens: Tokens, pad: Tensor, pads: Sequence[float]) -> Tensor:
    """KL ``[P, R]`` of what R states ``[R, d]``, moved by each of P lengths of the pad, read out to; nats, float64.

    ``norm(x + a v) = G (x + a v) / s(x + a v) + o``, so the logits of every pad are those of the first, scaled row by
    row, plus a multiple of ``W G v``: one product with the unembedding serves them all. Where the norm has no such gain
    there is no pad direction and all pads are the same; where logits are soft-capped each pad is read out on its own.
    """
    gain = readout.gain(x.shape[-1])
    if not readout.linear or gain is None or len(pads) == 1:
        found = [token_kl(readout, readout.final_norm(x + a * pad.to(x)), tokens) for a in pads]
        return torch.stack(found).double().cpu()
    offset = readout.final_norm(torch.zeros_like(x[0]))
    direction = pad.to(x) @ gain.T  # G v
    u = x @ gain.T
    n = [readout.final_norm(x + a * pad.to(x)) for a in pads]
    inverse = []
    for a, rows in zip(pads, n, strict=True):
        unscaled = u + a * direction
        inverse.append(readout.inverse_scale(unscaled, rows, offset))
    log_z = log_partition_of_pads(readout, u, direction, offset, torch.stack(inverse), pads)
    kl = [token_kl(readout, rows, tokens, z) for rows, z in zip(n, log_z, strict=True)]
    return torch.stack(kl).double().cpu()


def log_partition_of_pads(
    readout: ReadOut, u: Tensor, direction: Tensor, offset: Tensor, inverse: Tensor, pads: Sequence[float]
) -> Tensor:
    """``logsumexp(W ((u + a_p direction) inverse_p + offset) + bias)`` for P pads: ``[P, R]`` from u ``[R, d_read]``.

    As in :func:`lensbench.streams.kl.log_partition`, each row is shifted by the largest logit of its first block.
    """
    weight, half = readout.weight, readout.products is not None and not u.is_cuda
    constant = weight @ offset if readout.bias is None else torch.addmv(readout.bias, weight, offset)
    along, shifted = weight @ direction, bool(constant.any())
    many, out = CUDA_ROWS if u.is_cuda else TOKEN_BLOCK // 2, []
    for first in range(0, len(u), many):
        rows = slice(first, first + many)
        inverses, left, base, apart = inverse[:, rows, None], u[rows], constant, u.new_zeros(0, dtype=torch.long)
        if half:  # states are scaled to logits first: others may be beyond its range
            left, base, apart = centred(left * inverses[0], weight, readout.longest)
        # A processor works in its cache; a GPU wants few large blocks.
        block = max(VOCABULARY_BLOCK, (CUDA_LOGITS if u.is_cuda else IN_CACHE) // len(left))
        total, shift = inverse.new_zeros(len(pads), len(left), 1), torch.empty(0)
        for start in range(0, len(weight), block):
            words = slice(start, start + block)
            if half:
                unscaled = (left @ readout.weight_in_terms[0][words].T + base[words]).div_(inverses[0])
                unscaled[apart] = u[rows][apart] @ weight[words].T
            else:
                unscaled = left @ weight[words].T
            if not start:
                each = zip(pads, inverses, strict=True)
                logits_of = ((unscaled + a * along[words]) * i + constant[words] for a, i in each)
                shift = torch.stack([logits.amax(-1, keepdim=True) for logits in logits_of])
            for p, a in enumerate(pads):
                logits = torch.add(unscaled, along[words], alpha=a).sub_(shift[p] / inverses[p]).mul_(inverses[p])
                total[p] += exponentials_(logits + constant[words] if shifted else logits).sum(-1, keepdim=True)
        log_z = (shift + total.log())[..., 0]
        # A later logit may be far above the largest of the first block.
        for p, row in (~torch.isfinite(log_z)).nonzero().tolist():
            n = (u[rows][row] + pads[p] * direction) * inverse[p, rows][row] + offset
            log_z[p, row] = online_log_partition(readout.with_products(None), n[None])[0][0]
        out.append(log_z)
    return torch.cat(out, 1)


Solve = Callable[[float], Reads]
"""The lens of a ridge"""


def thinned(captured: Capture, tokens: int) -> Capture:
    """At most so many tokens, drawn at random: every n-th one would be the same place of every sequence."""
    drawn = torch.randperm(captured.tokens, generator=torch.Generator().manual_seed(0))[:tokens]
    return captured.chosen(drawn.sort().values)


class DevSearch:
    """Ridge and pad of lenses, chosen by KL on the dev split; every evaluation is made once.

    Of a large vocabulary, mean KLs are unbiased estimates (:mod:`lensbench.lenses.estimated`): some words stand for all of
    them, and :func:`drawn_of` of the states have exact log-partitions. All lenses are read out to the same words.
    """

    def __init__(self, readout: ReadOut, dev: Capture, recipe: FitRecipe, pad: Tensor):
        if recipe.search_tokens is not None:
            dev = thinned(dev, recipe.search_tokens)
        self.readout, self.dev, self.recipe, self.pad = readout, dev, recipe, pad
        self.ranks = dev.ranks
        self.before, self.tokens = self.ranks.span(len(dev))
        self.constant_kl = float(self.ranks.sum(dev.constant_kl.double().sum())) / self.tokens
        self.shuffled = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(0)).to(dev.states.device)
        self.by_words: ReadOut | None = None
        if readout.linear and worth_estimating(len(readout.weight)):
            self.by_words = Words.draw(readout, dev.mean_p, WORDS, torch.Generator().manual_seed(0)).as_readout()
        self.rows_read_out = 0
        """Products of a state with the whole unembedding so far: what a search costs."""

    def kl(self, maps: Reads, layers: Sequence[int]) -> float:
        """Mean dev KL of map k on ``layers[k]`` (or of one map on all of them)."""
        return float(self.kl_of_pads(maps, layers, [0.0])[0])

    def kl_of_pads(self, maps: Reads, layers: Sequence[int], pads: Sequence[float]) -> Tensor:
        """Mean dev KL ``[P]`` of maps with each of P pads added, for one matrix product with the unembedding.

        A lens of several layers is chosen on at most ``pooled_dev_tokens`` states: the dev tokens are dealt out, each
        layer getting equally many.
        """
        share = 1
        if len(layers) > 1:
            share = min(self.tokens, max(1, -(-len(layers) * self.tokens // self.recipe.pooled_dev_tokens)))
        dev = self.dev
        sums, parts, sizes = [], [], []
        counts = [self.tokens if share == 1 else len(self.shuffled[k % share :: share]) for k in range(len(layers))]
        for k, layer in enumerate(layers):
            # Dealt from a shuffled pack: in their order, a layer would get the same places of every sequence.
            at = slice(None) if share == 1 else self.here(self.shuffled[k % share :: share])
            x = maps.read(k, dev.states[layer][at])
            parts.append((x, Tokens(dev.expected[at], dev.entropy_term[at], dev.states[-1][at])))
            sizes.append(len(x))
            # Several layers' rows in one product: a few rows would not be worth reading the unembedding for.
            if k == len(layers) - 1 or sum(sizes) >= 2 * TOKEN_BLOCK:
                tokens = Tokens(
                    *(torch.cat(columns) for columns in zip(*(vars(t).values() for _, t in parts), strict=True))
                )
                kl = self.padded_kl(torch.cat([x for x, _ in parts]), tokens, pads)
                sums += [one.sum(1) for one in kl.split(sizes, 1)]
                self.rows_read_out += sum(sizes)
                parts, sizes = [], []
        # Of all processes' tokens: what is chosen by it is the same on all of them.
        means = self.ranks.sum(torch.stack(sums)) / torch.tensor(counts, dtype=torch.float64)[:, None]
        return means.sum(0) / len(layers)

    def here(self, tokens: Tensor) -> Tensor:
        """Those of some tokens, given by their numbers among all, that this process has, by their numbers in it."""
        if self.ranks.size == 1:
            return tokens
        return tokens[(tokens >= self.before) & (tokens < self.before + len(self.dev))] - self.before

    def padded_kl(self, x: Tensor, tokens: Tokens, pads: Sequence[float]) -> Tensor:
        """:func:`padded_kl`, or estimates whose mean is unbiased; in halves where it does not fit into memory."""
        if not len(x):
            return torch.zeros(len(pads), 0, dtype=torch.float64)

        def kl(readout: ReadOut, rows: slice | Tensor) -> Tensor:
            own = Tokens(*(column[rows] for column in vars(tokens).values()))
            return padded_kl(readout, x[rows], own, self.pad, pads)

        def one(rows: slice) -> Tensor:
            some = torch.arange(rows.start, rows.stop)
            count = drawn_of(len(some), fewest=FEWEST_PAIRED)
            if self.by_words is None or count >= len(some):
                return kl(self.readout, rows)
            at = (torch.arange(count) * len(some)) // count
            return mended(
                kl(self.by_words, rows), kl(self.readout, some[at].to(x.device)), Drawn(at, count / len(some))
            )

        return torch.cat(in_pieces(slice(0, len(x)), len(x), one, what="a token of the search on dev"), 1)

    def padded(self, maps: AffineMaps, pad: float) -> AffineMaps:
        """Maps with so many lengths of the pad added to their offsets."""
        return AffineMaps(maps.matrix, maps.offset + pad * self.pad)

    def best_pad(self, maps: Reads, layers: Sequence[int], start: int) -> tuple[int, float]:
        """Index of the best pad and its KL, by descent from ``start``: KL has one valley along the pad."""
        pads = self.recipe.pads
        known: dict[int, float] = {}
        here = start
        while True:
            around = [i for i in (here - 1, here, here + 1) if 0 <= i < len(pads)]
            new = [i for i in around if i not in known]
            if known:  # having moved once, look two further on in the same product
                ahead = 2 * new[0] - here if new else here
                new += [i for i in (ahead,) if 0 <= i < len(pads) and i not in known and i not in new]
            if new:
                found = self.kl_of_pads(maps, layers, [pads[i] for i in new])
                known |= dict(zip(new, found.tolist(), strict=True))
            best = min(around, key=known.__getitem__)
            if best == here:
                return here, known[here]
            here = best

    def path(self, solve: Solve, layers: Sequence[int]) -> list[Choice]:
        """The best pad at every ridge of the path."""
        choices, start = [], len(self.recipe.pads) // 3
        for ridge in self.recipe.ridges:
            start, kl = self.best_pad(solve(ridge), layers, start)
            choices.append(Choice(ridge, self.recipe.pads[start], kl))
        return choices

    def best(self, solve: Solve, layers: Sequence[int], near: Choice | None = None) -> Choice:
        """The best ridge and pad, by descent along the path: KL has one valley along the ridge too.

        From the middle, or from where a like lens ended (``near``), which saves most of the way.
        """
        ridges = self.recipe.ridges
        known: dict[int, Choice] = {}
        pad = len(self.recipe.pads) // 3 if near is None else self.recipe.pads.index(near.pad)

        def at(index: int) -> float:
            nonlocal pad
            if index not in known:
                pad, kl = self.best_pad(solve(ridges[index]), layers, pad)
                known[index] = Choice(ridges[index], self.recipe.pads[pad], kl)
            return known[index].dev_kl

        here = len(ridges) // 2 if near is None else ridges.index(near.ridge)
        at(here)  # first, so that its pad is where the neighbours' search begins
        while True:
            around = [i for i in (here - 1, here, here + 1) if 0 <= i < len(ridges)]
            best = min(around, key=at)
            if best == here:
                return known[here]
            here = best

    def strongest(
        self,
        solve: Solve,
        layers: Sequence[int],
        tolerance: float,
        near: Choice | None = None,
    ) -> tuple[Choice, Choice]:
        """The best ridge (see :meth:`best`), and the strongest one that the tolerance allows (see :meth:`within`).

        The second is found by going up from the best, as far as the loss stays within what is allowed.
        """
        climb = self.climb(solve, layers, tolerance, near)
        return climb[0], self.end_of(climb, tolerance)

    def climb(
        self,
        solve: Solve,
        layers: Sequence[int],
        tolerance: float,
        near: Choice | None = None,
    ) -> list[Choice]:
        """The best ridge, and those above it up to the first whose loss the tolerance does not allow, or the last one.

        Every smaller tolerance has its end in it (:meth:`end_of`).
        """
        climb = [self.best(solve, layers, near)]
        for ridge in self.recipe.ridges[self.recipe.ridges.index(climb[0].ridge) + 1 :]:
            if climb[-1].dev_kl > self.allowed(climb[0].dev_kl, tolerance):
                break
            pad, kl = self.best_pad(solve(ridge), layers, self.recipe.pads.index(climb[-1].pad))
            climb.append(Choice(ridge, self.recipe.pads[pad], kl))
        return climb

    def end_of(self, climb: Sequence[Choice], tolerance: float) -> Choice:
        """The last choice of a climb before the first one whose loss the tolerance does not allow."""
        allowed = self.allowed(climb[0].dev_kl, tolerance)
        return list(itertools.takewhile(lambda choice: choice.dev_kl <= allowed, climb))[-1]

    def allowed(self, best: float, tolerance: float) -> float:
        """The dev KL that a tolerance allows where the best is ``best``."""
        return best + tolerance * max(0.0, self.constant_kl - best)

    def within_one_error(self, path: Sequence[Choice], solve: Callable[[float], AffineMaps], layer: int) -> Choice:
        """The strongest ridge whose dev KL exceeds the best's by at most one standard error of the paired difference.

        The standard error is clustered by document.
        """
        dev = self.dev
        tokens = Tokens(dev.expected, dev.entropy_term, dev.states[-1])
        sizes = sums_of_all(torch.ones(len(dev)), dev)
        documents = self.ranks.joined(dev.document[np.flatnonzero(np.diff(dev.window, prepend=-1))])

        def kl(choice: Choice) -> Tensor:
            maps = self.padded(solve(choice.ridge), choice.pad).to(dev.states)
            x = dev.states[layer] @ maps.matrix[0].T + maps.offset[0]
            return self.padded_kl(x, tokens, [0.0])[0]

        best = min(path, key=lambda c: c.dev_kl)
        of_best, chosen = kl(best), best
        for choice in path:
            if choice.ridge > chosen.ridge:
                excess = kl(choice) - of_best
                sums = sums_of_all(excess, dev)[:, None, None]
                mean = float(self.ranks.sum(excess.double().sum().cpu())) / self.tokens
                if mean <= float(half_width(sums, sizes, documents)[0, 0]) / 1.96:
                    chosen = choice
        return chosen

    def within(self, path: Sequence[Choice], tolerance: float) -> Choice:
        """The strongest ridge whose dev KL exceeds the path's best by at most ``tolerance`` of ``K_0 - best``."""
        best = min(choice.dev_kl for choice in path)
        allowed = self.allowed(best, tolerance)
        return max((c for c in path if c.dev_kl <= allowed), key=lambda c: c.ridge)
