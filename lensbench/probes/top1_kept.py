"""How many of a model's predictions stay where a block is deleted, or exchanged with the next one?"""

import numpy as np
import torch
from numpy.typing import NDArray

from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.lenses.recipe import spread_layers
from lensbench.probes.block_paths import skipping
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity, of_model
from lensbench.probes.gradient_alignment import IMAGES_AT_ONCE
from lensbench.probes.guess_and_refine import Chance
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.block_places import swapped, why_not_swapped
from lensbench.statistics import Array
from lensbench.streams.stream import ResidualStream

WINDOWS = 32
"""Windows (or images) that are looked at, at most"""

BLOCKS = 8
"""Blocks that are deleted, and pairs of neighbours that are exchanged, at most: evenly spread"""

LOGITS = 2**26
"""Logits in memory at once: 256 MiB in float32"""


def top1_kept(subject: Subject) -> Measured:
    """Share of positions whose top-1 stays the same without a block, or with two neighbours in each other's place.

    As in arXiv 2406.19384, and at every position of at most 32 windows. What is changed is as in the probes ``block_paths``
    and ``block_order``, which measure the loss. Chance is exact: the top-1 against that of each position of other documents.
    Passes of the model: 1 + 2 * 8 at most.
    """
    stream, name = subject.stream, "top1_kept"
    if subject.rotated or not stream.blocks:
        return Measured(
            name, reason="a rotated view has no blocks of its own" if subject.rotated else no_blocks(stream)
        )
    few = subject.samples.spread(WINDOWS)
    whole, window = top_words(stream, few)
    if (whole < 0).any():
        return Measured(name, reason="undefined: the model's logits overflow")
    places = np.bincount(window, minlength=len(few)).astype(float)
    sums = Sums(name, few, places)
    deletions = spread_layers(stream.layers, BLOCKS) if stream.layers > 1 else [0]
    pairs = spread_layers(stream.layers - 1, BLOCKS) if stream.layers > 2 else list(range(stream.layers - 1))
    named = f"{name}-{subject.name}" if subject.name else name
    with subject.progress.task(named, len(deletions) + len(pairs), "blocks") as task:

        def kept() -> Array:
            task.update(len(deleted) + len(exchanged) + 1)
            same = top_words(stream, few)[0] == whole
            return np.bincount(window, same, len(few)).astype(float)

        deleted: dict[int, Array] = {}
        exchanged: dict[int, Array | str] = {}
        for k in deletions:
            with skipping([stream.blocks[k]]):
                deleted[k] = kept()
        for k in pairs:
            reason = why_not_swapped(stream, k)
            if reason:
                exchanged[k] = reason
                continue
            with swapped(stream, k):
                exchanged[k] = kept()
    by_chance = Chance(whole, few.documents[window], stream.vocab_size).of(whole)
    sums.add("top1_kept_chance", np.bincount(window, by_chance, len(few)).astype(float))
    _add(sums, deleted, exchanged, stream.layers)
    return sums.measured()


def _add(sums: Sums, deleted: dict[int, Array], exchanged: dict[int, Array | str], layers: int) -> None:
    """Add what was kept of each window ``[S]``, by block and by pair, and means over them."""
    for k, kept in deleted.items():
        sums.add("top1_kept_deleted", kept, layer=k)
    for k, answer in exchanged.items():
        if isinstance(answer, str):
            sums.undefined("top1_kept_swapped", answer, layer=k, other=k + 1)
        else:
            sums.add("top1_kept_swapped", answer, layer=k, other=k + 1)
    means = {
        "deleted_mean": list(deleted.values()),
        "deleted_middle": [kept for k, kept in deleted.items() if 0 < k < layers - 1],
        "swapped_mean": [kept for kept in exchanged.values() if not isinstance(kept, str)],
    }
    for what, parts in means.items():
        if parts:
            sums.add(f"top1_kept_{what}", np.mean(parts, axis=0))
        else:
            sums.undefined(f"top1_kept_{what}", NOTHING)
    if means["swapped_mean"]:
        change = np.mean(means["swapped_mean"], axis=0) - np.mean(means["deleted_mean"], axis=0)
        sums.add("top1_kept_swapped_minus_deleted", change)
    else:
        sums.undefined("top1_kept_swapped_minus_deleted", NOTHING)


NOTHING = "undefined: it has no such blocks"


@torch.no_grad()
def top_words(stream: ResidualStream, samples: Samples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The model's top-1 at every position of every window, and the window of each, ``[N]``; -1 where logits overflow.

    Of images: the most probable class of each.
    """
    text = samples if isinstance(samples, Windows) else None
    length = 1 if text is None else text.positions_read
    per_batch = IMAGES_AT_ONCE if text is None else max(1, LOGITS // stream.vocab_size // length)
    words, windows = [], []
    for start in range(0, len(samples), per_batch):
        rows = slice(start, start + per_batch)
        inputs, row, at = samples.scored(rows)
        if text is not None:
            row, at = np.nonzero(text.inside[rows])
        _, logits = stream.at(*map(torch.from_numpy, (inputs, row, at)))
        highest, word = logits.max(-1)
        words.append(torch.where(highest.isfinite(), word, -1).cpu().numpy())
        windows.append(row + start)
    return np.concatenate(words), np.concatenate(windows)


TOP1_KEPT = Probe(
    "top1_kept",
    top1_kept,
    "share of the model's predictions that stay with a block deleted, or exchanged with the next one",
    (
        Quantity(
            "top1_kept_deleted",
            "top-1 kept, block deleted",
            "share of positions whose top-1 is the same with the block replaced by the identity",
            "layer",
            "Near 1, the model does without the block.",
            SAME_TOKENIZER,
            panel=Panel("block deleted (from 0)", "top-1 kept"),
        ),
        Quantity(
            "top1_kept_swapped",
            "top-1 kept, blocks exchanged",
            "share of positions whose top-1 is the same with two neighbouring blocks in each other's place",
            "pair",
            "Near 1, the order of the two does not matter.",
            SAME_TOKENIZER,
            panel=Panel("blocks exchanged: first of two", "top-1 kept"),
        ),
        of_model(
            "top1_kept_chance",
            "top-1 kept by chance",
            "share of positions of other documents that have the same top-1",
            "What a prediction that knows nothing of its text would keep.",
        ),
        of_model(
            "top1_kept_deleted_mean",
            "top-1 kept, one block deleted",
            "mean of `top1_kept_deleted` over at most 8 blocks",
            "Published: 0.72 to 0.95, higher in models with more blocks.",
        ),
        of_model(
            "top1_kept_deleted_middle",
            "the same without the first and the last block",
            "mean of `top1_kept_deleted` over those of the 8 that are neither first nor last",
            "Above the mean over all, both ends are needed most.",
        ),
        of_model(
            "top1_kept_swapped_mean",
            "top-1 kept, neighbours exchanged",
            "mean of `top1_kept_swapped` over at most 8 pairs",
            "Near 1, neighbouring blocks only add.",
        ),
        of_model(
            "top1_kept_swapped_minus_deleted",
            "neighbours exchanged - one deleted",
            "`top1_kept_swapped_mean` minus `top1_kept_deleted_mean`, same positions",
            "Above 0, a block is needed more than its place.",
        ),
    ),
    images=True,
    control="predictions of other documents",
    topic="blocks",
)
