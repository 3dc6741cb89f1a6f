"""What a probe is, and what its quantities are: data from which tables, panels, validation and documentation are made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lensbench.probes.measured import Measurement
from lensbench.probes.subject import Subject
from lensbench.streams.parts import evaluating

Owner = Literal["model", "layer", "pair", "head", "blocks", "rank", "layer and rank", "target"]
"""What a value belongs to. The columns ``layer`` and ``other`` of ``probes.csv`` say which one: a layer or block
(``layer``), two layers (both), a head of a layer (both), a number of blocks or a rank (``other``), a rank of a layer's
lens (both), a target in percent (``other``), or the whole model (neither)."""


Table = Literal["places", "layers", "models", "heads"]
"""The table of the terminal that shows a quantity, in the order of the catalogue."""


ANYWHERE = "any models of the same text"
SAME_TOKENIZER = "models with the same text and tokenizer"
SAME_WIDTH = "models of the same width"
WITH_ITS_NULL = "its quantity, in the same model"


@dataclass(frozen=True)
class Panel:
    """How the figure ``probes.png`` draws a quantity: one panel, one line per model."""

    over: str
    """Label of the horizontal axis"""
    name: str
    """Label of the vertical axis"""
    at: Literal["layer", "other", "distance"] = "layer"
    """What is on the horizontal axis; over a distance of two layers, means are drawn and no intervals"""
    null: str = ""
    """The quantity that is drawn as a thin line"""
    zero: bool = True
    """Whether a line is drawn at zero"""
    symlog: bool = False
    one_view: bool = False
    """Two views of a model have the same values: one line is drawn"""


@dataclass(frozen=True)
class Quantity:
    """One quantity that a probe measures, as the column ``quantity`` of ``probes.csv`` names it."""

    name: str
    label: str
    """What tables call it"""
    formula: str
    """What is computed, with the unit"""
    of: Owner
    reading: str
    """How to read it, in one sentence"""
    comparable: str = ANYWHERE
    """Between what its values can be compared"""
    table: Table | None = None
    panel: Panel | None = None


def of_model(name: str, label: str, formula: str, reading: str, table: Table | None = "models") -> Quantity:
    """A quantity of a whole model, in words or nats of its tokenizer."""
    return Quantity(name, label, formula, "model", reading, SAME_TOKENIZER, table)


@dataclass(frozen=True)
class Probe:
    """One probe: a function of a :class:`Subject`, and the catalogue of what it measures.

    A suite names it in ``probes``. ``images`` says that it needs no text.
    """

    name: str
    function: Callable[[Subject], Measurement]
    measures: str
    """What it measures, in one line"""
    quantities: tuple[Quantity, ...]
    images: bool = False
    control: str = ""
    """Its null, or its control"""
    topic: str = ""
    """What its panels show, for the title of the figure"""
    version: int = 1
    """It is raised where the numbers change: results of another version are not reused, and not compared"""

    def measure(self, subject: Subject) -> Measurement:
        """What the probe finds in a subject; its model is in evaluation mode, and then as it was."""
        with evaluating(subject.stream.model):
            return self.function(subject)

    def quantity(self, name: str) -> Quantity | None:
        """The quantity of this name; None where the probe has no such quantity."""
        return next((q for q in self.quantities if q.name == name), None)


def probes_markdown(probes: Iterable[Probe]) -> str:
    """A Markdown table with a row per probe: what it measures, and its null."""
    rows = [f"| `{p.name}` | {p.measures} | {p.control} |" for p in probes]
    return "\n".join(["| probe | measures | null, or control |", "|---|---|---|", *rows]) + "\n"


def quantities_markdown(probes: Iterable[Probe]) -> str:
    """A Markdown table with a row per quantity of every probe."""
    head = "| quantity | of | what is computed | how to read it | comparable |"
    lines = [head, "|---|---|---|---|---|"]
    for probe in probes:
        lines.append(f"| **`{probe.name}`** | | | | |")
        for q in probe.quantities:
            formula = q.formula.replace("|", r"\|")  # a bare one would end the cell
            lines.append(f"| `{q.name}` | {q.of} | {formula} | {q.reading} | {q.comparable} |")
    return "\n".join(lines) + "\n"
