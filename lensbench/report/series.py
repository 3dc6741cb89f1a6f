"""Models that differ in one thing alone, their training or their size, and what the tables say of them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lensbench.measures.indices import fact_indices
from lensbench.probes.registry import PROBES
from lensbench.results.folder import Run
from lensbench.statistics import mean_over_seeds
from lensbench.suite.snapshots import AT

TOKENS, PARAMETERS = "train_tokens", "parameters"

OVER = {TOKENS: "training tokens", PARAMETERS: "parameters"}
"""Column of ``models.csv`` that models of a series differ in -> in words"""

SIZE = re.compile(
    r"(?:^|[-_.+])(?:\d+(?:\.\d+)?[kmbt]|tiny|mini|small|medium|base|large|xl|xxl)(?=$|[-_.+])", re.IGNORECASE
)
"""What a name says of a model's size"""

LEAST_DOUBLINGS = 0.5
"""Models that lie closer together are of one size: the sizes of models that are to be equal differ by a percent"""

HEADLINES = (
    "ce", "in_place_without_layer0", "clarity_without_layer0", "news_without_layer0", "shared_consistency_without_layer0",
    "gain_visibility_without_layer0", "injection_survival: mean_survival_error_without_layer0",
)  # fmt: skip
"""What figures and the terminal show of trends, unless asked for others"""

POINT_COLUMNS = ("over", "series", "x", "model", "seed", "index", "value", "ci_low", "ci_high")


@dataclass(frozen=True)
class Series:
    """Models of one kind, by what they differ in."""

    over: str
    """:data:`TOKENS` or :data:`PARAMETERS`"""
    name: str
    models: Mapping[str, float]
    """Model -> its tokens or parameters, ascending"""


def series_of(models: pd.DataFrame, named: Sequence[Sequence[str]] = ()) -> list[Series]:
    """The series in ``models.csv``: checkpoints and revisions of one model, and models whose names differ in a size alone.

    ``named``: models in series over parameters by their names, beside those that names tell. A model without tokens, or
    of which the table does not say how many, has no place over tokens. Models within half a doubling are no series.
    """
    found = models.drop_duplicates("model").set_index("model")
    over_tokens: dict[str, list[str]] = {}
    over_size: dict[str, list[str]] = {}
    for model in map(str, found.index):
        over_tokens.setdefault(model.partition(AT)[0], []).append(model)
        if AT not in model and SIZE.search(model):
            over_size.setdefault(SIZE.sub("", model, count=1).strip("-_.+") or "all", []).append(model)
    for several in named:
        over_size[", ".join(several)] = [name for name in several if name in found.index]
    kept = []
    for over, groups in ((TOKENS, over_tokens), (PARAMETERS, over_size)):
        for name, members in groups.items():
            sizes = pd.to_numeric(found[over]).loc[members].sort_values(kind="stable")
            known = {str(m): float(x) for m, x in sizes.items() if x > 0}
            if known and math.log2(max(known.values()) / min(known.values())) >= LEAST_DOUBLINGS:
                kept.append(Series(over, name, known))
    return kept


def values_of(run: Run) -> pd.DataFrame:
    """``model, seed, index, value, ci_low, ci_high, reason`` of losses, indices, and quantities that a probe has of a model.

    A quantity of a probe is called ``PROBE: QUANTITY``. Means over seeds are left out.
    """
    columns = ["model", "seed", "index", "value", "ci_low", "ci_high", "reason"]
    models, indices, probes = (run.tables[name] for name in ("models.csv", "indices.csv", "probes.csv"))
    frames = []
    for loss in ("ce", "bits_per_byte"):
        names = {loss: "value", f"{loss}_ci_low": "ci_low", f"{loss}_ci_high": "ci_high"}
        frames.append(models[["model", "seed", *names]].rename(columns=names).assign(index=loss, reason=""))
    frames.append(indices[~indices["index"].isin(fact_indices())])
    of_models = {(name, q.name) for name, probe in PROBES.items() for q in probe.quantities if q.of == "model"}
    of_model = [pair in of_models for pair in zip(probes["probe"], probes["quantity"], strict=True)]
    told = probes[pd.Series(of_model, index=probes.index, dtype=bool)]
    frames.append(told.assign(index=told["probe"].astype(str) + ": " + told["quantity"].astype(str)))
    whole = pd.concat([frame[columns] for frame in frames if len(frame)] or [indices[columns]], ignore_index=True)
    whole = whole[whole["seed"].astype(str) != "all"]
    return whole.assign(seed=whole["seed"].astype(int))


def points_of(values: pd.DataFrame, series: Sequence[Series]) -> pd.DataFrame:
    """Values of every model of every series, columns :data:`POINT_COLUMNS`: those of each seed, and of several the mean.

    Means have Student-t intervals over the seeds at which the index is defined, seed ``all``.
    """
    rows: list[dict[str, Any]] = []
    for one in series:
        for model, x in one.models.items():
            of_model = values[(values["model"] == model) & values["value"].notna()]
            for index, of_index in of_model.groupby("index", sort=False):
                who = {"over": one.over, "series": one.name, "x": x, "model": model, "index": index}
                for row in of_index[["seed", "value", "ci_low", "ci_high"]].to_dict("records"):
                    rows.append(who | {str(key): value for key, value in row.items()})
                if len(of_index) > 1:
                    mean, low, high = mean_over_seeds(of_index["value"].to_list())
                    rows.append({**who, "seed": "all", "value": mean, "ci_low": low, "ci_high": high})
    return pd.DataFrame(rows, columns=list(POINT_COLUMNS))
