"""What finished runs say: figures, comparisons, pages, the ruler."""

from pathlib import Path
from typing import Annotated

import typer

from lensbench.cli.app import Debug, answerable, app, console
from lensbench.cli.mistakes import check_places
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show, show_line


@app.command(short_help="Draw a run's figures again from its tables.")
@answerable
def figures(
    folder: Annotated[Path, typer.Argument(help="A run folder; its CSV tables are all that is read.")],
    unverified: Annotated[bool, typer.Option("--unverified", help="Draw tables that changed since the run.")] = False,
    format: Annotated[
        list[str] | None, typer.Option(help="png (default), pdf or svg; repeat it for several.", show_default=False)
    ] = None,
    dpi: Annotated[int, typer.Option(min=50, max=1200, help="Dots per inch of PNG.")] = 150,
    columns: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="As wide as 1 or 2 columns of a paper (3.35, 6.9 inches), letters of 6 to 8 points. Default: for a screen.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for them; default FOLDER/figures.", show_default=False),
    ] = None,
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Draw this figure alone; repeat it for several. Default: all.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Redraw a run's figures from its CSV tables alone; the same tables give the same bytes."""
    from lensbench.report.figures.draw import check_drawing, draw_figures
    from lensbench.results.folder import read_run, refuse_no_folder

    formats = list(dict.fromkeys(format or ["png"]))
    check_drawing(figure, formats, dpi, columns)
    refuse_no_folder(folder)
    to = out or folder / "figures"
    check_places({}, {"--out": to})
    tables = read_run(folder, need_manifest=False, verify=not unverified)
    for path in draw_figures(tables, to, formats=formats, dpi=dpi, columns=columns, names=figure):
        show_line(str(path), console)


