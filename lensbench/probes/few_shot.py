"""Does an example in a few-shot prompt move the next prediction by its error, or by its label alone?"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.probes.catalogue import SAME_TOKENIZER, WITH_ITS_NULL, Probe, Quantity
from lensbench.probes.subject import Subject
from lensbench.probes.tools.averaging import add_beyond_averaging, averaging_columns, counts_before
from lensbench.probes.tools.crossfit import FOLDS, Estimates, FoldSums, Jackknifed, by_group, refitted
from lensbench.probes.tools.prompts import LABELS, PROMPTS, Form, Prompts, prompts_of
from lensbench.statistics import Array, jackknife
from lensbench.streams.stream import ResidualStream

Ids = NDArray[np.int64]


TOKENS_AT_ONCE = 4096


def few_shot(subject: Subject) -> Jackknifed:
    """In few-shot prompts ``query:label``, each with a random map: the change by example k against the error at example k.

    Prompts are whole texts: they begin with the model's beginning-of-text token, and their ids are those that its tokenizer
    makes of their text (:mod:`lensbench.probes.tools.prompts`).

    The change is that of the labels' logits (about their mean) at the answer of example k+1 when example k is taken out of
    the prompt and everything else is kept. The error is ``1[y] - p`` over the labels, where p is the model's prediction at
    the answer of example k. The regression is ``change ~ alpha 1[y] - beta p``, cross-fitted over groups of prompts. In half
    of the prompts example k+1 asks the same query as k (``_same``), in the other half another one (``_other``).

    At the same query, the prompt up to the answer without example k is the context from which p was predicted. So logits
    minus log p regress on p whatever moves them: attention that averages the labels shown, and holds no prediction, has a
    ratio well above 0 and a gain above the null. Neither tells errors from that.

    The control is in what p adds to the labels shown before: their means, at each query and over all, and how a label
    changes these (:mod:`lensbench.probes.tools.averaging`). The prediction is taken from a prompt with the same labels in
    another order, after exchanged queries. ``few_shot_error_beyond_averaging_`` is beta of that regression, in logits: that
    of an update by the error is alpha, that of an average is 0.

    Three kinds of averages are not told apart by it. One has a strength that differs from prompt to prompt: the sharper
    prediction then goes with the larger change. Of strengths that vary by a factor of e, 3 of 14 sets of prompts had an
    interval above 0, and 3 of 14 one below where the average was inside a logarithm. In the other two the prior counts as a
    label, or is inside the logarithm; that is an update by the error at a falling rate. A prediction without any example
    would be blind to the strength, but once labels are shown hardly anything of it is left: in SmolLM2-135M it has a
    correlation of 0.08 with the prediction, too little to stand for it.
    """
    name = "few_shot"
    if subject.rotated:
        return Jackknifed(name, reason="the same as in the view that is not rotated: it is about the model's output")
    drawn = prompts_of(subject.words.tokenizer, subject.words.fit_windows, subject.windows.ids.shape[1])
    if isinstance(drawn, str):
        return Jackknifed(name, reason=drawn)
    form, prompts = drawn
    found = Estimates(name, FOLDS)
    changes, shown, predicted, learned = measure(subject.stream, prompts, form)
    elsewhere = predicted_elsewhere(subject.stream, prompts, form)
    group = np.arange(PROMPTS) % FOLDS
    found.share("few_shot_learned", by_group(learned, group), by_group(np.ones(PROMPTS), group))
    for same, kind in ((True, "same"), (False, "other")):
        of = prompts.same == same
        _add_regression(found, kind, changes[of], shown[of], predicted[of], group[of])
        columns = label_columns(prompts, same)[of]
        add_beyond_averaging(found, kind, columns, predicted[of], elsewhere[of], changes[of], group[of])
    return found.done()


def label_columns(prompts: Prompts, same: bool) -> Tensor:
    """What averages of labels move by when a label is shown ``[S, m, C]``: at the asked query, and over all examples.

    Where the next example asks another query, its labels count beside those of the query at ``at``.
    """
    row = np.arange(len(prompts.at))
    numbers = (prompts.labels[..., None] == prompts.choices[:, None]).argmax(-1)
    shown = torch.from_numpy(np.eye(LABELS)[prompts.place])
    asked = [prompts.queries[row, prompts.at]] + ([] if same else [prompts.queries[row, prompts.at + 1]])
    scopes = [prompts.queries == query[:, None] for query in asked] + [np.ones_like(prompts.queries, dtype=bool)]
    counts = [counts_before(numbers, prompts.at, of, LABELS) for of in scopes]
    return torch.cat([(shown - 1 / LABELS)[..., None], *(averaging_columns(n, shown) for n in counts)], -1)


def _add_regression(found: Estimates, kind: str, change: Tensor, shown: Tensor, predicted: Tensor, group: Ids) -> None:
    """Add the quantities of ``change ~ alpha 1[y] - beta p``, of S prompts and m labels ``[S, m]`` in groups ``[S]``."""
    columns = moments(change, shown, predicted, group)
    null = moments(change, shown, predicted.roll(1, 0), group)
    copying, total = summed(refitted(columns, torch.tensor([1]), torch.tensor([3]), (0.0,)))
    free, _ = summed(refitted(columns, torch.tensor([1, 2]), torch.tensor([3]), (0.0,)))
    permuted, _ = summed(refitted(null, torch.tensor([1, 2]), torch.tensor([3]), (0.0,)))
    found.refitted_share(f"few_shot_copying_r2_{kind}", total - copying, total)
    found.refitted_share(f"few_shot_error_gain_{kind}", copying - free, total)
    found.refitted_share(f"few_shot_error_gain_null_{kind}", copying - permuted, total)
    whole = columns.sum(0)
    alpha, beta = coefficients(whole)
    each = [coefficients(whole - held) for held in columns]
    found.add(f"few_shot_alpha_{kind}", alpha, np.array([a for a, _ in each]))
    low, high = jackknife(np.array([alpha]), np.array([[a] for a, _ in each]))
    if low[0] <= 0 <= high[0]:
        reason = "undefined: the interval of alpha holds 0, so there is no update to take a share of"
        found.add(f"few_shot_ratio_{kind}", np.nan, reason=reason)
    else:
        found.add(f"few_shot_ratio_{kind}", beta / alpha, np.array([b / a for a, b in each]))


def summed(parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Errors and totals ``[K, K]`` of a regression with one output, from ``[K, K, 1]``."""
    return parts[0][..., 0], parts[1][..., 0]


