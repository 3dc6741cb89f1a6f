"""The command line: parses, calls, prints."""

import contextlib
import errno
import functools
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from lensbench import __version__
from lensbench.errors import LensbenchError
from lensbench.runtime.bars import Bars, messages
from lensbench.runtime.progress import Quiet

app = typer.Typer(
    name="lensbench",
    help="Does a language model refine one prediction, kept in one representation, layer by layer?\n\n"
    "lensbench trains small models, fits a lens per layer and one lens for all layers, reads every lens "
    "at every layer, and reports indices with intervals beside their nulls.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


# Tables that go to a file or a pipe are not to be folded at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 160)


def say(line: str) -> None:
    messages.print(f"lensbench: {line}", highlight=False, markup=False, soft_wrap=True)


def answerable(command: Callable[..., None]) -> Callable[..., None]:
    """One line and exit code 2 for what a user can mend, 130 for Ctrl-C; a defect of lensbench keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted; finished stages are kept, the same command goes on from there")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read the output wants no more of it; nor is the interpreter to complain when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            rank = int(os.environ.get("RANK", 0))
            if rank:  # what all processes find wrong the first one says, and takes the others with it
                time.sleep(5)
                line = f"process {rank}: {line}"
            say(line)
            raise typer.Exit(2) from error

    return wrapped


def one_line(error: Exception) -> str | None:
    """What to tell a user of an error that they can mend; None for a defect of lensbench."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error) or "os error 28" in str(error):
        return "the disk is full; free some space and run the same command again: finished stages are kept"
    if isinstance(error, LensbenchError):
        return " ".join(str(error).split())
    if "torch" in sys.modules:
        from lensbench.runtime.memory import is_out_of_memory

        if is_out_of_memory(error):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return (
                f"out of memory: {reason}; finished stages are kept; take a device with more memory or a smaller model"
            )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno) if error.errno else error}"
    return None


Out = Annotated[
    Path | None,
    typer.Option(help="Run folder; default runs/SUITE, with the names of --model and --corpus.", show_default=False),
]


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def show_version(asked: bool) -> None:
    if asked:
        console.print(f"lensbench {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """What every command has in common."""


class MayNameACluster(TyperCommand):
    """A command whose ``--ray`` may stand alone: then it is a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for k, word in enumerate(args):
            given.append(word)
            following = args[k + 1] if k + 1 < len(args) else ""
            if word == "--ray" and not (
                following in ("local", "auto") or re.fullmatch(r"(ray://)?[\w.-]+:\d+", following)
            ):
                given.append("local")
        return super().parse_args(ctx, given)


@app.command(cls=MayNameACluster)
@answerable
def run(
    suite: Annotated[str, typer.Argument(help="Name of a suite (see `lensbench models`) or a TOML file.")],
    out: Out = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Run this seed instead of the suite's; tables then hold this seed alone.", show_default=False
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A pretrained model instead of the suite's: hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE, "
            "package:NAME; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="A text instead of the suite's: stdlib, file:PATH or hf:NAME[/CONFIG][@SPLIT]; of a suite of images, "
            "images: digits, folder:PATH or hf:NAME.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run these models alone; repeat it, or separate names by commas.", show_default=False),
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the suite's probes compute these alone, in parts: the others are told where they are finished; "
            "repeat it, or separate names by commas.",
            show_default=False,
        ),
    ] = None,
    max_hours: Annotated[
        float, typer.Option(min=0, help="Refuse a run to a stated precision that is predicted to score for longer.")
    ] = 1.0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Compute on a Ray cluster (pip install 'lensbench[ray]'): HOST:PORT, auto, or, without an address, one on "
            "this machine. The run folder must be one that all its machines share.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a suite: train, fit, transfer, report. A second run reuses what is finished and still fits the settings."""
    from lensbench.run.cluster import Cluster
    from lensbench.run.suite import run_suite
    from lensbench.runtime.environment import choose_device
    from lensbench.runtime.ranks import join_ranks, leave_ranks
    from lensbench.suite.files import load_suite, name_of, on_request, text_name

    chosen = on_request(load_suite(suite), model or [], corpus)
    default = "-".join([chosen.name, *map(name_of, model or []), *([text_name(corpus)] if corpus else [])])
    if seed is not None:
        chosen = chosen.model_copy(update={"seeds": (seed,)})
    names, wanted = ([n for given in several or [] for n in given.split(",") if n] for several in (only, probes))
    folder = out or Path("runs") / default
    start = time.perf_counter()
    ranks = join_ranks()
    if ray is not None and ranks.size > 1:
        raise LensbenchError("give either --ray or torchrun's processes: a Ray cluster starts its own")
    with Bars() if ranks.first else contextlib.nullcontext(Quiet()) as progress:
        finished = run_suite(
            chosen,
            folder,
            device=choose_device(device),
            only=names,
            progress=progress,
            max_hours=max_hours,
            probes=wanted,
            ranks=ranks,
            cluster=None if ray is None else Cluster(ray),
        )
    leave_ranks(ranks)
    if not ranks.first:
        return
    from lensbench.report.terminal import print_run

    print_run(finished, console)
    console.print(f"\n{time.perf_counter() - start:.0f} s. Tables and figures: {folder}", highlight=False)


