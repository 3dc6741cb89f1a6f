"""The update decomposition's indices of a run, as comparisons need them: values, draws, and reasons."""

from collections.abc import Sequence

import numpy as np

from lensbench.measures.indices import update_indices
from lensbench.measures.update.held import DRAWS
from lensbench.results.folder import Run
from lensbench.statistics import Array

Found = tuple[dict[str, float], dict[str, Array], dict[str, str]]
"""Values, draws and reasons of undefined ones, by index"""


def updates_of(run: Run) -> dict[tuple[str, int], Found]:
    """Of each model and seed of a run; empty for a run without the decomposition."""
    indices, names = run.tables["indices.csv"], update_indices()
    rows = indices[indices["index"].isin(names) & (indices["seed"] != "all")]
    drawn = {key: part.to_numpy(float) for key, part in run.update_draws().groupby(["model", "seed", "index"])["value"]}
    found: dict[tuple[str, int], Found] = {}
    for row in rows.to_dict("records"):
        who, name, value = (str(row["model"]), int(row["seed"])), str(row["index"]), float(row["value"])
        values, draws, reasons = found.setdefault(who, ({}, {}, {}))
        values[name], draws[name] = value, drawn.get((*who, name), np.full(DRAWS, value))
        if np.isnan(value):
            reasons[name] = str(row["reason"])
    for values, draws, reasons in found.values():
        for name in set(names) - set(values):
            values[name], draws[name] = np.nan, np.full(DRAWS, np.nan)
            reasons[name] = "not measured: a run of an earlier version"
    return found


def not_measured() -> Found:
    """Of a model whose run has no decomposition."""
    names, reason = update_indices(), "not measured: a run without the update decomposition"
    return dict.fromkeys(names, np.nan), dict.fromkeys(names, np.full(DRAWS, np.nan)), dict.fromkeys(names, reason)


def indices_of_none(runs: Sequence[Run]) -> set[str]:
    """The decomposition's indices that no run has: there is nothing to compare, and nothing to say of it."""
    return set(update_indices()).difference(*(run.tables["indices.csv"]["index"] for run in runs))
