"""The probe of loops, against states, softmaxes and means written out in float64."""

import numpy as np
import pytest
import torch
from helpers.planted import subject_of

from lensbench.models import build
from lensbench.models.looped import looping
from lensbench.probes.loops import NO_LOOP
from lensbench.probes.registry import PROBES

SHAPE = {"vocab_size": 97, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


def by_hand(model, subject, loops, read=slice(None)):
    """Per loop: relative change, distance from the last state, KL from the exit at loop 3, and cross-entropy."""
    windows = subject.windows
    ids, at = torch.from_numpy(windows.ids), windows.positions
    rows = np.repeat(np.arange(len(ids)), at.shape[1])
    with torch.no_grad(), looping(model, loops):
        states = [h[..., read] for h in model(ids, output_hidden_states=True).hidden_states]
    h = [x[rows, at.ravel()].double() for x in states]
    target = ids[rows, at.ravel() + 1]
    weight, gain = model.lm_head.weight.double(), model.norm.weight.double()
    d = len(gain)

    def log_p(x):
        seen = x[:, :d]
        return ((seen / (seen.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain) @ weight.T).log_softmax(-1)

    exits = [log_p(x).detach() for x in h]
    p = exits[3]
    return {
        "loop_change": [None] + [float(((b - a).norm(dim=1) / b.norm(dim=1)).mean()) for a, b in zip(h, h[1:])],  # noqa: B905, RUF007
        "loop_distance": [float(((h[-1] - x).norm(dim=1) / h[-1].norm(dim=1)).mean()) for x in h],
        "loop_kl": [float((p.exp() * (p - q)).sum(-1).mean()) for q in exits],
        "loop_ce": [float(-q.gather(1, target[:, None]).mean()) for q in exits],
    }


@pytest.mark.parametrize(
    ("family", "settings"), [("gpt-looped", {}), ("gpt-tied", {}), ("predictive-coding", {"tied_layers": True})]
)
def test_loops_are_those_written_out_by_hand_beyond_training_too(family, settings):
    model = build(family, seed=2, **SHAPE, **settings).eval()
    subject = subject_of(model, count=12)
    found = PROBES["loops"].measure(subject).frame(200)
    expected = by_hand(model, subject, 12)
    for name, values in expected.items():
        rows = found[found["quantity"] == name].set_index("layer")["value"].astype(float)
        assert len(rows) == {"loop_kl": 12, "loop_ce": 13}.get(name, 12)
        for layer, value in rows.items():
            assert value == pytest.approx(values[int(layer)], rel=2e-3, abs=2e-5), (name, layer)
    whole = found[found["layer"].isna()].set_index("quantity")["value"].astype(float)
    ce, change = expected["loop_ce"], expected["loop_change"]
    assert whole["loops_doubled_ce"] == pytest.approx(ce[6] - ce[3], abs=2e-5)
    assert whole["loops_beyond_ce"] == pytest.approx(ce[12] - ce[3], abs=2e-5)
    assert whole["loops_contraction"] == pytest.approx(change[12] / change[3], rel=2e-3)
    assert model.config.num_hidden_layers == 3


def test_a_contraction_converges_and_its_exits_stay():
    """With blocks that add nothing and an adapter that halves what is not input, every loop halves what is left."""
    model = build("gpt-looped", seed=2, **SHAPE).eval()
    (loop,) = model.layers
    with torch.no_grad():
        for block in loop.blocks:
            block.attention_output.weight.zero_()
            block.down.weight.zero_()
        loop.adapter.weight.copy_(torch.cat([0.5 * torch.eye(32), torch.roll(torch.eye(32), 1, 0)], 1))
    found = PROBES["loops"].measure(subject_of(model, count=12)).frame(200).set_index(["quantity", "layer"])["value"]
    change = [float(found["loop_change", k]) for k in range(1, 13)]
    assert change == sorted(change, reverse=True)
    assert change[-1] < 1e-3
    assert float(found["loop_kl", 12]) < float(found["loop_kl", 1])


def test_layers_of_other_models_are_listed_and_nothing_beyond_them():
    found = PROBES["loops"].measure(subject_of(build("gpt-conv", seed=2, **SHAPE).eval(), count=12)).frame(200)
    assert sorted(found["layer"].dropna().astype(int).unique()) == [0, 1, 2, 3]
    beyond = found[found["layer"].isna()]
    assert set(beyond["reason"]) == {NO_LOOP}
    assert beyond["value"].isna().all()
