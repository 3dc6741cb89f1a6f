"""How many tokens the update decomposition takes: intervals of what is added in place, by width and number of tokens.

Streams of :mod:`lensbench.studies.synthetic` are decomposed as a model is, at a few numbers of fitting tokens for every
width of the state. Dev and held-out tokens are a fixed share of these. Of each stream the interval of ``in_place`` over all
layers is kept (layer 0 of these streams is like the others), with its truth and which pairs pass the gates.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update.decomposition import Decomposition, Fitted, measured
from lensbench.measures.update.summary import drawn_indices
from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.results.study_folder import study_files, write_study_table
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.stages import peak_gib
from lensbench.streams.capture import Capture, room_for
from lensbench.studies.kept_rows import kept_rows
from lensbench.studies.population import Population
from lensbench.studies.synthetic import STREAM_FAMILIES, Shape, SyntheticStream
from lensbench.studies.update_tables import LETTERS, Row
from lensbench.studies.update_token_tables import POINTS, points_table, summaries
from lensbench.studies.update_truth import true_values

VERSION = 1
"""Increased when the same settings give another row for a stream, so that old rows are not reused"""

FEWEST_DOCUMENTS = 4
"""Of dev and of held-out tokens: below, nothing can be drawn anew"""

PER_DOCUMENT = 8
"""Tokens of a document"""

MOST_PER_D = 1_000_000
"""Fitting tokens in multiples of d"""

ONE_THREAD_BELOW = 1024
"""Width below which matrix products are too small for several threads: streams are measured in parallel instead"""


class Coarser(BaseModel):
    """What a width may have less of than the others: its algebra grows with the cube of d."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ridges: tuple[float, ...] | None = Field(None, min_length=1, description="instead of fit.ridges")
    pads: tuple[float, ...] | None = Field(None, min_length=1, description="instead of fit.pads")
    refits: int | None = Field(None, ge=0, description="instead of refits")

    @property
    def fit(self) -> dict[str, tuple[float, ...]]:
        """Settings of the fit that differ."""
        return {name: of for name, of in (("ridges", self.ridges), ("pads", self.pads)) if of is not None}

    @model_serializer(mode="wrap")
    def _what_is_set(self, whole: SerializerFunctionWrapHandler) -> Row:
        """Without what is left as it is, so that streams measured before keep their names."""
        return {
            name: value for name, value in whole(self).items() if name not in Coarser.model_fields or value is not None
        }


