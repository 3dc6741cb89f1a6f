"""The null of gradient alignment: what all texts have in common, and nothing that one text has in common with itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.planted import D, L, planted, subject_of

from lensbench.probes import gradient_alignment
from lensbench.probes.gradient_alignment import elsewhere
from lensbench.probes.registry import PROBES


def planted_descent(monkeypatch, subject, of_window, of_all):
    """The probe's values where steps and descents are noise, and what windows, or all texts, have in common of them."""
    generator = torch.Generator().manual_seed(0)
    common = of_window * torch.randn(len(subject.windows), D, generator=generator)
    common = common + of_all * torch.randn(D, generator=generator)
    number = {ids.tobytes(): k for k, ids in enumerate(subject.windows.ids)}

    def known(stream, ids, classes, inside):
        base = common[[number[row.numpy().tobytes()] for row in ids]][:, None]
        step, descent = (base + torch.randn(L, *ids.shape, D, generator=generator) for _ in range(2))
        return torch.cat([torch.zeros_like(step[:1]), step.cumsum(0)]), descent

    monkeypatch.setattr(gradient_alignment, "states_and_gradients", known)
    frame = PROBES["gradient_alignment"].measure(subject).frame(50)
    return frame.groupby("quantity")["value"].apply(lambda values: values.astype(float).mean())


@pytest.mark.parametrize("windows_at_once", [2, 4, 16])
def test_what_a_window_has_in_common_is_not_in_the_null(monkeypatch, windows_at_once):
    subject = subject_of(planted("none"), count=32)
    alone = replace(subject.windows, documents=np.arange(32), document_names=tuple(map(str, range(32))))
    monkeypatch.setattr(gradient_alignment, "TOKENS_AT_ONCE", windows_at_once * alone.positions_read)
    value = planted_descent(monkeypatch, replace(subject, samples=alone), 1.0, 0.0)
    assert value["gradient_alignment"] == pytest.approx(0.5, abs=0.03)
    assert value["gradient_alignment_null"] == pytest.approx(0, abs=0.06)
    assert value["gradient_alignment_beyond_null"] == pytest.approx(0.5, abs=0.06)


def test_what_all_texts_have_in_common_is_in_the_null(monkeypatch):
    value = planted_descent(monkeypatch, subject_of(planted("none"), count=32), 0.0, 1.0)
    assert value["gradient_alignment_null"] == pytest.approx(value["gradient_alignment"], abs=0.02)
    assert value["gradient_alignment_beyond_null"] == pytest.approx(0, abs=0.02)


def test_the_other_token_is_of_another_document_and_each_of_these_is_as_likely():
    window = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    document = torch.tensor([5, 5, 5, 2, 2, 5, 2, 2, 2, 2])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([elsewhere(document, window, generator) for _ in range(3000)])
    assert (document[drawn] != document).all()
    counts = torch.bincount(drawn[:, 0], minlength=10)
    assert (counts[document == 2] / 3000 - 1 / 6).abs().max() < 0.03
    one_document = elsewhere(torch.zeros(10, dtype=torch.long), window, generator)
    assert (window[one_document] != window).all()
    one_window = elsewhere(torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long), generator)
    assert (one_window != torch.arange(6)).all()


def test_a_window_that_would_be_alone_in_the_last_batch_is_read_with_the_one_before(monkeypatch):
    subject = subject_of(planted("none"), count=34)
    subject = replace(subject, samples=subject.windows.take(np.arange(33)))
    monkeypatch.setattr(gradient_alignment, "TOKENS_AT_ONCE", 4 * subject.windows.positions_read)
    value = planted_descent(monkeypatch, subject, 3.0, 0.0)
    assert value["gradient_alignment_null"] < 0.1
