"""The parts of any causal LM or image classifier: blocks, final norm and head, found by watching one forward pass.

No list of classes is needed. The module whose output is the head's input is the final norm. The modules that return the
reported hidden states are the blocks. What the model does to the head's output is measured with a known output. An image
classifier pools the states of an image before its head; the few known ways to pool are tried in turn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.streams.readout import ReadOut, frozen
from lensbench.streams.rotary import same_after_any_text


@dataclass(frozen=True)
class _Call:
    """A call of a module in the watched forward pass."""

    name: str
    module: nn.Module
    received: Tensor | None
    returned: Tensor


def first_tensor(value: Any) -> Tensor | None:
    """``value`` if it is a tensor, else the first tensor of a nested list or tuple; None without one."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which every module of a model is in evaluation mode; each is then in the mode that it was in.

    What the model read before changes nothing, see :func:`same_after_any_text`.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with same_after_any_text(model):
            yield
    finally:
        for module in training:
            module.training = True


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The state that a block or norm is called with: its first argument, or ``hidden_states``."""
    return first_tensor(list(args) or kwargs.get("hidden_states"))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same numbers: in the same memory (some models pass on slices), or cast to another type."""
    if a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or (a.dtype != b.dtype and torch.equal(a.to(b.device, b.dtype), b))


def sees_images(model: PreTrainedModel) -> bool:
    """Whether a model reads images (``pixel_values``) instead of token ids."""
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model takes its token ids or images on."""
    if sees_images(model):
        return next(model.parameters()).device
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model reads; 3 x 224 x 224 where its config does not say."""
    seen = getattr(config, "vision_config", config)
    size = getattr(seen, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return int(getattr(seen, "num_channels", 3)), int(height), int(width)


def example_inputs(model: PreTrainedModel, count: int, seed: int | None = None) -> Tensor:
    """``count`` random inputs of the kind that a model reads: token ids ``[B, 16]`` or images ``[B, C, H, W]``."""
    generator = torch.Generator().manual_seed(seed or 0)
    if sees_images(model):
        made = torch.rand(count, *image_shape(model.config), generator=generator) * 2 - 1
        return made.to(input_device(model), next(model.parameters()).dtype)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (count, 16), generator=generator).to(input_device(model))


@dataclass(frozen=True)
class Pooling:
    """How an image classifier pools the states of an image: ``[B, N, d]`` or ``[B, d, H, W]`` to ``[B, d]``.

    ``before`` is applied to each position first: the model's norm, where norm and mean cannot change places.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    before: nn.Module

    def __call__(self, h: Tensor) -> Tensor:
        """The pooled states ``[B, d]``."""
        return self.function(self.before(h))


CLASS_TOKEN = "class token"


def ways_to_pool(h: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Known ways to pool states of this shape, by name. Class token and registers come before the patches."""
    if h.ndim == 4:
        yield "mean over the map", lambda h: h.mean((2, 3))
        yield "mean over the map, channels last", lambda h: h.mean((1, 2))
    if h.ndim == 3:
        yield CLASS_TOKEN, lambda h: h[:, 0]
        for first in range(min(10, h.shape[1])):
            yield f"mean of the tokens from {first}", partial(_mean_from, first=first)
            yield f"class token next to the mean of the tokens from {first}", partial(_class_and_mean, first=first)


def _mean_from(h: Tensor, first: int) -> Tensor:
    return h[:, first:].mean(1)


def _class_and_mean(h: Tensor, first: int) -> Tensor:
    return torch.cat([h[:, 0], _mean_from(h, first)], -1)


@dataclass(frozen=True)
class FoundParts:
    """The read-out of a model, its blocks, and where the read-out begins."""

    readout: ReadOut
    entry: nn.Module | None
    """The module whose input is h_L; None where the head reads h_L itself"""
    blocks: str | None
    """Name of the list of blocks; None where the reported states do not show it"""
    members: tuple[nn.Module, ...]
    """The blocks, each called once with its state as first argument; else empty, and the reported states are used"""
    pooling: Pooling | None = None
    """Of an image classifier, whose h_L is the output of its last block"""


def find_readout(model: PreTrainedModel) -> ReadOut:
    """The read-out of :func:`find_parts`, without what the model does to the head's output."""
    return find_parts(model).readout


