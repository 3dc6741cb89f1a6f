"""Closed forms against scikit-learn, KL and its gradient against autograd, dev's choices against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.synthetic import KINDS, SyntheticStream, capture_of, in_double, orthogonal, random_maps, read_out, true_kl
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from lensbench.lenses.closed import fit_each, fit_rotated, fit_shared, fit_shared_bias
from lensbench.lenses.maps import AffineMaps, rotated_maps
from lensbench.lenses.moments import Moments, MomentSums
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.lenses.refine import LogPartition, kl_gradient, kl_objective, orthogonalised, refine
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.search import Choice, DevSearch, pad_direction, padded_kl
from lensbench.streams.kl import Tokens, Vocabulary
from lensbench.streams.rotated import RotatedView

D, LAYERS, N = 7, 3, 160
RIDGES = (1e-4, 0.03, 1.0, 100.0)


def random_capture(seed=0, *, d=D, layers=LAYERS, tokens=N, vocab=30, dtype=torch.float64, **how):
    """Correlated layers with means and scales of their own."""
    random = torch.Generator().manual_seed(seed)
    final = torch.randn(tokens, d, generator=random, dtype=dtype)
    states = []
    for layer in range(layers):
        mixing = torch.randn(d, d, generator=random, dtype=dtype)
        noise = torch.randn(tokens, d, generator=random, dtype=dtype)
        states.append((final @ mixing + (layers - layer) * noise) * (1 + layer) + torch.randn(d, generator=random))
    readout = read_out(d, vocab, dtype=dtype, seed=seed, **how)
    return readout, capture_of(readout, torch.stack([*states, final + 0.3]))


def unit(states):
    """The unit of a ridge, by definition: lower median of the eigenvalues of the inputs' covariance."""
    values = np.sort(np.linalg.eigvalsh(np.cov(states.T, bias=True)))
    return values[(len(values) - 1) // 2]


def assert_same_map(maps, row, sklearn_model, matrix_added=0.0):
    np.testing.assert_allclose(maps.matrix[row].numpy(), sklearn_model.coef_ + matrix_added, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(maps.offset[row].numpy(), sklearn_model.intercept_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", RIDGES)
def test_prior_zero_is_ridge_regression_to_the_final_state(ridge):
    _, captured = random_capture()
    maps = RidgePath(Moments.of(captured), "zero").solve(ridge)
    for layer in range(LAYERS):
        h, r = captured.states[layer].numpy(), captured.states[-1].numpy()
        assert_same_map(maps, layer, Ridge(alpha=N * ridge * unit(h)).fit(h, r))


@pytest.mark.parametrize("ridge", RIDGES)
def test_prior_identity_is_ridge_regression_to_what_is_still_missing(ridge):
    _, captured = random_capture()
    maps = RidgePath(Moments.of(captured), "identity").solve(ridge)
    for layer in range(LAYERS):
        h, r = captured.states[layer].numpy(), captured.states[-1].numpy()
        assert_same_map(maps, layer, Ridge(alpha=N * ridge * unit(h)).fit(h, r - h), np.eye(D))


def test_each_regression_may_have_a_ridge_of_its_own():
    _, captured = random_capture()
    path = RidgePath(Moments.of(captured), "zero")
    together = path.solve(torch.tensor([0.01, 1.0, 30.0]))
    for layer, ridge in enumerate((0.01, 1.0, 30.0)):
        torch.testing.assert_close(together.matrix[layer], path.solve(ridge).matrix[layer])


@given(st.integers(0, 1000), st.sampled_from(RIDGES), st.sampled_from(["own", "shared", "shared_bias"]))
@settings(deadline=None, max_examples=25)
def test_prior_zero_predicts_the_same_on_rotated_states(seed, ridge, kind):
    _, captured = random_capture(seed)
    q = orthogonal(D, torch.Generator().manual_seed(seed)).double()
    q = torch.linalg.qr(q)[0]  # orthogonal to float64
    turned = replace(captured, states=torch.cat([captured.states[:-1] @ q.T, captured.states[-1:]]))

    def predictions(c):
        moments = Moments.of(c)
        regressions = {"own": moments, "shared": moments.pooled(range(LAYERS)), "shared_bias": moments.pooled_within()}
        maps = RidgePath(regressions[kind], "zero").solve(ridge)
        return c.states[:-1] @ maps.matrix.transpose(-1, -2) + maps.offset[:, None]

    torch.testing.assert_close(predictions(turned), predictions(captured), rtol=1e-8, atol=1e-8)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_own_lenses_of_a_rotated_view_predict_the_same_and_have_the_same_unit(seed):
    _, captured = random_capture(seed)
    moments = Moments.of(captured)
    view = RotatedView.random(moments.covariance, seed=seed, variance=0.9)
    assert 0 < view.rank <= D
    plain, turned = RidgePath(moments, "zero"), RidgePath(moments.rotated(view), "zero")
    torch.testing.assert_close(turned.unit, plain.unit, rtol=1e-9, atol=0)
    back = rotated_maps(turned.solve(0.1), view)
    torch.testing.assert_close(back.matrix, plain.solve(0.1).matrix, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.offset, plain.solve(0.1).offset, rtol=1e-8, atol=1e-8)


def test_rotated_moments_are_those_of_the_rotated_states():
    _, captured = random_capture()
    moments = Moments.of(captured)
    view = RotatedView.random(moments.covariance, seed=3, variance=1.0)
    direct, derived = Moments.of(view.apply(captured)), moments.rotated(view)
    for name in ("mean", "covariance", "cross", "target_mean"):
        torch.testing.assert_close(getattr(derived, name), getattr(direct, name), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_token_weights_are_repetitions(seed):
    _, captured = random_capture(seed, tokens=24)
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, 24))
    counts[0] = 2
    repeated = captured.take(torch.repeat_interleave(torch.arange(24), counts))
    for name in ("mean", "covariance", "cross", "target_mean"):
        a, b = (getattr(m, name) for m in (Moments.of(captured, counts), Moments.of(repeated)))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def centred_moments(states, weights=None):
    """Moments by definition, centred before they are multiplied: per layer in numpy's float64."""
    states = states.double().numpy()
    share = np.full(states.shape[1], 1.0) if weights is None else weights.double().numpy()
    share = share / share.sum()
    mean = (states * share[None, :, None]).sum(1)
    h = states - mean[:, None]
    covariance = np.stack([x.T @ (share[:, None] * x) for x in h[:-1]])
    cross = np.stack([h[-1].T @ (share[:, None] * x) for x in h[:-1]])
    return {"mean": mean[:-1], "covariance": covariance, "cross": cross, "target_mean": mean[-1]}


@given(st.integers(0, 1000), st.lists(st.integers(1, 90), max_size=8), st.booleans(), st.sampled_from([0.0, 1e4]))
@settings(deadline=None, max_examples=25)
def test_moments_summed_block_by_block_are_those_of_all_tokens(seed, sizes, weighted, mean):
    _, captured = random_capture(seed)
    random = torch.Generator().manual_seed(seed)
    states = captured.states + mean * torch.randn(LAYERS + 1, 1, D, generator=random, dtype=torch.float64)
    weights = torch.randint(0, 4, (N,), generator=random) if weighted else None
    sums = MomentSums()
    for rows in np.split(np.arange(N), np.minimum(np.cumsum(sizes, dtype=int), N)):
        if len(rows):
            sums.add(states[:, rows], None if weights is None else weights[rows])
    found = sums.moments()
    for name, expected in centred_moments(states, weights).items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-9, atol=1e-9 * size, err_msg=name)


def test_a_large_mean_costs_float32_states_no_digits():
    """float32 states with a mean of 1e4 hold three digits of their own; sums in float32 would lose the covariance whole."""
    _, captured = random_capture()
    states = (captured.states + 1e4).float()
    found = Moments.of(replace(captured, states=states))
    for name, expected in centred_moments(states).items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-9, atol=1e-9 * size, err_msg=name)


