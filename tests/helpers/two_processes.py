"""Two processes that share tokens, as threads of this one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lensbench.runtime.ranks import Ranks
from lensbench.streams.capture import Capture


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One of two, which exchange arrays through a list and a barrier."""

    box: Any = None

    def all_of(self, value: Any) -> list[Any]:
        held, barrier = self.box
        held[self.rank] = value
        barrier.wait()
        found = list(held)
        barrier.wait()
        return found

    def joined(self, values, axis=0):
        return np.concatenate(self.all_of(values), axis)

    def sum(self, values):
        return torch.stack(self.all_of(values)).sum(0)

    def span(self, count):
        counts = self.all_of(count)
        return sum(counts[: self.rank]), sum(counts)

    def told(self, value):
        return self.all_of(value)[0]

    def most(self, value):
        return max(self.all_of(value))


def in_two(work: Callable[..., Any], *captures: tuple[Capture, int]) -> list[Any]:
    """What each of two processes finds by ``work``, given its tokens of captures cut before a token each."""
    found: list[Any] = [None, None]
    box = [None, None], threading.Barrier(2, timeout=30)

    def one(rank: int) -> None:
        ranks = ThreadRanks(rank, 2, box)
        own = []
        for captured, cut in captures:
            tokens = torch.arange(len(captured))
            own.append(replace(captured.take(tokens[cut:] if rank else tokens[:cut]), ranks=ranks))
        found[rank] = work(*own)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
