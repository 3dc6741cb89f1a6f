"""The update decomposition against its definition, written out in numpy with no code in common."""

import numpy as np
import pytest
import torch
from torch import nn

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import decompose, index_estimates
from lensbench.measures.update.chance import chance_and_products, chance_of_persistence, principal_space
from lensbench.measures.update.folds import deal_documents, fold_moments, folds_and_halves, readings
from lensbench.measures.update.held import HeldOut
from lensbench.measures.update.metric import Metric
from lensbench.measures.update.news import Unread
from lensbench.measures.update.products import (
    Products,
    SecondMoments,
    cluster_products,
    later_readings_of_moments,
    layer_products_of_moments,
    means_of,
    pairs_of,
    products_of_moments,
)
from lensbench.measures.update.quantities import Chance, quantities
from lensbench.streams.readout import ReadOut
from lensbench.studies.synthetic import Shape, SyntheticStream, capture_of

RECIPE = FitRecipe(ridges=(1e-2, 1.0, 100.0), pads=(0.0, 0.3))
WIDE = FitRecipe(ridges=(1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0), pads=(0.0, 0.2, 0.4, 0.6))
SMALL = Shape(d=12, layers=3, vocab=40)


def captures(family, shape=SMALL, tokens=(1200, 600, 800), seed=0):
    stream = SyntheticStream(family, shape, seed=seed)
    fit = stream.capture(tokens[0], seed=1)
    rest = [stream.capture(n, seed=k + 2, constant=fit.mean_p) for k, n in enumerate(tokens[1:])]
    return stream.readout, fit, *rest


