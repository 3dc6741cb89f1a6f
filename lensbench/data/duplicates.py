"""Exact and near-duplicates among texts: what splits may not share."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

GRAM_WORDS = 13


MAX_JACCARD = 0.5


def duplicate_groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """The group of each text, int64 [N]: exact and near-duplicates, and texts connected by them, have the same number.

    Two texts are near-duplicates when their words are the same, or when the Jaccard index of their sets of 13-grams of
    whitespace-separated words is above 0.5. The index is exact up to collisions of a 64-bit hash; there is no sketch.
    """
    # A gram's hash is linear in its word numbers with fixed random odd coefficients, modulo 2**64.
    coefficients = np.random.default_rng(13).integers(2**64, size=GRAM_WORDS, dtype=np.uint64) | np.uint64(1)
    numbers: dict[str, int] = {}
    first_with: dict[bytes, int] = {}
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    grams = [np.zeros(0, dtype=np.uint64)]
    sizes = np.zeros(len(texts), dtype=np.int64)  # 13-grams of each text
    for i, text in enumerate(texts):
        words = text.split()
        first = first_with.setdefault(hashlib.sha256(" ".join(words).encode()).digest(), i)
        if first != i:
            pairs.append(np.array([[first], [i]]))
        elif len(words) >= GRAM_WORDS:
            ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
            hashes = np.zeros(len(ids) - GRAM_WORDS + 1, dtype=np.uint64)
            for k, coefficient in enumerate(coefficients):
                hashes += coefficient * ids[k : k + len(hashes)]
            grams.append(np.unique(hashes))
            sizes[i] = len(grams[-1])

    _, columns, frequency = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    shared = frequency[columns] >= 2  # grams of a single text are in no intersection
    rows = np.repeat(np.arange(len(texts)), sizes)
    ones = np.ones(int(shared.sum()), dtype=np.int32)
    has = csr_array((ones, (rows[shared], columns[shared])), shape=(len(texts), len(frequency)))
    transposed = has.T.tocsr()
    for start in range(0, len(texts), 512):  # in slices: boilerplate that all texts share makes the product dense
        common = coo_array(has[start : start + 512] @ transposed)
        a, b = common.row + start, common.col
        near = (a < b) & (common.data > MAX_JACCARD * (sizes[a] + sizes[b] - common.data))
        pairs.append(np.stack([a[near], b[near]]))
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(len(texts), len(texts)))
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels
