"""The one loop that runs a suite: corpus -> models -> stream -> lenses -> transfer -> tables -> figures."""

import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lensbench import __version__, corpus, evaluation, figures, results, tables
from lensbench.cluster import Cluster, cells_of
from lensbench.corpus import Corpus, Windows
from lensbench.data import IMAGES, TRAINED_HERE, Data, Pictures, Texts, documents_of
from lensbench.errors import LensbenchError
from lensbench.evaluation import FitSummary
from lensbench.fitting import Moments
from lensbench.images import ImageSet, Prepare, labels_for, load_images, plainly, processed_pixels
from lensbench.learning import CurvePoint, Scored, curve_table, score_positions, timing_table
from lensbench.lenses import (
    AffineMaps,
    SharedLens,
    lens_files,
    load_maps,
    load_tuned_lens,
    maps_of,
    save_maps,
    save_tuned_lens,
    tuned_lens,
)
from lensbench.models import build, count_parameters
from lensbench.models.pretrained import (
    check_context,
    check_vocabulary,
    identity,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    locate,
)
from lensbench.models.training import StepReport, TrainingRecipe, train
from lensbench.page import PAGE, write_page
from lensbench.probes import PROBES, Found, ReadText, Subject, load_found
from lensbench.ranks import ALONE, Ranks
from lensbench.readout import image_shape
from lensbench.samples import Samples
from lensbench.stages import OWNER, NotFinished, Pieces, Stage, Stages, open_run_folder
from lensbench.stream import Capture, ResidualStream, RotatedView, capture
from lensbench.suite import ImageRecipe, ModelRecipe, Suite, Sweep, load_suite
from lensbench.transfer import choose_product_dtype, half_width, penalties, transfer_sums

transformers_logging.disable_progress_bar()  # lensbench draws its own

CODE_VERSION = 3
"""Raised when a stage computes something else from the same settings, so that old stages are not reused."""


class Progress(Protocol):
    """What the loop tells about itself; the command line draws it."""

    def stage(self, name: str, total: int, unit: str) -> "Callable[[int, str], None]":
        """A stage begins; call the answer with (done, remark)."""

    def finished(self, name: str, seconds: float, reused: bool) -> None: ...

    def say(self, line: str) -> None:
        """Something that the user has to know now."""


REMEDY = "set evaluate.length to {} or less, in a copy of the suite's file"


@dataclass(frozen=True)
class Origin:
    """A model of a run: what identifies it, and how it is loaded."""

    name: str
    digest: str
    load: Callable[[], PreTrainedModel]
    facts: dict[str, Any]
    """``family, source, dtype, train_tokens`` of ``models.csv``."""


