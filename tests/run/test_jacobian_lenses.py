"""Jacobian lenses of a suite, and lens files of others side by side, from the command line to the tables."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import refused, run
from helpers.suites import without_figures, write_suite
from pydantic import ValidationError

from lensbench.lenses.fit import Fit
from lensbench.lenses.jacobian_files import read_jacobian
from lensbench.lenses.jacobian_kinds import JACOBIAN_LENS, SHARED_JACOBIAN_LENS
from lensbench.lenses.recipe import FitRecipe
from lensbench.results.folder import read_table
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
    said = " ".join(result.output.split())
    assert "stored in float16, three digits; it does not say which revision of the model it was fitted to" in said
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


@pytest.mark.run
def test_the_matrix_of_jacobian_lenses_needs_them(jacobian_run):
    content = (jacobian_run / "tiny.toml").read_text().replace("[evaluate]", "[evaluate]\njacobian_matrix = true")
    (jacobian_run / "without.toml").write_text(content.replace('"jacobian", "jacobian_local", "shared_jacobian"', ""))
    refused(
        run("run", jacobian_run / "without.toml"), "evaluate.jacobian_matrix is true: fit.lenses must name jacobian"
    )


@pytest.mark.run
def test_precision_and_the_matrix_of_jacobian_lenses_are_added_to_a_finished_run_and_leave_the_rest_as_it_was(
    jacobian_run,
):
    """Stages of their own: nothing else runs again, and tables differ by what was asked for alone."""
    before, after = jacobian_run / "run", shutil.copytree(jacobian_run / "run", jacobian_run / "asked")
    content = (jacobian_run / "tiny.toml").read_text()
    asked = jacobian_run / "asked.toml"
    asked.write_text(content.replace("[evaluate]", "[evaluate]\ntop = true\njacobian_matrix = true"))
    with without_figures():
        result = run("run", asked, "--out", after)
    assert result.exit_code == 0, result.output
    assert "score-gpt-seed0: reused" in result.output
    lenses, transfer = (read_table(after / name) for name in ("lenses.csv", "transfer.csv"))
    plain = pd.read_csv(before / "lenses.csv")
    assert not {"top1", "top10"} & set(plain)
    pd.testing.assert_frame_equal(lenses[plain.columns], read_table(before / "lenses.csv")[plain.columns])
    assert "lens" not in pd.read_csv(before / "transfer.csv")
    old = transfer[transfer["lens"] != "jacobian"].drop(columns="lens").reset_index(drop=True)
    pd.testing.assert_frame_equal(old, read_table(before / "transfer.csv").drop(columns="lens"))
    assert lenses[["top1", "top10"]].notna().all(axis=None)
    assert (lenses["top10"] >= lenses["top1"]).all()
    assert ((lenses["top1_ci_low"] <= lenses["top1"]) & (lenses["top1"] <= lenses["top1_ci_high"])).all()
    # The logit lens of lenses.csv is the last row of the matrix, a Jacobian lens the diagonal of its own.
    own = lenses.query("model == 'gpt'").set_index(["lens", "layer"])
    last = transfer.query("model == 'gpt' and lens == 'logit'").set_index("stream_layer")
    assert np.allclose(own.loc["logit", "top1"], last["top1_agreement"])
    diagonal = transfer.query("model == 'gpt' and lens == 'jacobian' and lens_layer == stream_layer").set_index(
        "lens_layer"
    )
    for here, there in (("kl", "kl"), ("ce", "ce"), ("top1", "top1_agreement")):
        assert np.allclose(own.loc["jacobian", here], diagonal[there], rtol=1e-5, atol=1e-6), here
    assert np.allclose(diagonal[["penalty_kl", "movement_kl"]], 0, atol=1e-5)
    assert len(transfer.query("model == 'gpt' and lens == 'jacobian'")) == 3 * 4
    indices = read_table(after / "indices.csv").query("model == 'gpt'").set_index("index")
    assert {"explained_by_distance", "explained_by_distance_jacobian"} <= set(indices.index)
    assert "explained_by_distance" not in set(read_table(before / "indices.csv")["index"])
