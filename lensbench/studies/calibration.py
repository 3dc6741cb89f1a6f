"""Calibration: how often verdicts are wrong and intervals miss, measured on synthetic streams of known answer.

A calibration is a data file, like a suite. It names families of streams to tune the thresholds of the rule on, other
families to judge them by, and the frozen rule. Lenses are fitted and scored on each stream as on a model, and the stream
gets a verdict. Its true indices are those of the same lenses on many times as many fresh tokens.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from scipy.stats import binomtest

from lensbench.lenses.closed import fit_rotated
from lensbench.lenses.fit import Fit, fit
from lensbench.lenses.maps import AffineMaps, rotated_maps
from lensbench.lenses.moments import Moments
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext
from lensbench.lenses.read import score
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.lenses.shared import SHARED_LENS
from lensbench.measures.evaluate import evaluate
from lensbench.measures.formulas import consistency, retention
from lensbench.measures.indices import INDICES, estimates
from lensbench.measures.means import Means, Value, with_last
from lensbench.measures.transfer import transfer_sums
from lensbench.measures.verdict import CANNOT_TELL, SCOPES, Span, VerdictRule, decide_on
from lensbench.results.folder import claimed
from lensbench.results.manifest import write_manifest
from lensbench.results.study_folder import study_files, write_study_table
from lensbench.results.sums import ClusterSums
from lensbench.runtime.progress import QUIET, Progress
from lensbench.statistics import bootstrap_weights
from lensbench.streams.capture import Capture
from lensbench.streams.rotated import RotatedView
from lensbench.studies.kept_rows import kept_rows
from lensbench.studies.synthetic import STREAM_FAMILIES, Shape, SyntheticStream, windows_of

JUDGED = ("gain_visibility", "movement", "shared_consistency", "shared_retention")
"""Indices whose intervals are compared with the truth"""


OWN_VIEWS = "shared_consistency_own_views"
"""Consistency with the null of the fitted views themselves; the truth of ``shared_consistency`` uses new views.

The spread over views is a part of the interval. The interval therefore covers this truth too often, most of all where the
spread is all of it.
"""


VERSION = 2
"""Increased when the same settings give another row for a stream, so that old rows are not reused"""


FRESH_BLOCK = 10_000
"""Fresh tokens that are read at once"""


class Calibration(BaseModel):
    """The streams of a calibration, their families and sizes, and the rule that is judged."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    tune: tuple[str, ...] = Field(min_length=1, description="families that thresholds were chosen on")
    held_out: tuple[str, ...] = Field(min_length=1, description="families that they are judged by")
    streams: int = Field(40, ge=1, description="streams of each family")
    layers: tuple[int, ...] = Field((4, 6, 8), min_length=1)
    d: tuple[int, ...] = Field((24, 32, 48), min_length=1)
    vocab: int = Field(200, ge=8)
    noise: tuple[tuple[float, float], ...] = Field(((1.6, 0.3), (1.0, 0.2), (2.0, 0.8)), min_length=1)
    tokens: tuple[int, ...] = Field((2000, 4000), min_length=1, description="held-out tokens")
    fit_tokens: int = Field(4000, ge=100)
    dev_tokens: int = Field(800, ge=50)
    fresh: int = Field(
        100, ge=0, description="fresh tokens per held-out token that the truth is measured on; 0: no coverage"
    )
    new_views: int = Field(25, ge=2, description="new random views; the true null is their mean")
    draws: int = Field(500, ge=100)
    fit: FitRecipe = FitRecipe()
    rule: VerdictRule = VerdictRule()

    @field_validator("tune", "held_out")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in STREAM_FAMILIES:
                raise ValueError(f"unknown family {name!r}; there are {', '.join(STREAM_FAMILIES)}")
        return names

    def jobs(self) -> "Iterator[Job]":
        """Every stream to measure; its sizes are drawn at random."""
        for group in ("tune", "held_out"):
            for family in getattr(self, group):
                for number in range(self.streams):
                    # Families differ in the sizes, directions and tokens of their streams, so they may be counted together.
                    of_family = int.from_bytes(hashlib.sha256(f"{group}/{family}".encode()).digest()[:3])
                    rng = np.random.default_rng([number, of_family])
                    first, last = self.noise[rng.integers(len(self.noise))]
                    shape = Shape(
                        d=int(rng.choice(self.d)),
                        layers=int(rng.choice(self.layers)),
                        vocab=self.vocab,
                        first_noise=first,
                        last_noise=last,
                    )
                    tokens, seed = int(rng.choice(self.tokens)), int(rng.integers(2**31))
                    yield Job(group=group, family=family, number=number, seed=seed, tokens=tokens, shape=vars(shape))


