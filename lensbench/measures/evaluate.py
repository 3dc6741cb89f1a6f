"""Every lens of a fit read at every layer of the eval split."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.errors import LensbenchError
from lensbench.lenses.estimated import Estimator, Shares
from lensbench.lenses.fit import Fit, FitSummary
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.lens import FittedLens, LensId, curve_column
from lensbench.lenses.logit import LOGIT_LENS
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.read import lens_sums
from lensbench.lenses.shared import REFITTED_VIEWS, SHARED_LENS, SHARED_LOO_LENS
from lensbench.measures.means import Means
from lensbench.measures.transfer import TransferSums, own_sums, transfer_sums
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sums_of_all
from lensbench.streams.readout import ReadOut

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LensSums:
    """Per-window sums of one lens, nats: column k of each array ``[S, K]`` is the cell ``cells[k]``.

    ``cells``: (layer that the map was fitted at, or -1; layer that it reads). None: not measured.
    """

    cells: list[tuple[int, int]]
    kl: Array
    ce: Array | None = None
    movement: Array | None = None
    top1: Array | None = None


@dataclass(frozen=True)
class Evaluated:
    """Per-window sums of everything that was read on the eval split, and mean KLs of the refits.

    ``lenses``: in the order of rows. ``constant``, ``model_ce``, ``tokens``, ``bytes`` ``[S]``. ``refits``: fields of
    :class:`Means` stacked over the fit itself and its refits, on the refits' tokens.
    """

    lenses: dict[LensId, LensSums]
    constant: Array
    model_ce: Array
    tokens: Array
    bytes: Array
    refits: dict[str, Array]
    fit: FitSummary

    def matrix(self, quantity: str) -> Array:
        """``kl``, ``ce``, ``movement`` or ``top1`` of the whole matrix, ``[S, L+1, L+1]``; lens L is the logit lens."""
        rows = [getattr(self.lenses[lens], quantity) for lens in (self.fit.headline, LOGIT_LENS)]
        size = self.fit.depth + 1
        return np.concatenate(rows, 1).reshape(-1, size, size)

    def frame(self, samples: Samples, *, model: str, seed: int) -> pd.DataFrame:
        """The rows of ``per_sequence.parquet`` of one model and seed."""
        names = np.array(samples.document_names, dtype=object)[samples.documents]
        every = {"document": names, "sequence": samples.sequence}
        sizes = {"tokens": self.tokens, "bytes": self.bytes}

        def block(
            lens: str, at: tuple[int, int], stage: str, prior: str, view: int, sums: dict[str, Any]
        ) -> pd.DataFrame:
            which = {"lens": lens, "lens_layer": at[0], "layer": at[1], "stage": stage, "prior": prior, "view": view}
            known = dict.fromkeys(QUANTITIES, np.nan) | sums
            return pd.DataFrame({**every, **which, **sizes, **known}, range(len(names)))

        blocks = [
            block("constant", (-1, -1), "none", "none", -1, {"kl": self.constant}),
            block("model", (-1, self.fit.depth), "none", "none", -1, {"kl": 0.0, "ce": self.model_ce}),
        ]
        curve = self.fit.curve()
        for lens, read in self.lenses.items():
            if lens in self.fit.records and self.fit.records[lens].unchanged:
                continue  # it is the closed form
            column = curve_column(lens) if lens in curve else lens.kind
            measured = {name: getattr(read, name) for name in QUANTITIES if getattr(read, name) is not None}
            for k, at in enumerate(read.cells):
                sums = {name: values[:, k] for name, values in measured.items()}
                blocks.append(block(column, at, lens.stage, lens.prior, lens.view, sums))
        frame = pd.concat(blocks, ignore_index=True)
        frame.insert(0, "model", model)
        frame.insert(1, "seed", seed)
        return frame.astype(TYPES)


QUANTITIES = ("kl", "ce", "movement", "top1")


TYPES = {
    **dict.fromkeys(("model", "document", "lens", "stage", "prior"), "category"),
    **dict.fromkeys(("seed", "sequence", "tokens", "bytes"), "int32"),
    **dict.fromkeys(("lens_layer", "layer", "view"), "int16"),
    **dict.fromkeys(QUANTITIES, "float32"),
}


Tick = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """One part of an evaluation: how many units of progress it has, and what reads it and counts them."""

    steps: int
    read: Callable[[Tick], dict[LensId, LensSums]]


@dataclass(frozen=True)
class EvalContext:
    """All that an evaluation works on."""

    readout: ReadOut
    captured: Capture
    fit: Fit
    memory_gib: float = float("inf")
    """What movement is measured from is as large as the states; beyond this it is kept on disk as they are."""
    pieces: Pieces = NOTHING_KEPT
    matrix: bool = True
    """Every lens on every layer; without it the lenses of the matrix are read at their own layers, the logit lens at all"""
    estimator: Estimator | None = None
    """Of ``captured``, where only a share of the log-partitions is computed"""

    def on(self, sample: Capture, number: int) -> "EvalContext":
        """The same on some of the tokens, with a sample of them that is drawn anew, the ``number``-th."""
        if self.estimator is None:
            return replace(self, captured=sample)
        return replace(self, captured=sample, estimator=self.estimator.again(sample, number))

    def sums(self, name: str, lens: FittedLens) -> tuple[Array, Array]:
        """Sums of KL and cross-entropy of a lens on its own layers, kept as a piece."""

        def content() -> dict[str, Tensor]:
            scores_at = None if self.estimator is None else self.estimator.score
            kl, ce = lens_sums(self.readout, self.captured, lens, self.fit.views, scores_at)
            return {"kl": torch.from_numpy(kl), "ce": torch.from_numpy(ce)}

        found = self.pieces.get(name, content)
        return found["kl"].numpy(), found["ce"].numpy()

    def chosen_matrix(self, name: str, maps: AffineMaps) -> TransferSums:
        """The matrix of the chosen layers; ``maps``: those of these layers."""
        whole, chosen = self.fit.headline.maps, self.fit.summary.layers
        matrix, offset = whole.matrix.clone(), whole.offset.clone()
        matrix[chosen], offset[chosen] = maps.matrix, maps.offset
        return transfer_sums(
            self.readout, self.captured, AffineMaps(matrix, offset), lenses=chosen, layers=chosen,
            estimator=self.estimator, memory_gib=self.memory_gib, pieces=self.pieces, name=name,
        )  # fmt: skip


def readings(context: EvalContext) -> Iterator[Reading]:
    """What is read, in the order of rows: the matrix, its curve, lenses on their own layers, pairs last."""
    summary = context.fit.summary
    yield Reading(summary.depth + 1, partial(_matrix, context))
    curve = sorted(summary.curve(), key=lambda lens: lens.tolerance_label)
    for lens in curve if context.matrix else ():
        yield Reading(1, partial(_on_the_curve, context, lens))
    # A refined lens that no pass has changed is the closed form, which is read.
    others = [
        lens
        for lens, record in summary.records.items()
        if not record.transfers and lens.refit < 0 and not record.unchanged
    ]
    for lens in sorted(others, key=row_order):
        yield Reading(1, partial(_on_own_layers, context, lens))


def row_order(lens: LensId) -> tuple[int, str, int]:
    """Where rows of a lens stand: lenses of one layer, of rotated views, of several layers, of pairs."""
    reads = KINDS[lens.kind].reads
    group = 3 if reads == "pair" else 1 if lens.view >= 0 else 0 if reads == "layer" else 2
    return group, f"{lens.kind}{'_refined' if lens.stage == 'refined' else ''}", lens.view


def _matrix(context: EvalContext, tick: Tick) -> dict[LensId, LensSums]:
    """The transfer matrix: the lenses of all layers, and the logit lens as the last."""
    fit, depth = context.fit, context.fit.summary.depth
    if context.matrix:
        sums = transfer_sums(
            context.readout, context.captured, fit.headline.maps, estimator=context.estimator,
            memory_gib=context.memory_gib, pieces=context.pieces, name="matrix",
            report=lambda layer: tick(f"matrix, layer {layer}"),
        )  # fmt: skip
    else:
        sums = own_sums(
            context.readout, context.captured, fit.headline.maps, pieces=context.pieces,
            report=lambda layer: tick(f"own lens, layer {layer}"),
        )  # fmt: skip

    def rows(which: range) -> LensSums:
        cells = [(i, j) for i, j in itertools.product(which, range(depth + 1)) if context.matrix or i in (j, depth)]
        i, j = np.array(cells).T
        return LensSums(cells, *(getattr(sums, name)[:, i, j] for name in QUANTITIES))

    return {fit.summary.headline: rows(range(depth)), LOGIT_LENS: rows(range(depth, depth + 1))}


def _on_the_curve(context: EvalContext, lens: LensId, tick: Tick) -> dict[LensId, LensSums]:
    """KL and movement of the chosen layers: all that is followed over tolerances, and enough rows."""
    sums = context.chosen_matrix(f"curve-{lens}", context.fit[lens].maps)
    cells = [(i, j) for i in context.fit.summary.layers for j in context.fit.summary.layers]
    tick(f"tolerance {lens.tolerance_label}")
    return {lens: LensSums(cells, _flat(sums.kl), movement=_flat(sums.movement))}


def _on_own_layers(context: EvalContext, lens: LensId, tick: Tick) -> dict[LensId, LensSums]:
    fitted, kind = context.fit[lens], KINDS[lens.kind]
    kl, ce = context.sums(f"own-{lens}", fitted)
    cells = [(kind.lens_layer(layer, own), layer) for own in fitted.reads for layer in own]
    tick(str(lens))
    return {lens: LensSums(cells, kl, None if kind.reads == "pair" else ce)}


def _flat(matrix: Array) -> Array:
    return matrix.reshape(len(matrix), -1)


def evaluate(
    readout: ReadOut,
    captured: Capture,
    fit: Fit,
    *,
    refit_positions: int | None = None,
    matrix: bool = True,
    exact_share: Shares = 1.0,
    seed: Sequence[int] = (0,),
    memory_gib: float = float("inf"),
    pieces: Pieces = NOTHING_KEPT,
    progress: Progress = QUIET,
    task: str = "score",
) -> Evaluated:
    """Every lens of a fit on the held-out tokens; refits on at most ``refit_positions`` of each window.

    Without the ``matrix`` lenses are read at their own layers alone; a fit with refits or a curve over tolerances needs it.

    Below an ``exact_share`` of 1 (one for all layers, or one of each) all losses are unbiased estimates from that share of
    the exact log-partitions, of tokens drawn with ``seed`` (:mod:`lensbench.lenses.estimated`); a vocabulary too small to
    save anything is read exactly. What movement is measured from is as large as the states; beyond ``memory_gib`` it is
    kept on disk as they are. Finished ``pieces`` are taken up. ``task``: what the progress is called. Raises
    :class:`LensbenchError` for an ``exact_share`` below 1 without the matrix, of which nothing is estimated.
    """
    if not matrix and exact_share != 1:
        raise LensbenchError(f"exact_share is {exact_share}: without the matrix it must be 1")
    estimator = Estimator.where_it_saves(readout, captured, fit.headline.maps, share=exact_share, seed=seed)
    context = EvalContext(readout, captured, fit, memory_gib, pieces, matrix, estimator)
    planned, refits = list(readings(context)), fit.summary.refits
    done = 0
    lenses: dict[LensId, LensSums] = {}
    with progress.task(task, sum(reading.steps for reading in planned) + refits, "readings") as shown:

        def tick(remark: str) -> None:
            nonlocal done
            done += 1
            shown.update(done, remark)

        for reading in planned:
            lenses |= reading.read(tick)
        means = []
        if refits:
            sample = captured if refit_positions is None else thinned_windows(captured, refit_positions)
            on_sample = context.on(sample, 1)
            means.append(refit_means(on_sample, -1))
            for number in range(refits):
                means.append(refit_means(on_sample, number))
                tick(f"refit {number}")
    return Evaluated(
        lenses=lenses,
        constant=sums_of_all(captured.constant_kl, captured),
        model_ce=sums_of_all(captured.model_ce, captured),
        tokens=sums_of_all(torch.ones(len(captured)), captured),
        bytes=sums_of_all(torch.from_numpy(captured.target_bytes), captured),
        refits={name: np.stack([getattr(m, name) for m in means]) for name, _ in means[0].items()} if means else {},
        fit=fit.summary,
    )


def refit_means(context: EvalContext, refit: int) -> Means:
    """Means of a refit on the context's tokens, or of the fit itself (-1); what has no refit is NaN."""
    fit, summary, sample = context.fit, context.fit.summary, context.captured
    chosen, depth = summary.layers, summary.depth
    who = "fit" if refit < 0 else f"refit{refit}"
    maps = fit.headline.maps[chosen] if refit < 0 else fit[summary.headline.of_refit(refit)].maps
    sums = context.chosen_matrix(f"{who}-matrix", maps)

    def kl_of(lens: LensId) -> Array:
        return context.sums(f"{who}-{lens}", fit[lens.of_refit(refit)])[0]

    sample_tokens = sums_of_all(torch.ones(len(sample)), sample)
    unknown = np.full((len(sample_tokens), depth + 1, depth + 1), np.nan)
    block = np.ix_(range(len(sample_tokens)), chosen, chosen)
    whole = {name: unknown.copy() for name in ("kl", "ce", "movement")}
    for name, values in whole.items():
        values[block] = getattr(sums, name)
    own, shared = kl_of(OWN), kl_of(SHARED_LENS)
    loo = unknown[:, :-1, 0].copy()
    loo[:, chosen] = kl_of(SHARED_LOO_LENS)
    total = Means(
        constant=sums_of_all(sample.constant_kl, sample),
        transfer=whole["kl"],
        transfer_ce=whole["ce"],
        movement=whole["movement"],
        own=own,
        shared=shared,
        shared_loo=loo,
        rotated=np.stack([kl_of(SHARED_LENS.of_view(k)) for k in range(min(summary.rotations, REFITTED_VIEWS))], 1),
        own_refined=unknown[:, :-1, 0],
        shared_refined=unknown[:, :-1, 0],
        pair=unknown[:, :-1, :-1],
        pair_rotated=unknown[:, None, :-1, :-1],
    )
    return Means.of_clusters(total, sample_tokens)


def thinned_windows(captured: Capture, positions: int) -> Capture:
    """At most ``positions`` tokens of each window, evenly spread over those that it has."""
    _, rank, counts = np.unique(captured.window, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    within, size = np.arange(len(captured)) - first[rank], counts[rank]
    wanted = np.minimum(positions, size)
    return captured.take(torch.from_numpy(np.flatnonzero((within + 1) * wanted // size > within * wanted // size)))
