"""An index at other settings, and the parts of its doubt, against sums written out."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.report.settings import doubt_frame, settings_frame, settings_tables

INDEX = "in_place_without_layer0"
VALUES = {"gpt": [0.9, 1.0, 1.1], "short": [0.5]}
GAPS = {"0.1": [0.02, 0.04, 0.03], "whitened": [-0.2, -0.1, 0.0]}


def run():
    """Tables of a model of three seeds and one of one seed, at a tolerance and a metric."""
    indices, variants = [], []
    for model, values in VALUES.items():
        for seed, value in enumerate(values):
            of = {"model": model, "seed": str(seed), "index": INDEX}
            indices.append(of | {"value": value, "ci_low": value - 0.5, "ci_high": value + 0.5})
            variants.append(_variant(of, "interval", "documents", value, 0.3, None))
            for at, gaps in GAPS.items():
                setting = "metric" if at == "whitened" else "tolerance"
                variants.append(_variant(of, setting, at, value + gaps[seed], 0.3, gaps[seed]))
        indices.append({"model": model, "seed": "all", "index": INDEX, "value": 7.0, "ci_low": 6.0, "ci_high": 8.0})
    return SimpleNamespace(tables={"indices.csv": pd.DataFrame(indices), "variants.csv": pd.DataFrame(variants)})


def _variant(of, setting, at, value, half, gap):
    nothing = gap is None
    return of | {
        "setting": setting, "at": at, "value": value, "ci_low": value - half, "ci_high": value + half,
        "difference": np.nan if nothing else gap, "difference_ci_low": np.nan if nothing else gap - 0.01,
        "difference_ci_high": np.nan if nothing else gap + 0.01,
    }  # fmt: skip


def test_differences_are_means_over_seeds_with_their_interval():
    frame = settings_frame([run()], INDEX)
    row = frame[(frame["model"] == "gpt") & (frame["at"] == "0.1")].iloc[0]
    low, high = stats.t.interval(0.95, 2, loc=0.03, scale=stats.sem(GAPS["0.1"]))
    found = (row["seeds"], row["difference"], row["difference_ci_low"], row["difference_ci_high"])
    assert found == pytest.approx((3, 0.03, low, high))
    reported = frame[(frame["model"] == "gpt") & (frame["setting"] == "reported")].iloc[0]
    assert (reported["value"], reported["seeds"]) == pytest.approx((1.0, 3))


def test_one_seed_has_the_interval_over_its_documents():
    frame = settings_frame([run()], INDEX)
    row = frame[(frame["model"] == "short") & (frame["at"] == "whitened")].iloc[0]
    assert (row["difference_ci_low"], row["ci_high"]) == pytest.approx((-0.21, 0.3 + 0.3))


def test_doubt_is_told_apart():
    doubt = doubt_frame([run()], INDEX).set_index("model")
    assert doubt.loc["gpt", "between_seeds"] == pytest.approx(0.1)
    assert doubt.loc["gpt", "documents"] == pytest.approx(0.3 / 1.96)
    assert doubt.loc["gpt", "refits"] == pytest.approx((0.5**2 - 0.3**2) ** 0.5 / 1.96)
    assert np.isnan(doubt.loc["short", "between_seeds"])


def test_the_largest_difference_of_a_kind_is_marked():
    frame = settings_frame([run()], INDEX)
    table, _ = settings_tables(frame, doubt_frame([run()], INDEX))
    marks = list(table.columns[-1].cells)
    assert marks == ["", "largest", "largest"] * 2


def test_an_index_that_no_run_tells_is_named_with_those_there_are():
    with pytest.raises(LensbenchError, match=f"no run has gain at other settings; there are {INDEX}"):
        settings_frame([run()], "gain")


def test_the_nearest_index_is_proposed_for_a_misspelt_one_only():
    with pytest.raises(LensbenchError, match=f"no run has in_plac at other settings; did you mean '{INDEX}'"):
        settings_frame([run()], "in_plac")
    one = run()
    one.tables["indices.csv"].loc[0, "index"] = "in_place_of_one_setting"
    with pytest.raises(LensbenchError, match=f"no run has in_place_of_one_setting at .*; there are {INDEX}"):
        settings_frame([one], "in_place_of_one_setting")