@pytest.mark.parametrize("begin", [0, 30])
def test_a_block_that_counts_for_nothing_leaves_moments_as_they_are(begin):
    """Where a block is one document, a third of the blocks are such when documents are drawn with replacement."""
    _, captured = random_capture()
    weights = torch.ones(N)
    weights[begin : begin + 30] = 0
    sums = MomentSums()
    for rows in torch.arange(N).split(30):
        sums.add(captured.states[:, rows], weights[rows])
    found = sums.moments()
    for name, expected in centred_moments(captured.states, weights).items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-9, atol=1e-9 * size, err_msg=name)


def test_moments_take_the_memory_of_their_sums():
    """Of wide states these fill most of the memory: a copy would double it."""
    _, captured = random_capture()
    sums = MomentSums()
    sums.add(captured.states)
    places = sums.second.data_ptr(), sums.cross.data_ptr()
    found = sums.moments()
    assert (found.covariance.data_ptr(), found.cross.data_ptr()) == places
    with pytest.raises(ValueError, match="no token"):
        sums.moments()


def test_moments_of_no_token_are_refused():
    with pytest.raises(ValueError, match="no token"):
        MomentSums().moments()


def stacked(captured, layers):
    h = np.concatenate([captured.states[k].numpy() for k in layers])
    return h, np.concatenate([captured.states[-1].numpy()] * len(layers))


@pytest.mark.parametrize("ridge", RIDGES)
def test_shared_lens_is_ridge_on_the_stacked_layers_and_leave_one_out_never_sees_its_layer(ridge):
    _, captured = random_capture()
    for layers in ([0, 1, 2], [1, 2], [0, 2], [0, 1]):
        h, r = stacked(captured, layers)
        model = Ridge(alpha=len(h) * ridge * unit(h)).fit(h, r)
        assert_same_map(RidgePath(Moments.of(captured).pooled(layers), "zero").solve(ridge), 0, model)
        for gone in set(range(LAYERS)) - set(layers):
            states = captured.states.clone()
            states[gone] = torch.nan
            blind = RidgePath(Moments.of(replace(captured, states=states)).pooled(layers), "zero").solve(ridge)
            assert_same_map(blind, 0, model)


@pytest.mark.parametrize("ridge", RIDGES)
def test_shared_lens_with_a_bias_per_layer_is_one_matrix_on_layer_centred_states(ridge):
    _, captured = random_capture()
    centred = np.concatenate([h - h.mean(0) for h in captured.states[:-1].numpy()])
    r = captured.states[-1].numpy()
    model = Ridge(alpha=len(centred) * ridge * unit(centred), fit_intercept=False)
    model.fit(centred, np.tile(r - r.mean(0), (LAYERS, 1)))
    maps = RidgePath(Moments.of(captured).pooled_within(), "zero").solve(ridge)
    for layer in range(LAYERS):
        np.testing.assert_allclose(maps.matrix[layer], model.coef_, rtol=1e-6, atol=1e-8)
        intercept = r.mean(0) - model.coef_ @ captured.states[layer].numpy().mean(0)
        np.testing.assert_allclose(maps.offset[layer], intercept, rtol=1e-6, atol=1e-8)


def test_a_state_wider_than_what_it_holds_keeps_its_unit():
    _, captured = random_capture(dtype=torch.float64)
    wide = torch.cat([captured.states, torch.zeros(LAYERS + 1, N, 20, dtype=torch.float64)], -1)
    plain = RidgePath(Moments.of(captured), "zero")
    widened = RidgePath(Moments.of(replace(captured, states=wide)), "zero")
    torch.testing.assert_close(widened.unit, plain.unit, rtol=1e-9, atol=0)
    torch.testing.assert_close(widened.solve(0.1).matrix[:, :D, :D], plain.solve(0.1).matrix, rtol=1e-8, atol=1e-9)


