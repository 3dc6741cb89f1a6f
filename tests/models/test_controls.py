"""Each control's construction holds exactly, and each is an ordinary causal LM."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.models import build, count_parameters
from lensbench.models.controls import ControlGPTConfig, ControlGPTForCausalLM, rotate
from lensbench.models.training import loss_of, train
from lensbench.streams.parts import find_parts, find_readout
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 101, "d_model": 48, "layers": 4, "heads": 4, "context": 32, "parameters": 150_000}
CHANGES = {
    "gpt-conv": {},
    "gpt-partitioned": {"read_size": 12},
    "gpt-tied": {},
    "gpt-noskip": {},
}


def control(family: str, **settings) -> ControlGPTForCausalLM:
    return build(family, seed=3, **SHAPE, **CHANGES[family], **settings).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", CHANGES)
def test_every_control_has_its_parameters_and_reads_out_to_its_own_logits(family, ids):
    model = control(family)
    assert abs(count_parameters(model) - 150_000) <= 1500
    stream = ResidualStream(model)
    states, _logits = stream.forward(ids)
    assert stream.layers == 4
    assert states.shape == (5, 3, 20, 48)
    torch.testing.assert_close(stream.readout(states[-1]), model(ids).logits)
    reported = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, torch.stack(reported))


@pytest.mark.parametrize("family", CHANGES)
def test_controls_are_saved_and_loaded_as_ordinary_models(family, ids, tmp_path):
    model = control(family)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.lm_head.weight is again.embed_tokens.weight


@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_prediction(family, side, ids):
    model = control(family)
    pad = torch.full((3, 4), 7)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.ones_like(padded)
    where = slice(4, 24) if side == "left" else slice(0, 20)
    mask[:, : where.start] = 0
    mask[:, where.stop :] = 0
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, where], model(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_slices_of_a_partitioned_stream_are_never_overwritten(ids):
    model = control("gpt-partitioned")
    with torch.no_grad():
        for p in model.parameters():  # large weights: nothing may depend on blocks being small
            p.add_(torch.randn_like(p))
    states = model(ids, output_hidden_states=True).hidden_states
    parts = [model.config.written_by(k) for k in range(5)]
    covered = sorted(i for part in parts for i in range(part.start, part.stop))
    assert covered == list(range(48)), "the slices are disjoint and fill the stream"
    for layer, state in enumerate(states):
        for writer, part in enumerate(parts):
            held = state[..., part]
            if writer <= layer:
                assert torch.equal(held, states[writer][..., part])
                assert held.abs().max() > 0
            else:
                assert torch.equal(held, torch.zeros_like(held))


def test_norm_and_head_of_a_partitioned_stream_see_the_read_out_slice_alone(ids):
    model = control("gpt-partitioned")
    stream = ResidualStream(model)
    states, logits = stream.forward(ids)
    other = states[-1].clone()
    other[..., 12:] = torch.randn_like(other[..., 12:])
    torch.testing.assert_close(stream.readout(other), logits)


def test_tied_layers_are_one_block():
    model, loose = control("gpt-tied"), control("gpt-conv")
    assert len(model.layers) == 1
    assert len(loose.layers) == 4
    states = model(torch.arange(6)[None], output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states):
        torch.testing.assert_close(model.layers[0](before, None), after)


def test_without_skips_a_block_hands_on_only_what_it_computed(ids):
    model = control("gpt-noskip")
    block = model.layers[0]
    with torch.no_grad():
        block.down.weight.zero_()
        h = torch.randn(2, 5, 48)
        assert torch.equal(block(h, None), torch.zeros(2, 5, 48))
        half = control("gpt-noskip", skip=0.5).layers[0]
        half.down.weight.zero_()
        half.attention_output.weight.zero_()
        torch.testing.assert_close(half(h, None), 0.25 * h)


def test_rotary_positions_depend_on_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(x.expand(1, 1, 12, 8).clone())[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for lag in range(-5, 6):
        diagonal = scores.diagonal(lag)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(12))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="leaves 0 entries for 3 slices"):
        ControlGPTConfig(hidden_size=48, num_hidden_layers=4, partitioned=True, read_size=24, num_attention_heads=4)
    with pytest.raises(ValueError, match="attention of size 16 does not divide into 3 heads"):
        ControlGPTConfig(hidden_size=48, partitioned=True, read_size=12, attention_size=16, num_attention_heads=3)
    with pytest.raises(ValueError, match="skip must lie"):
        ControlGPTConfig(skip=1.5)
    with pytest.raises(ValueError, match="a block for every layer"):
        ControlGPTConfig(hidden_size=48, num_hidden_layers=4, partitioned=True, read_size=12, tied_layers=True)
    with pytest.raises(ValueError, match="read_size is for the partitioned form"):
        ControlGPTConfig(hidden_size=48, read_size=12)
    with pytest.raises(LensbenchError, match="leaves 0 entries for 3 slices"):
        build("gpt-partitioned", **SHAPE, read_size=24)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-conv", "predictive-coding"])
def test_deep_supervision_adds_the_heads_loss_at_the_inner_layers(family, ids):
    model = build(family, seed=1, **{**SHAPE, "d_model": 24, "parameters": 60_000}).eval()
    view = "prediction" if family == "predictive-coding" else "state"
    stream = ResidualStream(model, view)
    states, logits = stream.forward(ids)

    def ce(logits):
        return -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()

    inner = [ce(stream.readout(states[layer])) for layer in (1, 2, 3)]
    total, last = loss_of(model, ids, find_readout(model), 0.3)
    torch.testing.assert_close(last, ce(logits))
    torch.testing.assert_close(total, ce(logits) + 0.3 * sum(inner) / 3)
    plain, same = loss_of(model, ids, None, 0.0)
    assert plain is same
    torch.testing.assert_close(plain, ce(logits))


@pytest.mark.slow
def test_deep_supervision_trains_the_inner_layers(tmp_path):
    rng = np.random.default_rng(0)
    stream = rng.permutation(101)[np.cumsum(rng.integers(1, 3, 20_000)) % 101].astype(np.uint16)
    ids = torch.from_numpy(stream[:512].astype(np.int64)).view(16, 32)
    inner = {}
    for weight in (0.0, 0.3):
        recipe = TrainingRecipe(tokens=30_000, length=32, batch=8, deep_supervision=weight)
        model = control("gpt-conv")
        train(model, stream, recipe, seed=0, checkpoints=tmp_path / str(weight), device=torch.device("cpu"))
        with torch.no_grad():
            total, last = loss_of(model, ids, find_readout(model), 1.0)
        inner[weight] = (total - last).item()
    assert inner[0.3] < inner[0.0] - 0.2


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-conv", "gpt-partitioned", "gpt-noskip", "predictive-coding"])
def test_blocks_of_every_family_are_found(family):
    """So that blocks can be deleted and swapped; the one block of a tied model is none of several."""
    shape = {**SHAPE, "parameters": 150_000}
    found = find_parts(build(family, seed=0, **shape, **CHANGES.get(family, {})))
    assert len(found.members) == 4
    assert find_parts(control("gpt-tied")).members == ()


def test_a_read_out_alone_is_trained_on_random_features(tmp_path):
    stream = np.random.default_rng(0).integers(0, 101, 4_000).astype(np.uint16)
    recipe = TrainingRecipe(tokens=2_000, length=32, batch=8, read_out_alone=True)
    model, before = control("gpt-conv"), control("gpt-conv").state_dict()
    train(model, stream, recipe, seed=0, checkpoints=tmp_path, device=torch.device("cpu"))
    read_out = {
        name for name, _ in model.named_parameters() if name.split(".")[-2] in ("lm_head", "embed_tokens", "norm")
    }
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= read_out
    assert all(p.requires_grad for p in model.parameters())
