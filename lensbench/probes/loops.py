"""Does a stream converge as one layer is applied again and again, and does its prediction, beyond training too?"""

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import score
from lensbench.models.looped import can_loop, looping
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.streams.capture import Capture, capture
from lensbench.streams.kl import sum_by_window
from lensbench.streams.stream import ResidualStream

NAME = "loops"

BEYOND = 4
"""A model that can loop does so up to this many times as often as in the run"""

NO_LOOP = "its layers are not one layer in a loop: there is nothing beyond the last one"


@torch.no_grad()
def loops(subject: Subject) -> Measured:
    """How far each loop moves the state, and what norm and head predict from it: of the last loop, and of the next token.

    A model with one layer for all depths (``gpt-looped``, ``gpt-tied``, predictive coding with ``tied_layers``) is run with
    four times its L loops; of any other model, layers 1..L stand for loops. The reference of every KL is the model's own
    prediction, that after L loops, so beyond L it says how far the prediction drifts from there. Everything is read with
    the model's own norm and head, without a lens.
    """
    if subject.rotated:
        return Measured(NAME, reason="a rotated view has no loops of its own")
    scored, stream = subject.eval, subject.stream
    states = _looped_states(stream, subject, scored) if can_loop(stream.model) else scored.states
    sums = Sums(NAME, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    moved: dict[int, np.ndarray] = {}
    for layer in range(1, len(states)):
        moved[layer] = sum_by_window(relative_change(states[layer - 1], states[layer]), scored)
        sums.add("loop_change", moved[layer], layer=layer)
        sums.add("loop_distance", sum_by_window(relative_change(states[layer], states[-1]), scored), layer=layer)
    identity, trained, ce = AffineMaps.identity(stream.d_model), stream.layers, {}
    for layer, h in enumerate(states):
        read = score(stream.readout, h, identity, scored)
        ce[layer] = sum_by_window(read.ce[0], scored)
        if layer != trained:  # at L the difference of equals is what rounding leaves
            sums.add("loop_kl", sum_by_window(read.kl[0], scored), layer=layer)
        sums.add("loop_ce", ce[layer], layer=layer)
    if can_loop(stream.model):
        sums.add("loops_contraction", moved[len(states) - 1], moved[trained])
        sums.add("loops_doubled_ce", ce[2 * trained] - ce[trained])
        sums.add("loops_beyond_ce", ce[len(states) - 1] - ce[trained])
    else:
        for name in ("loops_contraction", "loops_doubled_ce", "loops_beyond_ce"):
            sums.undefined(name, NO_LOOP)
    return sums.measured()


def _looped_states(stream: ResidualStream, subject: Subject, scored: Capture) -> Tensor:
    """The states ``[4 L + 1, N, d]`` of a model that loops on, at the scored tokens."""
    with looping(stream.model, BEYOND * stream.layers):
        states = capture(ResidualStream(stream.model, stream.view), subject.samples, constant=scored.mean_p).states
    return states.to(scored.states)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before| / |after|`` of every token ``[N]``, from states ``[N, d]``."""
    change: Tensor = (after - before).norm(dim=-1) / after.norm(dim=-1).clamp(min=torch.finfo(after.dtype).tiny)
    return change


LOOPS = Probe(
    NAME,
    loops,
    "per loop (of any other model, per layer): how far the state moves, and what the model's own head predicts from it",
    (
        Quantity(
            "loop_change",
            "relative change of the state",
            "mean of `|h_k - h_{k-1}| / |h_k|`",
            "layer",
            "If it falls to 0, the state converges; if it stays level, the state cycles or drifts.",
            table="layers",
            panel=Panel("loop (layer)", "relative change of the state"),
        ),
        Quantity(
            "loop_distance",
            "distance from the last state",
            "mean of `|h_K - h_k| / |h_K|`, K the last loop that was run",
            "layer",
            "It falls to 0 where loops go to one state, whatever the size of single changes.",
        ),
        Quantity(
            "loop_kl",
            "KL of the own exit",
            "KL(p || q_k), nats/token: p the model's own prediction after L loops, q_k what its norm and head read from "
            "h_k; none at k = L",
            "layer",
            "Before L it is what an early exit costs; beyond L, how far the prediction drifts.",
            SAME_TOKENIZER,
            "layers",
            Panel("loop (layer)", "KL of the own exit, nats/token", symlog=True),
        ),
        Quantity(
            "loop_ce",
            "cross-entropy of the own exit",
            "cross-entropy of q_k to the next token, nats/token",
            "layer",
            "It says at which loop the prediction is best, beyond training too.",
            SAME_TOKENIZER,
            "layers",
            Panel("loop (layer)", "cross-entropy of the own exit, nats/token", zero=False),
        ),
        Quantity(
            "loops_contraction",
            "change at the last loop, by that at L",
            "`loop_change` at the last of 4 L loops, as a share of that at L",
            "model",
            "Near 0, the loop converges; near 1 or above, it does not.",
            table="models",
        ),
        Quantity(
            "loops_doubled_ce",
            "cross-entropy of twice the loops",
            "`loop_ce` after 2 L loops minus that after L, paired, nats/token",
            "model",
            "Below 0, more loops than usual help; above 0, they hurt.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "loops_beyond_ce",
            "cross-entropy of four times the loops",
            "`loop_ce` after 4 L loops minus that after L, paired, nats/token",
            "model",
            "Near 0, the prediction stays where training left it.",
            SAME_TOKENIZER,
            "models",
        ),
    ),
    images=True,
    control="any model of untied layers, whose layers 1..L are listed in the same way",
    topic="what loops do",
)