# KL and its gradient


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_objective_and_gradient_are_those_of_log_softmax(bias, norm, monkeypatch):
    monkeypatch.setattr("lensbench.lenses.refine.TOKEN_BLOCK", 7)
    readout = read_out(9, 40, norm=norm, bias=bias, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    r, x = (3 * torch.randn(25, 9, generator=random, dtype=torch.float64) for _ in range(2))
    captured = capture_of(readout, r[None])
    x = x.requires_grad_()
    ours = kl_objective(readout, x, captured.expected, captured.entropy_term)
    (gradient,) = torch.autograd.grad(ours, x)
    log_p, log_q = readout(r).log_softmax(-1), readout(x).log_softmax(-1)
    reference = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, x)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_log_partition_passes_on_any_gradient_and_large_logits(bias):
    readout = read_out(6, 20, bias=bias, dtype=torch.float64)
    n = (300 * torch.randn(8, 6, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(8, dtype=torch.float64)
    ours = LogPartition.apply(n, readout.weight, readout.bias)
    reference = readout.unembedding(n).logsumexp(-1)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad((weights * v).sum(), n)[0] for v in (ours, reference))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


HEADS = {"plain": {}, "scaled": {"scale": 0.3}, "capped": {"softcap": 2.0}, "both": {"scale": 0.7, "softcap": 1.5}}
"""What a model may do to its head's output."""


def behind_head(readout, kind):
    for name, value in HEADS[kind].items():
        setattr(readout, name, value)
    return readout


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradient_of_refinement_is_that_of_kl_by_definition(norm, bias, head, monkeypatch):
    monkeypatch.setattr("lensbench.lenses.refine.ROW_BLOCK", 7)
    readout = behind_head(read_out(9, 40, norm=norm, bias=bias, dtype=torch.float64), head)
    random = torch.Generator().manual_seed(1)
    r, x = (3 * torch.randn(25, 9, generator=random, dtype=torch.float64) for _ in range(2))
    captured = capture_of(readout, r[None])
    n = readout.final_norm(x).requires_grad_()
    # By definition: from the modules and numbers themselves, not from the read-out's own folding and capping.
    scale, cap = HEADS[head].get("scale", 1.0), HEADS[head].get("softcap")

    def log_softmax(states):
        logits = scale * readout.unembedding(states)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    log_p, log_q = log_softmax(readout.final_norm(r)), log_softmax(n)
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), n)
    assert expected.abs().max() > 0.01
    tokens = Tokens(captured.expected, captured.entropy_term, captured.states[-1])
    found = kl_gradient(readout, n.detach(), tokens, readout.weight, readout.bias)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# The vocabulary that refinement sees


@pytest.mark.parametrize("rows", [30, 31, 4096])
@pytest.mark.parametrize("bias", [False, True])
def test_a_small_vocabulary_is_seen_exactly(bias, rows):
    readout, captured = random_capture(vocab=30, bias=bias)
    weight, offset = Vocabulary(readout, captured.mean_p, rows, torch.Generator()).draw()
    assert torch.equal(weight, readout.weight)
    assert (offset is None) if not bias else torch.equal(offset, readout.bias)


def test_capped_logits_are_seen_exactly():
    readout, captured = random_capture(vocab=30, bias=True)
    readout.softcap = 2.0
    weight, offset = Vocabulary(readout, captured.mean_p, 10, torch.Generator()).draw()
    assert torch.equal(weight, readout.weight)
    assert torch.equal(offset, readout.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_sampled_vocabulary_is_unbiased_for_the_partition_and_nearly_for_the_gradient(scale, bias):
    readout, captured = random_capture(vocab=300, bias=bias, tokens=40)
    readout.scale = scale
    captured = capture_of(readout, captured.states)
    vocabulary = Vocabulary(readout, captured.mean_p, 60, torch.Generator().manual_seed(0))
    n = readout.final_norm(captured.states[-1])
    logits = scale * readout.unembedding(n)
    draws, moments = [], []
    for _ in range(1500):
        weight, offset = vocabulary.draw()
        assert weight.shape == (60, D)
        sampled = n @ weight.T + offset
        draws.append(sampled.exp().sum(-1))
        moments.append(sampled.softmax(-1) @ weight)
    draws, moments = torch.stack(draws), torch.stack(moments)
    error = draws.std(0) / len(draws) ** 0.5
    full = logits.exp().sum(-1)
    assert (error > 0).all()
    assert (error < 0.02 * full).all()
    deviation = (draws.mean(0) - full) / error
    assert deviation.abs().max() < 4
    assert abs(float((draws.mean(0) / full).mean()) - 1) < 0.01
    exact = logits.softmax(-1) @ readout.weight
    assert (moments.mean(0) - exact).norm() < 0.05 * exact.norm()


def test_the_most_probable_words_are_in_every_sample():
    readout, captured = random_capture(vocab=300)
    vocabulary = Vocabulary(readout, captured.mean_p, 60, torch.Generator().manual_seed(0))
    top = readout.weight[torch.from_numpy(np.argsort(-captured.mean_p.numpy())[:30].copy())]
    first, second = vocabulary.draw(), vocabulary.draw()
    for weight, offset in (first, second):
        assert torch.equal(weight[:30], top)
        assert not offset[:30].any()
        # Of the other words, none is one of them.
        assert not (weight[30:, None] == top[None]).all(-1).any()
    assert not torch.equal(first[0], second[0])


# Updates of refinement


def with_spectrum(values, a, b, seed):
    """Matrices ``[M, a, b]`` of given singular values ``[M, a]``, with their singular vectors."""
    random = torch.Generator().manual_seed(seed)
    u = torch.stack([orthogonal(a, random).double() for _ in values])
    v = torch.stack([orthogonal(b, random).double()[:, :a] for _ in values])
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    return u, v, (u * values[:, None]) @ v.transpose(1, 2)


@given(st.integers(0, 1000), st.sampled_from([(6, 6), (6, 7), (3, 11)]), st.sampled_from([1e-8, 1.0, 1e6]))
@settings(deadline=None, max_examples=20)
def test_orthogonalised_brings_singular_values_to_about_one_and_keeps_the_vectors(seed, shape, size):
    a, b = shape
    random = torch.Generator().manual_seed(seed)
    # Down to a hundredth of the largest; each matrix of the stack with a spectrum of its own.
    values = size * 10 ** (-2 * torch.rand(4, a, generator=random, dtype=torch.float64))
    u, v, matrices = with_spectrum(values, a, b, seed)
    found = u.transpose(1, 2) @ orthogonalised(matrices) @ v
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert float(diagonal.min()) > 0.6
    assert float(diagonal.max()) < 1.3
    assert float((found - torch.diag_embed(diagonal)).abs().max()) < 1e-8
    # Nothing outside of the matrix's own row space.
    outside = orthogonalised(matrices) - orthogonalised(matrices) @ v @ v.transpose(1, 2)
    assert float(outside.abs().max()) < 1e-8


def test_orthogonalised_in_half_precision_is_what_it_is_in_float32_but_for_rounding():
    matrices = torch.randn(3, 64, 65, generator=torch.Generator().manual_seed(0))
    found, expected = orthogonalised(matrices, half=True), orthogonalised(matrices)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert not orthogonalised(torch.zeros(2, 5, 6), half=True).any()


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradient_in_half_precision_is_that_of_float32_but_for_rounding_and_always_finite(bias):
    readout = read_out(64, 300, bias=bias)
    random = torch.Generator().manual_seed(2)
    r, x = (torch.randn(40, 64, generator=random) for _ in range(2))
    captured = capture_of(readout, r[None])
    known = Tokens(captured.expected, captured.entropy_term, captured.states[-1])
    n = readout.final_norm(x)
    expected = kl_gradient(readout, n, known, readout.weight, readout.bias)
    found = kl_gradient(readout, n, known, readout.weight.half(), readout.bias)
    assert float((found - expected).norm() / expected.norm()) < 0.01
    n[3], n[7, 5] = 1e6, -1e9
    loud = kl_gradient(readout, n, known, readout.weight.half(), readout.bias)
    assert torch.isfinite(loud).all()
    others = [k for k in range(len(n)) if k not in (3, 7)]
    torch.testing.assert_close(loud[others], found[others])


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_orthogonalised_turns_with_its_input_whatever_its_length(seed):
    random = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, 5, 6, generator=random, dtype=torch.float64)
    left, right = (torch.linalg.qr(orthogonal(k, random).double())[0] for k in (5, 6))
    turned = left @ orthogonalised(matrices) @ right.T
    torch.testing.assert_close(orthogonalised(7.0 * left @ matrices @ right.T), turned, rtol=1e-9, atol=1e-9)
    assert not orthogonalised(torch.zeros(2, 5, 6)).any()


