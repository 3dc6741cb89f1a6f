"""Second moments of synthetic streams, read off their construction, against samples and against numpy written out."""

import numpy as np
import pytest
import torch

from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update.decomposition import Fitted, measured
from lensbench.studies.held_out import HELD_OUT_FAMILIES, HeldOutStream
from lensbench.studies.population import Population
from lensbench.studies.synthetic import STREAM_FAMILIES, Shape, SyntheticStream
from lensbench.studies.update_truth import declared_values, true_values

TOKENS = 20_000
SMALL = Shape(d=12, layers=3, vocab=40)
RECIPE = FitRecipe(ridges=(1e-2, 0.1, 1.0), pads=(0.0, 0.3))


def covariance(states: torch.Tensor) -> np.ndarray:
    """Covariance of all layers' states side by side."""
    wide = states.double().permute(1, 0, 2).reshape(states.shape[1], -1).numpy()
    return np.cov(wide.T, bias=True)


def as_one(population: Population) -> np.ndarray:
    wide = population.maps.permute(1, 0, 2).reshape(population.maps.shape[1], -1).numpy()
    return wide.T @ wide


def assert_near(found: np.ndarray, sampled: np.ndarray) -> None:
    """Within five standard errors of a normal sample's covariance."""
    spread = np.sqrt((found**2 + np.outer(np.diag(found), np.diag(found))) / TOKENS)
    assert (np.abs(sampled - found) <= 5.5 * spread + 1e-5).all()


@pytest.mark.parametrize("family", STREAM_FAMILIES)
def test_moments_of_a_synthetic_stream_are_those_of_a_large_sample(family):
    stream = SyntheticStream(family, SMALL, seed=1)
    assert_near(as_one(Population.of(stream)), covariance(stream.states(TOKENS, seed=5, per_document=1)))


@pytest.mark.parametrize("family", ["place-copied", pytest.param("three-way-drifting", marks=pytest.mark.slow)])
def test_moments_of_a_held_out_stream_are_those_of_a_large_sample(family):
    stream = HeldOutStream(family, seed=1)
    assert_near(as_one(Population.of(stream)), covariance(stream.states(TOKENS, seed=5, per_document=1)))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(HELD_OUT_FAMILIES))
def test_moments_of_every_held_out_family_are_those_of_a_large_sample(family):
    test_moments_of_a_held_out_stream_are_those_of_a_large_sample(family)


def test_moments_stand_where_the_decomposition_looks_for_them():
    population = Population.of(SyntheticStream("overlapping", SMALL, seed=0))
    h = population.maps.numpy()
    for j in range(3):
        np.testing.assert_allclose(population.own[j], h[j].T @ h[j])
        np.testing.assert_allclose(population.goal[j], h[j].T @ h[3])
        np.testing.assert_allclose(population.moments.cross[j], h[3].T @ h[j])
    np.testing.assert_allclose(population.later(0)[1], h[2].T @ h[0])
    np.testing.assert_allclose(population.moments.covariance[3], h[3].T @ h[3])