def by_definition(readout, fit, held_out, ridges, folds):
    """r, s, f as the definitions say, in float64 numpy; every product averaged over (a, b) and (b, a)."""
    gain = readout.gain(fit.states.shape[-1]).double().numpy()
    weight, p = readout.weight.double().numpy(), fit.mean_p.double().numpy()
    aims = fit.expected.double().numpy()
    metric = gain.T @ (weight.T @ (p[:, None] * weight) - aims.T @ aims / len(aims)) @ gain
    values, vectors = np.linalg.eigh(metric)
    values, vectors = values[values > 1e-9 * values[-1]], vectors[:, values > 1e-9 * values[-1]]
    factor = np.sqrt(values)[:, None] * vectors.T
    count = fit.layers
    fold_of = folds[fit.document]
    states = fit.states.double().numpy()

    def cov(x, y):
        return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)

    read = np.empty((2, count), dtype=object)
    signal, apart = np.empty((2, count), dtype=object), np.empty((2, count), dtype=object)
    third = states[:, fold_of == 2]
    of_target = np.linalg.pinv(cov(third[-1] @ factor.T, third[-1] @ factor.T), rcond=1e-9, hermitian=True)
    for fold in (0, 1):
        own = states[:, fold_of == fold]
        for i in range(count):
            c = cov(own[i], own[i])
            spectrum = np.linalg.eigvalsh(c)
            # The median of torch, the lower one of two in the middle, of what is not null.
            spectrum = spectrum[spectrum > 1e-10 * spectrum[-1]]
            unit = spectrum[(len(spectrum) - 1) // 2]
            lens = cov(own[-1], own[i]) @ np.linalg.inv(c + ridges[i] * unit * np.eye(len(c)))
            read[fold, i] = factor @ lens
            signal[fold, i] = cov(third[i] @ read[fold, i].T, third[-1] @ factor.T) @ of_target
            # For squares, from every other document of the third fold, and from the rest.
            rank_in_third = np.cumsum(folds == 2)[fit.document]
            half = states[:, (fold_of == 2) & (rank_in_third % 2 == fold)]
            goal = half[-1] @ factor.T
            apart[fold, i] = cov(half[i] @ read[fold, i].T, goal) @ np.linalg.pinv(
                cov(goal, goal), rcond=1e-9, hermitian=True
            )
    x = held_out.states.double().numpy()
    x = x - x.mean(1, keepdims=True)
    return read, signal, apart, factor, x


def crossed(left, right):
    """Mean over tokens of the products of two folds' readings, and over both orders."""
    return ((left[0] * right[1]).sum(-1).mean() + (left[1] * right[0]).sum(-1).mean()) / 2


@pytest.mark.parametrize("family", ["fresh", "overlapping", "partly-carried"])
def test_carried_persistence_clarity_and_commission_are_those_of_the_definition(family):
    readout, fit, dev, held_out = captures(family)
    found = decompose(readout, fit, dev, held_out, RECIPE, refits=0, readable=False)
    folds = deal_documents(fit, 0)
    read, signal, apart, factor, x = by_definition(readout, fit, held_out, found.ridges, folds)
    rank = principal_space(SecondMoments.of(held_out.states, [0, 1, 2], means_of(held_out.states, [0, 1, 2, 3]))).shape[
        1
    ]
    pooled = sum(h.T @ h / len(h) for h in x[:3]) / 3
    space = np.linalg.eigh(pooled)[1][:, -rank:]
    goal = x[-1] @ factor.T
    for at, (i, j) in enumerate(zip(*found.pairs, strict=True)):
        r = [x[i] @ read[k, i].T for k in (0, 1)]
        s = [x[j] @ read[k, i].T for k in (0, 1)]
        new = [x[j] @ read[k, j].T for k in (0, 1)]
        f = [goal @ signal[k, i].T for k in (0, 1)]

        def loading(z, r=r, f=f):
            return crossed(z, r) / crossed(z, f)

        carried = (loading(s) - loading(new)) / (loading(r) - loading(new))
        assert found.point.carried[at] == pytest.approx(carried, abs=2e-4)
        assert found.point.persistence[at] == pytest.approx(crossed(s, f) / crossed(r, f), rel=1e-4)
        assert found.point.room[at] == pytest.approx(1 - (loading(new) - 1) / (loading(r) - 1), abs=2e-4)
        # X = U^T E[h_j f^T] F A U / <r, f>, mean square of both orders.
        square = np.mean(
            [np.square(space.T @ (x[j].T @ f[1 - k] / len(x[j])) @ read[k, i] @ space).sum() / rank for k in (0, 1)]
        )
        chance = np.sqrt(square) / crossed(r, f)
        assert found.chance.persistence[at] == pytest.approx(chance, rel=1e-3)
        gram = np.array([[crossed(r, r), crossed(r, new)], [crossed(r, new), crossed(new, new)]])
        with_s = np.array([crossed(s, r), crossed(s, new)])
        explained = with_s @ np.linalg.solve(gram, with_s) / crossed(s, s)
        base = 2 * chance**2 * crossed(r, f) / crossed(s, s)
        clarity = np.sqrt(max(0, (np.clip(explained, 0, 1) - base) / (1 - base)))
        assert found.point.clarity[at] == pytest.approx(clarity, abs=2e-4)
        g = [goal @ apart[k, i].T for k in (0, 1)]
        error = crossed(r, r) - 2 * crossed(r, f) + crossed(g, g)
        missed = [goal - r[k] for k in (0, 1)]
        assert found.point.commission[i] == pytest.approx(error / crossed(missed, missed), rel=1e-3)
        moved = x[j] - x[i]
        spread = []
        for k in (0, 1):
            of_r = space.T @ (moved.T @ r[1 - k] / len(moved)) @ read[k, i] @ space
            of_f = space.T @ (moved.T @ f[1 - k] / len(moved)) @ read[k, i] @ space
            spread.append(np.square((of_r - loading(r) * of_f) / crossed(r, f)).sum() / rank)
        scale = abs(loading(r) - loading(new)) * abs(crossed(s, f) / crossed(r, f))
        assert found.chance.carried[at] == pytest.approx(np.sqrt(np.mean(spread)) / scale, rel=2e-3)


@pytest.mark.parametrize("tokens", [6, None])
def test_products_of_tokens_are_those_of_second_moments(tokens):
    readout, fit, _, held_out = captures("overlapping")
    held_out = held_out if tokens is None else held_out.take(torch.arange(tokens))
    layers = [0, 2]
    maps = readings(fold_moments(fit, layers, deal_documents(fit, 3)), Metric.of("fisher", readout, fit), [0.1, 1.0])
    means = means_of(held_out.states, [0, 2, 3])
    cluster = torch.from_numpy(held_out.document)
    clusters = int(held_out.document.max()) + 1
    of_tokens = cluster_products(held_out.states, layers, means, cluster, clusters, maps).total()
    moments = SecondMoments.of(held_out.states, layers, means)
    of_layer, target = layer_products_of_moments(moments, maps)
    known = later_readings_of_moments(moments, maps)
    assert ("jr" in known) == (tokens is not None)  # of few tokens, from their readings
    of_pair = products_of_moments(moments, 0, moments.later(0), maps, known, of_layer)
    tokens = len(held_out)
    for name, values in of_pair.items():
        np.testing.assert_allclose(of_tokens.pair[name] / tokens, values, rtol=1e-4, err_msg=name)
    for name, values in of_layer.items():
        np.testing.assert_allclose(of_tokens.layer[name] / tokens, values, rtol=1e-4, err_msg=name)
    assert of_tokens.target / tokens == pytest.approx(target, rel=1e-5)


def test_what_gates_ask_for_is_the_same_without_old_readings():
    readout, fit, _, held_out = captures("overlapping")
    layers = [0, 1, 2]
    maps = readings(fold_moments(fit, layers, deal_documents(fit, 3)), Metric.of("fisher", readout, fit), [0.1] * 3)
    held = HeldOut.of(held_out, layers)
    whole, some = held.products(maps), held.products(maps, old=False)
    for name in ("uf", "vr", "vf", "vv"):
        np.testing.assert_allclose(some.pair[name], whole.pair[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert all(np.isnan(some.pair[name]).all() for name in ("ur", "uu", "uv"))
    chance = Chance(np.full(3, 0.1), np.full(3, np.nan))
    for one, other in zip(held.quantities(whole, chance), held.quantities(some, chance), strict=True):
        for name in ("room", "persistence"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-3, err_msg=name)


def test_chance_of_persistence_alone_is_that_of_both():
    readout, fit, _, held_out = captures("overlapping")
    layers = [0, 1, 2]
    maps = readings(fold_moments(fit, layers, deal_documents(fit, 3)), Metric.of("fisher", readout, fit), [0.1] * 3)
    held = HeldOut.of(held_out, layers)
    moments = SecondMoments.of(held_out.states, layers, held.means)
    (both,), _ = chance_and_products(moments, [maps], [])
    signal = held.products(maps).total().layer["rf"] / len(held_out)
    alone = chance_of_persistence(moments, maps, signal)
    np.testing.assert_allclose(alone.persistence, both.persistence, rtol=1e-4)
    assert np.isnan(alone.carried).all()
    assert np.isfinite(both.carried).all()


def test_a_variant_is_the_decomposition_without_the_chance_of_what_is_carried():
    given = captures("overlapping")
    one, other = (decompose(*given, RECIPE, refits=0, readable=False, variant=variant) for variant in (False, True))
    for a, b in ((one.point, other.point), (one.draws, other.draws)):
        for name, values in vars(a).items():
            np.testing.assert_allclose(values, getattr(b, name), rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.isnan(other.chance.carried).all()


@pytest.mark.parametrize("unread", range(8))
def test_unread_parts_are_measured_by_whichever_directions_are_fewer(unread):
    rng = np.random.default_rng(unread)
    basis = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    explained = basis @ np.diag([0.05] * unread + [0.5] * (7 - unread)) @ basis.T
    vectors = rng.standard_normal((3, 20, 7))
    found = Unread.of(torch.from_numpy(explained))
    squares = found.squares(torch.from_numpy(vectors), torch.from_numpy((vectors**2).sum(-1)))
    expected = np.square(vectors @ basis[:, :unread]).sum(-1)
    np.testing.assert_allclose(squares, expected, atol=1e-12)
    np.testing.assert_allclose(found.projection, basis[:, :unread] @ basis[:, :unread].T, atol=1e-12)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_third_fold_is_its_halves_together(drawn):
    _, fit, _, _ = captures("fresh")
    folds, layers = deal_documents(fit, 1), [0, 2]
    counts = np.arange(len(folds)) % 3 if drawn else None
    moments, halves = folds_and_halves(fit, layers, folds, counts)
    for found, expected in zip(moments, fold_moments(fit, layers, folds, counts), strict=True):
        for name in ("mean", "covariance", "cross", "target_mean"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-7)
    third = np.flatnonzero(folds == 2)
    for half, documents in zip(halves, (third[1::2], third[::2]), strict=True):
        times = np.isin(fit.document, documents) * (1 if counts is None else counts[fit.document])
        own = np.repeat(fit.states.double().numpy(), times, axis=1)
        np.testing.assert_allclose(half.covariance[1], np.cov(own[2].T, bias=True), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(half.target_mean, own[-1].mean(0), rtol=1e-5, atol=1e-6)


def test_with_one_document_in_the_third_fold_each_half_is_the_whole():
    _, fit, _, _ = captures("fresh")
    folds = np.where(np.arange(int(fit.document.max()) + 1) == 4, 2, np.arange(int(fit.document.max()) + 1) % 2)
    moments, (first, second) = folds_and_halves(fit, [0], folds)
    assert first is second is moments[2]


def test_a_cluster_holds_its_own_tokens_alone():
    readout, fit, _, held_out = captures("fresh")
    maps = readings(fold_moments(fit, [0, 1], deal_documents(fit, 0)), Metric.of("fisher", readout, fit), [1.0, 1.0])
    means = means_of(held_out.states, [0, 1, 3])
    number = torch.from_numpy(held_out.document)
    whole = cluster_products(held_out.states, [0, 1], means, number, int(number.max()) + 1, maps)
    own = number == 5
    alone = cluster_products(held_out.states[:, own], [0, 1], means, number[own] * 0, 1, maps)
    for name, values in whole.pair.items():
        np.testing.assert_allclose(values[5], alone.pair[name][0], rtol=1e-5)


def test_what_a_reading_says_does_not_depend_on_the_coordinates_of_a_layer():
    """An invertible map of one layer's states changes no reading of its own (without a ridge), so no carried share."""
    readout, fit, dev, held_out = captures("overlapping", tokens=(4000, 1000, 2000))
    scale = 3.0
    plain = decompose(readout, fit, dev, held_out, RECIPE, refits=0, readable=False)

    def scaled(captured):
        states = captured.states.clone()
        states[:-1] *= scale
        return type(captured)(**{**vars(captured), "states": states})

    turned = decompose(readout, *(scaled(c) for c in (fit, dev, held_out)), RECIPE, refits=0, readable=False)
    np.testing.assert_allclose(turned.point.carried, plain.point.carried, atol=1e-3)
    np.testing.assert_allclose(turned.point.clarity, plain.point.clarity, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "carried", "clarity"),
    [("fresh", 0.0, 1.0), ("averaged", 0.0, 1.0), ("disjoint", 1.0, 1.0), ("overlapping", 1.0, None)],
)
def test_families_of_known_answer_get_it(family, carried, clarity):
    readout, fit, dev, held_out = captures(family, Shape(d=48, layers=5), (4096, 1024, 2048))
    found = index_estimates(decompose(readout, fit, dev, held_out, WIDE, refits=2, readable=False))
    assert found["carried_without_layer0"].value == pytest.approx(carried, abs=0.15)
    assert found["in_place_without_layer0"].value == pytest.approx(1 - carried, abs=0.15)
    if clarity is not None:
        assert found["clarity_without_layer0"].value == pytest.approx(clarity, abs=0.03)


def test_a_new_basis_at_every_layer_keeps_nothing_and_its_shares_are_undetermined():
    readout, fit, dev, held_out = captures("rebased", Shape(d=48, layers=5), (4096, 1024, 2048))
    found = index_estimates(decompose(readout, fit, dev, held_out, WIDE, refits=0, readable=False))
    assert found["kept_high"].value == pytest.approx(0, abs=0.05)
    assert found["carried"].value is None
    assert "reads no more of its signal at the later layer than it would by chance" in found["carried"].reason


def test_updates_of_random_directions_lie_within_their_analytic_chance():
    """sd of S under Haar rotations of the later layer, drawn, against the closed form."""
    readout, fit, dev, held_out = captures("fresh", tokens=(2000, 600, 1500))
    found = decompose(readout, fit, dev, held_out, RECIPE, refits=0, readable=False)
    read, signal, _, factor, x = by_definition(readout, fit, held_out, found.ridges, deal_documents(fit, 0))
    pooled = sum(h.T @ h / len(h) for h in x[:3]) / 3
    values, vectors = np.linalg.eigh(pooled)
    keep = int((np.cumsum(values[::-1]) / values.sum() < 0.99).sum()) + 1
    space = vectors[:, -keep:]
    goal = x[-1] @ factor.T
    f = [goal @ signal[k, 0].T for k in (0, 1)]
    own = crossed([x[0] @ read[k, 0].T for k in (0, 1)], f)
    drawn, rng = [], np.random.default_rng(0)
    for _ in range(400):
        q, upper = np.linalg.qr(rng.normal(size=(keep, keep)))
        q = q * np.sign(np.diag(upper))
        turned = x[1] @ space @ q @ space.T
        drawn.append(crossed([turned @ read[k, 0].T for k in (0, 1)], f) / own)
    assert np.mean(drawn) == pytest.approx(0, abs=3 * np.std(drawn) / 20)
    # The closed form squares each order; the mean of both orders varies a little less.
    assert np.std(drawn) == pytest.approx(found.chance.persistence[0], rel=0.12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_fisher_metric_is_the_mean_hessian_of_the_divergence(softcap):
    """Against autograd: KL(p(h) || p(h + delta)) has Hessian G at delta = 0 where the norm passes states on as they are."""
    torch.manual_seed(0)
    head = nn.Linear(5, 17, bias=True)
    readout = ReadOut(nn.Identity(), head, softcap=softcap).requires_grad_(False)
    states = torch.randn(1, 40, 5).repeat(3, 1, 1) * 2
    captured = capture_of(readout, states)
    found = Metric.of("fisher", readout, captured)
    total = torch.zeros(5, 5, dtype=torch.float64)
    wide = ReadOut(nn.Identity(), nn.Linear(5, 17).double(), softcap=softcap)
    wide.unembedding.weight.data, wide.unembedding.bias.data = head.weight.double(), head.bias.double()
    for h in states[-1].double():
        own = wide(h).log_softmax(-1)

        def divergence(delta, h=h, own=own):
            return (own.exp() * (own - wide(h + delta).log_softmax(-1))).sum()

        total += torch.autograd.functional.hessian(divergence, torch.zeros(5, dtype=torch.float64)).detach() / 40
    inner = found.factor.T @ found.factor
    # The gain of a norm is known up to a factor.
    np.testing.assert_allclose((inner / inner.trace()).numpy(), (total / total.trace()).numpy(), atol=1e-4)
    assert found.name == ("fisher" if softcap is None else "fisher, soft-capped")


def test_two_documents_are_too_few_for_three_folds():
    readout, fit, dev, held_out = captures("fresh", tokens=(16, 600, 800))
    with pytest.raises(LensbenchError, match="2 fitting documents, and lenses and signal need 3 folds"):
        decompose(readout, fit, dev, held_out, RECIPE, refits=0, readable=False)


def test_a_head_whose_norm_is_no_gain_has_no_metric():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    _, fit, dev, held_out = captures("fresh")
    readout = ReadOut(Square(), nn.Linear(12, 40)).requires_grad_(False)
    with pytest.raises(LensbenchError, match="the final norm is not a matrix over a scale"):
        decompose(readout, fit, dev, held_out, RECIPE, refits=0, readable=False)


def test_the_same_seed_gives_the_same_numbers():
    readout, fit, dev, held_out = captures("overlapping")
    one, two = (
        index_estimates(decompose(readout, fit, dev, held_out, RECIPE, refits=2, readable=False, seed=7))
        for _ in range(2)
    )
    assert one == two


def test_pairs_come_in_the_order_of_their_first_layer():
    i, j = pairs_of(4)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_a_reading_that_chance_could_make_has_no_clarity():
    """Were chance alone to explain more than there is, or were the square of the reading noise below 0, R is 0."""
    layer = {name: np.array([1.0, 1.0]) for name in ("rr", "rf", "ff", "rT", "fT")}
    pair = {"ur": -0.1, "uf": -0.5, "uv": 0.1, "vr": -0.1, "vf": -0.2, "vv": 0.2}
    pairs = pairs_of(2)
    for square, chance in ((1.0, 3.0), (-0.1, 0.1)):
        products = Products({k: np.array([v]) for k, v in (pair | {"uu": square - 0.8}).items()}, layer, np.array(2.0))
        found = quantities(products, pairs, Chance(np.array([chance]), np.array([0.1])))
        assert found.clarity[0] == 0
