"""All lenses of a stream from one pass over it: closed forms along a ridge path, then refinement on KL.

The closed form is ridge regression from h_l to the final pre-norm state, from centred second moments in float64.
A *prior* B0 says what the ridge shrinks towards: ``identity`` (as published) or ``zero`` (exactly rotation-equivariant).
Ridges are in units of the median eigenvalue of the layer's covariance, which rotations leave alone. Least squares
shrinks and a scale-free norm re-inflates it, so that its predictions come out over-confident; the *pad* adds length
along the direction that the unembedding sees least.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from lensbench.lenses import AffineMaps
from lensbench.memory import in_pieces
from lensbench.ranks import ALONE, Ranks
from lensbench.stream import Capture, ReadOut, RotatedView
from lensbench.transfer import (
    ROW_BLOCK,
    TOKEN_BLOCK,
    VOCABULARY_BLOCK,
    Tokens,
    Vocabulary,
    half_width,
    sums_of_all,
    token_kl,
)

Prior = Literal["zero", "identity"]
Stage = Literal["closed", "refined", "loaded"]

MOMENT_BLOCK = 4096


class FitRecipe(BaseModel):
    """How lenses are fitted and chosen; every choice is made on the dev split."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sequences: int = Field(512, ge=1, description="sequences of the fit split")
    positions: int = Field(32, ge=1, description="random positions of each of them")
    dev_sequences: int = Field(256, ge=1, description="sequences of the dev split")
    dev_positions: int = Field(16, ge=1, description="random positions of each of them")
    ridges: tuple[float, ...] = Field(
        (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3),
        min_length=1,
        description="ridge path, rising, in median eigenvalues",
    )
    pads: tuple[float, ...] = Field(
        tuple(i / 10 for i in range(11)), min_length=1, description="lengths of the pad, in rms of the final state"
    )
    tolerance: float = Field(0.02, ge=0, description="allowed dev loss of the headline matrix, share of K_0 - best")
    tolerances: tuple[float, ...] = Field(
        (0.0, 0.05, 0.1), description="allowed dev losses of the curve beside the headline's, and one standard error"
    )
    layers: int = Field(
        8,
        ge=2,
        description="layers at most, evenly spread, of the curve over tolerances, leave-one-out, pairs and refits",
    )
    pair_rotations: int = Field(2, ge=1, description="rotated views of which pairs of layers get lenses")
    rotations: int = Field(5, ge=1, description="rotated views, each with a shared lens of its own")
    variance: float = Field(0.99, gt=0, le=1, description="share of pooled variance that rotations act on")
    refits: int = Field(5, ge=0, description="refits on document-resampled fit data")
    pooled_dev_tokens: int = Field(
        16384, ge=1, description="dev states at most that a lens of several layers is chosen on, equally many per layer"
    )
    refine_tokens: int = Field(16384, ge=1, description="fitting tokens of a pass of refinement")
    refine_passes: int = Field(24, ge=0, description="most passes of a refinement")
    refine_batch: int = Field(256, ge=1, description="tokens of an update of a lens")
    refine_rate: float = Field(
        0.01, gt=0, description="first rate: spectral size of an update, relative to rms(h_L) / rms(h_l)"
    )
    refine_tolerance: float = Field(1e-3, gt=0, description="relative fall of dev KL in a pass that ends a refinement")
    refine_vocabulary: int = Field(
        4096, ge=2, description="rows of the unembedding that refinement sees: half exactly, half drawn from the rest"
    )
    memory_gib: float = Field(
        4.0,
        gt=0,
        description="states beyond this are kept in a memory-mapped temporary file (TMPDIR) instead of in memory",
    )

    @field_validator("ridges", "pads")
    @classmethod
    def _rising(cls, path: tuple[float, ...]) -> tuple[float, ...]:
        if any(b <= a for a, b in itertools.pairwise(path)):
            raise ValueError("must rise from one entry to the next")
        return path

    @field_validator("tolerances")
    @classmethod
    def _shares(cls, tolerances: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= t < 1 for t in tolerances):
            raise ValueError("must be shares of K_0 - best: at least 0 and below 1")
        if len({f"{t:g}" for t in tolerances}) < len(tolerances):
            raise ValueError("must differ in their first six digits")
        return tolerances

    @field_validator("ridges")
    @classmethod
    def _positive(cls, ridges: tuple[float, ...]) -> tuple[float, ...]:
        if ridges[0] <= 0:
            raise ValueError("must be above 0: without a ridge a stream that does not fill its space has no solution")
        return ridges


