"""Processes that share one run: who this one is, and the sums and copies that they exchange (torch.distributed).

Data parallel: every process holds whole models and its own windows of text, or images, and what is added up over tokens is
added up over processes. What depends on sums alone is therefore the same on all of them; what a process decides by itself
is decided by the first and told to the others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from lensbench.errors import LensbenchError

T = TypeVar("T")


PATIENCE = timedelta(days=7)
"""How long processes wait for one another: the first one works alone for hours. One that ends takes the others with it."""


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` of them; alone it has nothing to exchange, and every method returns what it was given."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things in a row: contiguous, in the order of ranks.

        Raises :class:`LensbenchError` where there are fewer things than processes.
        """
        if count < self.size:
            raise LensbenchError(f"{self.size} processes for {count} sequences: give no more processes than sequences")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, the same to the last digit on all of them."""
        if self.size == 1:
            return values
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def span(self, count: int) -> tuple[int, int]:
        """How many things the processes before this one have, and how many all have, ``count`` of them here."""
        if self.size == 1:
            return 0, count
        counts = torch.zeros(self.size, dtype=torch.long)
        counts[self.rank] = count
        dist.all_reduce(counts)
        return int(counts[: self.rank].sum()), int(counts.sum())

    def joined(self, values: np.ndarray, axis: int = 0) -> np.ndarray:
        """The processes' arrays behind one another along ``axis``, in the order of ranks."""
        if self.size == 1:
            return values
        parts: list[np.ndarray] = [values] * self.size
        dist.all_gather_object(parts, values)
        return np.concatenate(parts, axis)

    def rows(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Rows of a tensor whose first axis the processes share: ``chosen`` are indices into the whole of it."""
        if self.size == 1:
            return values[chosen.to(values.device)]
        before, _ = self.span(len(values))
        here = (chosen >= before) & (chosen < before + len(values))
        found = values.new_zeros(len(chosen), *values.shape[1:])
        found[here.to(values.device)] = values[(chosen[here] - before).to(values.device)]
        return self.sum(found)

    def told(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def agreed(self, work: Callable[[], T]) -> T:
        """What the first process finds by ``work``, on all; its :class:`LensbenchError` is raised on all of them too."""
        if self.size == 1:
            return work()
        answer: tuple[T | None, str | None] = None, None
        if self.first:
            try:
                answer = work(), None
            except LensbenchError as error:
                answer = None, str(error)
        found, refused = self.told(answer)
        if refused is not None:
            raise LensbenchError(refused)
        return found  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The processes that ``torchrun`` started; alone where it did not. Each takes the GPU of its local rank.

    NCCL between GPUs, gloo between CPUs. Raises :class:`LensbenchError` where the others cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        return ALONE
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError, KeyError) as error:
        raise LensbenchError(f"the other processes cannot be reached: {str(error).splitlines()[0]}") from error
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks(ranks: Ranks) -> None:
    """Close what :func:`join_ranks` opened."""
    if ranks.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
