"""Measurements beside the lenses, each usable alone: a function of a model's stream that gives sums per window.

A probe returns :class:`Measured`: quantities that are ratios of sums over the scored windows, so that all of them get their
interval from the same bootstrap over documents, and a tidy frame from :meth:`Measured.frame`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import from_numpy
from transformers import PreTrainedTokenizerBase

from lensbench.corpus import Windows, clusters_of
from lensbench.errors import LensbenchError
from lensbench.indices import SMALLEST_DENOMINATOR, bootstrap_weights, few_clusters, interval
from lensbench.lenses import AffineMaps
from lensbench.models.ngram import KneserNeyBigram
from lensbench.probes.crossfit import COLUMNS, Jackknifed
from lensbench.samples import Samples
from lensbench.stream import Capture, ResidualStream, capture

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReadText:
    """What probes of language need beside a stream."""

    fit_windows: Windows
    """Other text of the same kind, that lenses were fitted on"""
    bigram: Callable[[], KneserNeyBigram]
    """Counted on the train split"""
    tokenizer: Tokenizer | PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What probes look at: a model's stream, the inputs that are scored, and tokens of the three splits when asked for."""

    stream: ResidualStream
    samples: Samples
    layers: list[int]
    """The layers of what is made for pairs of them"""
    lenses: AffineMaps
    """Per-layer lenses 0..L-1 of the headline matrix"""
    rotated: bool
    read: Callable[[str], Capture]
    own: AffineMaps
    """Per-layer lenses 0..L-1 as the shared one was made: closed form, prior zero, best ridge"""
    shared: AffineMaps
    """The one lens for all layers"""
    text: ReadText | None = None
    """Where the samples are windows of text"""
    report: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what passes by, how many have, and of how many"""
    say: Callable[[str], None] = lambda line: None
    """Called with what a user should know of how something is measured"""

    @classmethod
    def plain(
        cls,
        stream: ResidualStream,
        windows: Windows,
        fit_windows: Windows,
        tokenizer: Tokenizer | PreTrainedTokenizerBase,
    ) -> "Subject":
        """Outside a suite: with the logit lens at every layer, and a bigram counted on ``fit_windows``.

        Other lenses, or a bigram of more text, with ``dataclasses.replace``. Nothing is measured on ``fit_windows`` alone;
        they must be other documents than ``windows``.
        """
        d = stream.d_model

        def read(split: str) -> Capture:
            if split == "fit":
                return capture(stream, fit_windows)
            constant = capture(stream, fit_windows.spread(16)).mean_p
            return capture(stream, windows, constant=constant)

        def bigram() -> KneserNeyBigram:
            return KneserNeyBigram.fit(fit_windows.ids[fit_windows.inside], stream.vocab_size)

        lenses = AffineMaps(torch.eye(d).repeat(stream.layers, 1, 1), torch.zeros(stream.layers, d))
        layers, text = list(range(stream.layers)), ReadText(fit_windows, bigram, tokenizer)
        return cls(stream, windows, layers, lenses, False, read, lenses, AffineMaps.identity(d), text)

    @property
    def windows(self) -> Windows:
        """The samples, where they are windows of text; probes that ask for them are not in :data:`OF_IMAGES_TOO`."""
        if not isinstance(self.samples, Windows):
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.samples

    @property
    def words(self) -> ReadText:
        """As :attr:`windows`, what goes with them."""
        if self.text is None:
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.text

    @cached_property
    def fit(self) -> Capture:
        return self.read("fit")

    @cached_property
    def dev(self) -> Capture:
        return self.read("dev")

    @cached_property
    def eval(self) -> Capture:
        return self.read("eval")


@dataclass(frozen=True)
class Measured:
    """Per-window sums: quantity k is ``sum(top[:, k]) / sum(bottom[:, k])``, both ``[S, K]``.

    ``layer`` and ``other`` say what it belongs to (None: the whole model). ``floor`` is the mean denominator per token, in
    nats, below which the ratio is not defined; 0 where the denominator is no loss. ``tokens`` ``[S]``; ``documents`` ``[S]``
    names the cluster of each window. With a ``reason`` there is nothing else: the probe does not apply.
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

    def save(self, folder: Path) -> None:
        arrays = {"top": self.top, "bottom": self.bottom, "tokens": self.tokens}
        save_file({k: from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, folder / "sums.safetensors")
        labels = {k: list(getattr(self, k)) for k in ("quantity", "layer", "other", "floor", "documents")}
        (folder / "labels.json").write_text(json.dumps({"probe": self.probe, "reason": self.reason, **labels}))

    @classmethod
    def load(cls, folder: Path) -> "Measured":
        arrays: dict[str, Any] = {k: v.numpy() for k, v in load_file(folder / "sums.safetensors").items()}
        return cls(**json.loads((folder / "labels.json").read_text()), **arrays)

    def frame(self, draws: int = 2000, clusters: Mapping[str, str] | None = None) -> pd.DataFrame:
        """A row per quantity with its 95 % interval over clusters; empty ``value`` with the reason where undefined.

        ``clusters``: the cluster of each document, where the windows are some of a larger set that decides it.
        """
        if self.reason:
            row = dict.fromkeys(COLUMNS) | {"probe": self.probe, "quantity": self.probe, "reason": self.reason}
            return pd.DataFrame([row], columns=COLUMNS)
        of = clusters_of(self.documents) if clusters is None else clusters
        names, cluster = np.unique([of[name] for name in self.documents], return_inverse=True)

        def by_document(values: Array) -> Array:
            sums = np.zeros((len(names), values.shape[-1]))
            np.add.at(sums, cluster, values)
            return sums

        top, bottom = by_document(self.top), by_document(self.bottom)
        tokens = by_document(self.tokens[:, None])
        weights = bootstrap_weights(len(names), draws, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (weights @ top) / (weights @ bottom)
            value = top.sum(0) / bottom.sum(0)
            per_token = (weights @ bottom) / (weights @ tokens)
        low, high = interval(drawn)
        warning = few_clusters(len(names))
        least, _ = interval(per_token)
        rows = []
        for k, quantity in enumerate(self.quantity):
            row = {"probe": self.probe, "quantity": quantity, "layer": self.layer[k], "other": self.other[k]}
            if least[k] < self.floor[k] or not np.isfinite(value[k]):
                reason = f"undefined: the interval of its denominator reaches below {self.floor[k]:.3g}"
                row |= {"value": None, "ci_low": None, "ci_high": None, "reason": reason}
            elif np.ptp(drawn[:, k]) <= 1e-9 * abs(value[k]):
                row |= {"value": value[k], "ci_low": None, "ci_high": None, "reason": "the same for every document"}
            else:
                row |= {"value": value[k], "ci_low": low[k], "ci_high": high[k], "reason": warning}
            rows.append(row)
        return pd.DataFrame(rows, columns=COLUMNS)


class Sums:
    """Collects the columns of a :class:`Measured`."""

    def __init__(self, probe: str, samples: Samples, tokens: Array):
        self.probe, self.tokens = probe, tokens
        names = samples.document_names
        self.documents = [str(names[k]) for k in samples.documents]
        self.columns: list[tuple[str, int | None, int | None, float, Array, Array]] = []

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
        """One quantity; without ``bottom`` a mean over tokens."""
        self.columns.append((quantity, layer, other, floor, top, self.tokens if bottom is None else bottom))

    def measured(self) -> Measured:
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
        )


def smallest_gain(captured: Capture) -> float:
    """2 % of K_0: the smallest denominator, nats/token, that a share of a loss is taken of."""
    return SMALLEST_DENOMINATOR * float(captured.constant_kl.mean())


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


from lensbench.probes import (  # noqa: E402,F401  (each registers what it has)
    accuracy,
    causal_fidelity,
    error_transport,
    few_shot,
    gradient_steps,
    gradients,
    head_weights,
    paths,
    places,
    prediction_visibility,
    representation,
)
