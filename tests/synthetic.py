"""Synthetic residual streams of known structure: a small read-out, and captures whose layers' relation is prescribed.

And some such streams with all lenses fitted and scored, for tests of what is made of them; KLs of maps by definition.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lensbench import indices
from lensbench.corpus import Windows
from lensbench.evaluation import Fit, Scored, fit_all, score_all
from lensbench.fitting import FitRecipe
from lensbench.indices import Estimate, Means
from lensbench.lenses import AffineMaps
from lensbench.stream import Capture, ReadOut
from lensbench.tables import ClusterSums, Part


class RMSNorm(nn.Module):
    """Root-mean-square norm of the leading ``width`` entries, the only ones it hands on."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : len(self.gain)]
        return self.gain * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def read_out(
    d: int, vocab: int, *, norm: str = "rms", read: int | None = None, gain: bool = True, bias: bool = False,
    logits: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> ReadOut:  # fmt: skip
    """``logits``: their standard deviation. ``norm``: 'rms' (``read`` leading entries of the state) or 'layer'."""
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
        # As in language models, some directions of the state hardly show in any logit.
        spectrum = torch.logspace(0, -1.5, width)
        weight = (torch.randn(vocab, width, generator=random) * spectrum) @ orthogonal(width, random).T
        head.weight.copy_(weight * logits / spectrum.norm())
        if bias:
            head.bias.copy_(torch.randn(vocab, generator=random))
    return ReadOut(module, head).to(dtype)


@torch.no_grad()
def capture_of(
    readout: ReadOut, states: Tensor, *, per_document: int = 8, constant: Tensor | None = None, seed: int = 0
) -> Capture:
    """What ``lensbench.stream.capture`` would read off these states ``[L+1, N, d]``, written out with log_softmax.

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


def orthogonal(d: int, random: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


KINDS = ("fresh", "removed", "added", "disjoint", "overlapping", "rebased")


class SyntheticStream:
    """A stream whose layers relate as ``kind`` says; every sample shares its directions and its read-out.

    ``fresh``: h_l is the answer with noise of its own. ``removed``: noise is taken away step by step. ``added``: parts of
    the answer are added up. ``disjoint``: block l writes its (ever better) copy into a slice of its own, the last block
    the slice that the read-out sees. ``overlapping``: block l adds its copy in random directions of its own.
    ``rebased``: each layer is the answer with noise in a random basis of its own. Documents share a part of the answer.
    """

    def __init__(self, kind: str, *, d: int = 48, layers: int = 6, vocab: int = 200, seed: int = 0):
        self.kind, self.layers = kind, layers
        random = torch.Generator().manual_seed(seed + 17)
        self.slice = d // (layers + 2) if kind == "disjoint" else 0
        self.width = d - layers * self.slice  # of the answer
        self.d = d
        self.bases = [orthogonal(d, random) for _ in range(layers)]
        self.parts = [torch.randn(self.width, self.slice, generator=random) / self.width**0.5 for _ in range(layers)]
        self.noise = torch.linspace(1.6, 0.3, layers)
        self.readout = read_out(d, vocab, read=self.width, seed=seed)

    def states(self, tokens: int, *, seed: int, per_document: int = 8) -> Tensor:
        random = torch.Generator().manual_seed(1000 + seed)

        def normal(width: int = self.width) -> Tensor:
            return torch.randn(tokens, width, generator=random)

        shared = torch.randn(-(-tokens // per_document), self.width, generator=random)
        answer = 0.8**0.5 * normal() + 0.2**0.5 * shared.repeat_interleave(per_document, 0)[:tokens]
        layers, sigma = self.layers, self.noise
        if self.kind == "fresh":
            h = [answer + s * normal() for s in sigma]
        elif self.kind == "removed":
            h = [answer]
            steps = torch.diff(sigma.flip(0) ** 2, prepend=torch.zeros(1)).sqrt()
            for step in steps:
                h.append(h[-1] + step * normal())
            h = h[:0:-1]
        elif self.kind == "added":
            parts = torch.stack([normal() for _ in range(layers)])
            # Parts with the answer as their sum: a bridge between nothing and the answer.
            parts = parts - parts.mean(0) + answer * layers**-0.5
            parts = torch.cat([parts, normal()[None]])
            answer = parts.sum(0) / (layers + 1) ** 0.5
            h = list(parts.cumsum(0)[:-1] / (layers + 1) ** 0.5)
        elif self.kind == "disjoint":
            store = torch.zeros(tokens, self.d)
            h = []
            for layer in range(layers):
                at = slice(self.width + layer * self.slice, self.width + (layer + 1) * self.slice)
                store[:, at] = (answer + sigma[layer] * normal()) @ self.parts[layer]
                h.append(store.clone())
            final = store.clone()
            final[:, : self.width] = answer
            return torch.stack([*h, final])
        elif self.kind == "overlapping":
            written = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.bases, strict=True)]
            h = list(torch.stack(written).cumsum(0))
        elif self.kind == "rebased":
            h = [(answer + s * normal()) @ q.T for s, q in zip(sigma, self.bases, strict=True)]
        else:
            raise ValueError(self.kind)
        return torch.stack([*h, answer])

    def capture(self, tokens: int, *, seed: int, per_document: int = 8, constant: Tensor | None = None) -> Capture:
        states = self.states(tokens, seed=seed, per_document=per_document)
        return capture_of(self.readout, states, per_document=per_document, constant=constant, seed=seed)


def random_maps(count: int, d: int, *, seed: int = 0, spread: float = 0.3) -> AffineMaps:
    """Affine maps near the identity."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.eye(d) + spread * torch.randn(count, d, d, generator=random) / d**0.5
    return AffineMaps(matrix, spread * torch.randn(count, d, generator=random))


# KL by definition


def in_double(readout: ReadOut) -> ReadOut:
    """A copy that computes in float64, without the caches of the original."""
    readout = copy.deepcopy(readout).double()
    readout._scaled, readout._gains = None, {}
    return readout


@torch.no_grad()
def true_token_kl(readout: ReadOut, captured: Capture, matrix: Tensor, offset: Tensor, layer: int) -> Tensor:
    """KL of one map's read-outs of a layer, by definition in float64: ``[N]``."""
    readout, states = in_double(readout), captured.states.double()
    log_p = readout(states[-1]).log_softmax(-1)
    log_q = readout(states[layer] @ matrix.double().T + offset.double()).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def true_kls(readout: ReadOut, captured: Capture, maps: AffineMaps, layers: Sequence[int]) -> list[float]:
    """Mean KL of map k on ``layers[k]``, or of one map on all of them, by definition in float64."""
    at = [k if len(maps) > 1 else 0 for k in range(len(layers))]
    return [
        float(true_token_kl(readout, captured, maps.matrix[k], maps.offset[k], layer).mean())
        for k, layer in zip(at, layers, strict=True)
    ]


def true_kl(readout: ReadOut, captured: Capture, maps: AffineMaps, layers: Sequence[int]) -> float:
    """Their mean over the layers."""
    return float(np.mean(true_kls(readout, captured, maps, layers)))


# Streams with all lenses fitted and scored


@dataclass(frozen=True)
class Measured:
    stream: SyntheticStream
    captured: Capture
    dev: Capture
    held_out: Capture
    recipe: FitRecipe
    fit: Fit
    scored: Scored
    frame: pd.DataFrame
    steps: list[int]

    def part(self, model: str, seed: int) -> Part:
        facts = {
            "family": "synthetic", "source": None, "dtype": "float32", "parameters": 1, "layers": self.stream.layers,
            "d_model": self.stream.d, "vocab_size": self.stream.readout.weight.shape[0], "train_tokens": 0,
        }  # fmt: skip
        return Part(model, seed, self.frame, facts, self.fit.summary, self.scored.refits)


def measure(stream, recipe, *, tokens=(4000, 800, 2000), seed=0, name="it", loaded=None) -> Measured:
    captured = stream.capture(tokens[0], seed=10 * seed + 1)
    dev = stream.capture(tokens[1], seed=10 * seed + 2, constant=captured.mean_p)
    held_out = stream.capture(tokens[2], seed=10 * seed + 3, constant=captured.mean_p)
    steps: list[int] = []
    fit = fit_all(
        stream.readout, captured, dev, recipe, seed=seed, loaded=loaded, report=lambda done, what: steps.append(done)
    )
    scored = score_all(stream.readout, held_out, fit)
    frame = scored.frame(windows_of(held_out), model=name, seed=seed)
    return Measured(stream, captured, dev, held_out, recipe, fit, scored, frame, steps)


CLOSED = FitRecipe(
    ridges=(1e-3, 1e-2, 0.1, 1.0, 10.0), pads=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), rotations=3, variance=1.0, refits=0,
    refine_passes=0,
)  # fmt: skip
SMALL = FitRecipe(
    ridges=(0.01, 0.1, 1.0), pads=(0.0, 0.4, 0.8), rotations=2, refits=2, refine_passes=8, refine_tokens=400
)
DEEP = SMALL.model_copy(update={"layers": 3, "refine_passes": 0, "ridges": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)})


