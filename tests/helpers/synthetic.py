"""Synthetic streams at the size of tests, some with all lenses fitted and scored; KLs of maps by definition."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.progress import Steps
from lensbench import statistics
from lensbench.lenses.fit import Fit, fit
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import MATRIX_LENSES
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures import indices
from lensbench.measures.evaluate import Evaluated, evaluate
from lensbench.measures.means import Estimate, Means
from lensbench.results.sums import ClusterSums
from lensbench.results.tables import Part
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.studies import synthetic
from lensbench.studies.synthetic import RMSNorm, Shape, capture_of, orthogonal, read_out, windows_of


def SyntheticStream(
    kind: str, *, d: int = 48, layers: int = 6, vocab: int = 200, seed: int = 0
) -> synthetic.SyntheticStream:
    """A stream of the package's families, at the size of a test."""
    return synthetic.SyntheticStream(kind, Shape(d=d, layers=layers, vocab=vocab), seed=seed)


__all__ = ["RMSNorm", "capture_of", "orthogonal", "read_out", "windows_of"]

KINDS = ("fresh", "removed", "added", "disjoint", "overlapping", "rebased")


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
    stream: synthetic.SyntheticStream
    captured: Capture
    dev: Capture
    held_out: Capture
    recipe: FitRecipe
    fit: Fit
    scored: Evaluated
    frame: pd.DataFrame
    steps: Steps

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
    steps = Steps()
    lenses = fit(FitContext.of(stream.readout, captured, dev, recipe, seed=seed, loaded=loaded, progress=steps))
    scored = evaluate(stream.readout, held_out, lenses)
    frame = scored.frame(windows_of(held_out), model=name, seed=seed)
    return Measured(stream, captured, dev, held_out, recipe, lenses, scored, frame, steps)


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


HEADLINE = MATRIX_LENSES.within(0.02)
"""The lenses of the transfer matrix, by the default recipe."""


DRAWS = 300


def estimates_of(frame: pd.DataFrame, draws: int = DRAWS) -> dict[str, Estimate]:
    """Every index of the rows of ``per_sequence.parquet`` of one model and seed."""
    sums = ClusterSums.of(frame)
    weights = statistics.bootstrap_weights(len(sums.tokens), draws, 0)
    drawn = Means.of_clusters(sums.totals, sums.tokens, weights)
    point = Means.of_clusters(sums.totals, sums.tokens)
    return indices.estimates(point, drawn, seed=0, clusters=len(sums.tokens))
