"""The table of lenses between models: penalties of each pair and layer, paired with their null, and means over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lensbench.measures.between import Between
from lensbench.statistics import (
    Array,
    bootstrap_weights,
    effective_clusters,
    few_clusters,
    interval,
    jackknife,
    mean_over_seeds,
)

TABLE = "between.csv"

WHO = (
    "kind", "lens_model", "lens_seed", "lens_tokens", "states_model", "states_seed", "states_tokens", "map", "head",
    "lens_layer", "states_layer",
)  # fmt: skip
QUANTITIES = ("own_kl", "penalty", "null_penalty", "saved", "shared", "same_tokens", "penalty_ce", "null_penalty_ce")
BETWEEN_COLUMNS = (
    *WHO, "ridge",
    *(column for name in QUANTITIES for column in (name, f"{name}_ci_low", f"{name}_ci_high")),
    "tokens", "clusters", "note",
)  # fmt: skip

LATER = "later"
"""In place of a layer: the mean over the layers of the states from 1 on"""

NO_NULL_PENALTY = "shared is undefined: the null's penalty is not above 0"
FEWEST_SEEDS = 3
"""For an interval over pairs of seeds"""


@dataclass(frozen=True)
class MeasuredPair:
    """What was read between two models, and the tokens and clusters of its windows."""

    facts: dict[str, Any]
    """The first seven columns of :data:`WHO`"""
    found: Between
    tokens: Array
    """Of each window ``[S]``"""
    clusters: np.ndarray
    """Name of the cluster of each window ``[S]``"""


def between_table(pairs: Sequence[MeasuredPair], draws: int) -> pd.DataFrame:
    """``between.csv``: a row for each pair, map, head and layer, for the mean of the later layers, and means over seeds.

    Intervals are those of a bootstrap over clusters of documents, the same draws for all columns, so that differences are
    paired. Those of means over seeds are Student's t; where the two models have different seeds, a jackknife that leaves out
    one seed with all of its pairs.
    """
    rows = [row for pair in pairs for row in _rows_of(pair, draws)]
    table = pd.DataFrame(rows, columns=list(BETWEEN_COLUMNS)).astype(object)
    means = list(_over_seeds(table))
    if means:
        table = pd.concat([table, pd.DataFrame(means, columns=list(BETWEEN_COLUMNS)).astype(object)], ignore_index=True)
    return table


def _rows_of(pair: MeasuredPair, draws: int) -> list[dict[str, Any]]:
    names, cluster = np.unique(pair.clusters, return_inverse=True)
    tokens = np.zeros(len(names))
    np.add.at(tokens, cluster, pair.tokens)
    weights = bootstrap_weights(len(names), draws, 0)
    effective = effective_clusters(np.arange(len(names)), tokens)
    by_cluster = {}
    for name, sums in pair.found.sums.items():
        by_cluster[name] = np.zeros((len(names), len(sums)))
        np.add.at(by_cluster[name], cluster, sums.T)
    note = few_clusters(effective)
    common: dict[str, Any] = {**pair.facts, "tokens": int(tokens.sum()), "clusters": len(names), "note": note}
    readings, rows = pair.found.readings, []

    def add(chosen: list[int], lens_layer: int | str, states_layer: int | str, ridge: float) -> None:
        of = readings[chosen[0]]
        layers = {"map": of.map, "head": of.head, "lens_layer": lens_layer, "states_layer": states_layer}
        sums = {name: values[:, chosen].mean(1) for name, values in by_cluster.items()}
        rows.append({**common, **layers, "ridge": ridge, **_values(sums, tokens, weights, note)})

    for k, reading in enumerate(readings):
        add([k], reading.lens_layer, reading.states_layer, pair.found.ridge[k])
    for kind, head in dict.fromkeys((r.map, r.head) for r in readings):
        later = [k for k, r in enumerate(readings) if (r.map, r.head) == (kind, head) and r.states_layer > 0]
        if later:
            add(later, LATER, LATER, np.nan)
    return rows


def _values(sums: dict[str, Array], tokens: Array, weights: Array, note: str) -> dict[str, Any]:
    """The quantities of a row with their intervals, from sums by cluster ``[G]`` and draws ``[draws, G]``."""
    kl, ce = (
        {name: sums[f"{loss}_{name}"] for name in ("own", "through", "null", "same_tokens")} for loss in ("kl", "ce")
    )
    tops = {
        "own_kl": kl["own"],
        "penalty": kl["through"] - kl["own"],
        "null_penalty": kl["null"] - kl["own"],
        "saved": kl["null"] - kl["through"],
        "same_tokens": kl["same_tokens"] - kl["own"],
        "penalty_ce": ce["through"] - ce["own"],
        "null_penalty_ce": ce["null"] - ce["own"],
    }
    drawn = {name: (weights @ top) / (weights @ tokens) for name, top in tops.items()}
    row: dict[str, Any] = {}
    for name, top in tops.items():
        low, high = interval(drawn[name])
        row |= {name: top.sum() / tokens.sum(), f"{name}_ci_low": low, f"{name}_ci_high": high}
    if row["null_penalty_ci_low"] > 0:
        low, high = interval(drawn["saved"] / drawn["null_penalty"])
        shared = row["saved"] / row["null_penalty"]
        row |= {"shared": shared, "shared_ci_low": low, "shared_ci_high": high}
    elif not np.isnan(row["null_penalty"]):
        row["note"] = "; ".join(filter(None, (note, NO_NULL_PENALTY)))
    return row


def _over_seeds(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean rows over seeds of every pair of models; of pairs of seeds, only from three seeds on."""
    what = [name for name in WHO if name not in ("lens_seed", "states_seed")]
    means = []
    for key, rows in table.groupby(what, dropna=False, sort=False):
        if len(rows) < 2:
            continue
        same = bool((rows["lens_seed"] == rows["states_seed"]).all())
        seeds = sorted({*rows["lens_seed"], *rows["states_seed"]})
        row: dict[str, Any] = dict(zip(what, key, strict=True))
        row |= {"lens_seed": "all", "states_seed": "all", "note": ""}
        row |= {"tokens": rows["tokens"].iloc[0], "clusters": rows["clusters"].iloc[0]}
        for name in QUANTITIES:
            values = rows[name].astype(float)
            if values.isna().any():
                continue
            row[name] = float(values.mean())
            if same:
                _, row[f"{name}_ci_low"], row[f"{name}_ci_high"] = mean_over_seeds(list(values))
            elif len(seeds) >= FEWEST_SEEDS:
                without = [values[(rows["lens_seed"] != s) & (rows["states_seed"] != s)].mean() for s in seeds]
                low, high = jackknife(np.array([row[name]]), np.array(without)[:, None])
                row |= {f"{name}_ci_low": float(low[0]), f"{name}_ci_high": float(high[0])}
        if not same and len(seeds) < FEWEST_SEEDS:
            row["note"] = f"no interval over seeds: pairs of {len(seeds)} seeds, and {FEWEST_SEEDS} are needed"
        means.append(row)
    return means
