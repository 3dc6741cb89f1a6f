"""Held-out states of the update decomposition: their clusters, the bootstrap draws of the clusters, and sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.measures.update.folds import Readings
from lensbench.measures.update.products import Products, cluster_products, means_of, pairs_of
from lensbench.measures.update.quantities import Chance, Quantities, quantities
from lensbench.statistics import Array, bootstrap_weights
from lensbench.streams.capture import Capture

DRAWS = 1000
"""Bootstrap draws of the clusters"""


def cluster_numbers(captured: Capture) -> tuple[Tensor, int]:
    """The number of each token's document among those of the capture, ``[N]``, and how many documents there are."""
    known, number = np.unique(captured.document, return_inverse=True)
    return torch.from_numpy(number), len(known)


@dataclass(frozen=True)
class HeldOut:
    """Held-out states, centred on their own means, with their clusters and bootstrap draws."""

    states: Tensor
    layers: Sequence[int]
    means: Tensor
    cluster: Tensor
    clusters: int
    weights: Array

    @classmethod
    def of(cls, captured: Capture, layers: Sequence[int]) -> "HeldOut":
        """All tokens of a capture."""
        means = means_of(captured.states, [*layers, captured.layers])
        cluster, clusters = cluster_numbers(captured)
        return cls(captured.states, layers, means, cluster, clusters, bootstrap_weights(clusters, DRAWS, 0))

    def products(self, maps: Readings, *, old: bool = True) -> Products:
        """Sums by cluster; ``old``: see :func:`cluster_products`."""
        return cluster_products(self.states, self.layers, self.means, self.cluster, self.clusters, maps, old=old)

    def quantities(self, sums: Products, chance: Chance) -> tuple[Quantities, Quantities]:
        """The point estimate, and the draws."""
        pairs = pairs_of(len(self.layers))
        return quantities(sums.total(), pairs, chance), quantities(sums.drawn(self.weights), pairs, chance)

    def by_cluster(self, captured: Capture, of_windows: Array) -> Array:
        """Sums ``[clusters, K]`` of sums by window ``[S, K]``: windows of one document are added up."""
        first = np.flatnonzero(np.diff(captured.window, prepend=captured.window[0] - 1))
        sums = np.zeros((self.clusters, of_windows.shape[1]))
        np.add.at(sums, self.cluster.numpy()[first], of_windows)
        return sums
