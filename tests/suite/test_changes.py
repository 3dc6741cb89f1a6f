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


@pytest.mark.parametrize("name", ["pretrained", "vision"])
def test_a_setting_leaves_all_others_of_a_suite_as_they_are(name):
    suite = load_suite(name)
    changed = Changes(settings=(f"evaluate.draws={suite.evaluate.draws + 1}",)).of(name)
    assert changed.evaluate.draws == suite.evaluate.draws + 1
    evaluate = changed.evaluate.model_copy(update={"draws": suite.evaluate.draws})
    assert changed.model_copy(update={"evaluate": evaluate}).described() == suite.described()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("fit.sequnces=3", "command line: unknown key 'fit.sequnces'; did you mean 'fit.sequences'?"),
        ("fti.sequences=3", "command line: unknown key 'fti'; did you mean 'fit'?"),
        ("verdict.update.aded=0.5", "unknown key 'verdict.update.aded'; did you mean 'verdict.update.added'?"),
        ("models.gpt.layrs=3", "unknown key 'models.gpt.layrs'; did you mean 'models.gpt.layers'?"),
        ("models.gtp.layers=3", "models.gtp.layers: models are set by name, models.gpt.KEY; did you mean 'gpt'?"),
        ("models.gpt.layers=1", "command line: models.gpt.layers must be at least 2"),
        ("fit.sequences=0", "fit.sequences must be at least 1"),
        ("fit.sequences=many", "fit.sequences must be a whole number"),
        ("fit.sequences=[1", "--set fit.sequences=[1: the value is not valid TOML"),
        ("fit.sequences", "--set fit.sequences: give KEY=VALUE"),
        ("fit.sequences=", "give KEY=VALUE"),
        ("=3", "give KEY=VALUE"),
        ("fit=3", "command line: fit must be a table of settings"),
        ("fit.sequences.more=3", "command line: fit.sequences.more: sequences is no table"),
        ("corpus.train=0.9", "must sum to 1"),
        ("evaluate.positions=70", "no more than 62 positions"),
        ("seeds=[-1]", "seeds"),
    ],
)
def test_a_wrong_setting_is_answered_with_what_would_be_right(option, expected, pretrained):
    with pytest.raises(LensbenchError) as error:
        Changes(settings=(option,)).of(str(pretrained))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_of_a_table_that_the_suite_leaves_out_is_refused(pretrained):
    with pytest.raises(LensbenchError, match=r"update\.layers: update is left out of this suite"):
        Changes(settings=("update=false", "update.layers=4")).of(str(pretrained))


def test_of_two_settings_of_one_key_the_later_one_has_the_last_word(pretrained):
    assert Changes(settings=("fit.sequences=20", "fit.sequences=30")).of(str(pretrained)).fit.sequences == 30


def test_settings_that_are_right_together_alone_may_be_given_in_any_order(pretrained):
    """96 positions of sequences of 128 tokens: the first setting alone is refused."""
    settings = ("fit.positions=96", "evaluate.length=128", "training.length=128")
    assert Changes(settings=settings).of(str(pretrained)).length == 128


def test_a_model_of_the_command_line_takes_settings_by_its_name():
    suite = Changes(models=("hub:a/B-1.5",), settings=("models.B-1.5.dtype=bfloat16",)).of("pretrained")
    assert [(m.name, m.dtype) for m in suite.models] == [("B-1.5", "bfloat16")]


def test_runs_of_other_settings_lie_in_other_folders_by_default(pretrained):
    suite = load_suite(str(pretrained))
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


PRESETS = """
[presets.glance]
probes = []
update = { landmarks = false }

[presets.glance.fit]
refits = 0
sequences = 20

[presets.glance.models.gpt]
dtype = "bfloat16"
"""

