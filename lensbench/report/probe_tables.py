"""What probes measured, as tables of the terminal; the catalogue of the probes says which table shows a quantity."""

from collections.abc import Iterator

import pandas as pd
from rich.table import Column, Table

from lensbench.probes.catalogue import Quantity
from lensbench.probes.catalogue import Table as Shown
from lensbench.probes.registry import quantities
from lensbench.report.formatting import shown_seeds, with_interval
from lensbench.results.folder import Run

SHOWN_LAYERS, SHOWN_HEADS = 8, 5
"""Layers and heads that a table shows, at most"""


def shown_in(table: Shown) -> list[Quantity]:
    """The quantities that a table shows, in its order."""
    return [quantity for quantity in quantities() if quantity.table == table]


def layer_table(title: str, layers: list[int]) -> Table:
    """An empty table with a column for each layer."""
    return Table(Column("model", no_wrap=True), Column("quantity", no_wrap=True), *map(str, layers), title=title)


def add_by_layer(table: Table, model: str, rows: pd.DataFrame, quantity: Quantity, layers: list[int]) -> None:
    """Add the row of a quantity, from the rows of a model; none where it was not measured."""
    cells = rows[rows["quantity"] == quantity.name].set_index("layer")
    if len(cells):
        shown = (with_interval(cells.loc[k]) if k in cells.index else "" for k in layers)
        table.add_row(model, quantity.label, *shown)


def places_table(run: Run) -> Table | None:
    """What predictive-coding models hold at their known places, by layer; None where nothing was measured."""
    probes = run.tables["probes.csv"]
    found = shown_seeds(probes[(probes["probe"] == "known_places") & probes["value"].notna()])
    if found.empty:
        return None
    layers = sorted(found["layer"].dropna().astype(int).unique())
    table = layer_table("at the known places: means over held-out tokens, by layer [95 %]", layers)
    seen: set[tuple[float, ...]] = set()
    for model, rows in found.groupby("model", sort=False):
        if (values := tuple(rows["value"])) in seen:
            continue  # two views of a model have the same places
        seen.add(values)
        for quantity in shown_in("places"):
            if quantity.of == "layer":
                add_by_layer(table, str(model), rows, quantity, layers)
                continue
            for _, row in rows[rows["quantity"] == quantity.name].iterrows():
                table.add_row(str(model), quantity.label, with_interval(row))
    return table


def probe_tables(run: Run) -> Iterator[Table]:
    """Tables of probes: by layer (of many, some), of whole models, and of the heads with the highest error scores."""
    probes = run.tables["probes.csv"]
    found = shown_seeds(probes[probes["quantity"].isin([q.name for q in shown_in("layers") + shown_in("models")])])
    by_layer = found[found["quantity"].isin([q.name for q in shown_in("layers")]) & found["value"].notna()]
    if len(by_layer):
        yield by_layer_table(by_layer)
    whole = found[found["quantity"].isin([q.name for q in shown_in("models")])]
    if len(whole):
        yield whole_models_table(whole)
    heads = probes[probes["quantity"].isin([q.name for q in shown_in("heads")]) & probes["layer"].notna()]
    heads = heads.drop_duplicates(["model", "quantity", "layer", "other"])
    if len(heads):
        yield heads_table(heads, probes[probes["quantity"] == "error_transport_found"])


def by_layer_table(found: pd.DataFrame) -> Table:
    """A row per model and quantity, a column per layer; of more than :data:`SHOWN_LAYERS`, as many spread evenly."""
    every = sorted(found["layer"].astype(int).unique())
    spread = {every[round(k * (len(every) - 1) / (SHOWN_LAYERS - 1))] for k in range(SHOWN_LAYERS)}
    layers = every if len(every) <= SHOWN_LAYERS else sorted(spread)
    table = layer_table("probes by layer [95 %]", layers)
    for model, rows in found.groupby("model", sort=False):
        for quantity in shown_in("layers"):
            add_by_layer(table, str(model), rows, quantity, layers)
    return table


def whole_models_table(found: pd.DataFrame) -> Table:
    """A row per quantity, a column per model."""
    models = list(dict.fromkeys(found["model"]))
    table = Table(Column("quantity", no_wrap=True), *models, title="probes of whole models [95 %]")
    for quantity in shown_in("models"):
        cells = found[found["quantity"] == quantity.name].drop_duplicates("model").set_index("model")
        if len(cells):
            table.add_row(quantity.label, *(with_interval(cells.loc[m]) if m in cells.index else "" for m in models))
    return table


def heads_table(heads: pd.DataFrame, found: pd.DataFrame) -> Table:
    """A row for each of the heads of a model that were found, and of those with the highest error scores.

    Of both, :data:`SHOWN_HEADS` at most, by score. ``found`` says which were found.
    """
    shown = shown_in("heads")
    title = (
        f"heads found to carry errors and heads with the highest error scores, {SHOWN_HEADS} of each, first seed [95 %]"
    )
    table = Table(Column("model", no_wrap=True), "head", "found", *(q.label for q in shown), title=title)
    hits = found.drop_duplicates(["model", "layer", "other"])
    for model, rows in heads.groupby("model", sort=False):
        score = rows[rows["quantity"] == "error_score"].astype({"value": float, "layer": int, "other": int})
        hit = hits[hits["model"] == model].set_index(["layer", "other"])["value"]
        is_found = pd.Series(
            [hit[at] > 0 for at in zip(score["layer"], score["other"], strict=True)], score.index, bool
        )
        chosen = pd.concat([part.nlargest(SHOWN_HEADS, "value") for part in (score[is_found], score)])
        chosen = chosen.drop_duplicates(["layer", "other"])
        for layer, head in zip(chosen["layer"], chosen["other"], strict=True):
            of = rows[(rows["layer"] == layer) & (rows["other"] == head)].drop_duplicates("quantity")
            cells = of.set_index("quantity")
            values = (with_interval(cells.loc[q.name]) if q.name in cells.index else "" for q in shown)
            table.add_row(str(model), f"L{layer}.H{head}", f"{hit[layer, head]:.2g}", *values)
    return table
