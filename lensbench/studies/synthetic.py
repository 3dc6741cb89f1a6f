"""Synthetic residual streams of known answer, to test the instrument and to calibrate its verdicts.

Every family has an answer: ``width`` normal entries, partly shared by the tokens of a document. Layers 0..L-1 hold the
answer with noise ``sigma_l`` in the way that the family's name says. Layer L is the answer itself, where the read-out looks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lensbench.data.windows import Windows
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut

Truth = Literal["refinement", "carry-along", "re-representation", "mixed"]


class RMSNorm(nn.Module):
    """Root-mean-square norm of the first ``len(gain)`` entries; the others are dropped."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised entries: ``[..., >= R]`` to ``[..., R]``."""
        x = x[..., : len(self.gain)]
        return self.gain * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def orthogonal(d: int, random: torch.Generator) -> Tensor:
    """A rotation of d dimensions, drawn from the Haar measure, float32 ``[d, d]``."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))
    rotation: Tensor = (q * r.diagonal().sign()).float()
    return rotation


def turned(d: int, angle: float, random: torch.Generator) -> Tensor:
    """A rotation that turns each of ``d // 2`` random planes by ``angle``, float32 ``[d, d]``."""
    basis = orthogonal(d, random).double()
    cos, sin = np.cos(angle), np.sin(angle)
    blocks = [torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)] * (d // 2)
    blocks += [torch.eye(1, dtype=torch.float64)] * (d % 2)
    rotation: Tensor = (basis @ torch.block_diag(*blocks) @ basis.T).float()
    return rotation


def read_out(
    d: int, vocab: int, *, norm: str = "rms", read: int | None = None, gain: bool = True, bias: bool = False,
    logits: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> ReadOut:  # fmt: skip
    """A random read-out of states of width ``d``. As in language models, some directions hardly show in any logit.

    ``norm``: 'rms' (of the first ``read`` entries of the state) or 'layer'. ``logits``: standard deviation of the logits.
    """
    random = torch.Generator().manual_seed(seed)
    width = read or d
    weights = torch.exp(0.3 * torch.randn(width, generator=random)) if gain else torch.ones(width)
    module: nn.Module = RMSNorm(weights)
    if norm == "layer":
        module = nn.LayerNorm(d)
        with torch.no_grad():
            module.weight.copy_(weights)
            module.bias.copy_(0.2 * torch.randn(d, generator=random))
    head = nn.Linear(width, vocab, bias=bias)
    with torch.no_grad():
        spectrum = torch.logspace(0, -1.5, width)
        weight = (torch.randn(vocab, width, generator=random) * spectrum) @ orthogonal(width, random).T
        head.weight.copy_(weight * logits / spectrum.norm())
        if bias:
            head.bias.copy_(torch.randn(vocab, generator=random))
    made: ReadOut = ReadOut(module, head).requires_grad_(False).to(dtype)
    return made


def answers(tokens: int, width: int, random: torch.Generator, *, per_document: int, shared: float = 0.2) -> Tensor:
    """Standard normal answers ``[tokens, width]``; the tokens of a document correlate by ``shared``, documents do not."""
    of_document = torch.randn(-(-tokens // per_document), width, generator=random)
    own = torch.randn(tokens, width, generator=random)
    made: Tensor = (1 - shared) ** 0.5 * own + shared**0.5 * of_document.repeat_interleave(per_document, 0)[:tokens]
    return made


@dataclass(frozen=True)
class Shape:
    """Size of a stream, and the noise of its first and last layers (standard deviations)."""

    d: int = 48
    layers: int = 6
    vocab: int = 200
    first_noise: float = 1.6
    last_noise: float = 0.3


class SyntheticStream:
    """A stream of one family of :data:`STREAM_FAMILIES`; all its samples share directions and read-out.

    Raises ValueError for an unknown family, and where ``d`` leaves no slice for each layer.
    """

    def __init__(self, family: str, shape: Shape = Shape(), *, seed: int = 0):
        if family not in STREAM_FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(STREAM_FAMILIES)}")
        self.family, self.shape, self.layers, self.d = family, shape, shape.layers, shape.d
        random = torch.Generator().manual_seed(seed + 17)
        layers, d = shape.layers, shape.d
        sliced = STREAM_FAMILIES[family].sliced
        self.slice = d // (layers + 2) if sliced else 0
        if sliced and not self.slice:
            raise ValueError(f"d is {d}: too narrow for {layers} slices and the answer")
        self.width = d - layers * self.slice  # of the answer
        # Every family draws the same directions, whether it uses them or not.
        self.bases = [orthogonal(d, random) for _ in range(layers)]
        self.parts = [torch.randn(self.width, self.slice, generator=random) / self.width**0.5 for _ in range(layers)]
        self.halves = [orthogonal(d - d // 2, random) for _ in range(layers)]
        plane_seed = int(torch.randint(2**31, (1,), generator=random))
        self.turns = [
            turned(d, np.pi / 4 * k / max(1, layers - 1), torch.Generator().manual_seed(plane_seed))
            for k in range(layers)
        ]
        self.jitters = [turned(d, np.pi / 6, torch.Generator().manual_seed(plane_seed + 1 + k)) for k in range(layers)]
        self.stretches = [
            torch.exp(torch.linspace(-0.7, 0.7, d))[torch.randperm(d, generator=random)] for _ in range(layers)
        ]
        self.noise = torch.linspace(shape.first_noise, shape.last_noise, layers)
        self.readout = read_out(d, shape.vocab, read=self.width, seed=seed)

    def states(self, tokens: int, *, seed: int, per_document: int = 8) -> Tensor:
        """A sample of the stream's states, ``[L+1, tokens, d]``."""
        random = torch.Generator().manual_seed(1000 + seed)

        def normal() -> Tensor:
            return torch.randn(tokens, self.width, generator=random)

        answer = answers(tokens, self.width, random, per_document=per_document)
        return torch.stack(STREAM_FAMILIES[self.family].draw(self, answer, normal))

    def capture(self, tokens: int, *, seed: int, per_document: int = 8, constant: Tensor | None = None) -> Capture:
        """A sample of :meth:`states` with what the read-out predicts from it; see :func:`capture_of`."""
        states = self.states(tokens, seed=seed, per_document=per_document)
        return capture_of(self.readout, states, per_document=per_document, constant=constant, seed=seed)


Normal = Callable[[], Tensor]
"""Draws new normal entries, ``[tokens, width]``"""


def noisy(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """The answer with new noise at every layer 0..L-1."""
    return [answer + s * normal() for s in stream.noise]


def rotated_by(stream: SyntheticStream, answer: Tensor, normal: Normal, rotations: Iterable[Tensor]) -> list[Tensor]:
    """h_0..h_L: noisy answers, each of the layers 0..L-1 in a basis of ``rotations``."""
    return [*((answer + s * normal()) @ q.T for s, q in zip(stream.noise, rotations, strict=True)), answer]


def fresh(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """The answer with new noise at every layer."""
    return [*noisy(stream, answer, normal), answer]


def removed(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Every layer removes a part of the noise."""
    h = [answer]
    for step in torch.diff(stream.noise.flip(0) ** 2, prepend=torch.zeros(1)).sqrt():
        h.append(h[-1] + step * normal())
    return h[::-1]


def added(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Every layer adds a part of the answer."""
    layers = stream.layers
    parts = torch.stack([normal() for _ in range(layers)])
    # Parts whose sum is the answer: a bridge from nothing to the answer.
    parts = parts - parts.mean(0) + answer * layers**-0.5
    parts = torch.cat([parts, normal()[None]])
    answer = parts.sum(0) / (layers + 1) ** 0.5
    return [*(parts.cumsum(0)[:-1] / (layers + 1) ** 0.5), answer]


def averaged(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Layer l is the mean of l + 1 noisy copies."""
    copies = torch.stack([answer + stream.noise[0] * normal() for _ in range(stream.layers)])
    return [*(copies.cumsum(0) / torch.arange(1, stream.layers + 1)[:, None, None]), answer]


def in_slices(stream: SyntheticStream, answer: Tensor, written: Callable[[int], Tensor]) -> list[Tensor]:
    """h_0..h_L: block l writes ``written(l)`` to its own slice, the last block writes the answer where the head looks."""
    store = torch.zeros(len(answer), stream.d)
    h = []
    for layer in range(stream.layers):
        start = stream.width + layer * stream.slice
        store[:, start : start + stream.slice] = written(layer)
        h.append(store.clone())
    store[:, : stream.width] = answer
    return [*h, store]


def disjoint(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Block l writes an ever better copy to its own slice, the last block to the slice that the read-out sees."""
    return in_slices(stream, answer, lambda layer: (answer + stream.noise[layer] * normal()) @ stream.parts[layer])


def filed(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """As ``disjoint``, but each block files its own part of the answer, and the last one reads them all."""

    def written(layer: int) -> Tensor:
        # Its own entries, spread over all of the answer.
        entries = (torch.arange(stream.slice) * stream.layers + layer) % stream.width
        return (answer + stream.noise[-1] * normal()) @ torch.eye(stream.width)[:, entries]

    return in_slices(stream, answer, written)


def overlapping(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Block l adds its copy in its own random directions, on top of all others."""
    written = rotated_by(stream, answer, normal, stream.bases)[:-1]
    return [*torch.stack(written).cumsum(0), answer]


def rebased(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Every layer has its own random basis."""
    return rotated_by(stream, answer, normal, stream.bases)


def restretched(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Every layer has its own random linear map, which is no rotation."""
    sizes = zip(stream.noise, stream.stretches, stream.bases, strict=True)
    return [*(((answer + s * normal()) * stretch) @ q.T for s, stretch, q in sizes), answer]


def drifting(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """The basis turns by 45 degrees over the layers."""
    return rotated_by(stream, answer, normal, stream.turns)


def half_rebased(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """One basis for the first half of the layers, another for the second half."""
    two = [stream.bases[0] if k < stream.layers / 2 else stream.bases[1] for k in range(stream.layers)]
    return rotated_by(stream, answer, normal, two)


def partly_rebased(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Half of the answer's entries in a random basis for each layer, the other half in one basis."""
    h, half = noisy(stream, answer, normal), stream.d // 2
    for state, q in zip(h, stream.halves, strict=True):
        state[:, half:] = state[:, half:] @ q.T
    return [*h, answer]


def partly_carried(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """Half of the answer's entries refined, half carried along in overlapping random directions."""
    h, half = noisy(stream, answer, normal), stream.d // 2
    carried = torch.zeros(len(answer), stream.d - half)
    for state, q in zip(h, stream.halves, strict=True):
        carried = carried + state[:, half:] @ q.T
        state[:, half:] = carried
    return [*h, answer]


def jittered(stream: SyntheticStream, answer: Tensor, normal: Normal) -> list[Tensor]:
    """The basis of each layer is turned by 30 degrees in its own random planes."""
    return rotated_by(stream, answer, normal, stream.jitters)


@dataclass(frozen=True)
class StreamFamily:
    """A way to write an answer into the layers of a stream, and the verdict that it deserves."""

    truth: Truth
    draw: Callable[[SyntheticStream, Tensor, Normal], list[Tensor]]
    """States h_0..h_L, each ``[tokens, d]``, for an answer ``[tokens, width]``"""
    sliced: bool = False
    """Whether the state has a slice for each layer, next to the answer"""


STREAM_FAMILIES: dict[str, StreamFamily] = {
    "fresh": StreamFamily("refinement", fresh),
    "removed": StreamFamily("refinement", removed),
    "added": StreamFamily("refinement", added),
    "disjoint": StreamFamily("carry-along", disjoint, sliced=True),
    "overlapping": StreamFamily("carry-along", overlapping),
    "rebased": StreamFamily("re-representation", rebased),
    "averaged": StreamFamily("refinement", averaged),
    "filed": StreamFamily("carry-along", filed, sliced=True),
    "restretched": StreamFamily("re-representation", restretched),
    "drifting": StreamFamily("mixed", drifting),
    "half-rebased": StreamFamily("mixed", half_rebased),
    "partly-rebased": StreamFamily("mixed", partly_rebased),
    "partly-carried": StreamFamily("mixed", partly_carried),
    "jittered": StreamFamily("mixed", jittered),
}
"""Name of a family of synthetic streams -> the family."""


@torch.no_grad()
def capture_of(
    readout: ReadOut, states: Tensor, *, per_document: int = 8, constant: Tensor | None = None, seed: int = 0
) -> Capture:
    """The :class:`Capture` of states ``[L+1, N, d]``, computed by definition in float64.

    A document has two windows. Next tokens are drawn from the read-out of the last state.
    """
    n = states.shape[1]
    log_p = readout(states[-1]).double().log_softmax(-1)
    p = log_p.exp()
    mean_p = p.mean(0)
    random = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(p, 1, generator=random)[:, 0]
    weight = readout.weight.double()
    entropy = (p * log_p).sum(-1)
    base = entropy if readout.bias is None or not readout.linear else entropy - p @ readout.bias.double()
    from_constant = entropy - p @ (mean_p if constant is None else constant.double()).log()
    dtype = states.dtype
    token = np.arange(n)
    return Capture(
        states=states,
        expected=(p @ weight).to(dtype),
        entropy_term=base.to(dtype),
        targets=targets,
        top=log_p.argmax(-1),
        model_ce=(-log_p.gather(-1, targets[:, None])[:, 0]).to(dtype),
        mean_p=mean_p.to(dtype),
        constant_kl=from_constant.to(dtype),
        window=token // (per_document // 2),
        document=token // per_document,
        target_bytes=(1 + token % 5).astype(np.int32),
    )


def windows_of(captured: Capture) -> Windows:
    """Windows that the tokens of :func:`capture_of` could belong to; the ids are all 0."""
    count = int(captured.window.max()) + 1
    sizes = np.bincount(captured.window)
    first = np.flatnonzero(np.diff(captured.window, prepend=-1))
    documents = captured.document[first]
    valid = np.arange(sizes.max())[None] < sizes[:, None]
    return Windows(
        ids=np.zeros((count, sizes.max() + 1), np.int64),
        lengths=sizes + 1,
        positions=np.minimum(np.arange(sizes.max())[None], sizes[:, None] - 1),
        valid=valid,
        documents=documents,
        document_names=tuple(f"doc{k:06d}" for k in range(documents.max() + 1)),
        sequence=np.arange(count) - np.searchsorted(documents, documents),
        next_bytes=np.where(valid, 1, 0).astype(np.int32),
    )
