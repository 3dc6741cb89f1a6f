"""What the committed run of image models says, and what the README may therefore say of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lensbench.report.compare import compare_runs, side_by_side
from lensbench.report.figures.draw import draw_plane
from lensbench.results import folder

pytestmark = pytest.mark.results

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def run():
    found = folder.read_run(RESULTS / "vision")
    assert not found.manifest.git_revision.endswith("dirty")
    return found


def test_five_seeds_of_three_models_were_measured_on_images_that_none_was_trained_or_fitted_on(run):
    assert run.manifest.corpus.documents == {"train": 900, "fit": 350, "dev": 150, "eval": 397}
    models = run.tables["models.csv"]
    names = ("vit", "cnn-residual", "cnn-residual-slow", "cnn-plain")
    assert models.groupby("model").size().to_dict() == dict.fromkeys(names, 5)
    assert (models["scored_tokens"] == 397).all()
    assert models["parameters"].between(267_300, 272_700).all()
    accuracy = run.tables["probes.csv"].query("quantity == 'accuracy' and seed == 'all'")
    assert (accuracy["value"] > 0.965).all()
    assert accuracy["ci_low"].notna().all()


def test_the_residual_network_keeps_one_representation_and_the_plain_one_does_not():
    table = compare_runs([RESULTS / "vision"]).table
    claims = table[table["kind"] == "claim"]
    assert (claims["seeds"] == 5).all()
    assert claims["paired"].all()
    below = claims["index"] == "clarity_without_layer0"  # the plain network's less the residual one's
    assert (claims[below]["ci_high"] < -0.7).all()
    assert (len(claims), below.sum()) == (5 + 3 + 1, 1)
    claims = claims[~below]
    assert (claims["ci_low"] > 0).all()
    assert (claims["p_holm"] < 0.01).all()
    whole = claims["index"].isin(["shared_retention", "gain_visibility", "shared_consistency"])
    assert whole.sum() == 6
    assert (claims[whole]["p_holm"] < 0.001).all()
    curve = table[(table["kind"] == "claim at tolerance") & (table["index"] == "gain_visibility")]
    assert len(curve) >= 8
    assert (curve["ci_low"] > 0).all(), "at every loss that a ridge may cost"


def test_without_skips_the_head_is_at_chance_at_every_layer_and_own_lenses_are_not(run):
    rows = run.tables["probes.csv"].query("model == 'cnn-plain' and seed == 'all'").set_index(["quantity", "layer"])
    assert (rows.loc["logit_accuracy", "ci_low"] < 0.1).all()
    assert (rows.loc["tuned_accuracy"].loc[1:, "value"] > 0.9).all()


def test_the_ruler_is_drawn_from_the_tables_byte_for_byte(tmp_path):
    folders = [RESULTS / "standard" / part for part in ("gpt", "pc", "controls")] + [RESULTS / "vision"]
    draw_plane(side_by_side(folders), tmp_path / "ruler.png")
    assert (tmp_path / "ruler.png").read_bytes() == (RESULTS / "vision" / "ruler.png").read_bytes()
    names = pd.unique(side_by_side(folders).tables["models.csv"]["model"])
    assert {"cnn-plain", "gpt-conv", "pc+state"} <= set(names)
    assert np.unique(names).size == len(names)
