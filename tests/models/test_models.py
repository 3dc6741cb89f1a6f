"""Families of models: the stated size, the stated seed, and refusals that a user can act on."""

import random

import numpy as np
import pytest
import torch

from lensbench.errors import LensbenchError
from lensbench.models import FAMILIES, build, count_parameters

TEXT = [name for name, family in FAMILIES.items() if not family.images]
SHAPE = {"vocab_size": 60, "d_model": 16, "layers": 2, "heads": 2, "context": 32}


def stored_numbers(model):
    """Numbers in distinct storages: what the model holds, tied tensors once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in model.parameters()}.values())


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize(
    ("parameters", "shape"),
    [
        (12_000, SHAPE),
        (50_000, SHAPE),
        (20_011, {**SHAPE, "layers": 3, "heads": 4}),
        (300_000, {**SHAPE, "vocab_size": 300, "d_model": 32, "layers": 5}),
        (17_000, {**SHAPE, "vocab_size": 300, "layers": 1, "heads": 1}),
    ],
)
def test_the_parameter_count_is_met_within_one_percent(family, parameters, shape):
    model = build(family, parameters=parameters, **shape)
    assert abs(stored_numbers(model) - parameters) <= 0.01 * parameters
    assert count_parameters(model) == stored_numbers(model)
    assert not any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        logits = model(torch.randint(0, shape["vocab_size"], (2, shape["context"]))).logits
    assert logits.shape == (2, shape["context"], shape["vocab_size"])
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", TEXT)
def test_models_of_equal_parameters_have_the_stated_depth_and_width(family):
    model = build(family, parameters=30_000, **{**SHAPE, "layers": 3})
    out = model(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    width = model.config.read_size if family == "gpt-partitioned" else 16
    assert model.get_input_embeddings().weight.shape == (60, width)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", TEXT)
def test_a_count_that_no_width_reaches_is_refused_with_the_smallest_one(family):
    with pytest.raises(LensbenchError, match="no MLP width") as refused:
        build(family, parameters=500, **SHAPE)
    assert family in str(refused.value)
    assert "500" in str(refused.value)


# The attention of gpt-partitioned has a width of its own, made to fit.
@pytest.mark.parametrize("family", sorted(set(TEXT) - {"gpt-partitioned"}))
def test_a_width_that_the_heads_do_not_divide_is_refused(family):
    with pytest.raises(LensbenchError, match="heads"):
        build(family, parameters=20_000, **{**SHAPE, "heads": 3})


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(LensbenchError, match="unknown model family 'gtp'") as refused:
        build("gtp", parameters=20_000, **SHAPE)
    for family in FAMILIES:
        assert family in str(refused.value)


@pytest.mark.parametrize("family", TEXT)
def test_an_unknown_setting_is_refused_with_the_known_ones(family):
    with pytest.raises(LensbenchError, match="no setting 'colour'") as refused:
        build(family, parameters=20_000, **SHAPE, colour=1)
    for setting in FAMILIES[family].settings:
        assert setting in str(refused.value)


def test_an_impossible_value_of_a_setting_is_refused():
    with pytest.raises(LensbenchError, match="error"):
        build("predictive-coding", parameters=20_000, **SHAPE, error="cheap")


@pytest.mark.parametrize("family", TEXT)
def test_settings_reach_the_model(family):
    quiet = build(family, parameters=20_000, **SHAPE, initializer_range=1e-3)
    assert quiet.get_input_embeddings().weight.std().item() == pytest.approx(1e-3, rel=0.2)
    if family == "predictive-coding":
        model = build(family, parameters=20_000, **SHAPE, error="none", initial_eta=0.5, initial_beta=3.0)
        assert model.config.error == "none"
        for layer in model.layers:
            torch.testing.assert_close(layer.log_eta.exp(), torch.full((2,), 0.5))
            torch.testing.assert_close(layer.log_beta.exp(), torch.full((2,), 3.0))
            torch.testing.assert_close(layer.decay_logit.sigmoid(), torch.tensor([0.73, 0.95]))


@pytest.mark.parametrize("family", TEXT)
def test_the_seed_alone_decides_the_weights(family):
    def weights(seed):
        return torch.cat(
            [p.detach().flatten() for p in build(family, parameters=20_000, seed=seed, **SHAPE).parameters()]
        )

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    torch.rand(17)
    assert torch.equal(first, weights(0))
    assert (first != weights(1)).float().mean() > 0.8


@pytest.mark.parametrize("family", TEXT)
def test_building_does_not_disturb_the_global_random_numbers(family):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    build(family, parameters=20_000, seed=3, **SHAPE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
