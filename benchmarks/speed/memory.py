"""Peak memory of fitting and transfer beside its formula: ``python -m benchmarks.speed.memory``

Layers, width, vocabulary and tokens are doubled in turn, each size in a process of its own (the peak is a process's).
``memory.csv`` has what the process held above what it began with (packages and model), what the formula says, and their
ratio. The formula counts what has to be held at once, in bytes:

    states       4 (L + 1) d (N_fit + N_dev)      of fitting and dev tokens; beyond memory_gib on disk
    turned       4 3 (L + 1) d N_dev              the dev tokens seen through a rotation, while they are made
    read-outs    4 (d + 7) (N_fit + N_dev)        e = W^T p and what else is kept of a token
    moments      8 d^2 M                          M matrices of all layers, float64: moments, rotated views, and what pairs
                                                  and refits take (:func:`lensbench.lenses.planning.matrices`); a run has
                                                  them in a file. Besides, the solutions of all layers of one lens, 8 L d^2
    lenses       4 d^2 F                          F maps that are kept until they are written; a run has them in files
    matrix       4 (L + 2) d N_dev                what movement is measured from, and one layer's states read by all lenses
    logits       4 V (2 P B)                      of a batch of B windows with P positions, twice: logits and p
    blocks       4 (8 S b + 6 (M + 1) m d)        what a refinement step works on: S rows of the unembedding for b = 1024
                                                  states at a time, M lenses with m = 256 tokens each
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from benchmarks.speed.scaling import random_windows
from benchmarks.speed.task import console, peak_memory, refusals, say, write_description, write_table
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import fit
from lensbench.lenses.planning import FitContext, matrices
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.transfer import transfer_sums
from lensbench.models import build, count_parameters
from lensbench.runtime.environment import git_revision, hardware, versions
from lensbench.streams.capture import capture
from lensbench.streams.kl import ROW_BLOCK
from lensbench.streams.stream import ResidualStream

RECIPE = FitRecipe(
    ridges=(1e-3, 1e-2, 0.1), pads=(0.0, 0.2, 0.4), refine_tokens=1024, refine_passes=1, pooled_dev_tokens=1024,
    layers=4, rotations=2, pair_rotations=1, refits=1, tolerances=(0.0,),
)  # fmt: skip
BASE = {"layers": 8, "width": 256, "vocabulary": 8192, "tokens": 16_384}
BATCH, POSITIONS = 16, 32


def kept_maps(layers: int) -> int:
    """Maps that :func:`lensbench.lenses.fit.fit` holds at its end with the recipe of this measurement."""
    some = min(layers, RECIPE.layers)
    pairs, curve = some * (some - 1) // 2, len(RECIPE.tolerances) + 1
    per_layer = 4 * layers + curve * some + some  # transfer, own, own refined, rotated own; the curve; leave-one-out
    shared = 3 + layers + RECIPE.rotations * (1 + layers)  # shared, refined; biases; rotated views and their maps
    refits = RECIPE.refits * (some + layers + 1 + some + RECIPE.rotations)
    return per_layer + shared + (1 + RECIPE.pair_rotations) * pairs + refits


def formula(layers: int, width: int, vocabulary: int, tokens: int) -> dict[str, float]:
    """GiB by what they are for."""
    dev = max(4 * POSITIONS, tokens // 8)
    parts = {
        "states": 4 * (layers + 1) * width * (tokens + dev),
        "turned": 4 * 3 * (layers + 1) * width * dev,
        "read_outs": 4 * (width + 7) * (tokens + dev),
        "moments": 8 * width**2 * (matrices(RECIPE, layers) + layers),
        "lenses": 4 * width**2 * kept_maps(layers),
        "matrix": 4 * (layers + 2) * width * dev,
        "logits": 4 * vocabulary * 2 * BATCH * POSITIONS,
        "blocks": 4 * (8 * min(vocabulary, RECIPE.refine_vocabulary) * ROW_BLOCK + 6 * (layers + 1) * 256 * width),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def measure(layers: int, width: int, vocabulary: int, tokens: int) -> dict[str, float]:
    """GiB that this process holds above packages and model when all is done."""
    torch.set_num_threads(1)
    model = build(
        "gpt", seed=0, vocab_size=vocabulary, context=128, d_model=width, layers=layers, heads=4,
        parameters=2 * vocabulary * width + layers * 12 * width**2,
    ).eval()  # fmt: skip
    stream = ResidualStream(model)
    before = peak_memory()
    count = tokens // POSITIONS
    states = capture(stream, random_windows(count, 128, vocabulary, 0), batch=BATCH)
    captured = peak_memory()
    dev = capture(stream, random_windows(max(4, count // 8), 128, vocabulary, 1), batch=BATCH, constant=states.mean_p)
    found = fit(FitContext.of(stream.readout, states, dev, RECIPE, seed=0))
    fitted = peak_memory()
    transfer_sums(stream.readout, dev, found.headline.maps)
    return {
        "before": before, "captured": captured - before, "fitted": fitted - before, "peak": peak_memory() - before,
        "parameters": count_parameters(model),
    }  # fmt: skip


def main(
    out: Path = Path("runs/memory"),
    sizes: Annotated[int, typer.Option(min=1, help="Doublings of each of them.")] = 1,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print and write memory.csv and memory.json into OUT."""
    if worker is not None:
        print(json.dumps(measure(**json.loads(worker))))
        return
    revision = git_revision()
    rows = []
    tried = [BASE] + [{**BASE, name: value * 2**k} for name, value in BASE.items() for k in range(1, sizes + 1)]
    with refusals():
        for shape in tried:
            command = [sys.executable, "-m", "benchmarks.speed.memory", "--worker", json.dumps(shape)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise LensbenchError(f"{shape} failed: {done.stderr.strip().splitlines()[-1]}")
            found, parts = json.loads(done.stdout.splitlines()[-1]), formula(**shape)
            predicted = sum(parts.values())
            rows.append({**shape, "measured_gib": found["peak"], "formula_gib": predicted}
                        | {"ratio": found["peak"] / predicted, "packages_and_model_gib": found["before"]}
                        | {f"{name}_gib": size for name, size in parts.items()})  # fmt: skip
            say(f"{shape}: {found['peak']:.3f} GiB, formula {predicted:.3f}")
        table = pd.DataFrame(rows)
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "memory.csv", table, "%.4g")
        described = {"hardware": hardware(torch.device("cpu")), "versions": versions(), "git_revision": revision}
        write_description(out, "memory", described)
    console.print(table.iloc[:, :8].to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    typer.run(main)
