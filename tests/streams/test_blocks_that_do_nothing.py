"""Blocks that hand on the tensor that they got, or change it in place: states are right, or the model is refused."""

import itertools

import pytest
import torch
import transformers
from torch import nn

from lensbench.errors import LensbenchError
from lensbench.streams.stream import ResidualStream

V, D = 60, 16


class Idle(nn.Module):
    """A block that returns its input itself, as a block does that was deleted."""

    def __init__(self, in_a_tuple):
        super().__init__()
        self.in_a_tuple = in_a_tuple

    def forward(self, h, *_, **__):
        return (h,) if self.in_a_tuple else h


class InPlace(nn.Module):
    """A block that writes its output over its input and returns that."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h, *args, **kwargs):
        return h.copy_(self.inner(h.clone(), *args, **kwargs))


def llama(layers):
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config), "model.layers", "model.norm"


def bloom(layers):
    """A norm stands between embedding and blocks: without blocks it makes h_L, and is no part of the read-out."""
    config = transformers.BloomConfig(vocab_size=V, hidden_size=D, n_layer=layers, n_head=2)
    return transformers.BloomForCausalLM(config), "transformer.h", "transformer.ln_f"


def gpt2(layers):
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=layers, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), "transformer.h", "transformer.ln_f"


def by_hand(model, blocks, norm, ids):
    """What each block and the final norm are called with, copied at once."""
    states = []
    watched = [*model.get_submodule(blocks), model.get_submodule(norm)]
    hooks = [m.register_forward_pre_hook(lambda _, args: states.append(args[0].clone())) for m in watched]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(states)


CHANGED = [(n, some) for n in (2, 3) for k in range(1, n + 1) for some in itertools.combinations(range(n), k)]


@pytest.mark.parametrize("make", [llama, bloom, gpt2])
@pytest.mark.parametrize("how", [Idle, InPlace])
def test_a_block_that_returns_its_own_input_gives_right_states_or_is_refused(make, how):
    read, refused = 0, []
    for layers, some in CHANGED:
        torch.manual_seed(0)
        model, blocks, norm = make(layers)
        members = model.eval().get_submodule(blocks)
        if how is InPlace and make is bloom:
            continue  # its blocks return tuples
        for k in some:
            members[k] = Idle(make is bloom) if how is Idle else InPlace(members[k])
        ids = torch.randint(0, V, (2, 9))
        try:
            stream = ResidualStream(model)
        except LensbenchError as error:
            refused.append(str(error))
            continue
        read += 1
        expected = by_hand(model, blocks, norm, ids)
        assert stream.layers == layers, some
        torch.testing.assert_close(stream.forward(ids)[0], expected, msg=f"{layers} layers, {some}")
        kept = torch.stack(stream.graph(ids)[0])
        torch.testing.assert_close(kept, expected, msg=f"graph of {layers} layers, {some}")
    known = ("in place", "does not report its hidden states", "reports its last state twice")
    assert all(any(said in error for said in known) for error in refused)
    assert read >= (0 if how is InPlace else 8)


def test_a_block_that_changes_its_input_in_place_is_refused_by_name():
    model, blocks, _ = llama(3)
    members = model.eval().get_submodule(blocks)
    members[1] = InPlace(members[1])
    with pytest.raises(LensbenchError, match="a block of LlamaForCausalLM changes its input in place"):
        ResidualStream(model)
