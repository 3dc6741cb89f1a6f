"""Tensors in safetensors files that know what they hold: a damaged one is never read as if it were whole.

For files that a run may be interrupted over, before the checksums of a finished stage are there.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.runtime.files import write_atomically
from lensbench.runtime.mapped import give_back_pages, kept_in_file

SEAL = "sha256"

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""As safetensors calls them"""

GIVE_BACK_EVERY = 2**27
"""Bytes written of tensors that may lie in files themselves, after which their pages are given back"""


def read_tensors(path: Path, remedy: str = "", *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises :class:`LensbenchError` that names it for one that is damaged.

    ``mapped``: they lie in the file, in pages that can be given back; nothing may change them.
    """
    try:
        tensors = load_file(path)
        return _mapped_tensors(path) if mapped else tensors
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        empty = path.is_file() and not path.stat().st_size
        reason = "it is empty" if empty else next(iter(str(error).splitlines()), type(error).__name__)
        raise LensbenchError(f"{path} is damaged: {reason}{remedy and '; '}{remedy}") from error


class Damaged(Exception):
    """A file that does not hold what was written; the reason."""


def seal_of(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """SHA-256 (hex) of names, types, shapes and bytes of tensors, and of the facts beside them."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        content = hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}\n".encode())
    for name, fact in sorted(facts.items()):
        whole.update(f"{name}={fact}\n".encode())
    return whole.hexdigest()


def save_sealed(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write tensors and facts with their seal, moved into place whole."""
    facts = dict(facts or {})
    # Copies: safetensors refuses tensors that share memory.
    content = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    metadata = {**facts, SEAL: seal_of(content, facts)}
    write_atomically(path, lambda partial: save_file(content, partial, metadata=metadata))


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors on the CPU, in float32, to a safetensors file, one after the other, moved into place whole.

    safetensors' own writer holds a copy of all of them in memory; the bytes are the same.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            given_back = file.write(struct.pack("<Q", len(described)) + described)
            for _, tensor in sorted(tensors.items()):
                for part in tensor.detach() if tensor.dim() > 1 else [tensor.detach()]:
                    file.write(part.float().contiguous().numpy().data)
                if file.tell() - given_back > GIVE_BACK_EVERY:  # what was read of tensors that lie in files
                    give_back_pages()
                    given_back = file.tell()

    write_atomically(path, write)


def load_sealed(path: Path, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Inverse of :func:`save_sealed`; raises :class:`Damaged` for a file that is truncated, changed or has no seal.

    ``mapped``: tensors lie in the file, which must not change while they are used, and take no memory of their own.
    """
    with _told_as_damage():
        checked = _identity(path)
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
        # Copies: what load_file returns lies in the file, which may be gone before they are.
        tensors = {k: v if mapped else v.clone() for k, v in load_file(path).items()}
    if facts.pop(SEAL, None) != seal_of(tensors, facts):
        raise Damaged("its checksum differs")
    if not mapped:
        return tensors, facts
    # Mapped anew: the check has read every page of the first mapping, and they count as this process's memory.
    with _told_as_damage():
        tensors = _mapped_tensors(path) if _identity(path) == checked else {}
        if _identity(path) != checked:
            raise Damaged("it was replaced while it was read")
    return tensors, facts


def _mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in a mapping whose pages can be given back: safetensors' own cannot."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    content = kept_in_file(np.memmap(path, dtype=np.uint8, mode="c"))
    found = {}
    for name, one in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in one["data_offsets"])
        dtype = TYPES[one["dtype"]]
        part = content[begin:end] if begin % dtype.itemsize == 0 else content[begin:end].clone()
        found[name] = part.view(dtype).view(one["shape"])
    return found


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes where another file takes the place of this one."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _told_as_damage() -> Iterator[None]:
    """A context that raises :class:`Damaged` for whatever a file that cannot be read raises."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        struct.error,
    ) as error:
        raise Damaged(str(error).splitlines()[0]) from error
