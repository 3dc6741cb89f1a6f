"""States of a model at the positions that a stage looks at."""

import time

from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.run.context import Context
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture, capture
from lensbench.streams.kl import choose_product_dtype
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream


def captured_states(
    context: Context,
    stream: ResidualStream,
    samples: Samples,
    *,
    name: str,
    constant: Tensor | None = None,
    rotation: RotatedView | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Capture, ReadOut]:
    """One pass over the samples (this process's share of them), and the read-out to score its states with.

    The read-out is the stream's own. On a GPU it makes the products of log-partitions in bfloat16 where these states show
    that bfloat16 agrees with float32; the stream's read-out stays as it is.
    """
    start = time.perf_counter()
    with context.progress.task(name, len(samples), "inputs") as task:

        def report(done: int, _: int) -> None:
            rate = done * samples.positions_read / (time.perf_counter() - start)
            task.update(done, f"{rate:,.0f} {context.unit}s/s")

        captured = capture(
            stream, samples, constant=constant, memory_gib=context.suite.fit.memory_gib, report=report, ranks=ranks
        )
    # Judged on what lenses at every layer may hand the head, the first layers' logit lens being the hardest.
    sample = captured.states[:, : max(1, 2048 // len(captured.states))].flatten(0, 1)
    dtype = ranks.told(choose_product_dtype(stream.readout, stream.readout.final_norm(sample)))
    if dtype is not None:
        context.progress.say(f"log-partitions in {str(dtype).removeprefix('torch.')}, which agrees with float32 here")
    readout = stream.readout.with_products_in(dtype)
    return captured if rotation is None else rotation.apply(captured), readout
