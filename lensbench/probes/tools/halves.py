"""Halves of the fitting text, by source and by window, and mean Jacobians of each."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianSource, Targets
from lensbench.measures.update.metric import Metric
from lensbench.probes.subject import Subject

NO_JACOBIANS = "undefined: the suite estimates no Jacobians (fit.lenses)"
ONE_SOURCE = "undefined: the fitting text has one source, which cannot be split"


@dataclass(frozen=True)
class Halves:
    """Which half of the fitting windows each is in, ``[S]`` of 0 and 1."""

    source: NDArray[np.int64]
    """No source (cluster of documents) is in both"""
    window: NDArray[np.int64]
    """Windows of every half by source are in both"""

    @classmethod
    def of(cls, windows: Windows) -> "Halves | None":
        """Sources in random order, each to the half that has fewer windows so far; None where there is one source."""
        clusters, rng = windows.clusters, np.random.default_rng(0)
        names, sizes = np.unique(clusters, return_counts=True)
        if len(names) < 2:
            return None
        held, half_of = [0, 0], np.zeros(int(names.max()) + 1, dtype=np.int64)
        for k in rng.permutation(len(names)):
            half = int(held[1] < held[0])
            half_of[names[k]] = half
            held[half] += int(sizes[k])
        source = half_of[clusters]
        window = np.zeros(len(windows), dtype=np.int64)
        for half in (0, 1):
            own = rng.permutation(np.flatnonzero(source == half))
            window[own[1::2]] = 1
        return cls(source, window)


@dataclass(frozen=True)
class Parts:
    """What Jacobians of parts of the fitting text are estimated from, and the metric that they are compared in."""

    halves: Halves
    factor: Tensor
    """F ``[., d]`` of the read-out's Fisher metric ``F^T F``"""
    prompts: int
    """Prompts of the suite's own Jacobians, which the parts share out"""

    @classmethod
    def of(cls, subject: Subject) -> "Parts | str":
        """Of a subject's fitting text; or why there are none."""
        if subject.jacobians is None:
            return NO_JACOBIANS
        windows = subject.words.fit_windows
        halves = Halves.of(windows)
        if halves is None:
            return ONE_SOURCE
        try:
            factor = Metric.of("fisher", subject.stream.readout, subject.fit).factor
        except LensbenchError as error:  # a norm that is no gain over a scale
            return str(error)
        return cls(halves, factor, subject.jacobians(windows).recipe.prompts)


def jacobians_of(subject: Subject, rows: NDArray[np.int64], targets: Targets, prompts: int, name: str) -> Tensor:
    """Mean Jacobians ``[L, d, d]`` of h_L, float64, over ``prompts`` of these fitting windows, as the suite estimates them.

    ``name``: what the progress is called.
    """
    assert subject.jacobians is not None
    found: JacobianSource = subject.jacobians(subject.words.fit_windows.take(rows))
    recipe = found.recipe.model_copy(update={"prompts": max(2, prompts)})
    source = replace(found, recipe=recipe)
    # Of a rotated view the source's states are plain, and the lens's are not.
    control = None if source.rotation is not None else subject.own.matrix
    with subject.progress.task(f"{name}-{subject.name}" if subject.name else name, 1, "halves") as task:
        return source.estimate(targets, control, lambda remark: task.update(0, remark)).mean


def squared(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``x . y`` of every token, ``[N]``; of x with itself where y is left out."""
    return (x * (x if y is None else y)).sum(-1)
