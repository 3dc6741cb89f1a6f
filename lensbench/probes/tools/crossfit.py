"""Linear regressions from streamed sufficient statistics: every fold predicted by maps fitted on the others.

Tokens pass once. Only the second moments of each fold are kept, ``[K, F, F]`` for F columns, whatever the number of
tokens. Folds hold whole clusters of documents, and intervals come from leaving out one fold at a time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

from lensbench.data.windows import Windows
from lensbench.statistics import Array, jackknife, leaving_one_out

FOLDS = 8
"""Groups of documents: a map is fitted on seven and judged on the eighth; intervals have seven degrees of freedom"""


COLUMNS = ["probe", "quantity", "layer", "other", "value", "ci_low", "ci_high", "reason"]


RIDGES = (1e-3, 1e-2, 0.1, 1.0)
"""Ridges that are tried, in units of the median eigenvalue of the standardised inputs"""


def folds_of(windows: Windows, folds: int = FOLDS) -> NDArray[np.int64]:
    """Fold of each window ``[S]``: the largest cluster of documents goes first, each into the smallest fold so far.

    With fewer clusters than folds there are as many folds as clusters.
    """
    names, cluster, count = np.unique(windows.clusters, return_inverse=True, return_counts=True)
    held = np.zeros(min(folds, len(names)), dtype=np.int64)
    fold = np.zeros(len(names), dtype=np.int64)
    for k in np.argsort(-count, kind="stable"):
        fold[k] = held.argmin()
        held[fold[k]] += count[k]
    return fold[cluster]


def in_folds(windows: Windows, folds: int = FOLDS) -> tuple[Windows, NDArray[np.int64]]:
    """The windows sorted by fold, and the fold of each ``[S]``: a batch then adds to the sums of few folds."""
    fold = folds_of(windows, folds)
    order = np.argsort(fold, kind="stable")
    return windows.take(order), fold[order]


class FoldSums:
    """``sum x x^T`` over the tokens of each fold, ``[K, ..., F, F]`` float64, of columns x ``[..., n, F]``.

    Column 0 is one. The other columns are shifted by the mean of the first tokens: that keeps the sums accurate and
    changes no regression with an intercept.
    """

    def __init__(self, folds: int):
        self.folds = folds
        self.sums = torch.zeros(0, dtype=torch.float64)
        self._shift = torch.zeros(0)

    def add(self, fold: int, x: Tensor) -> None:
        """Add the columns ``[..., n, F]`` of n tokens to the sums of one fold."""
        if not x.shape[-2]:
            return  # windows of one or two tokens
        x = x.double().cpu()
        if not len(self.sums):
            self._shift = x.mean(-2, keepdim=True)
            self._shift[..., 0] = 0
            self.sums = x.new_zeros(self.folds, *x.shape[:-2], x.shape[-1], x.shape[-1])
        x = x - self._shift
        self.sums[fold] += x.transpose(-1, -2) @ x


def centred(moments: Tensor) -> Tensor:
    """Second moments about the mean ``[..., F-1, F-1]``, of raw sums ``[..., F, F]`` whose column 0 is one."""
    mean = moments[..., 0, 1:] / moments[..., 0, :1]
    return moments[..., 1:, 1:] - moments[..., 0, :1, None] * mean[..., :, None] * mean[..., None, :]


def ridge_map(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The ridge map ``(C + ridge m D)^-1 cross`` of inputs with covariance C ``[F, F]`` and diagonal D.

    m is the median eigenvalue of the standardised covariance. The unit of a column changes no prediction.
    """
    scale = covariance.diagonal().clamp(min=1e-300).sqrt()
    used = covariance.diagonal() > 1e-12 * covariance.diagonal().max()
    scale = torch.where(used, scale, torch.inf)  # a constant column is not used
    standard = covariance / scale[:, None] / scale
    median = torch.linalg.eigvalsh(standard).median() if len(standard) <= 512 else standard.diagonal().mean()
    system = standard + torch.eye(len(standard), dtype=standard.dtype) * max(ridge * float(median), 1e-10)
    return torch.cholesky_solve(cross / scale[:, None], torch.linalg.cholesky(system)) / scale[:, None]


