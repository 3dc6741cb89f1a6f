"""Injection survival: models whose blocks keep, shrink or clean what they are handed, against closed forms."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.by_hand import logits_by_hand, mixed_model
from helpers.known_blocks import WIDTH, drawn, known_model, observations
from helpers.planted import V, planted, subject_of, text
from hypothesis import given
from hypothesis import strategies as st

from lensbench.models import build
from lensbench.probes import injection_survival
from lensbench.probes.injection_quantities import DIFFERENCES, KINDS, add_quantities, fate_of_errors
from lensbench.probes.injection_survival import Injected, Lenses, answers_of, in_turn
from lensbench.probes.measured import Sums
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.interventions import after_moves, cache_of
from lensbench.streams import ResidualStream

LAYERS = 4


def measured(model, count=24, **changes):
    subject = subject_of(model, count=count, **changes)
    return PROBES["injection_survival"].measure(subject).frame(200)


def by_pair(frame, quantity):
    rows = frame[frame["quantity"] == quantity]
    return {(int(i), int(j)): v for i, j, v in zip(rows["layer"], rows["other"], rows["value"], strict=True)}


def of_model(frame, quantity):
    return frame.set_index("quantity").loc[quantity]


def running_mean(noise=1.0):
    seen = observations(LAYERS, noise)

    def step(k):
        return lambda h, ids: ((k + 1) * h + seen[k + 1][ids]) / (k + 2)

    return known_model([step(k) for k in range(LAYERS)], seen[0])


def test_a_running_mean_keeps_i_plus_1_by_j_plus_1_of_whatever_it_is_handed():
    frame = measured(running_mean())
    for kind in KINDS:
        found = by_pair(frame, f"survival_{kind}")
        assert found == pytest.approx({(i, j): (i + 1) / (j + 1) for i in range(3) for j in range(i + 1, 4)}, abs=1e-4)
    for name in DIFFERENCES:
        assert list(by_pair(frame, name).values()) == pytest.approx([0] * 6, abs=1e-4)
    pairs = [(i + 1) / (j + 1) for i in range(3) for j in range(i + 1, 4)]
    assert of_model(frame, "mean_survival_error")["value"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert of_model(frame, "mean_survival_error_without_layer0")["value"] == pytest.approx(
        np.mean([2 / 3, 2 / 4, 3 / 4]), abs=1e-4
    )


def test_scaled_skips_keep_the_product_of_their_scales():
    scales, seen = [0.5, 1.5, 0.8, 1.2], observations(LAYERS)
    steps = [lambda h, ids, k=k: scales[k] * h + seen[k + 1][ids] for k in range(LAYERS)]
    frame = measured(known_model(steps, seen[0]))
    expected = {(i, j): math.prod(scales[i:j]) for i in range(3) for j in range(i + 1, 4)}
    for kind in KINDS:
        assert by_pair(frame, f"survival_{kind}") == pytest.approx(expected, abs=1e-4)


def test_a_stack_of_additions_keeps_all_that_it_is_handed():
    seen = observations(LAYERS)
    frame = measured(known_model([lambda h, ids, k=k: h + seen[k + 1][ids] for k in range(LAYERS)], seen[0]))
    for kind in KINDS:
        assert list(by_pair(frame, f"survival_{kind}").values()) == pytest.approx([1] * 6, abs=1e-4)


def test_a_gpt_keeps_everything_between_blocks_that_are_zero():
    model = planted("none")
    with torch.no_grad():
        for block in model.model.layers[:-1]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    frame = measured(model)
    for kind in KINDS:
        assert by_pair(frame, f"survival_{kind}") == pytest.approx({(0, 1): 1, (0, 2): 1, (1, 2): 1}, abs=1e-4)


HALF = WIDTH // 2


def cleaner(shrink=0.5):
    """Half of the state is large and right from the start; the other half is noisy, and each block takes noise off it."""
    large = torch.cat([4 * torch.ones(HALF), torch.ones(HALF)])
    keep = torch.cat([torch.ones(HALF), shrink * torch.ones(HALF)])
    noise = torch.cat([torch.zeros(HALF), torch.ones(HALF)])
    aim = large * drawn(0, V, WIDTH)
    steps = [lambda h, ids: keep * h + (1 - keep) * aim[ids] for _ in range(LAYERS)]
    return known_model(steps, aim + noise * drawn(1, V, WIDTH))


def test_a_model_that_takes_noise_off_its_own_state_corrects_errors_and_keeps_signal():
    frame = measured(cleaner(), count=64)
    errors, signals, noises = (by_pair(frame, f"survival_{kind}") for kind in KINDS)
    for pair, error in errors.items():
        assert error == pytest.approx(0.5 ** (pair[1] - pair[0]), abs=0.02), "errors are in the half that is cleaned"
        assert signals[pair] > 0.85
        assert error < noises[pair] < signals[pair]
    for name in DIFFERENCES:
        assert of_model(frame, f"mean_{name}_without_layer0")["ci_high"] < -0.1
    assert fate_of_errors(frame) == "corrected"
    assert fate_of_errors(frame, "") == "corrected"


def test_errors_that_shrink_no_more_than_all_else_are_not_called_corrected():
    subject = subject_of(running_mean(), count=24)
    assert fate_of_errors(PROBES["injection_survival"].measure(subject).frame(200)) != "corrected"


def rows(error, signal, noise, stays=(0.9, 1.1)):
    values = {
        "survival_error": error,
        "error_minus_signal": signal,
        "error_minus_noise": noise,
        "survival_signal": stays,
    }
    return pd.DataFrame(
        [{"quantity": f"mean_{k}_without_layer0", "ci_low": low, "ci_high": high} for k, (low, high) in values.items()]
    )


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        (((0.4, 0.6), (-0.5, -0.3), (-0.4, -0.2)), "corrected"),
        (((0.4, 0.6), (-0.5, -0.3), (-0.4, -0.2), (0.8, 0.95)), "corrected"),
        (((0.4, 0.6), (-0.5, -0.3), (-0.4, -0.2), (0.6, 0.8)), "shrunk"),
        (((0.4, 0.6), (-0.5, -0.3), (-0.4, 0.2)), "neither"),
        (((0.4, 0.6), (-0.5, 0.3), (-0.4, -0.2)), "neither"),
        (((0.9, 1.01), (-0.5, -0.3), (-0.4, -0.2)), "unchanged"),
        (((0.96, 0.98), (-0.5, -0.3), (-0.4, -0.2)), "unchanged"),
        (((1.2, 1.3), (-0.5, -0.3), (-0.4, -0.2)), "neither"),
        (((0.95, 1.05), (-0.1, 0.1), (-0.1, 0.1)), "unchanged"),
        (((0.5, 1.05), (-0.1, 0.1), (-0.1, 0.1)), "undetermined"),
        (((-22.3, 25.5), (-0.1, 0.1), (-0.1, 0.1)), "undetermined"),
        (((1.01, 1.3), (-0.1, 0.1), (-0.1, 0.1)), "neither"),
        (((np.nan, np.nan), (-0.5, -0.3), (-0.4, -0.2)), "undetermined"),
    ],
)
def test_corrected_needs_less_than_signal_less_than_noise_and_less_than_one(intervals, expected):
    assert fate_of_errors(rows(*intervals)) == expected
    assert fate_of_errors(rows(*intervals).iloc[1:]) == "undetermined"


def lenses_of(subject):
    return Lenses.of(subject, subject.layers)


def test_changes_read_as_asked_have_the_least_length_and_noise_has_the_errors():
    subject = subject_of(running_mean(), count=128)
    lenses = lenses_of(subject)
    injected = Injected.drawn(subject, lenses, np.arange(4))
    states = subject.fit.states.double()
    for number in range(4):
        own, other = injected.states[:, number], injected.others[:, number]
        changes = lenses.changes(own, other, np.random.default_rng(0))
        for fold in range(2):
            for i in range(3):
                read, signal = lenses.maps.read[fold, i].numpy(), lenses.maps.signal[fold, i].numpy()
                covariance = np.cov(states[i].numpy().T, bias=True)
                error = read @ other[i].numpy() - signal @ other[-1].numpy()
                swap = signal @ (other[-1] - own[-1]).numpy()
                inverse = np.linalg.inv(covariance)
                lengths = [d @ inverse @ d for d in changes[fold, i].numpy()]
                assert lengths[2] == pytest.approx(lengths[0], rel=1e-6)
                for delta, wanted in zip(changes[fold, i].numpy(), (error, swap), strict=False):
                    np.testing.assert_allclose(read @ delta, wanted, atol=1e-6 * np.abs(wanted).max())
                # Any other change that is read alike differs by one that is not read: it must be at a right angle.
                unread = np.linalg.svd(read)[2][np.linalg.matrix_rank(read) :]
                assert np.abs(unread @ inverse @ changes[fold, i, 0].numpy()).max(initial=0) < 1e-6 * np.sqrt(
                    lengths[0]
                )


def test_the_token_and_the_one_whose_error_it_gets_are_of_different_documents_and_drawn_alone():
    subject = subject_of(running_mean(), count=24)
    lenses = lenses_of(subject)
    every, one = (Injected.drawn(subject, lenses, np.array(r)) for r in (range(24), [7]))
    torch.testing.assert_close(every.others[:, 7], one.others[:, 0])
    assert every.at[7] == one.at[0]
    states = subject.eval.states[[*subject.layers, LAYERS]].double() - lenses.means[:, None]
    for row in range(24):
        match = (states == every.others[:, [row]]).all(-1).all(0)
        assert (subject.eval.document[match.numpy()] != subject.windows.documents[row]).any()
        mine = (states == every.states[:, [row]]).all(-1).all(0)
        assert row in subject.eval.window[mine.numpy()]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3_text", "lfm2"])
def test_answers_are_those_of_blocks_called_by_hand(architecture):
    """Of kinds that differ from block to block; states and losses after a move of one state, whole texts without a cache."""
    model = mixed_model(architecture)
    subject = subject_of(model, count=24, windows=text(0, 24)) if model.config.vocab_size >= V else None
    if subject is None:
        few = text(0, 24)
        subject = subject_of(model, windows=replace(few, ids=few.ids % model.config.vocab_size))
    check_by_hand(model, subject)


def check_by_hand(model, subject):
    lenses = Lenses.of(subject, subject.layers)
    injected = Injected.drawn(subject, lenses, np.arange(24))
    found = answers_of(subject, lenses, injected, 3)
    place, ids = injected.at[3], subject.windows.ids[3]
    prefix, target = torch.from_numpy(ids[: place + 1])[None], ids[place + 1]
    moves = lenses.changes(injected.states[:, 3], injected.others[:, 3], np.random.default_rng([3, 1])).float()

    def run(layer=None, move=None):
        states = {}

        def enter(block, h):
            if block == layer:
                h = h.clone()
                h[:, -1] += move
            states[block] = h[0, -1]
            return h

        logits = logits_by_hand(model, prefix, range(4), enter)
        return torch.stack([states[k] for k in range(4)]).double(), -logits[0, -1].double().log_softmax(-1)[target]

    plain, nats = run()
    expected = np.zeros_like(found)
    for fold in range(2):
        for i in range(3):
            for kind in range(3):
                states, after = run(i, moves[fold, i, kind])
                made = lenses.maps.read[fold, i] @ (states[i] - plain[i])
                for j in range(i, 4):
                    expected[i, kind, j] += float(made @ lenses.maps.read[1 - fold, i] @ (states[j] - plain[j]))
                expected[i, kind, 4] += float(after - nats)
                # The subject's own lens is the logit lens.
                at_once = [-subject.stream.readout(h.float()).log_softmax(-1)[target] for h in (states[i], plain[i])]
                expected[i, kind, 5] += float(at_once[0] - at_once[1])
    scale = np.abs(expected[..., :4]).max()
    np.testing.assert_allclose(found[..., :4], expected[..., :4], atol=1e-3 * scale)
    np.testing.assert_allclose(found[..., 4:], expected[..., 4:], atol=2e-3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 60))
def test_windows_are_taken_from_clusters_in_turn(clusters, most):
    clusters = np.array(clusters)
    rows = in_turn(clusters, most)
    assert len(set(rows)) == len(rows) == min(most, len(clusters))
    assert (np.diff(rows) > 0).all()
    taken, there = np.bincount(clusters[rows], minlength=10), np.bincount(clusters, minlength=10)
    # No cluster has two more than one that could have given another.
    assert all(taken[b] >= taken[a] - 1 for a in range(10) for b in range(10) if taken[b] < there[b])


@torch.no_grad()
def test_a_cache_is_held_against_the_captured_state_and_only_then_against_another_pass(monkeypatch):
    """With a captured state that is off, the answers stay those of the model: by the cache that agrees with a pass."""
    model = planted("none")
    subject = subject_of(model, count=24)
    assert cache_of(subject.stream, torch.ones(1, 4, dtype=torch.long)) is not None
    lenses = Lenses.of(subject, subject.layers)
    injected = Injected.drawn(subject, lenses, np.arange(24))
    passes, at = [], ResidualStream.at
    monkeypatch.setattr(ResidualStream, "at", lambda *args, **more: passes.append(1) or at(*args, **more))
    found = answers_of(subject, lenses, injected, 3)
    assert not passes
    off = answers_of(subject, lenses, replace(injected, ends=injected.ends + torch.randn_like(injected.ends)), 3)
    assert len(passes) == 1
    np.testing.assert_array_equal(off, found)


def test_where_nothing_follows_an_injection_costs_what_the_lens_loses():
    """The subject's own lens is the logit lens; blocks after the first add nothing."""
    seen = observations(2)
    steps = [lambda h, ids: h + seen[1][ids], lambda h, ids: 1 * h, lambda h, ids: 1 * h]
    frame = measured(known_model(steps, seen[0]))
    cost = frame[frame["layer"].notna() & frame["other"].isna()].set_index(["quantity", "layer"])["value"].astype(float)
    assert abs(cost["cost_signal", 1]) > 0.01
    assert cost["cost_signal", 1] == pytest.approx(cost["read_cost_signal", 1], rel=1e-3)
    errors = frame[(frame["quantity"] == "survival_error") & (frame["layer"] == 1)]
    assert errors["value"].isna().all()
    assert "too small errors" in errors["reason"].iloc[0], "layer 1 reads what the model will say"
    assert frame[frame["quantity"] == "mean_survival_error"]["value"].isna().all()


