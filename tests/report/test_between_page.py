"""What pages say of lenses between models, of made-up tables: when a lens survives, what is declared, and the light form."""

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.texts import between
from benchmarks.texts.between import DECLARED, EARLY, HALF, Transfers
from benchmarks.texts.numbers import TextError
from lensbench.errors import LensbenchError
from lensbench.report.export import export_run
from lensbench.report.light_between import light
from lensbench.results.between import BETWEEN_COLUMNS
from lensbench.results.manifest import write_manifest
from lensbench.runtime.files import sha256

END = 4_999_168
PENALTIES = {EARLY: (0.9, 0.5), HALF: (0.05, 0.045)}
"""Tokens of the lens -> penalty on the final states, without a map and rotated; a random pairing costs 2 nats"""


def made_up() -> pd.DataFrame:
    """``between.csv`` of three seeds: late lenses survive, a rotation helps the early ones, seeds share 0.3 and 0.8."""
    rows = []
    for model in DECLARED:
        for lens, states in ((EARLY, END), (HALF, END), (END, EARLY), (END, HALF), (EARLY, HALF), (HALF, EARLY)):
            names = {t: model if t == END else f"{model}@{t}" for t in (lens, states)}
            for seed in (0, 1, 2, "all"):
                wobble = 0.0 if seed == "all" else 0.002 * (seed - 1)
                for head in ("lens", "states"):
                    for k, through in enumerate(("none", "orthogonal")):
                        penalty = PENALTIES[min(lens, states)][k] * (1 if states == END else 3) + wobble
                        rows += [{
                            "kind": "training", "lens_model": names[lens], "lens_seed": seed, "lens_tokens": lens,
                            "states_model": names[states], "states_seed": seed, "states_tokens": states, "map": through,
                            "head": head, "lens_layer": layer, "states_layer": layer,
                            "penalty": penalty + 9 * (head == "lens"), "null_penalty": 2.0 if k else np.nan,
                        } for layer in (0, "later")]  # fmt: skip
        for through, shared in (("orthogonal", 0.3), ("affine", 0.8)):
            values = {
                f"{name}{end}": x + reach
                for name, x in (("shared", shared), ("penalty", 2 - 2 * shared), ("null_penalty", 2), ("same_tokens", 0.1))
                for end, reach in (("", 0), ("_ci_low", -0.03), ("_ci_high", 0.03))
            }  # fmt: skip
            rows += [{
                "kind": "seeds", "lens_model": model, "lens_seed": a, "lens_tokens": END, "states_model": model,
                "states_seed": b, "states_tokens": END, "map": through, "head": "lens", "lens_layer": "later",
                "states_layer": "later", **values,
            } for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1), ("all", "all"))]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=list(BETWEEN_COLUMNS))


@pytest.fixture
def folders(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    made_up().to_csv(whole / "between.csv", index=False)
    write_manifest(
        whole,
        {
            "suite_name": "training",
            "suite": {"fit": {}, "evaluate": {}, "models": []},
            "files": {"between.csv": sha256(whole / "between.csv")},
        },
    )
    return whole, tmp_path / "light"


@pytest.fixture
def transfers(folders):
    export_run(*folders, figures=["between"])
    return Transfers(folders[1])


def test_the_light_form_has_what_the_page_needs_and_no_rows_of_layers(folders, transfers):
    rows = transfers.table
    assert set(rows["states_layer"]) == {"later"}
    between_checkpoints = ~(rows["lens_tokens"].eq(END) | rows["states_tokens"].eq(END))
    assert set(rows.loc[between_checkpoints, "lens_seed"]) == {"all"}
    assert set(rows.loc[between_checkpoints, "head"]) == {"states"}
    assert set(rows.loc[~between_checkpoints & rows["kind"].eq("training"), "lens_seed"]) == {"0", "1", "2", "all"}
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    assert manifest["files"] == {name: sha256(folders[1] / name) for name in ("between.csv.xz", "between.png")}
    assert manifest["exported"]["tables"]["between.csv"] == sha256(folders[0] / "between.csv")
    assert light(pd.DataFrame(made_up()).assign(penalty=1.23456789))["penalty"].unique() == [1.235]


def test_a_table_that_was_changed_has_no_light_form(folders):
    (folders[0] / "between.csv").open("a").write("\n")
    with pytest.raises(LensbenchError, match="is not what the study wrote"):
        export_run(*folders)
    assert not folders[1].exists()


def test_an_export_of_a_light_form_is_the_same_to_the_byte_and_without_a_figure_it_is_removed(folders, tmp_path):
    export_run(*folders, figures=["between"])
    export_run(folders[1], tmp_path / "again", figures=["between"])
    before = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    assert set(before) == {"between.csv.xz", "between.png", "manifest.json"}
    assert export_run(folders[1], folders[1]) == [folders[1] / "between.png"]
    assert {path.name for path in folders[1].iterdir()} == {"between.csv.xz", "manifest.json"}


def test_a_light_form_of_lenses_between_models_has_one_figure_and_no_clusters(folders):
    with pytest.raises(LensbenchError, match="has one figure, between, and no 'plane'"):
        export_run(*folders, figures=["plane"])
    with pytest.raises(LensbenchError, match="lenses between models, with no clusters to join"):
        export_run(*folders, groups=64)
    assert not folders[1].exists()


def test_a_null_that_costs_less_is_passed_later(transfers):
    rows = (transfers.table["head"] == "lens") & (transfers.table["kind"] == "training")
    transfers.table.loc[rows, "null_penalty"] = 0.06
    assert transfers.first_share("pc", of_end=True, head="lens") == "only at its end"
    assert transfers.first_share("pc", of_end=True) == "51.2 %"


def test_tables_over_time_have_a_row_for_each_checkpoint_of_the_final_states_alone(transfers):
    rows = transfers.survival_table().splitlines()[2:]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| 79,872", "1.6 %", "0.900 [0.895, 0.905]"],
        ["| 2,560,000", "51.2 %", "0.050 [0.045, 0.055]"],
    ]
    rows = transfers.rotation_table().splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["0.400 [0.400, 0.400]", "0.005 [0.005, 0.005]"]


