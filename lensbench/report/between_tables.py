"""Lenses between models as a table of the terminal."""

import pandas as pd
from rich.table import Column, Table

from lensbench.report.formatting import with_interval
from lensbench.results.between import LATER

SHOWN = {
    "penalty": "penalty", "null_penalty": "of a random pairing", "shared": "shared", "same_tokens": "same tokens",
}  # fmt: skip


def between_rows_table(table: pd.DataFrame) -> Table:
    """A row for each two models, map and head: means over the later layers, over seeds where there are several."""
    rows = table[table["states_layer"].astype(str) == LATER]
    means = rows[rows["lens_seed"].astype(str) == "all"]
    what = ["kind", "lens_model", "states_model", "map", "head"]
    covered = set(means[what].itertuples(index=False, name=None))
    single = [key not in covered for key in rows[what].itertuples(index=False, name=None)]
    shown = Table(
        Column("lens of", no_wrap=True), Column("states of", no_wrap=True), "map", "head", "seeds", *SHOWN.values(),
        title="lenses between models: KL beyond the own lens, nats/token, mean over layers from 1 on [95 %]",
    )  # fmt: skip
    for _, row in pd.concat([means, rows[single]]).iterrows():
        lens, states = str(row["lens_seed"]), str(row["states_seed"])
        seeds = lens if lens == states else f"{lens}, {states}"
        cells = (with_interval(row, name, f"{name}_ci_low", f"{name}_ci_high") for name in SHOWN)
        shown.add_row(row["lens_model"], row["states_model"], row["map"], row["head"], seeds, *cells)
    return shown
