"""The decomposition at other settings, without massive activations, and by the distance of two layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateRecipe, decompose
from lensbench.measures.update.summary import distance_rows, drawn_indices
from lensbench.measures.update.variants import MassiveTokens, variant_rows, without_massive
from lensbench.studies.synthetic import Shape, SyntheticStream

RECIPE = FitRecipe(ridges=(1e-3, 1e-2, 0.1, 1.0, 10.0), pads=(0.0, 0.3))
QUICK = {"refits": 0, "readable": False}


@pytest.fixture(scope="module")
def captures():
    stream = SyntheticStream("fresh", Shape(d=12, layers=5, vocab=40, first_noise=2.5, last_noise=0.3), seed=3)
    fit = stream.capture(1600, seed=1)
    return stream.readout, (fit, *(stream.capture(n, seed=n, constant=fit.mean_p) for n in (800, 1200)))


def by_name(found, setting, at):
    rows = [row for row in variant_rows(found) if (row["setting"], row["at"]) == (setting, at)]
    return {row["index"]: row for row in rows}


def test_a_variant_is_the_decomposition_at_its_setting_over_the_same_pairs(captures):
    readout, splits = captures
    found = decompose(readout, *splits, RECIPE, tolerances=(0.1,), metrics=("whitened",), **QUICK)
    for setting, at, settings in (
        ("tolerance", "0.1", {"tolerance": 0.1}),
        ("metric", "whitened", {"metric": "whitened"}),
    ):
        alone = decompose(readout, *splits, RECIPE, gating=found.gating, **settings, **QUICK)
        (variant,) = (one for one in found.variants if one.setting == setting)
        np.testing.assert_allclose(variant.point.carried, alone.point.carried, atol=1e-9)
        np.testing.assert_allclose(variant.draws.clarity, alone.draws.clarity, atol=1e-9)
        row = by_name(found, setting, at)["persistence_without_layer0"]
        expected = alone.point.persistence[[i > 0 for i in found.pairs[0]]].mean()
        assert row["value"] == pytest.approx(expected)
        assert row["difference_ci_low"] <= row["difference"] <= row["difference_ci_high"]


def test_the_reported_tolerance_again_differs_by_nothing(captures):
    readout, splits = captures
    found = decompose(readout, *splits, RECIPE, tolerances=(RECIPE.tolerance,), metrics=("fisher",), **QUICK)
    rows = list(variant_rows(found))
    reported = drawn_indices(found)
    assert {row["index"] for row in rows} >= {"in_place", "clarity_without_layer0", "commission"}
    for row in rows:
        if row["setting"] == "units":  # these are other units
            continue
        assert row["value"] == pytest.approx(reported[row["index"]].estimate.value)
        if row["value"] is None:
            assert row["reason"] == reported[row["index"]].estimate.reason
            continue
        assert [row[name] for name in ("difference", "difference_ci_low", "difference_ci_high")] == pytest.approx(
            [0] * 3, abs=1e-9
        )


def test_a_paired_difference_is_surer_than_two_values(captures):
    readout, splits = captures
    found = decompose(readout, *splits, RECIPE, metrics=("logit",), **QUICK)
    row = by_name(found, "metric", "logit")["persistence_without_layer0"]
    assert row["difference_ci_high"] - row["difference_ci_low"] < row["ci_high"] - row["ci_low"]


def planted(captured, every, layer, factor):
    """A capture whose ``every``-th token has a state of a much larger norm at one layer."""
    states = captured.states.clone()
    states[layer, ::every] *= factor
    return replace(captured, states=states)


def test_massive_tokens_are_those_above_the_cap_at_any_layer(captures):
    _, (fit, dev, _) = captures
    fit = planted(fit, 97, 2, 40.0)
    massive = MassiveTokens.of(fit, (0, 1, 2, 3, 4), 4.0)
    norms = fit.states.double().norm(dim=-1).numpy()
    expected = [any(norms[row, n] > 4 * np.median(norms[row]) for row in range(6)) for n in range(len(fit))]
    assert massive.among(fit).tolist() == expected
    left, share = massive.left_out(fit)
    assert len(left) == len(fit) - sum(expected)
    assert share == pytest.approx(sum(expected) / len(fit))
    assert massive.left_out(dev)[1] < 0.01


def test_without_planted_massive_activations_the_stream_is_told_as_without_them(captures):
    readout, clean = captures
    dirty = tuple(planted(captured, 61, 2, 300.0) for captured in clean)
    found = decompose(readout, *dirty, RECIPE, **QUICK)
    massive = MassiveTokens.of(dirty[0], found.layers, 4.0)
    left = [massive.left_out(captured)[0] for captured in dirty]
    capped = decompose(readout, *left, RECIPE, gating=found.gating, **QUICK)
    rows = by_name(without_massive(found, capped, 4.0), "massive", "4")
    known = decompose(readout, *clean, RECIPE, gating=found.gating, **QUICK)
    expected = known.point.clarity[[i > 0 for i in known.pairs[0]]].mean()
    reported = found.point.clarity[[i > 0 for i in found.pairs[0]]].mean()
    assert rows["clarity_without_layer0"]["value"] == pytest.approx(expected, abs=0.02)
    assert abs(reported - expected) > 0.05


def test_a_difference_of_other_documents_has_no_interval_and_says_so(captures):
    readout, (fit, dev, held_out) = captures
    found = decompose(readout, fit, dev, held_out, RECIPE, **QUICK)
    fewer = held_out.take(torch.from_numpy(held_out.document > 0))
    capped = decompose(readout, fit, dev, fewer, RECIPE, gating=found.gating, **QUICK)
    for row in by_name(without_massive(found, capped, 4.0), "massive", "4").values():
        assert row["difference_ci_low"] is None
        assert row["value"] is None or "no interval" in row["reason"]


def test_means_by_distance_are_over_the_pairs_of_that_distance_without_layer_0(captures):
    readout, splits = captures
    found = decompose(readout, *splits, RECIPE, **QUICK)
    rows = list(distance_rows(found))
    assert [(row["distance"], row["pairs"]) for row in rows] == [(1, 3), (2, 2), (3, 1)]
    for row in rows:
        at = [k for k, (i, j) in enumerate(zip(*found.pairs, strict=True)) if i > 0 and j - i == row["distance"]]
        assert row["clarity"] == pytest.approx(found.point.clarity[at].mean())
        assert row["passed"] == sum(not found.gate[k] for k in at)
    (last,) = [row for row in rows if row["distance"] == 3]
    if last["passed"]:
        (at,) = [k for k, (i, j) in enumerate(zip(*found.pairs, strict=True)) if (i, j) == (1, 4)]
        assert last["in_place"] == pytest.approx(1 - found.point.carried[at])


@pytest.mark.parametrize("settings", [{"largest_norm": 1.0}, {"tolerances": (1.0,)}, {"tolerances": (-0.1,)}])
def test_a_setting_that_means_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=r"greater than 1|from 0 to 1"):
        UpdateRecipe(**settings)


def test_false_leaves_the_look_without_massive_activations_out():
    assert UpdateRecipe(largest_norm=False).largest_norm is None


def test_intervals_of_documents_alone_are_those_of_a_decomposition_without_refits(captures):
    readout, splits = captures
    found = decompose(readout, *splits, RECIPE, refits=3, readable=False, normed=False)
    alone = drawn_indices(decompose(readout, *splits, RECIPE, refits=0, readable=False, normed=False))
    rows = {row["index"]: row for row in variant_rows(found) if row["setting"] == "interval"}
    assert set(rows) >= {"in_place_without_layer0", "clarity", "commission"}
    for name, row in rows.items():
        one = alone[name].estimate
        # Refits enter the weights of pairs, and little else.
        assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((one.value, one.low, one.high), abs=1e-4)
        assert row["difference_ci_low"] is None
