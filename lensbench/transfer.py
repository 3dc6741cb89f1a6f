"""Every lens on every layer, exact: KL, cross-entropy and movement from one log-sum-exp per lens, layer and token.

With ``e = W^T p`` and ``n = norm(x)``, ``KL(p || q) = sum p log p - e.n + logsumexp(W n)`` and the cross-entropy is
``logsumexp(W n) - w_y.n``: the softmax of a lens is never formed, the model's own never formed again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses import AffineMaps
from lensbench.memory import in_pieces
from lensbench.stages import NOTHING_KEPT, Pieces
from lensbench.stream import Capture, ReadOut, room_for

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

    Rows are shifted by their largest logit of the first block, within the product (``addmm``): exact unless
    a later logit is more than 80 above it, in which case the row is done again with an online maximum.
    """
    return partition_and_largest(readout, n, want_largest=False)[0]


def partition_and_largest(readout: ReadOut, n: Tensor, *, want_largest: bool = True) -> tuple[Tensor, Tensor | None]:
    """:func:`log_partition` and, where wanted, the largest logit of every row: ``[R]``, ``[R]``.

    From the same pass; where products are made in bfloat16 that finds the largest logit's word, and its logit is made again.
    """
    if not len(n):
        return n[:, 0], n[:, 0] if want_largest else None
    parts = [_log_partition(readout, rows, want_largest) for rows in n.split(ROW_BLOCK if not n.is_cuda else len(n))]
    largest = [p[1] for p in parts if p[1] is not None]
    return torch.cat([p[0] for p in parts]), torch.cat(largest) if want_largest else None


def _log_partition(readout: ReadOut, n: Tensor, want_largest: bool) -> tuple[Tensor, Tensor | None]:
    weight, bias = readout.weight, readout.bias
    if n.is_cuda:  # one large product is what a GPU wants
        log_z, top = _online_log_partition(readout, n)
        return log_z, top if want_largest else None
    logits = n @ weight[:VOCABULARY_BLOCK].T
    if bias is not None:
        logits += bias[:VOCABULARY_BLOCK]
    shift = readout.cap_(logits).amax(-1, keepdim=True)
    total = logits.sub_(shift).exp_().sum(-1)
    above = torch.zeros_like(total)  # the largest logit, above the shift
    room = torch.empty(len(n), VOCABULARY_BLOCK, dtype=n.dtype)
    for start in range(VOCABULARY_BLOCK, len(weight), VOCABULARY_BLOCK):
        rows = weight[start : start + VOCABULARY_BLOCK]
        logits = room if len(rows) == VOCABULARY_BLOCK else room.new_empty(len(n), len(rows))
        if readout.linear:
            base = -shift if bias is None else bias[start : start + VOCABULARY_BLOCK] - shift
            torch.addmm(base.expand_as(logits), n, rows.T, out=logits)
        else:
            torch.mm(n, rows.T, out=logits)
            if bias is not None:
                logits += bias[start : start + VOCABULARY_BLOCK]
            readout.cap_(logits).sub_(shift)
        if want_largest:
            above = torch.maximum(above, logits.amax(-1))
        total += logits.exp_().sum(-1)
    log_z, largest = shift[:, 0] + total.log(), shift[:, 0] + above
    bad = ~torch.isfinite(log_z)
    if bool(bad.any()):
        log_z[bad], largest[bad] = _online_log_partition(readout, n[bad])
    return log_z, largest if want_largest else None


