"""The metric in which readings of lenses are compared: how far a change of state moves the model's distribution."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensbench.measures.update.undefined import Undefined
from lensbench.streams.capture import Capture
from lensbench.streams.gram import add_gram_
from lensbench.streams.readout import ReadOut

MetricKind = Literal["fisher", "logit", "euclidean", "whitened"]
"""``fisher``: the read-out's mean Fisher information. ``logit``: squared differences of logits. ``euclidean``: of what the
norm passes on. ``whitened``: in units of the covariance of the final state."""

SOFTCAP_TOKENS = 1024
"""Tokens at most that the Fisher metric of soft-capped logits is a mean of: each needs all its logits"""

SMALLEST_EIGENVALUE = 1e-9
"""Relative to the largest: directions below are null directions of a metric, or of a covariance that is inverted"""


@dataclass(frozen=True)
class Metric:
    """A metric ``G = F^T F`` of states ``[d]``: squared lengths are those of ``F h``."""

    name: str
    """As tables name it: the kind, and ``fisher, soft-capped`` where the slope of the cap enters."""
    factor: Tensor
    """F ``[k, d]``, float64 on the CPU, k the rank of G"""

    @classmethod
    def of(cls, kind: MetricKind, readout: ReadOut, captured: Capture) -> "Metric":
        """The metric of a read-out on the (fitting) tokens of ``captured``.

        Fisher: ``G = D^T (W^T diag(pbar) W - E e e^T) D``, D the gain of the norm (with its centring, if it centres), pbar
        the mean p and ``e = W^T p``; the scale of the norm is left out, all products being compared with one another. With
        soft-capped logits z their slope ``t = 1 - (z / cap)^2`` enters: ``E[W^T diag(t) (diag p - p p^T) diag(t) W]``.

        Raises :class:`Undefined` where the norm is no gain over a scale.
        """
        gain = readout.gain(captured.states.shape[-1])
        if gain is None:
            raise Undefined("undefined: the final norm is not a matrix over a scale, so that readings have no metric")
        gain, name = gain.double().cpu(), str(kind)
        if kind == "euclidean":
            inner = torch.eye(len(gain), dtype=torch.float64)
        elif kind == "logit":
            weight = readout.weight.double()
            inner = torch.cov(weight.T, correction=0).cpu()
        elif kind == "whitened":
            return cls(name, whitening(covariance_of(captured.states[-1])))
        elif readout.linear:
            inner = _fisher(readout, captured)
        else:
            inner, name = _fisher_of_capped(readout, captured), "fisher, soft-capped"
        return cls(name, factor_of(gain.T @ inner @ gain))


def factor_of(metric: Tensor) -> Tensor:
    """F ``[k, d]`` with ``F^T F`` the given symmetric ``[d, d]``, its null directions left out."""
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    seen = values > SMALLEST_EIGENVALUE * values[-1]
    factor: Tensor = values[seen].sqrt()[:, None] * vectors[:, seen].T
    return factor


def whitening(covariance: Tensor) -> Tensor:
    """F ``[k, d]`` with ``F C F^T = 1`` on the directions in which the covariance C ``[d, d]`` is not null."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    seen = values > SMALLEST_EIGENVALUE * values[-1]
    factor: Tensor = vectors[:, seen].T / values[seen].sqrt()[:, None]
    return factor


def covariance_of(states: Tensor) -> Tensor:
    """Covariance ``[d, d]`` of states ``[N, d]`` in float64 on the CPU."""
    mean = states.mean(0, dtype=torch.float64)
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64, device=states.device)
    for rows in states.split(4096):
        centred = rows.double() - mean
        add_gram_(total, centred)
    return (total / len(states)).cpu()


def _fisher(readout: ReadOut, captured: Capture) -> Tensor:
    """``W^T diag(pbar) W - E e e^T`` ``[d_read, d_read]``."""
    weight, p = readout.weight, captured.mean_p
    total = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows, share in zip(weight.split(8192), p.to(weight.device).split(8192), strict=True):
        wide = rows.double()
        add_gram_(total, wide, share.double()[:, None] * wide)
    ranks = captured.ranks
    aims = captured.expected.new_zeros(total.shape, dtype=torch.float64)
    for rows in captured.expected.split(8192):
        wide = rows.double()
        add_gram_(aims, wide)
    return total.cpu() - ranks.sum(aims.cpu()) / ranks.span(len(captured))[1]


@torch.no_grad()
def _fisher_of_capped(readout: ReadOut, captured: Capture) -> Tensor:
    """``E[W^T diag(t) (diag p - p p^T) diag(t) W]`` of at most :data:`SOFTCAP_TOKENS` tokens, spread over the capture."""
    cap = readout.softcap
    assert cap is not None
    ranks, here = captured.ranks, len(captured)
    before, tokens = ranks.span(here)
    chosen = torch.linspace(0, tokens - 1, min(tokens, SOFTCAP_TOKENS), dtype=torch.float64).round().long().unique()
    mine = chosen[(chosen >= before) & (chosen < before + here)] - before
    weight = readout.weight
    diagonal = torch.zeros(len(weight), dtype=torch.float64)
    outer = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in captured.states[-1][mine.to(captured.states.device)].split(64):
        logits = readout(rows)
        p, slope = logits.softmax(-1), 1 - (logits / cap) ** 2
        diagonal += (p * slope**2).sum(0).double().cpu()
        seen = ((p * slope) @ weight).double().cpu()
        outer += seen.T @ seen
    total = torch.zeros_like(outer)
    for words, share in zip(weight.split(8192), ranks.sum(diagonal).split(8192), strict=True):
        wide = words.double().cpu()
        add_gram_(total, wide, share[:, None] * wide)
    return (total - ranks.sum(outer)) / len(chosen)
