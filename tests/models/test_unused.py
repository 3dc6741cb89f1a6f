"""What lies in a checkpoint and is not used is refused, or said."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import load_model


def llama(folder: Path, **changes) -> Path:
    """A model of three blocks."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=3, **changes)).save_pretrained(folder)
    return folder


def gpt2(folder: Path, *, prefix=True) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16)).save_pretrained(folder)
    if not prefix:
        rewrite(folder, lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items()})
    return folder


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def lines_of(folder: Path) -> list[str]:
    """What the user is told when the model is loaded."""
    told = []
    load_model(f"path:{folder}", say=told.append)
    return told


@pytest.mark.parametrize(
    ("make", "key", "first"),
    [
        (llama, "num_hidden_layers", "model.layers.2.input_layernorm.weight and 8 more"),
        (gpt2, "n_layer", "transformer.h.2.attn"),
        (lambda folder: gpt2(folder, prefix=False), "n_layer", "h.2.attn"),
    ],
)
def test_a_checkpoint_of_more_layers_than_its_config_is_refused(tmp_path, make, key, first):
    folder = make(tmp_path / "m")
    configure(folder, **{key: 2})
    with pytest.raises(LensbenchError, match=first):
        load_model(f"path:{folder}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.router.experts.0.weight",
        "model.norm.bias",
        "model.embed_positions.weight",
        "lm_head.bias",
    ],
)
def test_a_weight_inside_the_model_that_it_does_not_take_is_refused(tmp_path, name):
    folder = llama(tmp_path / "m")
    rewrite(folder, lambda weights: {**weights, name: torch.ones(16)})
    with pytest.raises(LensbenchError, match=f"holds the weight {name}, which its config has no place for"):
        load_model(f"path:{folder}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.attention.bias",
        "model.embeddings.position_ids",
    ],
)
def test_buffers_that_older_versions_saved_pass(tmp_path, name):
    folder = llama(tmp_path / "m")
    rewrite(folder, lambda weights: {**weights, name: torch.ones(4)})
    assert lines_of(folder) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vision_tower.encoder.layers.0.weight", "vision_tower.encoder.layers"),
        ("mtp.layers.0.weight", "mtp.layers"),
        ("score.weight", "score"),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1"),
    ],
)
def test_weights_of_other_parts_are_named_in_one_line(tmp_path, name, kind):
    folder = llama(tmp_path / "m")
    rewrite(folder, lambda weights: {**weights, name: torch.ones(4)})
    (line,) = lines_of(folder)
    assert "1 weights are not read" in line
    assert line.endswith(f": {kind}")


