"""Rows of many streams, each measured in a process of its own and kept in a file: a calibration goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from lensbench.runtime.files import write_atomically
from lensbench.runtime.progress import Progress
from lensbench.runtime.texts import read_json

Row = dict[str, Any]


class StreamJob(Protocol):
    """One stream to measure: a pydantic model with a family and a number."""

    @property
    def family(self) -> str:
        """The stream's family."""

    @property
    def number(self) -> int:
        """Its number within the family."""

    @property
    def model_dump(self) -> Callable[..., Row]:
        """All that tells it from other streams."""


J = TypeVar("J", bound=StreamJob)
R = TypeVar("R", bound=BaseModel)


def kept_rows(
    jobs: Sequence[J],
    measure: Callable[[J, R], Row],
    recipe: R,
    kept: Path,
    *,
    common: Mapping[str, Any],
    workers: int,
    progress: Progress,
) -> list[Row]:
    """A row per job, in their order; each is kept in a file of its own in the folder ``kept``, and never measured twice.

    ``common``: what rows depend on beside their job. Raises :class:`lensbench.errors.LensbenchError` for a damaged file.
    """
    kept.mkdir(exist_ok=True)

    def place(job: J) -> Path:
        key = json.dumps({"job": job.model_dump(), **common}, sort_keys=True)
        return kept / f"{job.family}-{job.number}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    # Of every family its first streams, then the next: an interrupted calibration has some of all.
    wanted = sorted((job for job in jobs if not place(job).exists()), key=lambda job: job.number)
    if wanted:
        done = len(jobs) - len(wanted)
        with progress.task("streams", len(jobs), "streams") as task, ProcessPoolExecutor(max_workers=workers) as pool:
            task.update(done)
            running = {pool.submit(measure, job, recipe): job for job in wanted}
            for number, future in enumerate(as_completed(running), done + 1):
                write_atomically(place(running[future]), partial(_write_row, row=future.result()))
                task.update(number)
    return [read_json(place(job), "delete it to measure anew") for job in jobs]


def _write_row(path: Path, *, row: Row) -> None:
    path.write_text(json.dumps(row))
