"""What do a head's weights do with tokens, without any text: do they copy, suppress, or write minus a bigram?

The matrix is ``W_U W_OV W_E^T`` (the OV circuit; copying heads: Elhage et al. 2021; suppression: arXiv 2310.04625). It is
computed as a function, with the model's own norms in it: a block is given the embedding of one token, alone in its sequence,
so that every head must look at it.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
from lensbench.probes.catalogue import SAME_TOKENIZER, WITH_ITS_NULL, Probe, Quantity
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.crossfit import FOLDS, Estimates, Jackknifed, by_group
from lensbench.probes.tools.heads import EAGER, check_heads, reading_heads, sets_attention
from lensbench.probes.tools.interventions import entering
from lensbench.probes.tools.predictions import Directions, batches
from lensbench.streams.stream import ResidualStream

TOKENS = 1000
"""Number of the text's most frequent tokens that are inputs and outputs"""


WINDOWS = 16
"""Windows on which attention to the previous token is measured, at most"""


AT_ONCE = 256


def head_weights(subject: Subject) -> Jackknifed:
    """For every head and the text's most frequent tokens x: row x of ``W_U W_OV W_E^T`` against the identity and a bigram.

    The matrix is taken about the means of its columns and rows, the bigram's ``log p(y | x) - log p(y)`` (interpolated,
    train split) about the same means. Nulls take another token's entry or row. What a head makes of x as the *previous*
    token is measured on what the head of an earlier layer that looks at the previous token most writes of x: a head that
    carries errors has the identity and, there, minus the bigram. Intervals are over groups of tokens.

    They hold the weights fixed. In a model whose embedding is its unembedding an untrained head has an identity too, about
    ``1 / sqrt(d)`` on either side of 0 for a width d, and its interval may leave 0 out.
    """
    name = "head_weights"
    stream = subject.stream
    if subject.rotated:
        return Jackknifed(name, reason="a rotated view has no heads of its own")
    if reason := check_heads(stream):
        return Jackknifed(name, reason=reason)
    if sets_attention(stream):
        subject.say(EAGER)
    if not stream.blocks:
        return Jackknifed(name, reason=f"{no_blocks(stream)}, and could not be handed a token's embedding")
    width = stream.model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device=stream.input_device)).shape[-1]
    if width != stream.d_model and not isinstance(stream.model, PredictiveCodingForCausalLM):
        return Jackknifed(name, reason=f"a token's embedding has {width} entries, and a state {stream.d_model}")
    tokens, association = _frequent_tokens(subject)
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
    handed = _written_of_previous(written, looks)
    composed = written_by(stream, handed, tokens) if handed else {}
    for layer, of_heads in written.items():
        for head, out in enumerate(of_heads):
            scores = _direct_scores(about_means(out.double().cpu() @ outputs.T), association)
            if layer in composed:
                through = about_means(composed[layer][head].double().cpu() @ outputs.T)
                scores |= _scores_through_previous(through, association)
            for quantity, values in scores.items():
                estimates.share(quantity, by_group(values.numpy(), group), size, layer=layer, other=head)
            estimates.add("previous_attention", float(looks[layer][head]), layer=layer, other=head)
    return estimates.done()


def _frequent_tokens(subject: Subject) -> tuple[Tensor, Tensor]:
    """Ids ``[N]`` of the fit split's most frequent tokens, and their bigram association about its means ``[N, N]``."""
    ids = subject.words.fit_windows.ids[subject.words.fit_windows.inside]
    found, counts = np.unique(ids, return_counts=True)
    tokens = torch.from_numpy(np.sort(found[np.argsort(-counts, kind="stable")][:TOKENS]))
    bigram = subject.words.bigram()
    rows = np.stack([bigram.distribution(int(v))[tokens.numpy()] for v in tokens])
    association = torch.from_numpy(np.log(rows) - np.log(bigram.continuation[tokens.numpy()]))
    return tokens, about_means(association)


def _written_of_previous(written: dict[int, Tensor], looks: dict[int, list[float]]) -> dict[int, Tensor]:
    """Layer -> what the earlier head that looks at the previous token most writes of each token ``[N, d]``."""
    found = {}
    for layer in written:
        before = [(looks[k][h], k, h) for k in looks if k < layer and k in written for h in range(len(looks[k]))]
        if before:
            _, k, h = max(before)
            found[layer] = written[k][h]
    return found


