"""Tidy frames that figures are drawn from, out of a run's tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.lenses.kinds import layer_kinds
from lensbench.measures.indices import INDICES
from lensbench.report.formatting import is_left_out
from lensbench.results.folder import Run
from lensbench.results.schema import of_the_matrix
from lensbench.studies.curves import shown_curves

SMALLEST_KL = 1e-6  # nats/token; a log axis has no zero


NULL = "rotated"
"""In frames of lenses: the shared lens of the null's first random basis."""


def lens_labels() -> dict[str, str]:
    """Name -> label of every kind of lens that figures draw, in the order of legends; the null last."""
    return {kind.name: kind.label for kind in layer_kinds()} | {NULL: "shared lens, rotated view"}


VISIBILITIES = {
    name: INDICES[name].variant
    for name in ("gain_visibility", "gain_visibility_adjacent", "gain_visibility_without_layer0")
}
"""Gain visibilities of a figure -> the pairs of layers that each is of."""

SHOWN_INDICES = (*VISIBILITIES, "movement")
"""Indices of the figure of gain visibility"""


def transfer_frame(run: Run) -> pd.DataFrame:
    """``model, lens_layer, stream_layer, penalty_ce``, and ``layers``; no cell of the (L+1) x (L+1) grid is missing.

    A model whose lenses were read at their own layers alone has no rows. Raises :class:`LensbenchError` where cells of a
    matrix are missing.
    """
    cell = ["lens_layer", "stream_layer"]
    table = of_the_matrix(run.tables["transfer.csv"]).loc[lambda table: np.isfinite(table["penalty_ce"])]
    frames = []
    for _, (model, seed, layers) in run.tables["models.csv"][["model", "seed", "layers"]].iterrows():
        rows = table[(table["model"] == model) & (table["seed"] == seed)]
        if rows[(rows["lens_layer"] < layers) & (rows["lens_layer"] != rows["stream_layer"])].empty:
            continue
        missing = (layers + 1) ** 2 - len(rows[cell].drop_duplicates())
        if missing:
            raise LensbenchError(f"transfer.csv: {missing} cells of model {model}, seed {seed}, have no penalty_ce")
        frames.append(rows.assign(layers=layers))
    if not frames:
        return pd.DataFrame(columns=["model", "layers", *cell, "penalty_ce"])
    groups = pd.concat(frames).groupby(["model", "layers", *cell], sort=False)
    means: pd.DataFrame = groups[["penalty_ce"]].mean().reset_index()
    return means


def layer_pair_frame(run: Run) -> pd.DataFrame:
    """The rows of :func:`transfer_frame` for two different layers below L; a model of one layer has none."""
    cells = transfer_frame(run)
    i, j = cells["lens_layer"], cells["stream_layer"]
    return cells[(i != j) & (np.maximum(i, j) < cells["layers"])]


def lens_frame(run: Run) -> pd.DataFrame:
    """``model, lens, stage, name, layer, kl`` and its interval: refined lenses where there are, closed ones elsewhere.

    The shared lens of the rotated view is ``rotated``. The logit lens at L, the model itself, is left out.
    """
    table = run.tables["lenses.csv"].fillna({"stage": "none"})
    frames = []
    for model, layers in run.tables["models.csv"].groupby("model", sort=False)["layers"].first().items():
        rotated = table[(table["model"] == f"{model}+rotated") & (table["lens"] == "shared")]
        rotated = rotated.assign(model=str(model), lens="rotated", stage="rotated")
        rows = pd.concat([table[(table["model"] == model) & (table["layer"] < layers)], rotated])
        rows = pd.concat([rows[rows["lens"] == lens] for lens in lens_labels()])
        if rows["kl"].isna().any():
            raise LensbenchError(f"lenses.csv, model {model}: {rows['kl'].isna().sum()} of {len(rows)} kl are missing")
        refined = rows["lens"].isin(rows.loc[rows["stage"] == "refined", "lens"])
        frames.append(rows[~refined | (rows["stage"] == "refined")])
    groups = pd.concat(frames).groupby(["model", "lens", "stage", "layer"], sort=False)
    frame: pd.DataFrame = groups[["kl", "kl_ci_low", "kl_ci_high"]].mean().clip(lower=SMALLEST_KL).reset_index()
    stages = frame["stage"].map({"closed": " (closed)", "refined": " (refined)"}).fillna("")
    return frame.assign(name=frame["lens"].map(lens_labels()) + stages)


