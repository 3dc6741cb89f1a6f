"""The decomposition at other settings, next to the one that is reported: tolerances, metrics, and no massive activations.

Every variant uses the pairs of layers that passed the gates at the reported setting, with their weights, and the same
documents. So only the setting differs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lensbench.measures.means import Estimate
from lensbench.measures.update.decomposition import Decomposition, Variant
from lensbench.measures.update.massive import LEFT_OUT, MASSIVE
from lensbench.measures.update.quantities import Quantities
from lensbench.measures.update.summary import (
    WITHOUT_LAYER_0,
    estimate,
    mean_carried,
    news_of,
    pairs_from,
    passing,
    plain_mean,
    undetermined,
)
from lensbench.statistics import Array
from lensbench.streams.capture import Capture

DOCUMENTS_ALONE = "interval"
"""The setting of the reported decomposition with the doubt of documents alone, without that of lens refits"""

NO_INTERVALS: dict[str, Any] = {
    **dict.fromkeys(("ci_low", "ci_high", "difference", "difference_ci_low", "difference_ci_high")),
    "reason": "",
}
"""Columns of a row that is a plain share of tokens"""


@dataclass(frozen=True)
class MassiveTokens:
    """Tokens with a massive activation: the norm of a state is above ``cap`` times the median of its layer.

    Medians are those of the fitting tokens. A few tokens of such norms (arXiv:2402.17762) can decide a second moment.
    """

    cap: float
    layers: tuple[int, ...]
    medians: torch.Tensor

    @classmethod
    def of(cls, fit: Capture, layers: Sequence[int], cap: float) -> "MassiveTokens":
        """From the fitting tokens; ``layers`` are looked at, and the last state."""
        rows = (*layers, fit.layers)
        return cls(cap, rows, torch.stack([fit.states[row].norm(dim=-1).median() for row in rows]))

    def left_out(self, captured: Capture, memory_gib: float = float("inf")) -> tuple[Capture, float]:
        """The capture without them, and their share of its tokens; states above ``memory_gib`` GiB lie in a file."""
        massive = self.among(captured)
        return captured.take(~massive, memory_gib), float(massive.double().mean())

    def rows(self, shares: dict[str, float]) -> list[dict[str, Any]]:
        """Rows as of :func:`variant_rows` that say which share of the tokens of each split is left out."""
        return [
            {"setting": MASSIVE, "at": f"{self.cap:g}", "index": f"{split}_{LEFT_OUT}", "value": share} | NO_INTERVALS
            for split, share in shares.items()
        ]

    def among(self, captured: Capture) -> torch.Tensor:
        """Which tokens have one at any of the layers, ``[N]``."""
        found = torch.zeros(len(captured), dtype=torch.bool)
        for row, median in zip(self.layers, self.medians, strict=True):
            found |= (captured.states[row].norm(dim=-1) > self.cap * median).cpu()
        return found


def without_massive(found: Decomposition, capped: Decomposition, cap: float) -> Decomposition:
    """The decomposition with one more variant: ``capped``, of the tokens without massive activations."""
    paired = found.weights.shape == capped.weights.shape
    one = Variant(MASSIVE, f"{cap:g}", capped.point, capped.draws, paired, (capped.news_sums, capped.weights))
    return replace(found, variants=(*found.variants, one))


def variant_rows(found: Decomposition) -> Iterator[dict[str, Any]]:
    """A row for each variant and index: ``setting, at, index``, its value and its difference from the reported one.

    Both have intervals over documents; lenses are not fitted again.
    """
    alone = (
        [] if found.refits is None else [Variant(DOCUMENTS_ALONE, "documents", found.point, found.draws, paired=False)]
    )
    for one in (*found.variants, *alone):
        for suffix, first in (("", 0), (WITHOUT_LAYER_0, 1)):
            pairs = pairs_from(found, first)
            for name, (reported, drawn, value, draws, reason) in _compared(found, one, pairs).items():
                row: dict[str, Any] = {"setting": one.setting, "at": one.value, "index": f"{name}{suffix}"}
                nothing = Estimate(None, None, None, reason)
                here = nothing if reason else estimate(value, draws, found)
                change = nothing if reason else estimate(value - reported, draws - drawn, found)
                row |= {"value": here.value, "ci_low": here.low, "ci_high": here.high, "difference": change.value}
                row |= {"difference_ci_low": None, "difference_ci_high": None}
                if one.paired:
                    row |= {"difference_ci_low": change.low, "difference_ci_high": change.high}
                elif not reason and one.setting == MASSIVE:
                    reason = "some documents have no token left, so that the difference has no interval"
                yield row | {"reason": reason or here.reason}


Compared = tuple[float, Array, float, Array, str]
"""The reported value and its draws, the variant's, and why there is none"""


def _compared(found: Decomposition, one: Variant, pairs: NDArray[np.bool_]) -> dict[str, Compared]:
    if not pairs.any():
        return {}
    none = np.zeros(len(found.weights))
    reason = undetermined(found, pairs)
    if reason:
        shares: Compared = (0.0, none, 0.0, none, reason)
    else:
        carried = mean_carried(found, passing(found, pairs))
        shares = _both(found, one, lambda q: 1 - carried(q))
    compared = {"in_place": shares}
    for name in ("clarity", "persistence"):
        compared[name] = _both(found, one, plain_mean(name, pairs))
    layers = np.unique(found.pairs[0][pairs])
    compared["commission"] = _both(found, one, lambda q: np.asarray(q.commission[..., layers].mean(-1)))
    if one.news is not None:
        before, after = (
            news_of(found, pairs),
            news_of(replace(found, news_sums=one.news[0], weights=one.news[1]), pairs),
        )
        if before.draws is not None and after.draws is not None:
            assert before.estimate.value is not None
            assert after.estimate.value is not None
            compared["news"] = before.estimate.value, before.draws, after.estimate.value, after.draws, ""
    return compared


def _both(found: Decomposition, one: Variant, of: Callable[[Quantities], Array]) -> Compared:
    return float(of(found.point)), of(found.draws), float(of(one.point)), of(one.draws), ""
