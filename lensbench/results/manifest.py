"""The manifest of a run: everything needed to run it again, sealed with checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lensbench.errors import LensbenchError
from lensbench.runtime.files import write_json
from lensbench.runtime.texts import COPY_AGAIN, read_json
from lensbench.runtime.validation import in_words

SCHEMA_VERSION = 3


MANIFEST = "manifest.json"


class _Facts(BaseModel):
    """Facts of a manifest: what other versions of lensbench add is kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """What the file says, as JSON has it; nothing that it leaves out."""
        return self.model_dump(mode="json", exclude_unset=True)


class ModelSettings(_Facts):
    """A model of the suite; its recipe is in :meth:`content`."""

    name: str


class ClaimSettings(_Facts):
    """What the suite declares beforehand; all of it is in :meth:`content`."""

    model: str
    against: str | None = None
    indices: list[str] = []


class EvaluateSettings(_Facts):
    """How the suite scores."""

    draws: int = Field(ge=1, le=10**6)


class SuiteSettings(_Facts):
    """The suite's settings as they were run."""

    evaluate: EvaluateSettings
    fit: dict[str, Any]
    models: list[ModelSettings]
    verdict: dict[str, Any] = {}
    claims: list[ClaimSettings] = []
    question: str = ""
    images: dict[str, Any] | None = None


class CorpusFacts(_Facts):
    """The text, or the images, that everything was read from."""

    checksum: str
    spec: str
    documents: dict[str, int] = {}
    tokens: dict[str, int] = {}
    sources: list[dict[str, Any]] = []
    """Of a text of packages or of several sources: each with its checksum, documents, bytes, and what was left out of it"""
    epochs: float | None = None
    """How often models that were trained here read the train split, on average"""


class ScoredCounts(_Facts):
    """How much was scored."""

    sequences: int = 0
    sequences_asked: int = 0
    documents: int = 0


class ExportFacts(_Facts):
    """What a light folder holds of the run that it was made of."""

    tables: dict[str, str]
    """SHA-256 of each CSV, before some were packed"""
    sums: str
    """What the sums by cluster were made of"""


class Manifest(_Facts):
    """Everything needed to run a run again, and to tell whether two runs measure the same thing."""

    schema_version: int = SCHEMA_VERSION
    code_version: int
    suite_name: str
    suite: SuiteSettings
    options: list[str] = []
    """What the command line changed of the suite's file, as options of `lensbench run`"""
    models: list[str]
    """The models in the tables"""
    seeds: list[int]
    corpus: CorpusFacts
    scored: ScoredCounts = ScoredCounts()
    tokenizers: dict[str, Any] = {}
    sources: dict[str, dict[str, str]] = {}
    """Of pretrained models: ``source``, and checksums or the commit"""
    probe_versions: dict[str, int] = {}
    """Version of each of the suite's probes; one that is not named has version 1"""
    weights: dict[str, str] = {}
    """``MODEL-seedN`` -> the digest of its weights, as in ``models.csv``"""
    lenses: dict[str, dict[str, str]] = {}
    """Of models with lenses that others fitted: the lens, and checksums"""
    left_out: dict[str, str] = {}
    """Models of the suite that are not in the tables: name -> reason, ``not asked for`` or why it could not be read"""
    files: dict[str, str]
    """Files of the run folder and their SHA-256 (hex)"""
    exported: ExportFacts | None = None
    """Of a folder that `lensbench export` wrote"""
    figures: list[str] = []
    seconds: dict[str, float] = {}
    """What each stage took"""
    peak_gib: float | None = None
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    git_revision: str | None = None
    written: str | None = None
    precision: dict[str, Any] | None = None
    estimated: dict[str, dict[str, Any]] = {}
    """``MODEL-seedN`` -> the share of the log-partitions that was exact, and what it rests on; empty where all were"""
    half_passes: dict[str, dict[str, Any]] = {}
    """Model -> how far its passes in float16 are from float32: ``kl``, nats/token, and ``state_error``; empty without"""
    sweep: dict[str, Any] | None = None
    """Of a sweep's folder: its trials"""

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every CSV, packed or not, and of the other files."""
        return {**self.files, **({} if self.exported is None else self.exported.tables)}

    @classmethod
    def of_tables(cls, folder: Path, models: list[str], verdict: dict[str, Any] | None = None) -> "Manifest":
        """The manifest of a folder that holds tables alone: which models these are of, and the rule of their verdicts."""
        suite = SuiteSettings(
            evaluate=EvaluateSettings(draws=2000), fit={}, models=[ModelSettings(name=name) for name in models],
            verdict=verdict or {},
        )  # fmt: skip
        corpus = CorpusFacts(checksum="", spec="")
        return cls(
            code_version=0, suite_name=folder.name, suite=suite, models=models, seeds=[], corpus=corpus, files={}
        )


CHECKSUM = "checksum"


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of everything else that a manifest says."""
    rest = {k: v for k, v in manifest.items() if k != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest | dict[str, Any]) -> None:
    """Write ``manifest.json`` with its own checksum, so that a changed one is refused.

    A run has a :class:`Manifest`; a study says what it likes.
    """
    content = manifest.content() if isinstance(manifest, Manifest) else manifest
    plain = json.loads(json.dumps(content))  # as it will be read
    write_json(folder / MANIFEST, {**plain, CHECKSUM: seal(plain)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run.

    Raises :class:`LensbenchError` for a folder that no run of this version finished, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise LensbenchError(
            f"{folder} is not a run folder: it has no {MANIFEST}; give one that `lensbench run` finished"
        )
    content: Any = read_json(path)
    try:
        version = content["schema_version"]
        manifest = Manifest.model_validate(content) if version == SCHEMA_VERSION else None
        if content.get(CHECKSUM, whole := seal(content)) != whole:
            raise ValueError("its checksum differs")
        if outside := [name for name in content.get("files", ()) if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, which is no file of this folder")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        words = in_words(first)
        between = " " if words.startswith(("must", "is ")) else ": "
        raise LensbenchError(f"{path} is damaged: {place}{between}{words}; {COPY_AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, KeyError) and "in_context" in content:
            raise LensbenchError(f"{folder} holds tasks (`lensbench in-context`), not a run of a suite") from error
        if isinstance(error, KeyError) and "schema_version" not in content:
            raise LensbenchError(f"{folder} holds no run of a suite: its {MANIFEST} is another command's") from error
        raise LensbenchError(f"{path} is damaged: {error}; {COPY_AGAIN}") from error
    if manifest is None:
        raise LensbenchError(
            f"{folder} was written with schema {version}, this lensbench reads schema {SCHEMA_VERSION}"
        )
    return manifest
