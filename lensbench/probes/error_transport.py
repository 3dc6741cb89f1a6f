"""Do attention heads carry prediction errors forward, or tokens?

A head that copies writes what a token says, whatever was predicted. A head that suppresses copies (arXiv 2310.04625)
takes away what is predicted already. A predictive-coding head carries the difference of the two.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from lensbench.data.windows import Windows
from lensbench.probes.catalogue import SAME_TOKENIZER, WITH_ITS_NULL, Probe, Quantity
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import FOLDS, Estimates, FoldSums, Jackknifed, in_folds, joined_clusters
from lensbench.probes.tools.heads import EAGER, check_heads, sets_attention
from lensbench.probes.tools.predictions import RANK, Constant, Directions, PredictionBatch, after, batches
from lensbench.probes.tools.transport import Scores, score_layer
from lensbench.statistics import Array, effective_clusters, few_clusters, jackknife

FIRST = 2
"""First position that is used"""


MEMORY_GIB = 4.0
"""Most memory for what is kept of all heads, and half of it for the sums of one layer"""


SHARE = 0.95
"""Least share of the unembedding's variance that the directions hold"""


ROWS_PER_DIRECTION = 12
"""Least number of kept positions for each direction: regressions have three maps of all directions"""


LEVEL = 0.05
"""Level of the test over all heads"""


STEEPEST = np.deg2rad(85)
"""Beyond this angle, beta / alpha above 11, the token hardly counts and the ratio says nothing"""


def error_transport(subject: Subject) -> Jackknifed:
    """For every head: does what it mixes follow ``sum_s a_{n,s} (alpha e_{x_s} - beta ebar_{s-1})`` with beta above 0?

    The model of a head is ``out_n ~ M sum_s a_{n,s} (alpha e_{x_s} - beta ebar_{s-1})``. M is any map to what the
    head mixes, so its rank is at most the head's size. Squared error is judged through the head's output map, the layer's
    lens and the gain of the read-out. The sum runs over s >= 1, the tokens that revealed an error. Nuisances are refitted
    for every rival: the head's weight on position 0, its weight on all others, and a free map of
    ``sum_s a_{n,s} e_{x_{s-1}}``, since what the *previous* token says is no prediction.

    One null permutes expectations over the positions of their window. It is weak: whatever else a head reads of its context
    is correlated with expectations, also in an untrained model, and some of that goes to beta. An error differs from such a
    correlation in that expectations are used *as tokens are*, with the sign turned. So tokens and expectations also get free
    maps, M and N, each fitted on one half of the folds and multiplied with those of the other half. ``error_alignment`` is
    the cosine of N and -M, over what tokens leave of expectations. ``error_score`` is the share of the variance that
    expectations explain in M's shape, signs turned, beyond what coins in place of the signs along each principal direction
    give; it is below 0 where they have the tokens' own sign. ``error_transport_p`` is the larger of two one-sided p: of as
    large a sum under such coins, and of a cosine above 0 (jackknife), corrected over all heads (Holm).

    All is seen in the principal directions of the unembedding that hold :data:`SHARE` of its variance over the text, and at
    least in :data:`RANK`. Heads are kept at evenly spread positions, as many as memory allows, since neighbours mix nearly
    the same; the sums are made layer by layer. Where too few positions are left for so many directions (a model of which
    nearly all directions count, on a short text), fewer are used, and the reason of ``error_directions_share`` says so.

    Intervals are those of a jackknife over folds of documents; those of the gains fit all maps again without each fold, with
    beta / alpha kept.

    ``layer`` is the block, ``other`` the head. Attention weights are read with ``attn_implementation="eager"``, which is set
    back; the probe reports that. A predictive-coding model is read at its known places: expectations are those of its
    layer's own prediction.
    """
    name = "error_transport"
    stream = subject.stream
    if subject.rotated:
        return Jackknifed(name, reason="a rotated view has no heads of its own")
    reason = check_heads(stream)
    if reason:
        return Jackknifed(name, reason=reason)
    if sets_attention(stream):
        subject.say(EAGER)
    windows, fold = in_folds(subject.windows)
    if fold.max() < 3:
        return Jackknifed(name, reason="its windows come from fewer than four documents: nothing to cross-fit on")
    plan = planned(subject, windows)
    kept, warning = gather(subject, windows, fold, plan)
    clusters = effective_clusters(joined_clusters(windows))
    found = Estimates(
        name,
        kept.folds,
        warning or few_clusters(clusters),
        groups=effective_clusters(fold),
        clusters=clusters,
    )
    return estimate(found, kept, subject, plan, nothing=bool(warning))


