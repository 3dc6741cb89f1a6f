"""What a predictive-coding language model holds at its known places: predictions, errors and updates, layer by layer."""

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
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.statistics import Array

TOKENS_AT_ONCE = 4096


@probe
def known_places(subject: Subject) -> Measured:
    """Of a predictive-coding model, means over tokens at every layer l, or whose block is l.

    ``read_out_ce``: cross-entropy of ``predictions[l]`` through the model's own head, nats/token. ``true_error_rms``: of
    the error ``(E[x] - E^T p) / rms(E)`` of ``predictions[l]``; ``carried_error_rms``: of what the block was given
    instead (the two differ in the cheap and in the no-error variants), and ``error_cosine`` of the two;
    ``update_share``: norm of ``updates[l]`` by that of ``predictions[l]``. ``subtracted_cosine``, of the cheap error: of
    what is subtracted, ``A rms(z)``, and ``E^T p``.

    ``subtracted_share``: norm of ``E^T p`` by that of ``E[x]``: how much there is to subtract. Where it is small, as before
    training, every error has a cosine near 1 with the true one.

    For the whole model, at the last scored token of a window: ``uniform_kl``, from the model's own prediction to that of the
    uniform variant with the same weights on the same prefix, in which every layer updates all predictions by all errors of
    the prefix, and ``uniform_ce_rise``, of the cross-entropy by that change. The weights are not trained for it.
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


@probe
def prefix_read_out(subject: Subject) -> Measured:
    """Of the non-causal update (every layer moves all predictions by *all* errors): its read-outs with and without a future.

    The uniform variant with the model's own weights reads a window's prefix, and the whole window, both at the prefix's
    last token, one scored position of each window. ``full_kl``: KL from the read-out of the prefix to that of the whole;
    ``full_ce_change``: of the cross-entropy of the token behind the prefix, which the whole has seen, nats;
    ``future_tokens``: how many more it has. The weights are not trained for it. Causal against uniform on the same prefix:
    ``known_places``.
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
    """Name -> value ``[S]`` at position ``at`` ``[S]`` of each window, see :func:`prefix_read_out`."""
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


def uniform_twin(model: PredictiveCodingForCausalLM) -> PredictiveCodingForCausalLM:
    """The non-causal variant with the same weights."""
    config = PredictiveCodingConfig(**{**model.config.to_dict(), "causal": False})
    twin = torch.nn.Module.to(PredictiveCodingForCausalLM(config), model.device).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def against_uniform(model: PredictiveCodingForCausalLM, windows: Windows, per_batch: int) -> dict[str, Array]:
    """Name -> value ``[S]`` of each window, see :func:`known_places`."""
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
    """Quantity and layer -> its value ``[B, T-1]`` for the prediction at position n, which token n+1 judges."""
    out: PredictiveCodingOutput = model(ids, output_hidden_states=True)
    assert out.predictions is not None and out.errors is not None and out.updates is not None
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
