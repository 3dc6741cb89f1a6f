"""GGUF files read in seconds: what transformers and the package gguf do value by value is done in larger pieces.

Each list of the vocabulary is read once for all of a model's parts, weights are dequantized into the memory that they
stay in, and merges are sorted at once. Names, values, weights and token ids are the same, bit for bit.
"""

import contextlib
import functools
import gc
import importlib
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as converted

ALREADY_READ = -1
"""In place of the type of a field: transformers converts values by type, and leaves one of an unknown type as it is"""

GROUP = 2**17
"""Weights that are dequantized at once: they stay in the processor's cache; the package gguf takes 16 rows"""

ARRAY, STRING = 9, 8
"""Types of values in a GGUF file"""

_LOCK = threading.RLock()

_READ: list["_Lists"] = []
"""The lists of the reading that is under way, if one is"""


@contextlib.contextmanager
def quick_reading() -> Iterator[None]:
    """transformers reads GGUF files through the functions of this module inside; without the package gguf, nothing changes.

    What is read inside one ``with`` is read once, also by those within it: no file may change meanwhile.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    with _LOCK:
        if _READ:
            yield
            return
        lists = _Lists()
        replaced = list(_quick(gguf, lists))
        originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
        _READ.append(lists)
        # Hundreds of thousands of strings are made and kept: there is nothing to collect, and looking takes a while.
        collecting = gc.isenabled()
        gc.disable()
        try:
            for module, name, quick in replaced:
                setattr(module, name, quick)
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)
            _READ.clear()
            if collecting:
                gc.enable()


def _quick(gguf: Any, lists: "_Lists") -> Iterator[tuple[ModuleType, str, Any]]:
    """Module, name and what takes its place; not all releases of transformers have all of them."""
    yield gguf, "GGUFReader", _reader(gguf, lists)
    yield gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)
    yield gguf, "dequantize", _in_large_groups(gguf)
    yield converted, "np", _NumpyThatKeeps()
    with contextlib.suppress(ImportError):
        module = importlib.import_module("transformers.integrations.gguf.reader")
        if hasattr(module, "_read_value"):
            yield module, "_read_value", _value(module._read_value, lists)
    for name in ("integrations.gguf.gguf_tokenizer_mapping", "convert_slow_tokenizer", "tokenization_utils_tokenizers"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"transformers.{name}")
            if hasattr(module, "generate_merges"):
                yield module, "generate_merges", merges


def tensors(file: Path, model: PreTrainedModel) -> tuple[list[str], list[str] | None]:
    """The names of a file's tensors, and of those that transformers has a place for in ``model``.

    None for the second where it gives weights names in a way of its own (mixtures of experts, and families whose files
    it reads without the package gguf, and reports on itself).
    """
    import gguf

    with quick_reading():
        read = gguf.GGUFReader(file)
        names = [tensor.name for tensor in read.tensors]
        family = str(read.fields["general.architecture"].contents())
        kind = converted.TENSOR_PROCESSORS.get(family, converted.TensorProcessor)
        own = kind.perform_fallback_tensor_mapping is not converted.TensorProcessor.perform_fallback_tensor_mapping
        if own or family not in converted.GGUF_SUPPORTED_ARCHITECTURES:
            return names, None
        try:
            places: dict[str, str] = converted.get_gguf_hf_weights_map(model, kind(config={}))  # type: ignore[no-untyped-call]
            return names, list(places)
        except NotImplementedError:
            return names, None


class _Lists:
    """Lists of strings in files, each read once."""

    def __init__(self) -> None:
        self.read: dict[tuple[str, int, int], tuple[list[str], int]] = {}

    def strings(self, data: NDArray[np.uint8], begin: int, count: int) -> tuple[list[str], int]:
        """What :func:`_strings` returns; the list is the caller's own."""
        if (file := getattr(data, "filename", None)) is None:
            return _strings(data, begin, count)
        key = str(file), data.size, begin
        if key not in self.read:
            self.read[key] = _strings(data, begin, count)
        values, end = self.read[key]
        return list(values), end


