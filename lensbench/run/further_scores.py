"""The stages of what a suite asks for next to its scores: precision of every lens, and the matrix of Jacobian lenses.

They have stages of their own, so that the scores of a suite that asks for them later are still found.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lensbench.data.samples import Samples
from lensbench.lenses.fit import Fit
from lensbench.lenses.jacobian_kinds import JACOBIAN_LENS
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.lens import FittedLens, LensRecord
from lensbench.lenses.logit import LOGIT_LENS
from lensbench.lenses.maps import AffineMaps
from lensbench.measures.evaluate import QUANTITIES
from lensbench.measures.top_words import TOP, precision_sums
from lensbench.measures.transfer import transfer_sums
from lensbench.results.sums import JACOBIAN_MATRIX
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import fitting, rotation_of
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import origin_of, stream_of
from lensbench.runtime.files import write_atomically
from lensbench.runtime.stages import Pieces, Stage
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sums_of_all
from lensbench.streams.readout import ReadOut
from lensbench.suite.recipes import ModelRecipe, Suite

PRECISION, MATRIX = "precision", "jacobian-matrix"
"""How the stages are called"""

TABLE = "sums.parquet"

LENS_KEY = ["lens", "stage", "prior", "view", "layer"]
"""What tells the lenses of ``lenses.csv`` apart"""


def asked_for(suite: Suite) -> list[str]:
    """Which of these stages a suite asks for, by what they are called."""
    asked = {PRECISION: suite.evaluate.top, MATRIX: suite.evaluate.jacobian_matrix}
    return [what for what in asked if asked[what]]


def further_stages(context: Context, model: ModelRecipe, seed: int) -> dict[str, Stage]:
    """The stages that the suite asks for, by what they are called."""
    return {what: _stage(context, model, seed, what) for what in asked_for(context.suite)}


def with_further_sums(context: Context, model: ModelRecipe, seed: int, sequences: pd.DataFrame) -> pd.DataFrame:
    """The sums of a model's scores, and what these stages found: columns of :data:`TOP`, rows of the matrix."""
    stages = further_stages(context, model, seed)
    if PRECISION in stages:
        found = pd.read_parquet(stages[PRECISION].folder / TABLE)
        keys = [*LENS_KEY, "document", "sequence"]
        kinds = sequences.dtypes
        joined = sequences.merge(found, on=keys, how="left", suffixes=("", "_found"), validate="m:1")
        joined["top1"] = joined["top1"].fillna(joined.pop("top1_found"))
        sequences = joined.astype({**kinds.to_dict(), "top10": "float32"})
    if MATRIX in stages:
        rows = pd.read_parquet(stages[MATRIX].folder / TABLE).assign(model=model.name, seed=seed)
        kinds = sequences.dtypes
        sequences = pd.concat([sequences.astype({"document": str, "lens": str}), rows], ignore_index=True)
        sequences = sequences.astype(kinds.to_dict() | {"document": "category", "lens": "category"})
    return sequences


def _stage(context: Context, model: ModelRecipe, seed: int, what: str) -> Stage:
    fitted, settings = fitting(context, model, seed), context.suite.evaluate
    name = f"{what}-{model.name}-seed{seed}"

    def compute(folder: Path) -> None:
        fit, origin = Fit.load(fitted.folder), origin_of(context, model, seed)
        samples = eval_samples(context, data_of(context, model))
        captured, readout = captured_states(
            context, stream_of(context, origin, model.view), samples, name=f"capture-{name}", origin=origin,
            constant=fit.constant, rotation=rotation_of(fitted), ranks=context.ranks,
        )  # fmt: skip
        if what == PRECISION:
            parts = list(_precision(context, name, fit, captured, readout))
        else:
            pieces = Pieces(folder / "pieces", context.ranks)
            parts = list(_matrix(context, name, fit, captured, readout, pieces))
            pieces.clear()
        if context.ranks.first:
            frame = pd.concat([_of_windows(samples, part) for part in parts], ignore_index=True)
            write_atomically(folder / TABLE, lambda path: frame.to_parquet(path, index=False))

    key: dict[str, Any] = {"fit": fitted.digest, "evaluate": settings.scored}
    if context.sequences is not None:
        key["sequences"] = context.sequences
    return context.stage(name, key, compute, together=True)


def _of_windows(samples: Samples, values: dict[str, Any]) -> pd.DataFrame:
    """Rows of all windows: ``document``, ``sequence``, and values that are one for all or one for each."""
    names = np.array(samples.document_names, dtype=object)[samples.documents]
    return pd.DataFrame({"document": names, "sequence": samples.sequence, **values}, range(len(names)))


def _precision(context: Context, name: str, fit: Fit, captured: Capture, readout: ReadOut) -> Iterator[dict[str, Any]]:
    """What ``precision`` measures of each lens and layer of ``lenses.csv``."""
    everything = range(fit.summary.depth + 1)
    logit = LensRecord(lens=LOGIT_LENS, reads=[[layer] for layer in everything])
    identity = AffineMaps.identity(captured.states.shape[-1])
    lenses = [FittedLens(logit, AffineMaps.stack([identity] * len(everything)))]
    lenses += [lens for lens in fit.lenses.values() if is_in_lenses_csv(lens)]
    with context.progress.task(name, len(lenses), "lenses") as task:
        for number, lens in enumerate(lenses):
            found = precision_sums(readout, captured, lens, fit.views)
            for k, layer in enumerate(lens.record.layers):
                which = dict(
                    zip(LENS_KEY, (lens.id.kind, lens.id.stage, lens.id.prior, lens.id.view, layer), strict=True)
                )
                yield which | {precision: found[precision][:, k] for precision in TOP}
            task.update(number + 1, str(lens.id))


def is_in_lenses_csv(lens: FittedLens) -> bool:
    """Whether a fitted lens has rows of its own there: not those of the transfer matrix, of pairs, of refits."""
    which = lens.id
    if lens.record.transfers or lens.record.unchanged or KINDS[which.kind].reads == "pair":
        return False
    return which.view <= 0 and which.refit < 0


def _matrix(
    context: Context, name: str, fit: Fit, captured: Capture, readout: ReadOut, pieces: Pieces
) -> Iterator[dict[str, Any]]:
    """The rows of the matrix of Jacobian lenses, as the scores' own are written; row L is the logit lens."""
    with context.progress.task(name, fit.summary.depth + 1, "layers") as task:
        sums = transfer_sums(
            readout, captured, fit[JACOBIAN_LENS].maps, memory_gib=context.suite.fit.memory_gib, pieces=pieces,
            name="matrix", report=lambda layer: task.update(layer + 1),
        )  # fmt: skip
    tokens = sums_of_all(torch.ones(len(captured)), captured)
    which = {"lens": JACOBIAN_MATRIX, "stage": JACOBIAN_LENS.stage, "prior": JACOBIAN_LENS.prior, "view": -1}
    for i, j in np.ndindex(sums.kl.shape[1:]):
        found = {quantity: getattr(sums, quantity)[:, i, j] for quantity in QUANTITIES}
        yield {**which, "lens_layer": i, "layer": j, "tokens": tokens, "bytes": 0, **found}
