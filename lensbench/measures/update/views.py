"""Nulls and landmarks of the update decomposition: the model's own states, rebuilt so that the answer is known.

``NAME+rotated`` re-represents, ``NAME+carried`` carries along, ``NAME+drifting`` changes its basis by 45 degrees in all,
``NAME+shuffled`` adds up in one representation, but its losses do not fall.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.estimated import usual_scores
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import MOMENT_BLOCK, MomentSums
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.search import Choice, DevSearch, pad_direction
from lensbench.measures.update.verdict import CARRIED, MIXED, REPRESENTED, UNDETERMINED
from lensbench.statistics import half_width
from lensbench.streams.capture import Capture, room_for
from lensbench.streams.kl import sums_of_all
from lensbench.streams.readout import ReadOut
from lensbench.streams.views import BasisView, ShuffledView, View, covariances, random_bases, turning_bases
from lensbench.streams.views.bases import sized

GROWTHS = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Growths of the newest copy over the one before that are tried for a carried stream, the smallest first"""

DEV_TOKENS = 2048
"""Dev tokens at most that a growth is chosen on"""

SURE = 1.5
"""Half-widths of its 95 % interval that a fall must exceed: gates ask for bounds that hold for all pairs together"""

FIRST_SEED = 2_000_000
"""Of the bases of views; those of the random-basis null and of rotated models count from lower numbers"""


@dataclass(frozen=True)
class FittedView:
    """A view of one model, made from its fit and dev tokens."""

    name: str
    """A key of :data:`LANDMARKS`"""
    view: View
    note: str = ""
    """What a reader has to know of this one, in words; empty for a view that is as it should be"""
    sizes: tuple[float, ...] = ()
    """Of a carried stream, a_k of every copy"""

    def save(self, path: Path) -> None:
        """Write the view to a safetensors file."""
        kept = {name: tensor.contiguous() for name, tensor in self.view.tensors().items()}
        kept["sizes"] = torch.tensor(self.sizes, dtype=torch.float64)
        save_file(kept, path, metadata={"name": self.name, "note": self.note})

    @classmethod
    def load(cls, path: Path, readout: ReadOut) -> "FittedView":
        """The view that :meth:`save` wrote, of the model with this read-out."""
        with safe_open(path, "pt") as file:
            said = file.metadata()
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        view: View
        view = ShuffledView.of_tensors(kept, readout) if said["name"] == "shuffled" else BasisView.of_tensors(kept)
        return cls(said["name"], view, said["note"], tuple(kept["sizes"].tolist()))


@dataclass(frozen=True)
class ViewContext:
    """What a view is made from."""

    readout: ReadOut
    fit: Capture
    dev: Capture
    recipe: FitRecipe
    layers: tuple[int, ...]
    seed: int

    def bases(self, make: Callable[..., Tensor], number: int) -> Tensor:
        """Bases of all layers, ``[n, d, d]``, with a seed of their own for each ``number`` below 10."""
        found, _ = covariances(self.fit, self.layers)
        return make(found, seed=FIRST_SEED + 10 * self.seed + number, variance=self.recipe.variance)


def rotated(context: ViewContext) -> FittedView:
    """Every layer in a random basis of its own."""
    return FittedView("rotated", BasisView(context.layers, context.bases(random_bases, 0)))


def drifting(context: ViewContext) -> FittedView:
    """The basis turns by 45 degrees in all, over the layers."""
    return FittedView("drifting", BasisView(context.layers, context.bases(turning_bases, 1)))


def shuffled(context: ViewContext) -> FittedView:
    """Every block's update from a token of another document."""
    view = ShuffledView.fitted(
        context.fit, context.readout, layers=context.layers, seed=context.seed, memory_gib=context.recipe.memory_gib
    )
    return FittedView("shuffled", view)


def carried(context: ViewContext) -> FittedView:
    """Every layer adds its states in a random basis of its own, each copy grown until the newest is the best."""
    bases = context.bases(random_bases, 2)
    sizes, drowned = grown_copies(context, bases)
    note = ""
    if drowned:
        note = (
            f"no growth of a copy up to {GROWTHS[-1]:g} times the one before lets KL and cross-entropy surely fall at "
            f"layer{'s' * (len(drowned) > 1)} {', '.join(map(str, drowned))}, where the model's own do: pairs that end "
            "there may fail the gates"
        )
    return FittedView("carried", BasisView(context.layers, sized(bases, sizes), carries=True), note, sizes)


