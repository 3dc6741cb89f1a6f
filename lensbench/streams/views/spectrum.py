"""How many directions the states of each layer fill, and how they grow: what tells a view's stream from the model's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lensbench.streams.capture import Capture
from lensbench.streams.gram import add_gram_

TOKENS = 4096
"""Tokens of a block in float64"""


@dataclass(frozen=True)
class LayerSpectrum:
    """The states of one layer of a capture, over the tokens of all processes."""

    layer: int
    participation: float
    """Participation ratio of the covariance, ``(sum of eigenvalues)^2 / sum of their squares``: 1 to d"""
    effective_rank: float
    """Exponential of the entropy of the eigenvalues, as shares (Roy & Vetterli 2007)"""
    rms: float
    """Root of the mean squared norm, the mean state included"""
    growth: float
    """rms over that of the layer before; NaN at layer 0"""


@torch.no_grad()
def covariances(captured: Capture, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Covariances ``[n, d, d]`` and means ``[n, d]`` of the states of n layers, float64 on the CPU, of all processes."""
    ranks, tokens = captured.ranks, captured.tokens
    found, means = [], []
    for layer in layers:
        total = captured.states.new_zeros(captured.states.shape[-1], dtype=torch.float64)
        for rows in captured.states[layer].split(TOKENS):
            total += rows.double().sum(0)
        mean = ranks.sum(total) / tokens
        second = mean.new_zeros(len(mean), len(mean))
        for rows in captured.states[layer].split(TOKENS):
            centred = rows.double() - mean
            add_gram_(second, centred)
        found.append((ranks.sum(second) / tokens).cpu())
        means.append(mean.cpu())
    return torch.stack(found), torch.stack(means)


def spectrum(captured: Capture) -> list[LayerSpectrum]:
    """The spectrum of every layer 0..L of a capture; NaN where a layer's states are all the same."""
    found: list[LayerSpectrum] = []
    for layer in range(captured.layers + 1):
        (covariance,), (mean,) = covariances(captured, [layer])
        values = torch.linalg.eigvalsh(covariance).clamp(min=0)
        share = values / values.sum()
        rms = float((values.sum() + mean @ mean).sqrt())
        before = found[-1].rms if found else float("nan")
        found.append(
            LayerSpectrum(
                layer=layer,
                participation=float(1 / share.square().sum()),
                effective_rank=float(torch.special.entr(share).sum().exp()),
                rms=rms,
                growth=rms / before if before else float("nan"),
            )
        )
    return found
