"""Every lens on every layer, exact: KL, cross-entropy and movement from one log-sum-exp per lens, layer and token.

With ``e = W^T p`` and ``n = norm(x)``, ``KL(p || q) = sum p log p - e.n + logsumexp(W n)`` and the cross-entropy is
``logsumexp(W n) - w_y.n``: the softmax of a lens is never formed, the model's own never formed again.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses import AffineMaps
from lensbench.stream import Capture, ReadOut

TOKEN_BLOCK = 1024
VOCABULARY_BLOCK = 2048


def log_partition(readout: ReadOut, n: Tensor) -> Tensor:
    """``logsumexp(W n + bias)`` of rows ``[R, d_read]``, in vocabulary blocks with an online maximum: ``[R]``."""
    weight, bias = readout.weight, readout.bias
    largest = torch.full((len(n),), -torch.inf, dtype=n.dtype, device=n.device)
    total = torch.zeros_like(largest)
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        rows = slice(start, start + VOCABULARY_BLOCK)
        logits = n @ weight[rows].T if bias is None else torch.addmm(bias[rows], n, weight[rows].T)
        new = torch.maximum(largest, logits.amax(-1))
        total = total * torch.exp(largest - new) + logits.sub_(new[:, None]).exp_().sum(-1)
        largest = new
    return largest + total.log()


def softmax_moment(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """``W^T q`` ``[R, d_read]`` and ``sum q log q - sum q bias`` ``[R]`` of ``q = softmax(W n + bias)``."""
    weight, bias = readout.weight, readout.bias
    logits = n @ weight.T if bias is None else torch.addmm(bias, n, weight.T)
    log_z = logits.logsumexp(-1)
    moment = torch.exp(logits - log_z[:, None]) @ weight
    return moment, (moment * n).sum(-1) - log_z


@dataclass(frozen=True)
class Scores:
    """Per-token results of M lenses on one layer, nats; float32 ``[M, N]``."""

    kl: Tensor
    ce: Tensor
    movement: Tensor | None


@torch.no_grad()
def score(
    readout: ReadOut,
    h: Tensor,
    maps: AffineMaps,
    captured: Capture,
    reference: tuple[Tensor, Tensor] | None = None,
) -> Scores:
    """M lenses on one layer's states ``[N, d]``, against the model's own distribution and the next token.

    ``reference``: for every lens the moments ``W^T q`` ``[M, N, d_read]`` and ``sum q log q`` ``[M, N]`` of the
    distribution that movement is measured from.
    """
    maps = maps.to(h)
    m, d = len(maps), h.shape[-1]
    weight, bias = readout.weight, readout.bias
    kl, ce, movement = [], [], []
    for start in range(0, len(h), TOKEN_BLOCK):
        rows = slice(start, start + TOKEN_BLOCK)
        block = h[rows]
        # All lenses in one product: [n, d] x [d, M d].
        x = (block @ maps.matrix.reshape(m * d, d).T).view(-1, m, d) + maps.offset
        n = readout.final_norm(x)  # [n, M, d_read]
        log_z = log_partition(readout, n.flatten(0, 1)).view(-1, m)
        target = captured.targets[rows]
        aim = (weight[target][:, None] * n).sum(-1)
        if bias is not None:
            aim = aim + bias[target][:, None]
        kl.append((captured.entropy_term[rows, None] - (captured.expected[rows, None] * n).sum(-1) + log_z).T)
        ce.append((log_z - aim).T)
        if reference is not None:
            moment, negative_entropy = reference[0][:, rows], reference[1][:, rows]
            movement.append(negative_entropy - (moment * n.transpose(0, 1)).sum(-1) + log_z.T)
    return Scores(torch.cat(kl, 1), torch.cat(ce, 1), torch.cat(movement, 1) if movement else None)


def sum_by_window(values: Tensor, captured: Capture) -> np.ndarray:
    """Sums over the tokens of each window, float64: ``[..., N] -> [..., S]``, windows in the order of their rows."""
    starts = np.flatnonzero(np.diff(captured.window, prepend=-1))
    return np.add.reduceat(values.double().cpu().numpy(), starts, axis=-1)


@dataclass(frozen=True)
class TransferSums:
    """Per-window sums over the scored tokens, nats, float64 ``[S, lens 0..L, layer 0..L]``; lens L is the identity."""

    kl: np.ndarray
    ce: np.ndarray
    movement: np.ndarray


@torch.no_grad()
def transfer_sums(readout: ReadOut, captured: Capture, per_layer: AffineMaps) -> TransferSums:
    """The whole matrix for per-layer lenses 0..L-1: ``K_ij``, ``C_ij`` and movement ``D_ij = E KL(q_ii || q_ij)``."""
    d = captured.states.shape[-1]
    identity = AffineMaps.identity(d)
    maps = AffineMaps.stack([per_layer.to(captured.states), identity.to(captured.states)])
    own_moments, own_entropies = [], []
    for layer, h in enumerate(captured.states):
        x = h @ maps.matrix[layer].T + maps.offset[layer]
        parts = [softmax_moment(readout, readout.final_norm(block)) for block in x.split(TOKEN_BLOCK)]
        own_moments.append(torch.cat([p[0] for p in parts]))
        own_entropies.append(torch.cat([p[1] for p in parts]))
    reference = torch.stack(own_moments), torch.stack(own_entropies)
    columns = [score(readout, h, maps, captured, reference) for h in captured.states]
    kl, ce, movement = (
        np.stack([sum_by_window(getattr(column, name), captured).T for column in columns], axis=-1)
        for name in ("kl", "ce", "movement")
    )
    return TransferSums(kl, ce, movement)


@torch.no_grad()
def own_layer_sums(
    readout: ReadOut, captured: Capture, maps: AffineMaps, layers: range | list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Per-window sums of KL and cross-entropy of map k on ``layers[k]``: two arrays ``[S, len(layers)]``.

    One map for all layers (a shared lens) is given as a stack of one.
    """
    kl, ce = [], []
    for k, layer in enumerate(layers):
        scores = score(readout, captured.states[layer], maps[[k if len(maps) > 1 else 0]], captured)
        kl.append(sum_by_window(scores.kl[0], captured))
        ce.append(sum_by_window(scores.ce[0], captured))
    return np.stack(kl, -1), np.stack(ce, -1)
