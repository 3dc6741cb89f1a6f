"""What a head's weights say of tokens, without any text: does it copy, suppress, or write minus a bigram?

``W_U W_OV W_E^T`` (arXiv 2112.00861 would call it the OV circuit; copying heads: Elhage et al. 2021; suppression: arXiv
2310.04625). It is taken as a function, with the model's own norms in it: a block is handed one token's embedding, alone in
its sequence, so that every head must look at it.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import FOLDS, Estimates, Jackknifed, by_group
from lensbench.probes.tools.heads import check_heads, reading_heads
from lensbench.probes.tools.interventions import entering
from lensbench.probes.tools.predictions import Directions, batches
from lensbench.streams.stream import ResidualStream

TOKENS = 1000
"""The text's most frequent tokens, as inputs and as outputs."""


WINDOWS = 16
"""Windows that attention to the previous token is measured on."""


AT_ONCE = 256


@probe
def head_weights(subject: Subject) -> Jackknifed:
    """Per head, over the text's most frequent tokens x: row x of ``W_U W_OV W_E^T``, about its mean and the columns' means.

    ``weights_identity``: the entry of x itself in standard deviations of its row, mean over x: above 0 copies, below 0
    suppresses (minus the identity); ``weights_identity_null`` takes another token's entry. ``weights_bigram``:
    correlation of the row with ``log p(y | x) - log p(y)`` of an interpolated bigram (train split), about the same means;
    ``weights_bigram_null`` with another token's. ``weights_previous_bigram``, ``weights_previous_identity``: the same of
    what the head makes of x as the *previous* token, handed to it by the head of an earlier layer that looks at the
    previous token most: a head that carries errors has the identity and, here, minus the bigram. ``previous_attention``:
    mean weight of the head on the token before. Intervals over groups of tokens.
    """
    name = "head_weights"
    stream = subject.stream
    if subject.rotated:
        return Jackknifed(name, reason="a rotated view has no heads of its own")
    reason = check_heads(stream, subject.say)
    if not reason and not stream.blocks:
        reason = "its layers are not blocks of their own, which could be handed a token's embedding"
    if reason:
        return Jackknifed(name, reason=reason)
    ids = subject.words.fit_windows.ids[subject.words.fit_windows.inside]
    found, counts = np.unique(ids, return_counts=True)
    tokens = torch.from_numpy(np.sort(found[np.argsort(-counts, kind="stable")][:TOKENS]))
    bigram = subject.words.bigram()
    rows = np.stack([bigram.distribution(int(v))[tokens.numpy()] for v in tokens])
    association = about_means(torch.from_numpy(np.log(rows) - np.log(bigram.continuation[tokens.numpy()])))
    group = np.random.default_rng(0).permutation(len(tokens)) % FOLDS
    size = by_group(np.ones(len(tokens)), group)
    outputs = stream.readout.weight[tokens].double().cpu()
    gain = stream.readout.gain(stream.d_model)
    if gain is not None:
        outputs = outputs @ gain.double().cpu()
    estimates = Estimates(name, FOLDS)
    looks = previous_attention(subject)
    embedded = stream.model.get_input_embeddings()(tokens.to(stream.input_device)).detach().float()
    written = written_by(stream, embedded, tokens)
    handed = {}
    for layer in written:
        before = [(looks[k][h], k, h) for k in looks if k < layer and k in written for h in range(len(looks[k]))]
        if before:
            _, k, h = max(before)
            handed[layer] = written[k][h]
    composed = written_by(stream, handed, tokens) if handed else {}

    def add(quantity: str, values: Tensor, layer: int, head: int) -> None:
        estimates.share(quantity, by_group(values.numpy(), group), size, layer=layer, other=head)

    for layer, of_heads in written.items():
        for head, out in enumerate(of_heads):
            direct = about_means(out.double().cpu() @ outputs.T)
            add("weights_identity", standardised(direct, 0), layer, head)
            add("weights_identity_null", standardised(direct, 1), layer, head)
            add("weights_bigram", correlation(direct, association), layer, head)
            add("weights_bigram_null", correlation(direct, association.roll(1, 0)), layer, head)
            if layer in composed:
                through = about_means(composed[layer][head].double().cpu() @ outputs.T)
                add("weights_previous_identity", standardised(through, 0), layer, head)
                add("weights_previous_bigram", correlation(through, association), layer, head)
                add("weights_previous_bigram_null", correlation(through, association.roll(1, 0)), layer, head)
            estimates.add("previous_attention", float(looks[layer][head]), layer=layer, other=head)
    return estimates.done()


