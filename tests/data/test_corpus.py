"""Corpora: what is read, what may share a split, and what a window may hold."""

import itertools
import json
import random
import string
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lensbench.data import reading
from lensbench.data.corpus import FRACTIONS, SPLITS, Corpus, clusters_of, duplicate_groups, load_corpus
from lensbench.data.reading import Document, read_documents
from lensbench.data.tokens import TokenizedDocument, tokenize, train_tokenizer, training_stream
from lensbench.data.windows import Windows, sample_windows
from lensbench.errors import LensbenchError


def prose(n_words, seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(400)]
    return "".join(rng.choice(words) + ("\n" if i % 12 == 11 else " ") for i in range(n_words))


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return f"file:{path}"


def split_of(corpus, name):
    (found,) = [s for s in SPLITS if name in {d.name for d in corpus.splits[s]}]
    return found


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


@pytest.fixture(scope="module")
def tokenizer(stdlib):
    small = {s: documents[:25] for s, documents in stdlib.splits.items()}
    return train_tokenizer(Corpus("stdlib", "", small), 600)


# The standard library


def test_stdlib_is_sources_and_documentation_without_tests(stdlib):
    names = [d.name for s in SPLITS for d in stdlib.splits[s]]
    assert {"pydoc_data/topics.py", "json/decoder.py", "argparse.py"} <= set(names)
    assert len(names) == len(set(names)) > 300
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "idle_test"}
    assert not any(left_out & set(name.split("/")[:-1]) for name in names)
    sizes = {s: sum(len(d.text.encode()) for d in stdlib.splits[s]) for s in SPLITS}
    total = sum(sizes.values())
    assert total > 6e6
    assert [round(sizes[s] / total, 2) for s in SPLITS] == pytest.approx([FRACTIONS[s] for s in SPLITS], abs=0.015)


def test_stdlib_splits_are_of_one_kind_and_no_document_is_most_of_one(stdlib):
    sizes = {split: [len(d.text.encode()) for d in documents] for split, documents in stdlib.splits.items()}
    assert len(sizes["eval"]) >= 64
    for split in ("fit", "dev", "eval"):
        assert max(sizes[split]) <= 0.25 * sum(sizes[split])
        assert 0.4 < np.median(sizes[split]) / np.median(sizes["train"]) < 2.5


