"""Captures on disk: the states of a model's inputs are computed once and read by every stage that needs them.

A kept capture is a folder of two files: the states as a NumPy array, which readers map into memory, and everything else in
a sealed safetensors file. The second is written last, with the checksum of the first: a folder without it is unfinished.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lensbench.runtime.files import sha256
from lensbench.runtime.mapped import kept_in_file, reserve
from lensbench.runtime.sealed import Damaged, load_sealed, save_sealed
from lensbench.streams.capture import Capture

STATES, PREDICTIONS = "states.npy", "predictions.safetensors"

CHECKSUM = "states_sha256"

TENSORS = ("expected", "entropy_term", "targets", "top", "model_ce", "mean_p", "constant_kl")
"""Fields of :class:`Capture` that are tensors, without the states"""

ARRAYS = ("window", "document", "target_bytes")
"""Those that are arrays"""


def mapped_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new float32 array on disk, as a tensor that is written through to it; its folder must be there.

    Raises OSError where the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    reserve(path)
    return kept_in_file(array)


def keep(captured: Capture, folder: Path) -> None:
    """Finish the capture in ``folder``, whose states :func:`mapped_file` holds there, or write them from another device."""
    path = folder / STATES
    if not path.exists():
        states = mapped_file(path, tuple(captured.states.shape))
        for row, own in zip(states, captured.states, strict=True):  # a layer at a time: all may have no room
            row.copy_(own)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    content = {name: getattr(captured, name) for name in TENSORS}
    content |= {name: torch.from_numpy(np.ascontiguousarray(getattr(captured, name))) for name in ARRAYS}
    save_sealed(content, folder / PREDICTIONS, {CHECKSUM: sha256(path)})


def kept(folder: Path, device: torch.device) -> Capture | None:
    """The capture that :func:`keep` left in ``folder``, of one process; None where there is none that is whole.

    On the CPU its states are mapped. Nothing may change them: a change never reaches the file, and is lost with its page.
    What is damaged or unfinished is removed.
    """
    if not folder.is_dir():
        return None
    try:
        content, facts = load_sealed(folder / PREDICTIONS)
        states = np.load(folder / STATES, mmap_mode="c")
        if sha256(folder / STATES) != facts.get(CHECKSUM):
            raise Damaged("the checksum of the states differs")
    except (Damaged, OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    fields: dict[str, Any] = {name: content[name].to(device) for name in TENSORS}
    fields |= {name: content[name].numpy() for name in ARRAYS}
    return Capture(states=kept_in_file(states).to(device), **fields)
