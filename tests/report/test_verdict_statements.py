"""What the terminal and the page say of verdicts, from the tables alone."""

from pathlib import Path

import pandas as pd
import pytest

from lensbench.errors import LensbenchError
from lensbench.report.terminal import verdict_cell
from lensbench.report.verdicts import landmarks_in_words, rule_of, update_statements
from lensbench.results.folder import Run, read_run
from lensbench.results.schema import no_rows

RESULTS = Path(__file__).resolve().parents[2] / "results"


def landmarks(**verdicts):
    """Rows of ``landmarks.csv`` of a model; landmark -> verdict and gate of each seed."""
    return pd.DataFrame(
        [
            {"model": "gpt", "seed": seed, "landmark": name, "index": "in_place", "verdict": verdict, "gate": gate}
            for name, of_seeds in verdicts.items()
            for seed, (verdict, gate) in enumerate(of_seeds)
        ]
    )


def test_verdicts_on_landmarks_are_said_once_and_each_where_seeds_differ():
    table = landmarks(
        rotated=[("re-represented", None)] * 2,
        carried=[("carried along", None), ("mixed", None)],
        shuffled=[("undetermined", "no fall")] * 2,
    )
    assert landmarks_in_words(table, "gpt", "all layers") == (
        "The same rule on landmarks made of its own states: rotated, re-represented; carried, carried along or mixed; "
        "shuffled, undetermined (no fall)."
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
    run = read_run(RESULTS / "smollm2")  # of a version before the decomposition
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
    assert str(said) == (
        "gpt (all layers): mixed. A sentence. The same rule on landmarks made of its own states: rotated, re-represented."
    )
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
