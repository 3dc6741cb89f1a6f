"""The folder of a study: its tables, long ones packed, and its light form.

A study (a calibration, tasks or a regression in context) has no tables of a run, and its manifest is its own. A sweep has
one table, and is exported likewise.
"""

import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.results.folder import GZIPPED, PACKED, plain_name, table_bytes, table_file, write_csv
from lensbench.results.manifest import CHECKSUM, MANIFEST, write_manifest
from lensbench.runtime.files import sha256, write_atomically
from lensbench.runtime.texts import COPY_AGAIN, read_json

LONG = 30_000
"""Bytes above which any table is packed"""

ENDINGS = ("", PACKED, GZIPPED)


def pack(path: Path) -> None:
    """Put a table's packed file in its place; the same table gives the same bytes."""
    content = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    write_atomically(path.with_name(path.name + PACKED), lambda partial: partial.write_bytes(content))
    path.unlink()


def write_study_table(folder: Path, name: str, table: pd.DataFrame, digits: str | None = "%.6g") -> pd.DataFrame:
    """The table ``NAME.csv`` of a study as it reads after it was written, packed where it is longer than :data:`LONG`.

    Other forms of it are removed. ``digits``: of floats, six by default; None: all.
    """
    write_csv(folder / name, table, digits)
    packed = (folder / name).stat().st_size > LONG
    if packed:
        pack(folder / name)
    for other in set(ENDINGS) - {PACKED if packed else ""}:
        (folder / f"{name}{other}").unlink(missing_ok=True)
    return read_study_table(folder, name)


def read_study_table(folder: Path, name: str) -> pd.DataFrame:
    """The table ``NAME.csv`` of a study, packed or not."""
    return pd.read_csv(_there(folder, name))


def study_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The files of some tables, packed or not, and their SHA-256."""
    return {path.name: sha256(path) for path in (_there(folder, name) for name in names)}


def _there(folder: Path, name: str) -> Path:
    found = table_file(folder, name)
    if found is None:
        raise LensbenchError(f"{folder} has no {name}: it is not the folder of a finished study of lensbench")
    return found


def study_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the finished study or sweep in a folder; None where there is a run, or nothing."""
    if not (folder / MANIFEST).is_file():
        return None
    content: Any = read_json(folder / MANIFEST)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        return None
    if "schema_version" in content and content.get("sweep") is None:
        return None
    return content


def verified_tables(source: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Name and CSV of each table that a study's manifest names.

    Raises :class:`LensbenchError` where one is missing or is not what the study wrote.
    """
    content = {}
    for name, checksum in manifest["files"].items():
        if Path(name).name != name or not (source / name).is_file() or sha256(source / name) != checksum:
            raise LensbenchError(f"{source / name} is missing, or is not what the study wrote; {COPY_AGAIN}")
        if plain_name(name).endswith(".csv"):
            content[plain_name(name)] = table_bytes(source / name)
    return content


def export_study(source: Path, manifest: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the light form of the study in ``source`` into ``folder``: its tables, long ones packed, and its manifest.

    Returns the files that it replaces no more. No number changes. Raises as :func:`verified_tables`.
    """
    content = verified_tables(source, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        light = Path(made)
        for name, table in content.items():
            (light / name).write_bytes(table)
            if len(table) > LONG:
                pack(light / name)
        files = study_files(light, content)
        earlier = [folder / f"{name}{end}" for name in content for end in ENDINGS]
        removed = [path for path in earlier if path.is_file() and path.name not in files]
        for path in removed:
            path.unlink()
        for name in files:
            (light / name).replace(folder / name)
    write_manifest(folder, {**{k: v for k, v in manifest.items() if k != CHECKSUM}, "files": files})
    return removed
