"""The command ``lensbench`` itself: options that commands share, and what becomes of their errors."""

import errno
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from typer.models import ArgumentInfo, CommandFunctionType

from lensbench import __version__
from lensbench.cli.mistakes import OneLineGroup, PlainCommand, check_place, say
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show_line

VALUES: dict[type, str] = {int: "N", float: "X", Path: "PATH", str: "NAME"}
"""The type of a value -> what stands for it on a help page, in place of Python's name of the type"""

NAMED = {
    "model": "MODEL", "only": "MODEL", "corpus": "TEXT", "device": "DEVICE", "dtype": "TYPE", "preset": "PRESET",
    "probes": "PROBE", "rule": "SUITE", "index": "INDEX", "figure": "FIGURE", "format": "FORMAT", "lens": "LENS",
    "suite": "SUITE", "figures": "FOLDER", "run": "FOLDER", "html": "FILE", "series": "MODEL,MODEL,...",
    "workers": "N",
}  # fmt: skip
"""The name of an option -> what stands for its value, where that says more than its type"""


class App(typer.Typer):
    """The command ``lensbench``, on whose help pages values have no names of Python's types."""

    def command(self, name: str | None = None, **kwargs: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """As Typer's; values that name nothing of their own are named by :data:`VALUES`, arguments by themselves."""
        register = super().command(name, **{"cls": PlainCommand, **kwargs})

        def named(function: CommandFunctionType) -> CommandFunctionType:
            for value, annotation in get_type_hints(function, include_extras=True).items():
                for info in getattr(annotation, "__metadata__", ()):
                    if info.metavar is None:
                        info.metavar = value_name(value, annotation.__origin__, isinstance(info, ArgumentInfo))
            return register(function)

        return named


def value_name(name: str, kind: Any, is_argument: bool) -> str | None:
    """What stands for a value on help pages; None for a flag and a choice, which name theirs."""
    inner = [k for k in (get_args(kind) or (kind,)) if k is not type(None)]
    of = get_args(inner[0])[0] if get_args(inner[0]) else inner[0]
    if is_argument:
        several = get_origin(kind) is list
        return f"{name.upper().removesuffix('S') if several else name.upper()}{'...' * several}"
    return NAMED.get(name, VALUES.get(of)) if of in VALUES else None


app = App(
    name="lensbench",
    cls=OneLineGroup,
    help="Does a language model refine one prediction, kept in one representation, layer by layer?\n\n"
    "lensbench trains small models or reads pretrained ones. It fits a lens at each layer, asks whether what later layers "
    "add to the prediction shows in the lenses of earlier layers, and reports the answer with intervals and nulls.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS") or 80))
"""Where results go: tables are as wide as the terminal, in a file or a pipe 80 columns (or ``COLUMNS``)"""


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
    typer.Option(metavar="FOLDER", help="Folder of the tables; default runs/NAME.", show_default=False),
]


Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse a folder or pattern that holds files other than text. Without it they are skipped and listed.",
    ),
]


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def noted(line: str) -> None:
    """Show something that the user has to know, next to the results."""
    show_line(f"note: {line}", console)


def show_version(asked: bool) -> None:
    """Print the version and exit, where it is asked for."""
    if asked:
        show_line(f"lensbench {__version__}", console)
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """What every command has in common."""


Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME.")
]


Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]


def run_folder(out: Path | None, default: str) -> Path:
    """The folder to write into: ``--out``, else ``runs/DEFAULT``.

    Raises :class:`LensbenchError` for a folder that cannot be written, and where the default lies in ``results/`` of a
    checkout: that is written only by name.
    """
    from lensbench.results.folder import in_checkout_results

    folder = out or Path("runs") / default
    if out is None and in_checkout_results(folder):
        raise LensbenchError(f"{folder} lies in results/ of a checkout of lensbench; name the folder with --out")
    check_place(folder, "--out", folder=True)
    return folder
