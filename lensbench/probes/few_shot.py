"""Does an example of a few-shot prompt move the next prediction by its error, or by its label alone?"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import FOLDS, Estimates, FoldSums, Jackknifed, by_group, cross_fitted
from lensbench.statistics import Array, jackknife
from lensbench.streams.stream import ResidualStream

Ids = NDArray[np.int64]


PROMPTS = 512


EXAMPLES = 16
"""Of a prompt at most."""


QUERIES, LABELS = 4, 4
"""Different ones in a prompt, drawn anew for each, with an own map from query to label."""


POOL = 64
"""The text's most frequent words that queries and labels are drawn from."""


NOISE = 0.2
"""Share of the examples whose label is any: errors go on when the map is known."""


TOKENS_AT_ONCE = 4096


@probe
def few_shot(subject: Subject) -> Jackknifed:
    """Few-shot prompts ``query:label``, a random map each; the error at example k against the change at example k+1.

    The change is that of the labels' logits (about their mean) at the answer of example k+1 when example k is taken out of
    the prompt, everything else kept; the error is ``1[y] - p`` over the labels, p being the model's at the answer of
    example k. ``change ~ alpha 1[y] - beta p``: ``few_shot_alpha``, logits per label shown; ``few_shot_ratio`` is beta /
    alpha, 1 for an update by the error, 0 for adding the label whatever was predicted; ``few_shot_copying_r2`` that of
    beta = 0, ``few_shot_error_gain`` what a free beta adds to it, cross-fitted over groups of prompts, and
    ``few_shot_error_gain_null`` the same with p of another prompt. Names end in ``_same`` where example k+1 asks the same
    query as k, in ``_other`` where another. At the same query what is left of the prompt up to the answer is the context
    that p was predicted from, so that logits minus log p regress on p whatever moves them: attention that averages the
    labels shown, and holds no prediction, has a ratio well above 0 and a gain above this null. Neither tells errors from
    that. ``few_shot_learned`` is p of the mapped label at the last example, among the
    labels: a quarter if nothing is learned from the prompt.
    """
    name = "few_shot"
    if subject.rotated:
        return Jackknifed(name, reason="the same as in the view that is not rotated: it is about the model's output")
    stream = subject.stream
    words = frequent_words(subject)
    if len(words) < QUERIES + LABELS:
        return Jackknifed(name, reason=f"its tokenizer has {len(words)} words of one token in this text: too few")
    colon, newline = (encode(subject.words.tokenizer, text) for text in (":", "\n"))
    form = Form(colon, newline)
    room = subject.windows.ids.shape[1] // form.tokens
    if room < 4:
        return Jackknifed(name, reason=f"its windows have room for {room} examples: too few")
    examples = min(EXAMPLES, room)
    prompts = draw_prompts(words, examples, np.random.default_rng(0))
    found = Estimates(name, FOLDS)
    changes, shown, predicted, learned = measure(stream, prompts, form)
    group = np.arange(PROMPTS) % FOLDS
    hits = by_group(learned, group)
    found.share("few_shot_learned", hits, by_group(np.ones(PROMPTS), group))
    for same, kind in ((True, "same"), (False, "other")):
        of = prompts.same == same
        where = group[of]
        columns = moments(changes[of], shown[of], predicted[of], where)
        null = moments(changes[of], shown[of], predicted[of].roll(1, 0), where)
        copying, total = summed(cross_fitted(columns, torch.tensor([1]), torch.tensor([3]), (0.0,)))
        free, _ = summed(cross_fitted(columns, torch.tensor([1, 2]), torch.tensor([3]), (0.0,)))
        permuted, _ = summed(cross_fitted(null, torch.tensor([1, 2]), torch.tensor([3]), (0.0,)))
        found.share(f"few_shot_copying_r2_{kind}", total - copying, total)
        found.share(f"few_shot_error_gain_{kind}", copying - free, total)
        found.share(f"few_shot_error_gain_null_{kind}", copying - permuted, total)
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
    return found.done()


