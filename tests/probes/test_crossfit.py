"""Regressions from streamed sums against scikit-learn on the data themselves, and the coverage of the intervals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.planted import text
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LinearRegression

from lensbench.probes.measured import load_measurement
from lensbench.probes.tools.crossfit import (
    Estimates,
    FoldSums,
    RidgeMaps,
    centred,
    folds_of,
    joined_clusters,
    partner,
    refitted,
)
from lensbench.statistics import jackknife, leaving_one_out


def data(seed=0, folds=4, count=60, inputs=5, outputs=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((folds, count, inputs)) * 10.0 ** np.arange(-2, inputs - 2) + 50
    y = x @ rng.standard_normal((inputs, outputs)) + rng.standard_normal((folds, count, outputs)) + 7
    return x, y


def sums_of(x, y, pieces=3):
    sums = FoldSums(len(x))
    for fold in range(len(x)):
        columns = np.concatenate([np.ones((*x.shape[1:2], 1)), x[fold], y[fold]], 1)
        for part in np.array_split(columns, pieces):
            sums.add(fold, torch.from_numpy(part))
    return sums.sums


def cross_fitted(*args, **settings):
    """Errors and totals ``[K, O]`` of each fold by maps fitted on the others."""
    return tuple(np.einsum("kko->ko", each) for each in refitted(*args, **settings))


def test_cross_fitted_errors_are_those_of_least_squares_on_the_other_folds():
    x, y = data()
    errors, totals = cross_fitted(sums_of(x, y), torch.arange(1, 6), torch.tensor([6, 7]), (1e-12,))
    for k in range(len(x)):
        rest = [i for i in range(len(x)) if i != k]
        x_rest, y_rest = x[rest].reshape(-1, 5), y[rest].reshape(-1, 2)
        predicted = LinearRegression().fit(x_rest, y_rest).predict(x[k])
        np.testing.assert_allclose(errors[k], np.square(y[k] - predicted).sum(0), rtol=1e-6)
        np.testing.assert_allclose(totals[k], np.square(y[k] - y_rest.mean(0)).sum(0), rtol=1e-8)


def test_the_order_and_the_sizes_of_the_pieces_change_nothing():
    x, y = data(3)
    whole = cross_fitted(sums_of(x, y, 1), torch.arange(1, 6), torch.tensor([6, 7]))
    pieces = cross_fitted(sums_of(x, y, 7), torch.arange(1, 6), torch.tensor([6, 7]))
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-8)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.floats(1e-4, 1e4))
def test_what_an_input_is_measured_in_changes_no_ridge_prediction(seed, factor):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((40, 4)))
    y = torch.from_numpy(rng.standard_normal((40, 1)))
    scale = torch.tensor([factor, 1.0, 1.0, 1.0], dtype=torch.float64)
    plain = x @ RidgeMaps.of(x.T @ x, x.T @ y).map(0.3)
    scaled = (x * scale) @ RidgeMaps.of((x * scale).T @ (x * scale), (x * scale).T @ y).map(0.3)
    torch.testing.assert_close(plain, scaled, rtol=1e-8, atol=1e-10)


def test_centred_moments_are_those_about_the_mean():
    x, y = data(5)
    columns = np.concatenate([np.ones((60, 1)), x[0], y[0]], 1)
    about = columns[:, 1:] - columns[:, 1:].mean(0)
    found = centred(torch.from_numpy(columns.T @ columns)).numpy()
    np.testing.assert_allclose(found, about.T @ about, rtol=1e-6, atol=1e-6)


def test_noise_explains_nothing_of_held_out_folds():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 200, 40)), rng.standard_normal((8, 200, 1))
    errors, totals = cross_fitted(sums_of(x, y), torch.arange(1, 41), torch.tensor([41]), (1e-9,))
    assert errors.sum() > totals.sum(), "in-sample it would explain a share of 40 / 1400"


def test_folds_are_of_whole_clusters_and_of_alike_size():
    windows = text(0, 128)
    fold = folds_of(windows, 8)
    assert all(len(set(fold[windows.clusters == c])) == 1 for c in set(windows.clusters))
    assert np.bincount(fold).tolist() == [16] * 8
    assert folds_of(windows.take(np.arange(4)), 8).max() == 1, "two documents give two folds"


def test_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(1).standard_normal(8)
    mean, without = leaving_one_out(values, np.ones(8))
    low, high = jackknife(np.array([mean]), without[:, None])
    expected = stats.t.interval(0.95, 7, values.mean(), values.std(ddof=1) / 8**0.5)
    assert (low[0], high[0]) == pytest.approx(expected)


def test_intervals_of_a_ratio_cover_it_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        bottom = rng.gamma(5, size=8)
        top = 0.3 * bottom + 0.2 * rng.standard_normal(8)
        value, without = leaving_one_out(top, bottom)
        low, high = jackknife(np.array([value]), without[:, None])
        covered += low[0] <= 0.3 <= high[0]
    assert 0.92 <= covered / 400 <= 0.98


def test_estimates_come_back_from_their_folder_and_say_what_is_undefined(tmp_path):
    found = Estimates("a", 4)
    found.share("x", np.arange(4.0), np.ones(4), layer=1, other=2)
    found.add("y", float("nan"), layer=0, reason="undefined: because")
    found.add("z", 2.0)
    done = found.done()
    done.save(tmp_path)
    frame = load_measurement(tmp_path).frame()
    assert frame.equals(done.frame())
    by = frame.set_index("quantity")
    assert by.loc["x", "value"] == 1.5
    assert by.loc["x", "ci_low"] < 1.5 < by.loc["x", "ci_high"]
    assert np.isnan(by.loc["y", "value"])
    assert by.loc["y", "reason"] == "undefined: because"
    assert np.isnan(by.loc["z", "ci_low"])
    assert (by.loc["x", "layer"], by.loc["x", "other"]) == (1, 2)


def ridge_by_hand(x, y, ridge):
    """Weights of ``(C + ridge D)^-1 cross``, D the variances, by numpy."""
    covariance = x.T @ x
    return np.linalg.solve(covariance + ridge * np.diag(np.diag(covariance)), x.T @ y)


@pytest.mark.parametrize("inputs", [20, 512, 513])
def test_the_unit_of_the_ridge_is_an_inputs_variance_for_any_number_of_inputs(inputs):
    rng = np.random.default_rng(inputs)
    x = rng.standard_normal((900, inputs)) @ np.diag(rng.uniform(0.5, 3, inputs)) + rng.standard_normal((900, 1))
    y = rng.standard_normal((900, 2))
    found = RidgeMaps.of(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y)).map(0.1).numpy()
    np.testing.assert_allclose(found, ridge_by_hand(x, y, 0.1), rtol=1e-6, atol=1e-9)


def weak_and_strong(seed=4, folds=8, count=60):
    """A number that its inputs determine, beside a large prediction of which they say nothing: they want other ridges."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((folds, count, 30))
    number = x @ rng.standard_normal(30) + 0.1 * rng.standard_normal((folds, count))
    return x, np.concatenate([number[..., None], 30 * rng.standard_normal((folds, count, 6))], -1)


