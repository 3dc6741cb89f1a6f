"""Gradient descent in activation space: layers against explicit steps, and trained attention against the best-tuned one."""

import json

import numpy as np
import pytest
import torch
from helpers.planted import V, planted, subject_of
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.models import build
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM
from lensbench.probes.registry import PROBES
from lensbench.studies.regression import (
    InContextRegressor,
    RegressionRecipe,
    answered,
    descent,
    least_norm,
    tasks,
    tuned,
)

SHAPE = {"vocab_size": V, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


def pc(**settings):
    model = build("predictive-coding", seed=1, **SHAPE, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def value(frame, quantity):
    return frame[frame["quantity"] == quantity]["value"].astype(float).to_numpy()


def test_layers_with_linear_kernel_are_explicit_gradient_steps_to_float64():
    for settings in ({}, {"decay": False}):
        frame = PROBES["gradient_steps"].measure(subject_of(pc(kernel="linear", **settings))).frame()
        assert len(value(frame, "gradient_step_error")) == 3
        assert value(frame, "gradient_step_error").max() < 1e-12
        assert value(frame, "gradient_step_cosine") == pytest.approx(np.ones(3), abs=1e-12)


def test_layers_with_another_kernel_are_not():
    frame = PROBES["gradient_steps"].measure(subject_of(pc(kernel="exp"))).frame()
    assert value(frame, "gradient_step_error").min() > 0.05
    assert (value(frame, "gradient_step_cosine") < 0.999).all()


@pytest.mark.parametrize("settings", [{"error": "none"}, {"kernel": "linear", "delta_rule": True}])
def test_variants_that_make_no_such_step_say_so(settings):
    frame = PROBES["gradient_steps"].measure(subject_of(pc(**settings))).frame()
    assert "no step along a gradient" in frame["reason"][0]
    assert (
        "no errors at known places"
        in PROBES["gradient_steps"].measure(subject_of(planted("none"))).frame()["reason"][0]
    )


def test_prefix_and_whole_are_read_out_by_the_uniform_variant():
    model = pc()
    subject = subject_of(model, count=16)
    frame = PROBES["prefix_read_out"].measure(subject).frame(200).set_index("quantity")["value"].astype(float)
    twin = PredictiveCodingForCausalLM(PredictiveCodingConfig(**{**model.config.to_dict(), "causal": False})).eval()
    twin.load_state_dict(model.state_dict())
    kl, change, future = [], [], []
    with torch.no_grad():
        for row, ids in enumerate(torch.from_numpy(subject.windows.ids)):
            n = int(subject.windows.positions[row, subject.windows.valid[row].sum() // 2])
            p, q = (twin(x[None]).logits[0, n].double().log_softmax(-1) for x in (ids[: n + 1], ids))
            kl.append(float((p.exp() * (p - q)).sum()))
            change.append(float(p[ids[n + 1]] - q[ids[n + 1]]))
            future.append(len(ids) - n - 1)
    assert frame["full_kl"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert np.mean(kl) > 1e-3
    assert frame["full_ce_change"] == pytest.approx(np.mean(change), rel=1e-4)
    assert frame["future_tokens"] == pytest.approx(np.mean(future))
    assert "no update" in PROBES["prefix_read_out"].measure(subject_of(planted("none"), count=8)).frame()["reason"][0]


# In-context linear regression (arXiv 2212.07677)

RECIPE = RegressionRecipe(name="r", question="?", dimensions=3, context=6, steps=800, batch=256, test_tasks=256)


def test_descent_is_that_of_autograd_on_the_weights():
    x, y, question, _ = tasks(RECIPE, 5, 0, 0)
    rates = [0.7, 0.4, 0.2]
    found = descent(x, y, question, rates, [0.0] * 3)
    for b in range(5):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for rate in rates:
            loss = (x[b] @ w - y[b]).square().sum() / (2 * RECIPE.context)
            (gradient,) = torch.autograd.grad(loss, w)
            w = (w - rate * gradient).detach().requires_grad_()
        assert float(found[b]) == pytest.approx(float(question[b] @ w.detach()), rel=1e-9)


def test_one_step_of_gd_is_written_by_linear_attention_as_the_paper_constructs_it():
    x, y, question, _ = tasks(RECIPE, 20, 1, 0)
    model = InContextRegressor(3, 1, "linear").double()
    with torch.no_grad():
        look = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
        model.query[0].weight.copy_(look)
        model.key[0].weight.copy_(look)
        model.value[0].weight.copy_(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)))
        model.output[0].weight.copy_(-0.8 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(model(x, y, question), descent(x, y, question, [0.8], [0.0]))
    predicted, sensitivity = answered(model, x, y, question)
    step = 0.8 * torch.einsum("bn,bnd->bd", y, x) / RECIPE.context
    torch.testing.assert_close(sensitivity, step)
    torch.testing.assert_close(predicted, (step * question).sum(-1))


def test_the_best_rate_is_that_of_least_squares_and_more_steps_come_closer():
    (rate,), _ = tuned(RECIPE, 1, "gd")
    x, y, question, answer = tasks(RECIPE, RECIPE.test_tasks, 0, 1)
    unit = descent(x, y, question, [1.0], [0.0])
    assert rate == pytest.approx(float((unit * answer).sum() / unit.square().sum()), rel=1e-3)

    def loss(steps, kind):
        return float((descent(x, y, question, *tuned(RECIPE, steps, kind)) - answer).square().mean())

    assert loss(1, "gd") > loss(2, "gd") > loss(2, "gd++") > 0


def test_the_bayes_predictor_is_the_least_norm_solution():
    few = RECIPE.model_copy(update={"context": 2})
    x, y, question, _ = tasks(few, 4, 0, 0)
    for b in range(4):
        w = np.linalg.lstsq(x[b].numpy(), y[b].numpy(), rcond=None)[0]
        assert float(least_norm(x, y, question)[b]) == pytest.approx(float(question[b].numpy() @ w), rel=1e-8)


@pytest.mark.slow
def test_trained_attention_takes_the_best_tuned_step(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(
        'name = "r"\nquestion = "?"\nseeds = [0, 1]\nthreads = 1\ndimensions = 3\ncontext = 6\nlayers = [1]\n'
        'attention = ["linear"]\nsteps = 800\nbatch = 256\ntest_tasks = 512\n'
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["regression", str(file), "--out", str(out)])
    assert result.exit_code == 0, result.output
    import pandas as pd

    table = pd.read_csv(out / "regression.csv").fillna({"against": ""})
    mean = table[table["seed"] == "all"].set_index(["against", "quantity"])["value"]
    assert mean["gd", "sensitivity_cosine"] > 0.97
    assert mean["", "squared_error"] == pytest.approx(mean["gd", "squared_error"], rel=0.05)
    assert mean["gd", "prediction_distance"] < 0.25 < mean["gd, another task", "prediction_distance"]
    assert abs(mean["gd, another task", "sensitivity_cosine"]) < 0.2
    assert (out / "regression.png").stat().st_size > 10_000
    before = (out / "regression.csv").read_bytes()
    again = CliRunner().invoke(app, ["regression", str(file), "--out", str(out)])
    assert again.exit_code == 0
    assert "reused" in again.output
    assert (out / "regression.csv").read_bytes() == before
    assert json.loads((out / "manifest.json").read_text())["regression"]["dimensions"] == 3
    wrong = CliRunner().invoke(app, ["run", str(file)])
    assert wrong.exit_code != 0
    assert "lensbench regression" in wrong.output