# The pad


@pytest.mark.parametrize(("norm", "read"), [("rms", None), ("layer", None), ("rms", 8)])
def test_pad_lies_where_the_norm_looks_and_is_hardly_visible(norm, read):
    d = 12
    readout = read_out(d, 50, norm=norm, read=read, dtype=torch.float64)
    random = torch.Generator().manual_seed(2)
    states = 2 * torch.randn(300, d, generator=random, dtype=torch.float64) + 0.4
    pad = pad_direction(readout, states)
    if norm == "layer":
        assert abs(pad.sum()) < 1e-9 * pad.norm()
    if read:
        assert pad[read:].abs().max() < 1e-9 * pad.norm()

    def seen(v):
        """The state as far as the norm depends on it."""
        return v - v.mean(-1, keepdim=True) if norm == "layer" else v[..., : read or d]

    gain = readout.final_norm.gain if norm == "rms" else readout.final_norm.weight

    def visible(v):
        v = seen(v)
        logits = (gain * v / v.norm(dim=-1, keepdim=True)) @ readout.weight.T
        return (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)

    others = torch.randn(5000, d, generator=random, dtype=torch.float64)
    assert visible(pad) < visible(others).min()
    assert pad @ states.mean(0) > 0
    dimensions = {"layer": d - 1}.get(norm, read or d)
    rms = seen(states).pow(2).sum(-1).mean().div(dimensions).sqrt()
    assert float(pad.norm()) == pytest.approx(float(rms * dimensions**0.5), rel=1e-9)


def test_pad_follows_the_sign_of_the_mean_final_state():
    readout = read_out(10, 50, dtype=torch.float64)
    states = torch.randn(200, 10, dtype=torch.float64) + 0.5
    torch.testing.assert_close(pad_direction(readout, -states), -pad_direction(readout, states))


def test_no_pad_where_the_norm_is_no_gain_over_a_scale():
    readout = read_out(5, 20, dtype=torch.float64)
    readout.final_norm = Bent()
    assert not pad_direction(readout, torch.randn(50, 5, dtype=torch.float64)).any()


# Choices on dev


RECIPE = FitRecipe(refits=0, rotations=2)


def stream_search(kind, recipe=RECIPE, seed=0):
    stream = SyntheticStream(kind, d=24, layers=4, vocab=80, seed=seed)
    captured = stream.capture(1200, seed=seed)
    dev = stream.capture(320, seed=seed + 1, constant=captured.mean_p)
    search = DevSearch(stream.readout, dev, recipe, pad_direction(stream.readout, captured.states[-1]))
    return stream, captured, dev, search


class Bent(torch.nn.Module):
    """A norm that is no matrix over a scale."""

    def forward(self, x):
        return torch.tanh(x)


KL_READOUTS = {
    "rms": {}, "rms of a part": {"read": 9}, "rms with head bias": {"bias": True}, "layer": {"norm": "layer"},
    "layer with head bias": {"norm": "layer", "bias": True}, "tanh": {"bias": True}, "tanh capped": {"bias": True},
    "capped": {"bias": True}, "scaled": {"norm": "layer", "bias": True}, "scaled and capped": {},
}  # fmt: skip


