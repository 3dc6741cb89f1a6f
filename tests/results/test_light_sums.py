"""What a run folder keeps for comparisons: sums by cluster and draws in steps, tables of nine digits, packed or not."""

import numpy as np
import pandas as pd
import pytest
from helpers.synthetic import estimates_of, small

from lensbench.errors import LensbenchError
from lensbench.measures.indices import shown_indices
from lensbench.results.draws import KEPT_DRAWS, in_steps, kept_draws
from lensbench.results.folder import (
    digits,
    read_table,
    table_bytes,
    table_file,
    write_sequences,
    write_sums,
    write_table,
)
from lensbench.results.schema import SCHEMA
from lensbench.results.sums import compared_sums, step_of_sums, summed_by_cluster


def kept(frame, groups=None):
    return compared_sums(summed_by_cluster(frame, groups))


def test_every_compared_index_is_that_of_the_sums_by_sequence():
    frame = small(0).frame
    whole, light = estimates_of(frame), estimates_of(kept(frame))
    for name in (name for name in shown_indices() if name in whole):
        here, there = whole[name], light[name]
        assert (here.value is None) == (there.value is None), name
        if here.value is not None:
            assert (there.value, there.low, there.high) == pytest.approx((here.value, here.low, here.high), abs=2e-3)


def test_a_sum_is_rounded_to_a_power_of_two_and_a_mean_moves_by_what_the_documentation_says():
    # A thousandth of the root of 128 tokens is 0.0113; the power of two below it is 1/128.
    assert step_of_sums(np.full(64, 128.0)) == 1 / 128
    frame = small(0).frame
    whole, light = summed_by_cluster(frame), kept(frame)
    tokens = whole[whole["lens"] == "model"]["tokens"].to_numpy(float)
    step = step_of_sums(tokens)
    for name in ("kl", "ce", "movement"):
        multiples = light[name].dropna().to_numpy(float) / step
        assert (multiples == np.round(multiples)).all()
    cell = ["lens", "lens_layer", "layer", "stage", "prior", "view"]
    means = [rows.groupby(cell, observed=True)["kl"].sum() / tokens.sum() for rows in (whole, light)]
    moved = (means[1] - means[0]).dropna()
    assert len(moved) > 30
    assert float(np.sqrt(np.square(moved).mean())) < 3e-4 / tokens.sum() ** 0.5


def test_the_file_holds_clusters_and_a_fraction_of_the_bytes(tmp_path):
    frame = pd.concat([small(0).frame.assign(sequence=k) for k in range(6)], ignore_index=True)
    write_sequences(tmp_path / "by_sequence.parquet", frame)
    write_sums(tmp_path / "by_cluster.parquet", kept(frame))
    found = pd.read_parquet(tmp_path / "by_cluster.parquet")
    assert not {"document", "sequence", "top1"} & set(found)
    assert found["cluster"].nunique() == frame["document"].nunique()
    assert 3 * (tmp_path / "by_cluster.parquet").stat().st_size < (tmp_path / "by_sequence.parquet").stat().st_size


def test_draws_are_the_first_ones_in_steps_of_a_64th_of_their_spread():
    drawn = np.random.default_rng(0).normal(0.9, 0.03, 1000)
    found = in_steps(drawn)
    assert found.shape == (KEPT_DRAWS,)
    assert found.dtype == np.float32
    assert np.abs(found - drawn[:KEPT_DRAWS]).max() <= drawn[:KEPT_DRAWS].std() / 128
    assert len(np.unique(found)) < 500
    low, high = np.percentile(drawn[:KEPT_DRAWS], [2.5, 97.5])
    assert np.percentile(found, [2.5, 97.5]) == pytest.approx((low, high), abs=0.03 / 64)
    unknown = in_steps(np.full(1000, np.nan))
    assert unknown.shape == (KEPT_DRAWS,)
    assert np.isnan(unknown).all()


def test_a_file_of_more_draws_is_cut_to_those_that_a_run_keeps():
    values = np.random.default_rng(1).normal(size=1000)
    draws = pd.concat(
        pd.DataFrame({"model": model, "seed": 0, "index": "in_place", "value": values + k})
        for k, model in enumerate(("a", "b"))
    )
    found = kept_draws(draws)
    assert found.groupby("model").size().to_dict() == {"a": KEPT_DRAWS, "b": KEPT_DRAWS}
    assert found[found["model"] == "b"]["value"].to_numpy() == pytest.approx(in_steps(values + 1))
    assert kept_draws(found)["value"].to_numpy() == pytest.approx(found["value"].to_numpy(), abs=0)


def test_a_number_has_nine_digits_and_a_whole_one_all_of_them():
    assert digits(1 / 3) == "0.333333333"
    assert digits(7_241_732_096.0) == "7241732096"
    assert digits(-1.6298145055770874e-09) == "-1.62981451e-09"
    for value in np.random.default_rng(0).normal(size=200).astype(np.float32):
        assert np.float32(digits(float(value))) == value


def test_a_table_is_written_with_nine_digits_also_where_numbers_and_gaps_are_objects(tmp_path):
    row = dict.fromkeys(SCHEMA["probes.csv"])
    rows = [
        row | {"model": "m", "seed": 0, "probe": "p", "quantity": "q", "layer": 3, "value": 1 / 3},
        row | {"model": "m", "seed": "all", "probe": "p", "quantity": "q", "reason": "undefined"},
    ]
    write_table(tmp_path, "probes.csv", pd.DataFrame(rows))
    lines = (tmp_path / "probes.csv").read_text().splitlines()
    assert lines[1:] == ["m,0,p,q,3,,0.333333333,,,", "m,all,p,q,,,,,,undefined"]


def test_a_packed_table_is_read_as_the_plain_one_and_a_damaged_one_is_told_in_a_line(tmp_path):
    from lensbench.report.export import pack

    row = dict.fromkeys(SCHEMA["probes.csv"])
    write_table(tmp_path, "probes.csv", pd.DataFrame([row | {"model": "m", "seed": 0, "value": 0.25}]))
    plain, content = read_table(tmp_path / "probes.csv"), (tmp_path / "probes.csv").read_bytes()
    pack(tmp_path / "probes.csv")
    packed = table_file(tmp_path, "probes.csv")
    assert packed == tmp_path / "probes.csv.xz"
    assert not (tmp_path / "probes.csv").exists()
    assert table_bytes(packed) == content
    pd.testing.assert_frame_equal(read_table(tmp_path / "probes.csv"), plain)
    pd.testing.assert_frame_equal(pd.read_csv(packed), pd.read_csv(packed.parent / "probes.csv.xz"))
    whole = packed.read_bytes()
    for damaged in (whole[:-12], whole[:20] + b"x" + whole[21:], b"no archive"):
        packed.write_bytes(damaged)
        with pytest.raises(LensbenchError, match=r"probes\.csv\.xz is damaged"):
            read_table(tmp_path / "probes.csv")
