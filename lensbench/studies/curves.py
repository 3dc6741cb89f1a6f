"""Learning curves: held-out cross-entropy of models trained with several budgets, by position in the context.

Every budget is a training of its own, with its own warm-up and decay. A checkpoint of a longer training has not decayed its
learning rate, which would favour models that learn fast.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save_file
from scipy import stats
from torch import from_numpy, nn

from lensbench.data.windows import Windows
from lensbench.runtime.sealed import read_tensors
from lensbench.statistics import Array, bootstrap_weights, few_clusters, interval, mean_over_seeds
from lensbench.streams.parts import evaluating

TOKENS_AT_ONCE = 8192


ALL = "all"
"""``positions`` of a mean over the whole context, and ``seed`` of a mean over seeds"""


BOUND = "bayes"
"""``model`` of the exact Bayes predictor, where it is known"""


class CurveRecipe(BaseModel):
    """Budgets and positions of learning curves."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    budgets: tuple[int, ...] = Field((), description="training tokens of shorter runs; training.tokens is the last")
    positions: tuple[int, ...] = Field(
        (1, 16, 64), min_length=1, description="first positions of the parts of the context"
    )

    @model_validator(mode="after")
    def _rising(self) -> "CurveRecipe":
        for name in ("budgets", "positions"):
            values = getattr(self, name)
            if any(a >= b for a, b in itertools.pairwise(values)) or min(values, default=1) < 1:
                raise ValueError(f"{name} must rise from 1 or more: {list(values)}")
        return self


@dataclass(frozen=True)
class PositionSums:
    """Summed nats ``[S, K]`` and tokens ``[S, K]`` of a model in S windows and K parts of the context; clusters ``[S]``."""

    nats: Array
    tokens: Array
    cluster: NDArray[np.int64]

    def save(self, folder: Path) -> None:
        """Write the sums to ``sums.safetensors`` in ``folder``."""
        arrays = {"nats": self.nats, "tokens": self.tokens, "cluster": self.cluster}
        save_file(
            {name: from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}, folder / "sums.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> "PositionSums":
        """The sums that :meth:`save` wrote."""
        arrays: dict[str, Any] = {k: v.numpy() for k, v in read_tensors(folder / "sums.safetensors").items()}
        return cls(**arrays)


@dataclass(frozen=True)
class CurvePoint:
    """A model trained with one budget and seed: its losses, and the seconds of its training."""

    model: str
    seed: int
    train_tokens: int
    seconds: float
    scored: PositionSums


@torch.no_grad()
def score_positions(model: nn.Module, windows: Windows, first: tuple[int, ...]) -> PositionSums:
    """The cross-entropy of a causal LM at **every** position of the windows, summed over parts of the context.

    The model is in evaluation mode, and then as it was. At position n it predicts token n+1. Part k begins at ``first[k]``
    and ends before ``first[k+1]``, the last part at the end of the window. Positions before ``first[0]`` are not scored.
    """
    device = next(model.parameters()).device
    length = windows.ids.shape[1]
    part = np.searchsorted(first, np.arange(length - 1), side="right") - 1  # -1 before the first
    members = torch.zeros(length - 1, len(first), dtype=torch.float64)
    members[np.nonzero(part >= 0)[0], part[part >= 0]] = 1
    nats, tokens = [], []
    rows = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, len(windows.ids), rows):
        ids = from_numpy(windows.ids[start : start + rows]).to(device)
        with evaluating(model):
            logits = model(input_ids=ids).logits[:, :-1]
        target = ids[:, 1:, None]
        ce = -logits.float().log_softmax(-1).gather(-1, target)[..., 0].double().cpu()
        known = from_numpy(np.arange(1, length) < windows.lengths[start : start + rows, None]).double()
        nats.append((ce * known) @ members)
        tokens.append(known @ members)
    return PositionSums(torch.cat(nats).numpy(), torch.cat(tokens).numpy(), windows.clusters)


