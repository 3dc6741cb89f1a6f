"""The study of tokens: how many an interval takes, what is kept, and what a file may say."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update.decomposition import decompose
from lensbench.measures.update.summary import index_estimates
from lensbench.report.calibration_tables import update_tokens_tables
from lensbench.studies import update_tokens as study
from lensbench.studies.synthetic import Shape, SyntheticStream
from lensbench.studies.update_token_tables import (
    AT_MOST,
    EXTRAPOLATED,
    MEASURED,
    NEEDED,
    POINTS,
    TOKENS,
    needed,
    needed_table,
    tokens_table,
)
from lensbench.studies.update_tokens import TokensJob, UpdateTokens, Width, measure, run_update_tokens
from lensbench.suite.files import load_calibration

FIT = FitRecipe(ridges=(1e-2, 1.0), pads=(0.0, 0.4))


def recipe(**changes) -> UpdateTokens:
    small = {
        "name": "tiny", "question": "how many?", "families": ("fresh",), "refits": 2, "fit": FIT,
        "widths": (Width(d=16, tokens=(24, 48), streams=1),),
    }  # fmt: skip
    return UpdateTokens(**(small | changes))


def points(rows: list[tuple[int, float | None]], **columns) -> pd.DataFrame:
    """Points of one family and width at (tokens, half-width)."""
    tokens, widths = zip(*rows, strict=True)
    made = {
        "family": "fresh", "d": 100, "fit_tokens": tokens, "half_width": np.array(widths, float), "of_refits": 0.5,
        "passed": 3, "error": 0.01, "covered": 1.0, "seconds": 1.0,
    }  # fmt: skip
    return pd.DataFrame(made | columns)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, pd.DataFrame]]:
    folder = tmp_path_factory.mktemp("tokens")
    return folder, run_update_tokens(recipe(), folder, workers=1)


# How many tokens
def test_half_widths_that_fall_by_the_root_of_tokens_name_the_number_that_they_take():
    tokens = np.array([1000.0, 2000, 4000, 8000])
    found = needed(tokens, 3 / np.sqrt(tokens), 0.05)
    assert (found.tokens, found.slope, found.how) == (pytest.approx(3600), pytest.approx(-0.5), MEASURED)
    assert (found.low, found.high) == (pytest.approx(3600), pytest.approx(3600))


def test_the_interval_holds_the_numbers_of_tokens_at_which_a_t_test_does_not_tell_the_line_from_what_is_asked():
    rng = np.random.default_rng(0)
    tokens = np.repeat([1000.0, 2000, 4000, 8000], 3)
    widths = 3 / np.sqrt(tokens) * np.exp(0.2 * rng.standard_normal(12))
    found = needed(tokens, widths, 0.05)
    line = stats.linregress(np.log(tokens), np.log(widths))
    assert found.tokens == pytest.approx(np.exp((np.log(0.05) - line.intercept) / line.slope))
    t = stats.t.ppf(0.975, 10)
    assert (found.slope_low, found.slope_high) == pytest.approx(
        (line.slope - t * line.stderr, line.slope + t * line.stderr)
    )
    # Written out: a t-test of the line at each of many numbers of tokens.
    grid = np.linspace(np.log(500), np.log(50_000), 200_001)
    x = np.log(tokens)
    left = np.log(widths) - line.intercept - line.slope * x
    error = np.sqrt((left**2).sum() / 10 * (1 / 12 + (grid - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()))
    kept = grid[np.abs(line.intercept + line.slope * grid - np.log(0.05)) <= t * error]
    assert (found.low, found.high) == pytest.approx((np.exp(kept[0]), np.exp(kept[-1])), rel=1e-4)


def test_half_widths_that_do_not_surely_fall_reach_nothing():
    found = needed(np.array([1000.0, 2000, 4000, 8000]), np.array([0.1, 0.08, 0.11, 0.09]), 0.05)
    assert found.tokens is None
    assert "do not surely fall" in found.reason
    assert found.slope_high > 0


@pytest.mark.parametrize(("asked", "how"), [(3 / np.sqrt(20_000), EXTRAPOLATED), (3 / np.sqrt(6000), MEASURED)])
def test_a_number_beyond_those_measured_is_called_extrapolated(asked, how):
    tokens = np.array([1000.0, 2000, 4000, 8000])
    assert needed(tokens, 3 / np.sqrt(tokens), asked).how == how


def test_no_number_is_named_more_than_four_times_beyond_those_measured():
    tokens = np.array([1000.0, 2000, 4000, 8000])
    found = needed(tokens, 3 / np.sqrt(tokens), 3 / np.sqrt(33_000))
    assert found.tokens is None
    assert found.reason == "not reached: more than 4 times the 8,000 tokens measured"


def test_what_the_fewest_tokens_reach_takes_at_most_these():
    found = needed(np.array([1000.0, 2000]), np.array([0.01, 0.02]), 0.05)
    assert (found.tokens, found.low, found.how) == (1000, None, AT_MOST)


def test_too_few_intervals_and_none_at_all_are_said():
    assert "half of the streams" in needed(np.array([]), np.array([]), 0.05).reason
    assert "three intervals" in needed(np.array([1000.0, 2000]), np.array([0.2, 0.1]), 0.05).reason
    assert "no width" in needed(np.array([1000.0, 2000, 2000]), np.array([0.2, 0.1, 0.0]), 0.05).reason


def test_numbers_of_tokens_far_from_what_is_asked_do_not_bend_the_line():
    tokens = np.array([500.0, 1000, 2000, 4000, 8000])
    widths = 3 / np.sqrt(tokens)
    widths[0] = 2
    assert needed(tokens, widths, 0.05).tokens == pytest.approx(3600)


# Tables
def test_a_row_of_tokens_has_means_over_the_streams_that_have_an_interval():
    widths, errors = [0.1, 0.2, 0.4], [0.1, -0.2, 0.0]
    of = points(
        [*((1000, width) for width in widths), (1000, None), (2000, 0.1)],
        error=[*errors, np.nan, np.nan], covered=[1, 0, 1, np.nan, np.nan], passed=[3, 4, 5, 0, 6],
    )  # fmt: skip
    row, single = (one for _, one in tokens_table(of).iterrows())
    low, high = stats.t.interval(0.95, 2, np.mean(widths), stats.sem(widths))
    assert (row["half_width"], row["half_width_ci_low"], row["half_width_ci_high"]) == pytest.approx(
        (np.mean(widths), low, high)
    )
    assert (row["streams"], row["intervals"], row["truths"], row["passed"]) == (4, 3, 3, 3)
    assert (row["rms"], row["bias"]) == pytest.approx((np.sqrt(0.05 / 3), -0.1 / 3))
    assert row["covered"] == pytest.approx(2 / 3)
    assert (single["half_width"], single["per_d"], single["truths"]) == (0.1, 20, 0)
    assert np.isnan(single["half_width_ci_low"])
    assert np.isnan(single["covered"])


def test_numbers_of_tokens_at_which_most_streams_are_undetermined_do_not_count():
    rows = [
        (1000, None),
        (2000, 0.001),
        (2000, None),
        (2000, None),
        (4000, 0.1),
        (4000, None),
        (8000, 0.07),
        (8000, 0.08),
    ]
    row = needed_table(points(rows, passed=[0, 3, 1, 0, 3, 2, 6, 6]), 0.05).iloc[0]
    assert (row["no_pair_at"], row["a_pair_at"], row["interval_at"], row["intervals"]) == (1000, 2000, 4000, 3)


def test_the_terminal_says_how_a_number_is_known():
    rows = [(1000, 0.09), (1000, 0.1), (2000, 0.07), (2000, 0.071)]
    of = pd.concat([points(rows), points([(1000, 0.01)]).assign(d=50), points([(1000, None)], passed=0).assign(d=30)])
    console = Console(file=io.StringIO(), width=250)
    for table in update_tokens_tables({TOKENS: tokens_table(of), NEEDED: needed_table(of, 0.05)}):
        console.print(table)
    printed = console.file.getvalue()
    for said in (", extrapolated", "at most 1,000", "not reached", "none up to 1,000", "1,000 or fewer"):
        assert said in printed


# Streams
def test_a_row_is_what_the_decomposition_of_the_stream_says(run):
    row = pd.read_csv(run[0] / POINTS).iloc[1]
    stream = SyntheticStream("fresh", Shape(16, 4, 200), seed=0)
    fit = stream.capture(768, seed=1)
    dev, scored = (stream.capture(n, seed=seed, constant=fit.mean_p) for n, seed in ((192, 2), (515, 3)))
    found = decompose(stream.readout, fit, dev, scored, FIT, refits=2, readable=False, seed=0, spread=(0, 5))
    one = index_estimates(found)["in_place"]
    assert row["fit_tokens"] == 768
    assert (row["in_place"], row["in_place_ci_low"], row["in_place_ci_high"]) == pytest.approx(
        (one.value, one.low, one.high), rel=1e-5
    )
    assert row["passed"] == sum(not gate for gate in found.gate)
    assert row["in_place_population"] == pytest.approx(1, abs=1e-6)
    assert row["error"] == pytest.approx(one.value - 1, abs=1e-6)
    assert row["half_width"] == pytest.approx((one.high - one.low) / 2, rel=1e-5)


def test_a_stream_without_a_truth_has_the_same_interval():
    """Wide streams let go of their moments before the refits."""
    job = TokensJob(family="fresh", number=0, d=16, fit_tokens=768)
    changing = {"truth", "seconds", "peak_gib"}
    wide, whole = measure(job, recipe(truth_up_to=15)), measure(job, recipe())
    assert wide["truth"] is None
    assert {k: v for k, v in wide.items() if k not in changing} == {k: v for k, v in whole.items() if k not in changing}


def test_states_in_a_file_give_the_same_row():
    job = TokensJob(family="fresh", number=0, d=16, fit_tokens=768)
    changing = {"seconds", "peak_gib"}
    on_disk, here = measure(job, recipe(fit=FIT.model_copy(update={"memory_gib": 1e-9}))), measure(job, recipe())
    assert {k: v for k, v in on_disk.items() if k not in changing} == {
        k: v for k, v in here.items() if k not in changing
    }


def test_finished_streams_are_not_measured_again(run, monkeypatch):
    """Neither for another half-width, nor for another place of the states."""
    monkeypatch.setattr(study, "measure", lambda *_: pytest.fail("measured again"))
    elsewhere = FIT.model_copy(update={"memory_gib": 0.1})
    again = run_update_tokens(recipe(half_width=0.3, fit=elsewhere), run[0], workers=1)
    assert again[NEEDED]["asked"].tolist() == [0.3]
    pd.testing.assert_frame_equal(again[TOKENS], run[1][TOKENS])


def test_an_interrupted_study_goes_on_with_what_is_left(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "again")
    first, second = sorted((folder / "streams").iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns
    again = run_update_tokens(recipe(), folder, workers=1)
    assert sorted((folder / "streams").iterdir()) == [first, second]
    assert first.stat().st_mtime_ns == before
    timed = ["seconds", "peak_gib"]
    pd.testing.assert_frame_equal(again[POINTS].drop(columns=timed), run[1][POINTS].drop(columns=timed))


def test_a_damaged_row_is_named(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "again")
    first = min((folder / "streams").iterdir())
    first.write_text("{")
    with pytest.raises(LensbenchError, match=f"{first.name}.*measure anew"):
        run_update_tokens(recipe(), folder, workers=1)


def test_the_manifest_names_the_widths_that_were_measured(run):
    manifest = json.loads((run[0] / "manifest.json").read_text())
    assert manifest["widths"] == [16]
    assert set(manifest["files"]) == {POINTS, TOKENS, NEEDED}


# Files
def test_the_shipped_study_reaches_from_toys_to_large_models():
    shipped = load_calibration("update-tokens")
    assert isinstance(shipped, UpdateTokens)
    assert [width.d for width in shipped.widths] == [96, 288, 576, 2048, 4096]
    assert {job.d for job in shipped.jobs(up_to=576)} == {96, 288, 576}
    numbers = [(job.family, job.number, job.d, job.fit_tokens) for job in shipped.jobs()]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ('families = ["none"]', "families: unknown family 'none'"),
        ('families = ["fresh", "fresh"]', "families: names a family twice"),
        ("[[widths]]\nd = 16\ntokens = [48, 24]", "must rise from one entry to the next"),
        ("[[widths]]\nd = 16\ntokens = [8]\n[[widths]]\nd = 16\ntokens = [8]", "a width stands there twice"),
        ("[[widths]]\nd = 16\ntokens = [4]", "d = 16 has 16 dev tokens at the fewest; 32 are needed"),
        ("layers = 20\n[[widths]]\nd = 16\ntokens = [48]", "d = 16 is too narrow for 20 layers and an answer"),
        ("refit = 2", "unknown key 'refit'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, changed, said):
    lines = {"families": 'families = ["fresh"]', "widths": "[[widths]]\nd = 16\ntokens = [48]"}
    kept = [line for key, line in lines.items() if key not in changed]
    path = tmp_path / "bad.toml"
    path.write_text("\n".join(['name = "bad"', 'question = "?"', *sorted([*kept, changed], key=lambda x: "[[" in x)]))
    with pytest.raises(LensbenchError) as error:
        load_calibration(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("update-tokens", "--up-to", "50"), "has no width up to 50: its narrowest is 96"),
        (("update-tokens", "--only", "tune"), "--only is for update-calibration"),
        (("calibration", "--up-to", "96"), "--up-to is for update-tokens"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(tmp_path, options, said):
    result = CliRunner().invoke(app, ["calibrate", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_width_may_have_fewer_ridges_and_refits_and_streams_of_others_keep_their_names() -> None:
    plain, coarser = recipe(), recipe(widths=(Width(d=24, tokens=(20,), streams=1, ridges=(0.1, 1.0), refits=1),))
    assert "ridges" not in plain.jobs()[0].model_dump()
    assert "refits" not in plain.jobs()[0].model_dump()
    (job, *_) = coarser.jobs()
    assert job.model_dump()["ridges"] == (0.1, 1.0)
    assert job.refits == 1
    assert coarser.fit_of(job).ridges == (0.1, 1.0)
    assert coarser.fit_of(job).pads == coarser.fit.pads
    assert plain.fit_of(plain.jobs()[0]) == plain.fit
    with pytest.raises(ValueError, match="ridges"):
        recipe(widths=(Width(d=24, tokens=(20,), ridges=(1.0, 0.1)),))
