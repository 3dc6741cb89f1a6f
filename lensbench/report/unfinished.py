"""The page of a run that has not finished: the numbers that are there, each model with what is still missing of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from lensbench.report.figures.blocks import frame_of
from lensbench.report.page_tables import page_columns, sortable
from lensbench.report.profile_svg import profile
from lensbench.report.render import render
from lensbench.results.folder import PAGE, write_table
from lensbench.results.schema import OF_UPDATES, SCHEMA, no_rows
from lensbench.runtime.files import write_atomically

ASIDE = "unfinished"
"""The folder in a run folder for the tables of a run that has not finished"""


@dataclass(frozen=True)
class ModelSoFar:
    """A model of a run that has not finished."""

    name: str
    missing: Sequence[str]
    """What is still to come, in words"""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """By the names that a run gives them: those of the decomposition, or all"""

    @property
    def sentences(self) -> list[str]:
        """The verdicts of the update decomposition, in words."""
        rows = self.tables["verdicts.csv"].to_dict("records") if "verdicts.csv" in self.tables else []
        return [
            f"{row['scope']}: {row['verdict']}. {row['sentence']}" for row in rows if isinstance(row["verdict"], str)
        ]

    @property
    def profile(self) -> Markup:
        """The profile over depth; empty where there is none."""
        if "blocks.csv" not in self.tables:
            return Markup()
        frame = frame_of({name: no_rows(name) for name in OF_UPDATES} | dict(self.tables))
        return profile(frame, self.name) if (frame["part"] == "block").any() else Markup()

    def shown(self, place: int) -> list[Markup]:
        """Indices, and KL by layer; ``place``: its number on the page."""
        found = []
        for name, columns in (("indices.csv", ["index"]), ("lenses.csv", ["lens", "stage", "layer"])):
            rows = self.tables.get(name)
            if rows is None or rows.empty:
                continue
            number = [name for name in NUMBERS[name] if name in rows]
            shown = rows[[*columns, *number]]
            found.append(sortable(f"table-{place}-{name.partition('.')[0]}", name, page_columns(shown), opened=True))
        return found


NUMBERS = {"indices.csv": ("value", "ci_low", "ci_high"), "lenses.csv": ("kl", "kl_ci_low", "kl_ci_high")}
"""Table -> its number and the ends of the interval"""


def write_unfinished(folder: Path, question: str, models: Sequence[ModelSoFar], command: str, state: str) -> None:
    """Write ``report.html`` and the tables so far of an unfinished run; each is moved into place whole."""
    parts = [
        {
            "name": m.name,
            "missing": list(m.missing),
            "sentences": m.sentences,
            "profile": m.profile,
            "tables": m.shown(k),
        }
        for k, m in enumerate(models)
    ]
    content = render(
        "unfinished.html", title=f"unfinished: {question}", question=question, folder=folder.resolve().name, state=state,
        command=command, aside=f"{ASIDE}/", models=parts,
    )  # fmt: skip
    write_atomically(folder / PAGE, lambda partial: partial.write_text(f"{content}\n", encoding="utf-8"))
    (folder / ASIDE).mkdir(exist_ok=True)
    for name in SCHEMA:
        whole = [m.tables[name] for m in models if name in m.tables and set(m.tables[name]) == set(SCHEMA[name])]
        if whole and any(len(table) for table in whole):
            write_table(folder / ASIDE, name, pd.concat([t for t in whole if len(t)], ignore_index=True))
