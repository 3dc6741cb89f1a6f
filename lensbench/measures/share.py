"""The shares of exact log-partitions, by layer, that leave intervals nearly as they are, found on the dev split."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from lensbench.lenses.estimated import FEWEST_DRAWN, Estimator
from lensbench.lenses.fit import Fit
from lensbench.lenses.lens import LensId
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.pairs import PAIR_LENS, pairs_of
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.read import Reference, maps_by_layer
from lensbench.lenses.shared import SHARED_LENS, SHARED_LOO_LENS
from lensbench.measures.formulas import pair_penalty
from lensbench.measures.indices import INDICES, values_of
from lensbench.measures.means import Means
from lensbench.statistics import Array

WIDER = 1.1
"""How many times wider an interval may become"""

LARGEST_SHARE = 0.5
"""Above this share too little is saved, and everything is exact"""

PILOT_TOKENS = 512
"""Dev tokens that the share is found on: equally many of every dev sequence, and one at least"""

NEGLIGIBLE = 1e-9
"""An interval whose variance is below this share of the square of K_0 is that of a constant"""

GROWTH = 1.02
"""Times that a layer's share grows at once"""

OF_PAIRS = ("pair_penalty_of_pairs", "rotated_pair_penalty_of_pairs")
"""Intervals of single pairs of chosen layers"""

STEP = 1e-4
"""Of the numerical derivative of an index by the values of a token"""


