"""What :mod:`lensbench.probes.injection_survival` reports: survival by pair of layers, paired differences, means, costs."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lensbench.probes.catalogue import SAME_TOKENIZER, WITH_ITS_NULL, Panel, Quantity, Table
from lensbench.probes.measured import Sums
from lensbench.statistics import Array, bootstrap_weights, interval

KINDS = ("error", "signal", "noise")
"""What is injected"""


DIFFERENCES = {"error_minus_signal": ("error", "signal"), "error_minus_noise": ("error", "noise")}
"""Paired differences of survivals"""


SMALLEST_POWER = 1e-8
"""Mean ``|dr_i|^2``, as a share of the final state's power, below which an injection is lost in rounding"""


def add_quantities(sums: Sums, layers: Sequence[int], found: Array, cluster: NDArray[np.int64], power: float) -> None:
    """Add all quantities from the products and rises ``[S, n - 1, 3, n + 2]`` of S tokens; ``cluster`` ``[S]``.

    ``power`` is that of the final state's reading, the unit of ``|dr_i|^2``.
    """
    count = len(layers)
    survivals = {
        (i, j, kind): Survival(found[:, i, at, j], found[:, i, at, i], cluster, power, layers[i])
        for i in range(count - 1)
        for j in range(i + 1, count)
        for at, kind in enumerate(KINDS)
    }
    pairs = [(i, j) for i in range(count - 1) for j in range(i + 1, count)]
    for i, j in pairs:
        for kind in KINDS:
            one = survivals[i, j, kind]
            if one.reason:
                sums.undefined(f"survival_{kind}", one.reason, layer=layers[i], other=layers[j])
            else:
                sums.add(f"survival_{kind}", one.top, one.bottom, layer=layers[i], other=layers[j])
        for name, (left, right) in DIFFERENCES.items():
            _add(sums, name, [(1.0, survivals[i, j, left]), (-1.0, survivals[i, j, right])], layers[i], layers[j])
    for suffix, over in (("", pairs), ("_without_layer0", [(i, j) for i, j in pairs if layers[i] > 0])):
        for kind in KINDS:
            _add(sums, f"mean_survival_{kind}{suffix}", [(1 / len(over), survivals[i, j, kind]) for i, j in over])
        for name, (left, right) in DIFFERENCES.items():
            parts = [(s / len(over), survivals[i, j, kind]) for i, j in over for s, kind in ((1, left), (-1, right))]
            _add(sums, f"mean_{name}{suffix}", parts)
    for i, layer in enumerate(layers[:-1]):
        for at, kind in enumerate(KINDS):
            _add_costs(
                sums, kind, layer, found[:, i, at, [i, count, count + 1]] / 2, survivals[i, i + 1, kind].reason, power
            )


def _add_costs(sums: Sums, kind: str, layer: int, found: Array, reason: str, power: float) -> None:
    """Add the costs of one kind at one layer: ``found`` ``[S, 3]`` are ``|dr_i|^2`` and the two rises."""
    size, end, read = found[:, 0] / power, found[:, 1], found[:, 2]
    for name, top, bottom in (("cost", end, size), ("read_cost", read, size), ("cost_kept", end, read)):
        if reason:
            sums.undefined(f"{name}_{kind}", reason, layer=layer)
        else:
            sums.add(f"{name}_{kind}", top, bottom, layer=layer)


class Survival:
    """One ratio of sums over tokens ``[S]``, or the reason why it has no value."""

    def __init__(self, top: Array, bottom: Array, cluster: NDArray[np.int64], power: float, layer: int):
        self.top, self.bottom, self.reason = top, bottom, ""
        names, number = np.unique(cluster, return_inverse=True)
        by_cluster = np.bincount(number, bottom, len(names))
        low, _ = interval(bootstrap_weights(len(names), 2000, 0) @ by_cluster)
        if not np.isfinite(top).all() or not np.isfinite(bottom).all():
            self.reason = "undefined: a state overflowed after the injection"
        elif bottom.mean() / 2 < SMALLEST_POWER * power:
            self.reason = f"undefined: the lens of layer {layer} makes too small errors to inject"
        elif not low > 0:
            self.reason = f"undefined: the lenses of two folds of documents disagree on what layer {layer} was given"

    @property
    def value(self) -> float:
        """The ratio over all tokens."""
        return float(self.top.sum() / self.bottom.sum())

    @property
    def influence(self) -> Array:
        """What each token ``[S]`` adds to the ratio: its mean is the ratio, its spread that of the ratio to first order."""
        value = self.value
        of_each: Array = value + len(self.top) * (self.top - value * self.bottom) / self.bottom.sum()
        return of_each


def _add(
    sums: Sums,
    quantity: str,
    parts: Sequence[tuple[float, Survival]],
    layer: int | None = None,
    other: int | None = None,
) -> None:
    """Add a weighted sum of ratios of the same tokens, so that its interval is that of paired differences."""
    reason = next((part.reason for _, part in parts if part.reason), "")
    if not parts:
        reason = "undefined: no pair of layers without layer 0"
    if reason:
        sums.undefined(quantity, reason, layer=layer, other=other)
    else:
        top = np.sum([weight * part.influence for weight, part in parts], axis=0)
        sums.add(quantity, top, layer=layer, other=other)


Fate = Literal["corrected", "unchanged", "shrunk", "neither", "undetermined"]
"""What becomes of injected errors"""


UNCHANGED = (0.9, 1.1)
"""Within these bounds an interval of survival says that errors stay as they are"""


