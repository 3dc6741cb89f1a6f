"""Claims are tested as scipy and the textbook say, and corrected together; what was not tested says why."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lensbench.errors import LensbenchError
from lensbench.report.claims import claim_rows, p_text
from lensbench.report.comparison import claim_table
from lensbench.report.joining import joined
from lensbench.report.page import claim_list
from lensbench.results.folder import Run
from lensbench.results.manifest import ClaimSettings, Manifest
from lensbench.results.schema import SCHEMA

A, B = [0.91, 0.97, 0.88, 0.93, 0.95], [0.80, 0.89, 0.85, 0.83, 0.86]
SURVIVAL = {"probe": "injection_survival", "quantity": "mean_survival_error_without_layer0"}
ABOVE = {"model": "a", "indices": ["in_place"], "above": 0.8}


def rows_of(model, values, **columns):
    """Rows of one model, one for each seed; ``None`` is undefined, a triple has its interval."""
    rows = []
    for seed, value in enumerate(values):
        point, low, high = value if isinstance(value, tuple) else (value, None, None)
        rows.append({"model": model, "seed": str(seed), "value": point, "ci_low": low, "ci_high": high} | columns)
    return rows


def run_of(claims, indices=(), landmarks=(), probes=(), models=("a", "b")) -> Run:
    manifest = Manifest.of_tables(Path("run"), list(models))
    suite = manifest.suite.model_copy(update={"claims": [ClaimSettings(**claim) for claim in claims]})
    tables = {name: pd.DataFrame(columns=list(columns)) for name, columns in SCHEMA.items()}
    given = {"indices.csv": indices, "landmarks.csv": landmarks, "probes.csv": probes}
    given["models.csv"] = [{"model": m, "seed": "0", "ce": 3.0, "ce_ci_low": 2.9, "ce_ci_high": 3.2} for m in models]
    for name, rows in given.items():
        tables[name] = pd.DataFrame(list(rows), columns=list(SCHEMA[name]))
    return Run(Path("run"), manifest.model_copy(update={"suite": suite}), tables)


def only(claim, **tables):
    (row,) = claim_rows(run_of([claim], **tables))
    return row


def students_p(values, bound):
    """One-sided p that the mean is above the bound, written out."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return stats.t.sf((mean - bound) / math.sqrt(variance / n), n - 1)


def normal_p(z):
    return math.erfc(z / math.sqrt(2)) / 2


def test_a_bound_over_seeds_is_students_one_sided_t():
    found = rows_of("a", A, index="in_place")
    row = only(ABOVE, indices=found)
    assert row["p"] == pytest.approx(students_p(A, 0.8), rel=1e-9)
    low, high = stats.t.interval(0.95, 4, np.mean(A), stats.sem(A))
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((np.mean(A), low, high))
    assert (row["outcome"], row["seeds"], row["note"]) == ("holds", 5, "")
    below = only({"model": "a", "indices": ["in_place"], "below": 0.8}, indices=found)
    assert below["p"] == pytest.approx(1 - students_p(A, 0.8))
    assert below["outcome"] == "does not hold"


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    found = rows_of("a", A, index="in_place")
    for low, high, holds in ((0.9, 1.1, False), (0.85, 1.0, True)):
        row = only({"model": "a", "indices": ["in_place"], "within": [low, high]}, indices=found)
        assert row["p"] == pytest.approx(max(students_p(A, low), 1 - students_p(A, high)), rel=1e-9)
        assert row["outcome"] == ("holds" if holds else "does not hold")


def test_a_value_differs_from_another_by_the_two_sided_test():
    for bound in (1.0, 0.9):
        row = only({"model": "a", **SURVIVAL, "differs_from": bound}, probes=rows_of("a", A, **PROBE))
        assert row["p"] == pytest.approx(stats.ttest_1samp(A, bound).pvalue, rel=1e-9)


PROBE = {"probe": SURVIVAL["probe"], "quantity": SURVIVAL["quantity"]}


@pytest.mark.parametrize(
    ("bound", "z"),
    [
        ({"above": 0.8}, 1.959963984540054 * 0.1 / 0.05),
        ({"above": 0.85}, 1.959963984540054),
        ({"below": 0.8}, -1.959963984540054 * 0.1 / 0.03),
        ({"below": 0.93}, 1.959963984540054),
        ({"within": [0.8, 0.96]}, 1.959963984540054 * 0.1 / 0.05),
    ],
)
def test_a_model_of_one_seed_is_tested_by_the_half_of_its_interval_on_the_side_of_the_bound(bound, z):
    found = rows_of("a", [(0.9, 0.85, 0.93)], index="in_place", reason="only 40 clusters")
    row = only({"model": "a", "indices": ["in_place"], **bound}, indices=found)
    assert row["p"] == pytest.approx(normal_p(z))
    assert (row["value"], row["ci_low"], row["ci_high"], row["seeds"]) == (0.9, 0.85, 0.93, 1)
    assert row["note"] == "one seed, by its own interval; only 40 clusters"
    two_sided = only({"model": "a", "indices": ["in_place"], "differs_from": 0.8}, indices=found)
    assert two_sided["p"] == pytest.approx(2 * normal_p(1.959963984540054 * 0.1 / 0.05))


