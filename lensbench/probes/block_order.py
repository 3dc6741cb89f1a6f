"""Does the order of the middle blocks matter? If any order will do, blocks only add; they do not build on each other."""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from lensbench.data.samples import Samples
from lensbench.lenses.recipe import spread_layers
from lensbench.probes.block_paths import cross_entropy, skipping
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity, of_model
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.block_places import exchanged, reordered, why_not_reordered
from lensbench.runtime.progress import Task
from lensbench.statistics import Array

WINDOWS = 64
"""Windows (or images) that are looked at, at most"""


BLOCKS = 6
"""Swaps of neighbours, and deletions of single blocks, at most: evenly spread over the middle"""


RANDOM_ORDERS = 4
"""Random orders of all middle blocks, at most"""


def block_order(subject: Subject) -> Measured:
    """Rise of the model's own cross-entropy, nats/token, with its middle blocks in other orders.

    The first and the last block stay. The others change places: two neighbours, all of them in reverse, all of them at
    random. A block takes the mask, the rotary embedding and the inputs of its own layer with it. All rises are of the same
    tokens, so that intervals are of paired differences; they hold the random orders fixed. Next to them stands the rise with
    one middle block deleted: what a block adds, whatever its place. Passes of the model: at most 2 + 2 * 6 + 4 over 64
    windows, in batches of 8192 tokens; nothing else is kept.
    """
    stream, name = subject.stream, "block_order"
    if subject.rotated:
        return Measured(name, reason="a rotated view has no blocks of its own")
    if not stream.blocks:
        return Measured(name, reason=no_blocks(stream))
    if stream.layers < 4:
        return Measured(
            name, reason=f"it has {stream.layers} blocks: the middle needs two, between the first and the last"
        )
    few = subject.samples.spread(WINDOWS)
    middle = range(1, stream.layers - 1)
    firsts = [middle[k] for k in spread_layers(len(middle) - 1, BLOCKS)]
    singles = [middle[k] for k in spread_layers(len(middle), BLOCKS)]
    orders = random_orders(stream.layers)
    sums = Sums(name, few, few.valid.sum(1).astype(float))
    passes = 2 + len(firsts) + len(singles) + len(orders)
    with subject.progress.task(f"{name}-{subject.name}" if subject.name else name, passes, "orders") as task:
        rises = _Rises(subject, few, task)
        swaps = [(k, rises.of(exchanged(stream.layers, k))) for k in firsts]
        found = {
            "swapped": _mean([rise for _, rise in swaps]),
            "reversed": rises.of([0, *reversed(middle), stream.layers - 1]),
            "shuffled": _mean([rises.of(order) for order in orders]),
        }
        deleted = _mean([rises.inside(skipping([stream.blocks[k]])) for k in singles])
    for k, rise in swaps:
        _add(sums, "order_rise_exchanged", rise, layer=k, other=k + 1)
    _add(sums, "order_rise_deleted", deleted)
    for what, rise in found.items():
        _add(sums, f"order_rise_{what}", rise)
        _add(sums, f"order_{what}_minus_deleted", _minus(rise, deleted))
    return sums.measured()


Rise = Array | str
"""Rise of the cross-entropy of each window, nats, ``[S]``; or why there is none"""


class _Rises:
    """Rises of the cross-entropy over that of the model as it is, on the same samples."""

    def __init__(self, subject: Subject, samples: Samples, task: Task):
        self.stream, self.samples, self.task, self.done = subject.stream, samples, task, 0
        self.whole = self._cross_entropy()

    def _cross_entropy(self) -> Array:
        nats = cross_entropy(self.stream, self.samples)
        self.done += 1
        self.task.update(self.done)
        return nats

    def inside(self, changed: AbstractContextManager[None]) -> Array:
        """The rise in a context that changes the model."""
        with changed:
            return self._cross_entropy() - self.whole

    def of(self, order: list[int]) -> Rise:
        """The rise with the blocks in another order, or why they have no meaning in it."""
        return why_not_reordered(self.stream, order) or self.inside(reordered(self.stream, order))


