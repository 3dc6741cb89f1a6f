"""The run folder: tidy tables, their schema, a manifest with checksums, and atomic writes.

Everything downstream of a run (figures, comparisons) reads these files and never a model.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lensbench.errors import LensbenchError

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
SEQUENCES = "per_sequence.parquet"


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


_WHO = {
    "model": "name in the suite; MODEL+rotated is its first rotated view, whose tuned rows check the algebra alone",
    "seed": "seed of initialisation, batches and rotations; 'all' is the mean over seeds with a Student-t interval",
}
_HOW = {
    "stage": "closed (ridge), refined (KL), loaded (lenses of others), or none where nothing is fitted",
    "prior": "what the ridge shrinks the map towards: zero or identity",
}

SCHEMA: dict[str, dict[str, str]] = {
    "models.csv": {
        **_WHO,
        "family": "how it was built: of a pretrained model its model type",
        "source": "where a pretrained model comes from; empty for models trained here",
        "dtype": "what the model computes in; lenses are float32",
        "parameters": "tied tensors counted once",
        "layers": "blocks L",
        "d_model": "width of the stream that the lenses read",
        "vocab_size": "V",
        "train_tokens": "tokens visited in training; empty for pretrained models",
        "ce": "held-out cross-entropy, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "bits_per_byte": "the same in bits per byte of the scored tokens",
        "bits_per_byte_ci_low": "",
        "bits_per_byte_ci_high": "",
        "scored_tokens": "held-out tokens scored",
        "clusters": "documents they come from, or top folders of them; under 64 the intervals are not to be trusted",
    },
    "baselines.csv": {
        "tokenizer": "whose tokens: trained here (on the train split), or a model that brings its own",
        "baseline": "unigram, or bigram (interpolated Kneser-Ney), counted on the train split",
        "train_tokens": "",
        "ce": "on the same tokens as the models, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "bits_per_byte": "",
        "bits_per_byte_ci_low": "",
        "bits_per_byte_ci_high": "",
    },
    "lenses.csv": {
        **_WHO,
        "lens": "logit, tuned (per layer), shared, shared_bias (one bias per layer), shared_loo (fitted without the layer)",
        "layer": "stream layer it is read at",
        **_HOW,
        "ridge": "chosen on dev, in median eigenvalues of the input covariance",
        "pad": "chosen on dev, in rms of the final state",
        "kl": "held-out KL(p || q), nats/token",
        "kl_ci_low": "",
        "kl_ci_high": "",
        "ce": "held-out cross-entropy, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "fit_kl": "KL on the fitting tokens",
        "dev_kl": "KL on the dev tokens",
    },
    "transfer.csv": {
        **_WHO,
        "lens_layer": "layer i that the lens was fitted at; L is the identity, the logit lens",
        "stream_layer": "layer j that it is read at",
        **_HOW,
        "ridge": "of lens i, the strongest within the tolerance, in median eigenvalues",
        "tolerance": "allowed dev loss of lens i on its own layer, share of K_0 - best",
        "kl": "K_ij, nats/token",
        "ce": "C_ij, nats/token",
        "movement_kl": "D_ij = E KL(q_ii || q_ij)",
        "top1_agreement": "share of tokens at which the lens's most probable word is the model's",
        "top1_agreement_ci_low": "",
        "top1_agreement_ci_high": "",
        "penalty_kl": "K_ij - K_jj",
        "penalty_kl_ci_low": "",
        "penalty_kl_ci_high": "",
        "penalty_ce": "C_ij - C_jj, the published transfer penalty",
        "penalty_ce_ci_low": "",
        "penalty_ce_ci_high": "",
    },
    "tolerances.csv": {
        **_WHO,
        "tolerance": "allowed dev loss of a lens on its own layer, share of K_0 - best; 1se: one standard error; loaded",
        "index": "gain visibility or movement, over the pairs of these layers",
        "layers": "the layers of the lenses and of the stream",
        **_HOW,
        "ridge": "of each lens, in median eigenvalues",
        "own_kl": "mean held-out KL of the lenses on their own layers, nats/token",
        "own_kl_ci_low": "",
        "own_kl_ci_high": "",
        "value": "empty where undefined",
        "ci_low": "95 % paired bootstrap over documents, the fitted lens held fixed",
        "ci_high": "",
        "fit_low": "value plus the smallest change by a refit on document-resampled fit data, at the headline's tolerance",
        "fit_high": "plus the largest",
        "reason": "why it is undefined, or a warning",
    },
    "pairs.csv": {
        **_WHO,
        "layer_i": "first of the two layers that the lens is fitted to",
        "layer_j": "second",
        "ridge": "chosen on dev, in median eigenvalues of the pooled covariance",
        "pad": "chosen on dev, in rms of the final state",
        "kl_i": "held-out KL of the lens as it reads layer i, nats/token",
        "kl_j": "as it reads layer j",
        "penalty": "M_ij: mean excess of the two over the per-layer lenses' own (closed, prior zero)",
        "penalty_ci_low": "",
        "penalty_ci_high": "",
        "rotated_penalty": "the same where each layer has a random basis of its own, mean over views",
        "rotated_penalty_ci_low": "",
        "rotated_penalty_ci_high": "",
    },
    "verdicts.csv": {
        **_WHO,
        "scope": "all layers, or without layer 0",
        "known": "what is known of the model by construction; empty where it is to be found out",
        "verdict": "refinement, carry-along, re-representation or cannot tell, by the suite's rule; seeds must agree",
        "reason": "the indices that it rests on, their intervals widened by refits",
    },
    "probes.csv": {
        **_WHO,
        "probe": "what measured it, as a suite names it",
        "quantity": "what was measured; described in lensbench/probes",
        "layer": "layer or block (from 0) that it belongs to",
        "other": "the second layer or block, the head, or how many",
        "value": "empty where undefined",
        "ci_low": "95 %, bootstrap over documents or jackknife over eight groups of them; seed = all: Student-t over seeds",
        "ci_high": "",
        "reason": "why it is undefined, or why the probe does not apply",
    },
    "curves.csv": {
        **_WHO,
        "train_tokens": "budget of a training of its own, with its own schedule",
        "positions": "part of the context that is scored: positions from and to that predictions are read at, or all",
        "ce": "held-out cross-entropy at every position of it, nats/token",
        "ce_ci_low": "95 % bootstrap over documents; seed = all: Student-t over seeds",
        "ce_ci_high": "",
        "reason": "a warning",
    },
    "timings.csv": {
        **_WHO,
        "train_tokens": "budget, as in curves.csv",
        "seconds": "median time of a training step then, times the steps: measured, so the one table that no two runs share",
    },
    "indices.csv": {
        **_WHO,
        "index": "as in the README's table",
        "value": "empty where undefined",
        "ci_low": "95 % paired bootstrap over documents, the fitted lens held fixed; seed = all: Student-t over seeds",
        "ci_high": "",
        "fit_low": "value plus the smallest change by a refit on document-resampled fit data; empty if refits leave it out",
        "fit_high": "plus the largest",
        "stage": "",
        "tolerance": "of the matrix that the index is read off",
        "reason": "why it is undefined, or a warning",
    },
}


OPENING = """# What a run's tables hold

