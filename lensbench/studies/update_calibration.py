"""Calibration of the update decomposition: do its intervals cover, and is its verdict right?

A calibration names families of streams that thresholds were chosen on, families that they are judged by, and the frozen
rule. Every stream is decomposed as a model is, and has up to three truths (:mod:`lensbench.studies.update_truth`). What was
measured is kept apart from what is decided: another rule judges the same streams without measuring one again.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateResult
from lensbench.measures.update.decomposition import Fitted, measured
from lensbench.measures.update.verdict import UpdateRule
from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.results.study_folder import study_files, write_study_table
from lensbench.runtime.progress import QUIET, Progress
from lensbench.studies.held_out import HELD_OUT_FAMILIES, HeldOutStream
from lensbench.studies.held_out_uneven import UNEVEN_FAMILIES, UnevenStream
from lensbench.studies.kept_rows import kept_rows
from lensbench.studies.population import Population
from lensbench.studies.synthetic import STREAM_FAMILIES, Shape, SyntheticStream
from lensbench.studies.update_tables import BLOCKS, STREAMS, Row, stream_tables, summaries
from lensbench.studies.update_truth import Values, declared_values, true_values

VERSION = 4
"""Increased when the same settings give another row for a stream, so that old rows are not reused"""

Group = Literal["tune", "held_out", "uneven"]
FAMILIES: dict[Group, Mapping[str, Any]] = {
    "tune": STREAM_FAMILIES, "held_out": HELD_OUT_FAMILIES, "uneven": UNEVEN_FAMILIES,
}  # fmt: skip
"""Group -> the families that it chooses from"""

GROUPS: tuple[Group, ...] = tuple(FAMILIES)


class UpdateCalibration(BaseModel):
    """The streams of a calibration of the update decomposition, and the rule that is judged."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    tune: tuple[str, ...] = Field(description="families that thresholds were chosen on")
    held_out: tuple[str, ...] = Field(description="families that they are judged by")
    uneven: tuple[str, ...] = Field(
        (),
        description="families that they are judged by, whose tokens differ in loudness or hide a part of the prediction",
    )
    tune_streams: int = Field(20, ge=1, description="streams of each family of tune")
    held_out_streams: int = Field(50, ge=1, description="streams of each family of held_out, and of uneven")
    first_uneven: int = Field(0, ge=0, description="number, and seed, of the first stream of each family of uneven")
    layers: tuple[int, ...] = Field((4, 6, 8), min_length=1, description="of streams of tune; the others draw theirs")
    d: tuple[int, ...] = Field((32, 48, 64), min_length=1)
    noise: tuple[tuple[float, float], ...] = Field(((1.6, 0.3), (1.0, 0.2), (2.0, 0.8)), min_length=1)
    fit_tokens: int = Field(6144, ge=96)
    dev_tokens: int = Field(2048, ge=32)
    eval_tokens: int = Field(4096, ge=32)
    readable_every: int = Field(5, ge=1, description="readable gain is measured on every so many streams of a family")
    readable_always: tuple[str, ...] = Field((), description="families of which it is measured on every stream")
    further_pairs: int = Field(3, ge=0, description="pairs at most, but for neighbours, that it is measured on")
    refits: int = Field(4, ge=0)
    fit: FitRecipe = FitRecipe()
    rule: UpdateRule = UpdateRule()

    @model_validator(mode="after")
    def _known(self) -> "UpdateCalibration":
        for group, families in FAMILIES.items():
            for name in getattr(self, group):
                if name not in families:
                    raise ValueError(f"unknown family {name!r}; there are {', '.join(families)}")
        return self

    def jobs(self, groups: tuple[Group, ...] = GROUPS) -> "Iterator[Job]":
        """Every stream to measure; the sizes of those of ``tune`` are drawn at random."""
        for group in groups:
            count = self.tune_streams if group == "tune" else self.held_out_streams
            for family in getattr(self, group):
                start = self.first_uneven if group == "uneven" else 0
                for number in range(start, start + count):
                    shape = self._shape(family, number) if group == "tune" else {}
                    readable = number % self.readable_every == 0 or family in self.readable_always
                    yield Job(group=group, family=family, number=number, shape=shape, readable=readable)

    def _shape(self, family: str, number: int) -> dict[str, Any]:
        of_family = int.from_bytes(hashlib.sha256(family.encode()).digest()[:3])
        rng = np.random.default_rng([number, of_family])
        first, last = self.noise[rng.integers(len(self.noise))]
        d, layers = int(rng.choice(self.d)), int(rng.choice(self.layers))
        return vars(Shape(d=d, layers=layers, first_noise=first, last_noise=last))


