"""What a model's text begins with, and the windows that begin with it, for tokenizers of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lensbench.data import Windows, sample_windows, tokenize
from lensbench.data.reading import Document
from lensbench.data.tokens import beginning
from lensbench.errors import LensbenchError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<bos>", "<eos>", "<lang>"]
BOS, EOS, LANG = 256, 257, 258
TEMPLATES = {
    "nothing": None,
    "bos": "<bos> $A",
    "both ends": "<bos> $A <eos>",
    "two": "<bos> <lang> $A",
    "end": "$A <eos>",
}
FRONTS = {"nothing": (), "bos": (BOS,), "both ends": (BOS,), "two": (BOS, LANG), "end": ()}


def tokenizer_of(template: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with a template that puts special tokens around a text."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if TEMPLATES[template] is not None:
        ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=TEMPLATES[template], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("setting", ["auto", "every", "first"])
def test_every_window_begins_with_what_the_tokenizer_adds_in_front(template, setting):
    tokenizer = tokenizer_of(template, bos_token="<bos>", eos_token="<eos>")
    found = beginning(tokenizer, setting)
    added = FRONTS[template]
    assert found.ids == (added or (BOS,))  # a tokenizer that adds nothing in front still has its bos
    assert found.every_window == (setting == "every" or (setting == "auto" and bool(added)))
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    assert whole[: len(added)] == list(added)
    assert whole[len(added)] == plain[0]


def test_the_ids_in_front_are_bos_then_eos_then_none_where_the_tokenizer_adds_nothing():
    assert beginning(tokenizer_of("nothing", eos_token="<eos>")).ids == (EOS,)
    assert beginning(tokenizer_of("end", eos_token="<eos>")).ids == (EOS,)
    none = beginning(tokenizer_of("nothing"), "every")
    assert (none.ids, none.every_window, none.front, none.where) == ((), False, (), "none")


def windows_of(template: str, text: str, setting: str = "auto", **settings: int) -> Windows:
    documents = tokenize(tokenizer_of(template, bos_token="<bos>"), [Document("x", text)], setting)
    return sample_windows(documents, n_sequences=10**6, seed=0, **{"length": 40, "positions": 8, **settings})


@pytest.mark.parametrize("template", ["bos", "both ends", "two"])
@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=80, max_size=300))
def test_windows_hold_the_text_once_after_what_begins_each(template, text):
    """Also where the text spells the special token out: that is text."""
    text = text[:40] + "<bos>" + text[40:]
    front = FRONTS[template]
    w = windows_of(template, text, length=40, positions=8)
    assert (w.ids[:, : len(front)] == front).all()
    order = np.argsort(w.sequence)
    pieces = [w.ids[row, len(front) : w.lengths[row]] for row in order]
    raw = np.array([BYTES.index(c) for piece in pre_tokens(text) for c in piece])
    cut = [raw[i : i + 40 - len(front)] for i in range(0, len(raw), 40 - len(front))]
    for number, piece in zip(w.sequence[order], pieces, strict=True):
        np.testing.assert_array_equal(piece, cut[number])
    assert (w.targets(slice(None)) < 256).all()  # what stands in front is never scored
    assert w.positions.min() >= 1


def pre_tokens(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


@pytest.mark.parametrize("template", ["nothing", "bos", "both ends", "two"])
@pytest.mark.parametrize("setting", ["every", "first"])
def test_bytes_of_scored_tokens_are_those_of_the_text(template, setting):
    """Every token is a byte here, so the bytes of n scored tokens are n, and of the window's text all but the first."""
    w = windows_of(template, "abc <bos> defgh " * 40, setting, positions=30)
    assert (w.next_bytes.sum(1) == 30).all()
    text = np.array([BYTES.index("Ġ" if c == " " else c) for c in "abc <bos> defgh " * 40])
    front, step = (len(FRONTS[template]) or 1, 40) if setting == "first" else (0, 40 - (len(FRONTS[template]) or 1))
    for row in range(len(w)):
        begin = w.sequence[row] * step - front
        head = 40 - step
        for at in w.positions[row][w.valid[row]]:
            assert w.ids[row, at + 1] == text[begin + at + 1 - head]


def test_first_puts_the_token_into_a_documents_first_window_alone():
    w = windows_of("bos", "some text " * 40, "first")
    np.testing.assert_array_equal(w.ids[:, 0] == BOS, w.sequence == 0)


def test_a_first_position_of_zero_scores_the_first_token_of_text_after_the_token_in_front():
    w = windows_of("bos", "some text " * 40, first_position=0, positions=39)
    assert (w.positions[:, 0] == 0).all()
    np.testing.assert_array_equal(w.targets(slice(None)).reshape(len(w), 39), w.ids[:, 1:])


def test_more_positions_than_a_window_has_after_what_stands_in_front_are_refused():
    documents = tokenize(tokenizer_of("two"), [Document("x", "some text " * 40)])
    with pytest.raises(LensbenchError, match="a window of 40 tokens has 38"):
        sample_windows(documents, n_sequences=4, length=40, positions=39, seed=0, first_position=0)
