"""Do later layers remove the errors of earlier ones? An error of a lens is added to a state, and the model runs on.

The update decomposition cannot say it: adding independent increments has the same second moments as correcting. So a state
is changed by what a lens takes for an error of another token, by what it takes for another token's prediction (a signal),
and by noise that is as usual as the error. Only a model that corrects errors lets the first survive less than the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import spread_layers
from lensbench.measures.update.folds import (
    FOLDS,
    Readings,
    deal_documents,
    fold_moments,
    pooled_folds,
    pseudo_inverse,
    readings,
)
from lensbench.measures.update.metric import SMALLEST_EIGENVALUE, Metric, covariance_of
from lensbench.measures.update.products import means_of
from lensbench.probes.catalogue import Probe
from lensbench.probes.injection_quantities import KINDS, SURVIVAL_QUANTITIES, add_quantities
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.interventions import after_moves, blocks_of
from lensbench.statistics import Array

LAYERS = 8
"""Layers at most, evenly spread: each but the last is injected into, all later ones are read"""


WINDOWS = 128
"""Windows that are looked at, at most, from clusters in turn; in each, one scored token gets the injections"""


RIDGE = 1e-2
"""Ridge of the lenses, in median eigenvalues, of a subject that names none"""


def injection_survival(subject: Subject) -> Measured:
    """How much of a change of ``h_i`` a fixed lens i still reads at ``h_j``, for errors, signals and noise; and its cost.

    The survival at j of a change made at i is ``<ds_ij, dr_i> / <dr_i, dr_i>``, d the difference of two passes, with the
    change and without, ``r_i = F A_i h_i``, ``s_ij = F A_i h_j``, F a factor of the read-out's mean Fisher metric, A_i the
    lens (closed form, prior zero). Products are of the lenses of two folds of the fitting documents, each way; the third
    fold says what of a reading is signal. The change has the least Mahalanobis length under ``Cov(h_i)`` of all that the
    first of the two lenses reads as the error, or as the signal.

    For each window one scored token gets 2 folds * 3 kinds * 7 layers of changes, in batches of 64; only that token is
    computed again where the model has a cache. Maps take ``8 d^2 (9 n + 8 (n + 1))`` bytes for n <= 8 layers: 400 MB at
    d = 576, 20 GB at d = 4096.
    """
    name = "injection_survival"
    layers = [subject.layers[k] for k in spread_layers(len(subject.layers), LAYERS)] if len(subject.layers) > 1 else []
    if reason := _does_not_apply(subject, layers):
        return Measured(name, reason=reason)
    try:
        lenses = Lenses.of(subject, layers)
    except LensbenchError as error:  # a norm without a gain, too few documents
        return Measured(name, reason=str(error))
    rows = in_turn(subject.windows.clusters, WINDOWS)
    few = subject.windows.take(rows)
    found = np.zeros((len(rows), len(layers) - 1, len(KINDS), len(layers) + 2))
    injected = Injected.drawn(subject, lenses, rows)
    with subject.task(name, few) as task:
        for number in range(len(rows)):
            found[number] = answers_of(subject, lenses, injected, number)
            task.update(number + 1)
    sums = Sums(name, few, np.ones(len(rows)))
    add_quantities(sums, layers, found, few.clusters, lenses.power)
    return sums.measured()


def in_turn(clusters: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many windows, drawn from their clusters ``[S]`` in turn: as many clusters as can be, equally often."""
    drawn = np.random.default_rng(0).permutation(len(clusters))
    _, first, counts = np.unique(np.sort(clusters), return_index=True, return_counts=True)
    by_cluster = np.lexsort((drawn, clusters))
    turn = np.empty(len(clusters), dtype=np.int64)
    turn[by_cluster] = np.arange(len(clusters)) - np.repeat(first, counts)
    found: NDArray[np.int64] = np.sort(np.lexsort((drawn, turn))[:most])
    return found


def _does_not_apply(subject: Subject, layers: list[int]) -> str:
    """Why nothing can be injected into a model; empty where it can."""
    if subject.rotated:
        return "a rotated view has no states of its own to move"
    if not blocks_of(subject.stream):
        return f"{no_blocks(subject.stream)}: there are no inputs to move"
    if not layers:
        return "it has one layer: no later one could be read"
    if len(np.unique(subject.windows.clusters)) < 2:
        return "undefined: all tokens are of one document, and errors are those of another one"
    return ""


