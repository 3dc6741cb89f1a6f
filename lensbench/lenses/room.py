"""Where large matrices of a fit lie: in memory, or in one file of stated size that is mapped into it."""

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.runtime.mapped import mapped
from lensbench.runtime.memory import in_units

Room = Callable[[tuple[int, ...]], Tensor]
"""Makes a float64 tensor of a shape; its values are anything"""


def in_memory(shape: tuple[int, ...]) -> Tensor:
    """A float64 tensor in memory."""
    return torch.empty(shape, dtype=torch.float64)


IN_MEMORY: Room = in_memory


class MatrixFile:
    """A memory-mapped file of float64 numbers, handed out part by part; it has its whole size from the start.

    Raises :class:`LensbenchError` where the disk has no room for it.
    """

    def __init__(self, path: Path, numbers: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of an interrupted fit
        free, size = shutil.disk_usage(path.parent).free, 8 * numbers
        if free < size:
            raise LensbenchError(
                f"the disk is full: moments and maps take {in_units(size)}, and {path.parent} has {in_units(free)} free; "
                "take a larger disk (--out, TMPDIR), or set fit.rotations and fit.layers lower"
            )
        self.path = path
        self.all = mapped(path, (numbers,), np.float64)
        self.used = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """The next part of the file."""
        first, self.used = self.used, self.used + math.prod(shape)
        assert self.used <= len(self.all), "the file was stated too small"
        return self.all[first : self.used].view(shape)


FILE = "moments.float64"
"""In the folder of the pieces of a fit, and removed with them"""


def room_on_disk(folder: Path | None, numbers: int) -> Room:
    """Room for so many float64 numbers in a file ``moments.float64`` of a folder; in memory without a folder."""
    return in_memory if folder is None else MatrixFile(folder / FILE, numbers)


def again(room: Room, shape: tuple[int, ...]) -> Room:
    """Room for matrices ``shape[1:]``, ``shape[0]`` at a time, that overwrite earlier ones in the same place."""
    if room is in_memory:
        return in_memory
    parts = itertools.cycle(room(shape))
    return lambda asked: next(parts).view(asked)


SHARE = 32
"""An array that may lie in memory is no larger than ``memory_gib`` over this: some dozens are used at once"""


def spilling(memory_gib: float) -> Room:
    """Room in memory for small arrays; larger ones lie in files of the folder for temporary files (``TMPDIR``), mapped.

    Each file is removed from its folder at once, and its place on the disk is free when the array is forgotten.
    """

    def room(shape: tuple[int, ...]) -> Tensor:
        numbers = math.prod(shape)
        if 8 * numbers <= memory_gib * 2**30 / SHARE:
            return in_memory(shape)
        with tempfile.TemporaryDirectory(prefix="lensbench-") as folder:
            return MatrixFile(Path(folder) / FILE, numbers)(shape)

    return room
