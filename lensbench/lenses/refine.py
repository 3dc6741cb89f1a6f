"""Lenses refined on KL, many side by side, with orthogonalised momentum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import MOMENT_BLOCK
from lensbench.lenses.search import DevSearch
from lensbench.runtime.mapped import give_back_pages
from lensbench.streams.capture import Capture
from lensbench.streams.kl import ROW_BLOCK, TOKEN_BLOCK, Tokens, Vocabulary
from lensbench.streams.partition import rows_at_once, shifted_exponentials_
from lensbench.streams.readout import ReadOut


class LogPartition(torch.autograd.Function):
    """``logsumexp(W n + bias)`` and its gradient ``W^T q`` in one pass over blocks that stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, n: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Log-partitions ``[N]`` of normalised states ``[N, d_read]``."""
        log_z, moment = torch.empty_like(n[:, 0]), torch.empty_like(n)
        block = rows_at_once(n, len(weight), TOKEN_BLOCK)
        for start in range(0, len(n), block):
            rows = slice(start, start + block)
            logits = n[rows] @ weight.T if bias is None else torch.addmm(bias, n[rows], weight.T)
            q, total, log_z[rows] = shifted_exponentials_(logits)
            torch.div(q @ weight, total, out=moment[rows])
        ctx.save_for_backward(moment)
        return log_z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the states; weight and bias are not trained."""
        (moment,) = ctx.saved_tensors
        return moment * gradient[:, None], None, None


def kl_objective(readout: ReadOut, x: Tensor, expected: Tensor, entropy_term: Tensor) -> Tensor:
    """Mean ``KL(p || R(x))`` over rows ``[N, d]``, nats/token, differentiable in x."""
    n = readout.final_norm(x)
    log_z: Tensor = LogPartition.apply(n, readout.weight, readout.bias)  # type: ignore[no-untyped-call]
    kl: Tensor = entropy_term - (expected * n).sum(-1) + log_z
    return kl.mean()


def kl_gradient(readout: ReadOut, n: Tensor, tokens: Tokens, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Gradient of ``KL(p || q)`` in the normalised states ``[R, d_read]``, row by row: ``W^T q - e``.

    q over the given rows of the unembedding, with products in their type; where logits are soft-capped, over all words and
    with p formed again.
    """
    gradients = []
    rounded = _within(n, weight.dtype).to(weight.dtype)
    block = rows_at_once(n, len(weight), ROW_BLOCK)
    for start in range(0, len(n), block):
        rows = slice(start, start + block)
        if readout.softcap is None:
            logits = _within((rounded[rows] @ weight.T).to(n), weight.dtype)
            q = torch.softmax(logits if offset is None else logits.add_(offset), -1)
            gradients.append((q.to(weight.dtype) @ weight).to(n) - tokens.expected[rows])
        else:
            capped = readout.cap_(torch.nn.functional.linear(n[rows], weight, offset))
            p = readout.logits(readout.final_norm(tokens.final[rows])).softmax(-1)
            slope = 1 - (capped / readout.softcap) ** 2
            gradients.append(((capped.softmax(-1) - p) * slope) @ weight)
    return torch.cat(gradients)


def _within(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, with what is beyond the range of a half precision at its end: one row's gradient is off, and no other's."""
    largest = torch.finfo(dtype).max
    return x if x.dtype == dtype else x.clamp(-largest, largest)


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


def orthogonalised(matrices: Tensor, iterations: int = 5, *, half: bool = False) -> Tensor:
    """Each of ``[M, a, b]``, a <= b, with its singular values brought to about 1, by Newton-Schulz in batched products.

    ``half``: in float16, whose rounding is far less than what "about 1" leaves open (0.7 to 1.2).
    """
    x: Tensor = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    x = x.half() if half else x
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices)


@dataclass(frozen=True)
class Refinement:
    """A refined lens and how it ended: ``iterations``: updates kept; ``converged``: a pass brought less."""

    maps: AffineMaps
    dev_kl: float
    iterations: int
    ended: Literal["converged", "dev rose", "pass limit"]


