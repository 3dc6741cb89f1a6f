"""lensbench's side of the comparison: closed forms and refinement from a stated number of tokens, everything counted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.task import Ledger, Task, Where, now, peak_memory, rows_of
from lensbench.data.windows import Windows
from lensbench.lenses.closed import ClosedForms, fit_shared
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments, MomentSums
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.refine import refine
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.streams.capture import Capture, capture
from lensbench.streams.half import INPUTS, choose_half
from lensbench.streams.products import products_for

CLOSED_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768)
REFINED_BUDGETS = (2048, 4096, 5120, 6144, 8192, 12288, 16384, 20480, 32768, 65536)
BATCH = 8
"""Windows of one pass: with fewer, copies of the weights in float16 take much of it"""

RECIPE = FitRecipe(
    ridges=(1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0),
    pads=(0.0, 0.15, 0.3, 0.45, 0.6),
    refine_passes=2,
    pooled_dev_tokens=512,
)


@dataclass
class Clock:
    """Seconds of one fit, by what they were spent on."""

    task: Task
    model: float = 0.0
    closed: float = 0.0
    refined: float = 0.0
    gflop: float = 0.0
    """Of all matrix products; those of the second moments are in float64. Eigendecompositions are in the seconds only."""


def fit_budget(
    task: Task, wheres: list[Where], budget: int, *, refined: bool, seed: int = 0
) -> tuple[dict[Where, ClosedForms], dict[Where, AffineMaps], Clock]:
    """Lenses from ``budget`` tokens of fresh windows, an eighth of which serve as dev: all that is run is counted.

    The recipe's run takes its first windows from the same list.
    """
    clock = Clock(task)
    per_window = task.length - 2
    count = max(2, budget // per_window)
    windows = task.whole_windows(count, seed=seed)
    held = max(1, count // 8)
    fit_windows, dev_windows = rows_of(windows, np.arange(held, count)), rows_of(windows, np.arange(held))
    layers = task.stream.layers

    start = now(task.device)
    # As a run does: passes in float16 where the processor is fast at it and they agree, which is checked in these seconds.
    task.stream.half = choose_half(task.stream, lambda: rows_of(windows, np.arange(min(INPUTS, count))))
    if refined:
        fit = capture(task.stream, fit_windows, batch=BATCH)
        moments = Moments.of(fit)
        final = fit.states[-1]
    else:
        sums, finals = MomentSums(), []
        for begin in range(0, len(fit_windows.ids), BATCH):
            part = rows_of(fit_windows, np.arange(begin, min(begin + BATCH, len(fit_windows.ids))))
            states = states_of(task, part)
            sums.add(states)
            finals.append(states[-1].clone())
        moments, final = sums.moments(), torch.cat(finals)
    dev = thinned(capture(task.stream, dev_windows, batch=BATCH), 512 if refined else 256)
    # The read-out that a run scores such states with.
    readout = task.stream.readout.with_products(products_for(task.stream.readout, dev.states))
    task.stream.half = None  # other parts measure in float32
    clock.model = now(task.device) - start

    start = now(task.device)
    search = DevSearch(readout, dev, RECIPE, pad_direction(task.stream.readout, final))
    own = [list(range(layers)) if w == "shared" else [int(w)] for w in wheres]
    closed = {w: fit_shared(search, moments, at) for w, at in zip(wheres, own, strict=True)}
    clock.closed = now(task.device) - start
    d, head = task.stream.d_model, task.unembed_flops
    tokens = len(fit_windows.ids) * per_window
    read = (tokens if refined else 0) + len(dev_windows.ids) * per_window
    clock.gflop = (count * task.length * task.forward_flops + read * 2 * head + tokens * layers * 4 * d * d) / 1e9
    clock.gflop += d * head / 1e9  # W^T W, whose bottom eigenvector is the pad
    improved: dict[Where, AffineMaps] = {}
    if refined:
        start = now(task.device)
        recipe = RECIPE.model_copy(update={"refine_tokens": len(fit)})
        searched = search.rows_read_out
        search = DevSearch(readout, dev, recipe, search.pad)
        search.rows_read_out = searched
        done = refine(
            search,
            fit,
            Moments.stack([moments.pooled(at) for at in own]),
            AffineMaps.stack([closed[w].maps for w in wheres]),
            [closed[w].ridges[0] for w in wheres],
            own,
            seed=seed,
        )
        improved = {w: r.maps for w, r in zip(wheres, done, strict=True)}
        clock.refined = now(task.device) - start
        states = recipe.refine_passes * len(fit) * len(wheres)
        rows = min(recipe.refine_vocabulary, task.stream.vocab_size)
        updates = states / recipe.refine_batch
        clock.gflop += (states * (4 * d * rows + 6 * d * d) + updates * 30 * d**3) / 1e9
    clock.gflop += search.rows_read_out * (head + 2 * d * d) / 1e9
    return closed, improved, clock


def states_of(task: Task, windows: Windows) -> torch.Tensor:
    """States ``[L+1, n, d]`` at the used positions, without reading them out."""
    ids = torch.from_numpy(windows.ids).to(task.device)
    row, _ = np.nonzero(windows.valid)
    at = torch.from_numpy(windows.positions[windows.valid]).to(task.device)
    rows = torch.from_numpy(row).to(task.device)
    return task.stream.states_at(ids, rows, at, half=task.stream.half is not None)


def thinned(captured: Capture, most: int) -> Capture:
    """At most so many tokens, evenly spread."""
    if len(captured) <= most:
        return captured
    return captured.take(torch.linspace(0, len(captured) - 1, most).round().long().to(captured.states.device))


def run(
    task: Task, wheres: list[Where], held_out: dict[str, Capture], folder: Path, say: Callable[[str], None]
) -> None:
    """Closed forms and refined lenses at every budget; each is a run of its own from the loaded model."""
    ledger = Ledger(folder / "ours.csv", ("lens", "stage", "budget"))
    states_of(task, task.whole_windows(2))  # the first pass through a model allocates
    there = task.whole_tokens()
    for stage, budgets in (("closed", CLOSED_BUDGETS), ("refined", REFINED_BUDGETS)):
        for budget in budgets:
            if ledger.has(stage=stage, budget=budget, lens=wheres[-1]):
                continue
            if budget > there:
                say(f"ours, {stage} from {budget} tokens: the text has only {there}, left out")
                continue
            closed, improved, clock = fit_budget(task, wheres, budget, refined=stage == "refined")
            total = clock.model + clock.closed + clock.refined
            for where in wheres:
                maps = improved[where] if improved else closed[where].maps
                documents = folder / "ours-documents.parquet"
                row = task.measured(maps, where, held_out, documents, lens=where, stage=stage, budget=budget)
                if improved:
                    row |= {f"closed_{s}_kl": task.kl(closed[where].maps, where, c) for s, c in held_out.items()}
                ledger.add(
                    lens=where, stage=stage, budget=budget, **row, ridge=closed[where].ridges[0],
                    pad=closed[where].pads[0], model_seconds=clock.model, closed_seconds=clock.closed,
                    refined_seconds=clock.refined, seconds=total, gflop=clock.gflop, peak_gib=peak_memory(),
                )  # fmt: skip
            rows = ledger.rows()
            rows = rows[(rows["stage"] == stage) & (rows["budget"] == budget)]
            kls = ", ".join(f"{r['lens']}: {r['eval_kl']:.3f}" for _, r in rows.iterrows())
            say(f"ours, {stage} from {budget} tokens in {total:.1f} s; {kls}")
