"""One self-contained HTML page from run folders: the ruler, verdicts, heatmaps, curves, tables, and how to run it again.

It reads run folders and nothing else. All that it shows is in the markup; the script adds tips and sorts tables. The page
asks for no file, font or address outside itself.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.measures.update.sentences import update_rule_in_words
from lensbench.measures.verdict import rule_in_words
from lensbench.report.answers import answer_section, colours_of
from lensbench.report.claims import CELLS, claim_cells, claim_rows
from lensbench.report.compare import Comparison, read_distinct
from lensbench.report.comparison import opening, pair_name, shown_differences
from lensbench.report.figures.frames import lens_frame, transfer_frame
from lensbench.report.figures.transfer import COSTS, cost_scale
from lensbench.report.joining import grouped, joined, names_of
from lensbench.report.number_cells import aligned
from lensbench.report.page_tables import PageColumn, TableCell, csv_link, sortable, table_html
from lensbench.report.plane_svg import planes
from lensbench.report.profile_svg import profiles
from lensbench.report.render import render, shade
from lensbench.report.reproduction import differs_by_interval
from lensbench.report.svg import heatmap, kl_curves
from lensbench.report.terminal import doubts
from lensbench.report.verdicts import Statement, UpdateStatement, rule_of, statements, update_statements
from lensbench.results.folder import Run, table_file
from lensbench.results.manifest import Manifest
from lensbench.results.schema import SCHEMA, of_the_matrix, unit
from lensbench.runtime.files import write_atomically

SHOWN_TABLES = ("models.csv", "indices.csv", "verdicts.csv", "baselines.csv", "tolerances.csv")


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of run folders; raises :class:`LensbenchError` for folders that are damaged or hold no run."""
    runs = read_distinct(list(folders))
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
    claims = [claims for parts in grouped([*runs]) if (claims := claim_list(joined(parts)))]
    drawn = profiles(runs, names)
    plane, held_fixed = planes(runs, names, colours_of(names))
    content = render(
        "report.html",
        title=questions[0] if questions else "lensbench",
        folders=list(dict.fromkeys(run.folder.name for run in runs)),
        heading=questions[0] if len(questions) == 1 else f"{len(runs)} runs, {len(questions)} questions",
        compared=Markup() if comparison is None else compared_section(comparison),
        answers=answer_section(runs, names),
        contents=contents(runs, drawn=bool(drawn), placed=bool(plane), claims=bool(claims)),
        verdicts=verdict_list(runs, names),
        profiles=drawn,
        claims=claims,
        plane=plane,
        ruler=held_fixed,
        sections=[
            run_section(run, place, called, question=len(questions) > 1)
            for place, (run, called) in enumerate(zip(runs, names, strict=True))
        ],
    )
    return f"{content}\n"


def contents(runs: Sequence[Run], *, drawn: bool, placed: bool, claims: bool) -> list[tuple[str, str]]:
    """The sections of a page: where each is, and its name."""
    found = [
        *[("profile", "Where the prediction grows")] * drawn,
        *[("plane", "Among landmarks")] * placed,
        *[("claims", "Claims")] * claims,
        ("verdicts", "The verdicts in full"),
        ("ruler", "Lenses held fixed"),
    ]
    for place, run in enumerate(runs):
        of = f" of {run.folder.name}" if len(runs) > 1 else ""
        cells = of_the_matrix(run.tables["transfer.csv"])
        read = (cells["lens_layer"] != cells["stream_layer"]) & cells["penalty_ce"].notna()
        first = "Transfer penalties" if read.any() else "Doubts"
        found += [(f"run{place}", f"{first}{of}"), (f"kl{place}", f"KL by layer{of}")]
        found += [(f"tables{place}", f"Tables{of}"), (f"settings{place}", f"Settings{of}")]
    return found


def compared_section(comparison: Comparison) -> Markup:
    """The answer of a comparison, its warnings, and every difference whose interval leaves out 0."""
    found = shown_differences(comparison)
    clear = [row for _, row in found.iterrows() if differs_by_interval(row)]
    columns = {
        "difference": [pair_name(r["against_run"], r["against_model"], r["run"], r["model"]) for r in clear],
        "index": [r["index"] for r in clear],
        "paired": ["yes" if r["paired"] else "no" for r in clear],
        "note": [r["note"] if isinstance(r["note"], str) else "" for r in clear],
    }
    written = [
        PageColumn(name, [TableCell(text, wraps=name == "note") for text in texts]) for name, texts in columns.items()
    ]
    spans = [(r["value"], r["ci_low"], r["ci_high"]) for r in clear]
    written.insert(2, PageColumn("value [95 %]", [TableCell(c.text, c.value, c.interval) for c in aligned(spans)]))
    title = f"What differs: {len(clear)} of {len(found)} differences have an interval without 0"
    table = sortable("table-compared", title, written, opened=True) if clear else Markup()
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
def run_section(run: Run, place: int, names: dict[str, str], *, question: bool) -> Markup:
    """Everything about one run below the ruler; ``place``: its number on the page; with its ``question`` or without."""
    manifest = run.manifest
    per = unit(run.tables["models.csv"])
    cells, lines = mean_cells(of_the_matrix(run.tables["transfer.csv"])), lens_frame(run)
    has_matrix = set(transfer_frame(run)["model"])
    cells = cells[cells["model"].isin(has_matrix)]
    scale = cost_scale(cells) if has_matrix else None
    further = [found for name in SCHEMA if name not in SHOWN_TABLES and (found := table_file(run.folder, name))]
    return render(
        "run.html",
        place=place,
        suite=manifest.suite_name,
        folder=run.folder.name,
        question=manifest.suite.question if question else "",
        lines=doubts(run),
        unit=per,
        scale=scale,
        ramp=", ".join(shade(k / 8, COSTS)[0] for k in range(9)),
        maps=[
            heatmap(cells[cells["model"] == model], name, scale, per)
            for model, name in names.items()
            if scale is not None and model in has_matrix
        ],
        curves=[kl_curves(lines, model, name, per) for model, name in names.items()],
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
