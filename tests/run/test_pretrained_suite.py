"""Suites of pretrained models: the whole path from folders that others saved to tables, and what is wrong with a folder."""

import gc
import hashlib
import json
import logging
import shutil
import tomllib
import tracemalloc
import weakref
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.architectures import small_model
from helpers.pretrained import byte_tokenizer, run, save_model, write_suite
from helpers.suites import write_texts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from tuned_lens.nn.lenses import TunedLens

from lensbench.data import corpus, reading, sample_windows, tokenize
from lensbench.models import pretrained
from lensbench.results import schema as results
from lensbench.results.folder import read_run
from lensbench.run import origin as run_stages
from lensbench.run import suite as run_module
from lensbench.runtime.bars import Bars
from lensbench.runtime.files import sha256
from lensbench.runtime.stages import Pieces

pytestmark = pytest.mark.run


def csv_bytes(folder):
    return {name: (folder / name).read_bytes() for name in results.WRITTEN}


def computed(result) -> set[str]:
    """The stages that a run did not find finished."""
    assert result.exit_code == 0, result.output
    names = {line.split(":")[0] for line in result.stderr.splitlines() if ": done in" in line}
    return {name for name in names if not name.startswith("capture-")}


@dataclass(frozen=True)
class Made:
    """A finished suite of two models with tokenizers of their own, and what it was made from."""

    root: Path

    @property
    def texts(self) -> Path:
        return self.root / "texts"

    @property
    def suite(self) -> Path:
        return self.root / "suite.toml"

    @property
    def folder(self) -> Path:
        return self.root / "run"

    def write(self, **keys: str) -> None:
        """The suite, with more keys for the first of its models."""
        neox = {"source": f"path:{self.root / 'neox'}", **keys}
        write_suite(self.suite, self.texts, neox=neox, gpt2={"source": f"path:{self.root / 'gpt2'}"})

    def change_weights(self, change) -> None:
        """Of the first of its models."""
        path = self.root / "neox" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Made:
    """Tests must not change it: they take ``made``, or other run folders."""
    made = Made(tmp_path_factory.mktemp("pretrained"))
    texts = write_texts(made.texts, documents=120)
    save_model(made.root / "neox", "gpt_neox", texts, 300)
    save_model(made.root / "gpt2", "gpt2", texts, 280)
    made.write()
    result = run("run", made.suite, "--out", made.folder)
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture
def made(original, tmp_path) -> Made:
    """A copy in another place, its texts included."""
    shutil.copytree(original.root, tmp_path / "copy")
    copy = Made(tmp_path / "copy")
    copy.write()
    return copy


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """They have tests of their own and take longer than all the rest; ``original`` draws them."""
    request.getfixturevalue("original")
    monkeypatch.setattr(run_module, "draw_side_by_side", lambda *_: [])


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name)


# What a run leaves


def test_every_table_has_rows_of_every_model(original):
    finished = read_run(original.folder)
    for name in results.WRITTEN:
        if "model" in results.SCHEMA[name] and name != "probes.csv":  # the suite asks for no probe
            assert {"neox", "gpt2"} <= set(finished.tables[name]["model"]), name
    assert (finished.tables["transfer.csv"].groupby("model").size() == 16).all()
    models = finished.tables["models.csv"].set_index("model")
    assert models["source"].to_dict() == {"neox": "path:neox", "gpt2": "path:gpt2"}
    assert models["family"].to_dict() == {"neox": "gpt_neox", "gpt2": "gpt2"}
    assert models["vocab_size"].to_dict() == {"neox": 300, "gpt2": 280}
    assert set(models["dtype"]) == {"float32"}
    assert models["train_tokens"].isna().all()
    assert list((original.folder / "figures").glob("*.png"))


def test_baselines_are_counted_in_the_tokens_of_every_model(original):
    baselines = table(original.folder, "baselines.csv").set_index(["tokenizer", "baseline"])
    assert set(baselines.index) == {(t, b) for t in ("neox", "gpt2") for b in ("unigram", "bigram")}
    splits = corpus.load_corpus(f"file:{original.texts}").splits
    for name in ("neox", "gpt2"):
        tokenizer = AutoTokenizer.from_pretrained(original.root / name)
        counted = sum(1 + len(tokenizer(d.text)["input_ids"]) for d in splits["train"])
        assert set(baselines.loc[name, "train_tokens"]) == {counted}