@dataclass(frozen=True)
class Plan:
    """In which directions heads are seen, and at every how many positions they are kept."""

    directions: Directions
    stride: int
    reason: str = ""
    """Why the directions hold less than :data:`SHARE`"""


def planned(subject: Subject, windows: Windows) -> Plan:
    """The directions and positions that memory allows, see :func:`error_transport`."""
    (batch,) = batches(subject.stream, windows.spread(1), Directions.none(subject.stream), heads=True)
    heads = sum(h.weights.shape[1] for h in batch.heads)
    size = max(h.mixed.shape[-1] for h in batch.heads)
    most = int(MEMORY_GIB * 2**30)
    positions = int((windows.lengths - FIRST).clip(min=0).sum())
    stride = -(-positions * heads * (windows.ids.shape[1] + size) * 4 // most)
    directions = Directions.holding(subject.stream, subject.words.fit_windows, SHARE)
    largest = max(h.weights.shape[1] for h in batch.heads)
    columns = int((most / 2 / (8 * FOLDS * largest)) ** 0.5)
    rank = min((columns - 3 - size) // 4, max(RANK, positions // stride // ROWS_PER_DIRECTION))
    if rank >= directions.rank:
        return Plan(directions, stride)
    wanted, directions = directions.rank, Directions.of(subject.stream, subject.words.fit_windows, rank)
    reason = f"{wanted} directions would hold {SHARE:.0%}; memory and the kept positions allow {rank}"
    return Plan(directions, stride, reason)


@dataclass
class Kept:
    """What is kept of the heads of one layer, batch by batch, of B windows and n positions each."""

    written: Tensor  # [H, dh, d]
    weights: list[Tensor]  # [B, H, n, T]
    mixed: list[Tensor]  # [B, H, n, dh]
    expected: list[Tensor | None]  # [B, T, r]: of its layer's own prediction


@dataclass
class Batch:
    """What all heads of a batch may have carried, the kept positions that are tokens ``[B, n]``, and the folds ``[B]``."""

    carried: "Carried"
    looked: Tensor
    fold: NDArray[np.int64]


@dataclass
class Gathered:
    """Layer -> what is kept of its heads; and of each batch what they may have carried."""

    layers: dict[int, Kept]
    batches: list[Batch]
    folds: int

    def sums(self, layer: int) -> Tensor:
        """Raw sums ``[K, H, F, F]`` of a layer, of the columns that :mod:`lensbench.probes.tools.transport` describes."""
        kept, sums = self.layers[layer], FoldSums(self.folds)
        for of, weights, mixed, own in zip(self.batches, kept.weights, kept.mixed, kept.expected, strict=True):
            columns = head_columns(weights, mixed, of.carried, own)  # [H, B, n, F]
            for k in np.unique(of.fold):
                sums.add(int(k), columns[:, of.looked & torch.from_numpy(of.fold == k)[:, None]])
        return sums.sums


def gather(subject: Subject, windows: Windows, fold: NDArray[np.int64], plan: Plan) -> tuple[Gathered, str]:
    """What is kept of all heads, from one pass over the windows; and a warning where there is hardly a prediction."""
    generator = torch.Generator().manual_seed(0)
    found, constant = Gathered({}, [], int(fold.max()) + 1), Constant()
    positions = slice(FIRST, None, plan.stride)
    with subject.task("error_transport", windows) as task:
        for batch in batches(subject.stream, windows, plan.directions, heads=True, task=task):
            constant.add(batch)
            carried = carried_vectors(batch, plan.directions, generator)
            found.batches.append(Batch(carried, batch.inside[:, positions].cpu(), fold[batch.rows]))
            for heads in batch.heads:
                own = None if heads.expected is None else after(plan.directions.seen(heads.expected)).cpu()
                of = found.layers.setdefault(heads.layer, Kept(subject.stream.seen(heads.written), [], [], []))
                of.weights.append(heads.weights[:, :, positions].cpu().clone())
                of.mixed.append(heads.mixed[:, :, positions].cpu().clone())
                of.expected.append(own)
    return found, constant.warning()


@dataclass(frozen=True)
class Carried:
    """What a head may carry from each position s: ``[B, T, r]`` each, zero at position 0, where nothing was predicted."""

    token: Tensor
    previous: Tensor
    expected: Tensor
    order: Tensor  # [B, T]: the position whose expectation the null takes


def carried_vectors(batch: PredictionBatch, directions: Directions, generator: torch.Generator) -> Carried:
    """What heads may carry from the positions of a batch; the null permutes expectations within each window."""
    token = directions.rows[batch.ids]
    token[:, 0] = 0
    order = torch.arange(batch.ids.shape[1]).repeat(len(batch.ids), 1)
    for row, count in enumerate(batch.inside.sum(1).tolist()):
        order[row, 1:count] = 1 + torch.randperm(count - 1, generator=generator)
    previous = after(directions.rows[batch.ids])
    return Carried(token.cpu(), previous.cpu(), after(batch.expected).cpu(), order)


def head_columns(weights: Tensor, mixed: Tensor, carried: Carried, own: Tensor | None) -> Tensor:
    """The columns of every head at n positions ``[H, B, n, F]``, from its weights and what it mixed there.

    ``own`` ``[B, T, r]`` takes the place of the model's expectations.
    """
    expected = carried.expected if own is None else own
    order = carried.order[..., None].expand_as(expected)
    values = torch.cat([carried.previous, carried.token, expected, expected.gather(1, order)], -1)
    weights = weights.transpose(0, 1)  # [H, B, n, T]
    first = weights[..., 0]
    others = weights[..., 1:].sum(-1)
    attention = torch.stack([torch.ones_like(first), first, others], -1)
    return torch.cat([attention, weights @ values, mixed.transpose(0, 1)], -1)


@dataclass(frozen=True)
class HeadTests:
    """What decides, head by head, whether it is found."""

    layer: int
    head: int
    p: float
    """Of its alignment, one-sided and not yet corrected"""
    score: float
    ahead: bool
    """beta / alpha has an interval above 0, and a free beta explains more than that of the null"""
    beyond_null: bool
    """The gain beyond the null has an interval above 0"""


def estimate(found: Estimates, gathered: Gathered, subject: Subject, plan: Plan, *, nothing: bool) -> Jackknifed:
    """``found`` with all quantities, from what is kept of all heads; where ``nothing`` is predicted, no head is found."""
    readout, d = subject.stream.readout, subject.stream.d_model
    gain = readout.gain(d)
    tests: list[HeadTests] = []
    for layer in sorted(gathered.layers):
        sums = gathered.sums(layer)
        seen = gathered.layers.pop(layer).written.double().cpu() @ subject.lenses.matrix[layer].double().cpu().T
        if gain is not None:
            seen = seen @ gain.double().cpu().T
        scores = score_layer(sums, seen @ seen.transpose(1, 2), plan.directions.rank)
        tests += [add_head(found, scores, layer, head) for head in range(len(seen))]
    found.add("error_directions", plan.directions.rank)
    found.add("error_directions_share", plan.directions.share, reason=plan.reason)
    corrected = multipletests([test.p for test in tests], method="holm")[1]
    hits = (corrected < LEVEL) & np.array([test.ahead for test in tests]) & (not nothing)
    for test, p, hit in zip(tests, corrected, hits, strict=True):
        found.add("error_transport_p", float(p), layer=test.layer, other=test.head)
        found.add("error_transport_found", float(hit), layer=test.layer, other=test.head)
    found.add("heads_found", float(hits.mean()))
    found.add("heads_beyond_permutation", float(np.mean([test.beyond_null for test in tests])))
    known = [test.score for test in tests if np.isfinite(test.score)] or [np.nan]
    found.add("error_score_top", max(known))
    found.add("error_score_median", float(np.median(known)))
    return found.done()


def add_head(found: Estimates, scores: Scores, layer: int, head: int) -> HeadTests:
    """Add the quantities of one head to the estimates; returns what decides whether it is found."""
    where: dict[str, Any] = {"layer": layer, "other": head}
    total, nuisances, copying, free, null = (
        x[..., head] for x in (scores.total, scores.nuisances, scores.copying, scores.free, scores.null_free)
    )
    found.refitted_share("copying_gain", nuisances - copying, total, **where)
    found.refitted_share("error_gain", copying - free, total, **where)
    found.refitted_share("error_gain_null", copying - null, total, **where)
    found.refitted_share("error_gain_beyond_null", null - free, total, **where)
    *_, gain, without_each = found.rows[-1]
    beyond_null = bool(jackknife(np.array([gain]), without_each[:, None], found.groups)[0][0] > 0)
    p = max(float(scores.p[head]), above_zero(scores.cosine[head], scores.cosine_without[:, head], found.groups))
    score = float(scores.score[head])
    reason = "" if np.isfinite(score) else "undefined: the map of tokens cannot be told from zero"
    found.add("error_score", score, scores.score_without[:, head], reason=reason, **where)
    found.add("error_alignment", float(scores.cosine[head]), scores.cosine_without[:, head], **where)
    angle, without = scores.angle[head], scores.angle_without[:, head]
    steep = np.abs(np.append(without, angle)).max() > STEEPEST
    folds = len(without)
    ratio, ratio_without = (np.nan, np.full(folds, np.nan)) if steep else (np.tan(angle), np.tan(without))
    reason = "undefined: expectations alone, hardly the token" if steep else ""
    found.add("error_ratio", float(ratio), ratio_without, reason=reason, **where)
    low, _ = jackknife(np.array([ratio]), ratio_without[:, None], found.groups)
    ahead = bool(low[0] > 0) and gain > 0
    return HeadTests(layer, head, p, score, ahead, beyond_null)


def above_zero(value: float, without: Array, groups: float | None = None) -> float:
    """One-sided p that an estimate is above 0, by the t of the jackknife; 1 where it is undefined."""
    if not np.isfinite(without).all() or not np.isfinite(value):
        return 1.0
    folds = len(without)
    spread = np.sqrt((folds - 1) / folds * np.square(without - without.mean()).sum())
    return float(stats.t.sf(value / max(spread, 1e-12), (folds if groups is None else groups) - 1))


ERROR_TRANSPORT = Probe(
    "error_transport",
    error_transport,
    "per head, does it carry `alpha e_x - beta ebar` with beta above 0? Score, beta / alpha, p over all heads",
    (
        Quantity(
            "error_score",
            "error score",
            "share of what the head mixes that expectations explain by minus the map of tokens, beyond random signs",
            "head",
            "Above 0, expectations enter as tokens do with the sign turned; below 0, with the tokens' own sign.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "error_ratio",
            "beta / alpha",
            "`beta / alpha` of the best fit on all folds",
            "head",
            "It is 1 for a head that carries the error, 0 for one that copies.",
            table="heads",
        ),
        Quantity(
            "error_alignment",
            "alignment",
            "cosine of the free map of expectations and minus the free map of tokens",
            "head",
            "At 1, the head uses expectations exactly as tokens, with the sign turned.",
            table="heads",
        ),
        Quantity(
            "copying_gain",
            "copying, gain of R^2",
            "held-out R^2 that the token (beta = 0) adds to the nuisances",
            "head",
            "It says how much of what the head mixes is a map of the token.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "error_gain",
            "gain of a free beta",
            "held-out R^2 that a free beta adds to copying",
            "head",
            "Above 0, expectations explain what copying does not.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "error_gain_null",
            "gain of a free beta, null",
            "the same with expectations permuted over the positions of their window",
            "head",
            "It is a weak null: contexts are correlated with expectations, also in an untrained model.",
            WITH_ITS_NULL,
        ),
        Quantity(
            "error_gain_beyond_null",
            "the same beyond its null",
            "`error_gain` minus `error_gain_null`",
            "head",
            "Above 0, the expectations of the right positions explain more than others of the same window.",
            SAME_TOKENIZER,
            "heads",
        ),
        Quantity(
            "error_transport_p",
            "p, Holm",
            "larger p of the alignment's two tests, one-sided, corrected over all heads of the model",
            "head",
            "Below 0.05, the alignment is unlikely to be chance.",
            table="heads",
        ),
        Quantity(
            "error_transport_found",
            "found",
            "1 where p < 0.05, `error_gain_beyond_null` > 0, the interval of beta / alpha is above 0, and predictions vary",
            "head",
            "1 says that the head carries errors, 0 that this is not shown.",
        ),
        Quantity(
            "error_directions",
            "directions of errors",
            "number of principal directions of the unembedding in which tokens and expectations are seen",
            "model",
            "The fewest that hold 95 % of the variance, but no fewer than 128 (or all).",
            SAME_TOKENIZER,
        ),
        Quantity(
            "error_directions_share",
            "variance in the directions of errors",
            "share of the unembedding's variance, over the text, in these directions",
            "model",
            "Below 0.95 its reason says what kept the directions from holding more.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "heads_found",
            "share of heads found to carry errors",
            "mean of `error_transport_found` over all heads",
            "model",
            "A model without errors has a head found in about one of twenty cases.",
            table="models",
        ),
        Quantity(
            "heads_beyond_permutation",
            "share of heads beyond the permutation alone",
            "share of heads whose `error_gain_beyond_null` has an interval above 0",
            "model",
            "It is high for untrained models too, so it shows no errors by itself.",
            table="models",
        ),
        Quantity(
            "error_score_top",
            "highest error score",
            "largest `error_score` of all heads",
            "model",
            "It is the score of the head that carries errors most.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "error_score_median",
            "median error score",
            "median `error_score` of all heads",
            "model",
            "Above 0, most heads carry errors.",
            SAME_TOKENIZER,
            "models",
        ),
    ),
    control="copying (beta = 0), the previous token, expectations permuted over positions, random signs of directions",
    version=3,
)