def test_the_range_of_refits_widens_the_interval_of_one_seed():
    found = rows_of("a", [(0.9, 0.85, 0.93)], index="gain_visibility", fit_low=0.82, fit_high=0.91)
    row = only({"model": "a", "indices": ["gain_visibility"], "above": 0.8}, indices=found)
    assert (row["ci_low"], row["ci_high"]) == (0.82, 0.93)
    assert row["p"] == pytest.approx(normal_p(1.959963984540054 * 0.1 / 0.08))


def test_a_value_without_an_interval_or_the_same_at_every_seed_is_not_tested():
    found = rows_of("a", [0.9], index="in_place", reason="no interval: its documents count for 3 clusters")
    assert only(ABOVE, indices=found)["outcome"] == "not tested: no interval: its documents count for 3 clusters"
    same = only(ABOVE, indices=rows_of("a", [0.9, 0.9], index="in_place"))
    assert same["outcome"] == "not tested: it is the same at every seed"
    assert only({"model": "a", "indices": ["ce"], "below": 3.5})["p"] == pytest.approx(normal_p(1.959964 * 0.5 / 0.2))


def test_a_difference_is_paired_by_seed_and_has_to_lie_on_the_side_that_was_declared():
    found = rows_of("a", A, index="clarity") + rows_of("b", [*B[::-1], 0.1], index="clarity")
    expected = stats.ttest_rel(A, B[::-1])
    for direction, outcome in ((None, "holds"), ("above", "holds"), ("below", "does not hold")):
        claim = {"model": "a", "against": "b", "indices": ["clarity"]} | ({"direction": direction} if direction else {})
        row = only(claim, indices=found)
        assert (row["p"], row["seeds"], row["outcome"]) == (pytest.approx(expected.pvalue), 5, outcome)
        interval = expected.confidence_interval(0.95)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))
    one = only({"model": "a", "against": "b", "indices": ["clarity"]}, indices=found[:1] + found[5:6])
    assert one["outcome"].startswith("not tested: a difference is paired by seed: two seeds in common are needed")


LANDMARK = {"landmark": "carried", "index": "in_place"}


def test_a_landmark_that_no_gate_lets_pass_is_listed_with_the_reason_and_not_counted():
    on_landmark = {"model": "a", "landmark": "carried", "indices": ["in_place"], "below": 0.3}
    why = "undetermined: 0 of 15 pairs of layers pass the gates and 3 are needed"
    shut = rows_of("a", [None] * 5, reason=why, **LANDMARK)
    first, second = claim_rows(run_of([ABOVE, on_landmark], rows_of("a", A, index="in_place"), shut))
    assert second["claim"] == "a+carried: in_place lies below 0.3"
    assert (second["outcome"], second["p"], second["p_holm"]) == (f"not tested: {why}", None, None)
    assert first["p_holm"] == first["p"], "one test, nothing to correct"
    some = rows_of("a", [0.02, None, -0.05, 0.04, None], reason="", **LANDMARK)
    tested = only(on_landmark, landmarks=some)
    assert tested["p"] == pytest.approx(1 - students_p([0.02, -0.05, 0.04], 0.3))
    assert tested["note"] == "only 3 seeds; the gates pass for 3 of 5 seeds"
    lone = only(on_landmark, landmarks=rows_of("a", [0.02, None], reason="", **LANDMARK))
    assert lone["outcome"] == "not tested: the gates pass for 1 of 2 seeds, and two are needed"


def test_a_probe_that_does_not_apply_says_why():
    none = [
        {"model": "a", "seed": "0", "probe": SURVIVAL["probe"], "quantity": SURVIVAL["probe"], "reason": "no blocks"}
    ]
    claim = {"model": "a", **SURVIVAL, "within": [0.9, 1.1]}
    assert only(claim, probes=none)["outcome"] == "not tested: no blocks"
    assert only(claim)["outcome"] == f"not tested: probes.csv has no {SURVIVAL['quantity']} of a"
    on_landmark = {"model": "a", "landmark": "carried", "indices": ["in_place"], "below": 0.3}
    assert only(on_landmark)["outcome"] == "not tested: landmarks.csv has no in_place of a+carried"
    difference = {"model": "a", "against": "b", "indices": ["clarity"]}
    found = rows_of("a", A, index="clarity")
    assert only(difference, indices=found)["outcome"] == "not tested: indices.csv has no clarity of b"