@pytest.mark.parametrize("blocks", [1024, 8])
@pytest.mark.parametrize("kind", KL_READOUTS)
def test_kl_of_many_pads_is_that_of_each_padded_map_by_definition(kind, blocks, monkeypatch):
    for name in (
        "lensbench.lenses.search.TOKEN_BLOCK",
        "lensbench.lenses.search.VOCABULARY_BLOCK",
        "lensbench.streams.kl.ROW_BLOCK",
    ):
        monkeypatch.setattr(name, blocks)
    readout = read_out(12, 50, **KL_READOUTS[kind])
    if "tanh" in kind:
        readout.final_norm = Bent()
    readout.softcap = 2.0 if "capped" in kind else None
    readout.scale = 0.3 if "scaled" in kind else 1.0
    random = torch.Generator().manual_seed(3)
    dev = capture_of(readout, 2 * torch.randn(4, 45, 12, generator=random) + 0.3)
    maps = random_maps(3, 12, seed=1)
    direction = torch.randn(12, generator=random, dtype=torch.float64)  # any will do
    search = DevSearch(readout, dev, FitRecipe(), direction)
    pads = [0.0, 0.1, 0.7, 3.0]
    for lenses, layers in ((maps[[1]], [2]), (maps, [0, 1, 2]), (maps[[0]], [0, 2])):
        together = search.kl_of_pads(lenses, layers, pads)
        expected = [
            true_kl(readout, dev, AffineMaps(lenses.matrix, lenses.offset + a * direction), layers) for a in pads
        ]
        assert np.ptp(expected) > 1e-3  # the pad shows
        np.testing.assert_allclose(together.numpy(), expected, rtol=1e-5, atol=1e-5)
        for a, kl in zip(pads, expected, strict=True):
            assert search.kl(search.padded(lenses, a), layers) == pytest.approx(kl, rel=1e-5, abs=1e-5)


def test_searches_of_a_large_vocabulary_are_unbiased_estimates_that_stay_paired():
    """Against KL by definition: within its errors, and far closer for the difference of two lenses alike."""
    readout = read_out(12, 10_000)
    random = torch.Generator().manual_seed(3)
    dev = capture_of(readout, 2 * torch.randn(2, 640, 12, generator=random) + 0.3)
    direction, maps, pads = (
        torch.randn(12, generator=random, dtype=torch.float64),
        random_maps(1, 12, seed=1),
        [0.0, 3.0],
    )
    off = []
    for seed in range(6):
        turned = torch.from_numpy(np.random.default_rng(seed).permutation(640))  # other states are read out exactly
        search = DevSearch(readout, dev.take(turned), FitRecipe(), direction)
        found = search.kl_of_pads(maps, [1], pads).numpy()
        exact = [true_kl(readout, dev, AffineMaps(maps.matrix, maps.offset + a * direction), [1]) for a in pads]
        off.append(found - exact)
    assert 0 < np.abs(off).max() < 0.1 < np.ptp(exact)
    error = np.std(off, axis=0, ddof=1) / len(off) ** 0.5
    assert (np.abs(np.mean(off, axis=0)) < 4 * error).all()
    assert np.diff(off, axis=1).std() < np.std(off)


def dealt(search, layers, monkeypatch):
    """Which dev tokens of each layer a lens is chosen on, ``[layers, N]`` counts; and its KL."""
    from lensbench.lenses import search as search_module

    counts = np.zeros((len(layers), len(search.dev)), int)
    original = padded_kl

    where = {
        row.numpy().tobytes(): (k, t)
        for k, layer in enumerate(layers)
        for t, row in enumerate(search.dev.states[layer])
    }

    def watched(readout, x, *rest):
        for row in x:  # the identity leaves a state as it is
            counts[where[row.numpy().tobytes()]] += 1
        return original(readout, x, *rest)

    monkeypatch.setattr(search_module, "padded_kl", watched)
    kl = search.kl(AffineMaps.identity(24), layers)
    monkeypatch.setattr(search_module, "padded_kl", original)
    return counts, kl


@pytest.mark.parametrize(("limit", "each"), [(16384, 320), (1280, 320), (640, 160), (320, 80), (160, 40), (80, 20)])
def test_a_lens_of_several_layers_sees_each_of_them_equally_often_on_dealt_tokens(limit, each, monkeypatch):
    stream, _, dev, search = stream_search("fresh", FitRecipe(pooled_dev_tokens=limit))
    layers = [0, 1, 2, 3]
    counts, kl = dealt(search, layers, monkeypatch)
    assert (counts.sum(1) == each).all()
    assert counts.sum() <= limit
    assert counts.max() == 1
    assert counts.sum(0).max() - counts.sum(0).min() <= 1
    direct = [
        true_kl(stream.readout, dev.take(torch.from_numpy(counts[k] > 0)), AffineMaps.identity(24), [layer])
        for k, layer in enumerate(layers)
    ]
    assert kl == pytest.approx(np.mean(direct), abs=1e-5)


def test_a_lens_of_one_layer_is_chosen_on_all_dev_tokens(monkeypatch):
    """The limit is one of lenses of several layers."""
    _, _, _, search = stream_search("fresh", FitRecipe(pooled_dev_tokens=100))
    counts, _ = dealt(search, [2], monkeypatch)
    assert (counts == 1).all()


def brute_force(search, path, layers):
    """KL at every ridge and pad of the grid."""
    grid = np.empty((len(search.recipe.ridges), len(search.recipe.pads)))
    for a, ridge in enumerate(search.recipe.ridges):
        maps = path.solve(ridge)
        for b, pad in enumerate(search.recipe.pads):
            padded = AffineMaps(maps.matrix, maps.offset + pad * search.pad)
            grid[a, b] = true_kl(search.readout, search.dev, padded, layers)
    return grid


@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_the_best_of_the_grid_and_says_its_kl(kind):
    recipe = FitRecipe(ridges=(1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), pads=tuple(i / 5 for i in range(6)))
    _, captured, _, search = stream_search(kind, recipe)
    moments = Moments.of(captured)
    for layers in ([0], [2], [0, 1, 2, 3]):
        path = RidgePath(moments.pooled(layers), "zero")
        found, grid = search.best(path.solve, layers), brute_force(search, path, layers)
        at = grid[recipe.ridges.index(found.ridge), recipe.pads.index(found.pad)]
        assert found.dev_kl == pytest.approx(at, abs=1e-4)
        assert found.dev_kl <= grid.min() + 1e-3


