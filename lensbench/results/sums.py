"""Sums over clusters of documents: what every interval resamples."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lensbench.data.corpus import clusters_of
from lensbench.errors import LensbenchError
from lensbench.lenses.lens import tolerance_in
from lensbench.measures.means import Means

JACOBIAN_MATRIX = "jacobian_matrix"
"""In the column ``lens`` of sums: the Jacobian lens of every layer as it reads every layer"""


@dataclass(frozen=True)
class MatrixSums:
    """Sums of every lens on every layer, ``[clusters, L+1, L+1]``: nats, and tokens with the model's own top word."""

    kl: NDArray[np.float64]
    ce: NDArray[np.float64]
    movement: NDArray[np.float64]
    top1: NDArray[np.float64]


@dataclass(frozen=True)
class ClusterSums:
    """Sums over the clusters (documents, or folders of them) of one model and seed: what every interval resamples.

    ``tokens``, ``bytes`` ``[clusters]``; ``totals`` holds the fields of :class:`Means` as ``[clusters, ...]`` sums.
    """

    documents: tuple[str, ...]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    totals: Means
    top1: NDArray[np.float64]
    """``[clusters, L+1, L+1]``: tokens at which the lens's most probable word is the model's."""
    curve: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Tolerance -> sums of KL and movement, ``[clusters, L+1, L+1]``; NaN outside the chosen layers."""

    @classmethod
    def of(cls, sequences: pd.DataFrame) -> "ClusterSums":
        """From the sums of one model and seed, by cluster or by sequence; ``top1`` may be missing.

        Raises :class:`LensbenchError` where a KL is not a number.
        """
        refuse_missing(sequences)
        documents = tuple(sorted(sequences["document"].astype(str).unique()))
        model = by_document(sequences, lens="model")
        constant = by_document(sequences, lens="constant")["kl"].to_numpy(float)
        layers = int(sequences["layer"].max())
        tuned = sequences[(sequences["lens"] == "tuned") & (sequences["prior"] == "identity")]
        logit = sequences[sequences["lens"] == "logit"]
        matrix = pd.concat([tuned, logit])

        def grid(column: str, rows: pd.DataFrame = matrix, size: int = layers + 1) -> NDArray[np.float64]:
            """``[clusters, size, size]``, NaN where there is no such row."""
            if rows.empty:
                return np.full((len(documents), size, size), np.nan)
            table = rows.pivot_table(
                index="document", columns=["lens_layer", "layer"], values=column, aggfunc="sum", observed=True
            ).sort_index()
            values = np.full((len(documents), size, size), np.nan)
            at = np.array(table.columns.to_list(), dtype=np.int64).reshape(-1, 2)
            values[:, at[:, 0], at[:, 1]] = table.to_numpy(float)
            return values

        def per_layer(lens: str, stage: str = "closed", view: int = -1) -> NDArray[np.float64]:
            rows = sequences[(sequences["lens"] == lens) & (sequences["stage"] == stage) & (sequences["view"] == view)]
            rows = rows[rows["prior"] == "zero"]
            if rows.empty:
                return np.full((len(documents), layers), np.nan)
            table = rows.pivot_table(index="document", columns="layer", values="kl", aggfunc="sum", observed=True)
            values = np.full((len(documents), layers), np.nan)
            values[:, table.columns.to_numpy(np.int64)] = table.sort_index().to_numpy(float)
            return values

        pairs = sequences[sequences["lens"] == "pair"]
        bases = range(int(pairs["view"].max()) + 1) if len(pairs) else range(0)
        in_bases = [grid("kl", pairs[pairs["view"] == k], layers) for k in bases]
        curve = {}
        for lens in sorted(label for label in sequences["lens"].unique() if tolerance_in(label)):
            rows = sequences[sequences["lens"] == lens]
            curve[tolerance_in(lens) or ""] = grid("kl", rows), grid("movement", rows)

        views = range(int(sequences["view"].max()) + 1)
        totals = Means(
            constant=constant,
            transfer=grid("kl"),
            transfer_ce=grid("ce"),
            movement=grid("movement"),
            own=per_layer("tuned"),
            shared=per_layer("shared"),
            shared_loo=per_layer("shared_loo"),
            rotated=np.stack([per_layer("shared", view=k) for k in views], axis=1),
            own_refined=per_layer("tuned", "refined"),
            shared_refined=per_layer("shared", "refined"),
            pair=grid("kl", pairs[pairs["view"] == -1], layers),
            pair_rotated=np.stack(in_bases, axis=1)
            if in_bases
            else np.full((len(documents), 1, layers, layers), np.nan),
        )
        tokens, sizes = model["tokens"].to_numpy(float), model["bytes"].to_numpy(float)
        top1 = grid("top1") if "top1" in sequences else np.full_like(totals.transfer, np.nan)
        return cls(documents, tokens, sizes, totals, top1, curve)


def clustered(sequences: pd.DataFrame) -> pd.DataFrame:
    """Sums with the cluster of each document in place of its name; sums by cluster stay as they are."""
    names = sequences["document"].astype(str)
    return sequences.assign(document=names.map(clusters_of(names.unique())).astype("category"))


def joined_clusters(names: Iterable[str], groups: int | None) -> dict[str, str]:
    """The cluster of each document; more than ``groups`` of them are joined at random (always the same way)."""
    of = clusters_of(names)
    known = sorted(set(of.values()))
    if groups is None or len(known) <= groups:
        return of
    drawn = np.random.default_rng(0).permutation(len(known)) % groups
    into = {name: f"group {k:04d}" for name, k in zip(known, drawn, strict=True)}
    return {name: into[cluster] for name, cluster in of.items()}


KEYS = ("model", "seed", "lens", "lens_layer", "layer", "stage", "prior", "view", "document")
"""What a sum is of"""


def summed_by_cluster(sequences: pd.DataFrame, groups: int | None = None) -> pd.DataFrame:
    """The rows of a score's ``sequences.parquet``, one for each cluster in place of one for each sequence; sums are float64.

    ``groups``: as :func:`joined_clusters` takes it. Raises :class:`LensbenchError` where a KL is not a number.
    """
    refuse_missing(sequences)
    nats = [name for name in ("kl", "ce", "movement", "top1", "top10") if name in sequences]
    names = sequences["document"].astype(str)
    of = sequences.assign(document=names.map(joined_clusters(names.unique(), groups)).astype("category"))
    # A sum of nothing but unknown values stays unknown.
    wide = of.astype(dict.fromkeys(nats, float))
    found = (
        wide.groupby(list(KEYS), observed=True, sort=False)[["tokens", "bytes", *nats]].sum(min_count=1).reset_index()
    )
    found["sequence"] = 0
    kept = {name: sequences[name].dtype for name in ("tokens", "bytes", "sequence") if name in sequences}
    return found[[name for name in sequences.columns if name in found]].astype(kept)


def compared_sums(sums: pd.DataFrame) -> pd.DataFrame:
    """Of sums by cluster, what comparisons read (:class:`ClusterSums`), rounded: the rows of ``cluster_sums.parquet``.

    Left out: lenses that no compared index reads, the curve over tolerances, cross-entropies of other lenses than the
    transfer matrix's, and counts of equal top words. Each model and seed is rounded to its :func:`step_of_sums`.
    """
    matrix = (sums["lens"] == "logit") | ((sums["lens"] == "tuned") & (sums["prior"] == "identity"))
    own = (sums["lens"] == "tuned") & (sums["prior"] == "zero") & (sums["view"] == -1)
    others = sums["lens"].isin(["constant", "model", "shared", "shared_loo", "pair"])
    with_ce = matrix | (sums["lens"] == "model")
    kept = sums.assign(ce=sums["ce"].where(with_ce))[matrix | own | others]
    kept = kept[[*KEYS, "tokens", "bytes", "kl", "ce", "movement"]]
    rounded = [to_steps(rows) for _, rows in kept.groupby(["model", "seed"], observed=True, sort=False)]
    return pd.concat(rounded, ignore_index=True)


def step_of_sums(tokens: NDArray[np.float64]) -> float:
    """The step, nats, that sums over clusters of so many ``tokens`` ``[clusters]`` are rounded to: a power of two.

    It is at most a thousandth of the spread of a cluster's sum where the loss of a token has a spread of 1 nat. A mean over
    all N tokens moves by about ``0.0003 / sqrt(N)`` nats, a thousandth of what its interval says of it.
    """
    return float(2.0 ** np.floor(np.log2(1e-3 * tokens.mean() ** 0.5)))


def to_steps(sums: pd.DataFrame) -> pd.DataFrame:
    """The sums of one model and seed, rounded to their step: float32 holds its multiples exactly, and they pack well."""
    step = step_of_sums(by_document(sums, lens="model")["tokens"].to_numpy(float))
    rounded = {
        name: (np.round(sums[name].astype(float) / step) * step).astype("float32") for name in ("kl", "ce", "movement")
    }
    return sums.assign(**rounded)


def refuse_missing(sequences: pd.DataFrame) -> None:
    """Raise :class:`LensbenchError` where a KL is not a number: a sum would pass over it as if the lens were perfect."""
    missing = ~np.isfinite(sequences["kl"].to_numpy())
    if missing.any():
        row = sequences[missing].iloc[0]
        raise LensbenchError(
            f"{row['model']}: the KL of lens {row['lens']} at layer {row['layer']} is not a number in {row['document']} "
            f"(and {int(missing.sum()) - 1} more): the scores are damaged, or a lens overflowed"
        )


def by_document(sequences: pd.DataFrame, *, lens: str) -> pd.DataFrame:
    """Sums ``tokens, bytes, kl, ce`` of one lens, a row for every document."""
    rows = sequences[sequences["lens"] == lens]
    columns = ["tokens", "bytes", "kl", "ce"]
    return rows.groupby("document", observed=True)[columns].sum().sort_index()
