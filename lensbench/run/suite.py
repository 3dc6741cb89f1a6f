"""The one loop that runs a suite: corpus -> models -> stream -> lenses -> transfer -> tables -> figures."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lensbench.data.sources import refuse_missing_packages, sources_of
from lensbench.errors import LensbenchError
from lensbench.models.pretrained import locate, without_progress_bars
from lensbench.report.figures.draw import draw_side_by_side
from lensbench.report.page import write_page
from lensbench.results import tables
from lensbench.results.draws import update_draws
from lensbench.results.folder import (
    PAGE,
    SEQUENCES,
    SUMS,
    UPDATE_DRAWS,
    Run,
    claimed,
    earlier_manifest,
    read_run,
    read_table,
    write_sequences,
    write_sums,
    write_table,
    write_update_draws,
)
from lensbench.results.manifest import Manifest, write_manifest
from lensbench.results.schema import SCHEMA, no_rows
from lensbench.results.sums import compared_sums, joined_clusters, summed_by_cluster
from lensbench.results.tables import Part
from lensbench.run.baselines import baselines
from lensbench.run.beginnings import beginning_facts
from lensbench.run.capturing import forget_captures
from lensbench.run.cluster import Cluster, cluster_tasks
from lensbench.run.context import Cache, Context
from lensbench.run.curves import learning_curve
from lensbench.run.description import describe
from lensbench.run.expected import expected_seconds
from lensbench.run.fitting import fitting
from lensbench.run.further_scores import with_further_sums
from lensbench.run.inputs import data_of, read_corpus
from lensbench.run.origin import origin_of
from lensbench.run.planning import planning
from lensbench.run.probing import probing
from lensbench.run.replacing import refuse_replacing
from lensbench.run.scoring import scoring
from lensbench.run.sharing import exact_share_of
from lensbench.run.stage_names import stage_names
from lensbench.run.unfinished import Unfinished
from lensbench.run.updating import updating
from lensbench.run.workers import Ready, Workers, models_at_once
from lensbench.runtime.hub import HERE, TEXTS_HERE, refuse_unreachable
from lensbench.runtime.memory import reuse_memory
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.stages import ANEW, NotFinished, Stages
from lensbench.runtime.texts import read_json
from lensbench.studies.curves import CurvePoint, curve_table, timing_table
from lensbench.suite.recipes import ModelRecipe, Suite


@dataclass(frozen=True)
class MeasuredModel:
    """What the tables need of one model of a run, over its seeds."""

    model: ModelRecipe
    parts: list[Part]
    points: list[CurvePoint]
    """Of its learning curve"""
    scores: list[Path]
    """Files of its sums by sequence, one for each seed"""
    shares: dict[str, dict[str, Any]]
    """``MODEL-seedN`` -> the share of its log-partitions that are exact, and what it rests on"""


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    device: torch.device,
    only: Sequence[str] = (),
    progress: Progress = QUIET,
    max_hours: float = 1.0,
    probes: Sequence[str] = (),
    ranks: Ranks = ALONE,
    cluster: Cluster | None = None,
    workers: int | None = 1,
    options: Sequence[str] = (),
    command: str = "",
    strict: bool = False,
) -> Run:
    """Run a suite into ``folder`` and return its tables; finished stages are reused.

    With ``precision`` in the suite, first finds the number of sequences that it needs for every model, and scores all
    models on the largest, so that they stay paired; raises where that is predicted to take over ``max_hours``.

    ``only`` names the models to run, all of them where it is empty, and ``probes`` the probes. Of several ``ranks`` the
    first one writes; all must see ``folder``. With a ``cluster`` its workers compute the stages. Else ``workers`` processes
    compute as many models at once (None: as many as the suite says and the processors have room for), which import the
    script that calls this anew. ``options``: what the command line changed of the suite's file, which the manifest
    reports. ``command``: the command that goes on with an unfinished run, which the page names that is written as results
    are finished. With ``strict`` a folder of texts may hold nothing else.

    Raises :class:`LensbenchError` for what a user can mend.
    """
    check_request(suite, only, probes)
    reuse_memory()
    if cluster is not None:
        cluster.check()
    cache = Cache()
    if strict and suite.images is None:  # refused before a folder is made; what is read here is not read again
        cache.corpus = read_corpus(suite, progress, strict=True)
    processors = torch.get_num_threads()
    with claimed(folder, suite.name, suite.threads, ranks, on_this_machine(suite, command)), without_progress_bars():
        context = Context(
            suite, Stages(folder / "stages", ranks), device, progress, ranks, probes=tuple(probes), only=tuple(only),
            max_hours=max_hours, options=tuple(options), cache=cache,
        )  # fmt: skip
        asked = context.computed
        refuse_replacing(context)
        count, expected = announced(context, asked, cluster is not None, workers, processors)
        plans: dict[str, Any] = {}
        if suite.evaluate.precision is not None:
            context, plans = planned(context, asked, cluster)
        if cluster is not None:
            cluster.compute(context, cluster_tasks(context, asked))
        unfinished = Unfinished.of(context, asked, command or f"lensbench run {suite.name}")
        try:
            with computing(context, asked, count, processors, expected) as ready:
                measured, left_out = measured_models(context, asked, unfinished, ready)
        except BaseException:
            unfinished.interrupted()
            raise
        counted = {d.name: baselines(context, d) for d in (data_of(context, m.model) for m in measured)}
        if ranks.first:
            write_run(context, measured, counted, plans, left_out, count)
            forget_captures(context)
            unfinished.finished()
        ranks.wait()
        return read_run(folder)


def announced(
    context: Context, asked: list[ModelRecipe], alone: bool, workers: int | None, processors: int
) -> tuple[int, dict[str, float]]:
    """How many processes will compute models at once, one ``alone`` if all is there; tells of the stages to come.

    And the seconds that each stage is expected to take.
    """
    names = stage_names(context.suite, asked, context.probes)
    there = names & context.stages.finished()
    alone |= context.ranks.size > 1 or not names - there
    count = 1 if alone else models_at_once(context.suite, asked, workers, context.device, processors)
    expected = expected_seconds(context.suite, asked, context.probes, context.device, there)
    context.progress.stages(len(names), expected, count)
    if there:
        context.progress.say(
            f"goes on in {context.folder}: {len(there)} of {len(names)} stages are there; those that fit are reused"
        )
    return count, expected


@contextlib.contextmanager
def computing(
    context: Context, asked: list[ModelRecipe], count: int, processors: int, expected: dict[str, float]
) -> Iterator[Ready]:
    """What waits for a model's stages while ``count`` processes compute models; of one process nothing waits."""
    if count == 1:
        yield lambda model: None
        return
    context.progress.say(f"{count} models are computed at once, each in a process of its own")
    with Workers.of(context, asked, count, processors, expected).at_work() as ready:
        if any(context.suite.trained(model).source is None for model in asked):
            data_of(context).read()  # which all tasks share

        def last_with_baselines(model: ModelRecipe) -> None:
            if model is asked[-1]:  # some processor has nothing else to do
                baselines(context, data_of(context, model))
            ready(model)

        yield last_with_baselines


