"""A caller's model is as it was after every public function that takes one, also where the function fails.

A new public function that takes a model needs a line in ``CALLS``.
"""

import contextlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callers import MODELS, Stopped, blocks_of, llama, stopping, tokenizer, write_texts
from helpers.planted import subject_of, text
from helpers.progress import Steps
from helpers.taking import code_of, public_functions
from helpers.unchanged import condition, differences, left_as_it_was
from transformers import (
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from tuned_lens.nn.lenses import LogitLens

import lensbench
from lensbench.data.images import Images, load_images, pixels_of_size
from lensbench.data.recipe import TrainingRecipe
from lensbench.lenses.jacobian import linearised
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.trajectory import prediction_trajectory, trajectory_in_place
from lensbench.models import build, count_parameters, likelihood, looped, training, unused
from lensbench.models.pretrained import Pretrained
from lensbench.probes import PROBES
from lensbench.probes.subject import Subject
from lensbench.report import trace
from lensbench.report.trace_errors import errors_of
from lensbench.run import capturing, fitting, forecast, scoring
from lensbench.streams import ResidualStream, capture, parts
from lensbench.streams.half import choose_half, half_agreement
from lensbench.streams.rotary import same_after_any_text
from lensbench.streams.stream import refuse_non_finite
from lensbench.studies.curves import score_positions
from lensbench.suite.files import load_suite

PC = "predictive-coding"
RECIPE = FitRecipe(
    sequences=16, positions=8, dev_sequences=8, dev_positions=8, ridges=(0.1, 1.0), pads=(0.0,), tolerances=(),
    rotations=1, pair_rotations=1, refits=1, refine_tokens=64, refine_passes=1,
)  # fmt: skip
UPDATE = lensbench.UpdateRecipe(landmarks=False, refits=0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@dataclass
class Case:
    """A model as a caller has it, and what lensbench makes of it before a function is called."""

    model: Any
    texts: Path
    folder: Path
    probe: str = ""

    @cached_property
    def loaded(self) -> Pretrained:
        return Pretrained("path:models/of-a-caller", self.model, tokenizer(), False)

    @cached_property
    def stream(self) -> ResidualStream:
        return ResidualStream(self.model)

    @property
    def subject(self) -> Subject:
        # A third of the fitting tokens must be more than the state is wide, where a probe fits lenses of its own.
        return subject_of(self.model, count=80 if self.probe == "injection_survival" else 16, stream=self.stream)

    @cached_property
    def lenses(self) -> lensbench.api.Lenses:
        return lensbench.fit(self.loaded, f"file:{self.texts}", length=32, recipe=RECIPE, progress=False)

    @cached_property
    def exported(self) -> Path:
        self.lenses.fitted.export(self.folder, self.lenses.stream.readout, model_name="m")
        return self.folder


def in_folder(case: Case) -> list[str]:
    case.model.config.save_pretrained(case.folder)
    return unused.beside("m", case.folder, case.model)


def optimizers(case: Case) -> list[torch.optim.Optimizer]:
    return training.optimizers_of(case.model, TrainingRecipe())


def run_of_a_suite() -> Any:
    return SimpleNamespace(progress=Steps(), unit="token", suite=load_suite("pretrained"))


def multiplied(stream: ResidualStream) -> list[torch.Tensor]:
    with linearised(stream, IDS[None]) as product:
        return product(torch.ones(1, len(IDS), stream.d_model))


IDS = torch.arange(8)
WORDS = "ak bl cm dn eo ak bl cm"
SMALL = {"sequences": 8, "positions": 4}
CALLS = {
    "lensbench.lenses.jacobian.linearised": lambda c: multiplied(c.stream),
    "lensbench.api.fit": lambda c: lensbench.fit(c.loaded, f"file:{c.texts}", length=32, recipe=RECIPE, progress=False),
    "lensbench.api.decompose": lambda c: lensbench.decompose(
        c.loaded, f"file:{c.texts}", length=32, recipe=RECIPE, update=UPDATE, **SMALL, progress=False
    ),
    "lensbench.api.evaluate": lambda c: lensbench.evaluate(c.lenses, **SMALL, draws=10, update=UPDATE, progress=False),
    "lensbench.api.transfer_matrix": lambda c: lensbench.transfer_matrix(c.lenses, **SMALL, draws=10),
    "lensbench.api.Lenses.held_out": lambda c: c.lenses.held_out(8, 4),
    "lensbench.data.inputs.Texts.within": lambda c: c.lenses.texts.within(c.model),
    "lensbench.lenses.fit.Fit.export": lambda c: c.lenses.fitted.export(
        c.folder, c.lenses.stream.readout, model_name="m"
    ),
    "lensbench.lenses.trajectory.prediction_trajectory": lambda c: prediction_trajectory(
        LogitLens(c.stream.readout), c.stream, IDS, tokenizer()
    ),
    "lensbench.lenses.trajectory.trajectory_in_place": lambda c: trajectory_in_place(
        LogitLens(c.stream.readout), c.stream, IDS, tokenizer()
    ),
    "lensbench.models.families.count_parameters": lambda c: count_parameters(c.model),
    "lensbench.models.likelihood.text_likelihood": lambda c: likelihood.text_likelihood(
        c.model, tokenizer(), " ".join([WORDS] * 8), length=16
    ),
    "lensbench.models.likelihood.texts_likelihood": lambda c: likelihood.texts_likelihood(
        c.model, tokenizer(), [WORDS, WORDS], length=16
    ),
    "lensbench.models.likelihood.token_nats": lambda c: likelihood.token_nats(c.model, IDS),
    "lensbench.models.likelihood.nats_with_and_without": lambda c: likelihood.nats_with_and_without(
        c.model, text(0, 4), 1
    ),
    "lensbench.models.looped.can_loop": lambda c: looped.can_loop(c.model),
    "lensbench.models.looped.looping": lambda c: looped_on(c.model),
    "lensbench.models.training.optimizers_of": optimizers,
    "lensbench.models.training.save_checkpoint": lambda c: training.save_checkpoint(
        c.folder, c.model, optimizers(c), 1
    ),
    "lensbench.models.unused.unused_weights": lambda c: unused.unused_weights("m", c.model, ["tower.encoder.weight"]),
    "lensbench.models.unused.beside": in_folder,
    "lensbench.models.unused.check_stored": lambda c: unused.check_stored("m", c.folder, c.model),
    "lensbench.probes.catalogue.Probe.measure": lambda c: PROBES["accuracy"].measure(c.subject),
    "lensbench.probes.subject.Subject.plain": lambda c: subject_of(c.model, count=8, stream=c.stream),
    "lensbench.report.trace.load_lens": lambda c: trace.load_lens(c.stream, f"path:{c.exported / 'shared'}"),
    "lensbench.report.trace.token_ids": lambda c: trace.token_ids(c.loaded, WORDS),
    "lensbench.report.trace.traced": lambda c: trace.traced(c.loaded, WORDS, f"path:{c.exported / 'tuned'}"),
    "lensbench.report.trace.traced_in_place": lambda c: trace.traced_in_place(c.loaded, WORDS),
    "lensbench.report.trace_errors.errors_of": lambda c: errors_of(c.model, IDS),
    "lensbench.run.capturing.captured_states": lambda c: capturing.captured_states(
        run_of_a_suite(), c.stream, text(0, 4), name="m"
    ),
    "lensbench.run.forecast.embedded": lambda c: forecast.embedded(c.model),
    "lensbench.run.fitting.loaded_lens": lambda c: fitting.loaded_lens(f"path:{c.exported / 'tuned'}", c.stream),
    "lensbench.run.scoring.model_facts": lambda c: scoring.model_facts(
        SimpleNamespace(facts={"family": None}), c.stream
    ),
    "lensbench.streams.capture.capture": lambda c: capture(c.stream, text(0, 8)),
    "lensbench.streams.parts.evaluating": lambda c: evaluated(c.model),
    "lensbench.streams.parts.sees_images": lambda c: parts.sees_images(c.model),
    "lensbench.streams.parts.input_device": lambda c: parts.input_device(c.model),
    "lensbench.streams.parts.example_inputs": lambda c: parts.example_inputs(c.model, 2),
    "lensbench.streams.parts.find_readout": lambda c: parts.find_readout(c.model),
    "lensbench.streams.parts.find_parts": lambda c: parts.find_parts(c.model),
    "lensbench.streams.parts.find_text_parts": lambda c: parts.find_text_parts(c.model),
    "lensbench.streams.parts.after_the_head": lambda c: parts.after_the_head(
        c.model, c.model.get_output_embeddings(), {"input_ids": IDS[None]}
    ),
    "lensbench.streams.rotary.same_after_any_text": lambda c: unaware(c.model),
    "lensbench.streams.stream.ResidualStream": lambda c: ResidualStream(c.model),
    "lensbench.streams.stream.ResidualStream.with_readout": lambda c: c.stream.with_readout(c.stream.readout),
    "lensbench.streams.stream.ResidualStream.whole": lambda c: c.stream.whole(),
    "lensbench.streams.stream.ResidualStream.d_model": lambda c: c.stream.d_model,
    "lensbench.streams.stream.ResidualStream.before_the_head": lambda c: through_the_head(c.stream),
    "lensbench.streams.stream.ResidualStream.vocab_size": lambda c: c.stream.vocab_size,
    "lensbench.streams.half.choose_half": lambda c: choose_half(c.stream, lambda: text(0, 8)),
    "lensbench.streams.half.half_agreement": lambda c: half_agreement(c.stream, text(0, 8)),
    "lensbench.streams.stream.ResidualStream.states_at": lambda c: c.stream.states_at(
        IDS[None], torch.zeros(2).long(), IDS[:2], half=True
    ),
    "lensbench.streams.stream.ResidualStream.at": lambda c: c.stream.at(IDS[None], torch.zeros(2).long(), IDS[:2]),
    "lensbench.streams.stream.ResidualStream.places": lambda c: c.stream.places(
        torch.zeros(1, 4, 32), torch.zeros(2).long(), IDS[:2]
    ),
    "lensbench.streams.stream.ResidualStream.forward": lambda c: c.stream.forward(IDS[None]),
    "lensbench.streams.stream.ResidualStream.graph": lambda c: c.stream.graph(IDS[None]),
    "lensbench.streams.stream.ResidualStream.blocks": lambda c: c.stream.blocks,
    "lensbench.streams.stream.ResidualStream.block_list": lambda c: c.stream.block_list,
    "lensbench.streams.stream.ResidualStream.seen": lambda c: c.stream.seen(torch.zeros(1, 4, 32)),
    "lensbench.streams.stream.ResidualStream.asked": lambda c: c.stream.asked(IDS[None]),
    "lensbench.streams.stream.refuse_non_finite": lambda c: refuse_non_finite(c.model),
    "lensbench.studies.curves.score_positions": lambda c: score_positions(c.model, text(0, 4), (0,)),
}
"""What is called with each of the models: the full name of a public function -> a call of it"""

ONLY = {"lensbench.report.trace_errors.errors_of": [PC]}
"""Functions of some models"""

PARTS_OF_PROBES = {
    "block_paths": [
        "block_paths.cross_entropy", "tools.block_places.swapped", "tools.block_places.why_not_swapped",
        "tools.block_places.reordered", "tools.block_places.why_not_reordered",
    ],
    "causal_fidelity": [
        "causal_fidelity.scores_after", "causal_fidelity.Moves.of", "causal_fidelity.responses",
        "tools.interventions.cache_of", "tools.interventions.after_cache", "tools.interventions.entering",
    ],
    "error_transport": [
        "error_transport.planned", "error_transport.gather", "error_transport.estimate",
        "tools.heads.reading_heads", "tools.heads.AttentionWatch", "tools.heads.sets_attention",
        "tools.heads.check_heads", "tools.predictions.Directions.holding", "tools.predictions.batches",
    ],
    "few_shot": [
        "few_shot.measure", "few_shot.predicted_elsewhere", "few_shot.label_logits",
    ],
    "gradient_alignment": ["gradient_alignment.states_and_gradients"],
    "gradient_steps": ["gradient_steps.updates_and_steps"],
    "guess_and_refine": [
        "guess_and_refine.bigram_words", "guess_and_refine.words_of", "tools.layer_lenses.layer_lenses",
        "tools.layer_lenses.Uninformed.of",
    ],
    "head_weights": ["head_weights.previous_attention", "head_weights.written_by"],
    "known_places": ["known_places.uniform_twin", "known_places.against_uniform", "known_places.at_places"],
    "injection_survival": [
        "injection_survival.Lenses.of", "injection_survival.Injected.drawn",
        "injection_survival.answers_of", "tools.interventions.after_moves",
        "tools.interventions.last_states", "tools.interventions.before_blocks", "tools.interventions.blocks_of",
    ],
    "lens_rank": ["lens_rank.cuts_of"],
    "linearity": ["linearity.scores_of"],
    "top1_kept": ["top1_kept.top_words"],
    "prediction_visibility": ["prediction_visibility.Baseline.of", "tools.predictions.Directions.of"],
    "prefix_read_out": ["prefix_read_out.prefix_against_full"],
}  # fmt: skip
"""Functions that a probe calls, and that are tried with it: names below ``lensbench.probes``"""

HOLDS = "it is made of a model, or of what holds one, and does nothing with it"
TRAINS = "it is a step of a training, which changes the model"
NOT_TRIED = {
    "lensbench.probes.subject.no_blocks": "it asks for the names of what a stream has",
    "lensbench.api.Lenses": HOLDS,
    "lensbench.lenses.jacobian.JacobianSource": HOLDS,
    "lensbench.run.lens_comparison.Comparing": HOLDS,
    "lensbench.run.lens_comparison.compare_lenses": "it calls what is tried: a stream, lenses of others, linearised",
    "lensbench.run.lens_comparison.file_lens": "it reads the sizes of a stream, and hands its read-out on to what is tried",
    "lensbench.probes.decodable_used.add_layer": "it reads the states that the subject holds",
    "lensbench.probes.jacobian_halves.add_layer": "it reads the states that the subject holds",
    "lensbench.probes.tools.halves.Parts.of": "it reads the states and the read-out that the subject holds",
    "lensbench.probes.tools.halves.jacobians_of": "it hands the model on to a JacobianSource, which is tried",
    "lensbench.run.speeds.measured_speed": "it trains a model that was made for this alone",
    "lensbench.run.speeds.seconds_of_step": "it trains a model that was made for this alone",
    "lensbench.models.pretrained.Pretrained": HOLDS,
    "lensbench.probes.subject.Subject": HOLDS,
    "lensbench.probes.subject.Subject.windows": "it gives the windows that the subject holds",
    "lensbench.probes.subject.Subject.words": "it gives the text that the subject holds",
    "lensbench.probes.subject.Subject.task": "it reports progress",
    "lensbench.probes.subject.Subject.say": "it reports progress",
    "lensbench.run.capturing.KeptCaptures": HOLDS,
    "lensbench.run.capturing.shows_more": "it asks for the view of a stream",
    "lensbench.run.context.Cache": HOLDS,
    "lensbench.models.gguf.tensors": "it asks for the names of a model's weights, on the way to a caller",
    "lensbench.models.training.load_checkpoint": "it restores the weights of a checkpoint, as its name says",
    "lensbench.models.training.draw_step": TRAINS,
    "lensbench.models.training.loss_of": TRAINS,
    "lensbench.models.training.backward": TRAINS,
    "lensbench.models.training.share_gradients": TRAINS,
    "lensbench.models.training.where_not_finite": "a training that has failed calls it, on the model that it trained",
    "lensbench.models.training.train": TRAINS,
    "lensbench.run.training.save": "it ends the training of a run's own model, in evaluation mode",
    "lensbench.streams.parts.find_image_parts": "it is tried with the image models below",
    "lensbench.probes.tools.predictions.Directions.none": "it reads a device and the size of the read-out",
}
"""Public functions that take a model and are not tried, each with the reason"""


def evaluated(model):
    with parts.evaluating(model):
        model(input_ids=IDS[None])


def through_the_head(stream):
    with parts.evaluating(stream.model), stream.before_the_head(lambda _, args: args[0][:, -1:]):
        stream.model(input_ids=IDS[None])


def looped_on(model):
    with looped.looping(model, 9):
        pass


def unaware(model):
    with same_after_any_text(model), torch.random.fork_rng(devices=[]):
        model(input_ids=IDS[None], use_cache=False)


def of_probes() -> dict[str, str]:
    """The full name of a function -> the probe that it is tried with."""
    own = {f"{p.function.__module__}.{p.function.__name__}": name for name, p in PROBES.items()}
    return own | {f"lensbench.probes.{part}": name for name, parts in PARTS_OF_PROBES.items() for part in parts}


def test_every_function_that_takes_a_model_is_tried():
    known, public = {**CALLS, **of_probes(), **NOT_TRIED}, public_functions()
    new = sorted(set(public) - set(known))
    assert not new, (
        f"{', '.join(new)} takes a model that may be a caller's: add a call of it to CALLS in {Path(__file__).name} (a step "
        "of a probe: to PARTS_OF_PROBES), so that the model is compared before and after; or, where it is meant to change "
        "the model, name it in NOT_TRIED with the reason"
    )
    gone = sorted(set(known) - set(public) - {"lensbench.lenses.fit.Fit.export"})  # it takes a read-out
    assert not gone, f"no public function that takes a model: {', '.join(gone)}; remove it from {Path(__file__).name}"
    twice = (set(CALLS) | set(of_probes())) & set(NOT_TRIED)
    assert not twice, f"tried and yet in NOT_TRIED: {', '.join(sorted(twice))}"


def test_a_new_function_that_takes_a_model_would_be_seen(monkeypatch):
    def brand_new(model: Pretrained | None, length: int = 3) -> None:
        pass

    brand_new.__module__ = "lensbench.models.likelihood"
    monkeypatch.setattr(likelihood, "brand_new", brand_new, raising=False)
    with pytest.raises(AssertionError, match=r"brand_new.* takes a model .* add a call of it to CALLS"):
        test_every_function_that_takes_a_model_is_tried()


def test_the_helper_sees_what_changes():
    model = llama()
    before = condition(model)
    model.eval()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad.add_(1)
    model.config.use_cache = not model.config.use_cache
    model.model.norm.register_forward_hook(lambda *_: None)
    model.model.norm.variance_epsilon = 1.0
    torch.rand(1)
    seen = differences(before, condition(model))
    assert {
        "mode of lm_head", "parameter lm_head.weight: what it is", "parameter lm_head.weight: gradient", "config",
        "_forward_hooks of model.norm", "attribute variance_epsilon of model.norm",
        "process: random numbers of torch",
    } <= set(seen)  # fmt: skip


@contextlib.contextmanager
def called():
    """The code of every function of Python that runs inside."""
    found: set[Any] = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: found.add(frame.f_code) if event == "call" else None)
    try:
        yield found
    finally:
        sys.setprofile(before)


def tried(case: Case, call, failures) -> None:
    """Compare the model before and after a call, and one that is stopped at the first, a middle and the last pass.

    The call was made once before: what is fitted for it is then there.
    """
    with stopping(case.model) as calls, left_as_it_was(case.model):
        call(case)
    for after in sorted({0, len(calls) // 2, len(calls) - 1} if failures else set()):
        if 0 <= after < len(calls):
            with stopping(case.model, after) as so_far:
                with left_as_it_was(case.model), contextlib.suppress(Stopped):
                    call(case)
                assert len(so_far) > after


FAST = (
    "lensbench.models.likelihood.text_likelihood",
    "lensbench.report.trace.token_ids",
    "lensbench.streams.parts.find_parts",
    "lensbench.streams.stream.ResidualStream",
    "lensbench.streams.capture.capture",
    "lensbench.streams.stream.ResidualStream.graph",
)
FAST_PROBES = "accuracy", "head_weights", "gradient_alignment"


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_the_functions_that_most_others_use_leave_the_model_as_it_was(name, kind, texts, tmp_path):
    case = Case(MODELS[kind](), texts, tmp_path)
    CALLS[name](case)
    tried(case, CALLS[name], failures=True)


@pytest.mark.parametrize("name", FAST_PROBES)
def test_probes_that_hook_or_differentiate_a_model_leave_the_model_as_it_was(name, texts, tmp_path):
    case = Case(MODELS["own attention"](), texts, tmp_path)
    PROBES[name].measure(case.subject)
    tried(case, lambda c: PROBES[name].measure(c.subject), failures=True)


def some_models(number: int) -> list[str]:
    """Two models for the function of that number: one with hooks and dropout of its caller, one without."""
    return [["gpt2", "own attention"][number % 2], ["llama", PC, "gemma"][number % 3]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for k, name in enumerate(CALLS) for kind in ONLY.get(name, some_models(k))]
)
def test_a_public_function_leaves_the_model_as_it_was(name, kind, texts, tmp_path):
    function = public_functions().get(name) or lensbench.lenses.fit.Fit.export
    case = Case(MODELS[kind](), texts, tmp_path)
    with called() as ran:
        CALLS[name](case)
    assert code_of(function) in ran, f"CALLS does not call {name}"
    tried(case, CALLS[name], failures=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for k, name in enumerate(PROBES) for kind in dict.fromkeys([*some_models(k), PC])]
)
def test_a_probe_leaves_the_model_as_it_was(name, kind, texts, tmp_path):
    case = Case(MODELS[kind](), texts, tmp_path, name)
    PROBES[name].measure(case.subject)
    tried(case, lambda c: PROBES[name].measure(c.subject), failures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS_OF_PROBES)
def test_the_parts_of_a_probe_are_called_by_it(name, texts, tmp_path):
    public, ran = public_functions(), set()
    for kind in ("llama", PC):
        with called() as found:
            PROBES[name].measure(Case(MODELS[kind](), texts, tmp_path, name).subject)
        ran |= found
    missing = [p for p in PARTS_OF_PROBES[name] if code_of(public[f"lensbench.probes.{p}"]) not in ran]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decompose", "fit", "evaluate", "transfer_matrix"])
def test_a_loaded_model_stays_as_it_was_loaded(name, texts, tmp_path):
    MODELS["gpt2"]().save_pretrained(tmp_path / "m")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(tmp_path / "m")
    loaded = lensbench.load(f"path:{tmp_path / 'm'}")
    assert not loaded.model.training
    case = Case(loaded.model, texts, tmp_path)
    case.loaded = loaded
    words = loaded.tokenizer.backend_tokenizer.to_str()
    CALLS[f"lensbench.api.{name}"](case)
    tried(case, CALLS[f"lensbench.api.{name}"], failures=True)
    assert loaded.tokenizer.backend_tokenizer.to_str() == words


VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 5}
RESNET = {
    "num_channels": 1, "embedding_size": 16, "hidden_sizes": [16] * 3, "depths": [1] * 3, "layer_type": "basic",
    "num_labels": 5,
}  # fmt: skip
"""With batch norm: a pass in training mode changes its buffers"""
IMAGE_MODELS = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**VIT, image_size=8, patch_size=4, num_channels=1, hidden_dropout_prob=0.2)
    ),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET)),
    "cnn": lambda: build(
        "cnn-residual", vocab_size=5, d_model=16, layers=3, heads=2, context=8, channels=1, parameters=20_400
    ),
}


