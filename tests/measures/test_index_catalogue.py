"""The catalogue of indices: what adding one to it does, and what is made from it."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.measures import indices
from lensbench.measures.indices import (
    INDICES,
    Index,
    compared_quantities,
    find_index,
    indices_table,
    shown_indices,
    variants_of,
)
from lensbench.measures.means import Value
from lensbench.report.compare import compare_runs
from lensbench.results.schema import schema_text
from lensbench.suite.recipes import Suite

ROOT = Path(__file__).resolve().parents[2]
TOY = Index(
    "last_gap",
    "last gap",
    "K_own,L-1 / K_0",
    "How far the last lens is from the model.",
    stage="none",
    compute=lambda m: Value(m.own[..., -1] / m.constant),
    shown=50,
)


@pytest.fixture
def with_toy(monkeypatch):
    monkeypatch.setitem(INDICES, TOY.name, TOY)


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_an_index_of_the_catalogue_alone_is_in_the_table_on_the_terminal_in_compare_and_in_the_schema(
    with_toy, tiny_suite, tiny_run, tmp_path
):
    folder = shutil.copytree(tiny_run, tmp_path / "tiny")
    result = CliRunner().invoke(app, ["run", str(tiny_suite), "--out", str(folder)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert f"│ {TOY.name} " in result.output
    table = pd.read_csv(folder / "indices.csv")
    rows = table[table["index"] == TOY.name]
    assert list(rows["model"]) == ["gpt", "pc", "pc+state"]
    assert (rows["stage"] == "none").all()
    assert rows[["value", "ci_low", "ci_high", "fit_low", "fit_high"]].notna().all(axis=None)
    compared = compare_runs([folder]).table
    found = compared[(compared["index"] == TOY.name) & (compared["kind"] == "value")]
    assert list(found["value"]) == pytest.approx(list(rows["value"]), rel=1e-6)
    assert f"| `{TOY.name}` | {TOY.label} | {TOY.formula} |" in schema_text()
    assert f"| `{TOY.name}` | {TOY.reading} |" in indices_table()


def test_a_suite_may_claim_an_index_as_soon_as_the_catalogue_shows_it(with_toy):
    shape = {"family": "gpt", "d_model": 16, "layers": 2, "heads": 2, "parameters": 60_000}
    claim = {"model": "a", "against": "b", "indices": [TOY.name]}
    content = {"name": "x", "question": "y", "models": [{"name": n, **shape} for n in "ab"], "claims": [claim]}
    assert Suite.model_validate(content).claims[0].indices == (TOY.name,)
    claim["indices"] = ["constant_kl"]
    with pytest.raises(ValueError, match="a claim is about index 'constant_kl'"):
        Suite.model_validate(content)


def test_the_guides_index_works(with_toy):
    guide = (ROOT / "benchmarks" / "extending.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", guide, re.S) if "Index(" in b)
    exec(block, {})
    assert INDICES[TOY.name] is not TOY
    assert TOY.name in shown_indices()


def test_the_page_of_indices_shows_the_catalogue():
    assert indices_table() in (ROOT / "results" / "indices.md").read_text()


def test_every_index_says_what_it_is_and_stands_after_what_it_is_made_of():
    names = list(INDICES)
    for name, index in INDICES.items():
        assert index.name == name
        assert all((index.label, index.formula, index.unit, index.comparable, index.source)), name
        assert index.reading.endswith("."), name
        assert not index.variant_of or (index.variant_of in INDICES and index.variant), name
        assert all(names.index(part) < names.index(name) for part in index.made_of or ()), name


def test_shown_indices_have_places_of_their_own():
    places = [INDICES[name].shown for name in shown_indices()]
    assert places == sorted(set(places))
    assert compared_quantities()[:2] == ("ce", "bits_per_byte")
    assert {v.name for v in variants_of("pair_consistency")} == {"pair_consistency_without_layer0"}


def test_rows_of_a_family_are_found_by_their_distance():
    assert find_index("movement_distance_12") is INDICES["movement_distance_K"]
    assert set(indices.by_distance(3)) == {
        f"{name}_distance_{k}" for name in ("gain_visibility", "movement") for k in (1, 2)
    }
    with pytest.raises(LensbenchError, match="no index 'nonsense_3'"):
        find_index("nonsense_3")


def test_an_index_with_two_sources_or_none_is_refused():
    with pytest.raises(ValueError, match="needs one of"):
        Index("x", "x", "x", "X.")
    with pytest.raises(ValueError, match="needs one of"):
        Index("x", "x", "x", "X.", compute=TOY.compute, fact=True)


def test_an_index_of_more_than_means_says_so():
    with pytest.raises(LensbenchError, match="similarity_correlation is not made of means alone"):
        INDICES["similarity_correlation"].value(None)