def random_orders(layers: int) -> list[list[int]]:
    """At most :data:`RANDOM_ORDERS` orders of blocks 0..layers-1: all differ, the first and the last block stay.

    The order of the model and its reverse are not among them, where there are others.
    """
    middle = list(range(1, layers - 1))
    there = math.factorial(len(middle))
    taken = {tuple(middle), tuple(reversed(middle))} if there > 2 else {tuple(middle)}
    if there - len(taken) <= RANDOM_ORDERS:
        drawn = [order for order in itertools.permutations(middle) if order not in taken]
    else:
        rng, drawn = np.random.default_rng(0), []
        while len(drawn) < RANDOM_ORDERS:
            order = tuple(rng.permutation(middle).tolist())
            if order not in taken:
                taken.add(order)
                drawn.append(order)
    return [[0, *order, layers - 1] for order in drawn]


def _mean(rises: Sequence[Rise]) -> Rise:
    """The mean of rises; where one of them has a reason instead, that reason."""
    reasons = [rise for rise in rises if isinstance(rise, str)]
    if reasons:
        return reasons[0]
    mean: Array = np.mean([rise for rise in rises if not isinstance(rise, str)], axis=0)
    return mean


def _minus(rise: Rise, other: Rise) -> Rise:
    """Their difference, or the first reason."""
    if isinstance(rise, str) or isinstance(other, str):
        return rise if isinstance(rise, str) else other
    return rise - other


def _add(sums: Sums, quantity: str, rise: Rise, layer: int | None = None, other: int | None = None) -> None:
    if isinstance(rise, str):
        sums.undefined(quantity, rise, layer=layer, other=other)
    else:
        sums.add(quantity, rise, layer=layer, other=other)


BLOCK_ORDER = Probe(
    "block_order",
    block_order,
    "rise of the model's own loss with its middle blocks in another order",
    (
        Quantity(
            "order_rise_exchanged",
            "rise of CE, middle blocks exchanged",
            "CE with two neighbours of the middle in each other's place, minus the model's CE (nats/token)",
            "pair",
            "Near 0, the second does not need the first.",
            SAME_TOKENIZER,
            panel=Panel("middle blocks exchanged: first of two", "rise of CE (nats/token)", symlog=True),
        ),
        of_model(
            "order_rise_deleted",
            "rise of CE, one middle block deleted",
            "mean over at most 6 middle blocks of CE without the block, minus the model's CE (nats/token)",
            "What a block adds, whatever its place.",
        ),
        of_model(
            "order_rise_swapped",
            "rise of CE, neighbours exchanged",
            "mean of `order_rise_exchanged` over at most 6 pairs of neighbours (nats/token)",
            "At 0, neighbouring blocks only add.",
        ),
        of_model(
            "order_swapped_minus_deleted",
            "neighbours exchanged - one deleted",
            "`order_rise_swapped` minus `order_rise_deleted`, same tokens (nats/token)",
            "Below 0, a block is needed more than its place.",
        ),
        of_model(
            "order_rise_reversed",
            "rise of CE, middle reversed",
            "CE with all middle blocks in reverse order, minus the model's CE (nats/token)",
            "At 0, the middle blocks only add: no block needs an earlier one.",
        ),
        of_model(
            "order_reversed_minus_deleted",
            "middle reversed - one deleted",
            "`order_rise_reversed` minus `order_rise_deleted`, same tokens (nats/token)",
            "Below 0, all the order together is worth less than one block.",
        ),
        of_model(
            "order_rise_shuffled",
            "rise of CE, middle shuffled",
            "mean over at most 4 random orders of the middle blocks of CE, minus the model's CE (nats/token)",
            "At 0, the middle blocks only add; intervals hold the orders fixed.",
        ),
        of_model(
            "order_shuffled_minus_deleted",
            "middle shuffled - one deleted",
            "`order_rise_shuffled` minus `order_rise_deleted`, same tokens (nats/token)",
            "Below 0, the order is worth less than one block.",
        ),
    ),
    images=True,
    control="one block deleted",
    topic="order of blocks",
)
