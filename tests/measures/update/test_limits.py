"""What fools the update decomposition: exact values from the moments of small constructions, and gates that stop some."""

import numpy as np
import pytest
import torch

from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.ridge import RidgePath
from lensbench.measures.update import UpdateResult, decompose
from lensbench.measures.update.chance import chance_and_products
from lensbench.measures.update.folds import readings
from lensbench.measures.update.metric import Metric
from lensbench.measures.update.news import news_of_moments
from lensbench.measures.update.products import pairs_of
from lensbench.measures.update.quantities import Quantities, quantities
from lensbench.measures.update.verdict import ADDED, NO_FALL, UNDETERMINED, WITHOUT_FIRST, UpdateRule, decide_update
from lensbench.studies.population import Population
from lensbench.studies.synthetic import Shape, SyntheticStream, capture_of, orthogonal, turned

N = 24
"""Entries of the answer"""


class Noises:
    """Independent standard normal variables: the answer first, then as many noises as are asked for."""

    def __init__(self, count: int):
        self.parts = torch.eye(N * (count + 1), dtype=torch.float64).split(N, 1)
        self.answer, self.next = self.parts[0], 0

    def __call__(self) -> torch.Tensor:
        self.next += 1
        return self.parts[self.next]


def exact(states: list[torch.Tensor], ridge: float = 1e-6) -> tuple[Quantities, Population]:
    """All quantities of a stream of linear functions ``[m, d]`` of normal variables, the last state its prediction."""
    width = max(h.shape[1] for h in states)
    population = Population(torch.stack([torch.nn.functional.pad(h, (0, width - h.shape[1])) for h in states]))
    metric = Metric("euclidean", torch.eye(width, dtype=torch.float64)[:N])
    count = len(states) - 1
    maps = readings([population.moments] * 3, metric, [ridge] * count)
    (chance,), (products,) = chance_and_products(population, [maps], [maps])
    return quantities(products, pairs_of(count), chance), population


def test_growth_hides_a_change_of_basis_from_persistence_and_the_bracket_holds_it():
    noise, turns = Noises(4), [turned(N, np.pi / 6, torch.Generator().manual_seed(k)).double() for k in range(4)]
    plain = [(noise.answer + s * noise()) @ q.T for s, q in zip((1.2, 0.9, 0.6, 0.3), turns, strict=True)]
    kept = exact([*plain, noise.answer])[0]
    grown = exact([h * 1.6**k for k, h in enumerate([*plain, noise.answer])])[0]
    np.testing.assert_allclose(kept.persistence, 0.75, atol=0.05)
    assert (grown.persistence > 1).all()
    np.testing.assert_allclose(grown.kept_low, kept.clarity, rtol=1e-4)
    assert (grown.kept_high == 1).all()
    np.testing.assert_allclose(grown.carried, kept.carried, atol=1e-3)


def test_shrinkage_invents_no_change_of_basis_in_the_bracket():
    noise = Noises(3)
    h = [0.6**k * (noise.answer + s * noise()) for k, s in enumerate((1.2, 0.8, 0.4))]
    found = exact([*h, noise.answer])[0]
    assert (found.persistence < 0.7).all()
    np.testing.assert_allclose(found.clarity, 1, atol=1e-3)
    np.testing.assert_allclose(found.carried, 0, atol=1e-3)


def test_an_old_copy_that_is_denoised_while_a_better_one_is_written_elsewhere_counts_as_partly_in_place():
    noise = Noises(2)
    old, less = noise(), noise()
    first = torch.cat([noise.answer + old, torch.zeros_like(noise.answer)], 1)
    second = torch.cat([noise.answer + 0.8 * old, noise.answer + 0.3 * less], 1)
    assert 0.2 < exact([first, second, torch.cat([noise.answer] * 2, 1)])[0].carried[0] < 0.95


def test_copies_that_are_turned_by_45_degrees_count_as_partly_in_place():
    noise, turn = Noises(2), turned(N, np.pi / 4, torch.Generator().manual_seed(0)).double()
    first, better = noise.answer + 1.2 * noise(), 2 * (noise.answer + 0.3 * noise())
    elsewhere = orthogonal(N, torch.Generator().manual_seed(1)).double()
    half, whole = (exact([first, first + better @ q.T, noise.answer])[0].carried[0] for q in (turn, elsewhere))
    assert 0.1 < half < whole


