"""Probes against independent references: autograd by hand, blocks called by hand, numpy, streams of known answer."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.architectures import small_model
from helpers.gpt_windows import windows
from helpers.planted import D, planted, subject_of
from helpers.synthetic import SyntheticStream, capture_of, orthogonal, random_maps, true_token_kl, windows_of

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.models import build
from lensbench.probes.block_paths import cross_entropy, skipping
from lensbench.probes.gradient_alignment import states_and_gradients
from lensbench.probes.measured import Measured
from lensbench.probes.registry import PROBES
from lensbench.probes.representation import covariance_similarity
from lensbench.probes.subject import Subject
from lensbench.probes.tools.block_places import swapped
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 61, "d_model": 24, "layers": 4, "heads": 2, "context": 32, "parameters": 40_000}


@pytest.fixture(scope="module")
def gpt():
    model = build("gpt-conv", seed=5, **SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():  # far from the initial weights, where no block matters
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def subject(model, view="state", rotated=False) -> Subject:
    stream = ResidualStream(model, view)
    changes = {"windows": windows(), "lenses": random_maps(4, 24), "rotated": rotated, "read": lambda split: None}
    return subject_of(model, stream=stream, **changes)


def by_hand(model, h, blocks):
    """Logits of a control GPT whose given blocks are called one after the other, from the embedding on."""
    for block in blocks:
        h = block(h, None)
    return model.lm_head(model.norm(h))


def embedded(model, ids):
    return torch.nn.functional.rms_norm(model.embed_tokens(ids), (24,), eps=1e-12)


def test_gradients_are_those_of_the_summed_loss(gpt):
    ids = torch.from_numpy(windows().ids)
    trainable = [p.requires_grad for p in gpt.parameters()]
    states, descent = states_and_gradients(ResidualStream(gpt), ids)
    assert [p.requires_grad for p in gpt.parameters()] == trainable or not any(
        p.grad is not None for p in gpt.parameters()
    )
    for layer in range(4):
        h = states[layer].clone().requires_grad_()
        logits = by_hand(gpt, h, gpt.layers[layer:])
        loss = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum()
        (expected,) = torch.autograd.grad(loss, h)
        torch.testing.assert_close(descent[layer], -expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt-tied", "gpt2", "predictive-coding"])
def test_gradients_do_not_depend_on_how_a_models_layers_are_called(family):
    """A finite difference of the loss along each state's own gradient; the tied model has no blocks to hook."""
    model = build(family, seed=2, **SHAPE).eval()
    ids = torch.from_numpy(windows().ids)
    states, descent = states_and_gradients(ResidualStream(model), ids)
    assert descent.shape == states[:-1].shape
    assert bool((descent.flatten(1).norm(dim=1) > 0).all())

    def loss_with(change):
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out + change)
        logits = model(ids).logits.double()
        hook.remove()
        return float(-logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum())

    if family == "gpt2":  # its first state is its embedding, so a change of one is a change of the other
        with torch.no_grad():
            step = 1e-2 * descent[0] / descent[0].norm()
            slope = (loss_with(step) - loss_with(-step)) / 2
        assert slope == pytest.approx(-1e-2 * float(descent[0].norm()), rel=1e-2)


def test_alignment_is_the_mean_cosine_and_its_null_takes_another_tokens_gradient(gpt):
    it = subject(gpt)
    found = PROBES["gradient_alignment"].measure(it).frame(200).set_index(["quantity", "layer"])
    states, descent = states_and_gradients(it.stream, torch.from_numpy(it.windows.ids))
    chosen = [
        (w, t) for w in range(12) for t, ok in zip(it.windows.positions[w], it.windows.valid[w], strict=True) if ok
    ]
    for layer in range(4):
        cosines = [
            torch.dot(a, b) / a.norm() / b.norm()
            for a, b in ((states[layer + 1, w, t] - states[layer, w, t], descent[layer, w, t]) for w, t in chosen)
        ]
        assert found.loc[("gradient_alignment", layer), "value"] == pytest.approx(
            float(torch.stack(cosines).mean()), abs=1e-5
        )
    null = found.loc["gradient_alignment_null", "value"]
    assert (null.abs() < 0.2).all()
    assert not np.allclose(null, found.loc["gradient_alignment", "value"])


