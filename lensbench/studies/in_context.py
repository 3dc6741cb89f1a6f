"""Synthetic documents whose best predictor is known: does subtracting the prediction help where it should?

Every document is a Markov chain with its own table, from a token to the distribution of the next one. A model must learn the
table in the context. The exact Bayes predictor has a closed form. A model's distance from it is its cross-entropy minus
that of the predictor on the same tokens.

``noisy-map``: for each token one successor is drawn uniformly. It follows with probability ``1 - noise``, otherwise any
token does. To copy the last successor nearly solves the task.
``dirichlet``: a row is drawn from ``Dirichlet(concentration * B_a)`` around a table B that all documents share. Observed
successors must be *weighed* against B. An update by the error ``E[y] - E^T p`` is the gradient step that does so; adding
``E[y]`` alone grows with every repetition.
``thresholds``: each bit of the next token tells whether the token reaches a threshold (or whether it does not), and is wrong
with probability ``noise``. Every document has its own thresholds. Rows are not independent, but the bits are, and each has
few possible rules. The successor of one token is evidence about all others, whose codes overlap: a sum of co-occurrences
does not solve a regression on correlated inputs, but steps along the errors approach the solution.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from statsmodels.stats.multitest import multipletests
from torch import Tensor
from transformers import AutoModelForCausalLM

from lensbench.data.recipe import TrainingRecipe
from lensbench.data.windows import Windows
from lensbench.models import build
from lensbench.models.pretrained import without_progress_bars
from lensbench.models.training import StepReport, train
from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.runtime.files import sha256, write_atomically
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.stages import Stage, Stages
from lensbench.statistics import Array
from lensbench.studies.curves import (
    ALL,
    BOUND,
    CurvePoint,
    CurveRecipe,
    PositionSums,
    curve_table,
    differences,
    score_positions,
)

VERSION = 1
"""Increased when the same task gives other numbers"""


TABLE, GAPS = "task.csv", "differences.csv"


DEV, EVAL = 1, 2
"""Random number streams of the documents that choose learning rates, and of those that are reported; training has others"""


BASE_SPREAD = 0.3
"""Concentration of each row of B: few likely tokens and many unlikely ones"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskRecipe(_Strict):
    """One kind of documents."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["noisy-map", "dirichlet", "thresholds"]
    vocab_size: int = Field(16, ge=2)
    noise: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="of noisy-map: a token drawn uniformly instead; of thresholds: a bit flipped",
    )
    concentration: float = Field(2.0, gt=0, description="of dirichlet: how close tables lie to the shared one")

    @model_validator(mode="after")
    def _whole_bits(self) -> "TaskRecipe":
        if self.kind == "thresholds" and self.vocab_size & (self.vocab_size - 1):
            raise ValueError(f"vocab_size is {self.vocab_size}: thresholds need a power of two")
        return self

    @cached_property
    def bits(self) -> Array:
        """The bits of each token ``[V, M]``"""
        tokens = np.arange(self.vocab_size)[:, None]
        return (tokens >> np.arange(self.vocab_size.bit_length() - 1) & 1).astype(float)

    @cached_property
    def rules(self) -> Array:
        """The bit that each rule gives each token ``[2V, V]``: it reaches the threshold, or it does not"""
        reached = (np.arange(self.vocab_size) >= np.arange(self.vocab_size)[:, None]).astype(float)
        return np.concatenate([reached, 1 - reached])

    @cached_property
    def base(self) -> Array:
        """The table B ``[V, V]`` that all documents of a dirichlet task share."""
        return np.random.default_rng([3, 0, 1]).dirichlet(np.full(self.vocab_size, BASE_SPREAD), self.vocab_size)

    def tables(self, rng: np.random.Generator, documents: int) -> Array:
        """The table of each document, ``[D, V, V]``, rows summing to one."""
        size = self.vocab_size
        if self.kind == "noisy-map":
            follows = rng.integers(0, size, (documents, size))
            return self.noise / size + (1 - self.noise) * np.eye(size)[follows]
        if self.kind == "thresholds":
            rule = rng.integers(0, len(self.rules), (documents, self.bits.shape[1]))
            return self.joint(np.abs(self.rules[rule] - self.noise).transpose(0, 2, 1))
        # A row of Dirichlet variables is one of normalised Gamma variables; tiny shapes may all underflow to zero.
        drawn = rng.gamma(self.concentration * self.base, size=(documents, size, size)) + 1e-300
        rows: Array = drawn / drawn.sum(-1, keepdims=True)
        return rows

    def joint(self, one: Array) -> Array:
        """Probability of every token ``[..., V]``, given the probability of each bit to be one ``[..., M]``."""
        tokens: Array = np.where(self.bits == 1, one[..., None, :], 1 - one[..., None, :]).prod(-1)
        return tokens

    def documents(self, seed: list[int], documents: int, length: int) -> NDArray[np.int64]:
        """Token ids ``[D, T]``: the first token uniform, then each document's own chain."""
        rng = np.random.default_rng(seed)
        ahead = self.tables(rng, documents).cumsum(-1)
        ids = np.empty((documents, length), dtype=np.int64)
        ids[:, 0] = rng.integers(0, self.vocab_size, documents)
        for t in range(1, length):
            row = ahead[np.arange(documents), ids[:, t - 1]]
            drawn = rng.random(documents) * row[:, -1]
            ids[:, t] = (drawn[:, None] >= row).sum(1)
        return ids

    def bayes(self, ids: NDArray[np.int64]) -> Array:
        """Exact probabilities of the next token at each position but the last: ``[D, T-1, V]``."""
        size, every = self.vocab_size, np.arange(len(ids))
        evidence = np.zeros(
            (len(ids), len(self.rules), self.bits.shape[1])
        )  # of thresholds: log-likelihood of each rule
        counts = np.zeros((len(ids), size, size))
        found = np.empty((len(ids), ids.shape[1] - 1, size))
        for t in range(ids.shape[1] - 1):
            if t:
                counts[every, ids[:, t - 1], ids[:, t]] += 1
                said = self.rules[:, ids[:, t - 1]].T[:, :, None] == self.bits[ids[:, t]][:, None]
                evidence += np.where(said, np.log(1 - self.noise), np.log(self.noise))
            seen = counts[every, ids[:, t]]
            if self.kind == "noisy-map":
                # Each time that b followed multiplies the odds of "b is the successor" by exp of this.
                factor = np.log((1 - self.noise + self.noise / size) / (self.noise / size))
                weight = np.exp(factor * (seen - seen.max(1, keepdims=True)))
                found[:, t] = self.noise / size + (1 - self.noise) * weight / weight.sum(1, keepdims=True)
            elif self.kind == "thresholds":
                weight = np.exp(evidence - evidence.max(1, keepdims=True))
                says = np.abs(self.rules[:, ids[:, t]].T[:, :, None] - self.noise)
                found[:, t] = self.joint((weight * says).sum(1) / weight.sum(1))
            else:
                prior = self.concentration * self.base[ids[:, t]]
                found[:, t] = (seen + prior) / (seen.sum(1, keepdims=True) + self.concentration)
        return found

    def bayes_nats(self, ids: NDArray[np.int64]) -> Array:
        """Loss of the Bayes predictor at each position but the last, nats: ``[D, T-1]``."""
        return -np.log(np.take_along_axis(self.bayes(ids), ids[:, 1:, None], 2)[..., 0])


