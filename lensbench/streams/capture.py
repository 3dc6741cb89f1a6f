"""States of every layer at sampled positions, with what the model predicted there."""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.errors import LensbenchError
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.stream import ResidualStream


def refuse_overflow(h: Tensor, log_z: Tensor, window: int) -> None:
    """Raise :class:`LensbenchError` where states ``[L+1, n, d]`` or log-partitions of the model's logits are not finite."""
    finite = torch.isfinite(h).all(-1).all(-1)
    if not bool(finite.all()):
        what = f"the state behind layer {int((~finite).nonzero()[0, 0])}"
    elif not bool(torch.isfinite(log_z).all()):
        what = "the model's logits"
    else:
        return
    raise LensbenchError(
        f"{what} overflowed to NaN or infinity in or behind window (or image) {window}; "
        "give the model a dtype of larger range (bfloat16 or float32)"
    )


@dataclass(frozen=True)
class Capture:
    """What the lenses need to know of N tokens of a stream; float32, on one device.

    Every array's token axis is the same N positions, in the order of the windows they came from. Of images there is one
    position each: what is called a token, its window and its document here is then an image, and words are classes.
    """

    states: Tensor  # [L+1, N, d]
    expected: Tensor  # [N, d_read]: e = W^T p
    # Where logits are soft-capped, sum p log p alone.
    entropy_term: Tensor  # [N]: sum p log p - sum p bias: KL(p || q) = entropy_term - e.n + logsumexp(W n + bias)
    targets: Tensor  # [N]: the next token's id
    top: Tensor  # [N]: the model's own most probable next token
    model_ce: Tensor  # [N]: the model's own cross-entropy, nats
    mean_p: Tensor  # [V]: mean of p over the N tokens
    constant_kl: Tensor  # [N]: KL of p from the best constant distribution, that of the fitting tokens
    window: np.ndarray  # [N]: row of the windows
    document: np.ndarray  # [N]: index of the document, the cluster of every interval
    target_bytes: np.ndarray  # [N]: bytes of text that the next token stands for
    # The processes that the tokens are shared out among, each with whole windows of its own; means are over all of them.
    ranks: Ranks = ALONE

    @property
    def layers(self) -> int:
        return len(self.states) - 1

    def __len__(self) -> int:
        return self.states.shape[1]

    def take(self, tokens: Tensor) -> "Capture":
        """The given tokens (indices or mask [N]) alone; ``mean_p`` stays that of all."""
        at = tokens.cpu().numpy()
        return Capture(
            self.states[:, tokens], self.expected[tokens], self.entropy_term[tokens], self.targets[tokens],
            self.top[tokens], self.model_ce[tokens], self.mean_p, self.constant_kl[tokens], self.window[at],
            self.document[at], self.target_bytes[at], self.ranks,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of all processes."""
        return self.ranks.span(len(self))[1]

    def chosen(self, tokens: Tensor) -> "Capture":
        """As :meth:`take`, by sorted numbers among the tokens of all processes."""
        before, _ = self.ranks.span(len(self))
        return self.take(tokens[(tokens >= before) & (tokens < before + len(self))] - before)


@torch.no_grad()
def capture(
    stream: ResidualStream,
    samples: Samples,
    *,
    constant: Tensor | None = None,
    batch: int = 16,
    memory_gib: float = float("inf"),
    report: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Capture:
    """One forward pass per batch of windows of text, or of images, kept at the chosen positions only.

    Out of memory, batches are halved. Of several ``ranks`` each captures its own windows; ``mean_p`` is that of all.

    States that would take more than ``memory_gib`` GiB lie in a memory-mapped file of just their size, in the folder for
    temporary files (``TMPDIR``), which is gone when they are.

    ``constant`` ``[V]`` is the distribution that ``constant_kl`` is measured from: ``mean_p`` of the fitting tokens. Left
    out, it is that of the captured tokens themselves. ``report(done, total)`` is called with numbers of windows or images.
    """
    weight, bias = stream.readout.weight, stream.readout.bias
    expected: list[Tensor] = []
    entropy: list[Tensor] = []
    targets: list[Tensor] = []
    top: list[Tensor] = []
    ce: list[Tensor] = []
    constant_kl: list[Tensor] = []
    states, done = torch.empty(0), 0
    log_constant = None if constant is None else constant.double().clamp(min=1e-300).log().float().to(stream.device)
    mean_p = torch.zeros(stream.vocab_size, dtype=torch.float64, device=stream.device)
    own = ranks.share(len(samples))
    total, valid = own.stop - own.start, samples.valid[own]

    def one(rows: slice) -> None:
        nonlocal states, done, mean_p
        inputs, row_at, at = (torch.from_numpy(x).to(stream.device) for x in samples.scored(rows))
        h, logits = stream.at(inputs, row_at, at, read_out=stream.float32)
        if not stream.float32:  # the model's own logits have two or three digits, its states give more
            logits = stream.readout(h[-1].float())
        target = torch.from_numpy(samples.targets(rows)).to(stream.device)
        log_z = logits.logsumexp(-1, keepdim=True)
        best, losses = logits.argmax(-1), (log_z - logits.gather(-1, target[:, None]))[:, 0]
        p = logits.sub_(log_z).exp_()  # in place: fresh memory for [n, V] costs as much as filling it
        # logsumexp over many words is off by 1e-5; a p that sums to 1 + 1e-5 would move every KL by 1e-5 log Z.
        p.div_(p.sum(-1, keepdim=True))
        negative_entropy = -torch.special.entr(p).sum(-1)
        if done == 0:
            shape = (stream.layers + 1, int(valid.sum()), stream.d_model)
            states = room_for(shape, stream.device, memory_gib)
        refuse_overflow(h, log_z, rows.start)
        aim, total_p = p @ weight, p.sum(0).double()
        entropy_term = negative_entropy - (p @ bias if bias is not None and stream.readout.linear else 0.0)
        # Without a constant given, its cross term has the same mean: sum p log mean_p, added below.
        from_constant = negative_entropy - (p @ log_constant if log_constant is not None else 0.0)
        # From here on nothing can run out of memory and leave half of a batch behind.
        states[:, done : done + len(at)] = h
        done += len(at)
        mean_p += total_p
        kept = (expected, aim), (entropy, entropy_term), (targets, target), (top, best), (ce, losses)
        for parts, part in (*kept, (constant_kl, from_constant)):
            parts.append(part)
        if report is not None:
            report(rows.stop - own.start, total)

    in_pieces(own, batch, one, what="a sequence of the capture")
    window = np.nonzero(valid)[0]
    mean_p = ranks.sum(mean_p)
    mean_p /= ranks.span(len(window))[1]
    window += own.start
    from_constant = torch.cat(constant_kl)
    if constant is None:
        from_constant = from_constant - (mean_p * mean_p.clamp(min=1e-300).log()).sum().float()
    return Capture(
        states=states,
        expected=torch.cat(expected),
        entropy_term=torch.cat(entropy),
        targets=torch.cat(targets),
        top=torch.cat(top),
        model_ce=torch.cat(ce),
        mean_p=mean_p.float(),
        constant_kl=from_constant,
        window=window,
        document=samples.documents[window],
        target_bytes=samples.next_bytes[own][valid],
        ranks=ranks,
    )


def room_for(shape: tuple[int, int, int], device: torch.device, memory_gib: float) -> Tensor:
    """An empty float32 tensor; on the CPU, one of more than ``memory_gib`` GiB is a memory-mapped file without a name."""
    size = math.prod(shape)
    if device.type != "cpu" or 4 * size <= memory_gib * 2**30:
        return torch.empty(shape, device=device)
    with tempfile.NamedTemporaryFile(prefix="lensbench-states-") as file:
        free = shutil.disk_usage(file.name).free
        if free < 4 * size:
            raise LensbenchError(
                f"the states take {4 * size / 2**30:.1f} GiB, more than memory_gib allows in memory and more than the "
                f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}; set TMPDIR to a larger disk or fit fewer tokens"
            )
        return torch.from_file(file.name, shared=True, size=size).view(shape)
