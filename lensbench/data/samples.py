"""The inputs that streams are captured on: windows of text or images, through one interface.

:class:`lensbench.data.windows.Windows` and :class:`lensbench.data.images.Images` implement it. Code after the stream sees
no other difference between language models and image classifiers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray


class Samples(Protocol):
    """S inputs of a model, with at most P scored positions each; every scored position has a target."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """bool [S, P]: which positions are scored; an input may have fewer than P"""
        ...

    @property
    def documents(self) -> NDArray[np.int64]:
        """int64 [S]: the document of each input, an index into ``document_names``"""
        ...

    @property
    def document_names(self) -> tuple[str, ...]:
        """The documents that inputs come from"""
        ...

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64 [S]: number of the cluster of each input; intervals resample clusters"""
        ...

    @property
    def sequence(self) -> NDArray[np.int64]:
        """int64 [S]: number of each input within its document"""
        ...

    @property
    def next_bytes(self) -> NDArray[np.int32]:
        """int32 [S, P]: bytes of text of each target; 0 where the target is not text"""
        ...

    @property
    def positions_read(self) -> int:
        """Positions that a model reads in one input: the tokens of a window, 1 for an image"""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what tells these inputs and their scored positions from others of the same data"""
        ...

    def __len__(self) -> int: ...

    def scored(self, rows: slice) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Some inputs, and for each of their scored positions its input (from 0) and its place there, ``[n]`` each."""
        ...

    def targets(self, rows: slice) -> NDArray[np.int64]:
        """int64 [n]: the next token, or the class, at each scored position of these inputs"""
        ...

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The inputs with these indices."""
        ...

    def spread(self, count: int) -> Self:
        """``count`` inputs, or all if there are fewer, evenly spread over their order."""
        ...


def fingerprint_of(arrays: Sequence[NDArray[Any]], names: Sequence[str]) -> str:
    """SHA-256 (hex) of the types, shapes and contents of arrays, and of names."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(f"{array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    whole.update("\0".join(names).encode())
    return whole.hexdigest()
