"""Is a layer one step of gradient descent in activation space? With a linear kernel it is, exactly."""

import copy
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer
from lensbench.probes.catalogue import Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject

WINDOWS = 16
"""Windows that are looked at, at most"""


def gradient_steps(subject: Subject) -> Measured:
    """Distance of a layer's update from an explicit gradient step, by the length of the step; float64, at the last token.

    The step (see ``models/predictive_coding.py``): read-outs ``W_h`` start at zero and move by eta_h times minus the
    gradient, by autograd, of the cross-entropy of ``E (latent_i + sum_h V_h^T W_h c_i)`` over the predictions of the prefix,
    weighted by the decay. The update is ``sum_h V_h^T W_h c_n``. A causal model with a linear kernel and a softmax error
    has a distance at rounding. With other kernels the step is that of the same features c, without the feature space of
    their kernel.
    """
    name = "gradient_steps"
    model = subject.stream.model
    if not isinstance(model, PredictiveCodingForCausalLM):
        return Measured(name, reason="its layers have no errors at known places that a step could be made of")
    if subject.rotated:
        return Measured(name, reason="a rotated view has no places of its own")
    config = model.config
    if config.error != "softmax" or config.delta_rule or not config.tie_value_output:
        what = "the delta rule" if config.delta_rule else f"error {config.error!r} or an output map of its own"
        return Measured(name, reason=f"with {what} a layer makes no step along a gradient of the cross-entropy")
    twin: PredictiveCodingForCausalLM = copy.deepcopy(model)
    torch.nn.Module.double(twin.cpu()).train(False)
    few = subject.windows.spread(WINDOWS)
    layers = config.num_hidden_layers
    wrong, right, inner = (np.zeros((len(few.ids), layers)) for _ in range(3))
    for row, ids in enumerate(few.ids):
        last = int(few.positions[row][few.valid[row]].max())
        prefix = torch.from_numpy(ids[: last + 1])
        for layer, (update, step) in enumerate(updates_and_steps(twin, prefix)):
            wrong[row, layer] = float((update - step).square().sum())
            right[row, layer] = float(step.square().sum())
            inner[row, layer] = float(F.cosine_similarity(update, step, dim=0))
    sums = Sums(name, few, np.ones(len(few.ids)))
    for layer in range(layers):
        sums.add("gradient_step_error", np.sqrt(wrong[:, layer] / right[:, layer]), layer=layer)
        sums.add("gradient_step_cosine", inner[:, layer], layer=layer)
    return sums.measured()


def updates_and_steps(model: PredictiveCodingForCausalLM, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer, its update of the prediction at the last of T tokens and the explicit gradient step: ``[d]`` each."""
    table = model.embed_tokens.weight.detach()
    with torch.no_grad():
        out = model(ids[None], output_hidden_states=True)
    d = model.config.hidden_size
    assert out.updates is not None
    assert out.predictions is not None
    assert out.hidden_states is not None
    found = []
    for number, update in enumerate(out.updates):
        layer = cast(PredictiveCodingLayer, model.layers[number % len(model.layers)])
        u = out.hidden_states[number + 1][..., d : 2 * d]
        latent = model.norm(out.predictions[number])[0].detach()
        with torch.no_grad():
            features = layer.queries_and_keys(u)[0][0]  # [H, T, d/H]
        found.append((update[0, -1], explicit_step(layer, table, latent, features, ids)))
    return found


def explicit_step(layer: PredictiveCodingLayer, table: Tensor, latent: Tensor, features: Tensor, ids: Tensor) -> Tensor:
    """``sum_h V_h^T W_h c_n`` after one gradient step from W = 0, see :func:`gradient_steps`: ``[d]``."""
    heads, count, size = features.shape
    v = layer.value_output.weight.detach().view(heads, size, -1)
    decay = layer.log_decay.detach()
    age = torch.arange(count - 2, -1, -1, dtype=table.dtype)  # of the predictions whose tokens are known
    steps = []
    for head in range(heads):
        weight = torch.zeros(size, size, dtype=table.dtype, requires_grad=True)
        shift = features[head, :-1] @ weight.T @ v[head]
        logits = (latent[:-1] + shift) @ table.T
        losses = F.cross_entropy(logits, ids[1:], reduction="none") / table.square().mean().sqrt()
        (gradient,) = torch.autograd.grad((losses * (decay[head] * age).exp()).sum(), weight)
        moved = -layer.log_eta[head].detach().exp() * gradient
        steps.append(features[head, -1] @ moved.T @ v[head])
    return torch.stack(steps).sum(0)


GRADIENT_STEPS = Probe(
    "gradient_steps",
    gradient_steps,
    "of predictive-coding models, every layer against an explicit gradient step, float64",
    (
        Quantity(
            "gradient_step_error",
            "distance from a gradient step",
            "norm of update minus gradient step, by the norm of the step",
            "layer",
            "At rounding (below 1e-12), the layer is that gradient step.",
            table="layers",
        ),
        Quantity(
            "gradient_step_cosine",
            "cosine with a gradient step",
            "cosine of update and gradient step",
            "layer",
            "At 1, the layer moves along the gradient, whatever the length of its step.",
        ),
    ),
)
