"""The one loop that runs a suite: corpus -> models -> stream -> lenses -> transfer -> tables -> figures."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lensbench import __version__, corpus, evaluation, figures, results
from lensbench.corpus import Corpus, TokenizedDocument, Windows
from lensbench.errors import LensbenchError
from lensbench.evaluation import FitSummary
from lensbench.lenses import SharedLens, load_maps, save_maps, save_tuned_lens, tuned_lens
from lensbench.models import build, count_parameters, ngram
from lensbench.models.training import StepReport, train
from lensbench.stages import NotFinished, Stage, Stages, open_run_folder
from lensbench.stream import Capture, ResidualStream, capture
from lensbench.suite import ModelRecipe, Suite, Sweep, load_suite
from lensbench.transfer import choose_product_dtype, half_width, penalties, transfer_sums

transformers_logging.disable_progress_bar()  # lensbench draws its own

CODE_VERSION = 2
"""Raised when a stage computes something else from the same settings, so that old stages are not reused."""


class Progress(Protocol):
    """What the loop tells about itself; the command line draws it."""

    def stage(self, name: str, total: int, unit: str) -> "Callable[[int, str], None]":
        """A stage begins; call the answer with (done, remark)."""

    def finished(self, name: str, seconds: float, reused: bool) -> None: ...

    def say(self, line: str) -> None:
        """Something that the user has to know now."""


@dataclass(frozen=True)
class Texts:
    """The tokenised corpus of a run."""

    corpus: Corpus
    tokenizer: Tokenizer
    documents: dict[str, list[TokenizedDocument]]
    stage: Stage


def choose_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LensbenchError(f"unknown device {name!r}; give cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise LensbenchError(f"device {name!r} is not supported: lenses need float64; give cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise LensbenchError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} GPUs; give cpu")
    return device


@dataclass
class Runner:
    """A suite on its way through the stages of one run folder."""

    suite: Suite
    folder: Path
    device: torch.device
    progress: Progress
    max_hours: float = 1.0
    """A run to a stated precision that is predicted to score for longer is refused."""
    only_finished: bool = False
    """Compute nothing: a stage that is not there raises :class:`lensbench.stages.NotFinished`."""

    def __post_init__(self) -> None:
        self.stages = Stages(self.folder / "stages")
        self.known: dict[str, Stage] = {}
        self.streams: dict[tuple[Path, str], ResidualStream] = {}
        self.sequences: int | None = None
        self.revision = git_revision()  # of the code that runs, whatever is committed meanwhile

    def stage(self, name: str, key: dict[str, Any], compute: Callable[[Path], None]) -> Stage:
        """A stage of this run, reported when it is there; two views of a model share its training."""
        if name in self.known:
            return self.known[name]
        full = {**key, "code": CODE_VERSION, "device": self.device.type}
        stage = self.stages.run(name, full, None if self.only_finished else compute)
        self.progress.finished(name, self.stages.seconds[name], stage.reused)
        self.known[name] = stage
        return stage

    def texts(self) -> Texts:
        """Read, split and tokenise; the tokenizer is trained on the train split once and kept."""
        recipe = self.suite.corpus
        tick = self.progress.stage("corpus", 2, "steps")
        read = corpus.load_corpus(recipe.spec, fractions=recipe.fractions, seed=recipe.seed, max_bytes=recipe.max_bytes)
        tick(1, "tokenizer")

        def compute(folder: Path) -> None:
            corpus.train_tokenizer(read, recipe.vocab_size).save(str(folder / "tokenizer.json"))

        key = {"checksum": read.checksum, "recipe": recipe.model_dump(exclude={"spec", "max_bytes"})}
        stage = self.stage("tokenizer", key, compute)
        tokenizer = Tokenizer.from_file(str(stage.folder / "tokenizer.json"))
        documents = {split: corpus.tokenize(tokenizer, read.splits[split]) for split in corpus.SPLITS}
        tick(2, "")
        return Texts(read, tokenizer, documents, stage)

    def windows(
        self, texts: Texts, split: str, sequences: int, positions: int, *, share: float | None = None
    ) -> Windows:
        return corpus.sample_windows(
            texts.documents[split],
            n_sequences=sequences,
            length=self.suite.training.length,
            positions=positions,
            seed=corpus.SPLITS.index(split),
            max_share=share,
            first_position=self.suite.evaluate.first_position,
        )

    def eval_windows(self, texts: Texts, sequences: int | None = None) -> Windows:
        """The held-out windows: as many as the suite says, or as its precision turned out to need."""
        recipe = self.suite.evaluate
        count = sequences or self.sequences or recipe.sequences
        return self.windows(texts, "eval", count, recipe.positions, share=recipe.max_share)

    def trained(self, texts: Texts, model: ModelRecipe, seed: int, name: str | None = None) -> Stage:
        """The stage that trains ``model``: a ``save_pretrained`` folder."""
        recipe = self.suite.training_of(model)
        name = name or f"train-{model.name}-seed{seed}"

        def compute(folder: Path) -> None:
            tick = self.progress.stage(name, recipe.steps, "steps")
            network = build(
                str(model.family),
                vocab_size=self.suite.corpus.vocab_size,
                context=recipe.length,
                seed=seed,
                **model.shape,
                **model.settings,
            )
            start = time.perf_counter()

            def report(at: StepReport) -> None:
                tick(at.step, f"loss {at.loss:.3f}, {at.tokens / (time.perf_counter() - start):,.0f} tokens/s")

            stream = corpus.training_stream(texts.documents["train"])
            train(network, stream, recipe, seed=seed, checkpoints=folder, device=self.device, report=report)
            network.cpu().save_pretrained(folder)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)

        key = {
            "texts": texts.stage.digest,
            "model": {"family": model.family, **model.shape, **model.settings},
            "training": recipe.model_dump(exclude={"checkpoint_every"}),
            "seed": seed,
        }
        return self.stage(name, key, compute)

    def network(self, stage: Stage) -> PreTrainedModel:
        try:
            model = AutoModelForCausalLM.from_pretrained(stage.folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise LensbenchError(
                f"the model in {stage.folder} cannot be loaded ({reason}); delete it to train anew"
            ) from error
        return torch.nn.Module.to(model, self.device)

    def stream(self, training: Stage, view: str) -> ResidualStream:
        """The stream of a trained model, loaded when it is first needed; one at a time is kept."""
        key = training.folder, view
        if key not in self.streams:
            self.streams = {key: ResidualStream(self.network(training), view)}
        return self.streams[key]

    def capture(self, stream: ResidualStream, windows: Windows, *, constant: Tensor | None = None) -> Capture:
        """One pass over the windows. On a GPU it decides, too, whether log-partitions are made in bfloat16 from here on."""
        captured = capture(stream, windows, constant=constant, memory_gib=self.suite.fit.memory_gib)
        dtype = choose_product_dtype(stream.readout, stream.readout.final_norm(captured.states[-1][:512]))
        if dtype is not None:
            self.progress.say(f"log-partitions in {str(dtype).removeprefix('torch.')}, which agrees with float32 here")
        return captured

    def fitted(self, texts: Texts, model: ModelRecipe, seed: int) -> tuple[Stage, Stage]:
        """The stages that train a model and fit its lenses, for one view and seed."""
        training = self.trained(texts, self.suite.trained(model), seed)
        recipe = self.suite.fit
        who = f"{model.name}-seed{seed}"

        def fit(folder: Path) -> None:
            stream = self.stream(training, model.view)
            tick = self.progress.stage(f"fit-{who}", evaluation.fit_steps(recipe, stream.layers), "lenses")
            windows = self.windows(texts, "fit", recipe.sequences, recipe.positions)
            captured = self.capture(stream, windows)
            dev_windows = self.windows(texts, "dev", recipe.dev_sequences, recipe.dev_positions)
            dev = self.capture(stream, dev_windows, constant=captured.mean_p)
            fitted = evaluation.fit_all(stream.readout, captured, dev, recipe, seed=seed, report=tick)
            save_maps(fitted.maps, folder / "maps.safetensors")
            results.write_json(folder / "fit.json", fitted.summary.model_dump())
            readout, maps = stream.readout, fitted.maps
            label = f"{self.suite.name}/{model.name}"
            save_tuned_lens(tuned_lens(readout, maps["own_refined"], model_name=label), folder / "tuned")
            save_tuned_lens(tuned_lens(readout, maps["transfer"], model_name=label), folder / "tuned_headline")
            SharedLens.from_maps(readout, maps["shared_refined"]).save(folder / "shared")
            SharedLens.from_maps(readout, maps["shared_bias"]).save(folder / "shared_bias")

        key = {
            "trained": training.digest,
            "view": model.view,
            "fit": recipe.model_dump(exclude={"memory_gib"}),
            "seed": seed,
        }
        key["first_position"] = self.suite.evaluate.first_position
        return training, self.stage(f"fit-{who}", key, fit)

    def planned(self, texts: Texts, model: ModelRecipe, seed: int) -> Stage:
        """The stage that finds out how many sequences the suite's precision needs for this model, and how long they take.

        Scores the headline matrix on the suite's ``sequences`` as a pilot, then on as many as that predicts, and on more,
        until the interval of every penalty is narrow enough or the text is used up.
        """
        training, fitting = self.fitted(texts, model, seed)
        recipe, who = self.suite.evaluate, f"{model.name}-seed{seed}"

        def plan(folder: Path) -> None:
            target = recipe.precision
            assert target is not None
            maps = load_maps(fitting.folder / "maps.safetensors")["transfer"]
            stream = self.stream(training, model.view)
            tick = self.progress.stage(f"plan-{who}", 100, "% of the precision")
            count, asked, spent = recipe.sequences, 0, 0.0
            while True:
                start = time.perf_counter()
                windows = self.eval_windows(texts, count)
                captured = self.capture(stream, windows)
                sums = transfer_sums(stream.readout, captured, maps, movement=False)
                seconds = time.perf_counter() - start
                spent += seconds
                documents, tokens = windows.documents, windows.valid.sum(1)
                width = max(float(half_width(penalties(x), tokens, documents).max()) for x in (sums.kl, sums.ce))
                tick(min(100, round(100 * (target / width) ** 2)) if width > 0 else 100, f"half-width {width:.4f} nats")
                exhausted = len(windows.ids) < count
                if width <= target or exhausted:
                    break
                asked = count
                # Somewhat more than the square law says, since the widest of many intervals was picked.
                count = max(asked + 1, math.ceil(1.1 * asked * (width / target) ** 2))
                hours = seconds * count / asked / 3600
                self.progress.say(
                    f"{model.name}: half-width {width:.4f} nats at {asked} sequences; {target:g} needs about {count}, "
                    f"predicted to take {hours * 3600:,.0f} s"
                )
                if hours > self.max_hours:
                    raise LensbenchError(
                        f"precision {target:g} is predicted to take {hours:.2f} hours of scoring {model.name} "
                        f"({count} sequences), more than --max-hours {self.max_hours:g}; raise one of the two"
                    )
            reached = width <= target
            self.progress.say(
                f"{model.name}: half-width {width:.4f} nats with {len(windows.ids)} sequences, {spent:.0f} s"
                + ("" if reached else f"; the text has no more, so precision {target:g} is not reached")
            )
            results.write_json(
                folder / "plan.json",
                {"sequences": len(windows.ids), "half_width": width, "reached": reached, "seconds": round(spent, 2)},
            )

        key = {"fit": fitting.digest, "evaluate": recipe.model_dump(exclude={"draws"})}
        return self.stage(f"plan-{who}", key, plan)

    def measured(self, texts: Texts, model: ModelRecipe, seed: int) -> tuple[Stage, Stage]:
        """The stages that fit a model's lenses and score them, for one view and seed."""
        training, fitting = self.fitted(texts, model, seed)
        recipe, who = self.suite.fit, f"{model.name}-seed{seed}"

        def score(folder: Path) -> None:
            fitted = evaluation.Fit(
                load_maps(fitting.folder / "maps.safetensors"), FitSummary.load(fitting.folder / "fit.json")
            )
            stream = self.stream(training, model.view)
            tick = self.progress.stage(f"score-{who}", evaluation.score_steps(recipe), "matrices")
            windows = self.eval_windows(texts)
            captured = self.capture(stream, windows, constant=fitted.constant)
            scored = evaluation.score_all(stream.readout, captured, fitted, report=tick)
            frame = scored.frame(windows, model=model.name, seed=seed)
            results.write_sequences(folder / "sequences.parquet", frame)
            save_file({k: torch.from_numpy(v) for k, v in scored.refits.items()}, folder / "refits.safetensors")
            results.write_json(
                folder / "model.json",
                {
                    "family": self.suite.trained(model).family,
                    "parameters": count_parameters(stream.model),
                    "layers": stream.layers,
                    "d_model": stream.d_model,
                    "vocab_size": stream.vocab_size,
                    "train_tokens": self.suite.training.steps * self.suite.training.batch * self.suite.training.length,
                },
            )

        scoring_key: dict[str, Any] = {
            "fit": fitting.digest,
            "evaluate": self.suite.evaluate.model_dump(exclude={"draws"}),
        }
        if self.sequences is not None:
            scoring_key["sequences"] = self.sequences
        return fitting, self.stage(f"score-{who}", scoring_key, score)

    def baselines(self, texts: Texts) -> pd.DataFrame:
        """Unigram and Kneser-Ney bigram on the tokens that the models are scored on."""
        stream = corpus.training_stream(texts.documents["train"])
        windows = self.eval_windows(texts)
        rows = np.nonzero(windows.valid)[0]
        at = windows.positions[windows.valid]
        contexts, targets = windows.ids[rows, at], windows.ids[rows, at + 1]
        size = self.suite.corpus.vocab_size
        ce = {
            "unigram": ngram.unigram_cross_entropy(stream, contexts, targets, size),
            "bigram": ngram.KneserNeyBigram.fit(stream, size).cross_entropy(contexts, targets),
        }
        return evaluation.baseline_table(
            ce, windows.documents[rows], windows.next_bytes[windows.valid], len(stream), self.suite.evaluate.draws
        )


