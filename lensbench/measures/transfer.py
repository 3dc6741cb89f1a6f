"""Every lens on every layer, exact: KL, cross-entropy and movement from one log-sum-exp per lens, layer and token.

With ``e = W^T p`` and ``n = norm(x)``, ``KL(p || q) = sum p log p - e.n + logsumexp(W n)`` and the cross-entropy is
``logsumexp(W n) - w_y.n``: the softmax of a lens is never formed, the model's own never formed again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import Reference, score
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import ROW_BLOCK, TOKEN_BLOCK, Vocabulary, log_partition, sum_by_window, sums_of_all
from lensbench.streams.readout import ReadOut


@dataclass(frozen=True)
class TransferSums:
    """Per-window sums over the scored tokens, float64 ``[S, lenses, layers]``: nats, and counts of equal top words."""

    kl: np.ndarray
    ce: np.ndarray
    movement: np.ndarray
    top1: np.ndarray


def rows_and_columns(
    captured: Capture, per_layer: AffineMaps, lenses: Sequence[int] | None, layers: Sequence[int] | None
) -> tuple[list[int], list[int], AffineMaps]:
    """The lenses and layers of a matrix, all of 0..L where left out, and the lenses' maps; lens L is the identity."""
    everything = range(captured.layers + 1)
    chosen = list(everything if lenses is None else lenses)
    identity = AffineMaps.identity(captured.states.shape[-1])
    maps = AffineMaps.stack([per_layer.to(captured.states), identity.to(captured.states)])[chosen]
    return chosen, list(everything if layers is None else layers), maps


@torch.no_grad()
def transfer_sums(
    readout: ReadOut,
    captured: Capture,
    per_layer: AffineMaps,
    *,
    lenses: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    movement: bool = True,
    memory_gib: float = float("inf"),
    pieces: Pieces = NOTHING_KEPT,
    name: str = "transfer",
    report: Callable[[int], None] | None = None,
) -> TransferSums:
    """The matrix for per-layer lenses 0..L-1: ``K_ij``, ``C_ij``, movement ``D_ij = E KL(q_ii || q_ij)``, top-1 agreement.

    Lens L is the identity. ``lenses`` and ``layers`` (of 0..L) choose rows and columns; left out, all of them. Without
    ``movement``, which needs every lens's softmax on its own layer, that field is NaN. Columns that are finished ``pieces``
    called ``name`` are taken up; ``report(layer)`` after each.
    """
    chosen, layers, maps = rows_and_columns(captured, per_layer, lenses, layers)
    names = [f.name for f in fields(TransferSums) if movement or f.name != "movement"]

    @cache
    def reference() -> Reference | None:
        if not movement:
            return None
        own = zip(chosen, maps.matrix, maps.offset, strict=True)
        normalised = (readout.final_norm(captured.states[i] @ a.T + b) for i, a, b in own)
        return Reference.of(readout, normalised, len(chosen), memory_gib)

    def column(layer: int) -> dict[str, Tensor]:
        scores = score(readout, captured.states[layer], maps, captured, reference())
        return {name: torch.from_numpy(sums_of_all(getattr(scores, name), captured)) for name in names}

    columns = []
    for layer in layers:
        columns.append(pieces.get(f"{name}-{layer}", partial(column, layer)))
        if report is not None:
            report(layer)
    sums = {name: np.stack([c[name].numpy().T for c in columns], axis=-1) for name in names}
    return TransferSums(**{"movement": np.full_like(sums["kl"], np.nan), **sums})


