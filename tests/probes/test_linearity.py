"""Linearity between neighbouring layers, against the published formula and plain least squares."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.known_blocks import WIDTH, drawn, known_model
from helpers.planted import V, planted, subject_of

from lensbench.probes.linearity import LOUD, SCORES, mean_of_ratios
from lensbench.probes.registry import PROBES
from lensbench.statistics import bootstrap_weights


def values(subject, layer=None):
    """Quantity -> value at a layer, or of the whole model."""
    frame = PROBES["linearity"].measure(subject).frame(20)
    rows = frame[frame["layer"].isna() if layer is None else frame["layer"] == layer]
    return dict(zip(rows["quantity"], rows["value"].astype(float), strict=True))


@pytest.fixture(scope="module")
def subject():
    return subject_of(planted("none"), count=64)


def residuals(fit_x, fit_y, x, y):
    """Held-out residuals of numpy's least squares with an intercept, and the mean of the fitted y."""
    design = np.hstack([fit_x, np.ones((len(fit_x), 1))])
    found = np.linalg.lstsq(design, fit_y, rcond=None)[0]
    return y - np.hstack([x, np.ones((len(x), 1))]) @ found, fit_y.mean(0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_scores_are_those_of_plain_least_squares_on_other_text(subject, layer):
    found = values(subject, layer)
    states = [[c.states[k].double().numpy() for k in (layer, layer + 1)] for c in (subject.fit, subject.eval)]
    (fit_x, fit_y), (x, y) = states
    lengths = [np.linalg.norm(one - fit_y.mean(0), axis=1) for one in (fit_y, y)]
    loudest = np.quantile(lengths[0], LOUD)
    for ending, fitting, among in (
        ("", slice(None), slice(None)), ("_quiet", lengths[0] <= loudest, lengths[1] <= loudest),
    ):  # fmt: skip
        error, mean = residuals(fit_x[fitting], fit_y[fitting], x[among], y[among])
        change = (y - x)[among] - (fit_y - fit_x)[fitting].mean(0)
        whole = y[among] - mean
        assert found[f"linearity{ending}"] == pytest.approx(1 - (error**2).sum() / (whole**2).sum(), abs=1e-6)
        assert found[f"linearity_block{ending}"] == pytest.approx(1 - (error**2).sum() / (change**2).sum(), abs=1e-5)
        assert found[f"linearity_unchanged{ending}"] == pytest.approx(
            1 - (change**2).sum() / (whole**2).sum(), abs=1e-6
        )


def test_on_the_tokens_it_is_fitted_to_it_is_the_published_score(subject):
    """``1 - min_A |X A - Y|^2`` of centred states that are divided by their Frobenius norms (arXiv 2405.12250)."""
    same = replace(subject, read=lambda split: subject.eval)
    for layer in range(3):
        x, y = (subject.eval.states[k].double().numpy() for k in (layer, layer + 1))
        x, y = ((one - one.mean(0)) / np.linalg.norm(one - one.mean(0)) for one in (x, y))
        left = x @ np.linalg.lstsq(x, y, rcond=None)[0] - y
        assert values(same, layer)["linearity"] == pytest.approx(1 - np.linalg.norm(left) ** 2, abs=1e-6)


def test_linear_blocks_are_linear_with_and_without_the_residual_part():
    matrices = [0.5 * drawn(k, WIDTH, WIDTH) / WIDTH**0.5 for k in (1, 2)]
    model = known_model([lambda h, ids, m=m: h + h @ m + 1 for m in matrices], drawn(3, V, WIDTH))
    found = values(subject_of(model, count=64))
    assert {name for name in found if name.endswith("_mean")} == {f"{name}_mean" for name in SCORES}
    for name in ("linearity", "linearity_block", "linearity_quiet", "linearity_block_quiet"):
        assert found[f"{name}_mean"] == pytest.approx(1, abs=1e-5)
    assert found["linearity_unchanged_mean"] < 0.9


def test_what_a_block_adds_at_random_is_no_linear_part_of_it():
    """It adds a word's own vector, which a linear map of an unrelated state cannot know beyond its few words."""
    added = drawn(2, V, WIDTH)
    model = known_model([lambda h, ids: h, lambda h, ids: h + 0.3 * added[ids]], drawn(3, V, WIDTH))
    found = values(subject_of(model, count=64), 1)
    assert found["linearity"] > 0.9
    assert found["linearity_block"] < 0.5


def test_a_random_basis_has_no_residual_part_but_the_same_linearity(subject):
    turns = torch.stack([torch.linalg.qr(drawn(k, 32, 32).double())[0] for k in range(4)])
    turned = {
        split: replace(c, states=(c.states.double() @ turns.mT).float())
        for split, c in (("fit", subject.fit), ("eval", subject.eval))
    }
    found = values(replace(subject, rotated=True, read=turned.__getitem__), 1)
    assert found["linearity"] == pytest.approx(values(subject, 1)["linearity"], abs=1e-5)
    assert np.isnan(found["linearity_block"])


def test_the_mean_over_layers_varies_as_the_mean_of_its_ratios_does():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 15, 400).astype(float)
    ratios = [(tokens * rng.uniform(0, 1, 400) * size, tokens * size) for size in (1.0, 50.0)]
    weights = bootstrap_weights(400, 2000, 0)
    exact = np.mean([(weights @ top) / (weights @ bottom) for top, bottom in ratios], axis=0)
    found = (weights @ mean_of_ratios(ratios, tokens)) / (weights @ tokens)
    plain = np.mean([top.sum() / bottom.sum() for top, bottom in ratios])
    assert mean_of_ratios(ratios, tokens).sum() / tokens.sum() == pytest.approx(plain)
    assert found.std() == pytest.approx(exact.std(), rel=0.05)
    assert np.corrcoef(found, exact)[0, 1] > 0.99
