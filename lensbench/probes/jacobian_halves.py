"""Would other text give another Jacobian lens? J refitted on halves of the prompts, by source and by window."""

import torch
from torch import Tensor

from lensbench.probes.catalogue import ANYWHERE, SAME_TOKENIZER, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.halves import Parts, jacobians_of, squared
from lensbench.runtime.memory import in_pieces
from lensbench.streams.kl import sum_by_window
from lensbench.streams.partition import rows_at_once
from lensbench.streams.readout import ReadOut

NAME = "jacobian_halves"

ROWS = 256
"""Rows of logits in memory at once on a processor"""


def jacobian_halves(subject: Subject) -> Measured:
    """How far Jacobian lenses of two halves of the fitting prompts are from each other, at every layer.

    J is estimated in four quarters, with a quarter of ``fit.jacobian.prompts`` each: two halves of the sources, each cut in
    two at random. Quarters joined one way give halves that share no source; joined the other way, halves of the same
    sources. If the texts of a source repeat a template, the first are farther apart than the second.

    Squared distances are in the read-out's Fisher metric, of held-out states less their fitting mean, by the product of what
    two different quarters make of them, which noise does not lengthen; the KL is that of two lenses' distributions, both
    ways round.
    """
    parts = Parts.of(subject)
    if isinstance(parts, str):
        return Measured(NAME, reason=parts)
    halves, scored, quarters = parts.halves, subject.eval, {}
    for source, window in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = ((halves.source == source) & (halves.window == window)).nonzero()[0]
        name = f"{NAME}-quarter{2 * source + window}"
        quarters[source, window] = jacobians_of(subject, rows, "later", parts.prompts // 4, name)
    sums = Sums(NAME, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    for layer in range(subject.stream.layers):
        own = {key: matrix[layer] for key, matrix in quarters.items()}
        add_layer(sums, subject, layer, own, parts.factor)
    return sums.measured()


def add_layer(sums: Sums, subject: Subject, layer: int, own: dict[tuple[int, int], Tensor], factor: Tensor) -> None:
    """Add the quantities of one layer from J of its quarters ``[d, d]``."""
    scored = subject.eval
    mean = subject.fit.states[layer].mean(0, dtype=torch.float64).cpu()
    x = scored.states[layer].double().cpu() - mean
    each = [x @ (factor @ quarter).T for quarter in own.values()]
    # Products of different quarters alone: a square would have each quarter's noise in it.
    pairs = len(each) * (len(each) - 1)
    length = sum_by_window((squared(torch.stack(each).sum(0)) - sum(squared(one) for one in each)) / pairs, scored)

    def apart(one: Tensor, other: Tensor) -> Tensor:
        return squared(x @ (factor @ (one - other)).T)

    by_source = [(own[k, 0] + own[k, 1]) / 2 for k in (0, 1)]
    by_window = [(own[0, k] + own[1, k]) / 2 for k in (0, 1)]
    of_sources, of_windows = apart(*by_source), apart(*by_window)
    for name, values in (
        ("sources", of_sources), ("windows", of_windows), ("sources_minus_windows", of_sources - of_windows),
    ):  # fmt: skip
        sums.add(f"jacobian_halves_{name}", sum_by_window(values, scored), length, layer=layer)
    kl = kl_between(subject.stream.readout, scored.states[layer], *by_source)
    sums.add("jacobian_halves_kl", sum_by_window(kl, scored), layer=layer)


@torch.no_grad()
def kl_between(readout: ReadOut, h: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Mean of the two KLs between what two linear lenses ``[d, d]`` read of states ``[N, d]``: ``[N]``, nats."""

    def of(rows: slice) -> Tensor:
        p, q = (readout(h[rows] @ j.to(h).T).log_softmax(-1) for j in (one, other))
        both: Tensor = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
        return both

    if not len(h):
        return h.new_zeros(0)
    size = rows_at_once(h, len(readout.weight), ROWS)
    return torch.cat(list(in_pieces(slice(0, len(h)), size, of, what="a token of a read-out")))


def _distance(name: str, label: str, which: str, reading: str) -> Quantity:
    formula = f"E |(J_1 - J_2) x|^2 / E <J_a x, J_b x> in the read-out's Fisher metric; 1, 2: {which}; a, b: quarters"
    return Quantity(f"jacobian_halves_{name}", label, formula, "layer", reading, ANYWHERE)


JACOBIAN_HALVES = Probe(
    NAME,
    jacobian_halves,
    "per layer, how far Jacobian lenses refitted on two halves of the prompts are apart, by source and by window",
    (
        _distance(
            "sources", "J of two halves of the sources", "halves of the sources",
            "What other text would change; each half has half the prompts.",
        ),
        _distance(
            "windows", "J of two halves of the windows", "halves of the windows of the same sources",
            "What other windows of the same sources would change.",
        ),
        Quantity(
            "jacobian_halves_sources_minus_windows",
            "by source minus by window",
            "`jacobian_halves_sources` minus `jacobian_halves_windows`, same tokens",
            "layer",
            "Above 0, J holds something of its sources: templates that their texts repeat.",
            ANYWHERE,
        ),
        Quantity(
            "jacobian_halves_kl",
            "KL between J of two halves",
            "mean of the two KLs between what the lenses of two halves of the sources read (nats/token)",
            "layer",
            "What the choice of text is worth in nats.",
            SAME_TOKENIZER,
        ),
    ),
    control="halves of the windows of the same sources",
    version=2,
)  # fmt: skip
