"""The quantities of the update decomposition as formulas of inner products, for point estimates and draws alike."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lensbench.measures.update.products import Pairs, Products
from lensbench.statistics import Array


@dataclass(frozen=True)
class Chance:
    """Spreads under random bases, analytic: ``E tr(QX)^2 = |X|^2 / r`` for a Haar rotation Q of a space of rank r.

    It is a variance over random bases, not a sampling error.
    """

    persistence: Array
    """``[P]``: standard deviation of S if h_j were in a random basis"""
    carried: Array
    """``[P]``: standard deviation of c if the update were in random directions"""


@dataclass(frozen=True)
class Quantities:
    """Quantities of pairs of layers i < j, each ``[..., P]``; NaN where a ratio has no denominator.

    ``commission`` ``[..., n]`` is of layers.
    """

    persistence: Array
    """S: how much of the signal in reading i is still there at j; holds the growth of the stream"""
    carried: Array
    """c: the share of what was added that went elsewhere; ``1 - c`` shows in the reading of lens i"""
    room: Array
    """1 - B: the share of lens i's error loading that lens j no longer has"""
    clarity: Array
    """Share of reading i at layer j, as an amplitude, that readings of the two layers explain beyond chance"""
    drowned: Array
    """1 - R where S >= 1, else NaN: what is neither kept nor, for sure, in another basis"""
    kept_low: Array
    kept_high: Array
    commission: Array
    """Share of a lens's error that is loading on what is no signal"""
    remainder: Array
    """``E|T-r|^2 - E|e|^2 - E|T-f|^2`` over ``E|T-r|^2``: zero for the population's signal"""


def quantities(products: Products, pairs: Pairs, chance: Chance) -> Quantities:
    """All quantities of (sums or means of) products; ``pairs`` gives the positions (i, j) of each pair, ``[P]`` each."""
    i, _ = pairs
    pair, layer = products.pair, products.layer
    rr, rf = layer["rr"], layer["rf"]
    of_r, of_f = rr[..., i], rf[..., i]
    with np.errstate(divide="ignore", invalid="ignore"):
        own, new, old = of_r / of_f, loading_at("v", pair, of_r, of_f), loading_at("u", pair, of_r, of_f)
        persistence = 1 + pair["uf"] / of_f
        square = of_r + 2 * pair["ur"] + pair["uu"]  # s with s
        baseline = 2 * chance.persistence**2 * of_f / square
        # Of r_i and r_j together, as of r_i and v = r_j - r_i.
        explained = _explained(of_r + pair["ur"], pair["vr"] + pair["uv"], of_r, pair["vr"], pair["vv"]) / square
        # A reading that is no longer than chance makes it says nothing.
        told = (square > 0) & (baseline < 1)
        beyond = (np.clip(explained, 0, 1) - baseline) / np.where(told, 1 - baseline, 1)
        clarity = np.where(told, np.sqrt(np.maximum(0, beyond)), 0.0)
        kept = persistence > 2 * chance.persistence
        error = rr - 2 * rf + layer["ff"]
        target = products.target[..., None]
        missed = target - 2 * layer["rT"] + rr
        unread = target - 2 * layer["fT"] + layer["ff"]
        return Quantities(
            persistence=persistence,
            carried=(old - new) / (own - new),
            room=1 - (new - 1) / (own - 1),
            clarity=clarity,
            drowned=np.where(persistence >= 1, 1 - clarity, np.nan),
            kept_low=np.where(kept, clarity, 0.0),
            kept_high=np.where(kept, np.minimum(1, persistence), 0.0),
            commission=error / missed,
            remainder=(missed - error - unread) / missed,
        )


def loading_at(gain: str, pair: Mapping[str, Array], rr: Array, rf: Array) -> Array:
    """The error loading a of ``s_ij = r_i + u`` (gain ``u``) or of ``r_j = r_i + v`` (``v``), from the products of pairs."""
    loading: Array = (rr + pair[f"{gain}r"]) / (rf + pair[f"{gain}f"])
    return loading


def _explained(first: Array, second: Array, a: Array, ab: Array, b: Array) -> Array:
    """``v^T M^-1 v``: what two readings with squares a, b and product ab explain, from their products with a third."""
    return (first**2 * b - 2 * first * second * ab + second**2 * a) / (a * b - ab**2)