def test_an_output_has_the_ridge_that_it_has_alone_and_outputs_of_one_quantity_share_theirs():
    x, y = weak_and_strong()
    inputs, outputs = torch.arange(1, 31), torch.arange(31, 38)
    sums = sums_of(x, y)
    together = [0] + [1] * 6
    errors, totals = cross_fitted(sums, inputs, outputs, together=together)
    alone, _ = cross_fitted(sums, inputs, outputs[:1])
    np.testing.assert_allclose(errors[:, :1], alone, rtol=1e-9)
    rest, _ = cross_fitted(sums, inputs, outputs[1:], together=[0] * 6)
    np.testing.assert_allclose(errors[:, 1:], rest, rtol=1e-9)
    assert errors[:, 0].sum() / totals[:, 0].sum() < 0.002
    one_for_all, _ = cross_fitted(sums, inputs, outputs, together=[0] * 7)
    assert one_for_all[:, 0].sum() > 10 * errors[:, 0].sum(), "one ridge for all is that of the prediction"


def test_the_ridge_of_a_fold_is_the_best_on_its_partner_by_regressions_by_hand():
    x, y = weak_and_strong(5)
    ridges = (1e-3, 0.1, 10.0)
    errors, _ = cross_fitted(sums_of(x, y), torch.arange(1, 31), torch.arange(31, 38), ridges)

    def lost(fitted_on, judged, output, ridge):
        of_x, of_y = (a[fitted_on].reshape(-1, a.shape[-1]) for a in (x, y))
        mean_x, mean_y = of_x.mean(0), of_y[:, output].mean()
        weights = ridge_by_hand(of_x - mean_x, of_y[:, output] - mean_y, ridge)
        return np.square(y[judged, :, output] - mean_y - (x[judged] - mean_x) @ weights).sum()

    for fold, judge in ((0, 1), (1, 0), (6, 7)):
        for output in (0, 3):
            without_two = [k for k in range(8) if k not in (fold, judge)]
            best = min(ridges, key=lambda ridge: lost(without_two, judge, output, ridge))
            expected = lost([k for k in range(8) if k != fold], fold, output, best)
            assert errors[fold, output] == pytest.approx(expected, rel=1e-6)


def test_an_odd_number_of_folds_has_a_judge_for_each():
    x, y = weak_and_strong(6, folds=5)
    errors, _ = cross_fitted(sums_of(x, y), torch.arange(1, 31), torch.arange(31, 38))
    assert np.isfinite(errors).all()
    assert [partner(k, 5) for k in range(5)] == [1, 0, 3, 2, 0]