def test_layers_that_predict_later_tokens_are_named(tmp_path):
    folder = llama(tmp_path / "m")
    configure(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    (line,) = lines_of(folder)
    assert "9 weights are not read" in line
    assert "model.layers" in line


def test_a_head_of_its_own_in_the_file_is_the_one_that_is_read(tmp_path):
    folder = llama(tmp_path / "m")
    configure(folder, tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    model = load_model(f"path:{folder}")
    assert torch.equal(model.get_output_embeddings().weight, stored["lm_head.weight"])
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    folder = llama(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LensbenchError, match=r"holds an adapter.*merge"):
        load_model(f"path:{folder}")


def test_other_files_of_weights_are_named_and_those_of_a_trainer_are_not(tmp_path):
    folder = llama(tmp_path / "m")
    for name in ("pytorch_model.bin", "model-q4.gguf", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(b"")
    assert [line.partition(": ")[2] for line in lines_of(folder)] == [
        f"{folder}: model-q4.gguf and 1 more beside the weights: not read".partition(": ")[2]
    ]


def test_an_index_that_names_a_file_that_is_not_there_is_refused(tmp_path):
    folder = llama(tmp_path / "m")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {n: f"model-0000{1 + (n == names[0])}-of-00002.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(LensbenchError, match="model-00002-of-00002"):
        load_model(f"path:{folder}")


def test_code_of_its_own_and_a_quantization_that_is_not_applied_are_named(tmp_path):
    folder = llama(tmp_path / "m")
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, quantization_config={"quant_method": "odd"})
    code, quantization = lines_of(folder)
    assert "its own code (auto_map in config.json) is not run: it is read as LlamaForCausalLM" in code
    assert "its quantization (odd) is not applied" in quantization


def test_a_whole_checkpoint_says_nothing_and_python_users_are_warned(tmp_path):
    folder = llama(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(f"path:{folder}")
    rewrite(folder, lambda weights: {**weights, "score.weight": torch.ones(4)})
    with pytest.warns(UserWarning, match="1 weights are not read"):
        load_model(f"path:{folder}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_theta": 77.0}, "rope_theta 77.0 in config.json is not read"),
        ({"attn_logit_softcapping": 5.0}, "attn_logit_softcapping in config.json is not a setting of LlamaForCausalLM"),
        (
            {"model_type": "mistral"},
            "config.json names LlamaForCausalLM and its model_type is read as MistralForCausalLM",
        ),
    ],
)
def test_settings_that_the_model_does_not_follow_are_named(tmp_path, changes, says):
    folder = llama(tmp_path / "m")
    configure(folder, **changes)
    (line,) = lines_of(folder)
    assert says in line


def test_a_quantization_that_lies_in_a_file_of_its_own_is_named(tmp_path):
    folder = llama(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json is not read" in lines_of(folder)[0]


def test_weights_of_whole_numbers_without_a_scale_are_refused(tmp_path):
    folder = llama(tmp_path / "m")
    rewrite(folder, lambda weights: {k: v.mul(99).to(torch.int8) if "proj" in k else v for k, v in weights.items()})
    with pytest.raises(LensbenchError, match=r"stored as whole numbers \(I8\)"):
        load_model(f"path:{folder}")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "holds a list"),
        ("{}", "its weight_map must name"),
        ('{"weight_map": {"a": 1}}', "its weight_map must name"),
        ('{"weight_map": {"a": "x.safetensors"}}', "names x.safetensors, which is not there"),
        ('{"weight_map": {}}', "it has no metadata"),
    ],
)
def test_a_damaged_index_of_weights_is_one_line_that_names_it(tmp_path, index, says):
    folder = llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LensbenchError) as error:
        load_model(f"path:{folder}")
    assert "model.safetensors.index.json" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository ``org/name`` on the hub, with a copy here; returns the copy and the names of its files there."""
    folder, names = llama(tmp_path / "m"), []
    original = LlamaForCausalLM.from_pretrained.__func__

    def load(name, **options):
        assert name == "org/name"
        options = {k: v for k, v in options.items() if k not in ("trust_remote_code", "revision")}
        return original(LlamaForCausalLM, folder, **options)

    def listed(name, *, revision):
        if not names:
            raise ConnectionError("no network")
        return names

    monkeypatch.setattr("huggingface_hub.list_repo_files", listed)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    return folder, names


@pytest.mark.parametrize("online", [True, False])
def test_an_adapter_in_a_repository_of_the_hub_is_refused(hub, online):
    folder, names = hub
    if online:
        names += ["config.json", "adapter_config.json", "adapter_model.safetensors"]
    else:
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LensbenchError, match=r"hub:org/name@v1 holds an adapter.*merge"):
        load_model("hub:org/name@v1")


@pytest.mark.parametrize("online", [True, False])
def test_what_a_repository_of_the_hub_says_and_the_model_does_not_do_is_named(hub, online):
    folder, names = hub
    if online:
        names += ["config.json", "model.safetensors"]
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, attn_logit_softcapping=5.0)
    told = []
    load_model("hub:org/name", say=told.append)
    assert ["auto_map" in told[0], "attn_logit_softcapping" in told[1], len(told)] == [True, True, 2]


# GGUF


def smaller(path: Path, *, blocks=3, extra: str | None = None) -> Path:
    """A GGUF file of two blocks whose metadata say ``blocks``."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", blocks), ("embedding_length", 16), ("feed_forward_length", 24), ("attention.head_count", 2),
        ("attention.head_count_kv", 2), ("context_length", 32), ("vocab_size", 40),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (40, 16), "output.weight": (40, 16), "output_norm.weight": (16,)}
    for block in range(2):
        shapes |= {f"blk.{block}.attn_{part}.weight": (16, 16) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{part}.weight": (24, 16) for part in ("gate", "up")}
        shapes |= {f"blk.{block}.{part}_norm.weight": (16,) for part in ("attn", "ffn")}
        shapes[f"blk.{block}.ffn_down.weight"] = (16, 24)
    for name, shape in {**shapes, **({extra: (8,)} if extra else {})}.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_gguf_file_says_nothing(tmp_path):
    told = []
    model = load_model(f"gguf:{smaller(tmp_path / 'm.gguf', blocks=2)}", say=told.append)
    assert model.config.num_hidden_layers == 2
    assert told == []


def test_a_gguf_file_of_more_blocks_than_its_metadata_say_is_refused(tmp_path):
    with pytest.raises(LensbenchError, match=r"blk\.1\.attn_q\.weight and 8 more.*of 1 blocks"):
        load_model(f"gguf:{smaller(tmp_path / 'm.gguf', blocks=1)}")


def test_a_gguf_file_of_fewer_blocks_than_its_metadata_say_is_refused(tmp_path):
    with pytest.raises(LensbenchError, match=r"lacks the weight model\.layers\.2"):
        load_model(f"gguf:{smaller(tmp_path / 'm.gguf', blocks=3)}")


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "blk.0.attn_q_norm.weight"])
def test_a_tensor_of_a_block_that_the_model_does_not_take_is_refused(tmp_path, name):
    with pytest.raises(LensbenchError, match=f"holds the tensor {name}, "):
        load_model(f"gguf:{smaller(tmp_path / 'm.gguf', blocks=2, extra=name)}")


