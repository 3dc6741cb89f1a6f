"""Algebra of the fits, before and after: ``python -m benchmarks.speed.algebra``

Before: an eigendecomposition of every covariance, twice for each lens (search and solution), and a rotated view's map
turned to all layers at every ridge. After: :mod:`lensbench.lenses.ridge`, with a Cholesky factor for each ridge that the
search asks for, a unit from eigenvalues alone, once for each covariance, and maps turned to the layers that are read. Both
solve the same regressions of random states and read the same dev states. KL is not computed; the search visits a fixed
number of ridges.

``algebra.csv``: CPU seconds of one of each part, how many a fit has, and the sum over a fit for each layer of the model;
what moments, views and solutions take for each layer. ``difference``: of the maps, relative to their largest entry.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.speed.task import console, numbers_of, say, write_description
from lensbench.lenses.algebra import median_eigenvalue
from lensbench.lenses.maps import AffineMaps, TurnedMap, rotated_maps
from lensbench.lenses.moments import Moments, RotatedMoments
from lensbench.lenses.planning import matrices
from lensbench.lenses.recipe import FitRecipe, Prior
from lensbench.lenses.ridge import RidgePath
from lensbench.runtime.environment import git_revision, hardware, versions
from lensbench.runtime.files import write_atomically
from lensbench.streams.rotated import RotatedView
from lensbench.suite.files import load_suite

DEV = 2048
"""Dev states that a lens is read on"""

VISITED = (1e-2, 3e-2, 0.1, 0.3)
"""Ridges that the search for a lens visits; the last is the best"""


class Eigenpath:
    """Ridge solutions from an eigendecomposition of each covariance: the algorithm before."""

    def __init__(self, moments: Moments, prior: Prior):
        self.moments, self.prior = moments, prior
        self.values, self.vectors = torch.linalg.eigh(moments.covariance)
        self.unit = median_eigenvalue(self.values)
        self.projected_cross = moments.cross @ self.vectors

    def solve(self, ridge: float) -> AffineMaps:
        """As :meth:`lensbench.lenses.ridge.RidgePath.solve`."""
        lam = (torch.as_tensor(ridge, dtype=torch.float64) * self.unit)[:, None]
        numerator = self.projected_cross
        if self.prior == "identity":
            numerator = numerator + lam[..., None] * self.vectors
        shrunk = numerator / (self.values.clamp(min=0) + lam)[:, None, :]
        matrix = shrunk @ self.vectors.transpose(-1, -2)
        return AffineMaps(matrix, self.moments.target_mean - (matrix @ self.moments.mean[..., None])[..., 0])


@dataclass(frozen=True)
class Work:
    """Random states of some layers, their moments, and a random-basis view."""

    moments: Moments
    view: RotatedView
    rotated: Moments
    """Of all layers: made once and kept, before"""
    kept: RotatedMoments
    """Of the layers of pairs, after"""
    dev: Tensor
    ridges: tuple[float, ...]
    deep: int
    """Layers of the model that the fit is of"""

    @property
    def times(self) -> int:
        """How often what was done for every layer is done, with these few, for as many layers as the model has."""
        return self.deep // len(self.moments.mean)

    @classmethod
    def of(cls, d: int, layers: int, deep: int, ridges: tuple[float, ...]) -> "Work":
        """States whose standard deviations fall over two decades, with a target that they predict in part."""
        random = torch.Generator().manual_seed(0)
        scale = torch.logspace(0, -2, d, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))[0]
        covariance, cross = (torch.empty(layers, d, d, dtype=torch.float64) for _ in range(2))
        for k in range(layers):
            h = torch.randn(2 * d, d, generator=random, dtype=torch.float64) * scale @ basis.T
            covariance[k] = h.T @ h / len(h)
            cross[k] = covariance[k] + 0.01 * torch.randn(d, d, generator=random, dtype=torch.float64) / d**0.5
        mean = torch.randn(layers, d, generator=random, dtype=torch.float64)
        moments = Moments(mean, covariance, cross, mean[0])
        view = RotatedView.random(covariance, seed=1)
        kept = RotatedMoments(moments, view)
        kept.known.update({k: kept.of_layer(k) for k in (0, 1)})
        rotated = Moments(
            kept.mean, *(torch.stack(x) for x in zip(*map(kept.of_layer, range(layers)), strict=True)), mean[0]
        )
        return cls(moments, view, rotated, kept, torch.randn(DEV, d, generator=random), ridges, deep)

    def read(self, maps: object, layers: int = 1) -> None:
        """Read the dev states as each of so many layers."""
        for k in range(layers):
            maps.read(k, self.dev)  # type: ignore[attr-defined]

    def searched(
        self, make: Callable[[], Eigenpath | RidgePath], ridges: tuple[float, ...], layers: int = 1
    ) -> AffineMaps:
        """One search; before, its solution is made from another decomposition."""
        path = make()
        for ridge in ridges:
            self.read(path.solve(ridge), layers)
        path = make() if isinstance(path, Eigenpath) else path
        return path.solve(ridges[-1])


def one_layer(work: Work, before: bool) -> AffineMaps:
    """The matrix's whole path, its solution, and the lens with prior zero, plain and in the view."""
    kind = Eigenpath if before else RidgePath
    plain = (work.moments if before else fresh(work.moments)).layer([0])
    turned = (work.rotated if before else RotatedMoments(fresh(work.moments), work.view)).layer([0])
    path = partial(kind, plain, "identity")
    matrix = work.searched(path, work.ridges)
    zero = [work.searched(partial(kind, moments, "zero"), VISITED) for moments in (plain, turned)]
    return AffineMaps.stack([matrix, *zero])


