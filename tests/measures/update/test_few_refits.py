"""Weights of pairs and warnings where refits or held-out tokens are few."""

from types import SimpleNamespace

import numpy as np
import pytest

from lensbench.measures.update.summary import estimate, pair_weights
from lensbench.statistics import FEWEST_PER_DIRECTION, NOT_TRUSTED, few_tokens, warned_of_few_clusters


def found_of(refits, **changes):
    """A decomposition of 4 pairs of one spread over documents, whose refits of the first agree and of the others do not."""
    rng = np.random.default_rng(0)
    shares = np.zeros((refits, 4))
    shares[:, 1:] = np.linspace(-0.05, 0.05, refits)[:, None]
    made = {
        "chance": SimpleNamespace(carried=np.full(4, 0.1)),
        "draws": SimpleNamespace(carried=0.1 * rng.normal(size=(500, 4))),
        "refits": SimpleNamespace(carried=shares),
        "spread": (1,),
        "clusters": 100.0,
        "per_direction": 10.0,
    }
    return SimpleNamespace(**(made | changes))


@pytest.mark.parametrize("refits", [1, 2, 3, 4, 6])
def test_a_pair_whose_few_refits_agree_by_chance_does_not_get_all_the_weight(refits):
    weights = pair_weights(found_of(refits), np.ones(4, bool))
    assert weights.sum() == pytest.approx(1)
    assert weights[0] < 1.6 * weights[1:].mean()
    assert weights[0] >= 0.9 * weights[1:].mean()


@pytest.mark.parametrize("refits", [2, 3])
def test_weights_of_few_refits_are_those_of_the_variance_of_three_degrees_of_freedom(refits):
    found, passed = found_of(refits), np.array([True, False, True, True])
    spread = found.draws.carried.var(0) + 3 * found.refits.carried.var(0, ddof=1) + 0.1**2 + 0.1**2
    expected = 1 / spread[passed]
    np.testing.assert_allclose(pair_weights(found, passed), expected / expected.sum())


@pytest.mark.parametrize(("each", "warned"), [(1.5, True), (FEWEST_PER_DIRECTION, False), (50.0, False)])
def test_an_interval_over_few_held_out_tokens_of_a_wide_stream_is_warned_of(each, warned):
    draws = np.linspace(0, 1, 200)
    said = warned_of_few_clusters(estimate(0.5, draws, found_of(4, per_direction=each)).reason)
    assert said == few_tokens(each)
    assert bool(said) == warned
    assert not warned or ("1.5 held-out tokens" in said and said.endswith(NOT_TRUSTED))


def test_few_clusters_are_warned_of_before_few_tokens():
    found = found_of(4, per_direction=1.0, clusters=20.0)
    assert "only 20 clusters" in estimate(0.5, np.linspace(0, 1, 200), found).reason
