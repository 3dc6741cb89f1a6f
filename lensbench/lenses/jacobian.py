"""Mean Jacobians of a stream: what a change of a state does to the last one, from vector-Jacobian products.

The Jacobian lens (Gurnee et al., "Verbalizable Representations Form a Global Workspace in Language Models", Transformer
Circuits Thread 2026) reads a state by ``softmax(W_U norm(J_l h_l))``. V are the positions of a prompt that are looked at.
J_l is a mean over prompts and over t in V: with targets "later" of the sum over all t' >= t in V of
``d h_L[t'] / d h_l[t]``, with targets "current" of ``d h_L[t] / d h_l[t]``. J of h_L is the identity. Published files count
layers from the output of the first block: their layer l is our l + 1.

*Exact* estimates take a backward pass for every row of J and prompt. *Random* ones take few: with v of random signs, the
same at all positions, ``v (J^T v)^T`` has the mean J. With v drawn anew at each position the mean is that of the current
position alone, since products with other positions' v have mean zero. A known map A takes off variance as a control
variate: ``b A + v ((J - b A)^T v)^T`` has the same mean, whatever b that does not depend on v.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import JacobianRecipe
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream

Targets = Literal["later", "current"]
"""Which last states count: those of the current and later positions, or of the current position alone"""

PILOT_PROMPTS, PILOT_PROBES = 8, 2
"""Prompts and random vectors that the method and the control variate are chosen by"""

MOST_PROBES = 64
"""Random vectors of a prompt at most that ``auto`` chooses"""


class JacobianFacts(BaseModel):
    """How a Jacobian lens was estimated."""

    model_config = ConfigDict(extra="forbid")

    targets: Targets
    method: Literal["exact", "random"]
    prompts: int
    probes: int
    """Random vectors of each prompt; 0 for the exact method"""
    positions: int
    """Positions of all prompts that the mean is over"""
    skip_first: int
    skip_last: int
    products: int
    """Vector-Jacobian products of a prompt's length that were computed, the pilot's included"""
    control: list[float] = []
    """Factor b of the control variate at each layer; empty without one"""
    error: list[float]
    """Standard error of each layer's J over prompts and random vectors, by the norm of the *estimate* (Frobenius); empty of
    one prompt. The estimate is longer than J by its own noise: quote :attr:`relative_error`."""

    @property
    def relative_error(self) -> list[float]:
        """The relative standard error of each layer's J, by the norm of J itself; see :func:`by_the_norm_of_j`."""
        return [by_the_norm_of_j(error) for error in self.error]


def by_the_norm_of_j(error: float) -> float:
    """``r / sqrt(1 - r^2)``: the relative error of an unbiased estimate, from its error r by the estimate's own norm.

    ``E |J_hat|^2 = |J|^2 + E |J_hat - J|^2``: noise adds to the norm of what is divided by, and r never says more than 1,
    however large the error is. Infinite where the estimate is no longer than its noise.
    """
    return error / math.sqrt(1 - error**2) if error < 1 else math.inf


@dataclass(frozen=True)
class Jacobians:
    """Mean Jacobians ``[L, d, d]`` of h_L with respect to h_0..h_{L-1}, float64 on the CPU, and how they were estimated."""

    mean: Tensor
    facts: JacobianFacts