def _direct_scores(matrix: Tensor, association: Tensor) -> dict[str, Tensor]:
    """Quantity -> score of each token ``[N]``, of a head's matrix ``[N, N]`` about its means."""
    return {
        "weights_identity": standardised(matrix, 0),
        "weights_identity_null": standardised(matrix, 1),
        "weights_bigram": correlation(matrix, association),
        "weights_bigram_null": correlation(matrix, association.roll(1, 0)),
    }


def _scores_through_previous(matrix: Tensor, association: Tensor) -> dict[str, Tensor]:
    """As :func:`_direct_scores`, of the matrix after the head that looks at the previous token."""
    return {
        "weights_previous_identity": standardised(matrix, 0),
        "weights_previous_bigram": correlation(matrix, association),
        "weights_previous_bigram_null": correlation(matrix, association.roll(1, 0)),
    }


def about_means(matrix: Tensor) -> Tensor:
    """The matrix about the means of its columns and then of its rows: a bias or a shift of all logits does not count."""
    matrix = matrix - matrix.mean(0)
    return matrix - matrix.mean(1, keepdim=True)


def standardised(matrix: Tensor, shift: int) -> Tensor:
    """Entry ``x + shift`` of each row x in standard deviations of the row: ``[N]``."""
    spread = matrix.std(1).clamp(min=1e-300)
    return matrix.roll(-shift, 1).diagonal() / spread


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two matrices ``[N, M]`` about their means: ``[N]``."""
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
    """Layer -> what each head writes to the stream ``[H, N, d]`` when its block is given N states ``[N, d]`` alone.

    ``given`` are the same states for all blocks, or states of its own for each block.
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
    """What heads of a predictive-coding model write of errors ``[N, d]``, at the place of errors in the stream."""
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
    """The states ``[N, d]`` of a layer as N sequences of one token ``[N, 1, d]``; None for a layer that has none."""
    return states[layer][:, None].to(h) if layer in states else None


HEAD_WEIGHTS = Probe(
    "head_weights",
    head_weights,
    "per head, `W_U W_OV W_E^T` against the identity and a bigram; the same after the head of the previous token",
    (
        Quantity(
            "weights_identity",
            "weights: identity",
            "entry of x itself in standard deviations of row x, mean over x",
            "head",
            "Above 0 the head copies, below 0 it suppresses. With tied embeddings untrained heads reach `1 / sqrt(d)`.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "weights_identity_null",
            "weights: identity, null",
            "the same with the entry of another token",
            "head",
            "It is near 0 where no token is special.",
            WITH_ITS_NULL,
        ),
        Quantity(
            "weights_bigram",
            "weights: bigram",
            "mean correlation of row x with `log p(y | x) - log p(y)` of an interpolated bigram",
            "head",
            "Above 0 the head writes what follows a token, below 0 it takes that away.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "weights_bigram_null",
            "weights: bigram, null",
            "the same with the bigram of another token",
            "head",
            "It is near 0 where rows of different tokens have nothing in common.",
            WITH_ITS_NULL,
        ),
        Quantity(
            "weights_previous_identity",
            "weights after previous token: identity",
            "`weights_identity` of what the head makes of x as the previous token",
            "head",
            "Above 0 the head writes the previous token again.",
            SAME_TOKENIZER,
        ),
        Quantity(
            "weights_previous_bigram",
            "weights behind previous token: bigram",
            "`weights_bigram` of what the head makes of x as the previous token",
            "head",
            "Below 0 it takes away what the previous token predicts, as a head that carries errors does.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "weights_previous_bigram_null",
            "weights after previous token: bigram, null",
            "the same with the bigram of another token",
            "head",
            "It is near 0 where rows of different tokens have nothing in common.",
            WITH_ITS_NULL,
        ),
        Quantity(
            "previous_attention",
            "attention to the previous token",
            "mean weight of the head on the token before",
            "head",
            "At 1 the head looks at nothing else.",
            SAME_TOKENIZER,
        ),
    ),
    control="another token's entry or bigram",
)
