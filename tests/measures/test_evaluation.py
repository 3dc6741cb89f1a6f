"""Streams of known answer end to end; what is fitted and scored, taken up where it was interrupted, for some layers."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers.progress import Steps
from helpers.synthetic import (
    CLOSED,
    DEEP,
    DRAWS,
    HEADLINE,
    SMALL,
    SyntheticStream,
    deep,
    estimates_of,
    known,
    measure,
    random_maps,
    small,
    true_kls,
    true_token_kl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench import statistics
from lensbench.lenses import fit as fitting
from lensbench.lenses import read as reading
from lensbench.lenses import refined, refits
from lensbench.lenses.fit import Fit, fit, thinned
from lensbench.lenses.moments import Moments
from lensbench.lenses.pairs import PAIR_LENS
from lensbench.lenses.per_layer import MATRIX_LENSES, OWN
from lensbench.lenses.planning import FitContext
from lensbench.lenses.read import lens_sums, mean_kls
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.lenses.shared import SHARED_BIAS_LENS, SHARED_LENS, SHARED_LOO_LENS
from lensbench.measures.evaluate import evaluate, thinned_windows
from lensbench.measures.indices import INDICES
from lensbench.measures.means import Means
from lensbench.measures.transfer import transfer_sums
from lensbench.results import tables
from lensbench.runtime.progress import QUIET
from lensbench.runtime.stages import Pieces
from lensbench.streams.kl import sum_by_window

# Streams of known answer


def headline(kind):
    found = estimates_of(known(kind).frame)
    names = ("shared_retention", "rotated_retention", "shared_consistency", "gain_visibility", "movement")
    return {name: found[name] for name in names}


NOISES = ["fresh", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("removed", "added"))]
"""How the noise of a refined answer may differ from layer to layer"""

CARRIED = ("disjoint", "overlapping")
"""How an answer may be carried along"""


@pytest.mark.parametrize("kind", NOISES)
def test_refinement_is_consistent_and_visible(kind):
    found = headline(kind)
    assert found["shared_consistency"].low > 0.8
    assert found["gain_visibility"].low > 0.4
    assert found["movement"].low > 0.3


@pytest.mark.slow
def test_information_carried_along_in_slices_of_its_own_is_neither_visible_nor_moves():
    found = headline("disjoint")
    assert abs(found["gain_visibility"].value) < 0.05
    assert abs(found["movement"].value) < 0.05
    assert found["shared_consistency"].value > 0.8


@pytest.mark.slow
def test_information_carried_along_in_overlapping_directions_lies_between():
    found, ceiling = headline("overlapping"), headline("fresh")
    assert found["gain_visibility"].high < 0
    assert found["movement"].low > 0.5
    assert found["shared_consistency"].low > headline("rebased")["shared_consistency"].high
    assert found["shared_consistency"].high < ceiling["shared_consistency"].low


def test_a_random_basis_per_layer_is_not_consistent():
    found = headline("rebased")
    assert found["shared_consistency"].high < 0.2
    assert found["gain_visibility"].high < 0
    assert found["movement"].low > 0.5


@pytest.mark.parametrize("kind", NOISES)
def test_two_layers_that_share_a_representation_share_a_lens(kind):
    found = estimates_of(known(kind).frame)
    assert found["pair_consistency"].low > 0.85
    assert found["pair_penalty"].high < 0.05 * found["constant_kl"].value
    assert found["pair_penalty_rotated"].low > 0.2 * found["constant_kl"].value


@pytest.mark.slow
def test_two_layers_in_random_bases_share_no_more_than_the_null():
    found = estimates_of(known("rebased").frame)
    assert abs(found["pair_consistency"].value) < 0.05
    assert found["pair_penalty"].value == pytest.approx(found["pair_penalty_rotated"].value, rel=0.05)


def test_pairs_tell_which_layers_share_a_representation():
    """Layers 0 and 1 in one basis, 2 and 3 in another."""
    stream = SyntheticStream("rebased", d=24, layers=4, vocab=80)
    stream.bases[1], stream.bases[3] = stream.bases[0], stream.bases[2]
    it = measure(stream, CLOSED.model_copy(update={"rotations": 2}), tokens=(2000, 400, 800))
    rows = tables.tables([it.part("it", 0)], draws=DRAWS)["pairs.csv"]
    alike = rows.set_index(["layer_i", "layer_j"]).index.isin([(0, 1), (2, 3)])
    assert len(rows) == 6
    assert alike.sum() == 2
    assert (rows["penalty_ci_high"] < 0.25 * rows["rotated_penalty_ci_low"])[alike].all()
    assert (rows["penalty"] > 0.8 * rows["rotated_penalty"])[~alike].all()
    assert (rows["penalty"] < 1.2 * rows["rotated_penalty"])[~alike].all()


@pytest.mark.parametrize("kind", [*NOISES, "rebased", *(pytest.param(k, marks=pytest.mark.slow) for k in CARRIED)])
def test_a_rotated_view_costs_its_own_lenses_nothing(kind):
    sequences = known(kind).frame
    rows = sequences[(sequences["lens"] == "tuned") & (sequences["stage"] == "closed") & (sequences["prior"] == "zero")]
    sums = rows.pivot_table(index="document", columns=["view", "layer"], values="kl", aggfunc="sum", observed=True)
    tokens = sums.index.map(sequences[sequences["lens"] == "model"].groupby("document", observed=True)["tokens"].sum())
    weights = statistics.bootstrap_weights(len(tokens), DRAWS, 0)
    low, high = statistics.interval((weights @ sums[-1].to_numpy()) / (weights @ tokens.to_numpy(float))[:, None])
    turned = sums[0].sum().to_numpy() / tokens.to_numpy().sum()
    assert ((low <= turned) & (turned <= high)).all()
    np.testing.assert_allclose(sums[0].to_numpy(), sums[-1].to_numpy(), atol=1e-3)


def test_scored_sums_are_those_of_the_maps_that_were_fitted(tmp_path):
    it = small(0)
    it.fit.save(tmp_path)
    scored = evaluate(it.stream.readout, it.held_out, Fit.load(tmp_path))
    same_sums(scored, it.scored)
    assert list(scored.lenses) == list(it.scored.lenses)
    direct = transfer_sums(it.stream.readout, it.held_out, it.fit.headline.maps)
    np.testing.assert_array_equal(scored.matrix("kl"), direct.kl)
    np.testing.assert_array_equal(scored.constant, sum_by_window(it.held_out.constant_kl, it.held_out))


def test_the_last_step_of_a_fit_and_of_a_scoring_is_the_number_announced():
    for it in (small(0), deep(), with_loaded()):
        assert it.steps.done == sorted(it.steps.done)
        assert it.steps.done[-1] == it.steps.total
        steps = Steps()
        evaluate(it.stream.readout, it.held_out, it.fit, progress=steps)
        assert steps.done == list(range(1, steps.total + 1))


def test_jobs_have_names_of_their_own_which_are_names_of_lenses_where_they_fit_one():
    it = small(0)
    jobs = fitting.plan(FitContext.of(it.stream.readout, it.captured, it.dev, SMALL, seed=0))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == it.steps.total
    assert {str(OWN), str(SHARED_LENS), f"{PAIR_LENS}-0-2", str(SHARED_LENS.of_view(1)), "refit-1"} <= set(names)


def test_fits_do_not_depend_on_held_out_tokens_and_repeat_exactly():
    it = small(0)
    again = measure(SyntheticStream("fresh", d=16, layers=3, vocab=40, seed=0), SMALL, tokens=(640, 320, 64), seed=0)
    same_maps(again.fit, it.fit)


def test_leave_one_out_lens_never_sees_its_layer():
    """No fit and no choice on dev changes when the layer left out is replaced."""
    stream = SyntheticStream("fresh", d=16, layers=3, vocab=40)
    recipe = CLOSED.model_copy(update={"rotations": 1})
    captured = stream.capture(640, seed=1)
    dev = stream.capture(320, seed=2, constant=captured.mean_p)

    def without(layer, damage):
        def damaged(c):
            states = c.states.clone()
            if damage:
                states[layer] = torch.randn(states[layer].shape, generator=torch.Generator().manual_seed(9))
            return replace(c, states=states)

        lenses = fit(FitContext.of(stream.readout, damaged(captured), damaged(dev), recipe, seed=0))[SHARED_LOO_LENS]
        return lenses.maps.matrix[layer], lenses.record.ridge[layer]

    for layer in range(3):
        (a, ridge_a), (b, ridge_b) = without(layer, False), without(layer, True)
        assert ridge_a == ridge_b
        assert torch.equal(a, b)


def test_what_a_lens_says_of_its_kl_is_that_on_a_sample_of_the_tokens():
    """``fit_kl`` and ``dev_kl``: means over 100 tokens drawn from each split, by definition."""
    it = small(0)
    recipe = SMALL.model_copy(update={"refine_passes": 0, "record_tokens": 100})
    found = fit(FitContext.of(it.stream.readout, it.captured, it.dev, recipe, seed=0))
    some = {"fit_kl": thinned(it.captured, 100), "dev_kl": thinned(it.dev, 100)}
    for lens in (HEADLINE, OWN, SHARED_LENS, SHARED_BIAS_LENS, SHARED_LOO_LENS):
        for key, tokens in some.items():
            expected = true_kls(it.stream.readout, tokens, found[lens].maps, range(3))
            np.testing.assert_allclose(getattr(found[lens].record, key), expected, atol=1e-5, err_msg=str(lens))


@given(st.integers(1, 200), st.integers(1, 250))
@settings(deadline=None, max_examples=40)
def test_thinning_takes_as_many_tokens_as_allowed_each_once(size, allowed):
    captured = small(0).held_out.take(torch.arange(size))
    captured = replace(captured, target_bytes=np.arange(size, dtype=np.int32))
    taken = thinned(captured, allowed).target_bytes
    assert len(taken) == min(size, allowed)
    assert set(taken) <= set(range(size))
    assert (np.diff(taken) > 0).all()


@pytest.mark.parametrize("positions", [4, 8, 16, 32])
def test_thinning_prefers_no_place_within_a_sequence(positions):
    """With a step that divides the positions of a sequence, all tokens taken would stand at the same one of them."""
    it = small(0).captured
    size = len(it) // positions * positions
    places = replace(it.take(torch.arange(size)), target_bytes=np.arange(size, dtype=np.int32) % positions)
    taken = thinned(places, size // positions).target_bytes
    spread = positions / 12**0.5 / len(taken) ** 0.5
    assert abs(taken.mean() - (positions - 1) / 2) < 4 * spread
    assert len(set(taken)) > 1


# The curve over tolerances


TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.3)
CURVE = FitRecipe(
    ridges=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), pads=(0.0, 0.3, 0.6, 0.9), tolerance=0.02,
    tolerances=tuple(t for t in TOLERANCES if t != 0.02), rotations=1, pair_rotations=1, refits=0, refine_passes=0,
)  # fmt: skip


@cache
def curve_of(kind):
    """A fit and, by definition, per-token dev KLs of every layer, ridge and pad: ``[4, ridges, pads, N]``."""
    stream = SyntheticStream(kind, d=24, layers=4, vocab=80)
    captured = stream.capture(1200, seed=0)
    dev = stream.capture(320, seed=1, constant=captured.mean_p)
    lenses = fit(FitContext.of(stream.readout, captured, dev, CURVE, seed=0))
    path = RidgePath(Moments.of(captured), "identity")
    pad = pad_direction(stream.readout, captured.states[-1])
    maps = [path.solve(ridge) for ridge in CURVE.ridges]
    kls = [
        [[true_token_kl(stream.readout, dev, m.matrix[k], m.offset[k] + a * pad, k) for a in CURVE.pads] for m in maps]
        for k in range(4)
    ]
    return stream, dev, lenses, torch.stack([torch.stack([torch.stack(p) for p in layer]) for layer in kls]).numpy()


def lenses_within(fit, tolerance):
    lens = fit[MATRIX_LENSES.within(tolerance)]
    return lens.maps, lens.record


@pytest.mark.parametrize("kind", ["fresh", "overlapping", "removed"])
def test_a_larger_tolerance_takes_the_strongest_ridge_that_it_allows(kind):
    stream, dev, fit, kls = curve_of(kind)
    best_pads = kls.mean(-1).min(-1)  # [4, ridges]
    best, constant = best_pads.min(-1), float(dev.constant_kl.double().mean())
    before = np.zeros(4)
    for tolerance in TOLERANCES:
        maps, record = lenses_within(fit, tolerance)
        assert record.lens.tolerance == tolerance
        ridges = np.array(record.ridge)
        assert (ridges >= before).all()
        before = ridges
        own = np.array(true_kls(stream.readout, dev, maps, range(4)))
        allowed = best + tolerance * (constant - best)
        assert (own <= allowed + 1e-4).all()
        if tolerance == 0:
            np.testing.assert_allclose(own, best, atol=1e-4)
        for layer in range(4):
            stronger = np.array(CURVE.ridges) > ridges[layer]
            assert (best_pads[layer][stronger] > allowed[layer] - 1e-4).all()
    assert (before > lenses_within(fit, 0.0)[1].ridge).sum() >= 2


def clustered_error(values, clusters):
    """Standard error of a mean whose observations come in clusters, of unequal size."""
    mean, labels = values.mean(), np.unique(clusters)
    deviations = [sum(values[clusters == c] - mean) for c in labels]
    return np.sqrt(len(labels) / (len(labels) - 1) * sum(d**2 for d in deviations)) / len(values)


def one_error_by_hand(kls, error):
    """Of KLs ``[ridges, pads, N]`` the strongest ridge whose excess over the best has at most that error; best pads."""
    of_ridge = np.stack([kls[r, a] for r, a in enumerate(kls.mean(-1).argmin(-1))])
    best = int(of_ridge.mean(-1).argmin())
    excess = [of_ridge[r] - of_ridge[best] for r in range(best, len(of_ridge))]
    return CURVE.ridges[best + max(r for r, x in enumerate(excess) if x.mean() <= error(x))]


@pytest.mark.parametrize("kind", ["fresh", "overlapping", "removed"])
def test_lenses_within_one_standard_error_are_those_by_hand(kind):
    stream, dev, fit, kls = curve_of(kind)
    maps, record = lenses_within(fit, "1se")
    expected = [one_error_by_hand(kls[layer], lambda x: clustered_error(x, dev.document)) for layer in range(4)]
    assert record.ridge == expected
    own = true_kls(stream.readout, dev, maps, range(4))
    at = [CURVE.ridges.index(r) for r in record.ridge]
    np.testing.assert_allclose(own, [kls[k, r].mean(-1).min() for k, r in enumerate(at)], atol=1e-4)
    assert kind != "overlapping" or record.ridge != lenses_within(fit, 0.0)[1].ridge


@pytest.mark.parametrize(("alike", "stronger"), [(True, 1), (False, -1)])
def test_one_standard_error_counts_documents_and_not_tokens(alike, stronger):
    """The same tokens in documents whose tokens are alike, and in documents that each hold some of all: a larger and a
    smaller error than that of as many single tokens."""
    stream, dev, _, kls = curve_of("overlapping")
    layer = 1
    path = RidgePath(Moments.of(stream.capture(1200, seed=0)).layer([layer]), "identity")
    means = kls[layer].mean(-1).min(-1)
    best = int(means.argmin())
    far = best + (2 if alike else 1)
    order = np.argsort(kls[layer, far].min(0) - kls[layer, best].min(0))
    if not alike:
        order = np.stack([order[:160], order[:159:-1]], 1).ravel()  # low and high side by side
    document = np.repeat(np.arange(16), [12, 28] * 8)
    arranged = replace(dev.take(torch.from_numpy(order)), window=np.arange(320) // 4, document=document)
    search = DevSearch(stream.readout, arranged, CURVE, pad_direction(stream.readout, stream.states(1200, seed=0)[-1]))
    found = search.within_one_error(search.path(path.solve, [layer]), path.solve, layer).ridge
    assert found == one_error_by_hand(kls[layer][..., order], lambda x: clustered_error(x, document))
    of_tokens = one_error_by_hand(kls[layer], lambda x: x.std(ddof=1) / len(x) ** 0.5)
    assert np.sign(found - of_tokens) == stronger


# Some layers alone


def test_the_dear_lenses_are_those_of_the_chosen_layers():
    """And no other than if all layers were chosen."""
    it = deep()
    assert it.fit.summary.layers == [0, 2, 4]
    recipe = DEEP.model_copy(update={"layers": 5, "refits": 0})
    everything = fit(FitContext.of(it.stream.readout, it.captured, it.dev, recipe, seed=0))
    assert everything.summary.layers == [0, 1, 2, 3, 4]
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    at_pairs = [pairs.index(pair) for pair in ((0, 2), (0, 4), (2, 4))]
    curve = [MATRIX_LENSES.within(t) for t in (0.0, "1se", 0.05, 0.1)]
    for lens, rows in {
        **{lens: [0, 2, 4] for lens in [*curve, SHARED_LOO_LENS]},
        **dict.fromkeys([PAIR_LENS, PAIR_LENS.of_view(0), PAIR_LENS.of_view(1)], at_pairs),
        **{lens: [0, 1, 2, 3, 4] for lens in [HEADLINE, OWN]},
    }.items():
        assert len(it.fit[lens].maps) == len(rows), lens
        assert torch.equal(it.fit[lens].maps.matrix, everything[lens].maps.matrix[rows]), lens
        for column in ("ridge", "reads"):
            values = getattr(everything[lens].record, column)
            assert getattr(it.fit[lens].record, column) == [values[k] for k in rows], lens
    for n in range(2):
        assert len(it.fit[HEADLINE.of_refit(n)].maps) == len(it.fit[SHARED_LOO_LENS.of_refit(n)].maps) == 3
        assert len(it.fit[OWN.of_refit(n)].maps) == 5


def test_two_rotated_views_are_refitted_and_compared_with_their_own_first_fits():
    recipe = SMALL.model_copy(update={"rotations": 3, "refits": 1, "refine_passes": 0, "pairs": False})
    it = measure(SyntheticStream("fresh", d=12, layers=3, vocab=40, seed=5), recipe, tokens=(640, 320, 320))
    views = {
        refit: {lens.view for lens in it.fit.lenses if lens.kind == "shared" and lens.refit == refit}
        for refit in (-1, 0)
    }
    assert views == {-1: {-1, 0, 1, 2}, 0: {-1, 0, 1}}
    rotated = it.scored.refits["rotated"]
    assert rotated.shape == (2, 2, 3)
    for n, refit in enumerate((-1, 0)):
        for k in range(2):
            lens = it.fit[SHARED_LENS.of_view(k).of_refit(refit)]
            kl, _ = lens_sums(it.stream.readout, it.held_out, lens, it.fit.views)
            np.testing.assert_allclose(rotated[n, k], kl.sum(0) / len(it.held_out), rtol=1e-6)
    assert np.abs(rotated[1] - rotated[0]).max() > 1e-4


@pytest.mark.parametrize("together", [1, 100, 10**6])
def test_mean_kls_of_many_layers_at_once_are_those_of_softmaxes(together, monkeypatch):
    monkeypatch.setattr(reading, "ROW_BLOCK", together)
    it = deep()
    readout, held_out = it.stream.readout, it.held_out.take(torch.arange(0, len(it.held_out), 7))
    for lens in (it.fit.summary.headline, SHARED_LENS, SHARED_LENS.of_view(1), PAIR_LENS):
        fitted, expected = it.fit[lens], []
        for number, layers in enumerate(fitted.reads):
            maps = fitted.to_plain(number, it.fit.views)
            for k, layer in enumerate(layers):
                expected += [*true_kls(readout, held_out, maps[[k if len(maps) > 1 else 0]], (layer,))]
        found = mean_kls(readout, held_out, fitted, it.fit.views)
        np.testing.assert_allclose(found, np.ravel(expected), rtol=1e-4, atol=1e-5)


def test_pairs_are_scored_on_their_own_two_layers():
    it = deep()
    pairs = ((0, 2), (0, 4), (2, 4))
    for lens in (PAIR_LENS, PAIR_LENS.of_view(0), PAIR_LENS.of_view(1)):
        read = it.scored.lenses[lens]
        assert read.kl.shape == (len(it.scored.tokens), 6)
        assert read.cells == [cell for a, b in pairs for cell in ((b, a), (a, b))]
    kl = it.scored.lenses[PAIR_LENS].kl.sum(0) / len(it.held_out)
    for p, pair in enumerate(pairs):
        expected = true_kls(it.stream.readout, it.held_out, it.fit[PAIR_LENS].maps[[p]], pair)
        np.testing.assert_allclose(kl[2 * p : 2 * p + 2], expected, atol=1e-5)


# Loaded lenses


@cache
def with_loaded():
    stream = SyntheticStream("fresh", d=16, layers=3, vocab=40)
    recipe = SMALL.model_copy(update={"refine_passes": 0, "layers": 2})
    return measure(stream, recipe, tokens=(640, 320, 640), loaded=random_maps(3, 16, seed=4))


def test_loaded_lenses_are_the_headline_and_nothing_else_changes():
    it, loaded = with_loaded(), random_maps(3, 16, seed=4)
    headline = it.fit.headline
    assert headline.id.stage == "loaded"
    assert torch.equal(headline.maps.matrix, loaded.matrix)
    assert torch.equal(headline.maps.offset, loaded.offset)
    assert headline.record.ridge == headline.record.pad == [None] * 3
    expected = true_kls(it.stream.readout, it.dev.take(torch.arange(320)), loaded, range(3))
    np.testing.assert_allclose(headline.record.dev_kl, expected, atol=1e-5)
    assert not it.fit.summary.curve()
    fitted = fit(FitContext.of(it.stream.readout, it.captured, it.dev, it.recipe, seed=0))
    others = {lens for lens in fitted.lenses if lens.prior == "zero"}
    assert {OWN, SHARED_LENS, PAIR_LENS, PAIR_LENS.of_view(0), SHARED_LOO_LENS.of_refit(1), OWN.of_view(0)} <= others
    for lens in others:
        assert torch.equal(it.fit[lens].maps.matrix, fitted[lens].maps.matrix), lens
    for n in range(2):
        assert torch.equal(it.fit[headline.id.of_refit(n)].maps.matrix, loaded.matrix[[0, 2]])
    kl = it.scored.matrix("kl").sum(0) / len(it.held_out)
    for i in range(3):
        np.testing.assert_allclose(
            kl[i, :3], true_kls(it.stream.readout, it.held_out, loaded[[i]], range(3)), atol=1e-5
        )


def test_tables_of_loaded_lenses_say_so_and_have_no_curve():
    it = with_loaded()
    found = tables.tables([it.part("it", 0)], draws=DRAWS)
    transfer = found["transfer.csv"]
    of_lenses = transfer[transfer["lens_layer"] < 3]
    assert (of_lenses["stage"] == "loaded").all()
    assert of_lenses[["ridge", "tolerance"]].isna().all().all()
    curve = found["tolerances.csv"]
    assert list(curve["tolerance"]) == ["loaded"] * 3
    assert (curve["stage"] == "loaded").all()
    assert (curve["ridge"].str.strip() == "").all()
    assert (curve["layers"] == "0 2").all()
    own = true_kls(it.stream.readout, it.held_out, random_maps(3, 16, seed=4)[[0, 2]], [0, 2])
    np.testing.assert_allclose(curve["own_kl"], np.mean(own), atol=1e-5)
    rows = found["indices.csv"].set_index("index").loc[["gain_visibility", "movement", "distance_trend"]]
    assert (rows["stage"] == "loaded").all()
    assert rows["tolerance"].isna().all()
    # Refits do not touch lenses of others: that they do not vary would be no finding.
    assert rows[["fit_low", "fit_high"]].isna().all().all()
    assert curve[["fit_low", "fit_high"]].isna().all().all()


# Interrupted and taken up


class Interrupted(Exception):
    pass


def stop_at(step):
    """Progress that ends the work once so many steps are done."""

    def watch(done, remark):
        if done >= step:
            raise Interrupted(remark)

    return Steps(watch)


def same_maps(a, b):
    assert a.summary == b.summary
    assert set(a.lenses) == set(b.lenses)
    for lens, fitted in a.lenses.items():
        for part in ("matrix", "offset"):
            assert torch.equal(getattr(fitted.maps, part), getattr(b[lens].maps, part)), (lens, part)


def same_sums(a, b):
    """Of two scorings, bit by bit."""

    def leaves(scored):
        for lens, read in scored.lenses.items():
            for name, values in vars(read).items():
                yield f"{lens} {name}", values
        for name in ("constant", "model_ce", "tokens", "bytes"):
            yield name, getattr(scored, name)
        yield from scored.refits.items()

    x, y = dict(leaves(a)), dict(leaves(b))
    assert set(x) == set(y)
    for where, values in x.items():
        if values is None:
            assert y[where] is None, where
        else:
            np.testing.assert_array_equal(values, y[where], err_msg=where)


def cut_off(path, end):
    """A file that ends early in place of a whole one, which may still be mapped into memory."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:end])


