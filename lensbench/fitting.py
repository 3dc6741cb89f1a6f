"""All lenses of a stream from one pass over it: closed forms along a ridge path, then refinement on KL.

The closed form is ridge regression from h_l to the final pre-norm state, from centred second moments in float64.
A *prior* B0 says what the ridge shrinks towards: ``identity`` (as published) or ``zero`` (exactly rotation-equivariant).
Ridges are in units of the median eigenvalue of the layer's covariance, which rotations leave alone. Least squares
shrinks and a scale-free norm re-inflates it, so that its predictions come out over-confident; the *pad* adds length
along the direction that the unembedding sees least.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from lensbench.lenses import AffineMaps
from lensbench.stream import Capture, ReadOut, RotatedView
from lensbench.transfer import TOKEN_BLOCK, score

Prior = Literal["zero", "identity"]


class FitRecipe(BaseModel):
    """How lenses are fitted and chosen; every choice is made on the dev split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: int = Field(512, ge=1, description="sequences of the fit split")
    positions: int = Field(32, ge=1, description="random positions of each of them")
    dev_sequences: int = Field(256, ge=1, description="sequences of the dev split")
    dev_positions: int = Field(16, ge=1, description="random positions of each of them")
    ridges: tuple[float, ...] = Field(
        (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        min_length=1,
        description="ridge path, rising, in median eigenvalues",
    )
    pads: tuple[float, ...] = Field(
        tuple(i / 10 for i in range(11)), min_length=1, description="lengths of the pad, in rms of the final state"
    )
    tolerance: float = Field(0.02, ge=0, description="allowed dev loss of the headline matrix, share of K_0 - best")
    rotations: int = Field(5, ge=1, description="rotated views, each with a shared lens of its own")
    variance: float = Field(0.99, gt=0, le=1, description="share of pooled variance that rotations act on")
    refits: int = Field(5, ge=0, description="refits on document-resampled fit data")
    refine_tokens: int = Field(
        16384, ge=1, description="fitting tokens of a refinement (twice as many for the shared lens)"
    )
    refine_iterations: int = Field(40, ge=0, description="most L-BFGS iterations of a refinement")
    refine_tolerance: float = Field(
        1e-3, gt=0, description="relative fall of the objective in 4 iterations that ends it"
    )

    @field_validator("ridges", "pads")
    @classmethod
    def _rising(cls, path: tuple[float, ...]) -> tuple[float, ...]:
        if any(b <= a for a, b in itertools.pairwise(path)):
            raise ValueError("must rise from one entry to the next")
        return path

    @field_validator("ridges")
    @classmethod
    def _positive(cls, ridges: tuple[float, ...]) -> tuple[float, ...]:
        if ridges[0] <= 0:
            raise ValueError("must be above 0: without a ridge a stream that does not fill its space has no solution")
        return ridges


@dataclass(frozen=True)
class Moments:
    """Centred second moments of K regressions from ``[d]`` to ``[d]``, float64.

    ``covariance`` ``[K, d, d]`` of the input, ``cross`` ``[K, d, d]`` = E (r - rbar)(h - hbar)^T, ``mean`` ``[K, d]`` of the
    input, ``target_mean`` ``[d]``.
    """

    mean: Tensor
    covariance: Tensor
    cross: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, captured: Capture, token_weights: Tensor | None = None) -> "Moments":
        """One regression per layer 0..L-1, to h_L; ``token_weights`` ``[N]`` resample the tokens."""
        n = len(captured)
        weights = torch.ones(n, dtype=torch.float64) if token_weights is None else token_weights.double()
        weights = (weights / weights.sum()).to(captured.states.device)
        target = captured.states[-1].double()
        target_mean = weights @ target
        target = (target - target_mean) * weights[:, None]
        means, covariances, crosses = [], [], []
        for h in captured.states[:-1]:
            h = h.double()
            mean = weights @ h
            centred = h - mean
            means.append(mean)
            covariances.append((centred * weights[:, None]).T @ centred)
            crosses.append(target.T @ centred)
        # On the CPU from here: d x d algebra in float64 is no work for a GPU.
        parts = torch.stack(means), torch.stack(covariances), torch.stack(crosses), target_mean
        return cls(*(part.cpu() for part in parts))

    def layer(self, rows: Sequence[int]) -> "Moments":
        at = list(rows)
        return Moments(self.mean[at], self.covariance[at], self.cross[at], self.target_mean)

    def pooled(self, rows: Sequence[int]) -> "Moments":
        """One regression for several layers with equally many tokens: what a shared lens is fitted to."""
        at = list(rows)
        mean = self.mean[at].mean(0)
        shift = self.mean[at] - mean
        covariance = self.covariance[at].mean(0) + shift.T @ shift / len(at)
        return Moments(mean[None], covariance[None], self.cross[at].mean(0)[None], self.target_mean)

    def pooled_within(self) -> "Moments":
        """One matrix for all layers, each layer's own mean: what a shared lens with a bias per layer is fitted to."""
        layers = len(self.mean)
        covariance, cross = self.covariance.mean(0), self.cross.mean(0)
        return Moments(self.mean, covariance.expand(layers, -1, -1), cross.expand(layers, -1, -1), self.target_mean)

    def rotated(self, view: RotatedView) -> "Moments":
        """The moments of the rotated states, without rotating a state."""
        q = view.maps.to(self.mean)
        return Moments(
            torch.einsum("lde,le->ld", q, self.mean),
            q @ self.covariance @ q.transpose(-1, -2),
            self.cross @ q.transpose(-1, -2),
            self.target_mean,
        )


