"""The tidy frame of the profile over depth: what each block keeps, adds and brings, and the model's own landmarks."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lensbench.measures.update.gates import REASONS
from lensbench.measures.update.summary import WITHOUT_LAYER_0
from lensbench.measures.update.verdict import NOT_MEASURED, WITHOUT_FIRST
from lensbench.report.formatting import shown_seeds
from lensbench.results.folder import Run
from lensbench.statistics import mean_over_seeds

WITH_INTERVAL = ("clarity", "in_place", "news")
"""Quantities of a block that are drawn with an interval"""

NUMBERS = (
    *(name + end for name in WITH_INTERVAL for end in ("", "_low", "_high")),
    "kept_low", "kept_high", "drowned", "reach",
)  # fmt: skip

LANDMARK_ORDER = ("rotated", "carried", "drifting", "shuffled")


Tables = Mapping[str, pd.DataFrame]
"""The tables of a run, by name"""


def profile_frame(run: Run) -> pd.DataFrame:
    """The frame of the profile of a run, as :func:`frame_of` makes it of its tables."""
    return frame_of(run.tables)


def frame_of(tables: Tables) -> pd.DataFrame:
    """One row per mark of the profile, in the order of models.

    ``part`` says what a row is: ``block`` (a block or merged group; of several seeds their mean), ``seed`` (the same of one
    seed ``name``, where there are several), ``overall`` (the index from layer 1 on) or ``landmark`` (the same of the view
    ``name``). ``clarity, in_place, news`` have intervals (``_low``, ``_high``); further columns are ``kept_low, kept_high,
    drowned``. ``in_place`` is missing where no seed passes its gate, and ``gate`` then says which; ``passed`` of ``seeds``
    do. ``reach``: of a model, the share of its prediction that the lens of its last layer reads. ``reason``: why a model,
    or a landmark, has no ``in_place``. ``verdict``: on a model from layer 1 on. The frame is empty where no model of the
    tables has a block.
    """
    blocks = tables["blocks.csv"]
    rows: list[dict[str, Any]] = []
    for model, layers in tables["models.csv"].groupby("model", sort=False)["layers"].first().items():
        own = blocks[blocks["model"] == model]
        by_seed = {seed: own[own["seed"] == seed] for seed in own["seed"].unique()}
        found = [
            overall_row(tables, str(model)),
            *mean_blocks(list(by_seed.values())),
            *(row for seed, one in by_seed.items() if len(by_seed) > 1 for row in seed_rows(seed, one)),
            *landmark_rows(tables, str(model)),
        ]
        rows += [{"model": str(model), "layers": layers, **row} for row in found]
    columns = [
        "model",
        "layers",
        "part",
        "name",
        "from_layer",
        "to_layer",
        *NUMBERS,
        "gate",
        "passed",
        "seeds",
        "reason",
        "verdict",
    ]
    frame = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(NUMBERS, float))
    return frame if (frame["part"] == "block").any() else frame.iloc[:0]


def seed_rows(seed: object, blocks: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The blocks of one seed as they are drawn."""
    for row in blocks.to_dict("records"):
        yield {"part": "seed", "name": str(seed), **of_block(row), **span(row)}


def span(row: Mapping[Any, Any]) -> dict[str, int]:
    """The layers between which a row of ``blocks.csv`` lies."""
    return {"from_layer": int(row["from_layer"]), "to_layer": int(row["to_layer"])}


