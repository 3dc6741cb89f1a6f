"""Other streams made of a model's own states, without training: nulls and landmarks of known answer.

A view keeps tokens, next tokens and read-out. In another basis at every layer the model re-represents, with all copies kept
on top of each other it carries along, with other tokens' updates it adds up without getting better.
"""

from typing import Protocol

from torch import Tensor

from lensbench.streams.capture import Capture
from lensbench.streams.views.bases import BasisView, random_bases, turning_bases
from lensbench.streams.views.shuffled import ShuffledView, Split, donors
from lensbench.streams.views.spectrum import LayerSpectrum, covariances, spectrum


class View(Protocol):
    """One view of a model's stream, the same for all its splits."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the model that the view's layers 0..n-1 are made of; its layer n is the model's last."""
        ...

    def apply(self, captured: Capture, split: Split, *, memory_gib: float = float("inf")) -> Capture:
        """The capture ``[n+1, N, d]`` of one split as the view has it, from a capture of the model's whole stream.

        States beyond ``memory_gib`` lie in a memory-mapped file, as :func:`lensbench.streams.capture.room_for` says.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What the view consists of, to be kept in a file."""
        ...


__all__ = [
    "BasisView", "LayerSpectrum", "ShuffledView", "Split", "View", "covariances", "donors", "random_bases", "spectrum",
    "turning_bases",
]  # fmt: skip
