"""The share of exact log-partitions that widens no interval too much: what it is found from, against repeated draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.synthetic import small, true_token_kl
from helpers.words import lacks_to_first_order
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench.lenses.estimated import Estimator
from lensbench.lenses.pairs import PAIR_LENS
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.shared import SHARED_LENS
from lensbench.measures import share
from lensbench.measures.share import (
    added_ratios,
    find_share,
    influences,
    shares_of_layers,
    spread,
    token_values,
)
from lensbench.statistics import bootstrap_weights


@pytest.fixture(scope="module")
def pilot():
    it = small(0)
    estimator = Estimator.of(it.stream.readout, it.dev, it.fit.headline.maps, share=1.0, seed=(0,), words=12)
    return it, estimator, *token_values(estimator, it.fit)


def one_layer(ratio, tokens):
    (found,) = shares_of_layers([np.full((1, 1, 1), ratio)], tokens)
    return found


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1, 0.18])
def test_no_interval_is_more_than_a_tenth_wider_and_a_smaller_share_would_make_it_so(ratio):
    def times_wider(s):
        return (1 + (1 - s) / s * ratio) ** 0.5

    found = one_layer(ratio, 10**6)
    assert times_wider(found) <= 1.1
    assert times_wider(found / share.GROWTH - 0.002) > 1.1


def test_what_saves_too_little_is_exact_and_few_tokens_are_never_left_alone():
    assert one_layer(1.0, 10**6) == 1
    assert one_layer(0.0, 6400) == share.FEWEST_DRAWN / 6400
    assert one_layer(0.0, 100) == 1


def test_only_the_layers_of_a_wide_interval_get_a_large_share():
    ratios = np.zeros((4, 4, 2))
    ratios[1, 1, 0], ratios[2, 2, 0] = 0.1, 0.05
    ratios[0, 0, 1] = 0.001
    shares = shares_of_layers([ratios], 4096)
    assert shares[3] <= shares[0] < 0.02
    assert min(shares[1:3]) > 0.1


def test_values_are_those_of_the_lenses(pilot):
    it, estimator, exact, difference = pilot
    fit, readout = it.fit, it.stream.readout
    chosen = fit.summary.layers
    own, headline = fit[OWN].maps, fit.headline.maps
    for k, layer in enumerate(chosen):
        expected = true_token_kl(readout, it.dev, own.matrix[layer], own.offset[layer], layer)
        np.testing.assert_allclose(exact.own[:, k], expected, atol=1e-4)
    expected = true_token_kl(readout, it.dev, headline.matrix[chosen[0]], headline.offset[chosen[0]], chosen[-1])
    np.testing.assert_allclose(exact.transfer[:, 0, len(chosen) - 1], expected, atol=1e-4)
    shared = fit[SHARED_LENS].maps
    x = it.dev.states[chosen[1]] @ shared.matrix[0].T + shared.offset[0]
    n = readout.final_norm(x)
    short = (readout.logits(n).logsumexp(-1) - estimator.by_words.words.partition_and_largest(n)[0]).detach().double()
    alone = torch.from_numpy(exact.shared[:, 1]) - short
    lacks = lacks_to_first_order(estimator, readout.final_norm(it.dev.states[-1]), n)
    np.testing.assert_allclose(difference.shared[:, 1], short - (-(alone + lacks)).exp() * lacks, atol=1e-4)
    np.testing.assert_allclose(difference.transfer[:, -1, -1], 0, atol=1e-5)  # the model itself is known


def test_added_variance_is_that_of_repeated_draws(pilot):
    """Of R, a ratio, written out: its spread over samples of the tokens, and over resamples of the documents."""
    it, _, exact, difference = pilot
    count, share_drawn, draws = len(it.dev), 0.25, 1500
    random = np.random.default_rng(0)
    drawn = np.array([random.permutation(count)[: round(share_drawn * count)] for _ in range(draws)])

    def retention(own, shared, constant):
        return 1 - (shared - own).sum(-1) / (constant[..., None] - own).sum(-1)

    m, d = exact, difference
    own, shared = (
        (getattr(m, name) - getattr(d, name)).mean(0) + getattr(d, name)[drawn].mean(1) for name in ("own", "shared")
    )
    spread = retention(own, shared, np.full(draws, m.constant.mean())).var()
    added = influences(exact, difference)["shared_retention"].var(0)[0] / count * (1 - share_drawn) / share_drawn
    assert added == pytest.approx(spread, rel=0.2)
    index = np.unique(it.dev.document, return_inverse=True)[1]
    weights = bootstrap_weights(index.max() + 1, draws, 0)[:, index]
    own, shared, constant = (
        weights @ x / weights.sum(1, keepdims=True) for x in (m.own, m.shared, m.constant[:, None])
    )
    of_documents = np.bincount(index, influences(exact, exact)["shared_retention"][:, 0])
    assert np.square(of_documents).sum() / count**2 == pytest.approx(
        retention(own, shared, constant[:, 0]).var(), rel=0.2
    )


def test_what_layers_of_unequal_shares_add_is_that_of_repeated_nested_draws(pilot):
    """Of R again, each layer's own lens and the shared one exact at the beginning of one random order of the tokens."""
    it, _, exact, difference = pilot
    count, draws = len(it.dev), 1500
    shares = np.linspace(0.1, 0.4, exact.shared.shape[1])
    random = np.random.default_rng(1)
    drawn = [random.permutation(count) for _ in range(draws)]

    def estimates(of, apart):
        return np.stack(
            [
                (of - apart)[:, k].mean() + np.array([apart[d[: round(s * count)], k].mean() for d in drawn])
                for k, s in enumerate(shares)
            ],
            -1,
        )

    shared, own = estimates(exact.shared, difference.shared), estimates(exact.own, difference.own)
    spread_of_draws = (1 - (shared - own).sum(-1) / (exact.constant.mean() - own).sum(-1)).var()
    ratio = added_ratios(exact, difference, it.dev.document)["shared_retention"][..., 0]
    index = np.unique(it.dev.document, return_inverse=True)[1]
    of_documents = np.bincount(index, influences(exact, exact)["shared_retention"][:, 0])
    variance = np.square(of_documents).sum() * len(of_documents) / (len(of_documents) - 1) / count**2
    weights = 1 / np.maximum.outer(shares, shares) - 1
    predicted = (ratio[: len(shares), : len(shares)] * weights).sum() * variance
    assert predicted == pytest.approx(spread_of_draws, rel=0.2)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_shares_by_layer_widen_no_interval_more_than_a_tenth(seed):
    random = np.random.default_rng(seed)
    layers, tokens = int(random.integers(1, 6)), 4096
    one = np.zeros((layers, layers, 5))
    at = random.integers(0, layers, 5)
    one[at, at, np.arange(5)] = random.exponential(0.02, 5)
    root = random.normal(size=(layers, layers, 3)) * 0.05
    ratios = [one, np.einsum("jic,kic->jkc", root, root)]
    shares = shares_of_layers(ratios, tokens)
    added = 1 / np.maximum.outer(shares, shares) - 1
    for ratio in ratios:
        assert (np.einsum("jkc,jk->c", ratio, added) <= 0.2101).all()
    assert (shares >= share.FEWEST_DRAWN / tokens).all()
    assert (shares <= 1).all()