def step_down(p):
    """Holm's correction by hand: the smallest of m times m, the next times m - 1, none below the one before it."""
    corrected, largest = {}, 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        corrected[at] = largest
    return [corrected[at] for at in range(len(p))]


def several_claims():
    claims = [
        ABOVE,
        {"model": "b", "indices": ["in_place"], "above": 0.8},
        {"model": "a", "against": "b", "indices": ["in_place", "clarity"]},
        {"model": "a", **SURVIVAL, "within": [0.8, 1.1]},
        {"model": "c", "indices": ["in_place"], "above": 0.8},
        {"model": "b", "indices": ["news"], "below": 0.5},
    ]
    indices = [row for model, values in (("a", A), ("b", B)) for row in rows_of(model, values, index="in_place")]
    indices += rows_of("a", A[::-1], index="clarity") + rows_of("b", B, index="clarity")
    indices += rows_of("b", [0.1, 0.2, None, 0.1, 0.3], index="news", reason="undetermined: no gain")
    return claims, {"indices": indices, "probes": rows_of("a", A, **PROBE)}


def test_all_tests_are_corrected_together_and_what_was_not_tested_counts_as_nothing_found():
    claims, tables = several_claims()
    rows = claim_rows(run_of(claims, **tables))
    said = [row["outcome"] for row in rows]
    assert said[5] == "not tested: model c is not in these folders"
    assert said[6] == "not tested: undefined for seed 2: undetermined: no gain"
    p = [1.0 if row["p"] is None else row["p"] for row in rows]
    assert p.count(1.0) == 2
    found = [row["p_holm"] for row in rows]
    assert found[:5] == pytest.approx(step_down(p)[:5])
    assert found[:5] == pytest.approx(multipletests(p, method="holm")[1][:5])
    assert found[5:] == [None, None]


def test_parts_of_a_suite_are_tested_as_the_whole():
    claims, tables = several_claims()
    whole = run_of(claims, **tables)
    parts = []
    for model in "ab":
        mine = {
            name: table[table["model"] == model] if "model" in table else table for name, table in whole.tables.items()
        }
        parts.append(Run(whole.folder, whole.manifest.model_copy(update={"models": [model]}), mine))
    suite = whole.manifest.suite.model_copy(update={"models": []})
    parts = [Run(p.folder, p.manifest.model_copy(update={"suite": suite}), p.tables) for p in parts]
    assert claim_rows(joined(parts)) == claim_rows(whole)
    alone = claim_rows(parts[0])
    assert alone[1]["outcome"] == alone[2]["outcome"] == "not tested: model b is not in these folders"


def test_claims_are_told_in_words_on_the_terminal_and_on_the_page():
    run = run_of(
        [{**ABOVE, "status": "seen in a prototype"}, {**ABOVE, "model": "c"}], rows_of("a", A, index="in_place")
    )
    console = Console(width=200, record=True)
    console.print(claim_table(pd.DataFrame(claim_rows(run))))
    text, page = console.export_text(), claim_list(run)
    for told in (
        "a: in_place lies above 0.8",
        "holds",
        "seen in a prototype",
        "not tested: model c is not in these folders",
    ):
        assert told in text
        assert told in page
    assert "0.93 [" in text
    assert "0.93 [" in page
    assert not claim_list(run_of([]))


def test_tables_show_no_p_that_an_interval_cannot_tell():
    assert [p_text(p) for p in (0.0123, 1e-4, 9e-5, 0.0, None)] == ["0.012", "0.0001", "<0.0001", "<0.0001", ""]


def test_claims_of_earlier_manifests_are_read_and_damaged_ones_refused():
    old = ClaimSettings.model_validate({"model": "a", "against": "b", "indices": ["in_place"]}, strict=True)
    found = rows_of("a", A, index="in_place") + rows_of("b", B, index="in_place")
    (row,) = claim_rows(run_of([old.content() | {"of_another_version": 1}], indices=found))
    assert (row["claim"], row["status"], row["outcome"]) == ("a - b: in_place differs from 0", None, "holds")
    with pytest.raises(LensbenchError, match="its manifest's claims are damaged: a claim about 'a' sets one of"):
        claim_rows(run_of([{"model": "a", "indices": ["in_place"]}]))
