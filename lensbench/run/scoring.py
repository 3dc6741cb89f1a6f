"""The stage that scores the lenses of a model on held-out text."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lensbench.lenses.fit import Fit
from lensbench.measures.evaluate import evaluate
from lensbench.models import count_parameters
from lensbench.results.folder import write_sequences
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import fitting, rotation_of
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import Origin, origin_of, stream_of
from lensbench.run.sharing import estimate_key, exact_share_of, said_of, shares_in
from lensbench.runtime.files import write_json
from lensbench.runtime.stages import Pieces, Stage
from lensbench.streams.half import HalfAgreement
from lensbench.streams.stream import ResidualStream
from lensbench.suite.recipes import ModelRecipe


def scoring(context: Context, model: ModelRecipe, seed: int) -> Stage:
    """The stage that scores a model's fitted lenses, for one view and seed."""
    origin, fitted = origin_of(context, model, seed), fitting(context, model, seed)
    recipe, settings = context.suite.fit, context.suite.evaluate
    who, share = f"{model.name}-seed{seed}", exact_share_of(context, model, seed)

    def compute(folder: Path) -> None:
        fit = Fit.load(fitted.folder)
        stream = stream_of(context, origin, model.view)
        samples = eval_samples(context, data_of(context, model))
        captured, readout = captured_states(
            context,
            stream,
            samples,
            name=f"capture-eval-{who}",
            origin=origin,
            constant=fit.constant,
            rotation=rotation_of(fitted),
            ranks=context.ranks,
        )
        pieces = Pieces(folder / "pieces", context.ranks)
        evaluated = evaluate(
            readout,
            captured,
            fit,
            refit_positions=settings.refit_positions,
            matrix=settings.matrix,
            exact_share=shares_in(share),
            seed=(seed,),
            memory_gib=recipe.memory_gib,
            pieces=pieces,
            progress=context.progress,
            task=f"score-{who}",
        )
        write_sequences(folder / "sequences.parquet", evaluated.frame(samples, model=model.name, seed=seed))
        save_file({k: torch.from_numpy(v) for k, v in evaluated.refits.items()}, folder / "refits.safetensors")
        write_json(folder / "model.json", model_facts(origin, stream))
        if said := said_of(share, len(readout.weight)):
            context.progress.say(f"{who}: {said}")
        pieces.clear()

    key: dict[str, Any] = {"fit": fitted.digest, "evaluate": settings.scored}
    if settings.exact_share != 1:
        key["estimate"] = {**estimate_key(), **share}
    if context.sequences is not None:
        key["sequences"] = context.sequences
    return context.stage(f"score-{who}", key, compute, together=True)


def model_facts(origin: Origin, stream: ResidualStream) -> dict[str, Any]:
    """The row of ``models.csv`` that is known before anything is measured."""
    return {
        **origin.facts,
        "family": origin.facts["family"] or stream.model.config.model_type,
        "parameters": count_parameters(stream.model),
        "layers": stream.layers,
        "d_model": stream.d_model,
        "vocab_size": stream.vocab_size,
        **({"half_passes": stream.half.facts} if isinstance(stream.half, HalfAgreement) else {}),
    }
