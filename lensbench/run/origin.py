"""Where a model of a run comes from: trained here, or loaded from a source."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lensbench.data.inputs import Texts
from lensbench.data.samples import Samples
from lensbench.errors import LensbenchError
from lensbench.models.pretrained import (
    check_context,
    check_vocabulary,
    digest,
    load_config,
    load_model,
    locate,
    named,
)
from lensbench.results.manifest import MANIFEST
from lensbench.run.context import Context, digest_of
from lensbench.run.inputs import corpus_of, data_of, identity_of
from lensbench.run.training import checkpoint, loader_of, trained_network, training
from lensbench.runtime.environment import choose_device, dtype_named
from lensbench.runtime.texts import read_json
from lensbench.streams.half import INPUTS, POSITIONS, HalfAgreement, choose_half
from lensbench.streams.rotary import depends_on_length
from lensbench.streams.stream import ResidualStream
from lensbench.suite.recipes import ModelRecipe

REMEDY = "add --set evaluate.length={}, or less"


@dataclass(frozen=True)
class Origin:
    """A model of a run: what identifies it, and how it is loaded."""

    name: str
    digest: str
    load: Callable[[], PreTrainedModel]
    facts: dict[str, Any]
    """``family, source, weights, dtype, train_tokens`` of ``models.csv``."""
    compared: Callable[[], Samples] | None = None
    """What passes in float16 are compared with passes in float32 on; None where they are not to be used"""


def origin_of(context: Context, model: ModelRecipe, seed: int) -> Origin:
    """The model itself, trained first where the suite trains it."""
    owner = context.suite.trained(model)
    if owner.source is not None:
        return _pretrained(context, owner, owner.source)
    stage = whole = training(context, data_of(context), context.suite.whole_training(owner), seed)
    recipe = context.suite.training
    steps = recipe.steps
    if owner.checkpoint is not None:
        stage, steps = checkpoint(whole, owner.checkpoint), recipe.step_of(owner.checkpoint)
    stored = {Path(name): checksum for name, checksum in whole.checksums(".safetensors").items()}
    own = {file.name: checksum for file, checksum in stored.items() if whole.folder / file.parent == stage.folder}
    facts = {
        "family": owner.family,
        "source": None,
        "weights": digest(own),
        "dtype": "float32",
        "train_tokens": 0 if owner.untrained else steps * recipe.batch * recipe.length,
    }
    own_digest = stage.digest
    if not context.suite.evaluate.half_products:  # it changes log-partitions, and not the model
        own_digest = digest_of({"trained": stage.digest, "half_products": False})
    return Origin(owner.name, own_digest, partial(trained_network, context, stage), facts)


def _pretrained(context: Context, owner: ModelRecipe, source: str) -> Origin:
    device = context.device if owner.device is None else choose_device(owner.device)
    seen = source in context.cache.warned
    context.cache.warned.add(source)
    if context.suite.images is None and not seen and trained_on_this(context, source):
        context.progress.say(
            f"model {owner.name} was trained by a run of lensbench on this text, split another way: some of what it "
            "is scored on here it was trained on; give --corpus another text, or the suite that run's corpus settings"
        )
    identified = identity_of(context, source)
    key: dict[str, Any] = {"source": identified, "dtype": owner.dtype}
    if owner.device is not None:
        key["device"] = device.type
    half = context.suite.evaluate.half_products
    if not half:
        key["half_products"] = False
    facts = {
        "family": None,
        "source": named(source),
        "weights": digest(identified),
        "dtype": owner.dtype,
        "train_tokens": train_tokens_of(owner, source),
    }
    compared = partial(_compared, context, owner) if half and context.suite.images is None else None
    return Origin(owner.name, digest_of(key), partial(_load, context, owner, source, device), facts, compared)


def _compared(context: Context, owner: ModelRecipe) -> Samples:
    """A few inputs of dev."""
    return data_of(context, owner).samples("dev", INPUTS, min(POSITIONS, max(1, context.suite.length // 4)))


def train_tokens_of(owner: ModelRecipe, source: str) -> int | None:
    """The tokens that a pretrained model was trained on: as the suite says, or its config; None where neither does."""
    if owner.train_tokens is not None or source.startswith(("gguf:", "package:")):
        return owner.train_tokens
    said = getattr(load_config(source), "train_tokens", None)
    return said if isinstance(said, int) else None


def _load(context: Context, owner: ModelRecipe, source: str, device: torch.device) -> PreTrainedModel:
    """A pretrained model, checked against the text that it is to read."""
    with context.progress.task(f"load-{owner.name}", 1, "models") as task:
        network = load_model(
            source,
            dtype=dtype_named(owner.dtype),
            device=device,
            device_map=owner.device_map,
            loader=loader_of(context),
            say=context.say_once,
        )
        data = data_of(context, owner)
        if isinstance(data, Texts):
            check_context(f"model {owner.name}", network.config, context.suite.length, REMEDY)
            limit = depends_on_length(network.config)
            if limit is not None and context.suite.length > limit:
                context.say_once(
                    f"model {owner.name}: beyond {limit} tokens its rotary frequencies depend on the length; all windows, "
                    f"shorter ones too, are read with those of {context.suite.length} tokens",
                )
            check_vocabulary(source, data.tokenizer, network.config.get_text_config().vocab_size)
            data.within(network)
        task.update(1)
    return network


def trained_on_this(context: Context, source: str) -> bool:
    """Whether a model of a run's stage was trained on text that this suite may fit or score on."""
    own_tokenizer = locate(source).own_tokenizer
    if own_tokenizer is None:
        return False
    try:
        manifest = read_json(own_tokenizer.parents[2] / MANIFEST)
        theirs, checksum = manifest["suite"]["corpus"], manifest["corpus"]["checksum"]
    except (LensbenchError, KeyError, TypeError):
        return True  # a run that has not finished does not say
    split = {"train", "fit", "dev", "eval", "seed"}
    same_split = {k: theirs[k] for k in split} == context.suite.corpus.model_dump(include=split)
    return checksum == corpus_of(context).checksum and not same_split


def stream_of(context: Context, origin: Origin, view: str) -> ResidualStream:
    """The stream of a model, loaded when it is first needed; one model at a time is kept, with all its views."""
    streams, key = context.cache.streams, (origin.digest, view)
    if key not in streams:
        same = next((s.model for (digest, _), s in streams.items() if digest == origin.digest), None)
        streams.clear()  # before the next one is loaded: two models at once may not fit
        network = origin.load() if same is None else same
        try:
            streams[key] = ResidualStream(network, view)
        except LensbenchError as error:
            raise LensbenchError(f"model {origin.name}: {error}") from error
        streams[key].half = _half_of(context, origin, streams[key])
    return streams[key]


def _half_of(context: Context, origin: Origin, stream: ResidualStream) -> HalfAgreement | None:
    """How well passes in float16 agree, where they are used; decided once for all views of a model."""
    if origin.compared is None:
        return None
    if origin.digest not in context.cache.half:
        found = context.cache.half[origin.digest] = choose_half(stream, origin.compared)
        if found is not None:
            context.say_once(
                f"model {origin.name}: forward passes multiply in float16; against float32, predictions differ by a mean KL "
                f"of {found.kl:.1g} nats/token, states by {100 * found.state_error:.1g} % (--set "
                "evaluate.half_products=false: never)",
            )
    return context.cache.half[origin.digest]
