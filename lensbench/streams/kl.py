"""KL divergence from the model's own distribution, and log-partitions, computed in blocks of the vocabulary."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture
from lensbench.streams.partition import (
    CUDA_ROWS,
    VOCABULARY_BLOCK,
    exponentials_,
    online_log_partition,
    probabilities_,
    rows_at_once,
    shifted_exponentials_,
)
from lensbench.streams.products import half_log_partition
from lensbench.streams.readout import ReadOut

TOKEN_BLOCK = 1024


ROW_BLOCK = 1024
"""Rows of one block of logits on the CPU"""


@dataclass(frozen=True)
class Tokens:
    """The model's own distribution p at N tokens, in the form that KL divergences need."""

    expected: Tensor  # [N, d_read]: e = W^T p
    entropy_term: Tensor  # [N]: sum p log p - sum p bias; where logits are capped, sum p log p
    final: Tensor  # [N, d]: h_L, from which p is computed again where logits are capped

    def repeated(self, times: int) -> "Tokens":
        """These tokens again and again, ``[times * N]``."""
        return Tokens(self.expected.repeat(times, 1), self.entropy_term.repeat(times), self.final.repeat(times, 1))


def log_partition(readout: ReadOut, n: Tensor) -> Tensor:
    """``log sum_v exp(logit_v)`` ``[R]`` of normalised states ``[R, d_read]``, in blocks that fit into the cache.

    Each row is shifted by the largest logit of its first block, within the product (``addmm``). This is exact unless a
    later logit is more than 80 larger; such a row is computed again with an online maximum.
    """
    return partition_and_largest(readout, n, want_largest=False)[0]


def partition_and_largest(readout: ReadOut, n: Tensor, *, want_largest: bool = True) -> tuple[Tensor, Tensor | None]:
    """:func:`log_partition` ``[R]`` and, if wanted, the largest logit of every row ``[R]``, from one pass.

    With products in bfloat16, the pass finds the word of the largest logit, and its logit is computed again in float32.
    """
    if not len(n):
        return n[:, 0], n[:, 0] if want_largest else None
    parts = [_log_partition(readout, rows, want_largest) for rows in n.split(CUDA_ROWS if n.is_cuda else ROW_BLOCK)]
    largest = [p[1] for p in parts if p[1] is not None]
    return torch.cat([p[0] for p in parts]), torch.cat(largest) if want_largest else None


def _log_partition(readout: ReadOut, n: Tensor, want_largest: bool) -> tuple[Tensor, Tensor | None]:
    weight, bias = readout.weight, readout.bias
    if n.is_cuda:  # large products are fastest on a GPU
        log_z, top = online_log_partition(readout, n)
        return log_z, top if want_largest else None
    if readout.products is not None:
        return half_log_partition(readout, n, want_largest)
    logits = n @ weight[:VOCABULARY_BLOCK].T
    if bias is not None:
        logits += bias[:VOCABULARY_BLOCK]
    shift = readout.cap_(logits).amax(-1, keepdim=True)
    total = exponentials_(logits.sub_(shift)).sum(-1)
    above = torch.zeros_like(total)  # the largest logit minus the shift
    room = torch.empty(len(n), VOCABULARY_BLOCK, dtype=n.dtype)
    for start in range(VOCABULARY_BLOCK, len(weight), VOCABULARY_BLOCK):
        rows = weight[start : start + VOCABULARY_BLOCK]
        logits = room if len(rows) == VOCABULARY_BLOCK else room.new_empty(len(n), len(rows))
        if readout.linear:
            base = -shift if bias is None else bias[start : start + VOCABULARY_BLOCK] - shift
            torch.addmm(base.expand_as(logits), n, rows.T, out=logits)
        else:
            torch.mm(n, rows.T, out=logits)
            if bias is not None:
                logits += bias[start : start + VOCABULARY_BLOCK]
            readout.cap_(logits).sub_(shift)
        if want_largest:
            above = torch.maximum(above, logits.amax(-1))
        total += exponentials_(logits).sum(-1)
    log_z, largest = shift[:, 0] + total.log(), shift[:, 0] + above
    bad = ~torch.isfinite(log_z)
    if bool(bad.any()):
        log_z[bad], largest[bad] = online_log_partition(readout, n[bad])
    return log_z, largest if want_largest else None


def target_logits(readout: ReadOut, n: Tensor, targets: Tensor) -> Tensor:
    """Logits ``[n]`` of the ``targets`` at normalised states."""
    logit = (readout.weight[targets] * n).sum(-1)
    if readout.bias is not None:
        logit = logit + readout.bias[targets]
    cap = readout.softcap
    return logit if cap is None else cap * torch.tanh(logit / cap)


