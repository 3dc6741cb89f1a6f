"""Every lens on every layer: KL, cross-entropy and movement from one log-sum-exp per lens, layer and token.

With ``e = W^T p`` and ``n = norm(x)``, ``KL(p || q) = sum p log p - e.n + logsumexp(W n)`` and the cross-entropy is
``logsumexp(W n) - w_y.n``: the softmax of a lens is never formed, the model's own never formed again. An
:class:`lensbench.lenses.estimated.Estimator` computes a share of the log-sum-exps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.estimated import Estimator
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import Reference, normalised_on_own, score
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sums_of_all
from lensbench.streams.readout import ReadOut


@dataclass(frozen=True)
class TransferSums:
    """Per-window sums over the scored tokens, float64 ``[S, lenses, layers]``: nats, and counts of equal top words."""

    kl: np.ndarray
    ce: np.ndarray
    movement: np.ndarray
    top1: np.ndarray


def rows_and_columns(
    captured: Capture, per_layer: AffineMaps, lenses: Sequence[int] | None, layers: Sequence[int] | None
) -> tuple[list[int], list[int], AffineMaps]:
    """The lenses and layers of a matrix, all of 0..L where left out, and the lenses' maps; lens L is the identity."""
    everything = range(captured.layers + 1)
    chosen = list(everything if lenses is None else lenses)
    identity = AffineMaps.identity(captured.states.shape[-1])
    maps = AffineMaps.stack([per_layer.to(captured.states), identity.to(captured.states)])[chosen]
    return chosen, list(everything if layers is None else layers), maps


@torch.no_grad()
def transfer_sums(
    readout: ReadOut,
    captured: Capture,
    per_layer: AffineMaps,
    *,
    lenses: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    movement: bool = True,
    estimator: Estimator | None = None,
    memory_gib: float = float("inf"),
    pieces: Pieces = NOTHING_KEPT,
    name: str = "transfer",
    report: Callable[[int], None] | None = None,
) -> TransferSums:
    """The matrix for per-layer lenses 0..L-1: ``K_ij``, ``C_ij``, movement ``D_ij = E KL(q_ii || q_ij)``, top-1 agreement.

    Lens L is the identity. ``lenses`` and ``layers`` (of 0..L) choose rows and columns; left out, all of them. Without
    ``movement``, which needs every lens's softmax on its own layer, that field is NaN. With an ``estimator`` of the same
    capture all are unbiased estimates. Columns that are finished ``pieces`` called ``name`` are taken up;
    ``report(layer)`` after each.
    """
    chosen, layers, maps = rows_and_columns(captured, per_layer, lenses, layers)
    names = [f.name for f in fields(TransferSums) if movement or f.name != "movement"]

    @cache
    def references() -> tuple[Reference, Reference] | None:
        return None if estimator is None or not movement else estimator.references(chosen, maps, memory_gib)

    @cache
    def reference() -> Reference | None:
        if not movement:
            return None
        return Reference.of(readout, normalised_on_own(readout, captured, chosen, maps), len(chosen), memory_gib)

    def column(layer: int) -> dict[str, Tensor]:
        if estimator is None:
            scores = score(readout, captured.states[layer], maps, captured, reference())
        else:
            scores = estimator.score(layer, maps, references())
        return {name: torch.from_numpy(sums_of_all(getattr(scores, name), captured)) for name in names}

    columns = []
    for layer in layers:
        columns.append(pieces.get(f"{name}-{layer}", partial(column, layer)))
        if report is not None:
            report(layer)
    sums = {name: np.stack([c[name].numpy().T for c in columns], axis=-1) for name in names}
    return TransferSums(**{"movement": np.full_like(sums["kl"], np.nan), **sums})


@torch.no_grad()
def own_sums(
    readout: ReadOut,
    captured: Capture,
    per_layer: AffineMaps,
    *,
    pieces: Pieces = NOTHING_KEPT,
    name: str = "own-layers",
    report: Callable[[int], None] | None = None,
) -> TransferSums:
    """What of the matrix needs no transfer: every lens on its own layer, and the logit lens on all; the rest is NaN.

    Movement is NaN too. All are exact. Columns that are finished ``pieces`` called ``name`` are taken up.
    """
    depth = captured.layers
    sums: dict[str, np.ndarray] = {}
    for layer in range(depth + 1):
        lenses = sorted({layer, depth})
        _, _, maps = rows_and_columns(captured, per_layer, lenses, [layer])

        def column(layer: int = layer, maps: AffineMaps = maps) -> dict[str, Tensor]:
            scores = score(readout, captured.states[layer], maps, captured)
            return {n: torch.from_numpy(sums_of_all(getattr(scores, n), captured)) for n in ("kl", "ce", "top1")}

        for quantity, values in pieces.get(f"{name}-{layer}", column).items():
            whole = sums.setdefault(quantity, np.full((values.shape[-1], depth + 1, depth + 1), np.nan))
            whole[:, lenses, layer] = values.numpy().T
        if report is not None:
            report(layer)
    return TransferSums(**{"movement": np.full_like(sums["kl"], np.nan), **sums})


def penalties(sums: np.ndarray) -> np.ndarray:
    """``X_ij - X_jj`` of a whole square matrix of sums ``[..., L+1, L+1]``."""
    penalty: np.ndarray = sums - np.diagonal(sums, axis1=-2, axis2=-1)[..., None, :]
    return penalty
