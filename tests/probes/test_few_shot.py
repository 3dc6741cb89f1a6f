"""Few-shot error transport of learners whose update is known: by the error, by the label alone, or not at all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import learners
from helpers.learners import KnownLearner, known_prompts
from helpers.planted import V, planted, subject_of

from lensbench.probes.few_shot import (
    _add_regression,
    coefficients,
    label_columns,
    measure,
    moments,
    predicted_elsewhere,
)
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.averaging import add_beyond_averaging, averaging_columns, counts_before, instrumented
from lensbench.probes.tools.crossfit import FOLDS, Estimates
from lensbench.probes.tools.prompts import LABELS, PROMPTS, Form, draw_prompts

FORM = Form([V - 2], [V - 1])


class Learner:
    """Logits of the labels 0..3 begin at a prompt's own and move by ``alpha (1[y] - ratio p)`` behind every example."""

    device = torch.device("cpu")

    def __init__(self, alpha: float, ratio: float):
        self.alpha, self.ratio = alpha, ratio

    def at(self, ids, rows, columns):
        found = {}
        for b, prompt in enumerate(ids.numpy()):
            rng = np.random.default_rng(int(prompt[0]) + 1)
            logits = 2 * rng.standard_normal(LABELS)
            for start in range(0, len(prompt), FORM.tokens):
                found[b, start + FORM.answer] = logits
                p = np.exp(logits) / np.exp(logits).sum()
                logits = logits + self.alpha * (np.eye(LABELS)[prompt[start + 2]] - self.ratio * p)
        out = np.full((len(rows), V), -50.0)
        out[:, :LABELS] = [found[int(b), int(c)] for b, c in zip(rows, columns, strict=True)]
        return None, torch.from_numpy(out)


def prompts():
    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(0))
    place = (drawn.labels[..., None] == drawn.choices[:, None]).argmax(-1)
    return replace(drawn, labels=place, choices=np.tile(np.arange(LABELS), (PROMPTS, 1)))


def test_prompts_are_what_they_are_said_to_be():
    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(1))
    row = np.arange(PROMPTS)
    assert ((drawn.queries[row, drawn.at] == drawn.queries[row, drawn.at + 1]) == drawn.same).all()
    assert (drawn.choices[row, drawn.place] == drawn.labels[row, drawn.at]).all()
    assert drawn.at.min() >= 1
    assert drawn.at.max() <= 10
    assert 0.4 < drawn.same.mean() < 0.6
    assert not (set(drawn.queries[0]) & set(drawn.choices[0])), "a word is a query or a label"
    ids = FORM.written(drawn.queries, drawn.labels)
    assert ids.shape == (PROMPTS, 48)
    assert (ids[:, 1::4] == V - 2).all()
    assert (ids[:, 3::4] == V - 1).all()
    assert (ids[:, 0::4] == drawn.queries).all()
    assert (ids[:, 2::4] == drawn.labels).all()


@pytest.mark.parametrize(("alpha", "ratio"), [(1.3, 1.0), (0.7, 0.6), (2.0, 0.0)])
def test_the_update_of_a_learner_is_found(alpha, ratio):
    changes, shown, predicted, learned = measure(Learner(alpha, ratio), prompts(), FORM)
    sums = moments(changes, shown, predicted, np.arange(PROMPTS) % FOLDS).sum(0)
    found, beta = coefficients(sums)
    assert found == pytest.approx(alpha, abs=1e-9)
    assert beta == pytest.approx(alpha * ratio, abs=1e-9)
    assert learned.shape == (PROMPTS,)
    assert learned.min() > 0
    assert learned.max() < 1


def test_a_model_that_learns_nothing_from_its_prompt_says_so():
    subject = subject_of(planted("none"))
    frame = PROBES["few_shot"].measure(subject).frame().set_index("quantity")
    learned = frame.loc["few_shot_learned"]
    assert learned["ci_low"] < 0.25 < learned["ci_high"] or abs(learned["value"] - 0.25) < 0.08
    for kind in ("same", "other"):
        alpha = frame.loc[f"few_shot_alpha_{kind}"]
        undefined = np.isnan(frame.loc[f"few_shot_ratio_{kind}", "value"])
        assert undefined == (alpha["ci_low"] <= 0 <= alpha["ci_high"])
        assert float(frame.loc[f"few_shot_error_gain_{kind}", "value"]) < 0.1
        assert float(frame.loc[f"few_shot_gain_beyond_averaging_{kind}", "value"]) < 0.01


