"""Arrays in files that are mapped into memory, and how their pages are given back.

A page that was read or written stays in the process until the system needs its place, and counts as its memory. It lies in
the file, too: given back, it is read from there when it is used again.
"""

import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MAPPED: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
"""Of every mapping that is alive"""


def mapped(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """A new raw array in ``path``, as a tensor that is written through to it; its values are anything.

    Raises OSError where the disk has no room for it.
    """
    array = np.memmap(path, dtype=dtype, mode="w+", shape=shape)
    reserve(path)
    return kept_in_file(array)


def reserve(path: Path) -> None:
    """Give a file its place on the disk; raises OSError, and removes the file, where the disk has no room.

    A new file that is mapped has none yet. A page that finds no room as it is written kills the process, which no handler
    can tell the user. macOS and Windows have no such call: there this does nothing.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink()
        raise


def kept_in_file(array: "np.memmap[tuple[int, ...], np.dtype[np.generic]]") -> Tensor:
    """A mapped array, as a tensor whose pages can be given back.

    Of an array that is mapped as a copy (mode "c") a change would be lost with its page: it may not be changed.
    """
    own = array.base
    while own is not None and not isinstance(own, mmap.mmap):
        own = getattr(own, "base", None)
    if own is not None:
        _MAPPED.add(own)
    return torch.from_numpy(array)


def give_back_pages() -> None:
    """Take the pages of all mapped arrays off this process's memory; what was written stays in their files."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    for one in list(_MAPPED):
        if not one.closed:
            one.madvise(mmap.MADV_DONTNEED)
