"""The stage that decomposes the updates of a model: the first numbers of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lensbench.data.inputs import Data
from lensbench.data.samples import Samples
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.measures.indices import seed_of_rotations
from lensbench.measures.update import (
    STEPS,
    Undefined,
    UpdateRecipe,
    UpdateResult,
    UpdateRule,
    decide_update,
    decompose,
    landmark_results,
)
from lensbench.measures.update.decomposition import Decomposition
from lensbench.measures.update.sentences import sentence
from lensbench.measures.update.variants import MassiveTokens, without_massive
from lensbench.measures.update.verdict import WITHOUT_FIRST
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import random_bases
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import Origin, origin_of, stream_of
from lensbench.runtime.stages import NotFinished
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.suite.recipes import ModelRecipe

UPDATE_FORMAT = 3
"""Version of the numbers of this stage: part of its key"""

OF_LENSES = (
    "sequences", "positions", "dev_sequences", "dev_positions", "ridges", "pads", "tolerance", "pooled_dev_tokens",
    "variance",
)  # fmt: skip
"""The settings of the fit that the decomposition shares"""


def updating(context: Context, model: ModelRecipe, seed: int) -> UpdateResult | None:
    """The update decomposition of a model, for one view and seed.

    None where the suite asks for none, and where this context computes nothing and no earlier run has left one.
    """
    settings = context.suite.update
    if settings is None:
        return None
    origin, data, recipe = origin_of(context, model, seed), data_of(context, model), context.suite.fit
    who = f"{model.name}-seed{seed}"

    def compute(folder: Path) -> None:
        decomposed(context, model, seed, origin, data, settings).save(folder)

    key: dict[str, Any] = {
        "trained": origin.digest,
        "texts": data.digest,
        "length": context.suite.length,
        "view": model.view,
        "fit": recipe.model_dump(include=set(OF_LENSES)),
        "update": settings.model_dump(),
        "evaluate": context.suite.evaluate.model_dump(
            include={"sequences", "positions", "first_position", "max_share"}
        ),
        "seed": seed,
        "rotated": model.rotated,
        "version": UPDATE_FORMAT,
    }
    if context.sequences is not None:
        key["sequences"] = context.sequences
    try:
        stage = context.stage(f"update-{who}", key, compute)
    except NotFinished:
        if context.compute:
            raise
        return None
    result = UpdateResult.load(stage.folder)
    if context.compute:
        context.progress.say(f"update-{who}: {first_words(result, context.suite.verdict.update)}")
    return result


def decomposed(
    context: Context, model: ModelRecipe, seed: int, origin: Origin, data: Data, settings: UpdateRecipe
) -> UpdateResult:
    """The decomposition itself: states of three splits, and what follows from them."""
    stream, recipe, who = stream_of(context, origin, model.view), context.suite.fit, f"{model.name}-seed{seed}"
    samples = data.samples("fit", recipe.sequences, recipe.positions)
    fit, _ = captured_states(context, stream, samples, name=f"capture-update-fit-{who}")
    fit = in_clusters(fit, samples)
    rotation = random_bases(context, fit, seed) if model.rotated else None
    others = {
        "dev": data.samples("dev", recipe.dev_sequences, recipe.dev_positions),
        "eval": eval_samples(context, data),
    }
    (dev, _), (held_out, readout) = (
        captured_states(
            context, stream, samples, name=f"capture-update-{split}-{who}", constant=fit.mean_p, rotation=rotation
        )
        for split, samples in others.items()
    )
    fit = fit if rotation is None else rotation.apply(fit)
    dev, held_out = in_clusters(dev, others["dev"]), in_clusters(held_out, others["eval"])
    steps = [*STEPS, "without massive activations", "landmarks"]
    done = iter(range(len(steps)))
    with context.progress.task(f"update-{who}", len(steps), "steps") as task:
        try:
            found = decompose(
                readout,
                fit,
                dev,
                held_out,
                recipe,
                layers=spread_layers(stream.layers, settings.layers) if stream.layers > 1 else [0],
                metric=settings.metric,
                refits=settings.refits,
                readable=settings.readable,
                tolerances=settings.tolerances,
                metrics=settings.metrics,
                seed=seed,
                spread=seed_of_rotations(model.name, seed),
                say=lambda step: task.update(next(done), step),
            )
            task.update(len(STEPS), "without massive activations")
            found, rows = capped(found, readout, (fit, dev, held_out), recipe, settings, seed)
        except Undefined as error:
            return UpdateResult.undefined(str(error))
        result = UpdateResult.of(found, rows)
        if not settings.landmarks or model.rotated:
            return result
        task.update(len(steps) - 1, "landmarks")
        return result.beside(landmark_results(readout, fit, dev, held_out, recipe, metric=settings.metric, seed=seed))


def capped(
    found: Decomposition,
    readout: ReadOut,
    captures: tuple[Capture, Capture, Capture],
    recipe: FitRecipe,
    settings: UpdateRecipe,
    seed: int,
) -> tuple[Decomposition, list[dict[str, Any]]]:
    """The decomposition beside one without tokens of massive activations, and rows of their shares on fit, dev and eval."""
    if settings.largest_norm is None:
        return found, []
    massive = MassiveTokens.of(captures[0], found.layers, settings.largest_norm)
    (fit, dev, held_out), shares = zip(*(massive.left_out(captured) for captured in captures), strict=True)
    rows = massive.rows(dict(zip(("fit", "dev", "eval"), shares, strict=True)))
    if not any(shares):
        return found, rows
    try:
        other = decompose(
            readout, fit, dev, held_out, recipe, layers=found.layers, metric=settings.metric, refits=0, readable=False,
            gating=found.gating, seed=seed,
        )  # fmt: skip
    except Undefined as error:
        rows[-1]["reason"] = f"without these tokens: {error}"
        return found, rows
    return without_massive(found, other, settings.largest_norm), rows


def in_clusters(captured: Capture, samples: Samples) -> Capture:
    """The capture with clusters in place of documents: folds, gates and intervals take whole ones."""
    cluster = np.unique(samples.clusters[captured.window], return_inverse=True)[1].astype(np.int64)
    return replace(captured, document=cluster)


def first_words(result: UpdateResult, rule: UpdateRule) -> str:
    """The verdict on a model from layer 1 on, in a sentence; what becomes of errors is not known yet."""
    facts = result.facts(WITHOUT_FIRST)
    found = decide_update(rule, facts)
    said = sentence(rule, facts, found, null=result.null(WITHOUT_FIRST))
    return f"{found.verdict}. {said}"