def test_the_manifest_tells_what_the_sources_held(original):
    manifest = json.loads((original.folder / "manifest.json").read_text())
    for name in ("neox", "gpt2"):
        told = manifest["sources"][name]
        assert told.pop("source") == f"path:{name}"
        files = {p.name: p for p in (original.root / name).iterdir()}
        assert told == {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in files.items()}
        assert "model.safetensors" in told
        assert "tokenizer.json" in told


TRAINED = """
[training]
tokens = 2_048
length = 32
batch = 8

[[models]]
name = "trained"
family = "gpt"
d_model = 16
layers = 2
heads = 2
parameters = 20_000
"""


@pytest.mark.parametrize(
    "name",
    [
        "neox",
        "suite",
    ],
)
def test_a_model_trained_here_beside_a_pretrained_one_has_baselines_of_its_own(original, tmp_path, name):
    suite = write_suite(tmp_path / "suite.toml", original.texts, **{name: {"source": f"path:{original.root / 'neox'}"}})
    suite.write_text(suite.read_text().replace("[fit]", "vocab_size = 320\n\n[fit]") + TRAINED)
    result = run("run", suite, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert len(table(tmp_path / "run", "baselines.csv")) == 4
    assert table(tmp_path / "run", "models.csv").set_index("model")["source"].isna()["trained"]


def test_the_manifest_tells_sources_of_one_name_apart(made):
    shutil.copytree(made.root / "neox", made.root / "other" / "neox")
    sources = {"a": made.root / "neox", "b": made.root / "other" / "neox"}
    made.change_weights(lambda weights: weights["gpt_neox.final_layer_norm.bias"].add_(1))
    write_suite(made.suite, made.texts, **{name: {"source": f"path:{path}"} for name, path in sources.items()})
    assert run("run", made.suite, "--out", made.root / "two").exit_code == 0
    manifest = json.loads((made.root / "two" / "manifest.json").read_text())
    told = {source["model.safetensors"] for source in manifest["sources"].values()}
    assert told == {sha256(path / "model.safetensors") for path in sources.values()}


def test_nothing_that_a_run_writes_says_where_its_sources_lie(original):
    """Tables, manifest, lenses, the records of stages; ``run.json`` is the folder's own note for this machine, not sent."""
    written = [p for p in original.folder.rglob("*") if p.is_file() and p.name != "run.json"]
    assert len(written) > 20
    for path in written:
        assert str(original.root).encode() not in path.read_bytes(), path


def scored_by_transformers(original: Made, name: str) -> tuple[float, float]:
    """Mean nats per scored token and bits per byte, of the windows that the suite scores."""
    tokenizer = AutoTokenizer.from_pretrained(original.root / name)
    model = AutoModelForCausalLM.from_pretrained(original.root / name).eval()
    splits = corpus.load_corpus(f"file:{original.texts}").splits
    windows = sample_windows(
        tokenize(tokenizer, splits["eval"]), n_sequences=60, length=32, positions=8, seed=3, max_share=0.2
    )
    assert windows.ids.shape == (60, 32)
    assert windows.valid.all()
    nats = size = 0.0
    for ids, positions in zip(windows.ids, windows.positions, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor(ids[None])).logits[0].double().log_softmax(-1)
        for at in positions:
            nats -= log_p[at, ids[at + 1]].item()
            size += len(tokenizer.decode([ids[at + 1]]).encode())
    return nats / windows.valid.sum(), nats / np.log(2) / size


@pytest.mark.parametrize(("name", "size"), [("neox", 300), ("gpt2", 280)])
def test_bits_per_byte_are_those_of_a_plain_loop_over_the_model(original, name, size):
    row = table(original.folder, "models.csv").set_index("model").loc[name]
    ce, bits_per_byte = scored_by_transformers(original, name)
    assert row["ce"] == pytest.approx(ce, abs=1e-4)
    assert row["bits_per_byte"] == pytest.approx(bits_per_byte, abs=1e-3)
    assert abs(ce - np.log(size)) > 0.1  # no model that any reading of its states would agree with


def test_half_precision_gives_nearly_the_same_numbers(original, tmp_path):
    source = f"path:{original.root / 'neox'}"
    suite = write_suite(tmp_path / "suite.toml", original.texts, half={"source": source, "dtype": "bfloat16"})
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    half = table(tmp_path / "run", "models.csv").iloc[0]
    full = table(original.folder, "models.csv").set_index("model").loc["neox"]
    assert half["dtype"] == "bfloat16"
    assert 0 < abs(half["ce"] - full["ce"]) < 0.02
    kl = [
        table(folder, "transfer.csv").query(f"model == '{name}'")["kl"].to_numpy()
        for folder, name in ((tmp_path / "run", "half"), (original.folder, "neox"))
    ]
    np.testing.assert_allclose(*kl, rtol=0.1, atol=0.01)


def test_a_model_that_is_spread_over_devices_gives_the_same_tables(made):
    pytest.importorskip("accelerate")
    made.write(device_map="auto")
    assert "fit-neox-seed0" in computed(run("run", made.suite, "--out", made.root / "spread"))
    assert csv_bytes(made.root / "spread") == csv_bytes(made.folder)


# Going on and starting anew


def test_a_second_run_loads_no_model(made, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(run_stages, "load_model", refuse)
    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    before = csv_bytes(made.folder)
    # From sources and a text in another place: what they hold is what counts.
    assert computed(run("run", made.suite, "--out", made.folder)) == set()
    assert csv_bytes(made.folder) == before


def test_other_weights_in_the_folder_do_not_replace_a_finished_run(made):
    before = csv_bytes(made.folder)
    made.change_weights(lambda weights: weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"].mul_(0.5))
    for only in ((), ("--only", "neox"), ("--only", "gpt2")):
        refused(
            run("run", made.suite, "--out", made.folder, *only), "model 'neox', of which model.safetensors is another"
        )
    assert csv_bytes(made.folder) == before


def test_checkpoints_whose_folders_have_one_name_are_told_apart(made, monkeypatch):
    """``step1000/hf`` and ``step2000/hf``: by name in one command, by a refusal in two."""
    monkeypatch.chdir(made.root)
    for step in ("step1000", "step2000"):
        shutil.copytree(made.root / "neox", made.root / step / "hf")
    made.change_weights(lambda weights: weights["gpt_neox.final_layer_norm.bias"].add_(1))
    shutil.copy(made.root / "neox" / "model.safetensors", made.root / "step2000" / "hf")
    sources = ["path:step1000/hf", "path:step2000/hf"]
    assert run("run", made.suite, "--model", sources[0]).exit_code == 0
    first = made.root / "runs" / "pretrained-hf"
    before = csv_bytes(first)
    refused(
        run("run", made.suite, "--model", sources[1]), "holds a finished run", "model.safetensors is another one now"
    )
    assert csv_bytes(first) == before
    assert run("run", made.suite, "--model", sources[0], "--model", sources[1]).exit_code == 0
    both = read_run(made.root / "runs" / "pretrained-step1000-hf-step2000-hf")
    assert both.manifest.models == ["step1000-hf", "step2000-hf"]
    told = both.tables["models.csv"].set_index("model")["weights"]
    assert told["step1000-hf"] == table(first, "models.csv")["weights"][0] != told["step2000-hf"]
    assert both.manifest.weights["step2000-hf-seed0"] == told["step2000-hf"]


def test_other_weights_under_a_new_name_of_the_run_are_fitted_and_scored_anew(made):
    (made.folder / "manifest.json").unlink()  # what the refusal says
    before = {name: table(made.folder, f"{name}.csv") for name in ("models", "transfer", "lenses", "indices")}
    made.change_weights(lambda weights: weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"].mul_(0.5))
    done = computed(run("run", made.suite, "--out", made.folder))
    assert {"fit-neox-seed0", "score-neox-seed0"} <= done
    assert not any("gpt2" in name for name in done)
    for name, old in before.items():
        new = table(made.folder, f"{name}.csv")
        pd.testing.assert_frame_equal(new[new["model"] == "gpt2"], old[old["model"] == "gpt2"])
        assert not new[new["model"] == "neox"].equals(old[old["model"] == "neox"])
    manifest = json.loads((made.folder / "manifest.json").read_text())
    file = "model.safetensors"
    assert manifest["sources"]["neox"][file] == sha256(made.root / "neox" / file)


def test_another_tokenizer_in_the_folder_is_another_text(made):
    (made.folder / "manifest.json").unlink()
    byte_tokenizer(made.texts, 290).save_pretrained(made.root / "neox")
    assert {"fit-neox-seed0", "baselines-neox"} <= computed(run("run", made.suite, "--out", made.folder))


@pytest.mark.parametrize("where", ["fit-neox-seed0", "score-gpt2-seed0"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(original, tmp_path, monkeypatch, where):
    whole = Bars.task

    def task(self, name, total, unit):
        bar, updates = whole(self, name, total, unit), 0

        def update(done, remark=""):
            nonlocal updates
            updates += 1
            if updates == 5:
                raise KeyboardInterrupt

        if name == where:
            bar.update = update
        return bar

    with monkeypatch.context() as patched:
        patched.setattr(Bars, "task", task)
        assert run("run", original.suite, "--out", tmp_path / "run").exit_code == 130
    pieces = tmp_path / "run" / "stages" / f"{where}.partial" / "pieces"
    kept = {path.stem for path in pieces.iterdir()}
    assert kept
    again = []
    get = Pieces.get

    def counted(self, name, compute):
        def computing():
            again.append((self.folder, name))
            return compute()

        return get(self, name, computing)

    monkeypatch.setattr(Pieces, "get", counted)
    assert where in computed(run("run", original.suite, "--out", tmp_path / "run"))
    here = {name for folder, name in again if folder == pieces}
    assert here
    assert not here & kept
    assert csv_bytes(tmp_path / "run") == csv_bytes(original.folder)
    assert not list((tmp_path / "run").rglob("pieces"))


def loads(monkeypatch) -> list[str]:
    """The sources that are loaded from here on; fails where one is loaded while the one before is still held."""
    loading, loaded, held = pretrained.load_model, [], []

    def load(source, **options):
        assert not any(model() is not None for model in held), f"{loaded} still held when {source} is loaded"
        model = loading(source, **options)
        held.append(weakref.ref(model))
        loaded.append(Path(source).name)
        return model

    monkeypatch.setattr(run_stages, "load_model", load)
    return loaded


def test_two_models_are_never_held_at_once(original, tmp_path, monkeypatch):
    loaded = loads(monkeypatch)
    gc.collect()
    gc.disable()  # a model that only the collector frees is held for as long as it does not come by
    try:
        result = run("run", original.suite, "--out", tmp_path / "run")
    finally:
        gc.enable()
    assert result.exit_code == 0, (result.output, result.exception)
    assert loaded == ["neox", "gpt2"]


def test_a_second_view_and_a_second_seed_load_nothing_more(original, tmp_path, monkeypatch):
    loaded = loads(monkeypatch)
    view = {"view_of": "neox", "view": "prediction"}
    source = f"path:{original.root / 'neox'}"
    suite = write_suite(tmp_path / "suite.toml", original.texts, neox={"source": source}, again=view)
    suite.write_text(suite.read_text().replace("question", "seeds = [0, 1]\nquestion", 1))
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    assert loaded == ["neox"]
    # Norm and head of GPT-NeoX see the whole stream: the second view is the first.
    transfer = table(tmp_path / "run", "transfer.csv").drop(columns="seed").set_index("model")
    pd.testing.assert_frame_equal(
        transfer.loc["neox"].reset_index(drop=True), transfer.loc["again"].reset_index(drop=True)
    )
    assert set(table(tmp_path / "run", "baselines.csv")["tokenizer"]) == {"neox"}


# Models of the hub


@pytest.fixture
def cached(original, tmp_path, monkeypatch):
    """A cache of the hub, offline, with two commits of one model; call it to say which of them is the branch's."""
    cache = tmp_path / "hub" / "models--org--tiny"
    for commit, scale in (("a" * 40, 1.0), ("b" * 40, 0.5)):
        snapshot = cache / "snapshots" / commit
        shutil.copytree(original.root / "neox", snapshot)
        weights = load_file(snapshot / "model.safetensors")
        weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"].mul_(scale)
        save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    (cache / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def point(letter: str) -> None:
        (cache / "refs" / "main").write_text(letter * 40)

    return point


REVISIONS = """
[[models]]
name = "tiny"
source = "{source}"
revisions = [{revisions}]
{tokens}
"""


def revisions_of(path: Path, texts: Path, source: str, names: str, tokens: str = "") -> Path:
    write_suite(path, texts)
    path.write_text(path.read_text() + REVISIONS.format(source=source, revisions=names, tokens=tokens))
    return path


def tokens_in(folder: Path) -> dict[str, int]:
    return table(folder, "models.csv").set_index("model")["train_tokens"].to_dict()


def test_revisions_on_the_hub_are_models_with_their_tokens_and_finished_ones_stay(original, cached, tmp_path):
    cached("a")
    for name, letter in (("step1", "a"), ("step2", "b")):
        (tmp_path / "hub" / "models--org--tiny" / "refs" / name).write_text(letter * 40)
    one = revisions_of(tmp_path / "suite.toml", original.texts, "hub:org/tiny", '"step1"', "train_tokens = [5]")
    assert "fit-tiny@step1-seed0" in computed(run("run", one, "--out", tmp_path / "run"))
    names, tokens = '"step1", "step2"', "train_tokens = [5, 9]"
    both = revisions_of(tmp_path / "suite.toml", original.texts, "hub:org/tiny", names, tokens)
    new = computed(run("run", both, "--out", tmp_path / "run"))
    assert "fit-tiny@step2-seed0" in new
    assert not {name for name in new if "@step1" in name}
    assert tokens_in(tmp_path / "run") == {"tiny@step1": 5, "tiny@step2": 9}
    sources = json.loads((tmp_path / "run" / "manifest.json").read_text())["sources"]
    assert {name: held["commit"] for name, held in sources.items()} == {"tiny@step1": "a" * 40, "tiny@step2": "b" * 40}


def test_revisions_in_a_folder_have_the_tokens_that_their_configs_say(original, tmp_path):
    for name, tokens in (("step1", 1_000), ("step2", None)):
        shutil.copytree(original.root / "neox", tmp_path / "all" / name)
        config = json.loads((tmp_path / "all" / name / "config.json").read_text())
        said = {} if tokens is None else {"train_tokens": tokens}
        (tmp_path / "all" / name / "config.json").write_text(json.dumps({**config, **said}))
    suite = revisions_of(tmp_path / "suite.toml", original.texts, f"path:{tmp_path / 'all'}", '"step1", "step2"')
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    found = tokens_in(tmp_path / "run")
    assert found["tiny@step1"] == 1_000
    assert np.isnan(found["tiny@step2"])


def test_a_model_of_the_hub_is_known_by_its_commit(original, cached, tmp_path):
    suite = write_suite(tmp_path / "suite.toml", original.texts, neox={"source": "hub:org/tiny"})
    cached("a")
    assert "fit-neox-seed0" in computed(run("run", suite, "--out", tmp_path / "run"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["sources"] == {
        "neox": {"source": "hub:org/tiny", "hub": "org/tiny", "revision": "main", "commit": "a" * 40}
    }
    config = json.loads((tmp_path / "run" / "stages" / "fit-neox-seed0" / "tuned" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    first, local = (
        table(tmp_path / "run", "models.csv").iloc[0],
        table(original.folder, "models.csv").set_index("model"),
    )
    assert first["source"] == "hub:org/tiny"
    assert first["ce"] == local.loc["neox", "ce"]
    assert computed(run("run", suite, "--out", tmp_path / "run")) == set()

    cached("b")
    refused(run("run", suite, "--out", tmp_path / "run"), "model 'neox', of which commit is another one now")
    (tmp_path / "run" / "manifest.json").unlink()
    assert {"fit-neox-seed0", "score-neox-seed0"} <= computed(run("run", suite, "--out", tmp_path / "run"))
    assert table(tmp_path / "run", "models.csv").iloc[0]["ce"] != first["ce"]


def test_a_revision_of_the_hub_stays_what_it_is(original, cached, tmp_path):
    cached("b")
    sources = {"pinned": {"source": f"hub:org/tiny@{'a' * 40}"}, "branch": {"source": "hub:org/tiny"}}
    suite = write_suite(tmp_path / "suite.toml", original.texts, **sources)
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    ce = table(tmp_path / "run", "models.csv").set_index("model")["ce"]
    assert ce["pinned"] == table(original.folder, "models.csv").set_index("model").loc["neox", "ce"] != ce["branch"]


def test_refits_at_fewer_positions_move_nothing_but_their_own_range(made):
    before = {name: table(made.folder, name) for name in ("indices.csv", "transfer.csv", "lenses.csv", "pairs.csv")}
    text = made.suite.read_text()
    made.suite.write_text(text.replace("refit_positions = 4\n", ""))
    done = computed(run("run", made.suite, "--out", made.folder))
    assert {"score-neox-seed0", "score-gpt2-seed0"} <= done
    assert not any(name.startswith("fit-") for name in done)
    for name, old in before.items():
        new = table(made.folder, name)
        spread = [column for column in ("fit_low", "fit_high") if column in old]
        pd.testing.assert_frame_equal(new.drop(columns=spread), old.drop(columns=spread))
        if name == "indices.csv":
            assert not new[spread].equals(old[spread])
    # All of 8 positions is what is left out.
    all_of_them = csv_bytes(made.folder)
    made.suite.write_text(text.replace("refit_positions = 4", "refit_positions = 8"))
    assert run("run", made.suite, "--out", made.folder).exit_code == 0
    assert csv_bytes(made.folder) == all_of_them


# A text that is larger than what is read of it

LIMIT = 200_000


@pytest.mark.parametrize(
    "kind",
    [
        "txt",
        "jsonl",
        "folder",
    ],
)
def test_no_more_of_a_text_is_held_than_max_bytes(tmp_path, kind):
    """100 times the limit on disk, read with memory for a few times the limit."""
    line = "the quick brown fox jumps over the lazy dog\n" * 50
    count = 100 * LIMIT // len(line)
    path = tmp_path / f"text.{kind}"
    if kind == "folder":
        for number in range(100):
            (tmp_path / "text.folder" / f"{number:03d}.txt").parent.mkdir(exist_ok=True)
            (tmp_path / "text.folder" / f"{number:03d}.txt").write_text(line * (count // 100))
    else:
        path.write_text((line if kind == "txt" else json.dumps({"text": line}) + "\n") * count)
    tracemalloc.start()
    try:
        read = reading.read_documents(f"file:{path}", max_bytes=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(d.text) for d in read) == LIMIT
    assert peak < 10 * LIMIT


def test_a_suite_reads_no_more_than_its_max_bytes(original, tmp_path):
    suite = write_suite(tmp_path / "suite.toml", original.texts, gpt2={"source": f"path:{original.root / 'gpt2'}"})
    limit = sum(p.stat().st_size for p in original.texts.iterdir()) // 2
    suite.write_text(suite.read_text().replace("[fit]", f"max_bytes = {limit}\n\n[fit]"))
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    manifest, whole = (json.loads((f / "manifest.json").read_text()) for f in (tmp_path / "run", original.folder))
    documents, of = (sum(m["corpus"]["documents"].values()) for m in (manifest, whole))
    assert of == 120
    assert 55 <= documents <= 65


# Bad input: one line, exit code 2, and whatever was finished stays


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def heard():
    """What transformers says on stderr by its own logger, which CliRunner does not see."""
    handler, logger = Heard(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def refused(result, *expected: str) -> None:
    """Exit code 2, and one line on stderr beside those of steps that went well, and of what begins a model's text."""
    assert result.exit_code == 2, result.output
    usual = (
        "goes on in ",
        ": done in",
        ": reused",
        "> begins ",
        "pairs of layers pass the gates",
        "of what later layers add",
    )
    lines = [line for line in result.stderr.splitlines() if line and not any(part in line for part in usual)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("lensbench: "), result.stderr
    assert not result.stdout.strip()
    for part in expected:
        assert part in lines[0], lines[0]


def nan(weights):
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][3] = torch.nan


def with_foreign_word(made: Made) -> None:
    """Behind a tokenizer that fits, a beginning-of-text id that the model has no row for."""
    tokenizer = byte_tokenizer(made.texts, 300)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.save_pretrained(made.root / "neox")


def longer(made: Made) -> None:
    made.suite.write_text(made.suite.read_text().replace("length = 32", "length = 65"))


# what is wrong -> (how it came about, what the line must speak of)
DAMAGE = {
    "no weights": (lambda made: (made.root / "neox" / "model.safetensors").unlink(), ("/neox", "model.safetensors")),
    "weights lack one": (
        lambda made: made.change_weights(lambda weights: weights.pop("gpt_neox.final_layer_norm.bias")),
        ("/neox", "final_layer_norm.bias"),
    ),
    "NaN": (lambda made: made.change_weights(nan), ("layers.1.mlp.dense_h_to_4h.bias", "NaN")),
    "no tokenizer": (lambda made: (made.root / "neox" / "tokenizer.json").unlink(), ("/neox", "tokenizer")),
    "tokenizer of a larger model": (
        lambda made: byte_tokenizer(made.texts, 310).save_pretrained(made.root / "neox"),
        ("/neox", "309", "300"),
    ),
    "begins texts with a foreign word": (with_foreign_word, ("neox", "token 300", "300 entries")),
    "longer than the context": (longer, ("neox", "65", "context of 64", "evaluate.length")),
}


@pytest.mark.parametrize(
    "name",
    DAMAGE,
)
def test_a_damaged_source_is_refused_and_mended_goes_on(original, made, heard, name):
    damage, expected = DAMAGE[name]
    (made.folder / "manifest.json").unlink()  # of a finished run any change of the files is refused
    before = csv_bytes(made.folder)
    damage(made)
    refused(run("run", made.suite, "--out", made.folder), *expected)
    assert not heard
    assert csv_bytes(made.folder) == before
    shutil.rmtree(made.root / "neox")
    shutil.copytree(original.root / "neox", made.root / "neox")
    made.write()
    assert computed(run("run", made.suite, "--out", made.folder)) == set()
    assert csv_bytes(made.folder) == before


def of_another_model(made: Made) -> TunedLens:
    return TunedLens.from_model(small_model("gpt_neox", seed=5, vocab_size=300))


def of_fewer_layers(made: Made) -> TunedLens:
    model = AutoModelForCausalLM.from_pretrained(made.root / "neox")
    model.config.num_hidden_layers -= 1
    return TunedLens.from_model(model)


def of_another_width(made: Made) -> TunedLens:
    lens = TunedLens.from_model(small_model("gpt_neox", vocab_size=300, hidden_size=16))
    lens.config.unembed_hash = None  # as lenses have it that were saved before there were hashes
    return lens


def of_this_model(made: Made) -> TunedLens:
    return TunedLens.from_model(AutoModelForCausalLM.from_pretrained(made.root / "neox"))


def cut(folder: Path) -> None:
    (folder / "params.pt").write_bytes((folder / "params.pt").read_bytes()[:-500])


def without_weights(folder: Path) -> None:
    (folder / "params.pt").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")


LENSES = {
    "another model": (of_another_model, None, ("another model", "hash")),
    "fewer layers": (of_fewer_layers, None, ("2 layers of width 32", "3 of 32")),
    "another width": (of_another_width, None, ("another model", "width is 16")),
    "damaged weights": (of_this_model, cut, ("(params.pt) are damaged", "save the lens again")),
    "no weights": (of_this_model, without_weights, ("params.pt",)),
    "damaged config": (of_this_model, no_config, ("cannot be loaded",)),
}


@pytest.mark.parametrize("name", list(LENSES))
def test_a_lens_that_does_not_fit_is_refused(made, heard, name):
    make, damage, expected = LENSES[name]
    make(made).save(made.root / "lens")
    if damage is not None:
        damage(made.root / "lens")
    before = csv_bytes(made.folder)
    made.write(lens=f"path:{made.root / 'lens'}")
    refused(run("run", made.suite, "--out", made.folder), f"path:{made.root / 'lens'}", *expected)
    assert not heard
    assert csv_bytes(made.folder) == before
    made.write()
    assert computed(run("run", made.suite, "--out", made.folder)) == set()


SOURCE = 'source = "path:{root}/neox"'
SUITES = {
    "family beside source": (SOURCE, SOURCE + '\nfamily = "gpt"', "models.0: model 'neox' is pretrained"),
    "training beside source": (SOURCE, SOURCE + "\ntraining = {{ learning_rate = 1 }}", "cannot set training"),
    "dtype without source": (SOURCE, 'dtype = "bfloat16"', "sets dtype, which is for pretrained models"),
    "device map without source": (SOURCE, 'device_map = "auto"', "sets device_map, which is for pretrained models"),
    "unknown dtype": (SOURCE, SOURCE + '\ndtype = "int3"', "models.neox.dtype"),
    "two places": (SOURCE, SOURCE + '\ndevice = "cpu"\ndevice_map = "auto"', "device and device_map"),
    "unknown kind": ('"path:{root}/neox"', '"pth:{root}/neox"', "path:FOLDER"),
    "no kind": ('"path:{root}/neox"', '"{root}/neox"', "did you mean path:{root}/neox?"),
    "view of nothing": (SOURCE, 'view_of = "rnn"', "is a view of 'rnn', which no model of the suite is"),
    "positions beyond the length": ("length = 32", "length = 9", "no more than 7 positions"),
    "no positions of refits": ("refit_positions = 4", "refit_positions = 0", "evaluate.refit_positions"),
}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_that_contradicts_itself_is_refused_before_anything_starts(original, tmp_path, name):
    old, new, expected = (part.format(root=original.root) for part in SUITES[name])
    content = original.suite.read_text()
    assert old in content
    (tmp_path / "mine.toml").write_text(content.replace(old, new, 1))
    refused(run("run", tmp_path / "mine.toml", "--out", tmp_path / "run"), "mine.toml: ", expected)
    assert not (tmp_path / "run").exists()


def test_a_device_or_a_map_that_is_not_there_is_named(made):
    for keys in ({"device": "cuda:9"}, {"device_map": "nonsense"}):
        made.write(**keys)
        refused(run("run", made.suite, "--out", made.root / "other"), *keys.values())
        assert not list((made.root / "other").rglob("stage.json"))


def test_a_sweep_has_nothing_to_try_for_a_pretrained_model(original, tmp_path):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'name = "s"\nquestion = "?"\nsuite = "{original.suite}"\ntokens = 1000\n[[trials]]\nmodel = "neox"\n'
    )
    refused(run("sweep", sweep, "--out", tmp_path / "run"), "'neox'", "pretrained")


def test_only_does_not_need_the_files_of_other_models(original, tmp_path):
    models = {"gone": {"source": f"path:{tmp_path / 'gone'}"}, "neox": {"source": f"path:{original.root / 'neox'}"}}
    suite = write_suite(tmp_path / "suite.toml", original.texts, **models)
    result = run("run", suite, "--out", tmp_path / "run", "--only", "neox")
    assert result.exit_code == 0, result.output
    assert set(table(tmp_path / "run", "models.csv")["model"]) == {"neox"}
    refused(run("run", suite, "--out", tmp_path / "run"), "no config.json")


def test_a_pretrained_model_is_the_same_at_all_seeds_and_run_once(original, tmp_path):
    """With a row per seed, "all" would have an interval of no width."""
    suite = write_suite(tmp_path / "suite.toml", original.texts, neox={"source": f"path:{original.root / 'neox'}"})
    suite.write_text("seeds = [0, 1]\n" + suite.read_text())
    assert run("run", suite, "--out", tmp_path / "run").exit_code == 0
    assert set(table(tmp_path / "run", "indices.csv")["seed"]) == {0}


def test_other_models_and_texts_get_folders_of_their_own(original, tmp_path, monkeypatch):
    """The run of one model must not replace that of another."""
    monkeypatch.chdir(tmp_path)
    suite = write_suite(tmp_path / "suite.toml", original.texts, neox={"source": f"path:{original.root / 'neox'}"})
    model, text = f"path:{original.root / 'gpt2'}", f"file:{original.texts}"
    assert run("run", suite, "--model", model, "--corpus", text).exit_code == 0
    assert (tmp_path / "runs" / "pretrained-gpt2-texts" / "manifest.json").is_file()
    assert not (tmp_path / "runs" / "pretrained").exists()


def test_a_model_of_a_run_that_was_trained_on_this_text_is_told(tiny_run, tiny_suite, tmp_path):
    """Split another way, some of what it is scored on it was trained on."""
    texts = Path(tomllib.loads(Path(tiny_suite).read_text())["corpus"]["spec"].removeprefix("file:"))
    source = f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}"
    suite = write_suite(tmp_path / "suite.toml", texts, it={"source": source})
    silent = run("run", suite, "--out", tmp_path / "run")
    assert silent.exit_code == 0, "the split is that of its training"
    assert "it was trained on" not in silent.stderr, "the split is that of its training"
    suite.write_text(suite.read_text().replace("[fit]", "seed = 1\n\n[fit]"))
    told = run("run", suite, "--out", tmp_path / "run")
    assert told.exit_code == 0
    assert "it was trained on" in told.stderr


def test_a_run_says_where_frequencies_depend_on_the_length(original, tmp_path):
    """LongRoPE reads windows beyond the model's original context, and their padding, with other frequencies."""
    rope = {"rope_theta": 10000.0, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    folder = save_model(
        tmp_path / "phi", "phi3", original.texts, 300, rope_parameters=rope, original_max_position_embeddings=16
    )
    result = run(
        "run",
        write_suite(tmp_path / "suite.toml", original.texts, phi={"source": f"path:{folder}"}),
        "--out",
        tmp_path / "run",
    )
    assert result.exit_code == 0, result.output
    said = "model phi: beyond 16 tokens its rotary frequencies depend on the length; all windows"
    assert result.stderr.count(said) == 1