PRETRAINED = """
name = "tiny"
question = "Does it?"

[fit]
sequences = 48
dev_sequences = 32

[evaluate]
sequences = 96
positions = 8
length = 64

[[models]]
name = "gpt"
source = "hub:a/b"
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "tiny.toml"
    path.write_text(PRETRAINED)
    return path


@pytest.fixture(scope="module")
def with_presets(pretrained):
    path = pretrained.parent / "presets.toml"
    path.write_text(PRETRAINED + PRESETS)
    return path


def test_a_preset_sets_what_it_names_and_nothing_else(pretrained, with_presets):
    options = ("probes=[]", "update.landmarks=false", "fit.refits=0", "fit.sequences=20", "models.gpt.dtype=bfloat16")
    expected = Changes(settings=options).of(str(pretrained))
    assert Changes(preset="glance").of(str(with_presets)).described() == expected.described()


def test_a_file_with_presets_is_the_default_and_a_manifest_says_nothing_of_them(pretrained, with_presets):
    plain = load_suite(str(pretrained)).described()
    assert plain == load_suite(str(with_presets)).described()
    assert plain == Changes(preset="default").of(str(with_presets)).described()


def test_file_then_preset_then_limit_then_settings(with_presets):
    """48 and 96 sequences of fit and eval in the file, 20 of fit in the preset."""
    suite = Changes(preset="glance", limit=64, settings=("evaluate.sequences=70",)).of(str(with_presets))
    assert (suite.fit.sequences, suite.evaluate.sequences) == (20, 70)
    suite = Changes(preset="glance", limit=64).of(str(with_presets))
    assert (suite.fit.sequences, suite.fit.dev_sequences, suite.evaluate.sequences) == (20, 32, 64)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("[presets.a]\nfti = 3", "tiny.toml, preset a: unknown key 'fti'; did you mean 'fit'?"),
        ("[presets.a.fit]\nrefit = 3", "tiny.toml, preset a: unknown key 'fit.refit'; did you mean 'refits'?"),
        ("[presets.a.models.gtp]\ndtype = 3", "tiny.toml, preset a: models.gtp.dtype: did you mean 'gpt'?"),
        ("[presets.a.evaluate]\npositions = 70", "preset a: evaluate.positions is 70: sequences of 64 tokens"),
        ("[presets.default]\nseeds = [1]", "the preset 'default' is the file as it is"),
        ('[presets.a]\nname = "b"', "preset 'a' cannot set 'name'"),
        ("[presets]\na = 3", "tiny.toml: presets.a must be a table of settings"),
        ("[preset.a]\nseeds = [1]", "unknown key 'preset'; did you mean 'presets'?"),
    ],
)
def test_a_wrong_preset_is_told_when_its_suite_is_read(table, expected, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(f"{PRETRAINED}\n{table}\n")
    with pytest.raises(LensbenchError) as error:
        load_suite(str(path))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_and_a_suite_without_presets_are_told(pretrained, with_presets):
    with pytest.raises(LensbenchError, match="has no preset 'glanse'; did you mean 'glance'"):
        Changes(preset="glanse").of(str(with_presets))
    for preset in ("glance", "default"):
        with pytest.raises(LensbenchError, match=r"tiny\.toml has no presets: --preset is for"):
            Changes(preset=preset).of(str(pretrained))


def test_presets_come_from_files_alone(with_presets):
    with pytest.raises(LensbenchError, match=r"presets\.a\.seeds: presets are tables of a suite's file"):
        Changes(settings=("presets.a.seeds=[1]",)).of(str(with_presets))


def test_presets_of_pretrained_hold_for_the_model_of_the_command_line():
    glance = Changes(preset="glance", models=("hub:a/b",)).of("pretrained")
    assert [m.name for m in glance.models] == ["b"]
    assert not glance.update.landmarks
    assert (glance.fit.refits, glance.fit.tolerances, glance.probes, glance.claims) == (0, (), (), ())
    full, default = (Changes(preset=name).of("pretrained") for name in ("full", "default"))
    assert default.described() == load_suite("pretrained").described()
    for section, key in (("fit", "sequences"), ("evaluate", "sequences"), ("fit", "layers"), ("fit", "refits")):
        sizes = [getattr(getattr(suite, section), key) for suite in (glance, default, full)]
        assert sizes == sorted(set(sizes))


def test_a_limit_is_an_upper_bound_and_refused_where_intervals_could_not_be_trusted():
    limited, whole = Changes(limit=100).of("pretrained"), load_suite("pretrained")
    found = [limited.fit.sequences, limited.fit.dev_sequences, limited.evaluate.sequences]
    assert found == [100, min(100, whole.fit.dev_sequences), 100]
    assert Changes(limit=10_000).of("pretrained").described() == whole.described()
    with pytest.raises(LensbenchError, match=r"--limit 63: .*fewer than 64 clusters.*give --limit 64 or more"):
        Changes(limit=63).of("pretrained")
    with pytest.raises(LensbenchError, match=r"evaluate\.precision"):
        Changes(limit=64, settings=("evaluate.precision=0.1",)).of("pretrained")


def test_runs_of_presets_and_limits_lie_in_folders_of_their_own():
    suite = load_suite("pretrained")
    names = [
        Changes(preset=preset, limit=limit).folder_name(suite)
        for preset in ("default", "glance")
        for limit in (None, 64)
    ]
    assert names == ["pretrained", "pretrained-limit64", "pretrained-glance", "pretrained-glance-limit64"]


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
