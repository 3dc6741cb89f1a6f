"""Synthetic residual streams of known structure: what the instrument is tested and its verdicts are calibrated on.

Every family is an answer of ``width`` normal entries, shared in part by the tokens of a document, and layers 0..L-1 that
hold it with noise ``sigma_l`` in the way the family's name says; layer L is the answer itself, where the read-out looks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lensbench.data.windows import Windows
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut

Truth = Literal["refinement", "carry-along", "re-representation", "mixed"]


FAMILIES: dict[str, Truth] = {
    "fresh": "refinement",
    "removed": "refinement",
    "added": "refinement",
    "disjoint": "carry-along",
    "overlapping": "carry-along",
    "rebased": "re-representation",
    "averaged": "refinement",
    "filed": "carry-along",
    "restretched": "re-representation",
    "drifting": "mixed",
    "half-rebased": "mixed",
    "partly-rebased": "mixed",
    "partly-carried": "mixed",
    "jittered": "mixed",
}
"""Family -> what is known of it.

``fresh``: the answer with noise of its own at every layer. ``removed``: noise is taken away step by step. ``added``: parts
of the answer are added up. ``disjoint``: block l writes its (ever better) copy into a slice of its own, the last block the
slice that the read-out sees. ``overlapping``: block l adds its copy in random directions of its own, on top of all others.
``rebased``: a random basis per layer.

``averaged``: layer l is the mean of l + 1 noisy copies. ``filed``: as disjoint, but each block files a part of the answer of
its own, and the last one reads them all. ``restretched``: per layer a random linear map that is no rotation.

