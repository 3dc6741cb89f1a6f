"""Log-partitions over chunks of the unembedding, as a GPU computes them: large products, each reduced as it comes.

Products may be made in half precision with sums in float32; see :class:`lensbench.streams.readout.HalfProducts`.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lensbench.streams.readout import HalfProducts, ReadOut, in_terms

VOCABULARY_BLOCK = 1024
"""Words of one block of logits, at least"""

CUDA_LOGITS = 2**26
"""Logits of a chunk on a GPU: 256 MiB, whatever the vocabulary"""

CUDA_ROWS = 2**15
"""Rows at most that a GPU works on at once"""

LADDER = tuple(HalfProducts(dtype, terms) for terms in (1, 2, 3) for dtype in (torch.bfloat16, torch.float16))
"""Ways of making log-partitions in half precision, the fastest first"""


def rows_at_once(x: Tensor, words: int, in_cache: int) -> int:
    """Rows of logits to work on at once: ``in_cache`` on a processor, a chunk's worth on a GPU."""
    return max(in_cache, CUDA_LOGITS // words) if x.is_cuda else in_cache


Reduction = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor, Tensor]]


def reduced(logits: Tensor, largest: Tensor, total: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit so far and the sum of ``exp(logit - largest)``, ``[R]``, with a chunk of logits ``[R, C]`` in them.

    Also returns where in the chunk each row has its largest logit. ``cap``: of soft-capped logits.
    """
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    here, at = logits.max(-1)
    new = torch.maximum(largest, here)
    total = total * torch.exp(largest - new) + torch.exp(logits - new[:, None]).sum(-1)
    return new, total, at


@cache
def compiled() -> Reduction | None:
    """:func:`reduced` as fused kernels, which read a chunk once or twice and write nothing of its size.

    None where torch cannot compile for this GPU; a warning then says why.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    made: Reduction = torch.compile(reduced, dynamic=True)
    try:
        row = torch.zeros(2, device="cuda")
        made(torch.zeros(2, 8, device="cuda"), row, row, None)
    except Exception as error:  # of whatever torch hands on: a compiler that is missing, a driver that is too old
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"log-partitions are not compiled for this GPU, and slower: {reason}", stacklevel=2)
        return None
    return made


LOWEST = -60.0
"""Logarithm of the smallest term of a sum whose largest is 1: what is less adds nothing that is seen"""


def exponentials_(x: Tensor) -> Tensor:
    """``exp(x)`` in place, of logarithms below :data:`LOWEST` exp of that.

    Numbers below the normal range of float32 take a processor a hundred times as long.
    """
    return x.clamp_(min=LOWEST).exp_()


def shifted_exponentials_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(logit - largest)`` ``[R, S]`` in place of the logits, its sums ``[R, 1]``, and the log-partitions ``[R]``."""
    largest = logits.amax(-1, keepdim=True)
    q = exponentials_(logits.sub_(largest))
    total = q.sum(-1, keepdim=True)
    return q, total, (largest + total.log())[:, 0]


def probabilities_(x: Tensor) -> Tensor:
    """``exp(x)`` in place; 0 of logarithms below :data:`LOWEST`."""
    found: Tensor = torch.threshold_(exponentials_(x), 2 * math.exp(LOWEST), 0.0)
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` in float32 (float64 stays), with products in the type of the factors and sums in float32."""
    if left.dtype.itemsize >= 4:
        return left @ right.T
    if left.is_cuda:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left.float() @ right.float().T


def online_log_partition(readout: ReadOut, n: Tensor, reduction: Reduction | None = None) -> tuple[Tensor, Tensor]:
    """Log-partition and largest logit ``[R]`` of normalised states ``[R, d_read]``, with an online maximum over the chunks.

    ``reduction``: in place of the one for the device, compiled on a GPU. What it works on has the size of a chunk.
    """
    if reduction is None:
        reduction = (compiled() if n.is_cuda else None) or reduced
    weight, bias, products = readout.weight, readout.bias, readout.products
    size = VOCABULARY_BLOCK if not n.is_cuda else max(VOCABULARY_BLOCK, CUDA_LOGITS // max(1, len(n)))
    factors = [(n, weight)]
    if products is not None:
        states, weights = in_terms(n, products.terms, products.dtype), readout.weight_in_terms
        factors = [(states[k], weights[0]) for k in range(len(states))] + [(states[0], w) for w in weights[1:]]
    # Sums and maxima in float32 at least, whatever the type of the products.
    largest = torch.full((len(n),), -torch.inf, dtype=torch.promote_types(n.dtype, torch.float32), device=n.device)
    total = torch.zeros_like(largest)
    word = torch.zeros(len(n), dtype=torch.long, device=n.device)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        logits = product(factors[0][0], factors[0][1][rows]).to(largest.dtype)
        for left, right in factors[1:]:
            logits += product(left, right[rows])
        if bias is not None:
            logits += bias[rows]
        new, total, at = reduction(logits, largest, total, readout.softcap)
        word = torch.where(new > largest, at + start, word)
        largest = new
    log_z = largest + total.log()
    if products is not None:  # a logit with three digits cannot be compared with one with seven
        logit = (n * weight[word]).sum(-1)
        largest = readout.cap_(logit if bias is None else logit + bias[word])
    return log_z, largest


def agreeing_products(readout: ReadOut, n: Tensor, *, tolerance: float = 1e-3) -> HalfProducts | None:
    """The first of :data:`LADDER` with which log-partitions agree with float32, None where none does.

    They agree when the mean absolute difference over the normalised states ``[R, d_read]`` is at most ``tolerance`` nats.
    """
    exact = online_log_partition(readout.with_products(None), n)[0]
    # A state whose power lies in one entry has it sqrt(d) times as large as the root of its mean square.
    largest = max(float(n.abs().max()) * n.shape[-1] ** 0.5, float(readout.weight.abs().max()))
    for products in LADDER:
        if largest < torch.finfo(products.dtype).max:
            half = online_log_partition(readout.with_products(products), n)[0]
            if float((half - exact).abs().mean()) <= tolerance:
                return products
    return None
