"""Whether a model is as it was: every weight, mode, flag and hook of it, and the settings of the process."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def condition(model: Any) -> dict[str, Any]:
    """What a caller could see of a model, by name; tensors are copies."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        found[f"module {name}"] = id(module)
        found[f"attributes of {name}"] = sorted(k for k in vars(module) if k != "_is_hf_initialized")
        for kind in HOOKS:
            found[f"{kind} of {name}"] = list(getattr(module, kind).values())
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            found[f"{kind} {name}"] = tensor.detach().clone()
            found[f"{kind} {name}: what it is"] = (
                id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), tensor.requires_grad,
                None if tensor.grad is None else tensor.grad.clone(),
            )  # fmt: skip
    found["config"] = copy.deepcopy(model.config.to_dict())
    found["attention"] = getattr(model.config, "_attn_implementation", None)
    found["outputs"] = model.config.output_attentions, model.config.output_hidden_states
    generation = getattr(model, "generation_config", None)
    found["generation"] = None if generation is None else copy.deepcopy(generation.to_dict())
    found["process"] = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    found["random numbers"] = torch.get_rng_state()
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two conditions of a model."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)

    return [name for name in {**before, **after} if name not in before or not same(before[name], after.get(name))]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """A context after which the model must be as it was, whatever was raised."""
    before = condition(model)
    try:
        yield
    finally:
        assert differences(before, condition(model)) == []


def as_a_caller_has_it(model: Any) -> Any:
    """Between two steps of a training: in training mode but for one block, with some weights frozen."""
    with torch.no_grad():  # transformers leaves hooks of its own at the first such call
        ids = torch.ones(1, 4, dtype=torch.long)
        for asked in ("output_hidden_states", "output_attentions"):
            model(input_ids=ids, **{asked: True})
    model.train()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 1)
    model.get_output_embeddings().weight.requires_grad_(True)
    return model