def test_deleted_and_swapped_blocks_are_as_if_called_by_hand(gpt):
    it = subject(gpt)
    found = PROBES["block_paths"].measure(it).frame(200)
    ids = torch.from_numpy(it.windows.ids)
    blocks = list(gpt.layers)

    def ce(order):
        with torch.no_grad():
            log_p = by_hand(gpt, embedded(gpt, ids), [blocks[k] for k in order]).double().log_softmax(-1)
        nats = [
            -log_p[w, t, ids[w, t + 1]]
            for w in range(12)
            for t, ok in zip(it.windows.positions[w], it.windows.valid[w], strict=True)
            if ok
        ]
        return float(torch.stack(nats).mean())

    whole = ce(range(4))
    rises = found.set_index(["quantity", "layer"])["value"]
    for k in range(4):
        assert rises["ce_rise_deleted", k] == pytest.approx(ce([b for b in range(4) if b != k]) - whole, abs=1e-4)
    for k in range(3):
        order = list(range(4))
        order[k], order[k + 1] = order[k + 1], order[k]
        assert rises["ce_rise_swapped", k] == pytest.approx(ce(order) - whole, abs=1e-4)
    skipped = found[found["quantity"] == "ce_rise_skipped"]
    assert list(skipped["other"]) == [2, 3]
    assert abs(rises["ce_rise_deleted"]).max() > 0.01
    assert list(gpt.layers) == blocks, "the model is as it was"


def test_a_models_blocks_are_put_back_after_an_error(gpt):
    stream, blocks = ResidualStream(gpt), list(gpt.layers)
    with pytest.raises(RuntimeError), swapped(stream, 1):
        raise RuntimeError
    with pytest.raises(RuntimeError), skipping(blocks):
        raise RuntimeError
    assert list(gpt.layers) == blocks
    assert not any(b._forward_hooks for b in blocks)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-noskip", "predictive-coding"])
def test_paths_of_every_family(family):
    """Skipping all blocks reads the embedding out: what the last layer's norm and head make of h_0."""
    model = build(family, seed=1, **SHAPE).eval()
    stream, scored = ResidualStream(model), windows()
    with skipping(list(stream.blocks)):
        skipped = cross_entropy(stream, scored)
    states, _ = stream.forward(torch.from_numpy(scored.ids))
    log_p = stream.readout(states[0]).double().log_softmax(-1)
    expected = np.zeros(12)
    for w in range(12):
        for t, ok in zip(scored.positions[w], scored.valid[w], strict=True):
            expected[w] -= ok * float(log_p[w, t, scored.ids[w, t + 1]])
    np.testing.assert_allclose(skipped, expected, rtol=1e-5)


def test_probes_that_do_not_apply_say_why(gpt):
    for name in ("gradient_alignment", "block_paths"):
        frame = PROBES[name].measure(subject(gpt, rotated=True)).frame()
        assert len(frame) == 1
        assert frame["value"].isna().all()
        assert "rotated view" in frame["reason"][0]
    tied = PROBES["block_paths"].measure(subject(build("gpt-tied", seed=0, **SHAPE))).frame()
    assert "not blocks of their own" in tied["reason"][0]
    assert PROBES["gradient_alignment"].measure(subject(build("gpt-tied", seed=0, **SHAPE))).reason == ""


# Representation


def synthetic_subject(states_of, stream) -> Subject:
    captures = {}
    for seed, (split, tokens) in enumerate((("fit", 3000), ("dev", 600), ("eval", 1200))):
        constant = captures["fit"].mean_p if "fit" in captures else None
        captures[split] = capture_of(stream.readout, states_of(tokens, seed), constant=constant, seed=seed)
    layers = captures["fit"].layers
    lenses = RidgePath(Moments.of(captures["fit"]), "identity").solve(0.01)
    lenses = AffineMaps(lenses.matrix.float(), lenses.offset.float())
    scored = windows_of(captures["eval"])
    # Windows of the same ids would count as one that the text holds many times.
    scored = replace(scored, ids=scored.ids + np.arange(len(scored.ids))[:, None])
    return Subject(
        SimpleNamespace(readout=stream.readout, model=torch.nn.Identity()),
        scored, list(range(layers)), lenses, False, captures.__getitem__,
        lenses, lenses,
    )  # fmt: skip


def known(kind: str) -> Subject:
    stream = SyntheticStream(kind, d=24, layers=4, vocab=60)
    return synthetic_subject(lambda tokens, seed: stream.states(tokens, seed=seed), stream)


