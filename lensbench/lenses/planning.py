"""What fitting works on, the jobs that it consists of, and what a kind of lens has to say of itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from torch import Tensor

from lensbench.lenses.closed import ClosedForms
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.lens import FittedLens, LensId, LensRecord, joined
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments, RotatedMoments
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.lenses.room import IN_MEMORY, Room, again, room_on_disk
from lensbench.lenses.search import Choice, DevSearch, pad_direction
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView


@dataclass(frozen=True)
class FitContext:
    """All that a fit of one view of a model works on; jobs leave their lenses in it for later ones."""

    readout: ReadOut
    fit: Capture
    dev: Capture
    moments: Moments
    """Of the layers 0..L-1 over the fitting tokens."""
    search: DevSearch
    recipe: FitRecipe
    seed: int
    views: list[RotatedView]
    """The random bases of the null."""
    loaded: AffineMaps | None = None
    """Lenses of others, one per layer, for the transfer matrix instead of fitting them."""
    jacobians: JacobianSource | None = None
    """The model and the prompts that Jacobian lenses are estimated from; None: there are states alone"""
    pieces: Pieces = NOTHING_KEPT
    progress: Progress = QUIET
    parts: dict[LensId, list[FittedLens]] = field(default_factory=dict)
    searched: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What jobs found that fitted no lens, by their names."""
    refit_room: Room = IN_MEMORY
    """Where the moments of resampled documents lie, those of one refit at a time"""
    _turned: dict[int, RotatedMoments] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        readout: ReadOut,
        fit: Capture,
        dev: Capture,
        recipe: FitRecipe,
        *,
        seed: int,
        loaded: AffineMaps | None = None,
        jacobians: JacobianSource | None = None,
        pieces: Pieces = NOTHING_KEPT,
        progress: Progress = QUIET,
    ) -> "FitContext":
        """A fit from its fitting and dev tokens; ``loaded``: per-layer lenses of others for the transfer matrix.

        With a folder of ``pieces`` all that is as large as a matrix for every layer lies in one file there, of
        :func:`matrices` times ``8 d^2`` bytes.
        """
        layers, d = fit.layers, fit.states.shape[-1]
        room = room_on_disk(pieces.folder, matrices(recipe, layers) * d * d)
        moments = Moments.of(fit, room=room)
        search = DevSearch(readout, dev, recipe, pad_direction(readout, fit.states[-1], fit.ranks))
        views = [
            RotatedView.random(moments.covariance, seed=1000 * seed + k, variance=recipe.variance, room=room)
            for k in range(recipe.rotations)
        ]
        turned = {k: RotatedMoments(moments, view) for k, view in enumerate(views)}
        for k in range(paired_views(recipe)):
            turned[k].know(spread_layers(layers, recipe.layers), room)
        refit_room = again(room, (2, layers, d, d)) if recipe.refits else IN_MEMORY
        return cls(
            readout, fit, dev, moments, search, recipe, seed, views, loaded, jacobians, pieces, progress,
            refit_room=refit_room, _turned=turned,
        )  # fmt: skip

    @property
    def layers(self) -> list[int]:
        """All layers that lenses are fitted at, 0..L-1."""
        return list(range(self.fit.layers))

    @property
    def chosen(self) -> list[int]:
        """The layers of what takes long: curve over tolerances, leave-one-out, pairs, refits of the matrix."""
        return spread_layers(self.fit.layers, self.recipe.layers)

    @property
    def pair_rotations(self) -> int:
        """How many rotated views get lenses of pairs."""
        return paired_views(self.recipe)

    def lens(self, lens: LensId) -> FittedLens:
        """A lens that an earlier job fitted."""
        return joined(self.parts[lens])

    def choice(self, lens: LensId) -> Choice:
        """What dev chose for the first map of a fitted lens: where the search for a similar one begins."""
        record = self.parts[lens][0].record
        ridge, pad = record.ridge[0], record.pad[0]
        assert ridge is not None
        assert pad is not None
        return Choice(ridge, pad, float("nan"))

    def rotated(self, view: int) -> RotatedMoments:
        """The moments of a rotated view; of the layers that get lenses of pairs they are kept."""
        return self._turned[view]


