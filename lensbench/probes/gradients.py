"""Does a block move the stream down the loss's gradient? (arXiv 1710.04773)"""

import torch
import torch.nn.functional as F
from torch import Tensor, from_numpy, nn

from lensbench.probes.measured import Measured, Sums
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.streams.stream import ResidualStream

TOKENS_AT_ONCE = 2048


IMAGES_AT_ONCE = 64


def states_and_gradients(
    stream: ResidualStream, inputs: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_0..h_L and minus the gradient of the summed cross-entropy with respect to h_0..h_{L-1}, from one backward pass.

    Of token ids ``[B, T]``: ``[L+1, B, T, d]`` and ``[L, B, T, d]``; the sum runs over all positions: what a block writes at
    a token is judged by all predictions that it enters, later ones too. Of images ``[B, C, H, W]``, of ``classes``
    ``[B]``: ``[L+1, B, 1, D]``, the whole state of an image as one vector, as arXiv 1710.04773 has it.
    """
    trainable = [p for p in stream.model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            if stream.pooling is None:
                states, gradients = _text_gradients(stream, inputs)
            else:
                assert classes is not None
                states, gradients = _image_gradients(stream, inputs, classes)
    finally:
        for p in trainable:
            p.requires_grad_(True)
    seen = [stream.seen(h.detach()) for h in states], [-stream.seen(g) for g in gradients]
    return torch.stack(seen[0]), torch.stack(seen[1])


def _text_gradients(stream: ResidualStream, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    def leaf(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hook = stream.model.get_input_embeddings().register_forward_hook(leaf)
    try:
        states, logits = stream.graph(ids)
        for h in states[:-1]:
            h.retain_grad()
        targets = ids[:, 1:].to(logits.device)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum").backward()
    finally:
        hook.remove()
    return states, [torch.zeros_like(h) if h.grad is None else h.grad for h in states[:-1]]


def _image_gradients(stream: ResidualStream, images: Tensor, classes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    states, logits = stream.graph(images.to(stream.input_device).requires_grad_())
    loss = F.cross_entropy(logits.float(), classes.to(logits.device), reduction="sum")
    gradients = torch.autograd.grad(loss, states[:-1])
    return [h.flatten(1)[:, None] for h in states], [g.flatten(1)[:, None] for g in gradients]


@probe
def gradient_alignment(subject: Subject) -> Measured:
    """Per block the mean over tokens of ``cos(h_{l+1} - h_l, -dCE/dh_l)``; its null takes another token's gradient.

    Of an image classifier: the mean over images, of all positions' states together; the other image is of the same class as
    often as chance has it, which makes the null larger where classes share a gradient.

    Positive beyond its null: the block's change lowers the loss to first order, as a step of iterative inference would.
    """
    stream, windows = subject.stream, subject.samples
    if subject.rotated:
        return Measured("gradient_alignment", reason="a rotated view has no blocks of its own")
    if stream.pooling is not None:
        with torch.no_grad():
            shapes = {h.shape for h in stream.graph(from_numpy(windows.scored(slice(0, 1))[0]))[0]}
        if len(shapes) > 1:
            told = ", ".join(str(tuple(shape[1:])) for shape in sorted(shapes))
            return Measured("gradient_alignment", reason=f"its blocks change the shape of what they are given ({told})")
    # Two windows at least: the other token, whose gradient is the null, is then not always of the same text.
    per_batch = max(2, TOKENS_AT_ONCE // windows.positions_read) if stream.pooling is None else IMAGES_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    aligned: list[Tensor] = []
    null: list[Tensor] = []
    counts = windows.valid.sum(1)
    starts = [k for k in range(0, len(windows), per_batch) if k == 0 or counts[k:].sum() > 1]
    if counts.sum() < 2:
        return Measured("gradient_alignment", reason="there is no second prediction whose gradient could be the null")
    for start, end in zip(starts, [*starts[1:], len(windows)], strict=True):
        rows = slice(start, end)  # the last batch takes in a prediction that would be alone, its own null
        ids, row, at = map(from_numpy, windows.scored(rows))
        states, descent = states_and_gradients(stream, ids, from_numpy(windows.targets(rows)))
        change, descent = (states[1:] - states[:-1])[:, row, at].float(), descent[:, row, at].float()
        # Another token of the batch: a shift by a random amount has no token keep its own.
        shift = int(torch.randint(1, max(2, len(row)), (1,), generator=generator))
        for kept, other in ((aligned, descent), (null, descent.roll(shift, 1))):
            cosine = F.cosine_similarity(change, other, dim=-1).double().cpu()  # [L, n]
            kept.append(torch.zeros(len(cosine), len(ids), dtype=torch.float64).index_add_(1, row, cosine))
    tokens = windows.valid.sum(1).astype(float)
    sums = Sums("gradient_alignment", windows, tokens)
    for name, kept in (("gradient_alignment", aligned), ("gradient_alignment_null", null)):
        for block, values in enumerate(torch.cat(kept, 1).numpy()):
            sums.add(name, values, layer=block)
    difference = (torch.cat(aligned, 1) - torch.cat(null, 1)).mean(0).numpy()
    sums.add("gradient_alignment_beyond_null", difference)
    return sums.measured()
