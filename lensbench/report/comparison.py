"""A comparison of runs as tables of the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench.report.claims import CELLS, claim_cells
from lensbench.report.compare import Comparison
from lensbench.report.formatting import with_interval
from lensbench.report.probe_tables import places_table, probe_tables
from lensbench.report.study_tables import learning_table
from lensbench.report.terminal import correlation_table, retention_table, ruler_table
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


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print whether the runs reproduce the first one, then values and differences; across runs, of the same model."""
    for line in comparison.reproduction:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = comparison.table
    claims = table[table["kind"] == "claim"]
    on_curves = claims[(claims["index"] == "ce") & claims["against_model"].notna()]
    declared = list(zip(on_curves["model"], on_curves["against_model"], strict=True))
    for run in comparison.runs:
        shown = (ruler_table, retention_table, correlation_table, learning_table)
        for found in (*(make(run) for make in shown), gap_table(run, declared), places_table(run), *probe_tables(run)):
            if found is not None:
                console.print(found)
        for said in update_statements(run):
            console.print(str(said), highlight=False, markup=False)
    if len(claims):
        console.print(claim_table(claims))
        at_others = table[table["kind"] == "claim at tolerance"]
        if len(at_others):
            console.print(claims_at_tolerances(at_others))
    over = table["seed"] == "all"
    several = table["model"].isin(table.loc[over, "model"])
    console.print(value_table(table[(table["kind"] == "value") & (over | ~several)]))
    differences = table[table["kind"] == "difference"]
    if len(comparison.runs) > 1:
        # Of the same model across runs, where there are several; between models, within one.
        differences = differences[differences["model"] == differences["against_model"]]
    if over.any():
        left = len(differences)
        differences = differences[~(over | several).reindex(differences.index)]
        if left > len(differences):
            console.print(f"{left - len(differences)} more differences, by seed and over seeds: --out writes them")
    if len(differences):
        console.print(difference_table(differences))


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
