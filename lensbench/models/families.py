"""The model families of lensbench, and how a model of a given number of parameters is built.

A family is one row of :data:`FAMILIES`. To add one, write a function from a shape to a ``PreTrainedModel`` in a file of its
own in this package, and add its row.
"""

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
from lensbench.models.looped import LoopedGPTConfig, LoopedGPTForCausalLM
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM
from lensbench.models.vision import cnn, vit


@dataclass(frozen=True)
class Family:
    """One way to build a model, and the settings that a suite may change."""

    build: Callable[..., PreTrainedModel]
    """Takes ``width`` (of the MLPs), the shape and the settings, all as keywords"""
    description: str
    settings: tuple[str, ...]
    images: bool = False
    """Whether its models classify images; the others are causal language models"""
    attention: bool = True
    """Whether its models have attention heads"""


def from_config(
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
    """A language model of a class that lensbench defines; ``variant`` goes to its config."""
    del context  # these models have no table of positions
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


def predictive_coding_lm(*, d_model: int, **shape: Any) -> PreTrainedModel:
    """A predictive-coding language model; :class:`PredictiveCodingConfig` lists its variants."""
    return from_config(
        PredictiveCodingConfig, PredictiveCodingForCausalLM, d_model=d_model, prediction_size=4 * d_model, **shape
    )


control = partial(from_config, ControlGPTConfig, ControlGPTForCausalLM)
"""The controls' GPT. With the defaults of its config it is the stronger baseline."""


FAMILIES: dict[str, Family] = {
    "gpt": Family(llama, "Llama class of transformers: RMSNorm, rotary positions, gated MLP", ("initializer_range",)),
    "gpt2": Family(gpt2, "GPT-2 class of transformers: LayerNorm, learned positions", ("initializer_range",)),
    "gpt-conv": Family(
        control, "the stronger GPT: rotary positions, width-3 convolution, normalised embedding", ("initializer_range",)
    ),
    "gpt-partitioned": Family(
        partial(control, partitioned=True),
        "carry-along by construction: gpt-conv, each block writes into its own slice, the head sees the last block's",
        ("initializer_range", "read_size", "attention_size"),
    ),
    "gpt-tied": Family(
        partial(control, tied_layers=True), "gpt-conv with one block for all layers", ("initializer_range",)
    ),
    "gpt-looped": Family(
        partial(from_config, LoopedGPTConfig, LoopedGPTForCausalLM),
        "one group of gpt-conv's blocks in a loop, the input injected at every loop; `layers` is the number of loops",
        ("initializer_range", "blocks_per_loop", "loops_spread", "backward_loops"),
    ),
    "gpt-noskip": Family(
        partial(control, skip=0.0),
        "gpt-conv without skip connections; `skip` scales both of every block instead (0 to 1)",
        ("initializer_range", "skip"),
    ),
    "predictive-coding": Family(
        predictive_coding_lm,
        "explicit predictions and prediction errors; each layer corrects the prediction by the errors seen so far",
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
"""Name of a family, as suites spell it -> the family."""


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters; a tied tensor counts once."""
    return sum(p.numel() for p in model.parameters())


def build(family: str, *, parameters: int, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """A randomly initialised model of ``family`` with ``parameters`` parameters, within 1 %.

    ``shape``: ``d_model``, ``layers``, ``heads``, ``vocab_size`` (or the number of classes), ``context`` in tokens (or the
    pixels of a side), ``channels`` of images, and settings of the family. Raises :class:`LensbenchError` as
    :func:`fitting_width` does.
    """
    width = fitting_width(family, parameters=parameters, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family].build(width=width, **shape)


BUILD_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
"""What a config or torch raises for settings that make no model."""


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
    """The width of the MLPs (or of a CNN's blocks) that gives a model of ``family`` its number of parameters, within 1 %.

    The number of parameters is linear in the width, so two models without storage determine it. Raises
    :class:`LensbenchError` for an unknown family or setting, for a wrong value, and where no width comes within 1 %.
    """
    _check_settings(family, d_model, heads, context, settings)
    known = FAMILIES[family]
    shape: dict[str, Any] = {"vocab_size": vocab_size, "d_model": d_model, "layers": layers, "heads": heads}
    shape |= {"context": context} | ({"channels": channels} if known.images else {})

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(known.build(width=width, **shape, **settings))

    try:
        at_one, at_two = count(1), count(2)
    except BUILD_ERRORS as error:
        raise LensbenchError(f"{family}: {' '.join(str(error).split())}") from error
    width = round((parameters - at_one) / (at_two - at_one)) + 1
    if width < 1 or abs(count(width) - parameters) > 0.01 * parameters:
        raise LensbenchError(
            f"no MLP width gives {family} {parameters} parameters at d_model {d_model} and {layers} layers: "
            f"without MLPs it has {2 * at_one - at_two}; change parameters, d_model or layers"
        )
    return width


def _check_settings(family: str, d_model: int, heads: int | None, context: int, settings: dict[str, Any]) -> None:
    if family not in FAMILIES:
        raise LensbenchError(f"unknown model family {family!r}; there are {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    unknown = sorted(set(settings) - set(known.settings))
    if unknown:
        raise LensbenchError(f"{family} has no setting {unknown[0]!r}; it has {', '.join(known.settings)}")
    # Rotary positions turn pairs of entries, so the size of a head must also be even.
    # Configs with an attention size of their own check it themselves.
    own_size = "attention_size" in known.settings or not known.attention
    if not own_size and (heads is None or heads < 1 or d_model % heads or d_model // heads % 2):
        raise LensbenchError(f"heads is {heads}: it must divide d_model {d_model} into parts of even size")
    if heads is not None and heads < 1:
        raise LensbenchError(f"heads is {heads}: it must be at least 1")
    if known.images:
        size = settings.get("patch_size") or settings.get("stride") or 1
        if size < 1 or context % size:
            raise LensbenchError(f"{family}: patches (or steps) of {size} pixels do not divide images of {context}")
