"""Every index against its definition in the README's table, written out with loops."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lensbench.measures import formulas
from lensbench.measures.indices import INDICES, by_distance, draw_values, estimates, seed_of_rotations
from lensbench.measures.means import Means
from lensbench.statistics import FEWEST_CLUSTERS, bootstrap_weights, interval, mean_over_seeds

seeds = st.integers(0, 10_000)
OF_MEANS = {index.name: index.value for index in INDICES.values() if index.compute is not None}


def random_means(seed=0, *, layers=5, views=3, lead=(), chosen=None):
    """Means in which every per-layer lens beats the constant distribution and nothing else is orderly.

    Of layers that are not ``chosen`` there are neither leave-one-out lenses nor pairs.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.uniform(0, 1, (*lead, *shape))

    transfer = 0.5 + draw(layers + 1, layers + 1)
    k = np.arange(layers + 1)
    transfer[..., k, k] = np.linspace(0.5, 0, layers + 1) + 0.05 * draw(layers + 1)
    own = np.linspace(1.0, 0.1, layers) + 0.2 * draw(layers)
    here = np.isin(np.arange(layers), range(layers) if chosen is None else chosen)
    paired = here[:, None] & here & ~np.eye(layers, dtype=bool)
    return Means(
        constant=3 + draw(), transfer=transfer, transfer_ce=3 + draw(layers + 1, layers + 1),
        movement=draw(layers + 1, layers + 1), own=own,
        shared=own + draw(layers), shared_loo=np.where(here, own + draw(layers), np.nan),
        rotated=own[..., None, :] + 1 + draw(views, layers),
        own_refined=own - 0.05 * draw(layers), shared_refined=own + draw(layers),
        pair=np.where(paired, own[..., None, :] + draw(layers, layers), np.nan),
        pair_rotated=np.where(paired, own[..., None, None, :] + 1 + draw(views, layers, layers), np.nan),
    )  # fmt: skip


def slow_retention(own, shared, constant):
    lost = sum(s - o for s, o in zip(shared, own, strict=True))
    return 1 - lost / sum(constant - o for o in own)


def slow_visibility(k, keep=lambda i, j: True):
    layers = len(k) - 1
    seen = gained = 0.0
    for i in range(layers):
        for j in range(i + 1, layers):
            if keep(i, j):
                seen += k[i, i] - k[i, j]
                gained += k[i, i] - k[j, j]
    return seen / gained


def slow_movement(k, d, first=0):
    layers = len(k) - 1
    pairs = [(i, j) for i in range(first, layers) for j in range(i + 1, layers)]
    return sum(d[i, j] for i, j in pairs) / sum(k[i, i] - k[j, j] for i, j in pairs)


def slow_trend(k, keep=lambda i, j: True):
    layers = len(k) - 1
    pairs = [(i, j) for i in range(layers) for j in range(layers) if i != j and keep(i, j)]
    return stats.spearmanr([k[i, j] - k[j, j] for i, j in pairs], [abs(i - j) for i, j in pairs]).statistic


def slow_pair_penalties(own, pair):
    """By pair: what its lens, which stands at [i, j] as it reads j, costs its two layers on average."""
    penalties = {}
    for i in range(len(own)):
        for j in range(i + 1, len(own)):
            if not np.isnan(pair[i, j]):
                penalties[i, j] = ((pair[j, i] - own[i]) + (pair[i, j] - own[j])) / 2
    return penalties


def slow_mean_pair_penalty(own, pair, first=0):
    known = [penalty for (i, _), penalty in slow_pair_penalties(own, pair).items() if i >= first]
    return np.mean(known) if known else np.nan


def slow_loo(m):
    known = [k for k in range(len(m.own)) if not np.isnan(m.shared_loo[k])]
    return slow_retention([m.own[k] for k in known], [m.shared_loo[k] for k in known], m.constant)