def test_similarity_is_the_cosine_of_covariances():
    it = known("overlapping")
    frame = PROBES["representation"].measure(it).frame(100)
    found = frame[frame["quantity"] == "covariance_similarity"].set_index(["layer", "other"])["value"]
    covariances = [np.cov(h.double().numpy().T, bias=True) for h in it.fit.states[:-1]]
    assert len(found) == 6
    for (i, j), value in found.items():
        a, b = covariances[i], covariances[j]
        assert value == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


def test_the_same_rotation_of_all_layers_changes_no_similarity_and_own_rotations_do():
    states = SyntheticStream("removed", d=12, layers=4, vocab=30).states(800, seed=0)[:-1].double()
    states = states * torch.linspace(0.1, 2, 12)
    random = torch.Generator().manual_seed(1)
    cov = torch.stack([torch.cov(h.T) for h in states])
    same = orthogonal(12, random).double()
    own = torch.stack([orthogonal(12, random).double() for _ in range(4)])
    plain = covariance_similarity(cov)
    torch.testing.assert_close(covariance_similarity(same @ cov @ same.T), plain)
    turned = covariance_similarity(own @ cov @ own.transpose(1, 2))
    off = ~torch.eye(4, dtype=torch.bool)
    assert float(turned[off].max()) < float(plain[off].min())


def test_carried_share_is_one_where_nothing_is_overwritten_and_what_regression_says_elsewhere():
    from sklearn.linear_model import LinearRegression

    frame = PROBES["representation"].measure(known("disjoint")).frame(100)
    carried = frame[frame["quantity"] == "carried_share"]
    assert len(carried) == 6
    assert (carried["value"] > 0.999).all()
    it = known("fresh")
    frame = PROBES["representation"].measure(it).frame(100)
    carried = frame[frame["quantity"] == "carried_share"].set_index(["layer", "other"])
    for (i, j), row in carried.iterrows():
        reference = LinearRegression().fit(it.fit.states[j].numpy(), it.fit.states[i].numpy())
        target = it.eval.states[i].numpy()
        residual = ((target - reference.predict(it.eval.states[j].numpy())) ** 2).sum()
        expected = 1 - residual / ((target - it.fit.states[i].numpy().mean(0)) ** 2).sum()
        assert row["value"] == pytest.approx(expected, abs=5e-3)
        assert row["ci_low"] < row["value"] < row["ci_high"]


def test_what_is_only_offset_and_scale_is_matched_away():
    base = SyntheticStream("fresh", d=16, layers=3, vocab=40)
    random = torch.Generator().manual_seed(3)
    shift = torch.randn(3, 16, generator=random)

    def states(tokens, seed):
        whole = base.states(tokens, seed=seed)
        return torch.stack([*(whole[0] * s + m for s, m in zip((1.0, 3.0, 0.2), shift, strict=True)), whole[-1]])

    it = synthetic_subject(states, base)
    frame = PROBES["matched_transfer"].measure(it).frame(100).set_index(["quantity", "layer", "other"])
    # Every layer holds the same state, moved and scaled: with these lens i reads j as it reads i.
    readout, scored = it.stream.readout, it.eval
    own = [float(true_token_kl(readout, scored, it.lenses.matrix[k], it.lenses.offset[k], k).mean()) for k in range(3)]
    for i in range(3):
        for j in range(3):
            assert frame.loc[("matched_penalty", i, j), "value"] == pytest.approx(own[i] - own[j], abs=0.02)


def test_matched_transfer_is_transfer_of_matched_states():
    it = known("overlapping")
    frame = PROBES["matched_transfer"].measure(it).frame(100)
    fit, scored = it.fit.states.double(), it.eval
    mean = fit.mean(1)
    rms = [(h - m).pow(2).sum(-1).mean().sqrt() for h, m in zip(fit, mean, strict=True)]
    kl = np.zeros((4, 4))
    raw = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            matched = (rms[i] / rms[j]) * (scored.states[j].double() - mean[j]) + mean[i]
            states = scored.states.clone()
            raw[i, j] = true_token_kl(it.stream.readout, scored, it.lenses.matrix[i], it.lenses.offset[i], j).mean()
            states[j] = matched.float()
            other = replace(scored, states=states)
            kl[i, j] = true_token_kl(it.stream.readout, other, it.lenses.matrix[i], it.lenses.offset[i], j).mean()
    values = frame.set_index(["quantity", "layer", "other"])["value"]
    for i in range(4):
        for j in range(4):
            assert values["matched_penalty", i, j] == pytest.approx(kl[i, j] - raw[j, j], abs=1e-4)
    off = ~np.eye(4, dtype=bool)
    share = 1 - (kl - np.diag(raw))[off].sum() / (raw - np.diag(raw))[off].sum()
    assert frame.set_index("quantity").loc["offset_and_scale_share", "value"] == pytest.approx(share, rel=1e-3)


