"""Suites and other recipes, read from TOML and checked before anything starts."""

import copy
import difflib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lensbench.errors import LensbenchError, nearest
from lensbench.models import fitting_width
from lensbench.models.pretrained import check_source
from lensbench.runtime.texts import decode, read_bytes
from lensbench.runtime.validation import in_words
from lensbench.studies.calibration import Calibration
from lensbench.studies.in_context import InContext
from lensbench.studies.regression import RegressionRecipe
from lensbench.studies.update_calibration import UpdateCalibration
from lensbench.studies.update_tokens import UpdateTokens
from lensbench.suite.recipes import Suite
from lensbench.suite.shipped import named_files
from lensbench.suite.snapshots import without_checkpoints, written_out
from lensbench.suite.sweep import Sweep

Recipe = TypeVar("Recipe", bound=BaseModel)


def read_toml(name: str, command: str = "run") -> tuple[str, dict[str, Any]]:
    """The content of a file for a command, given by name (``quick``) or path, and what to call it in messages."""
    known = named_files()
    path = known.get(name) or Path(name)
    what = {runs: kind for kind, runs in [*FILE_KINDS.values(), ("a suite", "run")]}[command].removeprefix("a ")
    if path.is_dir():
        raise LensbenchError(f"{name} is a folder: give the name of a {what}, or its TOML file")
    if not path.is_file():
        if name.endswith(".toml"):
            stem = Path(name).stem
            close = [stem] if stem in known else difflib.get_close_matches(stem, known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}, which comes with lensbench?" if close else ""
            raise LensbenchError(f"there is no {what} file {name}{hint}")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        fit = close or [
            other for other in known if kind_of(tomllib.loads(known[other].read_text("utf-8")))[1] == command
        ]
        raise LensbenchError(f"unknown {what} {name!r}; {nearest(name, fit)}")
    try:
        return path.name, tomllib.loads(decode(read_bytes(path, path.name), path.name))
    except RecursionError as error:
        raise LensbenchError(f"{path.name} is nested too deeply to be read") from error
    except ValueError as error:  # TOMLDecodeError, and numbers with too many digits
        raise LensbenchError(f"{path.name} is not valid TOML: {error}") from error


def validated(kind: type[Recipe], name: str, content: dict[str, Any]) -> Recipe:
    """``content`` as a suite, a sweep or a study; raises :class:`LensbenchError` with the first thing wrong with it."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = place_in(first["loc"], content)
        if first["type"] == "extra_forbidden":
            raise LensbenchError(f"{name}: unknown key {place!r}; {meant(kind, name, place, first['loc'])}") from error
        words = in_words(first)
        if "table of settings" in words and name == COMMAND:
            words = f"{words}; set one of them, {place}.{known_keys(kind, first['loc'])[0]}=VALUE say"
        if first["loc"] == ("models",) and name == COMMAND:
            words = "are set one by one, models.NAME.KEY=VALUE"
        between = " " if words.startswith(("must", "is ", "are ")) else ": "
        raise LensbenchError(f"{name}: {place}{between}{words}" if place else f"{name}: {words}") from error


def meant(kind: type[BaseModel], name: str, place: str, location: tuple[int | str, ...]) -> str:
    """The hint after an unknown key: the sections that have it, else the nearest key of its own section."""
    key = str(location[-1])
    if len(location) == 1 and (sections := sections_with(kind, key)):
        return f"did you mean {either([f'{section}.{key}' for section in sections])}?"
    section = place.removesuffix(key) if name == COMMAND else ""  # a file has it above the key
    return nearest(key, known_keys(kind, location[:-1])).replace("did you mean '", f"did you mean '{section}")


def either(names: list[str]) -> str:
    """Names in quotes, of which one is meant."""
    quoted = [repr(name) for name in names]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def sections_with(kind: type[BaseModel], key: str) -> list[str]:
    """The tables of settings of a file that have a key; that of a model stands under its name."""
    found = {name: known_keys(kind, (name,)) for name in kind.model_fields if name != "claims"}
    having = [name for name, keys in found.items() if key in keys and keys != list(kind.model_fields)]
    return ["models.NAME" if name == "models" else name for name in having]


def place_in(location: tuple[int | str, ...], content: dict[str, Any]) -> str:
    """Where a validation error points to, as a dotted key; a setting of a model by the model's name."""
    if len(location) > 2 and location[0] == "models" and isinstance(location[1], int):
        models = written_out(content)["models"]  # errors count those that a model stands for, too
        location = ("models", models[location[1]].get("name", location[1]), *location[2:])
    return ".".join(str(part) for part in location)


