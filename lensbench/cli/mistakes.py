"""Mistakes on the command line itself, each in one line: wrong options, missing arguments, places that cannot be written."""

import difflib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lensbench.errors import LensbenchError
from lensbench.runtime.bars import messages
from lensbench.runtime.validation import in_words

USAGE: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises for options and arguments that do not fit"""


def say(line: str) -> None:
    """Print one line for the user to standard error."""
    messages.print(f"lensbench: {line}", highlight=False, markup=False, soft_wrap=True)


class PlainCommand(TyperCommand):
    """A command whose help page names values without Python's types, and ranges in words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The command; recent versions of Typer write the type of an argument next to its name."""
        super().__init__(*args, **kwargs)
        for value in self.params:
            if value.param_type_name == "argument":
                setattr(value, "display_type_rich", lambda ctx: "")  # noqa: B010 (no version of Typer declares it so)
            setattr(value, "get_help_record", with_ranges_in_words(value.get_help_record))  # noqa: B010

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the line of usage: an argument by its name, in brackets where it may be left out."""
        return [plain_piece(piece) for piece in super().collect_usage_pieces(ctx)]


class OneLineGroup(TyperGroup):
    """The command ``lensbench``; what is wrong with options and arguments it says in one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As Typer's, for options of ``lensbench`` itself."""
        try:
            return super().make_context(*args, **kwargs)
        except USAGE as error:
            raise told(error) from error

    def invoke(self, ctx: Any) -> Any:
        """As Typer's, for the command and its options."""
        try:
            return super().invoke(ctx)
        except USAGE as error:
            raise told(error) from error


def with_ranges_in_words(record: Any) -> Any:
    """A parameter's ``get_help_record`` whose ranges are words: ``x>=0`` is *at least 0*."""

    def worded(ctx: Any) -> Any:
        found = record(ctx)
        if found is None:
            return None
        name, text = found
        text = re.sub(r"(-?[\d.]+)<=x<=(-?[\d.]+)", r"\1 to \2", text)
        text = re.sub(r"x>=(-?[\d.]+)", r"at least \1", text)
        return name, re.sub(r"x<=(-?[\d.]+)", r"at most \1", text)

    return worded


def plain_piece(piece: str) -> str:
    """A part of a line of usage without the braces and repeated dots that versions of Typer put around a name."""
    plain = piece.replace("{", "").replace("}", "")
    return re.sub(r"^\[\[(.*)\]\]", r"[\1]", plain).replace("......", "...").replace("...]...", "...]")


def told(error: Any) -> Exception:
    """Say in one line what is wrong, and return what ends the command; a help page that was asked for stays as it is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # type: ignore[no-any-return]
    say(usage_line(error))
    return typer.Exit(2)


def usage_line(error: Any) -> str:
    """What is wrong with the options or arguments of a command, and what would be right."""
    context = error.ctx
    path = context.command_path if context is not None else "lensbench"
    path = f"lensbench {path.partition(' ')[2]}".strip()
    see = f"`{path} --help` lists what it takes"
    kind, message = type(error).__name__, " ".join(error.format_message().split())
    if kind == "NoSuchOption":
        known = [option for value in context.command.params for option in (*value.opts, *value.secondary_opts)]
        return f"there is no option {error.option_name}; {hint(error.option_name, known)}{see}"
    if kind == "MissingParameter":
        name = error.param.opts[0] if error.param.param_type_name == "option" else plain_piece(error.param.metavar)
        return f"{name} is missing: {path} {' '.join(arguments_of(context))}; {see}"
    if isinstance(error, typer.BadParameter):
        return bad_value(error)
    if "unexpected extra argument" in message.lower():
        words = re.findall(r"\(([^()]*)\)\.?$", message)
        expected = " ".join([path, *arguments_of(context)])
        return f"{words[0] if words else 'an argument'!r} is one argument too many: {expected}; put a text in quotes"
    if "requires an argument" in message:
        return f"{error.option_name} needs a value after it"
    if message.startswith("No such command"):
        known = sorted(context.command.commands)
        word = message.partition("'")[2].partition("'")[0]
        return f"there is no command {word!r}; {hint(word, known)}{see}"
    return f"{message}; {see}"


def hint(word: str, known: list[str]) -> str:
    """The known word that is nearest to a wrong one, as a question; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}? " if close else ""


def arguments_of(context: Any) -> list[str]:
    """The arguments of a command, as its line of usage names them."""
    return [piece for piece in context.command.collect_usage_pieces(context) if piece != "[OPTIONS]"]


def bad_value(error: Any) -> str:
    """What is wrong with the value of an option or argument."""
    if error.param_hint is not None or error.param is None:
        return f"{error.param_hint or 'a value'}: {error.message}"
    name = error.param.opts[0] if error.param.param_type_name == "option" else plain_piece(error.param.metavar)
    found = getattr(error.__cause__, "errors", None)
    words = in_words(found()[0]) if found is not None else error.message
    words = re.sub(r"^('.*') is not one of (.*?)\.?$", r"must be one of \2, not \1", words)
    words = re.sub(r"not '(-?[\d.]+)'$", r"not \1", words)
    return f"{name} {words}" if words.startswith("must") else f"{name}: {words}"


def check_place(path: Path, option: str, *, folder: bool) -> None:
    """Raise :class:`LensbenchError` where a file, or files in a ``folder``, cannot be written at ``path``."""
    if folder and path.is_file():
        wanted = f"give {option} a folder" if option.startswith("--") else "name a folder"
        raise LensbenchError(f"{path} is a file; {wanted}")
    if not folder and path.is_dir():
        raise LensbenchError(f"{option} {path} is a folder: name a file in it")
    try:
        nearest = next(p for p in (path if folder else path.parent, *path.parents, Path()) if p.exists())
        if not nearest.is_dir():
            raise LensbenchError(f"{option} {path}: {nearest} is a file, not a folder; name another place")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise LensbenchError(
            f"{option} {path} cannot be written ({reason}); name a place that you may write to"
        ) from error


def check_places(files: dict[str, Path | None], folders: dict[str, Path | None]) -> None:
    """:func:`check_place` for options with a path, those that are given."""
    for places, is_folder in ((files, False), (folders, True)):
        for option, path in places.items():
            if path is not None:
                check_place(path, option, folder=is_folder)