def test_a_layer_that_is_the_same_everywhere_is_read_as_the_mean_of_the_lens_and_leaves_no_share_undefined():
    """A class token before the first block: to divide by the rounding error of its rms would give any numbers."""
    base = SyntheticStream("fresh", d=16, layers=3, vocab=40)
    same = torch.randn(16, generator=torch.Generator().manual_seed(5))

    def states(tokens, seed):
        whole = base.states(tokens, seed=seed)
        return torch.stack([same.expand_as(whole[0]), *whole[1:]])

    it = synthetic_subject(states, base)
    frame = PROBES["matched_transfer"].measure(it).frame(100).set_index(["quantity", "layer", "other"])["value"]
    scored = it.eval
    for i in (1, 2):
        states_0 = scored.states.clone()
        states_0[0] = it.fit.states[i].double().mean(0).float()
        read, own = (
            float(true_token_kl(it.stream.readout, of, it.lenses.matrix[k], it.lenses.offset[k], 0).mean())
            for of, k in ((replace(scored, states=states_0), i), (scored, 0))
        )
        assert frame["matched_penalty", i, 0] == pytest.approx(read - own, abs=1e-4)
    assert frame.loc["offset_and_scale_share"].notna().all()
    carried = PROBES["representation"].measure(it).frame(100).set_index(["quantity", "layer", "other"])
    assert "nothing to take a share of" in carried.loc[("carried_share", 0, 1), "reason"]


def test_a_lens_that_overflows_has_no_accuracy():
    it = subject_of(planted("none"), count=12)
    broken = AffineMaps(torch.full((1, D, D), torch.inf), torch.zeros(1, D))
    frame = PROBES["accuracy"].measure(replace(it, shared=broken)).frame(50)
    overflowed = frame["quantity"] == "shared_accuracy"
    assert frame.loc[overflowed, "value"].isna().all()
    assert (frame.loc[overflowed, "reason"] == "undefined: it is not a number in some windows").all()
    assert frame.loc[~overflowed, "value"].notna().all()


def test_sums_are_saved_and_loaded(tmp_path):
    found = PROBES["representation"].measure(known("fresh"))
    found.save(tmp_path)
    assert Measured.load(tmp_path).frame(100).equals(found.frame(100))


def test_what_is_written_in_the_padding_changes_no_gradient():
    """Of a padded window, the gradients are those of its tokens alone, without padding."""
    stream = ResidualStream(planted("none"))
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    inside = torch.arange(20) < torch.tensor([[20], [9]])
    found = []
    for filling in (0, 5):
        padded = torch.where(inside, ids, filling)
        _, descent = states_and_gradients(stream, padded, inside=inside)
        found.append(descent[:, 1, :9])
    _, alone = states_and_gradients(stream, ids[1:, :9])
    for descent in found:
        torch.testing.assert_close(descent, alone[:, 0], rtol=1e-4, atol=1e-6)


def test_gradient_alignment_of_short_windows_is_the_same_whatever_pads_them():
    whole = subject_of(planted("none"), count=16)
    lengths = whole.windows.lengths.copy()
    lengths[::2] = 12
    valid = whole.windows.positions < lengths[:, None] - 1
    values = []
    for filling in (0, 5):
        ids = whole.windows.ids.copy()
        ids[np.arange(ids.shape[1]) >= lengths[:, None]] = filling
        windows = replace(whole.windows, ids=ids, lengths=lengths, valid=valid)
        frame = PROBES["gradient_alignment"].measure(replace(whole, samples=windows)).frame(50)
        values.append(frame["value"].astype(float).to_numpy())
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_every_probe_measures_a_model_of_few_layers_or_says_why_not(layers):
    it = subject_of(small_model("llama", num_hidden_layers=layers), count=16)
    for name in (
        "representation",
        "block_paths",
        "known_places",
        "matched_transfer",
        "head_weights",
        "causal_fidelity",
    ):
        frame = PROBES[name].measure(it).frame(20)
        assert len(frame)
        assert (frame["value"].notna() | (frame["reason"].fillna("") != "")).all(), name
        if layers == 1 and name in ("representation", "matched_transfer"):
            undefined = frame.loc[frame["value"].isna(), "reason"]
            assert set(undefined) == {"undefined: the model has too few layers to compare"}
