"""Learners of few-shot prompts whose update is known: by an average of the labels shown, or by errors."""

from dataclasses import replace

import numpy as np
import torch

from lensbench.probes.tools.prompts import LABELS, PROMPTS, Form, Prompts, draw_prompts

FIRST_LABEL = 100
V = FIRST_LABEL + LABELS * PROMPTS
FORM = Form([1], [2])


def known_prompts(seed: int = 0) -> Prompts:
    """Prompts of queries 10..59 whose labels are no other prompt's: a label tells which four it is one of."""
    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(seed))
    own = FIRST_LABEL + LABELS * np.arange(PROMPTS)[:, None]
    place = (drawn.labels[..., None] == drawn.choices[:, None]).argmax(-1)
    return replace(drawn, labels=own + place, choices=own + np.arange(LABELS))


class KnownLearner:
    """Logits of labels are a bias of label and query, and what was learned of the query.

    ``average``: ``size`` times the mean of the labels shown after the query and over all; ``log``: ``size`` times the
    logarithm of the smoothed mean after the query; ``error``: the sum of ``size (1[y] - p)`` after the query. ``noise`` is
    the standard deviation of what is new in the logits of every context.
    """

    device = torch.device("cpu")

    def __init__(self, kind: str, size: float, noise: float = 0.0, seed: int = 0):
        self.kind, self.size, self.noise, self.seed = kind, size, noise, seed
        rng = np.random.default_rng(seed + 1)
        self.bias = rng.standard_normal(V) + 0.5 * rng.standard_normal((60, V))
        self.new = rng.standard_normal((2**17, LABELS))

    def at(self, ids, rows, columns):
        """Logits ``[n, V]`` at some positions, as a stream gives them."""
        wanted = [(int(b), int(c)) for b, c in zip(rows, columns, strict=True)]
        found = {key: np.zeros(V) for key in wanted}
        for b, prompt in enumerate(ids.numpy()):
            shown, moved, every = {}, {}, np.zeros(LABELS)
            labels = np.arange(LABELS) + prompt[2] - (prompt[2] - FIRST_LABEL) % LABELS if len(prompt) > 2 else None
            for start in range(0, len(prompt), FORM.tokens):
                query = int(prompt[start])
                assert labels is not None
                logits = self.bias[query, labels] + self.learned(shown.get(query), moved.get(query), every)
                if self.noise:
                    context = hash((self.seed, *prompt[: start + 1].tolist())) % len(self.new)
                    logits = logits + self.noise * self.new[context]
                if (b, start + FORM.answer) in found:
                    found[b, start + FORM.answer][labels] = logits
                if start + 2 >= len(prompt):
                    break
                label = np.eye(LABELS)[prompt[start + 2] - labels[0]]
                p = np.exp(logits) / np.exp(logits).sum()
                moved[query] = moved.get(query, 0) + self.size * (label - p)
                shown[query] = shown.get(query, 0) + label
                every = every + label
        return None, torch.from_numpy(np.stack([found[key] for key in wanted]))

    def learned(self, shown, moved, every):
        """What was learned of a query ``[m]``, after the labels ``shown`` and the updates ``moved`` (None: no example)."""
        shown = np.zeros(LABELS) if shown is None else shown
        if self.kind == "error":
            return 0 if moved is None else moved
        if self.kind == "log":
            return self.size * np.log((shown + 1 / LABELS) / (shown.sum() + 1))
        return self.size * (0.7 * shown / max(shown.sum(), 1) + 0.3 * every / max(every.sum(), 1))