@app.command(short_help="Write the light form of a run.")
@answerable
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of its light form; an earlier one is replaced.")],
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Draw this figure into FOLDER/figures; repeat it. Default: none.", show_default=False),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Join clusters at random until N are left, 64 or more. Default: as the run.", show_default=False
        ),
    ] = None,
    no_sums: Annotated[
        bool, typer.Option("--no-sums", help="Leave out what only `lensbench compare` reads: most of the bytes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write the light form of a run: tables, sums by cluster, manifest. Other commands read it as they read a run.

    Of a sweep and of a study the tables are written, of `lensbench transfer-between` means over layers (--figure between).
    """
    from lensbench.report.export import export_run

    check_places({}, {"FOLDER": to})
    for path in export_run(folder, to, figures=figure or [], groups=groups, sums=not no_sums):
        show_line(f"removed: {path}", console)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    show_line(f"{to}: {size / 1e6:.2f} MB", console)


@app.command(short_help="Compare runs: reproduced, or what differs?")
@answerable
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; the first is what the others are held against.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all values and differences here, as CSV.", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures of all models together into this folder.", show_default=False)
    ] = None,
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Draw this figure alone; repeat it for several. Default: all.", show_default=False),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Judge by the rule of this suite; default: the first folder's own.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page of all models and what differs here.", show_default=False),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every table of the runs and every value, too.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare models across run folders: is it the same run again, and what differs?

    The first line answers. Then come one table of all models (the ruler), what differs, and the claims of the suite, all
    corrected together (Holm). Differences are paired where the same text was scored, over seeds by seed; where they are not,
    the note of a row says why. Folders with different models of one suite are read as one run. One rule judges all models.
    """
    from lensbench.report.compare import compare_runs
    from lensbench.report.comparison import print_comparison
    from lensbench.report.figures.draw import check_drawing, draw_figures
    from lensbench.report.joining import together

    if figure and figures is None:
        raise LensbenchError("--figure names figures to draw: say where with --figures FOLDER")
    check_drawing(figure)
    check_places({"--out": out, "--html": html}, {"--figures": figures})
    judge = None
    if rule is not None:
        from lensbench.suite.files import load_suite

        judge = load_suite(rule).verdict
    comparison = compare_runs(folders, judge)
    if out is not None:
        comparison.write(out)
    if figures is not None:
        draw_figures(together(comparison.runs), figures, names=figure)
    if html is not None:
        from lensbench.report.page import write_comparison

        write_comparison(comparison, html)
    print_comparison(comparison, console, everything=everything)
    if html is not None:
        show_line(f"Page: {html}", console)


@app.command(short_help="One HTML page of a run.")
@answerable
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; what is shown is read from them alone.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the page here; default report.html in the first folder.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: ruler, verdicts, heatmaps, curves, sortable tables, settings, how to run it again."""
    from lensbench.report.page import write_page
    from lensbench.results.folder import PAGE, refuse_no_folder

    for folder in folders:
        refuse_no_folder(folder)
    path = out or folders[0] / PAGE
    check_places({"--out": path}, {})
    write_page(folders, path)
    show_line(str(path), console)


@app.command(short_help="All models of several runs in one table, side by side.")
@answerable
def ruler(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, of texts and of images.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plane here, as PNG.", show_default=False)
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Judge by the rule of this suite; default: the first folder's own.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Verdicts and indices of all models of several runs in one table (the ruler): side by side, not compared.

    Models of other data and sizes differ in more than one thing; `compare` is for those that share both.
    """
    from lensbench.report.compare import side_by_side
    from lensbench.report.terminal import ruler_table

    check_places({"--out": out}, {})
    judge = None
    if rule is not None:
        from lensbench.suite.files import load_suite

        judge = load_suite(rule).verdict
    beside = side_by_side(folders, judge)
    if out is not None:
        from lensbench.report.figures.draw import draw_plane

        draw_plane(beside, out)
    show(ruler_table(beside), console)
    if out is not None:
        show_line(str(out), console)


@app.command(short_help="The decomposition at other tolerances, metrics and units.")
@answerable
def settings(
    folders: Annotated[list[Path], typer.Argument(help="Run folders with an update decomposition.")],
    index: Annotated[str, typer.Option(help="An index of the decomposition.")] = "in_place_without_layer0",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write both tables into this folder as CSV.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """An index of the update decomposition at other tolerances, metrics and units, and where its uncertainty comes from."""
    from lensbench.report.compare import read_distinct
    from lensbench.report.settings import doubt_frame, settings_frame, settings_tables
    from lensbench.results.folder import write_csv

    check_places({}, {"--out": out})
    runs = read_distinct(folders)
    frame, doubt = settings_frame(runs, index), doubt_frame(runs, index)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in (("settings.csv", frame), ("doubt.csv", doubt)):
            write_csv(out / name, table)
    for shown in settings_tables(frame, doubt):
        show(shown, console, keys=2)


@app.command(short_help="How indices change as tokens or parameters double.")
@answerable
def trends(
    folders: Annotated[list[Path], typer.Argument(help="Run folders of models that differ in size, or in training.")],
    index: Annotated[
        list[str] | None,
        typer.Option(help="An index, or 'PROBE: QUANTITY'; repeat it. Default: all are tested, the main ones shown."),
    ] = None,
    series: Annotated[
        list[str] | None,
        typer.Option(help="Models of different sizes whose names do not say so; repeat it for several series."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write trends.csv and trend_points.csv here.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw each index over tokens and over parameters here.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every index.")] = False,
    debug: Debug = False,
) -> None:
    """How much does each index change as training tokens or parameters double?

    Series are the checkpoints (or revisions) of a model, and models whose names differ in a size alone. Slopes have
    intervals over seeds, of one seed over documents; p is corrected (Holm) over the indices of a series.
    """
    from lensbench.report.trends import draw_trends, shown_indices, trend_tables, trends_of
    from lensbench.results.folder import write_csv

    check_places({}, {"--out": out, "--figures": figures})
    named = [[name.strip() for name in several.split(",")] for several in series or ()]
    found = trends_of(folders, indices=index or (), named=named)
    shown = shown_indices(found, index or (), everything)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in (("trends.csv", found.table), ("trend_points.csv", found.points)):
            write_csv(out / name, table)
    for one in trend_tables(found, shown):
        show(one, console, keys=2)
    for path in draw_trends(found, shown, figures) if figures is not None else ():
        show_line(str(path), console)
