"""One self-contained HTML page from run folders: the ruler, verdicts, heatmaps, curves, tables, and how to run it again.

It reads run folders and nothing else. All that it shows is in the markup; the script adds tips and sorts tables. The page
asks for no file, font or address outside itself.
"""

import base64
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.measures.update.sentences import update_rule_in_words
from lensbench.measures.verdict import rule_in_words
from lensbench.report.claims import CELLS, claim_cells, claim_rows
from lensbench.report.compare import Comparison
from lensbench.report.comparison import opening, pair_name, shown_differences
from lensbench.report.figures.frames import lens_frame, transfer_frame
from lensbench.report.formatting import shown_seeds, with_interval
from lensbench.report.joining import grouped, joined, names_of
from lensbench.report.profile_svg import profiles
from lensbench.report.render import render
from lensbench.report.reproduction import differs_by_interval
from lensbench.report.svg import heatmap, kl_curves, ruler
from lensbench.report.terminal import doubts
from lensbench.report.verdicts import Statement, UpdateStatement, rule_of, statements, update_statements
from lensbench.results.folder import PACKED, Run, read_run, table_bytes, table_file
from lensbench.results.manifest import Manifest, read_manifest
from lensbench.results.schema import SCHEMA, unit
from lensbench.runtime.files import write_atomically

LARGEST_CSV = 1_500_000
"""Bytes of a table that the page holds as a file; of a larger one it gives the name."""

SHOWN_TABLES = ("models.csv", "indices.csv", "verdicts.csv", "baselines.csv", "tolerances.csv")

MOST_ROWS = 400


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of run folders; raises :class:`LensbenchError` for folders that are damaged or hold no run."""
    for folder in folders:
        if folder.is_dir() and read_manifest(folder).sweep is not None:
            raise LensbenchError(f"{folder} holds a sweep, which has no lenses: give folders of `lensbench run`")
    runs = [read_run(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = page(runs)
    write_atomically(path, lambda partial: partial.write_text(content, encoding="utf-8"))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of the runs of a comparison, with what it found at the top.

    Raises :class:`LensbenchError` where the file cannot be written.
    """
    content = page(comparison.runs, comparison)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: partial.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise LensbenchError(f"{path} cannot be written: {error.strerror}") from error


def page(runs: Sequence[Run], comparison: Comparison | None = None) -> str:
    """The whole page, of a ``comparison`` with what it found; the same folders give the same bytes."""
    questions = list(dict.fromkeys(run.manifest.suite.question for run in runs))
    names = names_of(runs)
    content = render(
        "report.html",
        title=questions[0] if questions else "lensbench",
        folders=list(dict.fromkeys(run.folder.name for run in runs)),
        questions=questions,
        compared=Markup() if comparison is None else compared_section(comparison),
        verdicts=verdict_list(runs, names),
        profiles=profiles(runs, names),
        claims=[claims for parts in grouped([*runs]) if (claims := claim_list(joined(parts)))],
        ruler=ruler(runs, names),
        sections=[run_section(run, place, called) for place, (run, called) in enumerate(zip(runs, names, strict=True))],
    )
    return f"{content}\n"


def compared_section(comparison: Comparison) -> Markup:
    """The answer of a comparison, its warnings, and every difference whose interval leaves out 0."""
    found = shown_differences(comparison)
    clear = [row for _, row in found.iterrows() if differs_by_interval(row)]
    columns = ("difference", "index", "value [95 %]", "paired", "note")
    rows = [
        (pair_name(row["against_run"], row["against_model"], row["run"], row["model"]), row["index"], with_interval(row),
         "yes" if row["paired"] else "no", row["note"] if isinstance(row["note"], str) else "")
        for row in clear
    ]  # fmt: skip
    table = Markup()
    if rows:
        table = render(
            "table.html",
            id="table-compared",
            name=f"What differs: {len(rows)} of {len(found)} differences have an interval without 0",
            cut=None,
            opened=True,
            link="",
            columns=columns,
            rows=[
                [TableCell(text, wraps=column == "note") for column, text in zip(columns, row, strict=True)]
                for row in rows
            ],
        )
    return render("comparison.html", lines=opening(comparison), table=table)


# Verdicts
@dataclass(frozen=True)
class ModelVerdicts:
    """The verdicts on one model, for each scope one by each rule, and what is known of it by construction."""

    name: str
    updates: list[UpdateStatement]
    statements: list[Statement]
    known: str | None


