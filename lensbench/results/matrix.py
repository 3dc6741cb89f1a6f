"""``transfer.csv``: every lens on every layer, and what of a matrix the distance of its layers alone explains."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lensbench.lenses.fit import FitSummary
from lensbench.lenses.jacobian_kinds import JACOBIAN_LENS
from lensbench.lenses.lens import LensId
from lensbench.lenses.logit import LOGIT_LENS
from lensbench.measures.indices import structure_indices
from lensbench.measures.means import Estimate, Means, estimate, nothing_to_gain
from lensbench.results.sums import JACOBIAN_MATRIX, ClusterSums, MatrixSums
from lensbench.statistics import ratio_with_interval

Array = NDArray[np.float64]


def sums_of_jacobians(sequences: pd.DataFrame) -> MatrixSums | None:
    """Sums of the Jacobian lens of every layer on every layer, by cluster; None where a suite does not ask for them."""
    rows = sequences[sequences["lens"] == JACOBIAN_MATRIX]
    if rows.empty:
        return None
    documents = sorted(rows["document"].astype(str).unique())
    size = int(rows["layer"].max()) + 1
    at = rows["document"].astype(str).map({name: k for k, name in enumerate(documents)}).to_numpy()

    def grid(column: str) -> Array:
        values = np.zeros((len(documents), size, size))
        np.add.at(values, (at, rows["lens_layer"].to_numpy(), rows["layer"].to_numpy()), rows[column].to_numpy(float))
        return values

    return MatrixSums(grid("kl"), grid("ce"), grid("movement"), grid("top1"))


def transfer_rows(
    fit: FitSummary, sums: ClusterSums, weights: Array, jacobians: MatrixSums | None = None
) -> Iterator[dict[str, Any]]:
    """The transfer matrix of a model and seed, and that of its Jacobian lenses where there are sums of them.

    Only then is a row's lens named.
    """
    totals = sums.totals
    matrix = MatrixSums(totals.transfer, totals.transfer_ce, totals.movement, sums.top1)
    rows = matrix_rows(fit, matrix, sums.tokens, weights)
    if jacobians is None:
        yield from rows
        return
    for row in rows:
        kind = LOGIT_LENS.kind if row["lens_layer"] == fit.depth else fit.headline.kind
        yield {"lens": kind} | row
    for row in rows_of(JACOBIAN_LENS, [None] * fit.depth, jacobians, sums.tokens, weights):
        if row["lens_layer"] < fit.depth:  # J of the last state is the identity, the logit lens
            yield {"lens": JACOBIAN_LENS.kind} | row


def matrix_rows(fit: FitSummary, sums: MatrixSums, tokens: Array, weights: Array) -> Iterator[dict[str, Any]]:
    """A row for each lens of a fit's transfer matrix and layer: means and penalties in nats/token, with intervals.

    ``tokens`` ``[clusters]``; ``weights`` ``[draws, clusters]`` of the bootstrap.
    """
    return rows_of(fit.headline, fit.records[fit.headline].ridge, sums, tokens, weights)


def rows_of(
    lens: LensId, ridges: Sequence[float | None], sums: MatrixSums, tokens: Array, weights: Array
) -> Iterator[dict[str, Any]]:
    """:func:`matrix_rows` of one kind of lens; ``ridges``: those of the layers."""
    values, size = {}, sums.kl.shape[-1]
    for name, array in (
        ("kl", sums.kl),
        ("ce", sums.ce),
        ("movement_kl", sums.movement),
        ("top1_agreement", sums.top1),
    ):
        low, values[name], high = ratio_with_interval(array, tokens, weights)
        if name == "top1_agreement":
            values |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
        if name in ("kl", "ce"):
            penalty = array - np.diagonal(array, axis1=1, axis2=2)[:, None, :]
            low, mean, high = ratio_with_interval(penalty, tokens, weights)
            values |= {f"penalty_{name}": mean, f"penalty_{name}_ci_low": low, f"penalty_{name}_ci_high": high}
    for i, j in itertools.product(range(size), repeat=2):
        if np.isnan(values["kl"][i, j]):
            continue  # a suite without the matrix reads lenses at their own layers
        yield {
            "lens_layer": i,
            "stream_layer": j,
            "stage": lens.stage,
            "prior": lens.prior,
            "ridge": ridges[i] if i < size - 1 else None,
            "tolerance": lens.tolerance,
            **{name: float(array[i, j]) for name, array in values.items()},
        }


def structure_estimates(
    sums: ClusterSums, point: Means, drawn: Means, weights: Array, jacobians: MatrixSums | None
) -> dict[str, Estimate]:
    """What the distance of two layers alone explains of the matrices, where a suite asks for that of Jacobian lenses."""
    if jacobians is None:
        return {}
    clusters, constant, reason = len(sums.tokens), float(point.constant), nothing_to_gain(point)
    flat = jacobians.kl.reshape(clusters, -1)
    shape = jacobians.kl.shape[1:]
    of_jacobians = (
        (flat.sum(0) / sums.tokens.sum()).reshape(shape),
        ((weights @ flat) / (weights @ sums.tokens)[:, None]).reshape(len(weights), *shape),
    )
    found = {}
    for index in structure_indices():
        assert index.of_matrix is not None
        here, there = of_jacobians if index.stage == "backward" else (point.transfer, drawn.transfer)
        if np.isfinite(here).all():  # not of a suite that leaves out the transfer matrix
            with np.errstate(divide="ignore", invalid="ignore"):
                found[index.name] = estimate(index.of_matrix(here), index.of_matrix(there), constant, clusters, reason)
    return found
