"""What both sides of a comparison share: the model, the text, held-out tokens, the clock and the machine's own rate."""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from torch import Tensor

from lensbench.data import corpus
from lensbench.data.tokens import TokenizedDocument, tokenize
from lensbench.data.windows import Windows, sample_windows
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import score
from lensbench.models.pretrained import load_pretrained
from lensbench.runtime.environment import git_revision
from lensbench.runtime.files import sha256, write_atomically, write_json
from lensbench.statistics import bootstrap_weights, interval
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream

LENGTH = 258
"""Tokens of a window: positions 1..256 are used (0 is left out, the last has no next token), so four make 1024."""

console = Console(width=None if sys.stdout.isatty() else 120)

Where = int | str
"""A layer, or 'shared'."""


def say(line: str) -> None:
    """A line of progress with the time of day."""
    console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, soft_wrap=True)


def sha256_of(text: str) -> str | None:
    """Of the file that a corpus is, where it is one file; ``text_checksum`` is that of the documents read from it."""
    path = Path(text.removeprefix("file:"))
    if not text.startswith("file:") or not path.is_file():
        return None
    return sha256(path)


def numbers_of(given: str, option: str = "--layers") -> list[int]:
    """Numbers given as ``5,15,25``; raises :class:`LensbenchError` for anything else."""
    if not all(part.strip().isdecimal() for part in given.split(",")):
        raise LensbenchError(f"{option} is {given!r}: give numbers separated by commas, such as 5,15,25")
    return [int(part) for part in given.split(",")]


def use_threads(threads: int) -> None:
    """Raises :class:`LensbenchError` for fewer than one."""
    if threads < 1:
        raise LensbenchError(f"--threads is {threads}: at least 1")
    torch.set_num_threads(threads)