@dataclass(frozen=True)
class Moments:
    """Centred second moments of K regressions from ``[d]`` to ``[d]``, float64.

    ``covariance`` ``[K, d, d]`` of the input, ``cross`` ``[K, d, d]`` = E (r - rbar)(h - hbar)^T, ``mean`` ``[K, d]`` of the
    input, ``target_mean`` ``[d]``.
    """

    mean: Tensor
    covariance: Tensor
    cross: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, captured: Capture, token_weights: Tensor | None = None) -> "Moments":
        """One regression per layer 0..L-1, to h_L; ``token_weights`` ``[N]`` resample the tokens. Of all processes."""
        sums = MomentSums(captured.ranks)
        for start in range(0, len(captured), MOMENT_BLOCK):
            rows = slice(start, start + MOMENT_BLOCK)
            sums.add(captured.states[:, rows], None if token_weights is None else token_weights[rows])
        return sums.moments()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[K, d]`` and eigenvectors ``[K, d, d]`` of the covariances, found once."""
        return torch.linalg.eigh(self.covariance)

    @classmethod
    def stack(cls, parts: "Sequence[Moments]") -> "Moments":
        """The regressions of several, one after the other; their target is the same."""
        return cls(
            torch.cat([p.mean for p in parts]),
            torch.cat([p.covariance for p in parts]),
            torch.cat([p.cross for p in parts]),
            parts[0].target_mean,
        )

    def layer(self, rows: Sequence[int]) -> "Moments":
        at = list(rows)
        return Moments(self.mean[at], self.covariance[at], self.cross[at], self.target_mean)

    def pooled(self, rows: Sequence[int]) -> "Moments":
        """One regression for several layers with equally many tokens: what a shared lens is fitted to."""
        at = list(rows)
        mean = self.mean[at].mean(0)
        shift = self.mean[at] - mean
        covariance = self.covariance[at].mean(0) + shift.T @ shift / len(at)
        return Moments(mean[None], covariance[None], self.cross[at].mean(0)[None], self.target_mean)

    def pooled_within(self) -> "Moments":
        """One matrix for all layers, each layer's own mean: what a shared lens with a bias per layer is fitted to."""
        layers = len(self.mean)
        covariance, cross = self.covariance.mean(0), self.cross.mean(0)
        return Moments(self.mean, covariance.expand(layers, -1, -1), cross.expand(layers, -1, -1), self.target_mean)

    def rotated(self, view: RotatedView) -> "Moments":
        """The moments of the rotated states, without rotating a state."""
        q = view.maps.to(self.mean)
        return Moments(
            torch.einsum("lde,le->ld", q, self.mean),
            q @ self.covariance @ q.transpose(-1, -2),
            self.cross @ q.transpose(-1, -2),
            self.target_mean,
        )