@dataclass
class _CopyJudge:
    """Losses of closed-form lenses, prior zero, on states that stand where a layer's would."""

    context: ViewContext
    pad: Tensor
    dev: Capture
    near: Choice | None = field(default=None)

    @classmethod
    def of(cls, context: ViewContext) -> "_CopyJudge":
        """On dev tokens evenly spread over all documents."""
        dev = context.dev
        step = max(1, -(-dev.tokens // DEV_TOKENS))
        before, _ = dev.ranks.span(len(dev))
        dev = dev.take(torch.arange(-before % step, len(dev), step))
        pad = pad_direction(context.readout, context.fit.states[-1], context.fit.ranks)
        return cls(context, pad, dev)

    def losses(self, fit: Callable[[slice], Tensor], dev: Tensor) -> Tensor:
        """KL and cross-entropy ``[2, n]`` of the lens of fitting states at dev states ``[n, d]``, nats.

        ``fit`` gives the fitting states ``[rows, d]`` of some tokens: all of them may not fit into memory.
        """
        context, sums = self.context, MomentSums(self.context.fit.ranks)
        for rows in token_blocks(len(context.fit)):
            sums.add(torch.stack([fit(rows), context.fit.states[-1, rows]]))
        at_dev = replace(self.dev, states=torch.stack([dev, self.dev.states[-1]]))
        search = DevSearch(context.readout, at_dev, context.recipe, self.pad)
        path = RidgePath(sums.moments(), "zero")
        self.near, chosen = search.strongest(path.solve, [0], context.recipe.tolerance, self.near)
        maps: AffineMaps = search.padded(path.solve(chosen.ridge), chosen.pad)
        scores = usual_scores(context.readout, at_dev)(0, maps)  # by the same words and tokens for every copy
        return torch.cat([scores.kl, scores.ce])

    def fall(self, before: Tensor, after: Tensor) -> bool:
        """Whether both losses ``[2, n]`` surely fall, by paired differences and clusters of documents."""
        dev = self.dev
        sums = sums_of_all(before - after, dev).T[:, :, None]
        sizes = sums_of_all(torch.ones(len(dev)), dev)
        documents = dev.ranks.joined(dev.document[np.flatnonzero(np.diff(dev.window, prepend=-1))])
        mean = sums.sum(0) / sizes.sum()
        return bool((mean > SURE * half_width(sums, sizes, documents)).all())


@torch.no_grad()
def grown_copies(
    context: ViewContext, bases: Tensor, growths: Sequence[float] = GROWTHS
) -> tuple[tuple[float, ...], list[int]]:
    """Sizes a_k of the copies of a carried stream, and the layers at which no growth of ``growths`` is enough.

    a_0 = 1; a_k is a_(k-1) times the smallest growth with which KL and cross-entropy surely fall from layer k - 1 of the
    new stream to layer k, where those of the model's own layers do. All is chosen on the dev tokens.
    """
    judge, fit = _CopyJudge.of(context), context.fit
    dev = judge.dev
    (carried,) = room_for((1, *fit.states[0].shape), fit.states.device, context.recipe.memory_gib).to(fit.states.dtype)
    so_far = [carried.zero_(), torch.zeros_like(dev.states[0])]
    sizes: list[float] = []
    drowned: list[int] = []
    own = now = torch.empty(0)
    for k, layer in enumerate(context.layers):
        h = fit.states[layer], dev.states[layer]
        own_before, own, before = own, judge.losses(h[0].__getitem__, h[1]), now
        falls = k > 0 and judge.fall(own_before, own)
        for growth in growths if k else (1.0,):
            size = growth * sizes[-1] if k else growth
            turn = size * bases[k].to(h[0]).T
            new = [with_copy(x, copy, turn) for x, copy in zip(so_far, h, strict=True)]
            now = judge.losses(new[0], new[1](slice(None))) if k else own
            if not falls or judge.fall(before, now):
                break
        else:
            drowned.append(layer)
        sizes.append(size)
        for x, grown in zip(so_far, new, strict=True):
            for rows in token_blocks(len(x)):
                x[rows] = grown(rows)
    return tuple(sizes), drowned


def with_copy(so_far: Tensor, h: Tensor, turn: Tensor) -> Callable[[slice], Tensor]:
    """The states ``[rows, d]`` of some tokens of a carried stream, ``so_far`` ``[N, d]``, when a copy of h is added."""
    return lambda rows: so_far[rows] + h[rows] @ turn


def token_blocks(count: int) -> list[slice]:
    """Tokens that are worked on together."""
    return [slice(start, start + MOMENT_BLOCK) for start in range(0, count, MOMENT_BLOCK)]


@dataclass(frozen=True)
class Landmark:
    """A kind of view, and what the decomposition is to read in it."""

    title: str
    truth: str
    """What is known of it: a verdict, or 'undetermined' where no pair may pass the gates"""
    make: Callable[[ViewContext], FittedView]


LANDMARKS: dict[str, Landmark] = {
    "rotated": Landmark("every layer in a random basis of its own", REPRESENTED, rotated),
    "carried": Landmark("every layer's state added in a random basis of its own", CARRIED, carried),
    "drifting": Landmark("the basis turns by 45 degrees in all", MIXED, drifting),
    "shuffled": Landmark("every block's update from a token of another document", UNDETERMINED, shuffled),
}
"""X of ``NAME+X`` -> the view."""


def fit_view(
    name: str,
    readout: ReadOut,
    fit: Capture,
    dev: Capture,
    recipe: FitRecipe,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> FittedView:
    """A view of a model from the captures of its whole stream, to be applied to all of its splits.

    ``layers``: those of the model that the view has, at most ``recipe.layers`` evenly spread ones by default. Raises
    :class:`LensbenchError` for an unknown name or layer, and where the view cannot be made of these texts.
    """
    if name not in LANDMARKS:
        raise LensbenchError(f"unknown view {name!r}; there are {', '.join(LANDMARKS)}")
    chosen = tuple(spread_layers(fit.layers, recipe.layers) if layers is None else layers)
    if list(chosen) != sorted(set(chosen) & set(range(fit.layers))) or len(chosen) < 2:
        raise LensbenchError(
            f"a view has two or more rising layers of 0..{fit.layers - 1}, not {', '.join(map(str, chosen)) or 'none'}"
        )
    return LANDMARKS[name].make(ViewContext(readout, fit, dev, recipe, chosen, seed))