def test_a_lens_survives_from_the_checkpoint_on_after_which_it_surely_costs_a_tenth_of_the_null(transfers):
    assert transfers.first_share("pc", of_end=True) == "51.2 %"
    assert transfers.first_share("pc", of_end=False) == "51.2 %"
    transfers.table["penalty"] += 0.16
    assert transfers.first_share("pc", of_end=True) == "only at its end"


def test_every_declared_claim_is_tested_and_corrected_with_all_others(transfers, monkeypatch):
    rows = [row.split(" | ") for row in transfers.claims_table().splitlines()[2:]]
    assert len(rows) == 5 * len(DECLARED)
    outcomes = {row[0].removeprefix("| "): row[-1] for row in rows}
    assert outcomes["pc: lens of half the training costs less than 0.1 of the null"] == "holds |"
    assert outcomes["pc: lens of 1.6 % of it costs more than 0.1 of the null"] == "holds |"
    assert outcomes["pc: two seeds share less than 0.5 of the null, orthogonal"] == "holds |"
    monkeypatch.setattr(between, "SHARED", 0.81)
    worse = transfers.claims_table()
    assert worse.count("does not hold |") == len(DECLARED)


def test_a_table_without_a_checkpoint_is_no_text(transfers):
    with pytest.raises(TextError, match="no lens of gpt after 79872 tokens"):
        transfers.shares("gpt", EARLY)


def test_sizes_are_read_both_ways_and_claims_are_of_neighbours_alone(tmp_path):
    sizes = ("16k", "64k", "250k")
    rows = [
        {
            "kind": "sizes", "lens_model": f"pc-{lens}", "lens_seed": seed, "states_model": f"pc-{states}",
            "states_seed": seed, "lens_tokens": 1, "states_tokens": 2, "map": "affine", "head": "lens",
            "lens_layer": "later", "states_layer": "later", "penalty": 0.4, "null_penalty": 2.0, "same_tokens": 0.3,
            "shared": 0.2 if {lens, states} == {"16k", "64k"} else 0.8 + 0.01 * seed,
        }
        for lens in sizes for states in sizes if lens != states for seed in range(3)
    ]  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    pd.DataFrame(rows).reindex(columns=list(BETWEEN_COLUMNS)).to_csv(whole / "between.csv", index=False)
    files = {"between.csv": sha256(whole / "between.csv")}
    write_manifest(whole, {"suite": {"fit": {}, "evaluate": {}}, "files": files})
    with pytest.raises(LensbenchError, match="no checkpoints of a training"):
        export_run(whole, tmp_path / "light", figures=["between"])
    export_run(whole, tmp_path / "light")
    assert not (tmp_path / "light" / "between.png").exists(), "it has no matrix over time"
    found = Transfers(tmp_path / "light")
    assert found.sizes_claims() == (2, 4)
    table = found.sizes_table().splitlines()
    assert len(table) == 2 + 6
    assert table[3].startswith("| `pc-16k` | `pc-250k` | 0.400 [0.400, 0.400] |")
