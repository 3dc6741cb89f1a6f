"""Precision at k against a sort of every word."""

import torch
from helpers.synthetic import random_maps, small

from lensbench.measures.top_words import top_word_ranks


def test_the_rank_of_the_models_top_word_is_its_place_among_all_words_sorted():
    it = small(0)
    captured, readout = it.held_out, it.stream.readout
    maps = random_maps(2, captured.states.shape[-1])
    for k in range(2):
        h = captured.states[k]
        ranks = top_word_ranks(readout, h, maps, k, captured)
        with torch.no_grad():
            order = readout(h @ maps.matrix[k].T + maps.offset[k]).argsort(-1, descending=True)
        expected = (order == captured.top[:, None]).int().argmax(-1)
        assert torch.equal(ranks, expected)
    assert 0 < (ranks == 0).float().mean() < 1


def test_a_lens_whose_logits_overflow_is_right_nowhere():
    it = small(0)
    captured, readout = it.held_out, it.stream.readout
    maps = random_maps(1, captured.states.shape[-1])
    broken = type(maps)(maps.matrix * float("nan"), maps.offset)
    ranks = top_word_ranks(readout, captured.states[0], broken, 0, captured)
    assert (ranks == len(readout.weight)).all()
