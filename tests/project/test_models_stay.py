"""A caller's model is as it was after every public function that takes one, also where the function fails."""

import contextlib

import pytest
import torch
from helpers.architectures import small_model
from helpers.planted import planted, subject_of, text, words
from helpers.unchanged import as_a_caller_has_it, condition, differences, left_as_it_was

from lensbench.lenses.trajectory import prediction_trajectory
from lensbench.models import build, count_parameters
from lensbench.models.likelihood import token_nats
from lensbench.probes import PROBES
from lensbench.report.trace_errors import errors_of
from lensbench.streams import ResidualStream, capture
from lensbench.streams.parts import find_parts

SHAPE = {"vocab_size": 97, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


def predictive_coding():
    return as_a_caller_has_it(build("predictive-coding", seed=1, **SHAPE))


def llama():
    return as_a_caller_has_it(planted("none"))


def gemma():
    return as_a_caller_has_it(
        small_model("gemma3_text", vocab_size=97, attn_implementation="sdpa", tie_word_embeddings=True)
    )


MODELS = {"llama": llama, "gemma": gemma, "predictive-coding": predictive_coding}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


class Stopped(Exception):
    pass


def failing(model, after):
    """A hook that raises at the given call of the last module that a forward pass calls: its head."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) > after:
            raise Stopped

    return model.get_output_embeddings().register_forward_hook(stop)


def test_the_helper_sees_what_changes():
    model = llama()
    before = condition(model)
    model.eval()
    model.lm_head.weight.requires_grad_(False)
    model.config.use_cache = not model.config.use_cache
    model.model.norm.register_forward_hook(lambda *_: None)
    seen = differences(before, condition(model))
    for what in ("mode of lm_head", "lm_head.weight: what", "config", "_forward_hooks of model.norm"):
        assert any(what in name for name in seen), what


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_leaves_the_model_as_it_was(name, model):
    with left_as_it_was(model):
        subject = subject_of(model, count=16)
        PROBES[name].measure(subject)


@pytest.mark.parametrize("name", [name for name in PROBES if name != "gradient_steps"])
@pytest.mark.parametrize("calls", [0, 3])
def test_a_probe_that_fails_leaves_the_model_as_it_was(name, calls):
    model = gemma()
    subject = subject_of(model, count=16)
    hook = failing(model, calls)
    with left_as_it_was(model), contextlib.suppress(Stopped):
        PROBES[name].measure(subject)
    hook.remove()


TAKES_A_MODEL = {
    "token_nats": lambda model: token_nats(model, torch.arange(8)),
    "ResidualStream": ResidualStream,
    "capture": lambda model: capture(ResidualStream(model), text(0, 8)),
    "find_parts": find_parts,
    "count_parameters": count_parameters,
    "prediction_trajectory": lambda model: prediction_trajectory(
        lambda h, idx: h[:, :1].expand(-1, 97), ResidualStream(model), torch.arange(8), words()
    ),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_a_public_function_leaves_the_model_as_it_was(name, model):
    with left_as_it_was(model):
        TAKES_A_MODEL[name](model)
    hook = failing(model, 1)
    with left_as_it_was(model), contextlib.suppress(Stopped):
        TAKES_A_MODEL[name](model)
    hook.remove()


def test_errors_of_a_text_leave_the_model_as_it_was():
    model = predictive_coding()
    with left_as_it_was(model):
        errors_of(model, torch.arange(8))
