"""What a command changes of a suite's file: its models and text, how much it reads, and any of its settings."""

import hashlib
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensbench.data.sources import JOIN, sources_of
from lensbench.errors import LensbenchError, nearest
from lensbench.models.pretrained import named
from lensbench.statistics import FEWEST_CLUSTERS
from lensbench.suite.files import (
    COMMAND,
    as_written,
    expect,
    names_of,
    on_request,
    plain,
    preset_of,
    put,
    read_toml,
    text_name,
    validated,
)
from lensbench.suite.recipes import DEFAULT, Suite

LONGEST_LABEL = 60
"""Characters of a folder's name that settings may take; of more a digest stands for them."""


@dataclass(frozen=True)
class Changes:
    """What the options of ``lensbench run`` change of a suite, in the order that they do: a later one has the last word."""

    preset: str | None = None
    """The name of a preset of the suite's file; ``default`` is the file as it is"""
    models: tuple[str, ...] = ()
    """Sources of pretrained models in place of the suite's"""
    text: str | None = None
    """A text, or images, in place of the suite's"""
    limit: int | None = None
    """Sequences at most of each split"""
    settings: tuple[str, ...] = ()
    """``KEY=VALUE``, as ``--set`` takes them"""
    seed: int | None = None
    """Run this one alone"""

    def of(self, name: str) -> Suite:
        """The changed suite ``name`` (or of a file); raises :class:`LensbenchError` saying what is wrong and where."""
        file, content = read_toml(name)
        expect(file, name, content, "run")
        suite = with_preset(validated(Suite, file, content), file, content, self.preset)
        suite = on_request(suite, list(self.models), self.text)
        changed = with_settings(suite, [*limited(suite, self.limit), *self.settings])
        if self.limit is not None and changed.evaluate.precision is not None:
            raise LensbenchError("--limit: evaluate.precision is set, and scores as many sequences as it needs")
        return changed if self.seed is None else changed.model_copy(update={"seeds": (self.seed,)})

    def folder_name(self, suite: Suite) -> str:
        """What the default folder of the run is called: runs of other settings lie in other folders."""
        parts = [suite.name, *names_of(list(self.models))]
        if self.text is not None:
            parts.append(text_name(self.text))
        if self.preset not in (None, DEFAULT):
            parts.append(str(self.preset))
        if self.limit is not None:
            parts.append(f"limit{self.limit}")
        label = "-".join(plain(setting.replace(" ", "")) for setting in self.settings)
        if len(label) > LONGEST_LABEL:
            label = f"set-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        return "-".join([*parts, *([label] if label else [])])

    def command(self, name: str, folder: Path, more: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
        """The command that goes on with a run into ``folder``, on this machine; ``more``: options that change no suite."""
        single = [("--preset", self.preset), ("--corpus", self.text), ("--limit", self.limit), ("--seed", self.seed)]
        given = [(option, str(value)) for option, value in single if value is not None]
        several = [("--model", self.models), ("--set", self.settings), *more]
        given += [(option, value) for option, values in several for value in values]
        words = [word for option in given for word in option]
        return shlex.join(["lensbench", "run", name, *words, "--out", str(folder)])

    def options(self) -> list[str]:
        """The options that say so, as a manifest has them: without folders of this machine."""
        given = [] if self.preset is None else [("--preset", self.preset)]
        given += [("--model", named(model)) for model in self.models]
        if self.text is not None:
            given.append(("--corpus", without_folder(self.text)))
        if self.seed is not None:
            given.append(("--seed", str(self.seed)))
        if self.limit is not None:
            given.append(("--limit", str(self.limit)))
        given += [("--set", f"{key}={without_folder(value)}") for key, value in map(split_setting, self.settings)]
        return [word for option in given for word in option]


def with_preset(suite: Suite, file: str, content: dict[str, Any], preset: str | None) -> Suite:
    """The suite with what a preset of its file changes: tables that are merged into the file's; None changes nothing.

    Raises :class:`LensbenchError` for a preset that the file does not have.
    """
    if preset is None:
        return suite
    if not suite.presets:
        raise LensbenchError(f"{file} has no presets: --preset is for suites whose file has [presets.NAME]")
    if preset == DEFAULT:
        return suite
    if preset not in suite.presets:
        raise LensbenchError(f"{file} has no preset {preset!r}; {nearest(preset, [DEFAULT, *suite.presets])}")
    return preset_of(file, content, preset)


def limited(suite: Suite, limit: int | None) -> list[str]:
    """The settings that a limit stands for: no split gives more sequences; choices and gates rest on dev as they are.

    Raises :class:`LensbenchError` where so few are too few for intervals.
    """
    if limit is None:
        return []
    if limit < FEWEST_CLUSTERS:
        raise LensbenchError(
            f"--limit {limit}: with fewer than {FEWEST_CLUSTERS} sequences there are fewer than {FEWEST_CLUSTERS} clusters, "
            f"and intervals are not to be trusted; give --limit {FEWEST_CLUSTERS} or more"
        )
    given = {
        "fit.sequences": suite.fit.sequences,
        "fit.dev_sequences": suite.fit.dev_sequences,
        "evaluate.sequences": suite.evaluate.sequences,
    }
    return [f"{key}={limit}" for key, count in given.items() if count > limit]


def with_settings(suite: Suite, settings: Sequence[str]) -> Suite:
    """The suite with ``KEY=VALUE`` settings, checked as those of a file are; keys are dotted, values TOML."""
    if not settings:
        return suite
    content = as_written(suite)
    for setting in settings:
        key, value = split_setting(setting)
        put(content, path_of(key, content), parsed(key, value), COMMAND)
    return validated(Suite, COMMAND, content)


def split_setting(setting: str) -> tuple[str, str]:
    """Key and value of ``KEY=VALUE``."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise LensbenchError(f"--set {setting}: give KEY=VALUE, fit.sequences=128 say")
    return key.strip(), value.strip()


BARE_WORD = re.compile(r"[A-Za-z][\w:/.@+~-]*")
"""What no quotes are needed for on the command line; TOML's own words (true, inf) are read before"""


def parsed(key: str, value: str) -> Any:
    """A value as TOML reads it; a bare word (``every``, ``file:texts``) is a string."""
    try:
        return tomllib.loads(f"value = {value}\n")["value"]
    except RecursionError as error:
        raise LensbenchError(f"--set {key}: its value is nested too deeply to be read") from error
    except ValueError as error:
        if BARE_WORD.fullmatch(value):
            return value
        raise LensbenchError(
            f"--set {key}={value}: the value is not valid TOML: give a number, true, false, a word, a list such as [1, 2], "
            "or a text in double quotes within single ones"
        ) from error


def path_of(key: str, content: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a dotted key; ``models.NAME.KEY`` is of the model NAME, whose name may have dots of its own."""
    first, _, rest = key.partition(".")
    if first == "presets":
        raise LensbenchError(f"{COMMAND}: {key}: presets are tables of a suite's file; set what they would set")
    if first != "models" or not rest:
        return tuple(part.strip() for part in key.split("."))
    names = sorted((str(m.get("name")) for m in content.get("models", ())), key=len, reverse=True)
    name = next((n for n in names if rest.startswith(f"{n}.")), None)
    if name is None:
        raise LensbenchError(
            f"{COMMAND}: {key}: models are set by name, models.{min(names)}.KEY; {nearest(rest.partition('.')[0], names)}"
        )
    return ("models", name, *(part.strip() for part in rest.removeprefix(f"{name}.").split(".")))


FILES = ("file:", "folder:", "path:", "gguf:")
"""Beginnings of values that name a place on this machine"""


def without_folder(value: str) -> str:
    """A value as results report it: of a file or folder of this machine its name alone."""
    if len(parts := sources_of(value)) > 1:
        return JOIN.join(map(without_folder, parts))
    bare = value.strip("\"'")
    beginning = next((kind for kind in FILES if bare.startswith(kind)), None)
    return value if beginning is None else value.replace(bare, beginning + Path(bare.removeprefix(beginning)).name)
