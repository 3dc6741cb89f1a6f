"""Predictions that stay without a block, or with two in each other's place, against models called by hand."""

import numpy as np
import pytest
import torch
from helpers.by_hand import logits_by_hand, mixed_model
from helpers.gpt_windows import windows
from helpers.known_blocks import WIDTH, drawn, known_model, observations
from helpers.planted import V, planted, subject_of

from lensbench.models import build
from lensbench.probes.registry import PROBES


def measured(model, **changes):
    return PROBES["top1_kept"].measure(subject_of(model, **{"count": 8} | changes)).frame(20)


def values(frame, quantity):
    return frame[frame["quantity"] == quantity]["value"].astype(float).tolist()


@torch.no_grad()
@pytest.mark.slow
def test_what_is_kept_is_what_mixed_blocks_called_by_hand_keep():
    model, texts = mixed_model("gemma3_text"), windows()
    model.lm_head.weight.mul_(10)  # predictions far from uniform
    frame, ids = measured(model, windows=texts), torch.from_numpy(texts.ids)
    inside = [(w, t) for w in range(len(texts)) for t in range(texts.lengths[w])]

    def top(order):
        logits = logits_by_hand(model, ids, order)
        return [int(logits[w, t].argmax()) for w, t in inside]

    whole = top(range(4))

    def kept(order):
        return np.mean([a == b for a, b in zip(top(order), whole, strict=True)])

    deleted = [kept([k for k in range(4) if k != gone]) for gone in range(4)]
    swapped = [kept(order) for order in ([1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2])]
    assert min(deleted) < 1
    assert values(frame, "top1_kept_deleted") == pytest.approx(deleted)
    assert values(frame, "top1_kept_swapped") == pytest.approx(swapped)
    assert values(frame, "top1_kept_deleted_mean") == pytest.approx([np.mean(deleted)])
    assert values(frame, "top1_kept_deleted_middle") == pytest.approx([np.mean(deleted[1:3])])
    assert values(frame, "top1_kept_swapped_mean") == pytest.approx([np.mean(swapped)])
    change = np.mean(swapped) - np.mean(deleted)
    assert values(frame, "top1_kept_swapped_minus_deleted") == pytest.approx([change])
    document = [texts.documents[w] for w, _ in inside]
    same = []
    for a, word in enumerate(whole):
        others = [whole[b] for b in range(len(whole)) if document[b] != document[a]]
        same.append(np.mean([other == word for other in others]))
    assert values(frame, "top1_kept_chance") == pytest.approx([np.mean(same)])


def test_blocks_that_only_add_keep_every_prediction_when_exchanged():
    seen = observations(4)
    model = known_model([lambda h, ids, k=k: h + seen[k + 1][ids] for k in range(4)], seen[0])
    frame = measured(model)
    assert values(frame, "top1_kept_swapped") == [1, 1, 1]
    assert values(frame, "top1_kept_deleted_mean")[0] < 1


def test_a_last_block_that_decides_all_keeps_no_more_than_it_leaves():
    """It writes a new state: without it the embeddings are read out; of the blocks before it nothing is left."""
    aim = drawn(1, V, WIDTH)
    model = known_model([lambda h, ids: h + 1, lambda h, ids: aim[ids] + 0 * h], drawn(2, V, WIDTH))
    kept = values(measured(model), "top1_kept_deleted")
    assert kept[0] == 1
    assert kept[1] < 0.2


def test_what_it_does_not_apply_to_says_why():
    shape = {"vocab_size": V, "d_model": 32, "layers": 4, "heads": 4, "context": 64, "parameters": 60_000}
    tied = subject_of(build("gpt-tied", seed=1, **shape).eval(), count=8)
    for words, subject in (("blocks of their own", tied), ("rotated", subject_of(planted("none"), rotated=True))):
        assert words in PROBES["top1_kept"].measure(subject).frame()["reason"][0]
