"""Whether a model is as it was: every weight, mode, flag and hook of it, and the settings of the process."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from helpers.callers import settings_of_the_process

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def condition(model: Any) -> dict[str, Any]:
    """What a caller could see of a model, by name; tensors are copies."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        found[f"module {name}"] = id(module)
        for kind, held in vars(module).items():
            if kind in HOOKS:
                found[f"{kind} of {name}"] = list(held.items())
            elif kind not in ("_is_hf_initialized", "training"):
                found[f"attribute {kind} of {name}"] = held if isinstance(held, PLAIN) else id(held)
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            found[f"{kind} {name}"] = tensor.detach().clone()
            found[f"{kind} {name}: what it is"] = (
                id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), tensor.requires_grad,
                list((tensor._backward_hooks or {}).values()),
            )  # fmt: skip
            found[f"{kind} {name}: gradient"] = None if tensor.grad is None else tensor.grad.clone()
    found["config"] = copy.deepcopy(model.config.to_dict())
    found["attention"] = getattr(model.config, "_attn_implementation", None)
    found["outputs"] = model.config.output_attentions, model.config.output_hidden_states
    generation = getattr(model, "generation_config", None)
    found["generation"] = None if generation is None else copy.deepcopy(generation.to_dict())
    return found | {f"process: {name}": value for name, value in settings_of_the_process().items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two conditions of a model."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and bool(a == b)

    missing = [name for name in {**before, **after} if name not in before or name not in after]
    return missing + [name for name in before if name in after and not same(before[name], after[name])]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """A context after which the model must be as it was, whatever was raised."""
    before = condition(model)
    try:
        yield
    finally:
        changed = differences(before, condition(model))
        assert not changed, f"changed: {', '.join(changed)}"
