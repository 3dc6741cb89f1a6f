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
ROW_BLOCK = 1024
"""Rows of a block of logits on the CPU."""
VOCABULARY_BLOCK = 1024
CUDA_LOGITS = 2**28
"""Logits held at once on a GPU."""


@dataclass(frozen=True)
class Tokens:
    """What is known of the model's own distribution at N tokens."""

    expected: Tensor  # [N, d_read]: e = W^T p
    entropy_term: Tensor  # [N]: sum p log p - sum p bias; where logits are capped, sum p log p
    final: Tensor  # [N, d]: h_L, from which p is formed again where e does not tell


def log_partition(readout: ReadOut, n: Tensor) -> Tensor:
    """``log sum_v exp(logit_v)`` of normalised states ``[R, d_read]``, in blocks that stay in the cache: ``[R]``.

    Rows are shifted by their largest logit of the first block, folded into the product as one more column: exact unless
    a later logit is more than 80 above it, in which case the row is done again with an online maximum.
    """
    return torch.cat([_log_partition(readout, rows) for rows in n.split(ROW_BLOCK)]) if len(n) else n[:, 0]


def _log_partition(readout: ReadOut, n: Tensor) -> Tensor:
    weight, bias = readout.weight, readout.bias
    if n.is_cuda:  # one large product is what a GPU wants
        return _online_log_partition(readout, n)
    logits = n @ weight[:VOCABULARY_BLOCK].T
    if bias is not None:
        logits += bias[:VOCABULARY_BLOCK]
    shift = readout.cap_(logits).amax(-1, keepdim=True)
    total = logits.sub_(shift).exp_().sum(-1)
    room = torch.empty(len(n), VOCABULARY_BLOCK, dtype=n.dtype)
    for start in range(VOCABULARY_BLOCK, len(weight), VOCABULARY_BLOCK):
        rows = weight[start : start + VOCABULARY_BLOCK]
        logits = room[:, : len(rows)] if len(rows) == VOCABULARY_BLOCK else room.new_empty(len(n), len(rows))
        if readout.linear:
            base = -shift if bias is None else bias[start : start + VOCABULARY_BLOCK] - shift
            torch.addmm(base.expand_as(logits), n, rows.T, out=logits)
        else:
            torch.mm(n, rows.T, out=logits)
            if bias is not None:
                logits += bias[start : start + VOCABULARY_BLOCK]
            readout.cap_(logits).sub_(shift)
        total += logits.exp_().sum(-1)
    log_z = shift[:, 0] + total.log()
    bad = ~torch.isfinite(log_z)
    if bool(bad.any()):
        log_z[bad] = _online_log_partition(readout, n[bad])
    return log_z


