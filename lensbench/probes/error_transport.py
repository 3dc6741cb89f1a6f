"""Do attention heads carry prediction errors forward, or tokens?

A head that copies writes what a token says whatever was predicted; one that suppresses copies (arXiv 2310.04625) takes away
what is predicted already; a predictive-coding head carries the difference of the two.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from lensbench.data.windows import Windows
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import Estimates, FoldSums, Jackknifed, centred, in_folds
from lensbench.probes.tools.heads import Heads, check_heads
from lensbench.probes.tools.predictions import RANK, Batch, Constant, Directions, after, batches
from lensbench.statistics import Array, few_clusters, jackknife, leaving_one_out

FIRST = 2


MEMORY_GIB = 4.0
"""Most that the sums of all heads may take: with very many heads fewer directions are looked at."""


ANGLES = 36
"""Values of atan(beta / alpha) that are tried before the best one is refined."""


LEVEL = 0.05


@probe
def error_transport(subject: Subject) -> Jackknifed:
    """Per head: does what it mixes follow ``sum_s a_{n,s} (alpha e_{x_s} - beta ebar_{s-1})``, with beta above 0?

    ``out_n ~ M sum_s a_{n,s} (alpha e_{x_s} - beta ebar_{s-1})``, M any map to what the head mixes (so of rank at most the
    head's size), judged by squared error through the head's output map, the layer's lens and the read-out's gain. The sum
    runs over s >= 1, which revealed an error; beside it stand, refitted for every rival, the head's weight on position 0
    and on all others, and a free map of ``sum_s a_{n,s} e_{x_{s-1}}``: what the *previous* token says is no prediction.

    ``copying_gain``: R^2 that the token (beta = 0) adds to these. ``error_gain``: what a free beta adds to copying,
    cross-fitted over folds of documents; ``error_gain_null``: the same with expectations permuted over the positions of
    their window, ``error_gain_beyond_null`` the difference; ``error_ratio`` is beta / alpha of all folds. That null is weak:
    whatever else a head reads of its context is correlated with expectations, also in an untrained model, and some of it
    falls to beta. What tells an error from it is that expectations are used *as tokens are*, with the sign turned. So
    tokens and expectations are given free maps, M and N, each fitted on one half and multiplied with the other's:
    ``error_alignment`` is the cosine of N and -M over what tokens leave of expectations, and ``error_score`` the share of
    the variance that expectations explain in M's shape, signs turned, beyond what coins in place of the signs along each
    principal direction give; it is below 0 where they have the tokens' own sign. ``error_transport_p``: of as large a sum
    under such coins, or of a cosine above 0 (jackknife), the larger of the two, one-sided and corrected over all heads
    (Holm). ``error_transport_found``: 1 where p is below 0.05, the interval of beta / alpha above 0, the gain above its
    null, and the model predicts anything at all; ``heads_found`` their share over all heads;
    ``heads_beyond_permutation`` the share whose gain beyond its null has an interval above 0;
    ``error_score_top`` and ``error_score_median`` are those of all scores.
    ``layer`` is the block, ``other`` the head.

    Attention weights are read with ``attn_implementation="eager"``, which is set back, and the probe says so.
    A predictive-coding model is read at its own places: expectations are those of its layer's own prediction.
    """
    name = "error_transport"
    stream = subject.stream
    if subject.rotated:
        return Jackknifed(name, reason="a rotated view has no heads of its own")
    reason = check_heads(stream, subject.say)
    if reason:
        return Jackknifed(name, reason=reason)
    windows, fold = in_folds(subject.windows)
    if fold.max() < 3:
        return Jackknifed(name, reason="its windows come from fewer than four documents: nothing to cross-fit on")
    layers, warning = gather(subject, windows, fold)
    clusters = few_clusters(len(np.unique(windows.clusters)))
    return estimate(layers, subject, warning or clusters, nothing=bool(warning))


@dataclass
class Layer:
    """One layer's heads: sums by fold of ``[1, a_0, sum a, D (r), C (r), P (r), permuted P (r), mixed (dh)]``, each head."""

    sums: FoldSums
    written: Tensor  # [H, dh, d]


def directions_for(subject: Subject) -> Directions:
    """As many as the sums of all heads have room for."""
    stream = subject.stream
    heads, size = head_shape(subject)
    rank = RANK
    while rank > 16 and heads * (3 + 4 * rank + size) ** 2 * 8 * 8 > MEMORY_GIB * 2**30:
        rank -= 16
    return Directions.of(stream, subject.words.fit_windows, rank)


def head_shape(subject: Subject) -> tuple[int, int]:
    """Number of all heads of the model, and the largest size of one."""
    (batch,) = batches(subject.stream, subject.windows.spread(1), Directions.none(subject.stream), heads=True)
    return sum(h.weights.shape[1] for h in batch.heads), max(h.mixed.shape[-1] for h in batch.heads)


def gather(subject: Subject, windows: Windows, fold: np.ndarray) -> tuple[dict[int, Layer], str]:
    """One pass over the windows: layer -> the sums of its heads; and a warning where there is hardly a prediction."""
    stream = subject.stream
    directions = directions_for(subject)
    generator = torch.Generator().manual_seed(0)
    layers: dict[int, Layer] = {}
    constant = Constant()
    report = partial(subject.report, "error_transport")
    for batch in batches(stream, windows, directions, heads=True, report=report):
        constant.add(batch)
        carried = carried_vectors(batch, directions, generator)
        looked = batch.inside.clone()
        looked[:, :FIRST] = False
        for heads in batch.heads:
            if heads.layer not in layers:
                layers[heads.layer] = Layer(FoldSums(int(fold.max()) + 1), stream.seen(heads.written))
            columns = head_columns(heads, carried, directions)  # [H, B, T, F]
            for k in np.unique(fold[batch.rows]):
                chosen = looked & torch.from_numpy(fold[batch.rows] == k).to(looked.device)[:, None]
                layers[heads.layer].sums.add(int(k), columns[:, chosen])
    return layers, constant.warning()


@dataclass(frozen=True)
class Carried:
    """Of each position s what a head may carry: ``[B, T, r]`` each, zero at position 0, where nothing was predicted."""

    token: Tensor
    previous: Tensor
    expected: Tensor
    order: Tensor  # [B, T]: the positions that stand in for these in the null


def carried_vectors(batch: Batch, directions: Directions, generator: torch.Generator) -> Carried:
    token = directions.rows[batch.ids]
    token[:, 0] = 0
    order = torch.arange(batch.ids.shape[1]).repeat(len(batch.ids), 1)
    for row, count in enumerate(batch.inside.sum(1).tolist()):
        order[row, 1:count] = 1 + torch.randperm(count - 1, generator=generator)
    previous = after(directions.rows[batch.ids])
    return Carried(token, previous, after(batch.expected), order.to(batch.ids.device))


def head_columns(heads: Heads, carried: Carried, directions: Directions) -> Tensor:
    """The columns of :class:`Layer` for every position: ``[H, B, T, F]``."""
    expected = carried.expected if heads.expected is None else after(directions.seen(heads.expected))
    order = carried.order[..., None].expand_as(expected)
    values = torch.cat([carried.previous, carried.token, expected, expected.gather(1, order)], -1)
    mixed = heads.weights.transpose(0, 1) @ values  # [H, B, T, 4 r]
    weights = heads.weights.transpose(0, 1)
    first = weights[..., 0]
    others = weights[..., 1:].sum(-1)
    beside = torch.stack([torch.ones_like(first), first, others], -1)
    return torch.cat([beside, mixed, heads.mixed.transpose(0, 1)], -1)


@dataclass(frozen=True)
class Rivals:
    """Regressions of one layer's heads on the same tokens: moments about the mean, nuisances taken out.

    ``moments`` ``[H, F-1, F-1]`` is about the mean; ``free`` ``[H, N, 2r+dh]`` are the nuisances' maps of ``[C, P, z]``, and
    ``left`` ``[H, 2r+dh, 2r+dh]`` are the moments of what they leave.
    """

    mean: Tensor  # [H, F]: of all columns, the first being one
    free: Tensor
    left: Tensor
    rank: int

    @classmethod
    def of(cls, moments: Tensor, rank: int, permuted: bool) -> "Rivals":
        """From raw sums ``[H, F, F]``; with ``permuted`` the expectations of the null take the place of the others."""
        kept = columns_kept(moments.shape[-1], rank, permuted)
        about = centred(moments)[:, kept[1:, None] - 1, kept[1:] - 1]
        nuisances = 2 + rank
        n, x = slice(0, nuisances), slice(nuisances, None)
        free = torch.linalg.solve(damped(about[:, n, n]), about[:, n, x])
        left = about[:, x, x] - about[:, x, n] @ free
        return cls((moments[:, 0] / moments[:, 0, :1])[:, kept], free, left, rank)

    def explained(self, angle: Tensor, metric: Tensor) -> Tensor:
        """Squares explained ``[H]`` by the best M at ``atan(beta / alpha)`` ``[H]``, in the metric ``[H, dh, dh]``."""
        _, cross, solved = self.solved(angle)
        return torch.einsum("hij,hki,hkj->h", metric, cross, solved)

    def solved(self, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance and cross moments of the combination, and the map M ``[H, r, dh]`` that is best for it."""
        r, (c, s) = self.rank, (angle.cos()[:, None, None], angle.sin()[:, None, None])
        token, expected = slice(0, r), slice(r, 2 * r)
        both = self.left[:, token, expected]
        covariance = (
            c * c * self.left[:, token, token]
            - c * s * (both + both.transpose(1, 2))
            + s * s * self.left[:, expected, expected]
        )
        cross = c * self.left[:, token, 2 * r :] - s * self.left[:, expected, 2 * r :]
        return covariance, cross, torch.cholesky_solve(cross, torch.linalg.cholesky(damped(covariance)))

    def best_angle(self, metric: Tensor) -> Tensor:
        """``atan(beta / alpha)`` in (-pi/2, pi/2], of each head: a grid, then golden sections around its best."""
        heads = len(self.left)
        step = torch.pi / ANGLES
        grid = -torch.pi / 2 + step * torch.arange(1, ANGLES + 1, dtype=torch.float64)
        tried = torch.stack([self.explained(a.expand(heads), metric) for a in grid])
        low = grid[tried.argmax(0)] - step
        high = low + 2 * step
        golden = (5**0.5 - 1) / 2
        a, b = high - golden * (high - low), low + golden * (high - low)
        at_a, at_b = self.explained(a, metric), self.explained(b, metric)
        for _ in range(GOLDEN_SECTIONS):
            left = at_a >= at_b
            low, high = torch.where(left, low, a), torch.where(left, b, high)
            new = torch.where(left, high - golden * (high - low), low + golden * (high - low))
            at_new = self.explained(new, metric)
            a, b, at_a, at_b = (
                torch.where(left, new, b),
                torch.where(left, a, new),
                torch.where(left, at_new, at_b),
                torch.where(left, at_a, at_new),
            )
        return (low + high) / 2

    def fitted(self, angle: Tensor | None) -> Tensor:
        """Map ``[H, F', dh]`` of all columns but the mixed ones, the intercept first; None: of the nuisances alone."""
        r = self.rank
        of_mixed = self.free[..., 2 * r :]
        if angle is None:
            token = expected = of_mixed.new_zeros(len(of_mixed), r, of_mixed.shape[-1])
            nuisances = of_mixed
        else:
            _, _, best = self.solved(angle)
            c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
            token, expected = c * best, -s * best
            nuisances = of_mixed - self.free[..., :r] @ token - self.free[..., r : 2 * r] @ expected
        slopes = torch.cat([nuisances, token, expected], 1)
        size = of_mixed.shape[-1]
        mean_in, mean_out = self.mean[:, 1:-size], self.mean[:, -size:]
        return torch.cat([(mean_out - torch.einsum("hf,hfo->ho", mean_in, slopes))[:, None], slopes], 1)


GOLDEN_SECTIONS = 24


def columns_kept(columns: int, rank: int, permuted: bool) -> Tensor:
    """Of :class:`Layer`'s columns: one, nuisances, tokens, expectations (the null's in their place), and what was mixed."""
    head = torch.arange(3 + 2 * rank)
    expected = torch.arange(rank) + 3 + (3 if permuted else 2) * rank
    return torch.cat([head, expected, torch.arange(3 + 4 * rank, columns)])


def damped(covariance: Tensor) -> Tensor:
    """With a hair on its diagonal: directions that hold nothing do not count."""
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    return covariance + 1e-9 * size[..., None, None] * identity


def squared_error(moments: Tensor, fitted: Tensor | None, metric: Tensor, mean: Tensor) -> Tensor:
    """Of held-out sums ``[H, F', F']`` under a map ``[H, F'-dh, dh]``, or about ``mean`` ``[H, dh]`` for None: ``[H]``."""
    size = metric.shape[-1]
    zz, xz, xx = moments[:, -size:, -size:], moments[:, :-size, -size:], moments[:, :-size, :-size]
    if fitted is None:
        fitted = torch.zeros_like(xz)
        fitted[:, 0] = mean
    left = zz - fitted.transpose(1, 2) @ xz - xz.transpose(1, 2) @ fitted + fitted.transpose(1, 2) @ xx @ fitted
    return (metric * left).sum((1, 2))


@dataclass(frozen=True)
class Alignment:
    """Does a head use expectations as it uses tokens, with the sign turned?

    Maps of tokens M and of expectations N are fitted freely, side by side, on each half of the folds; products are between
    halves, so that errors of one do not meet those of the other. ``parts`` ``[H, r]``: ``-M N`` along each principal
    direction of what tokens leave of the expectations, weighted by its variance; ``tokens`` and ``expected`` ``[H]`` are
    ``M M`` and ``N N``; all in the metric, as sums over tokens.
    """

    parts: Tensor
    tokens: Tensor
    expected: Tensor

    @classmethod
    def of(cls, halves: tuple[Tensor, Tensor], rank: int, metric: Tensor) -> "Alignment":
        """``halves``: raw sums ``[H, F, F]`` of each, as :class:`Layer` has them."""
        r = rank
        both = Rivals.of(halves[0] + halves[1], rank, False).left
        token, expected = slice(0, r), slice(r, 2 * r)
        explained = torch.linalg.solve(damped(both[:, token, token]), both[:, token, expected])
        left = both[:, expected, expected] - both[:, expected, token] @ explained
        values, vectors = torch.linalg.eigh(left)
        maps = []
        for half in halves:
            moments = Rivals.of(half, rank, False).left
            free = torch.linalg.solve(damped(moments[:, : 2 * r, : 2 * r]), moments[:, : 2 * r, 2 * r :])
            maps.append([vectors.transpose(1, 2) @ free[:, part] for part in (token, expected)])

        def product(a: Tensor, b: Tensor) -> Tensor:
            return values.clamp(min=0) * torch.einsum("hij,hki,hkj->hk", metric, a, b)

        (m, n), (other_m, other_n) = maps
        parts = -(product(m, other_n) + product(other_m, n)) / 2
        return cls(parts, product(m, other_m).sum(1), product(n, other_n).sum(1))

    def cosine(self) -> Tensor:
        """Not a number where one of the two maps cannot be told from nothing."""
        size = (self.tokens.clamp(min=0) * self.expected.clamp(min=0)).sqrt()
        return torch.where(size > 0, self.parts.sum(1) / size, torch.nan)

    def score(self) -> Tensor:
        """Squares that expectations explain in the shape of the tokens' map, signs turned, beyond what flipped signs give.

        Below 0 where they are used with the tokens' own sign.
        """
        signed = self.parts.sum(1)
        return (signed * signed.abs() - self.parts.square().sum(1)) / self.tokens.clamp(min=1e-300)

    def p_values(self) -> Array:
        """Of as large a sum, were the sign along each direction a coin's (one-sided)."""
        heads, directions = self.parts.shape
        signed = self.parts.sum(1)
        generator, reached, tossed = torch.Generator().manual_seed(0), torch.zeros(heads, dtype=torch.long), 0
        # The smallest p, times the number of heads (Holm), must be able to lie below 0.05.
        while tossed < max(FLIPS, 40 * heads):
            coins = torch.randint(0, 2, (FLIPS, directions), generator=generator)
            flipped = (2 * coins - 1).to(self.parts) @ self.parts.T  # [FLIPS, H]
            reached += (flipped >= signed - 1e-9 * signed.abs()).sum(0)
            tossed += FLIPS
        found: Array = ((reached + 1) / (tossed + 1)).numpy()
        return found


FLIPS = 20_000
"""Coins tossed at a time for each direction"""


@dataclass(frozen=True)
class Scores:
    """Held-out squares of each fold and head ``[K, H]``, and ``atan(beta / alpha)`` of all folds and without each."""

    total: Array
    beside: Array
    copying: Array
    free: Array
    null_free: Array
    angle: Array  # [H]
    angle_without: Array  # [K, H]
    cosine: Array  # [H]
    cosine_without: Array  # [K, H]
    score: Array  # [H], as a share of the total
    score_without: Array  # [K, H]
    p: Array  # [H]


def score_layer(sums: Tensor, metric: Tensor, rank: int) -> Scores:
    """``sums`` ``[K, H, F, F]`` raw, as :class:`Layer` has them; ``metric`` ``[H, dh, dh]``."""
    total = sums.sum(0)
    copying = torch.zeros(sums.shape[1], dtype=torch.float64)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("total", "beside", "copying", "free", "null_free", "angle")}
    for held in sums:
        for permuted in (False, True):
            kept = columns_kept(sums.shape[-1], rank, permuted)
            rivals = Rivals.of(total - held, rank, permuted)
            judged = held[:, kept[:, None], kept]
            mean = rivals.mean[:, -metric.shape[-1] :]
            angle = rivals.best_angle(metric)
            free = squared_error(judged, rivals.fitted(angle), metric, mean)
            parts["null_free" if permuted else "free"].append(free)
            if not permuted:
                parts["total"].append(squared_error(judged, None, metric, mean))
                parts["beside"].append(squared_error(judged, rivals.fitted(None), metric, mean))
                parts["copying"].append(squared_error(judged, rivals.fitted(copying), metric, mean))
                parts["angle"].append(angle)
    whole = Rivals.of(total, rank, False).best_angle(metric)
    without = torch.stack(parts.pop("angle"))
    # beta / alpha is the same half a turn further: the nearest is meant.
    without = without - torch.pi * torch.round((without - whole) / torch.pi)
    found = {name: torch.stack(each).numpy() for name, each in parts.items()}
    halves = sums[0::2].sum(0), sums[1::2].sum(0)
    aligned = Alignment.of(halves, rank, metric)
    each = [
        Alignment.of((halves[0] - (held if k % 2 == 0 else 0), halves[1] - (held if k % 2 else 0)), rank, metric)
        for k, held in enumerate(sums)
    ]
    scale = found["total"].sum(0)
    return Scores(
        **found,
        angle=whole.numpy(),
        angle_without=without.numpy(),
        cosine=aligned.cosine().numpy(),
        cosine_without=torch.stack([a.cosine() for a in each]).numpy(),
        score=aligned.score().numpy() / scale,
        score_without=np.stack([a.score().numpy() / (scale - t) for a, t in zip(each, found["total"], strict=True)]),
        p=aligned.p_values(),
    )


STEEPEST = np.deg2rad(85)
"""Beyond this angle, beta / alpha above 11, the token hardly counts and the ratio says nothing."""


def estimate(layers: dict[int, Layer], subject: Subject, warning: str, *, nothing: bool) -> Jackknifed:
    """From the sums of all heads to rows; where ``nothing`` is predicted, no error is found."""
    readout, d = subject.stream.readout, subject.stream.d_model
    gain = readout.gain(d)
    folds = next(iter(layers.values())).sums.folds
    found = Estimates("error_transport", folds, warning)
    flips, ahead, heads, every, permuted = [], [], [], [], []
    for layer, of in sorted(layers.items()):
        size = of.written.shape[1]
        rank = (of.sums.sums.shape[-1] - 3 - size) // 4
        seen = of.written.double().cpu() @ subject.lenses.matrix[layer].double().cpu().T
        if gain is not None:
            seen = seen @ gain.double().cpu().T
        scores = score_layer(of.sums.sums, seen @ seen.transpose(1, 2), rank)
        for head in range(len(seen)):
            where: dict[str, Any] = {"layer": layer, "other": head}
            total, beside, copying, free, null = (
                getattr(scores, name)[:, head] for name in ("total", "beside", "copying", "free", "null_free")
            )
            found.share("copying_gain", beside - copying, total, **where)
            found.share("error_gain", copying - free, total, **where)
            found.share("error_gain_null", copying - null, total, **where)
            found.share("error_gain_beyond_null", null - free, total, **where)
            ahead_of_null, without_each = leaving_one_out(null - free, total)
            permuted.append(jackknife(np.array([ahead_of_null]), without_each[:, None])[0][0] > 0)
            flips.append(max(float(scores.p[head]), above_zero(scores.cosine[head], scores.cosine_without[:, head])))
            every.append(float(scores.score[head]))
            found.add("error_score", every[-1], scores.score_without[:, head], **where)
            found.add("error_alignment", float(scores.cosine[head]), scores.cosine_without[:, head], **where)
            angle, without = scores.angle[head], scores.angle_without[:, head]
            steep = np.abs(np.append(without, angle)).max() > STEEPEST
            ratio, ratio_without = (np.nan, np.full(folds, np.nan)) if steep else (np.tan(angle), np.tan(without))
            reason = "undefined: expectations alone, hardly the token" if steep else ""
            found.add("error_ratio", float(ratio), ratio_without, reason=reason, **where)
            low, _ = jackknife(np.array([ratio]), ratio_without[:, None])
            ahead.append(bool(low[0] > 0) and bool((null - free).sum() > 0))
            heads.append(where)
    corrected = multipletests(flips, method="holm")[1]
    hits = (corrected < LEVEL) & np.array(ahead) & (not nothing)
    for where, p, hit in zip(heads, corrected, hits, strict=True):
        found.add("error_transport_p", float(p), **where)
        found.add("error_transport_found", float(hit), **where)
    found.add("heads_found", float(hits.mean()))
    found.add("heads_beyond_permutation", float(np.mean(permuted)))
    found.add("error_score_top", max(every))
    found.add("error_score_median", float(np.median(every)))
    return found.done()


def above_zero(value: float, without: Array) -> float:
    """p of an estimate's being above 0, one-sided t of the jackknife; 1 where it is undefined."""
    if not np.isfinite(without).all() or not np.isfinite(value):
        return 1.0
    folds = len(without)
    spread = np.sqrt((folds - 1) / folds * np.square(without - without.mean()).sum())
    return float(stats.t.sf(value / max(spread, 1e-12), folds - 1))