@pytest.mark.parametrize("kind", ["fresh", "overlapping"])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1])
def test_headline_lens_has_the_strongest_ridge_within_the_tolerance(kind, tolerance):
    recipe = FitRecipe(ridges=(1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), pads=(0.0, 0.3, 0.6, 0.9))
    _, captured, dev, search = stream_search(kind, recipe)
    moments = Moments.of(captured)
    fitted = fit_each(search, moments, "identity", tolerance=tolerance)
    for layer in range(4):
        best_pads = brute_force(search, RidgePath(moments.layer([layer]), "identity"), [layer]).min(1)
        allowed = best_pads.min() + tolerance * max(0.0, float(dev.constant_kl.mean()) - best_pads.min())
        strongest = max(r for r, kl in zip(recipe.ridges, best_pads, strict=True) if kl <= allowed + 1e-6)
        assert fitted.ridges[layer] == strongest


def test_tolerance_is_a_share_of_what_the_lens_knows():
    _, _, _, search = stream_search("fresh")
    best, k0 = 0.5, search.constant_kl
    path = [Choice(1e-3, 0.0, 0.6), Choice(1e-2, 0.0, best), Choice(0.1, 0.0, best + 0.0199 * (k0 - best)),
            Choice(1.0, 0.0, best + 0.0201 * (k0 - best))]  # fmt: skip
    assert search.within(path, 0.02).ridge == 0.1
    assert search.within(path, 0.0).ridge == 1e-2
    hopeless = [Choice(0.1, 0.0, k0 + 1), Choice(1.0, 0.0, k0 + 2)]
    assert search.within(hopeless, 0.1).ridge == 0.1


def test_search_ends_where_the_path_is_flat():
    _, _, _, search = stream_search("fresh")
    identity = AffineMaps.identity(24)
    choice = search.best(lambda ridge: identity, [0])
    assert choice.dev_kl == pytest.approx(search.kl(search.padded(identity, choice.pad), [0]), abs=1e-6)


@given(st.integers(1, 200), st.integers(2, 60))
@settings(deadline=None)
def test_chosen_layers_are_spread_evenly_from_the_first_to_the_last(layers, count):
    chosen = spread_layers(layers, count)
    if layers <= count:
        assert chosen == list(range(layers))
        return
    assert len(chosen) == count
    assert chosen[0] == 0
    assert chosen[-1] == layers - 1
    steps = np.diff(chosen)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("tolerances", [(-0.01,), (0.1, 1.0)])
def test_allowed_losses_are_shares(tolerances):
    with pytest.raises(ValidationError, match="shares"):
        FitRecipe(tolerances=tolerances)


@pytest.mark.parametrize("ridges", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.1), (0.1, 0.1)])
def test_a_ridge_path_has_to_be_positive_and_rising(ridges):
    """A ridge of zero divides zero by zero on a state wider than what it holds; the search descends a rising path."""
    with pytest.raises(ValidationError):
        FitRecipe(ridges=ridges)


@pytest.mark.parametrize("kind", ["fresh", "rebased"])
def test_fits_report_the_ridge_and_pad_of_their_maps(kind):
    """The maps of a fit are those of its stated choices, and a rotated view's lens is one map of the rotated states."""
    recipe = FitRecipe(ridges=(0.01, 0.1, 1.0), pads=(0.0, 0.4, 0.8))
    stream, captured, dev, search = stream_search(kind, recipe)
    moments = Moments.of(captured)
    shared = fit_shared(search, moments, [0, 1, 2, 3])
    bias = fit_shared_bias(search, moments)
    for fitted, regression in ((shared, moments.pooled(range(4))), (bias, moments.pooled_within())):
        maps = RidgePath(regression, "zero").solve(fitted.ridges[0])
        torch.testing.assert_close(fitted.maps.matrix, maps.matrix)
        torch.testing.assert_close(fitted.maps.offset, maps.offset + fitted.pads[0] * search.pad)
    view = RotatedView.random(moments.covariance, seed=5, variance=1.0)
    turned = fit_rotated(search, moments.rotated(view), view)
    there = DevSearch(stream.readout, view.apply(dev), recipe, search.pad)
    direct = fit_shared(there, Moments.of(view.apply(captured)), [0, 1, 2, 3])
    assert (turned.ridges[0], turned.pads[0]) == (direct.ridges[0], direct.pads[0])
    for name in ("matrix", "offset"):
        torch.testing.assert_close(getattr(turned.maps, name), getattr(direct.maps, name), rtol=1e-4, atol=1e-4)
    here, back = search.kl(rotated_maps(turned.maps, view), range(4)), there.kl(direct.maps, range(4))
    assert here == pytest.approx(back, abs=1e-4)


def test_a_linear_stream_is_read_without_loss():
    random = torch.Generator().manual_seed(0)
    readout = read_out(16, 60)
    final = torch.randn(600, 16, generator=random)
    mixings = [torch.eye(16), orthogonal(16, random) * 3, torch.randn(16, 16, generator=random) / 4 + torch.eye(16)]
    states = torch.stack([*(final @ m + k for k, m in enumerate(mixings)), final])
    captured = capture_of(readout, states[:, :400])
    dev = capture_of(readout, states[:, 400:], constant=captured.mean_p)
    search = DevSearch(readout, dev, FitRecipe(), pad_direction(readout, captured.states[-1]))
    for prior in ("zero", "identity"):
        fitted = fit_each(search, Moments.of(captured), prior)
        for layer in range(3):
            kl = true_kl(readout, dev, fitted.maps[[layer]], [layer])
            assert abs(kl) < 1e-4
            if prior == "zero":
                moments = Moments.of(captured).layer([layer])
                start = fitted.maps[[layer]]
                (after,) = refine(search, captured, moments, start, [fitted.ridges[layer]], [[layer]])
                assert true_kl(readout, dev, after.maps, [layer]) < kl + 1e-5


# Refinement