def names_of(first: tuple[int, ...], length: int) -> list[str]:
    """Names of the parts of a context of ``length`` tokens: their first and last positions."""
    return [f"{a}-{b - 1}" for a, b in itertools.pairwise([*first, length - 1])]


def curve_table(points: list[CurvePoint], first: tuple[int, ...], length: int, draws: int) -> pd.DataFrame:
    """``curves.csv``: each seed with its interval over clusters of documents, and their mean with a Student-t interval.

    All seeds are scored on the same documents, so the interval of the mean is for other seeds, not for other documents.
    """
    rows: list[dict[str, Any]] = []
    names = [ALL, *names_of(first, length)]
    for point in points:
        count = int(point.scored.cluster.max()) + 1
        nats, tokens = (
            np.stack([np.bincount(point.scored.cluster, weights=column, minlength=count) for column in sums.T], 1)
            for sums in (point.scored.nats, point.scored.tokens)
        )
        nats, tokens = (np.concatenate([x.sum(1, keepdims=True), x], 1) for x in (nats, tokens))
        weights = bootstrap_weights(count, draws, 0)
        low, high = interval((weights @ nats) / (weights @ tokens))
        for k, name in enumerate(names):
            row = {"model": point.model, "seed": str(point.seed), "train_tokens": point.train_tokens, "positions": name}
            row |= {"ce": nats[:, k].sum() / tokens[:, k].sum(), "ce_ci_low": low[k], "ce_ci_high": high[k]}
            rows.append(row | {"reason": few_clusters(count)})
    table = pd.DataFrame(rows)
    means = []
    for (model, budget, part), group in table.groupby(["model", "train_tokens", "positions"], sort=False):
        if len(group) > 1:
            mean, *ends = mean_over_seeds(list(group["ce"]))
            row = {"model": model, "seed": ALL, "train_tokens": budget, "positions": part, "reason": ""}
            means.append(row | {"ce": mean, "ce_ci_low": ends[0], "ce_ci_high": ends[1]})
    return pd.concat([table, pd.DataFrame(means)], ignore_index=True) if means else table


def timing_table(points: list[CurvePoint]) -> pd.DataFrame:
    """``timings.csv``: the seconds of each training, on the machine that ran it."""
    return pd.DataFrame(
        [{"model": p.model, "seed": str(p.seed), "train_tokens": p.train_tokens, "seconds": p.seconds} for p in points]
    )


def differences(curves: pd.DataFrame, model: str, against: str) -> Iterator[dict[str, Any]]:
    """``model - against`` at every budget and part of the context: mean over paired seeds, Student-t interval, and p.

    There is no difference where the two models have fewer than two seeds in common.
    """
    of = curves[curves["seed"] != ALL].set_index(["model", "train_tokens", "positions", "seed"])["ce"].sort_index()
    known = curves[curves["model"] == model].drop_duplicates(["train_tokens", "positions"])
    for _, row in known.iterrows():
        cell = row["train_tokens"], row["positions"]
        try:
            gaps = (of.loc[(model, *cell)] - of.loc[(against, *cell)]).dropna()
        except KeyError:
            continue
        if len(gaps) < 2:
            continue
        mean, low, high = mean_over_seeds(list(gaps))
        found = {"train_tokens": int(cell[0]), "positions": cell[1], "value": mean, "ci_low": low, "ci_high": high}
        yield found | {"seeds": len(gaps), "p": float(stats.ttest_1samp(gaps, 0.0).pvalue)}


def shown_curves(curves: pd.DataFrame, by: str = "train_tokens") -> pd.DataFrame:
    """The rows over seeds where a model has several seeds at a budget (or value of ``by``), else those of its one seed."""
    groups = curves.groupby(["model", by])["seed"]
    return curves[(curves["seed"] == ALL) | ~groups.transform(lambda seeds: (seeds == ALL).any())]
