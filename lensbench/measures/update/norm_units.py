"""States in the units that the final norm reads, in which every token counts alike.

The final norm divides a state by its scale, so that a loud token's prediction weighs no more than a quiet one's. Second
moments of states weigh a token by the square of its length: a loud minority can decide them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.streams.capture import Capture
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
    found = []
    for rows in h.split(TOKEN_BLOCK):
        unscaled = rows @ gain.T
        # By least squares over the entries.
        found.append(((readout.final_norm(rows) - offset) * unscaled).sum(-1) / unscaled.square().sum(-1))
    return torch.cat(found)


@torch.no_grad()
def norm_units(captured: Capture, readout: ReadOut, layers: Sequence[int]) -> Capture:
    """The capture with the states of ``layers``, and the last, divided by the final norm's scale of the last state.

    Second moments of these are those of the states with weights ``1 / scale^2`` of mean 1; weighted means are taken off
    first, since what is divided with the state would else look like an update.
    """
    inverse = inverse_scales(readout, captured.states[-1])
    square = inverse.double().square()
    total = float(captured.ranks.sum(square.sum().cpu()))
    inverse = (inverse.double() * (captured.tokens / total) ** 0.5).to(captured.states)
    states = torch.zeros_like(captured.states)
    for row in (*layers, captured.layers):
        mean = captured.ranks.sum((square @ captured.states[row].double()).cpu()) / total
        torch.mul(captured.states[row] - mean.to(states), inverse[:, None], out=states[row])
    return replace(captured, states=states)
