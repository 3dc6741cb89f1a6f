"""The published recipe's side of the comparison: its own learning rates, its run on fresh tokens, its converged value."""

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    """Median of seconds; 0 of none."""
    return float(np.median(times)) if times else 0.0


@dataclass
class RecipeRun:
    """The recipe's run under way: its lenses, and the seconds of each step of the model and of every lens."""

    task: Task
    lenses: dict[Where, RecipeLens]
    settings: dict[Where, Setting]
    held_out: dict[str, Capture]
    folder: Path
    state: Path
    say: Callable[[str], None]
    seconds: dict[str, list[float]]
    done: int = 0

    @property
    def ledger(self) -> Ledger:
        """Its table, a row for each lens and checkpoint."""
        return Ledger(self.folder / "recipe.csv", ("lens", "step"))

    @property
    def documents(self) -> Path:
        """Where the sums of held-out KL by document lie."""
        return self.folder / "recipe-documents.parquet"

    def resume(self) -> None:
        """Take up what an interrupted run had reached."""
        if not self.state.exists():
            return
        stored = torch.load(self.state, weights_only=True)
        self.done, self.seconds = stored["step"], stored["seconds"]
        for where, lens in self.lenses.items():
            lens.restore(stored["lenses"][str(where)])

    def step(self, number: int, ids: Tensor) -> None:
        """One step on windows ``ids`` [B, T]: the model's forward pass, then every lens's own update, each timed."""
        start = now(self.task.device)
        states, logits = self.task.stream.forward(ids)
        used = slice(1, self.task.length - 1)
        log_p = logits[:, used].float().log_softmax(-1).flatten(0, 1)
        states = states[:, :, used].flatten(1, 2)
        self.seconds["model"].append(now(self.task.device) - start)
        for where, lens in self.lenses.items():
            start = now(self.task.device)
            lens.step(lens.published_loss(self.states_of(where, states, number), log_p))
            self.seconds[str(where)].append(now(self.task.device) - start)

    def states_of(self, where: Where, states: Tensor, step: int) -> Tensor:
        """States ``[N, d]`` of the lens's layer; for the shared lens each token's at a layer drawn for this step."""
        if where != "shared":
            return states[int(where)]
        g = torch.Generator().manual_seed(step)
        layer = torch.randint(0, self.task.stream.layers, (states.shape[1],), generator=g).to(self.task.device)
        return states[layer, torch.arange(states.shape[1], device=self.task.device)]

    def checkpoint(self, step: int) -> None:
        """Measure every lens on held-out tokens, and save what :meth:`resume` needs."""
        for where in self.lenses:
            self.ledger.add(**self.row(where, step))
        content = {
            "step": step, "seconds": self.seconds,
            "lenses": {str(w): lens.state() for w, lens in self.lenses.items()},
        }  # fmt: skip
        self.state.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.state, lambda p: torch.save(content, p))
        total = step * sum(median(times) for times in self.seconds.values())
        rows = self.ledger.rows()
        kls = ", ".join(f"{r['lens']}: {r['eval_kl']:.3f}" for _, r in rows[rows["step"] == step].iterrows())
        self.say(f"recipe: step {step} after {total:.0f} s; {kls}")

    def row(self, where: Where, step: int) -> dict[str, object]:
        """A lens's row of ``recipe.csv`` after so many steps."""
        task, setting = self.task, self.settings[where]
        tokens = WINDOWS_PER_STEP * (task.length - 2)
        # The model reads every token of its windows; the lens: logits, their gradient, and three products of its own.
        model_flops = WINDOWS_PER_STEP * task.length * (task.forward_flops + task.unembed_flops)
        lens_flops = tokens * (2 * task.unembed_flops + 6 * task.stream.d_model**2)
        measured = task.measured(self.lenses[where].maps(), where, self.held_out, self.documents, lens=where, step=step)
        return {
            "lens": where, "step": step, "tokens": step * tokens, **measured,
            "optimizer": setting.optimizer, "lr_scale": setting.lr_scale,
            "model_seconds": step * median(self.seconds["model"]),
            "lens_seconds": step * median(self.seconds[str(where)]),
            "model_gflop": step * model_flops / 1e9, "lens_gflop": step * lens_flops / 1e9,
            "measured_seconds": sum(self.seconds["model"]) + sum(self.seconds[str(where)]),
        }  # fmt: skip


