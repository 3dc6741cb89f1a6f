"""The run folder: tables in and out, checked, and the lock that one run holds on it."""

import contextlib
import gzip
import lzma
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import by_the_norm_of_j
from lensbench.results.manifest import MANIFEST, Manifest, read_manifest
from lensbench.results.schema import (
    ADDED,
    ADDED_COLUMNS,
    ASKED_COLUMNS,
    SCHEMA,
    TEXT_COLUMNS,
    TEXT_COLUMNS_OF,
    columns_of,
    no_rows,
)
from lensbench.results.verdicts import as_now
from lensbench.runtime.files import sha256, write_atomically, write_json
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.stages import BEGUN
from lensbench.runtime.texts import COPY_AGAIN, read_json

OWNER = "run.json"
"""Whose folder it is"""


STAGES = "stages"
"""The folder of finished work in a run folder"""


PAGE = "report.html"
"""The page of a finished run"""


LOCK = ".lock"


@contextlib.contextmanager
def claimed(
    folder: Path, name: str, threads: int | None = None, ranks: Ranks = ALONE, facts: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """The run folder, locked for the suite, sweep or study ``name``, with ``threads`` for torch (None: as many as now).

    Creates the folder. At the end the lock is released and torch has its threads back. A folder in which nothing is worth
    keeping when the work fails is removed if it was made here, and free for another suite if not. Of several processes
    the first one claims it; all must see it. ``facts``: what else :data:`OWNER` says, for commands on this machine alone:
    the ``command`` that goes on with unfinished work, and the ``sources`` of models.

    Raises :class:`LensbenchError` for a folder of another suite, one that holds something else, or one in use.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock: list[FileLock] = []
    ranks.agreed(lambda: lock.append(lock_run_folder(folder, name, facts)))
    before = torch.get_num_threads()
    try:
        if not (folder / OWNER).is_file():
            raise LensbenchError(
                f"process {ranks.rank} does not see {folder}: give --out a folder that all machines share"
            )
        torch.set_num_threads(threads or before)
        yield
    except BaseException:
        if lock:
            give_up(folder, made)
        raise
    finally:
        torch.set_num_threads(before)
        if lock:
            lock[0].release()


def lock_run_folder(folder: Path, name: str, facts: Mapping[str, Any] | None = None) -> FileLock:
    """Create ``folder``, lock it, and write into it whose it is; the lock is held until it is released.

    Raises :class:`LensbenchError` for a folder of another suite, one that holds something else, or one in use.
    """
    if folder.exists() and not folder.is_dir():
        raise LensbenchError(f"{folder} is a file; give --out a folder")
    # A run that was killed before it could write whose folder this is left no more than its lock.
    holds_something = folder.is_dir() and any(p.name not in (LOCK, f"{OWNER}.partial") for p in folder.iterdir())
    if holds_something and owner_of(folder) is None:
        raise LensbenchError(f"{folder} is not empty and not a run folder; give --out a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LensbenchError(f"another run is writing to {folder}; wait for it or give --out another folder") from error
    owner = owner_of(folder)
    if owner not in (None, name):
        if holds_work(folder):
            lock.release()
            raise LensbenchError(f"{folder} holds a run of suite {owner!r}, not {name!r}; give --out another folder")
        shutil.rmtree(folder / STAGES, ignore_errors=True)
    write_json(folder / OWNER, {"suite": name, **(facts or {})})
    return lock


def holds_work(folder: Path) -> bool:
    """Whether a run folder holds anything that took time: a finished stage, a part of one, or results."""
    return any(
        path.is_file() and path.name not in (LOCK, OWNER, f"{OWNER}.partial", BEGUN) and path.suffix != ".lock"
        for path in folder.rglob("*")
    )


def give_up(folder: Path, made: list[Path]) -> None:
    """Remove what a failed command made for nothing: the folders ``made``, innermost first, if no work is in them."""
    if folder not in made or holds_work(folder):
        return
    shutil.rmtree(folder)
    for parent in made[1:]:
        if any(parent.iterdir()):
            return
        parent.rmdir()


def earlier_manifest(folder: Path) -> Manifest | None:
    """The manifest of the finished run in a folder; None where there is none that can be read: it is written anew."""
    try:
        return read_manifest(folder)
    except LensbenchError:
        return None


def in_checkout_results(folder: Path) -> bool:
    """Whether a folder lies in ``results/`` of a checkout of lensbench, whose runs are committed."""
    return any(
        parent.name == "results" and (parent.parent / "lensbench" / "errors.py").is_file()
        for parent in folder.resolve().parents
    )


def owner_of(folder: Path) -> str | None:
    """The suite, sweep or study whose results a folder holds, finished or not; None where it holds none."""
    # What is finished counts, whoever claimed the folder since.
    for name, keys in ((MANIFEST, ("suite_name",)), (MANIFEST, ("calibration", "name")), (OWNER, ("suite",))):
        try:
            found: Any = read_json(folder / name)
            for key in keys:
                found = found[key]
            return str(found)
        except (LensbenchError, KeyError, TypeError):
            continue  # missing, or not of lensbench: the next one may say
    return None


def refuse_no_folder(folder: Path) -> None:
    """Raise :class:`LensbenchError` where there is no folder of this name."""
    if folder.is_file():
        raise LensbenchError(f"{folder} is a file: give the folder of a run")
    if not folder.is_dir():
        raise LensbenchError(f"there is no folder {folder}: give the folder of a run")


def refuse_unfinished(folder: Path) -> None:
    """Raise :class:`LensbenchError` for the folder of a run that is not finished, with the command that goes on."""
    if (folder / MANIFEST).is_file() or not (folder / OWNER).is_file():
        return
    try:
        facts: Any = read_json(folder / OWNER)
        suite, command = facts["suite"], facts.get("command")
    except (LensbenchError, KeyError, TypeError, AttributeError):
        return  # not of lensbench: what is missing is said
    stages = sum(1 for path in (folder / STAGES).glob("*/stage.json"))
    raise LensbenchError(
        f"{folder} holds an unfinished run of {suite} ({stages} finished stage{'s' * (stages != 1)}); to go on: "
        f"{command or f'lensbench run {suite} --out {folder} (with the options of before)'}"
    )


NO_SUMS = "left out, with the draws of the decomposition: lensbench compare needs the run itself"
"""What a manifest says of sums that an export leaves out"""


SUMS = "cluster_sums.parquet"
"""The sums by cluster that comparisons read"""


SEQUENCES = "per_sequence.parquet"
"""All sums by sequence: where a suite asks for them, and in runs of earlier versions"""


DIGITS = 9
"""Digits of a number in a table: all that a float32 has"""


def digits(value: float) -> str:
    """A number as tables have it: :data:`DIGITS` digits, or all of a whole number."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.{DIGITS}g}"


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """One CSV with exactly the columns of its schema, in their order, but for those that nobody asked for."""
    unknown = (set(table.columns) ^ set(SCHEMA[name])) - set(ASKED_COLUMNS.get(name, ()))
    if unknown:
        raise ValueError(f"{name}: columns differ from the schema: {sorted(unknown)}")
    write = partial(numbered(name, table).to_csv, index=False, lineterminator="\n", float_format=digits)
    write_atomically(folder / name, write)


def write_csv(path: Path, table: pd.DataFrame, digits: str | None = "%.6g") -> None:
    """A table of a study as CSV; ``digits``: of floats, six by default; None: all."""
    write = partial(table.to_csv, index=False, lineterminator="\n", float_format=digits)
    write_atomically(path, write)


def numbered(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns of its schema, in their order; columns of numbers and gaps are numbers, not objects.

    Columns that nobody asked for are left out.
    """
    columns, text = columns_of(name, table), TEXT_COLUMNS | TEXT_COLUMNS_OF.get(name, set())
    numbers = {c: pd.to_numeric(table[c]) for c in columns if c not in text and table[c].dtype == object}
    return table.assign(**numbers)[columns]


def write_sequences(path: Path, sequences: pd.DataFrame) -> None:
    """Sums by sequence, as a file: sums are floats, everything else repeats itself."""
    write_floats(path, sequences, ["kl", "ce", "movement", "top1"])


def write_sums(path: Path, sums: pd.DataFrame) -> None:
    """``cluster_sums.parquet`` from :func:`lensbench.results.sums.compared_sums`."""
    write_floats(path, sums.rename(columns={"document": "cluster"}), ["kl", "ce", "movement"])


def write_floats(path: Path, table: pd.DataFrame, floats: list[str]) -> None:
    """A Parquet file of columns of ``floats``, which share their bytes' places, and others, which repeat themselves."""
    layout = {"use_byte_stream_split": floats, "use_dictionary": [c for c in table.columns if c not in floats]}
    write = partial(table.to_parquet, index=False, compression="zstd", compression_level=19, **layout)
    write_atomically(path, write)


UPDATE_DRAWS = "update_draws.parquet"


def write_update_draws(path: Path, draws: pd.DataFrame) -> None:
    """``update_draws.parquet``: columns model, seed, index, value; a model's draws of an index in their order."""
    write_floats(path, draws, ["value"])


PACKED, GZIPPED = ".xz", ".gz"
"""What the name of a packed table ends with: today, and in earlier versions"""


def plain_name(name: str) -> str:
    """The name of a table without the ending of a packed one."""
    return name.removesuffix(PACKED).removesuffix(GZIPPED)


def table_file(folder: Path, name: str) -> Path | None:
    """The file of a table: ``NAME.csv``, or packed as ``NAME.csv.xz`` or ``NAME.csv.gz``; None where there is none."""
    files = (folder / f"{name}{end}" for end in ("", PACKED, GZIPPED))
    return next((path for path in files if path.is_file()), None)


def table_bytes(path: Path) -> bytes:
    """The CSV of a table's file, packed or not."""
    content = path.read_bytes()
    unpacked = {PACKED: lzma.decompress, GZIPPED: gzip.decompress}.get(path.suffix)
    return content if unpacked is None else unpacked(content)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV of a run folder; raises :class:`LensbenchError` where it is missing, unreadable or not what its name says."""
    found = table_file(path.parent, path.name)
    if found is None:
        raise LensbenchError(f"{path.parent} has no {path.name}: it is not the folder of a finished run of lensbench")
    text = TEXT_COLUMNS | TEXT_COLUMNS_OF.get(path.name, set())
    empty = {column: [""] for column in (*SCHEMA[path.name], OF_THE_ESTIMATE)}
    try:
        table = pd.read_csv(found, keep_default_na=False, na_values=empty, dtype=dict.fromkeys(text, str))
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, pd.errors.ParserError) as error:
        raise LensbenchError(f"{found} is damaged ({str(error).splitlines()[0]}); {COPY_AGAIN}") from error
    if path.name == "verdicts.csv":
        table = as_now(table)
    if path.name == "lenses.csv" and OF_THE_ESTIMATE in table:
        table["jacobian_error"] = table.pop(OF_THE_ESTIMATE).map(by_the_norm_of_j, na_action="ignore")
    for column in ADDED_COLUMNS.get(path.name, ()):
        if column not in table:
            table[column] = None if column in text else float("nan")
    missing = [column for column in SCHEMA[path.name] if column not in table.columns]
    if missing or (table.empty and path.name not in (*MAY_BE_EMPTY, *ADDED)):
        what = f"column {missing[0]!r} is missing" if missing else "it has no rows"
        raise LensbenchError(f"{path} is damaged or of another version of lensbench: {what}")
    numeric = [c for c in table.columns if c not in text and not pd.api.types.is_numeric_dtype(table[c])]
    if numeric and len(table):
        raise LensbenchError(f"{path} is damaged: column {numeric[0]!r} holds something that is not a number")
    return table


OF_THE_ESTIMATE = "relative_error"
"""Of earlier versions, in place of ``jacobian_error``: the error of a Jacobian lens by the norm of the estimate"""

MAY_BE_EMPTY = ("tolerances.csv", "pairs.csv")
"""Tables without rows where the suite leaves out the matrix, or pairs of layers, and for models of a single layer"""


@dataclass(frozen=True)
class Run:
    """A finished run folder, read and checked."""

    folder: Path
    manifest: Manifest
    tables: dict[str, pd.DataFrame]

    def sums(self) -> pd.DataFrame:
        """The sums that comparisons read: of ``cluster_sums.parquet``, or by sequence in runs of earlier versions."""
        path = next((p for p in (self.folder / SUMS, self.folder / SEQUENCES) if p.is_file()), None)
        if path is None:
            if self.manifest.exported is not None and self.manifest.exported.sums == NO_SUMS:
                raise LensbenchError(
                    f"{self.folder} has no {SUMS}: it was exported with --no-sums; give the folder of the run itself, or "
                    f"see its tables by `lensbench report {self.folder} --out PAGE.html`"
                )
            raise LensbenchError(
                f"{self.folder} has no {SUMS}: `lensbench run` with the same suite writes it from the finished stages"
            )
        try:
            return pd.read_parquet(path).rename(columns={"cluster": "document"})
        except (OSError, ValueError) as error:
            raise LensbenchError(f"{path} is damaged ({str(error).splitlines()[0]}); {COPY_AGAIN}") from error

    def update_draws(self) -> pd.DataFrame:
        """``update_draws.parquet``; empty where the run has none. Raises :class:`LensbenchError` for a damaged file."""
        path = self.folder / UPDATE_DRAWS
        if not path.is_file():
            return pd.DataFrame(columns=["model", "seed", "index", "value"])
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise LensbenchError(f"{path} is damaged ({str(error).splitlines()[0]}); {COPY_AGAIN}") from error


def read_run(folder: Path, *, need_manifest: bool = True, verify: bool = True) -> Run:
    """All tables of a run folder, each checked against its schema and against the manifest's checksum.

    Without ``need_manifest`` a folder that holds nothing but the CSV will do.
    """
    refuse_no_folder(folder)
    if need_manifest or table_file(folder, "models.csv") is None:
        refuse_unfinished(folder)
    manifest = read_manifest(folder) if need_manifest or (folder / MANIFEST).exists() else None
    if manifest is not None and manifest.sweep is not None and table_file(folder, "models.csv") is None:
        raise LensbenchError(f"{folder} holds a sweep, which has no lenses: give a folder of `lensbench run`")
    if manifest is not None and verify:
        for name, checksum in manifest.files.items():
            if not (folder / name).is_file():
                raise LensbenchError(f"{folder} is not complete: {name} is missing; {COPY_AGAIN}")
            if sha256(folder / name) != checksum:
                raise LensbenchError(
                    f"{folder / name} is not what the run wrote (checksum differs from {MANIFEST}); {COPY_AGAIN}"
                )
    known = set(SCHEMA) if manifest is None else {plain_name(name) for name in manifest.files}
    tables = {
        name: no_rows(name)
        if name in ADDED and not (name in known and table_file(folder, name))
        else read_table(folder / name)
        for name in SCHEMA
    }
    if manifest is None:
        manifest = Manifest.of_tables(folder, [str(name) for name in tables["models.csv"]["model"].unique()])
    return Run(folder, manifest, tables)
