"""A kind of lens in one file: the change of the mean state alone."""

import torch

from lensbench.lenses import AffineMaps, FitContext, FittedLens, Job, LensId, LensKind, LensRecord, Phase

MEAN_SHIFT = LensId("mean_shift", "none", "closed")


def plan(context: FitContext) -> list[Job]:
    """One job: ``h -> h + E h_L - E h_l`` at every layer."""

    def fit() -> FittedLens:
        moments = context.moments
        eye = torch.eye(len(moments.target_mean), dtype=torch.float64).repeat(len(moments.mean), 1, 1)
        record = LensRecord(lens=MEAN_SHIFT, reads=[[layer] for layer in context.layers])
        return FittedLens(record, AffineMaps(eye, moments.target_mean - moments.mean))

    return [Job.of(str(MEAN_SHIFT), Phase.CLOSED, "change of the mean", fit)]


TOY = LensKind(name="mean_shift", label="change of the mean", colour="#56b4e9", reads="layer", plan=plan)
