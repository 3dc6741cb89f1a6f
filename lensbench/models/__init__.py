"""Models trained here: name of a family -> a randomly initialised model of a stated number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.models.controls import ControlGPTConfig, ControlGPTForCausalLM
from lensbench.models.gpt import gpt2, llama
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM
from lensbench.models.vision import cnn, vit


def of_our_own(
    config: Callable[..., PreTrainedConfig],
    model: Callable[..., PreTrainedModel],
    *,
    vocab_size: int,
    d_model: int,
    layers: int,
    heads: int,
    width: int,
    context: int,
    **variant: Any,
) -> PreTrainedModel:
    """A model of a class that is defined here; ``variant`` goes to its config."""
    del context  # positions enter through rotations, decay and convolution alone
    return model(
        config(
            vocab_size=vocab_size,
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=width,
            bos_token_id=0,
            eos_token_id=0,
            **variant,
        )
    )


def predictive_coding_lm(*, d_model: int, **rest: Any) -> PreTrainedModel:
    """Predictive-coding LM; its variants are :class:`PredictiveCodingConfig`'s."""
    return of_our_own(
        PredictiveCodingConfig, PredictiveCodingForCausalLM, d_model=d_model, prediction_size=4 * d_model, **rest
    )


control = partial(of_our_own, ControlGPTConfig, ControlGPTForCausalLM)
"""The controls' GPT; without a change of its config the stronger baseline."""


@dataclass(frozen=True)
class Family:
    """One way to build a model, and the settings of it that a suite may change."""

    build: Callable[..., PreTrainedModel]
    description: str
    settings: tuple[str, ...]
    images: bool = False
    """Classifies images, and is no causal LM"""
    attention: bool = True


FAMILIES: dict[str, Family] = {
    "gpt": Family(llama, "Llama class of transformers: RMSNorm, rotary positions, gated MLP", ("initializer_range",)),
    "gpt2": Family(gpt2, "GPT-2 class of transformers: LayerNorm, learned positions", ("initializer_range",)),
    "gpt-conv": Family(
        control, "the stronger GPT: rotary positions, width-3 convolution, normalised embedding", ("initializer_range",)
    ),
    "gpt-partitioned": Family(
        partial(control, partitioned=True),
        "gpt-conv whose blocks write into slices of their own, the last alone into what the head sees: carry-along",
        ("initializer_range", "read_size", "attention_size"),
    ),
    "gpt-tied": Family(
        partial(control, tied_layers=True), "gpt-conv with one block for all layers", ("initializer_range",)
    ),
    "gpt-noskip": Family(
        partial(control, skip=0.0),
        "gpt-conv without skip connections, or with both of every block carrying `skip` times as much",
        ("initializer_range", "skip"),
    ),
    "predictive-coding": Family(
        predictive_coding_lm,
        "predictions and prediction errors at known places, each layer corrects the errors",
        (
            "initializer_range",
            "error",
            "error_gradient",
            "kernel",
            "decay",
            "delta_rule",
            "relaxed",
            "tied_layers",
            "tie_query_key",
            "tie_value_output",
            "initial_eta",
            "initial_beta",
            "initial_decays",
        ),
    ),
    "vit": Family(
        vit,
        "images: ViT class of transformers: patches of one width, class token, LayerNorm",
        ("initializer_range", "patch_size"),
        images=True,
    ),
    "cnn-residual": Family(
        partial(cnn, skip=True),
        "images: CNN of one width, every block adds to its input",
        ("stride",),
        images=True,
        attention=False,
    ),
    "cnn-plain": Family(
        partial(cnn, skip=False),
        "images: cnn-residual without its skip connections",
        ("stride",),
        images=True,
        attention=False,
    ),
}


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, a tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())


def build(family: str, *, parameters: int, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """A randomly initialised model of ``family`` with ``parameters`` parameters, within 1 %.

    ``shape``: ``d_model, layers, heads, vocab_size`` (or classes), ``context`` (or pixels of a side), ``channels`` of
    images, and settings of the family. Raises :class:`LensbenchError` as :func:`fitting_width` does.
    """
    width = fitting_width(family, parameters=parameters, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family].build(width=width, **shape)


MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What building a model of impossible settings raises."""


def fitting_width(
    family: str,
    *,
    parameters: int,
    vocab_size: int,
    d_model: int,
    layers: int,
    heads: int | None,
    context: int,
    channels: int | None = None,
    **settings: Any,
) -> int:
    """The width of the MLPs (or of the blocks of a CNN) that gives a model of ``family`` its number of parameters.

    Within 1 %; the count is linear in the width, so two empty models tell. Raises :class:`LensbenchError` for an unknown
    family or setting, for a wrong value, and where no width comes within 1 %.
    """
    if family not in FAMILIES:
        raise LensbenchError(f"unknown model family {family!r}; there are {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    unknown = sorted(set(settings) - set(known.settings))
    if unknown:
        raise LensbenchError(f"{family} has no setting {unknown[0]!r}; it has {', '.join(known.settings)}")
    # Rotary positions turn pairs of entries, so a head's size must be even too.
    # Families whose attention has a size of its own say so themselves.
    own_size = "attention_size" in known.settings or not known.attention
    if not own_size and (heads is None or heads < 1 or d_model % heads or d_model // heads % 2):
        raise LensbenchError(f"heads is {heads}: it must divide d_model {d_model} into parts of even size")
    if heads is not None and heads < 1:
        raise LensbenchError(f"heads is {heads}: it must be at least 1")
    shape: dict[str, Any] = {"vocab_size": vocab_size, "d_model": d_model, "layers": layers, "heads": heads}
    shape |= {"context": context} | ({"channels": channels} if known.images else {})
    if known.images:
        size = settings.get("patch_size") or settings.get("stride") or 1
        if size < 1 or context % size:
            raise LensbenchError(f"{family}: patches (or steps) of {size} pixels do not divide images of {context}")
    make = known.build

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(make(width=width, **shape, **settings))

    try:
        at_one, at_two = count(1), count(2)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        StrictDataclassError,
    ) as error:
        # The config's own check of its settings, or what torch makes of them.
        raise LensbenchError(f"{family}: {' '.join(str(error).split())}") from error
    width = round((parameters - at_one) / (at_two - at_one)) + 1
    if width < 1 or abs(count(width) - parameters) > 0.01 * parameters:
        raise LensbenchError(
            f"no MLP width gives {family} {parameters} parameters at d_model {d_model} and {layers} layers: "
            f"without MLPs it has {2 * at_one - at_two}; change parameters, d_model or layers"
        )
    return width
