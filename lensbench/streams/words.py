"""Some words that stand for a whole vocabulary: log-partitions and softmaxes at a small share of the cost.

What they give is biased, and no result is reported from it alone. It is a control variate: the exact values of a few
tokens mend it (:mod:`lensbench.lenses.estimated`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lensbench.runtime.memory import in_pieces
from lensbench.streams.kl import ROW_BLOCK, moment_and_partition
from lensbench.streams.partition import CUDA_ROWS, exponentials_
from lensbench.streams.products import centred
from lensbench.streams.readout import ReadOut

CERTAIN = 0.75
"""The share of the words that are the most probable ones; the others are drawn from the rest of the vocabulary"""


@dataclass(frozen=True)
class Words:
    """S words of a read-out, each with the log of how many words it stands for.

    The first ``certain`` stand for themselves, the others for all the rest, so that a sum of exponentials over them is
    unbiased for that over the vocabulary. Where the model caps its logits, the cap comes before the offset.
    """

    readout: ReadOut
    offset: Tensor  # [S]
    certain: int
    weight: Tensor  # [S, d_read]
    bias: Tensor | None  # [S]
    half: Tensor | None = None  # [S, d_read]: the weight in float16, on a processor that makes products of it

    @classmethod
    def of(cls, readout: ReadOut, at: Tensor, offset: Tensor, certain: int) -> "Words":
        """The words ``at`` ``[S]`` with their offsets ``[S]``."""
        at = at.to(readout.weight.device)
        bias = None if readout.bias is None else readout.bias[at]
        weight, products = readout.weight[at], readout.products
        half = weight.to(products.dtype) if products is not None and not weight.is_cuda else None
        return cls(readout, offset.to(readout.weight), certain, weight, bias, half)

    @classmethod
    def draw(cls, readout: ReadOut, mean: Tensor, rows: int, generator: torch.Generator) -> "Words":
        """At most so many, by the mean probability of every word ``[V]`` in what will be read out.

        Those beyond the most probable are drawn with replacement and probability proportional to the root of their mean
        probability; a word that is drawn k times stands for k times as many.
        """
        order = mean.double().cpu().argsort(descending=True)
        certain = round(CERTAIN * rows)
        rest = order[certain:]
        pi = mean.double().cpu()[rest].clamp(min=1e-12).sqrt()
        pi /= pi.sum()
        chosen, times = torch.multinomial(pi, rows - certain, replacement=True, generator=generator).unique(
            return_counts=True
        )
        offset = (times / ((rows - certain) * pi[chosen])).log()
        at = torch.cat([order[:certain], rest[chosen]])
        return cls.of(readout, at, torch.cat([torch.zeros(certain, dtype=offset.dtype), offset]), certain)

    def as_readout(self) -> ReadOut:
        """A read-out to these words alone, of logits plus offsets; of models that do not cap their logits."""
        assert self.readout.linear
        head = nn.Linear(1, 1)
        head.weight = nn.Parameter(self.weight, requires_grad=False)
        head.bias = nn.Parameter(self.offset if self.bias is None else self.offset + self.bias, requires_grad=False)
        return ReadOut(self.readout.final_norm, head).with_products(self.readout.products)

    def logits(self, n: Tensor) -> Tensor:
        """Logits plus offsets ``[R, S]`` of normalised states ``[R, d_read]``."""
        if self.half is not None:
            left, base, apart = centred(n, self.weight, self.readout.longest)
            logits = left @ self.half.T + base
            if len(apart):
                logits[apart] = n[apart] @ self.weight.T
            if self.bias is not None:
                logits += self.bias
            return self.readout.cap_(logits).add_(self.offset)
        if self.readout.linear:
            return torch.addmm(self.offset if self.bias is None else self.offset + self.bias, n, self.weight.T)
        logits = n @ self.weight.T if self.bias is None else torch.addmm(self.bias, n, self.weight.T)
        return self.readout.cap_(logits).add_(self.offset)

    def partition_and_largest(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Log-partition ``[R]``, and the largest logit ``[R]`` of the words that stand for themselves."""

        def one(rows: slice) -> tuple[Tensor, Tensor]:
            logits = self.logits(n[rows])
            shift = logits.amax(-1)
            if self.half is None:
                largest = logits[:, : self.certain].amax(-1)
            else:  # a rounded logit is not compared with one that is not
                word = logits[:, : self.certain].argmax(-1)
                largest = (n[rows] * self.weight[word]).sum(-1)
                largest = self.readout.cap_(largest if self.bias is None else largest + self.bias[word])
            return shift + exponentials_(logits.sub_(shift[:, None])).sum(-1).log(), largest

        log_z, largest = zip(*in_pieces(slice(0, len(n)), _rows_of(n), one, what="a row of words"), strict=True)
        return torch.cat(log_z), torch.cat(largest)

    def softmax_moment(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """``W^T q`` ``[R, d_read]`` and ``sum q log q - sum q (bias + offset)`` ``[R]``, q the softmax of the words."""

        def one(rows: slice) -> tuple[Tensor, Tensor]:
            logits = self.logits(n[rows])
            moment, log_z = moment_and_partition(logits, self.weight)
            return moment, (moment * n[rows]).sum(-1) - log_z

        moments, entropies = zip(*in_pieces(slice(0, len(n)), _rows_of(n), one, what="a softmax of words"), strict=True)
        return torch.cat(moments), torch.cat(entropies)

    def expected_logit(self, n: Tensor, of: Tensor) -> Tensor:
        """``sum_v q_v logit_v(n)`` ``[R]``, q the softmax of the words at normalised states ``of``; both ``[R, d_read]``."""

        def one(rows: slice) -> Tensor:
            return (self.logits(of[rows]).softmax(-1) * self.logits(n[rows]).sub_(self.offset)).sum(-1)

        return torch.cat(in_pieces(slice(0, len(n)), _rows_of(n), one, what="a row of words"))


def _rows_of(n: Tensor) -> int:
    """How many rows are read at once."""
    return CUDA_ROWS if n.is_cuda else ROW_BLOCK
