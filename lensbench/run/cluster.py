"""A whole suite over a cluster with Ray: one task for each trained model and seed, retried when its worker dies.

A task computes the stages of its model and of the views of it into the run folder, which all machines must share, so that a
retried one goes on where the dead worker stopped. The run that asked then finds every stage finished, and ends as it would
have ended by itself.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import without_progress_bars
from lensbench.results.folder import OWNER
from lensbench.run.capturing import forget_own_captures
from lensbench.run.context import Cache, Context
from lensbench.run.curves import learning_curve
from lensbench.run.further_scores import further_stages
from lensbench.run.inputs import data_of
from lensbench.run.planning import planning
from lensbench.run.probing import probing
from lensbench.run.scoring import scoring
from lensbench.run.stage_names import stage_names
from lensbench.run.updating import updating
from lensbench.runtime.environment import choose_device
from lensbench.runtime.memory import reuse_memory
from lensbench.runtime.stages import Stages
from lensbench.suite.recipes import ModelRecipe, Suite

RETRIES = 5
"""How often the task of a worker that died is given to another."""


LOCAL = "local"

Part = Literal["all", "update", "rest"]
"""Which stages of its models a task computes: all, those up to the update decomposition, or those after it"""


@dataclass(frozen=True)
class ClusterTask:
    """What one worker computes: a trained (or pretrained) model with its views, at one seed, in a run's folder."""

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
    part: Part = "all"
    only: tuple[str, ...] = ()
    """The models that the run computes, all of the suite's where it is empty"""

    @property
    def name(self) -> str:
        """What the task is called on the cluster and in messages."""
        what = "plan-" if self.planning else "" if self.part == "all" else f"{self.part}-"
        return f"task-{what}{self.models[0]}-seed{self.seed}"

    def compute(self, known: Cache | None = None) -> str | None:
        """Compute all unfinished stages of the task; returns what is wrong where a user can mend it, else None.

        ``known``: what need not be read again.
        """
        if not (self.folder / OWNER).is_file():
            return f"a worker does not see {self.folder}: give --out a folder that all machines share"
        reuse_memory()
        torch.set_num_threads(self.threads)  # this process is the task's own; results hold for as many threads
        try:
            # Were the worker before this one still alive somewhere, both would write.
            of_rest = "-rest" if self.part == "rest" else ""
            lock = FileLock(self.folder / "stages" / f".{self.models[0]}-seed{self.seed}{of_rest}.lock")
            with lock, without_progress_bars():
                self._compute_stages(known or Cache())
        except LensbenchError as error:
            return str(error)
        return None

    def _compute_stages(self, cache: Cache) -> None:
        context = Context(
            self.suite,
            Stages(self.folder / "stages"),
            choose_device(self.device),
            probes=self.probes,
            only=self.only,
            max_hours=self.max_hours,
            sequences=self.sequences,
            cache=cache,
        )
        for model in self.suite.models:
            if model.name not in self.models:
                continue
            if self.planning:
                planning(context, model, self.seed)
                continue
            if self.part != "rest":
                learning_curve(context, model, self.seed)
                updating(context, model, self.seed)
            if self.part == "update":
                continue
            scoring(context, model, self.seed)
            further_stages(context, model, self.seed)
            probing(context, model, self.seed)
        if self.part != "update" and not self._read_by_others(context):  # the rest reads the same captures
            forget_own_captures(context)

    def _read_by_others(self, context: Context) -> bool:
        """Whether a view of the same model has stages to come, which read the same captures."""
        suite = self.suite
        own = {suite.trained(model).name for model in suite.models if model.name in self.models}
        views = [m for m in context.computed if suite.trained(m).name in own and m.name not in self.models]
        names = {name for name in stage_names(suite, views, self.probes) if name.endswith(f"-seed{self.seed}")}
        return bool(names - context.stages.finished())


def cluster_tasks(context: Context, models: list[ModelRecipe], *, planning: bool = False) -> list[ClusterTask]:
    """The tasks of these models; models that share a training are in one."""
    suite = context.suite
    groups: dict[tuple[str, int], list[ModelRecipe]] = {}
    for model in models:
        for seed in suite.seeds_of(model):
            groups.setdefault((suite.whole_training(model).name, seed), []).append(model)
    return [
        ClusterTask(
            suite,
            context.folder.resolve(),
            tuple(m.name for m in sharing),
            seed,
            context.device.type,
            suite.threads or torch.get_num_threads(),
            context.probes,
            context.max_hours,
            context.sequences,
            planning,
            only=context.only,
        )
        for (_, seed), sharing in groups.items()
    ]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: ``local`` for one on this machine, else the address of one that runs (``auto`` finds it)."""

    address: str = LOCAL

    def compute(self, context: Context, tasks: list[ClusterTask]) -> None:
        """Run the tasks; raises :class:`LensbenchError` for what a user can mend in one of them.

        A task takes as many processors as the run has threads, and a GPU where the run is on one.
        """
        if any(context.suite.trained(m).source is None for m in context.suite.models):
            data_of(context)  # the tokenizer, which all tasks share
        with self._connected() as ray, context.progress.task("tasks", len(tasks), "tasks") as progress:
            most = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
            needs = {
                "num_cpus": min(most, max(1, tasks[0].threads)),
                "num_gpus": int(context.device.type == "cuda"),
                "max_retries": RETRIES,
            }
            remote = ray.remote(**needs)(_compute)
            start = time.perf_counter()
            waiting = {remote.options(name=task.name).remote(task): task for task in tasks}
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(ready[0])
                _refuse_failure(ray, ready[0], task)
                progress.update(len(tasks) - len(waiting), task.name)
                context.progress.say(f"{task.name}: finished after {time.perf_counter() - start:.1f} s")

    def check(self) -> None:
        """Raise :class:`LensbenchError` where Ray is missing or nothing listens at the address: before any work."""
        _ray()
        try:
            self._reached()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LensbenchError(f"no Ray cluster at {self.address}: {reason}") from error

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """The module ``ray``, connected to the cluster; what was started here is shut down at the end."""
        ray = _ray()
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
            yield ray
        finally:
            if started:
                ray.shutdown()

    def _reached(self) -> None:
        """Raise OSError where nothing listens at the address: Ray would try for minutes."""
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if host:
            socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    """The module ``ray``; raises :class:`LensbenchError` where it is not installed, or broken."""
    install = "python -m pip install -e '.[ray]'"
    try:
        import ray
    except Exception as error:  # a broken installation raises whatever its parts raise
        if isinstance(error, ModuleNotFoundError) and error.name == "ray":
            raise LensbenchError(f"--ray needs Ray: {install}") from error
        raise LensbenchError(
            f"--ray: the installed Ray cannot be imported ({type(error).__name__}: {error}); install it again: {install}"
        ) from error
    if not hasattr(ray, "init"):
        place = getattr(ray, "__file__", None) or next(iter(getattr(ray, "__path__", ())), "an unknown place")
        raise LensbenchError(f"--ray: the module ray in {place} is not Ray, or only a part of it; {install}")
    return ray


def _refuse_failure(ray: Any, answer: Any, task: ClusterTask) -> None:
    """Raise :class:`LensbenchError` where a task failed or its worker died too often."""
    try:
        wrong = ray.get(answer)
    except ray.exceptions.WorkerCrashedError as error:
        raise LensbenchError(f"{task.name}: its worker died {RETRIES + 1} times") from error
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise LensbenchError(f"{task.name}: {reason}") from error
    if wrong is not None:
        raise LensbenchError(wrong)


def _compute(task: ClusterTask) -> str | None:
    return task.compute()