def median_eigenvalue(values: Tensor) -> Tensor:
    """Median of a covariance's eigenvalues ``[K, d]``, null directions left out: the unit of a ridge, ``[K]``.

    A stream whose state is wider than what it holds would otherwise have a unit of nearly zero.
    """
    medians = [v[v > 1e-10 * v[-1]].median() if bool(v[-1] > 0) else v.new_tensor(1.0) for v in values]
    return torch.stack(medians)


class RidgePath:
    """Ridge solutions of K regressions for any ridge, from one eigendecomposition of each input covariance."""

    def __init__(self, moments: Moments, prior: Prior):
        self.moments, self.prior = moments, prior
        self.values, self.vectors = torch.linalg.eigh(moments.covariance)
        self.unit = median_eigenvalue(self.values)
        self.projected_cross = moments.cross @ self.vectors

    def solve(self, ridge: float | Tensor) -> AffineMaps:
        """``B = (C_rh + lam B0)(C_hh + lam I)^-1``, ``c = rbar - B hbar``; a ridge, or one for each regression ``[K]``."""
        lam = (torch.as_tensor(ridge, dtype=torch.float64) * self.unit.cpu()).to(self.values)[:, None]
        numerator = self.projected_cross
        if self.prior == "identity":
            numerator = numerator + lam[..., None] * self.vectors
        shrunk = numerator / (self.values.clamp(min=0) + lam)[:, None, :]
        matrix = shrunk @ self.vectors.transpose(-1, -2)
        offset = self.moments.target_mean - (matrix @ self.moments.mean[..., None])[..., 0]
        return AffineMaps(matrix, offset)


def pad_direction(readout: ReadOut, final_states: Tensor) -> Tensor:
    """Pad of length 1: the direction that the unembedding sees least, ``[d]``, times the rms of the final states.

    Among the directions that the norm's scale depends on, the bottom eigenvector of ``G^T W^T W G`` (W centred over the
    vocabulary, which softmax cannot tell), with the sign of the mean final state along it. Zero where the norm is not a
    gain over a scale.
    """
    h = final_states.double()
    gain = readout.gain(h.shape[-1])
    if gain is None:
        return torch.zeros_like(h[0]).cpu()
    gain, h = gain.double().cpu(), h.cpu()
    # What norm(x) does not depend on (LayerNorm: the mean; parts of the state that it is blind to) cannot hold length.
    values, vectors = torch.linalg.eigh(gain.T @ gain)
    seen = vectors[:, values > 1e-6 * values[-1]]
    weight = readout.weight.double().cpu()
    visible = (weight - weight.mean(0)) @ gain @ seen
    direction = seen @ torch.linalg.eigh(visible.T @ visible)[1][:, 0]
    rms = (h @ seen).pow(2).mean().sqrt()
    sign = torch.where((h.mean(0) @ direction) < 0, -1.0, 1.0)
    return sign * direction * rms * seen.shape[1] ** 0.5