@contextmanager
def linearised(stream: ResidualStream, ids: Tensor) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function that multiplies vectors with the Jacobians of one forward pass over token ids ``[B, T]``.

    It takes a vector for each position of h_L, ``[B, T, d]``, and returns for each of h_0..h_{L-1} the sum over positions of
    ``(d h_L[t'] / d h_l[t])^T v[t']``, ``[B, T, d]``; ``d`` are the entries that the view shows. It can be called many
    times. The model's weights take no gradient meanwhile.
    """
    trainable = [p for p in stream.model.parameters() if p.requires_grad]

    def leaf(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hook = stream.model.get_input_embeddings().register_forward_hook(leaf)
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            states, _ = stream.graph(ids, read_out=False)
        last = states[-1]

        def products(vectors: Tensor) -> list[Tensor]:
            whole = torch.zeros_like(last)
            whole[..., : vectors.shape[-1]] = vectors.to(whole)
            found = torch.autograd.grad(last, states[:-1], whole, retain_graph=True, allow_unused=True)
            return [
                stream.seen(torch.zeros_like(h) if g is None else g)
                for h, g in zip(states[:-1], found, strict=True)
            ]  # fmt: skip

        yield products
    finally:
        hook.remove()
        for p in trainable:
            p.requires_grad_(True)


@dataclass
class _Sums:
    """Sums over prompts of their Jacobians less the control variate's part, and of the squares of all entries."""

    total: Tensor  # [L, d, d], float64
    squares: Tensor  # [L], float64
    prompts: int = 0
    positions: int = 0
    products: int = 0

    def add(self, matrices: Tensor, positions: int) -> None:
        """The matrices ``[L, d, d]`` of one prompt."""
        self.total += matrices.to(self.total)
        self.squares += matrices.double().square().sum((1, 2)).to(self.squares)
        self.prompts += 1
        self.positions += positions

    def of_all(self, ranks: Ranks) -> "_Sums":
        """Those of all processes."""
        counts = ranks.sum(torch.tensor([self.prompts, self.positions, self.products], dtype=torch.float64))
        return _Sums(ranks.sum(self.total), ranks.sum(self.squares), *(int(c) for c in counts))


@dataclass(frozen=True)
class Choice:
    """How J is estimated: how many prompts, and how many random vectors of each (0: exactly)."""

    prompts: int
    probes: int


@dataclass(frozen=True)
class JacobianSource:
    """A stream and prompts that its mean Jacobians are estimated from."""

    stream: ResidualStream
    prompts: Windows
    recipe: JacobianRecipe
    seed: int = 0
    first_position: int = 0
    """Where ``recipe.skip_first = -1`` begins"""
    rotation: RotatedView | None = None
    """What the states of the layers before the last are seen through; None: as they are"""
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Raise :class:`LensbenchError` where no prompt has a position that is looked at."""
        if self.stream.pooling is not None:
            raise LensbenchError("Jacobian lenses are for language models: the states of an image have no positions")
        if not len(self._long_enough):
            raise LensbenchError(
                f"no prompt has a position left: the longest of {len(self.prompts)} has {int(self.prompts.lengths.max())} "
                f"tokens, and fit.jacobian leaves out the first {self.skip_first} and the last {self.recipe.skip_last}"
            )

    @property
    def skip_first(self) -> int:
        """Positions that are left out at the start of a prompt."""
        return self.first_position if self.recipe.skip_first < 0 else self.recipe.skip_first

    @property
    def _long_enough(self) -> np.ndarray:
        return np.flatnonzero(self.prompts.lengths > self.skip_first + self.recipe.skip_last)

    def positions(self, prompt: int) -> Tensor:
        """The positions of a prompt that are looked at."""
        return torch.arange(self.skip_first, int(self.prompts.lengths[prompt]) - self.recipe.skip_last)

    def estimate(
        self, targets: Targets, control: Tensor | None = None, say: Callable[[str], None] = lambda remark: None
    ) -> Jacobians:
        """The mean Jacobians over the first prompts that are long enough, as the recipe says.

        ``control`` ``[L, d, d]``: maps that are near J, such as a ridge regression's; without them none are used. ``say``
        shows a remark while it runs.
        """
        pilot = self._pilot(targets, control)
        choice, sums = pilot.choice, self._no_sums()
        some = self._long_enough[: choice.prompts]
        own = some[self.ranks.rank :: self.ranks.size]
        of_control = None if not choice.probes or control is None else pilot.factor[:, None, None] * control.double()
        if choice.probes:
            self._random(sums, own, targets, choice.probes, of_control, say)
        else:
            self._exact(sums, own, targets, say)
        whole = sums.of_all(self.ranks)
        mean = whole.total / whole.prompts
        spread = (whole.squares / whole.prompts - mean.square().sum((1, 2))).clamp(min=0) / max(1, whole.prompts - 1)
        if of_control is not None:
            mean = mean + of_control.to(mean)
        error = (spread.sqrt() / mean.square().sum((1, 2)).sqrt().clamp(min=1e-300)).tolist()
        facts = JacobianFacts(
            targets=targets,
            method="random" if choice.probes else "exact",
            prompts=whole.prompts,
            probes=choice.probes,
            positions=whole.positions,
            skip_first=self.skip_first,
            skip_last=self.recipe.skip_last,
            products=whole.products + pilot.products,
            control=[] if of_control is None else pilot.factor.tolist(),
            error=error if whole.prompts > 1 else [],
        )
        mean = mean.cpu()
        if self.rotation is not None:
            mean = mean @ self.rotation.maps[: len(mean)].to(mean).mT
        return Jacobians(mean, facts)

    def _no_sums(self) -> _Sums:
        layers, d = self.stream.layers, self.stream.d_model
        return _Sums(torch.zeros(layers, d, d, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64))

    def _ids(self, prompt: int) -> Tensor:
        """Token ids ``[T]`` of a prompt, without padding."""
        return torch.from_numpy(self.prompts.ids[prompt, : self.prompts.lengths[prompt]])

    def _exact(self, sums: _Sums, prompts: np.ndarray, targets: Targets, say: Callable[[str], None]) -> None:
        """Add the Jacobians of some prompts, row by row."""
        layers, d, rows = self.stream.layers, self.stream.d_model, self.recipe.rows
        for number, prompt in enumerate(prompts):
            at = self.positions(prompt)
            if targets == "current":
                drawn = self._generator(prompt, 0)
                at = at[torch.randperm(len(at), generator=drawn)[: self.recipe.positions]]
            matrices = torch.zeros(layers, d, d, dtype=torch.float64)
            # One unit vector at all positions gives a row of all of them; of the current one alone each takes its own.
            places = [at] if targets == "later" else list(at[:, None])
            units = [(place, a) for place in places for a in range(d)]
            ids = self._ids(int(prompt)).expand(rows, -1)
            with linearised(self.stream, ids) as products:
                for start in range(0, len(units), rows):
                    some = units[start : start + rows]
                    vectors = torch.zeros(*ids.shape, d, dtype=torch.float64)
                    for k, (place, a) in enumerate(some):
                        vectors[k, place, a] = 1.0
                    found = products(vectors)
                    for layer, g in enumerate(found):
                        own = g.double().cpu()
                        for k, (place, a) in enumerate(some):
                            matrices[layer, a] += own[k, place].mean(0) / len(places)
                    say(f"prompt {number + 1} of {len(prompts)}, row {min(start + rows, len(units))} of {len(units)}")
            sums.products += len(units)
            sums.add(matrices, len(at))

    def _random(
        self,
        sums: _Sums,
        prompts: np.ndarray,
        targets: Targets,
        probes: int,
        control: Tensor | None,
        say: Callable[[str], None],
    ) -> None:
        """Add unbiased estimates of the Jacobians of some prompts, less the control variate."""
        for start in range(0, len(prompts), self.recipe.rows):
            some = prompts[start : start + self.recipe.rows]
            estimates = None
            with self._batch(some) as (products, inside):
                for k in range(probes):
                    v = self._signs(some, targets, inside.shape[1], 1 + k)
                    found = [g.double() for g in products(v * inside[..., None])]
                    one = _outer(found, v.to(found[0]), inside.to(found[0]), control, targets)
                    estimates = one if estimates is None else estimates + one
            assert estimates is not None
            for k, prompt in enumerate(some):
                sums.add(estimates[k] / probes, len(self.positions(prompt)))
            sums.products += probes * len(some)
            say(f"prompt {min(start + len(some), len(prompts))} of {len(prompts)}")

    @contextmanager
    def _batch(self, prompts: np.ndarray) -> Iterator[tuple[Callable[[Tensor], list[Tensor]], Tensor]]:
        """The products of several prompts side by side, and which of their positions are looked at, float64 ``[B, T]``."""
        longest = int(self.prompts.lengths[prompts].max())
        ids = torch.from_numpy(self.prompts.ids[prompts, :longest])
        inside = torch.zeros(len(prompts), longest, dtype=torch.float64)
        for k, prompt in enumerate(prompts):
            inside[k, self.positions(prompt)] = 1.0
        with linearised(self.stream, ids) as products:
            yield products, inside

    def _signs(self, prompts: np.ndarray, targets: Targets, length: int, number: int) -> Tensor:
        """Random signs ``[B, T, d]``, a draw of its own for each prompt: the same at all positions, or not."""
        d, drawn = self.stream.d_model, []
        for prompt in prompts:
            shape = (1, d) if targets == "later" else (length, d)
            signs = torch.randint(2, shape, generator=self._generator(prompt, number), dtype=torch.float64)
            drawn.append((2 * signs - 1).expand(length, d))
        return torch.stack(drawn)

    def _generator(self, prompt: int, number: int) -> torch.Generator:
        state = np.random.SeedSequence((self.seed, int(prompt), number)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    def _pilot(self, targets: Targets, control: Tensor | None) -> "Pilot":
        """What a few prompts say of the method that is cheaper, and of the control variate's factor."""
        recipe, d = self.recipe, self.stream.d_model
        factor = torch.zeros(self.stream.layers, dtype=torch.float64)
        asked = Choice(min(recipe.prompts, len(self._long_enough)), 0 if recipe.method == "exact" else recipe.probes)
        if recipe.method == "exact" or (control is None and (recipe.method == "random" or targets == "current")):
            return Pilot(asked, factor, 0)
        some = self._long_enough[: min(PILOT_PROMPTS, recipe.rows, asked.prompts)]
        length, means, seen = int(self.prompts.lengths[some].max()), [], []
        with self._batch(some) as (products, inside):
            for k in range(PILOT_PROBES):
                # Prompts share a vector: products of two of them then have the mean |J|^2.
                v = self._signs(some[:1], targets, length, -1 - k + 2**31).expand(len(some), -1, -1)
                g = torch.stack([x.double().cpu() for x in products(v * inside[..., None])])  # [L, M, T, d]
                mean = (g * inside[..., None]).sum(2) / inside.sum(1)[:, None]
                means.append(mean)
                if control is not None:
                    near = (v * inside[..., None]).expand(len(g), -1, -1, -1) @ control.double()[:, None]
                    other = near.sum(2) / inside.sum(1)[:, None]
                    pair = (mean, other) if targets == "later" else (g * inside[..., None], near)
                    seen.append((pair[0].mul(pair[1]).flatten(1).sum(1), pair[1].square().flatten(1).sum(1), other))
        if seen:
            factor = sum(s[0] for s in seen) / sum(s[1] for s in seen).clamp(min=1e-300)  # type: ignore[union-attr]
        if recipe.method == "auto" and targets == "later":
            rest = [m - factor[:, None, None] * s[2] for m, s in zip(means, seen, strict=True)] if seen else means
            asked = cheaper(torch.stack(means), torch.stack(rest), recipe.precision, d, asked.prompts)
        return Pilot(asked, factor, PILOT_PROBES * len(some))


@dataclass(frozen=True)
class Pilot:
    """What a few prompts say: how to estimate, the control variate's factor ``[L]``, and the products that they took."""

    choice: Choice
    factor: Tensor
    products: int


def _outer(found: list[Tensor], v: Tensor, inside: Tensor, control: Tensor | None, targets: Targets) -> Tensor:
    """``v (g - A^T v)^T``, mean over a prompt's positions: ``[B, L, d, d]`` from products L times ``[B, T, d]``."""
    count = inside.sum(1)[:, None, None]
    matrices = []
    for layer, g in enumerate(found):
        if control is not None:
            g = g - v @ control[layer].to(v)
        g = g * inside[..., None]
        if targets == "later":
            matrices.append(v[:, 0, :, None] * (g.sum(1, keepdim=True) / count))
        else:
            matrices.append(v.mT @ g / count)
    return torch.stack(matrices, 1)


def cheaper(means: Tensor, rest: Tensor, precision: float, d: int, most: int) -> Choice:
    """The cheaper of the exact and the random method for a relative standard error, from a pilot.

    ``means`` ``[K, L, M, d]``: ``J_p^T v_k`` of M prompts with K vectors of random signs in common; ``rest``: the same less
    the control variate. ``E |J_p^T v|^2 = |J_p|^2``, and products of two prompts give ``|E J_p|^2``. An estimate from one
    vector has the variance ``(d - 1) |J_p|^2`` (of the rest), an exact one none. A product costs about what a forward pass
    does, so that a prompt costs 1 + its products. ``most`` prompts at most: where none reaches the precision, the more
    precise one is taken for what it costs.
    """
    count = means.shape[2]
    each = means.square().sum(-1).mean((0, 2))
    both = (means.sum(2).square().sum(-1).mean(0) - count * each) / max(1, count * (count - 1))
    between = (each - both).clamp(min=0)  # variance over prompts
    within = (d - 1) * rest.square().sum(-1).mean((0, 2))  # variance of one random vector
    unit = precision**2 * both.clamp(min=1e-12 * each.clamp(min=1e-300))

    def needed(probes: int) -> int:
        variance = between if probes == 0 else between + within / probes
        return min(10**12, max(2, math.ceil(float((variance / unit).max()))))

    ratio = float((within / between.clamp(min=1e-300)).median())
    probes = min(MOST_PROBES, d, max(1, round(math.sqrt(ratio))))
    by = {0: needed(0), probes: needed(probes)}
    cost = {0: by[0] * (1 + d), probes: by[probes] * (1 + probes)}
    within_reach = [k for k in by if by[k] <= most] or list(by)
    best = min(within_reach, key=lambda k: cost[k])
    return Choice(min(most, by[best]), best)
