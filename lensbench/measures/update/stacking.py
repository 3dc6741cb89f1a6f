"""Coefficients of readings that are added up, fitted to the tokens that follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import lsq_linear, minimize
from torch import Tensor

from lensbench.lenses.estimated import worth_estimating
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import Vocabulary, target_logits
from lensbench.streams.partition import shifted_exponentials_
from lensbench.streams.readout import ReadOut

WORDS = 2048
"""Rows of the unembedding that stand for a large vocabulary while coefficients are fitted"""

LEAST_FALL = 1e-7
"""Fall of the loss in a step, relative to it, at which coefficients are found"""

MOST_STEPS = 40
"""In a search for coefficients"""

LEAST_DAMPING = 0.25
"""Of Newton's steps once one has failed, in units of the curvature along each coefficient (Levenberg and Marquardt)"""

SHORTEST = 1e-12
"""Of how far coefficients move the state, one relative to another"""

LEAST_CURVATURE = 1e-5
"""Of a move of the state by its own length, nats: what a norm divides out has none but that of rounding"""

FLAT = 1e-9
"""Curvature, relative to the largest, below which a direction has none that can be trusted"""

IN_CACHE = 2**18
"""Logits at once in the moments of sums: they stay in a processor's cache"""


def stacked(parts: Sequence[Tensor], centre: Tensor, pad: Tensor, theta: Tensor) -> Tensor:
    """``mean h_L + sum theta_k x_k + pad`` ``[n, d]``; the last of ``theta`` is the length of the pad."""
    x = torch.cat(list(parts), 1)
    return centre.to(x) + torch.einsum("nkd,k->nd", x, theta[:-1].to(x)) + theta[-1].to(x) * pad.to(x)


@dataclass(frozen=True)
class Part:
    """A reading and its discounted copy at some tokens, and what a read-out makes of them before it divides by a scale."""

    x: Tensor
    """``[n, 2, d]``"""
    gained: Tensor | None
    """``G x`` ``[n, 2, d_read]``; None where the read-out is not affine in a scaled state"""
    logits: Tensor | None
    """``W G x`` ``[n, 2, S]``; None where ``gained`` is"""


@dataclass(frozen=True)
class Stack:
    """Parts that are added up with one coefficient for each of their K vectors, side by side."""

    x: Tensor
    """``[n, K, d]``"""
    gained: Tensor | None
    """``[n, K, d_read]``"""
    logits: Tensor | None
    """``[n, K, S]``"""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Stack":
        """Joined once for all coefficients that will be tried."""

        def joined(each: Sequence[Tensor | None]) -> Tensor | None:
            known = [one for one in each if one is not None]
            return torch.cat(known, 1) if known else None

        return cls(
            torch.cat([part.x for part in parts], 1),
            joined([part.gained for part in parts]),
            joined([part.logits for part in parts]),
        )

    @cached_property
    def squares(self) -> Tensor:
        """Squared lengths of ``gained``, ``[n, K]``"""
        assert self.gained is not None
        return self.gained.square().sum(-1)


@dataclass(frozen=True)
class Slopes:
    """A loss at some coefficients ``[K + 1]``, its gradient, and its curvature ``[K + 1, K + 1]`` (Gauss-Newton)."""

    value: float
    gradient: Array
    curvature: Array
    moved: Array
    """Mean square by which a coefficient of 1 moves the state, in units of the state's own ``[K + 1]``"""

    def step(self, room: Array, damping: float) -> tuple[Array, float]:
        """The step to where the quadratic of value, gradient and curvature is least, and by how much it falls.

        ``room``: how far each coefficient may fall, at least 0. ``damping``: times that the curvature along each coefficient
        counts more than it is.
        """
        curvature = self.curvature + np.diag(LEAST_CURVATURE * np.maximum(self.moved, SHORTEST**2))
        unit = 1 / np.sqrt(curvature.diagonal())
        values, vectors = np.linalg.eigh(curvature * np.outer(unit, unit) + damping * np.eye(len(unit)))
        root = np.sqrt(np.maximum(values, FLAT * values[-1]))
        # |R y + R^-T g|^2 is twice that quadratic, and a constant.
        aim = -(vectors.T @ (self.gradient * unit)) / root
        lower = -np.maximum(room, np.finfo(float).tiny) / unit
        found = lsq_linear(root[:, None] * vectors.T, aim, bounds=(lower, np.inf), method="bvls").x
        fall = (np.square(aim).sum() - np.square(root * (vectors.T @ found) - aim).sum()) / 2
        step: Array = np.maximum(found * unit, -room)
        return step, float(fall)


