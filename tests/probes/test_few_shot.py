"""Few-shot error transport of learners whose update is known: by the error, by the label alone, or not at all."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.planted import V, planted, subject_of

from lensbench.probes.few_shot import (
    LABELS,
    PROMPTS,
    Form,
    coefficients,
    draw_prompts,
    frequent_words,
    is_word,
    measure,
    moments,
)
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.crossfit import FOLDS

FORM = Form([V - 2], [V - 1])


class Learner:
    """Logits of the labels 0..3 begin at a prompt's own and move by ``alpha (1[y] - ratio p)`` behind every example."""

    device = torch.device("cpu")

    def __init__(self, alpha: float, ratio: float):
        self.alpha, self.ratio = alpha, ratio

    def at(self, ids, rows, columns):
        found = {}
        for b, prompt in enumerate(ids.numpy()):
            rng = np.random.default_rng(int(prompt[0]) + 1)
            logits = 2 * rng.standard_normal(LABELS)
            for start in range(0, len(prompt), FORM.tokens):
                found[b, start + FORM.answer] = logits
                p = np.exp(logits) / np.exp(logits).sum()
                logits = logits + self.alpha * (np.eye(LABELS)[prompt[start + 2]] - self.ratio * p)
        out = np.full((len(rows), V), -50.0)
        out[:, :LABELS] = [found[int(b), int(c)] for b, c in zip(rows, columns, strict=True)]
        return None, torch.from_numpy(out)


def prompts():
    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(0))
    place = (drawn.labels[..., None] == drawn.choices[:, None]).argmax(-1)
    return replace(drawn, labels=place, choices=np.tile(np.arange(LABELS), (PROMPTS, 1)))


def test_prompts_are_what_they_are_said_to_be():
    drawn = draw_prompts(np.arange(10, 60), 12, np.random.default_rng(1))
    row = np.arange(PROMPTS)
    assert ((drawn.queries[row, drawn.at] == drawn.queries[row, drawn.at + 1]) == drawn.same).all()
    assert (drawn.choices[row, drawn.place] == drawn.labels[row, drawn.at]).all()
    assert drawn.at.min() >= 1
    assert drawn.at.max() <= 10
    assert 0.4 < drawn.same.mean() < 0.6
    assert not (set(drawn.queries[0]) & set(drawn.choices[0])), "a word is a query or a label"
    ids = FORM.written(drawn.queries, drawn.labels)
    assert ids.shape == (PROMPTS, 48)
    assert (ids[:, 1::4] == V - 2).all()
    assert (ids[:, 3::4] == V - 1).all()
    assert (ids[:, 0::4] == drawn.queries).all()
    assert (ids[:, 2::4] == drawn.labels).all()


@pytest.mark.parametrize(("alpha", "ratio"), [(1.3, 1.0), (0.7, 0.6), (2.0, 0.0)])
def test_the_update_of_a_learner_is_found(alpha, ratio):
    changes, shown, predicted, learned = measure(Learner(alpha, ratio), prompts(), FORM)
    sums = moments(changes, shown, predicted, np.arange(PROMPTS) % FOLDS).sum(0)
    found, beta = coefficients(sums)
    assert found == pytest.approx(alpha, abs=1e-9)
    assert beta == pytest.approx(alpha * ratio, abs=1e-9)
    assert learned.shape == (PROMPTS,)
    assert learned.min() > 0
    assert learned.max() < 1


def test_a_model_that_learns_nothing_from_its_prompt_says_so():
    subject = subject_of(planted("none"))
    frame = PROBES["few_shot"].measure(subject).frame().set_index("quantity")
    learned = frame.loc["few_shot_learned"]
    assert learned["ci_low"] < 0.25 < learned["ci_high"] or abs(learned["value"] - 0.25) < 0.08
    for kind in ("same", "other"):
        alpha = frame.loc[f"few_shot_alpha_{kind}"]
        undefined = np.isnan(frame.loc[f"few_shot_ratio_{kind}", "value"])
        assert undefined == (alpha["ci_low"] <= 0 <= alpha["ci_high"])
        assert float(frame.loc[f"few_shot_error_gain_{kind}", "value"]) < 0.05


def test_words_are_letters_and_the_most_frequent_come_first():
    assert is_word(" the")
    assert is_word("def")
    assert not is_word("x")
    assert not is_word("a_b")
    assert not is_word("\n\n")
    subject = subject_of(planted("none"))
    words = frequent_words(subject)
    counts = np.bincount(subject.words.fit_windows.ids.ravel(), minlength=V)
    assert (np.diff(counts[words]) <= 0).all()
    assert len(words) == 64
    assert not ({V - 1, V - 2} & set(words.tolist()))


def test_too_few_words_and_rotated_views_are_skipped_with_the_reason():
    silent = SimpleNamespace(decode=lambda ids: "?", encode=lambda *a, **k: [0])
    few = PROBES["few_shot"].measure(subject_of(planted("none"), tokenizer=silent)).frame()
    assert "too few" in few["reason"][0]
    assert "not rotated" in PROBES["few_shot"].measure(subject_of(planted("none"), rotated=True)).frame()["reason"][0]
