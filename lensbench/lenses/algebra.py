"""Linear algebra of regressions: a Cholesky factor for each ridge that is asked for, and the unit that ridges are in.

Float64 where the device is fast in it. Where it is not, the factor is made in float32 and the solution refined by residuals
in float64 (iterative refinement: Wilkinson 1963; Carson and Higham 2018); one that does not reach float64's accuracy is
solved in float64 from the start.
"""

import time
from functools import lru_cache

import torch
from torch import Tensor

SLOW = 6.0
"""A device is slow in float64 where a product takes more than so many times as long as in float32"""

PROBED = 2048
"""Size of the matrices whose product is timed"""

ACCURATE = 1e-13
"""Largest residual of a row x of a refined solution, over ``|matrix| |x| + |numerator|``: as far as float64 itself comes"""

MOST_STEPS = 30
"""Refinement steps at most"""


def algebra_device(states: Tensor) -> torch.device:
    """Where regressions of these states are solved: on their GPU, else on the CPU (others lack float64)."""
    return states.device if states.device.type == "cuda" else torch.device("cpu")


@lru_cache
def fast_in_float64(device: torch.device) -> bool:
    """Whether products in float64 take no more than :data:`SLOW` times as long as in float32; the CPU's do not."""
    if device.type == "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(PROBED, PROBED, dtype=dtype, device=device)
        x @ x
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        x @ x
        torch.cuda.synchronize(device)
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.float64] <= SLOW * seconds[torch.float32]


def right_divided(numerator: Tensor, matrix: Tensor, *, mixed: bool | None = None) -> Tensor:
    """``numerator matrix^-1`` of a symmetric positive definite matrix ``[d, d]``, float64, on their device.

    ``mixed``: the factor in float32, refined; by default where the device is slow in float64. A matrix that rounding leaves
    without a Cholesky factor is solved by its eigenvectors, eigenvalues below its rounding error raised to that.
    """
    mixed = not fast_in_float64(matrix.device) if mixed is None else mixed
    if mixed:
        found = _refined(numerator, matrix)
        if found is not None:
            return found
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        solution: Tensor = torch.cholesky_solve(numerator.mT, factor).mT
        return solution
    values, vectors = torch.linalg.eigh(matrix)
    floor = torch.finfo(matrix.dtype).eps * values[-1]
    by_vectors: Tensor = ((numerator @ vectors) / values.clamp(min=floor)) @ vectors.mT
    return by_vectors


def _refined(numerator: Tensor, matrix: Tensor) -> Tensor | None:
    """``numerator matrix^-1`` from a factor in float32; None where refinement does not reach :data:`ACCURATE`."""
    # Equal diagonals: float32 has room for seven digits between directions, not for the scale of each of them too.
    scale = matrix.diagonal().rsqrt()
    if not bool(torch.isfinite(scale).all()):
        return None
    factor, failed = torch.linalg.cholesky_ex((matrix * scale * scale[:, None]).float())
    if int(failed):
        return None
    size, tiny = matrix.norm(dim=1).max(), torch.finfo(numerator.dtype).tiny
    solution: Tensor = torch.zeros_like(numerator)
    residual, before = numerator, 1.0
    for _ in range(MOST_STEPS):
        length = residual.norm(dim=1, keepdim=True).clamp(min=tiny)
        step = torch.cholesky_solve(((residual / length) * scale).float().mT, factor).mT
        solution = solution + step.double() * scale * length
        residual = numerator - solution @ matrix
        reached = size * solution.norm(dim=1) + numerator.norm(dim=1)
        now = float((residual.norm(dim=1) / reached.clamp(min=tiny)).max())
        if now <= ACCURATE:
            return solution
        if not now < before / 2:
            return None
        before = now
    return None


def median_eigenvalue(values: Tensor) -> Tensor:
    """Median of a covariance's eigenvalues ``[K, d]``, null directions left out: the unit of a ridge, ``[K]``.

    A stream whose state is wider than what it holds would otherwise have a unit of nearly zero.
    """
    medians = [v[v > 1e-10 * v[-1]].median() if bool(v[-1] > 0) else v.new_tensor(1.0) for v in values]
    return torch.stack(medians)


def ridge_unit(covariance: Tensor, device: torch.device) -> float:
    """The unit of ridges for a covariance ``[d, d]``, float64: its median eigenvalue, found without eigenvectors."""
    return float(median_eigenvalue(torch.linalg.eigvalsh(covariance.to(device))[None])[0])