def test_an_error_that_the_read_out_passes_over_survives_and_costs_nothing():
    """Ignored is not corrected: the last block takes the injected half off, after all layers that are read."""
    aim, noise = drawn(0, V, WIDTH), drawn(1, V, WIDTH)
    keep = torch.cat([torch.ones(HALF), torch.zeros(HALF)])
    steps = [lambda h, ids: h + 0.1 * aim[ids], lambda h, ids: 1 * h, lambda h, ids: keep * h + (1 - keep) * aim[ids]]
    blur = torch.cat([torch.zeros(HALF), torch.ones(HALF)]) * noise
    frame = measured(known_model(steps, aim + 2 * blur))
    assert list(by_pair(frame, "survival_error").values()) == pytest.approx([1] * 3, abs=1e-3)
    cost, read, signal = (
        frame[frame["quantity"] == name]["value"].astype(float).abs().min()
        for name in ("cost_error", "read_cost_error", "cost_signal")
    )
    assert cost < 1e-4 < 0.01 < min(read, signal)


def test_what_it_does_not_apply_to_says_why():
    tied = build("gpt-tied", seed=1, vocab_size=V, d_model=32, layers=3, heads=4, context=64, parameters=60_000).eval()
    tied.config.tied_layers = False  # a model that does not say that it loops
    cases = {
        "blocks of their own": subject_of(tied, count=8),
        "rotated": subject_of(planted("none"), rotated=True),
        "tokens, and a lens of width 32 needs more": subject_of(planted("none"), count=8),
        "one layer": subject_of(planted("none"), layers=[1]),
        "fitting documents": subject_of(planted("none"), count=4),
    }
    for words, subject in cases.items():
        assert words in PROBES["injection_survival"].measure(subject).frame()["reason"][0]