def fresh(moments: Moments) -> Moments:
    """The same moments with no unit known."""
    return Moments(moments.mean, moments.covariance, moments.cross, moments.target_mean)


def pair(work: Work, before: bool) -> AffineMaps:
    """One lens for two layers."""
    pooled = fresh(work.moments).pooled([0, 1])
    return work.searched(partial(Eigenpath if before else RidgePath, pooled, "zero"), VISITED, 2)


def rotated_pair(work: Work, before: bool) -> AffineMaps:
    """One lens for two layers of the view."""
    if not before:
        path = RidgePath(work.kept.pooled([0, 1]), "zero")
        for ridge in VISITED:
            work.read(TurnedMap(path.solve(ridge), work.view, [0, 1]), 2)
        return path.solve(VISITED[-1])
    pooled = work.rotated.pooled([0, 1])
    found = Eigenpath(pooled, "zero")
    for ridge in VISITED:
        solved = found.solve(ridge)
        for _ in range(work.times):
            turned = rotated_maps(solved, work.view)
        work.read(turned[[0, 1]], 2)
    return Eigenpath(pooled, "zero").solve(VISITED[-1])


def resampled(work: Work, before: bool) -> AffineMaps:
    """One regression solved again at its ridge, from moments of other documents."""
    return (Eigenpath if before else RidgePath)(fresh(work.moments).layer([0]), "zero").solve(VISITED[-1])


def shared_bias(work: Work, before: bool) -> AffineMaps:
    """One matrix for all layers, a bias for each."""
    pooled = fresh(work.moments).pooled_within()
    if before:
        for _ in range(2 * (work.times - 1)):  # searched and solved; all layers but these
            torch.linalg.eigh(pooled.covariance)
    return work.searched(partial(Eigenpath if before else RidgePath, pooled, "zero"), VISITED, len(pooled.mean))


PARTS: dict[str, Callable[[Work, bool], AffineMaps]] = {
    "lenses of a layer": one_layer, "lens of a pair": pair, "lens of a rotated pair": rotated_pair,
    "resampled lens": resampled, "shared lens, biases": shared_bias,
}  # fmt: skip