class Job(BaseModel):
    """One stream to measure; its number is its seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    group: Group
    family: str
    number: int
    shape: dict[str, Any]
    readable: bool

    def stream(self) -> SyntheticStream | HeldOutStream | UnevenStream:
        """The stream itself."""
        if self.group == "tune":
            return SyntheticStream(self.family, Shape(**self.shape), seed=self.number)
        made: type[HeldOutStream | UnevenStream] = HeldOutStream if self.group == "held_out" else UnevenStream
        return made(self.family, seed=self.number)


OF_ROW = {"fit_tokens", "dev_tokens", "eval_tokens", "refits", "fit", "further_pairs"}
"""Settings that a stream's row depends on: everything but how many of them there are, and the rule"""


def measure(job: Job, recipe: UpdateCalibration) -> Row:
    """What is kept of a stream: the decomposition's rows, its truths, and what the stream is."""
    torch.set_num_threads(1)  # products are small: processes measure streams in parallel instead
    stream, seed = job.stream(), 10 * job.number
    fit = stream.capture(recipe.fit_tokens, seed=seed + 1)
    dev = stream.capture(recipe.dev_tokens, seed=seed + 2, constant=fit.mean_p)
    scored = stream.capture(recipe.eval_tokens, seed=seed + 3, constant=fit.mean_p)
    layers = tuple(range(stream.layers))
    readout, tolerance = stream.readout, recipe.fit.tolerance
    fitted = Fitted.of(readout, fit, dev, recipe.fit, layers, "fisher", tolerance, job.number, lambda _: None)
    found = measured(
        readout, fitted, fit, dev, scored, recipe.refits,
        readable=job.readable, further=recipe.further_pairs, seed=job.number, spread=(job.number, len(job.family)),
    )  # fmt: skip
    truths: dict[str, Values] = {}
    if not isinstance(stream, UnevenStream):  # the states of these are not normal, so that moments do not say all
        truths = true_values(found, fitted, Population.of(stream), readout, job.number)
    facts: dict[str, Any] = {"layers": stream.layers, "d": stream.d}
    if isinstance(stream, HeldOutStream):
        truths["declared"] = declared_values(found, stream.shares)
    if not isinstance(stream, SyntheticStream):
        facts |= {"growth": stream.growth, "right": list(stream.verdicts)}
    else:
        facts |= {"growth": 1.0, "right": [OF_TRUTH[STREAM_FAMILIES[job.family].truth]]}
    result = UpdateResult.of(found).model_copy(update={"draws": {}})
    return {
        "job": job.model_dump(exclude={"shape"}), "facts": facts, "result": result.model_dump(mode="json"),
        "truths": truths,
    }  # fmt: skip


OF_TRUTH = {
    "refinement": "added up in one representation",
    "carry-along": "carried along",
    "re-representation": "re-represented",
    "mixed": "mixed",
}
"""What the families of :mod:`lensbench.studies.synthetic` are called there -> the verdict of the update decomposition"""


def run_update_calibration(
    recipe: UpdateCalibration,
    folder: Path,
    *,
    workers: int,
    groups: tuple[Group, ...] = GROUPS,
    code: dict[str, Any] | None = None,
    progress: Progress = QUIET,
) -> dict[str, pd.DataFrame]:
    """Measure every stream of some groups and write the tables; returns them by the names of their files.

    Finished streams are reused. ``code``: what the manifest says of the versions that ran.
    Raises :class:`LensbenchError` where a finished stream cannot be read.
    """
    with claimed(folder, recipe.name):
        rows = measured_rows(recipe, folder / "streams", groups, workers, progress)
        tables = stream_tables(rows)
        # From what was written: the committed tables give the same verdicts, to the last digit.
        written = {name: write_study_table(folder, name, table) for name, table in tables.items()}
        decided = summaries(written[STREAMS], written[BLOCKS], recipe.rule)
        for name, table in decided.items():
            write_study_table(folder, name, table)
        tables |= decided
        manifest = {
            "update_calibration": recipe.model_dump(mode="json"),
            "suite_name": recipe.name,
            "files": study_files(folder, tables),
            "code": code,
        }
        write_manifest(folder, manifest)
    return tables


def measured_rows(
    recipe: UpdateCalibration, kept: Path, groups: tuple[Group, ...], workers: int, progress: Progress
) -> list[Row]:
    """A row per stream, in the order of the recipe's jobs; each is kept in a file of its own in the folder ``kept``."""
    jobs = list(recipe.jobs(groups))
    common = {"version": VERSION} | recipe.model_dump(mode="json", include=OF_ROW)
    return kept_rows(jobs, measure, recipe, kept, common=common, workers=workers, progress=progress)