class OnItsObjective(DevSearch):
    """Dev is the fit data, and after the start it says the objective ``E KL + (lam/2) |B|^2``, so that refinement's steps
    and stops are ruled by what it says it minimises; less a constant, so that the start's value is its KL.

    ``lam = ridge * unit * 2 KL / E |r - x|^2`` at the start, all in float64 and by definition.
    """

    def prepare(self, maps, layer, ridge):
        readout, states = in_double(self.readout), self.dev.states.double()
        h, self.readout64 = states[layer], readout
        self.log_p = readout(states[-1]).log_softmax(-1)
        self.h = h
        b, c = maps.matrix[0], maps.offset[0]
        self.start = b.pow(2).sum()
        error = (states[-1] - h @ b.T - c).pow(2).sum(-1).mean()
        self.penalty = ridge * unit(h.numpy()) * 2 * self.mean_kl(b, c) / error

    def mean_kl(self, b, c):
        log_q = self.readout64(self.h @ b.T + c).log_softmax(-1)
        return (self.log_p.exp() * (self.log_p - log_q)).sum(-1).mean()

    def objective(self, b, c):
        return self.mean_kl(b, c) + self.penalty / 2 * b.pow(2).sum()

    def kl(self, maps, layers):
        return float(self.objective(maps.matrix[0], maps.offset[0]) - self.penalty / 2 * self.start)


@pytest.fixture
def one_thread():
    """Products of a few numbers are ten times slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refined_and_optimum(norm, ridge, head, **how):
    """Stated objective of the closed form, of the refined lens and at scipy's optimum."""
    readout, captured = random_capture(d=6, vocab=20, tokens=300, norm="layer" if norm == "layer" else "rms", bias=True)
    if norm == "tanh":
        readout.final_norm = Bent()
    readout = behind_head(readout, head)
    random = torch.Generator().manual_seed(3)
    final = captured.states[-1]
    noise = torch.randn(300, 6, generator=random, dtype=torch.float64)
    h = 3 * (final + 0.7 * noise) @ orthogonal(6, random).double() + 2
    captured = capture_of(readout, torch.stack([h, h, final]))
    recipe = FitRecipe(refine_passes=60, refine_tolerance=1e-7, **how)
    search = OnItsObjective(readout, captured, recipe, pad_direction(readout, final))
    moments = Moments.of(captured).layer([1])
    start = RidgePath(moments, "zero").solve(ridge)
    search.prepare(start, 1, ridge)

    def value_and_gradient(theta):
        theta = torch.from_numpy(theta).requires_grad_()
        value = search.objective(theta[:36].view(6, 6), theta[36:])
        return float(value.detach()), torch.autograd.grad(value, theta)[0].numpy()

    def optimum_from(maps):
        theta = torch.cat([maps.matrix.flatten(), maps.offset.flatten()]).numpy()
        options = {"maxiter": 500, "maxfun": 1000, "ftol": 1e-10, "gtol": 1e-7}
        return minimize(value_and_gradient, theta, jac=True, method="L-BFGS-B", options=options).fun

    (refined,) = refine(search, captured, moments, start, [ridge], [[1]])
    begin, ours = (float(search.objective(m.matrix[0], m.offset[0])) for m in (start, refined.maps))
    # Where the objective has several valleys another may be higher, but ours has to be near a bottom.
    return begin, ours, min(optimum_from(start), optimum_from(refined.maps))


@pytest.mark.parametrize(
    ("ridge", "head", "rate", "batch"),
    [(0.03, "plain", 0.1, 10), (0.3, "plain", 0.1, 10), (3.0, "plain", 0.1, 10), (0.03, "capped", 0.02, 50)],
)
@pytest.mark.slow
def test_refinement_reaches_the_optimum_of_its_stated_objective(ridge, head, rate, batch, one_thread):
    begin, ours, best = refined_and_optimum("tanh", ridge, head, refine_rate=rate, refine_batch=batch)
    assert best < 0.9 * begin
    assert ours <= 1.01 * best


@pytest.mark.parametrize(("norm", "ridge"), [("rms", 1e-6), ("layer", 1e-6), ("rms", 0.03), ("layer", 0.03)])
@pytest.mark.slow
def test_refinement_behind_a_scale_free_norm_brings_most_of_what_there_is(norm, ridge, one_thread):
    """There the penalty costs nothing at the optimum, where B is short and pointed: the way there is long and flat."""
    begin, ours, best = refined_and_optimum(norm, ridge, "plain", refine_rate=0.02, refine_batch=50)
    assert best < 0.9 * begin
    assert begin - ours >= 0.7 * (begin - best)
    assert ours <= 1.1 * best


def refined_together(kind, recipe, **how):
    """Own lenses and the shared one side by side, as a fit does it."""
    stream, captured, dev, search = stream_search(kind, recipe)
    moments, layers = Moments.of(captured), list(range(4))
    own, shared = fit_each(search, moments, "zero"), fit_shared(search, moments, layers)
    start = AffineMaps.stack([own.maps, shared.maps])
    at = [*([k] for k in layers), layers]
    both = Moments.stack([moments, moments.pooled(layers)])
    refined = refine(search, captured, both, start, [*own.ridges, *shared.ridges], at, **how)
    before = [true_kl(stream.readout, dev, start[[m]], of) for m, of in enumerate(at)]
    after = [true_kl(stream.readout, dev, r.maps, of) for r, of in zip(refined, at, strict=True)]
    return start, refined, before, after


@pytest.mark.parametrize("kind", ["fresh", "disjoint", "overlapping", "rebased"])
def test_refinement_is_never_worse_on_dev_and_says_its_kl(kind):
    recipe = FitRecipe(refine_passes=4, refine_batch=100)
    start, refined, before, after = refined_together(kind, recipe)
    assert len(refined) == 5
    for m, (lens, was, now) in enumerate(zip(refined, before, after, strict=True)):
        assert now <= was + 1e-6
        assert lens.dev_kl == pytest.approx(now, rel=1e-4, abs=1e-5)
        assert lens.iterations in range(0, 12 * 4 + 1, 12)
        assert (lens.iterations == 0) == torch.equal(lens.maps.matrix, start.matrix[[m]])
        assert lens.maps.matrix.dtype == lens.maps.offset.dtype == torch.float64
    # It is no refusal to move: the closed form minimises squared error, not KL.
    assert sum(after) < 0.995 * sum(before)


