"""Changing what a block receives while a model runs, and what the model makes of it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lensbench.models.looped import can_loop
from lensbench.streams.parts import block_input
from lensbench.streams.stream import ResidualStream

CACHED_TOLERANCE = 1e-3
"""Largest relative difference of a token's log-probabilities computed from a cache and from the whole prefix"""


MOVES_AT_ONCE = 64
"""Moved states in a batch"""


@contextmanager
def entering(stream: ResidualStream, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """A context in which block l receives ``change(l, h)`` in place of its state h ``[B, T, d]``; None changes nothing."""

    def enter(layer: int) -> Any:
        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = change(layer, args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return replace

    with before_blocks(stream, [enter(k) for k in range(stream.layers)]):
        yield


def blocks_of(stream: ResidualStream) -> tuple[nn.Module, ...]:
    """The L blocks in the order in which they run, one block L times for a model in a loop; empty where there are none."""
    if stream.blocks or stream.layers == 1 or not can_loop(stream.model):
        return stream.blocks
    block = stream.model.get_submodule("layers.0")
    return (block,) * stream.layers


@contextmanager
def before_blocks(stream: ResidualStream, hooks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """A context in which hook l, of PyTorch's form with keywords, is called before block l."""
    in_turn: dict[nn.Module, list[Callable[..., Any]]] = {}
    for block, hook in zip(blocks_of(stream), hooks, strict=True):
        in_turn.setdefault(block, []).append(hook)
    handles = [
        block.register_forward_pre_hook(partial(_next, cycle(of_block)), with_kwargs=True)
        for block, of_block in in_turn.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _next(hooks: Iterator[Callable[..., Any]], *call: Any) -> Any:
    """What the hook whose turn it is says: a block in a loop is called once for each of its hooks in a pass."""
    return next(hooks)(*call)


@torch.no_grad()
def after_moves(
    stream: ResidualStream, ids: Tensor, layers: Tensor, moves: Tensor, before: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model makes of moves ``[n, d]`` of the last state of a prefix ``[1, T]`` before blocks ``layers`` ``[n]``.

    Batch by batch of m moves: the states before each block ``[L, m, d]`` and the log-probabilities ``[m, V]`` of the last
    token. Only the last token is computed again, if the model has a cache of the prefix that can be trusted: ``before`` are
    the log-probabilities ``[V]`` without a move, each computed in another way, and the cache has to give one of them. A
    later one is asked for only where the earlier ones disagree. A batch holds :data:`MOVES_AT_ONCE` copies of the cache, or
    of the prefix.
    """
    cached = cache_of(stream, ids)
    start, checked = 0, cached is None
    while start < len(layers):
        of, move = (x[start : start + MOVES_AT_ONCE] for x in (layers, moves))
        if not checked:  # a row without a move goes with the first ones
            of, move = torch.cat([of[:1], of]), torch.cat([torch.zeros_like(move[:1]), move])
        count = len(of)
        with entering(stream, partial(moved, layers=of, moves=move)), last_states(stream) as states:
            if cached is not None:
                logits = after_cache(stream, ids, cached, count)
            else:
                last = torch.full((count,), ids.shape[1] - 1)
                _, logits = stream.at(ids.expand(count, -1), torch.arange(count), last)
        h, log_p = torch.stack(states), logits.float().log_softmax(-1)
        if not checked:
            checked, found = True, log_p[0]
            if not any(bool((found - one).abs().max() < CACHED_TOLERANCE * one.abs().max()) for one in before):
                cached = None
                continue
            h, log_p = h[:, 1:], log_p[1:]
        start += len(log_p)
        yield h, log_p


@contextmanager
def last_states(stream: ResidualStream) -> Iterator[list[Tensor]]:
    """A context that collects the last state ``[B, d]`` that each block receives, changes by earlier hooks included."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = block_input(args, kwargs)
        assert h is not None
        found.append(stream.seen(h[:, -1]).clone())

    with before_blocks(stream, [keep] * stream.layers):
        yield found


def cache_of(stream: ResidualStream, ids: Tensor) -> tuple[str, Any] | None:
    """The model's name of its cache, and the cache of all tokens ``[1, T]`` but the last; None for a model without one."""
    if ids.shape[1] < 2:
        return None
    with stream.before_the_head(lambda _, args: args[0][:, -1:]):
        out = stream.model(input_ids=ids[:, :-1], use_cache=True, return_dict=True)
    for name in ("cache", "past_key_values"):
        cache = getattr(out, name, None)
        if hasattr(cache, "reorder_cache"):
            return name, cache
    return None


def after_cache(stream: ResidualStream, ids: Tensor, cached: tuple[str, Any], count: int) -> Tensor:
    """Logits ``[count, V]`` of the last token of ``[1, T]``, ``count`` times, from a cache of the other tokens."""
    name, cache = cached[0], copy.deepcopy(cached[1])
    cache.reorder_cache(torch.zeros(count, dtype=torch.long, device=ids.device))
    last = ids[:, -1:].expand(count, 1)
    out = stream.model(input_ids=last, use_cache=True, return_dict=True, **{name: cache})
    logits: Tensor = out.logits[:, -1].to(stream.device)
    return logits


def moved(layer: int, h: Tensor, layers: Tensor, moves: Tensor) -> Tensor | None:
    """States ``[n, T, d]``, the last one of sequence i moved by ``moves[i]`` if ``layers[i]`` is this one; None if none."""
    here = (layers == layer).nonzero()[:, 0]
    if not len(here):
        return None
    change = torch.zeros_like(h)
    change[here.to(h.device), -1, : moves.shape[1]] = moves[here].to(h)
    return h + change
