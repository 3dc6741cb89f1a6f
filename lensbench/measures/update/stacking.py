"""Coefficients of readings that are added up, fitted to the tokens that follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import Vocabulary
from lensbench.streams.partition import shifted_exponentials_
from lensbench.streams.readout import ReadOut

WORDS = 4096
"""Rows of the unembedding that stand for all words while coefficients are fitted"""

LEAST_FALL = 1e-6
"""Fall of the loss in a step, relative to it, at which coefficients are found"""

IN_CACHE = 2**18
"""Logits at once in a log-partition of a sum: they stay in a processor's cache"""


def stacked(parts: Sequence[Tensor], centre: Tensor, pad: Tensor, theta: Tensor) -> Tensor:
    """``mean h_L + sum theta_k x_k + pad`` ``[n, d]``; the last of ``theta`` is the length of the pad."""
    x = torch.cat(list(parts), 1)
    return centre.to(x) + torch.einsum("nkd,k->nd", x, theta[:-1].to(x)) + theta[-1].to(x) * pad.to(x)


def target_logits(readout: ReadOut, n: Tensor, targets: Tensor) -> Tensor:
    """Logits ``[n]`` of the ``targets`` at normalised states."""
    logit = (readout.weight[targets] * n).sum(-1)
    if readout.bias is not None:
        logit = logit + readout.bias[targets]
    cap = readout.softcap
    return logit if cap is None else cap * torch.tanh(logit / cap)


class LogPartitionOfSum(torch.autograd.Function):
    """``logsumexp_w(sum_k a_k L_kw)`` of logits L that are made once, and its gradient in the coefficients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, logits: Sequence[Tensor], of_all: Tensor) -> Tensor:
        """Log-partitions ``[n]`` by coefficients ``a`` ``[n, K + m]``.

        Each of K ``logits`` is ``[n, S]``, a row for each token; ``of_all`` ``[m, S]`` are those that all tokens share.
        """
        own, log_z, moment = len(logits), torch.empty_like(a[:, 0]), torch.empty_like(a)
        block = max(1, IN_CACHE // of_all.shape[1])
        for start in range(0, len(a), block):
            rows = slice(start, start + block)
            added = a[rows, own:] @ of_all
            for k, one in enumerate(logits):
                added.addcmul_(one[rows], a[rows, k, None])
            q, total, log_z[rows] = shifted_exponentials_(added)
            moment[rows, own:] = q @ of_all.T
            for k, one in enumerate(logits):
                moment[rows, k] = torch.linalg.vecdot(q, one[rows])
            moment[rows] /= total
        ctx.save_for_backward(moment)
        return log_z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the coefficients."""
        (moment,) = ctx.saved_tensors
        return moment * gradient[:, None], None, None


@dataclass(frozen=True)
class Part:
    """A reading and its discounted copy at some tokens, and what a read-out makes of them before it divides by a scale."""

    x: Tensor
    """``[n, 2, d]``"""
    gained: Tensor | None
    """``G x`` ``[n, 2, d_read]``; None where the read-out is not affine in a scaled state"""
    logits: tuple[Tensor, ...]
    """``W G x`` for either, ``[n, S]`` each"""


@dataclass(frozen=True)
class Stack:
    """Parts that are added up with one coefficient for each of their K vectors."""

    joined: Tensor
    """``[K, n, d + d_read]``: x, and ``G x`` where the read-out is affine in a scaled state (else ``[K, n, d]``)"""
    logits: tuple[Tensor, ...]
    """Of each vector, ``[n, S]``; none where the read-out is not"""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Stack":
        """Side by side, once for all coefficients that will be tried."""
        each = [part.x if part.gained is None else torch.cat([part.x, part.gained], -1) for part in parts]
        return cls(torch.cat(each, 1).transpose(0, 1).contiguous(), tuple(one for part in parts for one in part.logits))


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
        sample = Vocabulary(readout, dev.mean_p, WORDS, torch.Generator().manual_seed(0))
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
            return Part(x, None, ())
        gained = x @ self.gain.T.to(x)
        return Part(x, gained, tuple(one @ self.weight.T for one in gained.unbind(1)))

    def fitted(self, parts: Sequence[Part], start: Array) -> Array:
        """The coefficients of least loss, the last that of the pad; those of parts after the first are at least 0."""
        count = 2 * len(parts)
        bounds = [(None, None)] * 2 + [(0.0, None)] * (count - 2) + [(None, None)]
        # Steps are taken where all coefficients move the state alike: their parts may differ in length by far.
        length, stack = self._lengths(parts), Stack.of(parts)

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
            bounds=bounds,
            options={"maxiter": 40, "ftol": LEAST_FALL},
        ).x
        return found / length

    def _lengths(self, parts: Sequence[Part]) -> Array:
        """How far a coefficient of 1 moves the state, by the read-out's gain: root mean squares in units of the first."""
        gain = self.readout.gain(len(self.pad))
        moved = [*torch.cat([part.x for part in parts], 1).unbind(1), self.pad[None]]
        if gain is not None:
            moved = [x @ gain.T.to(x) for x in moved]
        squares = np.array([float(x.double().square().sum(-1).mean()) for x in moved])
        length: Array = np.sqrt(np.maximum(squares / (squares[0] or 1.0), 1e-24))
        return length

    def loss(self, stack: Stack, theta: Tensor) -> Tensor:
        """Mean cross-entropy of the sum of parts, nats, differentiable in its coefficients."""
        d, like = len(self.pad), theta.to(stack.joined)
        moved = (like[:-1] @ stack.joined.flatten(1)).view(stack.joined.shape[1:])
        n = self.readout.final_norm(moved[:, :d] + (self.centre + like[-1] * self.pad))
        u = None
        if self.gain is not None:
            centre, pad = self._gained
            u = moved[:, d:] + centre + like[-1] * pad
        if u is not None and bool(u.detach().any(-1).all()):
            log_z = self._log_partition(stack, like, self.readout.inverse_scale(u, n, self._offset)[:, None])
        else:  # of a state that the norm sees as 0, its scale cannot be told from what it made of it
            logits = torch.nn.functional.linear(n, self.weight, self.bias)
            cap = self.readout.softcap
            log_z = (logits if cap is None else cap * torch.tanh(logits / cap)).logsumexp(-1)
        mean: Tensor = (log_z - target_logits(self.readout, n, self.targets)).double().mean()
        return mean

    def _log_partition(self, stack: Stack, theta: Tensor, inverse: Tensor) -> Tensor:
        """Log-partitions ``[n]``: the logits of a sum are the sum of its parts', over one scale: ``inverse`` ``[n, 1]``."""
        a = torch.cat([inverse * theta[:-1], inverse, inverse * theta[-1], torch.ones_like(inverse)], 1)
        found: Tensor = LogPartitionOfSum.apply(a, stack.logits, self._of_all)  # type: ignore[no-untyped-call]
        return found
