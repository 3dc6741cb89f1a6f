"""How fast this machine computes: a measurement of two seconds, from which times are predicted."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

FASTER = 1.5
"""How much faster than in float32 products in float16 must be; without instructions for them they are far slower"""

SECONDS_EACH = 0.35
"""What each kind of work is measured for"""

ROWS = 1024
"""Rows and columns of a block of logits"""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    model: float
    """FLOPs of products in the model's type"""
    single: float
    """FLOPs of products in float32"""
    double: float
    """FLOPs of products in float64, on the CPU"""
    eigen: float
    """``d^3`` of symmetric eigendecompositions in float64, on the CPU"""
    words: float
    """Logits that are shifted, exponentiated and added up"""
    copied: float
    """Bytes that are read and written"""
    read: float = 0.0
    """FLOPs of products with the unembedding, where they are faster than others in float32; 0: as fast"""
    peak: float = 0.0
    """FLOPs of the products that passes of a model are made of, where the passes as a whole are slower; 0: as fast"""
    own: float = 0.0
    """FLOPs of passes in the model's own type, where those that capture states are in another; 0: as ``model``"""
    steps: float = math.inf
    """Training steps of the model that is asked about"""
    at_hand: float = 1.0
    """Share of the measurement in which this process had the processor; other work on the machine takes the rest"""


def measured_rates(device: torch.device, dtype: torch.dtype, width: int) -> Rates:
    """The rates of a device for states of so many numbers, in ``dtype`` where the model computes, about two seconds."""
    cpu = torch.device("cpu")
    size = max(16, min(width, 512))
    logits = torch.randn(ROWS, ROWS, device=device)
    block = torch.empty(2**24, device=device)
    covariance = torch.cov(torch.randn(size, 4 * size, dtype=torch.float64))

    watch = Stopwatch(device)

    def exponentials() -> None:
        logits.sub_(1.0).exp_().sum(-1)
        logits.zero_()

    return Rates(
        model=product_rate(watch, dtype, width),
        single=product_rate(watch, torch.float32, width),
        double=product_rate(Stopwatch(cpu), torch.float64, min(width, 1024)),
        eigen=size**3 * per_second(lambda: torch.linalg.eigh(covariance), Stopwatch(cpu)),
        words=ROWS**2 * per_second(exponentials, watch),
        copied=2 * block.nbytes * per_second(block.clone, watch),
        at_hand=watch.at_hand,
    )


class Stopwatch:
    """Seconds that a device works for this process alone.

    On the CPU these are the seconds of the thread that gives the work, which takes its part in every operation: what other
    processes take of a busy machine does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = self._passed = 0.0

    def time(self, work: Callable[[], object]) -> float:
        """The seconds of some work."""
        passed, own = time.perf_counter(), time.thread_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        passed, own = time.perf_counter() - passed, time.thread_time() - own
        if self.device.type != "cpu":
            return passed
        self._passed, self._own = self._passed + passed, self._own + own
        return own

    @property
    def at_hand(self) -> float:
        """The share of the time so far in which this process had the processor; 1 on other devices."""
        return min(1.0, self._own / self._passed) if self._passed else 1.0


def product_rate(watch: Stopwatch, dtype: torch.dtype, width: int, least: float = SECONDS_EACH) -> float:
    """FLOPs in a second of products of ``[ROWS, width]`` with ``[width, ROWS]``, the form of most products here.

    ``least`` seconds are measured.
    """
    a, b = (torch.randn(shape, device=watch.device).to(dtype) for shape in ((ROWS, width), (width, ROWS)))
    return 2 * ROWS**2 * width * per_second(lambda: a @ b, watch, least)


def per_second(work: Callable[[], object], watch: Stopwatch, least: float = SECONDS_EACH) -> float:
    """How often a device does something in a second, its first time left out; ``least`` seconds are measured."""
    watch.time(work)
    count, spent, began = 0, 0.0, time.perf_counter()
    # On a busy machine the wait ends, too.
    while not count or (spent < least and time.perf_counter() - began < 2 * least):
        spent += watch.time(work)
        count += 1
    return count / max(spent, 1e-9)


@cache
def half_is_fast() -> bool:
    """Whether this processor makes products in float16 at least :data:`FASTER` times as fast as in float32: measured.

    By one thread: on a busy machine several wait for one another, whatever the type.
    """
    threads, watch = torch.get_num_threads(), Stopwatch(torch.device("cpu"))
    try:
        torch.set_num_threads(1)
        single, half = (product_rate(watch, dtype, 512, least=0.05) for dtype in (torch.float32, torch.float16))
    finally:
        torch.set_num_threads(threads)
    return half >= FASTER * single
