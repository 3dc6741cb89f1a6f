"""Verdicts: the rule on whole intervals, agreement of seeds, and the table of a calibration."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.measures.verdict import CANNOT_TELL, Span, Verdict, VerdictRule, agreement_of_seeds, decide
from lensbench.studies.calibration import JUDGED, Calibration, midpoints, summarise
from lensbench.studies.synthetic import STREAM_FAMILIES, Shape, SyntheticStream
from lensbench.suite.files import load_calibration

RULE = VerdictRule(visible=0.25, consistent=0.6, still=0.1, inconsistent=0.35, unseen=0.0)


def spans(visibility, movement, consistency, half=0.02):
    values = {"visibility": visibility, "movement": movement, "consistency": consistency}
    return {name: None if v is None else Span(v, v - half, v + half) for name, v in values.items()}


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ((0.7, 1.4, 0.9), "refinement"),
        ((0.0, 0.0, 1.0), "carry-along"),
        ((-1.5, 2.7, 0.1), "re-representation"),
        ((-1.3, 1.9, 0.63), CANNOT_TELL),  # overlapping carry-along
        ((0.7, 1.4, 0.5), CANNOT_TELL),
        ((0.2, 1.4, 0.9), CANNOT_TELL),
        ((0.7, 1.4, None), CANNOT_TELL),
        ((0.05, 1.4, 0.9), CANNOT_TELL),
        ((0.0, 0.0, None), "carry-along"),
        ((None, 0.0, 0.9), CANNOT_TELL),
    ],
)
def test_the_rule_on_what_is_known_of_streams(found, answer):
    verdict = decide(RULE, spans(*found))
    assert verdict.answer == answer
    assert "undefined" in verdict.reason if None in found else "gain visibility" in verdict.reason


@given(*(st.floats(-4, 4) for _ in range(3)), st.floats(0, 1))
@example(-0.078125, 0.0, 0.0, 0.0625)
def test_a_wider_interval_never_tells_something_else(visibility, movement, consistency, extra):
    """It tells the same or nothing."""
    narrow = decide(RULE, spans(visibility, movement, consistency, 0.01)).answer
    wide = decide(RULE, spans(visibility, movement, consistency, 0.01 + extra)).answer
    assert wide in (narrow, CANNOT_TELL)


def test_refits_widen_an_interval():
    span = Span(0.5, 0.4, 0.6)
    assert span.wider(0.3, 0.55) == Span(0.5, 0.3, 0.6)
    assert span.wider(None, None) == span


def test_seeds_have_to_agree():
    one, other = Verdict("refinement", "a"), Verdict("carry-along", "b")
    means = spans(0.7, 1.4, None)
    same = agreement_of_seeds([one, one, one], means)
    assert same.answer == "refinement"
    assert "all 3 seeds" in same.reason
    assert "gain visibility 0.700" in same.reason
    mixed = agreement_of_seeds([one, one, other], means)
    assert mixed.answer == CANNOT_TELL
    assert "2 refinement, 1 carry-along" in mixed.reason
    assert "consistency undefined" in mixed.reason


def test_a_rule_that_allows_two_answers_is_refused():
    with pytest.raises(ValidationError, match="inconsistent must not exceed consistent"):
        VerdictRule(consistent=0.2, inconsistent=0.4)


# Calibration


def test_the_shipped_calibration_judges_on_families_that_it_was_not_tuned_on():
    recipe = load_calibration("calibration")
    assert not set(recipe.tune) & set(recipe.held_out)
    assert {"overlapping", "partly-rebased", "partly-carried"} <= set(recipe.held_out)
    assert set(recipe.tune) | set(recipe.held_out) == set(STREAM_FAMILIES)
    assert max(recipe.d) <= 48
    assert recipe.fresh >= 100
    jobs = list(recipe.jobs())
    assert len(jobs) == recipe.streams * len(STREAM_FAMILIES)
    assert {j.shape["layers"] for j in jobs} == set(recipe.layers)
    assert len({j.seed for j in jobs}) == len(jobs), "no two streams share their tokens, of whatever family"


def test_summaries_count_what_is_right_among_what_is_committed():
    rows = [
        ("fresh", "refinement", "refinement", 0.5), ("fresh", "refinement", CANNOT_TELL, 0.5),
        ("fresh", "refinement", "carry-along", 0.9), ("drifting", "mixed", "refinement", 0.5),
        ("drifting", "mixed", CANNOT_TELL, 0.5),
    ]  # fmt: skip
    frame = pd.DataFrame(
        {"verdict_without_layer0": CANNOT_TELL}
        | {"set": "held_out", "family": f, "truth": t, "verdict": v, **dict.fromkeys(("layers", "d", "tokens"), 4)}
        | {"first_noise": 1.0, "last_noise": 0.2, "shared_consistency_own_views_true": 0.7}
        | {
            k: x
            for n in JUDGED
            for k, x in ((n, 0.5), (f"{n}_ci_low", 0.4), (f"{n}_ci_high", 0.6), (f"{n}_true", true))
        }
        for f, t, v, true in rows
    )
    whole = summarise(frame)
    table = whole.set_index(["by", "value"])
    assert table.loc[("family", "fresh"), "right_when_committed"] == 0.5
    assert table.loc[("family", "fresh"), "cannot_tell"] == pytest.approx(1 / 3)
    assert table.loc[("family", "drifting"), "right_when_committed"] == 0.0
    assert table.loc[("all", "all"), "right_when_committed"].iloc[0] == pytest.approx(1 / 3)
    assert table.loc[("pure", "all"), "committed"] == 2
    assert table.loc[("family", "fresh"), "covered_movement"] == pytest.approx(2 / 3)
    low, high = table.loc[("family", "fresh"), ["covered_movement_ci_low", "covered_movement_ci_high"]]
    assert 0 < low < 2 / 3 < high < 1
    assert (table.loc[("noise", "1.0 to 0.2"), "streams"] == 5).all()
    assert (whole["covered_shared_consistency_own_views"] == 0).all()
    assert table.loc[("family", "fresh"), "cannot_tell_without_layer0"] == 1
    both = whole[whole["set"] == "both"]
    assert len(both) == 5
    assert both["right_when_committed"].isna().all()
    assert both["covered_movement"].notna().all()


def test_thresholds_lie_midway_between_the_worst_that_has_to_pass_and_the_nearest_that_must_not():
    columns = ("gain_visibility_ci_low", "shared_consistency_ci_low", "shared_consistency_ci_high")
    rows = [
        ("tune", "fresh", "refinement", 0.8, 0.7, 0.9), ("tune", "fresh", "refinement", 0.9, 0.8, 0.95),
        ("tune", "drifting", "mixed", 0.5, 0.75, 0.8), ("tune", "half-rebased", "mixed", -1.0, 0.3, 0.4),
        ("tune", "rebased", "re-representation", -2.0, -0.1, 0.1), ("tune", "rebased", "re-representation", -3.0, 0.0, 0.2),
        ("held_out", "removed", "refinement", 0.1, 0.1, 0.1),
    ]  # fmt: skip
    streams = pd.DataFrame(rows, columns=("set", "family", "truth", *columns))
    found = midpoints(streams).set_index("threshold")
    # `drifting` reaches beyond the worst refinement's consistency: visibility is what keeps it out.
    assert found["pure"].to_dict() == pytest.approx({"visible": 0.8, "consistent": 0.7, "inconsistent": 0.2})
    assert found["other"].to_dict() == pytest.approx({"visible": 0.5, "consistent": 0.3, "inconsistent": 0.4})
    assert found["midpoint"].to_dict() == pytest.approx({"visible": 0.65, "consistent": 0.5, "inconsistent": 0.3})


@pytest.mark.run
def test_a_calibration_runs_is_taken_up_and_says_the_same_again(tmp_path):
    recipe = tmp_path / "little.toml"
    recipe.write_text(
        'name = "little"\nquestion = "Does it run?"\ntune = ["fresh"]\nheld_out = ["rebased", "disjoint"]\nstreams = 2\n'
        "layers = [3]\nd = [20]\nvocab = 40\ntokens = [600]\nfit_tokens = 800\ndev_tokens = 200\nfresh = 4\ndraws = 100\n"
        "[fit]\nridges = [1e-2, 0.1, 1.0]\npads = [0.0, 0.4, 0.8]\nlayers = 2\ntolerances = []\nrotations = 2\n"
        "pair_rotations = 1\nvariance = 1.0\nrefits = 0\nrefine_passes = 0\n"
    )

    def run():
        return CliRunner().invoke(app, ["calibrate", str(recipe), "--out", str(tmp_path / "run"), "--workers", "2"])

    first = run()
    assert first.exit_code == 0, first.output
    tables = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.csv")}
    streams = pd.read_csv(tmp_path / "run" / "streams.csv")
    assert len(streams) == 6
    assert np.isfinite(streams["gain_visibility_true"]).all()
    assert set(streams.loc[streams["family"] == "disjoint", "verdict"]) == {"carry-along"}
    assert (streams.loc[streams["family"] == "rebased", "shared_consistency"].dropna() < 0.4).all()
    # The null of new views is another sample of the same mean, that of the fit's own is what the value itself has.
    gap = (streams["shared_consistency_true"] - streams["shared_consistency_own_views_true"]).abs().dropna()
    assert (gap > 0).all()
    assert (gap < 0.2).all()
    gap = (streams["shared_retention"] - streams["shared_retention_true"]).abs().dropna()
    assert len(gap) >= 4
    assert (gap < 0.15).all()
    assert (gap > 0).all()
    kept = sorted((tmp_path / "run" / "streams").iterdir())
    before = kept[1].stat().st_mtime_ns
    kept[0].unlink()
    assert run().exit_code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.csv")} == tables
    assert kept[1].stat().st_mtime_ns == before
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["calibration"]["streams"] == 2


@pytest.mark.parametrize("family", STREAM_FAMILIES)
def test_every_family_ends_in_the_answer_and_gets_better_towards_it(family):
    stream = SyntheticStream(family, Shape(d=24, layers=4, vocab=50), seed=1)
    states = stream.states(400, seed=0)
    assert states.shape == (5, 400, 24)
    answer = states[-1][:, : stream.width].double().numpy()
    residual = []
    for h in states[:-1].double().numpy():
        design = np.column_stack([h, np.ones(400)])
        fitted = design @ np.linalg.lstsq(design, answer, rcond=None)[0]
        residual.append(((answer - fitted) ** 2).sum())
    assert residual[-1] < residual[0]
    if family not in ("overlapping", "partly-carried"):  # where a copy covers those before it
        assert all(b < a for a, b in itertools.pairwise(residual))


def test_a_calibration_names_families_that_there_are():
    with pytest.raises(ValidationError, match="unknown family 'stale'"):
        Calibration(name="x", question="y", tune=("stale",), held_out=("fresh",))
