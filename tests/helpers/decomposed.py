"""Made-up rows of the update decomposition, of the right order, for what draws or prints them."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from lensbench.measures.update.gates import REASONS
from lensbench.results.folder import Run
from lensbench.results.manifest import Manifest
from lensbench.results.schema import SCHEMA

KINDS = ("added up", "carried along", "re-represented", "gated")
"""What the models of a run are, in turn"""

SHARES = {"added up": (0.02, 0.97), "carried along": (1.0, 0.85), "re-represented": (0.4, 0.1), "gated": (0.1, 0.99)}
"""Kind -> c and R"""

VIEWS = {"rotated": (None, 0.02), "carried": (-0.05, 0.59), "drifting": (0.99, 0.93), "shuffled": (None, 0.997)}
"""Landmark -> in place and R"""


def merged(layers: int, kind: str, seed: int) -> list[tuple[int, int]]:
    """Blocks of a model: the second and third are merged at every second seed."""
    ends = [layer for layer in range(layers) if not (layer == 2 and seed % 2 and layers > 3)]
    return list(itertools.pairwise(ends))


def block_rows(who: dict, layers: int, rank: int) -> list[dict]:
    """Rows of ``blocks.csv`` of one model and seed."""
    kind, seed = KINDS[rank % len(KINDS)], int(who["seed"])
    c, clarity = SHARES[kind]
    rng = np.random.default_rng((rank, seed))
    rows = []
    for start, end in merged(layers, kind, seed):
        far = 0.6 if start == 0 else 0.0
        share, read = c + float(rng.normal(0, 0.03)), max(clarity - far + float(rng.normal(0, 0.01)), 0.02)
        grown = 0.5 if kind == "re-represented" else 1.1
        gate = tuple(REASONS)[start % len(REASONS)] if kind == "gated" and start else None
        row = {
            "from_layer": start,
            "to_layer": end,
            "metric": "fisher",
            "ridge": 0.1,
            "gate": gate,
            "blocks": end - start,
        }
        for name, value in {"carried": share, "clarity": read, "persistence": grown, "room": 0.3, "news": 0.2}.items():
            row |= {name: value, f"{name}_ci_low": value - 0.05, f"{name}_ci_high": value + 0.05}
        row |= {"kept_low": read, "kept_high": min(1.0, grown), "drowned": 1 - read if grown >= 1 else None}
        rows.append({**who, **row})
    return rows


def index_rows(who: dict, layers: int, rank: int) -> list[dict]:
    """Rows of ``indices.csv`` from layer 1 on, of one model and seed."""
    kind = KINDS[rank % len(KINDS)]
    c, clarity = SHARES[kind]
    why = f"undetermined: 0 of 10 pairs of layers pass the gates and 3 are needed; at 10 of them {REASONS['no fall']}"
    numbers = {"clarity": clarity, "kept_low": clarity, "kept_high": 1.0, "news": 0.2, "drowned": 1 - clarity}
    numbers["in_place"] = 1 - c if kind != "gated" else None
    rows = []
    for name, value in numbers.items():
        ends = {} if value is None else {"ci_low": value - 0.04, "ci_high": value + 0.04}
        reason = why if value is None else None
        rows.append({**who, "index": f"{name}_without_layer0", "value": value, "reason": reason, **ends})
    return rows if layers > 1 else []


def verdict_rows(who: dict, rank: int) -> list[dict]:
    """Rows of ``verdicts.csv`` of one model and seed."""
    kind = KINDS[rank % len(KINDS)]
    verdict = {"added up": "added up in one representation", "gated": "undetermined"}.get(kind, kind)
    gate = "no fall" if kind == "gated" else None
    return [{**who, "scope": scope, "verdict": verdict, "gate": gate} for scope in ("all layers", "without layer 0")]


def landmark_rows(who: dict) -> list[dict]:
    """Rows of ``landmarks.csv`` of one model and seed."""
    rows = []
    for name, (in_place, clarity) in VIEWS.items():
        for index, value in {"in_place": in_place, "clarity": clarity, "news": 0.1}.items():
            reason = "undetermined: 0 of 10 pairs of layers pass the gates" if value is None else None
            row = {
                "landmark": name,
                "known": name,
                "index": f"{index}_without_layer0",
                "value": value,
                "reason": reason,
            }
            rows.append({**who, **row})
    return rows


def decomposed_run(folder: Path, models: dict[str, int], seeds: tuple[str, ...] = ("0",)) -> Run:
    """A run of made-up tables: ``models`` maps a name to its number of layers; each is of one of :data:`KINDS` in turn."""
    rows: dict[str, list[dict]] = {name: [] for name in SCHEMA}
    for (rank, (model, layers)), seed in itertools.product(enumerate(models.items()), seeds):
        who = {"model": model, "seed": seed}
        rows["models.csv"].append({**who, "family": "toy", "layers": layers})
        rows["blocks.csv"] += block_rows(who, layers, rank)
        rows["indices.csv"] += index_rows(who, layers, rank)
        rows["landmarks.csv"] += landmark_rows(who)
        rows["verdicts.csv"] += verdict_rows(who, rank)
    tables = {
        name: pd.DataFrame([{**dict.fromkeys(SCHEMA[name]), **row} for row in rows[name]], columns=list(SCHEMA[name]))
        for name in SCHEMA
    }
    return Run(folder, Manifest.of_tables(folder, list(models)), tables)
