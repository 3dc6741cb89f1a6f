"""The draws of the update decomposition's indices that a run keeps, for paired comparisons."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lensbench.measures.indices import INDICES
from lensbench.results.tables import Part

KEPT_DRAWS = 500
"""Draws of each index that a run keeps for comparisons: they tell the end of an interval to 6 % of its length"""


def update_draws(parts: Sequence[Part]) -> pd.DataFrame:
    """The draws of the update decomposition's indices, of all models and seeds: model, seed, index, value.

    The first :data:`KEPT_DRAWS` of each, in steps of at most a 64th of their spread: float32 holds these exactly.
    """
    frames = [
        pd.DataFrame({"model": part.model, "seed": part.seed, "index": name, "value": in_steps(np.asarray(values))})
        for part in parts
        if part.updates is not None
        for name, values in part.updates.draws.items()
        if INDICES[name].shown is not None
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["model", "seed", "index", "value"])


def kept_draws(draws: pd.DataFrame) -> pd.DataFrame:
    """Of the draws in a run's file, what :func:`update_draws` keeps; runs of earlier versions have more."""
    keys, frames = ["model", "seed", "index"], []
    for _, rows in draws.groupby(keys, sort=False):
        values = in_steps(rows["value"].to_numpy())
        frames.append(rows.head(len(values)).assign(value=values)[[*keys, "value"]])
    return pd.concat(frames, ignore_index=True) if frames else draws


def in_steps(draws: NDArray[np.float64]) -> NDArray[np.float32]:
    """The first draws, rounded to a power of two that is at most a 64th of their spread; as they are without a spread."""
    kept: NDArray[np.float64] = draws[:KEPT_DRAWS].astype(float)
    spread = kept.std()
    if not (np.isfinite(spread) and spread > 0):
        return kept.astype(np.float32)
    step = 2.0 ** np.floor(np.log2(spread / 64))
    rounded: NDArray[np.float32] = (np.round(kept / step) * step).astype(np.float32)
    return rounded