@app.command()
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
    folder = out or Path("runs") / chosen.name
    with Bars() as bars:
        table = run_sweep(chosen, folder, device=choose_device(device), progress=bars)
    console.print(table.to_string(index=False), highlight=False)


@app.command()
@answerable
def calibrate(
    name: Annotated[str, typer.Argument(help="Name of a calibration or a TOML file.")] = "calibration",
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Streams at once; default: one per core.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure how often verdicts are wrong and intervals miss, on synthetic streams of known answer."""
    from lensbench.report.study_tables import calibration_table
    from lensbench.run.studies import calibration_study
    from lensbench.studies.calibration import default_workers
    from lensbench.suite.files import load_calibration

    chosen = load_calibration(name)
    folder = out or Path("runs") / chosen.name
    with Bars() as bars:
        _, summary = calibration_study(chosen, folder, workers=workers or default_workers(), progress=bars)
    console.print(calibration_table(summary))
    console.print(f"Tables: {folder}", highlight=False)


@app.command("in-context")
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
    folder = out or Path("runs") / chosen.name
    with Bars() as bars:
        written = in_context_study(chosen, folder, device=choose_device(device), progress=bars)
    for table in in_context_tables(written):
        console.print(table)
    console.print(f"Tables and figure: {folder}", highlight=False)


@app.command()
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
    folder = out or Path("runs") / chosen.name
    with Bars() as bars:
        table = regression_study(chosen, folder, progress=bars)
    console.print(regression_table(table))
    console.print(f"Table and figure: {folder}", highlight=False)


@app.command()
@answerable
def figures(
    folder: Annotated[Path, typer.Argument(help="A run folder; its CSV tables are all that is read.")],
    unverified: Annotated[bool, typer.Option("--unverified", help="Draw tables that changed since the run.")] = False,
    format: Annotated[
        list[str] | None, typer.Option(help="png (default), pdf or svg; repeat it for several.", show_default=False)
    ] = None,
    dpi: Annotated[int, typer.Option(help="Dots per inch of PNG, 50 to 1200.")] = 150,
    columns: Annotated[
        int | None,
        typer.Option(
            help="As wide as 1 or 2 columns of a paper (3.35, 6.9 inches), letters of 6 to 8 points. Default: for a screen.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for them; default FOLDER/figures.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Redraw a run's figures from its CSV tables alone; the same tables give the same bytes."""
    from lensbench.report.figures.draw import draw_figures
    from lensbench.results.folder import read_run

    tables = read_run(folder, need_manifest=False, verify=not unverified)
    formats = list(dict.fromkeys(format or ["png"]))
    for path in draw_figures(tables, out or folder / "figures", formats=formats, dpi=dpi, columns=columns):
        console.print(str(path), highlight=False)


@app.command()
@answerable
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; the first is what the others are held against.")],
    out: Annotated[Path | None, typer.Option(help="Write the tidy table here as CSV.", show_default=False)] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures of all models together into this folder.", show_default=False)
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Judge by the rule of this suite; default: the first folder's own.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare models across run folders: one tidy table, differences paired where the same sequences were scored.

    Folders that hold different models of one suite are read as one run. Over seeds, differences are paired by seed, and
    those that the suite declares as claims are corrected together (Holm). All models are judged by one rule.
    """
    from lensbench.report.compare import compare_runs, together
    from lensbench.report.comparison import print_comparison

    judge = None
    if rule is not None:
        from lensbench.suite.files import load_suite

        judge = load_suite(rule).verdict
    comparison = compare_runs(folders, judge)
    if out is not None:
        comparison.write(out)
    if figures is not None:
        from lensbench.report.figures.draw import draw_figures

        draw_figures(together(comparison.runs), figures)
    print_comparison(comparison, console)


@app.command()
@answerable
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; what is shown is read from them alone.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write the page here; default report.html in the first folder.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page: ruler, verdicts, heatmaps, curves, sortable tables, settings, how to run it again."""
    from lensbench.report.page import PAGE, write_page

    path = out or folders[0] / PAGE
    write_page(folders, path)
    console.print(str(path), highlight=False, markup=False)


@app.command()
@answerable
def ruler(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, of texts and of images.")],
    out: Annotated[Path | None, typer.Option(help="Draw the plane here, as PNG.", show_default=False)] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Judge by the rule of this suite; default: the first folder's own.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """All models of several runs on one ruler, whatever they read: side by side, not compared.

    Models of other data and sizes differ in more than one thing; `compare` tells differences of those that share theirs.
    """
    from lensbench.report.compare import side_by_side
    from lensbench.report.terminal import ruler_table

    judge = None
    if rule is not None:
        from lensbench.suite.files import load_suite

        judge = load_suite(rule).verdict
    beside = side_by_side(folders, judge)
    if out is not None:
        from lensbench.report.figures.draw import draw_plane

        draw_plane(beside, out)
    console.print(ruler_table(beside))
    if out is not None:
        console.print(str(out), highlight=False, markup=False)


Source = Annotated[str, typer.Argument(help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME.")]


Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]


@app.command()
@answerable
def bits(
    model: Source,
    text: Annotated[Path, typer.Argument(help="A text file.")],
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window; default 512, or the model's context.", show_default=False),
    ] = None,
    bos: Annotated[
        bool,
        typer.Option(
            help="Put the text behind the beginning- (or end-) of-text token, so that its first token is scored."
        ),
    ] = True,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Read no more than this.", show_default=False)] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """How well a model predicts a text: nats per token and bits per byte, every token scored once."""
    from lensbench.data.reading import read_documents
    from lensbench.data.windows import beginning
    from lensbench.models.likelihood import text_likelihood
    from lensbench.models.pretrained import check_context, context_length, load_pretrained
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.statistics import bootstrap_weights, interval

    documents = read_documents(f"file:{text}", max_bytes)
    if len(documents) != 1:
        raise LensbenchError(f"{text} holds {len(documents)} documents: give one text file")
    loaded = load_pretrained(model, dtype=dtype_named(dtype), device=choose_device(device))
    length = length or min(512, context_length(loaded.model.config) or 512)
    check_context(model, loaded.model.config, length, "set --length to {} or less")
    first = beginning(loaded.tokenizer) if bos else None
    with Bars() as bars:
        tick = bars.stage("scoring", 1, "windows")
        found = text_likelihood(
            loaded.model,
            loaded.tokenizer,
            documents[0].text,
            length=length,
            begin=bos,
            report=lambda done, total: bars.bars.update(bars.tasks["scoring"], completed=done, total=total),
        )
        tick(len(found.nats), "")
    weights = bootstrap_weights(len(found.nats), 2000, 0)
    for name, nats, per in (
        ("nats/token", found.nats, found.tokens),
        ("bits/byte", found.nats / math.log(2), found.bytes),
    ):
        low, high = interval((weights @ nats) / (weights @ per))
        console.print(f"{name}: {nats.sum() / per.sum():.4f} [{low:.4f}, {high:.4f}]", highlight=False, markup=False)
    total = f"{found.tokens.sum()} tokens, {found.bytes.sum()} bytes, {len(found.nats)} windows of {length} tokens"
    console.print(f"{total}; intervals: 95 %, bootstrap over windows", highlight=False, markup=False)
    front = "as it is, so its first token is not scored"
    if first is not None:
        words = loaded.tokenizer
        front = "behind " + str(words.id_to_token(first) if hasattr(words, "id_to_token") else words.decode([first]))
    console.print(f"the text stands {front}", highlight=False, markup=False)


@app.command()
@answerable
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME; with --run a model's name in that run."
        ),
    ],
    text: Annotated[str, typer.Argument(help="The text itself.")],
    lens: Annotated[
        str | None,
        typer.Option(
            help="logit; tuned, shared, shared_bias or tuned_headline (of a run); path:FOLDER of a tuned or shared lens, "
            "hub:RESOURCE of a tuned one. Left out: the run's shared lens, without a run the logit lens.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run folder: its models by name, and the lenses it fitted.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the run's seeds; default: the first.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Show the last so many tokens.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write a page here, as HTML.", show_default=False)] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """What each layer predicts next in a text, through a lens of your choice; prediction errors where a model has them."""
    from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
    from lensbench.models.pretrained import load_pretrained
    from lensbench.report.trace import token_ids, traced, traced_model, words_of
    from lensbench.report.trace_errors import errors_of
    from lensbench.report.trace_page import trace_page
    from lensbench.report.trace_tables import error_tables, trace_tables
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.runtime.files import write_atomically

    if out is not None and out.is_dir():
        raise LensbenchError(f"--out {out} is a folder: name a file, {out / 'trace.html'} say")
    named = traced_model(model, lens, run, seed)
    loaded = load_pretrained(named.model, dtype=dtype_named(dtype), device=choose_device(device))
    trajectory = traced(loaded, text, named.lens, tokens, named.view)
    for table in trace_tables(trajectory, tokens, console.width):
        console.print(table)
    ids, errors, note = token_ids(loaded, text), None, None
    if isinstance(loaded.model, PredictiveCodingForCausalLM):
        try:
            errors = errors_of(loaded.model, ids)
        except LensbenchError as error:
            note = str(error)
            console.print(f"note: {note}", highlight=False, markup=False)
        else:
            words, word = words_of(trajectory, ids.tolist()), words_of(trajectory, [errors.word])[0]
            for part in error_tables(errors, words, word, tokens, console.width):
                console.print(part, highlight=False)
    if out is not None:
        read = "the logit lens" if named.lens is None else f"lens {named.lens.rpartition('/')[2]}"
        page = trace_page(trajectory, title=f"{model}, {read}: {text}", errors=errors, ids=ids.tolist(), note=note)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda partial: partial.write_text(page, encoding="utf-8"))
        console.print(str(out), highlight=False, markup=False)


@app.command()
@answerable
def schema(debug: Debug = False) -> None:
    """What every column of every table means, as Markdown."""
    from lensbench.results.schema import schema_text

    sys.stdout.write(schema_text())


@app.command()
@answerable
def models(debug: Debug = False) -> None:
    """What can be named: suites and their models, sweeps, model families, corpora."""
    from lensbench.data.images import SPECS
    from lensbench.models import FAMILIES
    from lensbench.suite.files import kind_of, named_files, read_toml

    named = Table(
        "name", "models or trials", "question", title="suites, sweeps, calibrations, tasks (benchmarks/*.toml)"
    )
    for name in named_files():
        _, content = read_toml(name)
        _, command = kind_of(content)
        if command == "sweep":
            inside = f"{len(content['trials'])} trials"
        elif command == "calibrate":
            inside = f"{len({*content['tune'], *content['held_out']})} families of synthetic streams"
        elif command == "regression":
            inside = (
                f"{' and '.join(content['attention'])} attention, {' and '.join(map(str, content['layers']))} layers"
            )
        elif command == "in-context":
            inside = ", ".join(c["name"] for c in content["contestants"])
        else:
            inside = ", ".join(m["name"] for m in content["models"])
        named.add_row(name, inside, content["question"])
    console.print(named)
    families = Table("family", "settings", "what it is", title="model families")
    for name, family in FAMILIES.items():
        families.add_row(name, ", ".join(family.settings), family.description)
    console.print(families)
    corpora = "corpora: stdlib, file:PATH (.txt, .jsonl[#FIELD], folder), hf:NAME[/CONFIG][@SPLIT]"
    console.print(corpora, highlight=False, markup=False)
    console.print(f"images: {SPECS}", highlight=False, markup=False)


def main() -> None:
    """Entry point of the ``lensbench`` command."""
    app()


if __name__ == "__main__":
    main()