OF_LOOPS = {"vocab_size": V, "d_model": 16, "layers": 3, "heads": 2, "context": 64, "parameters": 12_000}


@pytest.mark.parametrize(
    ("loop", "stack", "settings"),
    [("gpt-tied", "gpt-conv", {}), ("predictive-coding", "predictive-coding", {"error_gradient": False})],
)
def test_one_block_in_a_loop_has_the_answers_of_a_stack_of_its_copies(loop, stack, settings, monkeypatch):
    monkeypatch.setattr(injection_survival, "WINDOWS", 4)
    tied = {"tied_layers": True} if stack == loop else {}
    one = build(loop, seed=2, **OF_LOOPS, **settings, **tied).eval()
    width = one.config.intermediate_size
    many = type(one)(type(one.config)(**one.config.to_dict() | {"tied_layers": False})).eval()
    assert many.config.intermediate_size == width
    for layer in many.layers:
        layer.load_state_dict(one.layers[0].state_dict())
    rest = {name: value for name, value in one.state_dict().items() if not name.startswith("layers.")}
    many.load_state_dict(rest, strict=False)
    of_loop, of_stack = (measured(model, count=32) for model in (one, many))
    assert of_loop["reason"].isna().all() or (of_loop["reason"] == of_stack["reason"]).all()
    pd.testing.assert_frame_equal(of_loop, of_stack, rtol=1e-4, atol=1e-5)
    assert by_pair(of_loop, "survival_error")


