"""Lenses side by side as tables of the terminal: a row for each layer, a column for each lens."""

from collections.abc import Iterator

import pandas as pd
from rich.table import Column, Table

SHOWN = {
    "kl": ("KL to the model's output, nats/token", "{:.3f}"),
    "top10": ("share of tokens whose top word of the model is among the lens's ten", "{:.3f}"),
}
"""Column -> title, and how a number is written"""


def lens_comparison_tables(table: pd.DataFrame) -> Iterator[Table]:
    """KL and precision at ten of every lens by layer; a star where a lens is behind the logit lens beyond its interval."""
    for column, (title, form) in SHOWN.items():
        values = table.pivot(index="layer", columns="lens", values=column)
        behind = table.pivot(index="layer", columns="lens", values="kl_minus_logit_ci_low") > 0
        names = list(dict.fromkeys(table["lens"]))
        shown = Table(Column("layer", no_wrap=True), *names, title=title, title_justify="left")
        for layer in values.index:
            cells = []
            for name in names:
                value, worse = float(values[name][layer]), bool(behind[name][layer])
                star = " *" if worse and column == "kl" else ""
                cells.append("" if pd.isna(value) else form.format(value) + star)
            shown.add_row(str(layer), *cells)
        yield shown
