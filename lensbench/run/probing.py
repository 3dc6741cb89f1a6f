"""The stages that run the suite's probes on a model."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lensbench.data.inputs import Texts
from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.lenses.fit import Fit
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.maps import AffineMaps, TurnedMap
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.shared import SHARED_LENS
from lensbench.probes.measured import Measurement, load_measurement
from lensbench.probes.registry import PROBES
from lensbench.probes.subject import ReadText, Subject
from lensbench.probes.tools.layer_lenses import FITTED_ALWAYS, PROBED
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import fitting, rotation_of
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import origin_of, stream_of
from lensbench.runtime.progress import QUIET
from lensbench.runtime.stages import NotFinished
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.suite.recipes import ModelRecipe


def probing(context: Context, model: ModelRecipe, seed: int) -> list[Measurement]:
    """What the suite's probes measure of a model, each in a stage of its own.

    Probes that this context does not compute are read where they are finished, and left out where they are not.
    """
    if not context.suite.probes:
        return []
    fitted, count = fitting(context, model, seed), probe_sequences(context)
    evaluate = context.suite.evaluate.model_dump(include={"positions", "max_share", "turns"})
    subject = cache(lambda: subject_of(context, model, seed))  # loaded when the first unfinished probe asks
    found = []
    for name in context.suite.probes:
        key: dict[str, Any] = {"fit": fitted.digest, "probe": name, "evaluate": {"probe_sequences": count, **evaluate}}
        if PROBES[name].version > 1:  # a key without one is of version 1
            key["version"] = PROBES[name].version

        def measure(folder: Path, name: str = name) -> None:
            PROBES[name].measure(subject()).save(folder)

        asked = not context.probes or name in context.probes
        # Results of the others do not count among the stages of this run.
        computing = context if asked else replace(context, compute=False, progress=QUIET)
        stage_name = f"probe-{name}-{model.name}-seed{seed}"
        try:
            stage = computing.stage(stage_name, key, measure)
        except NotFinished:
            if asked or not context.compute:
                raise
            continue
        if not asked:
            context.progress.say(f"{stage_name}: reused from an earlier run")
        found.append(load_measurement(stage.folder))
    return found


def probe_sequences(context: Context) -> int:
    """How many sequences probes read: no more than are scored, whose clusters are the probes' too."""
    evaluate = context.suite.evaluate
    return min(evaluate.probe_sequences, context.sequences or evaluate.sequences)


def further_lenses(fit: Fit) -> tuple[dict[str, TurnedMap], dict[str, AffineMaps]]:
    """Of the kinds that probes read: the nulls in the first random basis, and the lenses that not every fit has."""
    nulls, further = {}, {}
    for lens, fitted in fit.lenses.items():
        if lens.kind not in PROBED or lens.refit >= 0:
            continue
        if lens.view == 0 and fitted.record.basis == "view":
            nulls[lens.kind] = TurnedMap(fitted.maps, fit.views[0], fitted.reads[0])
        elif lens.view < 0 and lens.kind not in FITTED_ALWAYS:
            further[lens.kind] = fitted.maps
    return nulls, further


def subject_of(context: Context, model: ModelRecipe, seed: int) -> Subject:
    """A model with its lenses and samples, as probes look at it."""
    fitted, data, recipe = fitting(context, model, seed), data_of(context, model), context.suite.fit
    who, rotation = f"{model.name}-seed{seed}", rotation_of(fitted)
    origin = origin_of(context, model, seed)
    stream = stream_of(context, origin, model.view)
    fit = Fit.load(fitted.folder)
    scored = eval_samples(context, data, probe_sequences(context))
    samples: dict[str, Callable[[], Samples]] = {
        "fit": lambda: data.samples(**recipe.of_fit),
        "dev": lambda: data.samples(**recipe.of_dev),
        "eval": lambda: scored,
    }

    @cache
    def read(split: str) -> tuple[Capture, ReadOut]:
        constant = None if split == "fit" else fit.constant
        name = f"capture-probe-{split}-{who}"
        return captured_states(
            context, stream, samples[split](), name=name, origin=origin, constant=constant, rotation=rotation
        )

    def jacobians(prompts: Windows) -> JacobianSource:
        return JacobianSource(
            stream, prompts, recipe.jacobian, seed, context.suite.evaluate.first_position, rotation, context.ranks
        )

    # Products of log-partitions are made in half precision on GPUs alone, where the scored states allow it.
    on_gpu = stream.device.type == "cuda"

    return Subject(
        stream.with_readout(read("eval")[1]) if on_gpu else stream,
        scored,
        fit.summary.layers,
        fit.headline.maps,
        model.rotated,
        lambda split: read(split)[0],
        fit[OWN].maps,
        fit[SHARED_LENS].maps,
        ReadText(data.samples(**recipe.of_fit), data.bigram, data.tokenizer) if isinstance(data, Texts) else None,
        who,
        context.progress,
        tuple(ridge or 0.0 for ridge in fit[OWN].record.ridge),
        *further_lenses(fit),
        jacobians if recipe.lenses else None,
    )
