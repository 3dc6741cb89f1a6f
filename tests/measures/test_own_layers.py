"""A suite without the transfer matrix and pairs: what is left is what it was, and the rest says why it is not there."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers.synthetic import DRAWS, SMALL, small, windows_of
from pydantic import ValidationError

from lensbench.errors import LensbenchError
from lensbench.lenses.fit import fit
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.pairs import PAIR_LENS
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.search import DevSearch, pad_direction, thinned
from lensbench.lenses.shared import SHARED_LENS
from lensbench.measures.evaluate import evaluate
from lensbench.measures.indices import LEFT_OUT
from lensbench.measures.transfer import own_sums, transfer_sums
from lensbench.results import tables
from lensbench.suite.changes import Changes
from lensbench.suite.evaluation import EvaluateRecipe
from lensbench.suite.recipes import Suite

LITTLE = SMALL.model_copy(
    update={"pairs": False, "rotated_own": False, "tolerances": (), "refits": 0, "refine_passes": 0}
)


@cache
def little():
    """The small stream with fewer lenses, read at their own layers."""
    it = small(0)
    found = fit(FitContext.of(it.stream.readout, it.captured, it.dev, LITTLE, seed=0))
    scored = evaluate(it.stream.readout, it.held_out, found, matrix=False)
    frame = scored.frame(windows_of(it.held_out), model="it", seed=0)
    return replace(it, fit=found, scored=scored, frame=frame)


def test_an_estimate_without_the_matrix_is_refused():
    it = little()
    with pytest.raises(LensbenchError, match="without the matrix it must be 1"):
        evaluate(it.stream.readout, it.held_out, it.fit, matrix=False, exact_share=0.5)


def test_without_the_matrix_lenses_are_read_at_their_own_layers_as_in_it():
    it = small(0)
    whole = transfer_sums(it.stream.readout, it.held_out, it.fit.headline.maps)
    own = own_sums(it.stream.readout, it.held_out, it.fit.headline.maps)
    size = it.stream.layers + 1
    read = np.eye(size, dtype=bool)
    read[-1] = True
    for name in ("kl", "ce", "top1"):
        np.testing.assert_allclose(getattr(own, name)[:, read], getattr(whole, name)[:, read], rtol=1e-5, atol=1e-5)
        assert np.isnan(getattr(own, name)[:, ~read]).all()
    assert np.isnan(own.movement).all()


def test_a_fit_without_pairs_has_the_same_other_lenses():
    it = small(0)
    assert PAIR_LENS not in little().fit.lenses
    assert OWN.of_view(0) not in little().fit.lenses
    assert not [lens for lens in little().fit.lenses if KINDS[lens.kind].reads == "pair"]
    for lens in (OWN, SHARED_LENS, SHARED_LENS.of_view(0)):
        np.testing.assert_array_equal(little().fit[lens].maps.matrix, it.fit[lens].maps.matrix)


def test_tables_of_own_layers_alone_say_what_was_left_out():
    it, other = little(), small(0)
    found = tables.tables([it.part("it", 0)], draws=DRAWS)
    whole = tables.tables([other.part("it", 0)], draws=DRAWS)
    cells = found["transfer.csv"]
    layers = it.stream.layers
    assert {(i, j) for i, j in cells[["lens_layer", "stream_layer"]].itertuples(index=False)} == {
        (i, j) for i in range(layers + 1) for j in range(layers + 1) if i in (j, layers)
    }
    assert found["tolerances.csv"].empty
    assert found["pairs.csv"].empty
    reasons = found["indices.csv"].set_index("index")["reason"].fillna("")
    absent = {name for name, reason in reasons.items() if reason.startswith(LEFT_OUT)}
    assert {"gain_visibility", "movement", "distance_trend", "gain_visibility_distance_1", "pair_consistency"} <= absent
    assert {"shared_retention", "shared_consistency", "constant_kl"}.isdisjoint(absent)
    assert "evaluate.matrix" in reasons["movement"]
    assert "fit.pairs" in reasons["pair_penalty"]
    kept = ("constant_kl", "shared_retention", "rotated_retention", "shared_consistency")
    for name in kept:
        a, b = (t["indices.csv"].set_index("index").loc[name, ["value", "ci_low", "ci_high"]] for t in (found, whole))
        np.testing.assert_allclose(a.to_numpy(float), b.to_numpy(float), rtol=1e-6)


def test_a_search_on_fewer_dev_tokens_is_one_on_these_tokens():
    it = small(0)
    some = LITTLE.model_copy(update={"search_tokens": 50})
    pad = pad_direction(it.stream.readout, it.captured.states[-1])
    few = DevSearch(it.stream.readout, it.dev, some, pad)
    direct = DevSearch(it.stream.readout, thinned(it.dev, 50), LITTLE, pad)
    maps = it.fit[OWN].maps
    assert few.tokens == 50
    assert few.kl(maps[[1]], [1]) == direct.kl(maps[[1]], [1])
    assert few.kl(maps[[1]], [1]) != DevSearch(it.stream.readout, it.dev, LITTLE, pad).kl(maps[[1]], [1])


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("fit", {"tolerances": (0.0,)}, "fit.tolerances must be empty"),
        ("fit", {"refits": 2}, "fit.refits must be 0"),
        ("evaluate", {"exact_share": "auto"}, "evaluate.exact_share must be 1"),
        ("evaluate", {"precision": 0.1}, "evaluate.precision must be left out"),
    ],
)
def test_what_is_read_off_the_matrix_is_refused_without_it(section, change, told):
    whole = Changes().of("pretrained").model_dump(exclude_unset=True, exclude={"claims", "presets"})
    whole["fit"] = {**whole["fit"], "tolerances": (), "refits": 0}
    whole["evaluate"] = {**whole["evaluate"], "exact_share": 1, "matrix": False}
    Suite.model_validate(whole)
    whole[section] = {**whole[section], **change}
    with pytest.raises(ValidationError, match=told):
        Suite.model_validate(whole)


def test_settings_that_were_added_leave_what_a_fit_and_a_score_depend_on_as_it_was():
    assert {"pairs", "search_tokens", "record_tokens", "rotated_own"}.isdisjoint(FitRecipe().fitted)
    assert FitRecipe(pairs=False).fitted["pairs"] is False
    assert "matrix" not in EvaluateRecipe().scored
    assert EvaluateRecipe(matrix=False).scored["matrix"] is False
