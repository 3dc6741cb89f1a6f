"""Order of the middle blocks: blocks that only add, blocks that need each other, and mixed blocks called by hand."""

import math

import numpy as np
import pytest
import torch
from helpers.architectures import small_model
from helpers.by_hand import MIXED, logits_by_hand, mixed_model
from helpers.gpt_windows import windows
from helpers.known_blocks import WIDTH, drawn, known_model, observations
from helpers.planted import V, planted, subject_of, text

from lensbench.models import build
from lensbench.probes.block_order import random_orders
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.block_places import reordered, why_not_reordered
from lensbench.streams.stream import ResidualStream


def measured(model, count=12, **changes):
    return PROBES["block_order"].measure(subject_of(model, count=count, **changes)).frame(200)


def value(frame, quantity):
    return frame[frame["quantity"] == quantity]["value"].astype(float).tolist()


def test_blocks_that_add_without_reading_the_state_may_stand_in_any_order():
    seen = observations(6)
    frame = measured(known_model([lambda h, ids, k=k: h + seen[k + 1][ids] for k in range(6)], seen[0]))
    for name in ("exchanged", "swapped", "reversed", "shuffled"):
        assert value(frame, f"order_rise_{name}") == pytest.approx([0] * (3 if name == "exchanged" else 1), abs=1e-5)
    deleted = value(frame, "order_rise_deleted")[0]
    assert abs(deleted) > 1e-3
    for name in ("swapped", "reversed", "shuffled"):
        assert value(frame, f"order_{name}_minus_deleted") == pytest.approx([-deleted], abs=1e-5)


def test_a_block_that_needs_the_one_before_it_costs_what_a_hand_computation_says():
    """The first of two middle blocks writes to half of the state, the second passes that half through a sign to the rest."""
    half, aim = WIDTH // 2, drawn(3, V, WIDTH)
    first, mix = drawn(4, V, WIDTH // 2), drawn(5, WIDTH // 2, WIDTH // 2)

    def write(h, ids):
        return torch.cat([h[..., :half] + first[ids], h[..., half:]], -1)

    def use(h, ids):
        return torch.cat([h[..., :half], h[..., half:] + torch.sign(h[..., :half]) @ mix], -1)

    def same(h, ids):
        return 1 * h

    model = known_model([same, write, use, same], aim)
    frame = measured(model)
    it = subject_of(model, count=12)

    ids = it.windows.ids
    norm, head = (x.detach().numpy().astype(float) for x in (model.model.norm.weight, model.lm_head.weight))

    def ce(order):
        h = aim.numpy().astype(float)[ids]
        for name in order:
            if name == "write":
                h[..., :half] += first.numpy()[ids]
            else:
                h[..., half:] += np.sign(h[..., :half]) @ mix.numpy()
        logits = h / np.sqrt((h**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * norm @ head.T
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.mean([-log_p[w, t, ids[w, t + 1]] for w in range(len(ids)) for t in it.windows.positions[w]])

    expected = ce(["use", "write"]) - ce(["write", "use"])
    assert abs(expected) > 0.02
    for name in ("exchanged", "swapped", "reversed", "shuffled"):
        assert value(frame, f"order_rise_{name}") == pytest.approx([expected], abs=1e-4)
    without = np.mean([ce(["use"]), ce(["write"])]) - ce(["write", "use"])
    assert value(frame, "order_rise_deleted") == pytest.approx([without], abs=1e-4)
    assert value(frame, "order_reversed_minus_deleted") == pytest.approx([expected - without], abs=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", MIXED)
def test_blocks_in_any_order_keep_the_kind_of_their_attention(architecture):
    model = mixed_model(architecture)
    stream, ids = ResidualStream(model), torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(3))
    for order in ([0, 2, 1, 3], [2, 0, 1, 3], [3, 2, 1, 0], [1, 2, 3, 0]):
        assert why_not_reordered(stream, order) == ""
        with reordered(stream, order):
            found = stream.forward(ids)[1]
        torch.testing.assert_close(found, logits_by_hand(model, ids, order), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream.forward(ids)[1], logits_by_hand(model, ids, range(4)), rtol=1e-4, atol=1e-4)
    assert not model._forward_pre_hooks
    assert not any(block._forward_pre_hooks for block in stream.blocks)


@torch.no_grad()
def test_rises_are_those_of_mixed_blocks_called_by_hand():
    model, texts = mixed_model("gemma3_text"), windows()
    model.lm_head.weight.mul_(10)  # also the embedding: predictions far from uniform
    frame = measured(model, windows=texts)
    ids = torch.from_numpy(texts.ids)

    def ce(order):
        log_p = logits_by_hand(model, ids, order).double().log_softmax(-1)
        scored = zip(*texts.valid.nonzero(), strict=True)
        return float(torch.stack([-log_p[w, t := texts.positions[w, j], ids[w, t + 1]] for w, j in scored]).mean())

    rise = ce([0, 2, 1, 3]) - ce(range(4))
    assert abs(rise) > 1e-3
    assert value(frame, "order_rise_reversed") == pytest.approx([rise], abs=1e-4)
    deleted = np.mean([ce([0, 2, 3]), ce([0, 1, 3])]) - ce(range(4))
    assert value(frame, "order_rise_deleted") == pytest.approx([deleted], abs=1e-4)


@pytest.mark.parametrize("layers", [4, 5, 6, 12, 30])
def test_random_orders_differ_keep_both_ends_and_are_neither_the_models_nor_its_reverse(layers):
    orders = random_orders(layers)
    assert orders == random_orders(layers)
    others = math.factorial(layers - 2) - (1 if layers == 4 else 2)
    assert len({tuple(order) for order in orders}) == len(orders) == min(4, others)
    for order in orders:
        assert order[0] == 0
        assert order[-1] == layers - 1
        assert sorted(order) == list(range(layers))
        middle = order[1:-1]
        assert middle != sorted(middle)
        assert layers == 4 or middle != sorted(middle, reverse=True)


def test_what_it_does_not_apply_to_says_why():
    shape = {"vocab_size": V, "d_model": 32, "layers": 4, "heads": 4, "context": 64, "parameters": 60_000}
    cases = {
        "blocks of their own": subject_of(build("gpt-tied", seed=1, **shape).eval(), count=8),
        "rotated": subject_of(planted("none"), rotated=True),
        "it has 3 blocks": subject_of(planted("none"), count=8),
    }
    for words, subject in cases.items():
        assert words in PROBES["block_order"].measure(subject).frame()["reason"][0]


def test_blocks_that_return_different_things_have_a_reason_and_the_others_a_value(monkeypatch):
    model = small_model("llama", num_hidden_layers=5, vocab_size=V)
    refuse = "undefined: blocks 1 and 2 return different things"
    monkeypatch.setattr(
        "lensbench.probes.block_order.why_not_reordered", lambda stream, order: refuse * (order[1] != 1)
    )
    frame = measured(model, windows=text(0, 12)).set_index(["quantity", "layer"])
    exchanged = frame.loc["order_rise_exchanged"]
    assert exchanged["value"].isna().tolist() == [True, False]
    assert exchanged["reason"].iloc[0] == refuse
    for name in ("order_rise_swapped", "order_rise_reversed", "order_reversed_minus_deleted", "order_rise_shuffled"):
        assert frame.loc[name]["value"].isna().all()
        assert frame.loc[name]["reason"].iloc[0] == refuse
    assert frame.loc["order_rise_deleted"]["value"].notna().all()
