"""Training steps of the predictive-coding LM beside the GPT of equal size: ``python -m benchmarks.speed.predictive_coding``.

Tokens per second of forward, loss and backward (no optimiser), rounds of all models taken in turn; the FLOPs of the matrix
products that a token needs (counted by torch, not by us), and with them the share of this machine's matmul rate. An error
costs two products with the embedding for each layer and token, 4 d V FLOPs, and as many again where it is differentiated.
Also the linear kernel's chunked form beside all pairs of tokens, by length.
"""

import platform
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.speed.task import matmul_rate, now, numbers_of, refusals, say, use_threads, write_description
from lensbench.errors import LensbenchError
from lensbench.models import build, count_parameters
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingLayer
from lensbench.runtime.environment import git_revision, versions
from lensbench.runtime.files import write_atomically

BASELINE = "gpt-conv"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("gpt-conv", {}),
    "gpt2": ("gpt2", {}),
    "pc": ("predictive-coding", {"error_gradient": False}),
    "pc, error differentiated": ("predictive-coding", {}),
    "pc, linear kernel": ("predictive-coding", {"error_gradient": False, "kernel": "linear"}),
    "pc, softmax kernel": ("predictive-coding", {"error_gradient": False, "kernel": "softmax"}),
    "pc, relaxed": ("predictive-coding", {"error_gradient": False, "relaxed": True}),
    "pc, cheap error": ("predictive-coding", {"error": "linear"}),
    "pc, no error": ("predictive-coding", {"error": "none"}),
}
PARAMETERS = {128: 1_800_000, 256: 5_900_000, 512: 21_000_000}
"""Of models of six layers at a vocabulary of 4096: MLPs of about four times the width, as GPTs have them."""


def step(model: PreTrainedModel, ids: torch.Tensor, half: bool) -> None:
    """One forward pass, loss and backward pass on windows ``ids`` [B, T]; ``half``: products in bfloat16."""
    with torch.autocast(ids.device.type, torch.bfloat16) if half else nullcontext():
        loss = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    torch.nn.functional.cross_entropy(loss, ids[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/predictive-coding"),
    widths: Annotated[str, typer.Option(help="d_model, separated by commas: 128, 256, 512.")] = "128,256",
    vocabulary: Annotated[int, typer.Option(min=2, help="V.")] = 4096,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a step.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each model; the best counts.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    half: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Measure, and write step-training.csv, step-kernel.csv and step.json into OUT."""
    with refusals():
        use_threads(threads)
        revision = git_revision()  # before tables are written: they make the checkout differ
        chosen = numbers_of(widths)
        for width in chosen:
            if width not in PARAMETERS:
                raise LensbenchError(
                    f"no size is declared for d_model {width}; there are {', '.join(map(str, PARAMETERS))}"
                )
        where = torch.device(device)
        training = [row for d in chosen for row in training_rows(d, vocabulary, length, tokens, rounds, where, half)]
        tables = {"step-training.csv": training, "step-kernel.csv": kernel_rows(rounds, where)}
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            write = partial(pd.DataFrame(rows).to_csv, index=False, lineterminator="\n", float_format="%.6g")
            write_atomically(out / name, write)
        described = {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine(),
            "threads": threads, "bfloat16": half, "versions": versions(), "git_revision": revision,
        }  # fmt: skip
        write_description(out, "step", described)


def training_rows(
    width: int, vocabulary: int, length: int, tokens: int, rounds: int, device: torch.device, half: bool
) -> list[dict[str, Any]]:
    """One row per model of this width."""
    shape = {"vocab_size": vocabulary, "d_model": width, "layers": 6, "heads": max(4, width // 64), "context": length}
    built = {
        name: build(family, parameters=PARAMETERS[width], **shape, **settings).to(device).train()  # type: ignore[arg-type]
        for name, (family, settings) in MODELS.items()
    }
    ids = torch.randint(0, vocabulary, (max(1, tokens // length), length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    flops, best = {}, dict.fromkeys(built, float("inf"))
    for name, model in built.items():
        # Attention as plain products: the counter knows no formula of the processor's own kernel. This round allocates, too.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(model, ids, half)
        flops[name] = counter.get_total_flops() / ids.numel()
    rate = matmul_rate(torch.bfloat16 if half else torch.float32, device)
    for _ in range(rounds):
        for name, model in built.items():
            start = now(device)
            step(model, ids, half)
            best[name] = min(best[name], now(device) - start)
    rate = max(rate, matmul_rate(torch.bfloat16 if half else torch.float32, device))
    rows = []
    for name, model in built.items():
        speed = ids.numel() / best[name]
        row = {"model": name, "d_model": width, "vocab_size": vocabulary, "length": length, "tokens": ids.numel()}
        row |= {"parameters": count_parameters(model), "tokens_per_second": speed}
        row |= {"of_baseline": best[BASELINE] / best[name], "mflop_per_token": flops[name] / 1e6}
        row |= {"of_baseline_by_flops": flops[BASELINE] / flops[name], "matmul_gflops": rate / 1e9}
        rows.append(row | {"share_of_matmul": flops[name] * speed / rate})
        say(
            f"d {width}, {name}: {speed:,.0f} tokens/s, {row['of_baseline']:.2f} of {BASELINE}'s "
            f"(by FLOPs {row['of_baseline_by_flops']:.2f}), {rows[-1]['share_of_matmul']:.0%} of the matmul rate"
        )
    return rows


@torch.no_grad()
def kernel_rows(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The linear kernel's update in chunks and from all pairs of tokens, 256 queries at a time, by length."""
    config = PredictiveCodingConfig(hidden_size=128, num_attention_heads=4, kernel="linear")
    layer = PredictiveCodingLayer(config).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = []
    for length in (256, 512, 1024, 2048, 4096):
        u = torch.randn(1, length, 128, device=device)
        query, key = layer.queries_and_keys(u)
        value = torch.randn_like(query)
        whole, parts = layer.carried(query, key, value, None), layer.carried_in_chunks(query, key, value)
        row: dict[str, Any] = {"length": length, "largest_difference": float((whole - parts).abs().max())}
        ways = {
            "quadratic": lambda q=query, k=key, v=value: layer.carried(q, k, v, None),
            "chunked": lambda q=query, k=key, v=value: layer.carried_in_chunks(q, k, v),
        }
        for name, run in ways.items():
            seconds = []
            for _ in range(rounds):
                start = now(device)
                run()
                seconds.append(now(device) - start)
            row[f"{name}_seconds"] = min(seconds)
        gain = row["quadratic_seconds"] / row["chunked_seconds"]
        say(f"linear kernel, {length} tokens: {gain:.1f} times the quadratic form")
        rows.append(row)
    return rows


if __name__ == "__main__":
    typer.run(main)