def image_subject(model) -> Subject:
    stream = ResidualStream(model)
    pictures = load_images("digits", parts=(900, 350, 150, 397), seed=0)

    def of(split):
        rows = pictures.splits[split][:24]
        prepare = pixels_of_size(channels=1, height=8, width=8)
        return Images(pictures, rows, prepare, pictures.labels[rows] % 5)

    maps = AffineMaps.stack([AffineMaps.identity(stream.d_model)] * stream.layers)
    return Subject(
        stream,
        of("eval"),
        list(range(stream.layers)),
        maps,
        False,
        lambda split: capture(stream, of(split)),
        maps,
        maps,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if (kind, name) in [("vit", "accuracy")] else pytest.mark.slow)
        for kind in IMAGE_MODELS
        for name in [name for name, probe in PROBES.items() if probe.images]
    ],
)
def test_an_image_model_stays_as_it_was(kind, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = IMAGE_MODELS[kind]()
        for asked in ("output_hidden_states", "output_attentions"):  # transformers leaves hooks of its own
            with contextlib.suppress(TypeError), torch.no_grad():
                model.eval()(pixel_values=torch.zeros(1, 1, 8, 8), **{asked: True})
    model.train()
    blocks_of(model)[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 1)
    with left_as_it_was(model):
        parts.find_image_parts(model)
    with left_as_it_was(model):
        subject = image_subject(model)
    with left_as_it_was(model):
        PROBES[name].measure(subject)
    calls = []

    def stop(*_):
        calls.append(1)
        raise Stopped

    hook = blocks_of(model)[-1].register_forward_hook(stop)
    with left_as_it_was(model), contextlib.suppress(Stopped, lensbench.errors.LensbenchError):
        PROBES[name].measure(image_subject(model))
    assert calls
    hook.remove()


def test_a_model_in_training_mode_gives_the_numbers_of_its_evaluation_mode():
    """Dropout would show."""
    model = MODELS["gpt2"]()
    still = MODELS["gpt2"]().eval()
    for function in (
        lambda m: likelihood.token_nats(m, IDS),
        lambda m: torch.from_numpy(score_positions(m, text(0, 4), (0,)).nats),
        lambda m: ResidualStream(m).forward(IDS[None])[0],
    ):
        torch.testing.assert_close(function(model), function(still))
