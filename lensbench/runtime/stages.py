"""Finished work that a later run can reuse: each stage's files in a folder of their own, keyed by what they depend on."""

import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.runtime.files import sha256, write_json
from lensbench.runtime.mapped import give_back_pages
from lensbench.runtime.memory import release_memory
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.sealed import Damaged, load_sealed, save_sealed
from lensbench.runtime.texts import read_json

RECORD = "stage.json"


RECORDED: dict[str, Any] = {"key": str, "seconds": int | float, "peak_gib": int | float, "files": dict}
"""What a stage's record says, and its types"""


ANEW = "delete its folder to compute it anew"


OLD = ".old"


BEGUN = "key.json"


def peak_gib() -> float:
    """Most memory that this process has held so far, GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


class NotFinished(Exception):
    """A stage that is not there, asked for without a way to compute it."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: where its files are, and the digest that what depends on it takes into its own key."""

    folder: Path
    digest: str
    reused: bool

    def checksums(self, ending: str) -> dict[str, str]:
        """The SHA-256 (hex) of those of its files whose names end so, by name."""
        files: dict[str, str] = _said(self.folder, RECORD)["files"]
        return {name: checksum for name, checksum in files.items() if name.endswith(ending)}


@dataclass
class Stages:
    """The stages of one run folder.

    A stage runs again exactly when its key changed: its own settings and the digests of the stages it reads. It is
    computed in a folder beside its place, so that an interrupted one leaves what it had (checkpoints) for the next run.
    Of several processes the first one writes; the others must see the same folders.
    """

    root: Path
    ranks: Ranks = ALONE
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    """Most memory that the process had held when a stage was finished, GiB."""
    looking: bool = False
    """Whether folders are only looked at: nothing is tidied up or moved, and nothing can be computed"""

    def run(
        self, name: str, key: Mapping[str, Any], compute: Callable[[Path], None] | None, *, together: bool = False
    ) -> Stage:
        """The stage's files, computed by ``compute(folder)`` unless they are there already.

        Of several processes the first one computes alone, or all do ``together``, the others into folders that are
        thrown away. Raises :class:`LensbenchError` where a finished file is no longer what was written, and
        :class:`NotFinished` where there is nothing and ``compute`` is None.
        """
        digest = self.digest_of(key)
        folder = self.root / name
        record = self.ranks.agreed(lambda: self._finished(folder, digest))
        if record is not None:
            self.seconds[name], self.peak_gib[name] = record["seconds"], record["peak_gib"]
            return Stage(folder, digest, reused=True)
        if compute is None:
            raise NotFinished(name)
        if self.ranks.first:
            self._compute(name, folder, digest, compute)
        elif together:
            with tempfile.TemporaryDirectory(prefix="lensbench-") as aside:
                compute(Path(aside))
        # Until it is there, and what it took.
        self.seconds[name], self.peak_gib[name] = self.ranks.told(
            (self.seconds.get(name, 0.0), self.peak_gib.get(name, 0.0))
        )
        return Stage(folder, digest, reused=False)

    @staticmethod
    def digest_of(key: Mapping[str, Any]) -> str:
        """SHA-256 (hex) of a key."""
        return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()

    def finished(self) -> set[str]:
        """The names of the stages that are there, whether they fit the settings of now or not."""
        return {path.parent.name for path in self.root.glob(f"*/{RECORD}")}

    def took(self, names: set[str]) -> dict[str, float]:
        """The seconds that some of the stages that are there took, in the order in which they were finished."""
        records = [self.root / name / RECORD for name in names]
        there = [path for path in records if path.is_file()]
        there.sort(key=lambda path: (path.stat().st_mtime, path.parent.name))
        return {path.parent.name: float(_said(path.parent, RECORD)["seconds"]) for path in there}

    def begun(self, name: str, key: dict[str, Any]) -> float | None:
        """How many seconds an earlier attempt at a stage took, whose pieces will be taken up; None without one."""
        digest = self.digest_of(key)
        try:
            record = self._record(self.root / f"{name}.partial", BEGUN)
        except LensbenchError:
            return None  # damaged, and computed anew
        return float(record["seconds"]) if record is not None and record.get("key") == digest else None

    def _finished(self, folder: Path, digest: str) -> dict[str, Any] | None:
        """The record of a stage that is there, whole, and of this key."""
        if self.looking:
            record = self._record(folder)
            if record is None or record.get("key") != digest:
                return None
            self._verify(folder, record)
            return record
        partial, old = (folder.with_name(folder.name + end) for end in (".partial", OLD))
        shutil.rmtree(old, ignore_errors=True)
        for place in (folder, partial):
            record = self._record(place)
            if record is not None and record.get("key") == digest:
                self._verify(place, record)
                if place is partial:  # killed between its last file and its move
                    _move_into_place(partial, folder)
                return record
        return None

    def _compute(self, name: str, folder: Path, digest: str, compute: Callable[[Path], None]) -> None:
        partial = folder.with_name(f"{name}.partial")
        try:
            begun = self._record(partial, BEGUN)
        except LensbenchError:
            begun = None  # nothing that is not computed anew
        if partial.exists() and (begun is None or begun.get("key") != digest):
            shutil.rmtree(partial)
            begun = None
        partial.mkdir(parents=True, exist_ok=True)
        spent, start = float((begun or {}).get("seconds", 0.0)), time.perf_counter()
        write_json(partial / BEGUN, {"key": digest, "seconds": spent})
        release_memory()
        try:
            compute(partial)
        except BaseException:
            # What an interrupted attempt took counts too.
            write_json(partial / BEGUN, {"key": digest, "seconds": spent + time.perf_counter() - start})
            raise
        self.seconds[name] = round(spent + time.perf_counter() - start, 2)
        self.peak_gib[name] = peak_gib()
        for left in partial.rglob("*.partial"):  # of a write that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != BEGUN)
        checksums = {p.relative_to(partial).as_posix(): sha256(p) for p in files}
        record = {"key": digest, "seconds": self.seconds[name], "peak_gib": self.peak_gib[name], "files": checksums}
        write_json(partial / RECORD, record)
        _move_into_place(partial, folder)

    def _record(self, folder: Path, name: str = RECORD) -> dict[str, Any] | None:
        return _said(folder, name) if (folder / name).is_file() else None

    def _verify(self, folder: Path, record: dict[str, Any]) -> None:
        for name, checksum in record["files"].items():
            path = folder / name
            if not path.is_file() or sha256(path) != checksum:
                what = "is missing" if not path.is_file() else "is damaged (its checksum differs)"
                raise LensbenchError(f"{path} {what}; delete {folder} to compute it anew")


