"""An unbiased estimate of a small KL may be negative: tables and sums hold it as it is."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.synthetic import small

from lensbench.results import tables
from lensbench.results.sums import ClusterSums, by_document, clustered, compared_sums, summed_by_cluster


def test_a_negative_loss_reaches_tables_and_sums_unclipped():
    it = small(0)
    frame = it.frame.copy()
    last = it.fit.summary.depth - 1
    own = (frame["lens"] == "tuned") & (frame["prior"] == "zero") & (frame["stage"] == "closed")
    rows = own & (frame["layer"] == last) & (frame["view"] == -1)
    frame.loc[rows, "kl"] -= 2 * np.float32(frame.loc[rows, "kl"].sum() / rows.sum())
    total, tokens = frame.loc[rows, "kl"].astype(float).sum(), frame.loc[rows, "tokens"].sum()
    assert total < 0
    found = tables.tables([replace(it.part("it", 0), sequences=frame)], draws=200)
    listed = found["lenses.csv"]
    row = listed[
        (listed["model"] == "it") & (listed["lens"] == "tuned") & (listed["prior"] == "zero")
        & (listed["stage"] == "closed") & (listed["layer"] == last)
    ].iloc[0]  # fmt: skip
    assert row["kl"] == pytest.approx(total / tokens, rel=1e-6)
    assert row["kl_ci_low"] < row["kl"] < row["kl_ci_high"]
    indices = found["indices.csv"].set_index("index")["value"]
    assert np.isfinite(indices["shared_retention"])
    kept = compared_sums(summed_by_cluster(frame))
    sums = ClusterSums.of(clustered(kept))
    assert sums.totals.own[:, last].sum() == pytest.approx(total, abs=0.05)
    assert by_document(kept, lens="model")["tokens"].sum() == tokens