@torch.no_grad()
def measure(stream: ResidualStream, prompts: Prompts, form: Form) -> tuple[Tensor, Tensor, Tensor, Array]:
    """For every prompt: the change of the labels' logits, the label shown, the prediction, and what was learned.

    The first three are ``[S, m]``, about their means over labels. What was learned ``[S]`` is the probability, among the
    labels, of the mapped one at the last example.
    """
    count, examples = prompts.queries.shape
    changes, predicted, learned = [], [], np.zeros(count)
    ids = form.written(prompts.queries, prompts.labels)
    size = max(1, TOKENS_AT_ONCE // ids.shape[1])
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        at = prompts.at[rows]
        answers = form.tokens * np.stack([at, at + 1, np.full(len(rows), examples - 1)], 1) + form.answer
        whole = label_logits(stream, ids[rows], answers, prompts.choices[rows])  # [s, 3, m]
        left = np.stack([np.delete(np.arange(examples), k) for k in at])
        shorter = form.written(
            np.take_along_axis(prompts.queries[rows], left, 1), np.take_along_axis(prompts.labels[rows], left, 1)
        )
        without = label_logits(stream, shorter, answers[:, :1], prompts.choices[rows])[:, 0]
        changes.append(whole[:, 1] - without)
        predicted.append(whole[:, 0].softmax(-1))
        chosen = whole[:, 2].softmax(-1)
        learned[rows] = chosen[torch.arange(len(rows)), torch.from_numpy(prompts.mapped[rows])].numpy()
    shown = torch.eye(LABELS, dtype=torch.float64)[torch.from_numpy(prompts.place)]
    change, p = torch.cat(changes), torch.cat(predicted)
    return change - change.mean(-1, keepdim=True), shown - 1 / LABELS, p - 1 / LABELS, learned


@torch.no_grad()
def predicted_elsewhere(stream: ResidualStream, prompts: Prompts, form: Form) -> Tensor:
    """Predictions of the label at ``at`` ``[S, m]``, about their means, after the same labels in another order.

    The queries of each prompt are exchanged for one another throughout.
    """
    rng, found = np.random.default_rng(1), []
    count, examples = prompts.queries.shape
    order = np.tile(np.arange(examples), (count, 1))
    for row, at in zip(order, prompts.at, strict=True):
        row[:at] = rng.permutation(at)
    queries = np.take_along_axis(prompts.exchanged, order, 1)
    ids = form.written(queries, np.take_along_axis(prompts.labels, order, 1))
    size = max(1, TOKENS_AT_ONCE // ids.shape[1])
    for start in range(0, count, size):
        rows = slice(start, start + size)
        answers = form.tokens * prompts.at[rows, None] + form.answer
        found.append(
            label_logits(stream, ids[rows, : answers.max() + 1], answers, prompts.choices[rows])[:, 0].softmax(-1)
        )
    return torch.cat(found) - 1 / LABELS


def label_logits(stream: ResidualStream, ids: Ids, answers: Ids, choices: Ids) -> Tensor:
    """Log-probabilities ``[s, a, m]`` of m labels at a answers ``[s, a]`` of prompts ``[s, T]``, float64."""
    rows = torch.arange(len(ids)).repeat_interleave(answers.shape[1])
    columns = torch.from_numpy(answers.ravel())
    _, logits = stream.at(torch.from_numpy(ids).to(stream.device), rows.to(stream.device), columns.to(stream.device))
    log_p = logits.double().log_softmax(-1).cpu().view(*answers.shape, -1)
    return log_p.gather(-1, torch.from_numpy(choices)[:, None].expand(-1, answers.shape[1], -1))


def moments(change: Tensor, shown: Tensor, predicted: Tensor, group: Ids) -> Tensor:
    """Raw sums by group ``[K, 4, 4]`` of the columns ``[1, 1[y], p, change]``, with a row per prompt and label."""
    sums = FoldSums(FOLDS)
    columns = torch.stack([torch.ones_like(shown), shown, predicted, change], -1).flatten(0, 1)
    of = torch.from_numpy(np.repeat(group, LABELS))
    for k in range(FOLDS):
        sums.add(k, columns[of == k])
    return sums.sums


def coefficients(moments: Tensor) -> tuple[float, float]:
    """alpha and beta of ``change ~ alpha 1[y] - beta p``, from raw sums ``[4, 4]``; beta is nan for a constant p."""
    (ss, sp), (_, pp) = moments[1:3, 1:3].tolist()
    sc, pc = moments[1:3, 3].tolist()
    determinant = ss * pp - sp * sp
    if not determinant > 1e-12 * ss * pp:
        return sc / ss, np.nan
    return (pp * sc - sp * pc) / determinant, (sp * sc - ss * pc) / determinant


def _of_kind(kind: str, where: str, same: bool) -> tuple[Quantity, ...]:
    """The quantities of prompts whose next example asks the same query, or another one."""
    return (
        Quantity(
            f"few_shot_alpha_{kind}",
            f"few-shot, {kind} query: alpha (logits)",
            f"alpha at {where}: logits that a label gains by being shown",
            "model",
            "Above 0, showing a label raises it.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            f"few_shot_ratio_{kind}",
            f"few-shot, {kind} query: beta / alpha",
            f"beta / alpha at {where}",
            "model",
            "It is 1 for an update by the error, 0 for one by the label, but"
            " averaging attention has a ratio above 0, too."
            if same
            else "It is 1 for an update by the error, 0 for one by the label whatever was predicted.",
            table="models",
        ),
        Quantity(
            f"few_shot_copying_r2_{kind}",
            f"few-shot, {kind} query: R^2 of copying",
            f"held-out R^2 of beta = 0 at {where}",
            "model",
            "It says how much of the change the label alone explains.",
            SAME_TOKENIZER,
        ),
        Quantity(
            f"few_shot_error_gain_{kind}",
            f"few-shot, {kind} query: gain over copying",
            f"held-out R^2 that a free beta adds at {where}",
            "model",
            "Above its null, the change depends on what was predicted.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            f"few_shot_error_gain_null_{kind}",
            f"few-shot, {kind} query: its null",
            "the same with the prediction of another prompt",
            "model",
            "It is a weak null: logits regress to the prediction of the same context, errors or none.",
            WITH_ITS_NULL,
            "models" if same else None,
        ),
        Quantity(
            f"few_shot_error_beyond_averaging_{kind}",
            f"few-shot, {kind} query: beta beyond averaging (logits)",
            f"beta at {where}, given the means of the labels shown before; p from prompts with exchanged queries",
            "model",
            "It is alpha for an update by the error, 0 for an average of the labels shown.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            f"few_shot_gain_beyond_averaging_{kind}",
            f"few-shot, {kind} query: gain beyond averaging",
            f"held-out R^2 that this p adds to the means of the labels shown before at {where}",
            "model",
            "Above 0, predictions say more of the change than the labels shown before do.",
            SAME_TOKENIZER,
        ),
    )


FEW_SHOT = Probe(
    "few_shot",
    few_shot,
    "in prompts `query:label`, does an example move the next prediction by its error or by its label?",
    (
        Quantity(
            "few_shot_learned",
            "few-shot: p of the mapped label",
            "probability, among the four labels, of the one that the prompt's map gives for the last query",
            "model",
            "It is a quarter if nothing is learned from the prompt.",
            SAME_TOKENIZER,
            "models",
        ),
        *_of_kind("same", "the same query", True),
        *_of_kind("other", "another query", False),
    ),
    control="prediction of another prompt, a weak null; averages of the labels shown before",
    version=3,
)