Written from `lensbench/results.py` (`lensbench schema > results/README.md`); a test holds the two together. Tables are CSV,
UTF-8, one header line; an empty cell is what is unknown, and `reason` says why. Losses are in nats/token (of image models
nats/image) unless a column says otherwise. A mean has its 95 % interval in `_ci_low` and `_ci_high`: bootstrap over
documents (or clusters of them) with the fitted lens held fixed; rows with `seed` = `all` are means over seeds with
Student's t. `manifest.json` has the suite, seeds, versions, hardware, corpus checksum,
code revision, and the SHA-256 of every table and of itself.

Folders here are what `lensbench run SUITE`, `lensbench sweep`, `lensbench calibrate`, `lensbench in-context` and
`lensbench regression` wrote, unedited; `speed/` is described in `benchmarks/README.md`.
"""


def schema_text() -> str:
    """The schema of all tables as Markdown."""
    parts = [OPENING]
    for name, columns in SCHEMA.items():
        parts.append(f"## `{name}`\n\n| column | meaning |\n|---|---|\n")
        parts += [f"| `{column}` | {meaning.replace('|', chr(92) + '|')} |\n" for column, meaning in columns.items()]
        parts.append("\n")
    return "".join(part if part != OPENING else part + "\n" for part in parts).rstrip() + "\n"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """``write(partial)``, then move the finished file into place."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """One CSV with exactly the columns of its schema, in their order."""
    columns = list(SCHEMA[name])
    unknown = set(table.columns) ^ set(columns)
    if unknown:
        raise ValueError(f"{name}: columns differ from the schema: {sorted(unknown)}")
    write_atomically(folder / name, lambda path: table[columns].to_csv(path, index=False, lineterminator="\n"))


def write_sequences(path: Path, sequences: pd.DataFrame) -> None:
    """``per_sequence.parquet``, small enough to be committed: sums are floats, everything else repeats itself."""
    sums = ["kl", "ce", "movement", "top1"]
    layout = {"use_byte_stream_split": sums, "use_dictionary": [c for c in sequences.columns if c not in sums]}
    write = partial(sequences.to_parquet, index=False, compression="zstd", compression_level=15, **layout)
    write_atomically(path, write)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV of a run folder; raises :class:`LensbenchError` where it is missing, unreadable or not what its name says."""
    if not path.is_file():
        raise LensbenchError(f"{path.parent} has no {path.name}: not a finished run of lensbench")
    text = TEXT_COLUMNS | TEXT_COLUMNS_OF.get(path.name, set())
    try:
        table = pd.read_csv(
            path, keep_default_na=False, na_values={c: [""] for c in SCHEMA[path.name]}, dtype=dict.fromkeys(text, str)
        )
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise LensbenchError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    for column in ADDED_COLUMNS.get(path.name, ()):
        if column not in table:
            table[column] = None
    missing = [column for column in SCHEMA[path.name] if column not in table.columns]
    if missing or (table.empty and path.name not in ("pairs.csv", *ADDED)):  # a single layer is in no pair
        what = f"column {missing[0]!r} is missing" if missing else "it has no rows"
        raise LensbenchError(f"{path} is damaged or of another version of lensbench: {what}")
    numeric = [c for c in table.columns if c not in text and not pd.api.types.is_numeric_dtype(table[c])]
    if numeric and len(table):
        raise LensbenchError(f"{path} is damaged: column {numeric[0]!r} holds something that is not a number")
    return table


