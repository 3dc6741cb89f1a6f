"""States of every layer at sampled positions, with the model's own predictions there."""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.errors import LensbenchError
from lensbench.runtime.mapped import give_back_pages, mapped
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.partition import probabilities_
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream


def refuse_overflow(h: Tensor, log_z: Tensor, window: int) -> None:
    """Raise :class:`LensbenchError` where states ``[L+1, n, d]`` or log-partitions ``[n, 1]`` are not finite."""
    if bool(torch.isfinite(h).all() & torch.isfinite(log_z).all().to(h.device)):  # one answer to wait for on a GPU
        return
    finite = torch.isfinite(h).all(-1).all(-1)
    what = "the model's logits" if bool(finite.all()) else f"the state after layer {int((~finite).nonzero()[0, 0])}"
    raise LensbenchError(
        f"{what} overflowed to NaN or infinity in or after window (or image) {window}; "
        "give the model a dtype of larger range (bfloat16 or float32)"
    )


@dataclass(frozen=True)
class Capture:
    """What lenses need of N tokens of a stream: float32, on one device.

    The token axis of every array is the same N positions, in the order of their windows. An image has one position: a
    token, its window and its document are then the image, and words are classes. p is the model's distribution, W and
    ``bias`` those of the unembedding, n a normalised state.
    """

    states: Tensor  # [L+1, N, d]
    expected: Tensor  # [N, d_read]: e = W^T p
    # KL(p || q) = entropy_term - e.n + logsumexp(W n + bias). With soft-capped logits: sum p log p alone.
    entropy_term: Tensor  # [N]: sum p log p - sum p bias
    targets: Tensor  # [N]: id of the next token
    top: Tensor  # [N]: the model's most probable next token
    model_ce: Tensor  # [N]: the model's cross-entropy, nats
    mean_p: Tensor  # [V]: mean of p over the N tokens
    constant_kl: Tensor  # [N]: KL of p from the best constant distribution, the mean p of the fitting tokens
    window: NDArray[np.int64]  # [N]: row of the windows
    document: NDArray[np.int64]  # [N]: index of the document, the cluster of every interval
    target_bytes: NDArray[np.int32]  # [N]: bytes of text of the next token
    # The processes that share the tokens; each has whole windows. Means are over the tokens of all of them.
    ranks: Ranks = ALONE

    @property
    def layers(self) -> int:
        """Number L of layers; h_0 is not counted."""
        return len(self.states) - 1

    def __len__(self) -> int:
        return self.states.shape[1]

    def take(self, tokens: Tensor, memory_gib: float = float("inf")) -> "Capture":
        """The capture of the given tokens (indices or mask [N]); ``mean_p`` stays that of all tokens.

        States above ``memory_gib`` GiB lie in a file, see :func:`room_for`.
        """
        at = tokens.cpu().numpy()
        states = self._states_of(tokens, len(self.window[at]), memory_gib)
        return Capture(
            states, self.expected[tokens], self.entropy_term[tokens], self.targets[tokens],
            self.top[tokens], self.model_ce[tokens], self.mean_p, self.constant_kl[tokens], self.window[at],
            self.document[at], self.target_bytes[at], self.ranks,
        )  # fmt: skip

    def _states_of(self, tokens: Tensor, count: int, memory_gib: float) -> Tensor:
        layers, _, d = self.states.shape
        if 4 * layers * count * d <= memory_gib * 2**30:
            return self.states[:, tokens]
        states = room_for((layers, count, d), self.states.device, memory_gib)
        for row, own in zip(states, self.states, strict=True):
            row.copy_(own[tokens])
            give_back_pages()
        return states

    @property
    def tokens(self) -> int:
        """Number of tokens of all processes."""
        return self.ranks.span(len(self))[1]

    def chosen(self, tokens: Tensor) -> "Capture":
        """As :meth:`take`, for sorted indices into the tokens of all processes."""
        before, _ = self.ranks.span(len(self))
        return self.take(tokens[(tokens >= before) & (tokens < before + len(self))] - before)


