"""Several models of a suite at once on this machine's processors, each in a process that goes from model to model.

Threads help a small model little: two models side by side take far less time than one after the other with two threads
each. A worker computes the stages of its models into the run folder, as tasks of a cluster do. The run that started
it reads each model when its tasks are finished, so that results appear in the order of the suite.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess, parent_process
from types import MappingProxyType

import torch

from lensbench.errors import LensbenchError
from lensbench.run.cluster import ClusterTask, cluster_tasks
from lensbench.run.context import Cache, Context
from lensbench.run.origin import origin_of
from lensbench.run.stage_names import stage_names
from lensbench.runtime.left import kind_of
from lensbench.runtime.memory import release_memory
from lensbench.runtime.processes import new_processes
from lensbench.runtime.progress import QUIET
from lensbench.runtime.stages import NotFinished, Stages
from lensbench.suite.recipes import ModelRecipe, Suite

BEFORE = ("train", "curve", "update")
"""Kinds of stages up to the update decomposition"""

LOOK_EVERY = 0.5
"""Seconds between two looks at what the workers have finished"""

Ready = Callable[[ModelRecipe], None]
"""Returns when all stages of a model are there that workers compute"""


def models_at_once(
    suite: Suite, models: list[ModelRecipe], asked: int | None, device: torch.device, processors: int
) -> int:
    """How many processes compute models at once: as many as are ``asked`` for, if there are so many models and seeds.

    None asks for as many as the suite says, but no more than the processors have room for, at the suite's threads each.
    On a GPU one computes.
    """
    if device.type != "cpu":
        return 1
    tasks = sum(len(suite.seeds_of(model)) for model in models)
    wanted = min(suite.workers, max(1, processors // (suite.threads or 1))) if asked is None else asked
    return max(1, min(wanted, tasks))


@dataclass
class Worker:
    """A process that computes one task after the other: what it has imported and read serves all of them."""

    process: BaseProcess
    line: Connection
    """Tasks go one way, what is wrong with them the other"""
    task: ClusterTask | None = None
    """The one under way"""
    told: bool = False
    """Whether it has what the run had read when it got its first task"""

    @classmethod
    def started(cls) -> "Worker":
        """A new process without a task, and without the threads of this one."""
        context = new_processes()
        ours, theirs = context.Pipe()
        process = context.Process(target=_compute, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    @property
    def ended(self) -> bool:
        """Whether its task, or the process itself, has come to its end."""
        return self.line.poll() or not self.process.is_alive()

    def begin(self, task: ClusterTask, known: Cache) -> None:
        """Give it a task, and ``known``, what the run has read, with its first one."""
        self.task = task
        try:
            self.line.send((task, None if self.told else known))
        except OSError:  # its process is dead, which is told when it is looked at
            return
        self.told = True

    def said(self) -> str | None:
        """What is wrong with its task, which has ended, or None; then it is free for another."""
        assert self.task is not None
        name, self.task = self.task.name, None
        try:
            answer: str | None = self.line.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            if code >= 0:
                return f"{name}: its process failed; what it said stands above"
            return (
                f"{name}: its process was ended by signal {-code}, as where memory is short. The same command goes "
                "on; with --workers 1 it computes one model at a time"
            )
        return answer


@dataclass
class Workers:
    """The tasks of a run: those that wait, and those under way, at most ``count`` at once."""

    context: Context
    count: int
    waiting: list[ClusterTask]
    before: set[str]
    """Stages that were there before"""
    processes: list[Worker] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        context: Context,
        models: list[ModelRecipe],
        count: int,
        processors: int,
        expected: Mapping[str, float] = MappingProxyType({}),
    ) -> "Workers":
        """Tasks for each model and seed (:func:`in_parts`); workers have the suite's threads, or their share of processors.

        ``expected``: what stages are expected to take, seconds.
        """
        threads = context.suite.threads or max(1, processors // count)
        tasks = [
            replace(task, models=(name,), threads=threads)
            for task in cluster_tasks(context, models)
            for name in task.models
        ]
        return cls(context, count, in_parts(context, tasks, expected), context.stages.finished())

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Ready]:
        """Processes are started here, before the run reads its texts; they get tasks when a model is waited for.

        Where :func:`lensbench.runtime.processes.import_ahead` has not imported for them, they import meanwhile.
        What is given waits for a model. It raises :class:`LensbenchError` for what a user can mend in a task that is
        finished by then, and where a worker died. At the end of the block tasks that are not finished are stopped.
        """

        def ready(model: ModelRecipe) -> None:
            self.look()
            while any(task.models[0] == model.name for task in (*self.waiting, *self._running())):
                time.sleep(LOOK_EVERY)
                self.look()

        try:
            self.processes += [Worker.started() for _ in range(self.count)]
            yield ready
        finally:
            for worker in self.processes:
                worker.process.terminate()
            for worker in self.processes:
                worker.process.join()

    def look(self) -> None:
        """Take what workers have finished, give tasks that wait to those that are free, and report stages that are there."""
        for worker in [w for w in self.processes if w.task is not None and w.ended]:
            if (wrong := worker.said()) is not None:
                raise LensbenchError(wrong)
        self.context.report_others(self.before)
        for worker in [w for w in self.processes if w.task is None]:
            if (task := next(filter(self._may_start, self.waiting), None)) is None:
                return
            self.waiting.remove(task)
            worker.begin(task, self.context.cache.texts_alone())

    def _running(self) -> list[ClusterTask]:
        return [worker.task for worker in self.processes if worker.task is not None]

    def _may_start(self, task: ClusterTask) -> bool:
        """Whether what a task shares with earlier ones is there: its training, or all that is made of a pretrained model."""
        if task.part == "update" and len(self._between()) > self.count:
            return False  # the states of each of these models lie on disk
        model, whole = self._model(task), self._training(task)
        earlier = self._running() + self.waiting[: self.waiting.index(task)]
        if not any(self._training(other) == whole for other in earlier):
            return True
        if self.context.suite.trained(model).source is not None:
            return False
        cache = replace(self.context.cache, stages={})  # what is found here is still to be reported
        stages = Stages(self.context.stages.root, looking=True)  # a training under way is left alone
        try:
            origin_of(
                replace(self.context, stages=stages, compute=False, progress=QUIET, cache=cache), model, task.seed
            )
        except NotFinished:
            return False
        return True

    def _between(self) -> set[tuple[str, int]]:
        """Models and seeds whose decomposition has begun and whose rest is not finished."""
        updates = {(task.models[0], task.seed) for task in self.waiting if task.part == "update"}
        rests = {(t.models[0], t.seed) for t in (*self.waiting, *self._running()) if t.part == "rest"}
        return rests - updates

    def _model(self, task: ClusterTask) -> ModelRecipe:
        return next(model for model in self.context.suite.models if model.name == task.models[0])

    def _training(self, task: ClusterTask) -> tuple[str, int]:
        return self.context.suite.whole_training(self._model(task)).name, task.seed


def in_parts(context: Context, tasks: list[ClusterTask], expected: Mapping[str, float]) -> list[ClusterTask]:
    """Each task in two: up to the update decomposition, which is the first answer, and the rest.

    First answers come first, then the rests, of both the longest first, so that all processes end at about the same time.
    What is made of a pretrained model stays in one task, before all others: each would load the model.
    """
    suite = context.suite
    if suite.update is None:
        return tasks
    whole, first, rest = list[ClusterTask](), list[tuple[float, ClusterTask]](), list[tuple[float, ClusterTask]]()
    for task in tasks:
        (model,) = (model for model in suite.models if model.name in task.models)
        if suite.trained(model).source is not None:
            whole.append(task)
            continue
        end = f"-{model.name}-seed{task.seed}"
        names = {name for name in stage_names(suite, [model], context.probes) if name.endswith(end)}
        names.add(f"train-{suite.whole_training(model).name}-seed{task.seed}")
        before, after = (
            sum(expected.get(name, 0.0) for name in names if (kind_of(name) in BEFORE) == early)
            for early in (True, False)
        )
        first.append((before, replace(task, part="update")))
        rest.append((after, replace(task, part="rest")))
    return whole + [task for part in (first, rest) for _, task in sorted(part, key=lambda pair: -pair[0])]


def _compute(line: Connection) -> None:
    """Compute tasks, and say of each what is wrong, None for nothing; ends when the process that asks is no longer there."""
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    cache = Cache()
    try:
        while True:
            try:
                task, told = line.recv()
            except EOFError:  # nobody asks any more
                return
            cache = told or cache.read_so_far()
            line.send(task.compute(cache))
            release_memory()  # of the task's model
    except KeyboardInterrupt:  # of the terminal, which the process that asked was told, too
        os._exit(130)


def _end_with(asking: BaseProcess | None) -> None:
    """End this process, even in the middle of a task, when the process that asks has ended.

    The system's parent of this process is another one: workers are forked from it, and it lives as long as any of them.
    """
    assert asking is not None
    asking.join()
    os._exit(1)
