"""Lenses of one model of a run on states of another."""

from pathlib import Path
from typing import Annotated

import typer

from lensbench.cli.app import Debug, Device, answerable, app, console, run_folder
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show, show_line
from lensbench.runtime.bars import Bars


@app.command("transfer-between", short_help="Lenses of one model on states of another.")
@answerable
def transfer_between(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="Name of a suite or a TOML file.")],
    run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of its finished run; default runs/SUITE.", show_default=False),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B", help="Two models of the run to transfer between, too; repeat it.", show_default=False
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="The run's --preset, if it had one.", show_default=False)] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A --set that the run had; repeat it.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of table and figure; default runs/SUITE-between.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """What a representation shares with that of another model: lenses of one on states of the other, in nats.

    Checkpoints of a training (no map, and an orthogonal one), seeds (orthogonal and affine) and sizes (affine), each next to
    the map of a random pairing of tokens. Nothing is trained again, and the run's folder stays as it is.
    """
    from lensbench.report.between_tables import between_rows_table
    from lensbench.results.folder import owner_of, refuse_no_folder
    from lensbench.run.between import transfer_between
    from lensbench.runtime.environment import choose_device
    from lensbench.suite.changes import Changes

    chosen = Changes(preset=preset, settings=tuple(setting or ())).of(suite)
    named = [tuple(names.split(",")) for names in pair or []]
    if wrong := [names for names in named if len(set(names)) != 2 or not all(names)]:
        raise LensbenchError(f"--pair {','.join(wrong[0])}: name two models, A,B")
    finished = run or Path("runs") / chosen.name
    if not finished.exists():
        raise LensbenchError(f"there is no folder {finished}: name the folder of a run of {suite} with --run")
    refuse_no_folder(finished)
    if not (finished / "stages").is_dir():
        light = " (`lensbench export` leaves them out)" if (finished / "manifest.json").is_file() else ""
        raise LensbenchError(
            f"{finished} holds no stages of a run{light}: name the folder of a run of {suite} with --run"
        )
    if (owner := owner_of(finished)) not in (None, chosen.name):
        raise LensbenchError(f"{finished} holds a run of {owner}, not of {chosen.name}: name its own with --run")
    folder = run_folder(out, f"{chosen.name}-between")
    with Bars() as bars:
        table = transfer_between(
            chosen, finished, folder, device=choose_device(device), named=[(a, b) for a, b in named], progress=bars
        )
    show(between_rows_table(table), console, keys=2)
    show_line(f"Table and figure: {folder}", console)
