"""Studies as tables of the terminal: learning curves, tasks, regressions, calibration."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.table import Column, Table

from lensbench.report.formatting import with_interval
from lensbench.results.folder import Run
from lensbench.studies.curves import ALL, BOUND, shown_curves
from lensbench.studies.regression import shown


def learning_table(run: Run) -> Table | None:
    """Held-out cross-entropy by training budget, over the whole context and its parts; None without learning curves."""
    curves = shown_curves(run.tables["curves.csv"])
    if curves.empty:
        return None
    seconds: dict[Any, float] = run.tables["timings.csv"].groupby(["model", "train_tokens"])["seconds"].mean().to_dict()
    parts = list(dict.fromkeys(curves["positions"]))
    table = Table(
        Column("model", no_wrap=True), "tokens", "seconds", *(f"positions {p}" if p != ALL else p for p in parts),
        title="learning curves: held-out cross-entropy, nats/token [95 %]; each budget a training of its own",
    )  # fmt: skip
    for (model, budget), rows in curves.groupby(["model", "train_tokens"], sort=False):
        of = rows.set_index("positions")
        took = f"{seconds[model, budget]:.0f}" if (model, budget) in seconds else ""
        cells = (with_interval(of.loc[part], "ce", "ce_ci_low", "ce_ci_high") for part in parts)
        table.add_row(str(model), f"{budget:,}", took, *cells)
    return table


def in_context_tables(written: dict[str, pd.DataFrame]) -> Iterator[Table]:
    """Distance from the Bayes predictor by task, model and part of the document, and the differences of models."""
    table, gaps = written["task.csv"], written["differences.csv"]
    parts = list(dict.fromkeys(table["positions"]))
    named = [f"positions {p}" if p != ALL else p for p in parts]
    title = "cross-entropy above the exact Bayes predictor's, nats/token [95 %]"
    shown = Table("task", "model", "learning rate", *named, title=title)
    for (task, model), rows in shown_curves(table, "task").groupby(["task", "model"], sort=False):
        of = rows.drop_duplicates("positions").set_index("positions")
        if model == BOUND:
            cells = [with_interval(of.loc[p], "ce", "ce_ci_low", "ce_ci_high") for p in parts]
            shown.add_row(str(task), f"{BOUND} (its own CE)", "", *cells)
            continue
        cells = [with_interval(of.loc[p], "excess", "excess_ci_low", "excess_ci_high") for p in parts]
        at = f"{of['learning_rate'].iloc[0]:g}" + (" (at the edge)" if of["at_edge"].iloc[0] else "")
        shown.add_row(str(task), str(model), at, *cells)
    yield shown
    if len(gaps):
        title = "differences, paired by seed [95 %, Student t; only the claim is corrected]"
        shown = Table("task", "difference", *named, "p of the claim, Holm", title=title)
        for (task, model, against), rows in gaps.groupby(["task", "model", "against"], sort=False):
            of = rows.set_index("positions")
            holm = of["p_holm"].dropna()
            corrected = f"{holm.iloc[0]:.2g}" if len(holm) else ""
            shown.add_row(str(task), f"{model} - {against}", *(with_interval(of.loc[p]) for p in parts), corrected)
        yield shown


def regression_table(table: pd.DataFrame) -> Table:
    """Losses of trained attention and of its rivals, and the distance between their predictions."""
    title = "in-context linear regression: trained self-attention against the best-tuned gradient steps [95 %]"
    written = Table(
        "attention", "layers", "against", "squared error", "prediction distance", "cosine of sensitivities", title=title
    )
    for (attention, layers, against), of in shown(table).groupby(["attention", "layers", "against"], sort=False):
        by = of.set_index("quantity")
        cells = [
            with_interval(by.loc[q], "value", "ci_low", "ci_high") if q in by.index else ""
            for q in ("squared_error", "prediction_distance", "sensitivity_cosine")
        ]
        written.add_row(str(attention), str(layers), str(against) or "(itself)", *cells)
    return written


SHARES = {
    "right_when_committed": "right when committed",
    "cannot_tell": "cannot tell",
    "right_when_committed_without_layer0": "right, without layer 0",
    "cannot_tell_without_layer0": "cannot tell, without layer 0",
    "covered_gain_visibility": "covered: visibility",
    "covered_movement": "movement",
    "covered_shared_consistency": "consistency",
    "covered_shared_retention": "retention",
}
"""Share in ``calibration.csv`` -> the head of its column."""


def calibration_table(summary: pd.DataFrame) -> Table:
    """How often verdicts are right and intervals cover, with 95 % Wilson intervals."""
    columns = (Column(name) for name in ("streams", "n", "committed", *SHARES.values()))
    table = Table(*columns, title="verdicts and intervals on streams of known answer: share [95 %]")
    for _, row in summary.iterrows():
        who = row["set"] if row["by"] == "all" else f"{row['set']}, {row['by']} {row['value']}".replace(" all", "")
        counts = (f"{row[name]:.0f}" if pd.notna(row[name]) else "" for name in ("streams", "committed"))
        shares = [with_interval(row, k, f"{k}_ci_low", f"{k}_ci_high") if pd.notna(row[k]) else "" for k in SHARES]
        table.add_row(who, *counts, *shares)
    return table
