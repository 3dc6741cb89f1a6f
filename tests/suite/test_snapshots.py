"""Checkpoints of a training and revisions of a source are models of a suite, written out from one line."""

import tomllib

import pytest
from helpers.suites import SUITE

from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.suite.changes import with_settings
from lensbench.suite.files import read_toml, validated
from lensbench.suite.recipes import Suite

KEPT = "checkpoints = [0, 1_024, 4_096]\nlength = 64"


def suite_of(text: str) -> Suite:
    return validated(Suite, "my.toml", tomllib.loads(text))


def checkpointed(**replacements: str) -> Suite:
    text = SUITE.format(texts="x").replace("length = 64", KEPT)
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    return suite_of(text)


def revisioned(keys: str) -> Suite:
    head = SUITE.format(texts="x").partition("[[models]]")[0]
    return suite_of(f'{head}[[models]]\nname = "pythia"\n{keys}\n[[models]]\nname = "other"\nsource = "hub:a/b"\n')


def test_checkpoints_come_before_their_model_and_views_have_them_too():
    names = [m.name for m in checkpointed().models]
    assert names == [f"{name}{end}" for name in ("gpt", "pc", "pc+state") for end in ("@0", "@1024", "@4096", "")]


def test_a_checkpoint_is_its_model_in_all_but_its_tokens():
    suite = checkpointed()
    models = {m.name: m for m in suite.models}
    assert models["pc@1024"].shape == models["pc"].shape
    assert (models["pc@1024"].family, models["pc@1024"].view) == ("predictive-coding", "prediction")
    assert suite.trained(models["pc+state@1024"]).name == "pc@1024"
    assert suite.whole_training(models["pc+state@1024"]).name == "pc"
    assert suite.whole_training(models["gpt"]).name == "gpt"
    assert suite.known(models["gpt@0"]) == "nothing learned"
    assert suite.known(models["gpt@1024"]) == suite.known(models["gpt"])


def test_a_model_may_keep_others_or_none():
    suite = checkpointed(**{"layers = 3\nheads = 2\nparameters = 20_000\nview": "training = { checkpoints = [] }\n"
                            "layers = 3\nheads = 2\nparameters = 20_000\nview"})  # fmt: skip
    assert [m.name for m in suite.models] == ["gpt@0", "gpt@1024", "gpt@4096", "gpt", "pc", "pc+state"]


def test_rotated_views_untrained_and_pretrained_models_have_no_checkpoints():
    more = '\n[[models]]\nname = "gpt+rotated"\n[[models]]\nname = "hub"\nsource = "hub:a/b"\n'
    head = SUITE.format(texts="x").partition('[[models]]\nname = "pc"')[0].replace("length = 64", KEPT)
    suite = suite_of(head.replace("heads = 2", "heads = 2\nuntrained = true") + more)
    assert [m.name for m in suite.models] == ["gpt", "gpt+rotated", "hub"]
    assert "gpt+rotated@0" not in {m.name for m in suite_of(head + more).models}


def test_what_a_manifest_says_of_a_suite_is_the_same_suite_again():
    for suite in (checkpointed(), revisioned('source = "hub:a/c"\nrevisions = ["r/1", "r2"]\ntrain_tokens = [5, 9]')):
        assert Suite.model_validate(suite.described()).described() == suite.described()


def test_a_suite_without_checkpoints_says_what_it_said_before():
    described = suite_of(SUITE.format(texts="x")).described()
    assert "checkpoints" not in described["training"]
    assert not {"checkpoint", "checkpoint_of", "revisions", "train_tokens"} & set(described["models"][0])


def test_settings_of_the_command_line_write_checkpoints_anew():
    fewer = with_settings(checkpointed(), ["training.checkpoints=[2048]"])
    assert [m.name for m in fewer.models if m.name.startswith("gpt")] == ["gpt@2048", "gpt"]
    assert len(with_settings(checkpointed(), ["training.checkpoints=[]"]).models) == 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[0, 1_024, 4_096]", "[4_096, 1_024]", "checkpoints must rise"),
        ("[0, 1_024, 4_096]", "[4_096, 4_100]", "by a step of 512 tokens at least"),
        ("[0, 1_024, 4_096]", "[8_192]", "must stay below tokens, 8192"),
        ("[0, 1_024, 4_096]", '"soon"', "training.checkpoints"),
        ('name = "gpt"', 'name = "gpt"\ncheckpoint = 7\ncheckpoint_of = "pc"', "the training of 'pc' does not keep"),
        ('name = "gpt"', 'name = "gpt"\ncheckpoint_of = "pc"', "go together"),
    ],
)
def test_checkpoints_that_cannot_be_are_refused(old, new, expected):
    with pytest.raises(LensbenchError, match=r"my\.toml") as error:
        checkpointed(**{old: new})
    assert expected in str(error.value)


def test_a_mistake_in_a_model_behind_checkpoints_is_named_by_its_model():
    with pytest.raises(LensbenchError, match=r"models\.pc@0\.layers|models\.pc\.layers"):
        checkpointed(
            **{'"predictive-coding"\nd_model = 16\nlayers = 3': '"predictive-coding"\nd_model = 16\nlayers = 1'}
        )


