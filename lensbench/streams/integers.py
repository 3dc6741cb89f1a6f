"""Logits by products of integers of eight bits, where two or three digits are enough: a processor makes these far faster.

They serve as control variates alone: exact values of some tokens mend what is made of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lensbench.runtime.rates import integers_are_fast
from lensbench.streams.partition import exponentials_, online_log_partition
from lensbench.streams.readout import ReadOut

WIDE = 32
"""Entries of a state that stay in float32: in a few of them states are far longer than in all others (arXiv:2208.07339)"""

LARGEST = 127
"""The largest integer"""

LEAST_WEIGHTS = 2**20
"""Numbers of a weight from which products in integers save time"""

LARGEST_NOISE = 5e-2
"""Root mean square of what rounding may change in a log-partition, nats"""

ROWS, WORDS = 512, 4096
"""Rows and words of a block of logits: products are so fast that their sums had better stay in the cache"""

GROUPS = 256
"""Words of a block that are :data:`GROUPS` apart are compared at once"""

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class RoundedStates:
    """Normalised states of R rows, rounded to integers times a step of each row's own, but for a few entries."""

    whole: Tensor  # int8 [R, d_read]
    steps: Tensor  # [R, 1]
    rest: Tensor  # [R, k + 2]: the entries that stay in float32, 1, and what is taken off all logits of the row


@dataclass(frozen=True)
class IntegerLogits:
    """``n W^T + base`` of normalised states n, with n and W rounded to integers times a step.

    Each entry of n is divided by a scale that W is multiplied by, so that rounding takes as much off both.
    """

    weight: Tensor  # int8 [S, d_read]: W in steps, 0 where entries stay in float32
    step: float
    scale: Tensor  # [d_read]: what states are multiplied by; 0 where they stay in float32
    wide: Tensor  # [k]: entries that stay in float32
    rest: Tensor  # [S, k + 2]: W at these entries, base, and -1

    @classmethod
    def of(cls, weight: Tensor, base: Tensor, like: Tensor) -> "IntegerLogits | None":
        """For W ``[S, d_read]`` and a base ``[S]``, by normalised states ``[R, d_read]`` like those that will come.

        None where it would not be faster, or where rounding changes log-partitions by more than :data:`LARGEST_NOISE`.
        """
        fits = (
            weight.dtype == torch.float32 and not weight.is_cuda and weight.numel() >= LEAST_WEIGHTS and len(like) > 0
        )
        if not fits or not integers_are_fast():
            return None
        usual, own = (x.square().mean(0).sqrt().clamp(min=TINY) for x in (like, weight))
        wide = (usual * own).argsort(descending=True)[:WIDE]
        scale = (own / usual).sqrt()
        scaled = weight / scale
        scale[wide], scaled[:, wide] = 0.0, 0.0
        step = float(scaled.abs().max()) / LARGEST
        if not step > 0:
            return None
        rest = torch.cat([weight[:, wide], base[:, None], weight.new_full((len(weight), 1), -1.0)], 1)
        made = cls((scaled / step).round_().to(torch.int8), step, scale, wide, rest)
        some = like[: ROWS * max(1, WORDS // len(weight))]
        exact = torch.cat([torch.addmm(base, rows, weight.T).logsumexp(-1) for rows in some.split(ROWS)])
        error = made.partition_and_best(some)[0] - exact
        return made if bool(error.square().mean().sqrt() <= LARGEST_NOISE) else None

    def rounded(self, n: Tensor) -> RoundedStates:
        """Normalised states ``[R, d_read]`` as they enter products."""
        scaled = n * self.scale
        steps = scaled.abs().amax(-1, keepdim=True).clamp_(min=TINY).div_(LARGEST)
        whole = scaled.div_(steps).round_().to(torch.int8)
        rest = torch.cat([n[:, self.wide], n.new_ones(len(n), 1), n.new_zeros(len(n), 1)], 1)
        return RoundedStates(whole, steps.mul_(self.step), rest)

    def logits(self, states: RoundedStates, words: slice, room: Tensor | None = None) -> Tensor:
        """Logits ``[R, S]`` of some words, written into ``room`` if it is there."""
        sums = torch.mul(torch._int_mm(states.whole, self.weight[words].T), states.steps, out=room)
        return torch.addmm(sums, states.rest, self.rest[words].T, out=sums)

    def partition_and_best(self, n: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-partition ``[R]`` of normalised states ``[R, d_read]``, and some words ``[R, k]``, the best among them.

        ``softcap``: of capped logits.
        """
        found = [self._partition_and_best(rows, softcap) for rows in n.split(ROWS)]
        return torch.cat([log_z for log_z, _ in found]), torch.cat([words for _, words in found])

    def _partition_and_best(self, n: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Each row is shifted by the largest logit of its first block, within the product where nothing caps the logits."""
        states, shift = self.rounded(n), n.new_zeros(len(n))
        total, above = n.new_zeros(len(n)), n.new_full((len(n),), -torch.inf)
        first = torch.zeros(len(n), dtype=torch.long)
        step, room = torch.zeros_like(first), n.new_empty(len(n), WORDS)
        for start in range(0, len(self.weight), WORDS):
            whole = start + WORDS <= len(self.weight)
            logits = self.logits(states, slice(start, start + WORDS), room if whole else None)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap).sub_(shift[:, None])
            # The largest of words that are GROUPS apart first: finding which word it is takes longer than its value.
            groups = logits.view(len(n), -1, GROUPS).amax(1) if whole else logits
            here, at = groups.max(-1)
            if start == 0:
                shift = here
                logits.sub_(shift[:, None])
                here = torch.zeros_like(here)
                if softcap is None:
                    states.rest[:, -1] = shift
            better = here > above
            first, step = torch.where(better, at + start, first), torch.where(better, GROUPS * whole, step)
            above = torch.maximum(above, here)
            total += exponentials_(logits).sum(-1)
        return shift + total.log(), first[:, None] + step[:, None] * torch.arange(WORDS // GROUPS)


def integer_partition(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """Log-partition and largest logit ``[R]`` of ``[R, d_read]`` by the read-out's products in integers.

    The words of the largest logits are found by rounded logits, and their logits computed again.
    """
    assert readout.integers is not None
    log_z, words = readout.integers.partition_and_best(n, readout.softcap)
    logits = torch.einsum("rd,rkd->rk", n, readout.weight[words])
    largest = readout.cap_(logits if readout.bias is None else logits + readout.bias[words]).amax(-1)
    bad = ~torch.isfinite(log_z)  # a logit far above the first block's
    if bool(bad.any()):
        log_z[bad], largest[bad] = online_log_partition(readout, n[bad])
    return log_z, largest


def with_integers(readout: ReadOut, like: Tensor) -> ReadOut | None:
    """The read-out with log-partitions by products in integers; None where that saves nothing.

    ``like`` ``[R, d_read]``: normalised states of the kind that will be read out.
    """
    if readout.products is not None:
        return None
    base = torch.zeros(len(readout.weight)) if readout.bias is None else readout.bias
    made = IntegerLogits.of(readout.weight, base.to(readout.weight), like)
    return None if made is None else readout.with_integers(made)
