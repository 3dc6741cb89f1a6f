"""Ridge regression for any ridge: a Cholesky factor of each covariance with its ridge, and no eigenvector."""

import torch
from torch import Tensor

from lensbench.lenses.algebra import right_divided
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.recipe import Prior


class RidgePath:
    """Ridge solutions of K regressions for any ridge; what a solution takes is one factor of each covariance."""

    def __init__(self, moments: Moments, prior: Prior):
        self.moments, self.prior = moments, prior

    @property
    def unit(self) -> Tensor:
        """The unit of each regression's ridge, ``[K]``: see :func:`lensbench.lenses.algebra.median_eigenvalue`."""
        return torch.tensor([self.moments.unit(k) for k in range(len(self.moments.covariance))], dtype=torch.float64)

    def solve(self, ridge: float | Tensor) -> AffineMaps:
        """``B = (C_rh + lam B0)(C_hh + lam I)^-1``, ``c = rbar - B hbar``; a ridge, or one for each regression ``[K]``.

        Float64 on the CPU.
        """
        moments = self.moments
        ridges = torch.as_tensor(ridge, dtype=torch.float64).expand(len(moments.covariance))
        one = moments.repeated and bool((ridges == ridges[0]).all())
        solved = [self._matrix(k, float(ridges[k])) for k in range(1 if one else len(ridges))]
        matrix = solved[0].expand(len(ridges), -1, -1) if one else torch.stack(solved)
        offset = torch.stack([moments.target_mean - m @ mean for m, mean in zip(matrix, moments.mean, strict=True)])
        return AffineMaps(matrix, offset)

    def _matrix(self, k: int, ridge: float) -> Tensor:
        moments, device = self.moments, self.moments.device
        lam = ridge * moments.unit(k)
        covariance = moments.covariance[k].to(device, copy=True)
        covariance.diagonal().add_(lam)
        numerator = moments.cross[k].to(device)
        if self.prior == "identity":
            numerator = numerator.clone()
            numerator.diagonal().add_(lam)
        return right_divided(numerator, covariance).cpu()