def refuse(*args, **how):
    raise AssertionError("computed again")


def fit_in(pieces, progress=QUIET):
    it = small(0)
    context = FitContext.of(it.stream.readout, it.captured, it.dev, SMALL, seed=0, pieces=pieces, progress=progress)
    return fit(context)


def score_in(pieces, progress=QUIET):
    it = small(0)
    return evaluate(it.stream.readout, it.held_out, it.fit, pieces=pieces, progress=progress)


@pytest.fixture(scope="module")
def fitted_in_pieces(tmp_path_factory):
    """The folder of a fit that was interrupted again and again, and the fit that came of it."""
    folder = tmp_path_factory.mktemp("fit")
    total = small(0).steps.total
    kept = [0]
    for step in (1, 2, 4, 7, 8, 12, 15, 18, 21, 24, total - 1, total):
        with pytest.raises(Interrupted):
            fit_in(Pieces(folder), stop_at(step))
        kept.append(len(list(folder.iterdir())))
    assert kept == sorted(kept)
    assert len(set(kept)) > 8
    return folder, fit_in(Pieces(folder))


def test_an_interrupted_fit_ends_in_the_same_maps(fitted_in_pieces):
    same_maps(fitted_in_pieces[1], small(0).fit)


def test_what_a_fit_finished_is_not_computed_again(fitted_in_pieces, monkeypatch):
    folder, found = fitted_in_pieces
    for name in ("path", "best", "best_pad", "within_one_error"):
        monkeypatch.setattr(DevSearch, name, refuse)
    for module, name in ((refined, "refine"), (refits, "resampled_moments"), (fitting, "mean_kls")):
        monkeypatch.setattr(module, name, refuse)
    steps = Steps()
    same_maps(fit_in(Pieces(folder), steps), found)
    assert (steps.found, steps.done) == (list(range(1, steps.total + 1)), [])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_piece_of_a_fit_is_computed_anew(share, fitted_in_pieces):
    folder, found = fitted_in_pieces
    whole = {}
    within_one_error, pair = MATRIX_LENSES.within("1se"), f"{PAIR_LENS.of_view(1)}-0-2"
    for name in ("path-1", within_one_error, pair, "refit-1", "refined", f"dev_kl-{SHARED_LENS}"):
        path = folder / f"{name}.safetensors"
        whole[path] = path.read_bytes()
        cut_off(path, int(share * len(whole[path])))
    same_maps(fit_in(Pieces(folder)), found)
    assert all(path.read_bytes() == content for path, content in whole.items())


