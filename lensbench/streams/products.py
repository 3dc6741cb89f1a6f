"""How products with the unembedding are made: in float32, or in half precision where log-partitions agree."""

import torch
from torch import Tensor

from lensbench.runtime.rates import half_is_fast
from lensbench.streams.partition import VOCABULARY_BLOCK, agreeing_products, exponentials_, online_log_partition
from lensbench.streams.readout import HalfProducts, ReadOut

ON_CPU = HalfProducts(torch.float16, 1)
"""What a processor uses. It rounds what comes out of a product to float16, too: more products would not help."""

LEAST_WEIGHTS = 2**22
"""Numbers of an unembedding from which a processor makes its products in float16; of smaller ones the time goes elsewhere"""

LARGEST_BIAS, LARGEST_NOISE = 5e-4, 5e-2
"""Mean, and root mean square over tokens, of what float16 may change in the log-partitions of a layer, nats"""

CHANCE = 4.0
"""Standard errors of a layer's mean that are not held against it"""

UNUSUAL = 8.0
"""How much larger than the median a row's largest entry is if it does not enter the mean of rows"""

CPU_ROWS = 512
"""Rows that a processor works on at once"""


SAMPLE = 2048
"""States of all layers together by which products are chosen"""


def products_for(readout: ReadOut, states: Tensor) -> HalfProducts | None:
    """The products of log-partitions by the first states ``[L+1, N, d]``: what lenses at every layer may hand the head.

    The logit lens of the first layers is the hardest of it.
    """
    return choose_products(readout, readout.final_norm(states[:, : max(1, SAMPLE // len(states))]))


def choose_products(readout: ReadOut, n: Tensor) -> HalfProducts | None:
    """The products of log-partitions, by normalised states ``[R, d_read]``, or of layers ``[G, R, d_read]``; None: float32.

    On a GPU they are :func:`agreeing_products`. A processor makes them in float16 where it is fast at it, the unembedding
    is large, and :func:`agrees_on_average`. The read-out does not change; :meth:`ReadOut.with_products` makes one with them.
    """
    if n.is_cuda:
        return agreeing_products(readout, n.flatten(0, -2))
    large = readout.weight.dtype == torch.float32 and readout.weight.numel() >= LEAST_WEIGHTS
    layers = n if n.dim() == 3 else n[None]
    return ON_CPU if large and half_is_fast() and agrees_on_average(readout, layers) else None


def agrees_on_average(readout: ReadOut, n: Tensor) -> bool:
    """Whether log-partitions by :data:`ON_CPU` are those of float32 on average, with little noise: ``n`` ``[G, R, d_read]``.

    Of a single token the noise can be seen, of a mean over tokens it cannot, and a bias is what counts. Both are judged at
    each layer; what a layer's mean may differ by for its noise alone is granted to it.
    """
    if float(readout.weight.abs().max()) >= torch.finfo(ON_CPU.dtype).max:
        return False
    exact, half = readout.with_products(None), readout.with_products(ON_CPU)
    parts = [rows for layer in n for rows in layer.split(CPU_ROWS)]
    errors = [half_log_partition(half, x, False)[0] - online_log_partition(exact, x)[0] for x in parts]
    error = torch.cat(errors).double().view(n.shape[:-1])
    mean, noise = error.mean(-1).abs(), error.square().mean(-1).sqrt()
    granted = CHANCE * noise / error.shape[-1] ** 0.5
    return bool(
        (error.mean().abs() <= LARGEST_BIAS + granted.max() / len(n) ** 0.5)
        & (noise <= LARGEST_NOISE).all()
        & (mean <= LARGEST_BIAS + granted).all()
    )


def centred(n: Tensor, weight: Tensor, longest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[R, d]`` less their mean, in float16; ``W mean`` ``[V]``, to be added to their products with W; and rows apart.

    What all rows share is not rounded: else the same error would stand in every one, and in their mean. What is left is
    smaller, and so is its error. Rows whose products may leave the range of float16, by the ``longest`` row of W, are 0:
    their numbers ``[K]`` come last, to be read out in float32. Rows of unusual size do not enter the mean.
    """
    size = n.abs().amax(-1)
    usual = size <= UNUSUAL * size.nanmedian()
    centre = n.mean(0) if bool(usual.all()) else n[usual].mean(0) if bool(usual.any()) else torch.zeros_like(n[0])
    left = n - centre
    apart = (~(left.norm(dim=-1) * longest < torch.finfo(ON_CPU.dtype).max)).nonzero()[:, 0]
    if len(apart):
        left[apart] = 0.0
    return left.to(ON_CPU.dtype), weight @ centre, apart


def half_log_partition(readout: ReadOut, n: Tensor, want_largest: bool) -> tuple[Tensor, Tensor | None]:
    """Log-partition and largest logit ``[R]`` of ``[R, d_read]``, by products in float16 on a processor that makes them.

    The word of the largest logit is found by rounded logits, and its logit computed again.
    """
    assert readout.products is not None
    weight, bias = readout.weight_in_terms[0], readout.bias
    left, base, apart = centred(n, readout.weight, readout.longest)
    if bias is not None:
        base += bias
    shift, above, word = (
        n.new_zeros(len(n), 1),
        n.new_full((len(n),), -torch.inf),
        torch.zeros(len(n), dtype=torch.long),
    )
    total = n.new_zeros(len(n))
    rounded, room = left.new_empty(len(n), VOCABULARY_BLOCK), n.new_empty(len(n), VOCABULARY_BLOCK)
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        rows = weight[start : start + VOCABULARY_BLOCK]
        whole = len(rows) == VOCABULARY_BLOCK
        half = torch.mm(left, rows.T, out=rounded if whole else left.new_empty(len(n), len(rows)))
        logits = room if whole else n.new_empty(half.shape)
        readout.cap_(torch.add(half, base[start : start + VOCABULARY_BLOCK], out=logits))
        if start == 0:
            shift = logits.amax(-1, keepdim=True)
        if want_largest:
            here, at = logits.max(-1)
            word, above = torch.where(here > above, at + start, word), torch.maximum(above, here)
        total += exponentials_(logits.sub_(shift)).sum(-1)
    log_z = shift[:, 0] + total.log()
    # Those apart, and those with a logit far above the shift.
    bad = ~torch.isfinite(log_z)
    bad[apart] = True
    exact = online_log_partition(readout.with_products(None), n[bad]) if bool(bad.any()) else None
    if exact is not None:
        log_z[bad] = exact[0]
    if not want_largest:
        return log_z, None
    logit = (n * readout.weight[word]).sum(-1)
    largest = readout.cap_(logit if bias is None else logit + bias[word])
    if exact is not None:
        largest[bad] = exact[1]
    return log_z, largest