def test_a_loop_with_its_input_is_moved_at_the_loop_that_is_named():
    model = build("gpt-looped", seed=2, **OF_LOOPS).eval()
    stream, ids = ResidualStream(model), torch.arange(1, 9)[None]
    moves, into = torch.randn(3, 16), torch.tensor([0, 2, 1])
    _, logits = stream.at(ids, torch.zeros(1, dtype=torch.long), torch.tensor([7]))
    ((states, log_p),) = after_moves(stream, ids, into, moves, [logits.float().log_softmax(-1)[0]])
    with torch.no_grad():
        e = torch.nn.functional.rms_norm(model.embed_tokens(ids), (16,), eps=1e-12)
        for number in range(3):
            h, expected = e, []
            for loop in range(3):
                if loop == into[number]:
                    h = torch.cat([h[:, :-1], h[:, -1:] + moves[number]], 1)
                expected.append(h[0, -1])
                h = model.layers[0](h, e, None)
            torch.testing.assert_close(states[:, number], torch.stack(expected), rtol=1e-4, atol=1e-5)
            own = stream.readout(h[:, -1]).log_softmax(-1)[0]
            torch.testing.assert_close(log_p[number], own, rtol=1e-4, atol=1e-4)


def test_of_many_layers_a_few_are_looked_at_evenly_spread(monkeypatch):
    monkeypatch.setattr(injection_survival, "LAYERS", 3)
    frame = measured(running_mean())
    assert list(by_pair(frame, "survival_error")) == [(0, 2), (0, 3), (2, 3)]


