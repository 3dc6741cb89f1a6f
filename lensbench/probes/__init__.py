"""Measurements next to the lenses: one file per probe, with its function and the catalogue of its quantities."""

from lensbench.probes.catalogue import Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Measurement, Sums
from lensbench.probes.registry import PROBES
from lensbench.probes.subject import ReadText, Subject

__all__ = ["PROBES", "Measured", "Measurement", "Panel", "Probe", "Quantity", "ReadText", "Subject", "Sums"]