def run_suite(
    suite: Suite, folder: Path, *, device: torch.device, only: list[str], progress: Progress, max_hours: float = 1.0
) -> results.Run:
    """Run a suite into ``folder`` and return its tables; finished stages are reused.

    With ``precision`` in the suite, first finds the number of sequences that it needs for every model, and scores all
    models on the largest, so that they stay paired; raises where that is predicted to take over ``max_hours``.

    ``only`` names the models to run, all of them where it is empty. Raises :class:`LensbenchError` for what a user can mend.
    """
    unknown = [name for name in only if name not in {m.name for m in suite.models}]
    if unknown:
        known = ", ".join(m.name for m in suite.models)
        raise LensbenchError(f"suite {suite.name} has no model {unknown[0]!r}; it has {known}")
    lock = open_run_folder(folder, suite.name)
    try:
        runner = Runner(suite, folder, device, progress, max_hours)
        texts = runner.texts()
        parts, plans = [], {}
        if suite.evaluate.precision is not None:
            for model in suite.models:
                runner.only_finished = bool(only) and model.name not in only
                try:
                    for seed in suite.seeds:
                        path = runner.planned(texts, model, seed).folder / "plan.json"
                        plans[f"{model.name}-seed{seed}"] = json.loads(path.read_text())
                except NotFinished:
                    continue
            runner.sequences = max(plan["sequences"] for plan in plans.values())
        for model in suite.models:
            # What earlier runs finished stays in the tables, also where only other models are asked for now.
            runner.only_finished = bool(only) and model.name not in only
            try:
                measured = [(seed, *runner.measured(texts, model, seed)) for seed in suite.seeds]
            except NotFinished:
                continue
            parts += [evaluation.Part.load(model.name, seed, f.folder, s.folder) for seed, f, s in measured]
        models = [m for m in suite.models if m.name in {part.model for part in parts}]
        tick = progress.stage("tables", 2, "steps")
        start = time.perf_counter()
        tables = evaluation.tables(parts, runner.suite.fit, draws=suite.evaluate.draws)
        tables["baselines.csv"] = runner.baselines(texts)
        for name, table in tables.items():
            results.write_table(folder, name, table)
        everything = pd.concat([part.sequences for part in parts], ignore_index=True)
        results.write_sequences(folder / results.SEQUENCES, everything)
        runner.stages.seconds["tables"] = round(time.perf_counter() - start, 2)
        tick(1, "figures")
        start = time.perf_counter()
        run = results.Run(folder, None, {name: results.read_table(folder / name) for name in results.SCHEMA})
        drawn = figures.draw_figures(run, folder / "figures")
        runner.stages.seconds["figures"] = round(time.perf_counter() - start, 2)
        tick(2, "")
        files = [*results.SCHEMA, results.SEQUENCES]
        manifest = describe(runner, texts, models, files, [p.name for p in drawn])
        if plans:
            manifest["precision"] = {"asked": suite.evaluate.precision, "models": plans}
        results.write_json(folder / results.MANIFEST, manifest)
        return replace(run, manifest=manifest)
    finally:
        lock.release()


