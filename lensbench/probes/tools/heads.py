"""What each attention head did in a forward pass: where it looked, what it mixed, what it writes to the stream.

Models of transformers run their own eager attention for this (``attn_implementation="eager"``), which alone hands out its
weights; no list of classes: a module that returns weights ``[B, H, T, T]`` is an attention, and the linear map that it
calls last writes. The models that are defined here are read at their known places.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lensbench.models.controls import ControlGPTBlock, rotate
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer, expected_embedding
from lensbench.streams.stream import ResidualStream

EAGER = 'attention weights are read with attn_implementation="eager", set back behind it'
"""What a probe says of a model whose attention it sets."""


class NoHeads(Exception):
    """A model whose heads cannot be read; the message says why."""


@dataclass(frozen=True)
class Heads:
    """The H heads of one layer, on B sequences of T tokens.

    ``expected`` is given where the heads carry errors of predictions of their own layer: ``sum_x p(x) e_x`` of the one made
    at each position, ``[B, T, d_read]``.
    """

    layer: int
    weights: Tensor  # [B, H, T, T]: a_{n,s}
    mixed: Tensor  # [B, H, T, dh]: sum_s a_{n,s} v_s
    written: Tensor  # [H, dh, d]: what an entry of it adds to the stream
    expected: Tensor | None = None


@contextmanager
def reading_heads(stream: ResidualStream) -> Iterator[list[Heads]]:
    """While this lasts, a forward pass of the stream's model appends the heads of each layer to the list.

    Whoever reads the list empties it. Raises :class:`NoHeads` at the first pass of a model without attention weights.
    """
    found: list[Heads] = []
    model = stream.model
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
    """Head h of layer l adds ``V_h^T eta sum_s gamma^(n-s) k(c_{s-1}, c_n) V_h eps_s`` to z."""
    if model.config.delta_rule:
        raise NoHeads("with the delta rule what a layer adds is not a weighted sum of errors")
    table, d = model.embed_tokens.weight, model.config.hidden_size

    def took(layer: PredictiveCodingLayer, args: tuple, output: tuple) -> None:
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
    """Its blocks call torch's fused attention: weights are made again from the queries and keys that went in."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    for block in (m for m in model.modules() if isinstance(m, ControlGPTBlock)):

        def looked(_: nn.Module, __: tuple, output: Tensor, block: ControlGPTBlock = block) -> None:
            q, k, _v = (x.view(*x.shape[:2], block.heads, -1).transpose(1, 2) for x in output.chunk(3, -1))
            logits = rotate(q) @ rotate(k).transpose(-1, -2) * q.shape[-1] ** -0.5
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            kept[block] = logits.masked_fill(hidden, -torch.inf).softmax(-1), q

        def wrote(module: nn.Linear, args: tuple, block: ControlGPTBlock = block) -> None:
            weights, q = kept.pop(block)
            mixed = args[0].view(*args[0].shape[:2], block.heads, -1).transpose(1, 2)
            d, place = block.norm_attention.weight.shape[0], block.written
            written = module.weight.T
            if written.shape[1] != d:
                written = F.pad(written, (place.start, d - place.stop))
            found.append(Heads(len(found), weights, mixed, written.detach().view(block.heads, -1, d)))

        _hook(stack, block.query_key_value.register_forward_hook(looked))
        _hook(stack, block.attention_output.register_forward_pre_hook(wrote))


def _watch_transformers(stream: ResidualStream, found: list[Heads], stack: ExitStack) -> None:
    model = stream.model
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
    model.config.output_attentions = True  # some hand them on only then
    stack.callback(setattr, model.config, "output_attentions", asked)
    of_block = {m: k for k, block in enumerate(stream.blocks) for m in block.modules()}
    inputs: dict[int, list[tuple[nn.Module, Tensor]]] = {}
    inside: list[nn.Module] = []  # attention-like modules that are being called, the innermost last

    def enter(module: nn.Module, _: tuple) -> None:
        inside.append(module)
        inputs[id(module)] = []

    def linear(module: nn.Module, args: tuple) -> None:
        for outer in inside:
            inputs[id(outer)].append((module, args[0]))

    def leave(module: nn.Module, _: tuple, output: Any) -> None:
        inside.remove(module)
        called = inputs.pop(id(module))
        parts = output if isinstance(output, tuple | list) else (output,)
        length = called[-1][1].shape[1] if called and called[-1][1].dim() == 3 else None
        weights = next((x for x in parts if isinstance(x, Tensor) and _is_attention(x, length)), None)
        if weights is None:
            return
        last, mixed = called[-1]
        heads = weights.shape[1]
        if any(kept.weights is weights for kept in found) or mixed.shape[-1] % heads:
            return  # a module around an attention hands its weights on
        basis = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
        written = last(basis) - last(torch.zeros_like(basis[:1]))
        layer = of_block.get(module, len(found))
        split = mixed.view(*mixed.shape[:2], heads, -1).transpose(1, 2)
        on = stream.device
        written = written.detach().float().to(on).view(heads, -1, written.shape[-1])
        of = Heads(layer, weights.float().to(on), split.float().to(on), written)
        again = [k for k, kept in enumerate(found) if kept.layer == layer]
        if again:  # a model that runs its blocks more than once has its logits from the last time
            found[again[0]] = of
        else:
            found.append(of)

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            _hook(stack, module.register_forward_pre_hook(linear))
        elif "attention" in type(module).__name__.lower() or "attn" in type(module).__name__.lower():
            _hook(stack, module.register_forward_pre_hook(enter))
            _hook(stack, module.register_forward_hook(leave))


def _is_attention(x: Tensor, length: int | None) -> bool:
    """Whether these are weights ``[B, H, T, T]`` of a causal attention over all T tokens."""
    if x.dim() != 4 or x.shape[-1] != length or x.shape[-2] != length or not x.is_floating_point():
        return False
    above = x.triu(1).abs().amax() < 1e-6
    return bool(above) and bool((x >= 0).all()) and bool((x.sum(-1) < 1 + 1e-2).all())


def sets_attention(stream: ResidualStream) -> bool:
    """Whether the model's own eager attention is needed: not by those that are defined here."""
    own = PredictiveCodingForCausalLM, ControlGPTBlock
    return not any(isinstance(m, own) for m in stream.model.modules())


@torch.no_grad()
def check_heads(stream: ResidualStream, say: Callable[[str], None]) -> str:
    """Why the heads of a model cannot be read; empty where they can, and ``say`` is told how."""
    ids = torch.randint(0, stream.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    try:
        with reading_heads(stream) as heads:
            stream.forward(ids.to(stream.input_device))
            if not heads:
                return "it has no attention weights (no module returns any)"
    except NoHeads as error:
        return str(error)
    if sets_attention(stream):
        say(EAGER)
    return ""
