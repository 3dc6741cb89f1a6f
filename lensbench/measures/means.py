"""Means that indices are computed from, and the estimate with its interval that an index becomes.

Leading axes are free, so that one call serves the point estimate and all bootstrap draws. Layers are 0..L; per-layer
arrays hold layers 0..L-1.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from lensbench.statistics import Array, few_clusters, interval, overlap

SMALLEST_DENOMINATOR = 0.02
"""An index is undefined where the interval of its denominator reaches below this share of K_0."""


SMALLEST_CONSTANT = 0.05
"""K_0, nats/token, below which a model predicts nearly the same everywhere (as untrained ones do): nothing is compared."""


@dataclass(frozen=True)
class Means:
    """Means, nats/token, of everything that an index needs: KL to the model's own distribution unless said otherwise.

    ``constant`` ``[...]``: K_0. ``transfer``, ``transfer_ce``, ``movement`` ``[..., L+1, L+1]``: K_ij, C_ij and D_ij of the
    transfer matrix.
    ``own`` ``[..., L]``: per-layer lenses with prior zero; ``shared``, ``shared_loo`` ``[..., L]`` and ``rotated``
    ``[..., views, L]`` of the same prior and stage. ``own_refined``, ``shared_refined`` ``[..., L]``: the refined stage.
    ``pair`` ``[..., L, L]``: at [i, j], i != j, the lens of layers i and j as it reads j; ``pair_rotated``
    ``[..., views, L, L]``. NaN where there is no such lens.
    """

    constant: Array
    transfer: Array
    transfer_ce: Array
    movement: Array
    own: Array
    shared: Array
    shared_loo: Array
    rotated: Array
    own_refined: Array
    shared_refined: Array
    pair: Array
    pair_rotated: Array

    @classmethod
    def of_clusters(cls, sums: "Means", tokens: Array, weights: Array | None = None) -> "Means":
        """Weighted means over clusters: every field of ``sums`` is ``[clusters, ...]`` sums, ``tokens`` ``[clusters]``.

        ``weights`` ``[draws, clusters]`` gives ``[draws, ...]`` means; None gives the plain means.
        """
        w = np.ones((1, len(tokens))) if weights is None else weights
        total = w @ tokens
        means = {}
        for name, values in sums.items():
            flat = (w @ values.reshape(len(tokens), -1)) / total[:, None]
            shaped = flat.reshape(len(w), *values.shape[1:])
            means[name] = shaped[0] if weights is None else shaped
        return cls(**means)

    def items(self) -> list[tuple[str, Array]]:
        """Every field with its name."""
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


def with_last(matrix: Array) -> Array:
    """A matrix ``[..., n, n]`` of lenses of layers, with an unknown logit lens and last layer: ``[..., n+1, n+1]``."""
    padded = np.full((*matrix.shape[:-2], matrix.shape[-2] + 1, matrix.shape[-1] + 1), np.nan)
    padded[..., :-1, :-1] = matrix
    return padded


def of_layers(m: Means, transfer: Array, moved: Array) -> Means:
    """Means with the matrix ``[..., n, n]`` of some layers (and no logit lens) in place of their own."""
    return replace(m, transfer=with_last(transfer), movement=with_last(moved))


@dataclass(frozen=True)
class Value:
    """An index at every draw, with the denominator that decides whether it is defined (None: always)."""

    value: Array
    denominator: Array | None = None


@dataclass(frozen=True)
class Estimate:
    """An index with its 95 % interval; ``value`` is None where undefined, and ``reason`` says why, or warns."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def meets(self, other: "Estimate") -> bool:
        """Whether both are defined and their intervals overlap; one without an interval is a point."""
        if self.value is None or other.value is None:
            return False
        (low, high), (least, most) = (
            (e.value if e.low is None else e.low, e.value if e.high is None else e.high) for e in (self, other)
        )
        return overlap((low, high), (least, most))  # type: ignore[arg-type]


def estimate(here: Value, drawn: Value, constant: float, clusters: int, undefined: str = "") -> Estimate:
    """One index with its interval, or the reason why it is undefined: its denominator first, then the reason given."""
    floor = max(0.0, SMALLEST_DENOMINATOR * constant)
    reason = undefined
    if drawn.denominator is not None and float(interval(drawn.denominator)[0]) < floor:
        reason = f"undefined: the interval of its denominator reaches below {floor:.3g} nats (2 % of K_0)"
    if not reason and not (np.isfinite(here.value) and np.isfinite(drawn.value).all()):
        reason = "undefined: constant over layers"
    if reason:
        return Estimate(None, None, None, reason)
    low, high = interval(drawn.value)
    return Estimate(float(here.value), float(low), float(high), few_clusters(clusters))


def nothing_to_gain(point: Means) -> str:
    """The reason why all indices are undefined of a model that predicts nearly the same everywhere; otherwise empty."""
    constant = float(point.constant)
    if constant >= SMALLEST_CONSTANT:
        return ""
    return f"undefined: the model predicts nearly the same everywhere (K_0 = {constant:.2g} nats)"