def _reader(gguf: Any, lists: _Lists) -> type:
    """The reader of the package gguf, with lists of strings and numbers read at once."""
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
        """Reads a file of metadata and tensors."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            """Bytes taken, parts, the indices of those parts that are the value, and its types."""
            if raw_type != ARRAY or self.byte_order != "I" or struct.pack("=H", 1) != struct.pack("<H", 1):
                found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
                return found
            item, count = struct.unpack_from("<IQ", self.data, orig_offs)
            # transformers takes a list of one for its value.
            if item == ARRAY or count < 2:
                found = super()._get_field_parts(orig_offs, raw_type)
                return found
            begin = orig_offs + 12
            if item == STRING:
                values, end = lists.strings(self.data, begin, count)
            else:
                number = np.dtype(self.gguf_scalar_to_np[kinds(item)])
                values = np.frombuffer(self.data, number, count, begin).tolist()
                end = begin + count * number.itemsize
            return end - orig_offs, [values], [0], [ALREADY_READ]

    return Reader


def _value(read: Callable[..., tuple[Any, int]], lists: _Lists) -> Callable[..., tuple[Any, int]]:
    """transformers' own ``read`` of one value of the metadata, with lists of strings read at once."""

    def quick(blob: NDArray[np.uint8], pos: int, value_type: int, keep_strings: bool = False) -> tuple[Any, int]:
        if value_type == ARRAY:
            item, count = struct.unpack_from("<IQ", blob.data, pos)
            if item == STRING:
                values, end = lists.strings(blob, pos + 12, count)
                return (values if keep_strings else count), end
        return read(blob, pos, value_type, keep_strings)

    return quick


def _strings(data: NDArray[np.uint8], begin: int, count: int) -> tuple[list[str], int]:
    """``count`` strings, each behind its length in 8 bytes, and where they end; ValueError where the file ends first."""
    view, length, values = data.data, struct.Struct("<Q").unpack_from, []
    if 8 * count > len(view) - begin:
        raise ValueError(f"the file ends within a list of {count} strings")
    for _ in range(count):
        start = begin + 8
        begin = start + length(view, begin)[0]
        if begin > len(view):
            raise ValueError(f"the file ends within a list of {count} strings")
        values.append(str(view[start:begin], "utf-8"))
    return values, begin


def _in_large_groups(gguf: Any) -> Callable[..., NDArray[Any]]:
    """``dequantize`` of the package gguf on blocks one behind the other, across rows, straight into the result."""
    dequantize, sizes = gguf.dequantize, gguf.GGML_QUANT_SIZES

    def quick(data: NDArray[Any], qtype: Any) -> NDArray[Any]:
        block, size = sizes[qtype]
        if data.dtype != np.uint8 or data.size == 0 or data.shape[-1] % size:
            whole: NDArray[Any] = dequantize(data, qtype)
            return whole
        weights = np.empty((*data.shape[:-1], data.shape[-1] // size * block), np.float32)
        stored, into = data.reshape(-1, size), weights.reshape(-1, block)
        step = max(GROUP // block, 1)

        def fill(first: int) -> None:
            group = stored[first : first + step]
            into[first : first + step] = dequantize(group.reshape(1, -1), qtype).reshape(-1, block)

        groups, threads = range(0, len(stored), step), torch.get_num_threads()
        if threads == 1 or len(groups) < 2 * threads:
            for first in groups:
                fill(first)
        else:
            with ThreadPoolExecutor(threads) as pool:  # numpy computes outside Python's lock
                list(pool.map(fill, groups))
        return weights

    return quick


class _NumpyThatKeeps:
    """numpy for transformers' reader of weights, which copies each: one that is nobody else's memory need not be."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def copy(weights: NDArray[Any]) -> NDArray[Any]:
        """``weights`` themselves where they own their memory in order, else a copy."""
        kept = type(weights) is np.ndarray and weights.flags.owndata and weights.flags.carray
        return weights if kept else np.copy(weights)


def merges(
    vocab: Mapping[str, int],
    vocab_scores: Mapping[str, float] | None = None,
    skip_tokens: Collection[str] | None = None,
) -> list[tuple[str, str]]:
    """The pairs of tokens that make a third, in the order that ``generate_merges`` of transformers gives them.

    By score, descending (the id, ascending, without ``vocab_scores``), then by the lengths of both, then as they come.
    Within one token no two pairs have the same lengths, so that ids never decide.
    """
    scores: Mapping[str, float] = vocab if vocab_scores is None else dict(vocab_scores)
    skipped = set(skip_tokens or ())
    pieces = vocab.keys() - skipped if skipped else vocab
    direction = 1 if vocab_scores is None else -1
    pairs: list[tuple[str, str]] = []
    ranks: list[float] = []
    begins: list[int] = []
    ends: list[int] = []
    for token, score in scores.items():
        if token in skipped:
            continue
        length, rank = len(token), direction * score
        for cut in range(1, length):
            # Few ends are tokens, most beginnings are.
            if (end := token[cut:]) in pieces and (begin := token[:cut]) in pieces:
                pairs.append((begin, end))
                ranks.append(rank)
                begins.append(direction * cut)
                ends.append(direction * (length - cut))
    return [pairs[k] for k in np.lexsort((ends, begins, ranks)).tolist()]