@dataclass
class Refining:
    """One lens under refinement: where its best iterate stands and how large its next updates are.

    An iterate ``theta`` ``[d, d + 1]`` maps centred states with the constant ``scale`` appended.
    """

    layers: tuple[int, ...]
    mean: Tensor  # [d]
    scale: float
    penalty: float
    """Of ``|B|^2 / 2``, nats."""
    best: Tensor  # [d, d + 1]
    dev_kl: float
    rate: float
    updates: int = 0
    setbacks: int = 0
    ended: Literal["converged", "dev rose", "pass limit"] = "pass limit"

    def maps(self, theta: Tensor) -> AffineMaps:
        """An iterate as one map of plain states, float64."""
        matrix = theta[:, :-1].double().cpu()
        offset = theta[:, -1].double().cpu() * self.scale - matrix @ self.mean.double().cpu()
        return AffineMaps(matrix[None], offset[None])

    def keep_best(self, search: DevSearch, begin: Tensor, end: Tensor, updates: int) -> None:
        """Measure the end and the middle of a pass on dev, keep the best so far, and set the next pass's rate."""
        before, halfway = self.dev_kl, False
        for candidate in (end, (end + begin) / 2):
            dev_kl = search.kl(self.maps(candidate), self.layers)
            if dev_kl < self.dev_kl:
                self.best, self.dev_kl, self.updates = candidate.clone(), dev_kl, updates
                halfway = candidate is not end
        if self.dev_kl == before:
            self.setbacks += 1
            self.rate *= 0.3
            if self.setbacks == 2:
                self.ended = "dev rose"
        else:
            self.rate *= 0.5 if halfway else 1.0
            if before - self.dev_kl < search.recipe.refine_tolerance * before:
                self.ended = "converged"


class Centred(Protocol):
    """What refinement asks of M regressions; :class:`lensbench.lenses.moments.Moments` are some."""

    @property
    def mean(self) -> Tensor:
        """Mean of the input of each, ``[M, d]``."""

    def unit(self, regression: int) -> float:
        """The unit of its ridge."""


