"""Means over seeds of in-context regression: what no seed changes keeps its interval over tasks."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lensbench.studies.regression import seed_means


def test_a_rival_that_is_the_same_for_every_seed_has_an_interval_over_tasks_and_not_of_width_zero():
    who = {"layers": 1, "attention": "linear", "quantity": "squared_error"}
    own = [0.2, 0.25, 0.24]
    rows = [who | {"seed": k, "against": "", "value": v, "ci_low": v - 1, "ci_high": v + 1} for k, v in enumerate(own)]
    rows += [who | {"seed": k, "against": "gd", "value": 0.3, "ci_low": 0.28, "ci_high": 0.33} for k in range(3)]
    found = seed_means(pd.DataFrame(rows)).set_index("against")
    assert tuple(found.loc["gd", ["value", "ci_low", "ci_high"]]) == (0.3, 0.28, 0.33)
    expected = stats.t.interval(0.95, 2, np.mean(own), np.std(own, ddof=1) / 3**0.5)
    assert (found.loc["", "ci_low"], found.loc["", "ci_high"]) == pytest.approx(expected)