def describe(
    runner: Runner, texts: Texts, models: list[ModelRecipe], files: list[str], drawn: list[str]
) -> dict[str, Any]:
    """The manifest: everything needed to run this again, and to tell whether two runs measure the same thing."""
    suite = runner.suite
    windows = runner.eval_windows(texts)
    # The same text is the same corpus wherever it lies, and nobody's folders belong into a result.
    spec = suite.corpus.spec if not suite.corpus.spec.startswith("file:") else "file:" + Path(suite.corpus.spec).name
    described = suite.model_dump(mode="json")
    described["corpus"]["spec"] = spec
    return {
        "schema_version": results.SCHEMA_VERSION,
        "code_version": CODE_VERSION,
        "suite_name": suite.name,
        "suite": described,
        "models": [m.name for m in models],
        "seeds": list(suite.seeds),
        "corpus": {
            "spec": spec,
            "checksum": texts.corpus.checksum,
            "documents": {s: len(d) for s, d in texts.corpus.splits.items()},
            "tokens": {s: int(sum(len(d.ids) for d in documents)) for s, documents in texts.documents.items()},
        },
        "scored": {
            "sequences": len(windows.ids),
            "sequences_asked": runner.sequences or suite.evaluate.sequences,
            "documents": len(windows.document_names),
            "tokens": int(windows.valid.sum()),
            "first_position": suite.evaluate.first_position,
        },
        "files": {name: results.sha256(runner.folder / name) for name in files},
        "figures": drawn,
        "seconds": dict(sorted(runner.stages.seconds.items())),
        "versions": versions(),
        "hardware": hardware(runner.device),
        "git_revision": runner.revision,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tuned-lens", "tokenizers", "numpy", "pandas", "scipy", "safetensors")
    return {"lensbench": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def hardware(device: torch.device) -> dict[str, Any]:
    described = {"machine": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return {**described, "device": device.type}


def git_revision() -> str | None:
    """Of the checkout that this file lies in, marked where it was changed; None for an installed package."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git on this machine: the lensbench version stands alone


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
    lock = open_run_folder(folder, sweep.name)
    try:
        runner = Runner(suite, folder, device, progress)
        texts = runner.texts()
        windows = runner.windows(texts, "dev", suite.fit.dev_sequences, suite.fit.dev_positions)
        rows = []
        for number, trial in enumerate(sweep.trials):
            owner = models[trial.model]
            # The trial's own settings alone: what the suite has chosen already must not leak into the choice.
            tried = owner.model_copy(update={"training": trial.training, "settings": trial.settings, "view": "state"})
            stage = runner.trained(texts, tried, suite.seeds[0], f"trial-{number:02d}-{trial.model}")
            scored = capture(ResidualStream(runner.network(stage)), windows)
            low, mean, high = evaluation.mean_with_interval(scored.model_ce, scored.document, suite.evaluate.draws)
            settings = {**{f"training.{k}": v for k, v in trial.training.items()}, **trial.settings}
            described = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
            rows.append((trial.model, number, described, mean, low, high))
        columns = ["model", "trial", "settings", "dev_ce", "dev_ce_ci_low", "dev_ce_ci_high"]
        table = pd.DataFrame(rows, columns=columns)
        table["chosen"] = table["dev_ce"] == table.groupby("model")["dev_ce"].transform("min")
        results.write_atomically(folder / "sweep.csv", partial(table.to_csv, index=False, lineterminator="\n"))
        manifest = describe(runner, texts, [models[n] for n in dict.fromkeys(table["model"])], ["sweep.csv"], [])
        manifest |= {"sweep": sweep.model_dump(mode="json"), "suite_name": sweep.name}
        results.write_json(folder / results.MANIFEST, manifest)
        return table
    finally:
        lock.release()
