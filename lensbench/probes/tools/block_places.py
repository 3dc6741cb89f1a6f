"""Exchanging blocks of a running model, each with what the model hands to it because of its place.

Many models choose the mask, the rotary embedding or an input of a layer by the block's place (``config.layer_types`` of
Gemma, Qwen 3, OLMo 3; per-layer inputs of Gemma 3n). A block that changes places must take these with it: a block of
sliding attention would otherwise run with the full mask. What a block is handed is seen in a pass of the model as it is.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lensbench.streams.parts import block_input, example_inputs, first_tensor
from lensbench.streams.stream import ResidualStream

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a block"""


class _Onlooker(nn.Module):
    """Stands in a block's place, calls it without its hooks, and remembers what it was given and returned."""

    def __init__(self, block: nn.Module, stretch: float):
        super().__init__()
        self.block, self.stretch = block, stretch
        self.given: Given = (), {}
        self.returned: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # models read attributes of their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns; its state times ``stretch``."""
        self.given = args, kwargs
        self.returned = self.block.forward(*args, **kwargs)
        if self.stretch == 1:
            return self.returned
        if isinstance(self.returned, tuple):
            return (self.returned[0] * self.stretch, *self.returned[1:])
        return self.returned * self.stretch


def _handed(stream: ResidualStream, first: int, call: Given, stretch: float = 1.0) -> tuple[_Onlooker, _Onlooker]:
    """What blocks ``first`` and ``first + 1`` receive and return when the model is called; hooks of blocks do not run.

    The state that block ``first`` returns is multiplied by ``stretch``.
    """
    blocks = stream.block_list
    before = list(blocks)
    seen = [_Onlooker(block, stretch if k == first else 1.0) for k, block in enumerate(before)]
    for k, onlooker in enumerate(seen):
        blocks[k] = onlooker
    try:
        stream.model.forward(*call[0], **call[1])
    finally:
        for k, block in enumerate(before):
            blocks[k] = block
    return seen[first], seen[first + 1]


def _others(given: Given) -> dict[int | str, Any]:
    """All arguments but the state, by place or name."""
    args, kwargs = given
    found: dict[int | str, Any] = dict(enumerate(args[1:], 1))
    found.update((name, value) for name, value in kwargs.items() if args or name != "hidden_states")
    return found


def _identical(a: Any, b: Any) -> bool:
    """Whether two arguments are one object, or plain values that are equal."""
    if a is b:
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_identical, a, b))
    return isinstance(a, str | int | float) and isinstance(b, str | int | float) and a == b


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same numbers; of other objects nothing is known, and they count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _own(given: Given, other: Given) -> dict[int | str, Any]:
    """The arguments of a block that its neighbour is not given."""
    shared = _others(other)
    return {k: v for k, v in _others(given).items() if k not in shared or not _identical(v, shared[k])}


def _handing(block: nn.Module, given: Given, other: Given) -> Any:
    """A pre-hook that hands a block what it is given in its own place, with the state of the place where it runs now.

    What both blocks are given alike (a cache, a dictionary that blocks write to) is taken from the pass that runs.
    """
    own = _own(given, other)

    def hand(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = block_input(args, kwargs)
        now = _others((args, kwargs))
        values = {k: own[k] if k in own else now[k] for k in _others(given)}
        named = {k: v for k, v in values.items() if isinstance(k, str)}
        if not given[0]:
            return (), {"hidden_states": h, **named}
        return (h, *(values[k] for k in range(1, len(given[0])))), named

    return block.register_forward_pre_hook(hand, with_kwargs=True, prepend=True)


@contextmanager
def swapped(stream: ResidualStream, first: int) -> Iterator[None]:
    """A context in which blocks ``first`` and ``first + 1`` (from 0) have changed places.

    Each takes with it what the model hands to it alone: mask, rotary embedding, inputs of its layer. Where the two are
    given different things, each call of the model costs a second pass. See :func:`why_not_swapped`.
    """
    blocks = stream.block_list
    pair = blocks[first], blocks[first + 1]
    alike: set[tuple[int, ...]] = set()
    handles: list[Any] = []

    def set_apart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while handles:
            handles.pop().remove()
        inputs = first_tensor([*args, *kwargs.values()])
        assert inputs is not None
        if inputs.shape[1:] in alike:
            return
        blocks[first], blocks[first + 1] = pair
        try:
            one, two = _handed(stream, first, (args, kwargs))
        finally:
            blocks[first], blocks[first + 1] = pair[1], pair[0]
        if not _own(one.given, two.given) and not _own(two.given, one.given):
            alike.add(tuple(inputs.shape[1:]))
            return
        handles.append(_handing(pair[0], one.given, two.given))
        handles.append(_handing(pair[1], two.given, one.given))

    with ExitStack() as stack:
        stack.callback(stream.model.register_forward_pre_hook(set_apart, with_kwargs=True).remove)
        stack.callback(lambda: [handle.remove() for handle in handles])
        blocks[first], blocks[first + 1] = pair[1], pair[0]
        try:
            yield
        finally:
            blocks[first], blocks[first + 1] = pair


@torch.no_grad()
def why_not_swapped(stream: ResidualStream, first: int) -> str:
    """Why blocks ``first`` and ``first + 1`` have no meaning in each other's place; empty where they have one.

    The second may take more of the first than its state (values, a residual, keys that are shared): nothing could be handed
    to it in the first place.
    """
    inputs = example_inputs(stream.model, 1)
    call: Given = (), stream.asked(inputs)
    one, two = _handed(stream, first, call)
    if isinstance(one.returned, tuple) != isinstance(two.returned, tuple):
        return f"undefined: blocks {first} and {first + 1} return different things"
    own = _own(two.given, one.given)
    changed = _others(_handed(stream, first, call, stretch=1.5)[1].given)
    if own and not all(_equal(v, changed.get(k)) for k, v in own.items()):
        return f"undefined: block {first + 1} is given more from block {first} than its state"
    try:
        with swapped(stream, first):
            stream.forward(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # blocks raise all kinds
        what = str(error).splitlines()[0] if str(error) else ""
        return f"undefined: the blocks do not run in each other's place ({type(error).__name__}: {what})"
    return ""