def test_splits_depend_on_the_seed_alone(planted):
    first, again, other = (load_corpus(f"file:{planted}", seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.splits["eval"] != other.splits["eval"]
    assert first.checksum == other.checksum


# Splits of many documents


@pytest.fixture
def planted(tmp_path):
    """A folder of 60 texts; 'copy' repeats 'a', 'near' changes a few of its words, 'far' changes many."""
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text(prose(600, i))
    words = prose(600, 999).split()
    variants = {"a": words, "copy": words, "near": list(words), "far": list(words)}
    for at in range(40, 600, 60):  # 10 of 600 words: 130 of 588 grams differ
        variants["near"][at] = "changed"
    for at in range(5, 600, 20):  # every gram differs but a few
        variants["far"][at] = "changed"
    for name, text in variants.items():
        (tmp_path / f"{name}.md").write_text(("\n" if name == "copy" else " ").join(text))
    return tmp_path


def test_duplicates_share_a_split_and_splits_are_disjoint(planted):
    seen = set()
    for seed in range(12):
        corpus = load_corpus(f"file:{planted}", seed=seed)
        names = [d.name for s in SPLITS for d in corpus.splits[s]]
        assert len(names) == len(set(names)) == 64
        assert split_of(corpus, "a.md") == split_of(corpus, "copy.md") == split_of(corpus, "near.md")
        seen.add(split_of(corpus, "a.md") == split_of(corpus, "far.md"))
    assert False in seen  # what shares few 13-grams is free


def test_near_duplicates_agree_with_sets_of_grams():
    rng = random.Random(0)
    base = [prose(60, i).split() for i in range(4)]
    texts = []
    for _ in range(40):
        words = list(rng.choice(base))
        for _ in range(rng.randint(0, 4)):
            words[rng.randrange(len(words))] = rng.choice("xyz")
        texts.append(" ".join(words[: rng.randint(8, 60)]))
    texts += [texts[0].replace(" ", "\n"), "a b", "a  b", "a c"]

    def connected(a, b):
        grams = [{tuple(w[i : i + 13]) for i in range(len(w) - 12)} for w in (a.split(), b.split())]
        union = len(grams[0] | grams[1])
        return a.split() == b.split() or (union > 0 and len(grams[0] & grams[1]) / union > 0.5)

    label = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if connected(texts[i], texts[j]):
            label = [label[i] if k == label[j] else k for k in label]
    got = duplicate_groups(texts)
    assert len(set(label)) < len(texts) - 5
    for i, j in itertools.combinations(range(len(texts)), 2):
        assert (got[i] == got[j]) == (label[i] == label[j])


def test_checksum_is_of_content_and_not_of_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    names = [f"{i}.txt" for i in range(24)]
    for folder, order in ((a, names), (b, names[::-1])):
        folder.mkdir()
        for name in order:
            (folder / name).write_text(prose(50, name))
    first = load_corpus(f"file:{a}")
    assert first.checksum == load_corpus(f"file:{b}", seed=5).checksum
    assert len(first.checksum) == 64
    (b / "3.txt").write_text(prose(50, "other"))
    changed = load_corpus(f"file:{b}").checksum
    (b / "3.txt").rename(b / "33.txt")
    assert len({first.checksum, changed, load_corpus(f"file:{b}").checksum}) == 3


def test_a_giant_goes_to_train_and_no_split_is_empty(tmp_path):
    spec = write_jsonl(tmp_path / "x.jsonl", [prose(100, i) for i in range(20)] + [prose(20_000, "giant")])
    for seed in range(5):
        corpus = load_corpus(spec, seed=seed)
        assert split_of(corpus, "x.jsonl:21") == "train"
        assert all(corpus.splits.values())


def test_train_may_be_empty(planted, tmp_path):
    fractions = {"train": 0, "fit": 0.5, "dev": 0.2, "eval": 0.3}
    corpus = load_corpus(f"file:{planted}", fractions=fractions)
    assert [len(corpus.splits[s]) > 0 for s in SPLITS] == [False, True, True, True]
    lone = tmp_path / "lone"
    lone.write_text(prose(20_000, 1))
    corpus = load_corpus(f"file:{lone}", fractions=fractions)
    assert [len(corpus.splits[s]) > 0 for s in SPLITS] == [False, True, True, True]
    with pytest.raises(LensbenchError, match="no train split"):
        train_tokenizer(corpus, 300)


def test_too_few_distinct_documents(tmp_path):
    with pytest.raises(LensbenchError, match="25 documents are 1, too few for 4 splits"):
        load_corpus(write_jsonl(tmp_path / "x.jsonl", [prose(100, 0)] * 25))


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 1.0}, "train, fit, dev, eval"),
        ({"train": 0.7, "fit": 0.1, "dev": 0.1, "eval": 0.2}, "sum to 1.1"),
        ({"train": 0.8, "fit": 0.1, "dev": 0.1, "eval": 0.0}, "above 0"),
        ({"train": -0.1, "fit": 0.5, "dev": 0.3, "eval": 0.3}, "at least 0"),
    ],
)
def test_fractions_that_are_none(fractions, message):
    with pytest.raises(LensbenchError, match=message):
        load_corpus("stdlib", fractions=fractions)


# A lone text


@pytest.mark.parametrize("text", [prose(60_000, 0), "鯨は海に棲む獣である。\n" + prose(40_000, 1).replace("a", "é")])
def test_sections_of_a_lone_text_are_apart(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    corpus = load_corpus(f"file:{path}")
    spans = {s: [(text.index(d.text), len(d.text)) for d in corpus.splits[s]] for s in SPLITS}
    assert all(spans.values())
    for before, after in itertools.pairwise(SPLITS):
        end = max(start + size for start, size in spans[before])
        assert min(start for start, _ in spans[after]) - end > 4000  # a whole block
    for split in SPLITS[1:]:
        for (start, size), (following, _) in itertools.pairwise(spans[split]):
            assert following - (start + size) > 400  # the gap between blocks
    total = sum(map(len, (d.text for s in SPLITS for d in corpus.splits[s])))
    assert total > 0.5 * len(text)


def test_blocks_end_at_lines_and_characters(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(60_000, 0))
    blocks = load_corpus(f"file:{path}").splits["train"]
    assert all(d.text.endswith("\n") and 5000 < len(d.text) < 10_300 for d in blocks)
    rng = random.Random(0)
    path.write_text("".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(100_000)))  # nowhere to cut
    corpus = load_corpus(f"file:{path}")
    assert "\ufffd" not in "".join(d.text for s in SPLITS for d in corpus.splits[s])


