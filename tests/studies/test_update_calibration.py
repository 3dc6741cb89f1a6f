"""The calibration of the update decomposition: what is counted, what is kept, and what is decided again."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateResult
from lensbench.measures.update.verdict import WITHOUT_FIRST, UpdateRule, decide_update
from lensbench.studies import update_calibration as study
from lensbench.studies.update_calibration import UpdateCalibration, measured_rows, run_update_calibration
from lensbench.studies.update_tables import (
    BLOCKS,
    COVERAGE,
    RIGHT,
    STREAMS,
    VERDICTS,
    coverage_table,
    facts_of,
    right_table,
    stream_tables,
    summaries,
    verdicts,
)
from lensbench.suite.files import load_calibration


def recipe(**changes) -> UpdateCalibration:
    small = {
        "name": "tiny", "question": "does it cover?", "tune": ("fresh", "overlapping"), "held_out": ("growing",),
        "tune_streams": 1, "held_out_streams": 1, "layers": (4,), "d": (16,), "fit_tokens": 768, "dev_tokens": 384,
        "eval_tokens": 512, "refits": 2, "readable_every": 9, "fit": FitRecipe(ridges=(1e-2, 1.0), pads=(0.0, 0.4)),
    }  # fmt: skip
    return UpdateCalibration(**(small | changes))


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> tuple[Path, dict[str, pd.DataFrame]]:
    folder = tmp_path_factory.mktemp("calibration")
    return folder, run_update_calibration(recipe(), folder, workers=1)


def by_scipy(successes: int, n: int) -> tuple[float, float]:
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def test_coverage_counts_intervals_that_hold_the_truth():
    streams = pd.DataFrame(
        {
            "set": "held_out", "family": ["a", "a", "b", "b"], "number": range(4), "right": "mixed",
            "in_place": [0.5, 0.6, 0.7, np.nan], "in_place_ci_low": [0.4, 0.55, 0.6, np.nan],
            "in_place_ci_high": [0.6, 0.65, 0.8, np.nan], "in_place_population": [0.45, 0.7, 0.8, 0.5],
            "readable_gain": [0.2, 0.9, 0.1, 0.3], "readable_gain_ci_low": [0.1, 0.8, 0.0, 0.2],
            "readable_gain_ci_high": [0.3, 1.0, 0.2, 0.4], "readable_gain_declared": [1.0, 0.0, 0.05, np.nan],
            "kept_declared": [0.8, 0.9, 0.2, np.nan], "kept_low": [0.7, 0.95, 0.3, 0.1],
            "kept_low_ci_low": [0.6, 0.92, 0.1, 0.1], "kept_low_ci_high": [0.8, 0.98, 0.4, 0.2],
            "kept_high": [0.9, 1.0, 0.5, 0.9], "kept_high_ci_low": [0.8, 1.0, 0.4, 0.8],
            "kept_high_ci_high": [1.0, 1.0, 0.6, 1.0],
        }
    )  # fmt: skip
    for name in ("carried", "clarity", "persistence", "news", "commission", "drowned"):
        streams[name] = streams[f"{name}_ci_low"] = np.nan
    table = coverage_table(streams).set_index(["quantity", "truth", "family"])
    row = table.loc["in_place", "population", "all"]
    assert row["streams"] == 3
    assert row["covered"] == pytest.approx(2 / 3)
    assert (row["covered_ci_low"], row["covered_ci_high"]) == pytest.approx(by_scipy(2, 3))
    assert row["rms"] == pytest.approx(np.sqrt((0.05**2 + 0.1**2 + 0.1**2) / 3))
    assert row["bias"] == pytest.approx((0.05 - 0.1 - 0.1) / 3)
    assert table.loc["in_place", "population", "b"]["covered"] == 1
    # A lower bound covers from its lower end up.
    assert table.loc["readable_gain", "declared", "all"]["covered"] == pytest.approx(2 / 3)
    # The bracket reaches from the lowest end of both intervals to the highest.
    assert table.loc["kept_bracket", "declared", "all"]["covered"] == pytest.approx(2 / 3)
    assert table.loc["kept_bracket", "declared", "b"]["rms"] == pytest.approx(0.1)
    swapped = streams.rename(
        columns={
            f"kept_{a}{end}": f"kept_{b}{end}"
            for a, b in (("low", "high"), ("high", "low"))
            for end in ("", "_ci_low", "_ci_high")
        }
    )
    again = coverage_table(swapped).set_index(["quantity", "truth", "family"])
    pd.testing.assert_series_equal(
        again.loc["kept_bracket", "declared", "all"], table.loc["kept_bracket", "declared", "all"]
    )


def test_a_verdict_is_right_when_it_is_one_that_suits_the_stream():
    decided = pd.DataFrame(
        {
            "set": "held_out", "family": ["a", "a", "a", "b"], "number": [0, 1, 2, 0],
            "right": ["mixed|carried along"] * 3 + ["carried along"],
            "verdict": ["mixed", "undetermined", "added up in one representation", "carried along"], "gate": "",
        }
    )  # fmt: skip
    table = right_table(decided).set_index("family")
    assert table.loc["a", "committed"] == pytest.approx(2 / 3)
    assert table.loc["a", "right_when_committed"] == pytest.approx(1 / 2)
    assert table.loc["all pure", "streams"] == 1
    assert table.loc["all", "mixed"] == 1
    assert (table.loc["a", "committed_ci_low"], table.loc["a", "committed_ci_high"]) == pytest.approx(by_scipy(2, 3))


def test_a_calibration_writes_a_row_for_each_stream_and_each_truth(tables):
    folder, written = tables
    streams = pd.read_csv(folder / STREAMS)
    assert list(zip(streams["set"], streams["family"], strict=True)) == [
        ("tune", "fresh"), ("tune", "overlapping"), ("held_out", "growing"),
    ]  # fmt: skip
    assert streams.loc[0, "clarity_population"] == pytest.approx(1, abs=1e-6)
    assert streams["clarity_lenses"].notna().all()
    assert streams.loc[2, "in_place_declared"] == pytest.approx(1)
    assert streams.loc[:1, "in_place_declared"].isna().all()
    assert set(written) == {STREAMS, BLOCKS, VERDICTS, RIGHT, COVERAGE}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(written)


def test_finished_streams_are_not_measured_again(tables, monkeypatch):
    folder, _ = tables
    monkeypatch.setattr(study, "measure", lambda *_: pytest.fail("measured again"))
    again = run_update_calibration(recipe(rule=UpdateRule(added=0.9)), folder, workers=1)
    assert len(again[VERDICTS]) == 3


def test_an_interrupted_calibration_goes_on_with_what_is_left(tables, tmp_path):
    folder, _ = tables
    kept = tmp_path / "streams"
    kept.mkdir()
    first = next(iter(sorted((folder / "streams").iterdir())))
    (kept / first.name).write_bytes(first.read_bytes())
    rows = measured_rows(recipe(tune=("fresh",)), kept, ("tune",), 1, study.QUIET)
    expected = {p.name for p in (folder / "streams").iterdir() if p.name.startswith("fresh")} | {first.name}
    assert {p.name for p in kept.iterdir()} == expected
    assert rows[0]["job"]["family"] == "fresh"


def test_a_damaged_row_is_named(tables, tmp_path):
    kept = tmp_path / "streams"
    kept.mkdir()
    for path in (tables[0] / "streams").iterdir():
        (kept / path.name).write_text("{")
    with pytest.raises(LensbenchError, match="measure anew"):
        measured_rows(recipe(), kept, ("tune",), 1, study.QUIET)


def test_committed_tables_give_the_verdict_of_the_decomposition_itself(tables):
    """Gates, blocks and indices as a table holds them lead to the same verdict as the whole result."""
    folder, written = tables
    streams, blocks = (pd.read_csv(folder / name) for name in (STREAMS, BLOCKS))
    rule = recipe().rule
    rows = measured_rows(recipe(), folder / "streams", ("tune", "held_out"), 1, study.QUIET)
    decided = verdicts(streams, blocks, rule)
    for row, (_, one) in zip(rows, decided.iterrows(), strict=True):
        whole = decide_update(rule, UpdateResult.model_validate(row["result"]).facts(WITHOUT_FIRST))
        assert (one["verdict"], one["gate"]) == (whole.verdict, whole.gate)
    pd.testing.assert_frame_equal(written[VERDICTS], decided)


def test_the_truth_is_of_the_pairs_that_passed(tables):
    folder, _ = tables
    streams = pd.read_csv(folder / STREAMS)
    for _, row in streams.iterrows():
        facts = facts_of(row, pd.read_csv(folder / BLOCKS).query("family == @row['family']"))
        first, _ = np.triu_indices(4, 1)
        assert facts.passed == sum(letter == "." for i, letter in zip(first, row["gates"], strict=True) if i >= 1)


def test_sums_of_the_same_rows_are_the_same(tables):
    folder, written = tables
    rows = measured_rows(recipe(), folder / "streams", ("tune", "held_out"), 1, study.QUIET)
    assert len(stream_tables(rows)[STREAMS]) == 3
    streams, blocks = (pd.read_csv(folder / name) for name in (STREAMS, BLOCKS))
    pd.testing.assert_frame_equal(summaries(streams, blocks, recipe().rule)[COVERAGE], written[COVERAGE])


def test_the_shipped_calibration_judges_by_families_that_tuned_nothing():
    shipped = load_calibration("update-calibration")
    assert isinstance(shipped, UpdateCalibration)
    assert not set(shipped.tune) & set(shipped.held_out)
    jobs = list(shipped.jobs(("held_out",)))
    assert len(shipped.held_out) >= 8
    assert len(jobs) == 50 * len(shipped.held_out)
    assert all(job.readable for job in jobs if job.family.startswith("small-"))


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown family 'none'"):
        recipe(tune=("none",))
