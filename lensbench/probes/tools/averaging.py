"""Does a change depend on what was predicted, beyond what the labels shown before say? A control for few-shot prompts.

A learner that averages the labels shown moves its logits by ``(1[y] - mean) / (n + 1)``. Its predictions come from the same
mean, so that its changes correlate with them, though it holds no prediction. At equal labels its changes do not depend on
what it predicts of other words; those of a learner by errors do.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.probes.tools.crossfit import Estimates, FoldSums, refitted
from lensbench.statistics import jackknife

Ids = NDArray[np.int64]


def averaging_columns(counts: Tensor, shown: Tensor) -> Tensor:
    """Columns ``[..., m, 3]`` that averages of labels change by, of counts ``[..., m]`` before a label ``shown``.

    ``shown`` ``[..., m]`` is one at the label and zero elsewhere. The columns are the mean of the labels, its change by one
    more label, and the change of the logarithm of the mean with one label more, spread evenly. All are about their means.
    """
    labels, total = counts.shape[-1], counts.sum(-1, keepdim=True)
    even = torch.full_like(counts, 1 / labels)
    mean = torch.where(total > 0, counts / total.clamp(min=1), even)
    step = (shown - mean) / (total + 1)
    log_step = (counts + shown + even).log() - (counts + even).log()
    columns = torch.stack([mean, step, log_step], -1)
    return columns - columns.mean(-2, keepdim=True)


def counts_before(labels: Ids, at: Ids, of: NDArray[np.bool_], size: int) -> Tensor:
    """How often each of m labels was shown ``[S, m]`` before example ``at`` ``[S]``, at the examples in ``of`` ``[S, k]``.

    ``labels`` ``[S, k]`` are numbers of labels.
    """
    before = of & (np.arange(labels.shape[1]) < at[:, None])
    shown = np.eye(size)[labels] * before[..., None]
    return torch.from_numpy(shown.sum(1))


def add_beyond_averaging(
    found: Estimates, kind: str, columns: Tensor, predicted: Tensor, elsewhere: Tensor, change: Tensor, group: Ids
) -> None:
    """Add what predictions say of changes ``[S, m]`` beyond the averaging columns ``[S, m, C]``, groups ``[S]`` left out.

    ``predicted`` ``[S, m]`` is the model's prediction, ``elsewhere`` ``[S, m]`` its prediction after other words with the
    same labels. What the two share is no accident of one context: a change is the difference of two logits, and the noise
    of the one that gave the prediction would look like an error. So the second stands for the first: in the gain as a
    regressor, in the ratio as an instrument.
    """
    count = columns.shape[-1]
    sums = grouped(torch.cat([columns, torch.stack([predicted, elsewhere, change], -1)], -1), group, found.folds)
    known, output = torch.arange(1, count + 1), torch.tensor([count + 3])
    base, total = (x[..., 0] for x in refitted(sums, known, output, (0.0,)))
    more, _ = (x[..., 0] for x in refitted(sums, torch.cat([known, torch.tensor([count + 2])]), output, (0.0,)))
    found.refitted_share(f"few_shot_gain_beyond_averaging_{kind}", base - more, total)
    whole = sums.sum(0)
    each = np.array([instrumented(whole - held, count) for held in sums])
    slope, shared = instrumented(whole, count)
    low, _ = jackknife(np.array([slope, shared]), each)
    name, reason = f"few_shot_error_beyond_averaging_{kind}", ""
    if not low[1] > 0:
        reason = "undefined: predictions after other words with the same labels say nothing of the model's own"
        found.add(name, np.nan, reason=reason)
    else:
        found.add(name, slope, each[:, 0])


def grouped(columns: Tensor, group: Ids, folds: int) -> Tensor:
    """Raw sums by group ``[K, 1 + C, 1 + C]`` of one and columns ``[S, m, C]``, with a row per prompt and label."""
    sums = FoldSums(folds)
    rows = torch.cat([torch.ones_like(columns[..., :1]), columns], -1)
    for k in range(folds):
        sums.add(k, rows[torch.from_numpy(group == k)].flatten(0, 1))
    return sums.sums


def instrumented(moments: Tensor, count: int) -> tuple[float, float]:
    """beta of ``change ~ columns - beta p`` with an instrument for p, and the share of p that the instrument tells.

    ``moments`` ``[C + 4, C + 4]`` are raw sums of one, C columns, p, the instrument and the change. Both numbers are of what
    one and the columns leave.
    """
    known, rest = slice(0, count + 1), slice(count + 1, None)
    system = moments[known, known]
    scale = system.diagonal().clamp(min=1e-300).sqrt()
    standard = system / scale[:, None] / scale
    standard.diagonal().add_(1e-10)
    cross = moments[known, rest] / scale[:, None]
    left = moments[rest, rest] - cross.T @ torch.cholesky_solve(cross, torch.linalg.cholesky(standard))
    p, z, change = 0, 1, 2
    shared = float(left[z, p])
    return (-float(left[z, change]) / shared if shared else np.nan), shared / max(float(left[p, p]), 1e-300)