def about_means(matrix: Tensor) -> Tensor:
    """About the means of its columns and then of its rows: neither a bias nor a shift of all logits counts."""
    matrix = matrix - matrix.mean(0)
    return matrix - matrix.mean(1, keepdim=True)


def standardised(matrix: Tensor, shift: int) -> Tensor:
    """Entry ``x + shift`` of each row x in standard deviations of the row: ``[N]``."""
    spread = matrix.std(1).clamp(min=1e-300)
    return matrix.roll(-shift, 1).diagonal() / spread


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows, ``[N]``."""
    return torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-300)


def previous_attention(subject: Subject) -> dict[int, list[float]]:
    """Layer -> mean weight of each head on the token before."""
    few = subject.windows.spread(WINDOWS)
    sums: dict[int, Tensor] = {}
    count = 0.0
    for batch in batches(subject.stream, few, Directions.none(subject.stream), heads=True):
        inside = batch.inside[:, 2:].double().cpu()
        count += float(inside.sum())
        for heads in batch.heads:
            before = heads.weights.diagonal(-1, -2, -1)[..., 1:].double().cpu()  # a_{n,n-1} for n = 2, 3, ...
            sums[heads.layer] = sums.get(heads.layer, 0) + (before * inside[:, None]).sum((0, 2))
    return {layer: (total / count).tolist() for layer, total in sums.items()}


@torch.no_grad()
def written_by(stream: ResidualStream, given: Tensor | dict[int, Tensor], tokens: Tensor) -> dict[int, Tensor]:
    """What each head writes to the stream where its block is given N states ``[N, d]`` alone: layer -> ``[H, N, d]``.

    ``given``: the same states for all blocks, or of each block its own.
    """
    if isinstance(stream.model, PredictiveCodingForCausalLM):
        return _written_by_predictive_coding(stream, given)
    states = given if isinstance(given, dict) else dict.fromkeys(range(stream.layers), given)
    parts: dict[int, list[Tensor]] = {}
    with reading_heads(stream) as heads:
        for start in range(0, len(tokens), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            given_now = {layer: x[some] for layer, x in states.items()}
            with entering(stream, partial(handed_over, states=given_now)):
                stream.model(input_ids=tokens[some, None].to(stream.input_device))
            for of in heads:
                if of.layer in states:
                    mixed = of.mixed[:, :, 0] / of.weights[:, :, 0]  # sinks take a part of the weight
                    parts.setdefault(of.layer, []).append(torch.einsum("bhk,hkd->hbd", mixed, of.written))
            heads.clear()
    return {layer: torch.cat(each, 1) for layer, each in sorted(parts.items())}


def _written_by_predictive_coding(stream: ResidualStream, given: Tensor | dict[int, Tensor]) -> dict[int, Tensor]:
    """Its heads act on errors, at their place in the stream: what they make of an error ``[N, d]``."""
    found = {}
    for number in range(stream.layers):
        x = given.get(number) if isinstance(given, dict) else given
        if x is None:
            continue
        layers: Any = stream.model.layers
        layer = layers[number % len(layers)]
        d = layer.value_output.weight.shape[1]
        value = layer.split(layer.value_output(x[None, :, :d]))[0]
        matrix = (layer.value_output if layer.output is None else layer.output).weight.view(layer.heads, -1, d)
        found[number] = torch.nn.functional.pad(value @ matrix, (0, stream.d_model - d))
    return found


def handed_over(layer: int, h: Tensor, states: dict[int, Tensor]) -> Tensor | None:
    """States ``[N, d]`` of N sequences of one token in place of what came before."""
    return states[layer][:, None].to(h) if layer in states else None
