"""Lenses of one model on states of another: what two models' representations share, in nats of KL.

Both models read the same tokens. The lens of model a at layer i reads layer j of model b through a map from b's states to
a's, and its prediction is held against b's own:

    penalty = KL(p_b || R_a(A_i M h_j)) - KL(p_b || R_b(A_j h_j)),

R a model's norm and head, A_j the lens of b at that layer. M is fitted on states of the same tokens, those of the fit split:

- ``none``: the identity, for two checkpoints of one training, whose bases are the same;
- ``orthogonal``: ``M h = Q (h - mean_b) + mean_a``, Q the solution of the orthogonal Procrustes problem (Schoenemann 1966);
- ``affine``: a ridge regression, its ridge chosen on dev by the KL itself.

The null of a map is the same map of randomly paired tokens, which knows the two models' moments but not their tokens.
``same_tokens`` is what a map that gives a's own state would leave: ``KL(p_b || R_a(A_i h_i))``, h_i the state of a:
the part that two models' predictions differ by, whatever their bases.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import TOKEN_BLOCK, sum_by_window
from lensbench.streams.readout import ReadOut

NONE, ORTHOGONAL, AFFINE = "none", "orthogonal", "affine"
OWN_HEAD, STATES_HEAD = "lens", "states"
"""Whose norm and head read what the lens gives: those of the lens's model, or of the states' model"""

PAIRINGS = 2
"""Random pairings of tokens that a null is the mean of"""

LOSSES = ("kl", "ce")
READINGS = ("own", "through", "null", "same_tokens")
"""The lens of the states' own model; through the map; through that of a random pairing; on its own model's states"""


@dataclass(frozen=True)
class Peer:
    """A model with its lenses, and what its stream holds at the tokens of three splits."""

    readout: ReadOut
    lenses: AffineMaps
    """Of layers 0..L-1"""
    fit: Capture
    dev: Capture
    held_out: Capture

    @property
    def layers(self) -> int:
        """Number L of layers that have a lens."""
        return len(self.lenses)


@dataclass(frozen=True)
class Reading:
    """What is read: the lens of a layer of one model on a layer of another, through a map."""

    map: str
    head: str
    lens_layer: int
    states_layer: int


@dataclass(frozen=True)
class Between:
    """Sums over the tokens of each window, nats, ``[C, S]`` for C readings, by loss and what read it (``kl_own``, ...)."""

    readings: list[Reading]
    ridge: list[float]
    """Of the affine maps, in median eigenvalues of the covariance of b's states; NaN elsewhere"""
    sums: dict[str, np.ndarray]


def equal_depth(lens_layers: int, states_layers: int) -> list[tuple[int, int]]:
    """For each layer j of the states the lens layer i at the nearest relative depth: pairs (i, j)."""
    last = lens_layers - 1
    return [(min(last, round(j * lens_layers / states_layers)), j) for j in range(states_layers)]


