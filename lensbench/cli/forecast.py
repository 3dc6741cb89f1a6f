"""What `lensbench run --dry-run` prints: the stages of a run, finished and to be computed, with what they take."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from lensbench.report.in_width import show_line

if TYPE_CHECKING:
    from lensbench.run.forecast import Forecast, PlannedStage
    from lensbench.suite.recipes import Suite


def show_forecast(
    console: Console,
    suite: "Suite",
    folder: Path,
    device: str,
    only: list[str],
    probes: list[str],
    strict: bool,
    workers: int | None = None,
) -> None:
    """Print what a run into ``folder`` would take on a device."""
    from lensbench.models.pretrained import without_progress_bars
    from lensbench.run.forecast import forecast
    from lensbench.run.suite import check_request
    from lensbench.runtime.environment import choose_device

    at = choose_device(device)
    check_request(suite, only, probes)
    with without_progress_bars():
        found = forecast(
            suite, folder, device=at, only=tuple(only), probes=tuple(probes), strict=strict, workers=workers
        )
    console.print(forecast_table(suite, folder, found, at.type))
    said = side_by_side(found), found.unchecked, rate_lines(found, at.type), busy_lines(found), [CAUTION]
    for line in (line for lines in said for line in lines):
        show_line(line, console)


CAUTION = (
    "Predicted from FLOPs and the rates above; trainings and passes of models that are trained here from steps of each. "
    "Reading texts, tokenizers and baselines are not predicted. Searches end where dev says, and a text may hold fewer "
    "sequences: expect between half and twice as long. Nothing was computed or written."
)

BUSY = 0.8
"""Share of the time that this process must get for the machine to count as free"""


MANY = 30
"""Stages above which those of one kind and model share a row"""

OF_MODEL = re.compile(r"@(?P<checkpoint>[^-]+)|-seed(?P<seed>\d+)(?P<tokens>-\d+)?")
"""What tells stages of one kind and model apart in their names"""


def forecast_table(suite: "Suite", folder: Path, found: "Forecast", device: str) -> Table:
    """A row for each stage, or for each kind of stage and model where there are many; and the totals to be computed."""
    gib = 2.0**30
    table = Table(
        Column("stage", overflow="fold"), *(Column(name, justify="right") for name in ("time", "GiB", "disk")),
        title=f"{suite.name} on {device}: what would run", show_edge=False,
        caption=f"{folder}: GiB in memory, and GiB on disk that a stage leaves; reused stages took so long",
    )  # fmt: skip
    for name, stages in rows_of(found.stages).items():
        took = duration(sum(stage.seconds for stage in stages))
        if stages[0].finished:
            table.add_row(name, took, "", "reused")
        else:
            memory, disk = max(stage.cost.memory for stage in stages), sum(stage.cost.disk for stage in stages)
            table.add_row(name, took, f"{memory / gib:.1f}", f"{disk / gib:.2f}")
    table.add_section()
    missing = found.missing
    table.add_row(
        f"{len(missing)} of {len(found.stages)} stages",
        duration(sum(stage.seconds for stage in missing)),
        f"{max((stage.cost.memory for stage in missing), default=0.0) / gib:.1f}",
        f"{sum(stage.cost.disk for stage in missing) / gib:.2f}",
    )
    return table


def rows_of(stages: "list[PlannedStage]") -> "dict[str, list[PlannedStage]]":
    """The stages of each row, by what it is called; finished ones have rows of their own."""
    if len(stages) <= MANY:
        return {stage.name: [stage] for stage in stages}
    groups: dict[tuple[str, bool], list[PlannedStage]] = {}
    for stage in stages:
        groups.setdefault((OF_MODEL.sub("", stage.name), stage.finished), []).append(stage)
    found: dict[str, list[PlannedStage]] = {}
    for (name, _), group in groups.items():
        counts = [
            f"{len(values)} {what}s"
            for what, key in (("checkpoint", "checkpoint"), ("seed", "seed"), ("budget", "tokens"))
            if len(values := {m[key] for stage in group for m in OF_MODEL.finditer(stage.name) if m[key]}) > 1
        ]
        label = f"{name}: {', '.join(counts)}" if counts else name
        found[label if label not in found else f"{label} (rest)"] = group
    return found


def duration(seconds: float) -> str:
    """Seconds, or minutes or hours where there are many."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def side_by_side(found: "Forecast") -> list[str]:
    """Says what the stages take where several processes compute models at once."""
    if found.at_once == 1 or not found.missing:
        return []
    took = duration(found.side_by_side)
    return [f"{found.at_once} models are computed at once: {took} altogether, with the memory of as many stages."]


def busy_lines(found: "Forecast") -> list[str]:
    """Says how much longer it takes next to the other work on this machine, where there is much of it."""
    share = min(rates.at_hand for rates in found.rates.values())
    if share >= BUSY:
        return []
    return [
        f"These are seconds of a free machine. This one is busy: the measurement had the processor for {share:.0%} of its "
        f"time. Next to that work a run takes about {1 / share:.1f} times as long, and less with OMP_NUM_THREADS=1: threads "
        "wait for one another."
    ]


HALF = "products in float16 at {:,.0f} GFLOP/s: large models are assumed to use them; a run checks that they agree"


def rate_lines(found: "Forecast", device: str) -> list[str]:
    """A line for each type that models compute in: what was measured of this machine."""
    return [
        f"{device}: models in {dtype} run at {r.model / 1e9:,.0f} GFLOP/s; products of matrices for lenses at "
        f"{r.single / 1e9:,.0f} in float32 and {r.double / 1e9:,.0f} in float64; {r.words / 1e9:.2f} G exponentials/s; "
        f"copies at {r.copied / 1e9:.1f} GB/s"
        for dtype, r in found.rates.items()
    ] + ([HALF.format(found.half / 1e9)] if found.half else [])
