"""How much of a transfer penalty is only offset and scale?"""

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import score
from lensbench.measures.transfer import transfer_sums
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity
from lensbench.probes.measured import Measured, Sums, smallest_gain
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import NOTHING
from lensbench.streams.kl import sum_by_window


def matched_transfer(subject: Subject) -> Measured:
    """Transfer with offset and scale matched: lens i reads ``(s_i / s_j)(h_j - m_j) + m_i`` at layer j.

    Means m and rms s are those of the fit split. A layer whose state is the same everywhere (a class token before the first
    block) has no scale, and says nothing: lens i reads ``m_i`` there.
    """
    fit, scored = subject.fit, subject.eval
    layers, readout = subject.layers, subject.stream.readout
    mean = fit.states.mean(1, dtype=torch.float64)
    rms = torch.stack([(h.double() - m).pow(2).sum(-1).mean().sqrt() for h, m in zip(fit.states, mean, strict=True)])
    lenses = subject.lenses[layers]
    raw = transfer_sums(readout, scored, subject.lenses, lenses=layers, layers=layers, movement=False)
    matched = np.zeros_like(raw.kl)
    for at, j in enumerate(layers):
        scores = score(readout, scored.states[j], matched_maps(lenses, mean[layers], rms[layers], at), scored)
        matched[:, :, at] = sum_by_window(scores.kl, scored).T
    sums = Sums("matched_transfer", subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    own = np.diagonal(raw.kl, axis1=1, axis2=2)
    for a, i in enumerate(layers):
        for b, j in enumerate(layers):
            sums.add("matched_penalty", matched[:, a, b] - own[:, b], layer=i, other=j)
    if len(layers) < 2:
        for name in ("offset_and_scale_share", "gain_visibility_matched"):
            sums.undefined(name, NOTHING)
        return sums.measured()
    off = ~np.eye(len(layers), dtype=bool)
    floor = smallest_gain(scored)
    penalty = (raw.kl - own[:, None, :])[:, off].mean(1)
    lost = (raw.kl - matched)[:, off].mean(1)
    sums.add("offset_and_scale_share", lost, penalty, floor=floor)
    earlier, later = np.triu_indices(len(layers), k=1)
    gain = (own[:, earlier] - own[:, later]).mean(1)
    seen = (own[:, earlier] - matched[:, earlier, later]).mean(1)
    sums.add("gain_visibility_matched", seen, gain, floor=floor)
    return sums.measured()


CONSTANT = 1e-6
"""Share of the mean's size below which a layer's rms about it is that of rounding"""


def matched_maps(lenses: AffineMaps, mean: Tensor, rms: Tensor, at: int) -> AffineMaps:
    """Lenses i composed with ``h -> (s_i / s_j)(h - m_j) + m_i``, j being number ``at`` of ``mean`` and ``rms``.

    The scale ``s_i / s_j`` is 0 where layer j is constant: to divide by what rounding leaves would give any numbers.
    """
    matrix, offset = lenses.matrix.double(), lenses.offset.double()
    constant = bool(rms[at] <= CONSTANT * mean[at].norm())
    scaled = (torch.zeros_like(rms) if constant else rms / rms[at])[:, None, None] * matrix
    moved = torch.einsum("mde,me->md", matrix, mean) + offset - torch.einsum("mde,e->md", scaled, mean[at])
    return AffineMaps(scaled.float(), moved.float())


MATCHED_TRANSFER = Probe(
    "matched_transfer",
    matched_transfer,
    "transfer with offset and scale of the states matched",
    (
        Quantity(
            "matched_penalty",
            "matched penalty",
            "KL of lens i on the matched state of layer j, minus the KL of lens j there (nats/token)",
            "pair",
            "What is left of a transfer penalty is more than offset and scale.",
            SAME_TOKENIZER,
        ),
        Quantity(
            "offset_and_scale_share",
            "share of offset and scale",
            "raw minus matched penalty, by the raw penalty, over all pairs of layers",
            "model",
            "At 1, layers differ by nothing but offset and scale.",
        ),
        Quantity(
            "gain_visibility_matched",
            "matched gain visibility",
            "gain visibility with matched states, over all pairs i < j",
            "model",
            "Above the raw gain visibility, part of what lens i does not see of layer j's gain is offset and scale.",
        ),
    ),
    images=True,
)