def _online_log_partition(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """The two of them with an online maximum over the blocks."""
    weight, bias = readout.weight, readout.bias
    exact = n, weight, bias
    size = VOCABULARY_BLOCK if not n.is_cuda else max(VOCABULARY_BLOCK, CUDA_LOGITS // max(1, len(n)))
    dtype = readout.product_dtype or n.dtype
    n, weight = n.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    # Sums and maxima in float32 at least, whatever the products are made in.
    largest = torch.full((len(n),), -torch.inf, dtype=torch.promote_types(n.dtype, torch.float32), device=n.device)
    total = torch.zeros_like(largest)
    word = torch.zeros(len(n), dtype=torch.long, device=n.device)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        logits = n @ weight[rows].T if bias is None else torch.addmm(bias[rows], n, weight[rows].T)
        logits = readout.cap_(logits.to(largest.dtype))
        here, at = logits.max(-1)
        word = torch.where(here > largest, at + start, word)
        new = torch.maximum(largest, here)
        total = total * torch.exp(largest - new) + logits.sub_(new[:, None]).exp_().sum(-1)
        largest = new
    log_z = largest + total.log()
    if dtype != exact[0].dtype:  # a logit with three digits cannot be held against one with seven
        n, weight, bias = exact
        logit = (n * weight[word]).sum(-1)
        largest = readout.cap_(logit if bias is None else logit + bias[word])
    return log_z, largest


def choose_product_dtype(readout: ReadOut, n: Tensor, *, tolerance: float = 1e-3) -> torch.dtype | None:
    """bfloat16 for the products of log-partitions on a GPU, where it agrees with float32; None (no change) elsewhere.

    Agrees: the mean absolute difference of the log-partition over the normalised states ``[R, d_read]`` is below
    ``tolerance`` nats. Sets ``readout.product_dtype`` to the answer.
    """
    readout.product_dtype = None
    if n.is_cuda:
        exact = log_partition(readout, n)
        readout.product_dtype = torch.bfloat16
        if float((log_partition(readout, n) - exact).abs().mean()) > tolerance:
            readout.product_dtype = None
    return readout.product_dtype


class Vocabulary:
    """Rows of the unembedding that stand for all of them in a cheap log-partition.

    Half of them are the words most probable on average, exactly; half are drawn from the rest with probability ``pi``
    proportional to ``sqrt(mean p)``, each with offset ``-log(m pi)``, so that their sum of exponentials is unbiased for
    that of the rest. All words, exactly, where there are no more than that. For gradients and as a control variate: the
    logarithm of an unbiased sum is biased, so that a KL from it alone is never reported.
    """

    def __init__(self, readout: ReadOut, mean_p: Tensor, rows: int, generator: torch.Generator):
        self.weight, self.bias, self.generator = readout.weight, readout.bias, generator
        self.exact = not readout.linear or len(self.weight) <= rows
        order = mean_p.argsort(descending=True).to(self.weight.device)
        self.top, self.rest = order[: rows // 2], order[rows // 2 :]
        root = mean_p.to(self.weight.device)[self.rest].double().clamp(min=1e-12).sqrt()
        self.pi = (root / root.sum()).cpu()
        self.drawn = rows - rows // 2

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Rows ``[S, d_read]`` and their offsets ``[S]``, a new sample each time."""
        if self.exact:
            return self.weight, self.bias
        chosen = torch.multinomial(self.pi, self.drawn, replacement=True, generator=self.generator)
        at = torch.cat([self.top, self.rest[chosen.to(self.rest.device)]])
        offset = torch.zeros(len(at), dtype=torch.float64)
        offset[len(self.top) :] = -(self.drawn * self.pi[chosen]).log()
        offset = offset.to(self.weight)
        return self.weight[at], offset if self.bias is None else offset + self.bias[at]


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
    if not readout.linear:
        return tokens.entropy_term - expected_logit(readout, n, readout.final_norm(tokens.final)) + log_z
    return tokens.entropy_term - (tokens.expected * n).sum(-1) + log_z


def softmax_moment(readout: ReadOut, n: Tensor) -> tuple[Tensor, Tensor]:
    """``W^T q`` ``[R, d_read]`` and ``sum q log q - sum q bias`` ``[R]`` of ``q = softmax(W n + bias)``."""
    weight, bias = readout.weight, readout.bias

    def one(at: slice) -> tuple[Tensor, Tensor]:
        rows = n[at]
        logits = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        log_z = logits.logsumexp(-1)
        moment = logits.sub_(log_z[:, None]).exp_() @ weight
        return moment, (moment * rows).sum(-1) - log_z

    moments, entropies = zip(*in_pieces(slice(0, len(n)), ROW_BLOCK, one, what="a softmax"), strict=True)
    return torch.cat(moments), torch.cat(entropies)


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


@dataclass(frozen=True)
class Reference:
    """M distributions at each of N tokens, in the form that gives the KL from them to any other read-out."""

    moment: Tensor  # [M, N, d_read]: W^T q; where logits are capped the normalised states of q themselves
    negative_entropy: Tensor  # [M, N]: sum q log q, less sum q bias where logits are affine

    @classmethod
    @torch.no_grad()
    def of(cls, readout: ReadOut, n: Iterable[Tensor], count: int, memory_gib: float = float("inf")) -> "Reference":
        """The read-outs of normalised states, ``count`` of ``[N, d_read]``, one at a time.

        Beyond ``memory_gib`` the moments lie in a memory-mapped file, as :func:`lensbench.stream.room_for` says.
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


def sum_by_window(values: Tensor, captured: Capture) -> np.ndarray:
    """Sums over the tokens of each window, float64: ``[..., N] -> [..., S]``, windows in the order of their rows."""
    starts = np.flatnonzero(np.diff(captured.window, prepend=-1))
    if not len(starts):  # a process that has none of a few tokens
        return np.zeros((*values.shape[:-1], 0))
    return np.add.reduceat(values.double().cpu().numpy(), starts, axis=-1)


def sums_of_all(values: Tensor, captured: Capture) -> np.ndarray:
    """:func:`sum_by_window` over the windows of all processes, ``[..., S]``."""
    return captured.ranks.joined(sum_by_window(values, captured), axis=-1)


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
        return self.cheap.sum(0) / self.tokens.sum() + self.correction.sum(0) / self.drawn.sum()

    def penalty_half_width(self, documents: np.ndarray) -> np.ndarray:
        """Half-width of the 95 % intervals of the penalties, windows clustered by ``documents`` ``[S]``; square matrices."""
        known, index = np.unique(documents, return_inverse=True)
        influence = 0.0
        for sums, counts in ((penalties(self.cheap), self.tokens), (penalties(self.correction), self.drawn)):
            influence = influence + (sums - sums.sum(0) / counts.sum() * counts[:, None, None]) / counts.sum()
        clusters = np.zeros((len(known), *self.cheap.shape[1:]))
        np.add.at(clusters, index, influence)
        return 1.96 * np.sqrt((clusters**2).sum(0) * len(known) / max(1, len(known) - 1))


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


def half_width(sums: np.ndarray, tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Half-width of the 95 % interval of means (of penalties, say), clusters being documents: ``[lenses, layers]``, nats.

    From per-window sums ``[S, lenses, layers]``, token counts ``[S]`` and document numbers ``[S]``; the linearised
    variance of a ratio, which the bootstrap over documents approaches. Infinite for fewer than two documents.
    """
    known, index = np.unique(documents, return_inverse=True)
    if len(known) < 2:
        return np.full(sums.shape[1:], np.inf)
    clusters, sizes = np.zeros((len(known), *sums.shape[1:])), np.zeros(len(known))
    np.add.at(clusters, index, sums)
    np.add.at(sizes, index, tokens)
    mean = clusters.sum(0) / sizes.sum()
    residual = clusters - mean * sizes[:, None, None]
    variance = (residual**2).sum(0) * len(known) / (len(known) - 1) / sizes.sum() ** 2
    return 1.96 * np.sqrt(variance)


def penalties(sums: np.ndarray) -> np.ndarray:
    """``X_ij - X_jj`` of a whole square matrix of sums ``[..., L+1, L+1]``."""
    return sums - np.diagonal(sums, axis1=-2, axis2=-1)[..., None, :]


@torch.no_grad()
def own_layer_sums(
    readout: ReadOut, captured: Capture, maps: AffineMaps, layers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Per-window sums of KL and cross-entropy of map k on ``layers[k]``: two arrays ``[S, len(layers)]``.

    One map for all layers (a shared lens) is given as a stack of one.
    """
    kl, ce = [], []
    for k, layer in enumerate(layers):
        scores = score(readout, captured.states[layer], maps[[k if len(maps) > 1 else 0]], captured)
        kl.append(sums_of_all(scores.kl[0], captured))
        ce.append(sums_of_all(scores.ce[0], captured))
    return np.stack(kl, -1), np.stack(ce, -1)