def test_rotated_views_are_skipped_with_the_reason():
    assert "not rotated" in PROBES["few_shot"].measure(subject_of(planted("none"), rotated=True)).frame()["reason"][0]


def least_squares_error(x, y, fold, group, left_out):
    rest = ~np.isin(group, left_out)
    weights = np.linalg.lstsq(x[rest], y[rest], rcond=None)[0]
    return np.square(y[group == fold] - x[group == fold] @ weights).sum()


def test_intervals_of_gains_fit_the_regressions_again_without_each_group():
    """Of a weak update, the errors of single groups alone cover the gain in 86 to 94 % of the sets of prompts."""
    rng, group = np.random.default_rng(0), np.arange(64) % FOLDS
    shown = np.eye(LABELS)[rng.integers(0, LABELS, 64)] - 1 / LABELS
    predicted, noise = rng.dirichlet(np.ones(LABELS), 64) - 1 / LABELS, rng.standard_normal((2, 64, LABELS))
    change = 0.3 * (shown - predicted) + noise[0] - noise[0].mean(1, keepdims=True)
    known = noise[1] - noise[1].mean(1, keepdims=True)
    change, shown, predicted, known = map(torch.from_numpy, (change, shown, predicted, known))
    found = Estimates("few_shot", FOLDS)
    _add_regression(found, "same", change, shown, predicted, group)
    add_beyond_averaging(found, "same", known[..., None], predicted, predicted, change, group)
    rows = {quantity: (value, without) for quantity, *_, value, without in found.rows}
    one, y, p, z = (x.numpy().ravel() for x in (torch.ones_like(shown), shown, predicted, known))
    rivals = {
        "copying_r2": ([one], [one, y]),
        "error_gain": ([one, y], [one, y, p]),
        "gain_beyond_averaging": ([one, z], [one, z, p]),
    }
    target, of = change.numpy().ravel(), np.repeat(group, LABELS)
    for name, inputs in rivals.items():
        value, without = rows[f"few_shot_{name}_same"]
        for k in range(FOLDS):
            less, more, total = (
                sum(least_squares_error(np.stack(x, 1), target, j, of, (j, k)) for j in range(FOLDS) if j != k)
                for x in (*inputs, [one])
            )
            assert without[k] == pytest.approx((less - more) / total, rel=1e-6), name
        less, more, total = (
            sum(least_squares_error(np.stack(x, 1), target, j, of, (j,)) for j in range(FOLDS))
            for x in (*inputs, [one])
        )
        assert value == pytest.approx((less - more) / total, rel=1e-6), name


# Averaging of labels against errors


def beyond_averaging(learner, seed=0):
    """alpha, the ratio, and what lies beyond averaging, of the prompts with the same query; and what was learned."""
    prompts, group = known_prompts(seed), np.arange(PROMPTS) % FOLDS
    change, shown, p, learned = measure(learner, prompts, learners.FORM)
    of = prompts.same
    alpha, beta = coefficients(moments(change[of], shown[of], p[of], group[of]).sum(0))
    elsewhere, found = predicted_elsewhere(learner, prompts, learners.FORM), Estimates("few_shot", FOLDS)
    columns = label_columns(prompts, True)
    add_beyond_averaging(found, "same", columns[of], p[of], elsewhere[of], change[of], group[of])
    return alpha, beta / alpha, found.done().frame().set_index("quantity"), learned.mean()


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "size"), [("average", 4.0), ("log", 1.5), ("error", 1.5)])
def test_averages_of_labels_and_updates_by_errors_fall_on_two_sides(kind, size, noise):
    """They learn alike, and the ratio is well above 0 for all three."""
    _, ratio, frame, learned = beyond_averaging(KnownLearner(kind, size, noise))
    assert ratio > 0.4
    assert 0.6 < learned < 0.75
    beta, gain = frame.loc["few_shot_error_beyond_averaging_same"], frame.loc["few_shot_gain_beyond_averaging_same"]
    if kind == "error":
        assert beta["ci_low"] > 0.8
        assert beta["value"] == pytest.approx(size, abs=1e-6 if noise == 0 else 0.4)
        assert gain["ci_low"] > 0
    else:
        assert abs(beta["value"]) < (1e-6 if noise == 0 else 0.3)
        assert beta["ci_low"] < 1e-6
        assert gain["value"] < (1e-6 if noise == 0 else 0.003)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("average", 4.0), ("log", 1.5), ("error", 1.5)])