@dataclass(frozen=True)
class Choice:
    """What dev chose for one lens; ``dev_kl`` is its mean KL over the layers it was chosen for, nats/token."""

    ridge: float
    pad: float
    dev_kl: float


class DevSearch:
    """Ridge and pad of lenses, chosen by KL on the dev split; every evaluation is made once."""

    def __init__(self, readout: ReadOut, dev: Capture, recipe: FitRecipe, pad: Tensor):
        self.readout, self.dev, self.recipe, self.pad = readout, dev, recipe, pad
        self.constant_kl = float(dev.constant_kl.double().mean())

    def kl(self, maps: AffineMaps, layers: Sequence[int]) -> float:
        """Mean dev KL of map k on ``layers[k]`` (or of one map on all of them)."""
        total = 0.0
        for k, layer in enumerate(layers):
            one = maps[[k if len(maps) > 1 else 0]]
            total += float(score(self.readout, self.dev.states[layer], one, self.dev).kl.double().mean())
        return total / len(layers)

    def padded(self, maps: AffineMaps, pad: float) -> AffineMaps:
        return AffineMaps(maps.matrix, maps.offset + pad * self.pad)

    def best_pad(self, maps: AffineMaps, layers: Sequence[int], start: int) -> tuple[int, float]:
        """Index of the best pad and its KL, by descent from ``start``: KL has one valley along the pad."""
        known: dict[int, float] = {}

        def at(index: int) -> float:
            if index not in known:
                known[index] = self.kl(self.padded(maps, self.recipe.pads[index]), layers)
            return known[index]

        here = start
        while True:
            around = [i for i in (here - 1, here, here + 1) if 0 <= i < len(self.recipe.pads)]
            best = min(around, key=at)
            if best == here:
                return here, at(here)
            here = best

    def path(self, solve: Callable[[float], AffineMaps], layers: Sequence[int]) -> list[Choice]:
        """The best pad at every ridge of the path."""
        choices, start = [], len(self.recipe.pads) // 3
        for ridge in self.recipe.ridges:
            start, kl = self.best_pad(solve(ridge), layers, start)
            choices.append(Choice(ridge, self.recipe.pads[start], kl))
        return choices

    def best(self, solve: Callable[[float], AffineMaps], layers: Sequence[int]) -> Choice:
        """The best ridge and pad, by descent along the path from its middle: KL has one valley along the ridge too."""
        ridges = self.recipe.ridges
        known: dict[int, Choice] = {}
        pad = len(self.recipe.pads) // 3

        def at(index: int) -> float:
            nonlocal pad
            if index not in known:
                pad, kl = self.best_pad(solve(ridges[index]), layers, pad)
                known[index] = Choice(ridges[index], self.recipe.pads[pad], kl)
            return known[index].dev_kl

        here = len(ridges) // 2
        while True:
            around = [i for i in (here - 1, here, here + 1) if 0 <= i < len(ridges)]
            best = min(around, key=at)
            if best == here:
                return known[here]
            here = best

    def within(self, path: Sequence[Choice], tolerance: float) -> Choice:
        """The strongest ridge whose dev KL exceeds the path's best by at most ``tolerance`` of ``K_0 - best``."""
        best = min(choice.dev_kl for choice in path)
        allowed = best + tolerance * max(0.0, self.constant_kl - best)
        return max((c for c in path if c.dev_kl <= allowed), key=lambda c: c.ridge)


@dataclass(frozen=True)
class Fitted:
    """One kind of lens of one stage: its maps (one, or one per layer) and what was chosen on dev for each."""

    maps: AffineMaps
    ridges: tuple[float, ...]
    pads: tuple[float, ...]
    prior: Prior
    stage: Literal["closed", "refined"]
    tolerance: float = 0.0


def fit_each(search: DevSearch, moments: Moments, prior: Prior, *, tolerance: float | None = None) -> Fitted:
    """One lens per layer: the best ridge on dev, or with ``tolerance`` the strongest allowed one."""
    choices = []
    for layer in range(len(moments.mean)):
        path = RidgePath(moments.layer([layer]), prior)
        if tolerance is None:
            choices.append(search.best(path.solve, [layer]))
        else:
            choices.append(search.within(search.path(path.solve, [layer]), tolerance))
    return solve_as_chosen(search, moments, prior, choices, tolerance or 0.0)


