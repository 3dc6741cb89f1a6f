"""What streams are read on: windows of text, or images, through one interface.

:class:`lensbench.data.windows.Windows` and :class:`lensbench.data.images.Images` are two kinds of it. Everything after the
stream sees no other difference between language models and image classifiers.
"""

from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray


class Samples(Protocol):
    """S inputs of a model, with at most P scored positions each, every one of them followed by a target."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """bool [S, P]: which of the positions there are"""
        ...

    @property
    def documents(self) -> NDArray[np.int64]:
        """int64 [S]: index into ``document_names`` of what an input comes from"""
        ...

    @property
    def document_names(self) -> tuple[str, ...]: ...

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64 [S]: number of the cluster that intervals resample"""
        ...

    @property
    def sequence(self) -> NDArray[np.int64]:
        """int64 [S]: which input of its document it is"""
        ...

    @property
    def next_bytes(self) -> NDArray[np.int32]:
        """int32 [S, P]: bytes of text that a target stands for; 0 where it stands for none"""
        ...

    @property
    def positions_read(self) -> int:
        """Positions that a model reads of one input: tokens of a window, 1 for an image"""
        ...

    def __len__(self) -> int: ...

    def scored(self, rows: slice) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]:
        """Some inputs, and of each of their scored positions its input (from 0) and its place in it, ``[n]`` each."""
        ...

    def targets(self, rows: slice) -> NDArray[np.int64]:
        """int64 [n]: the next token, or the class, at each of those positions"""
        ...

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Some of the inputs."""
        ...

    def spread(self, count: int) -> Self:
        """So many of them, or all, evenly spread over their order."""
        ...