def slow_indices(m):
    rotated = np.mean([slow_retention(m.own, view, m.constant) for view in m.rotated])
    later = np.mean([slow_retention(m.own[1:], view[1:], m.constant) for view in m.rotated])
    kept = slow_retention(m.own, m.shared, m.constant)
    steps = [m.own[j + 1] - m.own[j] for j in range(len(m.own) - 1)]
    shared_steps = [m.shared[j + 1] - m.shared[j] for j in range(len(m.own) - 1)]
    k = m.transfer
    alike, anyhow = slow_mean_pair_penalty(m.own, m.pair), [slow_mean_pair_penalty(m.own, v) for v in m.pair_rotated]
    alike_later = slow_mean_pair_penalty(m.own, m.pair, first=1)
    anyhow_later = [slow_mean_pair_penalty(m.own, v, first=1) for v in m.pair_rotated]
    return {
        "constant_kl": m.constant,
        "shared_retention": kept,
        "rotated_retention": rotated,
        "loo_shared_retention": slow_loo(m),
        "shared_retention_refined": slow_retention(m.own_refined, m.shared_refined, m.constant),
        "shared_consistency": (kept - rotated) / (1 - rotated),
        "shared_retention_without_layer0": slow_retention(m.own[1:], m.shared[1:], m.constant),
        "rotated_retention_without_layer0": later,
        "shared_consistency_without_layer0": (slow_retention(m.own[1:], m.shared[1:], m.constant) - later)
        / (1 - later),
        "pair_penalty": alike,
        "pair_penalty_rotated": np.mean(anyhow),
        "pair_consistency": 1 - alike / np.mean(anyhow),
        "pair_consistency_without_layer0": 1 - alike_later / np.mean(anyhow_later),
        "gain_tracking": stats.linregress(steps, shared_steps).slope,
        "gain_visibility": slow_visibility(k),
        "gain_visibility_adjacent": slow_visibility(k, lambda i, j: j - i == 1),
        "gain_visibility_adjacent_without_layer0": slow_visibility(k, lambda i, j: j - i == 1 and i != 0),
        "gain_visibility_without_layer0": slow_visibility(k, lambda i, j: i != 0),
        "movement": slow_movement(k, m.movement),
        "movement_without_layer0": slow_movement(k, m.movement, first=1),
        "distance_trend": slow_trend(m.transfer_ce),
        "distance_trend_forward": slow_trend(m.transfer_ce, lambda i, j: i < j),
        "distance_trend_backward": slow_trend(m.transfer_ce, lambda i, j: i > j),
    }


def at(means, *where):
    return Means(**{name: values[where] for name, values in means.items()})


def some_of(layers):
    """Two of so many layers or more, or all of them."""
    return st.none() | st.sets(st.integers(0, layers - 1), min_size=2).map(sorted)


@given(seeds, st.integers(3, 7).flatmap(lambda n: st.tuples(st.just(n), some_of(n))), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_every_index_is_its_definition(seed, layers_and_chosen, views):
    """Also where leave-one-out lenses and pairs are those of some layers alone."""
    layers, chosen = layers_and_chosen
    how = {"layers": layers, "chosen": chosen, "views": views}
    m = random_means(seed, **how)
    point, _ = draw_values(m, random_means(seed + 1, **how, lead=(4,)), 0)
    expected = slow_indices(m)
    assert set(point) == set(expected)
    for name, value in expected.items():
        assert float(point[name].value) == pytest.approx(float(value), rel=1e-9, abs=1e-12, nan_ok=True), name


@given(seeds, some_of(5))
@settings(deadline=None, max_examples=20)
def test_every_pair_of_layers_has_its_own_penalty_or_none(seed, chosen):
    m = random_means(seed, chosen=chosen)
    found = formulas.pair_penalty(m.own, m.pair)
    expected = slow_pair_penalties(m.own, m.pair)
    assert len(expected) == (10 if chosen is None else len(chosen) * (len(chosen) - 1) // 2)
    order = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    np.testing.assert_allclose(found, [expected.get(pair, np.nan) for pair in order], rtol=1e-12)


@pytest.mark.parametrize("chosen", [None, (0, 2, 4)])
def test_leading_axes_are_free(chosen):
    m = random_means(3, lead=(2, 4), chosen=chosen)
    for name, function in OF_MEANS.items():
        together = function(m)
        for a in range(2):
            for b in range(4):
                alone = function(at(m, a, b))
                np.testing.assert_allclose(together.value[a, b], alone.value, rtol=1e-12, err_msg=name)
                if alone.denominator is not None:
                    np.testing.assert_allclose(together.denominator[a, b], alone.denominator, rtol=1e-12)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_layers_may_not_be_confused(seed):
    """The last row and column (the logit lens, the final state) enter no index."""
    m = random_means(seed)
    transfer, ce, moved = m.transfer.copy(), m.transfer_ce.copy(), m.movement.copy()
    for matrix in (transfer, ce, moved):
        matrix[-1], matrix[:, -1] = 99.0, 77.0
    changed = Means(**(dict(m.items()) | {"transfer": transfer, "transfer_ce": ce, "movement": moved}))
    for name, function in OF_MEANS.items():
        assert float(function(changed).value) == float(function(m).value), name


def test_known_matrices():
    """A lens that sees every later gain, one that sees none, and one that the next layer's change leaves blind."""
    base = random_means(0, layers=4)
    own = np.array([1.0, 0.7, 0.4, 0.2, 0.0])
    for matrix, expected in ((np.tile(own, (5, 1)), 1.0), (np.tile(own[:, None], (1, 5)), 0.0)):
        m = Means(**(dict(base.items()) | {"transfer": matrix}))
        for name in ("gain_visibility", "gain_visibility_adjacent", "gain_visibility_without_layer0"):
            assert float(INDICES[name].value(m).value) == pytest.approx(expected)
    m = Means(**(dict(base.items()) | {"shared": base.own, "rotated": np.tile(base.constant, (3, 4))}))
    point, _ = draw_values(m, random_means(1, layers=4, lead=(4,)), 0)
    assert float(point["shared_retention"].value) == pytest.approx(1)
    assert float(point["rotated_retention"].value) == pytest.approx(0)
    assert float(point["shared_consistency"].value) == pytest.approx(1)


# Means over clusters and the bootstrap


def random_sums(clusters, seed=0, *, spread=0.1, **how):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, clusters).astype(float)
    m = random_means(seed, **how)
    sums = {}
    for name, values in m.items():
        noise = 1 + spread * rng.normal(size=(clusters, *values.shape))
        sums[name] = tokens.reshape(-1, *[1] * values.ndim) * values * noise
    return Means(**sums), tokens


def test_means_over_clusters_weigh_by_tokens_and_by_draws():
    sums, tokens = random_sums(6)
    plain = Means.of_clusters(sums, tokens)
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 0, 1, 3, 0]], float)
    drawn = Means.of_clusters(sums, tokens, weights)
    for name, values in sums.items():
        np.testing.assert_allclose(getattr(plain, name), values.sum(0) / tokens.sum())
        np.testing.assert_allclose(getattr(drawn, name)[0], values.sum(0) / tokens.sum())
        picked = [1, 1, 3, 4, 4, 4]
        np.testing.assert_allclose(getattr(drawn, name)[1], values[picked].sum(0) / tokens[picked].sum())