def test_factors_of_rotary_frequencies_that_are_not_read_are_named(tmp_path):
    told = []
    load_model(f"gguf:{smaller(tmp_path / 'm.gguf', blocks=2, extra='rope_freqs.weight')}", say=told.append)
    (line,) = told
    assert "1 tensors are not read: rope_freqs.weight; without its factors" in line


@pytest.mark.parametrize(("dtype", "said"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")])
def test_weights_of_eight_bits_without_a_scale_are_refused(tmp_path, dtype, said):
    folder, name = llama(tmp_path / "m"), "model.layers.1.self_attn.q_proj.weight"
    rewrite(folder, lambda weights: {**weights, name: weights[name].to(dtype)})
    with pytest.raises(LensbenchError, match=f"{name} is stored as numbers of few bits \\({said}\\)") as error:
        load_model(f"path:{folder}")
    assert len(str(error.value).splitlines()) == 1


def test_a_second_head_under_another_name_is_refused_and_a_head_under_that_name_alone_is_read(tmp_path):
    folder = llama(tmp_path / "m")
    head = torch.randn(40, 16)
    rewrite(folder, lambda weights: {**weights, "model.lm_head.weight": head})
    with pytest.raises(
        LensbenchError, match=r"one weight twice, as lm_head.weight and model.lm_head.weight: take one out"
    ):
        load_model(f"path:{folder}")
    rewrite(folder, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    assert torch.equal(load_model(f"path:{folder}").lm_head.weight, head)


def in_two(folder, **further):
    """The weights in two files, with an index that has ``further`` entries."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for k, some in enumerate((names[:9], names[9:]), 1):
        file = f"model-{k:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places | further}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_an_index_that_names_a_weight_that_lies_in_no_file_is_refused(tmp_path):
    first = "model-00001-of-00002.safetensors"
    whole = in_two(llama(tmp_path / "whole"))
    assert lines_of(whole) == []
    more = in_two(llama(tmp_path / "more"), **{"model.layers.3.mlp.up_proj.weight": first})
    with pytest.raises(LensbenchError, match=r"names the weight model.layers.3.mlp.up_proj.weight, which lies in none"):
        load_model(f"path:{more}")
    (whole / first).write_bytes(b"damaged")
    with pytest.raises(LensbenchError, match=f"{first} is damaged"):
        load_model(f"path:{whole}")
