"""What each attention head did in a forward pass: its weights, what it mixed, and what it writes to the stream.

Models of transformers run their own eager attention for this (``attn_implementation="eager"``): no other returns its
weights. There is no list of classes. A module that returns weights ``[B, H, T, T]`` is an attention, and the linear map
that it calls last writes to the stream. The models that are defined here are read at their known places.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lensbench.models.controls import ControlGPTBlock, rotate
from lensbench.models.looped import Loop
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer, expected_embedding
from lensbench.streams.stream import ResidualStream

EAGER = 'attention weights are read with attn_implementation="eager", which is set back afterwards'
"""What a probe reports of a model whose attention it sets"""


class NoHeads(Exception):
    """The heads of a model cannot be read; the message says why."""


@dataclass(frozen=True)
class Heads:
    """What the H heads of one layer did with B sequences of T tokens.

    ``expected`` ``[B, T, d_read]`` is given where the heads carry errors of their own layer's predictions: the expectation
    ``sum_x p(x) e_x`` of the prediction at each position.
    """

    layer: int
    weights: Tensor  # [B, H, T, T]: a_{n,s}
    mixed: Tensor  # [B, H, T, dh]: sum_s a_{n,s} v_s
    written: Tensor  # [H, dh, d]: what each entry of ``mixed`` adds to the stream
    expected: Tensor | None = None


@contextmanager
def reading_heads(stream: ResidualStream) -> Iterator[list[Heads]]:
    """A list to which each forward pass of the stream's model appends the heads of each layer; the caller empties it.

    Raises :class:`NoHeads` where the model has no attention weights that can be read.
    """
    found: list[Heads] = []
    model = stream.model
    if any(isinstance(m, Loop) for m in model.modules()):
        raise NoHeads(
            "its heads write inside a loop, after an adapter and before a norm: not to the stream that lenses read"
        )
    with ExitStack() as stack:
        if isinstance(model, PredictiveCodingForCausalLM):
            _watch_predictive_coding(stream, model, found, stack)
        elif any(isinstance(m, ControlGPTBlock) for m in model.modules()):
            _watch_controls(model, found, stack)
        else:
            _watch_transformers(stream, found, stack)
        yield found


def _hook(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _watch_predictive_coding(
    stream: ResidualStream, model: PredictiveCodingForCausalLM, found: list[Heads], stack: ExitStack
) -> None:
    """Watch heads of errors: head h of layer l adds ``V_h^T eta sum_s gamma^(n-s) k(c_{s-1}, c_n) V_h eps_s`` to z."""
    if model.config.delta_rule:
        raise NoHeads("with the delta rule what a layer adds is not a weighted sum of errors")
    table, d = model.embed_tokens.weight, model.config.hidden_size

    def took(layer: PredictiveCodingLayer, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        state, error = args[0], output[1]
        weights = layer.kernel(output[0][..., d : 2 * d])
        value = layer.split(layer.value_output(error))
        matrix = (layer.value_output if layer.output is None else layer.output).weight
        written = F.pad(matrix, (0, stream.d_model - d)).view(layer.heads, -1, stream.d_model)
        latent = model.norm(state)
        expected = expected_embedding(latent.flatten(0, 1), table).view_as(latent)
        found.append(Heads(len(found), weights, weights @ value, written.detach(), expected))

    for layer in dict.fromkeys(model.layers):
        _hook(stack, layer.register_forward_hook(took))


def _watch_controls(model: nn.Module, found: list[Heads], stack: ExitStack) -> None:
    """Watch blocks that call torch's fused attention: weights are computed again from its queries and keys."""
    kept: dict[nn.Module, Tensor] = {}

    for block in (m for m in model.modules() if isinstance(m, ControlGPTBlock)):

        def looked(_: nn.Module, __: tuple[Any, ...], output: Tensor, block: ControlGPTBlock = block) -> None:
            q, k, _v = (x.view(*x.shape[:2], block.heads, -1).transpose(1, 2) for x in output.chunk(3, -1))
            logits = rotate(q) @ rotate(k).transpose(-1, -2) * q.shape[-1] ** -0.5
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            kept[block] = logits.masked_fill(hidden, -torch.inf).softmax(-1)

        def wrote(module: nn.Linear, args: tuple[Any, ...], block: ControlGPTBlock = block) -> None:
            weights = kept.pop(block)
            mixed = args[0].view(*args[0].shape[:2], block.heads, -1).transpose(1, 2)
            d, place = block.norm_attention.weight.shape[0], block.written
            written = module.weight.T
            if written.shape[1] != d:
                written = F.pad(written, (place.start, d - place.stop))
            found.append(Heads(len(found), weights, mixed, written.detach().view(block.heads, -1, d)))

        _hook(stack, block.query_key_value.register_forward_hook(looked))
        _hook(stack, block.attention_output.register_forward_pre_hook(wrote))


