"""Readable gain: streams of known answer, and its losses by definition."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lensbench.lenses.estimated import FEWEST_DRAWN
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import decompose, index_estimates, pair_rows
from lensbench.measures.update import readable as module
from lensbench.measures.update.decomposition import Fitted, measured
from lensbench.measures.update.readable import chosen_pairs
from lensbench.measures.update.stacking import NextTokens, Stack, stacked
from lensbench.studies.synthetic import Shape, SyntheticStream, read_out

RECIPE = FitRecipe(ridges=(1e-2, 0.1, 1.0, 10.0), pads=(0.0, 0.2, 0.4, 0.6))


def decomposed(family, seed=0, **how):
    stream = SyntheticStream(family, Shape(d=32, layers=4, vocab=100), seed=seed)
    fit = stream.capture(3000, seed=1)
    dev, held_out = (stream.capture(n, seed=k, constant=fit.mean_p) for n, k in ((1024, 2), (2048, 3)))
    fitted = Fitted.of(stream.readout, fit, dev, RECIPE, (0, 1, 2, 3), "fisher", RECIPE.tolerance, 0, lambda _: None)
    return measured(stream.readout, fitted, fit, dev, held_out, 0, **how)


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [
        ("fresh", 0.9, 1.02),
        ("disjoint", -0.02, 0.02),
        pytest.param("overlapping", -0.05, 0.1, marks=pytest.mark.slow),
        pytest.param("rebased", -0.05, 0.05, marks=pytest.mark.slow),
    ],
)
def test_what_an_earlier_lens_can_read_of_a_gain_is_what_the_stream_was_made_with(family, low, high):
    found = decomposed(family)
    value = index_estimates(found)["readable_gain_without_layer0"]
    assert value.value is not None, value.reason
    assert low <= value.value <= high
    assert value.low <= value.value <= value.high


def test_an_untold_gain_is_undetermined():
    """Layers that hold the same state: no later lens predicts better."""
    stream = SyntheticStream("removed", Shape(d=16, layers=3, vocab=60, first_noise=0.8, last_noise=0.8))
    fit = stream.capture(2000, seed=1)
    dev, held_out = (stream.capture(800, seed=k, constant=fit.mean_p) for k in (2, 3))
    found = index_estimates(decompose(stream.readout, fit, dev, held_out, RECIPE, refits=0))
    assert "0 of 3 pairs of layers pass the gates" in found["carried"].reason
    assert "no cross-entropy gain" in found["readable_gain"].reason


def test_losses_are_cross_entropies_of_the_read_out_of_the_sum_of_parts():
    torch.manual_seed(0)
    stream = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40))
    captured = stream.capture(64, seed=1)
    readout = read_out(12, 40, bias=True)
    reader = module._Reader.of(captured, [0, 1, 2], lenses(3, 12), 64)
    parts = [torch.randn(64, 2, 12), torch.randn(64, 2, 12)]
    theta, centre, pad = np.array([0.5, -0.2, 0.3, 0.1, 0.7]), torch.randn(12), torch.randn(12)
    found = module._Losses.of(readout, reader).at(stacked(parts, centre, pad, torch.from_numpy(theta)))
    x = centre + 0.7 * pad
    for weight, part in zip(theta, (parts[0][:, 0], parts[0][:, 1], parts[1][:, 0], parts[1][:, 1]), strict=False):
        x = x + weight * part
    expected = torch.nn.functional.cross_entropy(readout(x.float()), captured.targets, reduction="none")
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.7, 1.5)])
def test_the_loss_that_coefficients_are_fitted_to_is_the_cross_entropy_with_its_slope(norm, scale, softcap):
    torch.manual_seed(0)
    readout = read_out(12, 40, seed=1, bias=norm == "layer", norm=norm)
    readout.scale, readout.softcap = scale, softcap
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(64, seed=1)
    parts = [torch.randn(64, 2, 12), torch.randn(64, 2, 12)]
    centre, pad = torch.randn(12), torch.randn(12)
    following = NextTokens.of(readout, captured, torch.arange(64), centre, pad)
    theta = torch.tensor([0.5, -0.2, 0.3, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    state = stacked(parts, centre, pad, theta)
    expected = torch.nn.functional.cross_entropy(readout(state), captured.targets)
    found = following.loss(Stack.of([following.part(x) for x in parts]), theta)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    (slope,), (by_autograd,) = (torch.autograd.grad(x, theta, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(slope, by_autograd, atol=1e-5, rtol=1e-4)
    slopes = following.slopes(Stack.of([following.part(x) for x in parts]), theta.detach().numpy())
    assert (slopes is None) == (softcap is not None)
    if slopes is not None:
        assert slopes.value == pytest.approx(float(expected.detach()), abs=1e-5)
        np.testing.assert_allclose(slopes.gradient, by_autograd.numpy(), atol=1e-5, rtol=1e-4)
        exact = copy.deepcopy(readout).double()
        jacobian = torch.autograd.functional.jacobian(
            lambda t: exact(stacked([x.double() for x in parts], centre.double(), pad.double(), t)), theta.detach()
        )
        p = exact(state.double()).softmax(-1).detach()
        mean = torch.einsum("nv,nvk->nk", p, jacobian)
        expected = torch.einsum("nv,nvk,nvj->kj", p, jacobian, jacobian) - mean.T @ mean
        np.testing.assert_allclose(slopes.curvature, (expected / 64).numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("empty", [slice(0, 3), slice(None)])
def test_the_loss_of_states_of_zero_is_finite_and_its_slope_that_of_autograd(norm, empty):
    torch.manual_seed(0)
    readout = read_out(12, 40, seed=1, bias=True, norm=norm)
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(64, seed=1)
    parts = [torch.randn(64, 2, 12), torch.randn(64, 2, 12)]
    for part in parts:
        part[empty] = 0
    centre, pad = torch.zeros(12), torch.randn(12)
    following = NextTokens.of(readout, captured, torch.arange(64), centre, pad)
    theta = torch.tensor([0.5, -0.2, 0.3, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(readout(stacked(parts, centre, pad, theta)), captured.targets)
    stack = Stack.of([following.part(x) for x in parts])
    found = following.loss(stack, theta)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    (slope,), (by_autograd,) = (torch.autograd.grad(x, theta) for x in (found, expected))
    torch.testing.assert_close(slope, by_autograd, atol=1e-4, rtol=1e-4)
    assert following.slopes(stack, theta.detach().numpy()) is None


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_newton_ends_where_a_search_with_gradients_alone_ends(norm, vectors):
    """Also where the best coefficient is the least that is allowed, where one vector is zero, and where two are the same."""
    torch.manual_seed(0)
    readout = read_out(12, 40, seed=1, bias=True, norm=norm)
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(256, seed=1)
    centre, pad = torch.randn(12), torch.randn(12)
    following = NextTokens.of(readout, captured, torch.arange(256), centre, pad)
    signal = captured.states[-1] - centre
    own = torch.stack([signal + torch.randn(256, 12), torch.zeros(256, 12)], 1)
    other = torch.randn(256, 12) - 0.5 * signal
    added = torch.stack([other, other], 1)
    parts = [following.part(x) for x in (own, added)[:vectors]]
    stack, start = Stack.of(parts), np.array([1.0, *[0.0] * (2 * vectors)])
    least = np.array([-np.inf, -np.inf, *[0.0] * (2 * vectors - 2), -np.inf])
    with torch.no_grad():
        found, other = following.fitted(parts, start), following._by_gradients(stack, start, least)
        losses = [float(following.loss(stack, torch.from_numpy(theta))) for theta in (found, other)]
        assert following._by_newton(stack, start, least)[1] or norm == "layer"
    assert (found >= least).all()
    assert losses[0] <= losses[1] + 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_where_newton_is_stuck_the_search_with_gradients_goes_on(seed):
    """Without a centre the length of a reading, which the norm divides out, has neither slope nor curvature."""
    torch.manual_seed(seed)
    readout = read_out(12, 40, seed=seed)
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(256, seed=seed)
    following = NextTokens.of(readout, captured, torch.arange(256), torch.zeros(12), torch.randn(12))
    r = captured.states[-1] + torch.randn(256, 12)
    part = following.part(torch.stack([r, r / 2], 1))
    start, least = np.array([1.0, 0.0, 0.0]), np.full(3, -np.inf)
    with torch.no_grad():
        found, other = following.fitted([part], start), following._by_gradients(Stack.of([part]), start, least)
        losses = [float(following.loss(Stack.of([part]), torch.from_numpy(theta))) for theta in (found, other)]
    assert losses[0] <= losses[1] + 1e-4


def test_readings_that_are_not_finite_or_all_zero_end_a_search(recwarn):
    readout = read_out(12, 40, seed=1)
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(64, seed=1)
    for centre in (torch.ones(12), torch.full((12,), torch.nan)):
        following = NextTokens.of(readout, captured, torch.arange(64), centre, torch.zeros(12))
        start = np.array([1.0, 0.0, 0.0])
        with torch.no_grad():
            np.testing.assert_array_equal(following.fitted([following.part(torch.zeros(64, 2, 12))], start), start)
    assert not recwarn.list


@pytest.mark.parametrize("times", [1.0, 1e3, 1e-3])
def test_the_best_coefficients_are_found_whatever_the_lengths_of_the_parts(times):
    """Against a search by simplex, which takes no slopes, of the cross-entropy by definition."""
    torch.manual_seed(0)
    readout = read_out(12, 40, seed=1)
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=40)).capture(256, seed=1)
    centre, pad = torch.randn(12).double(), torch.randn(12).double()
    following = NextTokens.of(readout, captured, torch.arange(256), centre, pad)
    signal = captured.states[-1] - centre.float()
    parts = [torch.stack([signal + 2 * torch.randn(256, 12), times * torch.randn(256, 12)], 1)]
    exact = copy.deepcopy(readout).double()
    found = following.fitted([following.part(parts[0])], np.array([1.0, 0.0, 0.0]))

    def loss(theta):
        state = stacked([parts[0].double()], centre, pad, torch.from_numpy(theta * np.array([1, 1 / times, 1])))
        return float(torch.nn.functional.cross_entropy(exact(state), captured.targets))

    found *= np.array([1, times, 1])
    starts = np.array([1.0, 0.0, 0.0]), found
    best = [minimize(loss, at, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-9}).fun for at in starts]
    assert loss(found) <= min(best) + 2e-5


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_losses_with_a_large_vocabulary_are_unbiased_estimates_that_stay_paired(softcap, monkeypatch):
    """Their mean over many samples of tokens is the exact mean; equal readings have equal losses."""
    torch.manual_seed(0)
    readout = read_out(12, 300, seed=1)
    readout.softcap = softcap
    captured = SyntheticStream("fresh", Shape(d=12, layers=3, vocab=300)).capture(400, seed=1)
    reader = module._Reader.of(captured, [0, 1, 2], lenses(3, 12), 400)
    x = torch.randn(400, 12)
    exact = module._Losses.of(readout, reader).at(x)
    monkeypatch.setattr(module, "WORDS", 40)
    monkeypatch.setattr(module, "worth_estimating", lambda _: True)
    one = module._Losses.of(readout, reader)
    assert one.words is not None
    assert len(one.drawn.at) == FEWEST_DRAWN
    torch.testing.assert_close(one.at(x), one.at(x.clone()))
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(400, generator=random)[:64].sort().values for _ in range(300)]
    each = torch.stack([replace(one, drawn=replace(one.drawn, at=at)).at(x).mean() for at in drawn])
    assert abs(each.mean() - exact.mean()) < 4.5 * each.std() / len(each) ** 0.5
    assert each.std() > 1e-4


def lenses(count, d):
    from lensbench.lenses.maps import AffineMaps

    return AffineMaps(torch.randn(count, d, d), torch.randn(count, d))


def test_coefficients_that_are_added_are_never_negative_and_never_make_dev_worse():
    torch.manual_seed(0)
    stream = SyntheticStream("overlapping", Shape(d=12, layers=3, vocab=40))
    captured = stream.capture(256, seed=1)
    own, other = captured.states[1][:, None].repeat(1, 2, 1), captured.states[0][:, None].repeat(1, 2, 1)
    centre, pad = torch.zeros(12), torch.ones(12)
    following = NextTokens.of(stream.readout, captured, torch.arange(256), centre, pad)
    parts = [following.part(own), following.part(other)]
    base = following.fitted(parts[:1], np.array([1.0, 0.0, 0.0]))
    both = following.fitted(parts, np.array([*base[:2], 0.0, 0.0, base[2]]))
    assert (both[2:4] >= 0).all()

    def loss(parts, theta):
        state = stacked(parts, centre, pad, torch.from_numpy(theta))
        return float(torch.nn.functional.cross_entropy(stream.readout(state), captured.targets))

    assert loss([own, other], both) <= loss([own], base) + 1e-6


def test_all_neighbours_and_twelve_others_are_looked_at():
    assert chosen_pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    many = chosen_pairs(30)
    assert {(i, i + 1) for i in range(29)} <= set(many)
    assert len(many) == 29 + 12
    assert len(set(many)) == len(many)


def test_a_pair_has_its_own_readable_gain_and_others_are_empty():
    rows = pair_rows(decomposed("fresh", further=1))
    looked_at = [(r["from_layer"], r["to_layer"]) for r in rows if r["readable_gain"] is not None]
    assert set(looked_at) <= {(0, 1), (0, 2), (1, 2), (2, 3), (1, 3), (0, 3)}
    assert len(looked_at) == 4
