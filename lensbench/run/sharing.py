"""The stage that finds which share of the log-partitions a model's scores need at each layer."""

from pathlib import Path
from typing import Any

from lensbench.lenses.estimated import WORDS, Estimator, Shares, worth_estimating
from lensbench.lenses.fit import Fit
from lensbench.measures.evaluate import thinned_windows
from lensbench.measures.share import PILOT_TOKENS, find_share
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import fitting, rotation_of
from lensbench.run.inputs import data_of
from lensbench.run.origin import origin_of, stream_of
from lensbench.runtime.files import write_json
from lensbench.runtime.stages import ANEW
from lensbench.runtime.texts import read_json
from lensbench.suite.recipes import ModelRecipe

ESTIMATE_FORMAT = 7
"""Version of estimates and of how a share is found: in the keys of stages that estimate, and of no others"""

DEV_DRAW = 1
"""Tells the words that a share is found with from those that scores are estimated with"""


def exact_share_of(context: Context, model: ModelRecipe, seed: int) -> dict[str, Any]:
    """``share`` of the log-partitions that are computed exactly for a model, and where it was found what it rests on."""
    asked = context.suite.evaluate.exact_share
    if asked != "auto":
        return {"share": asked}
    fitted, recipe, settings = fitting(context, model, seed), context.suite.fit, context.suite.evaluate
    who = f"{model.name}-seed{seed}"
    scored = settings.sequences * settings.positions

    def compute(folder: Path) -> None:
        fit, origin = Fit.load(fitted.folder), origin_of(context, model, seed)
        stream = stream_of(context, origin, model.view)
        vocabulary = len(stream.readout.weight)
        if not worth_estimating(vocabulary):
            write_json(folder / "share.json", {"share": 1.0, "why": exact_because(vocabulary)})
            return
        # The dev samples that lenses were chosen on: their states are at hand.
        samples = data_of(context, model).samples(**recipe.of_dev)
        captured, readout = captured_states(
            context, stream, samples, name=f"capture-share-{who}", origin=origin, constant=fit.constant,
            rotation=rotation_of(fitted), ranks=context.ranks,
        )  # fmt: skip
        some = thinned_windows(captured, max(1, PILOT_TOKENS // len(samples)))
        estimator = Estimator.of(readout, some, fit.headline.maps, share=1.0, seed=(seed, DEV_DRAW))
        with context.progress.task(f"share-{who}", 1, "steps") as task:
            found = find_share(estimator, fit, scored)
            task.update(1)
        write_json(folder / "share.json", found.described())

    key = {"fit": fitted.digest, "evaluate": settings.scored, "estimate": estimate_key()}
    stage = context.stage(f"share-{who}", key, compute, together=True)
    known: dict[str, Any] = read_json(stage.folder / "share.json", ANEW)
    return known


def shares_in(found: dict[str, Any]) -> Shares:
    """The shares of all layers, or the one for all of them, of what :func:`exact_share_of` gives."""
    shares: Shares = found.get("of_layers", found["share"])
    return shares


def estimate_key() -> dict[str, int]:
    """What the stages that estimate have in their keys."""
    return {"version": ESTIMATE_FORMAT, "words": WORDS}


def said_of(share: dict[str, Any], vocabulary: int) -> str:
    """One line on how a model is scored; empty where everything is exact and nothing else was asked for."""
    if "why" in share:
        return str(share["why"])
    if share["share"] == 1:
        widest = share.get("widest")
        if widest == "":
            return "all log-partitions are exact: the dev split has too few documents to tell what a share would cost"
        return "" if widest is None else f"all log-partitions are exact: {widest} asks for more than half of them"
    if not worth_estimating(vocabulary):
        return exact_because(vocabulary)
    asks = ""
    if "widest" in share:
        asks = f" ({min(share['of_layers']):.1%} to {max(share['of_layers']):.1%} by layer, as {share['widest']} asks)"
    return (
        f"{share['share']:.1%} of the log-partitions are exact{asks}; the others are estimated, and intervals hold that"
    )


def exact_because(vocabulary: int) -> str:
    """Why a model is scored exactly where estimates were asked for."""
    return f"all log-partitions are exact: a vocabulary of {vocabulary} is too small for {WORDS} words to stand for it"