def test_a_new_copy_that_is_written_to_both_places_counts_as_partly_in_place():
    """Averaged with the old one where that was, and alone elsewhere: the share is neither 0 nor 1."""
    noise = Noises(2)
    old, new = noise.answer + 1.5 * noise(), noise.answer + 0.3 * noise()
    first, second = torch.cat([old, 0 * old], 1), torch.cat([(old + new) / 2, new], 1)
    assert 0.05 < exact([first, second, torch.cat([noise.answer] * 2, 1)])[0].carried[0] < 0.95


def test_shares_of_a_shift_register_leave_the_range_from_0_to_1_and_are_not_cut():
    """Copies move on by one place at every layer: the old place holds another copy, and no share describes it."""
    noise = Noises(4)
    copies = [noise.answer + s * noise() for s in (2.0, 1.4, 0.9, 0.4)]
    empty = torch.zeros_like(noise.answer)
    states = [torch.cat([copies[k - back] if k >= back else empty for back in range(4)], 1) for k in range(4)]
    found = exact([*states, torch.cat([noise.answer] * 4, 1)])[0]
    assert (found.carried < 1e-9).any()
    assert (found.persistence > 0.9).all()


def test_one_large_direction_decides_alone():
    """A direction of 30 times the size, added in place, outweighs all others, which are carried along."""
    noise = Noises(2)
    size = torch.ones(N, dtype=torch.float64)
    size[0] = 30
    new, old = noise(), noise()
    first = (noise.answer + old) * size
    second = torch.cat([first.clone(), (noise.answer + 0.3 * new) * size], 1)
    second[:, 0] = ((noise.answer + 0.3 * new) * size)[:, 0]
    second[:, N] = 0
    answer = torch.cat([noise.answer * size] * 2, 1)
    assert exact([torch.cat([first, 0 * first], 1), second, answer])[0].carried[0] < 0.1


def test_new_directions_that_are_filled_in_place_are_news():
    noise = Noises(2)
    half = torch.zeros(N, dtype=torch.float64)
    half[: N // 2] = 1
    first = noise.answer * half + 0.2 * noise() * half
    _, population = exact([first, noise.answer + 0.2 * noise.parts[1], noise.answer])
    lenses = RidgePath(population.moments.layer([0, 1]), "zero").solve(1e-6)
    new, whole = news_of_moments(population, lenses, torch.eye(N, dtype=torch.float64), pairs_of(2))
    assert new / whole == pytest.approx(1, abs=1e-6)


RECIPE = FitRecipe(ridges=(1e-2, 0.1, 1.0), pads=(0.0, 0.4))


def test_without_a_gain_no_pair_passes():
    """New noise of the same size at every layer: nothing is added, and the decomposition does not speak."""
    stream = SyntheticStream("fresh", Shape(d=16, layers=4, vocab=40, first_noise=1.0, last_noise=1.0), seed=0)
    fit = stream.capture(1200, seed=1)
    dev, scored = (stream.capture(800, seed=k, constant=fit.mean_p) for k in (2, 3))
    result = UpdateResult.of(decompose(stream.readout, fit, dev, scored, RECIPE, refits=0, readable=False))
    assert {row["gate"] for row in result.pairs} == {NO_FALL}
    verdict = decide_update(UpdateRule(), result.facts(WITHOUT_FIRST))
    assert (verdict.verdict, verdict.gate) == (UNDETERMINED, NO_FALL)


def test_a_code_whose_sign_is_drawn_for_every_token_is_not_seen():
    """Linear lenses read nothing of it: no loss falls, so that nothing is claimed."""
    stream = SyntheticStream("fresh", Shape(d=16, layers=4, vocab=40), seed=0)

    def flipped(tokens: int, seed: int, constant: torch.Tensor | None = None):
        states = stream.states(tokens, seed=seed)
        sign = 2 * torch.randint(2, (tokens, 1), generator=torch.Generator().manual_seed(seed)) - 1.0
        return capture_of(stream.readout, torch.cat([states[:-1] * sign, states[-1:]]), constant=constant, seed=seed)

    fit = flipped(1200, 1)
    dev, scored = (flipped(800, k, fit.mean_p) for k in (2, 3))
    result = UpdateResult.of(decompose(stream.readout, fit, dev, scored, RECIPE, refits=0, readable=False))
    assert decide_update(UpdateRule(), result.facts(WITHOUT_FIRST)).verdict != ADDED
    assert NO_FALL in {row["gate"] for row in result.pairs}