class Width(Coarser):
    """A width of the state, and the numbers of tokens that its streams are decomposed at."""

    d: int = Field(ge=8, le=65_536, description="width of the state")
    tokens: tuple[int, ...] = Field(min_length=1, description="fitting tokens, in multiples of d, rising")
    streams: int = Field(5, ge=1, le=10_000, description="streams of each family")

    @field_validator("tokens")
    @classmethod
    def _rising(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if not 1 <= tokens[0] <= tokens[-1] <= MOST_PER_D or any(b <= a for a, b in itertools.pairwise(tokens)):
            raise ValueError(f"must rise from one entry to the next, from at least 1 to at most {MOST_PER_D:,}")
        return tokens


class UpdateTokens(BaseModel):
    """The streams of a study of how many tokens the update decomposition takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    families: tuple[str, ...] = Field(min_length=1, description="of lensbench.studies.synthetic")
    widths: tuple[Width, ...] = Field(min_length=1)
    half_width: float = Field(0.05, gt=0, lt=1, description="half-width of an interval of in_place that is asked for")
    layers: int = Field(4, ge=3, description="of every stream: fewer have too few pairs to pass the gates")
    noise: tuple[float, float] = Field((1.6, 0.3), description="of the first and of the last layer")
    vocab: int = Field(200, ge=2, description="words of the read-out: it sees at most so many directions, less one")
    dev_share: float = Field(0.25, gt=0, le=10, description="dev tokens for each fitting token")
    eval_share: float = Field(0.67, gt=0, le=10, description="held-out tokens for each fitting token")
    refits: int = Field(4, ge=0)
    truth_up_to: int = Field(576, ge=0, description="widest streams whose truth is computed")
    fit: FitRecipe = FitRecipe()

    @field_validator("families")
    @classmethod
    def _known(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        for name in families:
            if name not in STREAM_FAMILIES:
                raise ValueError(f"unknown family {name!r}; there are {', '.join(STREAM_FAMILIES)}")
        if len(set(families)) < len(families):
            raise ValueError("names a family twice")
        return families

    @field_validator("noise")
    @classmethod
    def _sizes(cls, noise: tuple[float, float]) -> tuple[float, float]:
        if min(noise) < 0:
            raise ValueError("must be at least 0")
        return noise

    @model_validator(mode="after")
    def _possible(self) -> "UpdateTokens":
        widths = [width.d for width in self.widths]
        if len(set(widths)) < len(widths):
            raise ValueError("widths: a width stands there twice")
        needed = FEWEST_DOCUMENTS * PER_DOCUMENT
        for width in self.widths:
            self.fit_of(width)
            if width.d < self.layers + 2:
                raise ValueError(f"widths: d = {width.d} is too narrow for {self.layers} layers and an answer")
            fewest = width.d * width.tokens[0]
            for name, tokens in (("fitting", fewest), *zip(("dev", "held-out"), self.sizes(fewest), strict=True)):
                if tokens < needed:
                    raise ValueError(
                        f"widths: d = {width.d} has {tokens} {name} tokens at the fewest; {needed} are needed"
                    )
        return self

    def sizes(self, fit_tokens: int) -> tuple[int, int]:
        """How many dev and held-out tokens go with so many fitting tokens."""
        return round(self.dev_share * fit_tokens), round(self.eval_share * fit_tokens)

    def fit_of(self, coarser: Coarser) -> FitRecipe:
        """The fit of a width's streams. Raises :class:`ValueError` where what it has instead is no fit's."""
        return FitRecipe.model_validate(self.fit.model_dump() | coarser.fit)

    def jobs(self, up_to: int | None = None) -> "list[TokensJob]":
        """Every stream to decompose, of widths up to ``up_to`` (None: of all).

        Raises :class:`LensbenchError` where no width is so narrow.
        """
        jobs = list(self._jobs(up_to))
        if not jobs:
            raise LensbenchError(
                f"{self.name} has no width up to {up_to}: its narrowest is {min(width.d for width in self.widths)}"
            )
        return jobs

    def _jobs(self, up_to: int | None) -> "Iterator[TokensJob]":
        for width in self.widths:
            if up_to is not None and width.d > up_to:
                continue
            for family, number, of_d in itertools.product(self.families, range(width.streams), width.tokens):
                coarser = {name: getattr(width, name) for name in Coarser.model_fields}
                yield TokensJob(family=family, number=number, d=width.d, fit_tokens=of_d * width.d, **coarser)


class TokensJob(Coarser):
    """One stream at one number of fitting tokens; its number is its seed."""

    family: str
    number: int
    d: int
    fit_tokens: int


OF_ROW = {"layers", "noise", "vocab", "dev_share", "eval_share", "refits", "truth_up_to", "fit"}
"""Settings that a stream's row depends on: everything but which streams there are, the half-width that is asked for, and
where states lie"""


def measure(job: TokensJob, recipe: UpdateTokens) -> Row:
    """What is kept of a stream: its interval of ``in_place``, the pairs that pass, its truth, and what it cost."""
    if job.d < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    began, seed = time.perf_counter(), 10 * job.number
    first, last = recipe.noise
    shape = Shape(job.d, recipe.layers, recipe.vocab, first_noise=first, last_noise=last)
    stream = SyntheticStream(job.family, shape, seed=job.number)
    sizes, room = recipe.sizes(job.fit_tokens), recipe.fit.memory_gib
    fit = set_aside(stream.capture(job.fit_tokens, seed=seed + 1, per_document=PER_DOCUMENT), room)
    dev, scored = (
        set_aside(stream.capture(tokens, seed=seed + 2 + at, per_document=PER_DOCUMENT, constant=fit.mean_p), room)
        for at, tokens in enumerate(sizes)
    )
    with_truth = job.d <= recipe.truth_up_to
    fitted = fitted_to(stream, fit, dev, recipe.fit_of(job), job.number, keep=with_truth)
    found = measured(
        stream.readout, fitted, fit, dev, scored, recipe.refits if job.refits is None else job.refits,
        readable=False, normed=False, seed=job.number, spread=(job.number, len(job.family)),
    )  # fmt: skip
    truth = None
    if with_truth:
        population = Population.of(stream)
        truth = true_values(found, fitted, population, stream.readout, job.number)["population"]["in_place"]
    return {
        "job": job.model_dump(), "dev_tokens": sizes[0], "eval_tokens": sizes[1], **interval_row(found), "truth": truth,
        "seconds": round(time.perf_counter() - began, 1), "peak_gib": peak_gib(),
    }  # fmt: skip


def set_aside(captured: Capture, memory_gib: float) -> Capture:
    """The same with its states in a memory-mapped file, where they take more than ``memory_gib``."""
    states = captured.states
    if 4 * states.numel() <= memory_gib * 2**30:
        return captured
    layers, tokens, d = states.shape
    return replace(captured, states=room_for((layers, tokens, d), states.device, memory_gib).copy_(states))


def fitted_to(
    stream: SyntheticStream, fit: Capture, dev: Capture, recipe: FitRecipe, seed: int, *, keep: bool
) -> Fitted:
    """The lenses and maps of a stream; without the moments behind them unless they are to be kept.

    Those of all folds hold ``12 (L + 1) d^2`` numbers of 8 bytes: 7.5 GiB of 4 layers of width 4096, which the refits need.
    """
    layers, readout = tuple(range(stream.layers)), stream.readout
    fitted = Fitted.of(readout, fit, dev, recipe, layers, "fisher", recipe.tolerance, seed, lambda _: None)
    if keep:
        return fitted
    nothing = fitted.moments.layer([])
    return replace(fitted, parts=(), halves=(nothing, nothing), moments=nothing)


def interval_row(found: Decomposition) -> Row:
    """``in_place`` with its interval, and the gate of each pair as a letter."""
    one = drawn_indices(found)["in_place"]
    value = one.estimate
    return {
        "in_place": value.value, "in_place_ci_low": value.low, "in_place_ci_high": value.high,
        "reason": value.reason, "of_refits": one.of_refits, "gates": "".join(LETTERS[gate] for gate in found.gate),
    }  # fmt: skip


def run_update_tokens(
    recipe: UpdateTokens,
    folder: Path,
    *,
    workers: int,
    up_to: int | None = None,
    code: dict[str, Any] | None = None,
    progress: Progress = QUIET,
) -> dict[str, pd.DataFrame]:
    """Decompose every stream of widths up to ``up_to`` and write the tables; returns them by the names of their files.

    Finished streams are reused. ``code``: what the manifest says of the versions that ran.
    Raises :class:`LensbenchError` where a finished stream cannot be read, or no width is so narrow.
    """
    jobs, kept = recipe.jobs(up_to), folder / "streams"
    settings = recipe.model_dump(mode="json", include=OF_ROW, exclude={"fit": {"memory_gib"}})
    common = {"version": VERSION} | settings
    with claimed(folder, recipe.name):
        rows = kept_rows(jobs, measure, recipe, kept, common=common, workers=workers, progress=progress)
        # From what was written: the committed table gives the same sums, to the last digit.
        tables = {POINTS: write_study_table(folder, POINTS, points_table(rows))}
        sums = summaries(tables[POINTS], recipe.half_width)
        for name, table in sums.items():
            write_study_table(folder, name, table)
        tables |= sums
        manifest = {
            "update_tokens": recipe.model_dump(mode="json"),
            "suite_name": recipe.name,
            "widths": sorted({job.d for job in jobs}),
            "files": study_files(folder, tables),
            "code": code,
        }
        write_manifest(folder, manifest)
    return tables
