"""A model has one colour wherever it is drawn, and no two lenses have colours that a reader would confuse."""

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lensbench.lenses.kinds import KINDS
from lensbench.report.answers import colours_of
from lensbench.report.figures.lenses import NULL_COLOUR, lens_colours
from lensbench.report.figures.palette import COLOURS, FIXED, model_looks, palette_numbers, without_size
from lensbench.report.figures.ranks import SINGLE_COLOUR
from lensbench.report.figures.registry import looks_of
from lensbench.report.series import series_of

RESULTS = Path(__file__).resolve().parents[2] / "results"


def lab(colour: str) -> np.ndarray:
    """CIE L*a*b* of a colour, by the definition of sRGB."""
    rgb = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    white = np.array([0.9505, 1.0, 1.089])
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / white
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_no_two_lenses_of_a_figure_have_colours_that_a_reader_would_confuse():
    assert set(lens_colours()) >= {name for name in KINDS if name != "pair"}
    drawn = {**lens_colours(), "best of one layer": SINGLE_COLOUR}
    assert NULL_COLOUR in drawn.values()
    for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
        # A difference of 2 is just seen side by side; thin lines need many times that.
        assert np.linalg.norm(lab(first) - lab(second)) > 25, (one, other)


@pytest.mark.parametrize("company", [[], ["gpt"], ["x", "y", "gpt-conv"], ["pc+state", "vit"]])
def test_a_model_of_a_suite_has_the_colour_of_its_name_whoever_stands_next_to_it(company):
    for model in ("pc", "pc-64k", "pc@10000", "pc-250k@20000", "pc (runs/a)"):
        colours = {name: look["color"] for name, look in model_looks([*company, model]).items()}
        assert colours[model] == model_looks(["pc"])["pc"]["color"]
        assert colours_of([{name: name for name in [*company, model]}]) == colours
        assert looks_of(pd.DataFrame({"model": [*company, model]}))[model]["color"] == colours[model]


def test_a_series_over_size_has_the_colour_of_its_models():
    models = pd.DataFrame(
        {"model": ["pc-16k+state", "pc-64k+state"], "parameters": [16e3, 64e3], "train_tokens": [1e6, 1e6]}
    )
    (series,) = [one for one in series_of(models) if one.over == "parameters"]
    assert series.name == without_size("pc-64k+state") == "pc+state"
    assert model_looks([series.name])["pc+state"]["color"] == model_looks(["pc-16k+state"])["pc-16k+state"]["color"]


def test_models_of_a_user_keep_the_colour_of_their_name_until_another_has_it():
    alone = {name: palette_numbers([name])[name] for name in "abcdefgh"}
    assert palette_numbers(["a", "a"]) == {"a": alone["a"]}
    together = palette_numbers("abcdefgh")
    assert len({number % COLOURS for number in together.values()}) == 8, together
    assert together["a"] == alone["a"]
    assert len({tuple(look.values()) for look in model_looks([f"m{k}" for k in range(150)]).values()}) == 150


def test_models_that_a_committed_run_compares_have_colours_of_their_own():
    assert len(set(FIXED.values())) == len(FIXED)
    for file in RESULTS.rglob("models.csv"):
        models = [name for name in pd.read_csv(file)["model"].unique() if "@" not in name and "+rotated" not in name]
        if len(models) <= COLOURS:
            colours = {name: look["color"] for name, look in model_looks(models).items()}
            assert len(set(colours.values())) == len(models), (file, colours)


def test_figures_name_no_colour_for_a_model_by_its_place_in_a_list():
    for file in (RESULTS.parent / "lensbench/report").rglob("*.py"):
        said = re.findall(r"line_looks\(len\((\w+)\)\)", file.read_text())
        assert not {"models", "names", "facts", "shown"} & set(said), file
