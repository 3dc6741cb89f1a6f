"""What layers have in common, and how much of a transfer penalty is only offset and scale."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import MOMENT_BLOCK, Moments
from lensbench.lenses.read import score
from lensbench.lenses.ridge import median_eigenvalue
from lensbench.measures.transfer import transfer_sums
from lensbench.probes.measured import Measured, Sums, smallest_gain
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window

RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Tried for the regressions between layers, in units of the median eigenvalue; chosen on dev."""


def covariance_similarity(covariances: Tensor) -> Tensor:
    """Frobenius cosine of centred covariances ``[K, d, d]``, every pair: ``[K, K]`` (arXiv 2303.08112, section 4.2).

    A layer that is the same for all inputs (a class token before the first block) has 0 in common with any.
    """
    flat = covariances.flatten(1)
    flat = F.normalize(flat, dim=1, eps=1e-300)
    return flat @ flat.T


@probe
def representation(subject: Subject) -> Measured:
    """Covariance similarity of all layers, and the carried-along share: linear R^2 of h_i from h_j, i < j.

    Similarities are those of the fitting tokens. The regression is fitted on fit, its ridge chosen on dev, R^2 (total
    variance explained, around the fit split's mean) measured on eval.
    """
    fit, dev, scored = subject.fit, subject.dev, subject.eval
    moments = Moments.of(fit)
    sums = Sums("representation", subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    similarity = covariance_similarity(moments.covariance)
    one = np.ones_like(sums.tokens)
    for i in range(len(similarity)):
        for j in range(i + 1, len(similarity)):
            sums.add("covariance_similarity", float(similarity[i, j]) * one, one, layer=i, other=j)
    values, vectors = moments.eigen
    units = median_eigenvalue(values)
    for j in subject.layers:
        spectrum, unit = values[j].clamp(min=0), units[j]
        for i in (layer for layer in subject.layers if layer < j):
            cross = _cross(fit, moments, i, j) @ vectors[j]  # [d, d], in the eigenbasis of layer j
            maps = [(cross / (spectrum + ridge * unit)) @ vectors[j].T for ridge in RIDGES]
            left = [float(_unexplained(dev, moments, m, i, j)[0].sum()) for m in maps]
            best = maps[int(np.argmin(left))]
            residual, total = (sum_by_window(x, scored) for x in _unexplained(scored, moments, best, i, j))
            sums.add("carried_share", total - residual, total, layer=i, other=j)
    return sums.measured()


def _cross(fit: Capture, moments: Moments, i: int, j: int) -> Tensor:
    """E (h_i - m_i)(h_j - m_j)^T, float64."""
    total = torch.zeros_like(moments.covariance[0])
    for start in range(0, len(fit), MOMENT_BLOCK):
        rows = slice(start, start + MOMENT_BLOCK)
        a, b = (fit.states[k, rows].double().cpu() - moments.mean[k] for k in (i, j))
        total += a.T @ b
    return total / len(fit)


def _unexplained(captured: Capture, moments: Moments, matrix: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """Squared distance of h_i to its prediction from h_j, and to its mean, per token ``[N]``."""
    at, means = captured.states, moments.mean.to(captured.states)
    target, source = at[i] - means[i], at[j] - means[j]
    return (target - source @ matrix.to(source).T).pow(2).sum(-1), target.pow(2).sum(-1)


@probe
def matched_transfer(subject: Subject) -> Measured:
    """Transfer with offset and scale taken out: lens i on ``(s_i / s_j)(h_j - m_j) + m_i``, mean and rms of the fit split.

    Raw minus matched penalty is the share of a penalty that is only offset and scale.
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


def matched_maps(lenses: AffineMaps, mean: Tensor, rms: Tensor, at: int) -> AffineMaps:
    """Lenses i composed with ``h -> (s_i / s_j)(h - m_j) + m_i`` for the layer j that stands ``at`` that place."""
    matrix, offset = lenses.matrix.double(), lenses.offset.double()
    scaled = (rms / rms[at])[:, None, None] * matrix
    moved = torch.einsum("mde,me->md", matrix, mean) + offset - torch.einsum("mde,e->md", scaled, mean[at])
    return AffineMaps(scaled.float(), moved.float())
