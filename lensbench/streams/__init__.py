"""The residual stream of a model: its parts, its read-out, its captured states, its random-basis null."""

from lensbench.streams.capture import Capture, capture
from lensbench.streams.kl import sum_by_window
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream

__all__ = ["Capture", "ReadOut", "ResidualStream", "RotatedView", "capture", "sum_by_window"]