@dataclass(frozen=True)
class NextTokens:
    """The cross-entropy that coefficients are fitted to: exact, or with some rows of the unembedding for all words."""

    readout: ReadOut
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    centre: Tensor
    """``[d]``: mean of the final state"""
    pad: Tensor
    """``[d]``"""

    @classmethod
    def of(cls, readout: ReadOut, dev: Capture, tokens: Tensor, centre: Tensor, pad: Tensor) -> "NextTokens":
        """Those that follow some ``tokens`` of ``dev``."""
        words = WORDS if worth_estimating(len(readout.weight)) else len(readout.weight)
        sample = Vocabulary(readout, dev.mean_p, words, torch.Generator().manual_seed(0))
        weight, bias = sample.draw()
        return cls(readout, dev.targets[tokens], weight, bias, centre.to(weight), pad.to(weight))

    @cached_property
    def gain(self) -> Tensor | None:
        """G, where logits are affine in ``G x`` over a scale."""
        return self.readout.gain(len(self.pad)) if self.readout.linear else None

    @cached_property
    def _gained(self) -> tuple[Tensor, Tensor]:
        """``G`` times the centre, and times the pad."""
        assert self.gain is not None
        return self.gain @ self.centre, self.gain @ self.pad

    @cached_property
    def _offset(self) -> Tensor:
        """``norm(0)``."""
        found: Tensor = self.readout.final_norm(torch.zeros_like(self.pad))
        return found

    @cached_property
    def _of_all(self) -> Tensor:
        """Logits ``[3, S]`` that all tokens share: of the centre, of the pad, and what is left of a state of 0."""
        assert self.gain is not None
        constant = self.weight @ self._offset
        moved = torch.stack([self.centre, self.pad]) @ self.gain.T @ self.weight.T
        return torch.cat([moved, (constant if self.bias is None else constant + self.bias)[None]])

    def part(self, x: Tensor) -> Part:
        """Readings ``[n, 2, d]``, with logits where these serve every coefficient."""
        if self.gain is None:
            return Part(x, None, None)
        gained = x @ self.gain.T.to(x)
        return Part(x, gained, gained @ self.weight.T)

    def fitted(self, parts: Sequence[Part], start: Array) -> Array:
        """The coefficients of least loss, the last that of the pad; those of parts after the first are at least 0.

        By Newton's steps. Where these have no slopes, or do not come to an end, a search with gradients alone goes on.
        """
        count, stack = 2 * len(parts), Stack.of(parts)
        least = np.r_[np.full(2, -np.inf), np.zeros(count - 2), -np.inf]
        theta, ended = self._by_newton(stack, start, least)
        return theta if ended else self._by_gradients(stack, theta, least)

    def _by_newton(self, stack: Stack, start: Array, least: Array) -> tuple[Array, bool]:
        """Coefficients as far as Newton's steps lead, and whether no step is left that makes the loss smaller.

        Of steps that had to be damped to the last this is not known.
        """
        theta, here, damping = start, self.slopes(stack, start), 0.0
        for _ in range(MOST_STEPS):
            if here is None:
                return theta, False
            step, fall = here.step(theta - least, damping)
            if fall <= LEAST_FALL * abs(here.value):
                return theta, damping < LEAST_DAMPING
            there = self.slopes(stack, theta + step)
            if there is None:
                return theta, False
            # Far from the end a loss is no quadratic: where it falls by too little of what that promised, steps get shorter.
            kept = (here.value - there.value) / fall
            damping = max(LEAST_DAMPING, 4 * damping) if kept < 0.25 else damping / 4 if kept > 0.75 else damping
            if kept >= 0.25:
                theta, here = theta + step, there
        return theta, False

    def _by_gradients(self, stack: Stack, start: Array, least: Array) -> Array:
        """:meth:`fitted`, whatever the read-out."""
        # Steps are taken where all coefficients move the state alike: their parts may differ in length by far.
        length = self._lengths(stack)

        def loss(scaled: Array) -> tuple[float, Array]:
            with torch.enable_grad():
                free = torch.tensor(scaled / length, requires_grad=True)
                value = self.loss(stack, free)
                (slope,) = torch.autograd.grad(value, free)
            return float(value.detach()), slope.double().numpy() / length

        found: Array = minimize(
            loss,
            start * length,
            jac=True,
            method="L-BFGS-B",
            bounds=[(None if low < 0 else low, None) for low in least],
            options={"maxiter": MOST_STEPS, "ftol": LEAST_FALL},
        ).x
        return found / length

    def _lengths(self, stack: Stack) -> Array:
        """How far a coefficient of 1 moves the state, by the read-out's gain: root mean squares in units of the first."""
        gain = self.readout.gain(len(self.pad))
        moved = [*stack.x.unbind(1), self.pad[None]]
        if gain is not None:
            moved = [x @ gain.T.to(x) for x in moved]
        squares = np.array([float(x.double().square().sum(-1).mean()) for x in moved])
        length: Array = np.maximum(np.sqrt(squares / (squares[0] or 1.0)), SHORTEST)
        return length

    def loss(self, stack: Stack, theta: Tensor) -> Tensor:
        """Mean cross-entropy of the sum of parts, nats, differentiable in its coefficients."""
        n = self.readout.final_norm(stacked([stack.x], self.centre, self.pad, theta))
        logits = torch.nn.functional.linear(n, self.weight, self.bias)
        cap = self.readout.softcap
        log_z = (logits if cap is None else cap * torch.tanh(logits / cap)).logsumexp(-1)
        mean: Tensor = (log_z - target_logits(self.readout, n, self.targets)).double().mean()
        return mean

    def slopes(self, stack: Stack, coefficients: Array) -> Slopes | None:
        """:meth:`loss` with its gradient and curvature.

        The logits of a sum are the sum of its parts', over one scale. None where they are not affine in a scaled
        state or not finite, and where the norm sees a state as 0: its scale cannot be told from what it made of it.
        """
        if stack.gained is None or stack.logits is None:
            return None
        theta = torch.from_numpy(coefficients).to(stack.x)
        centre, pad = self._gained
        with torch.enable_grad():
            free = theta.expand(len(stack.x), -1).clone().requires_grad_()  # so that each token has slopes of its own
            own, length = free[:, :-1], free[:, -1:]
            n = self.readout.final_norm(self.centre + torch.einsum("nkd,nk->nd", stack.x, own) + length * self.pad)
            u = centre + torch.einsum("nkd,nk->nd", stack.gained, own) + length * pad
            if not bool(u.detach().any(-1).all()):
                return None
            inverse = self.readout.inverse_scale(u, n, self._offset)
            (of_inverse,) = torch.autograd.grad(inverse.sum(), free)
        inverse, n = inverse.detach(), n.detach()
        # A token's logits are a sum of terms a_l L_l and of what all tokens share: of the K vectors, the centre, the pad.
        factors = torch.cat([theta[:-1], theta.new_ones(1), theta[-1:]])
        moved = factors[:, None] * of_inverse[:, None]  # [n, K + 2, K + 1]: of each a_l by each coefficient
        free_of = [*range(len(theta) - 1), len(theta)]
        moved[:, free_of, range(len(theta))] += inverse[:, None]
        log_z, mean, covariance = self._moments(stack.logits, inverse[:, None] * factors)
        aim = self.readout.weight[self.targets]
        shared = torch.stack([centre, pad]) @ aim.T
        mean -= torch.cat([torch.einsum("nkd,nd->nk", stack.gained, aim), shared.T], 1)
        gradient = torch.einsum("nl,nlk->nk", mean, moved).double().mean(0)
        curvature = torch.einsum("nlk,nlm,nmj->nkj", moved, covariance, moved).double().mean(0)
        value = (log_z - target_logits(self.readout, n, self.targets)).double().mean()
        squares = torch.cat([stack.squares, pad.square().sum().expand(len(u), 1)], 1)
        whole = (inverse**2 * u.detach().square().sum(-1)).double().mean()
        of_moves = (inverse[:, None] ** 2 * squares).double().mean(0) / whole
        found = Slopes(float(value), *(x.cpu().numpy() for x in (gradient, curvature, of_moves)))
        return found if np.isfinite([found.value, *found.gradient, *found.curvature.flat]).all() else None

    def _moments(self, logits: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-partitions ``[n]`` of sums of ``logits`` ``[n, K, S]`` and of those that all tokens share, times ``a``.

        And the means ``[n, K + 2]`` and covariances ``[n, K + 2, K + 2]`` of the terms' logits over the words, as likely as
        the sums make them. ``a``: ``[n, K + 2]``.
        """
        (tokens, own, words), shared = logits.shape, self._of_all[:2]
        both = (shared[:, None] * shared).flatten(0, 1)
        log_z, mean, square = a.new_empty(tokens), torch.empty_like(a), a.new_empty(*a.shape, a.shape[1])
        block = max(1, IN_CACHE // (own * words))
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            of_these = logits[rows]
            added = torch.addmm(self._of_all[2], a[rows, own:], shared)
            added = torch.baddbmm(added[:, None], a[rows, None, :own], of_these)[:, 0]
            q, total, log_z[rows] = shifted_exponentials_(added)
            q.div_(total)
            weighted = of_these * q[:, None]
            mean[rows, :own], mean[rows, own:] = weighted.sum(-1), q @ shared.T
            square[rows, :own, :own] = torch.bmm(weighted, of_these.transpose(1, 2))
            square[rows, :own, own:] = weighted @ shared.T
            square[rows, own:, :own] = square[rows, :own, own:].transpose(1, 2)
            square[rows, own:, own:] = (q @ both.T).unflatten(1, (2, 2))
        return log_z, mean, square - mean[:, :, None] * mean[:, None]