def fate_of_errors(rows: pd.DataFrame, suffix: str = "_without_layer0") -> Fate:
    """What becomes of injected errors, from the rows of ``probes.csv`` of one model and seed (or of all seeds).

    ``unchanged``: the interval of its survival lies within :data:`UNCHANGED`. ``corrected``: else, an error survives less
    than a signal, less than noise, and less than 1, each with its interval, while signals stay. ``shrunk``: it would be,
    but signals too surely lie below the lower of :data:`UNCHANGED`, as where skips are scaled down: everything shrinks.
    ``neither``: it surely changes, as its
    interval leaves out 1, but is not surely corrected. ``undetermined``: an interval is missing or too wide for these.
    """
    of = rows.drop_duplicates("quantity").set_index("quantity")
    names = [f"mean_{what}{suffix}" for what in ("survival_error", *DIFFERENCES, "survival_signal")]
    if not set(names) <= set(of.index) or of.loc[names, ["ci_low", "ci_high"]].isna().any(axis=None):
        return "undetermined"
    low, high = (of.loc[names, column].astype(float).to_numpy() for column in ("ci_low", "ci_high"))
    if UNCHANGED[0] <= low[0] and high[0] <= UNCHANGED[1]:
        return "unchanged"
    if high[0] < 1 and high[1] < 0 and high[2] < 0:
        return "shrunk" if high[3] < UNCHANGED[0] else "corrected"
    return "undetermined" if low[0] <= 1 <= high[0] else "neither"


WHAT = {
    "error": "the error of another token",
    "signal": "another token's signal in place of its own",
    "noise": "noise of the error's Mahalanobis length",
}
SURVIVES = "`<ds_ij, dr_i> / <dr_i, dr_i>` of h_i changed by {what} as lens i reads it"
READING = {
    "error": "At 1, later blocks leave it as it is. They correct it if it is below 1, below the signal and below the noise.",
    "signal": "At 1, later blocks leave a change of the prediction as it is.",
    "noise": "At 1, later blocks leave it as it is.",
}
LABELS = {"error_minus_signal": "error - signal", "error_minus_noise": "error - noise"}
LESS = "With its whole interval below 0, the error is taken off more than the {other}."


def _pair_quantities() -> list[Quantity]:
    """Of each pair of layers."""
    found = []
    for kind in KINDS:
        panel = None
        if kind == "error":
            panel = Panel("distance j - i", "survival of an injected error", at="distance", zero=False)
        formula = SURVIVES.format(what=WHAT[kind])
        found.append(Quantity(f"survival_{kind}", f"survival, {kind}", formula, "pair", READING[kind], panel=panel))
    for name, (left, right) in DIFFERENCES.items():
        panel = Panel("distance j - i", f"survival, {LABELS[name]}", at="distance")
        formula = f"`survival_{left}` minus `survival_{right}`, same tokens"
        reading = LESS.format(other=right)
        found.append(Quantity(name, f"survival, {LABELS[name]}", formula, "pair", reading, WITH_ITS_NULL, panel=panel))
    return found


def _mean_quantities() -> list[Quantity]:
    """Of a model: means over its pairs, with layer 0 and without."""
    found = []
    for suffix, over, label in (
        ("", "all pairs of layers", ""),
        ("_without_layer0", "all pairs i < j with i >= 1", ", without layer 0"),
    ):
        table: Table | None = "models" if suffix else None
        for kind in KINDS:
            formula = f"mean of `survival_{kind}` over {over}"
            name = f"mean_survival_{kind}{suffix}"
            found.append(Quantity(name, f"survival, {kind}{label}", formula, "model", READING[kind], table=table))
        for name, (_, right) in DIFFERENCES.items():
            formula, reading = f"mean of `{name}` over {over}, same tokens", LESS.format(other=right)
            shown = f"survival, {LABELS[name]}{label}"
            found.append(Quantity(f"mean_{name}{suffix}", shown, formula, "model", reading, WITH_ITS_NULL, table=table))
    return found


def _cost_quantities() -> list[Quantity]:
    """Of each layer: what an injection costs at the end, and as the lens reads it."""
    unit = "per unit: `|dr_i|^2` as large as the power of the final state's reading"
    found = []
    for kind in KINDS:
        found += [
            Quantity(
                f"cost_{kind}",
                f"cost, {kind}",
                f"rise of the model's CE at the token with {WHAT[kind]} injected (nats), {unit}",
                "layer",
                "Near 0 although the injection survives: later blocks and the read-out ignore it. Compare `read_cost`.",
                SAME_TOKENIZER,
            ),
            Quantity(
                f"read_cost_{kind}",
                f"cost as read, {kind}",
                f"as `cost_{kind}`, of the CE of the layer's own lens (prior zero)",
                "layer",
                "What the injection would cost if layer i were read out at once.",
                SAME_TOKENIZER,
            ),
            Quantity(
                f"cost_kept_{kind}",
                f"cost kept, {kind}",
                f"`cost_{kind}` by `read_cost_{kind}`",
                "layer",
                "At 1, it costs at the end what it costs the lens. Low with a low survival: corrected; low with a "
                "survival of 1: ignored.",
                panel=Panel("layer injected into", "cost kept of an injected error") if kind == "error" else None,
            ),
        ]
    return found


SURVIVAL_QUANTITIES = (*_pair_quantities(), *_mean_quantities(), *_cost_quantities())
"""The catalogue of the probe"""