def fit_shared(search: DevSearch, moments: Moments, layers: Sequence[int]) -> Fitted:
    """One lens for ``layers``, prior zero, chosen by its mean dev KL over those layers."""
    pooled = moments.pooled(layers)
    choice = search.best(RidgePath(pooled, "zero").solve, layers)
    return solve_as_chosen(search, pooled, "zero", [choice])


def fit_shared_bias(search: DevSearch, moments: Moments) -> Fitted:
    """One matrix for all layers and a bias for each, prior zero."""
    within = moments.pooled_within()
    layers = range(len(moments.mean))
    choice = search.best(RidgePath(within, "zero").solve, layers)
    return solve_as_chosen(search, within, "zero", [choice] * len(layers))


def fit_rotated(search: DevSearch, moments: Moments, view: RotatedView) -> Fitted:
    """The shared lens of a rotated view as maps of the plain states, one per layer: ``B Q_l h + c``."""
    layers = range(len(moments.mean))
    path = RidgePath(moments.rotated(view).pooled(layers), "zero")

    choice = search.best(lambda ridge: rotated_maps(path.solve(ridge), view), layers)
    maps = search.padded(rotated_maps(path.solve(choice.ridge), view), choice.pad)
    return Fitted(maps, (choice.ridge,) * len(layers), (choice.pad,) * len(layers), "zero", "closed")


def rotated_maps(maps: AffineMaps, view: RotatedView) -> AffineMaps:
    """Maps of rotated states (one, or one per layer) as maps of the plain states, one per layer: ``B Q_l h + c``."""
    q = view.maps.to(maps.matrix)
    return AffineMaps(maps.matrix @ q, maps.offset.expand(len(q), -1))


def solve_as_chosen(
    search: DevSearch, moments: Moments, prior: Prior, choices: Sequence[Choice], tolerance: float = 0.0
) -> Fitted:
    """The closed forms of K regressions at chosen ridges and pads."""
    ridges, pads = tuple(c.ridge for c in choices), tuple(c.pad for c in choices)
    solved = RidgePath(moments, prior).solve(torch.tensor(ridges, dtype=torch.float64))
    offset = solved.offset + torch.tensor(pads, dtype=torch.float64).to(solved.offset)[:, None] * search.pad
    return Fitted(AffineMaps(solved.matrix, offset), ridges, pads, prior, "closed", tolerance)


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


def read_out_curvature(readout: ReadOut, fit: Capture) -> Tensor:
    """Mean curvature of KL at the final states, ``[d, d]`` float64: ``G^T (W^T (diag q - q q^T) W) G / scale^2``.

    The norm's radial part is left out: it is used as a preconditioner only. Identity where the norm has no gain matrix.
    """
    final = fit.states[-1][:2048]
    d = final.shape[-1]
    gain = readout.gain(d)
    if gain is None:
        return torch.eye(d, dtype=torch.float64)
    n = readout.final_norm(final)
    q = (n @ readout.weight.T if readout.bias is None else torch.addmm(readout.bias, n, readout.weight.T)).softmax(-1)
    inverse_scale = n.norm(dim=-1) / (final @ gain.T).norm(dim=-1)
    weighted = (q * inverse_scale[:, None] ** 2).sum(0)
    moment = (q @ readout.weight) * inverse_scale[:, None]
    weight = readout.weight.double()
    fisher = (weight.T * weighted.double()) @ weight - moment.double().T @ moment.double()
    return (gain.double().T @ fisher @ gain.double() / len(final)).cpu()