@dataclass(frozen=True)
class Lenses:
    """What makes changes of the states of n layers, and what reads them; maps in float64 on the CPU, two folds.

    ``maps`` reads and says what is signal. ``least`` ``[2, n, d, k]`` turns what a lens is to read into the change of least
    Mahalanobis length, ``inverse`` ``[2, n, k, k]`` gives the square of that length, and ``roots``, ``[d, rank]`` for each
    layer, turn coins of length 1 into changes of length 1. ``means`` ``[n + 1, d]`` are those of the scored tokens, of
    the layers and of the final state; ``power`` is ``E |F (h_L - mean)|^2``.
    """

    layers: list[int]
    maps: Readings
    least: Tensor
    inverse: Tensor
    roots: list[Tensor]
    means: Tensor
    power: float

    @classmethod
    def of(cls, subject: Subject, layers: list[int]) -> "Lenses":
        """Lenses of two folds of the fitting documents, with the signal from the third.

        Raises :class:`LensbenchError` where the norm has no gain, or the folds have too few documents or tokens.
        """
        fit = subject.fit
        metric = Metric.of("fisher", subject.stream.readout, fit)
        folds = deal_documents(fit, 0)
        sizes = np.bincount(folds[fit.document], minlength=FOLDS).tolist()
        if min(sizes) <= subject.stream.d_model:
            raise LensbenchError(
                f"undefined: a third of the fitting documents has {min(sizes)} tokens, and a lens of width "
                f"{subject.stream.d_model} needs more; raise fit.sequences or fit.positions"
            )
        moments = fold_moments(fit, layers, folds)
        ridges = [subject.ridges[layer] if subject.ridges else RIDGE for layer in layers]
        maps = readings(moments, metric, ridges)
        covariance = pooled_folds(moments, sizes).covariance[: len(layers)]
        inverse = torch.stack(
            [
                torch.stack([pseudo_inverse(a @ c @ a.T) for a, c in zip(of, covariance, strict=True)])
                for of in maps.read
            ]
        )
        least = covariance @ maps.read.transpose(-1, -2) @ inverse
        scored = subject.eval.states
        means = means_of(scored, [*layers, len(scored) - 1]).cpu()
        power = float(torch.trace(metric.factor @ covariance_of(scored[-1]) @ metric.factor.T))
        return cls(layers, maps, least, inverse, [_root(c) for c in covariance], means, power)

    def changes(self, state: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
        """Changes ``[2, n - 1, 3, d]`` of all layers but the last, by fold and kind, for one token.

        ``state`` and ``other`` ``[n + 1, d]``: centred states of the token and of the one whose error and signal it gets.
        """
        found = torch.zeros(2, len(self.layers) - 1, len(KINDS), state.shape[-1], dtype=torch.float64)
        for fold in range(2):
            for i in range(len(self.layers) - 1):
                signal = self.maps.signal[fold, i]
                error = self.maps.read[fold, i] @ other[i] - signal @ other[-1]
                length = (error @ self.inverse[fold, i] @ error).clamp(min=0).sqrt()
                root = self.roots[i]
                coin = torch.from_numpy(rng.standard_normal(root.shape[1]))
                found[fold, i, 0] = self.least[fold, i] @ error
                found[fold, i, 1] = self.least[fold, i] @ (signal @ (other[-1] - state[-1]))
                found[fold, i, 2] = root @ coin * (length / coin.norm().clamp(min=1e-300))
        return found


def _root(covariance: Tensor) -> Tensor:
    """R ``[d, rank]`` with ``R R^T`` the covariance, its null directions left out."""
    values, vectors = torch.linalg.eigh(covariance)
    seen = values > SMALLEST_EIGENVALUE * values[-1]
    root: Tensor = vectors[:, seen] * values[seen].sqrt()
    return root


@dataclass(frozen=True)
class Injected:
    """One scored token of each of S windows, and the token of another document whose error and signal it gets."""

    windows: Windows
    rows: NDArray[np.int64]  # [S]: of the windows
    at: NDArray[np.int64]  # [S]: the token's place in its window
    states: Tensor  # [n + 1, S, d] float64, centred
    others: Tensor  # [n + 1, S, d]
    ends: Tensor  # [S, d]: the final states, as they are

    @classmethod
    def drawn(cls, subject: Subject, lenses: Lenses, rows: NDArray[np.int64]) -> "Injected":
        """A token and another one for each row; each row draws its own, whatever the other rows are."""
        windows, captured = subject.windows, subject.eval
        _, row_of, place = windows.scored(slice(None))
        cluster = windows.clusters[row_of]
        own, other = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        for number, row in enumerate(rows):
            rng = np.random.default_rng([int(row), 0])
            own[number] = rng.choice(np.flatnonzero(row_of == row))
            other[number] = rng.choice(np.flatnonzero(cluster != cluster[own[number]]))

        def centred(tokens: NDArray[np.int64]) -> Tensor:
            at = torch.from_numpy(tokens)
            layers = [*lenses.layers, captured.layers]
            states = torch.stack([captured.states[k][at.to(captured.states.device)] for k in layers])
            return states.double().cpu() - lenses.means[:, None]

        ends = captured.states[-1][torch.from_numpy(own).to(captured.states.device)]
        return cls(windows, rows, place[own], centred(own), centred(other), ends)


@torch.no_grad()
def answers_of(subject: Subject, lenses: Lenses, injected: Injected, number: int) -> Array:
    """Sums over the two folds for one token: ``[n - 1, 3, n + 2]``, by layer of the injection and kind.

    The first n columns are ``<ds_ij, dr_i>`` for the layers j (the first that counts is ``<dr_i, dr_i>``, j = i), then
    the rise of the cross-entropy of the token that follows, nats: at the model's end, and as lens i reads it.
    """
    stream, row, place = subject.stream, injected.rows[number], injected.at[number]
    prefix = torch.from_numpy(injected.windows.ids[row, : place + 1])[None].to(stream.input_device)
    target = int(injected.windows.ids[row, place + 1])
    moves = lenses.changes(
        injected.states[:, number], injected.others[:, number], np.random.default_rng([int(row), 1])
    ).float()
    count = len(lenses.layers)
    into = torch.tensor(lenses.layers[:-1])[None, :, None].expand(moves.shape[:3]).flatten()

    def clean() -> Iterator[Tensor]:
        """Log-probabilities without a change: of the captured state, and where these do not serve of another pass."""
        yield stream.readout(injected.ends[number]).float().log_softmax(-1)
        _, logits = stream.at(prefix, torch.zeros(1, dtype=torch.long), torch.tensor([prefix.shape[1] - 1]))
        yield logits.float().log_softmax(-1)[0]

    # The first change is none: states with and without a change come from passes of one kind, cached or whole.
    nothing = torch.zeros(1, dtype=into.dtype), torch.zeros(1, moves.shape[-1])
    layers, steps = torch.cat([nothing[0], into]), torch.cat([nothing[1], moves.flatten(0, 2)])
    states, nats = [], []
    for h, log_p in after_moves(stream, prefix, layers, steps, clean()):
        states.append(h[lenses.layers].float())
        nats.append(-log_p[:, target].double().cpu())
    h, end = torch.cat(states, 1), torch.cat(nats)  # [n, 1 + 6 (n - 1), d]
    read = _read_nats(subject, lenses, h, target)
    change = (h[:, 1:] - h[:, :1]).double().cpu().view(count, *moves.shape)
    rise = (end[1:] - end[0]).view(moves.shape[:3])
    found = torch.zeros(count - 1, len(KINDS), count + 2, dtype=torch.float64)
    for fold in range(2):
        for i in range(count - 1):
            made = change[i, fold, i] @ lenses.maps.read[fold, i].T  # dr_i [3, k]
            later = change[i:, fold, i] @ lenses.maps.read[1 - fold, i].T  # ds_ij [n - i, 3, k]
            found[i, :, i:count] += (later * made).sum(-1).T
    found[..., count] = rise.sum(0)
    found[..., count + 1] = read.view(moves.shape[:3]).sum(0)
    return found.numpy()


def _read_nats(subject: Subject, lenses: Lenses, h: Tensor, target: int) -> Tensor:
    """Rise of the cross-entropy that the full lens of layer i reads, for each change of ``h`` ``[n, 1 + m, d]``: ``[m]``."""
    readout, count = subject.stream.readout, len(lenses.layers)
    into = torch.arange(count - 1).repeat_interleave(len(KINDS)).repeat(2)

    def nats(x: Tensor) -> Tensor:
        found: Tensor = -readout(x).float().log_softmax(-1)[:, target]
        return found.double().cpu()

    def lens(i: int) -> partial[Tensor]:
        maps = subject.own[[lenses.layers[i]]].to(h)
        return partial(torch.nn.functional.linear, weight=maps.matrix[0], bias=maps.offset[0])

    rise = torch.zeros(len(into), dtype=torch.float64)
    for i in range(count - 1):
        mine = (into == i).nonzero()[:, 0]
        both = torch.cat([h[i, :1], h[i, 1 + mine.to(h.device)]])
        found = nats(lens(i)(both))
        rise[mine] = found[1:] - found[0]
    return rise


INJECTION_SURVIVAL = Probe(
    "injection_survival",
    injection_survival,
    "per layer, a lens's error of another token added to the state: how much of it later states still hold, and its cost",
    SURVIVAL_QUANTITIES,
    control="another token's signal; noise of the same Mahalanobis length",
    topic="what becomes of errors",
)