@dataclass(frozen=True)
class Share:
    """Shares of exact log-partitions, and what they rest on."""

    share: float
    """The mean over layers; 1 where too little would be saved"""
    of_layers: tuple[float, ...]
    """The share of every layer 0..L"""
    widest: str
    """The interval that asks for the largest"""
    ratio: float
    """Variance that estimating with one exact value in two adds to that interval's, over its own"""
    tokens: int
    documents: int
    intervals: int

    def described(self) -> dict[str, Any]:
        """By name, for the manifest."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return found | {"of_layers": list(self.of_layers)}


def find_share(estimator: Estimator, fit: Fit, scored: int) -> Share:
    """The shares for ``scored`` tokens, from an estimator that draws all tokens of the dev split.

    It looks at the intervals of losses, penalties, pair penalties and indices, for the layers that the fit chose for what
    takes long; not at top-1 agreement, where one token in hundreds may be all that an interval is made of. Each is
    linearised: the variance of the exact value over documents is that of its influence, summed by document; the variance
    that the estimate adds is that of the influence of the difference between exact and cheap values, over tokens.

    A layer between two chosen ones gets the larger of their shares. There intervals of pairs do not count: only
    chosen layers are in pairs.
    """
    captured = estimator.captured
    exact, difference = token_values(estimator, fit)
    documents = captured.ranks.joined(captured.document)
    known = len(np.unique(documents))
    ratios = added_ratios(exact, difference, documents) if known > 1 else {}
    every = captured.layers + 1
    if not any(ratio.size for ratio in ratios.values()):  # nothing is known of any interval
        return Share(1.0, (1.0,) * every, "", 0.0, len(documents), known, 0)
    largest = {name: float(ratio.sum((0, 1)).max()) for name, ratio in ratios.items() if ratio.size}
    widest = max(largest, key=largest.__getitem__)
    chosen = [*fit.summary.layers, captured.layers]
    at_chosen = shares_of_layers(list(ratios.values()), scored)
    without_pairs = shares_of_layers([ratio for name, ratio in ratios.items() if name not in OF_PAIRS], scored)
    of_layers = spread(at_chosen, without_pairs, chosen)
    if np.mean(of_layers) > LARGEST_SHARE or (at_chosen == 1).all():
        of_layers = (1.0,) * every
    mean = round(float(np.mean(of_layers)), 4)
    intervals = sum(ratio.shape[-1] for ratio in ratios.values())
    return Share(mean, of_layers, widest, round(largest[widest], 6), len(documents), known, intervals)


def added_ratios(exact: Means, difference: Means, documents: Array) -> dict[str, Array]:
    """What estimating adds to the variance of every interval, over its own, by name, ``[layers, layers, intervals]``.

    At [j, k] it is the covariance of what the values at layers j and k add when one token in two is exact. Intervals that
    are those of constants are left out.
    """
    index = np.unique(documents, return_inverse=True)[1]
    known, count = int(index.max()) + 1, len(documents)
    whole = influences(exact, exact)
    of_layer = [influences(exact, at_layer(difference, k)) for k in range(exact.transfer.shape[-1])]
    constant, found = float(exact.constant.mean()), {}
    for name, of_tokens in whole.items():
        by_document = np.zeros((known, *of_tokens.shape[1:]))
        np.add.at(by_document, index, of_tokens)
        own = np.square(by_document).sum(0) * known / (known - 1) / count**2
        extra = np.stack([x[name] - x[name].mean(0) for x in of_layer])
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.einsum("jnc,knc->jkc", extra, extra) / count**2 / own
        finite = np.isfinite(ratio).all((0, 1)) & (own > NEGLIGIBLE * constant**2)
        found[name] = ratio[:, :, finite]
    return found


def at_layer(values: Means, layer: int) -> Means:
    """Values of tokens that are read at one layer, their last axis; zero elsewhere, and for what reads no layer."""

    def only(x: Array) -> Array:
        return x * (np.arange(x.shape[-1]) == layer) if x.ndim > 1 else 0 * x

    return Means(**{name: only(x) for name, x in values.items()})


def shares_of_layers(ratios: Sequence[Array], tokens: int) -> Array:
    """The shares of so many tokens that widen no interval more than :data:`WIDER` times, ``[layers]``.

    ``ratios``: of :func:`added_ratios`. Of n out of N tokens drawn without replacement, a share s, the variance that an
    estimate adds is ``(1 - s) / s`` times that at one half. Samples of the layers lie in each other, so what two of them add
    together is that of the larger one. Shares grow from the smallest, that one first which mends most of what is too wide.
    """
    every = np.concatenate(ratios, -1)
    size = len(every)

    def excess(shares: Array) -> float:
        added = np.einsum("jkc,jk->c", every, 1 / np.maximum.outer(shares, shares) - 1)
        return float(np.maximum(0, added - (WIDER**2 - 1)).sum())

    shares = np.full(size, min(1.0, FEWEST_DRAWN / tokens))
    while (now := excess(shares)) > 0 and shares.mean() <= LARGEST_SHARE:
        larger = np.minimum(1.0, GROWTH * shares)
        gain = [
            (now - excess(np.where(np.arange(size) == k, larger, shares))) / (larger[k] - shares[k])
            if larger[k] > shares[k]
            else -np.inf
            for k in range(size)
        ]
        # Where no single one mends anything, samples that differ are what widens it: the smallest grows.
        k = int(np.argmax(gain)) if max(gain) > 0 else int(np.argmin(shares))
        shares[k] = larger[k]
    if shares.mean() > LARGEST_SHARE:
        return np.ones(size)
    found: Array = np.minimum(1.0, np.ceil(1000 * shares) / 1000)
    return found


def spread(at: Array, between: Array, layers: Sequence[int]) -> tuple[float, ...]:
    """Shares of all layers: ``at`` some of them, rising to the last, and the larger of the two nearest ``between`` them."""
    found = []
    for layer in range(layers[-1] + 1):
        after = int(np.searchsorted(layers, layer))
        found.append(float(at[after] if layers[after] == layer else max(between[max(0, after - 1)], between[after])))
    return tuple(found)


def intervals_of(m: Means) -> dict[str, Array]:
    """What tables give an interval for, by name, ``[..., cells]``: functions of means with free leading axes.

    Rank correlations are left out: they have no derivative, and are made of penalties, which are there.
    """
    smooth = {name: value for name, value in values_of(m).items() if INDICES[name].unit != "rank correlation"}
    found = {name: value.value[..., None] for name, value in smooth.items()}
    for name, matrix in (("penalty_kl", m.transfer), ("penalty_ce", m.transfer_ce)):
        found[name] = _flat(matrix - np.diagonal(matrix, axis1=-2, axis2=-1)[..., None, :])
    found["kl"] = np.concatenate([m.own, m.shared, m.shared_loo, m.rotated[..., 0, :], m.transfer[..., -1, :]], -1)
    of_pairs = pair_penalty(m.own, m.pair), pair_penalty(m.own[..., None, :], m.pair_rotated).mean(-2)
    found |= zip(OF_PAIRS, of_pairs, strict=True)
    return found


def influences(exact: Means, deviation: Means) -> dict[str, Array]:
    """How much each token's deviation moves every interval's value, per token, ``[N, cells]``; of mean zero."""
    point = Means(**{name: x.mean(0) for name, x in exact.items()})
    moved = Means(**{name: getattr(point, name) + STEP * (x - x.mean(0)) for name, x in deviation.items()})
    with np.errstate(invalid="ignore", divide="ignore"):
        here, there = intervals_of(point), intervals_of(moved)
    return {name: (there[name] - here[name]) / STEP for name in here}


def _flat(matrix: Array) -> Array:
    return matrix.reshape(*matrix.shape[:-2], -1)


def token_values(estimator: Estimator, fit: Fit) -> tuple[Means, Means]:
    """Exact values of every token, and exact less cheap ones, for the fit's chosen layers and the last.

    The estimator must draw all tokens. Of rotated views the first is looked at: an estimate adds no more to the variance of
    their mean.
    """
    captured, summary = estimator.captured, fit.summary
    chosen, last = summary.layers, captured.layers
    whole, size = [*chosen, last], len(chosen)

    def joined(values: Tensor) -> Array:
        found: Array = captured.ranks.joined(values.double().cpu().numpy(), axis=-1)
        return found

    lenses = AffineMaps.stack([fit.headline.maps[chosen], AffineMaps.identity(captured.states.shape[-1])])
    maps = lenses.to(captured.states)
    references = estimator.references(whole, maps)
    columns = [_two(estimator, layer, maps, references, joined) for layer in whole]
    matrix = {name: np.stack([c[name] for c in columns], -1) for name in columns[0]}  # [2, lenses, N, layers]

    def own(lens: LensId) -> Array:
        """KL at the chosen layers, ``[2, N, layers]``."""
        found = [
            _two(estimator, layer, one, None, joined)["kl"][:, 0]
            for layer, one in maps_by_layer(fit[lens], fit.views)
            if layer in chosen
        ]
        return np.stack(found, -1)

    def pairs(lens: LensId) -> Array:
        """``[2, N, layers, layers]``: at [i, j] the lens of both as it reads j."""
        both, fitted = np.full((2, matrix["kl"].shape[2], size, size), np.nan), fit[lens]
        for number, (i, j) in enumerate(itertools.combinations(range(size), 2)):
            plain = fitted.to_plain(number, fit.views)
            for k, (at, other) in enumerate(((i, j), (j, i))):
                one = plain[[k if len(plain) > 1 else 0]]
                both[:, :, other, at] = _two(estimator, chosen[at], one, None, joined)["kl"][:, 0]
        return both

    has_pairs = PAIR_LENS in fit.lenses
    assert not has_pairs or pairs_of(chosen) == [tuple(reads) for reads in fit[PAIR_LENS].reads]
    constant = joined(captured.constant_kl)
    unknown = np.full((2, len(constant), size), np.nan)
    no_pairs = np.full((2, len(constant), size, size), np.nan)
    of_lenses = {
        "constant": np.stack([constant, np.zeros_like(constant)]),
        "transfer": matrix["kl"].swapaxes(1, 2),
        "transfer_ce": matrix["ce"].swapaxes(1, 2),
        "movement": matrix["movement"].swapaxes(1, 2),
        "own": own(OWN),
        "shared": own(SHARED_LENS),
        "shared_loo": own(SHARED_LOO_LENS),
        "rotated": own(SHARED_LENS.of_view(0))[:, :, None],
        "own_refined": unknown,
        "shared_refined": unknown,
        "pair": pairs(PAIR_LENS) if has_pairs else no_pairs,
        "pair_rotated": (pairs(PAIR_LENS.of_view(0)) if summary.pair_rotations else no_pairs)[:, :, None],
    }
    exact, difference = (Means(**{name: x[k] for name, x in of_lenses.items()}) for k in range(2))
    return exact, difference


def _two(
    estimator: Estimator,
    layer: int,
    maps: AffineMaps,
    references: tuple[Reference, Reference] | None,
    joined: Any,
) -> dict[str, Array]:
    """Exact values, and exact less cheap ones, of M lenses on a layer: ``[2, M, N]`` by name."""
    cheap, exact = estimator.both(layer, maps, references)
    found = {}
    for name in ("kl", "ce", "movement"):
        if (of := getattr(exact, name)) is not None:
            found[name] = np.stack([joined(of), joined(of.double() - getattr(cheap, name).double())])
    return found
