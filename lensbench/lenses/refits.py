"""The closed forms again on resampled documents: how much of an index is the draw of the fitting text."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.kinds import KINDS
from lensbench.lenses.moments import Moments
from lensbench.lenses.planning import FitContext, Job, Phase


def plan(context: FitContext) -> list[Job]:
    """A job for each refit: one pass over the fitting tokens for the refits of all kinds."""
    return [
        Job(f"refit-{n}", Phase.REFITS, f"refit {n} on resampled documents", partial(_refit, context, n))
        for n in range(context.recipe.refits)
    ]


def _refit(context: FitContext, number: int, say: Callable[[str], None]) -> dict[str, Tensor]:
    moments = resampled_moments(context, number)
    lenses = [lens for kind in KINDS.values() for lens in kind.refit(context, moments, number)]
    return {name: tensor for lens in lenses for name, tensor in lens.float32().tensors().items()}


def resampled_moments(context: FitContext, number: int) -> Moments:
    """The moments of the fitting documents drawn with replacement, as many as there are."""
    captured = context.fit
    documents = captured.ranks.most(int(captured.document.max())) + 1
    counts = np.random.default_rng([context.seed, number]).multinomial(documents, np.full(documents, 1 / documents))
    return Moments.of(captured, torch.from_numpy(counts[captured.document]), room=context.refit_room)