def test_repeated_blocks_are_dropped_from_the_later_split(tmp_path):
    text = prose(60_000, 0)
    path = tmp_path / "book.txt"
    path.write_text(text)
    before = load_corpus(f"file:{path}")
    last = before.splits["eval"][-1].text
    start = text.index(last)
    path.write_text(text[:start] + before.splits["train"][3].text[: len(last)] + text[start + len(last) :])
    after = load_corpus(f"file:{path}")
    assert [d.name for d in after.splits["eval"]] == [d.name for d in before.splits["eval"][:-1]]
    assert after.splits["train"] == before.splits["train"]
    path.write_text(prose(1400, 0) * 20)
    with pytest.raises(LensbenchError, match="repeats itself"):
        load_corpus(f"file:{path}")


def test_a_few_documents_are_cut_like_a_lone_text(tmp_path):
    corpus = load_corpus(write_jsonl(tmp_path / "x.jsonl", [prose(8000, i) for i in range(5)]))
    assert all(corpus.splits.values())
    assert {d.name.partition("[")[0] for d in corpus.splits["train"]} >= {"x.jsonl:1", "x.jsonl:2"}
    assert max(len(d.text) for d in corpus.splits["train"]) < 10_300


@pytest.mark.parametrize("n_words", [50, 9000])
def test_too_short_says_what_is_there_and_what_is_needed(tmp_path, n_words):
    path = tmp_path / "x.txt"
    path.write_text(prose(n_words, 0))
    with pytest.raises(LensbenchError, match=f"too short: {path.stat().st_size} bytes .* 65536 bytes or 20 documents"):
        load_corpus(f"file:{path}")


# Reading files


def test_fields_blank_lines_and_marks(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"body": "one\\u2028two"}\n\n{"body": "half \\ud83d"}\n{"body": " "}'.encode())
    documents = read_documents(f"file:{path}#body")
    assert documents == [Document("x.jsonl:1", "one\u2028two"), Document("x.jsonl:3", "half \ufffd")]


def test_a_number_sign_may_belong_to_the_path(tmp_path):
    folder = tmp_path / "c#sharp"
    folder.mkdir()
    (folder / "x#1.txt").write_text("hello")
    write_jsonl(folder / "y#2.jsonl", ["text"], field="body")
    assert read_documents(f"file:{folder / 'x#1.txt'}") == [Document("x#1.txt", "hello")]
    assert read_documents(f"file:{folder / 'y#2.jsonl'}#body") == [Document("y#2.jsonl:1", "text")]
    assert [d.name for d in read_documents(f"file:{folder}#body")] == ["x#1.txt", "y#2.jsonl:1"]


