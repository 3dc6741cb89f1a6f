"""Jacobian lenses: one per layer, of the current and later positions or of the current one, and their mean over layers."""

from functools import partial

import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import Targets
from lensbench.lenses.lens import FittedLens, LensId, LensRecord
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext, Job, LensKind, Phase

JACOBIAN_LENS = LensId("jacobian", "none", "backward")


JACOBIAN_LOCAL_LENS = LensId("jacobian_local", "none", "backward")


SHARED_JACOBIAN_LENS = LensId("shared_jacobian", "none", "backward")


SHARED_JACOBIAN_LOO_LENS = LensId("shared_jacobian_loo", "none", "backward")


def linear(matrix: Tensor) -> AffineMaps:
    """Maps ``J h`` without an offset, ``[M, d, d]``."""
    return AffineMaps(matrix, matrix.new_zeros(matrix.shape[:2]))


def plan_of(lens: LensId, targets: Targets, context: FitContext) -> list[Job]:
    """The job that estimates J of every layer, where the recipe asks for this kind.

    Per-layer ridge maps with prior zero are its control variate: they are fitted without any backward pass, and J of the
    current position equals them where states are Gaussian and positions independent (Stein's lemma).
    Raises :class:`LensbenchError` where the fit has no model to go back through.
    """
    if lens.kind not in context.recipe.lenses:
        return []
    source = context.jacobians
    if source is None:
        raise LensbenchError(f"lenses of kind {lens.kind} go back through a model, and this fit has states alone")

    def run(say: object) -> dict[str, Tensor]:
        # Of a rotated view the maps are turned back: the source's states are plain.
        control = None if source.rotation is not None else context.lens(OWN).maps.matrix
        found = source.estimate(targets, control, say)  # type: ignore[arg-type]
        reads = [[layer] for layer in context.layers]
        record = LensRecord(lens=lens, reads=reads, jacobian=found.facts)
        return FittedLens(record, linear(found.mean)).float32().tensors()

    return [Job(str(lens), Phase.BACKWARD, f"{lens.kind.replace('_', ' ')} lens", run)]


def plan_shared(context: FitContext) -> list[Job]:
    """The mean of J over layers, and in each rotated view: the random-basis null."""
    if SHARED_JACOBIAN_LENS.kind not in context.recipe.lenses:
        return []
    layers = context.layers

    def plain() -> FittedLens:
        mean = context.lens(JACOBIAN_LENS).maps.matrix.double().mean(0, keepdim=True)
        return FittedLens(LensRecord(lens=SHARED_JACOBIAN_LENS, reads=[layers]), linear(mean))

    def rotated(k: int) -> FittedLens:
        each = context.lens(JACOBIAN_LENS).maps.matrix.double()
        turned = torch.stack([j @ q.to(j).T for j, q in zip(each, context.views[k].maps, strict=False)])
        record = LensRecord(lens=SHARED_JACOBIAN_LENS.of_view(k), reads=[layers], basis="view")
        return FittedLens(record, linear(turned.mean(0, keepdim=True)))

    jobs = [Job.of(str(SHARED_JACOBIAN_LENS), Phase.AFTER_BACKWARD, "shared Jacobian", plain)]
    return jobs + [
        Job.of(
            str(SHARED_JACOBIAN_LENS.of_view(k)), Phase.AFTER_BACKWARD, f"shared Jacobian, rotated view {k}",
            partial(rotated, k),
        )
        for k in range(len(context.views))
    ]  # fmt: skip


def plan_shared_loo(context: FitContext) -> list[Job]:
    """For every layer the mean of J over all other layers."""
    if SHARED_JACOBIAN_LENS.kind not in context.recipe.lenses or len(context.layers) < 2:
        return []

    def without() -> FittedLens:
        each = context.lens(JACOBIAN_LENS).maps.matrix.double()
        others = (each.sum(0) - each) / (len(each) - 1)
        reads = [[layer] for layer in context.layers]
        return FittedLens(LensRecord(lens=SHARED_JACOBIAN_LOO_LENS, reads=reads), linear(others))

    return [
        Job.of(str(SHARED_JACOBIAN_LOO_LENS), Phase.AFTER_BACKWARD, "shared Jacobian, each layer left out", without)
    ]


JACOBIAN = LensKind(
    name="jacobian", label="Jacobian lens", colour="#cc78bc", reads="layer", note="mean Jacobian of the last state",
    on_page=True, plan=partial(plan_of, JACOBIAN_LENS, "later"),
)  # fmt: skip


JACOBIAN_LOCAL = LensKind(
    name="jacobian_local", label="Jacobian lens, own position", colour="#7b4fd0", reads="layer",
    note="of the current position alone", on_page=False, plan=partial(plan_of, JACOBIAN_LOCAL_LENS, "current"),
)  # fmt: skip


SHARED_JACOBIAN = LensKind(
    name="shared_jacobian", label="shared Jacobian lens", colour="#7a1f1f", reads="layers",
    note="its mean over layers", plan=plan_shared,
)  # fmt: skip


SHARED_JACOBIAN_LOO = LensKind(
    name="shared_jacobian_loo", label="shared Jacobian lens, layer left out", colour="#a3a300", reads="layers",
    note="its mean over the other layers", on_page=False, plan=plan_shared_loo,
)  # fmt: skip
