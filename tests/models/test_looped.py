"""The GPT of recurrent depth: a loop written out by hand, the drawn number of loops, and gradients through the last few."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lensbench.data.recipe import TrainingRecipe
from lensbench.models import build, count_parameters
from lensbench.models.looped import LoopedGPTConfig, can_loop, looping
from lensbench.models.training import draw_step, loss_of, train
from lensbench.streams.parts import find_parts, find_readout
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 61, "d_model": 24, "layers": 4, "heads": 2, "context": 32, "parameters": 40_000}


def looped(**settings):
    model = build("gpt-looped", seed=3, **SHAPE, **settings).eval()
    with torch.no_grad():  # far from the initial weights, where blocks do little
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(0))


def by_hand(model, ids, loops):
    """The states of a looped model whose adapter, blocks and norm are called one after another."""
    e = F.rms_norm(model.embed_tokens(ids), (24,), eps=1e-12)
    states, (loop,) = [e], model.layers
    for _ in range(loops):
        x = torch.cat([states[-1], e], -1) @ loop.adapter.weight.T
        for block in loop.blocks:
            x = block(x, None)
        states.append(x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * loop.norm.weight)
    return states


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_states_of_a_loop_are_those_of_its_parts_called_by_hand(blocks, ids):
    model = looped(blocks_per_loop=blocks)
    assert len(model.layers[0].blocks) == blocks
    expected = by_hand(model, ids, 4)
    stream = ResidualStream(model)
    states, logits = stream.forward(ids)
    assert stream.layers == 4
    torch.testing.assert_close(states, torch.stack(expected))
    torch.testing.assert_close(logits, model.lm_head(model.norm(expected[-1])))
    assert find_parts(model).members == ()
    assert abs(count_parameters(build("gpt-looped", **SHAPE)) - 40_000) <= 400


def test_a_model_loops_on_beyond_its_number_and_then_is_as_before(ids):
    model = looped()
    before = model(ids).logits
    with looping(model, 9):
        stream = ResidualStream(model)
        assert stream.layers == 9
        torch.testing.assert_close(stream.forward(ids)[0], torch.stack(by_hand(model, ids, 9)))
    assert torch.equal(model(ids).logits, before)
    for family, settings in (("gpt-tied", {}), ("predictive-coding", {"tied_layers": True})):
        other = build(family, seed=1, **SHAPE, **settings).eval()
        assert can_loop(other)
        short = other(ids, output_hidden_states=True).hidden_states
        with looping(other, 7):
            states = other(ids, output_hidden_states=True).hidden_states
        assert len(states) == 8
        assert all(torch.equal(a, b) for a, b in zip(short, states, strict=False))
    assert not can_loop(build("gpt-conv", **SHAPE))


def test_the_input_reaches_every_loop(ids):
    """Were it not injected, a state that is the same for all tokens would stay so."""
    model = looped()
    e = F.rms_norm(model.embed_tokens(ids), (24,), eps=1e-12)
    same = torch.ones_like(e)
    after = model.layers[0](same, e, None)
    assert float((after[0, 5] - after[1, 5]).detach().norm()) > 0.1
    with torch.no_grad():
        model.layers[0].adapter.weight[:, 24:] = 0
    after = model.layers[0](same, e, None)
    torch.testing.assert_close(after[0, 5], after[1, 5], rtol=1e-4, atol=1e-5)


def test_loops_are_drawn_from_a_log_normal_poisson_one_more(ids):
    model = looped(loops_spread=0.5)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(20_000):
        model.draw(rng)
        drawn.append(model.drawn)
    counts = np.array(drawn)
    # E r = L + 1; Var r = L + L^2 (exp(s^2) - 1), from the law of total variance.
    assert counts.min() == 1
    assert counts.mean() == pytest.approx(5, abs=0.06)
    assert counts.var() == pytest.approx(4 + 16 * np.expm1(0.25), rel=0.06)
    model.drawn = 6
    assert len(model.train()(ids, output_hidden_states=True).hidden_states) == 7
    assert len(model.eval()(ids, output_hidden_states=True).hidden_states) == 5, "evaluation has the config's number"


def test_every_step_draws_its_own_number_and_a_resumed_one_the_same():
    model, seen = looped(), []
    for step in range(30):
        draw_step(model, 7, step)
        seen.append(model.drawn)
    assert len(set(seen)) > 3
    draw_step(model, 7, 12)
    assert model.drawn == seen[12]
    draw_step(torch.nn.Linear(2, 2), 7, 0)  # other models draw nothing


def test_gradients_go_back_through_the_last_loops_alone(ids):
    model = looped(backward_loops=2).train()
    model.drawn = 5
    loss, _ = loss_of(model, ids, None, 0.0)
    loss.backward()
    e = F.rms_norm(model.embed_tokens(ids), (24,), eps=1e-12)
    with torch.no_grad():
        h = torch.stack(by_hand(model, ids, 3))[-1]
    found = model.layers[0].adapter.weight.grad.clone()
    model.zero_grad()
    for _ in range(2):
        h = model.layers[0](h, e, None)
    logits = model.lm_head(model.norm(h))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(found, model.layers[0].adapter.weight.grad)


def test_a_single_drawn_loop_has_no_inner_layer_to_supervise(ids):
    model = looped().train()
    model.drawn = 1
    total, last = loss_of(model, ids, find_readout(model), 0.3)
    assert total is last


def test_a_looped_model_is_saved_and_loaded_as_an_ordinary_one(ids, tmp_path):
    model = looped(blocks_per_loop=1, loops_spread=0.2, backward_loops=3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (again.config.blocks_per_loop, again.config.loops_spread, again.config.backward_loops) == (1, 0.2, 3)
    assert torch.equal(again(ids).logits, model(ids).logits)
    padded, mask = F.pad(ids, (4, 0), value=7), F.pad(torch.ones_like(ids), (4, 0))
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_values_out_of_range_are_refused():
    for settings, said in (
        ({"blocks_per_loop": 0}, "blocks_per_loop must be a whole number"),
        ({"backward_loops": 1.5}, "backward_loops must be a whole number"),
        ({"loops_spread": -1}, r"loops_spread must lie in 0\.\.2"),
    ):
        with pytest.raises(ValueError, match=said):
            LoopedGPTConfig(**settings)


@pytest.mark.slow
def test_a_looped_model_learns_and_holds_its_prediction_beyond_training(tmp_path):
    rng = np.random.default_rng(0)
    stream = rng.permutation(61)[np.cumsum(rng.integers(1, 3, 20_000)) % 61].astype(np.uint16)
    ids = torch.from_numpy(stream[:512].astype(np.int64)).view(16, 32)
    model = build("gpt-looped", seed=0, **SHAPE)
    recipe = TrainingRecipe(tokens=60_000, length=32, batch=8)
    train(model, stream, recipe, seed=0, checkpoints=tmp_path, device=torch.device("cpu"))
    with torch.no_grad():
        usual = float(loss_of(model, ids, None, 0.0)[0])
        with looping(model, 12):
            more = float(loss_of(model, ids, None, 0.0)[0])
    assert usual < 1.0, "two followers a token are ln 2 nats"
    assert more < usual + 0.3
