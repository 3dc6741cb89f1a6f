"""The generic read-out holds for every architecture that the documentation lists, and refuses what it cannot read."""

import re
from pathlib import Path

import pytest
import torch
from helpers.architectures import CONFIGS, CONTEXT, D, L, V, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lensbench.errors import LensbenchError
from lensbench.streams.parts import find_parts
from lensbench.streams.stream import ResidualStream

TABLE = Path(__file__).parents[2] / "benchmarks" / "architectures.md"


def documented() -> dict[str, tuple[str, str]]:
    """Architecture -> (read-out, what stands behind the head), from the documentation's table."""
    lines = TABLE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: (module.strip("`"), behind) for name, module, behind in rows[1:]}


def described(stream: ResidualStream) -> tuple[str, str]:
    norm = find_parts(stream.model).readout.final_norm
    names = {module: name for name, module in stream.model.named_modules()}
    parts = [norm] if norm in names else list(norm.children())
    behind = []
    if stream.readout.scale != 1:
        behind.append(f"scale {stream.readout.scale:g}")
    if stream.readout.softcap is not None:
        behind.append(f"soft cap {stream.readout.softcap:g}")
    if stream.readout.bias is not None:
        behind.append("bias")
    return " + ".join(names[p] for p in parts) or "none", ", ".join(behind) or "-"


def test_the_documentation_lists_every_architecture_tested_here() -> None:
    assert set(documented()) == set(CONFIGS)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_reading_out_the_last_state_gives_the_models_own_logits(architecture: str) -> None:
    model = small_model(architecture)
    ids = torch.randint(3, V, (2, CONTEXT // 2), generator=torch.Generator().manual_seed(1))
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == L]
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []

    def keep(into: list[torch.Tensor], value: object) -> None:
        while isinstance(value, list | tuple):
            value = value[0]
        assert isinstance(value, torch.Tensor)
        into.append(value.clone())

    stream = ResidualStream(model)
    for block in lists[0]:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: keep(entered, args or kwargs["hidden_states"]), with_kwargs=True
        )
        block.register_forward_hook(lambda _, args, output: keep(left, output))
    states, logits = stream.forward(ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(stream.readout(states[-1]), expected, rtol=1e-4, atol=1e-5)
    assert states.shape == (L + 1, *ids.shape, D)
    torch.testing.assert_close(states[:-1], torch.stack(entered[:L]))  # what enters block l, copied as it entered
    torch.testing.assert_close(states[-1], left[L - 1])
    assert described(stream) == documented()[architecture]

    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 17])
    some, at = stream.at(ids, rows, columns)
    torch.testing.assert_close(some, states[:, rows, columns])
    torch.testing.assert_close(at, logits[rows, columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite", "mamba"])
def test_half_precision_models_are_read_out_in_float32(architecture: str, dtype: torch.dtype) -> None:
    model = small_model(architecture).to(dtype)
    stream = ResidualStream(model)
    ids = torch.randint(3, V, (2, 16), generator=torch.Generator().manual_seed(1))
    states, logits = stream.forward(ids)
    assert states.dtype in (dtype, torch.float32)  # some keep their stream in float32
    assert stream.readout.weight.dtype == torch.float32
    read = stream.readout(states[-1].float())
    torch.testing.assert_close(
        read, logits.float(), rtol=0, atol=float(logits.abs().max()) * torch.finfo(dtype).eps * 4
    )
    assert next(model.parameters()).dtype == dtype  # the model itself stays as it was


@pytest.mark.parametrize("architecture", ["gemma2", "recurrent_gemma"])
def test_a_soft_cap_is_found_where_small_logits_do_not_show_it(architecture: str) -> None:
    model = small_model(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    stream = ResidualStream(model)
    assert stream.readout.softcap == 30.0
    assert stream.readout.scale == 1.0


def test_a_soft_cap_is_found_whatever_the_config_says() -> None:
    model = small_model("gemma2")
    inner = model.forward

    def doubled(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 10)
        return output

    model.config.final_logit_softcapping = None
    model.forward = doubled
    stream = ResidualStream(model)
    assert stream.readout.softcap == pytest.approx(5)
    assert stream.readout.scale == pytest.approx(0.5)


def test_blocks_are_found_by_what_they_return() -> None:
    assert find_parts(small_model("gpt2")).blocks == "transformer.h"
    assert find_parts(small_model("opt")).blocks == "model.decoder.layers"


def refused(model: object, reason: str) -> None:
    with pytest.raises(LensbenchError, match=re.escape(reason)):
        ResidualStream(model)  # type: ignore[arg-type]


def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=V, d_model=D, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    refused(AutoModelForSeq2SeqLM.from_config(config), "is an encoder-decoder")


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=4, intermediate_size=64
    )
    refused(AutoModelForCausalLM.from_config(config).eval(), "is not causal")


def test_a_transformation_between_the_blocks_and_the_head_is_refused() -> None:
    config = AutoConfig.for_model(
        "roberta", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=4, intermediate_size=64,
        is_decoder=True,
    )  # fmt: skip
    refused(AutoModelForCausalLM.from_config(config).eval(), "more to the stream after its blocks")


def test_what_is_not_a_scale_or_a_cap_is_refused() -> None:
    model = small_model("llama")
    inner = model.forward

    def squared(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits**2
        return output

    model.forward = squared
    refused(model, "does not give its own logits")


def test_damaged_weights_are_named() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    refused(model, "model.layers.1.mlp.up_proj.weight holds NaN")
