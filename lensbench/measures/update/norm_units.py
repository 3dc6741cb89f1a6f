"""States in the units that the final norm reads, in which every token counts alike.

Second moments of states weigh a token by the square of its length, so a minority of long states can dominate them. The
final norm divides each state by its scale: in these units a loud token weighs no more than a quiet one.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.runtime.mapped import give_back_pages
from lensbench.streams.capture import Capture, room_for
from lensbench.streams.readout import ReadOut

TOKEN_BLOCK = 4096


def inverse_scales(readout: ReadOut, h: Tensor) -> Tensor:
    """``1 / scale(h)`` of the final norm ``G h / scale(h) + norm(0)``, up to a common factor, ``[N]`` of states ``[N, d]``.

    Raises :class:`LensbenchError` where the norm is no matrix over a scale.
    """
    gain = readout.gain(h.shape[-1])
    if gain is None:
        raise LensbenchError("the final norm is no matrix over a scale: its units are unknown")
    offset = readout.final_norm(torch.zeros_like(h[0]))
    blocks = h.split(TOKEN_BLOCK)
    return torch.cat([readout.inverse_scale(x @ gain.T, readout.final_norm(x), offset) for x in blocks])


@torch.no_grad()
def norm_units(captured: Capture, readout: ReadOut, layers: Sequence[int], memory_gib: float = float("inf")) -> Capture:
    """A capture of the layers ``layers`` and of the last: states ``[n + 1, N, d]`` divided by the final norm's scale of h_L.

    Second moments of these are those of the states with weights ``1 / scale^2`` of mean 1; weighted means are taken off
    first, since what is divided with the state would else look like an update. States beyond ``memory_gib`` lie in a
    memory-mapped file.
    """
    inverse = inverse_scales(readout, captured.states[-1])
    square = inverse.double().square()
    total = float(captured.ranks.sum(square.sum().cpu()))
    inverse = (inverse.double() * (captured.tokens / total) ** 0.5).to(captured.states)
    shape = (len(layers) + 1, *captured.states.shape[1:])
    states = room_for(shape, captured.states.device, memory_gib).to(captured.states.dtype)
    for k, row in enumerate((*layers, captured.layers)):
        weighted = square.new_zeros(shape[2])
        for some, rows in zip(square.split(TOKEN_BLOCK), captured.states[row].split(TOKEN_BLOCK), strict=True):
            weighted += some @ rows.double()
        mean = captured.ranks.sum(weighted.cpu()) / total
        torch.mul(captured.states[row] - mean.to(states), inverse[:, None], out=states[k])
        give_back_pages()
    return replace(captured, states=states)
