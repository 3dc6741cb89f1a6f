"""Several models of a suite at once on this machine's processors, each trained model and seed in a process of its own.

Threads help a small model little: two models side by side take far less time than one after the other with two threads
each. A worker computes the stages of its models into the run folder, as a task of a cluster does. The run that started
it reads each model when its tasks are finished, so that results appear in the order of the suite.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from lensbench.errors import LensbenchError
from lensbench.run.cluster import ClusterTask, cluster_tasks
from lensbench.run.context import Context
from lensbench.run.origin import origin_of
from lensbench.runtime.progress import QUIET
from lensbench.runtime.stages import NotFinished
from lensbench.suite.recipes import ModelRecipe, Suite

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
    """A process that computes a task."""

    task: ClusterTask
    process: BaseProcess
    answer: Connection


@dataclass
class Workers:
    """The tasks of a run: those that wait, and those under way, at most ``count`` at once."""

    context: Context
    count: int
    waiting: list[ClusterTask]
    before: set[str]
    """Stages that were there before"""
    running: list[Worker] = field(default_factory=list)

    @classmethod
    def of(cls, context: Context, models: list[ModelRecipe], count: int, processors: int) -> "Workers":
        """A task for each model and seed; workers have the suite's threads, or their share of the processors."""
        threads = context.suite.threads or max(1, processors // count)
        tasks = [
            replace(task, models=(name,), threads=threads)
            for task in cluster_tasks(context, models)
            for name in task.models
        ]
        return cls(context, count, tasks, context.stages.finished())

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Ready]:
        """The tasks are computed from here on; those that are not finished at the end of the block are stopped.

        What is given waits for a model. It raises :class:`LensbenchError` for what a user can mend in a task that is
        finished by then, and where a worker died.
        """

        def ready(model: ModelRecipe) -> None:
            while any(task.models[0] == model.name for task in (*self.waiting, *(w.task for w in self.running))):
                self._look()
                time.sleep(LOOK_EVERY)

        try:
            self._look()
            yield ready
        finally:
            for worker in self.running:
                worker.process.terminate()
            for worker in self.running:
                worker.process.join()

    def _look(self) -> None:
        """Take what workers have finished, give free places to tasks that wait, and report stages that are there."""
        for worker in [w for w in self.running if w.answer.poll() or not w.process.is_alive()]:
            self.running.remove(worker)
            wrong = _said(worker)
            worker.process.join()
            if wrong is not None:
                raise LensbenchError(wrong)
        self.context.report_others(self.before)
        while (
            len(self.running) < self.count and (task := next(filter(self._may_start, self.waiting), None)) is not None
        ):
            self.waiting.remove(task)
            self.running.append(_started(task))

    def _may_start(self, task: ClusterTask) -> bool:
        """Whether what a task shares with earlier ones is there: its training, or all that is made of a pretrained model."""
        model, whole = self._model(task), self._training(task)
        earlier = [worker.task for worker in self.running] + self.waiting[: self.waiting.index(task)]
        if not any(self._training(other) == whole for other in earlier):
            return True
        if self.context.suite.trained(model).source is not None:
            return False
        cache = replace(self.context.cache, stages={})  # what is found here is still to be reported
        try:
            origin_of(replace(self.context, compute=False, progress=QUIET, cache=cache), model, task.seed)
        except NotFinished:
            return False
        return True

    def _model(self, task: ClusterTask) -> ModelRecipe:
        return next(model for model in self.context.suite.models if model.name == task.models[0])

    def _training(self, task: ClusterTask) -> tuple[str, int]:
        return self.context.suite.whole_training(self._model(task)).name, task.seed


def _started(task: ClusterTask) -> Worker:
    """A new process that computes a task; started anew and not forked, since threads of torch do not survive a fork."""
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_compute, args=(task, theirs), name=task.name, daemon=True)
    process.start()
    theirs.close()
    return Worker(task, process, ours)


def _said(worker: Worker) -> str | None:
    """What is wrong with a task that ended, or None."""
    try:
        answer: str | None = worker.answer.recv()
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode or 0
        if code >= 0:
            return f"{worker.task.name}: its process failed; what it said stands above"
        return (
            f"{worker.task.name}: its process was ended by signal {-code}, as where memory is short. The same command goes "
            "on; with --workers 1 it computes one model at a time"
        )
    return answer


def _compute(task: ClusterTask, answer: Connection) -> None:
    """Compute a task and say what is wrong, None for nothing; ends when the process that asked is no longer there."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        answer.send(task.compute())
    except KeyboardInterrupt:  # of the terminal, which the process that asked was told, too
        os._exit(130)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
