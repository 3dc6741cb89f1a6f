"""Which pairs of layers the decomposition may speak of: decided on the dev split, then held fixed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lensbench.measures.update.products import Pairs
from lensbench.measures.update.quantities import Chance, Quantities
from lensbench.statistics import Array, interval

LARGEST_BASELINE = 0.9
"""B above this: the error loading of lens j is hardly below that of lens i, so their difference has no measurable shares"""

CONFIDENCE = 0.95
"""Of all falls of one model together"""

FEWEST_PAIRS, SMALLEST_SHARE = 3, 0.2
"""A model's shares are undetermined unless so many of its pairs pass the gates, and such a share of them"""

Gate = str
"""Why a pair of layers is undetermined; empty for one that passes"""

NO_FALL = "no fall"
NO_ROOM = "no room"
NOT_KEPT = "not kept"

REASONS: dict[Gate, str] = {
    NO_FALL: "KL or cross-entropy does not surely fall from the earlier layer to the later one",
    NO_ROOM: "the later lens's error loading is not below the earlier one's by enough to share it out",
    NOT_KEPT: "the earlier lens reads no more of its signal at the later layer than it would by chance",
}
"""Gate -> what it means"""


@dataclass(frozen=True)
class Losses:
    """Losses of the full lenses on dev, sums by cluster: ``kl`` and ``ce`` ``[clusters, n]``, ``tokens`` ``[clusters]``."""

    kl: Array
    ce: Array
    tokens: Array


def pairs_needed(asked: int, fewest: int = FEWEST_PAIRS, share: float = SMALLEST_SHARE) -> int:
    """How many of ``asked`` pairs of layers must pass the gates."""
    return max(fewest, int(np.ceil(share * asked)))


def falls(losses: Losses, pairs: Pairs, weights: Array) -> NDArray[np.bool_]:
    """Whether both losses surely fall from i to j, ``[P]``: lower bounds that hold for all pairs and both losses at once.

    The bounds are those of a studentised maximum (max-t) over bootstrap draws of the clusters, ``weights``
    ``[draws, clusters]``.
    """
    i, j = pairs
    both = np.concatenate([losses.kl[:, i] - losses.kl[:, j], losses.ce[:, i] - losses.ce[:, j]], 1)
    point = both.sum(0) / losses.tokens.sum()
    drawn = (weights @ both) / (weights @ losses.tokens)[:, None]
    spread = drawn.std(0, ddof=1)
    moving = spread > 0
    if not moving.any():
        return np.zeros(len(i), dtype=bool)
    largest = ((drawn - point)[:, moving] / spread[moving]).max(1)
    sure = point - np.quantile(largest, CONFIDENCE) * spread > 0
    result: NDArray[np.bool_] = sure[: len(i)] & sure[len(i) :]
    return result


def has_room(point: Quantities, draws: Quantities) -> NDArray[np.bool_]:
    """Whether ``B = 1 - room`` is at most :data:`LARGEST_BASELINE` and its interval is not wholly below 0, ``[P]``."""
    high = interval(1 - draws.room)[1]
    # A comparison with NaN is false: a ratio without a denominator has no room.
    result: NDArray[np.bool_] = (1 - point.room <= LARGEST_BASELINE) & (high >= 0)
    return result


def gates(fall: NDArray[np.bool_], room: NDArray[np.bool_], point: Quantities, chance: Chance) -> list[Gate]:
    """The gate that stops each pair, or an empty text, ``[P]``; the first that applies, in the order of :data:`REASONS`."""
    kept = point.persistence > 2 * chance.persistence
    names = []
    for falling, roomy, persisting in zip(fall, room, kept, strict=True):
        names.append(NO_FALL if not falling else NO_ROOM if not roomy else NOT_KEPT if not persisting else "")
    return names


def merged_blocks(room: NDArray[np.bool_], pairs: Pairs, count: int) -> list[tuple[int, int]]:
    """Blocks (i, j) of the layers 0..count-1, neighbours merged until the pair of their ends has room.

    A rest without room at the end joins the group before it.
    """
    roomy = {(int(i), int(j)) for i, j, r in zip(*pairs, room, strict=True) if r}
    groups: list[tuple[int, int]] = []
    start = 0
    for end in range(1, count):
        if (start, end) in roomy:
            groups.append((start, end))
            start = end
    if start < count - 1:
        first = groups.pop()[0] if groups else start
        groups.append((first, count - 1))
    return groups
