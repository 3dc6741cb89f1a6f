"""Other tolerances of the ridge: one climb on dev serves them all."""

import pytest
import torch

from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update.decomposition import Fitted
from lensbench.studies.synthetic import Shape, SyntheticStream

RECIPE = FitRecipe(ridges=(0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0), pads=(0.0, 0.2, 0.4, 0.6))
TOLERANCES = (0.0, 0.01, 0.05, 0.1, 0.5)


@pytest.fixture(scope="module")
def fitted():
    stream = SyntheticStream("overlapping", Shape(d=24, layers=4, vocab=80))
    fit = stream.capture(1500, seed=1)
    dev = stream.capture(600, seed=2, constant=fit.mean_p)

    def at(tolerance, others=()):
        layers = (0, 1, 2, 3)
        return Fitted.of(stream.readout, fit, dev, RECIPE, layers, "fisher", tolerance, 0, lambda _: None, None, others)

    return at


def test_lenses_at_another_tolerance_are_those_of_a_search_at_that_tolerance(fitted):
    announced = fitted(0.02, TOLERANCES)
    ridges = []
    for tolerance in TOLERANCES:
        alone, found = fitted(tolerance), announced.at(tolerance)
        ridges.append(alone.lenses.ridges)
        for name, expected in vars(alone.maps).items():
            torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=0, msg=name)
    assert len(set(ridges)) > 2


def test_the_reported_lenses_do_not_depend_on_the_tolerances_that_are_announced(fitted):
    alone, announced = fitted(0.02), fitted(0.02, TOLERANCES)
    assert announced.lenses.choices == alone.lenses.choices


def test_more_tolerances_cost_no_product_with_the_unembedding_beyond_the_largest(fitted):
    assert fitted(0.02, TOLERANCES).search.rows_read_out == fitted(0.5).search.rows_read_out
