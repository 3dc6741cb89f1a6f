"""The probes by name."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lensbench.probes.measured import Measured
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import Jackknifed

Found = Measured | Jackknifed


Probe = TypeVar("Probe", bound=Callable[[Subject], Found])


PROBES: dict[str, Callable[[Subject], Found]] = {}
"""Name, as a suite's ``probes`` gives it -> function."""


OF_IMAGES_TOO = ("accuracy", "representation", "matched_transfer", "gradient_alignment", "block_paths")
"""Probes that need no text."""


def probe(function: Probe) -> Probe:
    """Registers a probe under its function's name."""
    PROBES[function.__name__] = function  # type: ignore[attr-defined]
    return function


def load_found(folder: Path) -> Found:
    """What a probe's stage holds."""
    return (Measured if (folder / "sums.safetensors").exists() else Jackknifed).load(folder)
