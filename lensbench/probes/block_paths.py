"""How much does the model need each block, their order, and all of them at once? (arXiv 1605.06431)"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lensbench.data.samples import Samples
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity
from lensbench.probes.gradient_alignment import IMAGES_AT_ONCE
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.block_places import swapped, why_not_swapped
from lensbench.statistics import Array
from lensbench.streams.parts import block_input
from lensbench.streams.stream import ResidualStream

TOKENS_AT_ONCE = 8192


RANDOM_SETS = 4
"""Number of random sets of n blocks that are skipped together, for each n"""


@contextmanager
def skipping(blocks: list[nn.Module]) -> Iterator[None]:
    """A context in which the blocks return what they receive."""

    def unchanged(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        h = block_input(args, kwargs)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    hooks = [block.register_forward_hook(unchanged, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_paths(subject: Subject) -> Measured:
    """Rise of the model's own cross-entropy, nats/token, with a block deleted, two neighbours swapped, n blocks skipped.

    An ensemble of shallow paths loses little by any of these; a chain of steps that build on each other loses everything. A
    deleted block returns all that it receives, even if its skip connections carry less; keys and values that later blocks
    share with it stay. A swapped block keeps the mask, the rotary embedding and the inputs of its own layer. For each n four
    random sets of blocks are drawn; intervals hold them fixed.
    """
    stream, windows = subject.stream, subject.samples
    blocks = list(stream.blocks)
    if subject.rotated or not blocks:
        what = "a rotated view has no blocks of its own" if subject.rotated else no_blocks(stream)
        return Measured("block_paths", reason=what)
    whole = cross_entropy(stream, windows)
    sums = Sums("block_paths", windows, windows.valid.sum(1).astype(float))
    for k, block in enumerate(blocks):
        with skipping([block]):
            sums.add("ce_rise_deleted", cross_entropy(stream, windows) - whole, layer=k)
    for k in range(len(blocks) - 1):
        if reason := why_not_swapped(stream, k):
            sums.undefined("ce_rise_swapped", reason, layer=k, other=k + 1)
            continue
        with swapped(stream, k):
            sums.add("ce_rise_swapped", cross_entropy(stream, windows) - whole, layer=k, other=k + 1)
    rng = np.random.default_rng(0)
    for n in range(2, len(blocks)):
        each = []
        for _ in range(RANDOM_SETS):
            with skipping([blocks[k] for k in rng.choice(len(blocks), n, replace=False)]):
                each.append(cross_entropy(stream, windows) - whole)
        sums.add("ce_rise_skipped", np.mean(each, axis=0), other=n)
    return sums.measured()


@torch.no_grad()
def cross_entropy(stream: ResidualStream, windows: Samples) -> Array:
    """Sum of the model's own cross-entropy over the scored positions of each window (or image), nats: ``[S]``."""
    per_batch = max(1, TOKENS_AT_ONCE // windows.positions_read) if stream.pooling is None else IMAGES_AT_ONCE
    sums = []
    for start in range(0, len(windows), per_batch):
        rows = slice(start, start + per_batch)
        inputs, row, at = map(torch.from_numpy, windows.scored(rows))
        _, logits = stream.at(inputs, row, at)
        targets = torch.from_numpy(windows.targets(rows)).to(logits.device)
        nats = -logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
        sums.append(torch.zeros(len(inputs), dtype=torch.float64).index_add_(0, row, nats))
    return torch.cat(sums).numpy()


BLOCK_PATHS = Probe(
    "block_paths",
    block_paths,
    "rise of the model's own loss with blocks deleted, swapped or skipped together",
    (
        Quantity(
            "ce_rise_deleted",
            "rise of CE, block deleted",
            "CE with the block replaced by the identity, minus the model's CE (nats/token)",
            "layer",
            "Near 0, the model does without the block.",
            SAME_TOKENIZER,
            panel=Panel("block deleted (from 0)", "rise of CE (nats/token)", symlog=True),
        ),
        Quantity(
            "ce_rise_swapped",
            "rise of CE, blocks swapped",
            "CE with two neighbouring blocks in each other's place, minus the model's CE (nats/token)",
            "pair",
            "Near 0, the order of the two blocks does not matter.",
            SAME_TOKENIZER,
            panel=Panel("blocks swapped: first of two", "rise of CE (nats/token)", symlog=True),
        ),
        Quantity(
            "ce_rise_skipped",
            "rise of CE, blocks skipped",
            "CE with n random blocks skipped together, minus the model's CE (nats/token); `other` is n",
            "blocks",
            "A slow rise with n speaks for many shallow paths, a steep one for a chain of steps.",
            SAME_TOKENIZER,
            panel=Panel("blocks skipped together", "rise of CE (nats/token)", at="other", symlog=True),
        ),
    ),
    images=True,
    topic="blocks",
    version=2,
)