def test_folders_are_read_in_order_without_hidden_and_empty_files(tmp_path):
    for name in ("b/2.md", "b/1.txt", "a.rst", ".git/x.txt", "z.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    assert [d.name for d in read_documents(f"file:{tmp_path}")] == ["a.rst", "b/1.txt", "b/2.md"]


@pytest.mark.parametrize("limit", range(1, 14))
def test_reading_stops_at_max_bytes(tmp_path, limit):
    spec = write_jsonl(tmp_path / "x.jsonl", ["abcd", "éé", "xyz"])
    got = "".join(d.text for d in read_documents(spec, max_bytes=limit))
    assert "abcdééxyz".startswith(got)
    assert min(limit, 11) - 1 <= len(got.encode()) <= limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "x.txt is empty"),
        ("x.txt", b" \n", "x.txt is empty"),
        ("x.txt", b"ab\0cd", "x.txt is binary"),
        ("x.txt", "café".encode("latin-1"), r"x.txt is not UTF-8 \(byte 3\)"),
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl line 2 is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"body": "a", "id": 1}\n', "line 3 has no field 'text': it has 'body', 'id'"),
        ("x.jsonl", b"{}\n", "it has none"),
        ("x.jsonl", b'["text"]\n', "line 1 is a JSON list"),
        ("x.jsonl", b'{"text": 3}\n', "field 'text' is a number"),
        ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl line 1 is not UTF-8"),
        ("x.jsonl", b'{"text": " "}\n', "every document is blank"),
        ("x.txt#body", None, "no such file"),
        ("x.txt", None, "no such file"),
        ("y" * 300, None, "no such file"),
    ],
)
def test_files_that_are_no_corpus(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LensbenchError, match=message) as error:
        load_corpus(f"file:{tmp_path / name}")
    assert "\n" not in str(error.value)


def test_other_mistakes_with_files(tmp_path):
    with pytest.raises(LensbenchError, match="holds no texts"):
        read_documents(f"file:{tmp_path}")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(LensbenchError, match=r"only \.jsonl files have fields"):
        read_documents(f"file:{tmp_path / 'x.txt'}#body")
    with pytest.raises(LensbenchError, match="field after '#' is empty"):
        read_documents(f"file:{tmp_path / 'x.txt'}#")
    with pytest.raises(LensbenchError, match="max_bytes is 0"):
        read_documents("stdlib", max_bytes=0)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("stlib", "mean stdlib"), ("files:x.txt", "mean file:PATH"), ("hff:a", "mean hf:NAME"), ("", "a corpus is stdlib"),
     ("file:", "mean file:PATH"), ("hf:", "mean hf:NAME"), ("stdlib:x", "mean stdlib"), ("q" * 400, "hf:NAME")],
)  # fmt: skip
def test_unknown_specs_are_told_the_forms(spec, hint):
    with pytest.raises(LensbenchError, match=r"unknown corpus .*stdlib, file:PATH.*, hf:NAME") as error:
        load_corpus(spec)
    assert hint in str(error.value)


def test_a_path_without_file_is_told_so(tmp_path):
    with pytest.raises(LensbenchError, match=f"did you mean file:{tmp_path}"):
        load_corpus(str(tmp_path))


