"""The terminal, the page, the README and ``verdicts.csv`` say the same of every model of every committed run."""

import html
import io
import re
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from lensbench.measures.verdict import CANNOT_TELL, SCOPES, conditions, decide_on
from lensbench.report.formatting import shown_seeds
from lensbench.report.page import page
from lensbench.report.terminal import print_run
from lensbench.report.verdicts import rule_of, statements
from lensbench.results.folder import read_run
from lensbench.results.verdicts import span_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.results
RUNS = (
    "quick", "smollm2", "standard/gpt", "standard/pc", "standard/controls", "predictive-coding/gpt",
    "predictive-coding/pc", "predictive-coding/ablation", "vision", "probes/small", "probes/smollm2",
)  # fmt: skip


@cache
def committed(name):
    return read_run(ROOT / "results" / name)


def answers(run):
    """(model, scope) -> the answer of verdicts.csv about lenses held fixed."""
    table = shown_seeds(run.tables["verdicts.csv"])
    return {(row["model"], row["scope"]): row["fixed_lens_verdict"] for _, row in table.iterrows()}


def said_by_the_terminal(run):
    printed = io.StringIO()
    print_run(run, Console(file=printed, width=2000))
    lines = re.findall(
        r"^(\S+) \((all layers|without layer 0), lenses held fixed\): ([a-z -]+)\. (.*)$", printed.getvalue(), re.M
    )
    return {(model, scope): (answer, reasons) for model, scope, answer, reasons in lines}


def said_by_the_page(run):
    verdicts = r"<summary><strong>(\S+)</strong>[^<]*</summary>\s*<ul>(.*?)</ul>"
    items = re.findall(verdicts, page([run]), re.S)
    item = re.compile(r"<li>([^:,]*), lenses held fixed: <span class=verdict>([^<]*)</span>\. (.*?)</li>")
    return {
        (html.unescape(model), scope): (answer, html.unescape(reasons))
        for model, content in items
        for scope, answer, reasons in item.findall(content)
    }


@pytest.mark.parametrize("name", RUNS)
def test_terminal_and_page_say_the_verdict_of_the_table_and_no_other(name):
    run = committed(name)
    expected = answers(run)
    assert len(expected) == 2 * run.tables["models.csv"]["model"].nunique()
    for said in (said_by_the_terminal(run), said_by_the_page(run)):
        assert {key: answer for key, (answer, _) in said.items()} == expected
        for (model, scope), (answer, reasons) in said.items():
            others = {*conditions(rule_of(run)), CANNOT_TELL} - {answer}
            assert not [other for other in others if other in reasons], (model, scope, reasons)


@pytest.mark.parametrize("name", RUNS)
def test_the_rule_in_the_manifest_gives_the_verdicts_of_the_table(name):
    """So what a statement says of thresholds is what decided."""
    run = committed(name)
    table = run.tables["verdicts.csv"].set_index(["model", "seed", "scope"])["fixed_lens_verdict"]
    indices = run.tables["indices.csv"]
    for (model, seed), rows in indices[indices["seed"] != "all"].groupby(["model", "seed"], sort=False):
        indexed = rows.set_index("index")
        for scope in SCOPES:
            found = decide_on(rule_of(run), scope, lambda index, indexed=indexed: span_of(indexed, index))
            assert found.answer == table[model, seed, scope], (model, seed, scope)


def test_what_holds_a_model_back_is_said_with_its_threshold():
    by_key = {(s.model, s.scope): s for s in statements(committed("standard/pc"))}
    held = by_key["pc+state", "all layers"]
    assert held.answer == CANNOT_TELL
    assert held.grounds.startswith("at 3 of 5 seeds gain visibility would have to lie above 0.61")
    assert "not the same at every loss" in held.sensitivity
    given = by_key["pc", "all layers"]
    assert given.answer == "refinement"
    assert given.grounds == "gain visibility lies above 0.61 and consistency lies above 0.56 at all 5 seeds"


def test_the_findings_quote_the_verdicts_of_standard():
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", (ROOT / "results" / "findings" / "fixed-lenses.md").read_text(), re.M
    )
    quoted = {model: verdict for model, verdict in rows if verdict.startswith((CANNOT_TELL, *conditions_of_standard()))}
    found = {}
    for part in ("gpt", "pc", "controls"):
        found |= answers(committed(f"standard/{part}"))
    assert set(quoted) == {model for model, _ in found}
    for model, verdict in quoted.items():
        whole, later = (found[model, scope] for scope in SCOPES)
        assert verdict == (whole if whole != CANNOT_TELL or whole == later else f"{whole}; {later} without layer 0")


def conditions_of_standard():
    return tuple(conditions(rule_of(committed("standard/gpt"))))
