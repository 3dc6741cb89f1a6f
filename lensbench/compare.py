"""Models across run folders: one tidy table, differences paired where the same sequences were scored."""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench import indices, results
from lensbench.errors import LensbenchError
from lensbench.indices import Array, Means
from lensbench.report import SHOWN, with_interval
from lensbench.results import Run
from lensbench.tables import ClusterSums, by_document, clustered

COMPARED = ("ce", "bits_per_byte", *SHOWN)

SAME_MEASURE = (
    ("fit", "tolerance"),
    ("fit", "variance"),
    ("fit", "layers"),
    ("evaluate", "first_position"),
    ("evaluate", "length"),
    ("training", "length"),
)
"""Settings without which two numbers of the same name are not the same quantity."""


@dataclass(frozen=True)
class Comparison:
    """``table``: a row per run, model, seed and index, and per pair of them a difference.

    Columns ``kind`` (value or difference), ``run, model, seed, index, value, ci_low, ci_high, against_run, against_model,
    against_seed, paired, note``.
    """

    table: pd.DataFrame
    reproduction: list[str]

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            results.write_atomically(path, partial(self.table.to_csv, index=False, lineterminator="\n"))
        except OSError as error:
            raise LensbenchError(f"{path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Cell:
    """One model and seed of one run: every compared quantity at its point estimate and at the bootstrap draws."""

    run: str
    corpus: str
    model: str
    seed: int
    documents: tuple[str, ...]
    tokens: Array
    point: dict[str, float]
    draws: dict[str, Array]
    reasons: dict[str, str]

    @property
    def who(self) -> dict[str, Any]:
        return {"run": self.run, "model": self.model, "seed": self.seed}


def compare_runs(folders: list[Path]) -> Comparison:
    """Read, check and compare runs; the first folder is the one that the others are held against.

    Raises :class:`LensbenchError` for damaged folders, and for runs that do not measure the same thing.
    """
    if len(set(folders)) < len(folders):
        raise LensbenchError("a run folder is named twice")
    runs = [results.read_run(folder) for folder in folders]
    for one, other in itertools.combinations(runs, 2):
        refuse_unlike(one, other)
    cells = [cell for run in runs for cell in cells_of(run)]
    rows = [{"kind": "value", **cell.who, "index": name, **value_of(cell, name)} for cell in cells for name in COMPARED]
    for first, second in itertools.combinations(cells, 2):
        if worth_comparing(first, second):
            rows += [difference(second, first, name) for name in COMPARED]
    columns = ["kind", "run", "model", "seed", "index", "value", "ci_low", "ci_high",
               "against_run", "against_model", "against_seed", "paired", "note"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    return Comparison(table, [reproduction(runs[0], run) for run in runs[1:]])


def refuse_unlike(one: Run, other: Run) -> None:
    """Raise where two runs do not measure the same thing, saying what differs."""
    a, b = (run.manifest or {} for run in (one, other))
    if "sweep" in a or "sweep" in b:
        raise LensbenchError("a sweep has no lenses to compare: give folders that `lensbench run` wrote")
    if a["code_version"] != b["code_version"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: code versions {a['code_version']} and "
            f"{b['code_version']}; run one of them again"
        )
    if a["corpus"]["spec"] != b["corpus"]["spec"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: corpus {a['corpus']['spec']} and "
            f"{b['corpus']['spec']}"
        )
    if a["corpus"]["spec"] != "stdlib" and a["corpus"]["checksum"] != b["corpus"]["checksum"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: {a['corpus']['spec']} held other texts"
        )
    for section, key in SAME_MEASURE:
        first, second = (manifest["suite"][section][key] for manifest in (a, b))
        if first != second:
            raise LensbenchError(
                f"{one.folder} and {other.folder} do not measure the same thing: {section}.{key} is {first} and {second}"
            )


def cells_of(run: Run) -> list[Cell]:
    manifest = run.manifest or {}
    sequences = run.sequences()
    draws = manifest["suite"]["evaluate"]["draws"]
    cells = []
    try:
        for key, rows in sequences.groupby(["model", "seed"], observed=True, sort=False):
            model, seed = cast(tuple[str, int], key)
            rows = clustered(rows)
            sums = ClusterSums.of(rows)
            weights = indices.bootstrap_weights(len(sums.tokens), draws, 0)
            means = Means.of_clusters(sums.totals, sums.tokens), Means.of_clusters(sums.totals, sums.tokens, weights)
            of_rotations = indices.seed_of_rotations(str(model), int(seed))
            at_point, at_draws = indices.draw_values(*means, of_rotations)
            estimates = indices.estimates(*means, seed=of_rotations, clusters=len(sums.tokens))
            ce = by_document(rows, lens="model")["ce"].to_numpy(float)
            point = {name: float(value.value) for name, value in at_point.items()}
            values = {name: value.value for name, value in at_draws.items()}
            for name, per in (("ce", sums.tokens), ("bits_per_byte", sums.bytes * np.log(2))):
                point[name] = float(ce.sum() / per.sum())
                values[name] = (weights @ ce) / (weights @ per)
            reasons = {name: e.reason for name, e in estimates.items() if e.value is None}
            cells.append(
                Cell(
                    str(run.folder),
                    manifest["corpus"]["checksum"],
                    str(model),
                    int(seed),
                    sums.documents,
                    sums.tokens,
                    point,
                    values,
                    reasons,
                )  # fmt: skip
            )
    except (KeyError, ValueError) as error:
        raise LensbenchError(f"{run.folder / results.SEQUENCES} is damaged: {error}") from error
    return cells


def value_of(cell: Cell, name: str) -> dict[str, Any]:
    if name in cell.reasons:
        return {"value": None, "ci_low": None, "ci_high": None, "note": cell.reasons[name]}
    low, high = indices.interval(cell.draws[name])
    return {"value": cell.point[name], "ci_low": float(low), "ci_high": float(high), "note": ""}


def worth_comparing(first: Cell, second: Cell) -> bool:
    """Models of one run at one seed, and the same model across runs."""
    return first.seed == second.seed if first.run == second.run else first.model == second.model


def difference(cell: Cell, against: Cell, name: str) -> dict[str, Any]:
    """``cell - against``; paired where both scored the same tokens of the same documents.

    Both sides' draws come from one seed, so that draw k resamples the same documents on both.
    """
    paired = cell.documents == against.documents and np.array_equal(cell.tokens, against.tokens)
    paired = paired and cell.corpus == against.corpus
    row = {"kind": "difference", **cell.who, "index": name, "paired": paired}
    row |= {f"against_{k}": v for k, v in against.who.items()}
    undefined = cell.reasons.get(name) or against.reasons.get(name)
    if undefined:
        return row | {"note": undefined}
    draws = min(len(cell.draws[name]), len(against.draws[name]))
    here, there = cell.draws[name][:draws], against.draws[name][:draws]
    if not paired:
        # Unpaired draws must not move together: pair each with another's.
        there = np.roll(there, len(there) // 2)
    low, high = indices.interval(here - there)
    note = "" if cell.corpus == against.corpus else "another corpus"
    return row | {
        "value": cell.point[name] - against.point[name],
        "ci_low": float(low),
        "ci_high": float(high),
        "note": note,
    }


def reproduction(reference: Run, run: Run) -> str:
    """One line: whether ``run`` reproduced ``reference``."""
    a, b = (r.manifest or {} for r in (reference, run))
    who = f"{run.folder} against {reference.folder}"
    if a["corpus"]["checksum"] != b["corpus"]["checksum"]:
        return (
            f"{who}: another corpus ({a['corpus']['spec']} with other texts): compare the intervals of the differences"
        )
    if a["suite"] != b["suite"] or a["seeds"] != b["seeds"]:
        return f"{who}: same corpus, other settings"
    if a["models"] != b["models"]:
        return f"{who}: same settings, but {', '.join(a['models'])} there and {', '.join(b['models'])} here"
    csv = [name for name in results.SCHEMA if a["files"].get(name) != b["files"].get(name)]
    if not csv:
        return f"{who}: identical, every CSV byte for byte"
    largest, where = 0.0, ""
    for name in csv:
        one, other = (r.tables[name].select_dtypes("number") for r in (reference, run))
        if one.shape != other.shape:
            return f"{who}: not reproduced, {name} has {len(other)} rows instead of {len(one)}"
        gap = (one - other).abs()
        if (one.isna() != other.isna()).any(axis=None):
            return f"{who}: not reproduced, other cells of {name} are empty"
        column = gap.max().idxmax()
        if gap[column].max() >= largest:
            largest, where = float(gap[column].max()), f"{name}, column {column}"
    return f"{who}: reproduced but for a largest absolute difference of {largest:.3g} ({where})"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Whether the runs reproduce the first one, then values and differences; across runs, of the same model."""
    for line in comparison.reproduction:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    values = comparison.table[comparison.table["kind"] == "value"]
    table = Table(*(Column(c, no_wrap=True) for c in ("run", "model", "seed", "index", "value [95 %]")), title="values")
    for _, row in values.iterrows():
        table.add_row(row["run"], row["model"], str(row["seed"]), row["index"], with_interval(row))
    console.print(table)
    differences = comparison.table[comparison.table["kind"] == "difference"]
    if differences["run"].nunique() > 1 or (differences["run"] != differences["against_run"]).any():
        differences = differences[differences["run"] != differences["against_run"]]
    if len(differences):
        columns = (Column(c, no_wrap=True) for c in ("difference", "index", "value [95 %]", "paired", "note"))
        table = Table(*columns, title="differences")
        for _, row in differences.iterrows():
            one_run = row["run"] == row["against_run"]
            names = [row[p + "model"] if one_run else f"{row[p + 'run']}:{row[p + 'model']}" for p in ("", "against_")]
            paired = "yes" if row["paired"] else "no"
            note = "" if pd.isna(row["value"]) else row["note"]
            table.add_row(" - ".join(names), row["index"], with_interval(row), paired, note)
        console.print(table)
