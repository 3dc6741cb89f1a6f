"""Transfer between the models of a finished run: pairs, tables, figure, manifest, and what is refused."""

import json
from functools import partial

import pandas as pd
import pytest
import torch
from helpers.commands import refused, run
from helpers.suites import write_suite

from lensbench.results.between import BETWEEN_COLUMNS, LATER
from lensbench.run.between import transfer_between
from lensbench.run.context import Context
from lensbench.run.fitting import fitting
from lensbench.runtime.files import sha256
from lensbench.runtime.stages import Stages
from lensbench.suite.files import load_suite

pytestmark = pytest.mark.run

SMALLER = """
[[models]]
name = "gpt-small"
family = "gpt"
d_model = 8
layers = 2
heads = 2
parameters = 8_000
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Trainings and lenses alone, which are all that transfer between models reads; pc has none at the second seed."""
    folder = tmp_path_factory.mktemp("between")
    path = write_suite(
        folder,
        **{
            "[corpus]": "seeds = [0, 1]\n\n[corpus]",
            "length = 64": "checkpoints = [2_048]\nlength = 64",
            "refits = 2": "refits = 0",
            "refine_passes = 8": "refine_passes = 0",
            "rotations = 2": "rotations = 1",
            '[[models]]\nname = "pc"\n': SMALLER + '\n[[models]]\nname = "pc"\n',
        },
    )
    suite = load_suite(str(path))
    context = Context(suite, Stages(folder / "run" / "stages"), torch.device("cpu"))
    for model in suite.models:
        for seed in (0, 1):
            if not model.name.startswith("pc") and model.name != "gpt-small@2048":
                fitting(context, model, seed)
    return path, folder / "run"


def test_checkpoints_seeds_and_sizes_are_read_by_each_others_lenses(fitted, tmp_path):
    path, folder = fitted
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    command = ("transfer-between", path, "--run", folder, "--device", "cpu", "--pair", "gpt@2048,gpt-small")
    result = run(*command, "--out", tmp_path / "between")
    assert result.exit_code == 0, result.output
    assert "pc-seed0" in result.stderr, "models without lenses are named"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before, "the run stays as it is"
    table = pd.read_csv(tmp_path / "between" / "between.csv")
    assert list(table.columns) == list(BETWEEN_COLUMNS)
    found = (
        table[table["lens_seed"] != "all"]
        .groupby("kind")
        .apply(
            lambda rows: rows[["lens_model", "states_model", "lens_seed", "states_seed"]].drop_duplicates().shape[0],
            include_groups=False,
        )
    )
    assert found.to_dict() == {"training": 4, "seeds": 4, "sizes": 4, "named": 4}
    training = table[table["kind"] == "training"]
    assert set(zip(training["map"], training["head"], strict=True)) == {
        (m, h) for m in ("none", "orthogonal") for h in ("lens", "states")
    }
    assert set(training["lens_tokens"]) == {2_048, 8_192}
    sizes = table[(table["kind"] == "sizes") & (table["states_model"] == "gpt") & (table["states_layer"] != LATER)]
    assert set(zip(sizes["lens_layer"].astype(int), sizes["states_layer"].astype(int), strict=True)) == {
        (0, 0), (1, 1), (1, 2),
    }  # fmt: skip
    assert (tmp_path / "between" / "between.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "between" / "manifest.json").read_text())
    assert manifest["files"]["between.csv"] == sha256(tmp_path / "between" / "between.csv")
    assert not (tmp_path / "between" / "pieces").exists()
    again = run(*command, "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert sha256(tmp_path / "again" / "between.csv") == sha256(tmp_path / "between" / "between.csv")


def test_sizes_that_lie_in_runs_of_their_own_are_read_as_those_of_one_run(fitted, tmp_path):
    path, folder = fitted
    suite = load_suite(str(path))
    both, large, small = (
        suite.model_copy(update={"models": tuple(m for m in suite.models if m.name in names)})
        for names in (("gpt", "gpt-small"), ("gpt",), ("gpt-small",))
    )
    of = partial(transfer_between, device=torch.device("cpu"))
    apart = of(large, folder, tmp_path / "apart", others=[(small, folder)])
    assert {"sizes", "seeds"} == set(apart["kind"])
    pd.testing.assert_frame_equal(apart, of(both, folder, tmp_path / "together"))


def test_what_cannot_be_transferred_is_refused_in_one_line(fitted, tmp_path):
    path, folder = fitted
    refused(run("transfer-between", path, "--run", tmp_path), "holds no stages of a run")
    refused(run("transfer-between", path, "--run", folder, "--pair", "gpt"), "name two models, A,B")
    refused(run("transfer-between", path, "--run", folder, "--pair", "gpt,gtp", "--out", tmp_path / "o"), "'gtp'")
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace("tokens = 8_192", "tokens = 4_096"))
    refused(
        run("transfer-between", other, "--run", folder, "--out", tmp_path / "o"), "has no lenses with these settings"
    )