def _watch_transformers(stream: ResidualStream, found: list[Heads], stack: ExitStack) -> None:
    """Watch every module that may be an attention, with eager attention until the stack closes."""
    _set_eager(stream.model, stack)
    watch = AttentionWatch(stream, found)
    for module in stream.model.modules():
        name = type(module).__name__.lower()
        if isinstance(module, nn.Linear | Conv1D):
            _hook(stack, module.register_forward_pre_hook(watch.linear))
        elif "attention" in name or "attn" in name:
            _hook(stack, module.register_forward_pre_hook(watch.enter))
            _hook(stack, module.register_forward_hook(watch.leave))


def _set_eager(model: PreTrainedModel, stack: ExitStack) -> None:
    """Set the model's attention to eager, with weights in its output, until the stack closes."""
    before = getattr(model.config, "_attn_implementation", None)
    try:
        model.set_attn_implementation("eager")
    except (ValueError, AttributeError) as error:
        raise NoHeads(f"it has no eager attention to read weights from: {str(error).splitlines()[0]}") from error
    if before is not None:
        stack.callback(model.set_attn_implementation, before)
    if getattr(model.config, "_attn_implementation", "eager") != "eager":
        raise NoHeads("its attention cannot be set to eager once it is loaded, and no other hands out weights")
    asked = model.config.output_attentions
    model.config.output_attentions = True  # some return them only then
    stack.callback(setattr, model.config, "output_attentions", asked)


class AttentionWatch:
    """Hooks that find attention modules during a forward pass and append what their heads did to ``found``."""

    def __init__(self, stream: ResidualStream, found: list[Heads]):
        self.found, self.device = found, stream.device
        self.of_block = {m: k for k, block in enumerate(stream.blocks) for m in block.modules()}
        self.inputs: dict[int, list[tuple[nn.Module, Tensor]]] = {}
        self.inside: list[nn.Module] = []  # modules that may be an attention and are being called, the innermost last

    def enter(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        """A module that may be an attention is called."""
        self.inside.append(module)
        self.inputs[id(module)] = []

    def linear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A linear map is called: remember its input for the modules around it."""
        for outer in self.inside:
            self.inputs[id(outer)].append((module, args[0]))

    def leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """The module returns: if weights are among what it returns, it is an attention."""
        self.inside.remove(module)
        called = self.inputs.pop(id(module))
        parts = output if isinstance(output, tuple | list) else (output,)
        length = called[-1][1].shape[1] if called and called[-1][1].dim() == 3 else None
        weights = next((x for x in parts if isinstance(x, Tensor) and _is_attention(x, length)), None)
        if weights is None:
            return
        last, mixed = called[-1]
        if any(kept.weights is weights for kept in self.found) or mixed.shape[-1] % weights.shape[1]:
            return  # a module around an attention returns the same weights
        self._keep(self.of_block.get(module, len(self.found)), weights, last, mixed)

    def _keep(self, layer: int, weights: Tensor, last: nn.Module, mixed: Tensor) -> None:
        """Append the heads of a layer, from weights ``[B, H, T, T]`` and the input ``[B, T, H dh]`` of its last map."""
        heads = weights.shape[1]
        basis = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
        written = last(basis) - last(torch.zeros_like(basis[:1]))
        split = mixed.view(*mixed.shape[:2], heads, -1).transpose(1, 2)
        on = self.device
        written = written.detach().float().to(on).view(heads, -1, written.shape[-1])
        of = Heads(layer, weights.float().to(on), split.float().to(on), written)
        again = [k for k, kept in enumerate(self.found) if kept.layer == layer]
        if again:  # a model that runs its blocks more than once computes its logits from the last time
            self.found[again[0]] = of
        else:
            self.found.append(of)


def _is_attention(x: Tensor, length: int | None) -> bool:
    """Whether ``x`` are the weights ``[B, H, T, T]`` of a causal attention over all T tokens."""
    if x.dim() != 4 or x.shape[-1] != length or x.shape[-2] != length or not x.is_floating_point():
        return False
    above = x.triu(1).abs().amax() < 1e-6
    return bool(above) and bool((x >= 0).all()) and bool((x.sum(-1) < 1 + 1e-2).all())


def sets_attention(stream: ResidualStream) -> bool:
    """Whether reading heads sets the model's attention to eager; the models that are defined here need no such setting."""
    own = PredictiveCodingForCausalLM, ControlGPTBlock
    return not any(isinstance(m, own) for m in stream.model.modules())


@torch.no_grad()
def check_heads(stream: ResidualStream) -> str:
    """Why the heads of a model cannot be read; empty where they can."""
    ids = torch.randint(0, stream.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    try:
        with reading_heads(stream) as heads:
            stream.forward(ids.to(stream.input_device))
            last = max((h.layer for h in heads), default=-1)
            if last >= stream.layers:
                return f"its {last + 1} attentions have no layer of the stream each: it has {stream.layers}"
            return "" if heads else "it has no attention weights (no module returns any)"
    except NoHeads as error:
        return str(error)
