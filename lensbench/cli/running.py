"""Run a suite or a sweep."""

import contextlib
import gc
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lensbench.cli.app import Debug, Device, Out, Strict, answerable, app, console, run_folder
from lensbench.cli.forecast import show_forecast
from lensbench.cli.mistakes import USAGE, PlainCommand
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show_line
from lensbench.runtime.bars import Bars
from lensbench.runtime.processes import import_ahead
from lensbench.runtime.progress import Quiet
from lensbench.suite.shipped import asks_for_several


class MayNameACluster(PlainCommand):
    """A command whose ``--ray`` may stand alone: then it is a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with ``local`` after a ``--ray`` that stands alone."""
        given, odd = [], ""
        for k, word in enumerate(args):
            given.append(word)
            following = args[k + 1] if k + 1 < len(args) else ""
            if word == "--ray" and not (
                following in ("local", "auto") or re.fullmatch(r"(ray://)?[\w.-]+:\d+", following)
            ):
                given.append("local")
                odd = following
        try:
            return super().parse_args(ctx, given)
        except USAGE as error:
            if odd and not odd.startswith("-") and f"({odd})" in str(error):
                raise typer.BadParameter(
                    f"{odd} is no address of a cluster: give HOST:PORT, auto, or no address for one on this machine",
                    param_hint="--ray",
                ) from error
            raise


RunFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Run folder; default runs/SUITE, followed by what other options change.",
        show_default=False,
    ),
]


Seed = Annotated[
    int | None,
    typer.Option(
        min=0, help="Run this seed instead of the suite's; tables then hold this seed alone.", show_default=False
    ),
]


Models = Annotated[
    list[str] | None,
    typer.Option(
        help="A pretrained model instead of the suite's: hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE, "
        "package:NAME; repeat it for several.",
        show_default=False,
    ),
]


Corpus = Annotated[
    str | None,
    typer.Option(
        help="A text instead of the suite's: stdlib, file:PATH, hf:NAME[/CONFIG][@SPLIT] or package:NAME, several joined "
        "by ' + '; of a suite of images, images: digits, folder:PATH or hf:NAME.",
        show_default=False,
    ),
]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of the suite, checked like its file: fit.sequences=128, update.tolerances=[0,0.01], "
        "models.NAME.dtype=bfloat16. Repeat it for several.",
        show_default=False,
    ),
]


Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="At most so many sequences in each of the fit, dev and eval splits (fit.sequences, fit.dev_sequences, "
        "evaluate.sequences), 64 or more. Models are trained as before.",
        show_default=False,
    ),
]


Preset = Annotated[
    str | None,
    typer.Option(
        help="How much of a suite of pretrained models runs: glance (the first answer), default (its file as it is) or "
        "full, as the tables [presets.NAME] of its file say.",
        show_default=False,
    ),
]


Only = Annotated[
    list[str] | None,
    typer.Option(help="Run only these models; repeat it, or separate names by commas.", show_default=False),
]


Probes = Annotated[
    list[str] | None,
    typer.Option(
        help="Compute only these of the suite's probes; finished results of other probes are still reported. Repeat it, "
        "or separate names by commas.",
        show_default=False,
    ),
]


MaxHours = Annotated[
    float,
    typer.Option(
        min=0, help="Refuse to start where scoring is predicted to take longer; for suites that set evaluate.precision."
    ),
]


Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Compute on a Ray cluster (pip install -e '.[ray]'): HOST:PORT, auto, or, without an address, one on "
        "this machine. The run folder must be one that all its machines share.",
        show_default=False,
    ),
]


Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Compute so many models at once on the CPU, each in a process of its own; default: as the suite says.",
        show_default=False,
    ),
]


DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the stages that would run and those that are finished, with predicted seconds, memory and disk on this "
        "machine; compute and write nothing. Refuses a text that is too short. Of pretrained models config and tokenizer "
        "are read, no weights.",
    ),
]


def names_in(option: str, given: list[str] | None) -> list[str]:
    """The names that a repeated option has, which may be separated by commas; refuses one that names nothing."""
    if empty := [value for value in given or () if not value.replace(",", "").strip()]:
        raise LensbenchError(f"{option} {empty[0]!r} names nothing: give a name, or leave {option} out")
    return [name.strip() for value in given or () for name in value.split(",") if name.strip()]


