"""The command ``lensbench`` itself: options that commands share, and what becomes of their errors."""

import errno
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lensbench import __version__
from lensbench.errors import LensbenchError
from lensbench.runtime.bars import messages

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
    """Print one line for the user to standard error."""
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


def noted(line: str) -> None:
    """Show something that the user has to know, next to the results."""
    console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)


def show_version(asked: bool) -> None:
    """Print the version and exit, where it is asked for."""
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


Source = Annotated[str, typer.Argument(help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME.")]


Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]


def run_folder(out: Path | None, default: str) -> Path:
    """The folder to write into: ``--out``, else ``runs/DEFAULT``.

    Raises :class:`LensbenchError` where the default lies in ``results/`` of a checkout: that is written only by name.
    """
    from lensbench.results.folder import in_checkout_results

    folder = out or Path("runs") / default
    if out is None and in_checkout_results(folder):
        raise LensbenchError(f"{folder} lies in results/ of a checkout of lensbench; name the folder with --out")
    return folder