def test_groups_of_unequal_size_have_fewer_degrees_of_freedom_and_few_clusters_no_interval():
    value, without = np.array([1.0]), np.random.default_rng(0).standard_normal((8, 1))
    narrow, wide = (jackknife(value, without, groups) for groups in (None, 3.0))
    ratio = stats.t.ppf(0.975, 2) / stats.t.ppf(0.975, 7)
    assert wide[1] - value == pytest.approx(ratio * (narrow[1] - value))
    found = Estimates("a", 8, groups=8.0, clusters=4.2)
    found.share("x", np.arange(8.0), np.ones(8))
    row = found.done().frame().iloc[0]
    assert np.isnan(row["ci_low"])
    assert "4.2 clusters" in row["reason"]


def test_every_value_without_an_interval_and_every_missing_value_has_a_reason():
    found = Estimates("a", 4)
    found.add("alone", 2.0)
    found.share("nothing", np.zeros(4), np.zeros(4))
    found.share("nothing without one", np.ones(4), np.array([1.0, 0, 0, 0]))
    frame = found.done().frame()
    for _, row in frame.iterrows():
        assert row["reason"], row["quantity"]
        assert np.isnan(row["ci_low"])


def test_refitted_errors_are_those_of_least_squares_without_two_folds():
    x, y = data()
    sums, inputs, outputs = sums_of(x, y), torch.arange(1, 6), torch.tensor([6, 7])
    errors, totals = refitted(sums, inputs, outputs, (1e-12,))
    for fold in range(len(x)):
        for other in range(len(x)):
            rest = [k for k in range(len(x)) if k not in (fold, other)]
            x_rest, y_rest = x[rest].reshape(-1, 5), y[rest].reshape(-1, 2)
            predicted = LinearRegression().fit(x_rest, y_rest).predict(x[fold])
            np.testing.assert_allclose(errors[fold, other], np.square(y[fold] - predicted).sum(0), rtol=1e-6)
            np.testing.assert_allclose(totals[fold, other], np.square(y[fold] - y_rest.mean(0)).sum(0), rtol=1e-8)
    found = Estimates("a", 4)
    found.refitted_share("x", (totals - errors)[..., 0], totals[..., 0])
    left, total = cross_fitted(sums, inputs, outputs, (1e-12,))
    assert found.rows[0][4] == pytest.approx(1 - left[:, 0].sum() / total[:, 0].sum(), rel=1e-9)
    without = [1 - sum(errors[j, k, 0] for j in range(4) if j != k) / sum(totals[j, k, 0] for j in range(4) if j != k)
               for k in range(4)]  # fmt: skip
    np.testing.assert_allclose(found.rows[0][5], without, rtol=1e-9)


def shrunk_shares(rng):
    """A share that a strong ridge leaves, of 8 folds of 4 documents that differ in scale, with two intervals of it."""
    scale = np.exp(0.7 * np.repeat(rng.standard_normal((8, 4, 1)), 12, 1))
    x = rng.standard_normal((8, 48, 20)) * scale
    y = x.sum(2, keepdims=True) / 20**0.5 + 0.3 * rng.standard_normal((8, 48, 1))
    columns = np.concatenate([np.ones((8, 48, 1)), x, y], 2)
    sums = torch.from_numpy(np.einsum("kni,knj->kij", columns, columns))
    errors, totals = (a[..., 0] for a in refitted(sums, torch.arange(1, 21), torch.tensor([21]), (1.0,)))
    found = Estimates("a", 8)
    found.share("folds", np.diag(totals - errors), np.diag(totals))
    found.refitted_share("refitted", totals - errors, totals)
    return found.done().frame()[["value", "ci_low", "ci_high"]].to_numpy(float)


@pytest.mark.slow
def test_intervals_of_cross_fitted_shares_cover_as_often_as_they_say_when_maps_are_fitted_again():
    """Over folds alone they cover their expectation in 67 % of the texts."""
    rng = np.random.default_rng(0)
    found = np.stack([shrunk_shares(rng) for _ in range(150)])
    covered = [((f[:, 1] <= f[:, 0].mean()) & (f[:, 0].mean() <= f[:, 2])).mean() for f in found.transpose(1, 0, 2)]
    assert covered[0] < 0.8
    assert 0.92 <= covered[1] <= 0.99


def test_an_interval_holds_what_the_fits_of_all_folds_have_in_common():
    folds, again = np.mean([shrunk_shares(np.random.default_rng(k)) for k in range(12)], 0)
    assert again[2] - again[1] > 1.5 * (folds[2] - folds[1])
    assert again[0] == pytest.approx(folds[0])


def test_a_document_that_a_text_holds_twice_is_in_one_fold():
    once = text(3, 32)
    twice = once.take(np.concatenate([np.arange(32), np.arange(0, 32, 2)]))
    names = tuple(
        f"{name} again" if k >= 16 else name for k, name in enumerate((*once.document_names, *once.document_names))
    )
    twice = replace(twice, documents=np.concatenate([once.documents, once.documents[::2] + 16]), document_names=names)
    fold = folds_of(twice)
    assert (fold[32:] == fold[:32:2]).all()
    assert len(set(joined_clusters(twice))) == 16
    assert (joined_clusters(once) == np.unique(once.clusters, return_inverse=True)[1]).all()
