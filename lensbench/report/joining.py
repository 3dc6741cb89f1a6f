"""Several run folders as one: parts of one run joined, and models of different runs under names that tell them apart."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.results.folder import Run
from lensbench.results.schema import SCHEMA


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs by what they are parts of: folders that are parts of one run stand together."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if all(parts_of_one(other, run) for other in group)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return groups


def parts_of_one(one: Run, other: Run) -> bool:
    """Whether two folders hold different models of the same suite, run on the same text with the same seeds."""
    a, b = one.manifest, other.manifest
    same = a.suite == b.suite and a.corpus.checksum == b.corpus.checksum and a.seeds == b.seeds
    return same and not set(a.models) & set(b.models)


def joined(parts: list[Run]) -> Run:
    """Runs of different models as one, its models in the order of the suite; a baseline stands once."""
    if len(parts) == 1:
        return parts[0]
    order = {model.name: k for k, model in enumerate(parts[0].manifest.suite.models)}
    tables = {}
    for name in SCHEMA:
        table = pd.concat([part.tables[name] for part in parts if len(part.tables[name])] or [parts[0].tables[name]])
        if "model" in table:
            table = table.sort_values("model", key=lambda names: names.map(order), kind="stable")
        tables[name] = table.drop_duplicates(ignore_index=True)
    return Run(parts[0].folder, parts[0].manifest, tables)


def together(runs: list[Run]) -> Run:
    """All models of several runs in one, for figures; raises :class:`LensbenchError` where two have one name."""
    names = [name for run in runs for name in run.tables["models.csv"]["model"].unique()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LensbenchError(f"model {twice!r} is in two of the folders: a figure of them all would show one")
    tables = {name: pd.concat([run.tables[name] for run in runs], ignore_index=True) for name in SCHEMA}
    return Run(runs[0].folder, runs[0].manifest, tables)


def names_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of each run: model -> the name to show it by, with the run's folder where two runs have a model of that name."""
    models = [list(run.tables["models.csv"]["model"].unique()) for run in runs]
    twice = {m for a, b in itertools.combinations(models, 2) for m in set(a) & set(b)}
    short = [run.folder.name for run in runs]
    folders = short if len(set(short)) == len(short) else [str(run.folder) for run in runs]
    return [
        {m: f"{m} ({folder})" if m in twice else str(m) for m in own}
        for folder, own in zip(folders, models, strict=True)
    ]


def on_one_ruler(runs: Sequence[Run]) -> Run:
    """All models of several runs in one, each by its name of :func:`names_of`: to look at together."""
    called = names_of(runs)
    renamed = [
        replace(run, tables={key: with_names(table, names) for key, table in run.tables.items()})
        for run, names in zip(runs, called, strict=True)
    ]
    return together(renamed)


def with_names(table: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """A table whose models have the names given here; one that ``names`` leaves out keeps its own."""
    if "model" not in table:
        return table
    return table.assign(model=[names.get(name, name) for name in table["model"]])
