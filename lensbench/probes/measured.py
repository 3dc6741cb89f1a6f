"""What a probe hands back: sums per window with a bootstrap interval, or estimates with a jackknife interval."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import save_file
from torch import from_numpy

from lensbench.data.corpus import clusters_of
from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.measures.means import SMALLEST_DENOMINATOR
from lensbench.probes.tools.crossfit import COLUMNS, NOTHING, Jackknifed, joined_documents
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.stages import ANEW
from lensbench.runtime.texts import read_json
from lensbench.statistics import (
    Array,
    bootstrap_weights,
    effective_clusters,
    few_clusters,
    interval,
    small_sample_interval,
    too_few_clusters,
)
from lensbench.streams.capture import Capture


@dataclass(frozen=True)
class Measured:
    """Sums per window of K quantities: quantity k is ``sum(top[:, k]) / sum(bottom[:, k])``, both ``[S, K]``.

    ``layer`` and ``other`` say what each belongs to (None: the whole model). ``floor`` is the mean denominator per token, in
    nats, below which the ratio is undefined; it is 0 where the denominator is no loss. ``tokens`` ``[S]`` counts scored
    tokens, ``documents`` ``[S]`` names the document of each window. ``reasons`` say why single quantities are undefined
    (empty: they are defined). A ``reason`` says why the probe does not apply; all other fields are then empty.
    """

    probe: str
    quantity: Sequence[str] = ()
    layer: Sequence[int | None] = ()
    other: Sequence[int | None] = ()
    floor: Sequence[float] = ()
    top: Array = field(default_factory=lambda: np.zeros((0, 0)))
    bottom: Array = field(default_factory=lambda: np.zeros((0, 0)))
    tokens: Array = field(default_factory=lambda: np.zeros(0))
    documents: Sequence[str] = ()
    reason: str = ""
    reasons: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Write ``sums.safetensors`` and ``labels.json`` into the folder."""
        arrays = {"top": self.top, "bottom": self.bottom, "tokens": self.tokens}
        save_file({k: from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, folder / "sums.safetensors")
        labels = {k: list(getattr(self, k)) for k in ("quantity", "layer", "other", "floor", "documents", "reasons")}
        (folder / "labels.json").write_text(json.dumps({"probe": self.probe, "reason": self.reason, **labels}))

    @classmethod
    def load(cls, folder: Path) -> "Measured":
        """What :meth:`save` wrote into the folder."""
        arrays: dict[str, Any] = {k: v.numpy() for k, v in read_tensors(folder / "sums.safetensors", ANEW).items()}
        labels = read_json(folder / "labels.json", ANEW)
        try:
            return cls(**labels, **arrays)
        except TypeError as error:
            raise LensbenchError(f"{folder} is damaged: {error}; {ANEW}") from error

    def frame(self, draws: int = 2000, clusters: Mapping[str, str] | None = None) -> pd.DataFrame:
        """A row per quantity with its 95 % bootstrap interval over clusters of documents.

        ``clusters`` names the cluster of each document, where the windows are some of a larger set. An undefined quantity
        has no value, and ``reason`` says why.
        """
        if self.reason:
            row = dict.fromkeys(COLUMNS) | {"probe": self.probe, "quantity": self.probe, "reason": self.reason}
            return pd.DataFrame([row], columns=COLUMNS)
        of = clusters_of(self.documents) if clusters is None else clusters
        names, cluster = np.unique([of[name] for name in self.documents], return_inverse=True)

        def by_cluster(values: Array) -> Array:
            sums = np.zeros((len(names), values.shape[-1]))
            np.add.at(sums, cluster, values)
            return sums

        top, bottom = by_cluster(self.top), by_cluster(self.bottom)
        tokens = by_cluster(self.tokens[:, None])
        weights = bootstrap_weights(len(names), draws, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (weights @ top) / (weights @ bottom)
            value = top.sum(0) / bottom.sum(0)
            per_token = (weights @ bottom) / (weights @ tokens)
        least, _ = interval(per_token)
        effective = effective_clusters(np.arange(len(names)), tokens[:, 0])
        return pd.DataFrame(self._rows(value, drawn, least, effective), columns=COLUMNS)

    def _rows(self, value: Array, drawn: Array, least: Array, clusters: float) -> Iterator[dict[str, Any]]:
        """Rows of :meth:`frame` from values ``[K]``, bootstrap draws ``[draws, K]`` and least denominators ``[K]``."""
        low, high = small_sample_interval(value, drawn, max(clusters, 2.0))
        for k, quantity in enumerate(self.quantity):
            row = {"probe": self.probe, "quantity": quantity, "layer": self.layer[k], "other": self.other[k]}
            row |= {"value": None, "ci_low": None, "ci_high": None}
            reason = self._undefined(k, value[k], least[k])
            if reason:
                yield row | {"reason": reason}
            elif reason := _no_interval(value[k], drawn[:, k], clusters):
                yield row | {"value": value[k], "reason": reason}
            else:
                yield row | {"value": value[k], "ci_low": low[k], "ci_high": high[k], "reason": few_clusters(clusters)}

    def _undefined(self, k: int, value: float, least: float) -> str:
        """Why a quantity has no value; empty where it has one."""
        if self.reasons and self.reasons[k]:
            return self.reasons[k]
        if not (np.isfinite(self.top[:, k]).all() and np.isfinite(self.bottom[:, k]).all()):
            return "undefined: it is not a number in some windows"
        if least < self.floor[k]:
            return f"undefined: the interval of its denominator reaches below {self.floor[k]:.3g}"
        return "" if np.isfinite(value) else "undefined: nothing to take a share of"


def _no_interval(value: float, drawn: Array, clusters: float) -> str:
    """Why a value has no interval, by its draws ``[draws]``; empty where it has one."""
    if reason := too_few_clusters(clusters):
        return reason
    if not np.isfinite(drawn).all():
        return "no interval: in some draws of documents there is nothing to take a share of"
    return "the same for every document" if np.ptp(drawn) <= 1e-9 * abs(value) else ""


class Sums:
    """Collects the quantities of a :class:`Measured`; ``tokens`` ``[S]`` are the scored tokens of each window.

    Documents that have a window in common go by one name: what a text holds twice tells an interval nothing new.
    """

    def __init__(self, probe: str, samples: Samples, tokens: Array):
        self.probe, self.tokens = probe, tokens
        names = samples.document_names
        documents = joined_documents(samples) if isinstance(samples, Windows) else samples.documents
        self.documents = [str(names[k]) for k in documents]
        self.columns: list[tuple[str, int | None, int | None, float, Array, Array]] = []
        self.reasons: list[str] = []

    def add(
        self,
        quantity: str,
        top: Array,
        bottom: Array | None = None,
        *,
        layer: int | None = None,
        other: int | None = None,
        floor: float = 0.0,
    ) -> None:
        """Add one quantity from sums per window ``[S]``; without ``bottom`` it is a mean over tokens."""
        self.columns.append((quantity, layer, other, floor, top, self.tokens if bottom is None else bottom))
        self.reasons.append("")

    def undefined(self, quantity: str, reason: str, *, layer: int | None = None, other: int | None = None) -> None:
        """Add one quantity that has no value, and why."""
        self.add(quantity, np.full(len(self.tokens), np.nan), layer=layer, other=other)
        self.reasons[-1] = reason

    def measured(self) -> Measured:
        """All that was added; undefined as a whole where nothing was."""
        if not self.columns:
            return Measured(self.probe, reason=NOTHING)
        quantity, layer, other, floor, top, bottom = zip(*self.columns, strict=True)
        return Measured(
            self.probe,
            quantity,
            layer,
            other,
            floor,
            np.stack(top, 1),
            np.stack(bottom, 1),
            self.tokens,
            self.documents,
            reasons=self.reasons,
        )


def smallest_gain(captured: Capture) -> float:
    """The smallest denominator, nats/token, that a share of a loss is taken of: 2 % of K_0."""
    return SMALLEST_DENOMINATOR * float(captured.constant_kl.mean())


Measurement = Measured | Jackknifed
"""What a probe hands back."""


def load_measurement(folder: Path) -> Measurement:
    """What the stage folder of a probe holds."""
    return (Measured if (folder / "sums.safetensors").exists() else Jackknifed).load(folder)
