"""The known places of a predictive-coding model: what the probe says of them against the model's own outputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import planted
from helpers.predictive_coding import D, L, T, V, tiny, tokens

from lensbench.models import build
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
from lensbench.probes.known_places import at_places, known_places
from lensbench.streams.stream import ResidualStream
from lensbench.studies.in_context import windows_of


def subject_of(model, ids):
    windows = windows_of(ids.numpy())
    # Score every position but the first, which no error belongs to.
    positions = np.tile(np.arange(1, T - 1), (len(ids), 1))
    object.__setattr__(windows, "positions", positions)
    object.__setattr__(windows, "valid", np.ones(positions.shape, dtype=bool))
    stream = ResidualStream(model, "state")
    return planted.subject_of(model, stream=stream, windows=windows, fit_windows=windows)


def measured(model, ids):
    frame = known_places(subject_of(model, ids)).frame(draws=100)
    return frame.set_index(["quantity", "layer"])["value"]


@pytest.mark.parametrize("error", ["softmax", "linear", "none"])
def test_every_quantity_is_its_definition_at_the_places_of_the_output(error):
    model, ids = tiny(error, dtype=torch.float32, rms_norm_eps=1e-6), tokens(batch=5)
    value = measured(model, ids)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        table = model.embed_tokens.weight
        scale = table.square().mean().sqrt()
        scored = slice(1, T - 1)
        for layer in range(L + 1):
            logits = model.lm_head(model.norm(out.predictions[layer]))[:, scored]
            ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
            assert value["read_out_ce", layer] == pytest.approx(ce.item(), rel=1e-5)
            true = (table[ids[:, 2:]] - logits.softmax(-1) @ table) / scale
            norm = true.square().mean(-1).sqrt().mean()
            assert value["true_error_rms", layer] == pytest.approx(norm.item(), rel=1e-5)
            if layer == L:
                assert ("error_cosine", layer) not in value.index
                continue
            carried = out.errors[layer][:, 2:]
            cosine = F.cosine_similarity(carried, true, dim=-1).mean().item()
            assert value["error_cosine", layer] == pytest.approx(cosine, abs=1e-5)
            assert (value["error_cosine", layer] == pytest.approx(1, abs=1e-6)) == (error == "softmax")
            share = (out.updates[layer].norm(dim=-1) / out.predictions[layer].norm(dim=-1))[:, scored].mean()
            assert value["update_share", layer] == pytest.approx(share.item(), rel=1e-5)
            assert (("subtracted_cosine", layer) in value.index) == (error == "linear")
    assert value["read_out_ce", L] == pytest.approx(
        F.cross_entropy(model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()).item(), rel=1e-5
    )


def test_the_uniform_variant_is_the_same_after_one_layer_and_another_after_three():
    ids = tokens(batch=4)
    for layers, same in ((1, True), (3, False)):
        model = tiny(dtype=torch.float32, num_hidden_layers=layers, rms_norm_eps=1e-6)
        frame = known_places(subject_of(model, ids)).frame(draws=100).set_index("quantity")["value"]
        assert (abs(frame["uniform_kl"]) < 1e-8) == same
    twin = PredictiveCodingForCausalLM(type(model.config)(**{**model.config.to_dict(), "causal": False})).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        own, other = (m(ids[:, : T - 1]).logits[:, -1].log_softmax(-1) for m in (model, twin))
    rise = (own - other).gather(1, ids[:, T - 1 :]).mean().item()
    assert frame["uniform_ce_rise"] == pytest.approx(rise, abs=1e-6)


def test_a_model_without_such_places_says_so():
    gpt = build("gpt-conv", parameters=12_000, vocab_size=V, d_model=D, layers=L, heads=4, context=T).eval()
    assert "known places" in known_places(subject_of(gpt, tokens())).reason


def test_places_belong_to_the_prediction_one_token_before_the_error():
    model, ids = tiny(), tokens()
    found = at_places(model, ids)
    assert all(values.shape == (2, T - 1) for values in found.values())
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % V
    other = at_places(model, changed)
    for key, values in found.items():
        assert torch.equal(values[:, :-1], other[key][:, :-1]), key
    assert (found["true_error_rms", 0][:, -1] != other["true_error_rms", 0][:, -1]).all()