# Hugging Face datasets


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: answers from a dictionary keyed by (name, config, split), and lists the calls."""
    import datasets

    rows, calls = {}, []

    def load_dataset(name, config=None, *, split, streaming):
        assert streaming
        calls.append((name, config, split))
        found = rows.get((name, config, split), datasets.exceptions.DatasetNotFoundError(f"{name} doesn't\nexist"))
        if isinstance(found, Exception):
            raise found
        return iter(found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows, calls


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("hf:a", ("a", None, "train")),
        ("hf:a@test", ("a", None, "test")),
        ("hf:org/a", ("org/a", None, "train")),
        ("hf:a/config", ("a", "config", "train")),
        ("hf:org/a/config@test[:5%]#text", ("org/a", "config", "test[:5%]")),
    ],
)
def test_hub_specs(hub, spec, key):
    rows, calls = hub
    rows[key] = [{"text": "one"}, {"text": None}, {"text": ""}, {"text": "two"}]
    assert read_documents(spec) == [Document(f"{key[2]}:0", "one"), Document(f"{key[2]}:3", "two")]
    assert calls[-1] == key


def test_hub_reading_stops_at_the_limit(hub, monkeypatch):
    rows, _ = hub
    rows["a", None, "train"] = ({"text": "x" * 1000} for _ in itertools.count())
    assert sum(len(d.text) for d in read_documents("hf:a", max_bytes=5500)) == 5500
    assert reading.HF_MAX_BYTES == 50_000_000
    monkeypatch.setattr(reading, "HF_MAX_BYTES", 2_500_000)
    rows["b", None, "train"] = ({"body": "x" * 1_000_000} for _ in itertools.count())
    assert sum(len(d.text) for d in read_documents("hf:b#body")) == 2_500_000


@pytest.mark.parametrize(
    ("spec", "found", "message"),
    [
        ("hf:a", None, "hf:a cannot be read: a doesn't exist"),
        ("hf:org/a", None, "org/a doesn't exist; org doesn't exist"),
        ("hf:a", ConnectionError("could\nnot reach"), "ConnectionError: could not reach"),
        ("hf:a", [{"body": "x", "id": 1}], "no field 'text': it has 'body', 'id'"),
        ("hf:a", [{"text": 1}], "row 0: field 'text' is a number"),
        ("hf:a/b/c/d", None, "is no dataset: expected hf:NAME"),
        ("hf:/a", None, "is no dataset"),
        ("hf:@test", None, "is no dataset"),
    ],
)
def test_hub_failures_are_one_line(hub, spec, found, message):
    if found is not None:
        hub[0]["a", None, "train"] = found
    with pytest.raises(LensbenchError, match=message) as error:
        read_documents(spec)
    assert "\n" not in str(error.value)


def test_a_hub_that_breaks_off_is_one_line(hub):
    def rows():
        yield {"text": "one"}
        raise OSError("connection\nreset")

    hub[0]["a", None, "train"] = rows()
    with pytest.raises(LensbenchError, match="hf:a cannot be read: OSError: connection reset"):
        read_documents("hf:a")


def test_a_local_dataset_through_the_real_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "train.jsonl", ["one", "two", "three"])
    assert [d.text for d in read_documents(f"hf:{tmp_path}")] == ["one", "two", "three"]


# Tokens


def test_vocabulary_is_exact_deterministic_and_complete(tokenizer, stdlib):
    small = Corpus("stdlib", "", {s: documents[:25] for s, documents in stdlib.splits.items()})
    assert train_tokenizer(small, 600).to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert train_tokenizer(small, 257).get_vocab_size() == 257


@pytest.mark.parametrize(("size", "message"), [(256, "at least 257"), (5000, "too short for vocab_size 5000")])
def test_vocabularies_that_cannot_be(size, message):
    corpus = Corpus("tiny", "", {"train": (Document("a", prose(300, 0)),), "fit": (), "dev": (), "eval": ()})
    with pytest.raises(LensbenchError, match=message):
        train_tokenizer(corpus, size)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_bytes_sum_to_the_text_and_the_text_comes_back(tokenizer, text):
    (document,) = tokenize(tokenizer, [Document("x", text)])
    assert document.ids[0] == 0
    assert document.n_bytes[0] == 0
    assert 0 not in document.ids[1:]
    assert document.n_bytes.sum() == len(text.encode())
    assert document.n_bytes.min() >= 0
    assert tokenizer.decode(document.ids[1:].tolist()) == text


def test_bytes_of_each_token(tokenizer):
    (document,) = tokenize(tokenizer, [Document("x", "def 鯨")])
    tokens = [tokenizer.id_to_token(i) for i in document.ids[1:]]
    whale = len(tokens) - len(tokenizer.encode("鯨").ids)
    assert sum(document.n_bytes[1 : whale + 1]) == 4
    assert document.n_bytes[whale + 1 :].tolist() == [3, 0, 0]  # the first of a character's tokens counts for it


def test_special_tokens_written_in_a_text_are_text(tokenizer):
    (document,) = tokenize(tokenizer, [Document("x", "a<|endoftext|>b")])
    assert (document.ids == 0).sum() == 1
    assert document.n_bytes.sum() == 15
    assert tokenizer.encode("<|endoftext|>").ids == [0]  # the caller's tokenizer is as it was


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_bytes_sum_where_text_is_normalised_away(text):
    backend = Tokenizer(tokenizer_models.WordLevel({"[UNK]": 0, "[BOS]": 1}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for document in tokenize(backend, [Document("x", text)]):
        assert document.n_bytes.sum() == len(text.encode())
        assert len(document.ids) == len(document.n_bytes) > 0


@pytest.mark.parametrize(
    ("special", "first"),
    [({"bos_token": "a", "eos_token": "b"}, "a"), ({"eos_token": "b"}, "b"), ({}, "<|endoftext|>")],
)
def test_what_a_models_own_tokenizer_puts_in_front(tokenizer, special, first):
    model = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model(["longer than two"], truncation=True, max_length=2)  # leaves truncation on in the backend
    (document,) = tokenize(model, [Document("x", "import this, not that")])
    assert document.ids[0] == tokenizer.token_to_id(first)
    assert document.ids[1:].tolist() == tokenizer.encode("import this, not that").ids
    assert document.n_bytes.sum() == 21


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_gives_no_padding_whatever_its_side(tokenizer, side):
    model = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", pad_token="a", padding_side=side
    )
    model(["short", "longer than that"], padding="max_length", max_length=40)  # leaves padding on in the backend
    (document,) = tokenize(model, [Document("x", "import this, not that")])
    assert document.ids[1:].tolist() == tokenizer.encode("import this, not that").ids
    windows = sample_windows(
        tokenize(model, [Document("x", "import this, " * 40)]), n_sequences=9, length=64, positions=4, seed=0
    )
    for row, length in zip(windows.ids, windows.lengths, strict=True):
        assert tokenizer.token_to_id("a") not in row[:length]
        assert not row[length:].any()


def test_nothing_in_front_where_there_is_nothing_to_put():
    backend = Tokenizer(tokenizer_models.WordLevel({"[UNK]": 0, "b": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (document,) = tokenize(backend, [Document("x", "b c b ")])
    assert document.ids.tolist() == [1, 0, 1]
    assert document.n_bytes.tolist() == [1, 2, 3]


def test_slow_tokenizers_are_refused():
    with pytest.raises(LensbenchError, match="fast tokenizer"):
        tokenize(object(), [Document("x", "a")])


def test_training_stream_keeps_documents_and_their_beginnings(tokenizer):
    documents = tokenize(tokenizer, [Document("x", "one two"), Document("y", "three")])
    stream = training_stream(documents)
    assert stream.dtype == np.int32
    assert np.flatnonzero(stream == 0).tolist() == [0, len(documents[0].ids)]
    assert tokenizer.decode(stream.tolist()) == "one twothree"
    with pytest.raises(LensbenchError, match="no documents to train on"):
        training_stream([])


# Windows


def numbered(sizes):
    """Documents whose every token is different, and tells document and place."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [
        TokenizedDocument(f"d{i}", np.arange(a, b, dtype=np.int32), ((np.arange(a, b) * 7) % 5 + 1).astype(np.int32))
        for i, (a, b) in enumerate(itertools.pairwise(starts))
    ]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    n=st.integers(1, 40),
    length=st.integers(32, 100),
    positions=st.integers(1, 20),
    first=st.integers(0, 10),
    share=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 5),
)
def test_windows(sizes, n, length, positions, first, share, seed):
    documents = numbered(sizes)
    arguments = {"n_sequences": n, "length": length, "positions": positions, "first_position": first}
    available = [sum(1 for k in range(0, size, length) if min(size - k, length) >= 32) for size in sizes]
    if not any(available):
        with pytest.raises(LensbenchError, match="no windows"):
            sample_windows(documents, seed=seed, max_share=share, **arguments)
        return
    w = sample_windows(documents, seed=seed, max_share=share, **arguments)
    drawn = len(w.ids)
    assert drawn <= min(n, sum(available))
    held = [w.ids[s, : w.lengths[s]] for s in range(drawn)]
    assert len(np.unique(np.concatenate(held))) == w.lengths.sum()  # no overlap
    for s in range(drawn):
        d = int(w.document_names[w.documents[s]][1:])
        start = w.sequence[s] * length
        np.testing.assert_array_equal(held[s], documents[d].ids[start : start + length])
        assert not w.ids[s, w.lengths[s] :].any()
        eligible = range(first, w.lengths[s] - 1)
        chosen = w.positions[s, w.valid[s]]
        assert len(set(chosen)) == len(chosen) == min(positions, len(eligible))
        assert set(chosen) <= set(eligible)
        np.testing.assert_array_equal(w.next_bytes[s, w.valid[s]], documents[d].n_bytes[start + chosen + 1])
    assert (np.diff(w.positions) >= 0).all()
    assert w.positions.max() <= length - 2
    assert not w.next_bytes[~w.valid].any()
    counts = np.bincount(w.documents)
    assert len(counts) == len(w.document_names)
    assert counts.min() >= 1
    if share is None:
        assert drawn == min(n, sum(available))
    else:
        there = sum(map(bool, available))
        most = share if there * share >= 1 else min(1, 2 / there)  # few documents have to give more
        assert counts.max() <= max(1, int(most * drawn + 1e-9))
        assert len(counts) == min(drawn, sum(map(bool, available)))  # as many documents as there can be
        spare = [c for c, a in zip(counts, [available[int(x[1:])] for x in w.document_names], strict=True) if c < a]
        assert counts.max() - min(spare, default=counts.max()) <= 1  # and as even


