"""The stage that trains a model of the suite."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from lensbench.data.inputs import Data, Texts
from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.models.training import StepReport, checkpoint_folder, train
from lensbench.run.context import Context, digest_of
from lensbench.runtime.files import write_json
from lensbench.runtime.progress import Task
from lensbench.runtime.stages import Stage
from lensbench.streams.parts import example_inputs
from lensbench.suite.recipes import ModelRecipe

TRAINING = "training.json"
"""In the stage of a trained model: the seconds that its training took."""


def training(
    context: Context, data: Data, model: ModelRecipe, seed: int, name: str | None = None, tokens: int | None = None
) -> Stage:
    """The stage that trains ``model``: a ``save_pretrained`` folder, with one in it for each checkpoint.

    ``tokens``: train on so many in place of the suite's number. An untrained model is built and saved.
    """
    recipe = context.suite.training_of(model)
    name = name or f"train-{model.name}-seed{seed}"
    if tokens is not None and tokens != recipe.tokens:
        recipe, name = recipe.model_copy(update={"tokens": tokens, "checkpoints": ()}), f"{name}-{tokens}"

    def compute(folder: Path) -> None:
        network = build(str(model.family), seed=seed, **data.shape(recipe), **model.shape, **model.settings)
        if model.untrained:
            save(context, network, folder, recipe.length)
            return
        with context.progress.task(name, recipe.steps, "steps") as task:
            _train(context, network, data, recipe, seed, folder, task)

    key: dict[str, Any] = {
        "texts": data.digest,
        "model": {"family": model.family, **model.shape, **model.settings},
        "training": None if model.untrained else training_key(recipe),
        "seed": seed,
    }
    kept = {"checkpoints": list(recipe.checkpoints)} if recipe.checkpoints and not model.untrained else {}
    stage = context.stage(name, {**key, **kept}, compute, together=not model.untrained)
    # The model at the end is the same whatever is kept on the way, and so is what was measured of it.
    return replace(stage, digest=context.digest(key))


def checkpoint(stage: Stage, tokens: int) -> Stage:
    """The model that a training kept behind so many tokens, as a part of the training's stage."""
    digest = digest_of({"trained": stage.digest, "tokens": tokens})
    return Stage(checkpoint_folder(stage.folder, tokens), digest, stage.reused)


def _train(
    context: Context,
    network: PreTrainedModel,
    data: Data,
    recipe: TrainingRecipe,
    seed: int,
    folder: Path,
    task: Task,
) -> None:
    """Train the network, save it into ``folder``, and note the seconds."""
    batches = data.batches(recipe, seed)
    if isinstance(data, Texts):
        warn_of_repeats(context, recipe.tokens, len(batches))
    start = time.perf_counter()
    ends = [start]

    def report(at: StepReport) -> None:
        ends.append(time.perf_counter())
        rate = at.tokens / (ends[-1] - start)
        task.update(at.step, f"loss {at.loss:.3f}, {rate:,.0f} {context.unit}s/s")

    def keep(tokens: int) -> None:
        place = checkpoint_folder(folder, tokens)
        if not place.exists():  # of a resumed training: the same weights
            aside = place.with_name(f"{place.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            network.save_pretrained(aside)
            os.replace(aside, place)

    train(
        network,
        batches,
        recipe,
        seed=seed,
        checkpoints=folder,
        device=context.device,
        report=report,
        keep=keep,
        ranks=context.ranks,
    )
    # The median step, as often as there are steps: pauses, and what else the machine did for a while, do not count.
    usual = float(np.median(np.diff(ends))) if len(ends) > 1 else 0.0
    write_json(folder / TRAINING, {"seconds": round(usual * recipe.steps, 2)})
    # transformers writes a config on the first of several processes alone; what the others hold is thrown away.
    context.ranks.agreed(lambda: save(context, network.cpu(), folder, recipe.length))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


MOST_EPOCHS = 4
"""Beyond it, reading a text again teaches less than new text would (arXiv 2305.16264)"""


def warn_of_repeats(context: Context, tokens: int, there: int) -> None:
    """Say once where a training reads its text more often than new text could be spared."""
    if tokens <= MOST_EPOCHS * there or "repeats" in context.cache.warned:
        return
    context.cache.warned.add("repeats")
    context.progress.say(
        f"{tokens:,} training tokens read the {there:,} tokens of the train split {tokens / there:.1f} times: beyond "
        f"{MOST_EPOCHS} a repeated text teaches less than a new one; give a longer text (--corpus "
        "'stdlib + package:NAME + file:FOLDER') or lower training.tokens"
    )


@torch.no_grad()
def save(context: Context, network: PreTrainedModel, folder: Path, length: int) -> None:
    """Write a ``save_pretrained`` folder; raises :class:`LensbenchError` where it loads as another model.

    A family that changes a network after its class has built it would be trained, then measured without the change.
    """
    network.eval().save_pretrained(folder)
    again = loader_of(context).from_pretrained(folder, dtype=torch.float32).eval()
    inputs = example_inputs(network, 2)
    if context.suite.images is None:
        inputs = inputs[:, :length]
    expected, found = network(inputs).logits, again(inputs).logits
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max()))):
        raise LensbenchError(
            f"a {type(network).__name__} that is saved loads as another model: its logits differ by up to "
            f"{float((found - expected).abs().max()):.3g}; give the family a config and a model class of its own, "
            "registered with transformers' Auto classes (see the end of lensbench/models/controls.py)"
        )


def training_key(recipe: TrainingRecipe) -> dict[str, Any]:
    """What a model's weights depend on in a recipe; what a recipe may leave out is named only where it does not."""
    unset = {name for name in ("deep_supervision", "read_out_alone") if not getattr(recipe, name)}
    key = recipe.model_dump(exclude={"checkpoint_every", "checkpoints"} | unset)
    return {**key, "optimizer": "Muon in float32 and AdamW"}


def loader_of(context: Context) -> Any:
    """The class of transformers that loads this suite's models."""
    return AutoModelForCausalLM if context.suite.images is None else AutoModelForImageClassification


def trained_network(context: Context, stage: Stage) -> PreTrainedModel:
    """The model that a training stage holds, on the run's device; raises :class:`LensbenchError` where it is damaged."""
    try:
        model = loader_of(context).from_pretrained(stage.folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LensbenchError(
            f"the model in {stage.folder} cannot be loaded ({reason}); delete it to train anew"
        ) from error
    network: PreTrainedModel = torch.nn.Module.to(model, context.device)
    return network
