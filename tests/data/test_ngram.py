"""The n-gram baselines against the published formulas, written out slowly with dictionaries."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensbench.data.ngram import KneserNeyBigram, unigram_cross_entropy
from lensbench.errors import LensbenchError

V = 11
streams = st.lists(st.integers(0, V - 1), min_size=2, max_size=80)


def slow_kneser_ney(stream, vocab_size):
    """p(w | v) by definition, with counts kept in dictionaries."""
    pairs = Counter(itertools.pairwise(stream))
    preceders = Counter(w for _, w in pairs)

    def discount(counts):
        n1 = sum(1 for c in counts.values() if c == 1)
        n2 = sum(1 for c in counts.values() if c == 2)
        return n1 / (n1 + 2 * n2) if n1 else 0.5

    d, e = discount(pairs), discount(preceders)

    def q(w):
        return max(preceders[w] - e, 0) / len(pairs) + e * len(preceders) / len(pairs) / vocab_size

    def p(w, v):
        total = sum(c for (a, _), c in pairs.items() if a == v)
        if total == 0:
            return q(w)
        kinds = sum(1 for a, _ in pairs if a == v)
        return max(pairs[v, w] - d, 0) / total + d * kinds / total * q(w)

    return p


@given(streams)
def test_bigram_agrees_with_the_formula_written_out(stream):
    model, p = KneserNeyBigram.fit(np.array(stream), V), slow_kneser_ney(stream, V)
    expected = np.array([[p(w, v) for w in range(V)] for v in range(V)])
    np.testing.assert_allclose(np.stack([model.distribution(v) for v in range(V)]), expected, rtol=1e-12, atol=1e-15)
    contexts, targets = (a.ravel() for a in np.indices((V, V)))
    np.testing.assert_allclose(model.cross_entropy(contexts, targets), -np.log(expected.ravel()), atol=1e-10)


@given(streams, st.integers(V, 3 * V))
def test_distributions_sum_to_one_and_leave_nothing_impossible(stream, vocab_size):
    model = KneserNeyBigram.fit(stream, vocab_size)
    for context in range(vocab_size):
        p = model.distribution(context)
        assert abs(p.sum() - 1) < 1e-12
        assert p.min() > 0


def test_bigram_reaches_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(20, 0.3), size=20)
    uniform = rng.random(200_000)
    stream = np.zeros(200_000, dtype=np.int32)
    for i in range(1, len(stream)):
        stream[i] = min(np.searchsorted(np.cumsum(transition[stream[i - 1]]), uniform[i]), 19)
    contexts, targets = stream[150_000:-1], stream[150_001:]
    true = -np.log(transition[contexts, targets]).mean()
    fitted = KneserNeyBigram.fit(stream[:150_000], 20).cross_entropy(contexts, targets).mean()
    unigram = unigram_cross_entropy(stream[:150_000], contexts, targets, 20).mean()
    assert true - 0.002 < fitted < true + 0.01
    assert unigram > fitted + 0.3


@given(streams)
def test_a_repeated_pair_becomes_likelier(stream):
    v, w = stream[0], stream[1]
    before = KneserNeyBigram.fit(stream, V).distribution(v)[w]
    after = KneserNeyBigram.fit(stream + [v, w] * 200, V).distribution(v)[w]
    assert after > 0.5
    assert after > before or before > 0.9


def test_large_vocabularies_do_not_overflow():
    stream = np.array([150_000, 150_001, 150_000, 150_001, 3], dtype=np.int32)
    model = KneserNeyBigram.fit(stream, 151_936)
    assert model.distribution(150_000).argmax() == 150_001
    assert abs(model.distribution(150_001).sum() - 1) < 1e-12


def test_unigram_closed_form():
    got = unigram_cross_entropy([2, 2, 2, 0], [0, 0, 0], [2, 1, 0], vocab_size=4)
    np.testing.assert_allclose(got, [-math.log(4 / 8), -math.log(1 / 8), -math.log(2 / 8)])


@given(streams)
def test_unigram_is_a_distribution_that_ignores_contexts(stream):
    targets = np.arange(V)
    got = unigram_cross_entropy(stream, targets, targets, V)
    assert abs(np.exp(-got).sum() - 1) < 1e-12
    np.testing.assert_array_equal(got, unigram_cross_entropy(stream, targets[::-1], targets, V))


@pytest.mark.parametrize("bad", [[0, V], [-1, 0], [0.5, 1.0], [[0, 1]]])
def test_ids_that_are_no_ids_are_refused(bad):
    with pytest.raises(LensbenchError, match="train_stream"):
        KneserNeyBigram.fit(np.array(bad), V)
    with pytest.raises(LensbenchError, match="targets"):
        unigram_cross_entropy([0, 1], [0, 0], np.array(bad), V)


def test_other_mistakes_are_refused():
    model = KneserNeyBigram.fit([0, 1, 0], V)
    with pytest.raises(LensbenchError, match="2 contexts and 1 targets"):
        model.cross_entropy([0, 1], [0])
    with pytest.raises(LensbenchError, match="context is 11"):
        model.distribution(V)
    with pytest.raises(LensbenchError, match="at least 2"):
        KneserNeyBigram.fit([1], V)