def matmul_rate(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", size: int = 2048) -> float:
    """FLOP/s of ``torch.mm`` of ``size x size`` matrices here and now: the best of twelve, or of those begun in 3 s.

    Processors without bfloat16 take a hundred times as long in it, so a product of an eighth of the size is tried
    first; where that alone would mean half a minute for a large one, its rate is the answer.
    """
    rate = 0.0
    for side in (size // 8, size):
        if rate and 2 * side**3 / rate > 30:
            break
        a = torch.randn(side, side).to(device, dtype)
        times, begun = [], now(torch.device(device))
        while not times or (len(times) < 12 and times[-1] - begun < 3):
            torch.mm(a, a)
            times.append(now(torch.device(device)))
        rate = 2 * side**3 / min(b - a for a, b in pairwise([begun, *times]))
    return rate


def now(device: torch.device) -> float:
    """Wall-clock seconds, after what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory() -> float:
    """Largest resident size of this process so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Task:
    """A model with its text, split as everywhere in lensbench; a model trained elsewhere is fitted on train + fit."""

    source: str
    text: str
    stream: ResidualStream
    documents: dict[str, list[TokenizedDocument]]
    checksum: str
    length: int = LENGTH
    revision: str | None = None
    """Of the code as it was loaded; later, tables that were written make the checkout differ."""

    @classmethod
    def load(cls, source: str, text: str, *, device: torch.device | str = "cpu", length: int = LENGTH) -> "Task":
        """The model of ``source`` on a text, split as a suite splits it; windows have ``length`` tokens."""
        revision = git_revision()
        loaded = load_pretrained(source, device=device)
        fractions = dict(corpus.FRACTIONS)
        if not loaded.trained_here:
            fractions = {**fractions, "train": 0.0, "fit": fractions["train"] + fractions["fit"]}
        read = corpus.load_corpus(text, fractions=fractions)
        documents = {split: tokenize(loaded.tokenizer, read.splits[split]) for split in corpus.SPLITS[1:]}
        return cls(source, text, ResidualStream(loaded.model), documents, read.checksum, length, revision)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.stream.device

    @property
    def forward_flops(self) -> int:
        """FLOPs of the blocks of the model for one token: two for every weight but the embedding's and the head's."""
        inside = sum(p.numel() for p in self.stream.model.parameters() if p.ndim > 1)
        outside = {id(m.weight): m.weight.numel() for m in (
            self.stream.model.get_input_embeddings(), self.stream.model.get_output_embeddings())}  # fmt: skip
        return 2 * (inside - sum(outside.values()))

    @property
    def unembed_flops(self) -> int:
        """FLOPs of one product of one state with the unembedding."""
        return 2 * self.stream.readout.weight.numel()

    def check_layers(self, layers: list[int]) -> None:
        """Raises :class:`LensbenchError` for a layer that the model does not have."""
        if max(layers) >= self.stream.layers:
            raise LensbenchError(
                f"layer {max(layers)} is not there: {self.source} has layers 0 to {self.stream.layers - 1}"
            )

    def windows(self, split: str, sequences: int, positions: int, seed: int = 0) -> Windows:
        """Windows of a split with so many scored positions each."""
        return sample_windows(
            self.documents[split], n_sequences=sequences, length=self.length, positions=positions, seed=seed
        )

    def whole_windows(self, sequences: int, seed: int = 0) -> Windows:
        """Fresh windows of the fit split with every position in use; short ones are left out."""
        positions = self.length - 2
        drawn = self.windows("fit", 10**9, positions, seed)
        full = np.flatnonzero(drawn.valid.all(1))[:sequences]
        return rows_of(drawn, full)

    def whole_tokens(self) -> int:
        """Used tokens of all the windows that :meth:`whole_windows` can give."""
        return sum(len(document.ids) // self.length for document in self.documents["fit"]) * (self.length - 2)

    def held_out(self, split: str, sequences: int, positions: int, cache: Path | None = None) -> Capture:
        """Few positions of many windows of ``dev`` or ``eval``, kept in ``cache`` between the parts of a benchmark."""
        path = None if cache is None else cache / f"{split}-{sequences}x{positions}.npz"
        windows = self.windows(split, sequences, positions)
        stored = np.load(path) if path is not None and path.exists() else None
        if stored is not None and set(stored.files) == {f.name for f in fields(Capture)} - {"ranks"}:
            tensors = {
                k: torch.from_numpy(stored[k]) if k not in ("window", "document", "target_bytes") else stored[k]
                for k in stored.files
            }
            return Capture(**{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in tensors.items()})
        captured = capture(self.stream, windows, batch=4)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = {k: v for k, v in vars(captured).items() if k != "ranks"}
            arrays = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in known.items()}

            def save(partial: Path) -> None:
                with open(partial, "wb") as file:  # a path would be given the suffix .npz
                    np.savez(file, **arrays)

            write_atomically(path, save)
        return captured

    def kl(self, maps: AffineMaps, where: Where, captured: Capture) -> float:
        """Held-out KL of one lens, nats/token; for the shared lens the tokens are dealt out over the layers."""
        return mean_kl(self.kl_by_document(maps, where, captured))

    def measured(
        self, maps: AffineMaps, where: Where, held_out: dict[str, Capture], documents: Path, **key: object
    ) -> dict[str, float]:
        """Columns ``SPLIT_kl`` of one lens; the sums of eval by document are kept in ``documents`` under the key."""
        sums = {split: self.kl_by_document(maps, where, captured) for split, captured in held_out.items()}
        keep_documents(documents, sums["eval"], **key)
        return {f"{split}_kl": mean_kl(table) for split, table in sums.items()}

    def kl_by_document(self, maps: AffineMaps, where: Where, captured: Capture) -> pd.DataFrame:
        """Sums of KL over the tokens of each document (columns document, kl, tokens); every layer of the shared lens
        weighs the same, however many of the tokens it got."""
        readout, layers, count = self.stream.readout, captured.layers, len(captured)
        kl, weight = np.empty(count), np.ones(count)
        dealt = [(int(where), np.arange(count))] if where != "shared" else [
            (layer, np.arange(layer, count, layers)) for layer in range(layers)]  # fmt: skip
        for layer, at in dealt:
            part = captured.take(torch.from_numpy(at).to(self.device))
            kl[at] = score(readout, part.states[layer], maps, part).kl.double().cpu().numpy()
            weight[at] = count / (len(dealt) * len(at))
        frame = pd.DataFrame({"document": captured.document, "kl": weight * kl, "tokens": weight})
        return frame.groupby("document", as_index=False).sum()

    def describe(self) -> dict[str, Any]:
        """What a reader needs to tell whether two results measure the same thing."""
        return {
            "model": self.source if not self.source.startswith(("path:", "gguf:")) else Path(self.source).name,
            "model_hash": self.stream.readout.unembedding_hash(),
            "text": self.text if not self.text.startswith("file:") else "file:" + Path(self.text).name,
            "text_checksum": self.checksum,
            "text_sha256": sha256_of(self.text),
            "layers": self.stream.layers,
            "d_model": self.stream.d_model,
            "vocab_size": self.stream.vocab_size,
            "forward_mflop_per_token": self.forward_flops / 1e6,
            "unembed_mflop_per_token": self.unembed_flops / 1e6,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "git_revision": self.revision,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def rows_of(windows: Windows, rows: np.ndarray) -> Windows:
    """Some of the windows."""
    return Windows(
        windows.ids[rows], windows.lengths[rows], windows.positions[rows], windows.valid[rows],
        windows.documents[rows], windows.document_names, windows.sequence[rows], windows.next_bytes[rows],
    )  # fmt: skip


def steps_of(windows: Windows, per_step: int) -> Iterator[Windows]:
    """The windows in their order, ``per_step`` at a time."""
    for start in range(0, len(windows.ids) - per_step + 1, per_step):
        yield rows_of(windows, np.arange(start, start + per_step))


@dataclass
class Ledger:
    """One CSV of a benchmark: rows are added as they are measured, written whole each time, and found again on resume."""

    path: Path
    keys: tuple[str, ...]

    def rows(self) -> pd.DataFrame:
        """All rows that were added."""
        if not self.path.exists():
            return pd.DataFrame(columns=list(self.keys))
        return pd.read_csv(self.path, float_precision="round_trip")

    def has(self, **key: object) -> bool:
        """Whether there is a row with this key."""
        return len(self.at(**key)) > 0

    def at(self, **key: object) -> pd.DataFrame:
        """The rows with this key."""
        known = self.rows()
        return known[self._at(known, key)]

    @staticmethod
    def _at(known: pd.DataFrame, key: dict[str, Any]) -> np.ndarray:
        """The rows with this key: a number is the same as 1, as 1.0 and as the word that a mixed column makes of it."""

        def word(value: Any) -> str:
            try:
                return repr(float(value))
            except ValueError:
                return str(value)

        same = [known[name].map(word).to_numpy() == word(value) for name, value in key.items()]
        return np.logical_and.reduce(same) if len(known) else np.zeros(0, bool)

    def add(self, **row: object) -> None:
        """Write a row, in place of one with the same key."""
        known = self.rows()
        kept = known[~self._at(known, {name: row[name] for name in self.keys})]
        table = pd.concat([kept, pd.DataFrame([row])], ignore_index=True) if len(kept) else pd.DataFrame([row])
        # Keys are looked up by their value, so they keep all their digits.
        measured = table.select_dtypes("float").columns.difference(list(self.keys))
        table[measured] = table[measured].map(lambda value: float(f"{value:.6g}"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda p: table.to_csv(p, index=False))


def mean_kl(sums: pd.DataFrame) -> float:
    """Nats/token of a table of :meth:`Task.kl_by_document`."""
    return float(sums["kl"].sum() / sums["tokens"].sum())


def keep_documents(path: Path, sums: pd.DataFrame, **key: object) -> None:
    """Adds the sums of one lens by document to a table, in the place of what it held under the same key."""
    columns = {name: str(value) for name, value in key.items()}
    sums = sums.assign(**columns)[[*columns, "document", "kl", "tokens"]]
    if path.exists():
        known = pd.read_parquet(path)
        other = known[list(columns)] != pd.Series(columns)
        sums = pd.concat([known[other.any(axis=1)], sums], ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: sums.to_parquet(p, index=False))


def paired_difference(one: pd.DataFrame, other: pd.DataFrame, *, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean KL of ``one`` less that of ``other`` with its 95 % interval: paired bootstrap over documents, lenses fixed.

    Raises :class:`LensbenchError` where the two were not measured on the same documents.
    """
    one, other = one.sort_values("document"), other.sort_values("document")
    if not np.array_equal(one["document"], other["document"]) or not np.allclose(one["tokens"], other["tokens"]):
        raise LensbenchError("the two lenses were not measured on the same documents: measure both again")
    tokens = one["tokens"].to_numpy()
    lower = one["kl"].to_numpy() - other["kl"].to_numpy()
    weights = bootstrap_weights(len(tokens), draws, seed=0)
    low, high = interval((weights @ lower) / (weights @ tokens))
    return float(lower.sum() / tokens.sum()), float(low), float(high)


def checksums(folder: Path, name: str) -> dict[str, str]:
    """sha256 of each table of a part."""
    found = [p for p in sorted(folder.glob(f"{name}*")) if p.suffix in (".csv", ".parquet")]
    return {p.name: sha256(p) for p in found}


def write_table(path: Path, table: pd.DataFrame, digits: str) -> None:
    """Write a table as CSV whole; ``digits``: the format of its numbers."""
    write_atomically(path, partial(table.to_csv, index=False, lineterminator="\n", float_format=digits))


@contextmanager
def refusals() -> Iterator[None]:
    """A program's work, of which a :class:`LensbenchError` is told in one line and ends it with exit code 2."""
    try:
        yield
    except LensbenchError as error:
        console.print(f"lensbench: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def write_description(folder: Path, name: str, content: dict[str, Any]) -> None:
    """``NAME.json``: the settings and machine behind the tables of a part, with the sha256 of each table."""
    content = {**content, "tables": checksums(folder, name)}
    write_json(folder / f"{name}.json", json.loads(json.dumps(content, default=str)))
