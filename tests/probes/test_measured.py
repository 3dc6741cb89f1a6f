"""Intervals of probes over documents: as often right as they say, with few clusters and unequal ones; and reasons."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.planted import text
from scipy import stats

from lensbench.probes.measured import Sums
from lensbench.statistics import bootstrap_weights, effective_clusters, interval, small_sample_interval


def samples(documents):
    names = tuple(f"doc{k}" for k in range(max(documents) + 1))
    return SimpleNamespace(document_names=names, documents=np.array(documents))


def frame_of(documents, draws=200, **quantities):
    sums = Sums("a", samples(documents), np.ones(len(documents)))
    for name, (top, bottom, floor) in quantities.items():
        sums.add(name, np.array(top, float), np.array(bottom, float), floor=floor)
    return sums.measured().frame(draws, {f"doc{k}": str(k) for k in documents}).set_index("quantity")


def test_the_effective_number_of_clusters_is_kishs():
    assert effective_clusters(np.repeat(np.arange(9), 4)) == pytest.approx(9)
    assert effective_clusters(np.array([7, 7, 7, 2])) == pytest.approx(16 / 10)
    assert effective_clusters(np.array([0, 1, 0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(2)


@pytest.mark.parametrize("sizes", [[10] * 5, [10] * 8, [100] * 4 + [5] * 40], ids=["five", "eight", "unequal"])
def test_intervals_over_few_or_unequal_clusters_are_right_as_often_as_they_say(sizes):
    sizes = np.array(sizes, float)
    clusters = effective_clusters(np.arange(len(sizes)), sizes)
    rng, weights, right = np.random.default_rng(0), bootstrap_weights(len(sizes), 400, 0), np.zeros(2)
    tops = sizes * rng.standard_normal((600, len(sizes)))
    drawn = (weights @ tops.T) / (weights @ sizes)[:, None]
    value = tops.sum(1) / sizes.sum()
    for k, (low, high) in enumerate((interval(drawn), small_sample_interval(value, drawn, clusters))):
        right[k] = ((low <= 0) & (high >= 0)).mean()
    assert 0.92 <= right[1] <= 0.98
    assert right[0] < 0.92, "percentiles alone are too short"


def test_the_correction_of_many_clusters_is_small_and_of_few_that_of_students_t():
    value, drawn = np.zeros(1), np.random.default_rng(0).standard_normal((4000, 1))
    low, high = interval(drawn)
    for clusters in (5, 64):
        found = small_sample_interval(value, drawn, clusters)
        factor = stats.t.ppf(0.975, clusters - 1) / stats.norm.ppf(0.975) * np.sqrt(clusters / (clusters - 1))
        assert (found[0] / low, found[1] / high) == pytest.approx((factor, factor))
    assert factor < 1.03


def test_one_document_that_outweighs_all_others_leaves_no_interval():
    documents = [0] * 60 + list(range(1, 20))
    row = frame_of(documents, x=(np.random.default_rng(0).standard_normal(79), np.ones(79), 0.0)).loc["x"]
    assert row["ci_low"] is None
    assert "count for 1.7 clusters" in row["reason"]
    assert np.isfinite(row["value"])


def test_whatever_is_not_a_number_says_why():
    n = 12
    one, zero, some = np.ones(n), np.zeros(n), np.array([1.0] + [0] * (n - 1))
    rows = frame_of(
        range(n),
        broken=(np.where(some > 0, np.nan, 1), one, 0.0),
        nothing=(one, zero, 0.0),
        seldom=(np.arange(n), some, 0.0),
        small=(one, one, 5.0),
        alike=(one, one, 0.0),
        plain=(np.arange(n), one, 0.0),
    )
    told = {
        "broken": "not a number in some windows",
        "nothing": "nothing to take a share of",
        "seldom": "in some draws",
        "small": "reaches below 5",
        "alike": "the same for every document",
        "plain": "only 12 clusters",
    }
    for name, reason in told.items():
        assert reason in rows.loc[name, "reason"], name
        assert np.isfinite(float(rows.loc[name, "ci_low"] or np.nan)) == (name == "plain")
    assert set(rows.index[rows["value"].isna()]) == {"broken", "nothing", "small"}


def test_a_text_that_holds_every_document_twice_has_no_shorter_intervals():
    once = text(3, 40)
    twice = replace(
        once.take(np.tile(np.arange(40), 2)),
        documents=np.concatenate([once.documents, once.documents + 20]),
        document_names=(*once.document_names, *(f"{name} again" for name in once.document_names)),
    )
    values = np.random.default_rng(0).standard_normal(40)
    widths = []
    for windows, repeats in ((once, 1), (twice, 2)):
        sums = Sums("a", windows, np.ones(40 * repeats))
        sums.add("x", np.tile(values, repeats))
        row = sums.measured().frame(400).iloc[0]
        widths.append(row["ci_high"] - row["ci_low"])
        assert row["value"] == pytest.approx(values.mean())
        assert "only 20 clusters" in row["reason"]
    assert widths[1] == pytest.approx(widths[0])
