"""What a user can mend is refused before anything is measured, and nothing is read twice for it."""

from types import SimpleNamespace

import pytest
from helpers.commands import refused, run
from helpers.pretrained import byte_tokenizer
from transformers import LlamaConfig

from lensbench.errors import LensbenchError
from lensbench.run import inputs, suite, updating
from lensbench.run.context import Cache
from lensbench.runtime.progress import QUIET
from lensbench.suite.files import load_suite


def test_a_lens_of_another_model_is_refused_before_states_are_captured(monkeypatch):
    def refuse(source, stream):
        raise LensbenchError(f"{source}: the lens was fitted to another model")

    monkeypatch.setattr(updating, "stream_of", lambda *_: None)
    monkeypatch.setattr(updating, "loaded_lens", refuse)
    monkeypatch.setattr(updating, "captured_states", lambda *_, **__: pytest.fail("states were captured"))
    context = SimpleNamespace(suite=SimpleNamespace(fit=None))
    model = SimpleNamespace(name="gpt", view="state", lens="path:other")
    with pytest.raises(LensbenchError, match="path:other: the lens was fitted to another model"):
        updating.decomposed(context, model, 0, None, None, None)


def test_strict_reads_the_text_once_and_refuses_before_a_folder_is_made(tmp_path, monkeypatch):
    reads = []

    def load(spec, **settings):
        reads.append(settings["strict"])
        if spec.endswith("mixed"):
            raise LensbenchError("1 file(s) of other kinds")
        return "the text"

    monkeypatch.setattr(inputs, "load_corpus", load)
    quick = load_suite("quick")
    mixed = quick.model_copy(update={"corpus": quick.corpus.model_copy(update={"spec": "file:mixed"})})
    with pytest.raises(LensbenchError, match="of other kinds"):
        suite.run_suite(mixed, tmp_path / "run", device=None, strict=True)
    assert not (tmp_path / "run").exists()
    assert reads == [True]

    kept = Cache()
    kept.corpus = inputs.read_corpus(quick, QUIET, strict=True)
    assert inputs.corpus_of(SimpleNamespace(cache=kept, suite=quick, progress=QUIET)) == "the text"
    assert reads == [True, True]


WORDS = ["alpha beta", "gamma delta", "epsilon zeta", "eta theta", "iota kappa", "lambda mu", "nu xi", "omicron pi"]


@pytest.mark.parametrize(
    ("name", "content", "options", "told"),
    [
        ("empty.txt", "", [], "empty.txt is empty"),
        ("few.txt", "a few words", [], "few.txt is too short: 11 bytes"),
        ("many.jsonl", "".join(f'{{"text": "{a} {b}"}}\n' for a in WORDS for b in WORDS), [], "one needs 32 tokens"),
        ("long.txt", "x", ["--length", "256"], "256 tokens are beyond its context of 128; set --length to 128 or less"),
        ("lens.txt", "x", ["nowhere.pt"], "there is no file nowhere.pt"),
        ("folder.txt", "x", ["nowhere"], "no config.json and params.pt in nowhere"),
    ],
)
def test_lenses_are_not_compared_on_a_text_that_is_too_short_and_no_model_is_loaded(
    tmp_path, monkeypatch, name, content, options, told
):
    monkeypatch.setattr("lensbench.models.pretrained.load_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / name).write_text(content)
    LlamaConfig(vocab_size=257, hidden_size=32, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path, 257).save_pretrained(tmp_path / "model")
    model, out = f"path:{tmp_path / 'model'}", tmp_path / "out"
    refused(run("compare-lenses", model, *options, "--corpus", f"file:{tmp_path / name}", "--out", out), told)
    assert not out.exists()
