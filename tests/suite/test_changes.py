"""Settings from the command line: any of a suite's, checked like its file, in place of what the file says."""

import json
import shlex

import pytest
from helpers.commands import refused, run
from helpers.suites import SUITE, write_suite, write_texts

from lensbench.errors import LensbenchError
from lensbench.suite.changes import Changes
from lensbench.suite.files import load_suite


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(SUITE.format(texts=write_texts(path.parent / "texts", documents=1)))
    return path


EDITS = {
    "fit.sequences=20": ("[fit]\nsequences = 48", "[fit]\nsequences = 20"),
    "update.tolerances=[0, 0.01]": ("[fit]", "[update]\ntolerances = [0, 0.01]\n[fit]"),
    "update=false": ('question = "Does', 'update = false\nquestion = "Does'),
    "seeds=[3, 4]": ('question = "Does', 'seeds = [3, 4]\nquestion = "Does'),
    "verdict.update.added=0.9": ("[fit]", "[verdict.update]\nadded = 0.9\n[fit]"),
    "models.gpt.layers=4": ("layers = 3", "layers = 4"),
    "models.gpt.training.learning_rate=0.5": ("layers = 3", "layers = 3\ntraining = { learning_rate = 0.5 }"),
    "models.pc+state.view='prediction'": ('view_of = "pc"', 'view_of = "pc"\nview = "prediction"'),
    "corpus.vocab_size=320": ("vocab_size = 300", "vocab_size = 320"),
    "evaluate.begin=every": ("draws = 200", 'draws = 200\nbegin = "every"'),
    "update.largest_norm=false": ("[fit]", "[update]\nlargest_norm = false\n[fit]"),
}
"""An option, and the same as an edit of the file"""


@pytest.mark.parametrize("option", EDITS)
def test_a_setting_of_the_command_line_is_that_of_the_file(option, file, tmp_path):
    old, new = EDITS[option]
    content = file.read_text()
    assert old in content
    edited = tmp_path / "edited.toml"
    edited.write_text(content.replace(old, new, 1))
    assert Changes(settings=(option,)).of(str(file)) == load_suite(str(edited))


@pytest.mark.parametrize("name", ["quick", "pretrained", "vision"])
def test_a_setting_leaves_all_others_of_a_suite_as_they_are(name):
    suite = load_suite(name)
    changed = Changes(settings=(f"evaluate.draws={suite.evaluate.draws + 1}",)).of(name)
    assert changed.evaluate.draws == suite.evaluate.draws + 1
    evaluate = changed.evaluate.model_copy(update={"draws": suite.evaluate.draws})
    assert changed.model_copy(update={"evaluate": evaluate}) == suite


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("fit.sequnces=3", "command line: unknown key 'fit.sequnces'; did you mean 'sequences'?"),
        ("fti.sequences=3", "command line: unknown key 'fti'; did you mean 'fit'?"),
        ("verdict.update.aded=0.5", "unknown key 'verdict.update.aded'; did you mean 'added'?"),
        ("models.gpt.layrs=3", "unknown key 'models.gpt.layrs'; did you mean 'layers'?"),
        ("models.gtp.layers=3", "models.gtp.layers: models are set by name, models.gpt.KEY; did you mean 'gpt'?"),
        ("models.gpt.layers=1", "command line: models.gpt.layers: Input should be greater than or equal to 2"),
        ("fit.sequences=0", "fit.sequences: Input should be greater than or equal to 1"),
        ("fit.sequences=many", "fit.sequences: Input should be a valid integer"),
        ("fit.sequences=[1", "--set fit.sequences=[1: the value is not valid TOML"),
        ("fit.sequences", "--set fit.sequences: give KEY=VALUE"),
        ("fit.sequences=", "give KEY=VALUE"),
        ("=3", "give KEY=VALUE"),
        ("fit=3", "command line: fit: "),
        ("fit.sequences.more=3", "command line: fit.sequences.more: sequences is no table"),
        ("corpus.train=0.9", "must sum to 1"),
        ("evaluate.positions=70", "no more than 62 positions"),
        ("seeds=[-1]", "seeds"),
    ],
)
def test_a_wrong_setting_is_answered_with_what_would_be_right(option, expected, file):
    with pytest.raises(LensbenchError) as error:
        Changes(settings=(option,)).of(str(file))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_of_a_table_that_the_suite_leaves_out_is_refused(file):
    with pytest.raises(LensbenchError, match=r"update\.layers: update is left out of this suite"):
        Changes(settings=("update=false", "update.layers=4")).of(str(file))


def test_of_two_settings_of_one_key_the_later_one_has_the_last_word(file):
    assert Changes(settings=("fit.sequences=20", "fit.sequences=30")).of(str(file)).fit.sequences == 30


def test_settings_that_are_right_together_alone_may_be_given_in_any_order(file):
    """96 positions of sequences of 128 tokens: the first setting alone is refused."""
    settings = ("fit.positions=96", "evaluate.length=128", "training.length=128")
    assert Changes(settings=settings).of(str(file)).length == 128


def test_a_model_of_the_command_line_takes_settings_by_its_name():
    suite = Changes(models=("hub:a/B-1.5",), settings=("models.B-1.5.dtype=bfloat16",)).of("pretrained")
    assert [(m.name, m.dtype) for m in suite.models] == [("B-1.5", "bfloat16")]


def test_runs_of_other_settings_lie_in_other_folders_by_default(file):
    suite = load_suite(str(file))
    assert Changes().folder_name(suite) == "tiny"
    assert Changes(settings=("fit.ridges=[0.1, 1]",)).folder_name(suite) == "tiny-fit.ridges-0.1-1"
    many = tuple(f"fit.sequences={n}" for n in range(1, 9))
    assert len({Changes(settings=many[:k]).folder_name(suite) for k in range(9)}) == 9
    assert len(Changes(settings=many).folder_name(suite)) < 80


def test_options_as_results_report_them_name_no_folder_of_this_machine():
    given = Changes(
        text="file:/home/me/texts", settings=('corpus.spec="file:/home/me/x"', "models.a.source=path:/m/b"), seed=3
    )
    assert given.options() == [
        "--corpus", "file:texts", "--seed", "3", "--set", 'corpus.spec="file:x"', "--set", "models.a.source=path:b",
    ]  # fmt: skip


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_the_settings_that_ran_are_in_the_manifest_with_the_command_that_gives_them(tmp_path):
    suite, out = write_suite(tmp_path), tmp_path / "run"
    given = ["--set", "update.readable=false", "--set", "models.gpt.training.learning_rate=0.01", "--only", "gpt"]
    result = run("run", suite, "--out", out, *given)
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["suite"]["update"]["readable"] is False
    assert manifest["suite"]["models"][0]["training"] == {"learning_rate": 0.01}
    assert manifest["options"] == given[:4]
    assert shlex.join(["lensbench", "run", "tiny", *given]) in (out / "report.html").read_text().replace("&#39;", "'")
    again = run("run", suite, "--out", out, *given)
    assert again.exit_code == 0, again.output
    assert "done in" not in again.output
    refused(run("run", suite, "--out", out, "--set", "fit.refit=1"), "unknown key 'fit.refit'")
    assert json.loads((out / "manifest.json").read_text())["suite"] == manifest["suite"]