def refine(
    search: DevSearch,
    fit: Capture,
    moments: Centred,
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

    After a norm that ignores scale the penalty has no optimum of its own (a smaller map has the same KL): there the
    ridge acts through the start, the path and the stopping on dev.
    """
    recipe = search.recipe
    generator = torch.Generator().manual_seed(seed)
    vocabulary = Vocabulary(search.readout, fit.mean_p, recipe.refine_vocabulary, generator)
    lenses = closed_forms(search, fit, moments, start, ridges, layers)
    passes = Passes.of(search, fit, vocabulary, generator)
    for number in range(recipe.refine_passes):
        active = [lens for lens in lenses if lens.ended == "pass limit" and lens.dev_kl > 0]
        if not active:
            break

        def tell(step: int, done: int = number * passes.steps) -> None:
            if report is not None:
                report(done + step, recipe.refine_passes * passes.steps)

        begin = torch.stack([lens.best for lens in active])
        end = passes.updated(active, begin, tell)
        for lens, first, last in zip(active, begin, end, strict=True):
            lens.keep_best(search, first, last, (number + 1) * passes.steps)
    return [
        Refinement(lens.maps(lens.best) if lens.updates else start[[m]], lens.dev_kl, lens.updates, lens.ended)
        for m, lens in enumerate(lenses)
    ]


def closed_forms(
    search: DevSearch,
    fit: Capture,
    moments: Centred,
    start: AffineMaps,
    ridges: Sequence[float],
    layers: Sequence[Sequence[int]],
) -> list[Refining]:
    """The lenses as they start: each at its closed form, with its penalty in nats and its first rate."""
    recipe, readout, ranks = search.recipe, search.readout, fit.ranks
    count = ranks.span(len(fit))[1]
    target_rms = float(ranks.rows(fit.states[-1], torch.arange(min(MOMENT_BLOCK, count))).pow(2).mean().sqrt())
    means, lenses = moments.mean.to(fit.states), []  # means [M, d]
    for m, own in enumerate(layers):
        some = torch.arange(m % 8, count, len(own) * 8)[:512]
        sample = torch.cat([ranks.rows(fit.states[layer], some) for layer in own]) - means[m]
        scale = float(sample.pow(2).mean(-1).sqrt().median()) or 1.0  # a layer may never vary
        matrix, offset = start.matrix[m].to(fit.states), start.offset[m].to(fit.states)
        dev_kl = search.kl(start[[m]], own)
        error = torch.stack([(search.dev.states[-1] - search.dev.states[k] @ matrix.T - offset)[:, : readout.weight.shape[1]]
                             .pow(2).sum(-1).mean() for k in own]).mean()  # fmt: skip
        if ranks.size > 1:
            error = ranks.sum(error * len(search.dev)) / search.tokens
        lam = ridges[m] * moments.unit(m)
        penalty = float(2 * dev_kl / error.double().cpu() * lam)
        theta = torch.cat([matrix, ((matrix @ means[m] + offset) / scale)[:, None]], 1)
        rate = recipe.refine_rate * target_rms / scale
        lenses.append(Refining(tuple(own), means[m], scale, penalty, theta, dev_kl, rate))
    return lenses


@dataclass(frozen=True)
class Passes:
    """Passes over the fitting tokens in updates of ``batch`` tokens of each lens."""

    readout: ReadOut
    fit: Capture
    vocabulary: Vocabulary
    generator: torch.Generator
    batch: int
    steps: int
    """Updates of a pass."""
    earlier: int
    """Tokens of the processes before this one."""
    count: int
    """Tokens of all processes."""

    @classmethod
    def of(cls, search: DevSearch, fit: Capture, vocabulary: Vocabulary, generator: torch.Generator) -> "Passes":
        """As the recipe says, on no more tokens than there are."""
        recipe, (earlier, count) = search.recipe, fit.ranks.span(len(fit))
        tokens = min(recipe.refine_tokens, count)
        batch = min(recipe.refine_batch, tokens)
        return cls(search.readout, fit, vocabulary, generator, batch, tokens // batch, earlier, count)

    @property
    def half(self) -> bool:
        """Whether updates are made by products in float16: where log-partitions are, on a processor."""
        return self.readout.products is not None and not self.fit.states.is_cuda

    def updated(self, lenses: Sequence[Refining], begin: Tensor, tell: Callable[[int], None]) -> Tensor:
        """The iterates ``[M, d, d + 1]`` after one pass from ``begin``; ``tell(step)`` every eighth update."""
        theta, momentum = begin.clone(), torch.zeros_like(begin)
        rates = torch.tensor([lens.rate for lens in lenses]).to(begin)[:, None, None]
        penalty = torch.tensor([lens.penalty for lens in lenses]).to(begin)[:, None, None]
        centre = torch.stack([lens.mean for lens in lenses])[:, None]
        scale = torch.tensor([lens.scale for lens in lenses]).to(begin)[:, None, None]
        order, at_layer = self.drawn(lenses)
        for step in range(self.steps):
            if step % 4 == 0:
                words, offset = self.vocabulary.draw()
                words = words.half() if self.half and self.readout.linear else words
            here = slice(step * self.batch, (step + 1) * self.batch)
            gradient = self.gradient(theta, order[:, here], at_layer[:, here], centre, scale, (words, offset))
            gradient[:, :, :-1] += penalty * theta[:, :, :-1]
            momentum.mul_(0.9).add_(gradient)
            change = orthogonalised(gradient.add_(momentum, alpha=0.9), half=self.half)
            decay = min(1.0, (step + 1) / (0.1 * self.steps)) * (1 - step / self.steps)
            theta -= rates * decay * change
            give_back_pages()  # of states that lie in a file: the system maps the pages around each row, too
            if step % 8 == 0:
                tell(step)
        return theta

    def drawn(self, lenses: Sequence[Refining]) -> tuple[Tensor, Tensor]:
        """For every lens a random order of tokens, and for each token one of its layers at random: two ``[M, N]``."""
        size = self.steps * self.batch
        order = torch.stack([torch.randperm(self.count, generator=self.generator)[:size] for _ in lenses])
        at_layer = torch.stack([
            torch.tensor(lens.layers)[torch.randint(len(lens.layers), (size,), generator=self.generator)]
            for lens in lenses
        ])  # fmt: skip
        return order.to(self.fit.states.device), at_layer.to(self.fit.states.device)

    def gradient(
        self,
        theta: Tensor,
        rows: Tensor,
        layers: Tensor,
        centre: Tensor,
        scale: Tensor,
        words: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """Gradient of the mean KL of M lenses on a batch, ``[M, d, d + 1]``; summed over processes."""
        fit, ranks, weights = self.fit, self.fit.ranks, None
        if ranks.size > 1:
            rows, layers, weights = own_rows(rows, layers, self.earlier, len(fit))
        h = fit.states[layers, rows].to(theta.device) - centre  # [M, B, d]
        inputs = torch.cat([h, scale.expand(-1, h.shape[1], 1)], -1)
        x = (inputs @ theta.transpose(1, 2)).requires_grad_()
        n = self.readout.final_norm(x)
        flat = rows.flatten()
        known = Tokens(fit.expected[flat], fit.entropy_term[flat], fit.states[-1][flat])
        with torch.no_grad():
            gradient_n = kl_gradient(self.readout, n.flatten(0, 1), known, *words).view_as(n) / self.batch
            if weights is not None:
                gradient_n *= weights
        (gradient_x,) = torch.autograd.grad(n, x, gradient_n)
        return ranks.sum(gradient_x.transpose(1, 2) @ inputs)
