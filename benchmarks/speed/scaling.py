"""Fitting and transfer by one process and by two, in one run: ``python -m benchmarks.speed.scaling --processes 1,2``

Each process has one thread. Rounds of all numbers of processes are taken in turn and the best of each part counts;
``scaling.csv`` has seconds, the speed-up against one process and the share of the ideal one (as many times as there are
processes). What does not shrink with the number of processes (the eigendecompositions, d x d algebra that every process
does for itself) is a part of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from benchmarks.speed.task import console, matmul_rate, now, numbers_of, refusals, say, write_description, write_table
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.closed import fit_each, fit_shared
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.refine import refine
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.measures.transfer import transfer_sums
from lensbench.models import build
from lensbench.runtime import files
from lensbench.runtime.environment import git_revision, hardware, versions
from lensbench.runtime.ranks import join_ranks, leave_ranks
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream

RECIPE = FitRecipe(
    ridges=(1e-3, 1e-2, 0.1), pads=(0.0, 0.2, 0.4), refine_tokens=4096, refine_passes=1, pooled_dev_tokens=2048
)


def random_windows(count: int, length: int, vocabulary: int, seed: int) -> Windows:
    """Windows of random tokens, scored at every fourth position: what they say is no matter to a clock."""
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(1, length - 1, 4), (count, 1))
    return Windows(
        ids=rng.integers(0, vocabulary, (count, length)),
        lengths=np.full(count, length),
        positions=positions,
        valid=np.ones_like(positions, dtype=bool),
        documents=np.arange(count),
        document_names=tuple(map(str, range(count))),
        sequence=np.zeros(count, dtype=np.int64),
        next_bytes=np.ones_like(positions, dtype=np.int32),
    )


def work(width: int, layers: int, vocabulary: int, tokens: int) -> dict[str, float]:
    """Seconds of each part, in a process that shares it with the others that torchrun started."""
    ranks = join_ranks()
    torch.set_num_threads(1)
    model = build(
        "gpt", seed=0, vocab_size=vocabulary, context=128, d_model=width, layers=layers, heads=max(2, width // 64),
        parameters=2 * vocabulary * width + layers * 12 * width**2,
    ).eval()  # fmt: skip
    stream, count = ResidualStream(model), max(1, tokens // 32)
    fit_windows, dev_windows = (
        random_windows(n, 128, vocabulary, seed) for n, seed in ((count, 0), (max(4, count // 8), 1))
    )
    seconds: dict[str, float] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        ranks.wait()
        start = now(stream.device)
        found = part()
        ranks.wait()
        seconds[name] = now(stream.device) - start
        return found

    fit = timed("capture", lambda: capture(stream, fit_windows, ranks=ranks))
    dev = capture(stream, dev_windows, ranks=ranks)
    moments = timed("second moments", lambda: Moments.of(fit))
    timed("eigendecompositions (by each)", lambda: moments.eigen)
    search = DevSearch(stream.readout, dev, RECIPE, pad_direction(stream.readout, fit.states[-1], ranks))
    every = list(range(stream.layers))
    own = timed("closed forms, chosen on dev", lambda: fit_each(search, moments, "zero"))
    shared = fit_shared(search, moments, every)
    starts, ridges = AffineMaps.stack([own.maps, shared.maps]), [*own.ridges, *shared.ridges]
    whole = Moments.stack([moments, moments.pooled(every)])
    timed("refinement", lambda: refine(search, fit, whole, starts, ridges, [*([k] for k in every), every]))
    timed("transfer matrix", lambda: transfer_sums(stream.readout, dev, own.maps))
    leave_ranks(ranks)
    return seconds if ranks.first else {}


def main(
    processes: Annotated[str, typer.Option(help="Numbers of processes, separated by commas; the first is 1.")] = "1,2",
    width: int = 256,
    layers: int = 6,
    vocabulary: int = 8192,
    tokens: Annotated[int, typer.Option(help="Fitting tokens.")] = 16_384,
    rounds: int = 3,
    out: Path = Path("runs/scaling"),
    worker: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print and write scaling.csv and scaling.json into OUT."""
    if worker is not None:
        seconds = work(width, layers, vocabulary, tokens)
        if seconds:
            files.write_json(worker, seconds)
        return
    revision = git_revision()
    with refusals():
        counts = numbers_of(processes)
        if counts[0] != 1:
            raise LensbenchError("--processes begins with 1, which the others are held against")
        out.mkdir(parents=True, exist_ok=True)
        best: dict[int, dict[str, float]] = {n: {} for n in counts}
        for turn in range(rounds):
            for count in counts:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                command += ["-m", "benchmarks.speed.scaling", "--worker", str(out / "seconds.json")]
                shape = {"width": width, "layers": layers, "vocabulary": vocabulary, "tokens": tokens}
                command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise LensbenchError(f"{count} processes failed: {done.stderr.strip().splitlines()[-1]}")
                for part, seconds in json.loads((out / "seconds.json").read_text()).items():
                    best[count][part] = min(seconds, best[count].get(part, float("inf")))
                say(f"round {turn + 1} of {rounds}, {count} processes")
        (out / "seconds.json").unlink()
        torch.set_num_threads(1)
        rows = [
            {
                "part": part, "processes": count, "seconds": seconds, "speed_up": best[1][part] / seconds,
                "share_of_ideal": best[1][part] / seconds / count,
            }
            for count in counts
            for part, seconds in best[count].items()
        ]  # fmt: skip
        table = pd.DataFrame(rows)
        write_table(out / "scaling.csv", table, "%.3g")
        described = {
            "shape": shape, "matmul_gflops_of_one_thread": matmul_rate() / 1e9, "cores": os.cpu_count(),
            "hardware": hardware(torch.device("cpu")), "versions": versions(), "git_revision": revision,
        }  # fmt: skip
        write_description(out, "scaling", described)
    console.print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    typer.run(main)