def paired_views(recipe: FitRecipe) -> int:
    """How many rotated views get lenses of pairs."""
    return min(recipe.pair_rotations, recipe.rotations) if recipe.pairs else 0


def matrices(recipe: FitRecipe, layers: int) -> int:
    """How many float64 matrices ``[d, d]`` a fit keeps on disk while it works.

    Two moments of each layer, one map of each layer and rotated view, the moments of rotated views that pairs are fitted
    to, and two moments of each layer for the resampled documents of a refit.
    """
    pairs = paired_views(recipe) * len(spread_layers(layers, recipe.layers))
    return layers * (2 + recipe.rotations + 2 * bool(recipe.refits)) + 2 * pairs


class Phase(IntEnum):
    """When a job runs: a later phase may use what an earlier one fitted."""

    MATRIX = 0
    CLOSED = 1
    NULL = 2
    NULL_CHECK = 3
    PAIRS = 4
    REFITS = 5
    REFINED = 6
    BACKWARD = 7
    AFTER_BACKWARD = 8


@dataclass(frozen=True)
class Job:
    """One step of a fit, kept as a finished piece under its name.

    ``run(say)`` returns tensors: those of lenses (:meth:`FittedLens.tensors`), or whatever later jobs ask
    :attr:`FitContext.searched` for. ``say`` shows a remark while a long job runs.
    """

    name: str
    phase: Phase
    remark: str
    run: Callable[[Callable[[str], None]], dict[str, Tensor]]

    @classmethod
    def of(cls, name: str, phase: Phase, remark: str, fit: Callable[[], FittedLens]) -> "Job":
        """A job that fits a lens, or a part of one: parts of the same lens are joined in the order of their jobs."""
        return cls(name, phase, remark, lambda say: fit().float32().tensors())


def closed_lens(
    lens: LensId,
    reads: Sequence[Sequence[int]],
    solved: ClosedForms,
    *,
    transfers: bool = False,
    basis: Literal["plain", "view"] = "plain",
) -> FittedLens:
    """Solved regressions as a lens: map m reads the layers ``reads[m]``."""
    record = LensRecord(
        lens=lens, reads=[list(own) for own in reads], transfers=transfers, basis=basis,
        ridge=list(solved.ridges), pad=list(solved.pads),
    )  # fmt: skip
    return FittedLens(record, solved.maps)


def no_jobs(context: FitContext) -> list[Job]:
    """Nothing: of a kind that needs no fitting."""
    return []


def no_refits(context: FitContext, moments: Moments, refit: int) -> list[FittedLens]:
    """Nothing: of a kind that is not fitted again to resampled documents."""
    return []


@dataclass(frozen=True)
class LensKind:
    """A kind of lens: how it is fitted, how it is read, and how it looks."""

    name: str
    """As in the column ``lens`` of tables: lower-case letters, digits and underscores."""
    label: str
    """Its name in figures."""
    colour: str
    reads: Literal["layer", "layers", "pair"]
    """What one map is for: one layer, several layers alike, or the two layers of a pair."""
    note: str = ""
    """What the description of the tables adds to its name."""
    dash: str = ""
    """Dashes of its curve on the page, as SVG's ``stroke-dasharray``."""
    on_page: bool = True
    """Whether the page draws its curve; figures draw all."""
    plan: Callable[[FitContext], Sequence[Job]] = no_jobs
    """The jobs that fit lenses of this kind."""
    refit: Callable[[FitContext, Moments, int], Sequence[FittedLens]] = no_refits
    """Its closed forms again from the moments of resampled documents, at the ridges and pads chosen before."""

    def lens_layer(self, layer: int, own: Sequence[int]) -> int:
        """The column ``lens_layer`` of a map for the layers ``own`` as it reads one of them; -1 where none applies."""
        if self.reads == "pair":
            return own[1] if layer == own[0] else own[0]
        return layer if self.reads == "layer" else -1
