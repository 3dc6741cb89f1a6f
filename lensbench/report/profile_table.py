"""The profile over depth for the terminal: a bar per block, or its number where there is no terminal to draw bars on."""

import pandas as pd
from rich.table import Column, Table

from lensbench.report.figures.blocks import gate_text, profile_frame
from lensbench.report.formatting import with_interval
from lensbench.results.folder import Run

BARS = "▁▂▃▄▅▆▇█"

MOST_SPACED = 12
"""Layers of the deepest model whose bars have a space between them: then a wide bar is a merged group"""

ROWS = {
    "keeps (clarity)": "clarity",
    "drowned": "drowned",
    "adds in place": "in_place",
    "adds elsewhere": "elsewhere",
    "news": "news",
}
"""Label -> the quantity of a block"""


def profile_table(run: Run, *, bars: bool) -> Table | None:
    """What each block keeps, adds in place, adds elsewhere, drowns and brings, with the model's own landmarks.

    ``bars``: draw a bar per block (``?``: undetermined, ``-``: undefined), as wide as it is deep; else write its number.
    None for a run without the decomposition.
    """
    frame = profile_frame(run)
    if frame.empty:
        return None
    frame = frame.assign(elsewhere=1 - frame["in_place"])
    frame = frame.assign(elsewhere_low=1 - frame["in_place_high"], elsewhere_high=1 - frame["in_place_low"])
    bars_column = Column("blocks, from layer 0", no_wrap=bars)
    own = bool((frame["part"] == "landmark").any())
    table = Table(
        Column("model", max_width=24), "", bars_column, "from layer 1 on", *["its own landmarks"] * own,
        title="where the prediction grows, block by block [95 %]",
    )  # fmt: skip
    for model, of_model in frame.groupby("model", sort=False):
        blocks, whole = of_model[of_model["part"] == "block"], of_model[of_model["part"] == "overall"].iloc[0]
        if blocks.empty:
            table.add_row(str(model), "not decomposed", "", whole["reason"])
            continue
        landmarks = of_model[of_model["part"] == "landmark"]
        for k, (label, quantity) in enumerate(ROWS.items()):
            shown = bar_line(blocks, quantity) if bars else number_line(blocks, quantity)
            near = [landmark_text(landmarks, quantity)] * own
            who = (str(model), whole["verdict"])[k] if k < 2 else ""
            table.add_row(who, label, shown, overall_text(whole, quantity), *near)
        if (blocks["gate"] != "").any():
            stopped = [f"{span_text(row)} {gate_text(row)}" for _, row in blocks.iterrows() if row["gate"]]
            table.add_row("", "undetermined", ", ".join(stopped), "", end_section=True)
    return table


def landmark_text(landmarks: pd.DataFrame, quantity: str) -> str:
    """A quantity of every landmark that has it; not what was added elsewhere, which is the rest of what is in place."""
    if quantity == "elsewhere":
        return ""
    rows = landmarks[landmarks[quantity].notna()]
    return ", ".join(f"+{name} {short(value)}" for name, value in zip(rows["name"], rows[quantity], strict=True))


def short(value: float) -> str:
    """Two decimals."""
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero


def span_text(row: pd.Series) -> str:
    """The layers that a block lies between."""
    return f"{row['from_layer']:.0f}-{row['to_layer']:.0f}"


def missing_mark(row: pd.Series, quantity: str) -> str:
    """What stands for a value that is missing: undetermined by a gate, or undefined."""
    return "?" if row["gate"] and quantity in ("in_place", "elsewhere") else "-"


def bar_line(blocks: pd.DataFrame, quantity: str) -> str:
    """A bar for each block, repeated for each of its layers."""
    spaced = " " if blocks["layers"].iloc[0] <= MOST_SPACED else ""
    cells = []
    for _, row in blocks.iterrows():
        value, wide = row[quantity], int(row["to_layer"] - row["from_layer"])
        mark = missing_mark(row, quantity) if pd.isna(value) else BARS[round(min(max(value, 0), 1) * (len(BARS) - 1))]
        cells.append(mark * wide)
    return spaced.join(cells)


def number_line(blocks: pd.DataFrame, quantity: str) -> str:
    """The number of each block, in their order; with the layers that it lies between where it is a merged group."""
    cells = []
    for _, row in blocks.iterrows():
        number = missing_mark(row, quantity) if pd.isna(row[quantity]) else short(row[quantity])
        cells.append(number if row["to_layer"] - row["from_layer"] == 1 else f"{number} ({span_text(row)})")
    return " ".join(cells)


def overall_text(whole: pd.Series, quantity: str) -> str:
    """An index from layer 1 on, with its interval; the gate where it is undetermined."""
    if pd.isna(whole[quantity]):
        return f"undetermined: {whole['gate']}" if missing_mark(whole, quantity) == "?" else "undefined"
    ends = {"ci_low": whole.get(f"{quantity}_low"), "ci_high": whole.get(f"{quantity}_high")}
    return with_interval({"value": round(whole[quantity], 3), **ends})
