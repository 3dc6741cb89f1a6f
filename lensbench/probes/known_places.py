"""What does a predictive-coding language model hold at its known places: predictions, errors and updates, by layer?"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, from_numpy

from lensbench.data.windows import Windows
from lensbench.models.predictive_coding import (
    PredictiveCodingConfig,
    PredictiveCodingForCausalLM,
    PredictiveCodingOutput,
    expected_embedding,
)
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.statistics import Array

TOKENS_AT_ONCE = 4096


def known_places(subject: Subject) -> Measured:
    """Predictions, errors and updates of a predictive-coding model: means over tokens for every layer l, or block l.

    Errors are ``(E[x] - E^T p) / rms(E)``, of the predictions of a layer. Where the model carries a cheap error, or none,
    what a block is given differs from it. Before training there is little to subtract (see ``subtracted_share``), and every
    error has a cosine near 1 with the true one.

    For the whole model, at the last scored token of a window, the model is compared with its uniform variant: the same
    weights on the same prefix, but every layer updates all predictions by all errors of the prefix. The weights are not
    trained for that.
    """
    model, windows = subject.stream.model, subject.windows
    if not isinstance(model, PredictiveCodingForCausalLM):
        return Measured("known_places", reason="its predictions and errors have no known places")
    if subject.rotated:
        return Measured("known_places", reason="a rotated view has no places of its own")
    sums: dict[tuple[str, int], list[Tensor]] = {}
    per_batch = max(1, TOKENS_AT_ONCE // windows.ids.shape[1])
    for start in range(0, len(windows.ids), per_batch):
        ids, row, at = map(from_numpy, windows.scored(slice(start, start + per_batch)))
        for (name, layer), values in at_places(model, ids.to(model.device)).items():
            scored = values.double().cpu()[row, at]
            total = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, row, scored)
            sums.setdefault((name, layer), []).append(total)
    found = Sums("known_places", windows, windows.valid.sum(1).astype(float))
    for (name, layer), parts in sums.items():
        found.add(name, torch.cat(parts).numpy(), layer=layer)
    if model.config.causal and not model.config.delta_rule:
        every = np.ones(len(windows.ids))
        for name, change in against_uniform(model, windows, per_batch).items():
            found.add(name, change, every)
    return found.measured()


def uniform_twin(model: PredictiveCodingForCausalLM) -> PredictiveCodingForCausalLM:
    """The non-causal variant of the model, with the same weights."""
    config = PredictiveCodingConfig(**{**model.config.to_dict(), "causal": False})
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
        twin = PredictiveCodingForCausalLM(config)
    torch.nn.Module.to(twin, model.device)
    twin.train(False)
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def against_uniform(model: PredictiveCodingForCausalLM, windows: Windows, per_batch: int) -> dict[str, Array]:
    """Quantity -> value ``[S]`` of each window, at its last scored token, against the uniform variant."""
    twin = uniform_twin(model)
    last = np.where(windows.valid, windows.positions, 0).max(1)
    found = {name: np.zeros(len(windows.ids)) for name in ("uniform_kl", "uniform_ce_rise")}
    for n in np.unique(last):
        (rows,) = np.nonzero(last == n)
        for some in np.array_split(rows, -(-len(rows) // per_batch)):
            ids = from_numpy(windows.ids[some]).to(model.device)
            prefix, target = ids[:, : n + 1], ids[:, n + 1 : n + 2]
            own, other = (m(prefix).logits[:, -1].double().log_softmax(-1) for m in (model, twin))
            found["uniform_kl"][some] = (own.exp() * (own - other)).sum(-1).cpu().numpy()
            found["uniform_ce_rise"][some] = (own - other).gather(1, target)[:, 0].cpu().numpy()
    return found


@torch.no_grad()
def at_places(model: PredictiveCodingForCausalLM, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """Quantity and layer -> its value ``[B, T-1]`` for the prediction at position n, which is of token n+1."""
    out: PredictiveCodingOutput = model(ids, output_hidden_states=True)
    assert out.predictions is not None
    assert out.errors is not None
    assert out.updates is not None
    table = model.embed_tokens.weight
    scale = table.pow(2).mean().rsqrt()
    actual = F.embedding(ids[:, 1:], table)
    found: dict[tuple[str, int], Tensor] = {}
    for layer, z in enumerate(out.predictions):
        logits = model.read_out(z[:, :-1])
        found["read_out_ce", layer] = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        latent = model.norm(z[:, :-1])
        expected = expected_embedding(latent.flatten(0, 1), table).view_as(latent)
        error = (actual - expected) * scale
        found["true_error_rms", layer] = error.pow(2).mean(-1).sqrt()
        found["subtracted_share", layer] = expected.norm(dim=-1) / actual.norm(dim=-1)
        if layer == len(out.errors):
            continue
        carried = out.errors[layer][:, 1:]
        found["carried_error_rms", layer] = carried.pow(2).mean(-1).sqrt()
        found["error_cosine", layer] = F.cosine_similarity(carried, error, dim=-1)
        found["update_share", layer] = (out.updates[layer].norm(dim=-1) / z.norm(dim=-1))[:, :-1]
        if model.config.error == "linear":
            rms = F.rms_norm(actual, (actual.shape[-1],), eps=1e-12)
            found["subtracted_cosine", layer] = F.cosine_similarity(rms - carried, expected, dim=-1)
    return found


KNOWN_PLACES = Probe(
    "known_places",
    known_places,
    "of predictive-coding models, predictions and errors by layer",
    (
        Quantity(
            "read_out_ce",
            "CE read out, nats/token",
            "cross-entropy of `predictions[l]` through the model's own head (nats/token)",
            "layer",
            "A fall from layer to layer is what the updates gain.",
            SAME_TOKENIZER,
            "places",
            Panel("layer read out by the model's own head", "CE (nats/token)", zero=False, one_view=True),
        ),
        Quantity(
            "true_error_rms",
            "rms of the error",
            "rms of `(E[x] - E^T p) / rms(E)` of `predictions[l]`",
            "layer",
            "It falls where predictions come closer to the tokens.",
            table="places",
            panel=Panel("layer", "rms of the error at its place", one_view=True),
        ),
        Quantity(
            "carried_error_rms",
            "rms of the error a block is given",
            "rms of the error that block l is given",
            "layer",
            "It differs from the rms of the error in the variants with a cheap error and with none.",
        ),
        Quantity(
            "error_cosine",
            "cosine of the error given and the true one",
            "cosine of the error that block l is given and the true one",
            "layer",
            "It is 1 where the block is given the true error.",
            table="places",
            panel=Panel("block (from 0)", "cosine of the error given and the true one", one_view=True),
        ),
        Quantity(
            "update_share",
            "share of the update",
            "norm of `updates[l]` by the norm of `predictions[l]`",
            "layer",
            "Near 0, the block changes the prediction little.",
        ),
        Quantity(
            "subtracted_cosine",
            "cosine of what is subtracted",
            "of the cheap error, cosine of what it subtracts, `A rms(z)`, and `E^T p`",
            "layer",
            "It is 1 where the linear map gives the direction of the true expectation.",
            table="places",
        ),
        Quantity(
            "subtracted_share",
            "share that is subtracted",
            "norm of `E^T p` by the norm of `E[x]`",
            "layer",
            "Where it is small there is little to subtract, and any error has a cosine near 1 with the true one.",
            table="places",
        ),
        Quantity(
            "uniform_kl",
            "KL to the uniform variant, nats",
            "KL from the model's prediction to that of the uniform variant on the same prefix (nats)",
            "model",
            "It is 0 with one layer, and grows with what the order of tokens changes.",
            SAME_TOKENIZER,
            "places",
        ),
        Quantity(
            "uniform_ce_rise",
            "its CE above the model's, nats",
            "CE of the uniform variant minus the model's CE (nats)",
            "model",
            "Above 0, the weights predict better with the causal update for which they were trained.",
            SAME_TOKENIZER,
            "places",
        ),
    ),
    topic="predictions and errors",
)
