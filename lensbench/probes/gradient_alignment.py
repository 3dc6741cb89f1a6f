"""Does a block move the stream down the loss's gradient? (arXiv 1710.04773)"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, from_numpy, nn

from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.probes.catalogue import SAME_WIDTH, WITH_ITS_NULL, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.streams.stream import ResidualStream

TOKENS_AT_ONCE = 2048


IMAGES_AT_ONCE = 64


IGNORED = -100
"""The target of a prediction that counts for no loss"""


def states_and_gradients(
    stream: ResidualStream, inputs: Tensor, classes: Tensor | None = None, inside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States h_0..h_L, and minus the gradient of the summed cross-entropy with respect to h_0..h_{L-1}.

    Of token ids ``[B, T]``: ``[L+1, B, T, d]`` and ``[L, B, T, d]``. The sum runs over all positions, so that a state is
    judged by all predictions that depend on it, later ones too, but those of padding: ``inside`` ``[B, T]`` is false there
    (left out: there is none). Of images ``[B, C, H, W]`` with ``classes`` ``[B]``:
    ``[L+1, B, 1, D]`` and ``[L, B, 1, D]``, the whole state of an image as one vector (arXiv 1710.04773).
    """
    trainable = [p for p in stream.model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            if stream.pooling is None:
                states, gradients = _text_gradients(stream, inputs, inside)
            else:
                assert classes is not None
                states, gradients = _image_gradients(stream, inputs, classes)
    finally:
        for p in trainable:
            p.requires_grad_(True)
    seen = [stream.seen(h.detach()) for h in states], [-stream.seen(g) for g in gradients]
    return torch.stack(seen[0]), torch.stack(seen[1])


def _text_gradients(stream: ResidualStream, ids: Tensor, inside: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    def leaf(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hook = stream.model.get_input_embeddings().register_forward_hook(leaf)
    try:
        states, logits = stream.graph(ids)
        for h in states[:-1]:
            h.retain_grad()
        targets = ids[:, 1:] if inside is None else ids[:, 1:].masked_fill(~inside[:, 1:].to(ids.device), IGNORED)
        targets = targets.to(logits.device)
        predicted = logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(predicted, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        torch.autograd.backward(loss)
    finally:
        hook.remove()
    return states, [torch.zeros_like(h) if h.grad is None else h.grad for h in states[:-1]]


def _image_gradients(stream: ResidualStream, images: Tensor, classes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    states, logits = stream.graph(images.to(stream.input_device).requires_grad_())
    loss = F.cross_entropy(logits.float(), classes.to(logits.device), reduction="sum")
    gradients = torch.autograd.grad(loss, states[:-1])
    return [h.flatten(1)[:, None] for h in states], [g.flatten(1)[:, None] for g in gradients]


def gradient_alignment(subject: Subject) -> Measured:
    """Mean over tokens of ``cos(h_{l+1} - h_l, -dCE/dh_l)`` per block; its null takes another token's gradient.

    The other token is of another document where the batch holds one, since tokens of one text share more of their gradients
    than all tokens do. Of an image classifier it is the mean over images, with the states of all positions as one vector.
    The other image is of the same class as often as chance has it, so the null is larger where classes share a gradient.
    """
    samples = subject.samples
    if reason := _why_not(subject):
        return Measured("gradient_alignment", reason=reason)
    aligned, null = (torch.cat(batches, 1) for batches in _cosines(subject.stream, samples))  # [L, S] sums of cosines
    sums = Sums("gradient_alignment", samples, samples.valid.sum(1).astype(float))
    for name, kept in (("gradient_alignment", aligned), ("gradient_alignment_null", null)):
        for block, values in enumerate(kept.numpy()):
            sums.add(name, values, layer=block)
    sums.add("gradient_alignment_beyond_null", (aligned - null).mean(0).numpy())
    return sums.measured()


def _why_not(subject: Subject) -> str:
    """Why there is no alignment to measure; empty where there is."""
    stream, samples = subject.stream, subject.samples
    if subject.rotated:
        return "a rotated view has no blocks of its own"
    if stream.pooling is not None:
        with torch.no_grad():
            shapes = {h.shape for h in stream.graph(from_numpy(samples.scored(slice(0, 1))[0]))[0]}
        if len(shapes) > 1:
            listed = ", ".join(str(tuple(shape[1:])) for shape in sorted(shapes))
            return f"its blocks change the shape of what they are given ({listed})"
    if samples.valid.sum() < 2:
        return "there is no second prediction whose gradient could be the null"
    return ""


def elsewhere(document: Tensor, window: Tensor, generator: torch.Generator) -> Tensor:
    """For each of n tokens of a batch the number of another one, drawn from all of other documents: ``[n]``.

    ``document`` and ``window`` ``[n]`` say where a token is from. Tokens of one document, and of one window all the more,
    have gradients in common that other texts have not. Where the batch has one document, the other token is of another
    window; where it has one window, any other.
    """
    token = torch.arange(len(window))
    for of in (document, window, token):
        of = of.unique(return_inverse=True)[1]
        if len(window) == 1 or of.max() > 0:
            break
    order = of.argsort(stable=True)
    size = of.bincount()
    # The tokens of a group stand together in this order: those of others begin behind its last one.
    behind = size.cumsum(0)[of]
    drawn = (torch.rand(len(of), generator=generator) * (len(of) - size[of])).long()
    return order[(behind + drawn) % len(of)]


def _cosines(stream: ResidualStream, samples: Samples) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of cosines per block and window ``[L, n]``, batch by batch, and those with another token's gradient."""
    # Two windows at least, so that another token's gradient can be that of another window.
    per_batch = max(2, TOKENS_AT_ONCE // samples.positions_read) if stream.pooling is None else IMAGES_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    aligned: list[Tensor] = []
    null: list[Tensor] = []
    scored = samples.valid.sum(1) > 0
    # A window that would be alone in the last batch belongs to the batch before.
    starts = [k for k in range(0, len(samples), per_batch) if k == 0 or np.count_nonzero(scored[k:]) > 1]
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        rows = slice(start, end)
        ids, row, at = map(from_numpy, samples.scored(rows))
        inside = from_numpy(samples.inside[rows]) if isinstance(samples, Windows) else None
        states, descent = states_and_gradients(stream, ids, from_numpy(samples.targets(rows)), inside)
        change, descent = (states[1:] - states[:-1])[:, row, at].float(), descent[:, row, at].float()
        others = elsewhere(from_numpy(samples.documents[rows])[row], row, generator)
        for kept, other in ((aligned, descent), (null, descent[:, others.to(descent.device)])):
            cosine = F.cosine_similarity(change, other, dim=-1).double().cpu()  # [L, n]
            kept.append(torch.zeros(len(cosine), len(ids), dtype=torch.float64).index_add_(1, row, cosine))
    return aligned, null


GRADIENT_ALIGNMENT = Probe(
    "gradient_alignment",
    gradient_alignment,
    "per block, the cosine of its change with the descent of the loss",
    (
        Quantity(
            "gradient_alignment",
            "gradient alignment of block",
            "mean cosine of `h_{l+1} - h_l` and `-dCE/dh_l`",
            "layer",
            "Above its null, the block lowers the loss to first order, as a step of iterative inference would.",
            SAME_WIDTH,
            "layers",
            Panel("block (from 0)", "cosine with $-$gradient", null="gradient_alignment_null"),
        ),
        Quantity(
            "gradient_alignment_null",
            "its null",
            "the same with the gradient of a token of another document (or another image)",
            "layer",
            "It is the cosine that a direction common to all tokens gives.",
            WITH_ITS_NULL,
            "layers",
        ),
        Quantity(
            "gradient_alignment_beyond_null",
            "gradient alignment beyond its null",
            "mean over blocks of the difference of the two",
            "model",
            "Above 0, blocks lower the loss more than a direction common to all tokens would.",
            SAME_WIDTH,
        ),
    ),
    images=True,
    control="a gradient of another document",
    topic="gradients",
    version=2,
)
