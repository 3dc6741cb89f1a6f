"""What does the non-causal update of a predictive-coding model gain from tokens of the future?"""

import numpy as np
import torch
from torch import from_numpy

from lensbench.data.windows import Windows
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity
from lensbench.probes.known_places import uniform_twin
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.statistics import Array


def prefix_read_out(subject: Subject) -> Measured:
    """Read-outs of the non-causal update with and without a future, at one scored position of each window.

    In this update every layer moves all predictions by all errors. The uniform variant, with the model's own weights, reads
    a window's prefix and the whole window, both at the last token of the prefix. The weights are not trained for that. For
    the causal against the uniform update on the same prefix see :func:`~lensbench.probes.known_places.known_places`.
    """
    name, model, windows = "prefix_read_out", subject.stream.model, subject.windows
    if not isinstance(model, PredictiveCodingForCausalLM):
        return Measured(name, reason="it has no update that could run over all positions")
    if subject.rotated:
        return Measured(name, reason="a rotated view has no read-out of its own")
    if model.config.delta_rule:
        return Measured(name, reason="the delta rule has no form without an order of tokens")
    at = windows.positions[np.arange(len(windows.ids)), windows.valid.sum(1) // 2]
    one = np.ones(len(windows.ids))
    sums = Sums(name, windows, one)
    for quantity, values in prefix_against_full(model, windows, at).items():
        sums.add(quantity, values, one)
    return sums.measured()


@torch.no_grad()
def prefix_against_full(model: PredictiveCodingForCausalLM, windows: Windows, at: Array) -> dict[str, Array]:
    """Quantity -> value ``[S]`` at position ``at`` ``[S]`` of each window."""
    twin = uniform_twin(model)
    found = {name: np.zeros(len(windows.ids)) for name in ("full_kl", "full_ce_change", "future_tokens")}
    for row, (n, length) in enumerate(zip(at, windows.lengths, strict=True)):
        ids = from_numpy(windows.ids[row : row + 1, :length]).to(model.device)
        prefix, full = (twin(x).logits[0, n].double().log_softmax(-1) for x in (ids[:, : n + 1], ids))
        target = ids[0, n + 1]
        found["full_kl"][row] = float((prefix.exp() * (prefix - full)).sum())
        found["full_ce_change"][row] = float(prefix[target] - full[target])
        found["future_tokens"][row] = length - n - 1
    return found


PREFIX_READ_OUT = Probe(
    "prefix_read_out",
    prefix_read_out,
    "of predictive-coding models, the non-causal update with and without a future",
    (
        Quantity(
            "full_kl",
            "non-causal update: KL of the whole from the prefix",
            "KL from the read-out of the prefix to that of the whole window (nats)",
            "model",
            "It says how far the future moves a prediction of the past.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "full_ce_change",
            "non-causal update: change of CE by a future",
            "CE of the token after the prefix: whole window minus prefix (nats)",
            "model",
            "Below 0, the whole window, which holds the token, predicts it better.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "future_tokens",
            "tokens of the future",
            "mean number of tokens after the prefix",
            "model",
            "It is the size of the future in the other two.",
            SAME_TOKENIZER,
        ),
    ),
)
