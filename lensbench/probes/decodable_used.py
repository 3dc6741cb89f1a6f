"""What a layer holds of the final state, and what moving it does: ridge maps against local Jacobians."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lensbench.measures.update.folds import pseudo_inverse
from lensbench.probes.catalogue import ANYWHERE, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.halves import Parts, jacobians_of, squared
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window

NAME = "decodable_used"


@dataclass(frozen=True)
class HalfMaps:
    """Maps of one half of the fitting text, float64."""

    regression: Tensor
    """``[L, d, d]``: of h_L on h_l, ridge 0"""
    jacobian: Tensor
    """``[L, d, d]``: mean Jacobian of h_L with respect to h_l, of the current position alone"""


def decodable_used(subject: Subject) -> Measured:
    """Squared distance of the local Jacobian J from the regression A of h_L on h_l, in the read-out's Fisher metric.

    A reads what can be decoded of the final state; J says what a change of the state does to it at the same position. For
    Gaussian states that are independent between positions they are equal (Stein's lemma). Elsewhere their difference mixes
    non-linearity with correlation between positions, and J leaves out positions that A sees (``fit.jacobian``).

    A (ridge 0) and J are those of two halves of the fitting sources, and every product is of one half with the other:
    ``<(A_1 - J_1) x, (A_2 - J_2) x>``, x the states of held-out tokens less their fitting mean. So estimation noise, which
    would add to a square, has mean zero. Intervals are over held-out documents, the maps held fixed.
    """
    parts = Parts.of(subject)
    if isinstance(parts, str):
        return Measured(NAME, reason=parts)
    scored, fit = subject.eval, subject.fit
    source, maps = parts.halves.source, []
    for half in (0, 1):
        rows = (source == half).nonzero()[0]
        jacobian = jacobians_of(subject, rows, "current", parts.prompts // 2, f"{NAME}-half{half}")
        maps.append(HalfMaps(regressions(fit, torch.from_numpy(source[fit.window] == half)), jacobian))
    sums = Sums(NAME, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    for layer in range(subject.stream.layers):
        add_layer(sums, subject, layer, maps, parts.factor)
    return sums.measured()


def regressions(fit: Capture, rows: Tensor) -> Tensor:
    """Least squares of h_L on every layer's state over some tokens (mask ``[N]``): ``[L, d, d]``, float64 on the CPU."""
    last = fit.states[-1][rows].double().cpu()
    last = last - last.mean(0)
    found = []
    for states in fit.states[:-1]:
        x = states[rows].double().cpu()
        x = x - x.mean(0)
        found.append(last.T @ x @ pseudo_inverse(x.T @ x))
    return torch.stack(found)


def add_layer(sums: Sums, subject: Subject, layer: int, maps: list[HalfMaps], factor: Tensor) -> None:
    """Add the quantities of one layer."""
    scored, fit = subject.eval, subject.fit
    mean = fit.states[layer].mean(0, dtype=torch.float64).cpu()
    x = scored.states[layer].double().cpu() - mean

    def seen(matrix: Tensor) -> Tensor:
        return x @ (factor @ matrix.double().cpu()).T

    (a1, j1), (a2, j2) = ((seen(one.regression[layer]), seen(one.jacobian[layer])) for one in maps)
    ridged = seen(subject.own.matrix[layer])

    def total(values: Tensor) -> Array:
        return sum_by_window(values, scored)

    held = total(squared(a1, a2))
    sums.add("decodable_used_distance", total(squared(a1 - j1, a2 - j2)), held, layer=layer)
    sums.add("decodable_used_slope", total((squared(a1, j2) + squared(a2, j1)) / 2), held, layer=layer)
    sums.add("decodable_used_size", total(squared(j1, j2)), held, layer=layer)
    of_ridged = total(squared(ridged))
    sums.add("decodable_used_distance_ridged", total(squared(ridged - j1, ridged - j2)), of_ridged, layer=layer)
    sums.add("decodable_used_noise", total(squared(j1 - j2)) / 4, held, layer=layer)


def _of_layer(name: str, label: str, formula: str, reading: str, panel: Panel | None = None) -> Quantity:
    return Quantity(name, label, formula, "layer", reading, ANYWHERE, panel=panel)


DECODABLE_USED = Probe(
    NAME,
    decodable_used,
    "per layer, how far what can be decoded of the final state is from what moving the state does to it",
    (
        _of_layer(
            "decodable_used_distance",
            "decodable less used",
            "E <(A_1 - J_1) x, (A_2 - J_2) x> / E <A_1 x, A_2 x> in the read-out's Fisher metric; A: ridge 0, J: of the "
            "current position, 1 and 2: halves of the fitting sources",
            "0: what is held is what is used, as for Gaussian states that are independent between positions; elsewhere it "
            "mixes non-linearity with correlation between positions.",
            Panel("layer", "squared distance of J and A"),
        ),
        _of_layer(
            "decodable_used_slope",
            "share of the decodable that is used",
            "E <A_1 x, J_2 x> / E <A_1 x, A_2 x>, mean of both orders of the halves",
            "1: a step along what is decoded moves the end by as much; below, more can be read than is used from here on.",
        ),
        _of_layer(
            "decodable_used_size",
            "size of the used",
            "E <J_1 x, J_2 x> / E <A_1 x, A_2 x>",
            "The distance is 1 - 2 slope + size.",
        ),
        _of_layer(
            "decodable_used_distance_ridged",
            "decodable less used, chosen ridge",
            "E <(A - J_1) x, (A - J_2) x> / E |A x|^2, A the per-layer lens with the ridge that dev chose",
            "The same next to the lens that is reported; a ridge keeps A below what can be decoded.",
        ),
        _of_layer(
            "decodable_used_noise",
            "noise of the local Jacobian",
            "E |J_1 x - J_2 x|^2 / 4 by E <A_1 x, A_2 x>",
            "How much error of estimation would add to the distance, were J of both halves compared with itself.",
        ),
    ),
    control="products of two halves of the sources alone: noise of the estimates has mean zero",
    topic="what a layer holds and what it does",
)