def test_an_interrupted_scoring_ends_in_the_same_sums(tmp_path, monkeypatch):
    steps = Steps()
    score_in(Pieces(tmp_path / "whole"), steps)
    folder = tmp_path / "pieces"
    for step in range(1, steps.total + 1):
        with pytest.raises(Interrupted):
            score_in(Pieces(folder), stop_at(step))
    files = list(folder.iterdir())
    same_sums(score_in(Pieces(folder)), small(0).scored)
    assert files
    with monkeypatch.context() as patch:
        for name in ("measures.transfer.score", "measures.evaluate.lens_sums"):
            patch.setattr(f"lensbench.{name}", refuse)
        same_sums(score_in(Pieces(folder)), small(0).scored)
    for path in files[::5]:
        cut_off(path, -3)
    same_sums(score_in(Pieces(folder)), small(0).scored)


# Refits on some of each window's tokens


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 14))
@settings(deadline=None, max_examples=60)
def test_windows_are_thinned_evenly(sizes, positions):
    captured = small(0).held_out.take(torch.arange(sum(sizes)))
    rows = np.repeat(3 * np.arange(len(sizes)) + 1, sizes)  # some windows have no token
    captured = replace(captured, window=rows, target_bytes=np.arange(sum(sizes), dtype=np.int32))
    taken = thinned_windows(captured, positions)
    assert (np.diff(taken.target_bytes) > 0).all()
    starts = np.cumsum([0, *sizes])
    for k, size in enumerate(sizes):
        here = taken.target_bytes[taken.window == 3 * k + 1] - starts[k]
        assert len(here) == min(positions, size)
        # No stretch without a token is longer than another by more than one, the ends aside.
        gaps = np.diff(here)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
        assert here[0] < -(-size // len(here))
        assert size - here[-1] <= -(-size // len(here))


@pytest.mark.slow
def test_refits_on_some_tokens_change_indices_by_as_much_as_on_all():
    it = small(0)
    same_sums(evaluate(it.stream.readout, it.held_out, it.fit, refit_positions=4), it.scored)  # as many as there are
    held_out = it.stream.capture(32_000, seed=77, constant=it.captured.mean_p)
    every, few = (evaluate(it.stream.readout, held_out, it.fit, refit_positions=k) for k in (None, 2))
    np.testing.assert_array_equal(few.matrix("kl"), every.matrix("kl"))
    sample = thinned_windows(held_out, 2)
    assert len(sample) == 16_000
    whole, some = Means(**every.refits), Means(**few.refits)
    np.testing.assert_allclose(some.constant, float(sample.constant_kl.double().mean()), rtol=1e-5)
    for n, refit in enumerate((-1, 0)):
        for name, lens in (("own", OWN), ("shared", SHARED_LENS), ("shared_loo", SHARED_LOO_LENS)):
            expected = true_kls(it.stream.readout, sample, it.fit[lens.of_refit(refit)].maps, range(3))
            np.testing.assert_allclose(getattr(some, name)[n], expected, atol=1e-5)
    for name in ("shared_retention", "rotated_retention", "loo_shared_retention", "gain_visibility", "movement"):
        on_all, on_some = (INDICES[name].value(m).value for m in (whole, some))
        change = np.abs(on_all[1:] - on_all[0]).max()
        atol = max(0.2 * change, 1e-3)
        np.testing.assert_allclose(on_some[1:] - on_some[0], on_all[1:] - on_all[0], atol=atol, err_msg=name)