class Contestant(_Strict):
    """A model that is trained on the tasks."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    family: str
    settings: dict[str, Any] = Field(default_factory=dict)


class InContext(_Strict):
    """Models of equal size on tasks whose Bayes predictor is known."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    seeds: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1, description="of the trainings that are reported")
    tuning_seed: int = Field(0, ge=0, description="of those that choose a rate; none of the reported ones")
    threads: int | None = Field(None, ge=1)
    d_model: int = Field(gt=0)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    parameters: int = Field(gt=0, description="met within 1 % by the width of the MLPs")
    training: TrainingRecipe = TrainingRecipe()
    learning_rates: tuple[float, ...] = Field(
        (0.024, 0.048, 0.096), min_length=1, description="tried by every model on every task"
    )
    documents: int = Field(512, ge=2, description="held-out documents; as many again choose the rate")
    positions: tuple[int, ...] = (1, 16, 64)
    draws: int = Field(2000, ge=100)
    tasks: tuple[TaskRecipe, ...] = Field(min_length=1)
    contestants: tuple[Contestant, ...] = Field(min_length=1)
    claim: tuple[str, str] | None = Field(
        None, description="two models whose difference over whole documents is tested on every task (Holm)"
    )

    @property
    def trainings(self) -> int:
        """Number of trainings in all"""
        return len(self.tasks) * len(self.contestants) * (len(self.learning_rates) + len(self.seeds))

    @model_validator(mode="after")
    def _distinct(self) -> "InContext":
        for what in ("tasks", "contestants"):
            names = [x.name for x in getattr(self, what)]
            if len(set(names)) < len(names):
                raise ValueError(f"two of {what} have one name")
        if any(c.name == BOUND for c in self.contestants):
            raise ValueError(f"no contestant can be named {BOUND!r}: so are the rows of the Bayes predictor")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} is one of seeds: what was selected on is not to be reported"
            )
        CurveRecipe(positions=self.positions)  # they rise
        unknown = set(self.claim or ()) - {c.name for c in self.contestants}
        if unknown:
            raise ValueError(f"claim is about {sorted(unknown)[0]!r}, which is no contestant")
        if self.positions[-1] > self.training.length - 2:
            raise ValueError(f"positions: documents of {self.training.length} tokens end at {self.training.length - 2}")
        return self