def find_parts(model: PreTrainedModel) -> FoundParts:
    """The blocks of a model, and the modules between the last block and the logits.

    Raises :class:`LensbenchError` for a model without a linear head, an encoder-decoder, a model whose head reads what no
    module returned, and an image classifier whose width changes.
    """
    return find_image_parts(model) if sees_images(model) else find_text_parts(model)


@dataclass
class _Watched:
    """The calls of one forward pass, in the order in which the modules returned."""

    calls: list[_Call]
    head_inputs: list[Tensor]


@contextmanager
def _watching(model: PreTrainedModel, head: nn.Module | None) -> Iterator[_Watched]:
    watched = _Watched([], [])

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            returned = first_tensor(output)
            if returned is not None:
                watched.calls.append(_Call(name, module, block_input(args, kwargs), returned))

        return hook

    hooks = [
        m.register_forward_hook(remember(n), with_kwargs=True) for n, m in model.named_modules() if m is not head and n
    ]
    if head is not None:
        hooks.append(head.register_forward_pre_hook(lambda _, args: watched.head_inputs.append(args[0])))
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def find_text_parts(model: PreTrainedModel) -> FoundParts:
    """:func:`find_parts` of a causal LM."""
    name, head = type(model).__name__, _text_head(model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(4) % vocabulary)[None].to(input_device(model))
    with evaluating(model), _watching(model, head) as watched:
        reported = model(input_ids=ids, output_hidden_states=True, return_dict=True).hidden_states
    calls, head_inputs = watched.calls, watched.head_inputs
    if not head_inputs:
        raise LensbenchError(f"{name} never calls its output embedding; lensbench cannot read it")
    if not reported or len(reported) < 2:
        raise LensbenchError(f"{name} does not report its hidden states; lensbench cannot read it")
    blocks = _blocks(model, calls, reported)

    # From the head back to the last block: usually one norm, in some models also a projection after it.
    chain: list[nn.Module] = []
    scale, wanted = _before_scaling(calls, head_inputs[-1])
    while True:
        made = [c for c in calls if _same(c.returned, wanted)]
        call = made[0] if made else None
        # A block may return its own input, which another module made: what a block returned is h_L all the same.
        if call is None or (blocks is not None and any(c.name.startswith(blocks + ".") for c in made)):
            break
        if call.module in chain or isinstance(call.module, nn.Embedding) or call.received is None:
            break
        if call.received.shape[:-1] != call.returned.shape[:-1]:
            break  # a whole decoder, called with token ids
        chain.insert(0, call.module)
        wanted = call.received
        if blocks is None:
            break  # further back may be a block
    if call is None and not chain:
        raise LensbenchError(
            f"no module of {name} produces its head's input; lensbench cannot tell what its head reads"
        )
    members = _members(model, calls, blocks, wanted.shape)
    return FoundParts(ReadOut(_in_a_row(chain), head, scale), chain[0] if chain else None, blocks, members)


def _before_scaling(calls: list[_Call], wanted: Tensor) -> tuple[float, Tensor]:
    """The factor that a model multiplies a module's output by for its head's input ``wanted``, and that output.

    1 and ``wanted`` where the head reads what a module returned, or no multiple of it. A factor differs from one in at least
    one part in a thousand.
    """
    if any(_same(c.returned, wanted) for c in calls):
        return 1.0, wanted
    for call in reversed(calls):
        returned = call.returned
        if returned.shape != wanted.shape or not returned.is_floating_point():
            continue
        x, y = returned.to(wanted.device).double().flatten(), wanted.double().flatten()
        scale = float(x @ y / (x @ x))
        if scale > 0 and bool(torch.allclose(scale * x, y, rtol=4 * torch.finfo(wanted.dtype).eps, atol=0)):
            return (float(f"{scale:.6g}"), returned) if abs(scale - 1) > 1e-3 else (1.0, wanted)
    return 1.0, wanted


def _text_head(model: PreTrainedModel) -> nn.Linear:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise LensbenchError(f"{name} is an encoder-decoder: lensbench reads causal language models")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LensbenchError(f"{name} has no linear output embedding: lensbench reads causal language models")
    if head.weight.is_meta:
        raise LensbenchError(f"the unembedding of {name} is offloaded; give a device_map that keeps it on a device")
    return head


def _members(
    model: PreTrainedModel, calls: list[_Call], blocks: str | None, shape: torch.Size | None
) -> tuple[nn.Module, ...]:
    """The blocks of the list of this name; empty unless they are called in order, each with a state (of this shape)."""
    members = () if blocks is None else tuple(model.get_submodule(blocks).children())
    called = [c for c in calls if any(c.module is m for m in members)]
    in_turn = [c.module for c in called] == list(members)
    if not in_turn or any(c.received is None or (shape is not None and c.received.shape != shape) for c in called):
        return ()
    return members