def run(
    task: Task,
    wheres: list[Where],
    held_out: dict[str, Capture],
    folder: Path,
    state: Path,
    say: Callable[[str], None],
    most: int = STEPS,
) -> None:
    """Run the recipe for 250 steps (``most``) of 1024 fresh tokens, all lenses in one loop as the package trains them.

    Every step: the model's forward pass, its log-probabilities, and for each lens its own forward and backward pass and
    update. Seconds are steps times the median step: measuring, saving and other work of the machine in between are not
    charged to the recipe. The run goes on where it stopped.
    """
    windows = task.whole_windows(most * WINDOWS_PER_STEP)
    steps = min(most, len(windows.ids) // WINDOWS_PER_STEP)
    if steps < most:
        say(f"the text has only {len(windows.ids)} whole windows: the recipe takes {steps} steps, not {most}")
    ledger = Ledger(folder / "recipe.csv", ("lens", "step"))
    if (folder / "recipe-documents.parquet").exists() and all(ledger.has(lens=w, step=steps) for w in wheres):
        return
    settings = {w: chosen(folder, w) for w in wheres}
    lenses = {w: RecipeLens(task.stream.readout, task.stream.d_model, settings[w], steps) for w in wheres}
    # Other lenses or other rates are another run.
    named = sorted((str(w), setting) for w, setting in settings.items())
    digest = hashlib.sha256(repr((named, steps, task.length)).encode()).hexdigest()
    state = state.with_name(f"{state.stem}-{digest[:8]}.pt")
    seconds: dict[str, list[float]] = {"model": [], **{str(w): [] for w in wheres}}
    recipe = RecipeRun(task, lenses, settings, held_out, folder, state, say, seconds)
    recipe.resume()
    done = recipe.done
    if done == 0 and not ledger.has(step=0):
        recipe.checkpoint(0)
    remaining = rows_of(windows, np.arange(done * WINDOWS_PER_STEP, len(windows.ids)))
    for step, batch in enumerate(steps_of(remaining, WINDOWS_PER_STEP), start=done + 1):
        if step > steps:
            break
        recipe.step(step, torch.from_numpy(batch.ids).to(task.device))
        if step in CHECKPOINTS or step == steps:
            recipe.checkpoint(step)
    if done == steps:
        recipe.checkpoint(steps)  # finished before, but its tables are gone


@dataclass
class ConvergedRun:
    """The recipe's full run on one layer: the tokens, the tables and what measures them."""

    task: Task
    layer: int
    held_out: dict[str, Capture]
    folder: Path
    pool_tokens: int

    @property
    def ledger(self) -> Ledger:
        """Its table, a row for each side and step."""
        return Ledger(self.folder / "converged.csv", ("layer", "side", "step"))

    def measured(self, side: str, step: int, maps: AffineMaps, **columns: object) -> None:
        """Add a row: held-out KL of ``maps`` after so many steps of a side."""
        documents = self.folder / "converged-documents.parquet"
        row = self.task.measured(maps, self.layer, self.held_out, documents, layer=self.layer, side=side, step=step)
        self.ledger.add(side=side, step=step, layer=self.layer, pool_tokens=self.pool_tokens, **row, **columns)

    def ours(self, fit: Capture) -> None:
        """Measure our closed form and refinement from the same tokens."""
        readout = self.task.stream.readout
        search = DevSearch(readout, self.held_out["dev"], CONVERGED, pad_direction(readout, fit.states[-1]))
        moments = Moments.of(fit)
        closed = fit_shared(search, moments, [self.layer])
        refined = refine(search, fit, moments.pooled([self.layer]), closed.maps, list(closed.ridges), [[self.layer]])[0]
        self.measured("closed", 0, closed.maps)
        self.measured("refined", 0, refined.maps)

    def chosen(self, states: Tensor, expected: Tensor, entropy: Tensor, say: Callable[[str], None]) -> Setting:
        """The better optimizer at its best rate, after 250 steps of 8192 tokens, by dev KL."""
        ledger = Ledger(self.folder / "converged-sweep.csv", ("optimizer", "lr_scale"))

        def trial(optimizer: OptimizerName, scale: float) -> float:
            if not ledger.has(optimizer=optimizer, lr_scale=scale):
                stream = self.task.stream
                lens = RecipeLens(stream.readout, stream.d_model, Setting(optimizer, scale), STEPS)
                for at in visits(len(states), 8192, STEPS, seed=0):
                    lens.step(lens.cached_loss(states[at], expected[at], entropy[at]))
                kl = self.task.kl(lens.maps(), self.layer, self.held_out["dev"])
                ledger.add(optimizer=optimizer, lr_scale=scale, steps=STEPS, tokens=8192 * STEPS, dev_kl=kl)
                say(f"converged, sweep: {optimizer} x{scale:g} gives {kl:.4f}")
            return float(ledger.at(optimizer=optimizer, lr_scale=scale)["dev_kl"].iloc[0])

        best: dict[float, Setting] = {}
        for optimizer in OPTIMIZERS:
            scale = best_scale(functools.partial(trial, optimizer))
            best[trial(optimizer, scale)] = Setting(optimizer, scale)
        return best[min(best)]


def converged(
    task: Task, layer: int, held_out: dict[str, Capture], folder: Path, state: Path, say: Callable[[str], None]
) -> None:
    """Run the recipe for its full 250 x 262144 token visits on one layer, by the better optimizer at its best rate on dev.

    With cached read-out statistics: the same gradients, so the same KL; its seconds are not the package's. Our closed form
    and refinement are measured on the same tokens.
    """
    if Ledger(folder / "converged.csv", ("layer", "side", "step")).has(side="recipe", step=STEPS, layer=layer):
        return
    fit = capture(task.stream, task.whole_windows(10**9), batch=16)
    states, expected, entropy = fit.states[layer].clone(), fit.expected, fit.entropy_term
    this = ConvergedRun(task, layer, held_out, folder, len(states))
    setting = this.chosen(states, expected, entropy, say)
    lens = RecipeLens(task.stream.readout, task.stream.d_model, setting, STEPS)
    if not this.ledger.has(layer=layer, side="refined", step=0):
        this.ours(fit)
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
            this.measured("recipe", step, lens.maps(), tokens=step * TOKENS_PER_STEP, optimizer=setting.optimizer,
                          lr_scale=setting.lr_scale, fit_kl=total)  # fmt: skip
            state.parent.mkdir(parents=True, exist_ok=True)
            content = {"step": step, "lens": lens.state()}
            write_atomically(state, lambda p, content=content: torch.save(content, p))
            pace = (time.perf_counter() - start) / (step - done)
            say(f"converged: {setting} step {step}, {pace * (STEPS - step):.0f} s to go")
