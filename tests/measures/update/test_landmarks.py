"""Views of a stream, read by the decomposition and chosen as their definitions say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.two_processes import in_two

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import decompose
from lensbench.measures.update.result import choices_in
from lensbench.measures.update.views import LANDMARKS, FittedView, ViewContext, fit_view, grown_copies
from lensbench.streams.views import random_bases
from lensbench.studies.synthetic import Shape, SyntheticStream

RECIPE = FitRecipe(ridges=(1e-3, 1e-1, 10.0), pads=(0.0, 0.5), refits=0, layers=4)
SMALL = Shape(d=16, layers=4, vocab=60)


def captures(family, tokens=(2400, 1600, 1600), seed=0):
    stream = SyntheticStream(family, SMALL, seed=seed)
    fit = stream.capture(tokens[0], seed=1)
    rest = [stream.capture(n, seed=k + 2, constant=fit.mean_p) for k, n in enumerate(tokens[1:])]
    return stream.readout, fit, *rest


ADDED = captures("added")


@pytest.fixture(scope="module")
def landmarks():
    """View -> the decomposition of a stream that is added up, seen through it."""
    readout, fit, dev, held_out = ADDED
    found = {}
    for name in LANDMARKS:
        view = fit_view(name, readout, fit, dev, RECIPE).view
        seen = [view.apply(c, s) for c, s in ((fit, "fit"), (dev, "dev"), (held_out, "eval"))]
        found[name] = decompose(readout, *seen, RECIPE, readable=False)
    return found


def of_passed(found, what):
    passed = [gate == "" for gate in found.gate]
    return np.mean(getattr(found.point, what)[passed]), np.mean(passed)


def test_what_is_added_up_is_read_as_such_until_its_copies_have_bases_of_their_own(landmarks):
    own = decompose(*ADDED, RECIPE, readable=False)
    c, passed = of_passed(own, "carried")
    assert abs(c) < 0.05
    assert passed == 1
    c, passed = of_passed(landmarks["carried"], "carried")
    assert passed >= 0.5
    assert 0.8 < c < 1.3


def test_in_random_bases_nothing_is_kept_and_turning_by_45_degrees_takes_a_part(landmarks):
    rotated, drifting = landmarks["rotated"], landmarks["drifting"]
    assert set(rotated.gate) == {"not kept"}
    assert (np.abs(rotated.point.persistence) < 3 * rotated.chance.persistence).all()
    assert rotated.point.clarity.max() < 0.2
    i, j = drifting.pairs
    expected = np.cos(np.pi / 4 * (j - i) / 3)
    np.testing.assert_allclose(drifting.point.clarity, expected, atol=0.05)


def test_other_tokens_updates_add_up_in_place_and_pass_no_gate(landmarks):
    shuffled = landmarks["shuffled"]
    assert set(shuffled.gate) == {"no fall"}
    np.testing.assert_allclose(shuffled.point.carried, 0, atol=0.1)
    np.testing.assert_allclose(shuffled.point.clarity, 1, atol=0.02)


def test_a_stream_in_other_bases_has_the_models_own_choices_and_needs_no_search(landmarks):
    readout, fit, dev, held_out = ADDED
    own = decompose(*ADDED, RECIPE, readable=False)
    known = dict(zip(own.layers, own.choices, strict=True))

    def ridges_and_pads(choices):
        return [[(choice.ridge, choice.pad) for choice in both] for both in choices]

    for name, turned in (("rotated", True), ("drifting", True), ("carried", False), ("shuffled", False)):
        view = fit_view(name, readout, fit, dev, RECIPE).view
        told = choices_in(view, known)
        assert (told is not None) == turned
        assert choices_in(view, {0: own.choices[0]}) is None
        if told is not None:  # the fixture's decompositions searched for themselves
            assert ridges_and_pads(told) == ridges_and_pads(landmarks[name].choices)
            seen = [view.apply(c, s) for c, s in ((fit, "fit"), (dev, "dev"), (held_out, "eval"))]
            found = decompose(readout, *seen, RECIPE, readable=False, known=told)
            assert np.array_equal(found.point.carried, landmarks[name].point.carried)
            assert found.gate == landmarks[name].gate


def ridge_losses(readout, fit, dev, at_fit, at_dev):
    """Smallest KL and the cross-entropy there of ridge regressions to the last state, in float64 numpy."""
    x, y = at_fit.double().numpy(), fit.states[-1].double().numpy()
    mean, centred = x.mean(0), x - x.mean(0)
    second = centred.T @ centred / len(x)
    unit = np.sort(np.linalg.eigvalsh(second))[(len(second) - 1) // 2]
    log_p = readout(dev.states[-1]).double().log_softmax(-1)
    found = []
    for ridge in RECIPE.ridges:
        matrix = np.linalg.solve(second + ridge * unit * np.eye(len(second)), centred.T @ (y - y.mean(0)) / len(x))
        end = torch.from_numpy((at_dev.double().numpy() - mean) @ matrix + y.mean(0)).float()
        log_q = readout(end).double().log_softmax(-1)
        ce = -log_q.gather(-1, dev.targets[:, None]).mean()
        found.append((float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), float(ce)))
    return min(found)


@pytest.mark.parametrize("family", ["added", "fresh"])
def test_the_newest_copy_of_a_carried_stream_is_the_best_by_an_independent_ridge(family):
    readout, fit, dev, _ = captures(family)
    recipe = RECIPE.model_copy(update={"pads": (0.0,)})
    fitted = fit_view("carried", readout, fit, dev, recipe)
    assert fitted.note == ""
    assert fitted.sizes[0] == 1
    assert (np.diff(fitted.sizes) >= 0).all()
    new_fit, new_dev = fitted.view.apply(fit, "fit"), fitted.view.apply(dev, "dev")
    losses = [
        ridge_losses(readout, fit, dev, new_fit.states[k], new_dev.states[k]) for k in range(len(fitted.view.layers))
    ]
    assert (np.diff(losses, axis=0) < 0).all()


def test_where_no_growth_is_enough_the_view_says_so_and_where_the_model_gets_no_better_none_is_asked_for():
    readout, fit, dev, _ = ADDED
    context = ViewContext(readout, fit, dev, RECIPE, (0, 1, 2, 3), 0)
    bases = random_bases(torch.eye(16, dtype=torch.float64).expand(4, 16, 16), seed=0)
    sizes, drowned = grown_copies(context, bases, growths=(0.2,))
    assert drowned
    assert sizes == pytest.approx([1, 0.2, 0.04, 0.008])
    worse = [replace(c, states=c.states[[3, 2, 1, 0, 4]]) for c in (fit, dev)]
    sizes, drowned = grown_copies(replace(context, fit=worse[0], dev=worse[1]), bases)
    assert sizes == (1, 1, 1, 1)
    assert drowned == []


def test_a_view_that_drowns_has_a_note_in_words(monkeypatch):
    monkeypatch.setattr("lensbench.measures.update.views.grown_copies", lambda *_: ((1.0, 3.0, 9.0, 27.0), [2, 3]))
    readout, fit, dev, _ = ADDED
    assert "fall at layers 2, 3, where the model's own do" in fit_view("carried", readout, fit, dev, RECIPE).note


@pytest.mark.parametrize("name", LANDMARKS)
def test_a_view_is_the_same_for_a_seed_and_from_its_file(name, tmp_path):
    readout, fit, dev, held_out = (x if k == 0 else x.take(torch.arange(400)) for k, x in enumerate(ADDED))
    one, again, other = (fit_view(name, readout, fit, dev, RECIPE, layers=(0, 2), seed=s) for s in (4, 4, 5))
    one.save(tmp_path / "view.safetensors")
    loaded = FittedView.load(tmp_path / "view.safetensors", readout)
    assert (loaded.name, loaded.note, loaded.sizes) == (one.name, one.note, one.sizes)
    assert loaded.view.layers == (0, 2)
    seen = [view.view.apply(held_out, "eval") for view in (one, again, loaded, other)]
    assert seen[0].states.shape == (3, 400, 16)
    for captured in seen[1:3]:
        assert torch.equal(captured.states, seen[0].states)
        assert torch.equal(captured.constant_kl, seen[0].constant_kl)
    assert (seen[3].states[1] - seen[0].states[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "layers", "says"),
    [
        ("turned", None, "unknown view 'turned'; there are rotated, carried, drifting, shuffled"),
        ("rotated", (0, 4), "two or more rising layers of 0..3, not 0, 4"),
        ("rotated", (2, 1), "not 2, 1"),
        ("carried", (1,), "not 1"),
    ],
)
def test_a_view_that_cannot_be_made_is_refused_in_one_line(name, layers, says):
    with pytest.raises(LensbenchError, match=says):
        fit_view(name, *ADDED[:3], RECIPE, layers=layers)


def test_by_default_a_view_has_evenly_spread_layers():
    readout, fit, dev, _ = ADDED
    recipe = RECIPE.model_copy(update={"layers": 2})
    assert fit_view("rotated", readout, fit, dev, recipe).view.layers == (0, 3)


def test_processes_that_share_the_tokens_choose_the_same_copies_as_one():
    readout, fit, dev, held_out = captures("fresh")
    alone = fit_view("carried", readout, fit, dev, RECIPE)

    def work(fit, dev, held_out):
        fitted = fit_view("carried", readout, fit, dev, RECIPE)
        return fitted.sizes, fitted.view.apply(held_out, "eval").states

    found = in_two(work, (fit, 800), (dev, 1000), (held_out, 16))
    assert max(alone.sizes) > 1
    assert found[0][0] == found[1][0] == alone.sizes
    states = alone.view.apply(held_out, "eval").states
    torch.testing.assert_close(torch.cat([f[1] for f in found], 1), states, rtol=1e-3, atol=1e-3)


def test_states_in_a_file_give_the_same_views():
    readout, fit, dev, held_out = ADDED
    in_file = RECIPE.model_copy(update={"memory_gib": 1e-6})
    for name in ("carried", "shuffled"):
        one, other = (fit_view(name, readout, fit, dev, recipe) for recipe in (RECIPE, in_file))
        seen = [one.view.apply(held_out, "eval"), other.view.apply(held_out, "eval", memory_gib=1e-6)]
        assert torch.equal(seen[0].states, seen[1].states)