def choose_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU if there is one."""
    if name == "auto":
        # Of several processes each has its own current one.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LensbenchError(f"unknown device {name!r}; give cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise LensbenchError(f"device {name!r} is not supported: lenses need float64; give cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise LensbenchError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} GPUs; give cpu")
    return device


def dtype_named(name: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise LensbenchError(f"unknown dtype {name!r}; give {', '.join(known)}")
    return known[name]


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
    probes: tuple[str, ...] = ()
    """Probes of the suite that are computed now, all of them where it is empty; of others what is finished is told."""
    ranks: Ranks = ALONE
    """The processes that train, fit and score together; what else there is to do the first one does."""

    def __post_init__(self) -> None:
        self.stages = Stages(self.folder / "stages", self.ranks)
        self.known: dict[str, Stage] = {}
        self.streams: dict[tuple[str, str], ResidualStream] = {}
        self.sources: dict[str, dict[str, str]] = {}
        self.own_data: dict[str, Data] = {}
        self.sequences: int | None = None
        self.revision = git_revision()  # of the code that runs, whatever is committed meanwhile

    def stage(
        self, name: str, key: dict[str, Any], compute: Callable[[Path], None], *, together: bool = False
    ) -> Stage:
        """A stage of this run, reported when it is there; two views of a model share its training."""
        if name in self.known:
            return self.known[name]
        full = {**key, "code": CODE_VERSION, "device": self.device.type}
        stage = self.stages.run(name, full, None if self.only_finished else compute, together=together)
        self.progress.finished(name, self.stages.seconds[name], stage.reused)
        self.known[name] = stage
        return stage

    @cached_property
    def corpus(self) -> Corpus:
        """The text, read and split."""
        recipe = self.suite.corpus
        tick = self.progress.stage("corpus", 1, "steps")
        read = corpus.load_corpus(recipe.spec, fractions=recipe.fractions, seed=recipe.seed, max_bytes=recipe.max_bytes)
        tick(1, "")
        return read

    @cached_property
    def images(self) -> ImageSet:
        """The images, found and split."""
        recipe = self.suite.images
        assert recipe is not None
        tick = self.progress.stage("images", 1, "steps")
        trains = any(m.source is None and m.view_of is None and not m.untrained for m in self.suite.models)
        needed = corpus.SPLITS if trains else corpus.SPLITS[1:]
        read = load_images(
            recipe.spec, parts=recipe.parts, seed=recipe.seed, max_images=recipe.max_images, needed=needed
        )
        tick(1, "")
        return read

    @property
    def source(self) -> Corpus | ImageSet:
        """What everything is read from."""
        return self.corpus if self.suite.images is None else self.images

    @cached_property
    def _suite_data(self) -> Data:
        return self._suite_texts() if self.suite.images is None else self._suite_pictures(self.suite.images)

    def _suite_texts(self) -> Texts:
        recipe = self.suite.corpus

        def compute(folder: Path) -> None:
            corpus.train_tokenizer(self.corpus, recipe.vocab_size).save(str(folder / "tokenizer.json"))

        key = {"checksum": self.corpus.checksum, "recipe": recipe.model_dump(exclude={"spec", "max_bytes"})}
        stage = self.stage("tokenizer", key, compute)
        return self._texts(
            TRAINED_HERE, stage.digest, lambda: Tokenizer.from_file(str(stage.folder / "tokenizer.json"))
        )

    def _texts(self, name: str, digest: str, load: Callable[[], Tokenizer | PreTrainedTokenizerBase]) -> Texts:
        return Texts(self.corpus, name, digest, load, self.suite.length, self.suite.evaluate.first_position)

    def _suite_pictures(self, recipe: ImageRecipe) -> Pictures:
        channels, size = recipe.shape
        prepare = plainly(channels=channels, height=size, width=size)
        key = {"checksum": self.images.checksum, "recipe": recipe.model_dump(exclude={"spec", "max_images"})}
        numbers = np.arange(len(self.images.classes))
        return Pictures(self.images, IMAGES, digest_of(key), lambda: (prepare, numbers), recipe.shape, recipe.shift)

    def data(self, model: ModelRecipe | None = None) -> Data:
        """What a model reads: the corpus in tokens of the tokenizer trained here, once, or its own; images likewise."""
        owner = None if model is None else self.suite.trained(model)
        if owner is None or owner.source is None:
            return self._suite_data
        if owner.name not in self.own_data:
            if self.suite.images is None:
                split = self.suite.corpus.model_dump(exclude={"spec", "max_bytes", "vocab_size"})
                key = {"checksum": self.corpus.checksum, "recipe": split, "source": self.identity(owner)}
                found: Data = self._texts(owner.name, digest_of(key), partial(load_tokenizer, owner.source))
            else:
                found = self._own_pictures(owner.name, owner.source, self.identity(owner), self.suite.images)
            self.own_data[owner.name] = found
        return self.own_data[owner.name]

    def _own_pictures(self, name: str, source: str, identified: dict[str, str], recipe: ImageRecipe) -> Pictures:
        split = recipe.model_dump(exclude={"spec", "max_images", "size", "channels", "shift"})
        key = {"checksum": self.images.checksum, "recipe": split, "source": identified}

        def load() -> tuple[Prepare, NDArray[np.int64]]:
            config = load_config(source)
            channels, height, width = image_shape(config)
            processor = load_image_processor(source)
            if processor is None:
                self.progress.say(
                    f"model {name} has no image processor beside it: it gets images of {height} x {width}, from -1 to 1"
                )
                prepare = plainly(channels=channels, height=height, width=width)
            else:
                prepare = partial(processed_pixels, processor=processor, channels=channels)
            return prepare, labels_for(f"model {name}", config, self.images.classes)

        return Pictures(self.images, name, digest_of(key), load, recipe.shape, recipe.shift)

    def identity(self, model: ModelRecipe) -> dict[str, str]:
        """What a pretrained model's source holds now."""
        assert model.source is not None
        if model.source not in self.sources:
            self.sources[model.source] = identity(model.source)
        return self.sources[model.source]

    def eval_samples(self, data: Data, count: int | None = None) -> Samples:
        """The held-out windows or images: as many as the suite says, or as its precision turned out to need."""
        recipe = self.suite.evaluate
        count = count or self.sequences or recipe.sequences
        return data.samples("eval", count, recipe.positions, share=recipe.max_share)

    def trained(
        self, data: Data, model: ModelRecipe, seed: int, name: str | None = None, tokens: int | None = None
    ) -> Stage:
        """The stage that trains ``model``, on ``tokens`` in place of the suite's if given: a ``save_pretrained`` folder."""
        recipe = self.suite.training_of(model)
        name = name or f"train-{model.name}-seed{seed}"
        if tokens is not None and tokens != recipe.tokens:
            recipe, name = recipe.model_copy(update={"tokens": tokens}), f"{name}-{tokens}"

        def compute(folder: Path) -> None:
            tick = self.progress.stage(name, recipe.steps, "steps")
            network = build(
                str(model.family),
                seed=seed,
                **data.shape(recipe),
                **model.shape,
                **model.settings,
            )
            if model.untrained:
                network.save_pretrained(folder)
                return
            stream = data.batches(recipe, seed)
            start = time.perf_counter()

            def report(at: StepReport) -> None:
                tick(at.step, f"loss {at.loss:.3f}, {at.tokens / (time.perf_counter() - start):,.0f} {self.unit}s/s")

            ends = [start]

            def timed(at: StepReport) -> None:
                ends.append(time.perf_counter())
                report(at)

            train(
                network,
                stream,
                recipe,
                seed=seed,
                checkpoints=folder,
                device=self.device,
                report=timed,
                ranks=self.ranks,
            )
            # The usual step, as often as there are steps: pauses, and what else the machine did for a while, do not count.
            usual = float(np.median(np.diff(ends))) if len(ends) > 1 else 0.0
            results.write_json(folder / TRAINING, {"seconds": round(usual * recipe.steps, 2)})
            network.cpu().save_pretrained(folder)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)

        key = {
            "texts": data.digest,
            "model": {"family": model.family, **model.shape, **model.settings},
            "training": training_key(recipe),
            "seed": seed,
        }
        if model.untrained:
            key["training"] = None
        return self.stage(name, key, compute, together=not model.untrained)

    @property
    def loader(self) -> Any:
        """The class of transformers that loads this suite's models."""
        return AutoModelForCausalLM if self.suite.images is None else AutoModelForImageClassification

    @property
    def unit(self) -> str:
        """What models predict once for each of."""
        return "token" if self.suite.images is None else "image"

    def network(self, stage: Stage) -> PreTrainedModel:
        try:
            model = self.loader.from_pretrained(stage.folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise LensbenchError(
                f"the model in {stage.folder} cannot be loaded ({reason}); delete it to train anew"
            ) from error
        return torch.nn.Module.to(model, self.device)

    def origin(self, model: ModelRecipe, seed: int) -> Origin:
        """The model itself, trained here first where it is to be."""
        owner = self.suite.trained(model)
        if owner.source is None:
            training = self.trained(self.data(), owner, seed)
            recipe = self.suite.training
            facts = {
                "family": owner.family,
                "source": None,
                "dtype": "float32",
                "train_tokens": 0 if owner.untrained else recipe.steps * recipe.batch * recipe.length,
            }
            return Origin(owner.name, training.digest, partial(self.network, training), facts)
        source, device = owner.source, self.device if owner.device is None else choose_device(owner.device)
        if self.suite.images is None and source not in self.sources and self.trained_on_this(source):
            self.progress.say(
                f"model {owner.name} was trained by a run of lensbench on this text, split another way: some of what it "
                "is scored on here it was trained on; give --corpus another text, or the suite that run's corpus settings"
            )
        key: dict[str, Any] = {"source": self.identity(owner), "dtype": owner.dtype}
        if owner.device is not None:
            key["device"] = device.type

        def load() -> PreTrainedModel:
            start = time.perf_counter()
            self.progress.stage(f"load-{owner.name}", 1, "models")
            network = load_model(
                source,
                dtype=dtype_named(owner.dtype),
                device=device,
                device_map=owner.device_map,
                loader=self.loader,
            )
            data = self.data(owner)
            if isinstance(data, Texts):
                check_context(f"model {owner.name}", network.config, self.suite.length, REMEDY)
                check_vocabulary(source, data.tokenizer, network.config.get_text_config().vocab_size)
                data.within(network)
            self.progress.finished(f"load-{owner.name}", time.perf_counter() - start, False)
            return network

        # What was trained elsewhere was not trained on tokens that can be counted here.
        facts = {"family": None, "source": named(source), "dtype": owner.dtype, "train_tokens": None}
        return Origin(owner.name, digest_of(key), load, facts)

    def trained_on_this(self, source: str) -> bool:
        """Whether a model of a run's stage was trained on text that this suite may fit or score on."""
        own_tokenizer = locate(source).own_tokenizer
        if own_tokenizer is None:
            return False
        try:
            manifest = json.loads((own_tokenizer.parents[2] / results.MANIFEST).read_text())
            theirs, checksum = manifest["suite"]["corpus"], manifest["corpus"]["checksum"]
        except (OSError, ValueError, KeyError, TypeError):
            return True  # a run that has not finished does not say
        split = {"train", "fit", "dev", "eval", "seed"}
        same_split = {k: theirs[k] for k in split} == self.suite.corpus.model_dump(include=split)
        return checksum == self.corpus.checksum and not same_split

    def stream(self, origin: Origin, view: str) -> ResidualStream:
        """The stream of a model, loaded when it is first needed; one at a time is kept, whatever its views."""
        key = origin.digest, view
        if key not in self.streams:
            same = next((s.model for (digest, _), s in self.streams.items() if digest == origin.digest), None)
            self.streams.clear()  # before the next one is loaded: two models at once may not fit
            network = origin.load() if same is None else same
            try:
                self.streams[key] = ResidualStream(network, view)
            except LensbenchError as error:
                raise LensbenchError(f"model {origin.name}: {error}") from error
        return self.streams[key]

    def capture(
        self,
        stream: ResidualStream,
        samples: Samples,
        *,
        name: str,
        constant: Tensor | None = None,
        rotation: RotatedView | None = None,
        ranks: Ranks = ALONE,
    ) -> Capture:
        """One pass over the samples, or over this process's among ``ranks``.

        On a GPU it decides, too, whether log-partitions are made in bfloat16 from here on.
        """
        tick, start = self.progress.stage(name, len(samples), "inputs"), time.perf_counter()

        def report(done: int, _: int) -> None:
            tick(done, f"{done * samples.positions_read / (time.perf_counter() - start):,.0f} {self.unit}s/s")

        captured = capture(
            stream, samples, constant=constant, memory_gib=self.suite.fit.memory_gib, report=report, ranks=ranks
        )
        self.progress.finished(name, time.perf_counter() - start, False)
        # Judged on what lenses at every layer may hand the head, the first layers' logit lens being the hardest.
        sample = captured.states[:, : max(1, 2048 // len(captured.states))].flatten(0, 1)
        dtype = ranks.told(choose_product_dtype(stream.readout, stream.readout.final_norm(sample)))
        stream.readout.product_dtype = dtype
        if dtype is not None:
            self.progress.say(f"log-partitions in {str(dtype).removeprefix('torch.')}, which agrees with float32 here")
        return captured if rotation is None else rotation.apply(captured)

    def fitted(self, model: ModelRecipe, seed: int) -> tuple[Origin, Stage]:
        """A model, trained where it is to be, and the stage that fits its lenses, for one view and seed."""
        origin, data = self.origin(model, seed), self.data(model)
        recipe = self.suite.fit
        who = f"{model.name}-seed{seed}"

        def fit(folder: Path) -> None:
            stream = self.stream(origin, model.view)
            readout = stream.readout
            if stream.layers < 2:
                raise LensbenchError(f"model {model.name} has one layer: there is nothing to transfer a lens to")
            loaded = None if model.lens is None else self.loaded_lens(model.lens, stream)
            samples = data.samples("fit", recipe.sequences, recipe.positions)
            captured = self.capture(stream, samples, name=f"capture-fit-{who}", ranks=self.ranks)
            dev_samples = data.samples("dev", recipe.dev_sequences, recipe.dev_positions)
            constant, name = captured.mean_p, f"capture-dev-{who}"
            dev = self.capture(stream, dev_samples, name=name, constant=constant, ranks=self.ranks)
            if model.rotated:
                view = RotatedView.random(
                    Moments.of(captured).covariance, seed=ROTATED_MODELS + seed, variance=recipe.variance
                )
                view.save(folder / ROTATION)
                captured, dev = view.apply(captured), view.apply(dev)
            steps = evaluation.fit_steps(recipe, stream.layers, loaded=loaded is not None)
            tick = self.progress.stage(f"fit-{who}", steps, "lenses")
            pieces = Pieces(folder / "pieces", self.ranks)
            fitted = evaluation.fit_all(
                readout, captured, dev, recipe, seed=seed, loaded=loaded, pieces=pieces, report=tick
            )
            maps = fitted.maps
            save_maps(maps, folder / "maps.safetensors")
            results.write_json(folder / "fit.json", fitted.summary.model_dump())
            label = origin.facts["source"] or f"{self.suite.name}/{model.name}"
            label = label.removeprefix("hub:")
            save_tuned_lens(tuned_lens(readout, maps["own_refined"], model_name=label), folder / "tuned")
            save_tuned_lens(tuned_lens(readout, maps["transfer"], model_name=label), folder / "tuned_headline")
            SharedLens.from_maps(readout, maps["shared_refined"]).save(folder / "shared")
            SharedLens.from_maps(readout, maps["shared_bias"]).save(folder / "shared_bias")
            pieces.clear()

        key: dict[str, Any] = {
            "trained": origin.digest,
            "texts": data.digest,
            "length": self.suite.length,
            "view": model.view,
            "fit": recipe.model_dump(exclude={"memory_gib"}),
            "seed": seed,
            "first_position": self.suite.evaluate.first_position,
        }
        if model.rotated:
            key["rotated"] = True
        if model.lens is not None:
            key["lens"] = lens_identity(model.lens)
        return origin, self.stage(f"fit-{who}", key, fit, together=True)

    def loaded_lens(self, source: str, stream: ResidualStream) -> AffineMaps:
        """Per-layer lenses of others, checked against the model."""
        maps = maps_of(load_tuned_lens(stream.readout, source))
        if maps.offset.shape != (stream.layers, stream.d_model):
            raise LensbenchError(
                f"{source}: the lens has {maps.offset.shape[0]} layers of width {maps.offset.shape[1]}, "
                f"the model {stream.layers} of {stream.d_model}"
            )
        return maps

    def planned(self, model: ModelRecipe, seed: int) -> Stage:
        """The stage that finds out how many sequences the suite's precision needs for this model, and how long they take.

        Scores the headline matrix on the suite's ``sequences`` as a pilot, then on as many as that predicts, and on more,
        until the interval of every penalty is narrow enough or the text is used up.
        """
        origin, fitting = self.fitted(model, seed)
        data, recipe, who = self.data(model), self.suite.evaluate, f"{model.name}-seed{seed}"

        def plan(folder: Path) -> None:
            target = recipe.precision
            assert target is not None
            maps = load_maps(fitting.folder / "maps.safetensors")["transfer"]
            stream = self.stream(origin, model.view)
            tick = self.progress.stage(f"plan-{who}", 100, "% of the precision")
            count, asked, spent = recipe.sequences, 0, 0.0
            while True:
                start = time.perf_counter()
                samples = self.eval_samples(data, count)
                captured = self.capture(
                    stream, samples, name=f"capture-plan-{who}", rotation=rotation_of(fitting), ranks=self.ranks
                )
                sums = transfer_sums(stream.readout, captured, maps, movement=False)
                seconds = self.ranks.told(time.perf_counter() - start)
                spent += seconds
                clusters, tokens = samples.clusters, samples.valid.sum(1)
                width = max(float(half_width(penalties(x), tokens, clusters).max()) for x in (sums.kl, sums.ce))
                tick(min(100, round(100 * (target / width) ** 2)) if width > 0 else 100, f"half-width {width:.4f} nats")
                exhausted = len(samples) < count
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
                f"{model.name}: half-width {width:.4f} nats with {len(samples)} sequences, {spent:.0f} s"
                + ("" if reached else f"; the text has no more, so precision {target:g} is not reached")
            )
            results.write_json(
                folder / "plan.json",
                {"sequences": len(samples), "half_width": width, "reached": reached, "seconds": round(spent, 2)},
            )

        key = {"fit": fitting.digest, "evaluate": recipe.scored}
        return self.stage(f"plan-{who}", key, plan, together=True)

    def measured(self, model: ModelRecipe, seed: int) -> tuple[Stage, Stage]:
        """The stages that fit a model's lenses and score them, for one view and seed."""
        origin, fitting = self.fitted(model, seed)
        data, recipe, who = self.data(model), self.suite.fit, f"{model.name}-seed{seed}"

        def score(folder: Path) -> None:
            fitted = evaluation.Fit(
                load_maps(fitting.folder / "maps.safetensors"), FitSummary.load(fitting.folder / "fit.json")
            )
            stream = self.stream(origin, model.view)
            samples = self.eval_samples(data)
            captured = self.capture(
                stream,
                samples,
                name=f"capture-eval-{who}",
                constant=fitted.constant,
                rotation=rotation_of(fitting),
                ranks=self.ranks,
            )
            tick = self.progress.stage(f"score-{who}", evaluation.score_steps(recipe, stream.layers), "matrices")
            pieces = Pieces(folder / "pieces", self.ranks)
            scored = evaluation.score_all(
                stream.readout,
                captured,
                fitted,
                refit_positions=self.suite.evaluate.refit_positions,
                memory_gib=recipe.memory_gib,
                pieces=pieces,
                report=tick,
            )
            frame = scored.frame(samples, model=model.name, seed=seed)
            results.write_sequences(folder / "sequences.parquet", frame)
            save_file({k: torch.from_numpy(v) for k, v in scored.refits.items()}, folder / "refits.safetensors")
            results.write_json(
                folder / "model.json",
                {
                    **origin.facts,
                    "family": origin.facts["family"] or stream.model.config.model_type,
                    "parameters": count_parameters(stream.model),
                    "layers": stream.layers,
                    "d_model": stream.d_model,
                    "vocab_size": stream.vocab_size,
                },
            )
            pieces.clear()

        scoring_key: dict[str, Any] = {
            "fit": fitting.digest,
            "evaluate": self.suite.evaluate.scored,
        }
        if self.sequences is not None:
            scoring_key["sequences"] = self.sequences
        return fitting, self.stage(f"score-{who}", scoring_key, score, together=True)

    def probed(self, model: ModelRecipe, seed: int) -> list[Found]:
        """What the suite's probes measure of a model, each in a stage of its own."""
        if not self.suite.probes:
            return []
        origin, fitting = self.fitted(model, seed)
        data, recipe, who = self.data(model), self.suite.fit, f"{model.name}-seed{seed}"
        # No more than are scored: the clusters of those are the probes' too.
        count = min(self.suite.evaluate.probe_sequences, self.sequences or self.suite.evaluate.sequences)
        splits = {"fit": (recipe.sequences, recipe.positions), "dev": (recipe.dev_sequences, recipe.dev_positions)}

        @cache
        def subject() -> Subject:
            """Loaded and captured when the first probe that is not finished asks."""
            stream, kept = self.stream(origin, model.view), FitSummary.load(fitting.folder / "fit.json")
            rotation = rotation_of(fitting)

            def read(split: str) -> Capture:
                samples = scored if split == "eval" else data.samples(split, *splits[split])
                constant = None if split == "fit" else torch.tensor(kept.constant)
                return self.capture(
                    stream, samples, name=f"capture-probe-{split}-{who}", constant=constant, rotation=rotation
                )

            scored = self.eval_samples(data, count)
            maps = load_maps(fitting.folder / "maps.safetensors")
            ticks: dict[str, Callable[[int, str], None]] = {}

            def report(what: str, done: int, total: int) -> None:
                if what not in ticks:
                    ticks[what] = self.progress.stage(f"{what}-{who}", total, "inputs")
                ticks[what](done, "")

            return Subject(
                stream,
                scored,
                kept.layers,
                maps["transfer"],
                model.rotated,
                read,
                maps["own"],
                maps["shared"],
                ReadText(data.samples("fit", *splits["fit"]), data.bigram, data.tokenizer)
                if isinstance(data, Texts)
                else None,
                report,
                lambda line: self.progress.say(f"{model.name}: {line}"),
            )

        found = []
        for name in self.suite.probes:
            evaluate = self.suite.evaluate.model_dump(include={"positions", "max_share"})
            evaluate = {"probe_sequences": count, **evaluate}
            key = {"fit": fitting.digest, "probe": name, "evaluate": evaluate}

            def measure(folder: Path, name: str = name) -> None:
                PROBES[name](subject()).save(folder)

            before, aside = self.only_finished, bool(self.probes) and name not in self.probes
            self.only_finished = before or aside
            try:
                stage = self.stage(f"probe-{name}-{who}", key, measure)
            except NotFinished:
                if before or not aside:
                    raise
                continue
            finally:
                self.only_finished = before
            found.append(load_found(stage.folder))
        return found

    def learned(self, model: ModelRecipe, seed: int) -> list[CurvePoint]:
        """The learning curve of a model that is trained here; a view of another, and what is not trained, has none."""
        recipe = self.suite.curve
        if recipe is None or model.view_of is not None or model.source is not None or model.untrained:
            return []
        data, points = self.data(), []
        for tokens in (*recipe.budgets, self.suite.training.tokens):
            training = self.trained(data, model, seed, tokens=tokens)

            def measure(folder: Path, training: Stage = training) -> None:
                windows = self.eval_samples(data)
                assert isinstance(windows, Windows)
                score_positions(self.network(training).eval(), windows, recipe.positions).save(folder)

            evaluate = self.suite.evaluate.model_dump(include={"sequences", "positions", "max_share", "first_position"})
            key = {"trained": training.digest, "texts": data.digest, "length": self.suite.length}
            key |= {"evaluate": evaluate, "sequences": self.sequences, "positions": recipe.positions}
            scored = Scored.load(self.stage(f"curve-{model.name}-seed{seed}-{tokens}", key, measure).folder)
            timed = training.folder / TRAINING
            # A stage of an earlier version knows only what it took as a whole.
            seconds = (
                json.loads(timed.read_text())["seconds"] if timed.exists() else self.stages.seconds[timed.parent.name]
            )
            points.append(CurvePoint(model.name, seed, tokens, seconds, scored))
        return points

    def baselines(self, data: Data) -> dict[str, Any]:
        """What counting alone predicts of the tokens (or classes) that the models are scored on, and how many those are.

        Counted on the train split, where there is none on the fit split.
        """

        def compute(folder: Path) -> None:
            samples = self.eval_samples(data)
            rows = np.nonzero(samples.valid)[0]
            ce = data.baselines(samples)
            per_token = {**ce, "document": samples.clusters[rows], "bytes": samples.next_bytes[samples.valid]}
            save_file({k: torch.from_numpy(v) for k, v in per_token.items()}, folder / "tokens.safetensors")
            scored = {
                "sequences": len(samples),
                "documents": len(samples.document_names),
                "tokens": int(samples.valid.sum()),
            }
            results.write_json(folder / "facts.json", {**data.counts(), "scored": scored, "baselines": list(ce)})

        evaluate = {k: v for k, v in self.suite.evaluate.scored.items() if k != "refit_positions"}
        key = {"texts": data.digest, "evaluate": evaluate, "length": self.suite.length, "sequences": self.sequences}
        key["clusters"] = "folders"  # earlier stages hold documents
        name = "baselines" if data.name in (TRAINED_HERE, IMAGES) else f"baselines-{data.name}"
        folder = self.stage(name, key, compute).folder
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        known = {k: v.numpy() for k, v in load_file(folder / "tokens.safetensors").items()}
        table = tables.baseline_table(
            {name: known[name] for name in facts.pop("baselines", ("unigram", "bigram"))},
            known["document"],
            known["bytes"],
            facts["train_tokens"],
            self.suite.evaluate.draws,
        )
        table.insert(0, "tokenizer", data.name)
        return {**facts, "table": table}


TRAINING = "training.json"
"""In the stage of a trained model: the seconds that its training took."""

ROTATION = "rotation.safetensors"
"""In the fit stage of a rotated view: the maps that its states were seen through."""

ROTATED_MODELS = 1_000_000
"""First seed of the maps of rotated views that are models of a suite; the nulls' own count from zero."""


def training_key(recipe: TrainingRecipe) -> dict[str, Any]:
    """What of a recipe a model's weights depend on; without deep supervision there is nothing to say of it."""
    key = recipe.model_dump(exclude={"checkpoint_every"} | (set() if recipe.deep_supervision else {"deep_supervision"}))
    return {**key, "optimizer": "Muon in float32 and AdamW"}


def rotation_of(fitting: Stage) -> RotatedView | None:
    path = fitting.folder / ROTATION
    return RotatedView.load(path) if path.exists() else None


def digest_of(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def named(source: str) -> str:
    """A source as results tell it: nobody's folders belong into them, but the file that a package ships does."""
    kind, _, rest = source.partition(":")
    if kind == "package":
        return f"{source}/{locate(source).options['gguf_file']}"
    return f"{kind}:{Path(rest).resolve().name}" if kind in ("path", "gguf") else source


def lens_identity(source: str) -> dict[str, str]:
    """What tells whether a lens is still the same: its name and the checksums of its files."""
    return {"lens": named(source), **{path.name: results.sha256(path) for path in lens_files(source)}}


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
) -> results.Run:
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
                tables.Part.load(
                    model.name, seed, f.folder, s.folder, runner.origin(model, seed).facts, found, suite.known(model)
                )
                for seed, f, s, found in measured
            ]
        if suite.evaluate.sums == "cluster":
            groups = suite.evaluate.groups
            parts = [
                replace(
                    part,
                    sequences=tables.summed_by_cluster(part.sequences, groups),
                    clusters=tables.joined_clusters(part.sequences["document"].astype(str).unique(), groups),
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
            return results.read_run(folder)
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
            results.write_table(folder, name, table)
        everything = pd.concat([part.sequences for part in parts], ignore_index=True)
        if suite.evaluate.sums == "cluster":
            everything = everything[~everything["lens"].astype(str).str.startswith("tuned@")]
        results.write_sequences(folder / results.SEQUENCES, everything)
        runner.stages.seconds["tables"] = round(time.perf_counter() - start, 2)
        tick(1, "figures")
        start = time.perf_counter()
        run = results.Run(
            folder,
            None,
            {n: results.read_table(folder / n) if n in written else results.no_rows(n) for n in results.SCHEMA},
        )
        drawn = figures.draw_figures(run, folder / "figures")
        runner.stages.seconds["figures"] = round(time.perf_counter() - start, 2)
        tick(2, "")
        files = [*(name for name in results.SCHEMA if name in written), results.SEQUENCES]
        manifest = describe(runner, counted, models, files, [p.name for p in drawn])
        if plans:
            manifest["precision"] = {"asked": suite.evaluate.precision, "models": plans}
        results.write_manifest(folder, manifest)
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
        "schema_version": results.SCHEMA_VERSION,
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
        "files": {name: results.sha256(runner.folder / name) for name in files},
        "figures": drawn,
        "seconds": dict(sorted(runner.stages.seconds.items())),
        "peak_gib": max(runner.stages.peak_gib.values()),
        "versions": versions(),
        "hardware": {**hardware(runner.device), "processes": runner.ranks.size},
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
            low, mean, high = tables.mean_with_interval(scored.model_ce, scored.document, suite.evaluate.draws)
            settings = {**{f"training.{k}": v for k, v in trial.training.items()}, **trial.settings}
            described = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
            rows.append((trial.model, number, described, mean, low, high))
        columns = ["model", "trial", "settings", "dev_ce", "dev_ce_ci_low", "dev_ce_ci_high"]
        table = pd.DataFrame(rows, columns=columns)
        table["chosen"] = table["dev_ce"] == table.groupby("model")["dev_ce"].transform("min")
        results.write_atomically(folder / "sweep.csv", partial(table.to_csv, index=False, lineterminator="\n"))
        manifest = describe(
            runner,
            {data.name: runner.baselines(data)},
            [models[n] for n in dict.fromkeys(table["model"])],
            ["sweep.csv"],
            [],
        )
        manifest |= {"sweep": sweep.model_dump(mode="json"), "suite_name": sweep.name}
        results.write_manifest(folder, manifest)
        return table
    finally:
        torch.set_num_threads(before)
        lock.release()
