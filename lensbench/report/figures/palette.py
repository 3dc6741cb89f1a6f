"""One palette of models by name: a model has its colour in every figure and on every page."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lensbench.report.figures.style import COLOURS, line_look
from lensbench.report.series import SIZE
from lensbench.suite.snapshots import AT

ROWS: tuple[tuple[str, ...], ...] = (
    (
        "gpt-conv", "pc", "pc+state", "pc-relaxed", "gpt-looped", "gpt-tied", "gpt-partitioned", "gpt-untrained",
        "gpt-random", "gpt",
    ),
    (
        "vit", "pc-tied", "pc-tied+state", "pc-ds", "gpt2", "pc-relaxed-none", "", "gpt-conv+rotated", "", "pc-none",
    ),
    ("", "pc-none+state", "", "pc-linear+state", "pc-ds+state", "pc+state+rotated", "", "", "", "gpt-noskip"),
    ("", "cnn-residual", "", "cnn-plain", "cnn-residual-slow", "gpt-ds", "", "", "", ""),
)  # fmt: skip
"""Models of the suites. Those of one column have one colour; no run has two models of one column."""

FIXED: Mapping[str, int] = {
    name: COLOURS * row + column for row, names in enumerate(ROWS) for column, name in enumerate(names) if name
}
"""Model of a suite -> its number in the palette"""

STRONG_FIRST = (0, 3, 2, 4, 1, 9, 5, 7, 6, 8)
"""Colours for other models, the palest last"""

STRONG = 6
"""So many of them may a name alone choose"""

OF_A_FOLDER = re.compile(r" \([^()]*\)$")
"""What a page adds to a name that two of its runs have"""


def without_size(name: str) -> str:
    """A model's name without its size, its checkpoint and its folder: ``pc+state`` of ``pc-64k+state@10000 (run)``."""
    whole = OF_A_FOLDER.sub("", name).partition(AT)[0]
    return SIZE.sub("", whole, count=1).strip("-_.+") or whole


def palette_numbers(models: Iterable[str]) -> dict[str, int]:
    """Model -> its number in the palette, no two alike (see :func:`line_look`).

    A model of a suite has its own, and the same colour at every size and checkpoint. Of any other the name chooses the
    colour; where a model before it has that colour, it takes the next one that is free.
    """
    names = list(dict.fromkeys(map(str, models)))
    found: dict[str, int] = {}
    # Short names first: of a model and its checkpoints, the model has the look that it has alone.
    for name in sorted(names, key=lambda name: (AT in name, OF_A_FOLDER.search(name) is not None)):
        if (number := FIXED.get(without_size(name))) is not None:
            found[name] = _free(number, found.values())
    for name in names:
        if name not in found:
            found[name] = _free(_colour_of_other(name, found.values()), found.values())
    return {name: found[name] for name in names}


def _colour_of_other(name: str, taken: Iterable[int]) -> int:
    """The colour that a name chooses, or the next that none has; where all are taken, the next that fewest have."""
    first = zlib.crc32(OF_A_FOLDER.sub("", name).encode()) % STRONG
    order = [*STRONG_FIRST[first:STRONG], *STRONG_FIRST[:first], *STRONG_FIRST[STRONG:]]
    in_use = Counter(number % COLOURS for number in taken)
    return min(order, key=lambda colour: in_use[colour])


def _free(number: int, taken: Iterable[int]) -> int:
    """The first free number of this colour."""
    used = set(taken)
    while number in used:
        number += COLOURS
    return number


def model_looks(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Model -> its colour, marker and dash."""
    return {model: line_look(number) for model, number in palette_numbers(models).items()}
