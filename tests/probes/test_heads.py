"""What attention heads did, of every architecture: their sum is what the attention wrote, and values belong to tokens."""

import pytest
import torch
from helpers.architectures import CONFIGS, small_model

from lensbench.models import build
from lensbench.probes.tools.heads import check_heads, reading_heads, sets_attention
from lensbench.streams.stream import ResidualStream

WITHOUT = {"mamba", "mamba2", "rwkv", "falcon_mamba", "falcon"}
POSITIONS = {"gpt2", "gpt_neo", "opt", "xglm", "openai-gpt", "opt (post-norm, projected)", "opt (projected)"}
"""Whose states know their position before the first attention."""
IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
IDS[:, 11] = IDS[:, 5]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_heads_of_every_architecture_are_read_or_refused_with_the_reason(architecture):
    model = small_model(architecture)
    before = model.config._attn_implementation
    stream = ResidualStream(model)
    reason = check_heads(stream)
    assert sets_attention(stream)
    assert bool(reason) == (architecture in WITHOUT), reason
    if reason:
        return
    with reading_heads(stream) as heads:
        stream.forward(IDS)
        found = list(heads)
    assert model.config._attn_implementation == before
    assert len({h.layer for h in found}) == len(found)
    assert max(h.layer for h in found) == stream.layers - 1
    first = found[0]
    assert first.weights.shape[1] == first.mixed.shape[1] == len(first.written)
    assert float(first.weights.triu(1).abs().max()) == 0
    if architecture in POSITIONS or first.layer:
        return
    # Behind the first block's attention a token's value is its own, wherever it stands.
    diagonal = first.weights.diagonal(dim1=-2, dim2=-1)
    if float(diagonal.min()) > 1e-2:
        value = torch.linalg.solve_triangular(first.weights.double(), first.mixed.double(), upper=False)
        torch.testing.assert_close(value[:, :, 5], value[:, :, 11], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-conv", "gpt-tied", "gpt-noskip", "predictive-coding"])
def test_what_all_heads_write_is_what_the_attention_adds(family):
    shape = {"vocab_size": 128, "d_model": 32, "layers": 3, "heads": 4, "context": 32, "parameters": 60_000}
    model = build(family, seed=1, **shape).eval()
    added: list[torch.Tensor] = []
    name = {"gpt": "o_proj", "gpt2": "attn.c_proj", "predictive-coding": "layers."}.get(family, "attention_output")
    for path, module in model.named_modules():
        if family == "predictive-coding":
            if path.startswith(name) and path.count(".") == 1:
                module.register_forward_hook(lambda _, __, out: added.append(out[2]))
        elif path.endswith(name):
            bias = getattr(module, "bias", None)
            taken = 0 if bias is None else bias
            module.register_forward_hook(lambda _, __, out, taken=taken: added.append(out - taken))
    stream = ResidualStream(model)
    with reading_heads(stream) as heads, torch.no_grad():
        added.clear()
        stream.forward(IDS)
        found = list(heads)
    # Writing has the hook too, when a unit vector is asked of it: only whole sequences count.
    added = [x for x in added if x.shape[:2] == IDS.shape]
    assert len(found) == len(added) == 3
    assert [h.layer for h in found] == [0, 1, 2]
    for of, total in zip(found, added, strict=True):
        written = torch.einsum("bhtk,hkd->btd", of.mixed, of.written)
        torch.testing.assert_close(written[..., : total.shape[-1]], total, rtol=1e-4, atol=1e-5)


def test_the_delta_rule_is_no_weighted_sum_of_errors():
    model = build(
        "predictive-coding", vocab_size=128, d_model=32, layers=2, heads=4, context=32, parameters=60_000,
        kernel="linear", delta_rule=True,
    ).eval()  # fmt: skip
    assert "delta rule" in check_heads(ResidualStream(model))
