"""A sweep: declared trials of a suite's models, judged on the dev split."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import without_progress_bars
from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.run.baselines import baselines
from lensbench.run.context import Context
from lensbench.run.description import describe
from lensbench.run.inputs import data_of
from lensbench.run.training import trained_network, training
from lensbench.runtime.files import write_atomically
from lensbench.runtime.progress import Progress
from lensbench.runtime.stages import Stages
from lensbench.statistics import mean_with_interval
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream
from lensbench.suite.changes import Changes
from lensbench.suite.sweep import Sweep


def run_sweep(sweep: Sweep, folder: Path, *, device: torch.device, progress: Progress) -> pd.DataFrame:
    """Train every trial of a sweep and judge it by cross-entropy on the dev split; best of each model marked.

    Writes ``sweep.csv`` and ``manifest.json``; finished trials are reused.
    """
    suite = Changes(preset=sweep.preset).of(sweep.suite)
    shorter = suite.training.model_copy(update={"tokens": sweep.tokens, "checkpoints": ()})
    suite = suite.model_copy(update={"training": shorter})
    models = {m.name: m for m in suite.models if m.checkpoint is None}
    unknown = [t.model for t in sweep.trials if t.model not in models]
    if unknown:
        raise LensbenchError(f"sweep {sweep.name} tries model {unknown[0]!r}, which suite {suite.name} does not have")
    pretrained = [t.model for t in sweep.trials if models[t.model].source is not None]
    if pretrained:
        raise LensbenchError(
            f"sweep {sweep.name} tries model {pretrained[0]!r}, which is pretrained: nothing is trained"
        )
    with claimed(folder, sweep.name, suite.threads), without_progress_bars():
        context = Context(suite, Stages(folder / "stages"), device, progress)
        progress.stages(2 + len(sweep.trials))  # the tokenizer and the baselines
        table = judged_trials(context, sweep)
        write_atomically(folder / "sweep.csv", partial(table.to_csv, index=False, lineterminator="\n"))
        data = data_of(context)
        tried = [models[n] for n in dict.fromkeys(table["model"])]
        manifest = describe(context, {data.name: baselines(context, data)}, tried, ["sweep.csv"], [])
        manifest = manifest.model_copy(
            update={"sweep": sweep.model_dump(mode="json", exclude_none=True), "suite_name": sweep.name}
        )
        write_manifest(folder, manifest)
    return table


def judged_trials(context: Context, sweep: Sweep) -> pd.DataFrame:
    """A row per trial: its settings, its cross-entropy on the dev split, and how far it is behind its model's best one.

    In nats/token, with intervals over documents; the difference is paired, since all trials read the same tokens.
    """
    suite, data = context.suite, data_of(context)
    models = {m.name: m for m in suite.models}
    samples = data.samples(**suite.fit.of_dev)
    rows, losses = [], []
    for number, trial in enumerate(sweep.trials):
        # The trial's own settings alone: what the suite has chosen already must not leak into the choice.
        update = {"training": trial.training, "settings": trial.settings, "view": "state"}
        tried = models[trial.model].model_copy(update=update)
        stage = training(context, data, tried, suite.seeds[0], f"trial-{number:02d}-{trial.model}")
        scored = capture(ResidualStream(trained_network(context, stage)), samples)
        losses.append(scored.model_ce)
        low, mean, high = mean_with_interval(scored.model_ce, scored.document, suite.evaluate.draws)
        settings = {**{f"training.{k}": v for k, v in trial.training.items()}, **trial.settings}
        described = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
        rows.append((trial.model, number, described, mean, low, high))
    columns = ["model", "trial", "settings", "dev_ce", "dev_ce_ci_low", "dev_ce_ci_high"]
    return held_against_best(pd.DataFrame(rows, columns=columns), losses, scored.document, suite.evaluate.draws)


def held_against_best(
    table: pd.DataFrame, losses: Sequence[Tensor], document: NDArray[np.int64], draws: int
) -> pd.DataFrame:
    """The trials with how far each is behind its model's best one, from the losses of the same tokens ``[N]`` of each."""
    best = table.groupby("model")["dev_ce"].transform("idxmin").to_numpy(dtype=int)
    behind = [mean_with_interval(losses[k] - losses[of], document, draws) for k, of in enumerate(best)]
    low, mean, high = zip(*behind, strict=True)
    return table.assign(behind=mean, behind_ci_low=low, behind_ci_high=high, chosen=table.index == best)
