"""The stage that decomposes the updates of a model: the first numbers of a run."""

from pathlib import Path
from typing import Any

from lensbench.data.inputs import Data
from lensbench.measures.update import UpdateRecipe, UpdateResult, UpdateRule, decide_update
from lensbench.measures.update.measure import in_clusters, measure_updates
from lensbench.measures.update.sentences import sentence
from lensbench.measures.update.verdict import WITHOUT_FIRST
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import loaded_lens, random_bases
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import Origin, origin_of, stream_of
from lensbench.runtime.stages import NotFinished
from lensbench.suite.recipes import ModelRecipe

UPDATE_FORMAT = 15
"""Version of the numbers of this stage: part of its key"""

OF_LENSES = (
    "sequences", "positions", "dev_sequences", "dev_positions", "ridges", "pads", "tolerance", "pooled_dev_tokens",
    "search_tokens", "variance", "turns",
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
            include={"sequences", "positions", "first_position", "max_share", "turns"}
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
    if model.lens is not None:
        loaded_lens(model.lens, stream)  # one of another model is refused before anything is measured
    samples = data.samples(**recipe.of_fit)
    fit, _ = captured_states(context, stream, samples, name=f"capture-update-fit-{who}", origin=origin)
    fit = in_clusters(fit, samples)
    rotation = random_bases(context, fit, seed) if model.rotated else None
    others = {
        "dev": data.samples(**recipe.of_dev),
        "eval": eval_samples(context, data),
    }
    (dev, _), (held_out, readout) = (
        captured_states(
            context, stream, samples, name=f"capture-update-{split}-{who}", origin=origin, constant=fit.mean_p,
            rotation=rotation,
        )
        for split, samples in others.items()
    )  # fmt: skip
    fit = fit if rotation is None else rotation.apply(fit)
    dev, held_out = in_clusters(dev, others["dev"]), in_clusters(held_out, others["eval"])
    if model.rotated:
        settings = settings.model_copy(update={"landmarks": False})
    return measure_updates(
        readout, fit, dev, held_out, recipe, settings, name=model.name, seed=seed, progress=context.progress
    )


def first_words(result: UpdateResult, rule: UpdateRule) -> str:
    """The verdict on a model from layer 1 on, in a sentence; what becomes of errors is not known yet."""
    facts = result.facts(WITHOUT_FIRST)
    found = decide_update(rule, facts)
    null, massive = result.null(WITHOUT_FIRST), result.without_massive(WITHOUT_FIRST)
    said = sentence(rule, facts, found, null=null, massive=massive)
    return f"{found.verdict}. {said}"
