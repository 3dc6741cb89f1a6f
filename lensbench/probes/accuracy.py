"""How often each layer's read-out names what comes: the next token, or the class of an image."""

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window
from lensbench.streams.readout import ReadOut

TOKENS_AT_ONCE = 1024


@probe
def accuracy(subject: Subject) -> Measured:
    """Share of held-out targets that are the most probable word: of the model itself, and of three lenses at every layer.

    The lenses are the logit lens, the layer's own, and the one shared by all layers (both closed, prior zero).
    """
    scored, readout, d = subject.eval, subject.stream.readout, subject.stream.d_model
    tokens = sum_by_window(torch.ones(len(scored)), scored)
    sums = Sums("accuracy", subject.samples, tokens)
    sums.add("accuracy", sum_by_window((scored.top == scored.targets).float(), scored))
    identity = AffineMaps.identity(d)
    for layer in range(subject.stream.layers):
        for name, maps in (("logit", identity), ("tuned", subject.own[[layer]]), ("shared", subject.shared)):
            sums.add(f"{name}_accuracy", sum_by_window(hits(readout, scored, maps, layer), scored), layer=layer)
    return sums.measured()


@torch.no_grad()
def hits(readout: ReadOut, captured: Capture, maps: AffineMaps, layer: int) -> Tensor:
    """1 where one lens's most probable word at a layer is the target, else 0: ``[N]``."""
    maps = maps.to(captured.states)
    found = []
    for start in range(0, len(captured), TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        read = captured.states[layer][rows] @ maps.matrix[0].T + maps.offset[0]
        found.append(readout(read).argmax(-1) == captured.targets[rows])
    return torch.cat(found).float()
