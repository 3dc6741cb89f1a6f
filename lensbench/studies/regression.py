"""Is a trained transformer's in-context regression a gradient step? (von Oswald et al. 2023, arXiv 2212.07677)

A task is a weight vector ``w ~ N(0, I)``. Its context is N pairs ``(x_i, w.x_i)``, x uniform in [-1, 1], and the question
is ``w.x`` for another x. Tokens are ``(x_i, y_i)`` and, for the question, ``(x, 0)``. One layer of linear self-attention can
implement one step of gradient descent on the squared error of the context from ``w = 0``. Whether training finds this step
is measured by comparing losses, predictions and sensitivities ``d prediction / d x`` with those of the step whose rate is
best on other tasks. A model of several layers is compared with as many steps, without (gd) or with (gd++) the change of the
inputs ``x -> (I - gamma X^T X) x`` between steps that the paper found in trained models.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import Tensor, nn

from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.runtime.files import sha256, write_atomically
from lensbench.runtime.progress import QUIET, Progress, Task
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.stages import Stage, Stages
from lensbench.statistics import Array, bootstrap_weights, interval, mean_over_seeds

VERSION = 1


TABLE = "regression.csv"


TRAIN, TUNE, EVAL = 0, 1, 2
"""Random number streams of tasks; those of the last two are the same for all seeds"""


class RegressionRecipe(BaseModel):
    """The models that are trained, and the tasks that they are compared on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    threads: int | None = Field(None, ge=1)
    dimensions: int = Field(ge=1, description="of x")
    context: int = Field(ge=1, description="pairs in a task")
    layers: tuple[int, ...] = Field((1, 2), min_length=1, description="models of so many layers are trained")
    attention: tuple[Literal["linear", "softmax"], ...] = Field(("linear", "softmax"), min_length=1)
    steps: int = Field(5000, ge=1)
    batch: int = Field(2048, ge=1, description="tasks of a step")
    learning_rate: float = Field(3e-3, gt=0, description="Adam's, falling to 0 along a cosine")
    test_tasks: int = Field(4096, ge=2, description="tasks that are reported, and as many that rivals are tuned on")
    draws: int = Field(2000, ge=100)


def tasks(recipe: RegressionRecipe, count: int, seed: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs ``[B, N, d]``, outputs ``[B, N]``, question ``[B, d]`` and answer ``[B]`` of random tasks, float64."""
    rng = np.random.default_rng([seed, stream])
    w = rng.standard_normal((count, recipe.dimensions))
    x = rng.uniform(-1, 1, (count, recipe.context + 1, recipe.dimensions))
    y = np.einsum("bnd,bd->bn", x, w)
    inputs, outputs = torch.from_numpy(x), torch.from_numpy(y)
    return inputs[:, :-1], outputs[:, :-1], inputs[:, -1], outputs[:, -1]


class InContextRegressor(nn.Module):
    """Layers of self-attention without norms or MLPs; all tokens, that of the question too, attend to the context.

    ``e <- e + sum_i (P V e_i) k(K e_i, Q e)``, k the dot product (``linear``) or its softmax over the context.
    """

    def __init__(self, dimensions: int, layers: int, attention: str):
        super().__init__()
        size = dimensions + 1
        self.attention = attention
        self.query = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))
        self.key = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))
        self.value = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))
        self.output = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))
        for linear in (*self.query, *self.key, *self.value, *self.output):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.1)

    def forward(self, x: Tensor, y: Tensor, question: Tensor) -> Tensor:
        """Predicted answers ``[B]``: minus the y entry of the question's token, as in the paper."""
        context = torch.cat([x, y[..., None]], -1)
        tokens = torch.cat([context, F.pad(question, (0, 1))[:, None]], 1)
        count = x.shape[1]
        for query, key, value, output in zip(self.query, self.key, self.value, self.output, strict=True):
            looks = query(tokens) @ key(tokens[:, :count]).transpose(1, 2)
            weights = looks / count if self.attention == "linear" else looks.softmax(-1)
            tokens = tokens + output(weights @ value(tokens[:, :count]))
        return -tokens[:, -1, -1]


def descent(x: Tensor, y: Tensor, question: Tensor, rates: list[float], changes: list[float]) -> Tensor:
    """Prediction ``[B]`` of gradient descent on ``sum_i (w.x_i - y_i)^2 / 2N`` from w = 0, one step for each rate.

    It tracks the residuals of the context and the prediction of the question instead of w; both change by products of
    inputs. ``changes``: gamma of each step, which changes the inputs for the next step.
    """
    count = x.shape[1]
    residual, predicted = y, torch.zeros_like(question[:, 0])
    for rate, gamma in zip(rates, changes, strict=True):
        step = rate / count * torch.einsum("bn,bnd->bd", residual, x)
        residual = residual - torch.einsum("bnd,bd->bn", x, step)
        predicted = predicted + (question * step).sum(-1)
        moments = x.transpose(1, 2) @ x / count
        x, question = x - gamma * x @ moments, question - gamma * (question[:, None] @ moments)[:, 0]
    return predicted


def least_norm(x: Tensor, y: Tensor, question: Tensor) -> Tensor:
    """Predictions ``[B]`` of the Bayes predictor: w where the context determines it, else 0, the mean of the prior."""
    w: Tensor = (torch.linalg.pinv(x) @ y[..., None])[..., 0]
    return w.mul(question).sum(-1)


def tuned(recipe: RegressionRecipe, layers: int, kind: str) -> tuple[list[float], list[float]]:
    """Rates and gammas of ``layers`` steps with the least squared error on tasks that are not reported."""
    given = tasks(recipe, recipe.test_tasks, 0, TUNE)
    free = layers + (layers - 1 if kind == "gd++" else 0)

    def split(values: Array) -> tuple[list[float], list[float]]:
        gammas = [*values[layers:], *([0.0] * (2 * layers - len(values)))]
        return list(values[:layers]), gammas

    def loss(values: Array) -> float:
        return float((descent(*given[:3], *split(values)) - given[3]).square().mean())

    start = np.concatenate([np.ones(layers), np.zeros(free - layers)])
    best = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-9, "maxiter": 4000})
    return split(best.x)


