"""The decomposition's indices as comparisons read them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from lensbench.measures.indices import update_indices
from lensbench.report.updates import updates_of


def test_an_index_that_an_earlier_version_did_not_have_is_not_measured():
    rows = pd.DataFrame([{"model": "gpt", "seed": "0", "index": "in_place", "value": 0.9, "reason": ""}])
    draws = pd.DataFrame({"model": "gpt", "seed": 0, "index": "in_place", "value": np.linspace(0.8, 1.0, 1000)})
    run = SimpleNamespace(tables={"indices.csv": rows}, update_draws=lambda: draws)
    values, drawn, reasons = updates_of(run)["gpt", 0]
    assert set(values) == set(drawn) == set(update_indices())
    assert values["in_place"] == 0.9
    assert drawn["in_place"][0] == 0.8
    assert reasons["reach"] == "not measured: a run of an earlier version"
    assert "in_place" not in reasons
