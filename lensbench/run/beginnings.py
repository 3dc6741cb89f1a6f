"""The stage that measures what the beginning-of-text token in front of every window is worth to a pretrained model."""

from pathlib import Path
from typing import Any

import numpy as np

from lensbench.data.corpus import SPLITS
from lensbench.data.inputs import Texts
from lensbench.data.tokens import tokenize
from lensbench.data.windows import Windows, sample_windows
from lensbench.models.likelihood import nats_with_and_without
from lensbench.run.context import Context
from lensbench.run.inputs import data_of
from lensbench.run.origin import origin_of, stream_of
from lensbench.runtime.files import write_json
from lensbench.runtime.stages import ANEW
from lensbench.runtime.texts import read_json
from lensbench.statistics import bootstrap_weights, ratio_with_interval
from lensbench.suite.recipes import ModelRecipe, Suite

WINDOWS = 32
"""Number of dev windows at most that are read with the token and without it: a quarter of those that the fit has"""


def windows_of(suite: Suite) -> int:
    """How many windows a suite reads with and without the token."""
    return min(WINDOWS, max(1, suite.fit.dev_sequences // 4))


def beginning_facts(context: Context, model: ModelRecipe, seed: int) -> dict[str, Any]:
    """The columns of ``models.csv`` on the token that a model's text begins with; empty for images.

    A pretrained model is read with and without the token on a few dev windows, and what it is worth is reported.
    """
    data, owner = data_of(context, model), context.suite.trained(model)
    if not isinstance(data, Texts):
        return {}
    facts = data.beginning.facts
    if owner.source is None:
        return facts
    found = read_json(_worth(context, model, seed, data), ANEW)
    if not found["windows"]:
        return facts
    gain, said = found["begin_gain"], f"beginning of {owner.name}"
    ends = {f"begin_gain_ci_{end}": gain[end] for end in ("low", "high")}
    facts = {**facts, "begin_gain": gain["value"], **ends}
    if said in context.cache.warned:
        return facts
    context.cache.warned.add(said)
    context.progress.say(
        f"model {owner.name}: {data.beginning.text} begins {_PLACES[data.beginning.where]}; on {found['windows']} dev "
        f"windows the model loses {found['with']:.3f} nats/token with it in front of each and {found['without']:.3f} "
        f"without it ({gain['value']:+.3f} [{gain['low']:.3f}, {gain['high']:.3f}])"
    )
    return facts


def begin_windows(data: Texts, count: int) -> Windows:
    """The dev windows that are read with and without the token, ``count`` at most; it stands in front of each."""
    # Of documents, not of the read data: there the token may stand in front of the first window alone.
    documents = tokenize(data.tokenizer, data.corpus.splits["dev"], "every")
    return sample_windows(documents, n_sequences=count, length=data.length, positions=1, seed=SPLITS.index("dev"))


_PLACES = {"every window": "every window", "first window": "the first window of each document"}


def _worth(context: Context, model: ModelRecipe, seed: int, data: Texts) -> Path:
    """The file that says what the token is worth, in a stage of its own."""
    origin, owner = origin_of(context, model, seed), context.suite.trained(model)
    asked = windows_of(context.suite)

    def compute(folder: Path) -> None:
        if not data.beginning.ids:
            write_json(folder / "beginning.json", {"windows": 0})
            return
        stream = stream_of(context, origin, model.view)
        windows = begin_windows(data, asked)
        front = len(data.beginning.ids)
        given, taken, tokens = nats_with_and_without(
            stream.model, windows, front, context.progress, f"begin-{owner.name}"
        )
        gained, count = (np.bincount(windows.clusters, weights=x).astype(float) for x in (taken - given, tokens))
        weights = bootstrap_weights(len(count), context.suite.evaluate.draws, 0)
        low, value, high = ratio_with_interval(gained, count, weights)
        gain = {"value": float(value), "low": float(low), "high": float(high)}
        total = float(tokens.sum())
        means = {"with": float(given.sum()) / total, "without": float(taken.sum()) / total}
        write_json(folder / "beginning.json", {"begin_gain": gain, **means, "windows": len(windows)})

    key = {"trained": origin.digest, "texts": data.digest, "length": data.length, "windows": asked}
    return context.stage(f"begin-{owner.name}", key, compute).folder / "beginning.json"