def _said(folder: Path, name: str) -> dict[str, Any]:
    """What the record of a stage says; raises :class:`LensbenchError` for a damaged one."""
    path, remedy = folder / name, f"delete {folder} to compute it anew"
    content = read_json(path, remedy)
    kinds = RECORDED if name == RECORD else {key: RECORDED[key] for key in ("key", "seconds")}
    if set(content) != set(kinds) or not all(isinstance(content[key], kind) for key, kind in kinds.items()):
        raise LensbenchError(f"{path} is damaged: it does not say what a stage's record says; {remedy}")
    return content


def _move_into_place(partial: Path, folder: Path) -> None:
    """What was there before is whole until the new is: killed anywhere in here, one of the two is found."""
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Pieces:
    """Finished pieces of one long computation: interrupted, it goes on behind the last of them.

    Each is a dictionary of tensors in a sealed safetensors file of its own, moved into place whole. Without a folder
    nothing is kept and every piece is computed. Of several processes the first one keeps them, and all go on with its own.
    """

    folder: Path | None = None
    ranks: Ranks = ALONE
    mapped: bool = False
    """Whether finished pieces are read from their files when they are used, and take no memory; of one process alone"""

    def __contains__(self, name: str) -> bool:
        """Whether a file of this piece is there."""
        return self.folder is not None and (self.folder / f"{name}.safetensors").is_file()

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The piece ``name``, computed unless it is there; a damaged file is computed anew."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.safetensors"
        mapped = self.mapped and self.ranks.size == 1
        kept = self.ranks.told(_kept(path, mapped) if self.ranks.first else None)
        if kept is not None:
            return kept
        content = {k: v.detach().cpu() for k, v in compute().items()}
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_sealed(content, path)
        give_back_pages()  # of what the piece was made from
        if mapped:
            return _kept(path, mapped) or content
        # What the first one solved, not what each did: processors differ in the last digits.
        return self.ranks.told(content)

    def clear(self) -> None:
        """Forget all of them, the whole being finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _kept(path: Path, mapped: bool) -> dict[str, Tensor] | None:
    """A piece that is there and whole."""
    if not path.is_file():
        return None
    try:
        return load_sealed(path, mapped=mapped)[0]
    except Damaged:
        path.unlink(missing_ok=True)  # computed anew
        return None


NOTHING_KEPT = Pieces()
