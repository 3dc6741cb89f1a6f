"""What the terminal and the page say of verdicts, from the tables alone."""

from pathlib import Path

import pandas as pd
import pytest

from lensbench.errors import LensbenchError
from lensbench.measures.update.sentences import MORE_EVAL_TEXT, MORE_FIT_TEXT
from lensbench.measures.update.views import LANDMARKS
from lensbench.report.terminal import answer_lines, verdict_cell
from lensbench.report.verdicts import landmarks_in_words, rule_of, update_statements
from lensbench.results.folder import Run, read_run
from lensbench.results.schema import no_rows

RESULTS = Path(__file__).resolve().parents[2] / "results"


def landmarks(**verdicts):
    """Rows of ``landmarks.csv`` of a model; landmark -> verdict and gate of each seed."""
    return pd.DataFrame(
        [
            {
                "model": "gpt",
                "seed": seed,
                "landmark": name,
                "index": "in_place",
                "verdict": verdict,
                "gate": gate,
                "known": LANDMARKS[name].truth,
            }
            for name, of_seeds in verdicts.items()
            for seed, (verdict, gate) in enumerate(of_seeds)
        ]
    )


def test_landmarks_are_counted_by_whether_they_get_their_known_answer():
    table = landmarks(
        rotated=[("re-represented", None)] * 2,
        carried=[("carried along", None), ("mixed", None)],
        drifting=[("undetermined", "between two answers")] * 2,
        shuffled=[("undetermined", "no fall")] * 2,
    )
    assert landmarks_in_words(table, "gpt", "all layers") == (
        "Landmarks that get their known answer: 2 of 4; carried at 1 of 2 seeds; "
        "drifting gets undetermined (between two answers), not mixed."
    )
    assert landmarks_in_words(table, "gpt", "without layer 0") == ""
    assert landmarks_in_words(table, "other", "all layers") == ""


def test_a_rule_of_an_earlier_version_is_read_without_what_is_no_longer_asked():
    run = read_run(RESULTS / "vision")
    rule = {"visible": 0.61, "update": {"added": 0.8, "news": 0.5}}
    suite = run.manifest.suite.model_copy(update={"verdict": rule})
    found = rule_of(Run(run.folder, run.manifest.model_copy(update={"suite": suite}), run.tables))
    assert (found.visible, found.update.added) == (0.61, 0.8)
    suite = run.manifest.suite.model_copy(update={"verdict": {"update": {"aded": 0.8}}})
    with pytest.raises(LensbenchError, match="its manifest's verdict is no rule"):
        rule_of(Run(run.folder, run.manifest.model_copy(update={"suite": suite}), run.tables))


def test_a_statement_is_the_sentence_of_the_table_and_its_landmarks():
    run = read_run(RESULTS / "probes" / "smollm2")  # without the decomposition
    assert update_statements(run) == []
    row = {
        "model": "gpt",
        "seed": "0",
        "scope": "all layers",
        "verdict": "mixed",
        "sentence": "A sentence.",
        "gate": None,
    }
    tables = {"verdicts.csv": pd.DataFrame([row]), "landmarks.csv": landmarks(rotated=[("re-represented", None)])}
    (said,) = update_statements(Run(run.folder, run.manifest, tables))
    assert str(said) == ("gpt (all layers): mixed. A sentence. Landmarks that get their known answer: 1 of 1.")
    tables["landmarks.csv"] = no_rows("landmarks.csv")
    (said,) = update_statements(Run(run.folder, run.manifest, tables))
    assert said.reasons == "A sentence."


@pytest.mark.parametrize(
    ("verdict", "gate", "cell"),
    [
        ("mixed", float("nan"), "mixed"),
        ("undetermined", "no fall", "undetermined (no fall)"),
        ("undetermined", "not measured", "not measured"),
    ],
)
def test_tables_show_an_undetermined_verdict_with_its_gate(verdict, gate, cell):
    assert verdict_cell(pd.Series({"verdict": verdict, "gate": gate})) == cell


def test_advice_and_landmarks_are_given_once_from_layer_1_on():
    run = read_run(RESULTS / "probes" / "smollm2")
    whole = {"model": "gpt", "seed": "0", "verdict": "undetermined", "gate": "between two answers"}
    rows = [
        whole | {"scope": "all layers", "sentence": f"Over all layers 80 %; clarity 0.9; {MORE_FIT_TEXT}."},
        whole | {"scope": "without layer 0", "sentence": f"From layer 1 on 80 %; clarity 0.9; {MORE_EVAL_TEXT}."},
    ]
    table = landmarks(rotated=[("re-represented", None)])
    of_later = table.assign(index="in_place_without_layer0")
    tables = {"verdicts.csv": pd.DataFrame(rows), "landmarks.csv": pd.concat([table, of_later])}
    run = Run(run.folder, run.manifest, tables)
    first, second = update_statements(run)
    assert first.reasons == "Over all layers 80 %; clarity 0.9."
    assert second.said == f"From layer 1 on 80 %; clarity 0.9; {MORE_EVAL_TEXT}."
    assert second.landmarks == "Landmarks that get their known answer: 1 of 1."
    assert answer_lines(run) == [
        "gpt: undetermined (between two answers)",
        f"  From layer 1 on 80 %; {MORE_EVAL_TEXT}.",
    ]
