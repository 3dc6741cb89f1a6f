"""Changing what a block receives while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lensbench.streams.stream import ResidualStream


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

    hooks = [b.register_forward_pre_hook(enter(k), with_kwargs=True) for k, b in enumerate(stream.blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
