"""Moving states: against whole forward passes by hand, caches against none, and streams whose answer is known."""

import numpy as np
import pytest
import torch
from helpers.planted import D, L, V, planted, subject_of

from lensbench.models import build
from lensbench.probes.causal_fidelity import (
    DIRECTIONS,
    SCORES,
    Moves,
    _add_layer,
    aitchison,
    cosine,
    responses,
    scores_after,
)
from lensbench.probes.measured import Sums
from lensbench.probes.registry import PROBES
from lensbench.probes.tools import interventions
from lensbench.probes.tools.interventions import after_moves, cache_of
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 97, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-conv", "predictive-coding"])
def test_responses_are_those_of_a_forward_pass_with_the_moved_state(family):
    model = build(family, seed=1, **SHAPE).eval()
    stream = ResidualStream(model)
    ids = torch.randint(0, V, (1, 12), generator=torch.Generator().manual_seed(0))
    layers = torch.tensor([0, 2, 1])
    moves = torch.randn(3, stream.d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits[0, -1].log_softmax(-1)
        found = responses(stream, ids, layers, moves, before)
        for k in range(3):
            block = stream.blocks[layers[k]]

            def move(_, args, kwargs, k=k):
                h = (args[0] if args else kwargs["hidden_states"]).clone()
                h[:, -1] += moves[k]
                return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

            hook = block.register_forward_pre_hook(move, with_kwargs=True)
            try:
                expected = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
            finally:
                hook.remove()
            torch.testing.assert_close(found[k], expected, rtol=1e-3, atol=1e-4)
            assert (expected - before).abs().max() > 1e-3
    assert (cache_of(stream, ids) is None) == (family == "gpt-conv"), "which has no cache, and is read whole"


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_each_move_is_answered_once_whatever_the_batch_and_whether_the_cache_is_trusted(at_once, trusted, monkeypatch):
    stream = ResidualStream(build("gpt", seed=1, **SHAPE).eval())
    ids = torch.randint(0, V, (1, 12), generator=torch.Generator().manual_seed(0))
    layers, moves = torch.tensor([0, 2, 1]), torch.randn(3, stream.d_model, generator=torch.Generator().manual_seed(1))
    before = stream.at(ids, torch.tensor([0]), torch.tensor([11]))[1].log_softmax(-1)[0]
    whole = list(after_moves(stream, ids, layers, moves, [before]))
    monkeypatch.setattr(interventions, "MOVES_AT_ONCE", at_once)
    passes, at = [], ResidualStream.at
    monkeypatch.setattr(ResidualStream, "at", lambda *args, **more: passes.append(1) or at(*args, **more))
    batches = list(after_moves(stream, ids, layers, moves, [before if trusted else before.flip(0)]))
    assert [h.shape[1] for h, _ in batches] == [len(x) for x in layers.split(at_once)]
    assert len(passes) == (0 if trusted else len(batches))
    for number, axis in ((0, 1), (1, 0)):
        found, expected = (torch.cat([batch[number] for batch in of], axis) for of in (batches, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_directions_are_equally_usual_and_the_lenss_move_its_logits_most():
    subject = subject_of(planted("none"))
    moves = Moves.of(subject).of_window(0).double()
    assert moves.shape == (L, 2 * DIRECTIONS, D)
    states = subject.stream.forward(torch.from_numpy(subject.windows.ids))[0]
    h = states[1, :, 2:].flatten(0, 1).double()
    covariance = torch.cov(h.T)
    distance = torch.einsum("kd,de,ke->k", moves[1], torch.linalg.pinv(covariance, rtol=1e-9), moves[1])
    # The covariance is that of some of the windows.
    torch.testing.assert_close(distance, torch.ones_like(distance), rtol=0.2, atol=0)
    gain = subject.stream.readout.gain(D).double()
    logits = moves[1] @ gain.T @ subject.stream.readout.weight.double().T
    size = logits.var(1)
    assert size[0] == size.max()
    assert size[:DIRECTIONS].min() > size[DIRECTIONS:].mean()


def test_aitchison_is_the_covariance_of_log_ratios_under_p():
    rng = np.random.default_rng(0)
    a, b, p = rng.standard_normal(7), rng.standard_normal(7), rng.dirichlet(np.ones(7))
    covariance = np.cov(np.stack([a, b]), aweights=p, bias=True)
    found = aitchison(torch.from_numpy(a)[None], torch.from_numpy(b)[None] + 5, torch.from_numpy(p))
    assert [float(x) for x in found] == pytest.approx([covariance[0, 1], covariance[0, 0], covariance[1, 1]])


def test_where_later_blocks_do_nothing_the_output_moves_as_the_logit_lens_reads():
    model = planted("none")
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    frame = PROBES["causal_fidelity"].measure(subject_of(model, count=32)).frame(200)
    value = frame.set_index(["quantity", "layer"])["value"].astype(float)
    for layer in (1, 2):
        for name in ("fidelity", "fidelity_own", "fidelity_logit", "fidelity_random", "response_slope"):
            assert value[name, layer] == pytest.approx(1, abs=1e-3)
        assert abs(value["fidelity_null", layer]) < 0.5
        assert value["response_ratio", layer] == pytest.approx(value["stimulus_ratio", layer], rel=1e-2)
    assert value["fidelity", 0] < 0.99


def test_what_has_no_blocks_or_is_rotated_says_so():
    tied = build("gpt-tied", seed=1, **SHAPE).eval()
    assert "blocks of their own" in PROBES["causal_fidelity"].measure(subject_of(tied)).frame()["reason"][0]
    assert (
        "rotated" in PROBES["causal_fidelity"].measure(subject_of(planted("none"), rotated=True)).frame()["reason"][0]
    )


def test_every_window_draws_random_directions_of_its_own_and_shares_the_lenss():
    subject = subject_of(planted("none"), count=32)
    moves = Moves.of(subject)
    first, second = moves.of_window(0), moves.of_window(1)
    assert torch.equal(first, moves.of_window(0)), "a window's draw is its own, whatever was drawn before"
    assert torch.equal(first[:, :DIRECTIONS], second[:, :DIRECTIONS])
    random, others = first[:, DIRECTIONS:].flatten(0, 1), second[:, DIRECTIONS:].flatten(0, 1)
    assert torch.nn.functional.cosine_similarity(random, others, dim=-1).abs().max() < 0.99
    few = subject_of(planted("none"), windows=subject.windows.take(np.arange(8)))
    frames = [PROBES["causal_fidelity"].measure(s) for s in (subject, few)]
    column = list(frames[0].quantity).index("fidelity_random")
    assert frames[0].top[:, column].std() > 0


def test_random_directions_are_usual_ones_of_the_layer():
    """Over many windows they have the layer's covariance: their mean square along any direction is its variance by d."""
    subject = subject_of(planted("none"), count=64)
    moves = Moves.of(subject)
    drawn = torch.stack([moves.of_window(k)[1, DIRECTIONS:] for k in range(600)]).flatten(0, 1).double()
    covariance = moves.root[1].double() @ moves.root[1].double()
    torch.testing.assert_close(
        drawn.T @ drawn / len(drawn) * D, covariance, rtol=0, atol=0.15 * float(covariance.max())
    )


def test_the_sign_of_a_direction_changes_no_null():
    """To first order: with later blocks that do nothing, and small moves, the null is the same for both signs."""
    subject = subject_of(planted("none"), count=16)
    prefix = torch.from_numpy(subject.windows.ids[:1, :12])
    moves = 1e-2 * Moves.of(subject).of_window(0)
    turned = moves.clone()
    turned[:, ::2] *= -1
    plain, other = (scores_after(subject, prefix, m)["null"] for m in (moves, turned))
    assert (plain > 0).all()
    np.testing.assert_allclose(plain, other, atol=0.05)


def test_a_direction_along_which_nothing_moves_has_no_cosine_and_is_no_evidence_of_unfaithfulness():
    """Zero by zero is not zero; a stimulus without response is."""
    covariance, left, right = (
        torch.tensor(x).double() for x in ([0.0, 0, 0.5, torch.nan], [0.0, 1, 1, 1], [0.0, 0, 1, torch.nan])
    )
    assert cosine(covariance, left, right).tolist() == pytest.approx([np.nan, 0, 0.5, np.inf], nan_ok=True)
    subject = subject_of(planted("none"), count=12)
    with torch.no_grad():
        subject.stream.model.lm_head.weight.zero_()
    frame = PROBES["causal_fidelity"].measure(subject).frame(50)
    assert frame["value"].astype(float).isna().all()
    assert (frame["reason"] == "undefined: nothing to take a share of").all()


def test_windows_without_a_cosine_do_not_pull_the_mean_to_zero_and_an_overflow_leaves_no_value():
    subject = subject_of(planted("none"), count=12)
    scores = {what: np.full((12, 2 * DIRECTIONS), 0.8) for what in SCORES}
    scores["shared"][:6] = np.nan
    scores["own"][3, 0] = np.inf
    sums = Sums("causal_fidelity", subject.windows, np.ones(12))
    _add_layer(sums, scores, 0)
    rows = sums.measured().frame(50).set_index("quantity")
    assert rows.loc["fidelity", "value"] == pytest.approx(0.8)
    assert rows.loc["fidelity_logit", "value"] == pytest.approx(0.8)
    assert rows.loc["fidelity_own", "reason"] == "undefined: it is not a number in some windows"