@given(st.integers(1, 200), st.integers(1, 30), seeds)
@settings(deadline=None, max_examples=25)
def test_a_bootstrap_draw_takes_as_many_clusters_as_there_are(clusters, draws, seed):
    weights = bootstrap_weights(clusters, draws, seed)
    assert weights.shape == (draws, clusters)
    assert (weights.sum(1) == clusters).all()
    assert (weights >= 0).all()
    assert (weights == weights.round()).all()
    assert (weights == bootstrap_weights(clusters, draws, seed)).all()


def test_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(0).exponential(size=150)
    low, high = interval(bootstrap_weights(150, 4000, 1) @ values / 150)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert low == pytest.approx(reference.low, abs=0.06 * (reference.high - reference.low))
    assert high == pytest.approx(reference.high, abs=0.06 * (reference.high - reference.low))


def test_seeds_have_a_student_t_interval():
    values = [0.3, 0.5, 0.45, 0.7, 0.62]
    mean, low, high = mean_over_seeds(values)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == (pytest.approx(reference.low), pytest.approx(reference.high))


def test_the_spread_of_the_rotated_views_enters_their_interval():
    """With no spread over documents, what remains is the t interval of the mean over views."""
    m = random_means(2, views=6)
    same = Means(**{name: np.broadcast_to(values, (20_000, *values.shape)) for name, values in m.items()})
    _, draws = draw_values(m, same, 0)
    views = [slow_retention(m.own, view, m.constant) for view in m.rotated]
    reference = stats.ttest_1samp(views, 0).confidence_interval(0.95)
    low, high = interval(draws["rotated_retention"].value)
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.03 * width)
    assert high == pytest.approx(reference.high, abs=0.03 * width)
    consistency = (draws["shared_retention"].value - draws["rotated_retention"].value) / (
        1 - draws["rotated_retention"].value
    )
    np.testing.assert_allclose(draws["shared_consistency"].value, consistency)


# Undefined


