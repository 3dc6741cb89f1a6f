"""Probes in a suite: rows for every model, reasons where one does not apply, figures, and nothing done twice."""

import numpy as np
import pandas as pd
import pytest
from helpers.suites import write_suite
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.report.figures import frames, guesses, probes, ranks, style
from lensbench.results.folder import read_run

pytestmark = pytest.mark.run

NAMES = [
    "prediction_visibility", "error_transport", "head_weights", "few_shot", "causal_fidelity", "gradient_steps",
    "prefix_read_out", "guess_and_refine", "lens_rank",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    asked = f'name = "tiny"\nthreads = 1\nseeds = [0, 1]\nprobes = {NAMES!r}'.replace("'", '"')
    suite = write_suite(folder, **{'name = "tiny"': asked})
    out = folder / "out"
    first = CliRunner().invoke(app, ["run", str(suite), "--only", "gpt,pc", "--out", str(out)])
    assert first.exit_code == 0, first.output
    assert 'gpt-seed0: attention weights are read with attn_implementation="eager"' in " ".join(first.output.split())
    assert "pc-seed0: attention weights" not in first.output
    return suite, out


def test_every_probe_has_rows_or_a_reason_for_every_model_and_seed(run):
    table = pd.read_csv(run[1] / "probes.csv", keep_default_na=False, na_values=[""])
    for model in ("gpt", "pc"):
        for seed in ("0", "1", "all"):
            rows = table[(table["model"] == model) & (table["seed"] == seed)]
            assert set(NAMES) <= set(rows["probe"]) or seed == "all"
    assert (
        table[(table["seed"] == "all") & table["probe"].isin(["error_transport", "head_weights"])]["layer"].isna().all()
    )
    told = table[table["value"].isna()]
    assert told["reason"].notna().all(), "what is empty says why"
    heads = table[(table["quantity"] == "error_score") & (table["seed"] == "0")]
    assert len(heads) == 2 * 3 * 2, "layers and heads of two models"
    assert set(heads["layer"]) == {0, 1, 2}
    assert set(heads["other"]) == {0, 1}
    ratio = table[(table["quantity"] == "error_ratio") & (table["model"] == "pc") & (table["seed"] == "1")]
    assert ratio["value"].to_numpy() == pytest.approx(1, abs=1e-3)
    gpt = table[(table["model"] == "gpt") & (table["probe"] == "gradient_steps") & (table["seed"] == "0")]
    assert "no errors at known places" in gpt["reason"].iloc[0]


@pytest.mark.usefixtures("no_figures")
def test_the_same_command_does_nothing_twice_and_writes_the_same_bytes(run):
    suite, out = run
    before = (out / "probes.csv").read_bytes()
    again = CliRunner().invoke(app, ["run", str(suite), "--only", "gpt,pc", "--out", str(out)])
    assert again.exit_code == 0
    assert ": done in" not in again.output.replace("corpus: done in", "")
    assert (out / "probes.csv").read_bytes() == before


def test_heads_are_drawn_and_the_top_ones_named(run):
    table = read_run(run[1])
    frame = frames.head_frame(table)
    assert list(frame.columns) == ["model", "layer", "head", "score", "ratio", "found"]
    assert len(frame) == 12
    with style.style():
        figure = probes.error_transport(frame)
    for model in ("gpt", "pc"):
        of = frame[frame["model"] == model]
        (panel,) = [axes for axes in figure.axes if axes.get_title().startswith(f"{model}:")]
        found = of[of["found"] > 0].nlargest(1, "score")
        named = [f"\nL{row.layer}.H{row.head}" for row in found.itertuples()] or ["\nnone to name"]
        assert named[0] in panel.get_title()
        drawn = np.asarray(panel.collections[0].get_array()).reshape(3, 2)
        expected = of.pivot(index="layer", columns="head", values="score").to_numpy()
        np.testing.assert_allclose(drawn, expected)
        circles = [line for line in panel.lines if line.get_marker() == "o"]
        assert len(circles) == (of["found"] > 0).sum()
    assert (run[1] / "figures" / "error_transport.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_figures")
def test_probes_can_be_run_in_parts(tmp_path):
    asked = 'name = "tiny"\nthreads = 1\nprobes = ["few_shot", "gradient_steps"]'
    suite, out = write_suite(tmp_path, **{'name = "tiny"': asked}), tmp_path / "out"

    def part(*options: str) -> tuple[set[str], str]:
        result = CliRunner().invoke(app, ["run", str(suite), "--only", "gpt", "--out", str(out), *options])
        assert result.exit_code == 0, result.output
        return set(read_run(out).tables["probes.csv"]["probe"]), result.output

    assert part("--probes", "gradient_steps")[0] == {"gradient_steps"}
    both, told = part("--probes", "few_shot")
    assert both == {"few_shot", "gradient_steps"}
    assert "probe-gradient_steps-gpt-seed0: reused" in told
    assert part()[0] == both
    wrong = CliRunner().invoke(app, ["run", str(suite), "--probes", "paths", "--out", str(out)])
    assert wrong.exit_code != 0
    assert "has no probe 'paths'" in wrong.output


def test_unknown_probes_are_refused_in_one_line(tmp_path):
    suite = write_suite(tmp_path, **{'name = "tiny"': 'name = "tiny"\nprobes = ["error_transprot"]'})
    result = CliRunner().invoke(app, ["run", str(suite), "--out", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert "did you mean 'error_transport'?" in result.output


def test_guesses_of_every_lens_stand_next_to_their_nulls(run):
    frame = guesses.guess_frame(read_run(run[1]))
    assert set(frame["lens"]) == {"logit", "tuned", "shared", ""}
    for what, beside in guesses.BESIDE.items():
        lenses = {"logit", "tuned", "shared"} if beside == "chance" else {"tuned", "shared"}
        for model in ("gpt", "pc"):
            rows = frame[(frame["model"] == model) & (frame["what"] == what) & (frame["beside"] == beside)]
            assert set(rows["lens"]) == lenses
            assert rows["value"].between(0, 1).all()
    assert (run[1] / "figures" / "guess_and_refine.png").stat().st_size > 10_000


def test_every_rank_of_every_lens_is_drawn(run):
    frame = ranks.rank_frame(read_run(run[1]))
    for _, rows in frame.groupby(["model", "what", "kind"]):
        assert list(rows["rank"]) == [0, 1, 2, 4, 8, 16]
    assert len(frame) == 2 * 2 * 3 * 6
    assert (run[1] / "figures" / "lens_rank.png").stat().st_size > 10_000
