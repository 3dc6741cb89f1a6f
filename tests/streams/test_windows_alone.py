"""The numbers of a window are those of the window alone: not of its padding, its batch, or what the model read before."""

import copy

import numpy as np
import pytest
import torch
from helpers.architectures import CONFIGS, D, V, small_model
from helpers.unchanged import left_as_it_was
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from lensbench.data.windows import Windows
from lensbench.models.likelihood import token_nats
from lensbench.probes import block_paths
from lensbench.streams.capture import capture
from lensbench.streams.parts import evaluating
from lensbench.streams.rotary import depends_on_length
from lensbench.streams.stream import ResidualStream

LENGTHS = [48, 37, 13, 48, 24]
LIMIT = 16
"""Tokens of the original context of the models with rotary frequencies that depend on the length"""


def of_length(kind: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0, **more}}


DYNAMIC = {
    "llama": {"max_position_embeddings": LIMIT, **of_length("dynamic")},
    "phi3": {
        "original_max_position_embeddings": LIMIT,
        **of_length(
            "longrope", original_max_position_embeddings=LIMIT, short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0]
        ),
    },
    "gemma3_text": {
        "max_position_embeddings": LIMIT,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
}


def sharp(architecture: str, **changes: object) -> PreTrainedModel:
    """A small model whose attention is far from uniform, so that wrong positions would show."""
    model = small_model(architecture, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not any(part in name for part in ("emb", "head", "wte", "wpe")):
                weight.mul_(8)
    return model


def plain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[T, V]`` of one text, from a copy of the model that has read nothing else."""
    with torch.no_grad():
        logits: Tensor = copy.deepcopy(model)(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def windows() -> Windows:
    """Windows of several lengths in which every third token is 0, which is also what pads them; one is all 0."""
    rng = np.random.default_rng(0)
    ids = np.zeros((len(LENGTHS), max(LENGTHS)), dtype=np.int64)
    positions = np.zeros((len(LENGTHS), 6), dtype=np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(0, V, length) * (rng.random(length) > 1 / 3) * (row != 2)
        positions[row] = np.sort(rng.choice(length - 1, 6, replace=False))
    every = np.arange(len(LENGTHS))
    one = np.ones(positions.shape, dtype=np.int32)
    return Windows(ids, np.array(LENGTHS), positions, one > 0, every, tuple("abcde"), 0 * every, one)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "granite", "cohere2", "mixtral", "gpt_oss"])
def test_neither_padding_nor_the_batch_nor_tokens_like_the_padding_change_a_window(architecture: str) -> None:
    """Absolute places, places with an offset, no places, scales, and experts: all against one unpadded text at a time."""
    model, given = sharp(architecture), windows()
    assert model.config.pad_token_id == 0
    expected = []
    for row, length in enumerate(LENGTHS):
        log_p = plain(model, torch.from_numpy(given.ids[row, :length])).double().log_softmax(-1)
        expected.append(log_p[given.positions[row]])
    p = torch.cat(expected)
    ce = -p.gather(-1, torch.from_numpy(given.targets(slice(None)))[:, None])[:, 0]
    stream = ResidualStream(model)
    for batch in (1, 2, 5):
        found = capture(stream, given, batch=batch)
        np.testing.assert_allclose(found.model_ce, ce, rtol=0, atol=2e-5)
        q = stream.readout(found.states[-1]).double().log_softmax(-1)
        np.testing.assert_allclose((p.exp() * (p - q)).sum(-1), 0, atol=1e-8)


def test_windows_longer_than_a_batch_of_tokens_are_scored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = sharp("gpt2"), windows()
    expected = []
    for row, length in enumerate(LENGTHS):
        ids, at = torch.from_numpy(given.ids[row, :length]), torch.from_numpy(given.positions[row])
        log_p = plain(model, ids).double().log_softmax(-1)
        expected.append(-float(log_p[at, ids[at + 1]].sum()))
    stream = ResidualStream(model)
    for tokens in (1, 47, 100, 8192):
        monkeypatch.setattr(block_paths, "TOKENS_AT_ONCE", tokens)
        np.testing.assert_allclose(block_paths.cross_entropy(stream, given), expected, rtol=1e-5)


@pytest.mark.parametrize("architecture", DYNAMIC)
def test_a_model_gives_the_same_numbers_whatever_it_read_before(architecture: str) -> None:
    """Rotary frequencies depend on the length: in the model they stay those of an earlier, longer text."""
    model = sharp(architecture, **DYNAMIC[architecture])
    texts = {n: torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 24, 9)}
    expected = {n: plain(model, ids) for n, ids in texts.items()}
    stream = ResidualStream(model)
    with evaluating(model), torch.no_grad():  # as inside a probe
        for n in (60, 24, 9, 60, 9, 24):
            torch.testing.assert_close(model(input_ids=texts[n][None]).logits[0], expected[n])
    for n in (60, 24, 9, 60, 9, 24):
        with left_as_it_was(model):
            torch.testing.assert_close(stream.forward(texts[n][None])[1][0], expected[n], rtol=1e-4, atol=1e-5)
        log_p = expected[n][:-1].double().log_softmax(-1)
        np.testing.assert_allclose(
            token_nats(model, texts[n]), -log_p.gather(-1, texts[n][1:, None])[:, 0], rtol=0, atol=1e-4
        )
    assert depends_on_length(model.config) == LIMIT


def test_frequencies_that_do_not_depend_on_the_length_are_known_as_such() -> None:
    for architecture in ("llama", "gpt2", "gemma3_text"):
        assert depends_on_length(small_model(architecture).config) is None


def test_a_model_that_a_caller_used_on_a_long_text_keeps_its_frequencies() -> None:
    model = sharp("llama", **DYNAMIC["llama"])
    with torch.no_grad():
        model(input_ids=torch.arange(60)[None], output_hidden_states=True)
    with left_as_it_was(model):
        ResidualStream(model).forward(torch.arange(24)[None])


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_a_model_that_scales_the_input_of_its_head_is_read_right(scale: float) -> None:
    model = sharp("granite")
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * scale,))
    ids = torch.randint(3, V, (2, 20), generator=torch.Generator().manual_seed(1))
    stream = ResidualStream(model)
    assert stream.readout.scale == pytest.approx(scale / 8)  # 8: the model's own, after its head
    states, _ = stream.forward(ids)
    torch.testing.assert_close(stream.readout(states[-1])[0], plain(model, ids[0]), rtol=1e-4, atol=1e-5)
    h = states[1, 0]
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * model.model.norm.weight
    torch.testing.assert_close(stream.readout(h), normed @ model.lm_head.weight.T * scale / 8, rtol=1e-4, atol=1e-5)


SCALED = {
    "minicpm3": {
        **CONFIGS["llama"], "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "dim_model_base": D // 2,
    },
    "hyperclovax": {**CONFIGS["llama"], "logits_scaling": 4.0},
    "granitemoe": {**CONFIGS["mixtral"], "logits_scaling": 4.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "scale"), [("minicpm3", 0.5), ("hyperclovax", 4.0), ("granitemoe", 0.25)])
def test_scales_of_logits_before_and_after_the_head_are_found(architecture: str, scale: float) -> None:
    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {architecture}")
    model = small_model(architecture, **SCALED[architecture])
    ids = torch.randint(3, V, (1, 20), generator=torch.Generator().manual_seed(1))
    stream = ResidualStream(model)
    assert stream.readout.scale == pytest.approx(scale)
    torch.testing.assert_close(
        stream.readout(stream.forward(ids)[0][-1])[0], plain(model, ids[0]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma"])
def test_the_logit_lens_normalises_each_layer_by_its_own_statistics(architecture: str) -> None:
    """LayerNorm, RMSNorm and Gemma's RMSNorm written out; the statistics of the last state would give other numbers."""
    model = sharp(architecture)
    ids = torch.randint(3, V, (1, 20), generator=torch.Generator().manual_seed(1))
    stream = ResidualStream(model)
    states = stream.forward(ids)[0].double()
    norm = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    gain = norm.weight.detach().double() + (architecture == "gemma")
    centred = states - states.mean(-1, keepdim=True) if architecture == "gpt2" else states
    offset = norm.bias.detach().double() if architecture == "gpt2" else 0.0
    scales = (centred.pow(2).mean(-1, keepdim=True) + (1e-5 if architecture == "gpt2" else 1e-6)).sqrt()
    head = model.get_output_embeddings().weight.detach().double()
    expected = (centred / scales * gain + offset) @ head.T
    torch.testing.assert_close(stream.readout(states.float()).double(), expected, rtol=1e-3, atol=1e-3)
    cached = (centred / scales[-1] * gain + offset) @ head.T
    assert float((cached - expected)[:-1].abs().max()) > 0.1 * float(expected.abs().max())