@dataclass(frozen=True)
class EstimatedSums:
    """What an unbiased estimate of the KL matrix is made of, float64 ``[S, lenses, layers]`` and ``[S]``.

    ``cheap``: per-window sums of KL with a sampled log-partition, over all tokens. ``correction``: per-window sums of
    exact less sampled log-partition, over the tokens drawn for it; ``tokens`` and ``drawn`` count both.
    """

    cheap: np.ndarray
    correction: np.ndarray
    tokens: np.ndarray
    drawn: np.ndarray

    def mean(self) -> np.ndarray:
        """The estimate of ``K_ij``: mean over all tokens plus mean correction over the drawn ones."""
        mean: np.ndarray = self.cheap.sum(0) / self.tokens.sum() + self.correction.sum(0) / self.drawn.sum()
        return mean

    def penalty_half_width(self, documents: np.ndarray) -> np.ndarray:
        """Half-width of the 95 % intervals of the penalties, windows clustered by ``documents`` ``[S]``; square matrices."""
        known, index = np.unique(documents, return_inverse=True)
        influence = np.zeros(self.cheap.shape)
        for sums, counts in ((penalties(self.cheap), self.tokens), (penalties(self.correction), self.drawn)):
            influence = influence + (sums - sums.sum(0) / counts.sum() * counts[:, None, None]) / counts.sum()
        clusters = np.zeros((len(known), *self.cheap.shape[1:]))
        np.add.at(clusters, index, influence)
        half: np.ndarray = 1.96 * np.sqrt((clusters**2).sum(0) * len(known) / max(1, len(known) - 1))
        return half


@torch.no_grad()
def estimated_transfer(
    readout: ReadOut,
    captured: Capture,
    per_layer: AffineMaps,
    *,
    share: float,
    rows: int,
    seed: int,
    lenses: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> EstimatedSums:
    """The KL matrix from ``share`` of the exact log-partitions: two-phase sampling with a control variate.

    ``KL = sum p log p - e.n + log Z``, of which only log Z is dear. Every token gets a cheap one, over ``rows`` words of
    the vocabulary (half the most probable on average, half drawn, as :class:`Vocabulary`); a simple
    random sample of the tokens gets the exact one too, and its mean difference is added. Given the tokens, the mean over
    samples is the exact matrix, whatever the words drawn. Logits must not be soft-capped.
    """
    if not readout.linear:
        raise LensbenchError("the cheaper estimator needs logits that are affine in norm(h); these are soft-capped")
    if not 0 < share <= 1:
        raise LensbenchError(f"share is {share}: it must be above 0 and at most 1")
    lenses, layers, maps = rows_and_columns(captured, per_layer, lenses, layers)
    generator = torch.Generator().manual_seed(seed)
    weight, offset = Vocabulary(readout, captured.mean_p, rows, generator).draw()
    count = max(1, round(share * len(captured)))
    drawn = torch.zeros(len(captured), dtype=torch.bool)
    drawn[torch.randperm(len(captured), generator=generator)[:count]] = True
    drawn = drawn.to(captured.states.device)
    m, d = len(maps), captured.states.shape[-1]
    cheap_columns, correction_columns = [], []
    for layer in layers:
        cheap, correction = [], []
        for start in range(0, len(captured), TOKEN_BLOCK):
            block = slice(start, start + TOKEN_BLOCK)
            h = captured.states[layer][block]
            n = readout.final_norm((h @ maps.matrix.reshape(m * d, d).T).view(-1, m, d) + maps.offset)
            flat = n.flatten(0, 1)
            log_z = torch.cat([
                torch.logsumexp(part @ weight.T if offset is None else torch.addmm(offset, part, weight.T), -1)
                for part in flat.split(ROW_BLOCK)
            ]).view(-1, m)  # fmt: skip
            seen = (captured.expected[block, None] * n).sum(-1)
            cheap.append((captured.entropy_term[block, None] - seen + log_z).T)
            here = drawn[block]
            difference = torch.zeros_like(log_z)
            difference[here] = log_partition(readout, n[here].flatten(0, 1)).view(-1, m) - log_z[here]
            correction.append(difference.T)
        cheap_columns.append(sum_by_window(torch.cat(cheap, 1), captured).T)
        correction_columns.append(sum_by_window(torch.cat(correction, 1), captured).T)
    return EstimatedSums(
        np.stack(cheap_columns, -1),
        np.stack(correction_columns, -1),
        sum_by_window(torch.ones(len(captured)), captured),
        sum_by_window(drawn.float(), captured),
    )


def penalties(sums: np.ndarray) -> np.ndarray:
    """``X_ij - X_jj`` of a whole square matrix of sums ``[..., L+1, L+1]``."""
    penalty: np.ndarray = sums - np.diagonal(sums, axis1=-2, axis2=-1)[..., None, :]
    return penalty