def known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where a validation error points to."""
    for part in location:
        if isinstance(part, str) and part in kind.model_fields:
            annotation = kind.model_fields[part].annotation
            inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
            kind = next((a for a in inner if issubclass(a, BaseModel)), kind)
    return list(kind.model_fields)


def load_suite(name: str) -> Suite:
    """A suite by name or path; raises :class:`LensbenchError` saying what is wrong and where."""
    file, content = read_toml(name)
    expect(file, name, content, "run")
    suite = validated(Suite, file, content)
    for preset in suite.presets:
        preset_of(file, content, preset)
    return suite


def put(content: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    """Set what a path of keys names in ``content``; raises :class:`LensbenchError` where there is no table on the way."""
    here, keys = content, path
    if path[0] == "models" and len(path) > 1:
        models = {model["name"]: model for model in content["models"]}
        if path[1] not in models:
            raise LensbenchError(f"{where}: {'.'.join(path)}: {nearest(path[1], list(models))}")
        here, keys = models[path[1]], path[2:]
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            what = "is left out of this suite" if here in (None, False) else "is no table"
            raise LensbenchError(f"{where}: {'.'.join(path)}: {key} {what}")
    here[keys[-1]] = value


def leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in nested tables that is no table, with the keys that lead to it."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def preset_of(file: str, content: dict[str, Any], preset: str) -> Suite:
    """The suite of a file with what its table ``presets.PRESET`` sets in place of what the file says.

    Raises :class:`LensbenchError` with the first thing wrong with it.
    """
    where, changed = f"{file}, preset {preset}", copy.deepcopy(content)
    for path, value in leaves(changed.pop("presets")[preset]):
        put(changed, path, value, where)
    return validated(Suite, where, changed)


COMMAND = "command line"
"""What messages call the place of a wrong setting that no file has"""


def as_written(suite: Suite) -> dict[str, Any]:
    """What a suite was made from, without the checkpoints that its training writes out: they follow from it again."""
    content = suite.model_dump(exclude_unset=True)
    return {**content, "models": without_checkpoints(list(content["models"]))}


def on_request(suite: Suite, models: list[str], text: str | None) -> Suite:
    """The suite with pretrained ``models`` (sources) in place of its own, on another ``text``; None changes nothing.

    Raises :class:`LensbenchError` for an unknown source or text.
    """
    content = as_written(suite)
    if text is not None:
        section = "corpus" if suite.images is None else "images"
        content[section] = {**content.get(section, {}), "spec": text}
    if models:
        names = names_of(models)
        content["models"] = [{"name": name, "source": source} for name, source in zip(names, models, strict=True)]
        content.pop("claims", None)  # they are about the models of the suite
    return validated(Suite, COMMAND, content)


def names_of(sources: list[str]) -> list[str]:
    """What tables call models from sources: the last part of each name, and the parts before it where two are alike.

    ``step1000/hf`` and ``step2000/hf`` are ``step1000-hf`` and ``step2000-hf``. Raises :class:`LensbenchError` for a
    source that is given twice.
    """
    parts = [1] * len(sources)
    while True:
        names = [name_of(source, k) for source, k in zip(sources, parts, strict=True)]
        alike = [n for n, name in enumerate(names) if names.count(name) > 1]
        longer = [n for n in alike if name_of(sources[n], parts[n] + 1) != names[n]]
        if alike and not longer:
            raise LensbenchError(
                f"command line: two models are named {names[alike[0]]!r}: give them names in a suite's file"
            )
        if not alike:
            return names
        for n in longer:
            parts[n] += 1


def name_of(source: str, parts: int = 1) -> str:
    """What tables call a model from a source: the last ``parts`` of its name."""
    check_source(source)
    kind, _, rest = source.partition(":")
    if kind == "hub":
        # The revision belongs to the name: people compare checkpoints of one model.
        given = rest.partition("@")[0].split("/")
        given[-1] += rest[len("/".join(given)) :]
    else:
        given = str(Path(rest).resolve()).removesuffix(".gguf").split("/")
    return plain("-".join(given[-parts:])) or "model"


def text_name(spec: str) -> str:
    """What the name of a folder calls a text."""
    kind, _, rest = spec.partition(":")
    return plain(Path(rest).resolve().stem if kind == "file" else rest or kind) or "text"


def plain(name: str) -> str:
    """A name with nothing but letters, digits and ``._+-``."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("._+-")


FILE_KINDS = {
    "trials": ("a sweep", "sweep"),
    "held_out": ("a calibration", "calibrate"),
    "widths": ("a calibration", "calibrate"),
    "dimensions": ("a regression in context", "regression"),
    "tasks": ("a set of tasks", "in-context"),
}
"""A key that only one kind of file in ``benchmarks/`` has -> what the file is, and the command that runs it."""


def kind_of(content: dict[str, Any]) -> tuple[str, str]:
    """What a file of ``benchmarks/`` holds, and the command that runs it."""
    return next((kind for key, kind in FILE_KINDS.items() if key in content), ("a suite", "run"))


def expect(file: str, name: str, content: dict[str, Any], command: str) -> None:
    """Raise :class:`LensbenchError` where a file is for another command."""
    kind, of = kind_of(content)
    if of != command:
        wanted = {runs: what for what, runs in [*FILE_KINDS.values(), ("a suite", "run")]}[command]
        raise LensbenchError(f"{file} is {kind}, not {wanted}: `lensbench {of} {name}` runs it")


def load_in_context(name: str) -> InContext:
    """Tasks of known Bayes predictor by name or path."""
    file, content = read_toml(name, "in-context")
    expect(file, name, content, "in-context")
    found = validated(InContext, file, content)
    for who, task in itertools.product(found.contestants, found.tasks):
        shape = {key: getattr(found, key) for key in ("d_model", "layers", "heads", "parameters")}
        try:
            fitting_width(
                who.family, vocab_size=task.vocab_size, context=found.training.length, **shape, **who.settings
            )
        except LensbenchError as error:
            raise LensbenchError(f"{file}: {who.name}: {error}") from error
    return found


def load_regression(name: str) -> RegressionRecipe:
    """A regression in context by name or path."""
    file, content = read_toml(name, "regression")
    expect(file, name, content, "regression")
    return validated(RegressionRecipe, file, content)


def load_calibration(name: str) -> Calibration | UpdateCalibration | UpdateTokens:
    """A calibration by name or path.

    Of the update decomposition where it says how often readable gain is measured, of its tokens where it has widths.
    """
    file, content = read_toml(name, "calibrate")
    expect(file, name, content, "calibrate")
    if "widths" in content:
        return validated(UpdateTokens, file, content)
    if "readable_every" in content:
        return validated(UpdateCalibration, file, content)
    return validated(Calibration, file, content)


def load_sweep(name: str) -> Sweep:
    """A sweep by name or path."""
    file, content = read_toml(name, "sweep")
    expect(file, name, content, "sweep")
    return validated(Sweep, file, content)
