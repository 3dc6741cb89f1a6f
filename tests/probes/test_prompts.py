r"""Prompts ``query:label\n`` are texts of whole words, for tokenizers of every kind, and begin as the model's texts do."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.planted import planted, subject_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from lensbench.data import sample_windows, tokenize
from lensbench.data.corpus import Corpus
from lensbench.data.reading import Document
from lensbench.data.tokens import backend_of, beginning, train_tokenizer
from lensbench.models.pretrained import load_tokenizer
from lensbench.probes.few_shot import measure, predicted_elsewhere
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.prompts import EXAMPLES, LABELS, Form, draw_prompts, prompts_of, unlike_text, whole_words
from lensbench.streams.stream import ResidualStream

WORDS = ["the", "was", "his", "open", "by", "under", "they", "said", "with", "house", "some", "until", "new", "where"]
LONGER = ["openly", "opening", "newer", "bytes", "wither", "scientific", "dependent", "d'en", "ic_ly", "naïve"]
FRAGMENTS = ["en", "ic", "ly", "ing", "er", "th", "na", "tes"]
TEXT = "".join(
    f"{a} {b} {c}, {a} {b} {d}.\n"
    for a, b, c, d in zip(WORDS * 40, WORDS[3:] * 60, LONGER * 56, WORDS[5:] * 80, strict=False)
)
LETTERS = [*"abcdefghijklmnopqrstuvwxyzï", ",", ".", "_", "'"]


def byte_level() -> Tokenizer:
    """As suites train them."""
    document = Document("x", "\n".join([TEXT, *WORDS * 400]))
    tokenizer = train_tokenizer(Corpus("x", "", {"train": (document,)}), 336)
    assert tokenizer.encode("a").ids == tokenizer.encode("a", add_special_tokens=False).ids
    return tokenizer


def unigram() -> Tokenizer:
    """As sentencepiece's unigrams: a space before every text, and words with and without one."""
    pieces = [*(f"▁{w}" for w in WORDS), *WORDS, *FRAGMENTS, *(f"▁{f}" for f in FRAGMENTS)]
    vocab = [("<unk>", 0.0), ("</s>", 0.0), (":", -3.0), ("\n", -3.0), ("▁", -4.0)]
    vocab += [(piece, -5.0) for piece in pieces] + [(letter, -9.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def bpe_of_pieces(*, prefix: bool) -> Tokenizer:
    """BPE over whole texts, where a space is part of the word after it, and a line break is a byte."""
    normal: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    words = [w for w in (*WORDS, *FRAGMENTS) for _ in range(20)]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=[*LETTERS, ":", "▁"], show_progress=False)
    trained.train_from_iterator([*words, *(f"▁{w}" for w in words)], trainer)
    state = trained.get_vocab(), [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    names = [*special, *(f"<0x{b:02X}>" for b in range(256)), *sorted(state[0], key=state[0].__getitem__)]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, state[1], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *normal] if prefix else normal)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "unigram": unigram,
    "llama": lambda: bpe_of_pieces(prefix=True),
    "gemma": lambda: bpe_of_pieces(prefix=False),
}


def windows_of(tokenizer, text=TEXT, length=128):
    documents = tokenize(tokenizer, [Document("x", text)])
    return sample_windows(documents, n_sequences=200, length=length, positions=4, seed=0)


