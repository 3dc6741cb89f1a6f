"""Rotary embeddings whose frequencies depend on the length of what a model reads: dynamic NTK and LongRoPE."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


@contextmanager
def same_after_any_text(model: nn.Module) -> Iterator[None]:
    """A context in which a model gives the same numbers whatever it read before; its rotary embeddings stay as they are.

    transformers keeps the frequencies of dynamic NTK (``rope_type: dynamic``) of the longest sequence so far, and those of
    LongRoPE (arXiv 2402.13753) of the last one, in the module. Here each call begins with the frequencies of a model that
    has read nothing.
    """
    rotary = [module for module in model.modules() if any(map(_depends, _kinds(module).values()))]
    kept = [_state(module) for module in rotary]
    hooks = [module.register_forward_pre_hook(_forget) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, (attributes, buffers) in zip(rotary, kept, strict=True):
            _restore(module, attributes, buffers)


def depends_on_length(config: PreTrainedConfig) -> int | None:
    """The tokens beyond which a model's rotary frequencies depend on the length of what it reads; None if they never do."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
        for kind in kinds
        if _depends(kind.get("rope_type"))
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def _depends(kind: Any) -> bool:
    # As transformers decides it: `dynamic` anywhere in the name, or LongRoPE.
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _kinds(module: nn.Module) -> dict[str, Any]:
    """The kind of rotary embedding of a module by the prefix of its buffers: one, or one for each kind of layer."""
    kind = getattr(module, "rope_type", None)
    return {f"{name}_": one for name, one in kind.items()} if isinstance(kind, dict) else {"": kind}


def _forget(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Put the frequencies of a model that has read nothing into a rotary embedding."""
    for prefix, kind in _kinds(module).items():
        if _depends(kind) and "dynamic" in kind:  # LongRoPE chooses anew in each call
            frequencies: Any = getattr(module, f"{prefix}inv_freq")
            fresh: Any = getattr(module, f"{prefix}original_inv_freq")
            module._buffers[f"{prefix}inv_freq"] = fresh.to(frequencies.device).clone()
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


_State = tuple[dict[str, Any], dict[str, tuple[torch.Tensor, torch.Tensor]]]


def _state(module: nn.Module) -> _State:
    """Plain attributes of a rotary embedding, and its buffers with copies of their numbers."""
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return attributes, {name: (b, b.clone()) for name, b in module._buffers.items() if b is not None}


def _restore(
    module: nn.Module, attributes: dict[str, Any], buffers: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for name in [name for name in vars(module) if not name.startswith("_") and name not in attributes]:
        delattr(module, name)
    for name, value in attributes.items():
        if vars(module).get(name) is not value:
            setattr(module, name, value)
    for name in [name for name in module._buffers if name not in buffers]:
        del module._buffers[name]
    with torch.no_grad():
        for name, (buffer, numbers) in buffers.items():
            if not torch.equal(buffer, numbers):  # LongRoPE writes into it
                buffer.copy_(numbers)
            module._buffers[name] = buffer
