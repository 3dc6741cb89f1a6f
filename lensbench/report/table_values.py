"""What the tables of a run say of each model and seed: comparisons show it, and draw from the sums by cluster."""

import numpy as np

from lensbench.results.folder import Run
from lensbench.statistics import few_clusters

InTables = dict[str, tuple[float, float, float]]
"""Value and interval, by the name of a loss or an index"""


def values_in_tables(run: Run) -> dict[tuple[str, int], InTables]:
    """Losses and indices of each model and seed that have a value and an interval."""
    found: dict[tuple[str, int], InTables] = {}
    for row in run.tables["models.csv"].to_dict("records"):
        losses = {name: (row[name], row[f"{name}_ci_low"], row[f"{name}_ci_high"]) for name in ("ce", "bits_per_byte")}
        found[str(row["model"]), int(row["seed"])] = losses
    indices = run.tables["indices.csv"]
    for row in indices[indices["seed"] != "all"].to_dict("records"):
        of = found.setdefault((str(row["model"]), int(row["seed"])), {})
        of[str(row["index"])] = (row["value"], row["ci_low"], row["ci_high"])
    return {who: {name: each for name, each in of.items() if np.isfinite(each).all()} for who, of in found.items()}


def warnings_in_tables(run: Run) -> dict[tuple[str, int], dict[str, str]]:
    """What the tables warn of, by model and seed, and by the name of a loss or an index with an interval."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for row in run.tables["models.csv"].to_dict("records"):
        few = few_clusters(row["clusters"])
        found[str(row["model"]), int(row["seed"])] = dict.fromkeys(("ce", "bits_per_byte"), few) if few else {}
    indices = run.tables["indices.csv"]
    warned = indices[(indices["seed"] != "all") & indices["ci_low"].notna() & indices["reason"].notna()]
    for row in warned.to_dict("records"):
        found.setdefault((str(row["model"]), int(row["seed"])), {})[str(row["index"])] = str(row["reason"])
    return {who: {name: text for name, text in of.items() if text} for who, of in found.items()}