def _in_a_row(chain: list[nn.Module]) -> nn.Module:
    return chain[0] if len(chain) == 1 else nn.Sequential(*chain) if chain else nn.Identity()


WIDTHS_THAT_WORK = (
    "a model of one width: ViT, DeiT, BEiT, DINOv2, CLIP or SigLIP of transformers, or the families vit, cnn-residual and "
    "cnn-plain of lensbench"
)


@torch.no_grad()
def find_image_parts(model: PreTrainedModel) -> FoundParts:
    """:func:`find_parts` of an image classifier, with its pooling.

    Where the model normalises the pooled state (or picks one token, which gives the same), that norm belongs to the
    read-out. Where it averages normalised positions, the norm belongs to the pooling.
    """
    name = type(model).__name__
    with evaluating(model), _watching(model, None) as watched:
        images = example_inputs(model, 3)
        try:
            output = model(pixel_values=images, output_hidden_states=True, return_dict=True)
        except Exception as error:  # layers raise all kinds
            shape = " x ".join(map(str, images.shape[1:]))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LensbenchError(f"{name} does not take an image of {shape}: {reason}") from error
    calls, reported, logits = watched.calls, getattr(output, "hidden_states", None), getattr(output, "logits", None)
    if logits is None or logits.ndim != 2:
        raise LensbenchError(f"{name} gives no logits for an image: lensbench reads image classifiers")
    reported = _of_one_width(name, reported)
    final = next((c for c in reversed(calls) if isinstance(c.module, nn.Linear) and _same(c.returned, logits)), None)
    if final is None or final.received is None:
        raise LensbenchError(f"no linear head of {name} gives its logits; lensbench cannot tell what they are made of")
    blocks = _blocks(model, calls, reported)
    members = _members(model, calls, blocks, None)
    last = next(c.returned for c in calls if c.module is members[-1]) if members else reported[-1]
    with evaluating(model):
        norm, pooling = _norm_and_pooling(name, calls, last, final.received, len(images))
    return FoundParts(ReadOut(norm, final.module), None, blocks, members, pooling)  # type: ignore[arg-type]


def _of_one_width(name: str, reported: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """The reported states of an image classifier, which must all have one width."""
    if not reported or len(reported) < 2:
        raise LensbenchError(f"{name} does not report its hidden states; lensbench cannot read it")
    if any(h.ndim not in (3, 4) for h in reported):
        raise LensbenchError(f"{name} reports states that are neither tokens nor maps; lensbench cannot read it")
    widths = [h.shape[1 if h.ndim == 4 else 2] for h in reported]
    if len(set(widths)) > 1:
        changes = ", ".join(map(str, dict.fromkeys(widths)))
        raise LensbenchError(
            f"the stages of {name} change the width of its states ({changes}): a lens of one cannot read another; "
            f"what would work is {WIDTHS_THAT_WORK}"
        )
    return reported


def _norm_and_pooling(
    name: str, calls: list[_Call], last: Tensor, wanted: Tensor, count: int
) -> tuple[nn.Module, Pooling]:
    """The final norm and the pooling that make the head's input ``wanted`` from the last states of ``count`` images."""
    pooled: tuple[str, Callable[[Tensor], Tensor]] | None = None
    after: list[nn.Module] = []
    before: list[nn.Module] = []
    while not _same(last, wanted):
        if pooled is None:
            found = _pooled_from(calls, last, wanted)
            if found is not None:
                pooled, wanted = found
                continue
        call = next((c for c in calls if _same(c.returned, wanted) and c.module not in after + before), None)
        if call is None or call.received is None or call.received.shape[0] != count:
            raise LensbenchError(
                f"lensbench cannot tell how {name} makes its head's input from the states after its last block: it is no "
                f"mean or class token of them that lensbench knows; what would work is {WIDTHS_THAT_WORK}"
            )
        (after if pooled is None else before).insert(0, call.module)
        wanted = call.received
    if pooled is None:
        raise LensbenchError(f"the head of {name} reads all positions of an image; lensbench reads a pooled state")
    pooling = Pooling(pooled[0], pooled[1], nn.Identity())
    norm, inside = _in_a_row(after), _in_a_row(before)
    if before:
        # For a picked token the norm is the same before and after pooling; for a mean it is not.
        if pooled[0] == CLASS_TOKEN and torch.allclose(inside(pooling(last)), pooling(inside(last)), atol=1e-5):
            norm = _in_a_row(before + after)
        else:
            pooling = Pooling(f"{pooled[0]}, each position normalised", pooled[1], frozen(inside))
    return norm, pooling


def _pooled_from(
    calls: list[_Call], last: Tensor, wanted: Tensor
) -> tuple[tuple[str, Callable[[Tensor], Tensor]], Tensor] | None:
    """The way to pool (its name and function), and the states that ``wanted`` ``[B, d]`` was pooled from."""
    if wanted.ndim != 2:
        return None
    states = {id(t): t for t in (last, *(c.returned for c in calls)) if t.ndim in (3, 4) and len(t) == len(wanted)}
    for state in states.values():
        for way in ways_to_pool(state):
            found = way[1](state)
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-6):
                return way, state
    return None