class MomentSums:
    """Sums from which :class:`Moments` follow, filled block by block: the stream is passed once and no state is kept.

    float64, around the first block's means, so that a large mean costs no digits. Those of several processes are taken
    around the first one's and added up at the end.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.shift: Tensor | None = None  # [L+1, d]
        self.weight = 0.0
        self.first: Tensor  # [L+1, d]
        self.second: Tensor  # [L, d, d]
        self.cross: Tensor  # [L, d, d]

    def add(self, states: Tensor, token_weights: Tensor | None = None) -> None:
        """Add states ``[L+1, n, d]``, weighted by ``token_weights`` ``[n]``."""
        layers, _, d = states.shape[0] - 1, *states.shape[1:]
        weights = None if token_weights is None else token_weights.to(states.device).double()
        if self.shift is None:
            self.shift = self.ranks.told(states.mean(1, dtype=torch.float64).cpu()).to(states.device)
            self.first = torch.zeros_like(self.shift)
            self.second = self.shift.new_zeros(layers, d, d)
            self.cross = self.shift.new_zeros(layers, d, d)

        def centred(layer: int) -> Tensor:
            return states[layer].double() - self.shift[layer]  # type: ignore[index]

        target = centred(layers)
        weighted = target if weights is None else target * weights[:, None]
        self.first[layers] += weighted.sum(0)
        self.weight += float(states.shape[1] if weights is None else weights.sum())
        for layer in range(layers):
            h = centred(layer)
            self.cross[layer].addmm_(weighted.T, h)
            scaled = h if weights is None else h * weights[:, None]
            self.second[layer].addmm_(scaled.T, h)
            self.first[layer] += scaled.sum(0)

    def moments(self) -> Moments:
        """The centred moments; on the CPU from here on, d x d algebra in float64 being no work for a GPU."""
        if self.shift is None:
            raise ValueError("no token was added")
        weight = float(self.ranks.sum(torch.tensor(self.weight, dtype=torch.float64)))
        if not weight > 0:
            raise ValueError("no token was added")
        mean = self.ranks.sum(self.first) / weight
        inputs, target = mean[:-1], mean[-1]
        covariance = self.ranks.sum(self.second) / weight - inputs[:, :, None] * inputs[:, None, :]
        cross = self.ranks.sum(self.cross) / weight - target[None, :, None] * inputs[:, None, :]
        mean = mean + self.shift
        return Moments(mean[:-1].cpu(), covariance.cpu(), cross.cpu(), mean[-1].cpu())


def median_eigenvalue(values: Tensor) -> Tensor:
    """Median of a covariance's eigenvalues ``[K, d]``, null directions left out: the unit of a ridge, ``[K]``.

    A stream whose state is wider than what it holds would otherwise have a unit of nearly zero.
    """
    medians = [v[v > 1e-10 * v[-1]].median() if bool(v[-1] > 0) else v.new_tensor(1.0) for v in values]
    return torch.stack(medians)


class RidgePath:
    """Ridge solutions of K regressions for any ridge, from one eigendecomposition of each input covariance."""

    def __init__(self, moments: Moments, prior: Prior):
        self.moments, self.prior = moments, prior
        self.values, self.vectors = moments.eigen
        self.unit = median_eigenvalue(self.values)
        self.projected_cross = moments.cross @ self.vectors

    def solve(self, ridge: float | Tensor) -> AffineMaps:
        """``B = (C_rh + lam B0)(C_hh + lam I)^-1``, ``c = rbar - B hbar``; a ridge, or one for each regression ``[K]``."""
        lam = (torch.as_tensor(ridge, dtype=torch.float64) * self.unit.cpu()).to(self.values)[:, None]
        numerator = self.projected_cross
        if self.prior == "identity":
            numerator = numerator + lam[..., None] * self.vectors
        shrunk = numerator / (self.values.clamp(min=0) + lam)[:, None, :]
        matrix = shrunk @ self.vectors.transpose(-1, -2)
        offset = self.moments.target_mean - (matrix @ self.moments.mean[..., None])[..., 0]
        return AffineMaps(matrix, offset)


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
    return sign * direction * rms * seen.shape[1] ** 0.5


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
    # 1 / s of each row, by least squares over its entries.
    inverse = []
    for a, rows in zip(pads, n, strict=True):
        unscaled = u + a * direction
        inverse.append(((rows - offset) * unscaled).sum(-1) / unscaled.pow(2).sum(-1))
    log_z = log_partition_of_pads(readout, u, direction, offset, torch.stack(inverse), torch.tensor(pads).to(x))
    kl = [token_kl(readout, rows, tokens, z) for rows, z in zip(n, log_z, strict=True)]
    return torch.stack(kl).double().cpu()


def log_partition_of_pads(
    readout: ReadOut, u: Tensor, direction: Tensor, offset: Tensor, inverse: Tensor, pads: Tensor
) -> Tensor:
    """``logsumexp(W ((u + a_p direction) inverse_p + offset) + bias)`` for P pads: ``[P, R]`` from u ``[R, d_read]``."""
    weight, bias = readout.weight, readout.bias
    constant = weight @ offset if bias is None else torch.addmv(bias, weight, offset)
    along = weight @ direction
    out = []
    for first in range(0, len(u), TOKEN_BLOCK // 2):
        rows = slice(first, first + TOKEN_BLOCK // 2)
        largest = u.new_full((len(pads), len(u[rows])), -torch.inf)
        total = torch.zeros_like(largest)
        for start in range(0, len(weight), VOCABULARY_BLOCK):
            words = slice(start, start + VOCABULARY_BLOCK)
            unscaled = u[rows] @ weight[words].T
            for p, a in enumerate(pads):
                logits = torch.addcmul(
                    constant[words], unscaled + a * along[words] if a else unscaled, inverse[p, rows, None]
                )
                new = torch.maximum(largest[p], logits.amax(-1))
                total[p] = total[p] * torch.exp(largest[p] - new) + logits.sub_(new[:, None]).exp_().sum(-1)
                largest[p] = new
        out.append(largest + total.log())
    return torch.cat(out, 1)


class DevSearch:
    """Ridge and pad of lenses, chosen by KL on the dev split; every evaluation is made once."""

    def __init__(self, readout: ReadOut, dev: Capture, recipe: FitRecipe, pad: Tensor):
        self.readout, self.dev, self.recipe, self.pad = readout, dev, recipe, pad
        self.ranks = dev.ranks
        self.before, self.tokens = self.ranks.span(len(dev))
        self.constant_kl = float(self.ranks.sum(dev.constant_kl.double().sum())) / self.tokens
        self.shuffled = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(0)).to(dev.states.device)
        self.rows_read_out = 0
        """Products of a state with the whole unembedding so far: what a search costs."""

    def kl(self, maps: AffineMaps, layers: Sequence[int]) -> float:
        """Mean dev KL of map k on ``layers[k]`` (or of one map on all of them)."""
        return float(self.kl_of_pads(maps, layers, [0.0])[0])

    def kl_of_pads(self, maps: AffineMaps, layers: Sequence[int], pads: Sequence[float]) -> Tensor:
        """Mean dev KL ``[P]`` of maps with each of P pads added, for one matrix product with the unembedding.

        A lens of several layers is chosen on at most ``pooled_dev_tokens`` states: the dev tokens are dealt out, each
        layer getting equally many.
        """
        share = 1
        if len(layers) > 1:
            share = min(self.tokens, max(1, -(-len(layers) * self.tokens // self.recipe.pooled_dev_tokens)))
        maps, dev = maps.to(self.dev.states), self.dev
        sums, parts, sizes = [], [], []
        counts = [self.tokens if share == 1 else len(self.shuffled[k % share :: share]) for k in range(len(layers))]
        for k, layer in enumerate(layers):
            m = k if len(maps) > 1 else 0
            # Dealt from a shuffled pack: in their order, a layer would get the same places of every sequence.
            at = slice(None) if share == 1 else self.here(self.shuffled[k % share :: share])
            x = dev.states[layer][at] @ maps.matrix[m].T + maps.offset[m]
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
        """:func:`padded_kl`, in halves where it does not fit into memory."""
        if not len(x):
            return torch.zeros(len(pads), 0, dtype=torch.float64)

        def one(rows: slice) -> Tensor:
            own = Tokens(*(column[rows] for column in vars(tokens).values()))
            return padded_kl(self.readout, x[rows], own, self.pad, pads)

        return torch.cat(in_pieces(slice(0, len(x)), len(x), one, what="a token of the search on dev"), 1)

    def padded(self, maps: AffineMaps, pad: float) -> AffineMaps:
        return AffineMaps(maps.matrix, maps.offset + pad * self.pad)

    def best_pad(self, maps: AffineMaps, layers: Sequence[int], start: int) -> tuple[int, float]:
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

    def path(self, solve: Callable[[float], AffineMaps], layers: Sequence[int]) -> list[Choice]:
        """The best pad at every ridge of the path."""
        choices, start = [], len(self.recipe.pads) // 3
        for ridge in self.recipe.ridges:
            start, kl = self.best_pad(solve(ridge), layers, start)
            choices.append(Choice(ridge, self.recipe.pads[start], kl))
        return choices

    def best(self, solve: Callable[[float], AffineMaps], layers: Sequence[int], near: Choice | None = None) -> Choice:
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
            return token_kl(self.readout, self.readout.final_norm(x), tokens)

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
        allowed = best + tolerance * max(0.0, self.constant_kl - best)
        return max((c for c in path if c.dev_kl <= allowed), key=lambda c: c.ridge)


@dataclass(frozen=True)
class Fitted:
    """One kind of lens of one stage: its maps (one, or one per layer) and what was chosen on dev for each."""

    maps: AffineMaps
    ridges: tuple[float, ...]
    pads: tuple[float, ...]
    prior: Prior
    stage: Stage
    tolerance: float = 0.0


def choices_of(fitted: Fitted) -> list[Choice]:
    """What dev chose for each of some lenses, their KL aside: where the search for like ones may begin."""
    return [Choice(ridge, pad, float("nan")) for ridge, pad in zip(fitted.ridges, fitted.pads, strict=True)]


def fit_each(search: DevSearch, moments: Moments, prior: Prior, *, tolerance: float | None = None) -> Fitted:
    """One lens per layer: the best ridge on dev, or with ``tolerance`` the strongest allowed one."""
    if tolerance is not None:
        return fit_within(search, moments, prior, ridge_paths(search, moments, prior), tolerance)
    choices: list[Choice] = []
    for layer in range(len(moments.mean)):
        near = choices[-1] if choices else None
        choices.append(search.best(RidgePath(moments.layer([layer]), prior).solve, [layer], near))
    return solve_as_chosen(search, moments, prior, choices)


def ridge_paths(
    search: DevSearch, moments: Moments, prior: Prior, layers: Sequence[int] | None = None
) -> list[list[Choice]]:
    """Per regression the best pad and its dev KL at every ridge; ``layers``: those of the regressions, all if left out."""
    at = range(len(moments.mean)) if layers is None else layers
    return [search.path(RidgePath(moments.layer([k]), prior).solve, [layer]) for k, layer in enumerate(at)]


def fit_within(
    search: DevSearch,
    moments: Moments,
    prior: Prior,
    paths: Sequence[Sequence[Choice]],
    tolerance: float | Literal["1se"],
    layers: Sequence[int] | None = None,
) -> Fitted:
    """One lens per layer (of ``layers``), each with the strongest ridge of its path that the tolerance allows."""
    chosen = range(len(moments.mean)) if layers is None else layers
    choices = []
    for layer in chosen:
        if isinstance(tolerance, str):
            solve = RidgePath(moments.layer([layer]), prior).solve
            choices.append(search.within_one_error(paths[layer], solve, layer))
        else:
            choices.append(search.within(paths[layer], tolerance))
    own = moments if layers is None else moments.layer(chosen)
    return solve_as_chosen(search, own, prior, choices, 0.0 if isinstance(tolerance, str) else tolerance)


def spread_layers(layers: int, count: int) -> list[int]:
    """At most ``count`` of layers 0..layers-1, evenly spread, the first and the last among them."""
    return sorted({round(k * (layers - 1) / (count - 1)) for k in range(count)})


def fit_shared(search: DevSearch, moments: Moments, layers: Sequence[int], near: Choice | None = None) -> Fitted:
    """One lens for ``layers``, prior zero, chosen by its mean dev KL over those layers; ``near``: where to begin."""
    pooled = moments.pooled(layers)
    choice = search.best(RidgePath(pooled, "zero").solve, layers, near)
    return solve_as_chosen(search, pooled, "zero", [choice])


def fit_shared_bias(search: DevSearch, moments: Moments) -> Fitted:
    """One matrix for all layers and a bias for each, prior zero."""
    within = moments.pooled_within()
    layers = range(len(moments.mean))
    choice = search.best(RidgePath(within, "zero").solve, layers)
    return solve_as_chosen(search, within, "zero", [choice] * len(layers))


def fit_rotated(
    search: DevSearch,
    rotated: Moments,
    view: RotatedView,
    layers: Sequence[int] | None = None,
    near: Choice | None = None,
) -> Fitted:
    """The one lens of a rotated view for all layers, or for some, from the view's own moments.

    As a map of rotated states; it is chosen on plain dev states with the rotation folded in, which is the same. ``near``:
    where to begin.
    """
    chosen = list(range(len(rotated.mean))) if layers is None else list(layers)
    pooled = rotated.pooled(chosen)
    path = RidgePath(pooled, "zero")
    choice = search.best(lambda ridge: rotated_maps(path.solve(ridge), view)[chosen], chosen, near)
    return solve_as_chosen(search, pooled, "zero", [choice])


def rotated_maps(maps: AffineMaps, view: RotatedView) -> AffineMaps:
    """Maps of rotated states (one, or one per layer) as maps of the plain states, one per layer: ``B Q_l h + c``."""
    q = view.maps.to(maps.matrix)
    return AffineMaps(maps.matrix @ q, maps.offset.expand(len(q), -1))


def solve_as_chosen(
    search: DevSearch, moments: Moments, prior: Prior, choices: Sequence[Choice], tolerance: float = 0.0
) -> Fitted:
    """The closed forms of K regressions at chosen ridges and pads."""
    ridges, pads = tuple(c.ridge for c in choices), tuple(c.pad for c in choices)
    solved = RidgePath(moments, prior).solve(torch.tensor(ridges, dtype=torch.float64))
    offset = solved.offset + torch.tensor(pads, dtype=torch.float64).to(solved.offset)[:, None] * search.pad
    return Fitted(AffineMaps(solved.matrix, offset), ridges, pads, prior, "closed", tolerance)


class LogPartition(torch.autograd.Function):
    """``logsumexp(W n + bias)`` and its gradient ``W^T q`` in one pass over blocks that stay in the processor's cache."""

    @staticmethod
    def forward(ctx, n: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        log_z, moment = torch.empty_like(n[:, 0]), torch.empty_like(n)
        for start in range(0, len(n), TOKEN_BLOCK):
            rows = slice(start, start + TOKEN_BLOCK)
            logits = n[rows] @ weight.T if bias is None else torch.addmm(bias, n[rows], weight.T)
            largest = logits.amax(-1, keepdim=True)
            q = logits.sub_(largest).exp_()
            total = q.sum(-1, keepdim=True)
            log_z[rows] = (largest + total.log())[:, 0]
            torch.div(q @ weight, total, out=moment[rows])
        ctx.save_for_backward(moment)
        return log_z

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (moment,) = ctx.saved_tensors
        return moment * gradient[:, None], None, None


def kl_objective(readout: ReadOut, x: Tensor, expected: Tensor, entropy_term: Tensor) -> Tensor:
    """Mean ``KL(p || R(x))`` over rows ``[N, d]``, nats/token, differentiable in x."""
    n = readout.final_norm(x)
    return (entropy_term - (expected * n).sum(-1) + LogPartition.apply(n, readout.weight, readout.bias)).mean()


def kl_gradient(readout: ReadOut, n: Tensor, tokens: Tokens, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Gradient of ``KL(p || q)`` in the normalised states ``[R, d_read]``, row by row: ``W^T q - e``.

    q over the given rows of the unembedding; where logits are soft-capped, over all words and with p formed again.
    """
    gradients = []
    for start in range(0, len(n), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        logits = n[rows] @ weight.T if offset is None else torch.addmm(offset, n[rows], weight.T)
        if readout.softcap is None:
            gradients.append(torch.softmax(logits, -1) @ weight - tokens.expected[rows])
        else:
            capped = readout.cap_(logits)
            p = readout.logits(readout.final_norm(tokens.final[rows])).softmax(-1)
            slope = 1 - (capped / readout.softcap) ** 2
            gradients.append(((capped.softmax(-1) - p) * slope) @ weight)
    return torch.cat(gradients)


def own_rows(rows: Tensor, layers: Tensor, before: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each lens's batch ``[M, B]`` the tokens that this process has, which are ``count`` behind ``before``.

    Their numbers here and their layers ``[M, b]``, and weights ``[M, b, 1]``: 0 for what fills up the shorter rows.
    """
    here = (rows >= before) & (rows < before + count)
    most = max(1, int(here.sum(1).max()))
    kept = here.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    weights = here.gather(1, kept)
    return (rows.gather(1, kept) - before).clamp(0, count - 1), layers.gather(1, kept), weights[..., None]


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Muon (Jordan et al. 2024), which torch.optim.Muon uses too."""


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each of ``[M, a, b]``, a <= b, with its singular values brought to about 1, by Newton-Schulz in batched products."""
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@dataclass(frozen=True)
class Refinement:
    """A refined lens and how it ended: ``iterations``: updates kept; ``converged``: a pass brought less."""

    maps: AffineMaps
    dev_kl: float
    iterations: int
    ended: Literal["converged", "dev rose", "pass limit"]


@dataclass
class Refining:
    """One lens on its way: where its best iterate stands and how large its next updates are."""

    layers: tuple[int, ...]
    best: Tensor  # [d, d + 1]
    dev_kl: float
    rate: float
    updates: int = 0
    setbacks: int = 0
    ended: Literal["converged", "dev rose", "pass limit"] = "pass limit"


def refine(
    search: DevSearch,
    fit: Capture,
    moments: Moments,
    start: AffineMaps,
    ridges: Sequence[float],
    layers: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> list[Refinement]:
    """Minimise ``E KL + (lam/2) |B - B0|^2`` for M lenses side by side, lens m on ``layers[m]``, prior zero.

    Each starts from its closed form, the solution of regression m of ``moments``. The penalty is the closed form's own,
    in nats: its ridge times ``2 KL / E |r - x|^2`` at the start on dev, what a unit of squared error costs. Updates are
    orthogonalised momentum (Muon) on centred states with a constant appended: their spectral size is a share
    (``refine_rate``) of ``rms(h_L) / rms(h_l)``, the size of a map from that layer to the last, so that no rate is tuned
    over depth; equivariant under rotations. In passes over ``refine_tokens`` tokens, with 10 % warm-up and linear decay
    in each. After each the end and the middle of the way are measured on dev and the best so far, the start included, is
    kept: **a refinement never returns a lens that is worse on dev**; the next pass starts there, with updates half as
    large where the middle was better than the end, 0.3 times where neither was. A lens is done when a pass lowers its
    dev KL by less than ``refine_tolerance`` of it, or twice not at all. ``report(updates done, updates at most)``.

    Behind a norm that ignores scale the penalty has no optimum of its own (a smaller map has the same KL): there the
    ridge acts through the start, the path and the stopping on dev.
    """
    recipe, readout = search.recipe, search.readout
    device, dtype = fit.states.device, fit.states.dtype
    d = fit.states.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = Vocabulary(readout, fit.mean_p, recipe.refine_vocabulary, generator)
    ranks = fit.ranks
    earlier, count = ranks.span(len(fit))
    tokens = min(recipe.refine_tokens, count)
    batch = min(recipe.refine_batch, tokens)
    steps = tokens // batch
    target_rms = float(ranks.rows(fit.states[-1], torch.arange(min(MOMENT_BLOCK, count))).pow(2).mean().sqrt())

    mean = moments.mean.to(device, dtype)  # [M, d]
    scale, penalties, lenses = [], [], []
    values = moments.eigen[0]
    for m, own in enumerate(layers):
        some = torch.arange(m % 8, count, len(own) * 8)[:512]
        sample = torch.cat([ranks.rows(fit.states[layer], some) for layer in own]) - mean[m]
        scale.append(float(sample.pow(2).mean(-1).sqrt().median()) or 1.0)  # a layer may never vary
        matrix, offset = start.matrix[m].to(device, dtype), start.offset[m].to(device, dtype)
        dev_kl = search.kl(start[[m]], own)
        error = torch.stack([(search.dev.states[-1] - search.dev.states[k] @ matrix.T - offset)[:, : readout.weight.shape[1]]
                             .pow(2).sum(-1).mean() for k in own]).mean()  # fmt: skip
        if ranks.size > 1:
            error = ranks.sum(error * len(search.dev)) / search.tokens
        lam = ridges[m] * median_eigenvalue(values[m : m + 1])[0]
        penalties.append(float(2 * dev_kl / error.double().cpu() * lam))
        theta = torch.cat([matrix, ((matrix @ mean[m] + offset) / scale[m])[:, None]], 1)
        lenses.append(Refining(tuple(own), theta, dev_kl, recipe.refine_rate * target_rms / scale[m]))
    scales, penalty = torch.tensor(scale).to(mean), torch.tensor(penalties).to(mean)

    def maps(m: int, theta: Tensor) -> AffineMaps:
        matrix = theta[:, :d].double().cpu()
        offset = theta[:, d].double().cpu() * scale[m] - matrix @ mean[m].double().cpu()
        return AffineMaps(matrix[None], offset[None])

    for number in range(recipe.refine_passes):
        active = [m for m, lens in enumerate(lenses) if lens.ended == "pass limit" and lens.dev_kl > 0]
        if not active:
            break
        begin = torch.stack([lenses[m].best for m in active])
        theta, momentum = begin.clone(), torch.zeros_like(begin)
        rates = torch.tensor([lenses[m].rate for m in active]).to(mean)[:, None, None]
        # Every lens its own random order and, where it has several layers, a random layer for each token.
        order = torch.stack([torch.randperm(count, generator=generator)[: steps * batch] for _ in active])
        at_layer = torch.stack([
            torch.tensor(lenses[m].layers)[torch.randint(len(lenses[m].layers), (steps * batch,), generator=generator)]
            for m in active
        ])  # fmt: skip
        order, at_layer = order.to(device), at_layer.to(device)
        own_mean, own_scale, own_penalty = mean[active], scales[active], penalty[active]
        for step in range(steps):
            if step % 4 == 0:
                weight, word_offset = vocabulary.draw()
            here = slice(step * batch, (step + 1) * batch)
            rows, from_layer, weights = order[:, here], at_layer[:, here], None
            if ranks.size > 1:
                rows, from_layer, weights = own_rows(rows, from_layer, earlier, len(fit))
            h = fit.states[from_layer, rows].to(device) - own_mean[:, None]  # [M, B, d]
            inputs = torch.cat([h, own_scale[:, None, None].expand(-1, h.shape[1], 1)], -1)
            x = (inputs @ theta.transpose(1, 2)).requires_grad_()
            n = readout.final_norm(x)
            flat = rows.flatten()
            known = Tokens(fit.expected[flat], fit.entropy_term[flat], fit.states[-1][flat])
            with torch.no_grad():
                gradient_n = kl_gradient(readout, n.flatten(0, 1), known, weight, word_offset).view_as(n) / batch
                if weights is not None:
                    gradient_n *= weights
            (gradient_x,) = torch.autograd.grad(n, x, gradient_n)
            gradient = ranks.sum(gradient_x.transpose(1, 2) @ inputs)
            gradient[:, :, :d] += own_penalty[:, None, None] * theta[:, :, :d]
            momentum.mul_(0.9).add_(gradient)
            change = orthogonalised(gradient.add_(momentum, alpha=0.9))
            decay = min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
            theta -= rates * decay * change
            if report is not None and step % 8 == 0:
                report(number * steps + step, recipe.refine_passes * steps)
        for k, m in enumerate(active):
            lens, before = lenses[m], lenses[m].dev_kl
            theta_end, halfway = theta[k], False
            for candidate in (theta_end, (theta_end + begin[k]) / 2):
                dev_kl = search.kl(maps(m, candidate), lens.layers)
                if dev_kl < lens.dev_kl:
                    lens.best, lens.dev_kl, lens.updates = candidate.clone(), dev_kl, (number + 1) * steps
                    halfway = candidate is not theta_end
            if lens.dev_kl == before:
                lens.setbacks += 1
                lens.rate *= 0.3
                if lens.setbacks == 2:
                    lens.ended = "dev rose"
            else:
                lens.rate *= 0.5 if halfway else 1.0
                if before - lens.dev_kl < recipe.refine_tolerance * before:
                    lens.ended = "converged"
    return [
        Refinement(maps(m, lens.best) if lens.updates else start[[m]], lens.dev_kl, lens.updates, lens.ended)
        for m, lens in enumerate(lenses)
    ]