def of_block(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What is drawn of a row of ``blocks.csv``; nothing is said of what was added where a gate stops it."""
    gate = "" if pd.isna(row["gate"]) else str(row["gate"])
    found = {name: row[name] for name in ("kept_low", "kept_high", "drowned")}
    for name in ("clarity", "news"):
        found |= {name: row[name], f"{name}_low": row[f"{name}_ci_low"], f"{name}_high": row[f"{name}_ci_high"]}
    if not gate:
        low, high = row["carried_ci_low"], row["carried_ci_high"]
        found |= {"in_place": 1 - row["carried"], "in_place_low": 1 - high, "in_place_high": 1 - low}
    return {**found, "gate": gate, "passed": int(not gate), "seeds": 1}


def mean_blocks(seeds: Sequence[pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Blocks as means over seeds; where seeds merged other neighbours, every piece that no seed divides is a block."""
    if not seeds:
        return
    ends = sorted({int(layer) for one in seeds for layer in (*one["from_layer"], *one["to_layer"])})
    for start, end in itertools.pairwise(ends):
        covering = [
            of_block(row)
            for one in seeds
            for row in one[(one["from_layer"] <= start) & (one["to_layer"] >= end)].to_dict("records")
        ]
        found = covering[0] if len(covering) == 1 else mean_of(covering)
        yield {"part": "block", "name": "", "from_layer": start, "to_layer": end, **found}


def mean_of(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of one block over seeds, with Student's t; what was added over the seeds that pass their gates."""
    table = pd.DataFrame(seeds, columns=[*NUMBERS, "gate", "passed", "seeds"])
    found: dict[str, Any] = {name: table[name].mean() for name in ("kept_low", "kept_high")}
    found["drowned"] = table["drowned"].mean(skipna=False)
    for name in WITH_INTERVAL:
        values = table[name].dropna().astype(float).tolist()
        mean, low, high = mean_over_seeds(values) if len(values) > 1 else (*values, np.nan, np.nan, np.nan)[:3]
        found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    stopped = list(table.loc[table["gate"] != "", "gate"])
    most = max(dict.fromkeys(stopped), key=stopped.count) if stopped else ""
    return {**found, "gate": most, "passed": int(table["passed"].sum()), "seeds": len(seeds)}


def overall_row(tables: Tables, model: str) -> dict[str, Any]:
    """The model's indices from layer 1 on, of seed ``all`` where there is one."""
    table = tables["indices.csv"]
    own = table[table["model"] == model]
    own = (
        own.iloc[(own["seed"] == "all").argsort(kind="stable")].drop_duplicates("index", keep="last").set_index("index")
    )
    found: dict[str, Any] = {"part": "overall", "name": "", "seeds": 1, "reason": "not measured"}
    for name in (*WITH_INTERVAL, "kept_low", "kept_high", "drowned"):
        if name + WITHOUT_LAYER_0 in own.index:
            row = own.loc[name + WITHOUT_LAYER_0]
            found |= {name: row["value"], f"{name}_low": row["ci_low"], f"{name}_high": row["ci_high"]}
    found["reach"] = own.loc["reach", "value"] if "reach" in own.index else np.nan
    if f"in_place{WITHOUT_LAYER_0}" in own.index:
        reason: Any = own.loc[f"in_place{WITHOUT_LAYER_0}", "reason"]
        found["reason"] = "" if pd.notna(found["in_place"]) or pd.isna(reason) else str(reason)
    found["passed"] = int(pd.notna(found.get("in_place", np.nan)))
    found["gate"] = next((gate for gate, why in REASONS.items() if why in found["reason"]), "")
    found["verdict"] = verdict_on(tables, model)
    return {key: value for key, value in found.items() if not key.startswith(("kept_low_", "kept_high_", "drowned_"))}


def verdict_on(tables: Tables, model: str) -> str:
    """The verdict on a model from layer 1 on, with the gate where it is undetermined; empty where it was not measured."""
    rows = shown_seeds(tables["verdicts.csv"])
    for row in rows[(rows["model"] == model) & (rows["scope"] == WITHOUT_FIRST)].to_dict("records"):
        gate = str(row["gate"]) if pd.notna(row["gate"]) else ""
        if gate != NOT_MEASURED and pd.notna(row["verdict"]):
            return f"{row['verdict']} ({gate})" if gate else str(row["verdict"])
    return ""


def landmark_rows(tables: Tables, model: str) -> Iterator[dict[str, Any]]:
    """The landmarks of a model from the view's layer 1 on, means over the seeds where they are defined."""
    table = tables["landmarks.csv"]
    own = table[table["model"] == model]
    for name in sorted(own["landmark"].unique(), key=lambda name: (*LANDMARK_ORDER, name).index(name)):
        rows = own[own["landmark"] == name]
        row: dict[str, Any] = {"part": "landmark", "name": name, "seeds": rows["seed"].nunique()}
        for quantity in WITH_INTERVAL:
            row[quantity] = rows.loc[rows["index"] == quantity + WITHOUT_LAYER_0, "value"].astype(float).mean()
        stopped = rows[(rows["index"] == f"in_place{WITHOUT_LAYER_0}") & rows["value"].isna()]
        row["passed"] = row["seeds"] - len(stopped)
        row["reason"] = str(stopped["reason"].iloc[0]) if len(stopped) and not row["passed"] else ""
        yield row


def gate_text(row: Any) -> str:
    """The name of the gate that stops a block, with the seeds where not all are stopped; empty for one that passes."""
    if not row["gate"]:
        return ""
    stopped = int(row["seeds"] - row["passed"])
    return str(row["gate"]) if not row["passed"] else f"{row['gate']} ({stopped} of {row['seeds']} seeds)"
