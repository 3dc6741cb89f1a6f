"""The catalogue of probes: every quantity that a probe writes is in it, and the documentation is made from it."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers.planted import planted, subject_of

from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.recipe import JacobianRecipe
from lensbench.models import build
from lensbench.probes.catalogue import probes_markdown, quantities_markdown
from lensbench.probes.registry import PROBES, quantities, quantity_of

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocab_size": 97, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}
COLUMNS = {
    "model": (False, False),
    "layer": (True, False),
    "pair": (True, True),
    "head": (True, True),
    "blocks": (False, True),
    "rank": (False, True),
    "layer and rank": (True, True),
    "target": (False, True),
}
"""Whether ``layer`` and ``other`` have a value, by what a quantity belongs to."""


@pytest.fixture(scope="module")
def subjects():
    pc = build("predictive-coding", seed=1, error="linear", **SHAPE).eval()
    linear = build("predictive-coding", seed=1, kernel="linear", error_gradient=False, **SHAPE).eval()
    return [subject_of(model, count=32) for model in (planted("none"), pc, linear)]


SECONDS = ("causal_fidelity", "error_transport", "few_shot", "prediction_visibility")
"""Probes that take seconds for a small model, too"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SECONDS else name for name in PROBES]
)
def test_a_probe_writes_the_quantities_of_its_catalogue_and_no_others(name, subjects):
    probe, written = PROBES[name], set()
    families = {"block_order": ("gpt", 4), "loops": ("gpt-looped", 3)}  # what some quantities take
    others = [
        subject_of(build(family, seed=1, **SHAPE | {"layers": layers}).eval(), count=8)
        for probe_name, (family, layers) in families.items()
        if probe_name == name
    ]
    if name in ("guess_and_refine", "lens_rank", "early_exit"):  # lenses that not every suite asks for
        further = {"jacobian": subjects[0].own, "shared_jacobian": subjects[0].shared}
        others = [replace(subjects[0], further=further)]
    if name in ("decodable_used", "jacobian_halves"):
        recipe = JacobianRecipe(method="random", prompts=8, probes=1, skip_first=2)
        others = [replace(subjects[0], jacobians=lambda prompts: JacobianSource(subjects[0].stream, prompts, recipe))]
    for subject in [*subjects, *others]:
        measured = probe.measure(subject)
        if measured.reason:
            continue
        for quantity, layer, other in zip(measured.quantity, measured.layer, measured.other, strict=True):
            entry = probe.quantity(quantity)
            assert entry is not None, quantity
            assert COLUMNS[entry.of] == (layer is not None, other is not None), quantity
            written.add(quantity)
    assert written == {quantity.name for quantity in probe.quantities}


def test_a_quantity_has_one_name_one_probe_and_says_all_of_itself():
    names = [quantity.name for quantity in quantities()]
    assert len(set(names)) == len(names)
    for quantity in quantities():
        assert quantity.reading.endswith(".")
        assert quantity.label
        assert quantity.formula
        assert quantity.comparable
        if quantity.panel is not None and quantity.panel.null:
            assert quantity.panel.null in names


def test_the_documentations_tables_are_those_of_the_catalogue():
    benchmarks = ROOT / "benchmarks"
    assert probes_markdown(PROBES.values()) in (benchmarks / "probes.md").read_text()
    pages = [(benchmarks / f"quantities-of-{name}.md").read_text() for name in ("errors", "layers", "lenses", "ranks")]
    for probe in PROBES.values():
        rows = quantities_markdown([probe]).split("\n", 2)[2]
        assert sum(rows in page for page in pages) == 1, probe.name


@pytest.mark.parametrize("table", sorted((ROOT / "results").rglob("probes.csv.xz")), ids=lambda path: path.parent.name)
def test_quantities_of_committed_runs_are_in_the_catalogue(table):
    rows = pd.read_csv(table)[["probe", "quantity"]].drop_duplicates()
    unknown = [key for key in rows.itertuples(index=False) if key[0] != key[1] and quantity_of(*key) is None]
    assert not unknown
