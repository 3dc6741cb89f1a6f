"""Interventions on models whose blocks differ in mask or rotary embedding, against their blocks called by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.architectures import V, small_model
from helpers.by_hand import MIXED, logits_by_hand, mixed_model
from helpers.gpt_windows import windows
from helpers.planted import subject_of
from torch import nn

from lensbench.probes.block_paths import skipping
from lensbench.probes.causal_fidelity import responses
from lensbench.probes.head_weights import handed_over
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.block_places import swapped, why_not_swapped
from lensbench.probes.tools.heads import reading_heads
from lensbench.probes.tools.interventions import entering
from lensbench.streams.stream import ResidualStream

ALL = range(4)


def ids_of(count=2, length=14):
    return torch.randint(3, V, (count, length), generator=torch.Generator().manual_seed(3))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=MIXED)
def model(request):
    return mixed_model(request.param)


@torch.no_grad()
def test_swapped_blocks_keep_the_kind_of_their_attention(model):
    stream, ids = ResidualStream(model), ids_of()
    close(stream.forward(ids)[1], logits_by_hand(model, ids, ALL))
    for first in range(3):
        order = list(ALL)
        order[first], order[first + 1] = order[first + 1], order[first]
        assert why_not_swapped(stream, first) == ""
        expected, shorter = logits_by_hand(model, ids, order), logits_by_hand(model, ids[:1, :9], order)
        with swapped(stream, first):
            states, logits = stream.forward(ids)
            close(logits, expected)
            assert len(states) == 5
            rows, columns = torch.tensor([1, 0]), torch.tensor([13, 4])
            close(stream.at(ids, rows, columns)[1], expected[rows, columns])
            close(stream.forward(ids[:1, :9])[1], shorter)
    close(stream.forward(ids)[1], logits_by_hand(model, ids, ALL))
    assert not model._forward_pre_hooks
    assert not any(block._forward_pre_hooks for block in stream.blocks)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2"])
def test_rises_of_swapped_blocks_are_far_from_those_of_kinds_by_place(architecture):
    model, texts = mixed_model(architecture), windows()
    model.lm_head.weight.mul_(10)  # also the embedding: predictions far from uniform
    frame = PROBES["block_paths"].measure(subject_of(model, windows=texts)).frame(20)
    found = frame[frame["quantity"] == "ce_rise_swapped"]["value"]
    ids = torch.from_numpy(texts.ids)

    def ce(order, by_place=False):
        log_p = logits_by_hand(model, ids, order, by_place=by_place).double().log_softmax(-1)
        scored = zip(*texts.valid.nonzero(), strict=True)
        nats = [-log_p[w, t := texts.positions[w, j], ids[w, t + 1]] for w, j in scored]
        return torch.stack(nats).mean().item()

    orders = [[1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]]
    rises, by_place = (np.array([ce(order, way) - ce(ALL) for order in orders]) for way in (False, True))
    assert found.to_numpy() == pytest.approx(rises, abs=1e-4)
    assert abs(by_place - rises).max() > 0.02


@torch.no_grad()
def test_deleted_and_skipped_blocks_leave_the_others_their_kinds(model):
    stream, ids = ResidualStream(model), ids_of()
    for left_out in ([0], [1], [3], [0, 2], [1, 2, 3]):
        with skipping([stream.blocks[k] for k in left_out]):
            found = stream.forward(ids)[1]
        close(found, logits_by_hand(model, ids, [k for k in ALL if k not in left_out]))


@torch.no_grad()
def test_moved_states_pass_through_blocks_of_their_own_kind(model):
    stream, ids = ResidualStream(model), ids_of(1)
    layers = torch.arange(4)
    moves = torch.randn(4, stream.d_model, generator=torch.Generator().manual_seed(1))
    before = model(ids).logits[0, -1].log_softmax(-1)
    found = responses(stream, ids, layers, moves, before)
    for k in range(4):

        def moved(block, h, k=k):
            h = h.clone()
            h[:, -1] += moves[k] * (block == k)
            return h

        torch.testing.assert_close(
            found[k], logits_by_hand(model, ids, ALL, moved)[0, -1].log_softmax(-1), rtol=1e-3, atol=1e-3
        )


@torch.no_grad()
def test_injected_states_are_what_a_block_of_its_kind_receives(model):
    stream, ids = ResidualStream(model), ids_of(3, 1)
    given = {2: torch.randn(3, stream.d_model, generator=torch.Generator().manual_seed(1))}
    with entering(stream, partial(handed_over, states=given)):
        found = model(ids).logits
    close(found, logits_by_hand(model, ids, ALL, lambda k, h: given[k][:, None] if k in given else h))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2", "olmo3"])
def test_weights_of_heads_are_those_of_the_blocks_own_window(architecture):
    model = mixed_model(architecture)
    stream, ids = ResidualStream(model), ids_of()
    with reading_heads(stream) as heads:
        stream.forward(ids)
    for of in heads:
        beyond = of.weights.tril(-4).abs().amax()
        assert (beyond == 0) == (model.config.layer_types[of.layer] == "sliding_attention")


class _WithValues(nn.Module):
    """A block that adds what it is given of the first block, as models with residual values do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h, *args, values=None, **kwargs):
        out = self.inner(h, *args, **kwargs)
        return out if values is None else out + values


@torch.no_grad()
def test_a_block_that_takes_more_of_its_neighbour_than_its_state_is_not_swapped():
    model = small_model("llama")
    layers = model.model.layers
    for k, block in enumerate(layers):
        layers[k] = _WithValues(block)
    stream, forward = ResidualStream(model), model.model.forward

    class Place(nn.Module):
        """Where a model calls a block: it hands on what the first one returned."""

        first = None

        def __init__(self, block, number):
            super().__init__()
            self.block, self.number = block, number

        def forward(self, h, *args, **kwargs):
            out = self.block(h, *args, **kwargs, **({"values": Place.first} if self.number == 1 else {}))
            Place.first = out if self.number == 0 else Place.first
            return out

    def with_values(*args, **kwargs):
        blocks = list(layers)
        for k, block in enumerate(blocks):
            layers[k] = Place(block, k)
        try:
            return forward(*args, **kwargs)
        finally:
            for k, block in enumerate(blocks):
                layers[k] = block

    model.model.forward = with_values
    assert "more from block 0" in why_not_swapped(stream, 0)
    windows_of = subject_of(model, stream=stream, windows=windows())
    frame = PROBES["block_paths"].measure(windows_of).frame(200)
    swaps = frame[frame["quantity"] == "ce_rise_swapped"]
    assert swaps["value"].isna().tolist() == [True, False]
    assert "more from block 0" in swaps["reason"].iloc[0]
