"""Lenses are data: their names, and a kind that lies in one file is fitted, scored, tabled and drawn."""

import pandas as pd
import pytest
import torch
from helpers.commands import run
from helpers.suites import without_figures, write_suite
from helpers.synthetic import small
from helpers.toy_lens import MEAN_SHIFT, TOY
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit, fit
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.lens import LensId
from lensbench.lenses.per_layer import MATRIX_LENSES
from lensbench.lenses.planning import FitContext
from lensbench.report.figures.frames import lens_frame
from lensbench.report.figures.lenses import kl_by_layer
from lensbench.results.folder import read_run

IDS = st.builds(
    LensId,
    st.sampled_from([*KINDS, "a1_b"]),
    st.sampled_from(["zero", "identity", "none"]),
    st.sampled_from(["closed", "refined", "loaded", "none"]),
    st.none() | st.just("1se") | st.floats(0, 1, exclude_max=True),
    st.integers(-1, 12),
    st.integers(-1, 12),
)


@given(IDS)
def test_a_lens_is_read_back_from_its_name(lens):
    assert LensId.parse(str(lens)) == lens
    assert "/" not in str(lens)


@given(st.permutations([MATRIX_LENSES, MATRIX_LENSES.within("1se"), MATRIX_LENSES.within(0.5), MEAN_SHIFT]))
def test_lenses_can_be_sorted_whatever_their_tolerance(lenses):
    assert sorted(lenses)[0] == MEAN_SHIFT
    assert len(sorted(lenses)) == 4


@pytest.mark.parametrize("text", ["", "tuned", "tuned-zero", "tuned-zero-closed@", "transfer@1se", "own", "refit3.own"])
def test_a_text_that_names_no_lens_is_refused(text):
    with pytest.raises(LensbenchError, match="names no lens"):
        LensId.parse(text)


@pytest.mark.parametrize(("tolerance", "label"), [(0.0, "0"), (0.05, "0.05"), ("1se", "1se"), (None, "closed")])
def test_tables_write_a_tolerance_in_few_digits(tolerance, label):
    assert MATRIX_LENSES.within(tolerance).tolerance_label == label


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The tiny suite's first model, run while there is one kind more."""
    root = tmp_path_factory.mktemp("toy")
    suite = write_suite(root)
    text = suite.read_text()
    suite.write_text(text[: text.index('[[models]]\nname = "pc"')])
    with pytest.MonkeyPatch.context() as patched, without_figures():
        patched.setitem(KINDS, TOY.name, TOY)
        result = run("run", suite, "--out", root / "run")
    assert result.exit_code == 0, result.output
    return root / "run"


def test_a_kind_in_one_file_is_fitted_and_scored(toy_run):
    stage = toy_run / "stages" / "fit-gpt-seed0"
    lens = Fit.load(stage)[MEAN_SHIFT]
    assert lens.reads == [[0], [1], [2]]
    assert len(lens.record.dev_kl) == 3
    assert f"{MEAN_SHIFT}.matrix" in load_file(stage / "maps.safetensors")
    rows = pd.read_parquet(toy_run / "stages" / "score-gpt-seed0" / "sequences.parquet").query("lens == 'mean_shift'")
    assert sorted(rows["layer"].unique()) == [0, 1, 2]
    assert (rows["lens_layer"] == rows["layer"]).all()


def test_a_kind_in_one_file_has_rows_in_the_table_of_lenses(toy_run):
    table = pd.read_csv(toy_run / "lenses.csv").query("lens == 'mean_shift'")
    assert list(table["layer"]) == [0, 1, 2]
    assert (table["kl"] >= 0).all()
    assert table["dev_kl"].notna().all()
    assert table["ridge"].isna().all()


def test_a_kind_in_one_file_is_drawn_and_on_the_page(toy_run, monkeypatch):
    monkeypatch.setitem(KINDS, TOY.name, TOY)
    frame = lens_frame(read_run(toy_run))
    assert "change of the mean (closed)" in set(frame["name"])
    drawn = kl_by_layer(frame)
    assert "change of the mean (closed)" in {text.get_text() for legend in drawn.legends for text in legend.texts}
    assert "change of the mean" in (toy_run / "report.html").read_text()


def test_a_kind_more_leaves_the_other_lenses_as_they_are(monkeypatch):
    it = small(0)
    monkeypatch.setitem(KINDS, TOY.name, TOY)
    found = fit(FitContext.of(it.stream.readout, it.captured, it.dev, it.recipe, seed=0))
    assert set(found.lenses) - set(it.fit.lenses) == {MEAN_SHIFT}
    for lens, fitted in it.fit.lenses.items():
        assert torch.equal(found[lens].maps.matrix, fitted.maps.matrix), lens
        assert found[lens].record == fitted.record
