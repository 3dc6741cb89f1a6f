"""The published recipe's side of the comparison: its own learning rates, its run on fresh tokens, its converged value."""

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.recipe import STEPS, TOKENS_PER_STEP, OptimizerName, RecipeLens, Setting, visits
from benchmarks.speed.task import Ledger, Task, Where, now, rows_of, steps_of
from lensbench.lenses.closed import fit_shared
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.refine import refine
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.runtime.files import write_atomically
from lensbench.streams.capture import Capture, capture

SWEEP_TOKENS = 32_000
"""Tokens of a trial of the sweep, 128 for each of its 250 steps: the schedule of the run it chooses for, in small."""
WINDOWS_PER_STEP = 4
CONVERGED = FitRecipe(refine_tokens=65_536)
"""Ours beside the recipe's full run: the default path of ridges and pads, passes of four times the default length."""
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adam")
CHECKPOINTS = (0, 10, 25, 50, 75, 100, 150, 200, 250)


def mixed_rows(captured: Capture, where: Where) -> Tensor:
    """States ``[N, d]`` that a lens is trained on: its layer's, or for the shared lens each token's at a random layer."""
    if where != "shared":
        return captured.states[int(where)]
    layer = torch.randint(0, captured.layers, (len(captured),), generator=torch.Generator().manual_seed(0))
    return captured.states[layer.to(captured.states.device), torch.arange(len(captured), device=captured.states.device)]


def best_scale(trial: Callable[[float], float]) -> float:
    """The factor of the default rate with the lowest KL: by threefold steps from the default, as long as it falls."""
    trial = functools.cache(trial)
    best, step = (1, 1) if trial(3.0) < trial(1.0) else (0, -1)
    while trial(3.0 ** (best + step)) < trial(3.0**best):
        best += step
    return 3.0**best


