"""Closed forms against scikit-learn, KL and its gradient against autograd, the choices on dev against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from synthetic import KINDS, SyntheticStream, capture_of, orthogonal, read_out

from lensbench.fitting import (
    Choice,
    DevSearch,
    FitRecipe,
    LogPartition,
    Moments,
    RidgePath,
    fit_each,
    fit_rotated,
    fit_shared,
    fit_shared_bias,
    inverse_root,
    kl_objective,
    pad_direction,
    refine,
    rotated_maps,
)
from lensbench.lenses import AffineMaps
from lensbench.stream import RotatedView

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
    monkeypatch.setattr("lensbench.fitting.TOKEN_BLOCK", 7)
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


# The pad


@pytest.mark.parametrize("norm, read", [("rms", None), ("layer", None), ("rms", 8)])
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
    class Bent(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x)

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


def true_kl(readout, dev, maps, layers):
    """Mean KL by definition."""
    log_p = readout(dev.states[-1]).log_softmax(-1)
    total = []
    for k, layer in enumerate(layers):
        k = k if len(maps) > 1 else 0
        log_q = readout(dev.states[layer] @ maps.matrix[k].float().T + maps.offset[k].float()).log_softmax(-1)
        total.append(float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean()))
    return float(np.mean(total))


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
    turned = fit_rotated(search, moments, view)
    there = DevSearch(stream.readout, view.apply(dev), recipe, search.pad)
    direct = fit_shared(there, Moments.of(view.apply(captured)), [0, 1, 2, 3])
    assert (turned.ridges[0], turned.pads[0]) == (direct.ridges[0], direct.pads[0])
    here, back = search.kl(turned.maps, range(4)), there.kl(direct.maps, range(4))
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
                after = refine(search, captured, moments, start, fitted.ridges[layer], [layer], tokens=400)
                assert true_kl(readout, dev, after.maps, [layer]) < kl + 1e-5


# Refinement


def refine_objective(readout, captured, start, ridge, layers, moments, rows):
    """The stated objective in float64: E KL + (lam / 2) |B|^2, lam = ridge * unit * 2 KL / E |r - x|^2 at the start."""
    readout64 = readout.double()
    h = torch.cat([captured.states[layer][r] for layer, r in zip(layers, rows, strict=True)]).double()
    r = torch.cat([captured.states[-1][r] for r in rows]).double()
    log_p = readout64(r).log_softmax(-1)

    def kl(matrix, offset):
        log_q = readout64(h @ matrix.T + offset).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    b0, c0 = start.matrix[0].double(), start.offset[0].double()
    error = (r - h @ b0.T - c0).pow(2).sum(-1).mean()
    values = torch.linalg.eigvalsh(moments.covariance[0])
    penalty = ridge * values[(len(values) - 1) // 2] * 2 * kl(b0, c0) / error
    return kl, lambda matrix, offset: kl(matrix, offset) + penalty / 2 * matrix.pow(2).sum()


class EverBetter(DevSearch):
    """A dev split on which every iterate beats the one before: what refinement does when dev never stops it."""

    def kl(self, maps, layers):
        self.last = getattr(self, "last", 1e9) - 1
        return self.last


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_refinement_reaches_the_optimum_of_its_stated_objective(ridge, norm):
    readout, captured = random_capture(d=6, vocab=20, tokens=300, norm=norm)
    recipe = FitRecipe(refine_iterations=400, refine_tolerance=1e-9)
    search = EverBetter(readout, captured, recipe, pad_direction(readout, captured.states[-1]))
    moments = Moments.of(captured).layer([1])
    start = RidgePath(moments, "zero").solve(ridge)
    _, objective = refine_objective(readout, captured, start, ridge, [1], moments, [torch.arange(300)])

    def value_and_gradient(theta):
        theta = torch.from_numpy(theta).requires_grad_()
        value = objective(theta[:36].view(6, 6), theta[36:])
        return float(value.detach()), torch.autograd.grad(value, theta)[0].numpy()

    theta0 = torch.cat([start.matrix.flatten(), start.offset.flatten()]).numpy()

    def scipy_from(theta):
        options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-12, "gtol": 1e-8}
        return minimize(value_and_gradient, theta, jac=True, method="L-BFGS-B", options=options).fun

    maps = refine(search, captured, moments, start, ridge, [1], tokens=300).maps
    ours = float(objective(maps.matrix[0], maps.offset[0]))
    # The norm makes the objective non-convex: another valley may be higher, but ours has to be a bottom.
    assert ours <= scipy_from(theta0) * (1 + 1e-3)
    assert ours <= scipy_from(torch.cat([maps.matrix.flatten(), maps.offset.flatten()]).numpy()) * (1 + 1e-3)
    assert ours < value_and_gradient(theta0)[0]


@pytest.mark.parametrize("kind", ["fresh", "overlapping", "rebased"])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3]])
def test_refinement_is_never_worse_on_dev_and_lowers_its_objective(kind, layers):
    recipe = FitRecipe(refine_iterations=24)
    stream, captured, dev, search = stream_search(kind, recipe)
    moments = Moments.of(captured).pooled(layers)
    closed = fit_shared(search, Moments.of(captured), layers)
    start, ridge = closed.maps, closed.ridges[0]
    refined = refine(search, captured, moments, start, ridge, layers, tokens=1200)
    before, after = (true_kl(stream.readout, dev, maps, layers) for maps in (start, refined.maps))
    assert after <= before + 1e-5
    assert refined.dev_kl == pytest.approx(after, abs=1e-4)
    assert refined.iterations <= 24
    # Objective over all fitting tokens of these layers; the shared lens is refined on a part of them.
    rows = [torch.arange(1200)] * len(layers)
    _, objective = refine_objective(stream.readout, captured, start, ridge, layers, moments, rows)
    was, now = (float(objective(m.matrix[0].double(), m.offset[0].double())) for m in (start, refined.maps))
    assert refined.iterations == 0 or now < was


def test_no_iterations_return_the_closed_form():
    _, captured, _, search = stream_search("fresh", FitRecipe(refine_iterations=0))
    closed = fit_shared(search, Moments.of(captured), [1])
    refined = refine(search, captured, Moments.of(captured).layer([1]), closed.maps, closed.ridges[0], [1], tokens=500)
    assert refined.iterations == 0
    assert torch.equal(refined.maps.matrix, closed.maps.matrix) and torch.equal(refined.maps.offset, closed.maps.offset)


def test_refinement_on_rotated_states_predicts_the_same():
    recipe = FitRecipe(refine_iterations=8)
    stream, captured, dev, search = stream_search("fresh", recipe)
    moments = Moments.of(captured)
    view = RotatedView.random(moments.covariance, seed=2, variance=1.0)
    there = DevSearch(stream.readout, view.apply(dev), recipe, search.pad)
    closed = fit_shared(search, moments, [1])
    turned_moments = Moments.of(view.apply(captured))
    turned_start = fit_shared(there, turned_moments, [1])
    plain = refine(search, captured, moments.layer([1]), closed.maps, closed.ridges[0], [1], tokens=1200)
    turned = refine(
        there, view.apply(captured), turned_moments.layer([1]), turned_start.maps, turned_start.ridges[0], [1],
        tokens=1200,
    )  # fmt: skip
    assert plain.iterations > 0
    h, q = dev.states[1].double(), view.maps[1]
    a = h @ plain.maps.matrix[0].T + plain.maps.offset[0]
    b = h @ q.T @ turned.maps.matrix[0].T + turned.maps.offset[0]
    assert float((a - b).norm() / a.norm()) < 1e-3
    assert turned.dev_kl == pytest.approx(plain.dev_kl, abs=1e-5)


def test_refining_a_shared_lens_shows_every_layer_every_part_of_a_window():
    """Each layer's share of the tokens is spread over the positions of the windows, not tied to one of them."""
    layers, positions, windows = 4, 8, 60
    readout = read_out(6, 20)
    token = torch.arange(positions * windows)
    states = torch.randn(layers + 1, len(token), 6)
    # The first entry of a state is its position in the window.
    states[:, :, 0] = (token % positions).float()
    captured = capture_of(readout, states, per_document=positions * 2)
    moments = Moments.of(captured)
    search = DevSearch(readout, captured, FitRecipe(refine_iterations=4), torch.zeros(6, dtype=torch.float64))
    start = RidgePath(moments.pooled(range(layers)), "zero").solve(0.1)
    seen = []

    class Recorded(list):
        """A layer's states that remember which positions they were read at."""

        def __getitem__(self, rows):
            (h,) = self
            seen.append(h[rows][:, 0])
            return h[rows]

    recorded = [Recorded([h]) for h in captured.states[:-1]]
    watched = captured.take(torch.arange(len(captured)))
    object.__setattr__(watched, "states", WithLength([*recorded, captured.states[-1]], captured.states.shape))
    refine(search, watched, moments.pooled(range(layers)), start, 0.1, range(layers), tokens=10**6)
    assert len(seen) == layers
    for positions_seen in seen:
        assert abs(float(positions_seen.mean()) - (positions - 1) / 2) < 0.7


class WithLength(list):
    """States as a list that still has a tensor's shape."""

    def __init__(self, states, shape):
        super().__init__(states)
        self.shape = shape


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_inverse_root_undoes_a_covariance(seed):
    a = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = a @ a.T
    root = inverse_root(c, 0.0)
    torch.testing.assert_close(root @ c @ root, torch.eye(5, dtype=torch.float64), rtol=1e-7, atol=1e-7)
