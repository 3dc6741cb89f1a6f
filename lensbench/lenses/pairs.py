"""One lens for each pair of the chosen layers, and for the pair in random bases."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from lensbench.lenses.closed import fit_rotated, fit_shared
from lensbench.lenses.lens import FittedLens, LensId
from lensbench.lenses.planning import FitContext, Job, LensKind, Phase, closed_lens
from lensbench.lenses.shared import SHARED_LENS

PAIR_LENS = LensId("pair", "zero", "closed")


def pairs_of(layers: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of some layers, in the order of ``pairs.csv``."""
    return list(itertools.combinations(layers, 2))


def plan(context: FitContext) -> list[Job]:
    """A job for each pair, then for each pair of every rotated view that gets lenses of pairs; none without pairs."""
    if not context.recipe.pairs:
        return []

    def plain(pair: tuple[int, int]) -> FittedLens:
        near = context.choice(SHARED_LENS)
        return closed_lens(PAIR_LENS, [pair], fit_shared(context.search, context.moments, list(pair), near))

    def rotated(k: int, pair: tuple[int, int]) -> FittedLens:
        near = context.choice(SHARED_LENS)
        solved = fit_rotated(context.search, context.rotated(k), context.views[k], list(pair), near)
        return closed_lens(PAIR_LENS.of_view(k), [pair], solved, basis="view")

    def jobs(lens: LensId, remark: str, fit: Callable[[tuple[int, int]], FittedLens]) -> list[Job]:
        return [
            Job.of(f"{lens}-{a}-{b}", Phase.PAIRS, f"{remark}, layers {a} and {b}", partial(fit, (a, b)))
            for a, b in pairs_of(context.chosen)
        ]

    null = [
        job
        for k in range(context.pair_rotations)
        for job in jobs(PAIR_LENS.of_view(k), f"pair, rotated view {k}", partial(rotated, k))
    ]
    return jobs(PAIR_LENS, "pair", plain) + null


PAIR = LensKind(name="pair", label="one lens for two layers", colour="#56b4e9", reads="pair", plan=plan)