def test_a_step_is_the_nearest_to_its_tokens():
    recipe = TrainingRecipe(tokens=10_000, length=10, batch=10, checkpoints=(0, 149, 151, 9_900))
    assert [recipe.step_of(t) for t in recipe.checkpoints] == [0, 1, 2, 99]


def test_revisions_are_models_with_their_tokens():
    suite = revisioned('source = "hub:EleutherAI/pythia"\nrevisions = ["step1", "refs/pr/2"]\ntrain_tokens = [5, 9]')
    found = {m.name: (m.source, m.train_tokens) for m in suite.models}
    assert found == {
        "pythia@step1": ("hub:EleutherAI/pythia@step1", 5),
        "pythia@refs-pr-2": ("hub:EleutherAI/pythia@refs/pr/2", 9),
        "other": ("hub:a/b", None),
    }
    assert with_settings(suite, ["models.pythia@step1.dtype=bfloat16"]).models[0].dtype == "bfloat16"


def test_revisions_of_a_folder_are_folders_in_it():
    suite = revisioned('source = "path:/m/"\nrevisions = ["step1", "step2"]')
    assert [m.source for m in suite.models[:2]] == ["path:/m/step1", "path:/m/step2"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ('source = "hub:a/b@main"\nrevisions = ["x"]', "give hub:a/b"),
        ('source = "package:llm"\nrevisions = ["x"]', "hub:ORG/NAME, or folders within a path:FOLDER"),
        ('source = "hub:a/b"\nrevisions = ["x", "x"]', "named twice"),
        ('source = "hub:a/b"\nrevisions = 3', "a list of names, not 3"),
        ('source = "hub:a/b"\nrevisions = ["x", "y"]\ntrain_tokens = [1]', "a number for each of its 2 revisions"),
        ('source = "hub:a/b"\nrevisions = ["x"]\ntrain_tokens = [-1]', "models.pythia@x.train_tokens"),
        ('family = "gpt"\ntrain_tokens = 3', "sets train_tokens, which is for pretrained models"),
    ],
)
def test_revisions_that_cannot_be_are_refused(keys, expected):
    with pytest.raises(LensbenchError, match=r"my\.toml") as error:
        revisioned(keys)
    assert expected in str(error.value)


def test_every_revision_of_pythia_training_has_its_steps_worth_of_tokens():
    for model in read_toml("pythia-training")[1]["models"]:
        steps = [int(name.removeprefix("step")) for name in model["revisions"]]
        assert model["train_tokens"] == [step * 1024 * 2048 for step in steps]  # sequences of a batch, tokens of each


def test_every_size_of_scale_has_twenty_tokens_a_parameter_and_the_rate_of_its_width():
    content = read_toml("scale")[1]
    sizes = {"16k": content, **content["presets"]}
    counts = dict(zip(sizes, (16_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000), strict=True))
    for size, table in sizes.items():
        assert table["training"]["tokens"] == 20 * counts[size]
        for model in table["models"]:
            assert size in model["name"]
            if "view_of" in model:
                continue
            assert model["parameters"] == pytest.approx(counts[size], rel=0.01)
            rule = 3.072 if model["family"] == "gpt-conv" else 1.536
            assert model["training"]["learning_rate"] * model["d_model"] == pytest.approx(rule)


@pytest.mark.parametrize(
    ("sweep", "preset"), [("scale-sweep", None), *((f"scale-sweep-{n}", n) for n in ("64k", "250k"))]
)
def test_a_sweep_of_scale_tries_half_the_rule_the_rule_and_twice_of_it_after_a_quarter_of_the_tokens(sweep, preset):
    content, tried = read_toml("scale")[1], read_toml(sweep)[1]
    content = content if preset is None else content["presets"][preset]
    trained = {m["name"]: m for m in content["models"] if "family" in m}
    assert tried.get("preset") == preset
    assert tried["tokens"] == content["training"]["tokens"] / 4
    names = {t["model"] for t in tried["trials"]}
    assert {f"{name}-{preset or '16k'}" for name in ("gpt-conv", "pc")} <= names <= set(trained)
    for name in names:
        model, trials = trained[name], [t for t in tried["trials"] if t["model"] == name]
        rates = [t["training"]["learning_rate"] / model["training"]["learning_rate"] for t in trials]
        assert rates == pytest.approx([0.5, 1, 2])
        assert all(t.get("settings") == model.get("settings") for t in trials)


def test_the_smaller_preset_of_training_has_twenty_tokens_a_parameter_and_rates_inverse_to_the_width():
    content = read_toml("training")[1]
    small = content["presets"]["64k"]
    assert len(small["training"]["checkpoints"]) >= 10
    for table, parameters in ((content, 250_000), (small, 64_000)):
        assert table["training"]["tokens"] == 20 * parameters
        for model in table["models"]:
            assert "view_of" in model or model["parameters"] == parameters
    for large, less in zip(content["models"], small["models"], strict=True):
        assert large["name"] == less["name"]
        if "view_of" not in large:
            rates = [m["training"]["learning_rate"] * m["d_model"] for m in (large, less)]
            assert rates[0] == pytest.approx(rates[1])