@pytest.mark.parametrize("kind", ["fresh", "overlapping"])
def test_updates_that_only_harm_return_the_closed_form(kind):
    """At a rate at which every update throws a lens away, ten times its length and more, dev stops it."""
    recipe = FitRecipe(refine_passes=6, refine_batch=100, refine_rate=1e3)
    start, refined, before, after = refined_together(kind, recipe)
    for m, lens in enumerate(refined):
        assert after[m] <= before[m] + 1e-6
        assert lens.dev_kl == pytest.approx(after[m], rel=1e-4, abs=1e-5)
        if lens.iterations == 0:
            assert lens.ended == "dev rose"
            assert torch.equal(lens.maps.matrix, start.matrix[[m]])
    assert any(lens.iterations == 0 for lens in refined)


def test_no_passes_return_the_closed_form():
    start, refined, before, _ = refined_together("fresh", FitRecipe(refine_passes=0))
    for m, lens in enumerate(refined):
        assert lens.iterations == 0
        assert lens.ended == "pass limit"
        assert torch.equal(lens.maps.matrix, start.matrix[[m]])
        assert torch.equal(lens.maps.offset, start.offset[[m]])
        assert lens.dev_kl == pytest.approx(before[m], abs=1e-5)


def test_a_pass_that_brings_less_than_the_tolerance_is_the_last():
    _, refined, before, after = refined_together("overlapping", FitRecipe(refine_batch=100, refine_tolerance=0.9))
    for lens, was, now in zip(refined, before, after, strict=True):
        if lens.ended == "converged":
            assert lens.iterations == 12
            assert 0.1 * was < now < was
    assert any(lens.ended == "converged" for lens in refined)


def test_refinement_repeats_exactly_and_its_order_is_the_seeds():
    recipe = FitRecipe(refine_passes=1, refine_batch=100)
    first, again, other = (refined_together("fresh", recipe, **how)[1] for how in ({}, {}, {"seed": 1}))
    assert all(torch.equal(a.maps.matrix, b.maps.matrix) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.maps.matrix, b.maps.matrix) for a, b in zip(first, other, strict=True) if a.iterations)


def test_refinement_reports_its_way_up_to_its_limit():
    seen = []
    refined_together(
        "fresh", FitRecipe(refine_passes=2, refine_batch=100), report=lambda done, limit: seen.append((done, limit))
    )
    assert {limit for _, limit in seen} == {24}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert 0 <= seen[0][0] <= seen[-1][0] < 24


def test_a_layer_that_never_varies_harms_no_other():
    """h_0 of some streams is one constant: there is nothing to refine there, and the other lenses must not notice."""
    recipe = FitRecipe(refine_passes=2, refine_batch=100)
    stream, captured, dev, search = stream_search("fresh", recipe)

    def still(c):
        states = c.states.clone()
        states[0] = 0.25
        return replace(c, states=states)

    captured, dev = still(captured), still(dev)
    search = DevSearch(stream.readout, dev, recipe, search.pad)
    moments, layers = Moments.of(captured), [[0], [1], [0, 1, 2, 3]]
    both = Moments.stack([moments.layer([0, 1]), moments.pooled(range(4))])
    start = RidgePath(both, "zero").solve(0.1)
    refined = refine(search, captured, both, start, [0.1] * 3, layers)
    for m, lens in enumerate(refined):
        now = true_kl(stream.readout, dev, lens.maps, layers[m])
        assert lens.dev_kl == pytest.approx(now, rel=1e-4)
        assert now <= true_kl(stream.readout, dev, start[[m]], layers[m]) + 1e-6
    assert refined[1].iterations > 0
    assert refined[2].iterations > 0


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_refinement_on_rotated_states_predicts_the_same(norm):
    """Each layer turned by its own rotation, and one rotation for all layers of the shared lens."""
    readout, captured = random_capture(d=8, vocab=30, tokens=600, norm=norm)
    dev = captured.take(torch.arange(0, 600, 3))
    captured = captured.take(torch.arange(600) % 3 > 0)
    recipe = FitRecipe(refine_passes=3, refine_batch=40)
    random = torch.Generator().manual_seed(5)
    turn = [torch.linalg.qr(orthogonal(8, random).double())[0] for _ in range(LAYERS)]
    one = torch.linalg.qr(orthogonal(8, random).double())[0]
    ridges, pad = [0.1, 0.01, 1.0, 0.1], pad_direction(readout, captured.states[-1])

    def refined(turns, layers, regressions):
        def turned(c):
            h = torch.stack([h @ q.T for h, q in zip(c.states[:-1], turns, strict=True)])
            return replace(c, states=torch.cat([h, c.states[-1:]]))

        moments = regressions(Moments.of(turned(captured)))
        at_start = RidgePath(moments, "zero").solve(torch.tensor(ridges[: len(layers)], dtype=torch.float64))
        search = DevSearch(readout, turned(dev), recipe, pad)
        found = refine(search, turned(captured), moments, at_start, ridges[: len(layers)], layers)
        predictions = [
            turned(dev).states[k] @ lens.maps.matrix[0].T + lens.maps.offset[0]
            for lens, own in zip(found, layers, strict=True) for k in own
        ]  # fmt: skip
        return found, torch.stack(predictions)

    everything = [*([k] for k in range(LAYERS)), list(range(LAYERS))]
    settings_of = (
        (turn, everything[:-1], lambda moments: moments),
        ([one] * LAYERS, everything, lambda m: Moments.stack([m, m.pooled(range(LAYERS))])),
    )
    for turns, layers, regressions in settings_of:
        plain, here = refined([torch.eye(8, dtype=torch.float64)] * LAYERS, layers, regressions)
        moved, there = refined(turns, layers, regressions)
        assert all(lens.iterations > 0 for lens in plain)
        assert [lens.iterations for lens in moved] == [lens.iterations for lens in plain]
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_leave_the_states_that_they_are_given(dtype, weighted):
    states = (5 + torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights = torch.arange(30) % 3 if weighted else None
    before, sums = states.clone(), MomentSums()
    for _ in range(2):
        sums.add(states, weights)
    assert torch.equal(states, before)
    times = np.ones(30, dtype=int) if weights is None else weights.numpy()
    own = np.repeat(before[0].double().numpy(), times, axis=0)
    np.testing.assert_allclose(sums.moments().covariance[0], np.cov(own.T, bias=True), rtol=1e-6)
