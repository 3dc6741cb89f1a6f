"""A whole suite over a cluster with Ray: one task for each trained model and seed, retried when its worker dies.

A task computes the stages of its model and of the views of it into the run folder, which all machines must share, so that a
retried one goes on where the dead worker stopped. The run that asked then finds every stage finished, and ends as it would
have ended by itself.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from lensbench.errors import LensbenchError
from lensbench.results.folder import OWNER
from lensbench.run.stages import Runner
from lensbench.suite.recipes import ModelRecipe, Suite

RETRIES = 5
"""How often the task of a worker that died is given to another."""


LOCAL = "local"


@dataclass(frozen=True)
class Cell:
    """What one task does: a trained (or pretrained) model with its views, at one seed, in a run's folder."""

    suite: Suite
    folder: Path
    models: tuple[str, ...]
    seed: int
    device: str
    threads: int
    probes: tuple[str, ...]
    max_hours: float
    sequences: int | None
    planning: bool

    @property
    def name(self) -> str:
        return f"cell-{'plan-' if self.planning else ''}{self.models[0]}-seed{self.seed}"

    def compute(self) -> str | None:
        """All stages of the cell, where they are not finished; what is wrong, where a user can mend it."""
        from lensbench.run.stages import Runner
        from lensbench.runtime.environment import choose_device
        from lensbench.runtime.progress import Quiet

        if not (self.folder / OWNER).is_file():
            return f"a worker does not see {self.folder}: give --out a folder that all machines share"
        torch.set_num_threads(self.threads)  # results are the same to the byte for as many threads
        try:
            runner = Runner(
                self.suite, self.folder, choose_device(self.device), Quiet(), self.max_hours, probes=self.probes
            )
            runner.sequences = self.sequences
            # Were the worker before this one still alive somewhere, both would write.
            with FileLock(self.folder / "stages" / f".{self.models[0]}-seed{self.seed}.lock"):
                for model in self.suite.models:
                    if model.name not in self.models:
                        continue
                    if self.planning:
                        runner.planned(model, self.seed)
                        continue
                    runner.learned(model, self.seed)
                    runner.measured(model, self.seed)
                    runner.probed(model, self.seed)
        except LensbenchError as error:
            return str(error)
        return None


def cells_of(runner: "Runner", only: list[str], *, planning: bool = False) -> list[Cell]:
    """The cells of a suite; models that share a training are one."""
    suite = runner.suite
    groups: dict[tuple[str, int], list[ModelRecipe]] = {}
    for model in suite.models:
        if only and model.name not in only:
            continue
        for seed in suite.seeds_of(model):
            groups.setdefault((suite.trained(model).name, seed), []).append(model)
    return [
        Cell(
            suite,
            runner.folder.resolve(),
            tuple(m.name for m in models),
            seed,
            runner.device.type,
            suite.threads or torch.get_num_threads(),
            runner.probes,
            runner.max_hours,
            runner.sequences,
            planning,
        )
        for (_, seed), models in groups.items()
    ]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: ``local`` for one on this machine, else the address of one that runs (``auto`` finds it)."""

    address: str = LOCAL

    def compute(self, runner: "Runner", cells: list[Cell]) -> None:
        """Run the cells as tasks; raises :class:`LensbenchError` for what a user can mend in one of them.

        A task takes as many processors as the run has threads, and a GPU where the run is on one.
        """
        try:
            import ray
        except ImportError as error:
            raise LensbenchError("--ray needs Ray: python -m pip install 'lensbench[ray]'") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        started = not ray.is_initialized()
        try:
            self._reached()
            if started:
                options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
                if self.address == LOCAL:
                    options["include_dashboard"] = False
                ray.init(address=None if self.address == LOCAL else self.address, **options)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LensbenchError(f"no Ray cluster at {self.address}: {reason}") from error
        try:
            most = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
            needs = {
                "num_cpus": min(most, max(1, cells[0].threads)),
                "num_gpus": int(runner.device.type == "cuda"),
                "max_retries": RETRIES,
            }
            task = ray.remote(**needs)(_compute)
            start = time.perf_counter()
            waiting = {task.options(name=cell.name).remote(cell): cell for cell in cells}
            tick = runner.progress.stage("cells", len(cells), "cells")
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                cell = waiting.pop(ready[0])
                try:
                    wrong = ray.get(ready[0])
                except ray.exceptions.WorkerCrashedError as error:
                    raise LensbenchError(f"{cell.name}: its worker died {RETRIES + 1} times") from error
                except ray.exceptions.RayError as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                    raise LensbenchError(f"{cell.name}: {reason}") from error
                if wrong is not None:
                    raise LensbenchError(wrong)
                tick(len(cells) - len(waiting), cell.name)
                runner.progress.finished(cell.name, time.perf_counter() - start, False)
        finally:
            if started:
                ray.shutdown()

    def _reached(self) -> None:
        """Raise OSError where nothing listens at the address: Ray would try for minutes."""
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if host:
            socket.create_connection((host, int(port)), timeout=10).close()


def _compute(cell: Cell) -> str | None:
    return cell.compute()