@settings(max_examples=60, deadline=None)
@given(
    folders=st.lists(st.lists(st.integers(20, 400), min_size=1, max_size=6), min_size=64, max_size=70),
    n=st.integers(1, 300),
    seed=st.integers(0, 5),
)
def test_turns_of_clusters_take_as_many_clusters_as_there_are_and_as_evenly_as_their_windows_allow(folders, n, seed):
    sizes = [size for folder in folders for size in folder]
    names = [f"p{k:02d}/{d}" for k, folder in enumerate(folders) for d in range(len(folder))]
    documents = [replace(document, name=name) for document, name in zip(numbered(sizes), names, strict=True)]
    whole = [
        sum(sum(1 for k in range(0, size, 64) if min(size - k, 64) >= 32) for size in folder) for folder in folders
    ]
    assume(sum(map(bool, whole)) >= 64)
    w = sample_windows(documents, n_sequences=n, length=64, positions=4, seed=seed, max_share=1.0, turns="cluster")
    counts = Counter(w.document_names[d].partition("/")[0] for d in w.documents)
    assert sum(counts.values()) == min(n, sum(whole))
    assert len(counts) == min(n, sum(map(bool, whole)))
    spare = [counts[f"p{k:02d}"] for k, there in enumerate(whole) if counts[f"p{k:02d}"] < there]
    assert max(counts.values()) - min(spare, default=max(counts.values())) <= 1


