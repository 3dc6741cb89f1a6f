"""Exchanging blocks of a running model, each with what the model hands to it because of its place.

Many models choose the mask, the rotary embedding or an input of a layer by the block's place (``config.layer_types`` of
Gemma, Qwen 3, OLMo 3; per-layer inputs of Gemma 3n). A block that changes places must take these with it: a block of
sliding attention would otherwise run with the full mask. What a block is handed is seen in a pass of the model as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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


def _handed(stream: ResidualStream, call: Given, first: int = 0, stretch: float = 1.0) -> list[_Onlooker]:
    """What every block receives and returns when the model is called; hooks of blocks do not run.

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
    return seen


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
    """The arguments of a block that the other one is not given."""
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
def reordered(stream: ResidualStream, order: Sequence[int]) -> Iterator[None]:
    """A context in which block ``order[k]`` (from 0) runs in place k; ``order`` ``[L]`` names every block once.

    Each takes with it what the model hands to it alone: mask, rotary embedding, inputs of its layer. Where blocks that
    change places are given different things, each call of the model costs a second pass. See :func:`why_not_reordered`.
    """
    blocks = stream.block_list
    before = list(blocks)
    moved = _moved(order)
    alike: set[tuple[int, ...]] = set()
    handles: list[Any] = []

    def put(places: Sequence[int]) -> None:
        for place, number in enumerate(places):
            blocks[place] = before[number]

    def set_apart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while handles:
            handles.pop().remove()
        inputs = first_tensor([*args, *kwargs.values()])
        assert inputs is not None
        if inputs.shape[1:] in alike:
            return
        put(range(len(before)))
        try:
            seen = _handed(stream, (args, kwargs))
        finally:
            put(order)
        if not any(_own(seen[order[place]].given, seen[place].given) for place in moved):
            alike.add(tuple(inputs.shape[1:]))
            return
        for place in moved:
            own = seen[order[place]].given
            handles.append(_handing(before[order[place]], own, seen[place].given))

    with ExitStack() as stack:
        stack.callback(stream.model.register_forward_pre_hook(set_apart, with_kwargs=True).remove)
        stack.callback(lambda: [handle.remove() for handle in handles])
        put(order)
        try:
            yield
        finally:
            put(range(len(before)))


def _moved(order: Sequence[int]) -> list[int]:
    """The places at which another block runs."""
    return [place for place, number in enumerate(order) if place != number]


def _earlier(first: int, number: int) -> str:
    """The blocks from ``first`` on that run before block ``number``."""
    return f"block {first}" if number == first + 1 else f"blocks {first} to {number - 1}"


def exchanged(layers: int, first: int) -> list[int]:
    """The order of blocks in which ``first`` and ``first + 1`` have changed places."""
    order = list(range(layers))
    order[first], order[first + 1] = order[first + 1], order[first]
    return order


def swapped(stream: ResidualStream, first: int) -> AbstractContextManager[None]:
    """A context in which blocks ``first`` and ``first + 1`` (from 0) have changed places; see :func:`reordered`."""
    return reordered(stream, exchanged(len(stream.block_list), first))


def why_not_swapped(stream: ResidualStream, first: int) -> str:
    """Why blocks ``first`` and ``first + 1`` have no meaning in each other's place; empty where they have one."""
    return why_not_reordered(stream, exchanged(len(stream.block_list), first))


@torch.no_grad()
def why_not_reordered(stream: ResidualStream, order: Sequence[int]) -> str:
    """Why blocks have no meaning in the places that an order gives them; empty where they have one.

    A block may take more of an earlier one than its state (values, a residual, keys that are shared): nothing could be
    handed to it before that one has run.
    """
    moved = _moved(order)
    if not moved:
        return ""
    inputs = example_inputs(stream.model, 1)
    call: Given = (), stream.asked(inputs)
    first = moved[0]
    seen = _handed(stream, call)
    changed = _handed(stream, call, first, stretch=1.5)
    for place in moved:
        number = order[place]
        if isinstance(seen[number].returned, tuple) != isinstance(seen[place].returned, tuple):
            return f"undefined: blocks {min(number, place)} and {max(number, place)} return different things"
        own = _own(seen[number].given, seen[place].given)
        given = _others(changed[number].given)
        if number > first and not all(_equal(value, given.get(k)) for k, value in own.items()):
            return f"undefined: block {number} is given more from {_earlier(first, number)} than its state"
    try:
        with reordered(stream, order):
            stream.forward(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # blocks raise all kinds
        what = str(error).splitlines()[0] if str(error) else ""
        return f"undefined: the blocks do not run in each other's place ({type(error).__name__}: {what})"
    return ""