def _online_log_partition(readout: ReadOut, n: Tensor) -> Tensor:
    weight, bias = readout.weight, readout.bias
    size = VOCABULARY_BLOCK if not n.is_cuda else max(VOCABULARY_BLOCK, CUDA_LOGITS // max(1, len(n)))
    largest = torch.full((len(n),), -torch.inf, dtype=torch.promote_types(n.dtype, torch.float32), device=n.device)
    total = torch.zeros_like(largest)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        logits = n @ weight[rows].T if bias is None else torch.addmm(bias[rows], n, weight[rows].T)
        logits = readout.cap_(logits.to(largest.dtype))
        new = torch.maximum(largest, logits.amax(-1))
        total = total * torch.exp(largest - new) + logits.sub_(new[:, None]).exp_().sum(-1)
        largest = new
    return largest + total.log()


def expected_logit(readout: ReadOut, n: Tensor, of: Tensor) -> Tensor:
    """``sum_v p_v logit_v(n)`` with p the read-out of normalised states ``of``; both ``[R, d_read]``: ``[R]``.

    The generic path, for logits that are not affine in n: p is formed again, block by block.
    """
    weight, bias = readout.weight, readout.bias
    log_z = log_partition(readout, of)
    total = torch.zeros_like(log_z)
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        rows = slice(start, start + VOCABULARY_BLOCK)
        p, logits = of @ weight[rows].T, n @ weight[rows].T
        if bias is not None:
            p, logits = p + bias[rows], logits + bias[rows]
        total += ((readout.cap_(p) - log_z[:, None]).exp_() * readout.cap_(logits)).sum(-1)
    return total


def token_kl(readout: ReadOut, n: Tensor, tokens: Tokens, log_z: Tensor | None = None) -> Tensor:
    """``KL(p || q)`` of read-outs q of normalised states ``[N, d_read]``, nats: ``[N]``."""
    log_z = log_partition(readout, n) if log_z is None else log_z
    if readout.linear:
        seen = (tokens.expected * n).sum(-1)
    else:
        seen = expected_logit(readout, n, readout.final_norm(tokens.final))
    return tokens.entropy_term - seen + log_z


def softmax_moment(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """``W^T q`` ``[R, d_read]`` and ``sum q log q - sum q bias`` ``[R]`` of ``q = softmax(W n + bias)``."""
    weight, bias = readout.weight, readout.bias
    moments, entropies = [], []
    for rows in n.split(ROW_BLOCK):
        logits = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        log_z = logits.logsumexp(-1)
        moment = logits.sub_(log_z[:, None]).exp_() @ weight
        moments.append(moment)
        entropies.append((moment * rows).sum(-1) - log_z)
    return torch.cat(moments), torch.cat(entropies)


@dataclass(frozen=True)
class Scores:
    """Per-token results of M lenses on one layer, nats; float32 ``[M, N]``."""

    kl: Tensor
    ce: Tensor
    movement: Tensor | None
    log_z: Tensor


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
    kl, ce, movement, partitions = [], [], [], []
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
        tokens = Tokens(captured.expected[rows], captured.entropy_term[rows], captured.states[-1][rows])
        if readout.linear:
            seen = (tokens.expected[:, None] * n).sum(-1)
        else:
            of = readout.final_norm(tokens.final)
            seen = torch.stack([expected_logit(readout, n[:, k], of) for k in range(m)], 1)
        kl.append((tokens.entropy_term[:, None] - seen + log_z).T)
        ce.append((log_z - readout.cap_(aim)).T)
        partitions.append(log_z.T)
        if reference is not None:
            movement.append(reference.kl_to(readout, rows, n) + log_z.T)
    return Scores(
        torch.cat(kl, 1), torch.cat(ce, 1), torch.cat(movement, 1) if movement else None, torch.cat(partitions, 1)
    )


@dataclass(frozen=True)
class Reference:
    """M distributions at each of N tokens, in the form that gives the KL from them to any other read-out."""

    moment: Tensor  # [M, N, d_read]: W^T q; where logits are capped the normalised states of q themselves
    negative_entropy: Tensor  # [M, N]: sum q log q, less sum q bias where logits are affine

    @classmethod
    @torch.no_grad()
    def of(cls, readout: ReadOut, n: list[Tensor]) -> "Reference":
        """The read-outs of normalised states, M of ``[N, d_read]``."""
        if readout.linear:
            parts = [softmax_moment(readout, rows) for rows in n]
            return cls(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
        entropy = [expected_logit(readout, rows, rows) - log_partition(readout, rows) for rows in n]
        return cls(torch.stack(n), torch.stack(entropy))

    def kl_to(self, readout: ReadOut, rows: slice, n: Tensor) -> Tensor:
        """``KL(q_m || R_m)`` less the log-partition of R, for normalised states ``[n, M, d_read]``: ``[M, n]``."""
        moment = self.moment[:, rows]
        if readout.linear:
            seen = (moment * n.transpose(0, 1)).sum(-1)
        else:
            seen = torch.stack([expected_logit(readout, n[:, k], moment[k]) for k in range(len(moment))])
        return self.negative_entropy[:, rows] - seen


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
    reference = Reference.of(
        readout,
        [readout.final_norm(h @ a.T + b) for h, a, b in zip(captured.states, maps.matrix, maps.offset, strict=True)],
    )
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