def estimated(change=None, clusters=100, spread=0.01, seed=0):
    """Estimates of random sums, after ``change`` of the fields of their means."""
    sums, tokens = random_sums(clusters, seed, spread=0.0)
    means = dict(Means.of_clusters(sums, tokens).items())
    means |= change(means) if change else {}
    rng = np.random.default_rng(seed)
    noisy = {}
    for name, values in means.items():
        noise = 1 + spread * rng.normal(size=(clusters, *values.shape))
        noisy[name] = tokens.reshape(-1, *[1] * values.ndim) * values * noise
    sums = Means(**noisy)
    drawn = Means.of_clusters(sums, tokens, bootstrap_weights(clusters, 500, 0))
    return estimates(Means.of_clusters(sums, tokens), drawn, seed=0, clusters=clusters)


def test_everything_is_defined_and_inside_its_interval_where_nothing_is_wrong():
    found = estimated()
    assert set(found) == set(OF_MEANS)
    for name, e in found.items():
        assert e.reason == "", name
        assert e.low <= e.value <= e.high, name


def test_few_clusters_are_flagged_and_still_valued():
    assert all("clusters" in e.reason and e.value is not None for e in estimated(clusters=FEWEST_CLUSTERS - 1).values())
    assert not any(e.reason for e in estimated(clusters=FEWEST_CLUSTERS).values())


@pytest.mark.parametrize(("share", "defined"), [(0.01, False), (0.019, False), (0.025, True)])
def test_a_retention_needs_more_than_two_percent_of_the_constant(share, defined):
    def barely(means):
        layers = len(means["own"])
        own = np.full(layers, means["constant"] * (1 - share / layers))
        return {"own": own, "rotated": np.tile(means["constant"], (3, layers))}

    found = estimated(barely, spread=1e-5)
    for name in ("shared_retention", "loo_shared_retention", "rotated_retention", "shared_consistency"):
        assert (found[name].value is not None) == defined, name
        if not defined:
            assert found[name].reason.startswith("undefined")
            assert found[name].low is None
    assert found["gain_visibility"].value is not None
    assert found["constant_kl"].value is not None


@pytest.mark.parametrize(("gain", "defined"), [(-0.5, False), (0.01, False), (0.3, True)])
def test_a_matrix_index_needs_a_gain_and_a_negative_one_is_none(gain, defined):
    """``gain``: sum of G over i < j, as a share of K_0."""

    def barely(means):
        k = means["transfer"].copy()
        layers = len(k) - 1
        steps = gain * means["constant"] / sum(j - i for i in range(layers) for j in range(i + 1, layers))
        k[np.arange(layers), np.arange(layers)] = 1 - steps * np.arange(layers)
        return {"transfer": k}

    found = estimated(barely, spread=1e-4)
    for name in ("gain_visibility", "movement"):
        assert (found[name].value is not None) == defined, name
    assert found["shared_retention"].value is not None


def test_consistency_is_undefined_where_one_map_serves_random_bases():
    def wide(means):
        return {"rotated": np.tile(means["own"] + 0.01, (3, 1))}

    found = estimated(wide, spread=0.001)
    assert found["rotated_retention"].value > 0.9
    assert found["shared_consistency"].value is None
    assert "random bases" in found["shared_consistency"].reason
    assert found["shared_retention"].value is not None


@pytest.mark.parametrize(("share", "defined"), [(0.01, False), (0.025, True)])
def test_pairs_need_random_bases_that_cost_something(share, defined):
    """``share``: what a lens of two layers in random bases costs, as a share of K_0."""

    def cheap(means):
        return {"pair_rotated": np.tile(means["own"] + share * means["constant"], (3, len(means["own"]), 1))}

    found = estimated(cheap, spread=1e-5)
    assert (found["pair_consistency"].value is not None) == defined
    if not defined:
        assert "denominator" in found["pair_consistency"].reason
    assert found["pair_penalty_rotated"].value == pytest.approx(share * found["constant_kl"].value, rel=1e-2)


def test_indices_of_a_constant_stream_are_undefined_and_say_so():
    def constant(means):
        layers = len(means["own"])
        flat = np.ones((layers + 1, layers + 1))
        return {
            "own": np.ones(layers),
            "shared": np.ones(layers),
            "transfer": flat,
            "transfer_ce": flat,
            "movement": 0 * flat,
        }

    found = estimated(constant, spread=0.0)
    for name in ("gain_tracking", "gain_visibility", "movement", "distance_trend", "distance_trend_forward"):
        assert found[name].value is None, name
        assert found[name].reason.startswith("undefined"), name


