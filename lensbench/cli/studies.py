"""Studies that need no suite: calibration, tasks in context, regression in context."""

from enum import StrEnum
from typing import Annotated

import typer

from lensbench.cli.app import Debug, Device, Out, answerable, app, console, run_folder
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show, show_line
from lensbench.runtime.bars import Bars


class Only(StrEnum):
    """Sets of families of a calibration of the update decomposition."""

    tune = "tune"
    held_out = "held_out"
    uneven = "uneven"


@app.command(short_help="How often verdicts and intervals are right on known answers.")
@answerable
def calibrate(
    name: Annotated[str, typer.Argument(help="Name of a calibration or a TOML file.")] = "calibration",
    out: Out = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Streams that are measured at once; default: one per core.", show_default=False),
    ] = None,
    only: Annotated[
        Only | None,
        typer.Option(help="Measure one set of streams; for update-calibration. Default: all.", show_default=False),
    ] = None,
    up_to: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out wider streams; for update-tokens. Default: none.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure on streams of known answer how often verdicts are wrong and intervals miss, or how many tokens they need."""
    from lensbench.report.calibration_tables import update_calibration_tables, update_tokens_tables
    from lensbench.report.study_tables import calibration_table
    from lensbench.run.studies import calibration_study, update_calibration_study, update_tokens_study
    from lensbench.studies.calibration import Calibration, default_workers
    from lensbench.studies.update_calibration import GROUPS, UpdateCalibration
    from lensbench.studies.update_tokens import UpdateTokens
    from lensbench.suite.files import load_calibration

    chosen = load_calibration(name)
    if only is not None and not isinstance(chosen, UpdateCalibration):
        raise LensbenchError(f"--only is for update-calibration; {chosen.name} measures all of its families")
    if up_to is not None and not isinstance(chosen, UpdateTokens):
        raise LensbenchError(f"--up-to is for update-tokens; {chosen.name} has no widths to choose from")
    folder, workers = run_folder(out, chosen.name), workers or default_workers()
    if isinstance(chosen, UpdateTokens):
        with Bars() as bars:
            written = update_tokens_study(chosen, folder, workers=workers, up_to=up_to, progress=bars)
        tables = update_tokens_tables(written)
    elif isinstance(chosen, Calibration):
        with Bars() as bars:
            _, summary = calibration_study(chosen, folder, workers=workers, progress=bars)
        tables = [calibration_table(summary)]
    else:
        groups = tuple(group for group in GROUPS if only is None or group == only.value)
        with Bars() as bars:
            written = update_calibration_study(chosen, folder, workers=workers, groups=groups, progress=bars)
        tables = update_calibration_tables(written)
    for table in tables:
        show(table, console)
    show_line(f"Tables: {folder}", console)


@app.command("in-context", short_help="How far models stay from an exact Bayes predictor.")
@answerable
def in_context(
    name: Annotated[str, typer.Argument(help="Name of a file of tasks, or a TOML file.")] = "in-context",
    out: Out = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Train models on documents whose exact Bayes predictor is known, and measure how far from it they stay."""
    from lensbench.report.study_tables import in_context_tables
    from lensbench.run.studies import in_context_study
    from lensbench.runtime.environment import choose_device
    from lensbench.suite.files import load_in_context

    chosen = load_in_context(name)
    folder = run_folder(out, chosen.name)
    with Bars() as bars:
        written = in_context_study(chosen, folder, device=choose_device(device), progress=bars)
    for table in in_context_tables(written):
        show(table, console)
    show_line(f"Tables and figure: {folder}", console)


@app.command(short_help="Self-attention against gradient steps, on in-context regression.")
@answerable
def regression(
    name: Annotated[
        str, typer.Argument(help="Name of a regression in context, or a TOML file.")
    ] = "in-context-regression",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Train self-attention on in-context linear regression, and hold it against the best-tuned gradient steps."""
    from lensbench.report.study_tables import regression_table
    from lensbench.run.studies import regression_study
    from lensbench.suite.files import load_regression

    chosen = load_regression(name)
    folder = run_folder(out, chosen.name)
    with Bars() as bars:
        table = regression_study(chosen, folder, progress=bars)
    show(regression_table(table), console, keys=2)
    show_line(f"Table and figure: {folder}", console)