def inverse_root(matrix: Tensor, floor: float) -> Tensor:
    """``matrix^(-1/2)`` of a symmetric positive semi-definite matrix, eigenvalues raised to ``floor`` times their mean."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0) + floor * values.clamp(min=0).mean()
    return (vectors * values.rsqrt()) @ vectors.T


@dataclass(frozen=True)
class Refinement:
    """A refined lens and how it ended: ``iterations`` kept, ``converged`` to the tolerance or stopped by dev."""

    maps: AffineMaps
    dev_kl: float
    iterations: int
    ended: Literal["converged", "dev rose", "iteration limit"]


def refine(
    search: DevSearch,
    fit: Capture,
    moments: Moments,
    start: AffineMaps,
    ridge: float,
    layers: Sequence[int],
    *,
    tokens: int,
) -> Refinement:
    """Minimise ``E KL + (lam/2) |B - B0|^2`` for one lens on ``layers``, from its closed form; prior zero.

    The penalty is the closed form's own, in nats: its ridge times ``2 KL / E |r - x|^2`` at the start, what a unit of
    squared error costs. L-BFGS on coordinates whitened by the input covariance and the read-out's curvature, so that no
    step size is tuned by layer; equivariant under rotations. The best iterate on dev is returned, the start included:
    a refinement never returns a lens that is worse on dev. ``moments`` is the one regression that ``start`` solves.
    """
    recipe = search.recipe
    readout = search.readout
    # Dealt out at random: by turns, a layer would see the same ranks of position in every window.
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))
    share = [order[i :: len(layers)].sort().values for i in range(len(layers))]
    rows = [r[torch.linspace(0, len(r) - 1, min(len(r), tokens // len(layers))).round().long()] for r in share]
    h = torch.cat([fit.states[layer][r] for layer, r in zip(layers, rows, strict=True)])
    expected = torch.cat([fit.expected[r] for r in rows])
    entropy_term = torch.cat([fit.entropy_term[r] for r in rows])
    target = torch.cat([fit.states[-1][r] for r in rows])

    unit = median_eigenvalue(torch.linalg.eigvalsh(moments.covariance))[0]
    lam = ridge * unit
    # In the eigenbasis: L-BFGS sizes its first step by the gradient's largest entries, which depend on the basis.
    values, vectors = torch.linalg.eigh(moments.covariance[0])
    root = (values.clamp(min=0) + lam).sqrt()
    whiten, unwhiten = vectors / root, vectors * root
    colour = inverse_root(read_out_curvature(readout, fit), 1e-2)
    mean = moments.mean[0]
    inputs = ((h.double() - mean.to(h.device)) @ whiten.to(h.device)).to(h)
    whiten_h, colour_h = whiten.to(h), colour.to(h)

    # x = (inputs theta^T + gamma) colour, with theta and gamma what is optimised; colour is symmetric.
    matrix0, offset0 = start.matrix[0].double().cpu(), start.offset[0].double().cpu()
    theta0 = torch.linalg.solve(colour, matrix0) @ unwhiten
    gamma0 = torch.linalg.solve(colour, matrix0 @ mean + offset0)
    theta, gamma = theta0.to(h).requires_grad_(), gamma0.to(h).requires_grad_()

    def output() -> Tensor:
        return torch.addmm(gamma, inputs, theta.T) @ colour_h

    with torch.no_grad():
        x = output()
        seen = readout.weight.shape[1]
        error = (target - x)[:, :seen].pow(2).sum(-1).mean()
        nats_per_error = 2 * kl_objective(readout, x, expected, entropy_term) / error
    penalty = (nats_per_error * lam).to(h)

    def maps() -> AffineMaps:
        matrix = colour @ theta.detach().double().cpu() @ whiten.T
        return AffineMaps(matrix[None], (colour @ gamma.detach().double().cpu() - matrix @ mean)[None])

    optimizer = torch.optim.LBFGS(
        [theta, gamma], lr=1.0, max_iter=4, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0.0
    )
    last = np.inf

    def closure() -> Tensor:
        optimizer.zero_grad()
        matrix = colour_h @ theta @ whiten_h.T
        loss = kl_objective(readout, output(), expected, entropy_term) + penalty / 2 * matrix.pow(2).sum()
        loss.backward()
        return loss.detach()

    best = Refinement(start, search.kl(start, layers), 0, "iteration limit")
    ended: Literal["converged", "dev rose", "iteration limit"] = "iteration limit"
    rises = 0
    for iteration in range(4, recipe.refine_iterations + 1, 4):
        before = optimizer.step(closure).item()  # type: ignore[arg-type]
        here = maps()
        dev_kl = search.kl(here, layers)
        if dev_kl < best.dev_kl:
            best, rises = Refinement(here, dev_kl, iteration, ended), 0
        else:
            rises += 1
        if rises == 2:
            ended = "dev rose"
            break
        if last - before < recipe.refine_tolerance * abs(before):
            ended = "converged"
            break
        last = before
    return Refinement(best.maps, best.dev_kl, best.iterations, ended)
