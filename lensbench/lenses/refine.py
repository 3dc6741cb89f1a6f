"""Lenses refined on KL, many side by side, with orthogonalised momentum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import MOMENT_BLOCK, Moments
from lensbench.lenses.ridge import median_eigenvalue
from lensbench.lenses.search import DevSearch
from lensbench.streams.capture import Capture
from lensbench.streams.kl import ROW_BLOCK, TOKEN_BLOCK, Tokens, Vocabulary
from lensbench.streams.readout import ReadOut


class LogPartition(torch.autograd.Function):
    """``logsumexp(W n + bias)`` and its gradient ``W^T q`` in one pass over blocks that stay in the processor's cache."""

    @staticmethod
    def forward(ctx, n: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        log_z, moment = torch.empty_like(n[:, 0]), torch.empty_like(n)
        for start in range(0, len(n), TOKEN_BLOCK):
            rows = slice(start, start + TOKEN_BLOCK)
            logits = n[rows] @ weight.T if bias is None else torch.addmm(bias, n[rows], weight.T)
            largest = logits.amax(-1, keepdim=True)
            q = logits.sub_(largest).exp_()
            total = q.sum(-1, keepdim=True)
            log_z[rows] = (largest + total.log())[:, 0]
            torch.div(q @ weight, total, out=moment[rows])
        ctx.save_for_backward(moment)
        return log_z

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (moment,) = ctx.saved_tensors
        return moment * gradient[:, None], None, None


def kl_objective(readout: ReadOut, x: Tensor, expected: Tensor, entropy_term: Tensor) -> Tensor:
    """Mean ``KL(p || R(x))`` over rows ``[N, d]``, nats/token, differentiable in x."""
    n = readout.final_norm(x)
    return (entropy_term - (expected * n).sum(-1) + LogPartition.apply(n, readout.weight, readout.bias)).mean()


def kl_gradient(readout: ReadOut, n: Tensor, tokens: Tokens, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Gradient of ``KL(p || q)`` in the normalised states ``[R, d_read]``, row by row: ``W^T q - e``.

    q over the given rows of the unembedding; where logits are soft-capped, over all words and with p formed again.
    """
    gradients = []
    for start in range(0, len(n), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        logits = n[rows] @ weight.T if offset is None else torch.addmm(offset, n[rows], weight.T)
        if readout.softcap is None:
            gradients.append(torch.softmax(logits, -1) @ weight - tokens.expected[rows])
        else:
            capped = readout.cap_(logits)
            p = readout.logits(readout.final_norm(tokens.final[rows])).softmax(-1)
            slope = 1 - (capped / readout.softcap) ** 2
            gradients.append(((capped.softmax(-1) - p) * slope) @ weight)
    return torch.cat(gradients)


def own_rows(rows: Tensor, layers: Tensor, before: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each lens's batch ``[M, B]`` the tokens that this process has, which are ``count`` behind ``before``.

    Their numbers here and their layers ``[M, b]``, and weights ``[M, b, 1]``: 0 for what fills up the shorter rows.
    """
    here = (rows >= before) & (rows < before + count)
    most = max(1, int(here.sum(1).max()))
    kept = here.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    weights = here.gather(1, kept)
    return (rows.gather(1, kept) - before).clamp(0, count - 1), layers.gather(1, kept), weights[..., None]


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Muon (Jordan et al. 2024), which torch.optim.Muon uses too."""


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each of ``[M, a, b]``, a <= b, with its singular values brought to about 1, by Newton-Schulz in batched products."""
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@dataclass(frozen=True)
class Refinement:
    """A refined lens and how it ended: ``iterations``: updates kept; ``converged``: a pass brought less."""

    maps: AffineMaps
    dev_kl: float
    iterations: int
    ended: Literal["converged", "dev rose", "pass limit"]


@dataclass
class Refining:
    """One lens on its way: where its best iterate stands and how large its next updates are."""

    layers: tuple[int, ...]
    best: Tensor  # [d, d + 1]
    dev_kl: float
    rate: float
    updates: int = 0
    setbacks: int = 0
    ended: Literal["converged", "dev rose", "pass limit"] = "pass limit"


def refine(
    search: DevSearch,
    fit: Capture,
    moments: Moments,
    start: AffineMaps,
    ridges: Sequence[float],
    layers: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> list[Refinement]:
    """Minimise ``E KL + (lam/2) |B - B0|^2`` for M lenses side by side, lens m on ``layers[m]``, prior zero.

    Each starts from its closed form, the solution of regression m of ``moments``. The penalty is the closed form's own,
    in nats: its ridge times ``2 KL / E |r - x|^2`` at the start on dev, what a unit of squared error costs. Updates are
    orthogonalised momentum (Muon) on centred states with a constant appended: their spectral size is a share
    (``refine_rate``) of ``rms(h_L) / rms(h_l)``, the size of a map from that layer to the last, so that no rate is tuned
    over depth; equivariant under rotations. In passes over ``refine_tokens`` tokens, with 10 % warm-up and linear decay
    in each. After each the end and the middle of the way are measured on dev and the best so far, the start included, is
    kept: **a refinement never returns a lens that is worse on dev**; the next pass starts there, with updates half as
    large where the middle was better than the end, 0.3 times where neither was. A lens is done when a pass lowers its
    dev KL by less than ``refine_tolerance`` of it, or twice not at all. ``report(updates done, updates at most)``.

    Behind a norm that ignores scale the penalty has no optimum of its own (a smaller map has the same KL): there the
    ridge acts through the start, the path and the stopping on dev.
    """
    recipe, readout = search.recipe, search.readout
    device, dtype = fit.states.device, fit.states.dtype
    d = fit.states.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = Vocabulary(readout, fit.mean_p, recipe.refine_vocabulary, generator)
    ranks = fit.ranks
    earlier, count = ranks.span(len(fit))
    tokens = min(recipe.refine_tokens, count)
    batch = min(recipe.refine_batch, tokens)
    steps = tokens // batch
    target_rms = float(ranks.rows(fit.states[-1], torch.arange(min(MOMENT_BLOCK, count))).pow(2).mean().sqrt())

    mean = moments.mean.to(device, dtype)  # [M, d]
    scale, penalties, lenses = [], [], []
    values = moments.eigen[0]
    for m, own in enumerate(layers):
        some = torch.arange(m % 8, count, len(own) * 8)[:512]
        sample = torch.cat([ranks.rows(fit.states[layer], some) for layer in own]) - mean[m]
        scale.append(float(sample.pow(2).mean(-1).sqrt().median()) or 1.0)  # a layer may never vary
        matrix, offset = start.matrix[m].to(device, dtype), start.offset[m].to(device, dtype)
        dev_kl = search.kl(start[[m]], own)
        error = torch.stack([(search.dev.states[-1] - search.dev.states[k] @ matrix.T - offset)[:, : readout.weight.shape[1]]
                             .pow(2).sum(-1).mean() for k in own]).mean()  # fmt: skip
        if ranks.size > 1:
            error = ranks.sum(error * len(search.dev)) / search.tokens
        lam = ridges[m] * median_eigenvalue(values[m : m + 1])[0]
        penalties.append(float(2 * dev_kl / error.double().cpu() * lam))
        theta = torch.cat([matrix, ((matrix @ mean[m] + offset) / scale[m])[:, None]], 1)
        lenses.append(Refining(tuple(own), theta, dev_kl, recipe.refine_rate * target_rms / scale[m]))
    scales, penalty = torch.tensor(scale).to(mean), torch.tensor(penalties).to(mean)

    def maps(m: int, theta: Tensor) -> AffineMaps:
        matrix = theta[:, :d].double().cpu()
        offset = theta[:, d].double().cpu() * scale[m] - matrix @ mean[m].double().cpu()
        return AffineMaps(matrix[None], offset[None])

    for number in range(recipe.refine_passes):
        active = [m for m, lens in enumerate(lenses) if lens.ended == "pass limit" and lens.dev_kl > 0]
        if not active:
            break
        begin = torch.stack([lenses[m].best for m in active])
        theta, momentum = begin.clone(), torch.zeros_like(begin)
        rates = torch.tensor([lenses[m].rate for m in active]).to(mean)[:, None, None]
        # Every lens its own random order and, where it has several layers, a random layer for each token.
        order = torch.stack([torch.randperm(count, generator=generator)[: steps * batch] for _ in active])
        at_layer = torch.stack([
            torch.tensor(lenses[m].layers)[torch.randint(len(lenses[m].layers), (steps * batch,), generator=generator)]
            for m in active
        ])  # fmt: skip
        order, at_layer = order.to(device), at_layer.to(device)
        own_mean, own_scale, own_penalty = mean[active], scales[active], penalty[active]
        for step in range(steps):
            if step % 4 == 0:
                weight, word_offset = vocabulary.draw()
            here = slice(step * batch, (step + 1) * batch)
            rows, from_layer, weights = order[:, here], at_layer[:, here], None
            if ranks.size > 1:
                rows, from_layer, weights = own_rows(rows, from_layer, earlier, len(fit))
            h = fit.states[from_layer, rows].to(device) - own_mean[:, None]  # [M, B, d]
            inputs = torch.cat([h, own_scale[:, None, None].expand(-1, h.shape[1], 1)], -1)
            x = (inputs @ theta.transpose(1, 2)).requires_grad_()
            n = readout.final_norm(x)
            flat = rows.flatten()
            known = Tokens(fit.expected[flat], fit.entropy_term[flat], fit.states[-1][flat])
            with torch.no_grad():
                gradient_n = kl_gradient(readout, n.flatten(0, 1), known, weight, word_offset).view_as(n) / batch
                if weights is not None:
                    gradient_n *= weights
            (gradient_x,) = torch.autograd.grad(n, x, gradient_n)
            gradient = ranks.sum(gradient_x.transpose(1, 2) @ inputs)
            gradient[:, :, :d] += own_penalty[:, None, None] * theta[:, :, :d]
            momentum.mul_(0.9).add_(gradient)
            change = orthogonalised(gradient.add_(momentum, alpha=0.9))
            decay = min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
            theta -= rates * decay * change
            if report is not None and step % 8 == 0:
                report(number * steps + step, recipe.refine_passes * steps)
        for k, m in enumerate(active):
            lens, before = lenses[m], lenses[m].dev_kl
            theta_end, halfway = theta[k], False
            for candidate in (theta_end, (theta_end + begin[k]) / 2):
                dev_kl = search.kl(maps(m, candidate), lens.layers)
                if dev_kl < lens.dev_kl:
                    lens.best, lens.dev_kl, lens.updates = candidate.clone(), dev_kl, (number + 1) * steps
                    halfway = candidate is not theta_end
            if lens.dev_kl == before:
                lens.setbacks += 1
                lens.rate *= 0.3
                if lens.setbacks == 2:
                    lens.ended = "dev rose"
            else:
                lens.rate *= 0.5 if halfway else 1.0
                if before - lens.dev_kl < recipe.refine_tolerance * before:
                    lens.ended = "converged"
    return [
        Refinement(maps(m, lens.best) if lens.updates else start[[m]], lens.dev_kl, lens.updates, lens.ended)
        for m, lens in enumerate(lenses)
    ]
