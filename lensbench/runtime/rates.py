"""How fast this machine computes: a measurement of two seconds, from which times are predicted."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

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


def measured_rates(device: torch.device, dtype: torch.dtype, width: int) -> Rates:
    """The rates of a device for states of so many numbers, in ``dtype`` where the model computes, about two seconds."""
    cpu = torch.device("cpu")
    size = max(16, min(width, 512))
    logits = torch.randn(ROWS, ROWS, device=device)
    block = torch.empty(2**24, device=device)
    covariance = torch.cov(torch.randn(size, 4 * size, dtype=torch.float64))

    def exponentials() -> None:
        logits.sub_(1.0).exp_().sum(-1)
        logits.zero_()

    return Rates(
        model=product_rate(device, dtype, width),
        single=product_rate(device, torch.float32, width),
        double=product_rate(cpu, torch.float64, min(width, 1024)),
        eigen=size**3 * per_second(lambda: torch.linalg.eigh(covariance), cpu),
        words=ROWS**2 * per_second(exponentials, device),
        copied=2 * block.nbytes * per_second(block.clone, device),
    )


def product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOPs in a second of products of ``[ROWS, width]`` with ``[width, ROWS]``, the form of most products here."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((ROWS, width), (width, ROWS)))
    return 2 * ROWS**2 * width * per_second(lambda: a @ b, device)


def per_second(work: Callable[[], object], device: torch.device) -> float:
    """How often a device does something in a second, its first time left out."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < SECONDS_EACH or not count:
        work()
        wait()
        count += 1
    return count / max(spent, 1e-9)