class Job(BaseModel):
    """One stream to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    group: Literal["tune", "held_out"]
    family: str
    number: int
    seed: int
    tokens: int
    shape: dict[str, Any]


def measure(job: Job, recipe: Calibration) -> dict[str, Any]:
    """One row of ``streams.csv``: indices, verdict and truth of a stream."""
    torch.set_num_threads(1)  # products are small: processes measure streams in parallel instead
    seed = job.seed
    stream = SyntheticStream(job.family, Shape(**job.shape), seed=seed)
    captured = stream.capture(recipe.fit_tokens, seed=10 * seed + 1)
    dev = stream.capture(recipe.dev_tokens, seed=10 * seed + 2, constant=captured.mean_p)
    scored = stream.capture(job.tokens, seed=10 * seed + 3, constant=captured.mean_p)
    lenses = fit(FitContext.of(stream.readout, captured, dev, recipe.fit, seed=seed))
    frame = evaluate(stream.readout, scored, lenses).frame(windows_of(scored), model=job.family, seed=seed)
    sums = ClusterSums.of(frame)
    weights = bootstrap_weights(len(sums.tokens), recipe.draws, seed)
    point, drawn = (Means.of_clusters(sums.totals, sums.tokens, w) for w in (None, weights))
    found = estimates(point, drawn, seed=seed, clusters=len(sums.tokens))
    row: dict[str, Any] = {
        "set": job.group, "family": job.family, "truth": STREAM_FAMILIES[job.family].truth, "number": job.number,
        "seed": job.seed, **job.shape, "tokens": job.tokens,
    }  # fmt: skip
    truth = {}
    if recipe.fresh:
        views = views_of(stream, lenses, captured, dev, recipe, seed)
        truth = true_indices(stream, lenses, views, captured.mean_p, recipe.fresh * job.tokens, seed)
    for name in JUDGED:
        e = found[name]
        row |= {name: e.value, f"{name}_ci_low": e.low, f"{name}_ci_high": e.high, f"{name}_true": truth.get(name)}
    row[f"{OWN_VIEWS}_true"] = truth.get(OWN_VIEWS)

    def span(name: str) -> Span | None:
        e = found[name]
        return None if e.value is None or e.low is None or e.high is None else Span(e.value, e.low, e.high)

    for scope, suffix in SCOPES.items():
        verdict = decide_on(recipe.rule, scope, span)
        row |= {f"verdict{suffix}": verdict.answer, f"reason{suffix}": verdict.reason}
    return row


def views_of(
    stream: SyntheticStream, lenses: Fit, captured: Capture, dev: Capture, recipe: Calibration, seed: int
) -> list[AffineMaps]:
    """The shared lens of every random-basis view, as maps of states that are not rotated: the fit's views, then new ones."""
    moments = Moments.of(captured)
    search = DevSearch(stream.readout, dev, recipe.fit, pad_direction(stream.readout, captured.states[-1]))
    maps = [lenses[SHARED_LENS.of_view(k)].to_plain(0, lenses.views) for k in range(len(lenses.views))]
    for k in range(recipe.new_views):
        view = RotatedView.random(moments.covariance, seed=NEW_VIEWS + 1000 * seed + k, variance=recipe.fit.variance)
        maps.append(rotated_maps(fit_rotated(search, moments.rotated(view), view).maps, view))
    return maps


NEW_VIEWS = 500_000_000
"""First seed of the views that truths are measured on; seeds of fits count from zero"""