def index_frame(run: Run, names: Sequence[str] = SHOWN_INDICES) -> pd.DataFrame:
    """One row per index and model, undefined ones too: ``value`` and its intervals, of seed ``all`` where there is one.

    No rows where the suite left all of these indices out.
    """
    table = run.tables["indices.csv"]
    table = table[~is_left_out(table)]
    if not table["index"].isin(names).any():
        return table.head(0)
    table = table.iloc[(table["seed"] == "all").argsort(kind="stable")].drop_duplicates(["index", "model"], keep="last")
    numbers = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    every = pd.MultiIndex.from_product([names, run.tables["models.csv"]["model"].unique()], names=["index", "model"])
    frame = table.set_index(["index", "model"])[numbers].reindex(every).astype(float).reset_index()
    known = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model").set_index("model")["known"]
    models = run.tables["models.csv"].drop_duplicates("model").set_index("model")
    images = models["bits_per_byte"].isna()  # an image has no bytes of text
    return frame.assign(known=frame["model"].map(known).fillna(""), images=frame["model"].map(images))


def shown_rows(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per model and ``keys``: of seed ``all`` where there is one."""
    table = table.iloc[(table["seed"] == "all").argsort(kind="stable")]
    return table.drop_duplicates(["model", *keys], keep="last")


def distance_frame(run: Run) -> pd.DataFrame:
    """``model, distance, value, ci_low, ci_high`` of gain visibility; not a number where undefined."""
    table = run.tables["indices.csv"]
    table = table[~is_left_out(table)]
    name = "gain_visibility_distance_"
    rows = shown_rows(table[table["index"].str.startswith(name)], ["index"])
    rows = rows.assign(distance=rows["index"].str.removeprefix(name).astype(int))
    order = {model: k for k, model in enumerate(run.tables["models.csv"]["model"].unique())}
    rows = rows.sort_values(["model", "distance"], key=lambda c: c.map(order) if c.name == "model" else c)
    numbers = ["value", "ci_low", "ci_high"]
    return rows[["model", "distance", *numbers]].astype(dict.fromkeys(numbers, float)).reset_index(drop=True)


def probe_frame(run: Run) -> pd.DataFrame:
    """``model, quantity, layer, other, value, ci_low, ci_high`` of what probes measured."""
    rows = shown_rows(run.tables["probes.csv"], ["quantity", "layer", "other"])
    rows = rows[rows["value"].notna()]
    return rows[["model", "quantity", "layer", "other", "value", "ci_low", "ci_high"]].reset_index(drop=True)


def head_frame(run: Run) -> pd.DataFrame:
    """``model, layer, head, score, ratio, found``: error transport of every head, of each model's first seed."""
    table = run.tables["probes.csv"]
    names = {"error_score": "score", "error_ratio": "ratio", "error_transport_found": "found"}
    rows = table[table["quantity"].isin(names)].drop_duplicates(["model", "quantity", "layer", "other"])
    if not len(rows):
        return pd.DataFrame(columns=["model", "layer", "head", *names.values()])
    wide = rows.pivot(index=["model", "layer", "other"], columns="quantity", values="value").reindex(
        columns=list(names)
    )
    frame = (
        wide.rename(columns=names).reset_index().rename(columns={"other": "head"}).astype({"layer": int, "head": int})
    )
    order = {model: k for k, model in enumerate(run.tables["models.csv"]["model"].unique())}
    return frame.sort_values(["model", "layer", "head"], key=lambda c: c.map(order) if c.name == "model" else c)


def accuracy_frame(run: Run) -> pd.DataFrame:
    """``model, lens, layer, value, ci_low, ci_high`` of accuracies; lens ``model``, without a layer, is the model itself."""
    table = run.tables["probes.csv"]
    rows = shown_rows(table[table["probe"] == "accuracy"], ["quantity", "layer"])
    lens = rows["quantity"].str.removesuffix("_accuracy").replace("accuracy", "model")
    return rows.assign(lens=lens)[["model", "lens", "layer", "value", "ci_low", "ci_high"]].reset_index(drop=True)


def tolerance_frame(run: Run) -> pd.DataFrame:
    """``model, index, tolerance, value, ci_low, ci_high``, means over seeds; not a number where undefined."""
    table = run.tables["tolerances.csv"]
    table = table[table["index"].isin(["gain_visibility", "gain_visibility_without_layer0"])]
    groups = table.groupby(["model", "index", "tolerance"], sort=False)
    return groups[["value", "ci_low", "ci_high"]].mean().reset_index()


def pair_frame(run: Run) -> pd.DataFrame:
    """``model, layer_i, layer_j, penalty, rotated_penalty``, means over seeds."""
    keys, values = ["model", "layer_i", "layer_j"], ["penalty", "rotated_penalty"]
    return run.tables["pairs.csv"].groupby(keys, sort=False)[values].mean().reset_index()


def curve_frame(run: Run) -> pd.DataFrame:
    """``model, train_tokens, positions, ce`` with its interval, over seeds where there are several, and mean ``seconds``."""
    seconds = run.tables["timings.csv"].groupby(["model", "train_tokens"], as_index=False)["seconds"].mean()
    frame = shown_curves(run.tables["curves.csv"]).merge(seconds, on=["model", "train_tokens"], how="left")
    if frame["ce"].isna().any():
        raise LensbenchError(f"curves.csv: {frame['ce'].isna().sum()} of {len(frame)} ce are missing")
    return frame
