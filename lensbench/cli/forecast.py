"""What `lensbench run --dry-run` prints: the stages of a run, finished and to be computed, with what they take."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from lensbench.report.in_width import show_line

if TYPE_CHECKING:
    from lensbench.run.forecast import Forecast
    from lensbench.suite.recipes import Suite


def show_forecast(
    console: Console, suite: "Suite", folder: Path, device: str, only: list[str], probes: list[str]
) -> None:
    """Print what a run into ``folder`` would take on a device."""
    from lensbench.models.pretrained import without_progress_bars
    from lensbench.run.forecast import forecast
    from lensbench.run.suite import check_request
    from lensbench.runtime.environment import choose_device

    at = choose_device(device)
    check_request(suite, only, probes)
    with without_progress_bars():
        found = forecast(suite, folder, device=at, only=tuple(only), probes=tuple(probes))
    console.print(forecast_table(suite, folder, found, at.type))
    for line in (*rate_lines(found, at.type), *busy_lines(found), CAUTION):
        show_line(line, console)


CAUTION = (
    "Predicted from FLOPs and the rates above; trainings and passes of models that are trained here from steps of each. "
    "Searches end where dev says, and a text may hold fewer sequences: expect between half and twice as long. Nothing was "
    "computed or written."
)

BUSY = 0.8
"""Share of the time that this process must get for the machine to count as free"""


def forecast_table(suite: "Suite", folder: Path, found: "Forecast", device: str) -> Table:
    """A row for each stage, and the totals of those that would be computed."""
    gib = 2.0**30
    table = Table(
        Column("stage", no_wrap=True), "", *(Column(name, justify="right") for name in ("seconds", "GiB", "GiB on disk")),
        title=f"{suite.name} in {folder} on {device}: what would run",
    )  # fmt: skip
    for stage in found.stages:
        what = "reused, took" if stage.finished else "predicted"
        sizes = ("", "") if stage.finished else (f"{stage.cost.memory / gib:.1f}", f"{stage.cost.disk / gib:.2f}")
        table.add_row(stage.name, what, duration(stage.seconds), *sizes)
    table.add_section()
    missing = found.missing
    memory = max((stage.cost.memory for stage in missing), default=0.0)
    table.add_row(
        f"{len(missing)} of {len(found.stages)} stages", "predicted", duration(sum(stage.seconds for stage in missing)),
        f"{memory / gib:.1f} at most", f"{sum(stage.cost.disk for stage in missing) / gib:.2f}",
    )  # fmt: skip
    return table


def duration(seconds: float) -> str:
    """Seconds, with minutes or hours next to many."""
    shown = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"
    if seconds < 120:
        return shown
    return f"{shown} ({seconds / 60:.0f} min)" if seconds < 7200 else f"{shown} ({seconds / 3600:.1f} h)"


def busy_lines(found: "Forecast") -> list[str]:
    """Says how much longer it takes next to the other work on this machine, where there is much of it."""
    share = min(rates.at_hand for rates in found.rates.values())
    if share >= BUSY:
        return []
    return [
        f"These are seconds of a free machine. This one is busy: the measurement had the processor for {share:.0%} of its "
        f"time. Next to that work a run takes about {1 / share:.1f} times as long."
    ]


def rate_lines(found: "Forecast", device: str) -> list[str]:
    """A line for each type that models compute in: what was measured of this machine."""
    return [
        f"{device}: models in {dtype} run at {r.model / 1e9:,.0f} GFLOP/s; products of matrices for lenses at "
        f"{r.single / 1e9:,.0f} in float32 and {r.double / 1e9:,.0f} in float64; {r.words / 1e9:.2f} G exponentials/s; "
        f"copies at {r.copied / 1e9:.1f} GB/s"
        for dtype, r in found.rates.items()
    ]
