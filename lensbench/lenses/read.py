"""Losses of lenses at the layers they are read at, summed by window."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.lens import FittedLens
from lensbench.lenses.maps import AffineMaps
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture, room_for
from lensbench.streams.kl import (
    ROW_BLOCK,
    TOKEN_BLOCK,
    Tokens,
    expected_logit,
    log_partition,
    partition_and_largest,
    softmax_moment,
    sums_of_all,
    token_kl,
)
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView


@dataclass(frozen=True)
class Scores:
    """Per-token results of M lenses on one layer, nats; float32 ``[M, N]``."""

    kl: Tensor
    ce: Tensor
    movement: Tensor | None
    top1: Tensor  # 1 where the lens's most probable word is the model's, else 0


@torch.no_grad()
def score(
    readout: ReadOut,
    h: Tensor,
    maps: AffineMaps,
    captured: Capture,
    reference: "Reference | None" = None,
) -> Scores:
    """M lenses on one layer's states ``[N, d]``, against the model's own distribution and the next token.

    ``reference``: the M distributions that movement ``KL(reference || lens)`` is measured from.
    """
    maps = maps.to(h)
    m, d = len(maps), h.shape[-1]
    weight, bias = readout.weight, readout.bias

    def one(rows: slice) -> tuple[Tensor, ...]:
        block = h[rows]
        # All lenses in one product: [n, d] x [d, M d].
        x = (block @ maps.matrix.reshape(m * d, d).T).view(-1, m, d) + maps.offset
        n = readout.final_norm(x)  # [n, M, d_read]
        flat_log_z, largest = partition_and_largest(readout, n.flatten(0, 1))
        log_z = flat_log_z.view(-1, m)

        def logit_of(words: Tensor, n: Tensor = n) -> Tensor:
            logit = (weight[words][:, None] * n).sum(-1)
            return readout.cap_(logit if bias is None else logit + bias[words][:, None])

        aim, best = logit_of(captured.targets[rows]), logit_of(captured.top[rows])
        tokens = Tokens(captured.expected[rows], captured.entropy_term[rows], captured.states[-1][rows])
        if readout.linear:
            seen = (tokens.expected[:, None] * n).sum(-1)
        else:
            of = readout.final_norm(tokens.final)
            seen = torch.stack([expected_logit(readout, n[:, k], of) for k in range(m)], 1)
        assert largest is not None
        largest = largest.view(-1, m)
        # The same logit from two products differs in its last digits.
        hit = (best >= largest - 1e-5 * largest.abs().clamp(min=1)).float().T
        moved = () if reference is None else (reference.kl_to(readout, rows, n) + log_z.T,)
        return (tokens.entropy_term[:, None] - seen + log_z).T, (log_z - aim).T, hit, *moved

    if not len(h):
        none = h.new_zeros(m, 0)
        return Scores(none, none, None if reference is None else none, none)
    kl, ce, top1, *movement = (
        torch.cat(parts, 1)
        for parts in zip(*in_pieces(slice(0, len(h)), TOKEN_BLOCK, one, what="a token of a matrix"), strict=True)
    )
    return Scores(kl, ce, movement[0] if movement else None, top1)


def normalised_on_own(readout: ReadOut, captured: Capture, lenses: Sequence[int], maps: AffineMaps) -> Iterator[Tensor]:
    """Normalised readings ``[N, d_read]`` of each lens k on layer ``lenses[k]``, one lens at a time."""
    for layer, matrix, offset in zip(lenses, maps.matrix, maps.offset, strict=True):
        yield readout.final_norm(captured.states[layer] @ matrix.T + offset)


@dataclass(frozen=True)
class Reference:
    """M distributions at each of N tokens, in the form that gives the KL from them to any other read-out."""

    moment: Tensor  # [M, N, d_read]: W^T q; where logits are capped the normalised states of q themselves
    negative_entropy: Tensor  # [M, N]: sum q log q, less sum q bias where logits are affine

    @classmethod
    @torch.no_grad()
    def of(cls, readout: ReadOut, n: Iterable[Tensor], count: int, memory_gib: float = float("inf")) -> "Reference":
        """The read-outs of normalised states, ``count`` of ``[N, d_read]``, one at a time.

        Beyond ``memory_gib`` the moments lie in a memory-mapped file, as :func:`lensbench.streams.capture.room_for` says.
        """
        moment, entropies = torch.empty(0), []
        for k, rows in enumerate(n):
            if k == 0:
                moment = room_for((count, *rows.shape), rows.device, memory_gib)
            if readout.linear:
                moment[k], entropy = softmax_moment(readout, rows)
            else:
                moment[k] = rows
                entropy = expected_logit(readout, rows, rows) - log_partition(readout, rows)
            entropies.append(entropy)
        return cls(moment, torch.stack(entropies))

    def kl_to(self, readout: ReadOut, rows: slice, n: Tensor) -> Tensor:
        """``KL(q_m || R_m)`` less the log-partition of R, for normalised states ``[n, M, d_read]``: ``[M, n]``."""
        moment = self.moment[:, rows]
        if readout.linear:
            seen = (moment * n.transpose(0, 1)).sum(-1)
        else:
            seen = torch.stack([expected_logit(readout, n[:, k], moment[k]) for k in range(len(moment))])
        return self.negative_entropy[:, rows] - seen


def exact_scores(readout: ReadOut, captured: Capture) -> "ScoresAt":
    """:func:`score` of maps on a layer."""
    return lambda layer, maps: score(readout, captured.states[layer], maps, captured)


ScoresAt = Callable[[int, AffineMaps], Scores]
"""Scores maps on a layer in place of :func:`score`, as an estimator does"""


@torch.no_grad()
def own_layer_sums(
    readout: ReadOut, captured: Capture, maps: AffineMaps, layers: Sequence[int], scores_at: ScoresAt | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Per-window sums of KL and cross-entropy of map k on ``layers[k]``: two arrays ``[S, len(layers)]``.

    One map for all layers (a shared lens) is given as a stack of one.
    """
    scores_at = scores_at or exact_scores(readout, captured)
    kl, ce = [], []
    for k, layer in enumerate(layers):
        scores = scores_at(layer, maps[[k if len(maps) > 1 else 0]])
        kl.append(sums_of_all(scores.kl[0], captured))
        ce.append(sums_of_all(scores.ce[0], captured))
    return np.stack(kl, -1), np.stack(ce, -1)