class Vocabulary:
    """A sample of the unembedding's rows that stands for all words in a cheap log-partition.

    Half of the rows are the words most probable on average. The other m are drawn from the rest with probability ``pi``
    proportional to ``sqrt(mean p)``, each with offset ``-log(m pi)``, so that their sum of exponentials is unbiased for that
    of the rest. A vocabulary with no more than ``rows`` words is used whole. The logarithm of an unbiased sum is biased:
    samples serve gradients and control variates, and no KL is reported from them alone.
    """

    def __init__(self, readout: ReadOut, mean_p: Tensor, rows: int, generator: torch.Generator):
        self.weight, self.bias, self.generator = readout.weight, readout.bias, generator
        self.exact = not readout.linear or len(self.weight) <= rows
        order = mean_p.argsort(descending=True).to(self.weight.device)
        self.top, self.rest = order[: rows // 2], order[rows // 2 :]
        root = mean_p.to(self.weight.device)[self.rest].double().clamp(min=1e-12).sqrt()
        self.pi = (root / root.sum()).cpu()
        self.drawn = rows - rows // 2

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Rows ``[S, d_read]`` and their offsets ``[S]``, newly sampled at each call."""
        if self.exact:
            return self.weight, self.bias
        chosen = torch.multinomial(self.pi, self.drawn, replacement=True, generator=self.generator)
        at = torch.cat([self.top, self.rest[chosen.to(self.rest.device)]])
        offset = torch.zeros(len(at), dtype=torch.float64)
        offset[len(self.top) :] = -(self.drawn * self.pi[chosen]).log()
        offset = offset.to(self.weight)
        return self.weight[at], offset if self.bias is None else offset + self.bias[at]


def expected_logit(readout: ReadOut, n: Tensor, of: Tensor) -> Tensor:
    """``sum_v p_v logit_v(n)`` ``[R]``, p the read-out of normalised states ``of``; ``n`` and ``of`` are ``[R, d_read]``.

    For logits that are not affine in n: p is computed again, block by block.
    """
    weight, bias = readout.weight, readout.bias
    log_z = log_partition(readout, of)
    # A p that sums to 1 + e would move the mean logit by e times itself, which is far more than e.
    total, mass = torch.zeros_like(log_z), torch.zeros_like(log_z)
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        rows = slice(start, start + VOCABULARY_BLOCK)
        p, logits = of @ weight[rows].T, n @ weight[rows].T
        if bias is not None:
            p, logits = p + bias[rows], logits + bias[rows]
        p = probabilities_(readout.cap_(p) - log_z[:, None])
        mass += p.sum(-1)
        total += (p * readout.cap_(logits)).sum(-1)
    return total / mass


def token_kl(readout: ReadOut, n: Tensor, tokens: Tokens, log_z: Tensor | None = None) -> Tensor:
    """``KL(p || q)`` in nats ``[N]``, q the read-out of normalised states n ``[N, d_read]``."""
    log_z = log_partition(readout, n) if log_z is None else log_z
    if not readout.linear:
        return tokens.entropy_term - expected_logit(readout, n, readout.final_norm(tokens.final)) + log_z
    return tokens.entropy_term - (tokens.expected * n).sum(-1) + log_z


def moment_and_partition(logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``W^T softmax(logits)`` ``[R, d]`` and the log-partition ``[R]`` of ``[R, S]``, which are used up."""
    q, total, log_z = shifted_exponentials_(logits)
    return (q @ weight).div_(total), log_z


def softmax_moment(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """``W^T q`` ``[R, d_read]`` and ``sum q log q - sum q bias`` ``[R]``, where ``q = softmax(W n + bias)``."""
    weight, bias = readout.weight, readout.bias

    def one(at: slice) -> tuple[Tensor, Tensor]:
        rows = n[at]
        logits = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        moment, log_z = moment_and_partition(logits, weight)
        return moment, (moment * rows).sum(-1) - log_z

    moments, entropies = zip(
        *in_pieces(slice(0, len(n)), rows_at_once(n, len(weight), ROW_BLOCK), one, what="a softmax"), strict=True
    )
    return torch.cat(moments), torch.cat(entropies)


def sum_by_window(values: Tensor, captured: Capture) -> NDArray[np.float64]:
    """Sums of ``values`` ``[..., N]`` over the tokens of each window, float64 ``[..., S]``, in the order of the windows."""
    starts = np.flatnonzero(np.diff(captured.window, prepend=-1))
    if not len(starts):  # with few tokens, some of many processes have none
        return np.zeros((*values.shape[:-1], 0))
    sums: NDArray[np.float64] = np.add.reduceat(values.double().cpu().numpy(), starts, axis=-1)
    return sums


def sums_of_all(values: Tensor, captured: Capture) -> NDArray[np.float64]:
    """:func:`sum_by_window` over the windows of all processes, ``[..., S]``."""
    return captured.ranks.joined(sum_by_window(values, captured), axis=-1)
