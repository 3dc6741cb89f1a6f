"""Jacobians of streams by definition: torch's whole Jacobian of the blocks from a layer on, added up."""

import numpy as np
import torch
from torch import Tensor, nn

from lensbench.data.windows import Windows
from lensbench.streams.parts import block_input
from lensbench.streams.stream import ResidualStream


def windows_of_ids(ids: Tensor, lengths: list[int] | None = None) -> Windows:
    """Windows ``[S, T]`` of as many documents, with one scored position each."""
    count, length = ids.shape
    return Windows(
        ids=ids.numpy(),
        lengths=np.array(lengths or [length] * count, dtype=np.int64),
        positions=np.full((count, 1), 1, dtype=np.int64),
        valid=np.ones((count, 1), dtype=np.bool_),
        documents=np.arange(count),
        document_names=tuple(f"document {k}" for k in range(count)),
        sequence=np.zeros(count, dtype=np.int64),
        next_bytes=np.ones((count, 1), dtype=np.int32),
    )


def from_layer(stream: ResidualStream, ids: Tensor, layer: int):
    """A function from the state of a layer ``[T, D]`` to the last one ``[T, D]``: the model with that state put in."""
    # Where all layers are one module, the call of that number.
    blocks = stream.blocks or [next(m for n, m in stream.model.named_modules() if n.endswith("layers.0"))] * (layer + 1)
    calls = blocks.count(blocks[layer]) > 1 or not stream.blocks

    def run(h: Tensor) -> Tensor:
        before = [layer if calls else 0]

        def put(_: nn.Module, args, kwargs):
            assert block_input(args, kwargs) is not None
            before[0] -= 1
            if before[0] != -1:
                return None
            return ((h[None], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h[None]})

        hook = blocks[layer].register_forward_pre_hook(put, with_kwargs=True)
        try:
            return stream.graph(ids[None])[0][-1][0]
        finally:
            hook.remove()

    return run


def whole_jacobian(stream: ResidualStream, ids: Tensor, layer: int) -> Tensor:
    """``d h_L[t', a] / d h_layer[t, b]`` of one text ``[T]``: ``[T, d, T, d]`` of the entries that the view shows."""
    with torch.no_grad():
        states = stream.graph(ids[None])[0]
        h = states[layer][0]
        changed = from_layer(stream, ids, layer)(h + 1) - states[-1][0]
        assert changed.abs().max() > 1e-6  # the state is put in
    with torch.enable_grad():
        j = torch.autograd.functional.jacobian(from_layer(stream, ids, layer), h)
    return j[:, : stream.d_model, :, : stream.d_model]


def jacobian_by_definition(stream: ResidualStream, texts: Tensor, layer: int, inside: range, *, later: bool) -> Tensor:
    """J of a layer ``[d, d]``: mean over texts ``[S, T]`` and source positions, sum over current and later targets."""
    total = torch.zeros(stream.d_model, stream.d_model, dtype=torch.float64)
    for ids in texts:
        j = whole_jacobian(stream, ids, layer).double()
        for t in inside:
            for target in inside if later else [t]:
                if target >= t:
                    total += j[target, :, t] / len(inside)
    return total / len(texts)
