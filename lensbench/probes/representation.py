"""What do the states of two layers have in common?"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbench.lenses.algebra import median_eigenvalue
from lensbench.lenses.moments import MOMENT_BLOCK, Moments
from lensbench.probes.catalogue import Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window

RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridges of the regressions between layers, in units of the median eigenvalue; the dev split chooses"""


def covariance_similarity(covariances: Tensor) -> Tensor:
    """Frobenius cosine of every two of K centred covariances ``[K, d, d]``: ``[K, K]`` (arXiv 2303.08112, section 4.2).

    A layer whose state is the same for all inputs (a class token before the first block) has similarity 0 with any other.
    """
    flat = covariances.flatten(1)
    flat = F.normalize(flat, dim=1, eps=1e-300)
    return flat @ flat.T


def representation(subject: Subject) -> Measured:
    """Covariance similarity of every two layers, and the share of an earlier layer that a later one carries along.

    Similarities are those of the fit split. The regressions are fitted on fit, dev chooses their ridge, and R^2 is measured
    on eval: explained variance, summed over dimensions, about the mean of the fit split. Intervals hold the fitted map
    fixed: they are of what it explains, which lies below what the best map would, by about d / (fit tokens) of the rest.
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
    """``E (h_i - m_i)(h_j - m_j)^T`` over the fit split: ``[d, d]``, float64."""
    total = torch.zeros_like(moments.covariance[0])
    for start in range(0, len(fit), MOMENT_BLOCK):
        rows = slice(start, start + MOMENT_BLOCK)
        a, b = (fit.states[k, rows].double().cpu() - moments.mean[k] for k in (i, j))
        total += a.T @ b
    return total / len(fit)


def _unexplained(captured: Capture, moments: Moments, matrix: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """Squared distance of h_i to its prediction from h_j, and to its mean: ``[N]`` each."""
    at, means = captured.states, moments.mean.to(captured.states)
    target, source = at[i] - means[i], at[j] - means[j]
    return (target - source @ matrix.to(source).T).pow(2).sum(-1), target.pow(2).sum(-1)


REPRESENTATION = Probe(
    "representation",
    representation,
    "covariance similarity of layers; how much of an earlier layer a later one still holds (linear R^2)",
    (
        Quantity(
            "covariance_similarity",
            "covariance similarity",
            "Frobenius cosine of the centred covariances of layers i < j",
            "pair",
            "At 1, the two layers vary in the same directions to the same extent.",
            panel=Panel("distance of layers", "covariance similarity", at="distance"),
        ),
        Quantity(
            "carried_share",
            "earlier state in the later one",
            "linear R^2 of h_i from h_j, i < j",
            "pair",
            "At 1, layer j still holds all that layer i held, in a linear form.",
            panel=Panel("distance of layers, $i < j$", "share of $h_i$ in $h_j$ ($R^2$)", at="distance"),
        ),
    ),
    images=True,
    topic="what later layers still hold of earlier ones",
)
