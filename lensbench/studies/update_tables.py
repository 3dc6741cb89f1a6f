"""Tables of a calibration of the update decomposition: streams, verdicts, how often intervals cover and shares are off."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lensbench.measures.means import Estimate
from lensbench.measures.update import UpdateResult
from lensbench.measures.update.gates import NO_FALL, NO_ROOM, NOT_KEPT
from lensbench.measures.update.summary import IN_NORM_UNITS, REACH
from lensbench.measures.update.verdict import (
    ADDED,
    CARRIED,
    IN_FACTS,
    REPRESENTED,
    SUFFIXES,
    UNDETERMINED,
    WITHOUT_FIRST,
    UpdateFacts,
    UpdateRule,
    decide_update,
)
from lensbench.statistics import wilson

Row = dict[str, Any]

STREAMS, BLOCKS, VERDICTS, COVERAGE, RIGHT = (
    "streams.csv", "blocks.csv", "verdicts.csv", "coverage.csv", "right.csv",
)  # fmt: skip

SUFFIX = SUFFIXES[WITHOUT_FIRST]

QUANTITIES = (
    "in_place", "carried", "clarity", "persistence", "kept_low", "kept_high", "news", "commission", "drowned",
    "readable_gain",
)  # fmt: skip
"""Indices of the decomposition, without layer 0, that a row of a stream has"""

WITHOUT_TRUTH = {name: f"{name}{SUFFIX}" for name in IN_NORM_UNITS} | {REACH: REACH}
"""What else a verdict looks at: column -> index. No truth is worked out for these."""

LETTERS = {"": ".", NO_FALL: "f", NO_ROOM: "r", NOT_KEPT: "k"}
"""Gate of a pair -> its letter in the column ``gates``, pairs in the order (0, 1), (0, 2), ..."""

IN_BLOCKS = (
    "from_layer", "to_layer", "gate", "persistence", "persistence_ci_low", "persistence_ci_high", "clarity",
    "clarity_ci_low", "clarity_ci_high", "kept_high", "kept_high_ci_low", "kept_high_ci_high", "persistence_chance",
)  # fmt: skip

KEY = ["set", "family", "number"]


# Rows
def stream_tables(rows: list[Row]) -> dict[str, pd.DataFrame]:
    """A row per stream and a row per block: everything that is decided and summed up follows from these two."""
    blocks = [
        dict(zip(KEY, (job["group"], job["family"], job["number"]), strict=True))
        | {name: b[name] for name in IN_BLOCKS}
        for row in rows
        for job in (row["job"],)
        for b in row["result"]["blocks"]
    ]
    return {STREAMS: pd.DataFrame([_stream(row) for row in rows]), BLOCKS: pd.DataFrame(blocks)}


def _stream(row: Row) -> Row:
    job, facts, truths = row["job"], row["facts"], row["truths"]
    result = UpdateResult.model_validate(row["result"])
    found = result.estimates()
    made: Row = {
        "set": job["group"], "family": job["family"], "number": job["number"], "layers": facts["layers"],
        "d": facts["d"], "growth": facts["growth"], "right": "|".join(facts["right"]),
        "gates": "".join(LETTERS[pair["gate"]] for pair in result.pairs),
        "of_refits": result.of_refits.get(f"in_place{SUFFIX}"), "reason": result.reason,
    }  # fmt: skip
    for name in QUANTITIES:
        one = found[name + SUFFIX]
        made |= {name: one.value, f"{name}_ci_low": one.low, f"{name}_ci_high": one.high}
        made |= {f"{name}_{truth}": values.get(name + SUFFIX) for truth, values in truths.items()}
        if one.value is None:
            made[f"{name}_reason"] = one.reason.split(":")[0]
    for name, index in WITHOUT_TRUTH.items():
        one = found[index]
        made |= {name: one.value, f"{name}_ci_low": one.low, f"{name}_ci_high": one.high}
    for name in ("kept", "represented"):
        made[f"{name}_declared"] = truths.get("declared", {}).get(name + SUFFIX)
    made["in_place_all_layers"] = found["in_place"].value
    return made


# Decisions
def facts_of(stream: pd.Series, blocks: pd.DataFrame) -> UpdateFacts:
    """What a verdict looks at, from the row of a stream and the rows of its blocks."""
    named = {name: name + SUFFIX for name in IN_FACTS if name not in WITHOUT_TRUTH} | WITHOUT_TRUTH
    indices = {
        index: Estimate(
            _known(stream[name]), _known(stream[f"{name}_ci_low"]), _known(stream[f"{name}_ci_high"]),
            _text(stream.get(f"{name}_reason")),
        )
        for name, index in named.items()
    }  # fmt: skip
    of_letter = {letter: gate for gate, letter in LETTERS.items()}
    first, last = np.triu_indices(int(stream["layers"]), 1)
    pairs = [
        {"from_layer": i, "to_layer": j, "gate": of_letter[letter]}
        for i, j, letter in zip(first, last, stream["gates"], strict=True)
    ]
    refits = _known(stream["of_refits"])
    rows = blocks.to_dict("records")
    return UpdateFacts.of(WITHOUT_FIRST, indices, pairs, rows, of_refits=refits, reason=_text(stream["reason"]))


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def verdicts(streams: pd.DataFrame, blocks: pd.DataFrame, rule: UpdateRule) -> pd.DataFrame:
    """The verdict on every stream without layer 0: ``set, family, number, right, verdict, gate, between``."""
    of_stream = dict(iter(blocks.groupby(KEY, sort=False)))
    rows = []
    for _, stream in streams.iterrows():
        key = tuple(stream[KEY])
        one = decide_update(rule, facts_of(stream, of_stream[key]))
        rows.append(
            dict(zip(KEY, key, strict=True))
            | {"right": stream["right"], "verdict": one.verdict, "gate": one.gate, "between": "|".join(one.between)}
        )
    return pd.DataFrame(rows)


# Sums
def summaries(streams: pd.DataFrame, blocks: pd.DataFrame, rule: UpdateRule) -> dict[str, pd.DataFrame]:
    """The verdicts by a rule, how often they are right, and how often intervals cover."""
    decided = verdicts(streams, blocks, rule)
    return {VERDICTS: decided, RIGHT: right_table(decided), COVERAGE: coverage_table(streams)}


def share(name: str, count: int, of: int) -> dict[str, float | None]:
    """``count / of`` with its 95 % Wilson interval; None where ``of`` is 0."""
    if not of:
        return {name: None, f"{name}_ci_low": None, f"{name}_ci_high": None}
    low, high = wilson(count, of)
    return {name: count / of, f"{name}_ci_low": low, f"{name}_ci_high": high}


PURE = (ADDED, CARRIED, REPRESENTED)


def groups_of(table: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """All streams of each set, those with one pure answer, those of mixtures, and those of each family."""
    for name, of_set in table.groupby("set", sort=False):
        yield {"set": str(name), "family": "all"}, of_set
        pure = of_set["right"].isin(PURE)
        yield {"set": str(name), "family": "all pure"}, of_set[pure]
        yield {"set": str(name), "family": "all others"}, of_set[~pure]
        for family, rows in of_set.groupby("family", sort=False):
            yield {"set": str(name), "family": str(family)}, rows


def right_table(decided: pd.DataFrame) -> pd.DataFrame:
    """How many streams get a verdict other than *undetermined*, and how many of these verdicts suit the stream."""
    answers = sorted(decided["verdict"].unique())
    rows = []
    for group, of in groups_of(decided):
        committed = of["verdict"] != UNDETERMINED
        suits = np.array([v in right.split("|") for v, right in zip(of["verdict"], of["right"], strict=True)], bool)
        row: Row = {**group, "streams": len(of)}
        row |= share("committed", int(committed.sum()), len(of))
        row |= share("right_when_committed", int((suits & committed).sum()), int(committed.sum()))
        row |= {answer: int((of["verdict"] == answer).sum()) for answer in answers}
        rows.append(row)
    return pd.DataFrame(rows)


BRACKET = "kept_bracket"

TRUTHS = ("lenses", "population", "declared")


def coverage_table(streams: pd.DataFrame) -> pd.DataFrame:
    """By quantity, truth and family: the share of intervals that hold the truth, and how far values are from it.

    ``rms``, ``bias``: of value less truth. ``width``: the median width of intervals. The readable gain is a lower bound:
    it covers where its interval's lower end is not above the truth. ``kept_bracket`` spans the intervals of
    ``kept_low`` and ``kept_high``, whichever is the lower; its ``rms`` is of how far the truth lies outside the two values.
    """
    rows = []
    for group, of in groups_of(streams):
        for name in (*QUANTITIES, BRACKET):
            for truth in TRUTHS:
                if (row := _coverage(of, name, truth)) is not None:
                    rows.append({"quantity": name, "truth": truth, **group, **row})
    return pd.DataFrame(rows).sort_values(["quantity", "truth"], kind="stable")


TINY = 1e-6
"""Below what a table shows: an interval of a share that no sampling moves has a width of rounding errors"""


def _coverage(of: pd.DataFrame, name: str, truth: str) -> Row | None:
    if name == BRACKET:
        if truth != "declared" or of["kept_declared"].isna().all():
            return None
        known = of[of["kept_declared"].notna()]
        true, ends = known["kept_declared"], ["kept_low", "kept_high"]
        # Of a stream that shrinks, S lies below R.
        low = known[[f"{name}_ci_low" for name in ends]].min(axis=1)
        high = known[[f"{name}_ci_high" for name in ends]].max(axis=1)
        below, above = (known[ends].min(axis=1) - true).clip(lower=0), (true - known[ends].max(axis=1)).clip(lower=0)
        off = below - above
    else:
        column = f"{name}_{truth}"
        if column not in of or (known := of[of[column].notna() & of[f"{name}_ci_low"].notna()]).empty:
            return None
        true, low, high = known[column], known[f"{name}_ci_low"], known[f"{name}_ci_high"]
        if name == "readable_gain":
            high = pd.Series(np.inf, known.index)
        off = known[name] - true
    if known.empty:
        return None
    inside = (true >= low - TINY) & (true <= high + TINY)
    row: Row = {"streams": len(known)}
    row |= share("covered", int(inside.sum()), len(known))
    return row | {
        "rms": float((off**2).mean() ** 0.5),
        "bias": float(off.mean()),
        "width": float((high - low).median()),
    }
