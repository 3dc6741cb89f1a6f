"""A trace in the terminal: what each layer predicts after each token, and what prediction errors did."""

from collections.abc import Sequence

import numpy as np
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text
from tuned_lens.plotting import PredictionTrajectory

from lensbench.report.render import shade
from lensbench.report.trace import Growth, block_name, layer_name, next_words, words_of
from lensbench.report.trace_errors import PredictionErrors, largest_moves, moved_title

HIT = "\u2713 "
"""The mark of a layer's most probable word that is the text's own next one"""


def trace_tables(trajectory: PredictionTrajectory, tokens: int, width: int) -> list[Table]:
    """Per layer (the model itself last) its most probable next word after each of the last ``tokens`` tokens.

    Coloured by its probability, with the same ramp as on the page. Columns that do not fit into ``width`` characters go into
    further tables.
    """
    shown = min(tokens, trajectory.num_tokens)
    words = words_of(trajectory, trajectory.input_ids[-shown:])
    log_probs = trajectory.log_probs[:, -shown:]  # [L+1, n, V]
    true, targets = next_words(trajectory)[-shown:], np.asarray(trajectory.targets)[-shown:]
    rows = []
    for layer, row in enumerate(log_probs.argmax(-1)):
        chances = np.exp(np.take_along_axis(log_probs[layer], row[:, None], -1)[:, 0])
        cells = []
        for at, (word, chance) in enumerate(zip(words_of(trajectory, row), chances, strict=True)):
            fill, ink = shade(float(chance))
            hit = bool(true[at]) and row[at] == targets[at]
            cells.append(Text(f"{HIT if hit else ''}{word} {chance:.2f}", style=f"{ink} on {fill}"))
        rows.append((layer_name(layer, len(log_probs)), cells))
    rows.append(("in the text", [Text(word) for word in true]))
    return tables_within(Text(f"next word ({HIT.strip()}: as in the text)"), "after", words, rows, width)


def growth_tables(trajectory: PredictionTrajectory, growth: Growth, tokens: int, width: int) -> list[Table]:
    """What each block adds to the log-probability of each next token, of the last ``tokens``; how much of it in place."""
    shown = min(tokens, trajectory.num_tokens)
    words = words_of(trajectory, np.asarray(trajectory.targets)[-shown:])
    rows = [("layer 0", [Text(f"{x:.2f}") for x in growth.start[-shown:]])]
    for block, added in enumerate(growth.added):
        beside = growth.in_place[block] if block < len(growth.in_place) and not growth.fixed else None
        texts = [
            Text(f"{x:+.2f}" + ("" if beside is None else f" ({beside[k]:+.2f})"))
            for k, x in list(enumerate(added))[-shown:]
        ]
        rows.append((block_name(block, len(growth.added)), texts))
    rows.append(("model", [Text(f"{x:.2f}") for x in (growth.start + growth.added.sum(0))[-shown:]]))
    said = "" if growth.fixed else " (of them in place)"
    return tables_within(
        Text(f"log-probability of each next word, nats: what blocks add{said}"), "of", words, rows, width
    )


def error_tables(
    errors: PredictionErrors, words: Sequence[str], word: str, tokens: int, width: int
) -> list[RenderableType]:
    """Sizes and surprisals of the last tokens' errors, and which errors moved the last prediction, ``word``, most."""
    shown = min(tokens, len(words))
    rows = []
    for layer, (sizes, nats) in enumerate(zip(errors.size, errors.surprisal, strict=True)):
        pairs = zip(sizes[-shown:], nats[-shown:], strict=True)
        rows.append((f"layer {layer}", [Text("" if np.isnan(n) else f"{s:.2f} ({n:.2f})") for s, n in pairs]))
    title = Text("size of the prediction error that each token revealed (nats of surprise under that layer)")
    moves = Table("layer", "error revealed by", "position", "logit")
    for layer, s, change in largest_moves(errors):
        moves.add_row(str(layer), Text(words[s]), str(s), f"{change:+.3f}")
    return [
        *tables_within(title, "error at", words[-shown:], rows, width),
        Text(moved_title(errors, words, word)),
        moves,
    ]


def tables_within(
    title: Text, corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]], width: int
) -> list[Table]:
    """A table with a column per token, cut into several that are no wider than ``width``: no cell loses its number."""
    wide = [max(Text(head).cell_len, *(cells[k].cell_len for _, cells in rows)) + 3 for k, head in enumerate(heads)]
    front = max(len(corner), *(len(name) for name, _ in rows)) + 4
    tables, start = [], 0
    while start < len(heads):
        end, used = start + 1, front + wide[start]
        while end < len(heads) and used + wide[end] <= width:
            used += wide[end]
            end += 1
        columns = (Column(Text(head), no_wrap=True) for head in heads[start:end])
        table = Table(Column(corner, no_wrap=True), *columns, title=None if start else title)
        for name, cells in rows:
            table.add_row(name, *cells[start:end])
        tables.append(table)
        start = end
    return tables
