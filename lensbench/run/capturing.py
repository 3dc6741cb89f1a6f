"""States of a model at the positions that a stage looks at, computed once for all stages of the model and seed."""

import shutil
import time
from dataclasses import replace
from functools import partial

from filelock import FileLock
from torch import Tensor

from lensbench.data.samples import Samples, fingerprint_of
from lensbench.run.context import CODE_VERSION, Context, digest_of
from lensbench.run.origin import Origin
from lensbench.runtime.memory import in_units, release_memory
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.streams.capture import Capture, capture
from lensbench.streams.kept import STATES, keep, kept, mapped_file
from lensbench.streams.products import products_for
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream

KEPT = "states"
"""Folder of kept captures in a run folder: one folder for each, named by its key"""

CAPTURE_FORMAT = 1
"""Raised when captures hold something else, so that older ones are not read"""


def captured_states(
    context: Context,
    stream: ResidualStream,
    samples: Samples,
    *,
    name: str,
    origin: Origin | None = None,
    constant: Tensor | None = None,
    rotation: RotatedView | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Capture, ReadOut]:
    """States and predictions of the samples (this process's share of them), and the read-out to score its states with.

    Those of one process are kept on disk for the next stage that asks for the same samples of the same ``origin``.
    Without an origin, and with several ``ranks``, the model passes over the samples each time.

    The read-out is the stream's own. It makes the products of log-partitions in half precision where that is faster and
    these states show that it agrees with float32; the stream's read-out stays as it is.
    """
    start = time.perf_counter()
    with context.progress.task(name, len(samples), "inputs") as task:

        def report(done: int, _: int) -> None:
            rate = done * samples.positions_read / (time.perf_counter() - start)
            task.update(done, f"{rate:,.0f} {context.unit}s/s")

        whole = (
            stream.whole() if origin is not None and ranks.size == 1 and shows_more(context, stream, origin) else stream
        )
        passed = partial(capture, whole, samples, constant=constant, report=report)
        memory_gib = context.suite.fit.memory_gib
        if origin is None or ranks.size > 1:
            captured = passed(memory_gib=memory_gib, ranks=ranks)
        else:
            store = KeptCaptures(context, origin, whole)
            with store.alone(samples, constant):
                found = store.find(samples, constant)
                if found is None:
                    captured = store.capture(passed, samples, constant, memory_gib)
                else:
                    captured = found
                    task.update(len(samples), "kept by an earlier stage")
            if whole is not stream:
                captured = replace(captured, states=captured.states[..., : stream.d_model])
    release_memory()  # passes of a model leave much that is free
    allowed = context.suite.evaluate.half_products
    products = ranks.told(products_for(stream.readout, captured.states) if allowed else None)
    if products is not None:
        context.say_once(f"log-partitions use {products} (they agree with float32 on these states)")
    readout = stream.readout.with_products(products)
    return captured if rotation is None else rotation.apply(captured), readout


def shows_more(context: Context, stream: ResidualStream, origin: Origin) -> bool:
    """Whether another view of the same model is computed that shows the whole state: one pass then serves both."""
    views = {model.view for model in context.computed if context.suite.trained(model).name == origin.name}
    return stream.view != "state" and "state" in views


class KeptCaptures:
    """The captures of a run that are on disk.

    They are there while the stages of a model need them: those of another model are removed when this one's are made, all
    of them at the end of the run (:func:`forget_captures`). An interrupted run leaves them to the next one. A capture that
    would take more than half of the free disk is not kept.
    """

    def __init__(self, context: Context, origin: Origin, stream: ResidualStream):
        self.context, self.origin, self.stream = context, origin, stream
        self.root = context.folder / KEPT

    def key(self, samples: Samples, constant: Tensor | None) -> str:
        """Digest of all that a capture depends on."""
        key = {
            "model": self.origin.digest,
            "view": self.stream.view,
            "samples": samples.fingerprint,
            "length": self.context.suite.length,
            "constant": None if constant is None else fingerprint_of([constant.cpu().numpy()], ()),
            "device": self.context.device.type,
            "code": CODE_VERSION,
            "format": CAPTURE_FORMAT,
            **({"passes": "float16"} if self.stream.half is not None else {}),
        }
        return digest_of(key)[:24]

    def alone(self, samples: Samples, constant: Tensor | None) -> FileLock:
        """No other process looks for this capture, or makes it, meanwhile: two may compute stages of one model at once."""
        self.root.mkdir(parents=True, exist_ok=True)
        return FileLock(self.root / f"{self.key(samples, constant)}.lock")

    def find(self, samples: Samples, constant: Tensor | None) -> Capture | None:
        """The capture of these samples, if it is there and whole."""
        key = self.key(samples, constant)
        found = kept(self.root / key, self.stream.device)
        if found is not None:
            self.context.cache.captures[key] = self.origin.name
        return found

    def capture(
        self, passed: "partial[Capture]", samples: Samples, constant: Tensor | None, memory_gib: float
    ) -> Capture:
        """A pass over the samples; what it gives is kept, if there is room."""
        self.forget_others()
        size = 4 * (self.stream.layers + 1) * int(samples.valid.sum()) * self.stream.d_model
        free = shutil.disk_usage(self.context.folder).free
        if size > free / 2:
            self.context.say_once(
                f"states of {self.origin.name} take {in_units(size)}, more than half of the {in_units(free)} "
                f"free in {self.context.folder}: they are not kept, each stage computes them again",
            )
            return passed(memory_gib=memory_gib)
        key = self.key(samples, constant)
        folder, partial_folder = self.root / key, self.root / f"{key}.partial"
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        if self.stream.device.type == "cpu":
            captured = passed(room=partial(mapped_file, partial_folder / STATES))
        else:
            captured = passed(memory_gib=memory_gib)
        keep(captured, partial_folder)
        partial_folder.replace(folder)
        self.context.cache.captures[key] = self.origin.name
        return captured

    def forget_others(self) -> None:
        """Remove the captures of other models that this process has made or read."""
        known = self.context.cache.captures
        for key in [key for key, model in known.items() if model != self.origin.name]:
            shutil.rmtree(self.root / key, ignore_errors=True)
            del known[key]


def forget_own_captures(context: Context) -> None:
    """Remove the captures that this process has made or read: no task that is still to begin reads them.

    A process that reads them meanwhile keeps what it has mapped.
    """
    for key in context.cache.captures:
        with FileLock(context.folder / KEPT / f"{key}.lock"):
            shutil.rmtree(context.folder / KEPT / key, ignore_errors=True)
    context.cache.captures.clear()


def forget_captures(context: Context) -> None:
    """Remove all kept captures: the run is finished, or starts over."""
    shutil.rmtree(context.folder / KEPT, ignore_errors=True)
    context.cache.captures.clear()