def held_out(moments: Tensor, fitted: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of held-out tokens ``[O]``, and their squared distance from the training mean ``[O]``.

    ``moments`` ``[F, F]`` are raw sums of the held-out tokens, whose column 0 is one; ``fitted`` ``[2 + I, O]`` is what
    :func:`with_intercept` returns.
    """
    columns = torch.cat([torch.zeros(1, dtype=torch.long), inputs])
    weights, mean = fitted[1:], fitted[0]
    square = moments[outputs, outputs]
    xx, xy = moments[columns][:, columns], moments[columns][:, outputs]
    residual = square - 2 * (weights * xy).sum(0) + (weights * (xx @ weights)).sum(0)
    return residual, square - 2 * mean * moments[0, outputs] + moments[0, 0] * mean.square()


def with_intercept(moments: Tensor, inputs: Tensor, outputs: Tensor, ridge: float) -> Tensor:
    """The outputs' mean, the intercept and the ridge map ``[2 + I, O]``, fitted to raw sums ``[F, F]``."""
    mean = moments[0] / moments[0, 0]
    about = centred(moments)
    slope = ridge_map(about[inputs - 1][:, inputs - 1], about[inputs - 1][:, outputs - 1], ridge)
    return torch.cat([mean[outputs][None], (mean[outputs] - mean[inputs] @ slope)[None], slope])


def cross_fitted(
    sums: Tensor, inputs: Tensor, outputs: Tensor, ridges: Sequence[float] = RIDGES
) -> tuple[Array, Array]:
    """Held-out squared errors and totals of each fold, ``[K, O]`` each, of ridge maps fitted on the other folds.

    ``sums`` ``[K, F, F]`` are raw, and their column 0 is one. The ridge of a fold is the best one on the next fold, fitted
    on the rest.
    """
    total, folds = sums.sum(0), len(sums)
    errors, totals = [], []
    for k in range(folds):
        judge = (k + 1) % folds
        rest = total - sums[k] - sums[judge]
        ridge = ridges[0]
        if len(ridges) > 1 and folds > 2:
            lost = [held_out(sums[judge], with_intercept(rest, inputs, outputs, r), inputs, outputs)[0] for r in ridges]
            ridge = ridges[int(torch.stack([x.sum() for x in lost]).argmin())]
        error, around = held_out(sums[k], with_intercept(total - sums[k], inputs, outputs, ridge), inputs, outputs)
        errors.append(error)
        totals.append(around)
    return torch.stack(errors).numpy(), torch.stack(totals).numpy()


def by_group(values: Array, group: NDArray[np.int64]) -> Array:
    """Sums of values ``[N]`` over the members of each group: ``[K]``."""
    return np.bincount(group, values, FOLDS).astype(np.float64)


@dataclass(frozen=True)
class Jackknifed:
    """Estimates of Q quantities, and the estimates without each of K groups of documents.

    ``value`` ``[Q]``; ``without`` ``[K, Q]`` is not a number where a quantity has no interval. ``layer`` and ``other`` say
    what each belongs to (None: the whole model), ``reasons`` holds a warning of each. A ``reason`` says why the probe does
    not apply; all other fields are then empty.
    """

    probe: str
    quantity: Sequence[str] = ()
    layer: Sequence[int | None] = ()
    other: Sequence[int | None] = ()
    reasons: Sequence[str] = ()
    value: Array = field(default_factory=lambda: np.zeros(0))
    without: Array = field(default_factory=lambda: np.zeros((0, 0)))
    reason: str = ""

    def save(self, folder: Path) -> None:
        """Write ``estimates.safetensors`` and ``labels.json`` into the folder."""
        save_file(
            {k: from_numpy(np.ascontiguousarray(getattr(self, k))) for k in ("value", "without")},
            folder / "estimates.safetensors",
        )
        labels = {k: list(getattr(self, k)) for k in ("quantity", "layer", "other", "reasons")}
        (folder / "labels.json").write_text(json.dumps({"probe": self.probe, "reason": self.reason, **labels}))

    @classmethod
    def load(cls, folder: Path) -> "Jackknifed":
        """What :meth:`save` wrote into the folder."""
        arrays: dict[str, Any] = {k: v.numpy() for k, v in load_file(folder / "estimates.safetensors").items()}
        return cls(**json.loads((folder / "labels.json").read_text()), **arrays)

    def frame(self, draws: int = 0, clusters: Any = None) -> pd.DataFrame:
        """A row per quantity with its 95 % jackknife interval over groups of documents; the arguments change nothing."""
        del draws, clusters  # used by probes whose interval comes from a bootstrap
        if self.reason:
            row = dict.fromkeys(COLUMNS) | {"probe": self.probe, "quantity": self.probe, "reason": self.reason}
            return pd.DataFrame([row], columns=COLUMNS)
        low, high = jackknife(self.value, self.without)
        table = pd.DataFrame(
            {
                "probe": self.probe,
                "quantity": list(self.quantity),
                "layer": pd.Series(list(self.layer), dtype=object),
                "other": pd.Series(list(self.other), dtype=object),
                "value": self.value,
                "ci_low": low,
                "ci_high": high,
                "reason": list(self.reasons),
            }
        ).astype(object)
        undefined = ~np.isfinite(self.value)
        table.loc[undefined & (table["reason"] == ""), "reason"] = "undefined: nothing to take a share of"
        numbers = dict.fromkeys(["value", "ci_low", "ci_high"], float)
        return table.where(table.notna(), None).astype(numbers)[COLUMNS]


class Estimates:
    """Collects the quantities of a :class:`Jackknifed`; ``warning`` is the reason of all that have none of their own."""

    def __init__(self, probe: str, folds: int, warning: str = ""):
        self.probe, self.folds, self.warning = probe, folds, warning
        self.rows: list[tuple[str, int | None, int | None, str, float, Array]] = []

    def add(
        self,
        quantity: str,
        value: float,
        without: Array | None = None,
        *,
        layer: int | None = None,
        other: int | None = None,
        reason: str = "",
    ) -> None:
        """Add one estimate, and its values without each group ``[K]``; without them it has no interval."""
        kept = np.full(self.folds, np.nan) if without is None else without
        self.rows.append((quantity, layer, other, reason or self.warning, value, kept))

    def share(self, quantity: str, top: Array, bottom: Array, **where: Any) -> None:
        """Add ``sum(top) / sum(bottom)``, both ``[K]`` sums of the groups."""
        value, without = leaving_one_out(top, bottom)
        self.add(quantity, value, without, **where)

    def done(self) -> Jackknifed:
        """All that was added."""
        quantity, layer, other, reasons, value, without = zip(*self.rows, strict=True)
        return Jackknifed(
            self.probe, quantity, layer, other, reasons, np.array(value), np.stack(without, 1).astype(np.float64)
        )