def test_a_layer_between_two_gets_the_larger_of_the_shares_that_hold_between():
    at, between = np.array([0.1, 0.4, 0.2]), np.array([0.1, 0.3, 0.15])
    assert spread(at, between, [0, 2, 5]) == (0.1, 0.3, 0.4, 0.3, 0.3, 0.2)


def test_what_only_pairs_ask_for_is_not_asked_of_layers_between(pilot, monkeypatch):
    """An interval of a pair at the first chosen layer is made wide: that layer alone gets a larger share."""
    it, estimator, exact, difference = pilot
    layers = len(it.fit.summary.layers) + 1
    wide = np.zeros((layers, layers, 1))
    wide[0, 0] = 0.05
    monkeypatch.setattr(share, "token_values", lambda *_: (exact, difference))
    found = {}
    for name in ("kl", *share.OF_PAIRS):
        monkeypatch.setattr(share, "added_ratios", lambda *_, name=name: {"ce": np.full_like(wide, 1e-9), name: wide})
        found[name] = find_share(estimator, it.fit, 10**6).of_layers
    first, after = it.fit.summary.layers[:2]
    for name, of_layers in found.items():
        assert of_layers[first] > 0.1, name
        assert all((of > 0.1) == (name == "kl") for of in of_layers[first + 1 : after]), name
        assert max(of_layers[after:]) < 0.01


def test_a_fit_without_pairs_has_a_share_by_its_other_intervals(pilot):
    it, estimator, exact, _ = pilot
    lenses = {lens: fitted for lens, fitted in it.fit.lenses.items() if lens.kind != PAIR_LENS.kind}
    alone = replace(it.fit, lenses=lenses, summary=it.fit.summary.model_copy(update={"pair_rotations": 0}))
    without, _ = token_values(estimator, alone)
    assert np.isnan(without.pair).all()
    assert np.isnan(without.pair_rotated).all()
    np.testing.assert_array_equal(without.transfer, exact.transfer)
    found = find_share(estimator, alone, 10**6)
    assert 0 < found.share <= 1
    assert "pair" not in found.widest


def test_the_widest_interval_decides(pilot, monkeypatch):
    it, estimator, exact, difference = pilot
    monkeypatch.setattr(share, "token_values", lambda *_: (exact, difference))
    monkeypatch.setattr(share, "LARGEST_SHARE", 1.0)
    found = find_share(estimator, it.fit, 10**6)
    assert found.tokens == len(it.dev)
    assert found.documents == len(np.unique(it.dev.document))
    whole, extra = influences(exact, exact), influences(exact, difference)
    own = np.array([np.bincount(it.dev.document, x) for x in whole[found.widest].T])
    variance = np.square(own).sum(1) * found.documents / (found.documents - 1) / found.tokens**2
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.nanmax(extra[found.widest].var(0) / found.tokens / variance)
    assert found.ratio == pytest.approx(ratio, rel=1e-4)
    assert len(found.of_layers) == it.dev.layers + 1
    assert found.share == pytest.approx(np.mean(found.of_layers), abs=1e-4)
    assert found.share <= share.GROWTH * ratio / (ratio + share.WIDER**2 - 1) + 0.001
    at_chosen = np.array(found.of_layers)[[*it.fit.summary.layers, it.dev.layers]]
    added = 1 / np.maximum.outer(at_chosen, at_chosen) - 1
    for ratios in added_ratios(exact, difference, it.dev.document).values():
        assert (np.einsum("jkc,jk->c", ratios, added) <= share.WIDER**2 - 1 + 1e-9).all()
    assert "distance_trend" not in whole  # rank correlations have no derivative
    assert {"penalty_kl", "penalty_ce", "kl", "pair_penalty_of_pairs", "shared_consistency", "gain_visibility"} <= set(
        whole
    )


def test_with_one_dev_document_nothing_is_known_and_all_is_exact(pilot):
    it, estimator, *_ = pilot
    one = replace(estimator, captured=replace(estimator.captured, document=np.zeros_like(it.dev.document)))
    found = find_share(one, it.fit, 10**6)
    assert (found.share, found.widest, found.documents) == (1.0, "", 1)