def summed(parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of the one output."""
    return parts[0][:, 0], parts[1][:, 0]


@dataclass(frozen=True)
class Form:
    """How an example is written: query, ``colon``, label, ``newline``; queries and labels are one token each."""

    colon: list[int]
    newline: list[int]

    @property
    def tokens(self) -> int:
        return 2 + len(self.colon) + len(self.newline)

    def written(self, queries: Ids, labels: Ids) -> Ids:
        """Token ids ``[S, k * tokens]`` of k examples ``[S, k]``."""
        shape = (*queries.shape, 1)
        parts = [
            queries[..., None],
            np.broadcast_to(self.colon, (*queries.shape, len(self.colon))),
            labels.reshape(shape),
            np.broadcast_to(self.newline, (*queries.shape, len(self.newline))),
        ]
        return np.concatenate(parts, -1).reshape(len(queries), -1)

    @property
    def answer(self) -> int:
        """Place, within an example, of the token behind which the label is predicted."""
        return len(self.colon)


@dataclass(frozen=True)
class Prompts:
    """S prompts of k examples: token ids of queries and labels ``[S, k]``, and of each prompt's labels ``[S, m]``.

    ``at`` ``[S]`` is the example that is taken out; ``same`` ``[S]``: the one behind it asks the same query. ``mapped``
    ``[S]`` is the place, among the labels, of the one that the last query maps to; ``place`` ``[S]`` that of the one shown.
    """

    queries: Ids
    labels: Ids
    choices: Ids
    at: Ids
    same: NDArray[np.bool_]
    mapped: Ids
    place: Ids


def draw_prompts(words: Ids, examples: int, rng: np.random.Generator) -> Prompts:
    count = PROMPTS
    drawn = np.stack([rng.permutation(len(words))[: QUERIES + LABELS] for _ in range(count)])
    asked, choices = words[drawn[:, :QUERIES]], words[drawn[:, QUERIES:]]
    mapping = rng.integers(0, LABELS, (count, QUERIES))
    which = rng.integers(0, QUERIES, (count, examples))
    at = rng.integers(1, examples - 1, count)  # one example before it, one behind it at least
    same = np.arange(count) // FOLDS % 2 == 0
    row = np.arange(count)
    other = (which[row, at] + rng.integers(1, QUERIES, count)) % QUERIES
    which[row, at + 1] = np.where(same, which[row, at], other)
    label = np.take_along_axis(mapping, which, 1)
    noisy = rng.random((count, examples)) < NOISE
    label = np.where(noisy, rng.integers(0, LABELS, label.shape), label)
    return Prompts(
        np.take_along_axis(asked, which, 1),
        np.take_along_axis(choices, label, 1),
        choices,
        at,
        same,
        np.take_along_axis(mapping, which[:, -1:], 1)[:, 0],
        label[row, at],
    )


@torch.no_grad()
def measure(stream: ResidualStream, prompts: Prompts, form: Form) -> tuple[Tensor, Tensor, Tensor, Array]:
    """Per prompt the change of the labels' logits, the label shown, what was predicted ``[S, m]`` each, about their means.

    And the probability, among the labels, of the mapped one at the last example ``[S]``.
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


def label_logits(stream: ResidualStream, ids: Ids, answers: Ids, choices: Ids) -> Tensor:
    """Log-probabilities ``[s, a, m]`` of m labels at a answers ``[s, a]`` of prompts ``[s, T]``, float64."""
    rows = torch.arange(len(ids)).repeat_interleave(answers.shape[1])
    columns = torch.from_numpy(answers.ravel())
    _, logits = stream.at(torch.from_numpy(ids).to(stream.device), rows.to(stream.device), columns.to(stream.device))
    log_p = logits.double().log_softmax(-1).cpu().view(*answers.shape, -1)
    return log_p.gather(-1, torch.from_numpy(choices)[:, None].expand(-1, answers.shape[1], -1))


def moments(change: Tensor, shown: Tensor, predicted: Tensor, group: Ids) -> Tensor:
    """Raw sums by group ``[K, 4, 4]`` of ``[1, 1[y], p, change]``, a row per prompt and label."""
    sums = FoldSums(FOLDS)
    columns = torch.stack([torch.ones_like(shown), shown, predicted, change], -1).flatten(0, 1)
    of = torch.from_numpy(np.repeat(group, LABELS))
    for k in range(FOLDS):
        sums.add(k, columns[of == k])
    return sums.sums


def coefficients(moments: Tensor) -> tuple[float, float]:
    """alpha and beta of ``change ~ alpha 1[y] - beta p``."""
    alpha, minus_beta = torch.linalg.lstsq(moments[1:3, 1:3], moments[1:3, 3:]).solution[:, 0].tolist()
    return alpha, -minus_beta


def encode(tokenizer: Tokenizer | PreTrainedTokenizerBase, text: str) -> list[int]:
    if isinstance(tokenizer, Tokenizer):
        return list(tokenizer.encode(text).ids)
    return list(tokenizer.encode(text, add_special_tokens=False))


def frequent_words(subject: Subject) -> Ids:
    """Ids of the fitting text's most frequent tokens that are words: two letters or more, a space before them or not."""
    ids = subject.words.fit_windows.ids[subject.words.fit_windows.inside]
    tokens, counts = np.unique(ids, return_counts=True)
    words = [
        t for t in tokens[np.argsort(-counts, kind="stable")] if is_word(str(subject.words.tokenizer.decode([int(t)])))
    ]
    return np.array(words[:POOL], dtype=np.int64)


def is_word(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip().isalpha() and text.strip().isascii()