def sweep(task: Task, wheres: list[Where], dev: Capture, folder: Path, say: Callable[[str], None]) -> None:
    """The best rate of each optimizer for each lens on dev, by threefold steps from the package's default.

    Trials of 250 steps of 128 tokens with cached read-out statistics, which give the same gradients as the package's loop.
    """
    ledger = Ledger(folder / "sweep.csv", ("lens", "optimizer", "lr_scale"))
    if ledger.has(lens="all", optimizer="done"):
        return
    fit = capture(task.stream, task.whole_windows(SWEEP_TOKENS // (task.length - 2), seed=1), batch=4)
    for where in wheres:
        states = mixed_rows(fit, where)
        for optimizer in OPTIMIZERS:

            def trial(scale: float, where=where, optimizer=optimizer, states=states) -> float:
                known = ledger.at(lens=where, optimizer=optimizer, lr_scale=scale)
                if len(known):
                    return float(known["dev_kl"].iloc[0])
                lens = RecipeLens(task.stream.readout, task.stream.d_model, Setting(optimizer, scale), STEPS)
                start = time.perf_counter()
                per_step = len(states) // STEPS
                for at in visits(len(states), per_step, STEPS, seed=0):
                    lens.step(lens.cached_loss(states[at], fit.expected[at], fit.entropy_term[at]))
                kl = task.kl(lens.maps(), where, dev)
                ledger.add(
                    lens=where, optimizer=optimizer, lr_scale=scale, steps=STEPS, tokens=per_step * STEPS,
                    dev_kl=kl, seconds=time.perf_counter() - start,
                )  # fmt: skip
                say(f"sweep, lens {where}: {optimizer} x{scale:g} gives {kl:.3f}")
                return kl

            best_scale(trial)
    ledger.add(lens="all", optimizer="done", lr_scale=0.0)


def chosen(folder: Path, where: Where, optimizer: OptimizerName | None = None) -> Setting:
    """What the sweep chose for a lens: the better optimizer at its best rate."""
    rows = Ledger(folder / "sweep.csv", ()).rows()
    rows = rows[rows["lens"].astype(str) == str(where)]
    if optimizer is not None:
        rows = rows[rows["optimizer"] == optimizer]
    best = rows.loc[rows["dev_kl"].idxmin()]
    return Setting(best["optimizer"], float(best["lr_scale"]))


def median(times: list[float]) -> float:
    return float(np.median(times)) if times else 0.0


def run(
    task: Task, wheres: list[Where], held_out: dict[str, Capture], folder: Path, state: Path, say: Callable[[str], None]
) -> None:
    """The recipe on 250 steps of 1024 fresh tokens, all lenses side by side as the package trains them.

    Every step: the model's forward pass, its log-probabilities, and for each lens its own forward and backward pass and
    update. Seconds are steps times the median step, which leaves out measuring, saving and whatever else the machine was
    asked for in between: the recipe is not charged for a busy machine. Resumes where it stopped.
    """
    ledger = Ledger(folder / "recipe.csv", ("lens", "step"))
    windows = task.whole_windows(STEPS * WINDOWS_PER_STEP)
    steps = min(STEPS, len(windows.ids) // WINDOWS_PER_STEP)
    if steps < STEPS:
        say(f"the text has only {len(windows.ids)} whole windows: the recipe takes {steps} steps, not {STEPS}")
    documents = folder / "recipe-documents.parquet"
    if documents.exists() and all(ledger.has(lens=w, step=steps) for w in wheres):
        return
    settings = {str(w): chosen(folder, w) for w in wheres}
    lenses = {w: RecipeLens(task.stream.readout, task.stream.d_model, settings[str(w)], steps) for w in wheres}
    # Other lenses or other rates are another run.
    digest = hashlib.sha256(repr((sorted(settings.items()), steps, task.length)).encode()).hexdigest()
    state = state.with_name(f"{state.stem}-{digest[:8]}.pt")
    done = 0
    seconds: dict[str, list[float]] = {"model": [], **{str(w): [] for w in wheres}}
    if state.exists():
        stored = torch.load(state, weights_only=True)
        done, seconds = stored["step"], stored["seconds"]
        for where, lens in lenses.items():
            lens.restore(stored["lenses"][str(where)])

    tokens, d = WINDOWS_PER_STEP * (task.length - 2), task.stream.d_model
    # The model reads every token of its windows; the lens: logits, their gradient, and three products of its own.
    model_flops = WINDOWS_PER_STEP * task.length * (task.forward_flops + task.unembed_flops)
    lens_flops = tokens * (2 * task.unembed_flops + 6 * d * d)

    def checkpoint(step: int) -> None:
        for where, lens in lenses.items():
            row = task.measured(lens.maps(), where, held_out, documents, lens=where, step=step)
            setting = settings[str(where)]
            ledger.add(
                lens=where, step=step, tokens=step * WINDOWS_PER_STEP * (task.length - 2), **row,
                optimizer=setting.optimizer, lr_scale=setting.lr_scale, model_seconds=step * median(seconds["model"]),
                lens_seconds=step * median(seconds[str(where)]),
                model_gflop=step * model_flops / 1e9, lens_gflop=step * lens_flops / 1e9,
                measured_seconds=sum(seconds["model"]) + sum(seconds[str(where)]),
            )  # fmt: skip
        content = {
            "step": step, "seconds": seconds,
            "lenses": {str(w): lens.state() for w, lens in lenses.items()},
        }  # fmt: skip
        state.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(state, lambda p: torch.save(content, p))
        total = step * sum(median(times) for times in seconds.values())
        say(f"recipe: step {step} after {total:.0f} s; " + ", ".join(
            f"{r['lens']}: {r['eval_kl']:.3f}" for _, r in ledger.rows().iterrows() if r["step"] == step))  # fmt: skip

    if done == 0 and not ledger.has(step=0):
        checkpoint(0)
    remaining = rows_of(windows, np.arange(done * WINDOWS_PER_STEP, len(windows.ids)))
    device = task.device
    for step, batch in enumerate(steps_of(remaining, WINDOWS_PER_STEP), start=done + 1):
        if step > steps:
            break
        start = now(device)
        ids = torch.from_numpy(batch.ids).to(device)
        states, logits = task.stream.forward(ids)
        used = slice(1, task.length - 1)
        log_p = logits[:, used].float().log_softmax(-1).flatten(0, 1)
        states = states[:, :, used].flatten(1, 2)
        seconds["model"].append(now(device) - start)
        for where, lens in lenses.items():
            start = now(device)
            if where == "shared":
                g = torch.Generator().manual_seed(step)
                layer = torch.randint(0, task.stream.layers, (states.shape[1],), generator=g).to(device)
                h = states[layer, torch.arange(states.shape[1], device=device)]
            else:
                h = states[int(where)]
            lens.step(lens.published_loss(h, log_p))
            seconds[str(where)].append(now(device) - start)
        if step in CHECKPOINTS or step == steps:
            checkpoint(step)
    if done == steps:
        checkpoint(steps)  # finished before, but its tables are gone


def converged(
    task: Task, layer: int, held_out: dict[str, Capture], folder: Path, state: Path, say: Callable[[str], None]
) -> None:
    """The recipe at its full 250 x 262144 token visits on one layer, by the better optimizer at its best rate on dev.

    With cached read-out statistics: the same gradients, so the same KL; its seconds are not the package's. Beside it, on
    the same tokens, our closed form and refinement.
    """
    ledger = Ledger(folder / "converged.csv", ("layer", "side", "step"))
    if ledger.has(side="recipe", step=STEPS, layer=layer):
        return
    fit = capture(task.stream, task.whole_windows(10**9), batch=16)
    states, expected, entropy = fit.states[layer].clone(), fit.expected, fit.entropy_term
    dev = held_out["dev"]
    sweep_ledger = Ledger(folder / "converged-sweep.csv", ("optimizer", "lr_scale"))
    readout, d = task.stream.readout, task.stream.d_model

    def trial(optimizer: OptimizerName, scale: float) -> float:
        if not sweep_ledger.has(optimizer=optimizer, lr_scale=scale):
            lens = RecipeLens(readout, d, Setting(optimizer, scale), STEPS)
            for at in visits(len(states), 8192, STEPS, seed=0):
                lens.step(lens.cached_loss(states[at], expected[at], entropy[at]))
            kl = task.kl(lens.maps(), layer, dev)
            sweep_ledger.add(optimizer=optimizer, lr_scale=scale, steps=STEPS, tokens=8192 * STEPS, dev_kl=kl)
            say(f"converged, sweep: {optimizer} x{scale:g} gives {kl:.4f}")
        return float(sweep_ledger.at(optimizer=optimizer, lr_scale=scale)["dev_kl"].iloc[0])

    best: dict[float, Setting] = {}
    for optimizer in OPTIMIZERS:
        scale = best_scale(functools.partial(trial, optimizer))
        best[trial(optimizer, scale)] = Setting(optimizer, scale)
    setting = best[min(best)]
    lens = RecipeLens(readout, d, setting, STEPS)

    def measured(side: str, step: int, maps: AffineMaps, **columns: object) -> None:
        documents = folder / "converged-documents.parquet"
        row = task.measured(maps, layer, held_out, documents, layer=layer, side=side, step=step)
        ledger.add(side=side, step=step, layer=layer, pool_tokens=len(states), **row, **columns)

    if not ledger.has(layer=layer, side="refined", step=0):
        search = DevSearch(readout, dev, CONVERGED, pad_direction(readout, fit.states[-1]))
        moments = Moments.of(fit)
        closed = fit_shared(search, moments, [layer])
        refined = refine(search, fit, moments.pooled([layer]), closed.maps, list(closed.ridges), [[layer]])[0]
        measured("closed", 0, closed.maps)
        measured("refined", 0, refined.maps)
    del fit

    state = state.with_name(f"{state.stem}-{layer}-{setting.optimizer}-{setting.lr_scale:g}.pt")
    done = 0
    if state.exists():
        stored = torch.load(state, weights_only=True)
        done = stored["step"]
        lens.restore(stored["lens"])
    start = time.perf_counter()
    for step, at in enumerate(visits(len(states), TOKENS_PER_STEP, STEPS, seed=0, start=done), start=done + 1):
        total = 0.0
        for part in at.split(8192):
            loss = lens.cached_loss(states[part], expected[part], entropy[part]) * (len(part) / len(at))
            loss.backward()
            total += float(loss.detach())
        lens.update(torch.tensor(total))
        if step % 10 == 0:
            measured("recipe", step, lens.maps(), tokens=step * TOKENS_PER_STEP, optimizer=setting.optimizer,
                     lr_scale=setting.lr_scale, fit_kl=total)  # fmt: skip
            state.parent.mkdir(parents=True, exist_ok=True)
            content = {"step": step, "lens": lens.state()}
            write_atomically(state, lambda p, content=content: torch.save(content, p))
            pace = (time.perf_counter() - start) / (step - done)
            say(f"converged: {setting} step {step}, {pace * (STEPS - step):.0f} s to go")
