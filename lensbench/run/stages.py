"""The stages of a run: training, fitting, planning, scoring, probing, counting."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel, PreTrainedTokenizerBase

from lensbench.data.corpus import SPLITS, Corpus, load_corpus
from lensbench.data.images import ImageSet, Prepare, labels_for, load_images, plainly, processed_pixels
from lensbench.data.inputs import IMAGES, TRAINED_HERE, Data, Pictures, Texts
from lensbench.data.recipe import TrainingRecipe
from lensbench.data.samples import Samples
from lensbench.data.windows import Windows, train_tokenizer
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit, FitSummary, fit_all, fit_steps
from lensbench.lenses.maps import AffineMaps, load_maps, save_maps
from lensbench.lenses.moments import Moments
from lensbench.lenses.tuned import SharedLens, load_tuned_lens, maps_of, save_tuned_lens, tuned_lens
from lensbench.measures.evaluate import score_all, score_steps
from lensbench.measures.transfer import penalties, transfer_sums
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
    named,
)
from lensbench.models.training import StepReport, train
from lensbench.probes.registry import PROBES, Found, load_found
from lensbench.probes.subject import ReadText, Subject
from lensbench.results.folder import write_sequences
from lensbench.results.manifest import MANIFEST
from lensbench.results.tables import baseline_table
from lensbench.run.sources import lens_identity
from lensbench.runtime.environment import choose_device, dtype_named, git_revision
from lensbench.runtime.files import write_json
from lensbench.runtime.progress import Progress
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.stages import NotFinished, Pieces, Stage, Stages
from lensbench.statistics import half_width
from lensbench.streams.capture import Capture, capture
from lensbench.streams.kl import choose_product_dtype
from lensbench.streams.parts import image_shape
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream
from lensbench.studies.curves import CurvePoint, Scored, score_positions
from lensbench.suite.recipes import ImageRecipe, ModelRecipe, Suite

CODE_VERSION = 3
"""Raised when a stage computes something else from the same settings, so that old stages are not reused."""


REMEDY = "set evaluate.length to {} or less, in a copy of the suite's file"


@dataclass(frozen=True)
class Origin:
    """A model of a run: what identifies it, and how it is loaded."""

    name: str
    digest: str
    load: Callable[[], PreTrainedModel]
    facts: dict[str, Any]
    """``family, source, dtype, train_tokens`` of ``models.csv``."""


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
    """Compute nothing: a stage that is not there raises :class:`lensbench.runtime.stages.NotFinished`."""
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
        read = load_corpus(recipe.spec, fractions=recipe.fractions, seed=recipe.seed, max_bytes=recipe.max_bytes)
        tick(1, "")
        return read

    @cached_property
    def images(self) -> ImageSet:
        """The images, found and split."""
        recipe = self.suite.images
        assert recipe is not None
        tick = self.progress.stage("images", 1, "steps")
        trains = any(m.source is None and m.view_of is None and not m.untrained for m in self.suite.models)
        needed = SPLITS if trains else SPLITS[1:]
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
            train_tokenizer(self.corpus, recipe.vocab_size).save(str(folder / "tokenizer.json"))

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
            write_json(folder / TRAINING, {"seconds": round(usual * recipe.steps, 2)})
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
            manifest = json.loads((own_tokenizer.parents[2] / MANIFEST).read_text())
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
            steps = fit_steps(recipe, stream.layers, loaded=loaded is not None)
            tick = self.progress.stage(f"fit-{who}", steps, "lenses")
            pieces = Pieces(folder / "pieces", self.ranks)
            fitted = fit_all(readout, captured, dev, recipe, seed=seed, loaded=loaded, pieces=pieces, report=tick)
            maps = fitted.maps
            save_maps(maps, folder / "maps.safetensors")
            write_json(folder / "fit.json", fitted.summary.model_dump())
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
            write_json(
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
            fitted = Fit(load_maps(fitting.folder / "maps.safetensors"), FitSummary.load(fitting.folder / "fit.json"))
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
            tick = self.progress.stage(f"score-{who}", score_steps(recipe, stream.layers), "matrices")
            pieces = Pieces(folder / "pieces", self.ranks)
            scored = score_all(
                stream.readout,
                captured,
                fitted,
                refit_positions=self.suite.evaluate.refit_positions,
                memory_gib=recipe.memory_gib,
                pieces=pieces,
                report=tick,
            )
            frame = scored.frame(samples, model=model.name, seed=seed)
            write_sequences(folder / "sequences.parquet", frame)
            save_file({k: torch.from_numpy(v) for k, v in scored.refits.items()}, folder / "refits.safetensors")
            write_json(
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
            write_json(folder / "facts.json", {**data.counts(), "scored": scored, "baselines": list(ce)})

        evaluate = {k: v for k, v in self.suite.evaluate.scored.items() if k != "refit_positions"}
        key = {"texts": data.digest, "evaluate": evaluate, "length": self.suite.length, "sequences": self.sequences}
        key["clusters"] = "folders"  # earlier stages hold documents
        name = "baselines" if data.name in (TRAINED_HERE, IMAGES) else f"baselines-{data.name}"
        folder = self.stage(name, key, compute).folder
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        known = {k: v.numpy() for k, v in load_file(folder / "tokens.safetensors").items()}
        table = baseline_table(
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