def _blocks(model: PreTrainedModel, calls: list[_Call], reported: tuple[Tensor, ...]) -> str | None:
    """Name of the list whose members return the reported states between the first and the last.

    A block that returns its own input returns what another module made, too: of the modules that return a state, members of
    a list count. transformers reports the states of blocks of its own class; where it leaves some out, the list is the one
    whose members hand a state on to one another.
    """
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    parents = set()
    for state in reported[1:-1]:
        same = [
            c.name.rpartition(".")[0] for c in calls if c.returned.shape == state.shape and _same(c.returned, state)
        ]
        # A block and its last sub-module return the same tensor: the block is the outer one.
        parents.add(min((name for name in same if name in lists), key=_depth, default=""))
    if len(parents) == 1 and (found := parents.pop()) and len(model.get_submodule(found)) < len(reported):  # type: ignore[arg-type]
        return found
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return min((name for name in outer if _hands_on(model, calls, name, reported)), key=_depth, default=None)


def _depth(name: str) -> int:
    return name.count(".")


def _hands_on(model: PreTrainedModel, calls: list[_Call], name: str, reported: tuple[Tensor, ...]) -> bool:
    """Whether the members of a list are called in turn, each with the state that the one before returned.

    They must be as many as the model reports states after its first, which the first of them then gets, or more.
    """
    members = list(model.get_submodule(name).children())
    called = [c for c in calls if any(c.module is m for m in members)]
    if len(members) < len(reported) - 1 or [c.module for c in called] != members:
        return False
    received = [c.received for c in called if c.received is not None]
    if len(received) < len(called) or any(h.shape != reported[-1].shape for h in received):
        return False
    if len(members) == len(reported) - 1 and not _same(received[0], reported[0]):
        return False
    return all(_same(one.returned, h) for one, h in zip(called[:-1], received[1:], strict=True))


@torch.no_grad()
def after_the_head(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float | None]:
    """Scale and soft cap that a model applies to its head's output to get its logits; (1, None) for neither.

    Measured with known outputs of the head, from 0.001 to 10,000, so that neither the weights nor the names in the config
    matter. A model that does something else fails the identity check of :class:`ResidualStream`.
    """
    sent: list[Tensor] = []

    def ramp(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        vocabulary = output.shape[-1]
        values = torch.logspace(-3, 4, vocabulary, dtype=torch.float32, device=output.device)
        sent.append(values.to(output.dtype).expand_as(output).contiguous())
        return sent[-1].clone()  # some models scale in place

    hook = head.register_forward_hook(ramp)
    try:
        with evaluating(model):
            got = model(**inputs, return_dict=True).logits.double()
    finally:
        hook.remove()
    x, y = (values.flatten(0, -2)[0] for values in (sent[-1].to(got.device).double(), got))
    if x.shape != y.shape:
        return 1.0, None
    tolerance = 4 * torch.finfo(sent[-1].dtype).eps
    scale = float((y / x)[: max(1, len(x) // 16)].median())
    if not scale > 0:
        return 1.0, None
    scale = 1.0 if abs(scale - 1) < tolerance else float(f"{scale:.9g}")
    if bool(((y - scale * x).abs() <= tolerance * scale * x).all()):
        return scale, None
    cap = float(y[-1])
    bent = cap * torch.tanh(scale * x / cap)
    return (scale, cap) if bool(((y - bent).abs() <= 1e3 * tolerance * cap).all()) else (1.0, None)