def counts(recipe: FitRecipe, layers: int) -> dict[str, int]:
    """How many of each part a fit has; leave-one-out lenses and shared ones count as those of pairs."""
    some = min(layers, recipe.layers)
    pairs = some * (some - 1) // 2
    return {
        "lenses of a layer": layers, "lens of a pair": pairs + some + 1,
        "lens of a rotated pair": pairs * recipe.pair_rotations + recipe.rotations,
        "resampled lens": recipe.refits * (layers + 2 * some + 1 + recipe.rotations), "shared lens, biases": 1,
    }  # fmt: skip


def gib_of(recipe: FitRecipe, layers: int, d: int, before: bool) -> dict[str, float]:
    """GiB for each layer: in memory and on disk."""
    if before:
        return {"memory_gib": 8 * d * d * (8 + recipe.rotations + 3 * recipe.pair_rotations) / 2**30, "disk_gib": 0.0}
    # Of all layers together: a covariance with its ridge, its factor, numerator, solution, and a view's map.
    return {
        "memory_gib": 8 * d * d * 6 / layers / 2**30,
        "disk_gib": 8 * d * d * matrices(recipe, layers) / layers / 2**30,
    }


def measure(d: int, layers: int, deep: int, recipe: FitRecipe, rounds: int) -> list[dict[str, object]]:
    """Rows of one width: each part before and after, in alternation, the least of ``rounds``; then the sums."""
    work, rows = Work.of(d, layers, deep, recipe.ridges), []
    totals = {"before": 0.0, "after": 0.0}
    for name, part in PARTS.items():
        seconds = {"before": float("inf"), "after": float("inf")}
        maps = {}
        for _ in range(rounds):
            for which in seconds:
                start = time.process_time()
                maps[which] = part(work, which == "before")
                seconds[which] = min(seconds[which], time.process_time() - start)
        difference = (maps["before"].matrix - maps["after"].matrix).abs().max() / maps["before"].matrix.abs().max()
        count = counts(recipe, deep)[name]
        for which in totals:
            totals[which] += count * seconds[which]
        row = {"d": d, "part": name, "seconds_before": seconds["before"], "seconds_after": seconds["after"]}
        row |= {"ratio": seconds["before"] / seconds["after"], "in_a_fit": count, "difference": float(difference)}
        rows.append(row)
        say(f"d {d}, {name}: {seconds['before']:.3f} s before, {seconds['after']:.3f} s after")
    per_layer = {f"seconds_{which}": total / deep for which, total in totals.items()}
    size = {
        f"{name}_{which}": value
        for which in totals
        for name, value in gib_of(recipe, deep, d, which == "before").items()
    }
    rows.append(
        {"d": d, "part": "a fit, for each layer", **per_layer, "ratio": totals["before"] / totals["after"], **size}
    )
    return rows


def main(
    out: Path = Path("runs/speed/algebra"),
    widths: Annotated[str, typer.Option(help="Widths, separated by commas; 4096 takes 25 minutes.")] = "576,1024,2048",
    layers: Annotated[int, typer.Option(min=2, help="Layers of random states, a divisor of DEEP.")] = 4,
    deep: Annotated[int, typer.Option(min=2, help="Layers of the model that counts and bytes are given for.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    threads: int = 1,
) -> None:
    """Measure, print and write algebra.csv and algebra.json into OUT."""
    torch.set_num_threads(threads)
    recipe, revision = load_suite("pretrained").fit, git_revision()
    table = pd.DataFrame([row for d in numbers_of(widths) for row in measure(d, layers, deep, recipe, rounds)])
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "algebra.csv", partial(table.to_csv, index=False, lineterminator="\n", float_format="%.4g"))
    described = {"hardware": hardware(torch.device("cpu")), "versions": versions(), "git_revision": revision}
    described |= {"layers": layers, "deep": deep, "threads": threads, "rounds": rounds}
    write_description(out, "algebra", described)
    console.print(table.iloc[:, :7].to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    typer.run(main)
