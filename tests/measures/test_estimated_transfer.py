"""Losses from a share of the exact log-partitions are unbiased, their intervals cover, and lenses stay paired."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.synthetic import SyntheticStream, capture_of, random_maps, read_out
from helpers.words import by_words_alone, lacks_to_first_order

from lensbench.errors import LensbenchError
from lensbench.lenses import estimated
from lensbench.lenses.by_words import ByWords
from lensbench.lenses.estimated import FEWEST_PAIRED, Estimator, mean_read_out
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.measures.transfer import penalties, transfer_sums
from lensbench.statistics import bootstrap_weights, half_width, interval
from lensbench.streams.words import Words

NAMES = ("kl", "ce", "movement", "top1")

HEADS = {
    "plain": {}, "scaled": {"scale": 0.3}, "capped": {"softcap": 2.0}, "capped and scaled": {"scale": 0.7, "softcap": 1.5},
}  # fmt: skip


def stream_and_lenses(tokens=240, vocab=300, kind="overlapping"):
    stream = SyntheticStream(kind, d=16, layers=3, vocab=vocab, seed=3)
    captured = stream.capture(tokens, seed=4)
    fitted = RidgePath(Moments.of(captured), "identity").solve(0.03)
    return stream.readout, captured, AffineMaps(fitted.matrix.float(), fitted.offset.float())


def with_head(head, bias, tokens=42, norm="rms"):
    readout = read_out(10, 120, seed=1, bias=bias, norm=norm)
    for name, value in HEADS[head].items():
        setattr(readout, name, value)
    states = 2 * torch.randn(4, tokens, 10, generator=torch.Generator().manual_seed(1))
    return readout, capture_of(readout, states, per_document=6), random_maps(3, 10, seed=1)


def estimator_of(readout, captured, maps, share=0.1, words=60, seed=0):
    return Estimator.of(readout, captured, maps, share=share, seed=(seed,), words=words)


def means(sums, captured):
    return {name: getattr(sums, name).sum(0) / len(captured) for name in NAMES}


def estimate_of(readout, captured, maps, **how):
    return transfer_sums(readout, captured, maps, estimator=estimator_of(readout, captured, maps, **how))


@pytest.mark.parametrize(("head", "bias"), zip(HEADS, itertools.cycle([True, False]), strict=False))
def test_mean_over_all_samples_is_exact_whatever_the_head(head, bias):
    """Every way to draw 2 of 6 tokens, each as likely: their mean is exact to rounding, though each is far off."""
    readout, captured, maps = with_head(head, bias, norm="layer" if bias else "rms")
    captured = captured.take(torch.arange(6))
    exact = means(transfer_sums(readout, captured, maps), captured)
    base = estimator_of(readout, captured, maps, share=1 / 3, words=20)
    assert len(base.drawn) == 2
    found = {name: [] for name in NAMES}
    for chosen in itertools.combinations(range(6), 2):
        drawn = torch.tensor(chosen)
        one = replace(base, drawn=drawn, few=captured.take(drawn))
        for name, mean in means(transfer_sums(readout, captured, maps, estimator=one), captured).items():
            found[name].append(mean)
    for name, each in found.items():
        np.testing.assert_allclose(np.mean(each, 0), exact[name], rtol=0, atol=5e-5, err_msg=name)
        assert np.abs(np.array(each) - exact[name]).max() > 1e-3, name


def test_mean_over_seeds_is_the_exact_matrix():
    """Words and tokens drawn anew by each seed: the mean of 60 estimates lies within 4.5 standard errors everywhere."""
    readout, captured, maps = stream_and_lenses()
    exact = means(transfer_sums(readout, captured, maps), captured)
    found = [means(estimate_of(readout, captured, maps, seed=s), captured) for s in range(60)]
    for name in NAMES:
        each = np.array([one[name] for one in found])
        error = each.std(0, ddof=1) / np.sqrt(len(each))
        assert (np.abs(each.mean(0) - exact[name]) < 4.5 * error + 2e-5).all(), name
        assert error.max() > 1e-5


def test_layers_of_unequal_shares_draw_nested_samples_and_are_what_each_share_alone_gives():
    readout, captured, maps = stream_and_lenses()
    shares = (0.05, 0.4, 0.1, 1.0)
    it = estimator_of(readout, captured, maps, share=shares)
    samples = [set(it.sample(layer).at.tolist()) for layer in range(4)]
    assert [len(sample) for sample in samples] == [round(s * len(captured)) for s in shares]
    assert samples[0] < samples[2] < samples[1] < samples[3]
    found = transfer_sums(readout, captured, maps, estimator=it)
    for layer, share in enumerate(shares):
        alone = estimate_of(readout, captured, maps, share=share)
        for name in NAMES:
            one, other = getattr(found, name)[..., layer], getattr(alone, name)[..., layer]
            np.testing.assert_allclose(one, other, atol=1e-4, err_msg=f"{name} of layer {layer}")


def test_a_sample_drawn_again_has_tokens_enough_to_compare_refits():
    readout, captured, maps = stream_and_lenses()
    again = estimator_of(readout, captured, maps, share=0.01).again(captured, 1)
    assert set(again.counts) == {min(len(captured), FEWEST_PAIRED)}


@pytest.mark.parametrize("shares", [(0.1, 0.2), (0.1, 0.0, 0.1, 0.1)])
def test_shares_that_are_no_shares_or_not_one_of_every_layer_are_refused(shares):
    readout, captured, maps = stream_and_lenses()
    with pytest.raises(LensbenchError, match=r"2 shares of .* for 4 layers|above 0 and at most 1"):
        estimator_of(readout, captured, maps, share=shares)


@pytest.mark.parametrize("head", ["plain", "capped"])
def test_a_full_share_is_exact(head):
    readout, captured, maps = with_head(head, bias=True)
    exact, whole = transfer_sums(readout, captured, maps), estimate_of(readout, captured, maps, share=1.0, words=20)
    for name in NAMES:
        np.testing.assert_allclose(getattr(whole, name), getattr(exact, name), atol=2e-4, err_msg=name)


def test_an_estimate_by_hand():
    """One lens on one layer, from plain sums in float64: cheap values, the mean difference, and who was drawn."""
    readout, captured, maps = with_head("plain", bias=False)
    it = estimator_of(readout, captured, maps, share=0.25, words=20)
    scores = it.score(1, maps[[2]])
    states, weight = captured.states.double(), readout.unembedding.weight.double()

    def norm(x):
        return readout.final_norm(x.float()).double()

    n = norm(states[1] @ maps.matrix[2].double().T + maps.offset[2].double())
    log_p = (norm(states[-1]) @ weight.T).log_softmax(-1)
    exact = (log_p.exp() * (log_p - (n @ weight.T).log_softmax(-1))).sum(-1)
    alone = exact - (n @ weight.T).logsumexp(-1) + by_words_alone(it, n)
    lacks = lacks_to_first_order(it, norm(states[-1]), n)
    cheap = alone + (-(alone + lacks)).exp() * lacks
    total, drawn = len(captured), it.drawn
    assert len(drawn) == round(0.25 * total)
    mean = (exact - cheap)[drawn].mean()
    expected = cheap + mean
    expected[drawn] += total / len(drawn) * ((exact - cheap)[drawn] - mean)
    torch.testing.assert_close(scores.kl[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_near_the_model_cheap_values_have_no_error_of_first_order(head, bias):
    """Of a lens ten times nearer to the model they miss a hundredth; a tenth where logits are capped."""
    readout, captured, _ = with_head(head, bias, norm="layer" if bias else "rms")
    turn = torch.randn(10, 10, generator=torch.Generator().manual_seed(2)) / 10**0.5
    identity = AffineMaps.identity(10)
    it = estimator_of(readout, captured, identity[[0, 0, 0]], share=1.0, words=30)
    missed = {"kl": [], "ce": []}
    for step in (0.2, 0.02):
        cheap, exact = it.both(3, AffineMaps(identity.matrix + step * turn, identity.offset))
        for name, each in missed.items():
            each.append(float((getattr(exact, name) - getattr(cheap, name)).square().mean().sqrt()))
    n = readout.final_norm(captured.states[3])
    lack = (readout.logits(n).double().logsumexp(-1) - by_words_alone(it, n)).detach().square().mean().sqrt()
    for name, (far, close) in missed.items():
        assert close < (0.03 if readout.linear else 0.2) * far + 1e-5, name
        assert far < 0.5 * lack, name


@pytest.mark.parametrize("head", ["plain", "capped"])
def test_a_process_without_tokens_has_no_cheap_values(head):
    readout, captured, maps = with_head(head, bias=True)
    words = estimator_of(readout, captured, maps).by_words.words
    found = ByWords.of(words, captured.take(torch.arange(0))).scores(1, maps)
    assert found.kl.shape == found.ce.shape == found.top1.shape == (3, 0)


def test_all_lenses_and_layers_draw_the_same_tokens():
    """Of two equal lenses the difference of estimates is nothing; a lens on its own costs no penalty."""
    readout, captured, maps = stream_and_lenses()
    twice = maps[[0, 0, 2]]
    sums = estimate_of(readout, captured, twice, share=0.05)
    np.testing.assert_allclose(sums.kl[:, 0], sums.kl[:, 1], atol=1e-4)
    assert not np.diagonal(penalties(sums.kl), axis1=1, axis2=2).any()
    part = transfer_sums(
        readout, captured, twice, lenses=[2, 3], layers=[3, 1], movement=False,
        estimator=estimator_of(readout, captured, twice, share=0.05),
    )  # fmt: skip
    np.testing.assert_allclose(part.kl, sums.kl[:, [2, 3]][:, :, [3, 1]], atol=1e-4)
    assert np.isnan(part.movement).all()


@pytest.mark.slow
def test_intervals_of_estimates_cover_over_fresh_tokens():
    """Bootstrap intervals over documents, of a penalty from a share of exact values: they hold the truth in 95 % of draws.

    Those of the exact values of the same tokens are narrower, and would be too narrow around the estimate.
    """
    stream = SyntheticStream("overlapping", d=12, layers=2, vocab=200, seed=5)
    fitted = RidgePath(Moments.of(stream.capture(2000, seed=0)), "identity").solve(0.03)
    maps = AffineMaps(fitted.matrix.float(), fitted.offset.float())
    much = stream.capture(60_000, seed=1)
    truth = penalties(transfer_sums(stream.readout, much, maps, movement=False).kl.sum(0)) / len(much)
    covered, too_narrow, draws = [], [], 120
    for seed in range(draws):
        captured = stream.capture(640, seed=1000 + seed)
        _, first, index = np.unique(captured.window, return_index=True, return_inverse=True)
        documents, tokens = captured.document[first], np.bincount(index).astype(float)
        est = penalties(estimate_of(stream.readout, captured, maps, share=0.05, words=30, seed=seed).kl)
        exact = penalties(transfer_sums(stream.readout, captured, maps, movement=False).kl)
        clusters = np.unique(documents, return_inverse=True)[1]
        weights = bootstrap_weights(clusters.max() + 1, 400, seed)

        def bounds(sums, clusters=clusters, tokens=tokens, weights=weights):
            total, sizes = np.zeros((clusters.max() + 1, 3, 3)), np.bincount(clusters, tokens)
            np.add.at(total, clusters, sums)
            return interval(np.einsum("bc,cij->bij", weights, total) / (weights @ sizes)[:, None, None])

        low, high = bounds(est)
        covered.append((low <= truth) & (truth <= high))
        low, high = (x - exact.sum(0) / len(captured) + est.sum(0) / len(captured) for x in bounds(exact))
        too_narrow.append((low <= truth) & (truth <= high))
    off = ~np.eye(3, dtype=bool)
    right, narrow = np.mean(covered, 0)[off], np.mean(too_narrow, 0)[off]
    assert right.min() > 0.95 - 3.5 * (0.95 * 0.05 / draws) ** 0.5
    assert narrow.mean() < 0.9


def test_half_width_is_the_bootstraps():
    random = np.random.default_rng(0)
    windows, clusters = 400, 100
    documents = random.integers(0, clusters, windows)
    tokens = random.integers(4, 17, windows).astype(float)
    sums = tokens[:, None, None] * (
        random.normal(size=(clusters, 2, 2))[documents] + random.normal(size=(windows, 2, 2))
    )
    known, index = np.unique(documents, return_inverse=True)
    total, sizes = np.zeros((len(known), 2, 2)), np.zeros(len(known))
    np.add.at(total, index, sums)
    np.add.at(sizes, index, tokens)
    counts = random.multinomial(len(known), np.full(len(known), 1 / len(known)), size=20_000)
    found = np.einsum("bc,cij->bij", counts, total) / (counts @ sizes)[:, None, None]
    np.testing.assert_allclose(half_width(sums, tokens, documents), 1.96 * found.std(0), rtol=0.05)
    assert np.isinf(half_width(sums, tokens, np.zeros(windows))).all()


def test_penalties_are_taken_from_the_layers_own_lens():
    sums = np.arange(9.0).reshape(1, 3, 3)
    np.testing.assert_array_equal(penalties(sums)[0], sums[0] - np.diag(sums[0])[None, :])


def test_any_subset_is_that_part_of_the_whole_matrix():
    readout, captured, maps = stream_and_lenses()
    whole = transfer_sums(readout, captured, maps)
    part = transfer_sums(readout, captured, maps, lenses=[3, 0], layers=[2, 1, 3])
    for name in NAMES:
        np.testing.assert_allclose(
            getattr(part, name), getattr(whole, name)[:, [3, 0]][:, :, [2, 1, 3]], rtol=1e-5, atol=1e-4
        )


def test_top1_agreement_is_equality_of_the_most_probable_words():
    readout, captured, maps = stream_and_lenses()
    found = transfer_sums(readout, captured, maps).top1.sum(0)
    own = readout(captured.states[-1]).argmax(-1)
    for i in range(4):
        for j in range(4):
            x = captured.states[j] if i == 3 else captured.states[j] @ maps.matrix[i].T + maps.offset[i]
            assert found[i, j] == float((readout(x).argmax(-1) == own).sum())


def test_bad_shares_are_refused_and_small_vocabularies_read_exactly(monkeypatch):
    readout, captured, maps = stream_and_lenses(tokens=40)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(LensbenchError, match="above 0 and at most 1"):
            estimator_of(readout, captured, maps, share=share)
    assert Estimator.where_it_saves(readout, captured, maps, share=0.5, seed=(0,)) is None
    monkeypatch.setattr(estimated, "WORDS", 100)
    words = Estimator.where_it_saves(readout, captured, maps, share=0.5, seed=(0,)).by_words.words
    assert 75 <= len(words.weight) <= 100
    assert Estimator.where_it_saves(readout, captured, maps, share=1, seed=(0,)) is None


# The words


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_words_of_the_whole_vocabulary_are_exact(head, bias):
    """Each word once, none standing for others: partition, softmax and expected logit are those of the vocabulary."""
    readout, captured, _ = with_head(head, bias)
    words = Words.of(readout, torch.arange(120), torch.zeros(120), 120)
    n, of = captured.states[0], captured.states[1]
    logits, others = readout.logits(n).double(), readout.logits(of).double()
    log_z, largest = words.partition_and_largest(n)
    torch.testing.assert_close(log_z.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(largest.double(), logits.amax(-1), rtol=1e-5, atol=1e-5)
    expected = (others.softmax(-1) * logits).sum(-1)
    torch.testing.assert_close(words.expected_logit(n, of).double(), expected, rtol=1e-4, atol=1e-4)
    if readout.linear:
        q, bias_of = logits.softmax(-1), 0 if readout.bias is None else readout.bias.double()
        moment, entropy = words.softmax_moment(n)
        torch.testing.assert_close(moment.double(), q @ readout.weight.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy.double(), (q * (q.log() - bias_of)).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_sums_over_words_are_unbiased_for_sums_over_the_vocabulary(head):
    readout, captured, _ = with_head(head, bias=True)
    n = captured.states[0][:5]
    generator = torch.Generator().manual_seed(0)
    drawn = [Words.draw(readout, captured.mean_p, 40, generator) for _ in range(400)]
    assert all(len(words.weight) <= 40 and not words.offset[:30].any() for words in drawn)
    each = torch.stack([words.partition_and_largest(n)[0].exp() for words in drawn]).double()
    full = readout.logits(n).double().exp().sum(-1)
    error = each.std(0) / len(each) ** 0.5
    assert ((each.mean(0) - full).abs() < 4.5 * error).all()


def test_words_are_chosen_by_what_the_model_and_the_lenses_read_out(monkeypatch):
    readout, captured, maps = stream_and_lenses(tokens=40)
    monkeypatch.setattr(estimated, "WORDS_FROM", 16 * 40)
    found = mean_read_out(readout, captured, maps)
    each = [readout(captured.states[-1]).softmax(-1).mean(0)]
    lenses = [(maps.matrix[i], maps.offset[i]) for i in range(3)] + [(torch.eye(16), torch.zeros(16))]
    cells = [readout(h @ a.T + b).softmax(-1).mean(0) for h in captured.states for a, b in lenses]
    expected = (each[0] + torch.stack(cells).mean(0)) / 2
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)
