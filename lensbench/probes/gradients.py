"""Does a block move the stream down the loss's gradient? (arXiv 1710.04773)"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensbench.probes import Measured, Subject, Sums, probe
from lensbench.stream import ResidualStream

TOKENS_AT_ONCE = 2048


def states_and_gradients(stream: ResidualStream, ids: Tensor) -> tuple[Tensor, Tensor]:
    """h_0..h_L and minus the gradient of the summed next-token cross-entropy with respect to h_0..h_{L-1}.

    ``[L+1, B, T, d]`` and ``[L, B, T, d]``, from one backward pass. The sum runs over all positions: what a block writes at
    a token is judged by all predictions that it enters, later ones too.
    """
    model, trainable = stream.model, [p for p in stream.model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)

    def leaf(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            states, logits = stream.graph(ids)
            for h in states[:-1]:
                h.retain_grad()
            targets = ids[:, 1:].to(logits.device)
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum").backward()
            gradients = [torch.zeros_like(h) if h.grad is None else h.grad for h in states[:-1]]
    finally:
        hook.remove()
        for p in trainable:
            p.requires_grad_(True)
    seen = [stream.seen(h.detach()) for h in states], [-stream.seen(g) for g in gradients]
    return torch.stack(seen[0]), torch.stack(seen[1])


@probe
def gradient_alignment(subject: Subject) -> Measured:
    """Per block the mean over tokens of ``cos(h_{l+1} - h_l, -dCE/dh_l)``; its null takes another token's gradient.

    Positive beyond its null: the block's change lowers the loss to first order, as a step of iterative inference would.
    """
    stream, windows = subject.stream, subject.windows
    if subject.rotated:
        return Measured("gradient_alignment", reason="a rotated view has no blocks of its own")
    per_batch = max(1, TOKENS_AT_ONCE // windows.ids.shape[1])
    generator = torch.Generator().manual_seed(0)
    aligned: list[Tensor] = []
    null: list[Tensor] = []
    for start in range(0, len(windows.ids), per_batch):
        rows = slice(start, start + per_batch)
        ids, row, at = map(torch.from_numpy, windows.scored(rows))
        states, descent = states_and_gradients(stream, ids)
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