def test_turns_of_clusters_are_those_of_documents_where_each_is_its_own():
    documents = numbered([300, 200, 64, 900] * 5)
    one, other = (
        sample_windows(documents, n_sequences=40, length=64, positions=4, seed=1, max_share=0.1, turns=turns)
        for turns in ("document", "cluster")
    )
    assert one.fingerprint == other.fingerprint


def test_windows_follow_the_seed():
    documents = numbered([300] * 30)
    a, b, c = (
        sample_windows(documents, n_sequences=20, length=64, positions=4, seed=s, max_share=0.1) for s in (0, 0, 1)
    )
    for name in ("ids", "lengths", "positions", "valid", "documents", "sequence", "next_bytes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(c, name).dtype
    assert a.document_names == b.document_names
    assert not np.array_equal(a.ids, c.ids)
    assert not np.array_equal(a.positions, c.positions)
    assert (a.ids.dtype, a.positions.dtype, a.valid.dtype, a.next_bytes.dtype) == (np.int64, np.int64, bool, np.int32)


def test_positions_are_spread_evenly():
    w = sample_windows(numbered([64] * 2000), n_sequences=2000, length=64, positions=16, seed=0)
    counts = np.bincount(w.positions.ravel(), minlength=63)
    assert counts[0] == 0
    assert w.valid.all()
    expected = 2000 * 16 / 62
    assert abs(counts[1:] - expected).max() < 5 * np.sqrt(expected)


def test_the_first_window_alone_begins_with_the_beginning(tokenizer):
    documents = tokenize(tokenizer, [Document(str(i), prose(500, i)) for i in range(3)])
    w = sample_windows(documents, n_sequences=1000, length=64, positions=8, seed=0)
    np.testing.assert_array_equal(w.ids[:, 0] == 0, w.sequence == 0)
    assert (w.next_bytes[w.valid] > 0).all()


def test_fewer_windows_than_asked_shrink_the_share():
    w = sample_windows(numbered([640] + [64] * 5), n_sequences=100, length=64, positions=4, seed=0, max_share=0.4)
    assert np.bincount(w.documents).max() <= 0.4 * len(w.ids)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_sequences": 0}, "at least 1"),
        ({"positions": 0}, "at least 1"),
        ({"positions": 63}, "has 62 from first_position 1 on"),
        ({"length": 31}, "at least 32"),
        ({"max_share": 0.0}, "max_share"),
        ({"max_share": 1.5}, "max_share"),
        ({"first_position": 63}, "first_position is 63"),
        ({"first_position": -1}, "first_position is -1"),
    ],
)
def test_window_arguments_that_cannot_be(changed, message):
    arguments = {"n_sequences": 4, "length": 64, "positions": 4, "seed": 0, **changed}
    with pytest.raises(LensbenchError, match=message):
        sample_windows(numbered([200]), **arguments)