def windows_of(ids: NDArray[np.int64]) -> Windows:
    """Whole documents as windows; each is its own cluster."""
    documents, length = ids.shape
    every = np.arange(documents)
    scored = np.zeros((documents, 1), dtype=np.int64)
    names = tuple(f"document {k:06d}" for k in every)
    return Windows(
        ids,
        np.full(documents, length),
        scored,
        np.ones((documents, 1), dtype=bool),
        every,
        names,
        np.zeros(documents, dtype=np.int64),
        np.ones((documents, 1), dtype=np.int32),
    )


@dataclass(frozen=True)
class TaskStages:
    """The trainings and scores of one folder, as stages: finished ones are reused."""

    recipe: InContext
    stages: Stages
    device: torch.device
    progress: Progress

    def stage(self, name: str, key: dict[str, Any], compute: Callable[[Path], None]) -> Stage:
        """The stage of this name, computed unless it is finished, and reported."""
        found = self.stages.run(name, {**key, "code": VERSION, "device": self.device.type}, compute)
        self.progress.finished(name, self.stages.seconds[name], found.reused)
        return found

    def trained(self, task: TaskRecipe, who: Contestant, seed: int, rate: float) -> Stage:
        """The stage that trains a model on a task."""
        recipe = self.recipe.training.model_copy(update={"learning_rate": rate})
        shape = {key: getattr(self.recipe, key) for key in ("d_model", "layers", "heads", "parameters")}
        name = f"train-{task.name}-{who.name}-seed{seed}-{rate:g}"

        def compute(folder: Path) -> None:
            network = build(
                who.family, vocab_size=task.vocab_size, context=recipe.length, seed=seed, **shape, **who.settings
            )

            def batch(step: int) -> Tensor:
                return torch.from_numpy(task.documents([0, seed, step], recipe.batch, recipe.length))

            start = time.perf_counter()
            with self.progress.task(name, recipe.steps, "steps") as under_way:

                def report(at: StepReport) -> None:
                    rate = at.tokens / (time.perf_counter() - start)
                    under_way.update(at.step, f"loss {at.loss:.3f}, {rate:,.0f} tokens/s")

                train(network, batch, recipe, seed=seed, checkpoints=folder, device=self.device, report=report)
            network.cpu().save_pretrained(folder)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)

        key = {"task": task.model_dump(), "model": {"family": who.family, **shape, **who.settings}, "seed": seed}
        key["training"] = recipe.model_dump(exclude={"checkpoint_every"})
        return self.stage(name, key, compute)

    def scored(self, task: TaskRecipe, training: Stage, split: int) -> PositionSums:
        """Summed losses of a trained model on whole documents that training has not seen."""

        def compute(folder: Path) -> None:
            model = AutoModelForCausalLM.from_pretrained(training.folder, dtype=torch.float32).eval()
            ids = task.documents([split, 0, 1], self.recipe.documents, self.recipe.training.length)
            score_positions(torch.nn.Module.to(model, self.device), windows_of(ids), self.recipe.positions).save(folder)

        key = {"trained": training.digest, "split": split, "documents": self.recipe.documents}
        key["positions"] = self.recipe.positions
        part = "dev" if split == DEV else "eval"
        return PositionSums.load(
            self.stage(f"score-{part}-{training.folder.name.removeprefix('train-')}", key, compute).folder
        )

    def best_rate(self, task: TaskRecipe, who: Contestant) -> float:
        """The learning rate whose training predicts the dev documents best."""
        tried = {}
        for rate in self.recipe.learning_rates:
            dev = self.scored(task, self.trained(task, who, self.recipe.tuning_seed, rate), DEV)
            tried[rate] = float(dev.nats.sum() / dev.tokens.sum())
        return min(tried, key=lambda rate: tried[rate])

    def bound(self, task: TaskRecipe) -> PositionSums:
        """Summed losses of the Bayes predictor on the documents that are reported."""
        ids = task.documents([EVAL, 0, 1], self.recipe.documents, self.recipe.training.length)
        nats = task.bayes_nats(ids)
        first, length = self.recipe.positions, ids.shape[1]
        edges = [*first, length - 1]
        sums = np.stack([nats[:, a:b].sum(1) for a, b in itertools.pairwise(edges)], 1)
        sizes = np.tile(np.diff(edges).astype(float), (len(ids), 1))
        return PositionSums(sums, sizes, np.arange(len(ids)))

    def tables(self, task: TaskRecipe) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """The rows of ``task.csv`` and of ``differences.csv`` of one task."""
        recipe, bound = self.recipe, self.bound(task)
        losses = [CurvePoint(BOUND, recipe.seeds[0], 0, 0.0, bound)]
        excess: list[CurvePoint] = []
        chosen: dict[str, float] = {}
        for who in recipe.contestants:
            chosen[who.name] = best = self.best_rate(task, who)
            for seed in recipe.seeds:
                scored = self.scored(task, self.trained(task, who, seed, best), EVAL)
                above = PositionSums(scored.nats - bound.nats, scored.tokens, scored.cluster)
                losses.append(CurvePoint(who.name, seed, recipe.training.tokens, 0.0, scored))
                excess.append(CurvePoint(who.name, seed, recipe.training.tokens, 0.0, above))
        length = recipe.training.length
        table = curve_table(losses, recipe.positions, length, recipe.draws)
        beyond = curve_table(excess, recipe.positions, length, recipe.draws)
        renamed = {"ce": "excess", "ce_ci_low": "excess_ci_low", "ce_ci_high": "excess_ci_high"}
        where = ["model", "seed", "train_tokens", "positions"]
        table = table.merge(beyond.rename(columns=renamed).drop(columns="reason"), on=where, how="left")
        table.insert(0, "task", task.name)
        table["learning_rate"] = table["model"].map(chosen)
        ends = {min(recipe.learning_rates), max(recipe.learning_rates)} if len(recipe.learning_rates) > 1 else set()
        table["at_edge"] = table["learning_rate"].isin(ends) & table["learning_rate"].notna()
        gaps = []
        for against, model in itertools.combinations((c.name for c in recipe.contestants), 2):
            for gap in differences(beyond, model, against):
                del gap["train_tokens"]
                gaps.append({"task": task.name, "model": model, "against": against, **gap})
        return table.drop(columns="train_tokens"), gaps


