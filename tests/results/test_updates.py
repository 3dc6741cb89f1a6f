"""The update decomposition of one model without a run folder: its tables and words, also where there is nothing to say."""

import pytest

from lensbench import LensbenchError, UpdateRule, Updates, plot_profile
from lensbench.measures.update import UpdateResult
from lensbench.results.schema import OF_UPDATES, SCHEMA

REASON = "undefined: an update needs two layers before the last"


def test_a_model_without_a_decomposition_has_empty_tables_and_a_sentence_that_says_why():
    found = Updates("short", 0, 1, UpdateResult.undefined(REASON), UpdateRule())
    assert repr(found) == "Updates('short', 1 layer, seed 0: undetermined)"
    assert found.sentence == "From layer 1 on nothing can be said: an update needs two layers before the last."
    assert list(found.verdicts["gate"]) == ["undefined", "undefined"]
    for name in OF_UPDATES:
        assert found.tables[name].empty
        assert list(found.tables[name].columns) == list(SCHEMA[name])
    assert found.indices["value"].isna().all()
    assert set(found.indices["reason"]) == {REASON}
    with pytest.raises(LensbenchError, match=r"no block of short to draw: .*two layers"):
        plot_profile(found)
