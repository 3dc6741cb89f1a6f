"""Linear regressions from streamed sufficient statistics: every fold predicted by maps fitted on the others.

Tokens pass once. Only the second moments of each fold are kept, ``[K, F, F]`` for F columns, whatever the number of
tokens. Folds hold whole clusters of documents, and intervals come from leaving out one fold at a time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, from_numpy

from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.stages import ANEW
from lensbench.runtime.texts import read_json
from lensbench.statistics import Array, jackknife, leaving_one_out, too_few_clusters

FOLDS = 8
"""Groups of documents: a map is fitted on seven and judged on the eighth; intervals have seven degrees of freedom"""


NO_INTERVAL = "no interval is made of it"
"""The reason of a value without an interval"""


COLUMNS = ["probe", "quantity", "layer", "other", "value", "ci_low", "ci_high", "reason"]


RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridges that are tried, in units of the variance of an input: inputs are standardised"""


def joined_clusters(windows: Windows) -> NDArray[np.int64]:
    """Number of the cluster of each window ``[S]``; clusters that have a window in common are one.

    Of a document that a text holds twice, a map would else be judged on windows to which it was fitted.
    """
    return _joined(windows, windows.clusters)


def joined_documents(windows: Windows) -> NDArray[np.int64]:
    """Index of the document of each window ``[S]``; of documents that have a window in common, that of the first."""
    joined = _joined(windows, windows.documents)
    _, first, number = np.unique(joined, return_index=True, return_inverse=True)
    return windows.documents[first][number]


