"""GGUF files are read quickly, and give what the package gguf gives."""

import time

import numpy as np
import pytest

from lensbench.errors import LensbenchError
from lensbench.models.gguf import quick_reading
from lensbench.models.pretrained import load_config

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