def unit(models: pd.DataFrame) -> str:
    """What the models of ``models.csv`` predict once for each of: a token, an image (it has no bytes of text), or either."""
    images = models["bits_per_byte"].isna()
    return "image" if images.all() else "prediction" if images.any() else "token"


def no_rows(name: str) -> pd.DataFrame:
    """A table of a folder that has nothing to say there."""
    return pd.DataFrame(columns=list(SCHEMA[name]))


TEXT_COLUMNS = {
    "model", "seed", "family", "baseline", "tokenizer", "lens", "stage", "prior", "index", "reason", "dtype", "source",
    "probe", "quantity", "scope", "verdict", "known", "positions",
}  # fmt: skip
TEXT_COLUMNS_OF = {"tolerances.csv": {"tolerance", "layers", "ridge"}}


ON_REQUEST = ("curves.csv", "timings.csv")
"""Tables that are written where a suite asks for learning curves."""
ADDED = ("verdicts.csv", "probes.csv", *ON_REQUEST)
"""Tables that a folder may be without, being of an earlier version or not asked for them: read as empty."""
WRITTEN = tuple(name for name in SCHEMA if name not in ON_REQUEST)
"""Tables of every run."""
MEASURED_TIME = ("timings.csv",)
"""Tables that no two runs have alike."""
ADDED_COLUMNS = {"verdicts.csv": ("known",)}
"""Columns of text that they do not have."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


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


@dataclass(frozen=True)
class Run:
    """A finished run folder, read and checked."""

    folder: Path
    manifest: dict[str, Any] | None
    tables: dict[str, pd.DataFrame]

    def sequences(self) -> pd.DataFrame:
        """``per_sequence.parquet``: the sums that every number of the run is made of."""
        path = self.folder / SEQUENCES
        if not path.is_file():
            raise LensbenchError(f"{self.folder} has no {SEQUENCES}: its runs cannot be compared sequence by sequence")
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise LensbenchError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def read_run(folder: Path, *, need_manifest: bool = True, verify: bool = True) -> Run:
    """All tables of a run folder, each checked against its schema and against the manifest's checksum.

    Without ``need_manifest`` a folder that holds nothing but the CSV will do.
    """
    if not folder.is_dir():
        raise LensbenchError(f"there is no folder {folder}")
    manifest = read_manifest(folder) if need_manifest or (folder / MANIFEST).exists() else None
    if manifest is not None and verify:
        for name, checksum in manifest["files"].items():
            if not (folder / name).is_file():
                raise LensbenchError(f"{folder} is not complete: {name} is missing")
            if sha256(folder / name) != checksum:
                raise LensbenchError(f"{folder / name} is not what the run wrote (checksum differs from {MANIFEST})")
    known = set(SCHEMA) if manifest is None else set(manifest["files"])
    tables = {
        name: no_rows(name)
        if name in ADDED and not (name in known and (folder / name).exists())
        else read_table(folder / name)
        for name in SCHEMA
    }
    return Run(folder, manifest, tables)
