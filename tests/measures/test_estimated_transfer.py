"""The cheaper estimate is unbiased for the exact matrix, and intervals are what the bootstrap says they are."""

import itertools

import numpy as np
import pytest
import torch
from helpers.synthetic import SyntheticStream

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.measures import transfer
from lensbench.measures.transfer import estimated_transfer, penalties, transfer_sums
from lensbench.statistics import half_width


def stream_and_lenses(tokens=240, vocab=300, kind="overlapping"):
    stream = SyntheticStream(kind, d=16, layers=3, vocab=vocab, seed=3)
    captured = stream.capture(tokens, seed=4)
    fitted = RidgePath(Moments.of(captured), "identity").solve(0.03)
    return stream.readout, captured, AffineMaps(fitted.matrix.float(), fitted.offset.float())


def exact_mean(readout, captured, maps):
    return transfer_sums(readout, captured, maps).kl.sum(0) / len(captured)


def test_mean_over_all_samples_is_the_exact_matrix(monkeypatch):
    """Every way to draw 2 of 6 tokens, each as likely: their mean is exact to rounding, though each is far off."""
    readout, captured, maps = stream_and_lenses(tokens=40)
    captured = captured.take(torch.arange(6))
    exact = exact_mean(readout, captured, maps)
    found = []
    for chosen in itertools.combinations(range(6), 2):
        rest = [t for t in range(6) if t not in chosen]
        with monkeypatch.context() as patch:
            patch.setattr(transfer.torch, "randperm", lambda n, order=(*chosen, *rest), **_: torch.tensor(order))
            found.append(estimated_transfer(readout, captured, maps, share=1 / 3, rows=40, seed=0).mean())
    assert np.abs(np.array(found) - exact).max() > 1e-3
    np.testing.assert_allclose(np.mean(found, 0), exact, rtol=0, atol=2e-5)


def test_mean_over_seeds_is_the_exact_matrix():
    """Words and tokens drawn anew by each seed: the mean of 300 estimates lies within 4.5 standard errors everywhere."""
    readout, captured, maps = stream_and_lenses()
    exact = exact_mean(readout, captured, maps)
    found = np.array(
        [estimated_transfer(readout, captured, maps, share=0.1, rows=60, seed=s).mean() for s in range(300)]
    )
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - exact) < 4.5 * error + 1e-5).all()
    assert error.max() > 1e-5


def test_a_full_share_is_exact_and_draws_what_it_says():
    readout, captured, maps = stream_and_lenses()
    whole = estimated_transfer(readout, captured, maps, share=1.0, rows=50, seed=0)
    np.testing.assert_allclose(whole.mean(), exact_mean(readout, captured, maps), atol=2e-5)
    part = estimated_transfer(readout, captured, maps, share=0.25, rows=50, seed=0)
    assert part.drawn.sum() == round(0.25 * len(captured))
    assert part.tokens.sum() == len(captured)


def test_stated_interval_is_the_spread_over_fresh_tokens():
    """Half-widths against the spread of the estimate over independent sets of documents, tokens and words."""
    stream = SyntheticStream("overlapping", d=12, layers=2, vocab=200, seed=5)
    fitted = RidgePath(Moments.of(stream.capture(2000, seed=0)), "identity").solve(0.03)
    maps = AffineMaps(fitted.matrix.float(), fitted.offset.float())
    estimates, widths = [], []
    for seed in range(150):
        captured = stream.capture(640, seed=1000 + seed)
        found = estimated_transfer(stream.readout, captured, maps, share=0.2, rows=60, seed=seed)
        documents = np.array([captured.document[captured.window == w][0] for w in np.unique(captured.window)])
        estimates.append(penalties(found.mean()))
        widths.append(found.penalty_half_width(documents))
    spread = 1.96 * np.std(estimates, axis=0, ddof=1)
    off = ~np.eye(3, dtype=bool) & (spread > 0)
    ratio = np.mean(widths, 0)[off] / spread[off]
    assert ratio.min() > 0.8
    assert ratio.max() < 1.25


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
    means = np.einsum("bc,cij->bij", counts, total) / (counts @ sizes)[:, None, None]
    np.testing.assert_allclose(half_width(sums, tokens, documents), 1.96 * means.std(0), rtol=0.05)
    assert np.isinf(half_width(sums, tokens, np.zeros(windows))).all()


def test_penalties_are_taken_from_the_layers_own_lens():
    sums = np.arange(9.0).reshape(1, 3, 3)
    np.testing.assert_array_equal(penalties(sums)[0], sums[0] - np.diag(sums[0])[None, :])


def test_any_subset_is_that_part_of_the_whole_matrix():
    readout, captured, maps = stream_and_lenses()
    whole = transfer_sums(readout, captured, maps)
    part = transfer_sums(readout, captured, maps, lenses=[3, 0], layers=[2, 1, 3])
    for name in ("kl", "ce", "movement", "top1"):
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


def test_bad_shares_and_soft_caps_are_refused():
    readout, captured, maps = stream_and_lenses(tokens=40)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(LensbenchError, match="above 0 and at most 1"):
            estimated_transfer(readout, captured, maps, share=share, rows=50, seed=0)
    readout.softcap = 5.0
    with pytest.raises(LensbenchError, match="soft-capped"):
        estimated_transfer(readout, captured, maps, share=0.5, rows=50, seed=0)
