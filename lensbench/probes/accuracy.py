"""How often does each layer's read-out name the target: the next token, or the class of an image?"""

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window
from lensbench.streams.readout import ReadOut

TOKENS_AT_ONCE = 1024


def accuracy(subject: Subject) -> Measured:
    """Share of held-out targets that are the most probable word of the model, and of three lenses at every layer.

    The lenses are the logit lens, the layer's own lens and the shared lens (both in closed form, prior zero).
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
    """1 where the most probable word of a lens at a layer is the target, else 0: ``[N]``; NaN where its logits overflow."""
    maps = maps.to(captured.states)
    found = []
    for start in range(0, len(captured), TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        read = captured.states[layer][rows] @ maps.matrix[0].T + maps.offset[0]
        highest, word = readout(read).max(-1)  # NaN if any is
        hit = (word == captured.targets[rows]).float()
        found.append(torch.where(highest.isfinite(), hit, torch.nan))
    return torch.cat(found)


ACCURACY = Probe(
    "accuracy",
    accuracy,
    "how often the most probable word is the target: of the model, and of three lenses at every layer",
    (
        Quantity(
            "accuracy",
            "held-out accuracy",
            "share of held-out targets to which the model gives the highest probability",
            "model",
            "Higher is better; a blind guess is right once in as many times as there are words.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "logit_accuracy",
            "accuracy, logit lens",
            "the same of the logit lens",
            "layer",
            "It reaches the model's accuracy where a layer already holds the final prediction in the final basis.",
            SAME_TOKENIZER,
            "layers",
        ),
        Quantity(
            "tuned_accuracy",
            "accuracy, own lens",
            "the same of the layer's own lens",
            "layer",
            "It says how often an affine read-out that was fitted to this layer is right.",
            SAME_TOKENIZER,
            "layers",
        ),
        Quantity(
            "shared_accuracy",
            "accuracy, shared lens",
            "the same of the shared lens",
            "layer",
            "Where it is close to that of the own lens, one read-out serves this layer as well as the others.",
            SAME_TOKENIZER,
            "layers",
        ),
    ),
    images=True,
)