def planted_products(seed, documents=80):
    """Products of 3 layers and 3 kinds for two tokens a document; survivals and sizes vary by document and go together.

    A size is ``exp(x)``, x normal with variance 1/2; a share is ``mean + (x + normal) / 5``: the ratio of sums is then
    ``mean + 1 / 10`` in the long run.
    """
    rng = np.random.default_rng(seed)
    of_document, own = rng.standard_normal((2, documents, 1, 3)), rng.standard_normal((2, documents, 2, 3))
    x = (of_document[0] + own[0]) / 2
    share = (x + (of_document[1] + own[1]) / 2) / 5
    found = np.zeros((documents, 2, 2, 3, 5))
    for i in range(2):
        for j in range(i, 3):
            found[:, :, i, :, j] = np.exp(x) * (1 if i == j else np.array(MEANS) + share)
    found[..., 3:] = 1.0
    return found.reshape(2 * documents, 2, 3, 5), np.arange(2 * documents) // 2


MEANS = (0.6, 0.9, 0.8)


@pytest.mark.slow
def test_intervals_cover_the_survivals_that_are_planted():
    """Means, and paired differences of ratios, in about 95 of 100 draws of 80 documents."""
    truth = dict(zip((f"survival_{kind}" for kind in KINDS), (m + 0.1 for m in MEANS), strict=True))
    truth |= {"error_minus_signal": MEANS[0] - MEANS[1], "error_minus_noise": MEANS[0] - MEANS[2]}
    covered = dict.fromkeys(truth, 0)
    for seed in range(200):
        found, document = planted_products(seed)
        names = tuple(f"doc{k}" for k in range(80))
        samples = SimpleNamespace(documents=document, document_names=names)
        sums = Sums("injection_survival", samples, np.ones(len(found)))
        add_quantities(sums, [0, 1, 2], found, document, 1.0)
        rows = sums.measured().frame(400).set_index("quantity")
        for name, value in truth.items():
            row = rows.loc[f"mean_{name}"]
            covered[name] += bool(row["ci_low"] <= value <= row["ci_high"])
    assert all(180 <= count <= 199 for count in covered.values()), covered
