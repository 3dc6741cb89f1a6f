"""GGUF files read in seconds: the vocabulary, which the package gguf takes apart byte by byte, is read at once.

Names, values and weights are those that the package gguf gives, bit for bit: only the work is done in larger pieces.
"""

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as converted

ALREADY_READ = -1
"""In place of the type of a field: transformers converts values by type, and leaves one of an unknown type as it is"""

GROUP = 2**16
"""Weights of one row that the package gguf converts at once; it takes 16 rows"""

_LOCK = threading.RLock()


@contextlib.contextmanager
def quick_reading() -> Iterator[None]:
    """transformers reads GGUF files through the reader of this module inside; without the package gguf, nothing changes."""
    try:
        import gguf
    except ImportError:
        yield
        return
    replaced = {
        "GGUFReader": _reader(gguf),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
        "dequantize": _in_large_groups(gguf.dequantize),
    }
    with _LOCK:
        originals = {name: getattr(gguf, name) for name in replaced}
        for name, quick in replaced.items():
            setattr(gguf, name, quick)
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(gguf, name, original)


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


def _reader(gguf: Any) -> type:
    """The reader of the package gguf, with lists of strings and numbers read at once."""
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
        """Reads a file of metadata and tensors."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            """Bytes taken, parts, the indices of those parts that are the value, and its types."""
            if raw_type != kinds.ARRAY or self.byte_order != "I" or struct.pack("=H", 1) != struct.pack("<H", 1):
                found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
                return found
            item, count = struct.unpack_from("<IQ", self.data, orig_offs)
            # transformers takes a list of one for its value.
            if item == kinds.ARRAY or count < 2:
                found = super()._get_field_parts(orig_offs, raw_type)
                return found
            begin = orig_offs + 12
            if item == kinds.STRING:
                values, end = _strings(self.data, begin, count)
            else:
                number = np.dtype(self.gguf_scalar_to_np[kinds(item)])
                values = np.frombuffer(self.data, number, count, begin).tolist()
                end = begin + count * number.itemsize
            return end - orig_offs, [values], [0], [ALREADY_READ]

    return Reader


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


def _in_large_groups(dequantize: Callable[..., NDArray[Any]]) -> Callable[..., NDArray[Any]]:
    """``dequantize`` of the package gguf on fewer and longer rows: its blocks lie one behind the other, across rows too."""

    def quick(data: NDArray[Any], qtype: Any) -> NDArray[Any]:
        if data.ndim != 2:
            return dequantize(data, qtype)
        rows = data.shape[0]
        joined = max(k for k in range(1, max(GROUP // max(data.shape[1], 1), 1) + 1) if rows % k == 0)
        return dequantize(data.reshape(rows // joined, -1), qtype).reshape(rows, -1)

    return quick
