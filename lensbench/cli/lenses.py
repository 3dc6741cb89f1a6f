"""Lens files of others next to a model's own lenses."""

from pathlib import Path
from typing import Annotated

import typer

from lensbench.cli.app import Debug, Device, Dtype, Source, answerable, app, console, noted, run_folder
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show, show_line
from lensbench.runtime.bars import Bars


@app.command("compare-lenses", short_help="Lens files side by side with a model's own lenses.")
@answerable
def compare_lenses(
    model: Source,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LENS...]",
            help="A Jacobian lens: FILE.pt or hub:OWNER/NAME/FILE.pt[@REVISION]; a tuned lens: a folder that TunedLens.save "
            "wrote or hub:RESOURCE[@REVISION].",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[str, typer.Option(help="stdlib, file:PATH or hf:NAME[/CONFIG][@SPLIT].")] = "stdlib",
    length: Annotated[int, typer.Option(min=32, help="Tokens of a window.")] = 128,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out windows that all lenses are measured on.")] = 64,
    positions: Annotated[int, typer.Option(min=1, help="Scored positions of each window.")] = 16,
    fit: Annotated[
        int, typer.Option(min=0, help="Windows that our own tuned and shared lenses are fitted to; 0: none are.")
    ] = 96,
    jacobian: Annotated[
        int, typer.Option(min=0, help="Prompts of our own Jacobian lens, 2 or more; 0: it is not estimated.")
    ] = 0,
    refine: Annotated[int, typer.Option(min=0, help="Passes of refining our own lenses on KL.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn at random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the table; default runs/compare-lenses.", show_default=False),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """KL, cross-entropy, top-1 and top-10 precision of anybody's lenses, on the same held-out tokens as our own."""
    from lensbench.data.sources import refuse_missing, sources_of
    from lensbench.models.pretrained import check_source, load_pretrained, locate, without_progress_bars
    from lensbench.report.lens_comparison_tables import lens_comparison_tables
    from lensbench.run.lens_comparison import TABLE, LensComparison, text_of
    from lensbench.run.lens_comparison import compare_lenses as compared
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.runtime.hub import HERE, LENSES_HERE, TEXTS_HERE, lens_is_cached, refuse_unreachable

    if jacobian == 1 or (jacobian and not fit):
        raise LensbenchError("--jacobian needs at least 2 prompts, and --fit above 0 where they are taken from")
    if refine and not fit:
        raise LensbenchError("--refine refines our own lenses, and --fit 0 fits none: give --fit 1 or more")
    of_device, of_dtype = choose_device(device), dtype_named(dtype)
    check_source(model)
    refuse_unreachable(model, HERE)
    refuse_missing(corpus)
    for source in sources_of(corpus):
        refuse_unreachable(source, TEXTS_HERE)
    for lens in files or ():
        refuse_unreachable(lens, LENSES_HERE, held=lens_is_cached(lens))
    folder = run_folder(out, "compare-lenses")
    recipe = LensComparison(
        tuple(files or ()), corpus, length, sequences, positions, fit, jacobian, refine_passes=refine, seed=seed
    )
    with without_progress_bars(), locate(model).reading():
        texts = text_of(model, recipe)  # first: a text that is too short is found before minutes of loading
        loaded = load_pretrained(model, dtype=of_dtype, device=of_device, say=noted)
    with Bars() as bars:
        found = compared(loaded, recipe, texts, Path(folder), progress=bars)
    for table in lens_comparison_tables(found.table):
        show(table, console)
    noted("* behind the logit lens, beyond the 95 % interval of the difference over documents")
    for note in found.notes:
        noted(note)
    show_line(f"Table with intervals: {folder / TABLE}", console)
