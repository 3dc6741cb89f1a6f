"""GGUF files are read quickly, and give what the package gguf gives."""

import collections
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from lensbench.errors import LensbenchError
from lensbench.models import gguf as reading
from lensbench.models.gguf import merges, quick_reading
from lensbench.models.pretrained import load_config, load_model, load_pretrained, load_tokenizer

gguf = pytest.importorskip("gguf")


def written(path, *, words=400):
    """A file with every kind of value, and one weight."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a name")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", [f"wörd{k}" * (k % 3) for k in range(words)])
    writer.add_array("tokenizer.ggml.scores", [-0.5 * k for k in range(words)])
    writer.add_array("tokenizer.ggml.token_type", list(range(words)))
    writer.add_array("a.single", ["alone"])
    writer.add_array("a.flags", [True, False, True])
    writer.add_array("a.bytes", b"\x01\x02\xff")
    writer.add_tensor("output_norm.weight", np.arange(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WORDS = ["a", "b", "c", "ab", "bc", "abc", "▁", "▁a", "▁ab", "é", "  ", "ca", "cab", "<tag>"]


def gemma(path, *, width=32, extra=0):
    """A Gemma 3 of two blocks with 8-bit matrices, and a vocabulary without merges."""
    rng = np.random.default_rng(0)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{k:02X}>" for k in range(256)] + WORDS
    tokens += [f"w{k}" for k in range(extra)]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(k) for k in range(len(tokens))])
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * (len(WORDS) - 1) + [4] + [1] * extra)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    matrices, norms = {"token_embd": (len(tokens), width)}, {"output_norm": width}
    for k in range(2):
        matrices |= {f"blk.{k}.attn_q": (64, width), f"blk.{k}.attn_k": (32, width), f"blk.{k}.attn_v": (32, width)}
        matrices |= {f"blk.{k}.attn_output": (width, 64), f"blk.{k}.ffn_gate": (64, width)}
        matrices |= {f"blk.{k}.ffn_up": (64, width), f"blk.{k}.ffn_down": (width, 64)}
        norms |= {
            f"blk.{k}.{name}": width for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        }
        norms |= {f"blk.{k}.attn_q_norm": 32, f"blk.{k}.attn_k_norm": 32}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in matrices.items():
        weights = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weights, kind), raw_dtype=kind)
    for name, size in norms.items():
        writer.add_tensor(f"{name}.weight", 1 + rng.normal(size=size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(path):
    """What transformers makes of the metadata, and the weights."""
    from transformers.integrations.ggml import _gguf_parse_value

    reader = gguf.GGUFReader(path)
    fields = {}
    for name, field in reader.fields.items():
        found = [_gguf_parse_value(field.parts[k], field.types) for k in field.data]
        fields[name] = found[0] if len(found) == 1 else found
    return fields, {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def test_every_value_is_the_one_that_the_package_reads(tmp_path):
    path = written(tmp_path / "m.gguf")
    slow = values(path)
    with quick_reading():
        quick = values(path)
    assert quick == slow
    assert quick[0]["tokenizer.ggml.tokens"][5] == "wörd5wörd5"
    assert quick[0]["a.single"] == "alone"


def test_the_package_is_as_it_was_afterwards(tmp_path):
    before = gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map
    with quick_reading():
        assert before[0] is not gguf.GGUFReader
    assert (gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map) == before


@pytest.mark.parametrize("rows", [1, 7, 48, 257])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "F32", "BF16"])
def test_weights_are_those_of_the_package_bit_for_bit(name, rows):
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = {"F16": 512, "F32": 512}.get(name, 512 // block * size)
    stored = {"F16": np.float16, "F32": np.float32}.get(name, np.uint8)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 60, (rows, row * np.dtype(stored).itemsize), dtype=np.uint8).view(stored)
    slow = gguf.dequantize(data, kind)
    with quick_reading():
        quick = gguf.dequantize(data, kind)
    assert quick.shape == slow.shape == (rows, 512)
    np.testing.assert_array_equal(quick.view(np.uint8), slow.view(np.uint8))


def test_a_vocabulary_of_a_hundred_thousand_words_is_read_in_a_second(tmp_path):
    path = written(tmp_path / "m.gguf", words=100_000)
    start = time.process_time()
    with quick_reading():
        values(path)
    assert time.process_time() - start < 1  # the package alone takes over 5


@pytest.mark.parametrize("kept", [300, 2000, 5000])
def test_a_file_that_ends_within_its_vocabulary_is_refused(tmp_path, kept):
    path = written(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LensbenchError, match=r"its config cannot be loaded: \S"):
        load_config(f"gguf:{path}")


TEXTS = ["ab cab", " abc  ca é", "<tag>ab\n☃<bos>", ""]


def test_a_model_and_its_tokenizer_are_those_that_transformers_makes(tmp_path):
    path = gemma(tmp_path / "m.gguf")
    slow = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    quick = load_pretrained(f"gguf:{path}")
    expected, found = slow.state_dict(), quick.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(264, 272)[None]
    with torch.inference_mode():
        assert torch.equal(quick.model(ids).logits, slow.eval()(ids).logits)
    assert quick.tokenizer(TEXTS)["input_ids"] == words(TEXTS)["input_ids"]
    assert len(quick.tokenizer("cab")["input_ids"]) == 2  # <bos> and a word that merges make
    assert quick.tokenizer.backend_tokenizer.to_str() == words.backend_tokenizer.to_str()


def test_a_vocabulary_is_read_once_for_a_model_and_its_tokenizer(tmp_path, monkeypatch):
    path, read = gemma(tmp_path / "m.gguf"), collections.Counter()
    strings = reading._strings

    def counted(data, begin, count):
        read[begin] += 1
        return strings(data, begin, count)

    monkeypatch.setattr(reading, "_strings", counted)
    load_pretrained(f"gguf:{path}")
    assert list(read.values()) == [1]
    load_pretrained(f"gguf:{path}")
    assert list(read.values()) == [2]  # nothing is kept from one reading to the next


def test_no_string_of_a_vocabulary_goes_through_the_slow_readers(tmp_path, monkeypatch):
    slow = pytest.importorskip("transformers.integrations.gguf.reader")
    path, calls = gemma(tmp_path / "m.gguf", extra=3000), []
    string, part = slow._read_string, gguf.GGUFReader._get_str
    monkeypatch.setattr(slow, "_read_string", lambda *a: (calls.append(1), string(*a))[1])
    monkeypatch.setattr(gguf.GGUFReader, "_get_str", lambda *a: (calls.append(1), part(*a))[1])
    load_pretrained(f"gguf:{path}")
    assert 0 < len(calls) < 1000  # the names of tensors and of values


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    path = gemma(tmp_path / "m.gguf")
    first = load_tokenizer(f"gguf:{path}")
    gemma(path, extra=1)
    second = load_tokenizer(f"gguf:{path}")
    assert len(second) == len(first) + 1


def test_weights_are_dequantized_into_the_memory_that_they_stay_in(tmp_path, monkeypatch):
    path, copied = gemma(tmp_path / "m.gguf"), []
    copy = np.copy
    monkeypatch.setattr(np, "copy", lambda a, *rest, **more: (copied.append(a.size), copy(a, *rest, **more))[1])
    model = load_model(f"gguf:{path}")
    assert max(copied, default=0) <= 64  # no matrix
    model.get_input_embeddings().weight.data.zero_()  # and no memory of the file, which cannot be written


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["Q5_0", "Q8_0", "Q4_K", "Q6_K", "BF16"])
def test_weights_are_the_same_however_many_threads_dequantize_them(name, threads, monkeypatch):
    monkeypatch.setattr(reading, "GROUP", 1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (3, 29, 512 // block * size), dtype=np.uint8)
    slow = gguf.dequantize(data, kind)
    with quick_reading():
        quick = gguf.dequantize(data, kind)
    assert quick.shape == slow.shape == (3, 29, 512)
    np.testing.assert_array_equal(quick.view(np.uint8), slow.view(np.uint8))


pieces = st.text("abc▁", min_size=1, max_size=4)


@given(st.lists(pieces, unique=True, max_size=40), st.data())
def test_merges_are_those_of_transformers_in_their_order(tokens, data):
    vocab = {token: k for k, token in enumerate(tokens)}
    score = st.one_of(st.integers(-3, 3), st.sampled_from([-0.0, 0.0, 0.5, -1e30, float("inf"), -float("inf")]))
    scores = {token: data.draw(score) for token in data.draw(st.permutations(tokens))}
    skipped = data.draw(st.sets(pieces, max_size=3))
    assert merges(vocab) == generate_merges(vocab)
    assert merges(vocab, scores) == generate_merges(vocab, scores)
    assert merges(vocab, scores, skipped) == generate_merges(vocab, scores, skipped)


def test_two_threads_that_load_at_once_leave_the_packages_as_they_were(tmp_path):
    path, before, loaded = gemma(tmp_path / "m.gguf"), gguf.GGUFReader, []
    both = [threading.Thread(target=lambda: loaded.append(load_pretrained(f"gguf:{path}"))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    one, other = (pretrained.model.state_dict() for pretrained in loaded)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert gguf.GGUFReader is before
    assert reading.converted.np is np