def run_in_context(
    recipe: InContext, folder: Path, *, device: torch.device, code: dict[str, Any], progress: Progress = QUIET
) -> dict[str, pd.DataFrame]:
    """Train and score every model on every task; ``task.csv``, ``differences.csv`` and a manifest in ``folder``.

    Each model tries the same learning rates on each task with a seed of their own, the best on the dev documents trains the
    reported ones; ``at_edge``: it is the largest or smallest tried. ``p`` is uncorrected, ``p_holm`` of the claim alone.
    ``code``: what the manifest says of the versions that ran. Finished trainings are reused.
    Raises :class:`LensbenchError` for a folder that holds something else.
    """
    with claimed(folder, recipe.name, recipe.threads), without_progress_bars():
        progress.stages(2 * recipe.trainings)
        stages = TaskStages(recipe, Stages(folder / "stages"), device, progress)
        found = [stages.tables(task) for task in recipe.tasks]
        gaps = [gap for _, of_task in found for gap in of_task]
        correct(gaps, recipe)
        written = {TABLE: pd.concat([table for table, _ in found], ignore_index=True), GAPS: pd.DataFrame(gaps)}
        for name, table in written.items():
            write_atomically(folder / name, partial(table.to_csv, index=False, lineterminator="\n"))
        manifest = {"in_context": recipe.model_dump(mode="json"), "suite_name": recipe.name, **code}
        manifest["files"] = {name: sha256(folder / name) for name in written}
        manifest["seconds"] = dict(sorted(stages.stages.seconds.items()))
        write_manifest(folder, manifest)
        return written


def correct(gaps: list[dict[str, Any]], recipe: InContext) -> None:
    """``p_holm`` of the claim on every task; None of all other differences."""
    tested = []
    for gap in gaps:
        gap["p_holm"] = None
        if gap["positions"] == ALL and {gap["model"], gap["against"]} == set(recipe.claim or ()):
            tested.append(gap)
    if tested:
        for gap, p in zip(tested, multipletests([gap["p"] for gap in tested], method="holm")[1], strict=True):
            gap["p_holm"] = float(p)
