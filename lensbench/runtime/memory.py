"""Out of memory is no end: work on many rows is done again in halves."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from lensbench.errors import LensbenchError

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``"""

LARGEST_KEPT, MOST_KEPT = 2**25, 2**27
"""Bytes of the largest tensors whose memory is kept for others, and of what is kept in all at the end of the heap"""


def in_units(size: float) -> str:
    """A number of bytes in the unit that shows it: ``3.1 MiB``, ``66.0 GiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU (which torch tells by a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in told or "out of memory" in told or "CUBLAS_STATUS_ALLOC_FAILED" in told
    )


def release_memory() -> None:
    """Give back what is free and kept for later: to the GPU, and of the C library's heap to the system.

    Much of what tensors leave stays in the heap, and counts as this process's memory.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (trim := of_c_library("malloc_trim")) is not None:
        trim(0)


def reuse_memory() -> None:
    """Let the C library keep what tensors leave for the next ones, until :func:`release_memory`.

    Tensors come and go in every layer of a pass. By default much of their memory is given back and asked for again each
    time, page by page. What is larger than :data:`LARGEST_KEPT` is given back as before.
    """
    if (option := of_c_library("mallopt")) is not None:
        option(M_MMAP_THRESHOLD, LARGEST_KEPT)
        option(M_TRIM_THRESHOLD, MOST_KEPT)


@cache
def of_c_library(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where the C library has none of this name."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found


def too_large(what: str, error: BaseException) -> LensbenchError:
    """What to say where even one row does not fit into memory."""
    return LensbenchError(
        f"out of memory at {what}, one at a time: {str(error).splitlines()[0] or type(error).__name__}; "
        'take a device with more memory, device_map = "auto", shorter sequences or a smaller model'
    )


def in_pieces(rows: slice, size: int, work: Callable[[slice], T], *, what: str = "a row") -> list[T]:
    """``work`` on consecutive pieces of ``rows``, ``size`` at a time, or half as many (again and again) out of memory.

    Raises :class:`LensbenchError` where one alone does not fit. Results are in the order of rows.
    """
    found: list[T] = []
    start = rows.start
    while start < rows.stop:
        piece = slice(start, min(start + size, rows.stop))
        shortage: BaseException | None = None
        try:
            found.append(work(piece))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Out of the handler before the next try: the traceback holds the tensors of this one.
            shortage = error.with_traceback(None)
        if shortage is None:
            start = piece.stop
            continue
        if piece.stop - piece.start == 1:
            raise too_large(what, shortage)
        size = (piece.stop - piece.start + 1) // 2
        release_memory()
    return found