def true_indices(
    stream: SyntheticStream, lenses: Fit, views: list[AffineMaps], constant: torch.Tensor, tokens: int, seed: int
) -> dict[str, float]:
    """The indices of the fitted lenses on fresh tokens, which intervals over documents should cover.

    The fresh tokens are divided among groups of ``views``, each as large as the number of views of the fit. The retention
    of a view is computed on the tokens of its group.
    """
    layers = list(range(stream.layers))
    size = len(lenses.views)
    groups = [list(range(start, min(start + size, len(views)))) for start in range(0, len(views), size)]
    totals: dict[str, Any] = {}
    of_views, own_there, constant_there = (np.zeros((len(views), n)) for n in (stream.layers, stream.layers, 1))
    done = number = 0
    while done < tokens or number < len(groups):
        count = min(FRESH_BLOCK, -(-tokens // len(groups)))
        block = stream.capture(count, seed=10 * seed + 1_000_000 + number, constant=constant)
        matrix = transfer_sums(stream.readout, block, lenses.headline.maps, lenses=layers, layers=layers)
        group = groups[number % len(groups)]
        read = [lenses[OWN].maps, lenses[SHARED_LENS].maps, *(views[k] for k in group)]
        kl = kl_of_readers(stream, block, read)
        parts = {
            "constant": float(block.constant_kl.double().sum()),
            "transfer": with_last(matrix.kl.sum(0)),
            "transfer_ce": with_last(matrix.ce.sum(0)),
            "movement": with_last(matrix.movement.sum(0)),
            "own": kl[0],
            "shared": kl[1],
        }
        totals = {name: totals.get(name, 0) + value for name, value in parts.items()}
        of_views[group] += kl[2:]
        own_there[group] += kl[0]
        constant_there[group] += parts["constant"]
        done, number = done + len(block), number + 1
    means = {name: np.asarray(value / done) for name, value in totals.items()}
    of_view = retention(own_there, of_views, constant_there[:, 0]).value
    unknown = np.full(len(layers), np.nan)
    whole = Means(
        **means,
        rotated=unknown[None],
        shared_loo=unknown,
        own_refined=unknown,
        shared_refined=unknown,
        pair=np.full((len(layers), len(layers)), np.nan),
        pair_rotated=np.full((1, len(layers), len(layers)), np.nan),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {name: float(INDICES[name].value(whole).value) for name in JUDGED if not INDICES[name].made_of}
        kept = retention(whole.own, whole.shared, whole.constant)
        for name, of_some in (("shared_consistency", of_view[size:]), (OWN_VIEWS, of_view[:size])):
            found[name] = float(consistency(kept, Value(of_some.mean())).value)
    return found


def kl_of_readers(stream: SyntheticStream, block: Capture, readers: Sequence[AffineMaps]) -> NDArray[np.float64]:
    """Summed KL ``[M, L]`` of M lenses that read every layer 0..L-1; a lens has a map for each layer, or one for all."""
    sums = []
    for layer in range(stream.layers):
        maps = AffineMaps.stack([m[[layer if len(m) > 1 else 0]] for m in readers])
        scores = score(stream.readout, block.states[layer], maps, block)
        sums.append(scores.kl.double().sum(1).numpy())
    return np.stack(sums, -1)


def run_calibration(
    recipe: Calibration,
    folder: Path,
    *,
    workers: int,
    code: dict[str, Any] | None = None,
    progress: Progress = QUIET,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure every stream and write ``streams.csv``, ``calibration.csv`` and ``thresholds.csv``; returns the first two.

    Finished streams are reused. ``code``: what the manifest says of the versions that ran.
    Raises :class:`LensbenchError` where a finished stream cannot be read.
    """
    with claimed(folder, recipe.name):
        streams = measured_streams(recipe, folder / "streams", workers, progress)
        summary = summarise(streams)
        tables = {"streams.csv": streams, "calibration.csv": summary, "thresholds.csv": midpoints(streams)}
        for name, table in tables.items():
            write_study_table(folder, name, table, digits=None)
        manifest = {
            "calibration": recipe.model_dump(mode="json"),
            "suite_name": recipe.name,
            "files": study_files(folder, tables),
            "code": code,
        }
        write_manifest(folder, manifest)
    return streams, summary


def measured_streams(recipe: Calibration, kept: Path, workers: int, progress: Progress) -> pd.DataFrame:
    """A row per stream, in the order of the recipe's jobs; each is kept in a file of its own in the folder ``kept``."""
    jobs = list(recipe.jobs())
    # What a stream's row depends on: everything but how many of them there are.
    common = {"version": VERSION} | recipe.model_dump(
        mode="json", include={"fit", "fit_tokens", "dev_tokens", "fresh", "new_views", "draws", "rule"}
    )
    rows = kept_rows(jobs, measure, recipe, kept, common=common, workers=workers, progress=progress)
    return pd.DataFrame(rows)


SIZES = ("layers", "d", "noise", "tokens")
"""Sizes in which the streams of a family differ"""


def summarise(streams: pd.DataFrame) -> pd.DataFrame:
    """Shares of verdicts that commit, are right and cannot tell, and of intervals that cover the truth; ``calibration.csv``.

    Rows are, for each set, all streams, the pure streams and each family; for the held-out set also each size. Coverage is
    also given over both sets together, since nothing was tuned for it. Each share has a 95 % Wilson interval. Columns with
    ``_without_layer0`` are verdicts without layer 0; their thresholds are those of all layers.
    """
    rows = []
    noise = streams["first_noise"].astype(str) + " to " + streams["last_noise"].astype(str)
    streams = streams.assign(noise=noise)
    pure, held_out = streams[streams["truth"] != "mixed"], streams[streams["set"] == "held_out"]
    groups = [((s, "family", f), g) for (s, f), g in streams.groupby(["set", "family"], sort=False)]
    groups += [((s, "all", "all"), g) for s, g in streams.groupby("set", sort=False)]
    groups += [((s, "pure", "all"), g) for s, g in pure.groupby("set", sort=False)]
    groups += [(("held_out", size, v), g) for size in SIZES for v, g in held_out.groupby(size)]
    groups += [(("both", "all", "all"), streams)]
    groups += [(("both", size, v), g) for size in SIZES for v, g in streams.groupby(size)]
    for (group, by, value), rows_of in groups:
        row: dict[str, Any] = {"set": group, "by": by, "value": value, "streams": len(rows_of)}
        for suffix in SCOPES.values():
            judged = rows_of if group != "both" else rows_of[:0]  # the rule was tuned on some of them
            committed = judged[f"verdict{suffix}"] != CANNOT_TELL
            right = committed & (judged[f"verdict{suffix}"] == judged["truth"])
            row[f"committed{suffix}"] = int(committed.sum()) if len(judged) else None
            row |= share(f"right_when_committed{suffix}", int(right.sum()), int(committed.sum()))
            row |= share(f"cannot_tell{suffix}", int((~committed).sum()), len(judged))
        for name in (*JUDGED, OWN_VIEWS):
            index = name.removesuffix("_own_views")
            known = rows_of[rows_of[f"{name}_true"].notna() & rows_of[index].notna()]
            inside = known[f"{name}_true"].between(known[f"{index}_ci_low"], known[f"{index}_ci_high"])
            row |= share(f"covered_{name}", int(inside.sum()), len(known))
        rows.append(row)
    return pd.DataFrame(rows)


TUNED = {
    "visible": ("gain_visibility_ci_low", "refinement", 1),
    "consistent": ("shared_consistency_ci_low", "refinement", 1),
    "inconsistent": ("shared_consistency_ci_high", "re-representation", -1),
}
"""Threshold -> the column it is compared with, the truth whose streams must pass, and the side: above (1) or below (-1)"""


def midpoints(streams: pd.DataFrame) -> pd.DataFrame:
    """The thresholds that the ``tune`` streams suggest: ``threshold, pure, other, midpoint``.

    The midpoint lies between the worst stream that must pass (``pure``) and the nearest stream of another truth (``other``).
    Only families that lie wholly on the other side count; other thresholds exclude the rest. The two thresholds that are
    missing here have a meaning of their own: still is near zero, unseen is zero.
    """
    tune, rows = streams[streams["set"] == "tune"], []
    for threshold, (column, truth, side) in TUNED.items():
        pure = (side * tune.loc[tune["truth"] == truth, column]).min()
        beyond = (side * tune[column])[tune["truth"] != truth].groupby(tune["family"]).max()
        nearest = beyond[beyond < pure].max()
        row = {"threshold": threshold, "pure": side * pure, "other": side * nearest}
        rows.append(row | {"midpoint": side * (pure + nearest) / 2})
    return pd.DataFrame(rows)


def share(name: str, count: int, of: int) -> dict[str, float | None]:
    """``count / of`` with its 95 % Wilson interval; None where ``of`` is 0."""
    if not of:
        return {name: None, f"{name}_ci_low": None, f"{name}_ci_high": None}
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {name: count / of, f"{name}_ci_low": float(interval.low), f"{name}_ci_high": float(interval.high)}


def default_workers() -> int:
    """One process for each processor."""
    """One per core."""
    return max(1, os.cpu_count() or 1)