def test_intervals_of_what_lies_beyond_averaging_are_right_under_noise(kind, size):
    """Noise of one nat is larger than most updates: nothing may be found of an average, and errors not always."""
    true = size if kind == "error" else 0.0
    right, found = 0, 0
    for seed in range(12):
        beta = beyond_averaging(KnownLearner(kind, size, 1.0, seed), seed)[2].loc[
            "few_shot_error_beyond_averaging_same"
        ]
        right += beta["ci_low"] <= true <= beta["ci_high"]
        found += beta["ci_low"] > 0
    assert right >= 10
    assert kind == "error" or found <= 2


def test_what_a_mean_of_labels_moves_by_is_in_its_columns():
    labels = np.array([[0, 1, 1, 3, 2]])
    counts = counts_before(labels, np.array([4]), np.array([[True, True, False, True, True]]), 4)
    assert counts.tolist() == [[1, 1, 0, 1]]
    shown = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    mean, step, log_step = averaging_columns(counts, shown)[0].unbind(-1)
    before, after = np.array([1, 1, 0, 1]) / 3, np.array([1, 2, 0, 1]) / 4
    np.testing.assert_allclose(mean, before - before.mean(), atol=1e-12)
    np.testing.assert_allclose(step, after - before, atol=1e-12)
    smooth = np.log((np.array([1, 2, 0, 1]) + 0.25) / (np.array([1, 1, 0, 1]) + 0.25))
    np.testing.assert_allclose(log_step, smooth - smooth.mean(), atol=1e-12)


def test_the_instruments_beta_is_that_of_two_stages_of_least_squares():
    rng = np.random.default_rng(0)
    known, z, hidden = rng.standard_normal((200, 2)), rng.standard_normal(200), rng.standard_normal(200)
    p = known @ [1.0, -1.0] + z + hidden
    change = known @ [0.5, 2.0] - 0.7 * p + hidden  # what is hidden moves both: least squares alone is wrong
    one = np.ones((200, 1))
    x = np.concatenate([one, known, p[:, None], z[:, None], change[:, None]], 1)
    first = np.concatenate([one, known, z[:, None]], 1)
    told = first @ np.linalg.lstsq(first, p, rcond=None)[0]
    second = np.concatenate([one, known, told[:, None]], 1)
    beta = -np.linalg.lstsq(second, change, rcond=None)[0][-1]
    assert instrumented(torch.from_numpy(x.T @ x), 2)[0] == pytest.approx(beta, rel=1e-6)
    assert beta == pytest.approx(0.7, abs=0.2)


def test_alpha_and_beta_are_the_same_to_the_last_digit_and_a_constant_prediction_has_no_beta():
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((50, 4)))
    sums = x.T @ x
    (ss, sp), (_, pp) = sums[1:3, 1:3].tolist()
    sc, pc = sums[1:3, 3].tolist()
    assert coefficients(sums) == ((pp * sc - sp * pc) / (ss * pp - sp**2), (sp * sc - ss * pc) / (ss * pp - sp**2))
    weights = np.linalg.lstsq(x[:, 1:3].numpy(), x[:, 3].numpy(), rcond=None)[0]
    assert coefficients(sums) == pytest.approx((weights[0], -weights[1]))
    constant = sums.clone()
    constant[2] = constant[:, 2] = 0
    alpha, beta = coefficients(constant)
    assert alpha == pytest.approx(sc / ss)
    assert np.isnan(beta)