# Maps
def orthogonal_map(x: Tensor, y: Tensor) -> AffineMaps:
    """The map ``Q (x - mean) + mean_y``, Q orthogonal, nearest to y in the mean square: one map, float64.

    ``x`` and ``y`` ``[N, d]``: states of the same tokens, in this order. Q is ``U V^T`` of ``Cov(y, x) = U S V^T``.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, _, vt = torch.linalg.svd((y - mean_y).T @ (x - mean_x))
    q = u @ vt
    return AffineMaps(q[None], (mean_y - q @ mean_x)[None])


def affine_maps(x: Tensor, y: Tensor, ridges: Sequence[float]) -> AffineMaps:
    """Ridge regressions of y ``[N, d']`` on x ``[N, d]``, one for each ridge: ``Cov(y, x) (Cov(x) + r m)^-1``, float64.

    m is the median eigenvalue of ``Cov(x)``; the mean is not shrunk.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    values, vectors = torch.linalg.eigh((x - mean_x).T @ (x - mean_x) / len(x))
    turned = (y - mean_y).T @ (x - mean_x) / len(x) @ vectors
    # A layer that is the same everywhere has no variance at all; it is read as its mean.
    unit = values.median().clamp(min=1e-9 * values[-1]).clamp(min=1e-30)
    shrunk = [turned / (values.clamp(min=0) + ridge * unit) @ vectors.T for ridge in ridges]
    return AffineMaps(torch.stack(shrunk), torch.stack([mean_y - a @ mean_x for a in shrunk]))


def composed(lens: AffineMaps, through: AffineMaps) -> AffineMaps:
    """One lens after each of M maps: ``A (M h + c) + b``, float32."""
    a, b = lens.matrix[0].to(through.matrix), lens.offset[0].to(through.offset)
    return AffineMaps((a @ through.matrix).float(), (through.offset @ a.T + b).float())


# Losses
@dataclass(frozen=True)
class Read:
    """A lens, the states that it reads, and the norm and head that read what it gives."""

    readout: ReadOut
    states: Tensor
    """``[N, d]``"""
    lens: AffineMaps
    """One map"""


@torch.no_grad()
def losses(reads: Sequence[Read], of: Peer, captured: Capture) -> tuple[Tensor, Tensor]:
    """KL from model ``of``'s own prediction, and cross-entropy to the next token, of each read: nats, ``[K, N]`` each.

    The states of every read are of the tokens of ``captured``, which is a capture of ``of``. Its prediction is computed once
    for all reads.
    """
    lenses = [read.lens.to(read.states) for read in reads]

    def one(rows: slice) -> tuple[Tensor, Tensor]:
        log_p = of.readout(captured.states[-1][rows]).log_softmax(-1)
        p, targets = log_p.exp(), captured.targets[rows][:, None]
        kl, ce = [], []
        for read, lens in zip(reads, lenses, strict=True):
            log_q = read.readout(lens.read(0, read.states[rows])).log_softmax(-1)
            ce.append(-log_q.gather(1, targets)[:, 0])
            kl.append((p * (log_p - log_q)).sum(-1))
        return torch.stack(kl), torch.stack(ce)

    pieces = in_pieces(slice(0, len(captured)), TOKEN_BLOCK, one, what="a token of another model's lens")
    kl, ce = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return kl, ce


def best_of(maps: AffineMaps, readout: ReadOut, h: Tensor, of: Peer) -> int:
    """Which of several lenses has the lowest mean KL on the dev split's states ``h``."""
    kl, _ = losses([Read(readout, h, maps[[k]]) for k in range(len(maps))], of, of.dev)
    return int(kl.mean(1).argmin())


def check_same_tokens(lens: Peer, states: Peer) -> None:
    """Raise :class:`LensbenchError` where two models did not read the same tokens."""
    for split in ("fit", "dev", "held_out"):
        a, b = getattr(lens, split), getattr(states, split)
        if not np.array_equal(a.window, b.window) or not torch.equal(a.targets, b.targets):
            raise LensbenchError("the two models did not read the same tokens: states of theirs cannot be paired")
    if lens.readout.weight.shape[0] != states.readout.weight.shape[0]:
        raise LensbenchError("the two models predict different words: their predictions cannot be compared")


def read_between(
    lens: Peer,
    states: Peer,
    *,
    maps: Sequence[str],
    heads: Sequence[str] = (OWN_HEAD,),
    ridges: Sequence[float] = (),
    report: Callable[[int], None] | None = None,
) -> Between:
    """The lenses of one model on the states of another, at equal relative depth, through each of ``maps``.

    ``heads``: whose norm and head read (through the states' own one, ``same_tokens`` is undefined where widths differ).
    ``report`` is called with the number of layers that are done. Raises :class:`LensbenchError` where the two did not read
    the same tokens, and for a map between states of different widths that is not affine.
    """
    check_same_tokens(lens, states)
    d = lens.fit.states.shape[-1], states.fit.states.shape[-1]
    if d[0] != d[1] and (set(maps) != {AFFINE} or set(heads) != {OWN_HEAD}):
        raise LensbenchError(f"states of width {d[1]} go to width {d[0]} through an affine map and the lens's own head")
    readings, ridge, sums = [], [], []
    for done, (i, j) in enumerate(equal_depth(lens.layers, states.layers)):
        reads = [Read(states.readout, states.held_out.states[j], states.lenses[[j]])]
        turned = _turned(lens.lenses[[i]], states.fit.states[j], lens.fit.states[i]) if ORTHOGONAL in maps else []
        for head in heads:
            readout = lens.readout if head == OWN_HEAD else states.readout
            reads.append(Read(readout, lens.held_out.states[i], lens.lenses[[i]]))
            for kind in maps:
                chosen, through = float("nan"), [lens.lenses[[i]]] if kind == NONE else turned
                if kind == AFFINE:
                    chosen, through = _regressed(lens, states, (i, j), readout, ridges)
                readings.append(Reading(kind, head, i, j))
                ridge.append(chosen)
                reads += [Read(readout, states.held_out.states[j], one) for one in through]
        found = losses(reads, states, states.held_out)
        sums.append([_by_reading(values, len(heads), maps, states.held_out) for values in found])
        if report is not None:
            report(done + 1)
    named = {
        f"{loss}_{name}": np.concatenate([layer[number][k] for layer in sums])
        for number, loss in enumerate(LOSSES)
        for k, name in enumerate(READINGS)
    }
    return Between(readings, ridge, named)


def _by_reading(values: Tensor, heads: int, maps: Sequence[str], held_out: Capture) -> list[np.ndarray]:
    """The losses ``[K, N]`` of a layer's reads as sums by window: for each of :data:`READINGS` ``[heads * maps, S]``."""
    summed = iter(sum_by_window(values, held_out))
    own, rows = next(summed), []
    for _ in range(heads):
        same = next(summed)
        for kind in maps:
            through = next(summed)
            nulls = [next(summed) for _ in range(PAIRINGS)] if kind != NONE else [np.full_like(through, np.nan)]
            rows.append((own, through, np.mean(nulls, axis=0), same))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _turned(lens: AffineMaps, x: Tensor, y: Tensor) -> list[AffineMaps]:
    """The lens through the orthogonal map of x to y, followed by those through maps of randomly paired tokens."""
    targets = [y, *(y[order] for order in pairings(len(y)))]
    return [composed(lens, orthogonal_map(x, target)) for target in targets]


def _regressed(
    lens: Peer, states: Peer, layers: tuple[int, int], readout: ReadOut, ridges: Sequence[float]
) -> tuple[float, list[AffineMaps]]:
    """The chosen ridge, and the lens through its regression, followed by those through ones of randomly paired tokens."""
    i, j = layers
    own, x, y = lens.lenses[[i]], states.fit.states[j], lens.fit.states[i]
    chosen, through = [], []
    for target in (y, *(y[order] for order in pairings(len(y)))):
        each = composed(own, affine_maps(x, target, ridges))
        k = best_of(each, readout, states.dev.states[j], states)
        chosen.append(ridges[k])
        through.append(each[[k]])
    return chosen[0], through


def pairings(tokens: int) -> Iterator[Tensor]:
    """:data:`PAIRINGS` random orders of N tokens, the same for every pair of models."""
    for seed in range(PAIRINGS):
        yield torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