def on_this_machine(suite: Suite, command: str) -> dict[str, Any]:
    """What a run folder says for commands on this machine alone: the command that goes on, and where models lie."""
    sources = {
        m.name: m.source for m in suite.models if m.source is not None and m.source.startswith(("path:", "gguf:"))
    }
    return {**({"command": command} if command else {}), **({"sources": sources} if sources else {})}


def check_request(suite: Suite, only: Sequence[str], probes: Sequence[str]) -> None:
    """Raise :class:`LensbenchError` for what cannot be run, before a folder is made for it."""
    unknown = [name for name in only if name not in {m.name for m in suite.models}]
    if unknown:
        known = ", ".join(m.name for m in suite.models)
        raise LensbenchError(f"suite {suite.name} has no model {unknown[0]!r}; it has {known}")
    if strange := [name for name in probes if name not in suite.probes]:
        known = ", ".join(suite.probes) or "none"
        raise LensbenchError(f"suite {suite.name} has no probe {strange[0]!r}; it has {known}")
    for model in suite.models:
        if model.source is not None and (not only or model.name in only):
            locate(model.source)
            refuse_unreachable(model.source, HERE)
    if suite.images is None:
        refuse_missing_packages(suite.corpus.spec)
        for text in sources_of(suite.corpus.spec):
            refuse_unreachable(text, TEXTS_HERE)


def read_only(context: Context) -> Context:
    """The same run, in which nothing is computed or reported: what earlier runs finished is read."""
    return replace(context, compute=False, progress=QUIET)


