"""Passes with products in float16 against passes in float32 and float64."""

import pytest
import torch
from helpers.gpt_windows import windows

from lensbench.models import build
from lensbench.streams import half
from lensbench.streams.capture import capture
from lensbench.streams.half import LARGEST_ERROR, LARGEST_KL, choose_half, half_agreement
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 61, "d_model": 16, "layers": 3, "heads": 2, "context": 32, "parameters": 20_000}


def small_model(family="gpt"):
    return build(family, seed=0, **SHAPE).eval()


@pytest.fixture
def small_and_fast(monkeypatch):
    monkeypatch.setattr(half, "half_is_fast", lambda: True)
    monkeypatch.setattr(half, "LEAST_PARAMETERS", 0)


@pytest.mark.parametrize("family", ["gpt", "gpt-conv", "predictive-coding"])
def test_they_agree_with_float32_and_are_chosen(family, small_and_fast):
    stream = ResidualStream(small_model(family))
    found = choose_half(stream, windows)
    assert found is not None
    assert 0 < found.kl < LARGEST_KL
    assert 1e-5 < found.state_error < LARGEST_ERROR
    assert found.facts == {"passes": "float16", "kl": found.kl, "state_error": found.state_error}


def test_the_agreement_is_what_the_model_itself_says():
    def sharp():
        model = small_model()
        with torch.no_grad():  # logits of some size
            model.lm_head.weight.mul_(20)
        return model

    samples, found = windows(), half_agreement(ResidualStream(sharp()), windows())
    ids, rows, at = (torch.from_numpy(x) for x in samples.scored(slice(None)))
    model = sharp()
    with torch.no_grad():
        wide = sharp().double()(ids, output_hidden_states=True)
        with torch.autocast("cpu", torch.float16):
            narrow = model(ids, output_hidden_states=True)
        # The last of the states that this model reports is behind its final norm.
        logits = model.lm_head(narrow.hidden_states[-1].float())
    p, q = (x[rows, at].double().log_softmax(-1) for x in (wide.logits, logits))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)
    errors = []
    for exact, rounded in zip(wide.hidden_states[:-1], narrow.hidden_states[:-1], strict=True):
        h, other = exact[rows, at], rounded.double()[rows, at]
        errors.append(float(((other - h).norm(dim=-1) / (h - h.mean(0)).norm(dim=-1)).median()))
    assert found.state_error >= 0.99 * max(errors) > 0


@pytest.mark.parametrize("why", ["not fast", "small", "bfloat16", "overflow", "far"])
def test_they_are_not_used_where_they_gain_nothing_or_do_not_agree(why, small_and_fast, monkeypatch):
    model = small_model()
    if why == "not fast":
        monkeypatch.setattr(half, "half_is_fast", lambda: False)
    elif why == "small":
        monkeypatch.setattr(half, "LEAST_PARAMETERS", 10**6)
    elif why == "bfloat16":
        model = model.bfloat16()
    elif why == "far":
        monkeypatch.setattr(half, "LARGEST_ERROR", 1e-6)
    else:
        overflow(model)
    assert choose_half(ResidualStream(model), windows) is None


def overflow(model):
    """Let a product of a block leave the range of float16, with the same states after all."""
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2.0**24)
        mlp.down_proj.weight.div_(2.0**24)


def test_a_capture_by_them_differs_by_rounding_alone_and_reads_out_in_float32():
    stream, samples = ResidualStream(small_model()), windows()
    exact = capture(stream, samples)
    stream.half = True
    found = capture(stream, samples)
    assert found.states.dtype == torch.float32
    moved = (found.states - exact.states).norm(dim=-1) / exact.states.norm(dim=-1)
    assert 0 < moved.max() < 5e-3
    read = stream.readout.logits(stream.readout.final_norm(found.states[-1])).double().log_softmax(-1)
    own = -read.gather(-1, found.targets[:, None])[:, 0]
    assert (found.model_ce - own).abs().max() < 1e-5
    assert (found.model_ce - exact.model_ce).abs().max() < 0.02
    stream.half = None
    assert torch.equal(capture(stream, samples).states, exact.states)


def test_a_window_that_overflows_is_passed_in_float32():
    model = small_model()
    overflow(model)
    stream, samples = ResidualStream(model), windows()
    exact = capture(stream, samples)
    stream.half = True
    assert torch.equal(capture(stream, samples).states, exact.states)


def test_other_passes_stay_as_they_are():
    stream = ResidualStream(small_model())
    ids = torch.from_numpy(windows().ids)
    before = stream.forward(ids)
    stream.half = True
    after = stream.forward(ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    states, _ = stream.graph(ids)
    assert states[-1].requires_grad