def train(
    recipe: RegressionRecipe,
    layers: int,
    attention: str,
    seed: int,
    folder: Path,
    task: Task,
) -> None:
    """Train a regressor on fresh tasks at every step and save its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InContextRegressor(recipe.dimensions, layers, attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    rng = np.random.default_rng([seed, TRAIN])
    for step in range(recipe.steps):
        x, y, question, answer = (t.float() for t in tasks(recipe, recipe.batch, int(rng.integers(2**62)), TRAIN))
        loss = (model(x, y, question) - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            task.update(step + 1, f"squared error {loss.item():.3f}")
    save_file(model.state_dict(), folder / "model.safetensors")


def answered(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, question: Tensor
) -> tuple[Tensor, Tensor]:
    """Predictions ``[B]`` and their sensitivities to the question ``[B, d]``."""
    question = question.clone().requires_grad_()
    predicted = predict(x, y, question)
    (sensitivity,) = torch.autograd.grad(predicted.sum(), question)
    return predicted.detach(), sensitivity


def compared(
    recipe: RegressionRecipe, layers: int, attention: str, seed: int, model: InContextRegressor
) -> list[dict[str, Any]]:
    """Rows of the table for one trained model: its distance from every rival, with 95 % intervals over tasks."""
    x, y, question, answer = tasks(recipe, recipe.test_tasks, 0, EVAL)
    own, own_sensitivity = answered(model.double(), x, y, question)
    weights = bootstrap_weights(recipe.test_tasks, recipe.draws, 0)
    rows = []

    def row(against: str, quantity: str, top: Tensor, bottom: Tensor | None = None, root: bool = False) -> None:
        over = torch.ones_like(top) if bottom is None else bottom
        value = float(top.sum() / over.sum())
        low, high = interval((weights @ top.numpy()) / (weights @ over.numpy()))
        numbers = np.array([value, float(low), float(high)])
        value, low, high = np.sqrt(numbers) if root else numbers
        who = {"layers": layers, "attention": attention, "seed": seed, "against": against, "quantity": quantity}
        rows.append(who | {"value": value, "ci_low": low, "ci_high": high})

    row("", "squared_error", (own - answer).square())
    row("bayes", "squared_error", (least_norm(x, y, question) - answer).square())
    kinds = ["gd"] if layers == 1 else ["gd", "gd++"]
    for kind in kinds:
        rates, gammas = tuned(recipe, layers, kind)
        step = partial(descent, rates=rates, changes=gammas)
        theirs, sensitivity = answered(step, x, y, question)
        row(kind, "squared_error", (theirs - answer).square())
        row(kind, "prediction_distance", (own - theirs).square(), theirs.square(), root=True)
        row(kind, "sensitivity_cosine", F.cosine_similarity(own_sensitivity, sensitivity, dim=-1))
        apart = (own_sensitivity - sensitivity).square().sum(-1)
        row(kind, "sensitivity_distance", apart, sensitivity.square().sum(-1), root=True)
        # The prediction of another task's step for the same question: how similar any two tasks are.
        other, other_sensitivity = answered(step, x.roll(1, 0), y.roll(1, 0), question)
        row(f"{kind}, another task", "prediction_distance", (own - other).square(), other.square(), root=True)
        row(
            f"{kind}, another task",
            "sensitivity_cosine",
            F.cosine_similarity(own_sensitivity, other_sensitivity, dim=-1),
        )
        for k, rate in enumerate(rates):
            who = {"layers": layers, "attention": attention, "seed": seed, "against": kind, "quantity": f"rate_{k + 1}"}
            rows.append(who | {"value": rate, "ci_low": None, "ci_high": None})
    return rows


def run_regression(
    recipe: RegressionRecipe, folder: Path, *, code: dict[str, Any], progress: Progress = QUIET
) -> pd.DataFrame:
    """Train what is not trained yet, and write ``regression.csv`` and a manifest into ``folder``; returns the table.

    ``code``: what the manifest says of the versions that ran.
    """
    with claimed(folder, recipe.name, recipe.threads):
        stages = Stages(folder / "stages")
        every = list(itertools.product(recipe.layers, recipe.attention, recipe.seeds))
        progress.stages(len(every))
        rows = []
        for layers, attention, seed in every:
            model = InContextRegressor(recipe.dimensions, layers, attention)
            trained = training(recipe, stages, layers, attention, seed, progress)
            model.load_state_dict(read_tensors(trained.folder / "model.safetensors"))
            rows += compared(recipe, layers, attention, seed, model)
        table = pd.DataFrame(rows)
        table = pd.concat([table, seed_means(table)], ignore_index=True)
        write_atomically(folder / TABLE, partial(table.to_csv, index=False, lineterminator="\n"))
        manifest = {"regression": recipe.model_dump(mode="json"), "suite_name": recipe.name, **code}
        manifest["files"] = {TABLE: sha256(folder / TABLE)}
        manifest["seconds"] = dict(sorted(stages.seconds.items()))
        write_manifest(folder, manifest)
        return table


def training(
    recipe: RegressionRecipe, stages: Stages, layers: int, attention: str, seed: int, progress: Progress
) -> Stage:
    """The stage that trains one model."""
    apart = {"name", "question", "seeds", "layers", "attention", "threads", "test_tasks", "draws"}
    settings = recipe.model_dump(mode="json", exclude=apart)
    name = f"train-{attention}-{layers}-seed{seed}"

    def compute(into: Path) -> None:
        with progress.task(name, recipe.steps, "steps") as task:
            train(recipe, layers, attention, seed, into, task)

    key = {"version": VERSION, **settings, "layers": layers, "attention": attention, "seed": seed}
    found = stages.run(name, key, compute)
    progress.finished(name, stages.seconds[name], found.reused)
    return found


KEYS = ["layers", "attention", "against", "quantity"]


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each quantity: that of seed ``all`` where there is one."""
    rows = table.iloc[(table["seed"].astype(str) == "all").argsort(kind="stable")].fillna({"against": ""})
    return rows.drop_duplicates(KEYS, keep="last")


def seed_means(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of seed ``all``: the mean over seeds with its Student-t interval; none with a single seed.

    What is the same for every seed (a rival's own error: the tasks are the same) keeps its interval over tasks.
    """
    if table["seed"].nunique() < 2:
        return table.iloc[:0]
    rows = []
    for key, of in table.groupby(KEYS, sort=False):
        value, low, high = mean_over_seeds(list(of["value"]))
        if of["value"].nunique() == 1:
            value, low, high = of[["value", "ci_low", "ci_high"]].iloc[0]
        rows.append(dict(zip(KEYS, key, strict=True)) | {"seed": "all", "value": value, "ci_low": low, "ci_high": high})
    return pd.DataFrame(rows, columns=list(table.columns))