def planned(
    context: Context, asked: list[ModelRecipe], cluster: Cluster | None
) -> tuple[Context, dict[str, dict[str, Any]]]:
    """The context that scores as many sequences as the suite's precision needs, and the plan of each model and seed."""
    suite, plans = context.suite, {}
    if cluster is not None:
        cluster.compute(context, cluster_tasks(context, asked, planning=True))
    for model in [*asked, *(m for m in suite.models if m not in asked)]:
        on = context if model in asked else read_only(context)
        try:
            for seed in suite.seeds_of(model):
                path = planning(on, model, seed).folder / "plan.json"
                plans[f"{model.name}-seed{seed}"] = read_json(path, ANEW)
        except (NotFinished, LensbenchError):
            if model in asked:
                raise
    return replace(context, sequences=max(plan["sequences"] for plan in plans.values())), plans


def measured_models(
    context: Context, asked: list[ModelRecipe], unfinished: Unfinished, ready: Ready
) -> tuple[list[MeasuredModel], dict[str, str]]:
    """The models of the suite in its order, and those left out with the reason; ``ready`` waits for one.

    Models that are asked for are measured; others stay in the tables as earlier runs left them. One that cannot be read
    is left out, and reported; raises :class:`LensbenchError` where the tables hold it, so that its rows would be lost.
    """
    suite = context.suite
    others = [m for m in suite.models if m not in asked]
    reported = earlier_manifest(context.folder)
    kept = () if reported is None else reported.models
    # What is damaged is told before anything is computed; what is missing may be made by the models that are asked for.
    found, damaged = read_again(context, others, missing=False)
    refuse_losing(context, damaged, kept)
    for model in asked:
        ready(model)
        found[model.name] = measured_model(context, model, unfinished)
    late, left_out = read_again(context, [m for m in others if m.name not in found], missing=True)
    found |= late
    refuse_losing(context, left_out, kept)
    there = [m for m in suite.models if m.name in found]
    left_out = {m.name: why_left_out(context, m, there, left_out[m.name]) for m in others if m.name in left_out}
    measured = [found[m.name] for m in suite.models if m.name in found and found[m.name].parts]
    if not measured:
        raise LensbenchError(f"no model of suite {suite.name} runs with these seeds")
    return measured, left_out


def read_again(
    context: Context, models: list[ModelRecipe], *, missing: bool
) -> tuple[dict[str, MeasuredModel], dict[str, str]]:
    """Models as earlier runs left them, and why others cannot be read: damaged, or with ``missing`` not finished either."""
    found, unread = {}, {}
    for model in models:
        try:
            found[model.name] = measured_model(read_only(context), model)
        except NotFinished as stage:
            if missing:
                unread[model.name] = f"stage {stage} is not finished with these settings"
        except LensbenchError as error:
            unread[model.name] = str(error)
    return found, unread


NOT_ASKED = "not asked for"
"""Why a model is left out that the command did not name and no run into the folder has begun"""


def why_left_out(context: Context, model: ModelRecipe, there: list[ModelRecipe], reason: str) -> str:
    """``reason`` for a model that an earlier run has begun, and :data:`NOT_ASKED` for one left out on purpose.

    Models that are ``there`` may share stages with it.
    """
    own = stage_names(context.suite, [model]) - stage_names(context.suite, there)
    return reason if own & context.stages.finished() else NOT_ASKED


def refuse_losing(context: Context, unread: dict[str, str], kept: Sequence[str]) -> None:
    """Raise :class:`LensbenchError` where a model that cannot be read is one of those ``kept`` in the folder's tables."""
    for name, reason in unread.items():
        if name in kept:
            raise LensbenchError(
                f"the tables in {context.folder} hold model {name}, which cannot be read again: {reason}. They are left as "
                f"they are: mend that, run without --only (or with --only {name} too), or give --out another folder"
            )