@cache
def known(kind: str) -> Measured:
    """A stream of known answer, closed forms only."""
    return measure(SyntheticStream(kind), CLOSED, name=kind)


@cache
def small(seed: int) -> Measured:
    """A quick stream with everything switched on: refits, refinement, rotations in a subspace."""
    return measure(
        SyntheticStream("fresh", d=16, layers=3, vocab=40, seed=seed), SMALL, tokens=(640, 320, 640), seed=seed
    )


@cache
def deep() -> Measured:
    """One with more layers than the dear parts look at: of its five those 0, 2 and 4."""
    stream = SyntheticStream("fresh", d=12, layers=5, vocab=30, seed=3)
    return measure(stream, DEEP, tokens=(640, 320, 640))


DRAWS = 300


def estimates_of(frame: pd.DataFrame, draws: int = DRAWS) -> dict[str, Estimate]:
    """Every index of the rows of ``per_sequence.parquet`` of one model and seed."""
    sums = ClusterSums.of(frame)
    weights = indices.bootstrap_weights(len(sums.tokens), draws, 0)
    drawn = Means.of_clusters(sums.totals, sums.tokens, weights)
    point = Means.of_clusters(sums.totals, sums.tokens)
    return indices.estimates(point, drawn, seed=0, clusters=len(sums.tokens))
