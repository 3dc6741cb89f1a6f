"""A dry run refuses a text that is too short as the run does: with the same line, before anything is trained."""

import json
import random
from pathlib import Path

import pytest
from helpers.commands import refused, run
from helpers.pretrained import byte_tokenizer
from transformers import LlamaConfig

from lensbench.data.inputs import Texts
from lensbench.run import forecast, short_text
from lensbench.run.speeds import Speed
from lensbench.runtime.rates import Rates

SUITE = """
name = "short"
question = "Is the text long enough?"

[corpus]
spec = "file:{texts}"
vocab_size = 300

[training]
tokens = 128
length = 64
batch = 1

[fit]
sequences = 8
dev_sequences = 8

[evaluate]
sequences = 8
positions = 8
length = 64

[[models]]
name = "gpt"
family = "gpt"
d_model = 8
layers = 2
heads = 2
parameters = 4_000
"""


def words(count, seed):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(count))


def documents(*lengths):
    """Documents of so many words, as lines of JSON."""
    return "".join(json.dumps({"text": words(count, k)}) + "\n" for k, count in enumerate(lengths))


TOO_SHORT = {
    "few.txt": ("few words", "few.txt is too short: 9 bytes in 1 document(s)"),
    "alike.jsonl": (documents(*[3] * 30), "is too short for vocab_size 300"),
    # The long documents go to the train split, and no other has a window.
    "one.jsonl": (documents(4000, *[4] * 40), "no windows: one needs 32 tokens"),
}


@pytest.fixture
def suite(tmp_path) -> Path:
    path = tmp_path / "short.toml"
    path.write_text(SUITE.format(texts=tmp_path / "texts.jsonl"))
    return path


def told(result):
    refused(result)
    return next(line for line in result.output.splitlines() if line.startswith("lensbench: "))


@pytest.mark.parametrize("name", TOO_SHORT)
def test_a_dry_run_and_the_run_refuse_a_short_text_with_one_line(name, suite, tmp_path):
    content, reason = TOO_SHORT[name]
    (tmp_path / name).write_text(content)
    command = ["run", suite, "--corpus", f"file:{tmp_path / name}", "--device", "cpu", "--out", tmp_path / "run"]
    dry = told(run(*command, "--dry-run"))
    assert reason in dry
    assert not (tmp_path / "run").exists()
    assert told(run(*command)) == dry


def test_a_training_that_has_not_one_sequence_is_refused_with_one_line(suite, tmp_path):
    (tmp_path / "texts.jsonl").write_text(documents(*[40] * 24))
    long = ["--set", "training.length=4096", "--set", "training.tokens=4096"]
    command = ["run", suite, *long, "--out", tmp_path / "run"]
    dry = told(run(*command, "--dry-run"))
    assert "fewer than one sequence of 4096" in dry
    assert told(run(*command)) == dry


def test_strict_is_refused_by_a_dry_run_too(suite, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text(words(4000, 0))
    (folder / "b.bin").write_bytes(bytes(256))
    command = ["run", suite, "--corpus", f"file:{folder}", "--strict", "--out", tmp_path / "run"]
    assert told(run(*command, "--dry-run")) == told(run(*command))


@pytest.fixture
def known_rates(monkeypatch):
    rates = Rates(model=1e11, single=1e11, double=5e10, eigen=4e9, words=1e9, copied=1e10)
    monkeypatch.setattr(forecast, "measured_rates", lambda *_: rates)
    monkeypatch.setattr(forecast, "measured_speed", lambda *_: Speed(sequences=1000, steps=10))


@pytest.mark.usefixtures("known_rates")
def test_a_text_that_is_long_enough_passes_and_only_its_longest_documents_are_tokenised(suite, tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text(documents(*[200] * 60))
    counted = []
    monkeypatch.setattr(
        Texts, "documents", lambda self, split, whole=Texts.documents: counted.append(self) or whole(self, split)
    )
    result = run("run", suite, "--device", "cpu", "--dry-run", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Not checked" not in result.output
    assert {len(texts.corpus.splits["fit"]) for texts in counted} == {1}


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A folder of a model with a tokenizer and no weights."""
    (tmp_path / "for-tokenizer.txt").write_text(words(4000, 0))
    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    ).save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path, 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.usefixtures("known_rates")
def test_a_pretrained_model_reads_the_text_with_its_own_tokenizer_and_without_weights(pretrained, tmp_path):
    def dry(*lengths):
        (tmp_path / "texts.jsonl").write_text(documents(*lengths))
        return run(
            "run", "pretrained", "--model", f"path:{pretrained}", "--corpus", f"file:{tmp_path / 'texts.jsonl'}",
            "--device", "cpu", "--dry-run", "--out", tmp_path / "run",
        )  # fmt: skip

    refused(dry(*[4] * 40), "no windows: one needs 32 tokens, and the longest of")
    passes = dry(*[200] * 60)
    assert passes.exit_code == 0, passes.output
    assert "Not checked" not in passes.output
    (pretrained / "tokenizer.json").unlink()
    (pretrained / "tokenizer_config.json").unlink()
    unknown = dry(*[200] * 60)
    assert unknown.exit_code == 0, unknown.output
    assert "Not checked: whether the text is long enough for model" in " ".join(unknown.output.split())


@pytest.mark.usefixtures("known_rates")
def test_a_text_of_the_hub_is_not_downloaded_and_the_dry_run_says_so(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("lensbench.run.suite.refuse_unreachable", lambda *_: None)
    monkeypatch.setattr(short_text, "corpus_of", lambda *_: pytest.fail("the text was read"))
    result = run("run", suite, "--corpus", "hf:an/example", "--device", "cpu", "--dry-run", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Not checked: whether the text is long enough. hf:an/example would have to be downloaded." in " ".join(
        result.output.split()
    )
