"""Intervals and means, one home for each: bootstrap over clusters, ratios of sums, Student's t, jackknife, half-widths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

# Reading
FEWEST_CLUSTERS = 64
"""Of fewer clusters the intervals are not to be trusted."""


def half_width(sums: np.ndarray, tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Half-width of the 95 % interval of means (of penalties, say), clusters being documents: ``[lenses, layers]``, nats.

    From per-window sums ``[S, lenses, layers]``, token counts ``[S]`` and document numbers ``[S]``; the linearised
    variance of a ratio, which the bootstrap over documents approaches. Infinite for fewer than two documents.
    """
    known, index = np.unique(documents, return_inverse=True)
    if len(known) < 2:
        return np.full(sums.shape[1:], np.inf)
    clusters, sizes = np.zeros((len(known), *sums.shape[1:])), np.zeros(len(known))
    np.add.at(clusters, index, sums)
    np.add.at(sizes, index, tokens)
    mean = clusters.sum(0) / sizes.sum()
    residual = clusters - mean * sizes[:, None, None]
    variance = (residual**2).sum(0) * len(known) / (len(known) - 1) / sizes.sum() ** 2
    return 1.96 * np.sqrt(variance)


Array = NDArray[np.float64]


def bootstrap_weights(clusters: int, draws: int, seed: int) -> Array:
    """How often each cluster is drawn: ``[draws, clusters]``, the same for every model measured on the same clusters."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(float)


def interval(draws: Array) -> tuple[Array, Array]:
    """95 % percentile interval along the first axis."""
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return low, high


def few_clusters(clusters: int) -> str:
    """The warning beside an interval over so many clusters; nothing where there are enough."""
    return f"only {clusters} clusters: interval not to be trusted" if clusters < FEWEST_CLUSTERS else ""


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value per seed, with its 95 % Student-t interval."""
    mean, half = (
        float(np.mean(values)),
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5,
    )
    return mean, mean - float(half), mean + float(half)


def ratio_with_interval(
    sums: NDArray[np.float64], per: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``sum(sums) / sum(per)`` over clusters with its 95 % interval: (low, value, high), each of ``sums.shape[1:]``."""
    flat = sums.reshape(len(sums), -1)
    low, high = interval((weights @ flat) / (weights @ per)[:, None])
    shape = sums.shape[1:]
    return low.reshape(shape), (flat.sum(0) / per.sum()).reshape(shape), high.reshape(shape)


def mean_with_interval(values: Tensor, document: NDArray[np.int64], draws: int) -> tuple[float, float, float]:
    """Mean over tokens ``[N]`` with its 95 % interval over documents: (low, mean, high)."""
    sums = np.bincount(document, weights=values.double().cpu().numpy()).astype(float)
    counts = np.bincount(document).astype(float)
    low, mean, high = ratio_with_interval(sums, counts, bootstrap_weights(len(counts), draws, 0))
    return float(low), float(mean), float(high)


def leaving_one_out(top: Array, bottom: Array) -> tuple[float, Array]:
    """``sum top / sum bottom`` over K groups, and the same without each of them ``[K]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(top.sum() / bottom.sum()), (top.sum() - top) / (bottom.sum() - bottom)


def jackknife(value: Array, without: Array) -> tuple[Array, Array]:
    """95 % intervals ``[Q]`` of values ``[Q]`` whose estimates without each of K groups are ``[K, Q]`` (t, K - 1)."""
    folds = len(without)
    spread = np.sqrt((folds - 1) / folds * np.square(without - without.mean(0)).sum(0))
    reach = stats.t.ppf(0.975, folds - 1) * spread
    return value - reach, value + reach