def test_no_windows_of_no_documents():
    with pytest.raises(LensbenchError, match="no windows"):
        sample_windows([], n_sequences=4, length=64, positions=4, seed=0)


def test_files_of_one_folder_are_one_cluster_where_enough_are_left():
    """What a folder holds is alike (tables of encodings, say): resampled apart, its files would feign precision."""
    alike = [f"encodings/cp{k}.py" for k in range(40)]
    apart = [f"module{k:03d}.py" for k in range(63)]
    found = clusters_of([*alike, *apart])
    assert len(set(found.values())) == 64
    assert {found[name] for name in alike} == {"encodings"}
    fewer = clusters_of([*alike, *apart[:-1]])
    assert all(name == cluster for name, cluster in fewer.items())
    assert clusters_of(["a/b/c.py", *apart])["a/b/c.py"] == "a"


def test_windows_know_the_cluster_of_their_document():
    names = (*(f"encodings/{k}.py" for k in range(3)), *(f"m{k:03d}.py" for k in range(63)))
    count = len(names)
    windows = Windows(
        ids=np.zeros((count + 1, 4), np.int64), lengths=np.full(count + 1, 4), positions=np.ones((count + 1, 1), np.int64),
        valid=np.ones((count + 1, 1), bool), documents=np.array([*range(count), 5]), document_names=names,
        sequence=np.zeros(count + 1, np.int64), next_bytes=np.ones((count + 1, 1), np.int32),
    )  # fmt: skip
    clusters = windows.clusters
    assert clusters[0] == clusters[1] == clusters[2]
    assert len(set(clusters)) == 64
    assert clusters[-1] == clusters[5]


@pytest.fixture
def mixed(tmp_path):
    """A folder of two texts, a picture, and a file that is named like a text and is none."""
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "in" / "b.md").write_text("second")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "d.txt").write_bytes(b"ab\0cd\xff")
    return tmp_path


def test_what_is_no_text_in_a_folder_is_left_out_and_named(mixed):
    said = []
    assert [d.text for d in read_documents(f"file:{mixed}", say=said.append)] == ["first", "second"]
    (line,) = said
    assert "1 file(s) of other kinds, left out: c.png" in line
    assert "1 file(s) that are not UTF-8 text, left out: d.txt" in line


def test_strict_refuses_a_folder_with_files_that_are_no_text(mixed):
    with pytest.raises(LensbenchError, match=r"c\.png.*d\.txt"):
        read_documents(f"file:{mixed}", strict=True)
    assert len(read_documents(f"file:{mixed}/**/[ab].*", strict=True)) == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.txt", ["a.txt"]), ("**/*.md", ["in/b.md"]), ("**/[ab].*", ["a.txt", "in/b.md"]), ("i?/b.md", ["in/b.md"])],
)
def test_a_pattern_names_the_files_that_match_it(mixed, pattern, names):
    said = []
    assert [d.name for d in read_documents(f"file:{mixed}/{pattern}", say=said.append)] == names


def test_a_pattern_that_nothing_matches_is_refused(mixed):
    with pytest.raises(LensbenchError, match=r"\*\.rst: nothing matches this pattern"):
        read_documents(f"file:{mixed}/*.rst")
    write_jsonl(mixed / "e.jsonl", ["third"], field="body")
    assert [d.text for d in read_documents(f"file:{mixed}/*.jsonl#body")] == ["third"]
