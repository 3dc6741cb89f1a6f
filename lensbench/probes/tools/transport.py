"""Regressions of what a head mixes on tokens and expectations, from sums of their columns.

The F columns of a head are ``[1, a_0, sum a, D, C, P, permuted P, mixed]``, for each position. ``a_0`` is its weight on
position 0 and ``sum a`` that on all others. D, C and P (r columns each) are what its weights make of the previous tokens,
the tokens and the expectations; ``permuted P`` is the null's P. ``mixed`` (dh columns) is what the head mixes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.probes.tools.crossfit import centred
from lensbench.statistics import Array

ANGLES = 18
"""Values of atan(beta / alpha) that are tried before the best one is refined"""


GOLDEN_SECTIONS = 24
"""Steps that refine the best angle"""


FLIPS = 20_000
"""Coins that are tossed at a time for each direction"""


@dataclass(frozen=True)
class Rivals:
    """Regressions of what each head of a layer mixes, on tokens C and expectations P, with the nuisances taken out.

    ``left`` ``[H, 2r+dh, 2r+dh]`` are the second moments of what the nuisances leave of ``[C, P, mixed]``.
    """

    left: Tensor
    rank: int

    @classmethod
    def of(cls, moments: Tensor, rank: int, permuted: bool) -> "Rivals":
        """The regressions from raw sums ``[H, F, F]``; with ``permuted``, of the null's expectations."""
        kept = columns_kept(moments.shape[-1], rank, permuted)
        about = centred(moments)[:, kept[1:, None] - 1, kept[1:] - 1]
        nuisances = 2 + rank
        n, x = slice(0, nuisances), slice(nuisances, None)
        free = solve_damped(about[:, n, n], about[:, n, x])
        return cls(about[:, x, x] - about[:, x, n] @ free, rank)

    def explained(self, angle: Tensor, metric: Tensor) -> Tensor:
        """Squares ``[H]`` that the best M explains at angles ``atan(beta / alpha)`` ``[H]``, in a metric ``[H, dh, dh]``."""
        _, cross, solved = self.solved(angle)
        return torch.einsum("hij,hki,hkj->h", metric, cross, solved)

    def solved(self, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance and cross moments of ``alpha C - beta P``, and the best map M of it ``[H, r, dh]``."""
        r, (c, s) = self.rank, (angle.cos()[:, None, None], angle.sin()[:, None, None])
        token, expected = slice(0, r), slice(r, 2 * r)
        both = self.left[:, token, expected]
        covariance = (
            c * c * self.left[:, token, token]
            - c * s * (both + both.transpose(1, 2))
            + s * s * self.left[:, expected, expected]
        )
        cross = c * self.left[:, token, 2 * r :] - s * self.left[:, expected, 2 * r :]
        return covariance, cross, solve_damped(covariance, cross)

    def best_angle(self, metric: Tensor) -> Tensor:
        """The best ``atan(beta / alpha)`` of each head ``[H]``, in (-pi/2, pi/2]: a grid, then golden sections."""
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


def columns_kept(columns: int, rank: int, permuted: bool) -> Tensor:
    """Numbers of all columns but the null's expectations; with ``permuted``, of all but the true ones."""
    head = torch.arange(3 + 2 * rank)
    expected = torch.arange(rank) + 3 + (3 if permuted else 2) * rank
    return torch.cat([head, expected, torch.arange(3 + 4 * rank, columns)])


def damped(covariance: Tensor) -> Tensor:
    """The covariances with 1e-9 of their mean variance added to the diagonal, so that empty directions do not count."""
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    return covariance + 1e-9 * size[..., None, None] * identity


def solve_damped(covariance: Tensor, right: Tensor) -> Tensor:
    """``C^-1 B`` of :func:`damped` covariances ``[H, n, n]`` and right sides ``[H, n, m]``.

    By Cholesky: torch's batched LU fails with more than one thread of MKL from some 200 columns on, whatever the matrices.
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped(covariance)))


def squared_error(moments: Tensor, fitted: Tensor | None, metric: Tensor, mean: Tensor) -> Tensor:
    """Squared error ``[H]`` of maps ``[H, F'-dh, dh]`` on held-out sums ``[H, F', F']``; None: of ``mean`` ``[H, dh]``."""
    size = metric.shape[-1]
    zz, xz, xx = moments[:, -size:, -size:], moments[:, :-size, -size:], moments[:, :-size, :-size]
    if fitted is None:
        fitted = torch.zeros_like(xz)
        fitted[:, 0] = mean
    left = zz - fitted.transpose(1, 2) @ xz - xz.transpose(1, 2) @ fitted + fitted.transpose(1, 2) @ xx @ fitted
    error: Tensor = (metric * left).sum((1, 2))
    return error


@dataclass(frozen=True)
class Alignment:
    """Does a head use expectations as it uses tokens, with the sign turned?

    Free maps of tokens, M, and of expectations, N, are fitted together on each half of the folds. Products are between the
    halves, so that the errors of two estimates are independent. ``parts`` ``[H, r]`` is ``-M N`` along each principal
    direction of what tokens leave of the expectations, weighted by its variance; ``tokens`` and ``expected`` ``[H]`` are
    ``M M`` and ``N N``. All are in the metric, as sums over tokens.
    """

    parts: Tensor
    tokens: Tensor
    expected: Tensor

    @classmethod
    def of(cls, halves: tuple[Tensor, Tensor], rank: int, metric: Tensor) -> "Alignment":
        """The products, from the raw sums ``[H, F, F]`` of two halves."""
        r = rank
        both = Rivals.of(halves[0] + halves[1], rank, False).left
        token, expected = slice(0, r), slice(r, 2 * r)
        explained = solve_damped(both[:, token, token], both[:, token, expected])
        left = both[:, expected, expected] - both[:, expected, token] @ explained
        values, vectors = torch.linalg.eigh(left)
        maps = []
        for half in halves:
            moments = Rivals.of(half, rank, False).left
            free = solve_damped(moments[:, : 2 * r, : 2 * r], moments[:, : 2 * r, 2 * r :])
            maps.append([vectors.transpose(1, 2) @ free[:, part] for part in (token, expected)])

        def product(a: Tensor, b: Tensor) -> Tensor:
            squares: Tensor = values.clamp(min=0) * torch.einsum("hij,hki,hkj->hk", metric, a, b)
            return squares

        (m, n), (other_m, other_n) = maps
        parts = -(product(m, other_n) + product(other_m, n)) / 2
        return cls(parts, product(m, other_m).sum(1), product(n, other_n).sum(1))

    def cosine(self) -> Tensor:
        """Cosine of -M and N ``[H]``; not a number where one of the two maps cannot be told from zero."""
        size = (self.tokens.clamp(min=0) * self.expected.clamp(min=0)).sqrt()
        return torch.where(size > 0, self.parts.sum(1) / size, torch.nan)

    def score(self) -> Tensor:
        """Squares ``[H]`` that expectations explain in the shape of -M, beyond what random signs give.

        It is below 0 where expectations are used with the tokens' own sign, and not a number where the map of tokens cannot
        be told from zero: it has no shape then.
        """
        signed = self.parts.sum(1)
        beyond = signed * signed.abs() - self.parts.square().sum(1)
        return torch.where(self.tokens > 0, beyond / self.tokens.clamp(min=1e-300), torch.nan)

    def p_values(self) -> Array:
        """One-sided p ``[H]`` of as large a sum of ``parts`` with a random sign along each direction."""
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


@dataclass(frozen=True)
class Scores:
    """Held-out squared errors ``[K, K, H]`` of each head, and what all folds, or all but one, say of it.

    Entry j, k of the errors is of fold j by maps fitted without j and k, as in
    :func:`~lensbench.probes.tools.crossfit.refitted`; entry j, j is of fold j by maps fitted on all others.
    """

    total: Array
    """About the mean"""
    nuisances: Array
    """Of the nuisances alone"""
    copying: Array
    """With beta = 0"""
    free: Array
    """With a free beta"""
    null_free: Array
    """With a free beta of permuted expectations"""
    angle: Array  # [H]: atan(beta / alpha)
    angle_without: Array  # [K, H]
    cosine: Array  # [H]
    cosine_without: Array  # [K, H]
    score: Array  # [H]: as a share of the total
    score_without: Array  # [K, H]
    p: Array  # [H]


def score_layer(sums: Tensor, metric: Tensor, rank: int) -> Scores:
    """Scores of the heads of a layer, from the raw sums ``[K, H, F, F]`` of each fold.

    ``metric`` ``[H, dh, dh]`` is that of squared errors of what a head mixes.
    """
    total = sums.sum(0)
    found, angles = _held_out_errors(sums, metric, rank)
    whole = Rivals.of(total, rank, False).best_angle(metric)
    # beta / alpha is the same half a turn further: take the nearest angle.
    without = angles - torch.pi * torch.round((angles - whole) / torch.pi)
    halves = sums[0::2].sum(0), sums[1::2].sum(0)
    held_out = np.einsum("kkh->kh", found["total"])
    aligned = Alignment.of(halves, rank, metric)
    each = [
        Alignment.of((halves[0] - (held if k % 2 == 0 else 0), halves[1] - (held if k % 2 else 0)), rank, metric)
        for k, held in enumerate(sums)
    ]
    scale = held_out.sum(0)
    return Scores(
        **found,
        angle=whole.numpy(),
        angle_without=without.numpy(),
        cosine=aligned.cosine().numpy(),
        cosine_without=torch.stack([a.cosine() for a in each]).numpy(),
        score=aligned.score().numpy() / scale,
        score_without=np.stack([a.score().numpy() / (scale - t) for a, t in zip(each, held_out, strict=True)]),
        p=aligned.p_values(),
    )


def _held_out_errors(sums: Tensor, metric: Tensor, rank: int) -> tuple[dict[str, Array], Tensor]:
    """Squared errors of every rival ``[K, K, H]``, as :class:`Scores` has them, and the best angles ``[K, H]``.

    The angle of a fold is the best one on all others; it is kept where a further fold is left out, as a ridge is.
    """
    total = sums.sum(0)
    angles, null_angles = (
        torch.stack([Rivals.of(total - held, rank, permuted).best_angle(metric) for held in sums])
        for permuted in (False, True)
    )
    none, nuisances, both = 0, 2 + rank, 2 + 2 * rank  # numbers of inputs
    copying = _refitted_errors(sums, metric, rank, torch.zeros_like(angles), (none, nuisances, both))
    (free,) = _refitted_errors(sums, metric, rank, angles, (both,))
    (null_free,) = _refitted_errors(sums, metric, rank, null_angles, (both,), permuted=True)
    names = ("total", "nuisances", "copying", "free", "null_free")
    return dict(zip(names, (*copying, free, null_free), strict=True)), angles


def _refitted_errors(
    sums: Tensor, metric: Tensor, rank: int, angles: Tensor, inputs: tuple[int, ...], permuted: bool = False
) -> list[Array]:
    """Squared errors ``[K, K, H]`` of fold j without j and k, for each number of inputs, at the fold's angle ``[K, H]``.

    The inputs are the first of ``[a_0, sum a, D, cos C - sin P]``; without any, the error is about the mean.
    """
    total, errors = sums.sum(0), [torch.zeros_like(angles[:, None].expand(-1, len(sums), -1)) for _ in inputs]
    for j, held in enumerate(sums):
        judged = mixture(held, rank, angles[j], permuted)
        others = mixture(total, rank, angles[j], permuted) - judged
        for k, other in enumerate(sums):
            rest = others if k == j else others - mixture(other, rank, angles[j], permuted)
            for count, error in zip(inputs, errors, strict=True):
                error[j, k] = _error_of_first(rest, judged, count, metric)
    return [error.numpy() for error in errors]


def _error_of_first(rest: Tensor, judged: Tensor, count: int, metric: Tensor) -> Tensor:
    """Squared error ``[H]`` on the sums ``judged`` of least squares on the first inputs, fitted on the sums ``rest``."""
    size = metric.shape[-1]
    if 1 + count + size < rest.shape[-1]:
        used = torch.cat([torch.arange(1 + count), torch.arange(rest.shape[-1] - size, rest.shape[-1])])
        rest, judged = rest[:, used[:, None], used], judged[:, used[:, None], used]
    mean = rest[:, 0] / rest[:, 0, :1]
    if not count:
        return squared_error(judged, None, metric, mean[:, -size:])
    about = centred(rest)
    slopes = solve_damped(about[:, :count, :count], about[:, :count, count:])
    intercept = mean[:, None, -size:] - mean[:, None, 1 : 1 + count] @ slopes
    return squared_error(judged, torch.cat([intercept, slopes], 1), metric, mean[:, -size:])


def mixture(moments: Tensor, rank: int, angle: Tensor, permuted: bool) -> Tensor:
    """Raw sums of ``[1, a_0, sum a, D, cos C - sin P, mixed]`` at angles ``[H]``, from sums ``[H, F, F]`` of all columns."""
    first, size = 3 + rank, moments.shape[-1] - 3 - 4 * rank
    start = first + (2 if permuted else 1) * rank
    n, token, expected, z = (slice(first), slice(first, first + rank), slice(start, start + rank), slice(-size, None))
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    found = moments.new_empty(len(moments), first + rank + size, first + rank + size)
    x = token  # where the mixture stands
    both = moments[:, token, expected]
    found[:, x, x] = (
        c * c * moments[:, token, token] - c * s * (both + both.mT) + s * s * moments[:, expected, expected]
    )
    for other in (n, z):
        found[:, other, x] = c * moments[:, other, token] - s * moments[:, other, expected]
        found[:, x, other] = found[:, other, x].mT
        for another in (n, z):
            found[:, other, another] = moments[:, other, another]
    return found
