"""Tuned lenses, one per layer: those of the transfer matrix, its curve over tolerances, and those with prior zero."""

from functools import partial

import torch
from torch import Tensor

from lensbench.lenses.closed import ClosedForms, fit_each, fit_within, ridge_paths, solve_as_chosen
from lensbench.lenses.lens import FittedLens, LensId, LensRecord, tolerance_label
from lensbench.lenses.maps import rotated_maps
from lensbench.lenses.moments import Moments
from lensbench.lenses.planning import FitContext, Job, LensKind, Phase, closed_lens
from lensbench.lenses.recipe import ONE_STANDARD_ERROR, FitRecipe, Tolerance
from lensbench.lenses.search import Choice, DevSearch

OWN = LensId("tuned", "zero", "closed")
"""One lens per layer, prior zero, at the best ridge on dev: what the shared lens is compared with."""


MATRIX_LENSES = LensId("tuned", "identity", "closed")
"""Lenses of the transfer matrix; each has a tolerance."""


LOADED = LensId("tuned", "identity", "loaded")
"""Lenses of others in the transfer matrix."""


def headline_of(context: FitContext) -> LensId:
    """The lenses of the transfer matrix: within the recipe's tolerance, or loaded."""
    return LOADED if context.loaded is not None else MATRIX_LENSES.within(context.recipe.tolerance)


def curve_tolerances(recipe: FitRecipe) -> list[Tolerance]:
    """The tolerances of the curve, other than the transfer matrix's own."""
    own = tolerance_label(recipe.tolerance)
    labels = [label for label in map(tolerance_label, recipe.tolerances) if label != own]
    return [*map(float, labels), ONE_STANDARD_ERROR]


def plan(context: FitContext) -> list[Job]:
    """Jobs of the transfer matrix and its curve, of the lenses with prior zero, and of these in a random basis."""
    matrix = _matrix_jobs(context) if context.loaded is None else [_loaded_job(context)]
    reads = [[layer] for layer in context.layers]

    def own() -> FittedLens:
        return closed_lens(OWN, reads, fit_each(context.search, context.moments, "zero"))

    check = Job.of(
        str(OWN.of_view(0)), Phase.NULL_CHECK, "per layer, rotated view 0", partial(_in_random_basis, context, reads)
    )
    jobs = [*matrix, Job.of(str(OWN), Phase.CLOSED, "per layer, prior zero", own)]
    return [*jobs, check] if context.recipe.rotated_own else jobs


def _loaded_job(context: FitContext) -> Job:
    def take() -> FittedLens:
        assert context.loaded is not None
        unknown = [None] * len(context.layers)
        reads = [[layer] for layer in context.layers]
        return FittedLens(
            LensRecord(lens=LOADED, reads=reads, transfers=True, ridge=unknown, pad=unknown), context.loaded
        )

    return Job.of(str(LOADED), Phase.MATRIX, "per layer, loaded", take)


def _matrix_jobs(context: FitContext) -> list[Job]:
    """One search per layer; then the lenses within each tolerance, those of the curve for the chosen layers."""

    def search(layer: int, say: object) -> dict[str, Tensor]:
        (choices,) = ridge_paths(context.search, context.moments.layer([layer]), "identity", [layer])
        return {"path": torch.tensor([[c.ridge, c.pad, c.dev_kl] for c in choices], dtype=torch.float64)}

    def within(tolerance: Tolerance, layers: list[int] | None) -> FittedLens:
        paths = [
            [Choice(*row) for row in context.searched[_path_name(layer)]["path"].tolist()] for layer in context.layers
        ]
        solved = fit_within(context.search, context.moments, "identity", paths, tolerance, layers)
        reads = [[layer] for layer in (context.layers if layers is None else layers)]
        return closed_lens(MATRIX_LENSES.within(tolerance), reads, solved, transfers=True)

    jobs = [
        Job(_path_name(layer), Phase.MATRIX, f"layer {layer}, prior identity", partial(search, layer))
        for layer in context.layers
    ]
    tolerances: dict[Tolerance, list[int] | None] = {context.recipe.tolerance: None}
    tolerances |= dict.fromkeys(curve_tolerances(context.recipe), context.chosen)
    return jobs + [
        Job.of(
            str(MATRIX_LENSES.within(tolerance)),
            Phase.MATRIX,
            f"tolerance {tolerance_label(tolerance)}",
            partial(within, tolerance, layers),
        )
        for tolerance, layers in tolerances.items()
    ]


def _path_name(layer: int) -> str:
    return f"path-{layer}"


def _in_random_basis(context: FitContext, reads: list[list[int]]) -> FittedLens:
    """Per-layer lenses fitted to rotated moments and chosen on rotated dev states, as maps of plain states.

    They are scored with the rotation folded into the map, as all rotated lenses are: agreement with the plain ones checks
    the algebra. It is no second measurement.
    """
    view = context.views[0]
    search = DevSearch(context.readout, view.apply(context.dev), context.recipe, context.search.pad)
    solved = fit_each(search, context.rotated(0), "zero")
    folded = ClosedForms(rotated_maps(solved.maps, view), solved.ridges, solved.pads)
    return closed_lens(OWN.of_view(0), reads, folded)


def refit(context: FitContext, moments: Moments, number: int) -> list[FittedLens]:
    """The matrix's lenses of the chosen layers, and all with prior zero; loaded ones stay as they are."""
    chosen, headline, own = context.chosen, context.lens(headline_of(context)), context.lens(OWN)
    if headline.id.stage == "loaded":
        record = headline.record.model_copy(
            update={
                "lens": headline.id.of_refit(number),
                "reads": [[layer] for layer in chosen],
                "ridge": [None] * len(chosen),
                "pad": [None] * len(chosen),
            }
        )
        of_matrix = FittedLens(record, headline.maps[chosen])
    else:
        of_matrix = solved_again(context, moments.layer(chosen), headline, number, chosen)
    return [of_matrix, solved_again(context, moments, own, number)]


def solved_again(
    context: FitContext, regressions: Moments, lens: FittedLens, number: int, rows: list[int] | None = None
) -> FittedLens:
    """A closed form (of some ``rows``) for other moments, at the ridges and pads that dev chose for it."""
    record = lens.record
    at = range(len(record.ridge)) if rows is None else rows
    choices = [Choice(record.ridge[k] or 0.0, record.pad[k] or 0.0, 0.0) for k in at]
    solved = solve_as_chosen(context.search, regressions, lens.id.prior, choices)
    reads = [record.reads[k] for k in at]
    return closed_lens(lens.id.of_refit(number), reads, solved, transfers=record.transfers, basis=record.basis)


TUNED = LensKind(
    name="tuned", label="tuned lens, one per layer", colour="#0173b2", reads="layer", note="per layer",
    plan=plan, refit=refit,
)  # fmt: skip