Mixed: ``drifting``: the basis turns by 45 degrees over the layers. ``half-rebased``: one basis for the first half of the
layers, another for the second. ``partly-rebased``: half of the answer's entries in a random basis per layer, half in one.
``partly-carried``: half refined, half carried along in overlapping random directions. ``jittered``: the basis of each
layer is turned by 30 degrees in random planes of its own.
"""


class RMSNorm(nn.Module):
    """Root-mean-square norm of the leading ``len(gain)`` entries, the only ones it hands on."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : len(self.gain)]
        return self.gain * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def orthogonal(d: int, random: torch.Generator) -> Tensor:
    """A rotation of d dimensions from the Haar measure, float32."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def turned(d: int, angle: float, random: torch.Generator) -> Tensor:
    """A rotation that turns ``d // 2`` random planes by ``angle`` each, float32."""
    basis = orthogonal(d, random).double()
    cos, sin = np.cos(angle), np.sin(angle)
    blocks = [torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)] * (d // 2)
    blocks += [torch.eye(1, dtype=torch.float64)] * (d % 2)
    return (basis @ torch.block_diag(*blocks) @ basis.T).float()


def read_out(
    d: int, vocab: int, *, norm: str = "rms", read: int | None = None, gain: bool = True, bias: bool = False,
    logits: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> ReadOut:  # fmt: skip
    """``norm``: 'rms' (of the ``read`` leading entries of the state) or 'layer'; ``logits``: their standard deviation.

    As in language models, some directions of the state hardly show in any logit.
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
    return ReadOut(module, head).to(dtype)


@dataclass(frozen=True)
class Shape:
    """Size of a stream and how noisy its first and last layers are."""

    d: int = 48
    layers: int = 6
    vocab: int = 200
    first_noise: float = 1.6
    last_noise: float = 0.3


class SyntheticStream:
    """A stream of one family; every sample shares its directions and its read-out.

    Raises ValueError for an unknown family, and where ``d`` leaves no slice for each layer.
    """

    def __init__(self, family: str, shape: Shape = Shape(), *, seed: int = 0):  # noqa: B008 (frozen)
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
        self.family, self.shape, self.layers, self.d = family, shape, shape.layers, shape.d
        random = torch.Generator().manual_seed(seed + 17)
        layers, d = shape.layers, shape.d
        filed = family in ("disjoint", "filed")
        self.slice = d // (layers + 2) if filed else 0
        if filed and not self.slice:
            raise ValueError(f"d is {d}: too narrow for {layers} slices beside the answer")
        self.width = d - layers * self.slice  # of the answer
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
        """``[L+1, tokens, d]``."""
        random = torch.Generator().manual_seed(1000 + seed)

        def normal(width: int = self.width) -> Tensor:
            return torch.randn(tokens, width, generator=random)

        shared = torch.randn(-(-tokens // per_document), self.width, generator=random)
        answer = 0.8**0.5 * normal() + 0.2**0.5 * shared.repeat_interleave(per_document, 0)[:tokens]
        layers, sigma, half = self.layers, self.noise, self.d // 2
        if self.family == "fresh":
            h = [answer + s * normal() for s in sigma]
        elif self.family == "removed":
            h = [answer]
            steps = torch.diff(sigma.flip(0) ** 2, prepend=torch.zeros(1)).sqrt()
            for step in steps:
                h.append(h[-1] + step * normal())
            h = h[:0:-1]
        elif self.family == "added":
            parts = torch.stack([normal() for _ in range(layers)])
            # Parts with the answer as their sum: a bridge between nothing and the answer.
            parts = parts - parts.mean(0) + answer * layers**-0.5
            parts = torch.cat([parts, normal()[None]])
            answer = parts.sum(0) / (layers + 1) ** 0.5
            h = list(parts.cumsum(0)[:-1] / (layers + 1) ** 0.5)
        elif self.family in ("disjoint", "filed"):
            store = torch.zeros(tokens, self.d)
            h = []
            for layer in range(layers):
                at = slice(self.width + layer * self.slice, self.width + (layer + 1) * self.slice)
                part = self.parts[layer]
                if self.family == "filed":  # entries of its own, spread over all of the answer
                    part = torch.eye(self.width)[:, (torch.arange(self.slice) * layers + layer) % self.width]
                store[:, at] = (answer + (sigma[layer] if self.family == "disjoint" else sigma[-1]) * normal()) @ part
                h.append(store.clone())
            final = store.clone()
            final[:, : self.width] = answer
            return torch.stack([*h, final])
        elif self.family == "overlapping":
            written = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.bases, strict=True)]
            h = list(torch.stack(written).cumsum(0))
        elif self.family == "rebased":
            h = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.bases, strict=True)]
        elif self.family == "averaged":
            copies = torch.stack([answer + sigma[0] * normal() for _ in range(layers)])
            h = list(copies.cumsum(0) / torch.arange(1, layers + 1)[:, None, None])
        elif self.family == "restretched":
            h = [
                ((answer + s * normal()) * stretch) @ q.T
                for s, stretch, q in zip(sigma, self.stretches, self.bases, strict=True)
            ]
        elif self.family == "drifting":
            h = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.turns, strict=True)]
        elif self.family == "jittered":
            h = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.jitters, strict=True)]
        elif self.family == "half-rebased":
            two = [self.bases[0] if k < layers / 2 else self.bases[1] for k in range(layers)]
            h = [(answer + s * normal()) @ q.T for s, q in zip(sigma, two, strict=True)]
        elif self.family == "partly-rebased":
            h = [answer + s * normal() for s in sigma]
            for state, q in zip(h, self.halves, strict=True):
                state[:, half:] = state[:, half:] @ q.T
        else:  # partly-carried
            h = [answer + s * normal() for s in sigma]
            carried = torch.zeros(tokens, self.d - half)
            for state, q in zip(h, self.halves, strict=True):
                carried = carried + state[:, half:] @ q.T
                state[:, half:] = carried
        return torch.stack([*h, answer])

    def capture(self, tokens: int, *, seed: int, per_document: int = 8, constant: Tensor | None = None) -> Capture:
        states = self.states(tokens, seed=seed, per_document=per_document)
        return capture_of(self.readout, states, per_document=per_document, constant=constant, seed=seed)


@torch.no_grad()
def capture_of(
    readout: ReadOut, states: Tensor, *, per_document: int = 8, constant: Tensor | None = None, seed: int = 0
) -> Capture:
    """What :func:`lensbench.streams.capture.capture` would read off these states ``[L+1, N, d]``, by definition.

    Two windows per document; next tokens are drawn from the model's own distribution.
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
    """Windows that :func:`capture_of`'s tokens could have come from."""
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
