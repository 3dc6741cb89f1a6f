"""The first screen of a page: for each model the verdict, one sentence, and where its prediction grows over depth.

A few models have a card each; many have a row each of one table that sorts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from lensbench.measures.update.summary import WITHOUT_LAYER_0
from lensbench.measures.update.verdict import ADDED, NOT_MEASURED, WITHOUT_FIRST
from lensbench.report.figures.blocks import profile_frame
from lensbench.report.figures.palette import model_looks
from lensbench.report.formatting import shown_seeds
from lensbench.report.number_cells import NumberCell, aligned
from lensbench.report.profile_svg import SMALL, TINY, WHOLE, key_of_fills, profile
from lensbench.report.render import render
from lensbench.results.folder import Run
from lensbench.results.schema import unit

MOST_CARDS = 4
"""Models on a page that have a card each; more have a row each"""

COLUMNS = {
    f"in_place{WITHOUT_LAYER_0}": "added in place",
    f"readable_gain{WITHOUT_LAYER_0}": "readable gain",
    f"clarity{WITHOUT_LAYER_0}": "clarity",
    f"news{WITHOUT_LAYER_0}": "news",
}
"""Indices of the table of answers -> the names of their columns"""


@dataclass(frozen=True)
class Answer:
    """What a run says of one model: its name and colour on the page, the verdict, one sentence, and its drawing.

    ``numbers``: cells of :data:`COLUMNS`, then of the cross-entropy.
    """

    name: str
    colour: str
    known: str
    verdict: str
    sentence: str
    drawing: Markup
    numbers: list[NumberCell]

    @property
    def short(self) -> str:
        """The verdict on one line of a table."""
        return self.verdict.replace(ADDED, "added up")

    @property
    def tip(self) -> str:
        """What the row of a table shows on demand: the verdict whole, and the sentence."""
        return f"{self.verdict}. {self.sentence}".strip()


def colours_of(names: Sequence[dict[str, str]]) -> dict[str, str]:
    """Name on the page -> colour: the same as in figures."""
    shown = [name for called in names for name in called.values()]
    return {name: str(look["color"]) for name, look in model_looks(shown).items()}


def answers(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> list[Answer]:
    """The answer on every model of ``runs``, in their order; ``names``: of each run, model -> its name on the page."""
    colours = colours_of(names)
    columns = [number_cells(runs, names, index) for index in COLUMNS] + [losses(runs, names)]
    found: list[Answer] = []
    for run, called in zip(runs, names, strict=True):
        frame = profile_frame(run)
        for model, name in called.items():
            verdict, sentence = answer_of(run, model)
            own = frame[frame["model"] == model]
            size = WHOLE if len(colours) == 1 else SMALL if len(colours) <= MOST_CARDS else TINY
            drawing = profile(own, name, size) if (own["part"] == "block").any() else Markup()
            cells = [column[len(found)] for column in columns]
            found.append(Answer(name, colours[name], known_of(run, model), verdict, sentence, drawing, cells))
    return found


def known_of(run: Run, model: str) -> str:
    """The verdict on a model that is known by its construction, or ''."""
    table = run.tables["verdicts.csv"]
    known = table.loc[table["model"] == model, "known"].dropna()
    return str(known.iloc[0]) if len(known) else ""


def answer_of(run: Run, model: str) -> tuple[str, str]:
    """The verdict on a model from layer 1 on, and the first clause of its sentence; of lenses held fixed without one."""
    rows = shown_seeds(run.tables["verdicts.csv"])
    rows = rows[rows["model"] == model]
    here = rows[rows["scope"] == WITHOUT_FIRST]
    if here.empty:
        return "no verdict", ""
    row = here.iloc[0]
    if row["gate"] == NOT_MEASURED:
        return f"lenses held fixed: {row['fixed_lens_verdict']}", "The update decomposition was not measured."
    gate = f" ({row['gate']})" if pd.notna(row["gate"]) else ""
    sentence = str(row["sentence"]).partition("; ")[0].rstrip(".")
    return f"{row['verdict']}{gate}", f"{sentence}."


def number_cells(runs: Sequence[Run], names: Sequence[dict[str, str]], index: str) -> list[NumberCell]:
    """An index of every model, over seeds where there are several."""
    spans: list[Any] = []
    for run, called in zip(runs, names, strict=True):
        rows = shown_seeds(run.tables["indices.csv"])
        rows = rows[rows["index"] == index].drop_duplicates("model", keep="last").set_index("model")
        spans += [tuple(rows.loc[m, ["value", "ci_low", "ci_high"]]) if m in rows.index else None for m in called]
    return aligned(spans)


def losses(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> list[NumberCell]:
    """The cross-entropy of every model; of several seeds the mean, and no interval: theirs is over documents."""
    spans: list[Any] = []
    for run, called in zip(runs, names, strict=True):
        table = run.tables["models.csv"]
        for model in called:
            own = table.loc[table["model"] == model, ["ce", "ce_ci_low", "ce_ci_high"]].astype(float)
            spans.append(tuple(own.iloc[0]) if len(own) == 1 else (float(own["ce"].mean()), None, None))
    return aligned(spans)


def answer_section(runs: Sequence[Run], names: Sequence[dict[str, str]]) -> Markup:
    """Cards or a table of all answers."""
    found = answers(runs, names)
    units = list(dict.fromkeys(unit(run.tables["models.csv"]) for run in runs))
    columns = ["model", "verdict", "over depth", *COLUMNS.values(), f"cross-entropy, nats/{' or '.join(units)}"]
    parts = key_of_fills()
    return render(
        "answers.html", answers=found, cards=len(found) <= MOST_CARDS, columns=columns,
        key=[part for part in parts if any(part[0] in answer.drawing for answer in found)],
    )  # fmt: skip
