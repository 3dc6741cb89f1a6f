"""All that is measured of the updates of one model: the decomposition, its variants and its landmarks."""

from dataclasses import replace
from typing import Any

import numpy as np

from lensbench.data.samples import Samples
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.measures.indices import seed_of_rotations
from lensbench.measures.update.decomposition import STEPS, Decomposition, decompose
from lensbench.measures.update.recipe import UpdateRecipe
from lensbench.measures.update.result import UpdateResult, landmark_results
from lensbench.measures.update.undefined import Undefined
from lensbench.measures.update.variants import MassiveTokens, without_massive
from lensbench.runtime.memory import release_memory
from lensbench.runtime.progress import QUIET, Progress
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut


def measure_updates(
    readout: ReadOut,
    fit: Capture,
    dev: Capture,
    held_out: Capture,
    recipe: FitRecipe,
    settings: UpdateRecipe,
    *,
    name: str,
    seed: int,
    progress: Progress = QUIET,
) -> UpdateResult:
    """The update decomposition of a model from its states on three splits, each of them as :func:`in_clusters` gives it.

    ``recipe``: ridges, pads and the tolerance of the lenses. ``name`` and ``seed`` of the model seed what refits add to the
    draws. Where the decomposition is undefined the result is empty and says why.
    """
    steps = [*STEPS, "without massive activations", "landmarks"]
    with progress.task(f"update-{name}-seed{seed}", len(steps), "steps") as task:

        def begin(step: str) -> None:
            release_memory()  # each step leaves matrices of another size
            task.update(steps.index(step), step)

        try:
            found = decompose(
                readout,
                fit,
                dev,
                held_out,
                recipe,
                layers=spread_layers(fit.layers, settings.layers) if fit.layers > 1 else [0],
                metric=settings.metric,
                refits=settings.refits,
                readable=settings.readable,
                tolerances=settings.tolerances,
                metrics=settings.metrics,
                seed=seed,
                spread=seed_of_rotations(name, seed),
                say=begin,
            )
            begin("without massive activations")
            found, rows = capped(found, readout, (fit, dev, held_out), recipe, settings, seed)
        except Undefined as error:
            return UpdateResult.undefined(str(error))
        result = UpdateResult.of(found, rows)
        if not settings.landmarks:
            return result
        begin("landmarks")
        known = dict(zip(found.layers, found.choices, strict=True))
        landmarks = landmark_results(
            readout, fit, dev, held_out, recipe, metric=settings.metric, seed=seed, known=known
        )
        return result.beside(landmarks)


def capped(
    found: Decomposition,
    readout: ReadOut,
    captures: tuple[Capture, Capture, Capture],
    recipe: FitRecipe,
    settings: UpdateRecipe,
    seed: int,
) -> tuple[Decomposition, list[dict[str, Any]]]:
    """The decomposition beside one without tokens of massive activations, and rows of their shares on fit, dev and eval.

    Lenses are fitted anew without them, at the same ridges in median eigenvalues.
    """
    if settings.largest_norm is None:
        return found, []
    massive = MassiveTokens.of(captures[0], found.layers, settings.largest_norm)
    (fit, dev, held_out), shares = zip(
        *(massive.left_out(captured, recipe.memory_gib) for captured in captures), strict=True
    )
    rows = massive.rows(dict(zip(("fit", "dev", "eval"), shares, strict=True)))
    if not any(shares):
        return found, rows
    try:
        other = decompose(
            readout, fit, dev, held_out, recipe, layers=found.layers, metric=settings.metric, refits=0, readable=False,
            gating=found.gating, known=found.choices, normed=False, variant=True, seed=seed,
        )  # fmt: skip
    except Undefined as error:
        rows[-1]["reason"] = f"without these tokens: {error}"
        return found, rows
    return without_massive(found, other, settings.largest_norm), rows


def in_clusters(captured: Capture, samples: Samples) -> Capture:
    """The capture with clusters in place of documents: folds, gates and intervals take whole ones."""
    cluster = np.unique(samples.clusters[captured.window], return_inverse=True)[1].astype(np.int64)
    return replace(captured, document=cluster)
