"""The one loop that runs a suite: corpus -> models -> stream -> lenses -> transfer -> tables -> figures."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from transformers.utils import logging as transformers_logging

from lensbench.data.inputs import documents_of
from lensbench.errors import LensbenchError
from lensbench.models.pretrained import locate, named
from lensbench.report.figures.draw import draw_figures
from lensbench.report.page import PAGE, write_page
from lensbench.results import tables
from lensbench.results.folder import (
    OWNER,
    SEQUENCES,
    Run,
    open_run_folder,
    read_run,
    read_table,
    write_sequences,
    write_table,
)
from lensbench.results.manifest import SCHEMA_VERSION, write_manifest
from lensbench.results.schema import SCHEMA, no_rows
from lensbench.results.sums import joined_clusters, summed_by_cluster
from lensbench.results.tables import Part
from lensbench.run.cluster import Cluster, cells_of
from lensbench.run.stages import CODE_VERSION, Runner
from lensbench.runtime.environment import hardware, versions
from lensbench.runtime.files import sha256
from lensbench.runtime.progress import Progress
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.stages import NotFinished
from lensbench.studies.curves import curve_table, timing_table
from lensbench.suite.recipes import ModelRecipe, Suite

transformers_logging.disable_progress_bar()  # lensbench draws its own


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    device: torch.device,
    only: list[str],
    progress: Progress,
    max_hours: float = 1.0,
    probes: Sequence[str] = (),
    ranks: Ranks = ALONE,
    cluster: Cluster | None = None,
) -> Run:
    """Run a suite into ``folder`` and return its tables; finished stages are reused.

    With ``precision`` in the suite, first finds the number of sequences that it needs for every model, and scores all
    models on the largest, so that they stay paired; raises where that is predicted to take over ``max_hours``.

    ``only`` names the models to run, all of them where it is empty, and ``probes`` the probes. Of several ``ranks`` the
    first one writes; all must see ``folder``. With a ``cluster`` its workers compute the stages.

    Raises :class:`LensbenchError` for what a user can mend.
    """
    unknown = [name for name in only if name not in {m.name for m in suite.models}]
    if unknown:
        known = ", ".join(m.name for m in suite.models)
        raise LensbenchError(f"suite {suite.name} has no model {unknown[0]!r}; it has {known}")
    if strange := [name for name in probes if name not in suite.probes]:
        known = ", ".join(suite.probes) or "none"
        raise LensbenchError(f"suite {suite.name} has no probe {strange[0]!r}; it has {known}")
    for model in suite.models:  # before a folder is made for what cannot be run
        if model.source is not None and (not only or model.name in only):
            locate(model.source)
    lock = claim(folder, suite.name, ranks)
    before = torch.get_num_threads()
    torch.set_num_threads(suite.threads or before)
    try:
        runner = Runner(suite, folder, device, progress, max_hours, probes=tuple(probes), ranks=ranks)
        parts, plans, points = [], {}, []
        if cluster is not None:
            runner.data()  # the tokenizer, which all cells share
            if suite.evaluate.precision is not None:
                cluster.compute(runner, cells_of(runner, only, planning=True))
        if suite.evaluate.precision is not None:
            for model in suite.models:
                runner.only_finished = bool(only) and model.name not in only
                try:
                    for seed in suite.seeds_of(model):
                        path = runner.planned(model, seed).folder / "plan.json"
                        plans[f"{model.name}-seed{seed}"] = json.loads(path.read_text())
                except (NotFinished, LensbenchError):
                    if not runner.only_finished:
                        raise
            runner.sequences = max(plan["sequences"] for plan in plans.values())
        if cluster is not None:
            cluster.compute(runner, cells_of(runner, only))
        for model in suite.models:
            # What earlier runs finished stays in the tables, also where only other models are asked for now.
            runner.only_finished = bool(only) and model.name not in only
            try:
                learned = [point for seed in suite.seeds_of(model) for point in runner.learned(model, seed)]
                measured = [
                    (seed, *runner.measured(model, seed), runner.probed(model, seed)) for seed in suite.seeds_of(model)
                ]
            except (NotFinished, LensbenchError):
                if not runner.only_finished:
                    raise
                continue  # not there yet, or its files are not: no matter to the models that are asked for
            if not measured:
                runner.progress.say(f"{model.name}: not run at this seed, its suite says")
            points += learned
            parts += [
                Part.load(
                    model.name, seed, f.folder, s.folder, runner.origin(model, seed).facts, found, suite.known(model)
                )
                for seed, f, s, found in measured
            ]
        if suite.evaluate.sums == "cluster":
            groups = suite.evaluate.groups
            parts = [
                replace(
                    part,
                    sequences=summed_by_cluster(part.sequences, groups),
                    clusters=joined_clusters(part.sequences["document"].astype(str).unique(), groups),
                )
                for part in parts
            ]
        models = [m for m in suite.models if m.name in {part.model for part in parts}]
        if not models:
            raise LensbenchError(f"no model of suite {suite.name} runs with these seeds")
        runner.only_finished = False
        counted = {d.name: runner.baselines(d) for d in dict.fromkeys(map(runner.data, models))}
        if not ranks.first:
            ranks.wait()
            return read_run(folder)
        tick = progress.stage("tables", 2, "steps")
        start = time.perf_counter()
        written = tables.tables(
            parts, draws=suite.evaluate.draws, largest_ridge=suite.fit.ridges[-1], rule=suite.verdict
        )
        written["baselines.csv"] = pd.concat([c["table"] for c in counted.values()], ignore_index=True)
        if points:
            assert suite.curve is not None
            first = suite.curve.positions
            written["curves.csv"] = curve_table(points, first, suite.length, suite.evaluate.draws)
            written["timings.csv"] = timing_table(points)
        for name, table in written.items():
            write_table(folder, name, table)
        everything = pd.concat([part.sequences for part in parts], ignore_index=True)
        if suite.evaluate.sums == "cluster":
            everything = everything[~everything["lens"].astype(str).str.startswith("tuned@")]
        write_sequences(folder / SEQUENCES, everything)
        runner.stages.seconds["tables"] = round(time.perf_counter() - start, 2)
        tick(1, "figures")
        start = time.perf_counter()
        run = Run(
            folder,
            None,
            {n: read_table(folder / n) if n in written else no_rows(n) for n in SCHEMA},
        )
        drawn = draw_figures(run, folder / "figures")
        runner.stages.seconds["figures"] = round(time.perf_counter() - start, 2)
        tick(2, "")
        files = [*(name for name in SCHEMA if name in written), SEQUENCES]
        manifest = describe(runner, counted, models, files, [p.name for p in drawn])
        if plans:
            manifest["precision"] = {"asked": suite.evaluate.precision, "models": plans}
        write_manifest(folder, manifest)
        write_page([folder], folder / PAGE)
        ranks.wait()
        return replace(run, manifest=manifest)
    finally:
        torch.set_num_threads(before)
        if lock is not None:
            lock.release()


def claim(folder: Path, suite: str, ranks: Ranks) -> FileLock | None:
    """The run folder for this suite, locked by the first process; raises where the others do not see it."""
    lock: list[FileLock] = []
    ranks.agreed(lambda: lock.append(open_run_folder(folder, suite)))
    if not (folder / OWNER).is_file():
        raise LensbenchError(f"process {ranks.rank} does not see {folder}: give --out a folder that all machines share")
    return lock[0] if lock else None


def describe(
    runner: Runner, counted: dict[str, dict[str, Any]], models: list[ModelRecipe], files: list[str], drawn: list[str]
) -> dict[str, Any]:
    """The manifest: everything needed to run this again, and to tell whether two runs measure the same thing.

    ``counted``: what :meth:`Runner.baselines` found for each tokenizer; the first one's is told at the top.
    """
    suite = runner.suite
    first = next(iter(counted.values()))
    # The same text is the same corpus wherever it lies, and nobody's folders belong into a result.
    given = suite.corpus.spec if suite.images is None else suite.images.spec
    kind, _, rest = given.partition(":")
    spec = f"{kind}:{Path(rest).name}" if kind in ("file", "folder") else given
    described = suite.described()
    described["corpus" if suite.images is None else "images"]["spec"] = spec
    for model in described["models"]:
        model.update({key: named(model[key]) for key in ("source", "lens") if model[key] is not None})
    return {
        "schema_version": SCHEMA_VERSION,
        "code_version": CODE_VERSION,
        "suite_name": suite.name,
        "suite": described,
        "models": [m.name for m in models],
        "seeds": list(suite.seeds),
        "corpus": {
            "spec": spec,
            "checksum": runner.source.checksum,
            "documents": documents_of(runner.source),
            "tokens": first["tokens"],
        },
        "scored": {
            **first["scored"],
            "sequences_asked": runner.sequences or suite.evaluate.sequences,
            "first_position": suite.evaluate.first_position,
        },
        "tokenizers": {name: {"tokens": c["tokens"], "scored": c["scored"]} for name, c in counted.items()},
        "sources": {m.name: {"source": named(m.source), **runner.identity(m)} for m in models if m.source is not None},
        "files": {name: sha256(runner.folder / name) for name in files},
        "figures": drawn,
        "seconds": dict(sorted(runner.stages.seconds.items())),
        "peak_gib": max(runner.stages.peak_gib.values()),
        "versions": versions(),
        "hardware": {**hardware(runner.device), "processes": runner.ranks.size},
        "git_revision": runner.revision,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