def check(tokenizer, windows, allowed):
    """What a prompt must be, by the tokenizer's own decode and encode; gives its form."""
    backend, front = backend_of(tokenizer), list(beginning(tokenizer).ids)
    found = prompts_of(tokenizer, windows, 128)
    assert not isinstance(found, str), found
    form, prompts = found
    ids = form.written(prompts.queries, prompts.labels)
    assert ids.shape[1] <= 128
    assert prompts.queries.shape[1] == min(EXAMPLES, (128 - len(front)) // form.tokens)
    row = np.arange(len(ids))
    for example in range(prompts.queries.shape[1]):
        answers = form.tokens * example + form.answer
        np.testing.assert_array_equal(ids[row, answers + 1], prompts.labels[:, example])
    for prompt in ids[:20].tolist():
        assert prompt[: len(front)] == front
        text = backend.decode(prompt[len(front) :], skip_special_tokens=False)
        lines = text.lstrip(" ").split("\n")
        assert lines[-1] == ""
        assert len(lines) == prompts.queries.shape[1] + 1
        for line in lines[:-1]:
            query, label = line.split(":")
            assert {query, label} <= allowed
        assert backend.encode(text, add_special_tokens=False).ids == prompt[len(front) :]
        assert backend.encode(text.lstrip(" "), add_special_tokens=False).ids == prompt[len(front) :]
    return form


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_the_tokenizer_makes_of_its_text(kind):
    tokenizer = KINDS[kind]()
    form = check(tokenizer, windows_of(tokenizer), set(WORDS))
    # A tokenizer that lensbench trains puts its end-of-text (id 0) before no text; documents begin with it all the same.
    assert list(form.front) == {"byte-level": [0], "unigram": []}.get(kind, [tokenizer.token_to_id("<bos>")])
    assert tokenizer.encode("the").ids[: len(form.front)] == list(form.front) or kind == "byte-level"
    assert bool(form.first) == (kind in ("unigram", "llama"))
    separators = [tokenizer.id_to_token(i) for i in (*form.colon, *form.newline)]
    assert separators == [":", {"byte-level": "Ċ", "unigram": "\n"}.get(kind, "<0x0A>")]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_whole_words_of_the_text_and_the_most_frequent_come_first(kind):
    tokenizer = KINDS[kind]()
    text = "".join(f"{word} " * (60 - k) for k, word in enumerate([*WORDS, "openly", "wither"]))
    windows = windows_of(tokenizer, (text + "new-ish a1 b_c 1the ") * 3, 64)
    found = whole_words(backend_of(tokenizer), windows)
    assert found[:10] == WORDS[:10]
    assert set(found) == {*WORDS, "openly", "wither"}


def test_a_front_moves_no_number_and_is_part_of_every_prompt():
    """The same learner after a front of three tokens, and with other tokens for words at the start."""

    class After:
        device = torch.device("cpu")

        def __init__(self, form):
            self.form, self.seen = form, []

        def at(self, ids, rows, columns):
            front, ids = ids[:, : len(self.form.front)], ids[:, len(self.form.front) :].clone()
            back = {start: token for token, start in self.form.first.items()}
            ids[:, 0] = torch.tensor([back.get(i, i) for i in ids[:, 0].tolist()])
            self.seen.append(front)
            at = columns - len(self.form.front)
            text = torch.nn.functional.one_hot(ids, 200).double()
            weight = torch.arange(1.0, 201).double().sin()
            history = (text * weight).cumsum(1).cumsum(1).sin()
            return None, history[rows, at] * 3

    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(0))
    plain, moved = Form([3], [4]), Form([3], [4], (7, 8, 9), {w: w + 100 for w in range(10, 60)})
    after = After(moved)
    for a, b in zip(measure(After(plain), drawn, plain), measure(after, drawn, moved), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    elsewhere = [predicted_elsewhere(After(form), drawn, form).numpy() for form in (plain, moved)]
    np.testing.assert_array_equal(*elsewhere)
    assert all((front == torch.tensor([7, 8, 9])).all() for front in after.seen)
    assert (moved.written(drawn.queries, drawn.labels)[:, 3] == drawn.queries[:, 0] + 100).all()
    assert (moved.written(drawn.queries, drawn.labels)[:, 3 + 4 :: 4] == drawn.queries[:, 1:]).all()


def reason_of(tokenizer, text=TEXT):
    subject = subject_of(planted("none"), tokenizer=tokenizer, fit_windows=windows_of(tokenizer, text))
    frame = PROBES["few_shot"].measure(subject).frame()
    assert frame["value"].isna().all()
    return frame["reason"][0]


def test_a_tokenizer_that_cannot_write_prompts_says_why():
    few = byte_level()
    assert "has 2 whole words" in reason_of(few, "the was " * 200)
    assert "has 0 whole words" in reason_of(few, "1 2 3 " * 200)
    lines = unigram()
    lines.normalizer = normalizers.Replace(Regex(r"\s"), " ")  # as T5: a line break is a space
    assert "cannot write `query:label` and a line break: 'some:some\\nsome:some\\n' becomes" in reason_of(lines)


def test_prompts_that_their_text_does_not_give_back_are_named():
    tokenizer = bpe_of_pieces(prefix=False)
    found = prompts_of(tokenizer, windows_of(tokenizer), 128)
    assert not isinstance(found, str)
    form, prompts = found
    words = {i: tokenizer.decode([i]) for i in np.unique([prompts.queries, prompts.labels]).tolist()}
    assert unlike_text(tokenizer, form, words, prompts) == ""
    split = replace(form, colon=(tokenizer.token_to_id("▁"), *form.colon))
    assert "is read as" in unlike_text(tokenizer, split, words, prompts)
    colon = tokenizer.token_to_id("<0x3A>")  # the byte of a colon spells the same text
    assert "it encodes as other ids" in unlike_text(tokenizer, replace(form, colon=(colon,)), words, prompts)


@torch.no_grad()
def test_labels_are_read_where_a_plain_loop_over_texts_reads_them():
    """Each prompt is written as text here, with and without the example that is taken out."""
    tokenizer = bpe_of_pieces(prefix=True)
    found = prompts_of(tokenizer, windows_of(tokenizer), 128)
    assert not isinstance(found, str)
    form, drawn = found
    kept = slice(0, 512, 64)
    prompts = replace(drawn, **{name: getattr(drawn, name)[kept] for name in drawn.__dataclass_fields__})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    change, _, predicted, learned = measure(ResidualStream(model), prompts, form)

    def read(pairs, choices):
        text = "".join(f"{query}:{label}\n" for query, label in pairs[:-1]) + f"{pairs[-1][0]}:"
        logits = model(torch.tensor([tokenizer.encode(text).ids])).logits[0, -1, choices].double()
        return (logits - logits.mean()).numpy()

    for row, at in enumerate(prompts.at):
        queries, labels = ([tokenizer.decode([i]) for i in ids[row]] for ids in (prompts.queries, prompts.labels))
        pairs = list(zip(queries, labels, strict=True))
        before, choices = pairs[: at + 1], prompts.choices[row]
        whole, without = read(pairs[: at + 2], choices), read([*pairs[:at], pairs[at + 1]], choices)
        np.testing.assert_allclose(change[row], whole - without, atol=1e-4)
        p = np.exp(read(before, choices))
        np.testing.assert_allclose(predicted[row], p / p.sum() - 1 / LABELS, atol=1e-5)
        last = np.exp(read(pairs, choices))
        assert learned[row] == pytest.approx(last[prompts.mapped[row]] / last.sum(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif("LENSBENCH_GEMMA" not in os.environ, reason="LENSBENCH_GEMMA names no file of a Gemma model")
def test_prompts_of_gemma_are_whole_words_behind_its_bos():
    tokenizer = load_tokenizer(f"gguf:{os.environ['LENSBENCH_GEMMA']}")
    text = "\n".join(str(p.function.__doc__) + str(p.measures) for p in PROBES.values()) * 3
    windows = windows_of(tokenizer, text)
    form = check(tokenizer, windows, set(re.findall("[A-Za-z]{2,}", text)))
    assert list(form.front) == [tokenizer.bos_token_id]
    assert tokenizer.convert_ids_to_tokens([*form.colon, *form.newline]) == [":", "\n"]
