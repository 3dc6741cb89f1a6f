"""Lenses cut to a rank: the cut against a reference, scores against plain loops, choices on dev alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.planted import V, planted, subject_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.lens_rank import Cut, Read, dev_kl, ranks_of, scores
from lensbench.probes.registry import PROBES
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream


def rng_of(seed):
    return np.random.default_rng(seed)


def drawn_map(seed, d=6):
    """A map, moments and a factor of a metric with two null directions."""
    rng = rng_of(seed)
    scale = rng.standard_normal((d, d)) * 2.0 ** -np.arange(d)
    maps = AffineMaps(torch.from_numpy(rng.standard_normal((1, d, d))), torch.from_numpy(rng.standard_normal((1, d))))
    mean, covariance = torch.from_numpy(rng.standard_normal(d)), torch.from_numpy(scale @ scale.T + 1e-2 * np.eye(d))
    return maps, mean, covariance, torch.from_numpy(rng.standard_normal((d - 2, d)))


def matrix_of(cut, rank):
    """The matrix of a cut, from what it makes of states."""
    d = len(cut.mean)
    eye, none = torch.eye(d).double(), torch.zeros(1, d).double()
    return (cut.read(eye, rank) - cut.read(none, rank)).T.numpy()


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_cut_is_reduced_rank_regression_in_both_metrics(rank):
    """Reference: the truncated SVD of ``G^1/2 B C^1/2`` with symmetric roots, led back by pseudo-inverses."""
    maps, mean, covariance, factor = drawn_map(0)
    factor = torch.cat([factor, 1e-3 * torch.eye(6).double()])  # no null direction, so that the reference can go back
    found = matrix_of(Cut.of(maps, mean, covariance, factor), rank)
    out, into = (np.real(sqrtm(x.numpy())) for x in (factor.T @ factor, covariance))
    u, s, vt = np.linalg.svd(out @ maps.matrix[0].numpy() @ into)
    expected = np.linalg.inv(out) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(into)
    loss = s[rank:] ** 2
    missed = factor.numpy() @ (maps.matrix[0].numpy() - found)
    assert np.trace(missed @ covariance.numpy() @ missed.T) == pytest.approx(loss.sum(), rel=1e-6)
    weighted = out @ (found - expected) @ into
    assert np.abs(weighted).max() < 1e-6 * max(s)
    assert np.linalg.matrix_rank(found, tol=1e-9 * max(1, np.abs(found).max())) <= rank


def test_a_cut_reads_the_mean_as_the_lens_does_and_with_all_directions_is_the_lens():
    maps, mean, covariance, factor = drawn_map(1)
    cut, h = Cut.of(maps, mean, covariance, factor), torch.from_numpy(rng_of(2).standard_normal((5, 6)))
    whole = h @ maps.matrix[0].T + maps.offset[0]
    torch.testing.assert_close(cut.read(h, 6), whole, rtol=1e-12, atol=1e-12)
    for rank in range(6):
        torch.testing.assert_close(cut.read(mean[None], rank), mean[None] @ maps.matrix[0].T + maps.offset[0])
    # Directions beyond the rank of the metric are read, too, but nothing of them is seen.
    torch.testing.assert_close(cut.read(h, 4) @ factor.T, whole @ factor.T, rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 10_000), rank=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_another_basis_of_the_states_changes_no_reading(seed, rank):
    maps, mean, covariance, factor = drawn_map(3)
    rng = rng_of(seed)
    turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((6, 6))))[0]
    change = turn * torch.from_numpy(rng.uniform(0.5, 2, 6))
    h = mean + torch.linalg.cholesky(covariance) @ torch.from_numpy(rng.standard_normal(6))
    other = AffineMaps(maps.matrix @ torch.linalg.inv(change), maps.offset)
    before = Cut.of(maps, mean, covariance, factor).read(h[None], rank)
    after = Cut.of(other, change @ mean, change @ covariance @ change.T, factor).read((change @ h)[None], rank)
    torch.testing.assert_close(before @ factor.T, after @ factor.T, rtol=1e-5, atol=1e-7)


def test_ranks_are_the_powers_of_two_with_both_ends():
    assert ranks_of(6) == [0, 1, 2, 4, 6]
    assert ranks_of(8) == [0, 1, 2, 4, 8]


@pytest.fixture(scope="module")
def subject():
    plain = subject_of(planted("none"), count=8)
    d, layers = plain.stream.d_model, plain.stream.layers
    generator = torch.Generator().manual_seed(1)
    own = AffineMaps(
        torch.eye(d) + 0.4 * torch.randn(layers, d, d, generator=generator) / d**0.5,
        torch.randn(layers, d, generator=generator),
    )
    return replace(plain, own=own, shared=own[[1]])


def by_hand(subject, captured, layer, matrix, offset):
    """Mean KL, top-1 and top-10 of a lens at a layer, token by token in float64."""
    model = subject.stream.model
    gain, head = (w.detach().numpy().astype(float) for w in (model.model.norm.weight, model.lm_head.weight))

    def logits(x):
        return head @ (gain * x / np.sqrt((x**2).mean() + model.config.rms_norm_eps))

    found = []
    for h, end in zip(captured.states[layer].double().numpy(), captured.states[-1].double().numpy(), strict=True):
        truth, lens = logits(end), logits(matrix @ h + offset)
        p, q = (x - np.log(np.exp(x).sum()) for x in (truth, lens))
        place = sorted(range(V), key=lambda word: -lens[word]).index(int(np.argmax(truth)))
        found.append((float((np.exp(p) * (p - q)).sum()), place == 0, place < 10))
    return np.mean(found, axis=0)


@pytest.mark.slow
def test_the_whole_lenses_have_the_scores_that_plain_loops_find(subject):
    further = {"jacobian": subject.own, "shared_jacobian": subject.shared}
    frame = PROBES["lens_rank"].measure(replace(subject, further=further)).frame(20)
    for kind, same in (("jacobian", "tuned"), ("shared_jacobian", "shared")):  # the same maps by another name
        for what in ("kl", "top1", "top10", "top1_by_layer"):
            of_kind, of_same = (frame[frame["quantity"] == f"rank_{what}_{k}"]["value"] for k in (kind, same))
            assert len(of_kind) >= 7
            np.testing.assert_allclose(of_kind.astype(float), of_same.astype(float), atol=1e-6)
        assert frame[frame["quantity"] == f"rank_kl_{kind}_minus_{same}"]["value"].abs().max() < 1e-6
    whole = frame[frame["other"] == subject.stream.d_model].set_index(["quantity", "layer"])["value"].astype(float)
    layers, scored = range(subject.stream.layers), subject.eval
    single = int(whole["single_layer"].item())
    of_lens = {}
    for kind, lens_of in (("tuned", lambda k: k), ("shared", lambda k: 1), ("single", lambda k: single)):
        each = []
        for layer in layers:
            matrix, offset = (x[lens_of(layer)].double().numpy() for x in (subject.own.matrix, subject.own.offset))
            each.append(by_hand(subject, scored, layer, matrix, offset))
        of_lens[kind] = np.array(each)
        for k, what in enumerate(("kl", "top1", "top10")):
            assert whole[f"rank_{what}_{kind}"].item() == pytest.approx(of_lens[kind][:, k].mean(), abs=1e-5)
        np.testing.assert_allclose(whole[f"rank_top1_by_layer_{kind}"].sort_index(), of_lens[kind][:, 1], atol=1e-9)
    for one, other in (("shared", "tuned"), ("single", "shared")):
        for k, what in enumerate(("kl", "top1")):
            expected = (of_lens[one] - of_lens[other])[:, k].mean()
            assert whole[f"rank_{what}_{one}_minus_{other}"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_layer_is_chosen_on_dev_and_not_on_what_is_scored(subject):
    """Dev states are such that the lens of layer 0 reads every layer best; the scored ones are as they were."""
    dev = subject.eval
    best = dev.states[-1].double() - subject.own.offset[0].double()
    made = (best @ torch.linalg.inv(subject.own.matrix[0].double()).T).float()
    dev = replace(dev, states=torch.cat([made.expand(3, -1, -1), dev.states[-1:]]))
    splits = {"fit": subject.fit, "dev": dev, "eval": subject.eval}
    frame = PROBES["lens_rank"].measure(replace(subject, read=splits.__getitem__)).frame(20)
    chosen = frame[frame["quantity"] == "single_layer"].set_index("other")["value"].astype(float)
    assert chosen[subject.stream.d_model] == 0
    everywhere = [
        np.mean([by_hand(subject, subject.eval, layer, *(x[k].double().numpy() for x in vars(subject.own).values()))[0]
                 for layer in range(3)])
        for k in range(3)
    ]  # fmt: skip
    assert int(np.argmin(everywhere)) != 0, "on the scored tokens another layer would have been chosen"


@pytest.mark.slow
def test_a_permutation_of_the_vocabulary_changes_no_score(subject):
    model, order = planted("none"), torch.randperm(V, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[order])
    other = ResidualStream(model)
    cut = Cut.of(subject.own[[1]], torch.zeros(32).double(), torch.eye(32).double(), torch.eye(32).double())
    read = Read(cut, 8, torch.zeros(32))
    found = scores(subject.stream.readout, subject.eval, 1, read)
    again = scores(other.readout, capture(other, subject.windows), 1, read)
    torch.testing.assert_close(found.kl, again.kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.top1, again.top1)
    assert torch.equal(found.top10, again.top10)


@pytest.mark.slow
def test_a_longer_pad_on_dev_is_what_it_would_be_when_scored(subject):
    cut = Cut.of(subject.own[[0]], torch.zeros(32).double(), torch.eye(32).double(), torch.eye(32).double())
    pad = torch.randn(32, generator=torch.Generator().manual_seed(5)).double()
    found = dev_kl(subject.stream.readout, subject.eval, 0, cut, 4, pad, (0.0, 0.5))
    for k, length in enumerate((0.0, 0.5)):
        read = scores(subject.stream.readout, subject.eval, 0, Read(cut, 4, length * pad))
        assert float(found[k]) == pytest.approx(float(read.kl.mean()), abs=1e-5)
