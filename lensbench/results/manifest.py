"""The manifest of a run: everything needed to run it again, sealed with checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lensbench.errors import LensbenchError
from lensbench.runtime.files import write_json

SCHEMA_VERSION = 3


MANIFEST = "manifest.json"


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Named(_Loose):
    name: str


class _Claim(_Loose):
    model: str
    against: str
    indices: list[str]


class _Evaluated(_Loose):
    draws: int = Field(ge=1, le=10**6)


class _SuiteTold(_Loose):
    evaluate: _Evaluated
    fit: dict[str, Any]
    models: list[_Named]
    verdict: dict[str, float] = {}
    claims: list[_Claim] = []


class _CorpusTold(_Loose):
    checksum: str
    spec: str


class _Scored(_Loose):
    sequences: int = 0
    sequences_asked: int = 0
    documents: int = 0


class Told(_Loose):
    """What every manifest says, of what comparisons and reports read; there is more in it."""

    code_version: int
    corpus: _CorpusTold
    files: dict[str, str]
    models: list[str]
    seeds: list[int]
    suite: _SuiteTold
    suite_name: str
    scored: _Scored = _Scored()


CHECKSUM = "checksum"


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of what a manifest says beside it."""
    told = {k: v for k, v in manifest.items() if k != CHECKSUM}
    return hashlib.sha256(json.dumps(told, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest with its own checksum, so that a changed one is not believed."""
    plain = json.loads(json.dumps(manifest))  # as it will be read
    write_json(folder / MANIFEST, {**plain, CHECKSUM: seal(plain)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises :class:`LensbenchError` for a folder that no run of this version finished, or a damaged manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise LensbenchError(f"{folder} is not a run folder: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
        if version == SCHEMA_VERSION:
            Told.model_validate(manifest)
        if manifest.get(CHECKSUM, whole := seal(manifest)) != whole:
            raise ValueError("its checksum differs")
        if outside := [name for name in manifest.get("files", ()) if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, which is no file of this folder")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LensbenchError(f"{path} is damaged: {place}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, KeyError) and "in_context" in manifest:
            raise LensbenchError(f"{folder} holds tasks (`lensbench in-context`), not a run of a suite") from error
        raise LensbenchError(f"{path} is damaged: {error}") from error
    if version != SCHEMA_VERSION:
        raise LensbenchError(
            f"{folder} was written with schema {version}, this lensbench reads schema {SCHEMA_VERSION}"
        )
    return manifest
