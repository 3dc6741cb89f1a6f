"""Landmarks of the suite `standard`: models of known answer, and small ones trained alike, that every page shows in grey.

Their table comes with the package. ``python -m benchmarks.texts`` writes it from ``results/standard``.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources

import pandas as pd

from lensbench.measures.update.summary import WITHOUT_LAYER_0
from lensbench.report.formatting import shown_seeds
from lensbench.results.folder import Run

SUITE = "standard"
"""The suite whose models they are"""

QUANTITIES = {"in_place": f"in_place{WITHOUT_LAYER_0}", "clarity": f"clarity{WITHOUT_LAYER_0}"}
"""Column of the table -> index. Both compare across models of any depth and width."""

COLUMNS = ("model", "layers", "parameters", "known", *QUANTITIES)

FILE = resources.files("lensbench.report").joinpath("landmarks.csv")


def landmark_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The models of ``runs`` as landmarks: a row each of :data:`COLUMNS`; not a number where an index is undefined."""
    rows = []
    for run in runs:
        indices = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])["value"].astype(float)
        known = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model").set_index("model")["known"]
        for _, model in run.tables["models.csv"].drop_duplicates("model").iterrows():
            name = str(model["model"])
            row = {"model": name, "layers": int(model["layers"]), "parameters": int(model["parameters"])}
            row |= {"known": known.get(name, "")}
            row |= {column: round(indices.get((name, index), float("nan")), 4) for column, index in QUANTITIES.items()}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


@cache
def suite_landmarks() -> pd.DataFrame:
    """The landmarks that come with the package, a row each of :data:`COLUMNS`."""
    with resources.as_file(FILE) as path:
        return pd.read_csv(path, comment="#").fillna({"known": ""})


def landmarks_for(runs: Sequence[Run]) -> pd.DataFrame:
    """The suite's landmarks for a page of ``runs``: none where the runs are of that suite, whose models they show."""
    table = suite_landmarks()
    return table.iloc[:0] if any(run.manifest.suite_name == SUITE for run in runs) else table