def predictions(
    readout: ReadOut, logits: Tensor, target: Tensor, constant: Tensor | None, log_z: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """What a :class:`Capture` keeps of the logits ``[n, V]`` of n tokens, by field, and the sum of p, float64 ``[V]``.

    The logits are overwritten. ``target`` ``[n]``: next tokens. ``constant`` ``[V]``: logarithm of the constant
    distribution; without it ``constant_kl`` lacks the term sum mean_p log mean_p, the same for all tokens. ``log_z``
    ``[n, 1]``: log-partitions, if they are known.
    """
    log_z = logits.logsumexp(-1, keepdim=True) if log_z is None else log_z
    bias = readout.bias
    best, losses = logits.argmax(-1), (log_z - logits.gather(-1, target[:, None]))[:, 0]
    p = probabilities_(logits.sub_(log_z))  # in place: fresh memory for [n, V] costs as much as filling it
    # logsumexp over many words has an error of 1e-5; a p that sums to 1 + 1e-5 would move every KL by 1e-5 log Z.
    p.div_(p.sum(-1, keepdim=True))
    negative_entropy = -torch.special.entr(p).sum(-1)
    found = {
        "expected": p @ readout.weight,
        "entropy_term": negative_entropy - (p @ bias if bias is not None and readout.linear else 0.0),
        "targets": target,
        "top": best,
        "model_ce": losses,
        "constant_kl": negative_entropy - (p @ constant if constant is not None else 0.0),
    }
    return found, p.sum(0).double()


@dataclass
class _Collector:
    """Collects the tokens of one capture, batch by batch."""

    stream: ResidualStream
    samples: Samples
    constant: Tensor | None
    """Logarithm of the constant distribution [V], or None"""
    tokens: int
    room: Callable[[tuple[int, int, int]], Tensor]
    """Makes the tensor that states are kept in"""
    mean_p: Tensor
    """Sum of p so far, float64 [V]"""
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    done: int = 0
    """Tokens so far"""
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Field of :class:`Capture` -> its values of every batch"""

    def add(self, rows: slice) -> None:
        """Run the model on some samples and keep what it says at their scored positions."""
        stream, samples = self.stream, self.samples
        inputs, row_at, at = (torch.from_numpy(x).to(stream.device) for x in samples.scored(rows))
        if stream.float32 and stream.half is None:
            h, logits = stream.at(inputs, row_at, at)
        else:  # the model's own logits have two or three digits, its states give more
            h = stream.states_at(inputs, row_at, at, half=stream.half is not None)
            if stream.half is not None and not bool(torch.isfinite(h).all()):  # a product beyond the range of float16
                h = stream.states_at(inputs, row_at, at)
            logits = stream.readout(h[-1])
        target = torch.from_numpy(samples.targets(rows)).to(stream.device)
        log_z = logits.logsumexp(-1, keepdim=True)
        found, total_p = predictions(stream.readout, logits, target, self.constant, log_z)
        if self.done == 0:
            shape = (stream.layers + 1, self.tokens, stream.d_model)
            self.states = self.room(shape)
        refuse_overflow(h, log_z, rows.start)
        # From here on nothing can run out of memory and leave half of a batch in the capture.
        self.states[:, self.done : self.done + len(at)] = h
        self.done += len(at)
        self.mean_p += total_p
        for name, part in found.items():
            self.parts.setdefault(name, []).append(part)


@torch.no_grad()
def capture(
    stream: ResidualStream,
    samples: Samples,
    *,
    constant: Tensor | None = None,
    batch: int = 16,
    memory_gib: float = float("inf"),
    room: Callable[[tuple[int, int, int]], Tensor] | None = None,
    report: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Capture:
    """The states and predictions of ``stream`` at the scored positions of ``samples``, windows of text or images.

    One forward pass for each ``batch`` of samples; a batch that does not fit into memory is halved. With several ``ranks``
    each process captures its own samples; ``mean_p`` is over all of them.

    States above ``memory_gib`` GiB lie in a memory-mapped file of their size in the folder for temporary files
    (``TMPDIR``). The file disappears with the states. ``room(shape)``: makes the float32 tensor of the states instead.

    ``constant`` ``[V]``: the distribution that ``constant_kl`` is measured from, ``mean_p`` of the fitting tokens. By
    default it is that of the captured tokens. ``report(done, total)`` is called with numbers of samples. Raises
    :class:`LensbenchError` where states overflow, and where one sample or the states do not fit.
    """
    log_constant = None if constant is None else constant.double().clamp(min=1e-300).log().float().to(stream.device)
    own = ranks.share(len(samples))
    valid = samples.valid[own]
    found = _Collector(
        stream,
        samples,
        constant=log_constant,
        tokens=int(valid.sum()),
        room=room or partial(room_for, device=stream.device, memory_gib=memory_gib),
        mean_p=torch.zeros(stream.vocab_size, dtype=torch.float64, device=stream.device),
    )

    def one(rows: slice) -> None:
        found.add(rows)
        give_back_pages()
        if report is not None:
            report(rows.stop - own.start, own.stop - own.start)

    in_pieces(own, batch, one, what="a sequence of the capture")
    window = np.nonzero(valid)[0]
    mean_p = ranks.sum(found.mean_p)
    mean_p /= ranks.span(len(window))[1]
    window += own.start
    joined = {name: torch.cat(parts) for name, parts in found.parts.items()}
    if constant is None:
        joined["constant_kl"] = joined["constant_kl"] - (mean_p * mean_p.clamp(min=1e-300).log()).sum().float()
    return Capture(
        states=found.states,
        mean_p=mean_p.float(),
        window=window,
        document=samples.documents[window],
        target_bytes=samples.next_bytes[own][valid],
        ranks=ranks,
        **joined,
    )


def room_for(shape: tuple[int, int, int], device: torch.device, memory_gib: float) -> Tensor:
    """An uninitialised float32 tensor; on the CPU and above ``memory_gib`` GiB it lies in a memory-mapped, deleted file."""
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
        return mapped(Path(file.name), shape, np.float32)
