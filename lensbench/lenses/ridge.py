"""Ridge regression along a whole path of ridges from one eigendecomposition."""

import torch
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.recipe import Prior


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
        self.values, self.vectors = moments.eigen
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