@app.command(cls=MayNameACluster, short_help="Run a suite: train or load models, fit lenses, measure, report.")
@answerable
def run(
    suite: Annotated[str, typer.Argument(help="Name of a suite (see `lensbench models`) or a TOML file.")],
    out: RunFolder = None,
    seed: Seed = None,
    model: Models = None,
    corpus: Corpus = None,
    device: Device = "auto",
    only: Only = None,
    probes: Probes = None,
    max_hours: MaxHours = 1.0,
    ray: Ray = None,
    workers: Workers = None,
    preset: Preset = None,
    limit: Limit = None,
    setting: Set = None,
    dry_run: DryRun = False,
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Train or load a suite's models, fit lenses, measure, report. Finished work that fits the settings is reused."""
    import_modules(suite, workers, apart=dry_run or ray is not None)
    from lensbench.run.cluster import Cluster
    from lensbench.run.suite import run_suite
    from lensbench.runtime.environment import choose_device
    from lensbench.runtime.ranks import join_ranks, leave_ranks
    from lensbench.suite.changes import Changes

    changes = Changes(preset, tuple(model or ()), corpus, limit, tuple(setting or ()), seed)
    chosen = changes.of(suite)
    default = changes.folder_name(chosen)
    names, wanted = names_in("--only", only), names_in("--probes", probes)
    folder = run_folder(out, default)
    if dry_run:
        show_forecast(console, chosen, folder, device, names, wanted, strict, workers)
        return
    again = [("--only", names), ("--probes", wanted), ("--device", [device] * (device != "auto"))]
    again += [("--workers", [] if workers is None else [str(workers)])]
    again += [("--ray", [ray] if ray else []), ("--max-hours", [f"{max_hours:g}"] * (max_hours != 1))]
    command = changes.command(suite, folder, again)
    start = time.perf_counter()
    ranks = join_ranks()
    on = choose_device(device)  # of several processes each has its own
    refuse_other_processes(ray, workers, ranks.size)
    with Bars() if ranks.first else contextlib.nullcontext(Quiet()) as progress:
        finished = run_suite(
            chosen,
            folder,
            device=on,
            only=names,
            progress=progress,
            max_hours=max_hours,
            probes=wanted,
            ranks=ranks,
            cluster=None if ray is None else Cluster(ray),
            workers=workers,
            options=changes.options(),
            command=command,
            strict=strict,
        )
    leave_ranks(ranks)
    if not ranks.first:
        return
    from lensbench.report.terminal import print_run

    print_run(finished, console)
    everything = changes.command(suite, folder, [option for option in again if option[0] != "--only"])
    for line in left_out_lines(finished.manifest.left_out, everything):
        show_line(line, console)
    took = f"{time.perf_counter() - start:.0f} s. Tables and figures: {folder}"
    show_line(took, console)


def import_modules(suite: str, workers: int | None, apart: bool) -> None:
    """Import what a run needs.

    Where several models are computed at once, a process from which theirs are forked begins to import, too. With ``apart``
    nothing is computed on this machine's processes, and it is not started.
    """
    if not apart and (asks_for_several(suite) if workers is None else workers > 1):
        import_ahead("lensbench.run.workers", "lensbench.report.figures.draw")
    gc.disable()  # modules stay: looking for garbage among them takes a sixth of the time
    try:
        import lensbench.run.suite  # noqa: F401
    finally:
        gc.enable()


def refuse_other_processes(ray: str | None, workers: int | None, ranks: int) -> None:
    """Raise :class:`LensbenchError` where more than one way of computing with several processes is asked for."""
    if ray is not None and ranks > 1:
        raise LensbenchError("give either --ray or torchrun's processes: a Ray cluster starts its own")
    if workers is not None and (ray is not None or ranks > 1):
        raise LensbenchError("--workers is for processes of this machine alone: leave out --ray and torchrun")


def left_out_lines(left_out: dict[str, str], command: str) -> list[str]:
    """What a run says of models that it leaves out, with the reason; ``command`` runs all of them."""
    from lensbench.run.suite import NOT_ASKED

    on_purpose = [name for name, reason in left_out.items() if reason == NOT_ASKED]
    lines = [f"note: model {name} is left out: {reason}" for name, reason in left_out.items() if name not in on_purpose]
    if on_purpose:
        lines.append(f"note: not run, as --only asks: {', '.join(on_purpose)}. All models: {command}")
    return lines


@app.command(short_help="Try equally many settings of each model of a suite.")
@answerable
def sweep(
    name: Annotated[str, typer.Argument(help="Name of a sweep or a TOML file.")],
    out: Out = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Try the declared settings of a suite's models, equally many for each, and mark the best on the dev split."""
    from lensbench.run.sweep import run_sweep
    from lensbench.runtime.environment import choose_device
    from lensbench.suite.files import load_sweep

    chosen = load_sweep(name)
    folder = run_folder(out, chosen.name)
    with Bars() as bars:
        table = run_sweep(chosen, folder, device=choose_device(device), progress=bars)
    console.print(table.to_string(index=False), highlight=False)
