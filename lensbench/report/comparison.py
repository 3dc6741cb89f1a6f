"""A comparison of runs as tables of the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench.report.claims import CELLS, claim_cells
from lensbench.report.compare import Comparison
from lensbench.report.formatting import with_interval
from lensbench.report.in_width import show, show_line
from lensbench.report.joining import on_one_ruler
from lensbench.report.probe_tables import places_table, probe_tables
from lensbench.report.reproduction import differs_by_interval, is_identical
from lensbench.report.study_tables import learning_table
from lensbench.report.terminal import NOT_ALONE, correlation_table, retention_table, ruler_table
from lensbench.report.verdicts import update_statements
from lensbench.results.folder import Run
from lensbench.studies.curves import ALL, differences, shown_curves


def gap_table(run: Run, declared: list[tuple[str, str]]) -> Table | None:
    """Learning curves of declared pairs, and of every model against the one that is best at the largest budget."""
    curves = shown_curves(run.tables["curves.csv"])
    if curves.empty or not (curves["seed"] == ALL).any():
        return None
    whole = curves[curves["positions"] == ALL]
    best = whole[whole["train_tokens"] == whole["train_tokens"].max()].set_index("model")["ce"].idxmin()
    budgets = sorted(whole["train_tokens"].unique())
    title = "cross-entropy by training tokens, paired by seed [95 %, Student t]"
    shown = Table(Column("difference", no_wrap=True), *(f"{b:,}" for b in budgets), title=title)
    against_best = [(str(model), str(best)) for model in dict.fromkeys(whole["model"]) if model != best]
    for model, against in dict.fromkeys([*declared, *against_best]):
        found = differences(run.tables["curves.csv"], model, against)
        gaps = {gap["train_tokens"]: gap for gap in found if gap["positions"] == ALL}
        if gaps:
            shown.add_row(f"{model} - {against}", *(with_interval(gaps[b]) if b in gaps else "" for b in budgets))
    return shown


MOST_PAIRS = 4
"""Pairs of models whose differences are printed, at most; all are in the CSV"""


def print_comparison(comparison: Comparison, console: Console, *, everything: bool = False) -> None:
    """Print whether the runs are the first one again, warnings, one ruler of all models, what differs, and the claims.

    Of runs that are the first one byte for byte there is nothing more to say. ``everything``: print all tables of each run
    too, every value, and every difference of a model in two runs.
    """
    for line in opening(comparison):
        show_line(line, console)
    if is_identical(comparison.reproduction) and not everything:
        return
    table = comparison.table
    show(ruler_table(on_one_ruler(comparison.runs)), console)
    gaps = clear_differences(comparison)
    if gaps is not None:
        show(gaps, console)
    for line in left_to_say(comparison):
        show_line(line, console)
    claims = table[table["kind"] == "claim"]
    if everything:
        print_runs(comparison, console, claims)
    tested = claims if everything else claims[claims["value"].notna()]
    if len(tested):
        show(claim_table(tested), console)
    if len(tested) < len(claims):
        line = f"{len(claims) - len(tested)} more claims of the suite were not tested; --all says why"
        show_line(line, console)
    if everything:
        print_values(table, console)


def opening(comparison: Comparison) -> list[str]:
    """What a comparison begins with: the answer for each run after the first, and warnings, each once."""
    runs = comparison.runs
    first = comparison.reproduction or [f"one run: its {len(runs[0].manifest.models)} models against each other"]
    values = comparison.table[comparison.table["kind"] == "value"]
    warned = values[values["value"].notna() & (values["note"].fillna("") != "")]
    lines = []
    for note, rows in warned.groupby("note", sort=False):
        who = ", ".join(dict.fromkeys(rows["model"]))
        lines.append(f"note: {who}: {note} ({rows['index'].nunique()} quantities)")
    return [*first, *lines]


def shown_differences(comparison: Comparison) -> pd.DataFrame:
    """The differences that are worth printing: over seeds where there are several; of two runs, not those within one."""
    found = comparison.table[comparison.table["kind"] == "difference"]
    keys = ["run", "model", "against_run", "against_model"]
    several = found.groupby(keys)["seed"].transform(lambda seeds: (seeds == "all").any())
    found = found[(found["seed"] == "all") | ~several.astype(bool)]
    if len(comparison.runs) > 1:
        number = {str(run.folder): k for k, run in enumerate(comparison.runs)}
        within = found["run"].map(number) == found["against_run"].map(number)
        found = found[~within]
    return found


def clear_differences(comparison: Comparison) -> Table | None:
    """What differs: a row for each quantity, a column for each pair of models; None where nothing does."""
    found = shown_differences(comparison)
    clear = found[[differs_by_interval(row) for _, row in found.iterrows()]] if len(found) else found
    clear = clear[~clear["index"].isin(NOT_ALONE)]
    pairs = list(
        dict.fromkeys(zip(clear["against_run"], clear["against_model"], clear["run"], clear["model"], strict=True))
    )
    if not pairs:
        return None
    title = "what differs: later - earlier [95 %]; *: not paired"
    shown = Table(Column("index", no_wrap=True), *(pair_name(*pair) for pair in pairs[:MOST_PAIRS]), title=title)
    by = clear.set_index(["index", "against_run", "against_model", "run", "model"]).sort_index()
    for index in dict.fromkeys(clear["index"]):
        rows = [by.loc[[(index, *pair)]].iloc[0] if (index, *pair) in by.index else None for pair in pairs[:MOST_PAIRS]]
        if any(row is not None for row in rows):
            cells = ["" if row is None else f"{with_interval(row)}{'' if row['paired'] else ' *'}" for row in rows]
            shown.add_row(str(index), *cells)
    return shown


def pair_name(against_run: str, against: str, run: str, model: str) -> str:
    """``B - A``, with the folders where both have one name."""
    return f"{model} - {against}" if model != against else f"{model}: {run} - {against_run}"


def left_to_say(comparison: Comparison) -> list[str]:
    """How many quantities do not differ, why differences are not paired, and of how many pairs nothing is printed."""
    found = shown_differences(comparison)
    if found.empty:
        return []
    defined = found[found["value"].notna()]
    clear = sum(differs_by_interval(row) for _, row in defined.iterrows())
    lines = [
        f"{clear} of {len(defined)} differences have an interval without 0, {len(found) - len(defined)} are undefined; "
        "--out writes all of them as CSV, --all prints all tables"
    ]
    pairs = defined[["run", "model", "against_run", "against_model"]].drop_duplicates()
    if len(pairs) > MOST_PAIRS:
        lines.append(f"the table shows {MOST_PAIRS} of {len(pairs)} pairs of models at most")
    unpaired = defined[~defined["paired"].astype(bool)]
    notes = unpaired["note"].fillna("").str.split("; ").str[0]
    return [*lines, *(f"* {note}" for note in dict.fromkeys(notes) if note)]


def print_runs(comparison: Comparison, console: Console, claims: pd.DataFrame) -> None:
    """All tables of every run, and the verdicts on its models in words."""
    on_curves = claims[(claims["index"] == "ce") & claims["against_model"].notna()]
    declared = list(zip(on_curves["model"], on_curves["against_model"], strict=True))
    for run in comparison.runs:
        shown = (retention_table, correlation_table, learning_table)
        for found in (*(make(run) for make in shown), gap_table(run, declared), places_table(run), *probe_tables(run)):
            if found is not None:
                show(found, console)
        for said in update_statements(run):
            console.print(str(said), highlight=False, markup=False)


def print_values(table: pd.DataFrame, console: Console) -> None:
    """Every value, of several seeds over all of them, and claims at other tolerances."""
    at_others = table[table["kind"] == "claim at tolerance"]
    if len(at_others):
        show(claims_at_tolerances(at_others), console, keys=2)
    over = table["seed"] == "all"
    several = table["model"].isin(table.loc[over, "model"])
    show(value_table(table[(table["kind"] == "value") & (over | ~several)]), console)
    differences = table[(table["kind"] == "difference") & (over | ~several)]
    if len(differences):
        show(difference_table(differences), console)


def claim_table(claims: pd.DataFrame) -> Table:
    """What a suite declared, in words, with value, p, p corrected together, and what became of it."""
    title = "claims that the suite declared [95 %: of several seeds Student t, else as the value's own]"
    wrapped = ("claim", "outcome", "declared")
    shown = Table(*(Column(c, no_wrap=c not in wrapped, overflow="fold") for c in CELLS), title=title)
    for row in claims.to_dict("records"):
        shown.add_row(*claim_cells(row))
    return shown


def claims_at_tolerances(rows: pd.DataFrame) -> Table:
    """The declared differences at every loss that a lens's ridge may cost."""
    labels = list(dict.fromkeys(rows["note"]))
    shown = Table("difference", "index", *labels, title="the same by the loss that a lens's ridge may cost")
    for (model, against, index), of in rows.groupby(["model", "against_model", "index"], sort=False):
        by_label = of.set_index("note")
        cells = [with_interval(by_label.loc[label]) if label in by_label.index else "" for label in labels]
        shown.add_row(f"{model} - {against}", str(index), *cells)
    return shown


def value_table(values: pd.DataFrame) -> Table:
    """Every quantity of every model."""
    columns = ("run", "model", "seed", "index", "value [95 %]")
    shown = Table(*(Column(c, no_wrap=True) for c in columns), title="values")
    for _, row in values.iterrows():
        shown.add_row(row["run"], row["model"], str(row["seed"]), row["index"], with_interval(row))
    return shown


def difference_table(differences: pd.DataFrame) -> Table:
    """Differences of two models of a run, or of one model in two runs."""
    columns = ("difference", "index", "value [95 %]", "paired", "note")
    shown = Table(*(Column(c, no_wrap=True) for c in columns), title="differences")
    for _, row in differences.iterrows():
        one_run = row["run"] == row["against_run"]
        names = [row[p + "model"] if one_run else f"{row[p + 'run']}:{row[p + 'model']}" for p in ("", "against_")]
        paired = "yes" if row["paired"] else "no"
        note = "" if pd.isna(row["value"]) else row["note"]
        shown.add_row(" - ".join(names), row["index"], with_interval(row), paired, note)
    return shown