def maps_by_layer(lens: FittedLens, views: Sequence[RotatedView]) -> Iterator[tuple[int, AffineMaps]]:
    """Each layer that the maps of a lens read as their own, in the order of :attr:`LensRecord.layers`, and its one map."""
    for number, own in enumerate(lens.reads):
        maps = lens.to_plain(number, views)
        for k, layer in enumerate(own):
            yield layer, maps[[k if len(maps) > 1 else 0]]


@torch.no_grad()
def lens_sums(
    readout: ReadOut,
    captured: Capture,
    lens: FittedLens,
    views: Sequence[RotatedView],
    scores_at: ScoresAt | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Per-window sums of KL and cross-entropy of a lens on the layers that its maps read as their own.

    Two arrays ``[S, K]``, K layers in the order of :attr:`LensRecord.layers`. ``views``: the rotated views of the fit.
    """
    scores_at = scores_at or exact_scores(readout, captured)
    kl, ce = [], []
    for layer, own in maps_by_layer(lens, views):
        scores = scores_at(layer, own)
        kl.append(sums_of_all(scores.kl[0], captured))
        ce.append(sums_of_all(scores.ce[0], captured))
    return np.stack(kl, -1), np.stack(ce, -1)


@torch.no_grad()
def mean_kls(readout: ReadOut, captured: Capture, lens: FittedLens, views: Sequence[RotatedView]) -> list[float]:
    """Mean KL, nats, of a lens on each layer that its maps read as their own, in the order of :attr:`LensRecord.layers`.

    The tokens may be few: those of several layers go through the unembedding together.
    """
    tokens = Tokens(captured.expected, captured.entropy_term, captured.states[-1])

    def normalised() -> Iterator[Tensor]:
        for layer, own in maps_by_layer(lens, views):
            map_ = own.to(captured.states)
            yield readout.final_norm(captured.states[layer] @ map_.matrix[0].T + map_.offset[0])

    found, read = list[Tensor](), normalised()
    while some := list(itertools.islice(read, max(1, ROW_BLOCK // max(1, len(captured))))):
        kl = token_kl(readout, torch.cat(some), tokens.repeated(len(some)))
        found.append(kl.view(len(some), len(captured)).double().sum(1))
    means: list[float] = (captured.ranks.sum(torch.cat(found)) / captured.tokens).tolist()
    return means