def measured_model(context: Context, model: ModelRecipe, unfinished: Unfinished | None = None) -> MeasuredModel:
    """One model over its seeds: trained, fitted, scored and probed; ``unfinished`` shows what is there of it meanwhile."""
    suite, parts, scores, shares = context.suite, [], [], {}
    seeds = suite.seeds_of(model)
    points = [point for seed in seeds for point in learning_curve(context, model, seed)]
    for seed in seeds:
        begins = beginning_facts(context, model, seed)
        updates = updating(context, model, seed)
        if unfinished is not None:
            unfinished.decomposed(model, seed, updates)
        fitted, scored = fitting(context, model, seed), scoring(context, model, seed)
        facts = {**origin_of(context, model, seed).facts, **begins}
        part = Part.load(model.name, seed, fitted.folder, scored.folder, facts, (), suite.known(model), updates)
        part = replace(part, sequences=with_further_sums(context, model, seed, part.sequences))
        part = by_cluster(part, suite.evaluate.groups)
        if unfinished is not None:
            unfinished.scored(model, part)
        parts.append(replace(part, probes=probing(context, model, seed)))
        if unfinished is not None:
            unfinished.measured(model, seed)
        scores.append(scored.folder / "sequences.parquet")
        shares[f"{model.name}-seed{seed}"] = exact_share_of(context, model, seed)
    if not seeds:
        context.progress.say(f"{model.name}: not run at this seed, its suite says")
    return MeasuredModel(model, parts, points, scores, shares)


def by_cluster(part: Part, groups: int | None) -> Part:
    """A part with one sum for each cluster of documents, in place of one for each sequence."""
    return replace(
        part,
        sequences=summed_by_cluster(part.sequences, groups),
        clusters=joined_clusters(part.sequences["document"].astype(str).unique(), groups),
    )


def write_run(
    context: Context,
    measured: list[MeasuredModel],
    counted: dict[str, dict[str, Any]],
    plans: dict[str, dict[str, Any]],
    left_out: dict[str, str],
    processes: int,
) -> None:
    """Write tables, figures (with several ``processes``), manifest and page into the run folder."""
    folder, seconds = context.folder, context.stages.seconds
    with context.progress.task("tables", 2, "steps") as task:
        start = time.perf_counter()
        written = write_tables(context, measured, counted)
        seconds["tables"] = round(time.perf_counter() - start, 2)
        task.update(1, "figures")
        start = time.perf_counter()
        tables_now = {n: read_table(folder / n) if n in written else no_rows(n) for n in SCHEMA}
        rule = context.suite.verdict.model_dump()
        bare = Manifest.of_tables(folder, [m.model.name for m in measured], rule)
        drawn = draw_side_by_side(Run(folder, bare, tables_now), folder / "figures", processes)
        seconds["figures"] = round(time.perf_counter() - start, 2)
        task.update(2)
    files = [*(name for name in SCHEMA if name in written), SUMS]
    files += [name for name in (SEQUENCES, UPDATE_DRAWS) if (folder / name).is_file()]
    models = [m.model for m in measured]
    weights = {f"{part.model}-seed{part.seed}": part.facts["weights"] for m in measured for part in m.parts}
    estimated = {} if context.suite.evaluate.exact_share == 1 else {k: v for m in measured for k, v in m.shares.items()}
    names = [p.name for p in drawn]
    half = {part.model: part.facts["half_passes"] for m in measured for part in m.parts if "half_passes" in part.facts}
    manifest = describe(context, counted, models, files, names, plans, left_out, weights, estimated, half)
    write_manifest(folder, manifest)
    write_page([folder], folder / PAGE)


def write_tables(
    context: Context, measured: list[MeasuredModel], counted: dict[str, dict[str, Any]]
) -> dict[str, pd.DataFrame]:
    """The run's tables by file name, written; and the sums and draws that comparisons read."""
    suite, folder = context.suite, context.folder
    parts = [part for m in measured for part in m.parts]
    points = [point for m in measured for point in m.points]
    evaluate = suite.evaluate
    found = tables.tables(parts, draws=evaluate.draws, largest_ridge=suite.fit.ridges[-1], rule=suite.verdict)
    found["baselines.csv"] = pd.concat([c["table"] for c in counted.values()], ignore_index=True)
    if points:
        assert suite.curve is not None
        found["curves.csv"] = curve_table(points, suite.curve.positions, suite.length, evaluate.draws)
        found["timings.csv"] = timing_table(points)
    for name, table in found.items():
        write_table(folder, name, table)
    write_sums(folder / SUMS, compared_sums(pd.concat([part.sequences for part in parts], ignore_index=True)))
    if evaluate.sums == "sequence":
        whole = [pd.read_parquet(path) for m in measured for path in m.scores]
        write_sequences(folder / SEQUENCES, pd.concat(whole, ignore_index=True))
    else:
        (folder / SEQUENCES).unlink(missing_ok=True)  # of an earlier run with other settings
    if any(part.updates is not None for part in parts):
        write_update_draws(folder / UPDATE_DRAWS, update_draws(parts))
    return found