def verdict_list(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> Markup:
    """The verdict on each model and scope, with the intervals that it rests on and what holds it back."""
    models = []
    for run, called in zip(runs, names, strict=True):
        known = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model").set_index("model")["known"]
        updates, said = update_statements(run), statements(run)
        models += [
            ModelVerdicts(
                name, [s for s in updates if s.model == model], [s for s in said if s.model == model], known.get(model)
            )
            for model, name in called.items()
        ]
    return render("verdicts.html", models=models)


# Claims
def claim_list(run: Run) -> Markup:
    """What became of the claims that a suite declared, over all parts of its run; empty where it declares none."""
    rows = claim_rows(run)
    return render("claims.html", columns=CELLS, rows=[claim_cells(row) for row in rows]) if rows else Markup()


# One run
def run_section(run: Run, place: int, names: dict[str, str]) -> Markup:
    """Everything about one run below the ruler; ``place``: its number on the page."""
    manifest = run.manifest
    per = unit(run.tables["models.csv"])
    cells, lines = mean_cells(run.tables["transfer.csv"]), lens_frame(run)
    has_matrix = set(transfer_frame(run)["model"])
    cells = cells[cells["model"].isin(has_matrix)]
    off = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    top = max(float(np.percentile(off.clip(lower=0), 95)), 1e-3) if has_matrix else 1.0
    further = [found for name in SCHEMA if name not in SHOWN_TABLES and (found := table_file(run.folder, name))]
    return render(
        "run.html",
        place=place,
        suite=manifest.suite_name,
        folder=run.folder.name,
        question=manifest.suite.question,
        lines=doubts(run),
        unit=per,
        maps=[
            heatmap(cells[cells["model"] == model], name, top, per)
            for model, name in names.items()
            if model in has_matrix
        ],
        curves=[kl_curves(lines[lines["model"] == model], name, per) for model, name in names.items()],
        tables=[table_html(run, name, place) for name in SHOWN_TABLES],
        links=[csv_link(path) for path in further],
        rule=rule_in_words(rule_of(run)),
        update_rule=update_rule_in_words(rule_of(run).update),
        again=again(manifest),
        settings=settings(manifest),
    )


def mean_cells(table: pd.DataFrame) -> pd.DataFrame:
    """``model, lens_layer, stream_layer, penalty_ce`` and its interval: of several seeds the mean with Student's t."""
    cell = ["model", "lens_layer", "stream_layer"]
    columns = ["penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"]
    grouped = table.groupby(cell, sort=False)
    found = grouped[columns].mean()
    count, spread = grouped["penalty_ce"].count(), grouped["penalty_ce"].std()
    several = count > 1
    half = stats.t.ppf(0.975, (count - 1).clip(lower=1)) * spread / np.sqrt(count)
    for column, sign in (("penalty_ce_ci_low", -1), ("penalty_ce_ci_high", 1)):
        found[column] = found[column].where(~several, found["penalty_ce"] + sign * half)
    return found.reset_index()


# Tables
@dataclass(frozen=True)
class TableCell:
    """A cell: its text, the number that it is sorted by (None: by its text), and whether its lines may be broken."""

    text: str
    value: float | None = None
    wraps: bool = False


def csv_link(path: Path) -> Markup:
    """A link to a table that the page holds; of a large one its name and size. ``path``: its file, packed or not."""
    raw = table_bytes(path)
    data = None if len(raw) > LARGEST_CSV else base64.b64encode(raw).decode()
    return render("csv_link.html", name=path.name.removesuffix(PACKED), data=data, megabytes=len(raw) / 1e6)


def table_html(run: Run, name: str, place: int) -> Markup:
    """A sortable table with a link to its CSV: rows over seeds where there are, else each; empty for a missing table."""
    table, path = run.tables[name], table_file(run.folder, name)
    if table.empty or path is None:
        return Markup()
    rows = shown_seeds(table) if {"model", "seed"} <= set(table) and name != "models.csv" else table
    shown = rows.head(MOST_ROWS).dropna(axis=1, how="all")
    return render(
        "table.html",
        id=f"table-{place}-{name.partition('.')[0]}",
        name=name,
        cut=MOST_ROWS if len(rows) > MOST_ROWS else None,
        opened=name in ("models.csv", "verdicts.csv"),
        link=csv_link(path),
        columns=list(shown),
        rows=[
            [table_cell(column, value) for column, value in zip(shown, row, strict=True)]
            for row in shown.itertuples(index=False)
        ],
    )


def table_cell(column: object, value: Any) -> TableCell:
    """A value as the page shows it; missing ones are empty."""
    if pd.isna(value):
        return TableCell("")
    if isinstance(value, float | int | np.number) and not isinstance(value, bool):
        return TableCell(number_text(float(value)), float(value))
    return TableCell(str(value), wraps=column in ("reason", "sentence", "fixed_lens_reason"))


def number_text(value: float) -> str:
    """Four digits, or all of a whole number from 1,000."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"


# Running it again
def again(manifest: Manifest) -> str:
    """Commands that give this run again, on a machine like its own."""
    versions, hardware = manifest.versions, manifest.hardware
    packages = " ".join(
        f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if name not in ("python", "lensbench")
    )
    lines = [
        f"# lensbench {versions.get('lensbench', '?')}, Python {versions.get('python', '?')}; "
        + ", ".join(f"{k} {v}" for k, v in sorted(hardware.items())),
        f"python -m pip install {packages}",
    ]
    revision = manifest.git_revision
    if revision:
        changed = " (and local changes)" if str(revision).endswith("dirty") else ""
        lines.append(f"git checkout {str(revision).removesuffix('-dirty')}{changed} && python -m pip install -e .")
    sources = "".join(f" --model {s['source']}" for s in manifest.sources.values())
    asked = f" {shlex.join(manifest.options)}" if manifest.options else sources
    part = len(manifest.models) < len(manifest.suite.models)
    only = "".join(f" --only {m}" for m in manifest.models) if part else ""
    memory = "?" if manifest.peak_gib is None else f"{manifest.peak_gib:g}"
    lines += [
        f"lensbench run {manifest.suite_name}{asked}{only}",
        f"# text or images: {manifest.corpus.spec}, SHA-256 {manifest.corpus.checksum}; seeds {manifest.seeds}",
        f"# took {sum(manifest.seconds.values()):,.0f} s in all, {memory} GiB",
    ]
    return "\n".join(lines)


def settings(manifest: Manifest) -> str:
    """What the manifest says of suite, versions, hardware and data, as JSON."""
    shown: Iterable[str] = ("suite", "versions", "hardware", "git_revision", "corpus", "scored", "sources", "written")
    content = manifest.content()
    return json.dumps({k: content[k] for k in shown if k in content}, indent=1, sort_keys=True)
