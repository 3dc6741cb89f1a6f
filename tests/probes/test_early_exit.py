"""Exits of single tokens, against plain loops; thresholds come from dev alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.known_blocks import WIDTH, drawn, known_model
from helpers.planted import V, planted, subject_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.early_exit import TARGETS, Blind, Said, lowest_threshold
from lensbench.probes.registry import PROBES


@pytest.fixture(scope="module")
def subject():
    plain = subject_of(planted("none"), count=16)
    generator = torch.Generator().manual_seed(1)
    own = torch.eye(32) + 0.2 * torch.randn(3, 32, 32, generator=generator) / 32**0.5
    return replace(plain, own=AffineMaps(own, torch.zeros(3, 32)))


def values(subject):
    """Quantity and target -> value."""
    frame = PROBES["early_exit"].measure(subject).frame(20)
    return {(row.quantity, int(row.other)): float(row.value) for row in frame.itertuples()}


def drawn_said(seed, layers=4, tokens=60):
    """Probabilities that say something of what is right, more so at later layers."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(size=(layers, tokens))
    return Said(sure, rng.uniform(size=sure.shape) < sure * np.linspace(0.6, 1.1, layers)[:, None])


def by_hand(said, threshold):
    """The exit of each token and whether it keeps the model's top-1, token by token."""
    exits, kept = [], []
    layers, tokens = said.sure.shape
    for n in range(tokens):
        at = next((layer for layer in range(layers) if said.sure[layer, n] >= threshold), layers)
        exits.append(at)
        kept.append(True if at == layers else bool(said.right[at, n]))
    return np.array(exits), np.array(kept)


@given(seed=st.integers(0, 10_000), threshold=st.floats(0, 1.1))
@settings(max_examples=30, deadline=None)
def test_a_token_exits_at_the_first_layer_that_is_sure_enough(seed, threshold):
    said = drawn_said(seed)
    exits, kept = by_hand(said, threshold)
    np.testing.assert_array_equal(said.exits(threshold), exits)
    np.testing.assert_array_equal(said.kept(exits), kept)


@given(seed=st.integers(0, 10_000), target=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=30, deadline=None)
def test_no_lower_threshold_keeps_enough_down_to_the_chosen_one(seed, target):
    said = drawn_said(seed)
    found = lowest_threshold(said, target)
    tried = np.unique([0, *np.quantile(said.sure, np.linspace(0, 1, 256))])
    for threshold in tried[tried >= found]:
        assert by_hand(said, threshold)[1].mean() >= target
    below = tried[tried < found]
    assert len(below) == 0 or by_hand(said, below[-1])[1].mean() < target


def test_where_nothing_is_right_no_token_exits():
    said = Said(np.full((3, 9), 0.5), np.zeros((3, 9), dtype=bool))
    assert lowest_threshold(said, 0.95) == 2
    assert (said.exits(2.0) == 3).all()
    assert said.kept(said.exits(2.0)).all()


def test_overflowing_logits_are_no_reason_to_exit():
    sure = np.array([[np.nan, 0.9], [0.9, 0.9]])
    np.testing.assert_array_equal(Said(sure, np.ones((2, 2), dtype=bool)).exits(0.5), [1, 0])


@pytest.mark.parametrize("target", [0.5, 0.9, 1.0])
def test_blind_exits_keep_what_a_draw_of_tokens_keeps_and_no_layer_saves_more(target):
    said = drawn_said(3, tokens=4000)
    blind = Blind.of(said, target)
    left = np.random.default_rng(0).uniform(size=4000) < blind.share
    kept = np.where(left, said.right[blind.layer], True).mean()
    assert blind.kept(said).mean() == pytest.approx(kept, abs=0.02)
    assert blind.kept(said).mean() >= target - 1e-9
    for layer in range(4):
        for share in np.linspace(0, 1, 101):
            if 1 - share * (1 - said.right[layer].mean()) >= target:
                assert share * (1 - layer / 4) <= blind.saved + 1e-9


def test_what_is_saved_and_kept_is_what_plain_loops_find_with_the_threshold_of_dev(subject):
    model, dev, held = subject.stream.model, subject.dev, subject.eval
    shorter = dev.take(torch.arange(len(dev) // 2))
    found = values(replace(subject, read={"fit": subject.fit, "dev": shorter, "eval": held}.__getitem__))

    def said(captured, matrices):
        gain = model.model.norm.weight.detach().double().numpy()
        head = model.lm_head.weight.detach().double().numpy()
        sure, right = [], []
        for layer in range(3):
            x = captured.states[layer].double().numpy() @ matrices[layer].T
            logits = (gain * x / np.sqrt((x**2).mean(1, keepdims=True) + model.config.rms_norm_eps)) @ head.T
            p = np.exp(logits - logits.max(1, keepdims=True))
            sure.append((p / p.sum(1, keepdims=True)).max(1))
            right.append(logits.argmax(1) == captured.top.numpy())
        return Said(np.stack(sure), np.stack(right))

    saved = {}
    for kind, matrices in (("logit", np.stack([np.eye(32)] * 3)), ("tuned", subject.own.matrix.double().numpy())):
        for target in TARGETS:
            threshold = found[f"exit_threshold_{kind}", target]
            assert threshold == pytest.approx(lowest_threshold(said(shorter, matrices), target / 100), abs=1e-5)
            exits, kept = by_hand(said(held, matrices), threshold - 1e-6)
            saved[kind, target] = (1 - exits / 3).mean()
            assert found[f"exit_saved_{kind}", target] == pytest.approx(saved[kind, target], abs=0.01)
            assert found[f"exit_kept_{kind}", target] == pytest.approx(kept.mean(), abs=0.01)
    for target in TARGETS:
        more = saved["tuned", target] - saved["logit", target]
        assert found["exit_saved_tuned_minus_logit", target] == pytest.approx(more, abs=0.02)


def test_blocks_that_change_nothing_are_saved():
    model = known_model([lambda h, ids: h + 0.0] * 3, drawn(3, V, WIDTH))
    found = values(subject_of(model, count=16))
    for target in TARGETS:
        assert found["exit_saved_logit", target] == 1
        assert found["exit_kept_logit", target] == 1
        assert found["exit_saved_logit_blind", target] == 1
