"""The table of what probes measured."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from lensbench.probes.measured import Measurement
from lensbench.probes.registry import quantity_of
from lensbench.probes.tools.crossfit import COLUMNS
from lensbench.statistics import mean_over_seeds


def probe_table(
    parts: Sequence[tuple[str, int, Sequence[Measurement], Mapping[str, str] | None]], draws: int
) -> pd.DataFrame:
    """``probes.csv``; for a model with several seeds also the mean over them, with its Student-t interval.

    ``parts``: model, seed, what its probes measured, and the cluster of every scored document.

    Quantities of single heads have no mean over seeds: head 2 of another training is another head.
    """
    frames = []
    for model, seed, probes, clusters in parts:
        for found in probes:
            frame = found.frame(draws, clusters)
            frame.insert(0, "model", model)
            frame.insert(1, "seed", seed)
            frames.append(frame)
    columns = ["model", "seed", *COLUMNS]
    if not frames:
        return pd.DataFrame(columns=columns)
    table = pd.concat([f.astype(object) for f in frames], ignore_index=True)
    over = []
    what = ["model", "probe", "quantity", "layer", "other"]
    for key, rows in table.groupby(what, dropna=False, sort=False):
        known = rows["value"].dropna().astype(float)
        quantity = quantity_of(rows["probe"].iloc[0], rows["quantity"].iloc[0])
        if len(rows) < 2 or (quantity is not None and quantity.of == "head"):
            continue
        row = dict(zip(what, cast(tuple[Any, ...], key), strict=True)) | {"seed": "all", "reason": ""}
        if len(known) < len(rows):
            row["reason"] = f"undefined for {len(rows) - len(known)} of {len(rows)} seeds"
        elif known.nunique() == 1:  # no seed plays a part in it
            row |= {"value": known.iloc[0], "reason": "the same for every seed"}
        else:
            row["value"], row["ci_low"], row["ci_high"] = mean_over_seeds(list(known))
        over.append(row)
    if over:
        table = pd.concat([table, pd.DataFrame(over, columns=columns).astype(object)], ignore_index=True)
    return table[columns]
