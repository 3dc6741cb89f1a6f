"""The per-layer lenses and the shared one refined on KL, side by side in one loop."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lensbench.lenses.lens import FittedLens, LensId
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext, Job, Phase
from lensbench.lenses.refine import refine
from lensbench.lenses.shared import SHARED_LENS

OWN_REFINED = replace(OWN, stage="refined")


SHARED_REFINED = replace(SHARED_LENS, stage="refined")


@dataclass(frozen=True)
class OwnAndShared:
    """The regressions of all layers, and the shared one after them, none of their matrices copied."""

    own: Moments
    shared: Moments

    @property
    def mean(self) -> Tensor:
        """``[L + 1, d]``"""
        return torch.cat([self.own.mean, self.shared.mean])

    def unit(self, regression: int) -> float:
        """The unit of a regression's ridge."""
        count = len(self.own.mean)
        return self.own.unit(regression) if regression < count else self.shared.unit(regression - count)


def plan(context: FitContext) -> list[Job]:
    """One job: all lenses share the vocabulary that a step sees."""
    layers = context.layers

    def run(say: Callable[[str], None]) -> dict[str, Tensor]:
        own, shared = context.lens(OWN), context.lens(SHARED_LENS)
        refined = refine(
            context.search,
            context.fit,
            OwnAndShared(context.moments, context.moments.pooled(layers)),
            AffineMaps.stack([own.maps, shared.maps]),
            [ridge or 0.0 for ridge in (*own.record.ridge, *shared.record.ridge)],
            [*([layer] for layer in layers), layers],
            seed=context.seed,
            report=lambda done, limit: say(f"refining, update {done} of at most {limit}"),
        )
        maps = AffineMaps.stack([r.maps for r in refined])

        def part(lens: FittedLens, name: LensId, rows: slice) -> dict[str, Tensor]:
            how = {
                "lens": name,
                "iterations": [r.iterations for r in refined[rows]],
                "ended": [r.ended for r in refined[rows]],
            }
            return FittedLens(lens.record.model_copy(update=how), maps[rows]).tensors()

        return part(own, OWN_REFINED, slice(0, len(layers))) | part(shared, SHARED_REFINED, slice(len(layers), None))

    return [Job("refined", Phase.REFINED, "refined", run)]