def test_a_stage_is_named_for_every_index():
    assert {index.stage for index in INDICES.values()} == {"closed", "refined", "matrix", "backward", "none"}
    names = {f.name for f in fields(Means)}
    assert names == set(dict(random_means().items()))


def test_two_layers_have_one_pair_and_none_without_layer_0():
    m = random_means(0, layers=2, views=2)
    point, _ = draw_values(m, random_means(1, layers=2, views=2, lead=(4,)), 0)
    anyhow = np.mean([slow_mean_pair_penalty(m.own, view) for view in m.pair_rotated])
    expected = 1 - slow_mean_pair_penalty(m.own, m.pair) / anyhow
    assert float(point["pair_consistency"].value) == pytest.approx(expected)
    assert np.isnan(point["pair_consistency_without_layer0"].value)


def test_rotations_of_two_models_do_not_cancel_in_their_difference():
    """Each has its own; only the documents are drawn together."""
    rng = np.random.default_rng(0)
    shape = {
        "constant": (), "transfer": (4, 4), "transfer_ce": (4, 4), "movement": (4, 4), "own": (3,), "shared": (3,),
        "shared_loo": (3,), "rotated": (5, 3), "own_refined": (3,), "shared_refined": (3,), "pair": (3, 3),
        "pair_rotated": (1, 3, 3),
    }  # fmt: skip
    point = Means(**{name: 1 + 0.1 * rng.random(size) for name, size in shape.items()})
    point = replace(point, constant=np.array(3.0))
    draws = Means(**{name: np.broadcast_to(value, (4000, *value.shape)) for name, value in point.items()})

    def drawn(model):
        return draw_values(point, draws, seed_of_rotations(model, 0))[1]["rotated_retention"].value

    one, other = drawn("one"), drawn("other")
    assert np.array_equal(one, drawn("one"))
    assert abs(np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1]) < 0.1
    width = [np.subtract(*np.percentile(x, [75, 25])) for x in (one, other, one - other)]
    assert width[2] > 1.2 * max(width[:2])


@given(seed=st.integers(0, 1000), layers=st.integers(2, 6))
@settings(deadline=None, max_examples=20)
def test_visibility_and_movement_by_distance_add_up_to_those_of_all_pairs(seed, layers):
    m = random_means(seed, layers=layers)
    k, d = m.transfer, m.movement
    found = by_distance(layers)
    assert len(found) == 2 * (layers - 1)
    seen = moved = gained = 0.0
    for apart in range(1, layers):
        pairs = [(i, i + apart) for i in range(layers - apart)]
        own = sum(k[i, i] - k[j, j] for i, j in pairs)
        visible = found[f"gain_visibility_distance_{apart}"].value(m)
        assert float(visible.value) == pytest.approx(sum(k[i, i] - k[i, j] for i, j in pairs) / own)
        assert float(found[f"movement_distance_{apart}"].value(m).value) == pytest.approx(
            sum(d[i, j] for i, j in pairs) / own
        )
        seen += float(visible.value) * own
        moved += float(found[f"movement_distance_{apart}"].value(m).value) * own
        gained += own
    assert seen / gained == pytest.approx(float(INDICES["gain_visibility"].value(m).value))
    assert moved / gained == pytest.approx(float(INDICES["movement"].value(m).value))


def test_what_distance_explains_of_a_matrix_is_the_r2_of_its_means_at_each_distance():
    rng = np.random.default_rng(0)
    kl = rng.normal(size=(3, 6, 6))
    found = formulas.explained_by_distance(kl).value
    for k, one in enumerate(kl):
        cells = {(i, j): one[i, j] - one[j, j] for i in range(5) for j in range(5) if i != j}
        mean = sum(cells.values()) / len(cells)
        left = 0.0
        for (i, j), value in cells.items():
            alike = [v for (a, b), v in cells.items() if abs(a - b) == abs(i - j)]
            left += (value - sum(alike) / len(alike)) ** 2
        assert found[k] == pytest.approx(1 - left / sum((v - mean) ** 2 for v in cells.values()))


def test_a_matrix_of_distances_alone_is_explained_whole_and_one_of_noise_as_many_means_would():
    i, j = np.indices((8, 8))
    assert formulas.explained_by_distance(np.abs(i - j) ** 1.5 + 0.0).value == pytest.approx(1.0)
    noise = np.random.default_rng(1).normal(size=(4000, 8, 8))
    noise[:, range(8), range(8)] = 0.0
    assert formulas.explained_by_distance(noise).value.mean() == pytest.approx((7 - 2) / (7 * 6 - 1), abs=0.01)
