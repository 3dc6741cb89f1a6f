"""Jacobian lenses of a suite, and lens files of others side by side, from the command line to the tables."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import run
from helpers.suites import without_figures, write_suite
from pydantic import ValidationError

from lensbench.lenses.fit import Fit
from lensbench.lenses.jacobian_files import read_jacobian
from lensbench.lenses.jacobian_kinds import JACOBIAN_LENS, SHARED_JACOBIAN_LENS
from lensbench.lenses.recipe import FitRecipe
from lensbench.results.further import describes


def test_the_mean_over_layers_needs_the_lenses_that_it_is_a_mean_of():
    with pytest.raises(ValidationError, match="name jacobian, too"):
        FitRecipe(lenses=("shared_jacobian",))
    with pytest.raises(ValidationError, match="names a kind twice"):
        FitRecipe(lenses=("jacobian", "jacobian"))


@pytest.fixture(scope="module")
def jacobian_run(tmp_path_factory):
    """The tiny suite's first model with all further kinds."""
    root = tmp_path_factory.mktemp("jacobian")
    kinds = 'lenses = ["jacobian", "jacobian_local", "shared_jacobian"]\njacobian = { prompts = 8, skip_first = 4 }\n'
    suite = write_suite(
        root, **{"refine_passes = 8\n": f"refine_passes = 1\n{kinds}", "\n[corpus]": "update = false\n[corpus]"}
    )
    text = suite.read_text()
    suite.write_text(text[: text.index('[[models]]\nname = "pc"')])
    with without_figures():
        result = run("run", suite, "--out", root / "run")
    assert result.exit_code == 0, result.output
    return root


@pytest.mark.run
def test_every_kind_has_rows_of_every_layer(jacobian_run):
    table = pd.read_csv(jacobian_run / "run" / "lenses.csv")
    for kind in ("jacobian", "jacobian_local", "shared_jacobian", "shared_jacobian_loo"):
        rows = table.query("lens == @kind and model == 'gpt'")
        assert list(rows["layer"]) == [0, 1, 2], kind
        assert (rows["stage"] == "backward").all()
        assert (rows["kl"] >= 0).all()
    null = table.query("lens == 'shared_jacobian' and model == 'gpt+rotated'")
    plain = table.query("lens == 'shared_jacobian' and model == 'gpt'")
    assert null["kl"].mean() > plain["kl"].mean()


@pytest.mark.run
def test_the_shared_lens_is_the_mean_of_the_others_and_the_files_hold_them(jacobian_run):
    stage = jacobian_run / "run" / "stages" / "fit-gpt-seed0"
    fit = Fit.load(stage)
    each = fit[JACOBIAN_LENS]
    assert torch.allclose(fit[SHARED_JACOBIAN_LENS].maps.matrix[0], each.maps.matrix.mean(0), atol=1e-5)
    facts = each.record.jacobian
    assert facts.method in ("exact", "random")
    assert len(facts.error) == 3
    found = read_jacobian(str(stage / "jacobian_lens.pt"))
    for layer in range(3):
        assert torch.allclose(found.matrices[layer], each.maps.matrix[layer], atol=2e-3)
    # The mean over the others in a random basis, read back in the plain one.
    null = fit[SHARED_JACOBIAN_LENS.of_view(0)]
    turned = [j @ q.T for j, q in zip(each.maps.matrix, fit.views[0].maps, strict=False)]
    assert torch.allclose(null.maps.matrix[0], torch.stack(turned).mean(0), atol=1e-5)


@pytest.mark.run
def test_files_are_measured_on_the_same_tokens_as_our_own_lenses(jacobian_run):
    stages, out = jacobian_run / "run" / "stages", jacobian_run / "compared"
    files = [stages / "fit-gpt-seed0" / "jacobian_lens.pt", stages / "fit-gpt-seed0" / "tuned"]
    command = [
        "compare-lenses",
        f"path:{stages / 'train-gpt-seed0'}",
        *files,
        "--corpus",
        f"file:{jacobian_run / 'texts'}",
    ]
    command += ["--length", "64", "--fit", "24", "--sequences", "24", "--positions", "8", "--jacobian", "2"]
    result = run(*command, "--out", out)
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines() if line.startswith(("│", "┃"))) <= 80
    assert "stored in float16" in " ".join(result.output.split())
    table = pd.read_csv(out / "lens_comparison.csv")
    assert all(describes("lens_comparison.csv", column) for column in table)
    assert {"logit", "tuned", "shared", "jacobian", "shared_jacobian", "jacobian_lens", "tuned 2"} <= set(table["lens"])
    assert (table.groupby("lens")["layer"].count() == 3).all()
    logit = table.query("lens == 'logit'")
    assert np.allclose(logit["kl_minus_logit"], 0)
    assert ((table["top10"] >= table["top1"]) & (table["top10"] <= 1)).all()
    manifest = json.loads((out / "manifest.json").read_text())
    assert str(files[0]) in manifest["lenses"]
    wrong = run("compare-lenses", f"path:{stages / 'train-gpt-seed0'}", jacobian_run / "tiny.pt", "--out", out)
    assert wrong.exit_code == 2
    assert "there is no file" in wrong.output