def decomposed(family, tokens=1500, shape=SMALL, seed=0):
    stream = SyntheticStream(family, shape, seed=seed)
    fit = stream.capture(tokens, seed=1)
    dev, scored = (stream.capture(tokens // 2, seed=k, constant=fit.mean_p) for k in (2, 3))
    fitted = Fitted.of(stream.readout, fit, dev, RECIPE, (0, 1, 2), "fisher", 0.02, seed, lambda _: None)
    return stream, fit, fitted, measured(stream.readout, fitted, fit, dev, scored, 0, readable=False, seed=seed)


def test_the_metric_of_the_population_is_that_of_many_predictions():
    stream = SyntheticStream("disjoint", SMALL, seed=2)
    answer = stream.states(60_000, seed=9, per_document=1)[-1]
    p = stream.readout(answer).double().softmax(-1).numpy()
    w = (stream.readout.weight @ stream.readout.gain(12)).double().numpy()
    expected = w.T @ (np.diag(p.mean(0)) - p.T @ p / len(p)) @ w
    factor = Population.of(stream).metric(stream.readout, seed=0).factor.numpy()
    np.testing.assert_allclose(factor.T @ factor, expected, atol=0.01 * np.abs(expected).max())


def test_the_truth_of_the_population_is_the_definition_written_out():
    """c, S and commission of ridge lenses on the population, from numpy alone."""
    stream, fit, fitted, found = decomposed("partly-carried")
    population = Population.of(stream)
    got = true_values(found, fitted, population, stream.readout, 0)["population"]
    h = population.maps.numpy()
    cov = lambda i, j: h[i].T @ h[j]  # noqa: E731
    factor = population.metric(stream.readout, seed=0).factor.numpy()
    target = factor @ cov(3, 3) @ factor.T
    lens, signal, loading = [], [], []
    for i in range(3):
        folds = [fit.states[i, torch.from_numpy(fitted.folds[fit.document] == k)].double() for k in (0, 1)]
        unit = np.mean([sorted(np.linalg.eigvalsh(np.cov(x.T.numpy(), bias=True)))[(12 - 1) // 2] for x in folds])
        a = factor @ cov(3, i) @ np.linalg.inv(cov(i, i) + fitted.lenses.ridges[i] * unit * np.eye(12))
        lens.append(a)
        signal.append(a @ cov(i, 3) @ factor.T @ np.linalg.inv(target) @ factor)
    inner = lambda i, j, k: np.trace(lens[i] @ cov(j, k) @ lens[k].T)  # noqa: E731  (<s_ij, r_k>)
    along = lambda i, j, k: np.trace(lens[i] @ cov(j, 3) @ signal[k].T)  # noqa: E731  (<s_ij, f_k>)
    a = lambda i, j, k: inner(i, j, k) / along(i, j, k)  # noqa: E731
    pairs = [(0, 1), (0, 2), (1, 2)]
    carried = np.array([(a(i, j, i) - a(j, j, i)) / (a(i, i, i) - a(j, j, i)) for i, j in pairs])
    kept = np.array([along(i, j, i) / along(i, i, i) for i, j in pairs])
    for i in range(3):
        error = inner(i, i, i) - 2 * along(i, i, i) + np.trace(signal[i] @ cov(3, 3) @ signal[i].T)
        missed = np.trace(target) - 2 * np.trace(lens[i] @ cov(i, 3) @ factor.T) + inner(i, i, i)
        loading.append(error / missed)
    from lensbench.measures.update.summary import pair_weights

    passed = np.array([not gate for gate in found.gate])
    assert passed.all()
    np.testing.assert_allclose(got["carried"], carried @ pair_weights(found, passed), rtol=1e-5)
    np.testing.assert_allclose(got["persistence"], kept.mean(), rtol=1e-5)
    np.testing.assert_allclose(got["commission"], np.mean(loading[:2]), rtol=1e-5)
    assert got["carried_without_layer0"] is None


def test_lenses_and_tokens_without_number_come_to_the_truth():
    """The same decomposition with many tokens lies near the truth of the few-token one, by either truth."""
    stream, _, fitted, found = decomposed("partly-carried", 20_000)
    truths = true_values(found, fitted, Population.of(stream), stream.readout, 0)
    q = found.point
    for truth in ("lenses", "population"):
        assert truths[truth]["clarity"] == pytest.approx(q.clarity.mean(), abs=0.01)
        assert truths[truth]["persistence"] == pytest.approx(q.persistence.mean(), abs=0.02)
        news = found.news(np.ones(3, bool))[0]
        assert truths[truth]["news"] == pytest.approx(news, abs=0.02)


def test_news_of_few_tokens_is_near_that_of_the_population():
    """Of carried copies on top of each other, hardly any of which an early lens reads."""
    shape = Shape(d=32, layers=4, vocab=60)
    stream = SyntheticStream("overlapping", shape, seed=0)
    fit = stream.capture(4096, seed=1)
    dev, scored = (stream.capture(n, seed=n, constant=fit.mean_p) for n in (512, 2048))
    fitted = Fitted.of(stream.readout, fit, dev, RECIPE, (0, 1, 2, 3), "fisher", 0.02, 0, lambda _: None)
    found = measured(stream.readout, fitted, fit, dev, scored, 3, readable=False)
    truth = true_values(found, fitted, Population.of(stream), stream.readout, 0)["lenses"]["news"]
    value, draws = found.news(np.ones(6, bool))
    assert truth > 0.3
    assert value == pytest.approx(truth, abs=0.1)
    assert np.percentile(draws, 1) < truth < np.percentile(draws, 99)


def test_declared_shares_are_means_over_the_pairs_that_the_stream_itself_used():
    stream = HeldOutStream("growing", seed=3)
    fit = stream.capture(1200, seed=1)
    dev, scored = (stream.capture(600, seed=k, constant=fit.mean_p) for k in (2, 3))
    layers = tuple(range(stream.layers))
    fitted = Fitted.of(stream.readout, fit, dev, RECIPE, layers, "fisher", 0.02, 0, lambda _: None)
    found = measured(stream.readout, fitted, fit, dev, scored, 0, readable=False)
    declared = declared_values(found, stream.shares)
    for name, value in (("in_place", 1), ("carried", 0), ("kept", 1), ("represented", 0), ("readable_gain", 1)):
        for suffix in ("", "_without_layer0"):
            assert declared[name + suffix] is None or declared[name + suffix] == pytest.approx(value, abs=1e-9)
