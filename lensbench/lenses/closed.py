"""All closed forms of a stream from one pass over it: ridge regression along a path of ridges.

The closed form is ridge regression from h_l to the final pre-norm state, from centred second moments in float64.
A *prior* B0 says what the ridge shrinks towards: ``identity`` (as published) or ``zero`` (exactly rotation-equivariant).
Ridges are in units of the median eigenvalue of the layer's covariance, which rotations leave alone. Least squares
shrinks and a scale-free norm re-inflates it, so that its predictions come out over-confident; the *pad* (norm correction)
adds length along the direction that the unembedding sees least.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lensbench.lenses.maps import AffineMaps, TurnedMap
from lensbench.lenses.moments import Moments, RotatedMoments
from lensbench.lenses.recipe import Prior, Tolerance
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.search import Choice, DevSearch
from lensbench.streams.rotated import RotatedView


@dataclass(frozen=True)
class ClosedForms:
    """Solved regressions: their maps ``[K]``, float64, and the ridge and the pad that dev chose for each."""

    maps: AffineMaps
    ridges: tuple[float, ...]
    pads: tuple[float, ...]

    @classmethod
    def joined(cls, parts: "Sequence[ClosedForms]") -> "ClosedForms":
        """Several, one after the other."""
        ridges, pads = [p.ridges for p in parts], [p.pads for p in parts]
        return cls(AffineMaps.stack([p.maps for p in parts]), sum(ridges, ()), sum(pads, ()))


def fit_each(
    search: DevSearch, moments: Moments | RotatedMoments, prior: Prior, *, tolerance: Tolerance | None = None
) -> ClosedForms:
    """One lens per layer: the best ridge on dev, or with ``tolerance`` the strongest allowed one."""
    if tolerance is not None:
        assert isinstance(moments, Moments)
        return fit_within(search, moments, prior, ridge_paths(search, moments, prior), tolerance)
    near: Choice | None = None
    solved = []
    for layer in range(len(moments.mean)):
        path = RidgePath(moments.layer([layer]), prior)
        near = search.best(path.solve, [layer], near)
        solved.append(as_chosen(search, path, [near]))
    return ClosedForms.joined(solved)


def ridge_paths(
    search: DevSearch, moments: Moments, prior: Prior, layers: Sequence[int] | None = None
) -> list[list[Choice]]:
    """Per regression the best pad and its dev KL at every ridge; ``layers``: those of the regressions, all by default."""
    at = range(len(moments.mean)) if layers is None else layers
    return [search.path(RidgePath(moments.layer([k]), prior).solve, [layer]) for k, layer in enumerate(at)]


def fit_within(
    search: DevSearch,
    moments: Moments,
    prior: Prior,
    paths: Sequence[Sequence[Choice]],
    tolerance: Tolerance,
    layers: Sequence[int] | None = None,
) -> ClosedForms:
    """One lens per layer (of ``layers``), each with the strongest ridge of its path that the tolerance allows."""
    chosen = range(len(moments.mean)) if layers is None else layers
    choices = []
    for layer in chosen:
        if isinstance(tolerance, str):
            solve = RidgePath(moments.layer([layer]), prior).solve
            choices.append(search.within_one_error(paths[layer], solve, layer))
        else:
            choices.append(search.within(paths[layer], tolerance))
    own = moments if layers is None else moments.layer(chosen)
    return solve_as_chosen(search, own, prior, choices)


def fit_shared(search: DevSearch, moments: Moments, layers: Sequence[int], near: Choice | None = None) -> ClosedForms:
    """One lens for ``layers``, prior zero, chosen by its mean dev KL over those layers.

    ``near``: the choice for a similar lens, where the search begins.
    """
    pooled = moments.pooled(layers)
    path = RidgePath(pooled, "zero")
    return as_chosen(search, path, [search.best(path.solve, layers, near)])


def fit_shared_bias(search: DevSearch, moments: Moments) -> ClosedForms:
    """One matrix for all layers and a bias for each, prior zero."""
    within = moments.pooled_within()
    layers, path = range(len(moments.mean)), RidgePath(within, "zero")
    return as_chosen(search, path, [search.best(path.solve, layers)] * len(layers))


def fit_rotated(
    search: DevSearch,
    rotated: Moments | RotatedMoments,
    view: RotatedView,
    layers: Sequence[int] | None = None,
    near: Choice | None = None,
) -> ClosedForms:
    """The one lens of a rotated view for all layers, or for some, from the view's own moments: a map of rotated states.

    It is chosen on plain dev states with the rotation folded into the map, which is the same. ``near``: the choice for a
    similar lens, where the search begins.
    """
    chosen = list(range(len(rotated.mean))) if layers is None else list(layers)
    pooled = rotated.pooled(chosen)
    path = RidgePath(pooled, "zero")
    choice = search.best(lambda ridge: TurnedMap(path.solve(ridge), view, chosen), chosen, near)
    return as_chosen(search, path, [choice])


def solve_as_chosen(search: DevSearch, moments: Moments, prior: Prior, choices: Sequence[Choice]) -> ClosedForms:
    """The closed forms of K regressions at chosen ridges and pads."""
    return as_chosen(search, RidgePath(moments, prior), choices)


def as_chosen(search: DevSearch, path: RidgePath, choices: Sequence[Choice]) -> ClosedForms:
    """The closed forms of a path's K regressions at chosen ridges and pads."""
    ridges, pads = tuple(c.ridge for c in choices), tuple(c.pad for c in choices)
    solved = path.solve(torch.tensor(ridges, dtype=torch.float64))
    offset = solved.offset + torch.tensor(pads, dtype=torch.float64).to(solved.offset)[:, None] * search.pad
    return ClosedForms(AffineMaps(solved.matrix, offset), ridges, pads)
