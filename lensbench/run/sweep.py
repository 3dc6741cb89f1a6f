"""A sweep: declared trials of a suite's models, judged on the dev split."""

from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lensbench.errors import LensbenchError
from lensbench.results.folder import open_run_folder
from lensbench.results.manifest import write_manifest
from lensbench.run.stages import Runner
from lensbench.run.suite import describe
from lensbench.runtime.files import write_atomically
from lensbench.runtime.progress import Progress
from lensbench.statistics import mean_with_interval
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream
from lensbench.suite.files import load_suite
from lensbench.suite.recipes import Sweep


def run_sweep(sweep: Sweep, folder: Path, *, device: torch.device, progress: Progress) -> pd.DataFrame:
    """Train every trial of a sweep and judge it by cross-entropy on the dev split; best of each model marked.

    Writes ``sweep.csv`` and ``manifest.json``; finished trials are reused.
    """
    suite = load_suite(sweep.suite)
    suite = suite.model_copy(update={"training": suite.training.model_copy(update={"tokens": sweep.tokens})})
    models = {m.name: m for m in suite.models}
    unknown = [t.model for t in sweep.trials if t.model not in models]
    if unknown:
        raise LensbenchError(f"sweep {sweep.name} tries model {unknown[0]!r}, which suite {suite.name} does not have")
    pretrained = [t.model for t in sweep.trials if models[t.model].source is not None]
    if pretrained:
        raise LensbenchError(
            f"sweep {sweep.name} tries model {pretrained[0]!r}, which is pretrained: nothing is trained"
        )
    lock = open_run_folder(folder, sweep.name)
    before = torch.get_num_threads()
    torch.set_num_threads(suite.threads or before)
    try:
        runner = Runner(suite, folder, device, progress)
        data = runner.data()
        samples = data.samples("dev", suite.fit.dev_sequences, suite.fit.dev_positions)
        rows = []
        for number, trial in enumerate(sweep.trials):
            owner = models[trial.model]
            # The trial's own settings alone: what the suite has chosen already must not leak into the choice.
            tried = owner.model_copy(update={"training": trial.training, "settings": trial.settings, "view": "state"})
            stage = runner.trained(data, tried, suite.seeds[0], f"trial-{number:02d}-{trial.model}")
            scored = capture(ResidualStream(runner.network(stage)), samples)
            low, mean, high = mean_with_interval(scored.model_ce, scored.document, suite.evaluate.draws)
            settings = {**{f"training.{k}": v for k, v in trial.training.items()}, **trial.settings}
            described = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
            rows.append((trial.model, number, described, mean, low, high))
        columns = ["model", "trial", "settings", "dev_ce", "dev_ce_ci_low", "dev_ce_ci_high"]
        table = pd.DataFrame(rows, columns=columns)
        table["chosen"] = table["dev_ce"] == table.groupby("model")["dev_ce"].transform("min")
        write_atomically(folder / "sweep.csv", partial(table.to_csv, index=False, lineterminator="\n"))
        manifest = describe(
            runner,
            {data.name: runner.baselines(data)},
            [models[n] for n in dict.fromkeys(table["model"])],
            ["sweep.csv"],
            [],
        )
        manifest |= {"sweep": sweep.model_dump(mode="json"), "suite_name": sweep.name}
        write_manifest(folder, manifest)
        return table
    finally:
        torch.set_num_threads(before)
        lock.release()
