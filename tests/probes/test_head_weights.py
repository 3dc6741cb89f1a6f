"""Heads' weights against matrices multiplied by hand: copying, suppression, and what stands behind another head."""

import numpy as np
import pytest
import torch
from helpers.architectures import small_model
from helpers.planted import D, H, V, planted, subject_of

from lensbench.data.ngram import KneserNeyBigram
from lensbench.models import build
from lensbench.probes.head_weights import about_means, previous_attention, written_by
from lensbench.probes.registry import PROBES

HEAD = D // H


def model_with(sign: float):
    """Head 0 of block 1 writes ``sign R^T R`` of the (normed) token's row of the unembedding, so copies or suppresses."""
    model = planted("none", seed=4)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        shape = torch.randn(HEAD, D, generator=torch.Generator().manual_seed(0))
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[:HEAD] = shape
        attention.o_proj.weight[:, :HEAD] = sign * shape.T
    return model


def frame_of(model, **changes):
    return PROBES["head_weights"].measure(subject_of(model, **changes)).frame()


def at(frame, quantity, column="value"):
    return frame[frame["quantity"] == quantity].set_index(["layer", "other"])[column].astype(float)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_copying_is_above_zero_and_suppression_below(sign):
    frame = frame_of(model_with(sign))
    score, null = at(frame, "weights_identity"), at(frame, "weights_identity_null")
    assert (sign * score).idxmax() == (1, 0)
    low, high = (at(frame, "weights_identity", c)[1, 0] for c in ("ci_low", "ci_high"))
    assert min(sign * low, sign * high) > 0.5
    assert abs(null[1, 0]) < 0.5


def test_scores_are_those_of_the_matrix_by_hand():
    model = model_with(1.0)
    subject = subject_of(model)
    frame = PROBES["head_weights"].measure(subject).frame()
    tokens = np.unique(subject.words.fit_windows.ids)
    embedded = model.model.embed_tokens.weight[tokens]
    attention, norm = model.model.layers[2].self_attn, model.model.layers[2].input_layernorm
    rows = slice(2 * HEAD, 3 * HEAD)
    written = norm(embedded) @ attention.v_proj.weight[rows].T @ attention.o_proj.weight[:, rows].T
    matrix = (written @ torch.diag(model.model.norm.weight) @ model.lm_head.weight[tokens].T).detach().double()
    matrix = about_means(matrix)
    expected = (matrix.diagonal() / matrix.std(1)).mean()
    assert at(frame, "weights_identity")[2, 2] == pytest.approx(float(expected), rel=1e-3)
    bigram = subject.words.bigram()
    p = np.stack([bigram.distribution(int(t))[tokens] for t in tokens])
    association = about_means(torch.from_numpy(np.log(p) - np.log(bigram.continuation[tokens])))
    by_hand = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(matrix.numpy(), association.numpy(), strict=True)])
    assert at(frame, "weights_bigram")[2, 2] == pytest.approx(by_hand, rel=1e-3)


def test_the_previous_token_comes_through_the_earlier_head_that_looks_at_it_most():
    subject = subject_of(planted("none"))
    looks = previous_attention(subject)
    frame = PROBES["head_weights"].measure(subject).frame()
    assert at(frame, "previous_attention")[1, 2] == pytest.approx(looks[1][2])
    composed = at(frame, "weights_previous_identity")
    assert {layer for layer, _ in composed.index} == {1, 2}
    tokens = torch.from_numpy(np.unique(subject.words.fit_windows.ids))
    embedded = subject.stream.model.get_input_embeddings()(tokens).detach()
    first = written_by(subject.stream, embedded, tokens)[0][int(np.argmax(looks[0]))]
    second = written_by(subject.stream, {1: first}, tokens)
    assert list(second) == [1]
    stream = subject.stream
    outputs = (stream.readout.weight[tokens] @ stream.readout.gain(D)).double()
    through = about_means(second[1][3].double() @ outputs.T)
    assert composed[1, 3] == pytest.approx(float((through.diagonal() / through.std(1)).mean()), rel=1e-3)


def test_attention_to_the_previous_token_is_that_of_the_weights():
    subject = subject_of(planted("none"), count=8)
    looks = previous_attention(subject)
    subject.stream.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = subject.stream.model(torch.from_numpy(subject.windows.ids), output_attentions=True).attentions
    for layer, each in looks.items():
        before = weights[layer].diagonal(-1, -2, -1)[..., 1:]
        np.testing.assert_allclose(each, before.mean((0, 2)).numpy(), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "bloom"])
def test_other_architectures_are_read_the_same_way(architecture):
    model = small_model(architecture)
    frame = frame_of(model, bigram=lambda: KneserNeyBigram.fit(np.arange(200) % V, 128))
    assert len(at(frame, "weights_identity")) == 12
    assert at(frame, "weights_identity").notna().all()


def test_heads_of_a_predictive_coding_model_copy_by_construction():
    shape = {"vocab_size": V, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}
    frame = frame_of(build("predictive-coding", seed=0, **shape).eval())
    # V^T V is positive semi-definite: every head writes towards the token.
    assert (at(frame, "weights_identity", "ci_low") > 0).all()


def test_models_without_heads_say_so():
    assert "no attention weights" in frame_of(small_model("mamba"))["reason"][0]