def _joined(windows: Windows, group: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups ``[S]`` of windows, numbered again; groups that have a window in common are one."""
    clusters, cluster = np.unique(group, return_inverse=True)
    whole = np.concatenate([windows.lengths[:, None], np.where(windows.inside, windows.ids, 0)], 1)
    content = np.unique(whole, axis=0, return_inverse=True)[1].reshape(-1)
    size = len(clusters) + len(whole)
    edges = coo_array((np.ones(len(whole), dtype=np.int8), (cluster, len(clusters) + content)), shape=(size, size))
    joined: NDArray[np.int64] = connected_components(edges, directed=False)[1].astype(np.int64)
    return joined[cluster]


def folds_of(windows: Windows, folds: int = FOLDS) -> NDArray[np.int64]:
    """Fold of each window ``[S]``: the largest cluster of documents goes first, each into the smallest fold so far.

    With fewer clusters than folds there are as many folds as clusters. See :func:`joined_clusters`.
    """
    names, cluster, count = np.unique(joined_clusters(windows), return_inverse=True, return_counts=True)
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


@dataclass(frozen=True)
class RidgeMaps:
    """Ridge maps ``(C + ridge D)^-1 cross`` of inputs with covariance C ``[I, I]`` and diagonal D, one for each ridge.

    The ridge is a share of the variance of each input, which is the mean eigenvalue of the standardised covariance, for any
    number of inputs. So the unit of a column changes no prediction, and inputs that are added to a baseline do not change
    the penalty of the baseline's own (with the median eigenvalue they would).
    """

    standard: Tensor  # [I, I]: the covariance of the standardised inputs
    cross: Tensor  # [I, O]: theirs with the outputs
    scale: Tensor  # [I]

    @classmethod
    def of(cls, covariance: Tensor, cross: Tensor) -> "RidgeMaps":
        """The maps of inputs with a covariance ``[I, I]``, and cross moments ``[I, O]`` with the outputs."""
        variance = covariance.diagonal()
        used = variance > 1e-12 * variance.max()
        scale = torch.where(used, variance.clamp(min=1e-300).sqrt(), torch.inf)  # a constant column is not used
        return cls(covariance / scale[:, None] / scale, cross / scale[:, None], scale)

    def map(self, ridge: float) -> Tensor:
        """The map ``[I, O]`` with a ridge."""
        system = self.standard.clone()
        system.diagonal().add_(max(ridge, 1e-10))
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(system)) / self.scale[:, None]


@dataclass(frozen=True)
class Regression:
    """Ridge regressions of outputs on inputs, from raw sums ``[F, F]`` whose column 0 is one."""

    mean: Tensor  # [F]: of all columns
    maps: RidgeMaps
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, moments: Tensor, inputs: Tensor, outputs: Tensor) -> "Regression":
        """The regressions of some tokens, of the columns ``outputs`` on the columns ``inputs``."""
        mean = moments[0] / moments[0, 0]
        about = moments[inputs] - moments[0, 0] * mean[inputs, None] * mean
        return cls(mean, RidgeMaps.of(about[:, inputs], about[:, outputs]), inputs, outputs)

    def some(self, outputs: Tensor) -> "Regression":
        """The same for some of the outputs."""
        maps = RidgeMaps(self.maps.standard, self.maps.cross[:, outputs], self.maps.scale)
        return Regression(self.mean, maps, self.inputs, self.outputs[outputs])

    def fitted(self, ridge: float) -> Tensor:
        """Intercept and map ``[1 + I, O]`` with a ridge."""
        slope = self.maps.map(ridge)
        return torch.cat([(self.mean[self.outputs] - self.mean[self.inputs] @ slope)[None], slope])


@dataclass(frozen=True)
class HeldOut:
    """What judges maps on held-out tokens, from their raw sums ``[F, F]``."""

    xx: Tensor  # [1 + I, 1 + I]: of one and the inputs
    xy: Tensor  # [1 + I, O]
    yy: Tensor  # [O]

    @classmethod
    def of(cls, moments: Tensor, inputs: Tensor, outputs: Tensor) -> "HeldOut":
        """The sums of the columns ``inputs`` and ``outputs``."""
        columns = torch.cat([torch.zeros(1, dtype=torch.long), inputs])
        rows = moments[columns]
        return cls(rows[:, columns], rows[:, outputs], moments[outputs, outputs])

    def error(self, fitted: Tensor, some: Tensor | None = None) -> Tensor:
        """Squared error ``[O]`` of maps ``[1 + I, O]``, of all outputs or of some."""
        xy, yy = (self.xy, self.yy) if some is None else (self.xy[:, some], self.yy[some])
        return yy - 2 * (fitted * xy).sum(0) + (fitted * (self.xx @ fitted)).sum(0)

    def around(self, mean: Tensor) -> Tensor:
        """Squared distance ``[O]`` of the outputs from a mean ``[O]``."""
        return self.yy - 2 * mean * self.xy[0] + self.xx[0, 0] * mean.square()


def refitted(
    sums: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    ridges: Sequence[float] = RIDGES,
    together: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """Held-out squared errors and totals ``[K, K, O]`` of ridge maps: entry j, k is of fold j, fitted without j and k.

    Entry j, j is of maps fitted on all other folds. These are fitted on nearly the same tokens, so that their errors have in
    common what these tokens happen to be. The errors of single folds do not show it, and a jackknife over them alone is too
    narrow: hence the further fold.

    ``sums`` ``[K, F, F]`` are raw, and their column 0 is one. The ridge of a fold is the best one on its partner, fitted on
    all folds but these two, and is kept where a further fold is left out. Each output has a ridge of its own; outputs with
    the same number in ``together`` ``[O]`` are one quantity and share theirs.
    """
    judges = [HeldOut.of(held, inputs, outputs) for held in sums]
    chosen = _best_ridges(sums, judges, inputs, outputs, ridges, _quantities(outputs, together))
    folds = len(sums)
    errors, totals = torch.zeros(2, folds, folds, len(outputs), dtype=sums.dtype)
    for j, k in combinations_with_replacement(range(folds), 2):
        left_out = (j, k) if j != k else (j,)
        found = _held_out(sums, judges, chosen, left_out, inputs, outputs, ridges)
        for fold, other, (error, total) in zip(left_out, reversed(left_out), found, strict=True):
            errors[fold, other], totals[fold, other] = error, total
    return errors.numpy(), totals.numpy()


def _quantities(outputs: Tensor, together: Sequence[int] | None) -> Tensor:
    """The number of the quantity that each output belongs to: ``[O]``."""
    return torch.arange(len(outputs)) if together is None else torch.as_tensor(list(together))


def _held_out(
    sums: Tensor,
    judges: Sequence[HeldOut],
    chosen: Tensor,
    left_out: Sequence[int],
    inputs: Tensor,
    outputs: Tensor,
    ridges: Sequence[float],
) -> list[tuple[Tensor, Tensor]]:
    """Squared errors and totals ``[O]`` of each fold that is left out, of maps with its ridges fitted on all others."""
    rest = Regression.of(sums.sum(0) - sums[list(left_out)].sum(0), inputs, outputs)
    found = []
    for fold in left_out:
        error = torch.zeros(len(outputs), dtype=sums.dtype)
        for number in chosen[fold].unique().tolist():
            some = (chosen[fold] == number).nonzero()[:, 0]
            error[some] = judges[fold].error(rest.some(some).fitted(ridges[number]), some)
        found.append((error, judges[fold].around(rest.mean[outputs])))
    return found


def _best_ridges(
    sums: Tensor, judges: Sequence[HeldOut], inputs: Tensor, outputs: Tensor, ridges: Sequence[float], of: Tensor
) -> Tensor:
    """For each fold and output ``[K, O]``, the number of the ridge that is best for the outputs of its quantity."""
    folds, total = len(sums), sums.sum(0)
    chosen = torch.zeros(folds, len(outputs), dtype=torch.long)
    if len(ridges) < 2 or folds < 3:
        return chosen
    for pair in dict.fromkeys(tuple(sorted((k, partner(k, folds)))) for k in range(folds)):
        rest = Regression.of(total - sums[list(pair)].sum(0), inputs, outputs)
        maps = [rest.fitted(ridge) for ridge in ridges]
        for k in range(folds):
            if k not in pair or partner(k, folds) not in pair:
                continue  # two folds that are each other's partners are left out together, and fitted on once
            lost = torch.stack([judges[partner(k, folds)].error(fitted) for fitted in maps])
            by_quantity = torch.zeros(len(ridges), int(of.max()) + 1, dtype=lost.dtype).index_add_(1, of, lost)
            chosen[k] = by_quantity.argmin(0)[of]
    return chosen


def partner(fold: int, folds: int) -> int:
    """The fold that chooses the ridge of another: 0 and 1, 2 and 3, ... of each other, and of an odd last one the first."""
    other = fold ^ 1
    return other if other < folds else 0


def by_group(values: Array, group: NDArray[np.int64]) -> Array:
    """Sums of values ``[N]`` over the members of each group: ``[K]``."""
    return np.bincount(group, values, FOLDS).astype(np.float64)


@dataclass(frozen=True)
class Jackknifed:
    """Estimates of Q quantities, and the estimates without each of K groups of documents.

    ``value`` ``[Q]``; ``without`` ``[K, Q]`` is not a number where a quantity has no interval. ``layer`` and ``other`` say
    what each belongs to (None: the whole model), ``reasons`` holds a warning of each. A ``reason`` says why the probe does
    not apply; all other fields are then empty. ``groups`` is the effective number of the groups (None: K), and ``clusters``
    that of the clusters of documents that they hold (None: enough).
    """

    probe: str
    quantity: Sequence[str] = ()
    layer: Sequence[int | None] = ()
    other: Sequence[int | None] = ()
    reasons: Sequence[str] = ()
    value: Array = field(default_factory=lambda: np.zeros(0))
    without: Array = field(default_factory=lambda: np.zeros((0, 0)))
    reason: str = ""
    groups: float | None = None
    clusters: float | None = None

    def save(self, folder: Path) -> None:
        """Write ``estimates.safetensors`` and ``labels.json`` into the folder."""
        save_file(
            {k: from_numpy(np.ascontiguousarray(getattr(self, k))) for k in ("value", "without")},
            folder / "estimates.safetensors",
        )
        labels = {k: list(getattr(self, k)) for k in ("quantity", "layer", "other", "reasons")}
        alone = {k: getattr(self, k) for k in ("probe", "reason", "groups", "clusters")}
        (folder / "labels.json").write_text(json.dumps(alone | labels))

    @classmethod
    def load(cls, folder: Path) -> "Jackknifed":
        """What :meth:`save` wrote into the folder."""
        arrays: dict[str, Any] = {k: v.numpy() for k, v in read_tensors(folder / "estimates.safetensors", ANEW).items()}
        labels = read_json(folder / "labels.json", ANEW)
        try:
            return cls(**labels, **arrays)
        except TypeError as error:
            raise LensbenchError(f"{folder} is damaged: {error}; {ANEW}") from error

    def frame(self, draws: int = 0, clusters: Any = None) -> pd.DataFrame:
        """A row per quantity with its 95 % jackknife interval over groups of documents; the arguments change nothing."""
        del draws, clusters  # used by probes whose interval comes from a bootstrap
        if self.reason:
            row = dict.fromkeys(COLUMNS) | {"probe": self.probe, "quantity": self.probe, "reason": self.reason}
            return pd.DataFrame([row], columns=COLUMNS)
        low, high = jackknife(self.value, self.without, self.groups)
        few = "" if self.clusters is None else too_few_clusters(self.clusters)
        if few:
            low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
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
        undefined, open_ended = ~np.isfinite(self.value), ~(np.isfinite(low) & np.isfinite(high))
        table.loc[undefined & (table["reason"] == ""), "reason"] = "undefined: nothing to take a share of"
        if few:
            table.loc[~undefined & np.isfinite(self.without).all(0), "reason"] = few
        table.loc[open_ended & (table["reason"] == ""), "reason"] = NO_INTERVAL
        numbers = dict.fromkeys(["value", "ci_low", "ci_high"], float)
        return table.where(table.notna(), None).astype(numbers)[COLUMNS]


NOTHING = "undefined: the model has too few layers to compare"


class Estimates:
    """Collects the quantities of a :class:`Jackknifed`; ``warning`` is the reason of all that have none of their own.

    ``groups`` and ``clusters``: see there.
    """

    def __init__(
        self,
        probe: str,
        folds: int,
        warning: str = "",
        *,
        groups: float | None = None,
        clusters: float | None = None,
    ):
        self.probe, self.folds, self.warning = probe, folds, warning
        self.groups, self.clusters = groups, clusters
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

    def refitted_share(self, quantity: str, top: Array, bottom: Array, **where: Any) -> None:
        """Add ``sum(top) / sum(bottom)`` of the diagonals of sums ``[K, K]``: group j, fitted without j and k.

        Its values without group k are those of the other groups, fitted without k.
        """
        whole, other = np.eye(len(top), dtype=bool), ~np.eye(len(top), dtype=bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(top[whole].sum() / bottom[whole].sum())
            self.add(quantity, value, top.sum(0, where=other) / bottom.sum(0, where=other), **where)

    def done(self) -> Jackknifed:
        """All that was added; undefined as a whole where nothing was."""
        if not self.rows:
            return Jackknifed(self.probe, reason=NOTHING)
        quantity, layer, other, reasons, value, without = zip(*self.rows, strict=True)
        return Jackknifed(
            self.probe,
            quantity,
            layer,
            other,
            reasons,
            np.array(value, dtype=np.float64),
            np.stack(without, 1).astype(np.float64),
            groups=self.groups,
            clusters=self.clusters,
        )
