"""Lenses for several layers at once: one for all, one with a bias per layer, one for all layers but one."""

from functools import partial

from lensbench.lenses.closed import fit_rotated, fit_shared, fit_shared_bias
from lensbench.lenses.lens import FittedLens, LensId, joined
from lensbench.lenses.moments import Moments, RotatedMoments
from lensbench.lenses.per_layer import solved_again
from lensbench.lenses.planning import FitContext, Job, LensKind, Phase, closed_lens

SHARED_LENS = LensId("shared", "zero", "closed")


SHARED_BIAS_LENS = LensId("shared_bias", "zero", "closed")


SHARED_LOO_LENS = LensId("shared_loo", "zero", "closed")


REFITTED_VIEWS = 2
"""Rotated views at most whose lenses are fitted again: what documents do to a null is much the same in each of them"""


def plan_shared(context: FitContext) -> list[Job]:
    """One lens for all layers, and one for each rotated view from the view's own moments: the random-basis null."""
    layers = context.layers

    def plain() -> FittedLens:
        return closed_lens(SHARED_LENS, [layers], fit_shared(context.search, context.moments, layers))

    def rotated(k: int) -> FittedLens:
        solved = fit_rotated(context.search, context.rotated(k), context.views[k], near=context.choice(SHARED_LENS))
        return closed_lens(SHARED_LENS.of_view(k), [layers], solved, basis="view")

    null = [
        Job.of(str(SHARED_LENS.of_view(k)), Phase.NULL, f"shared, rotated view {k}", partial(rotated, k))
        for k in range(len(context.views))
    ]
    return [Job.of(str(SHARED_LENS), Phase.CLOSED, "shared", plain), *null]


def refit_shared(context: FitContext, moments: Moments, number: int) -> list[FittedLens]:
    """The shared lens and those of the first :data:`REFITTED_VIEWS` rotated views."""
    layers = context.layers
    again = [solved_again(context, moments.pooled(layers), context.lens(SHARED_LENS), number)]
    for k, view in enumerate(context.views[:REFITTED_VIEWS]):
        lens = context.lens(SHARED_LENS.of_view(k))
        again.append(solved_again(context, RotatedMoments(moments, view).pooled(layers), lens, number))
    return again


def plan_shared_bias(context: FitContext) -> list[Job]:
    """One matrix for all layers, a bias for each."""
    reads = [[layer] for layer in context.layers]

    def fit() -> FittedLens:
        return closed_lens(SHARED_BIAS_LENS, reads, fit_shared_bias(context.search, context.moments))

    return [Job.of(str(SHARED_BIAS_LENS), Phase.CLOSED, "shared, one bias per layer", fit)]


def plan_shared_loo(context: FitContext) -> list[Job]:
    """For each chosen layer one lens for all other layers; it is read at the layer that was left out."""

    def without(layer: int) -> FittedLens:
        # The search begins in the middle of the path: no choice, and no place that it begins from, has seen the layer.
        solved = fit_shared(context.search, context.moments, _others(context, layer))
        return closed_lens(SHARED_LOO_LENS, [[layer]], solved)

    return [
        Job.of(f"{SHARED_LOO_LENS}-{layer}", Phase.CLOSED, f"shared without layer {layer}", partial(without, layer))
        for layer in context.chosen
    ]


def refit_shared_loo(context: FitContext, moments: Moments, number: int) -> list[FittedLens]:
    """The leave-one-out lenses of the chosen layers."""
    lens = context.lens(SHARED_LOO_LENS)
    each = [
        solved_again(context, moments.pooled(_others(context, layer)), lens, number, [at])
        for at, layer in enumerate(context.chosen)
    ]
    return [joined(each)]


def _others(context: FitContext, layer: int) -> list[int]:
    return [k for k in context.layers if k != layer]


SHARED = LensKind(
    name="shared", label="shared lens", colour="#d55e00", reads="layers", plan=plan_shared, refit=refit_shared
)


SHARED_BIAS = LensKind(
    name="shared_bias", label="shared lens, one bias per layer", colour="#f0a830", reads="layers",
    note="a bias per layer", on_page=False, plan=plan_shared_bias,
)  # fmt: skip


SHARED_LOO = LensKind(
    name="shared_loo", label="shared lens, layer left out", colour="#029e73", reads="layers",
    note="fitted without it", on_page=False, plan=plan_shared_loo, refit=refit_shared_loo,
)  # fmt: skip
