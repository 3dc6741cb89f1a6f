"""Suites are checked before anything runs, and a wrong one is answered with what would be right."""

import tomllib

import pytest
from helpers.suites import SUITE
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.models import build, count_parameters
from lensbench.suite.files import (
    kind_of,
    load_calibration,
    load_in_context,
    load_regression,
    load_suite,
    load_sweep,
    read_toml,
    validated,
)
from lensbench.suite.recipes import Suite
from lensbench.suite.shipped import named_files


def changed(old: str, new: str) -> dict:
    content = SUITE.format(texts="nowhere")
    assert old in content
    return tomllib.loads(content.replace(old, new, 1))


def test_every_suite_that_comes_with_lensbench_is_valid():
    assert {"quick", "quick-sweep"} <= set(named_files())
    for name in named_files():
        _, command = kind_of(read_toml(name)[1])
        load = {"sweep": load_sweep, "run": load_suite, "calibrate": load_calibration}
        load |= {"in-context": load_in_context, "regression": load_regression}
        assert load[command](name).name == name


def test_every_file_that_comes_with_lensbench_is_listed():
    result = CliRunner().invoke(app, ["models"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert [name for name in named_files() if f" {name} " not in result.output] == []


def test_models_of_quick_have_equal_parameters_within_one_percent():
    suite = load_suite("quick")
    counts = [
        count_parameters(
            build(
                str(m.family),
                vocab_size=suite.corpus.vocab_size,
                context=suite.training.length,
                **m.shape,
                **m.settings,
            )
        )
        for m in suite.models
        if m.view_of is None
    ]
    assert len(counts) == 2
    assert max(counts) <= 1.01 * min(counts)


def test_quick_trains_its_models_with_what_the_sweep_tries():
    """The outcome that quick uses must be one of the declared trials, for every model."""
    suite, sweep = load_suite("quick"), load_sweep("quick-sweep")
    for model in suite.models:
        if model.view_of is None:
            tried = [(t.training, t.settings) for t in sweep.trials if t.model == model.name]
            assert (model.training, model.settings) in tried


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("refits = 2", "refit = 2", "unknown key 'fit.refit'; did you mean 'refits'?"),
        ("learning", "learning", ""),
        ('family = "gpt"', 'family = "gtp"', "did you mean 'gpt'?"),
        ("heads = 2", "head = 2", "did you mean 'heads'?"),
        ('name = "gpt"', 'name = "pc"', "two models are named 'pc'"),
        ('view_of = "pc"', 'view_of = "rnn"', "is a view of 'rnn'"),
        ("positions = 8", "positions = 70", "no more than 62 positions"),
        ("draws = 200", "draws = 3", "evaluate.draws"),
        ("vocab_size = 300", "vocab_size = 12", "corpus.vocab_size"),
        ("layers = 3", "layers = 1", "layers"),
        ("heads = 2", "heads = 5", "must divide d_model 16"),
        ("parameters = 20_000", "parameters = 600", "no MLP width gives gpt 600 parameters"),
        ("layers = 3", "layers = 3\nsettings = { foo = 1 }", "no setting 'foo'"),
        ("layers = 3", 'layers = 3\nsettings = { initializer_range = "a" }', "initializer_range"),
        ("layers = 3", "layers = 3\ntraining = { learning_rte = 1 }", "did you mean 'learning_rate'?"),
        ("layers = 3", "layers = 3\ntraining = { learning_rate = -1 }", "training.learning_rate"),
        ('question = "Does', 'seeds = [-1]\nquestion = "Does', "seeds"),
        ("vocab_size = 300", "vocab_size = 300\ntrain = 0.9", "must sum to 1"),
        ("rotations = 2", "rotations = 'two'", "fit.rotations"),
        (
            "[evaluate]",
            "[verdict.update]\naded = 0.9\n[evaluate]",
            "'verdict.update.aded'; did you mean 'added'",
        ),
        ("[evaluate]", "[verdict.update]\nadded = 0.1\n[evaluate]", "carried must not exceed added"),
        ("[evaluate]", "[verdict.update]\nfewest_pairs = 1\n[evaluate]", "verdict.update.fewest_pairs"),
    ],
)
def test_a_wrong_suite_is_answered_with_what_would_be_right(old, new, expected):
    if old == "learning":
        content = tomllib.loads(SUITE.format(texts="x"))
        content["models"][0]["training"] = {"tokens": 5}
        expected = "same for all models"
    else:
        content = changed(old, new)
    with pytest.raises(LensbenchError) as error:
        validated(Suite, "my.toml", content)
    assert str(error.value).startswith("my.toml: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_invalid_toml_and_unknown_names_are_told(tmp_path):
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(LensbenchError, match="not valid TOML"):
        load_suite(str(tmp_path / "broken.toml"))
    with pytest.raises(LensbenchError, match="did you mean 'quick'"):
        load_suite("quikc")
    with pytest.raises(LensbenchError, match="is a sweep"):
        load_suite("quick-sweep")
    with pytest.raises(LensbenchError, match="is a suite"):
        load_sweep("quick")


def test_a_sweep_gives_every_model_equally_many_trials(tmp_path):
    path = tmp_path / "unfair.toml"
    trial = '[[trials]]\nmodel = "{}"\n'
    path.write_text(
        'name = "unfair"\nquestion = "?"\nsuite = "quick"\ntokens = 1000\n'
        + "".join(map(trial.format, ["gpt", "gpt", "pc"]))
    )
    with pytest.raises(LensbenchError, match="equally many trials"):
        load_sweep(str(path))


def test_predictions_are_known_to_be_in_one_representation_only_where_every_layer_reads_them_out():
    suite = load_suite("predictive-coding")
    known = {model.name: suite.known(model) for model in suite.models}
    assert {name for name, what in known.items() if what == "one representation"} == {"pc", "pc-relaxed"}
    assert all(known[name] is None for name in ("pc-none", "pc-relaxed-none", "pc+state", "gpt-conv"))
