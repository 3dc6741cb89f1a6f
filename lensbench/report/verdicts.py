"""The verdicts of a run in words, for the terminal and the page: statements for each model and scope.

The first is the sentence of ``verdicts.csv`` on the update decomposition. The second is about lenses held fixed: its answer
is that of the table, and what it rests on is read from ``indices.csv`` and ``tolerances.csv``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.measures.update.sentences import without_advice
from lensbench.measures.update.verdict import NOT_MEASURED
from lensbench.measures.verdict import (
    INDEX_OF,
    NAMES,
    SCOPES,
    Answer,
    Span,
    VerdictRule,
    grounds,
    sign_over_tolerances,
    spans_on,
)
from lensbench.report.formatting import is_left_out, shown_seeds, with_interval
from lensbench.results.folder import Run
from lensbench.results.verdicts import known_number, span_of, verdict_table

HEADLINE = "without layer 0"
"""The scope that a model is summed up by: advice and landmarks are given for it alone"""


@dataclass(frozen=True)
class UpdateStatement:
    """What the update decomposition says of one model on one scope."""

    model: str
    scope: str
    answer: str
    said: str
    """The graded sentence; what would help stands in that of :data:`HEADLINE` alone, where the model has it"""
    landmarks: str
    """What the same rule says of the model's landmarks; empty on another scope than :data:`HEADLINE`"""

    @property
    def reasons(self) -> str:
        """Everything but the answer."""
        return " ".join(filter(None, [self.said, self.landmarks]))

    def __str__(self) -> str:
        """One line of the terminal."""
        return f"{self.model} ({self.scope}): {self.answer}. {self.reasons}"


def update_statements(run: Run) -> list[UpdateStatement]:
    """What the update decomposition says of every model of a run, by model and scope; none where it was not measured."""
    found = []
    for name, rows in shown_seeds(run.tables["verdicts.csv"]).groupby("model", sort=False):
        headline = HEADLINE if (rows["scope"] == HEADLINE).any() else rows["scope"].iloc[0]
        for _, row in rows[rows["gate"] != NOT_MEASURED].iterrows():
            main = row["scope"] == headline
            said = row["sentence"] if main else without_advice(row["sentence"])
            beside = landmarks_in_words(run.tables["landmarks.csv"], str(name), headline) if main else ""
            found.append(UpdateStatement(str(name), str(row["scope"]), row["verdict"], said, beside))
    return found


def landmarks_in_words(table: pd.DataFrame, model: str, scope: str) -> str:
    """How many of a model's landmarks get the verdict that is known of them, and what others get; empty without any.

    A landmark gets it where it does at every seed.
    """
    rows = table[(table["model"] == model) & (table["index"] == "in_place" + SCOPES[scope])].dropna(subset=["verdict"])
    wrong, count = [], 0
    for landmark, of_landmark in rows.groupby("landmark", sort=False):
        count += 1
        known, right = of_landmark["known"].iloc[0], of_landmark["verdict"] == of_landmark["known"]
        if right.all():
            continue
        gates = of_landmark["gate"].map(lambda gate: f" ({gate})" if isinstance(gate, str) else "")
        answers = list(dict.fromkeys(of_landmark["verdict"] + gates))
        got = f"gets {answers[0]}, not {known}" if len(answers) == 1 else f"at {right.sum()} of {len(right)} seeds"
        wrong.append(f"{landmark} {got}")
    if not count:
        return ""
    each = "".join(f"; {one}" for one in wrong)
    return f"Landmarks that get their known answer: {count - len(wrong)} of {count}{each}."


@dataclass(frozen=True)
class Statement:
    """What lenses held fixed say of one model on one scope."""

    model: str
    scope: str
    answer: Answer
    numbers: str
    """The indices with their intervals, and what one lens keeps here and in random bases."""
    grounds: str
    """Which thresholds are passed, or missed."""
    sensitivity: str
    """What depends on the loss that a lens's ridge may cost; empty where nothing does."""

    @property
    def reasons(self) -> str:
        """Everything but the answer."""
        sentences = [self.numbers, self.grounds, self.sensitivity]
        return " ".join(f"{s[0].upper()}{s[1:]}." for s in sentences if s)

    def __str__(self) -> str:
        """One line of the terminal."""
        return f"{self.model} ({self.scope}, lenses held fixed): {self.answer}. {self.reasons}"


EARLIER_THRESHOLDS = {"news"}
"""Of the rule on the update decomposition in earlier versions: their runs are judged by what is left of it"""


def rule_of(run: Run) -> VerdictRule:
    """The rule that a run was judged by; raises :class:`LensbenchError` for a manifest whose rule is not one."""
    content = dict(run.manifest.suite.verdict)
    if isinstance(update := content.get("update"), dict):
        content["update"] = {name: value for name, value in update.items() if name not in EARLIER_THRESHOLDS}
    try:
        return VerdictRule(**content)
    except (TypeError, ValueError) as error:
        raise LensbenchError(f"{run.folder}: its manifest's verdict is no rule: {error}") from error


def judged(run: Run, rule: VerdictRule) -> Run:
    """The run with verdicts by this rule."""
    before = run.tables["verdicts.csv"]
    known = before.dropna(subset=["known"])
    shares = before.set_index(["model", "seed", "scope"])["of_refits"]
    of_refits = {cast(tuple[str, str, str], key): known_number(share) for key, share in shares.items()}
    verdicts = verdict_table(run.tables, dict(zip(known["model"], known["known"], strict=True)), rule, of_refits)
    return replace(run, tables={**run.tables, "verdicts.csv": verdicts})


def statements(run: Run) -> list[Statement]:
    """What lenses held fixed say of every model of a run whose lenses were read at other layers, by model and scope."""
    indices = run.tables["indices.csv"]
    left_out = is_left_out(indices) & (indices["index"] == INDEX_OF["visibility"])
    absent = set(indices.loc[left_out, "model"])
    verdicts, rule = shown_seeds(run.tables["verdicts.csv"]), rule_of(run)
    return [
        statement(run, rule, str(row["model"]), str(row["scope"]), row["fixed_lens_verdict"])
        for model, rows in verdicts.groupby("model", sort=False)
        if model not in absent
        for _, row in rows.iterrows()
    ]


def statement(run: Run, rule: VerdictRule, model: str, scope: str, answer: Answer) -> Statement:
    """What lenses held fixed say of one model on one scope."""
    indices = run.tables["indices.csv"]
    of_model = indices[indices["model"] == model]
    shown = shown_seeds(of_model).set_index("index")
    seeds = [rows.set_index("index") for seed, rows in of_model.groupby("seed", sort=False) if seed != "all"]
    by_seed = [spans_on(scope, partial(span_of, rows)) for rows in seeds]
    undefined = {}
    for name in NAMES:
        index = f"{INDEX_OF[name]}{SCOPES[scope]}"
        rows = next((r for r, spans in zip(seeds, by_seed, strict=True) if spans[name] is None), None)
        if rows is not None:
            undefined[name] = str(rows.loc[index, "reason"])
    why = grounds(rule, answer, by_seed, undefined)
    return Statement(model, scope, answer, numbers(shown, scope), why, sensitivity(run, shown, model, scope))


def numbers(shown: pd.DataFrame, scope: str) -> str:
    """The three indices of a verdict, and what consistency is made of; empty where all are undefined.

    ``shown``: a model's indices by name.
    """
    suffix = SCOPES[scope]
    if shown.loc[[f"{index}{suffix}" for index in INDEX_OF.values()], "value"].isna().all():
        return ""
    visibility = shown.loc[f"gain_visibility{suffix}"]
    three = [f"{NAMES[name]} {with_interval(shown.loc[f'{INDEX_OF[name]}{suffix}'])}" for name in NAMES]
    if pd.notna(visibility["ci_low"]) and visibility["ci_low"] > 0:
        three[0] += " (fixed lenses see later layers improve)"
    elif pd.notna(visibility["ci_high"]) and visibility["ci_high"] < 0:
        three[0] += " (fixed lenses read later layers worse)"
    parts = [shown.loc[f"{name}{suffix}"] for name in ("shared_retention", "rotated_retention")]
    if any(pd.isna(part["value"]) for part in parts):
        return ", ".join(three)
    kept, null = map(with_interval, parts)
    return f"{', '.join(three)}; one lens keeps {kept} of what a lens per layer reads, in random bases {null}"


def sensitivity(run: Run, shown: pd.DataFrame, model: str, scope: str) -> str:
    """Whether the sign of gain visibility depends on the loss that a lens's ridge may cost; empty where it does not."""
    index = f"gain_visibility{SCOPES[scope]}"
    row = shown.loc[index]
    if pd.isna(row["ci_low"]) or row["ci_low"] <= 0 <= row["ci_high"]:
        return ""  # it has no sign
    curve = run.tables["tolerances.csv"]
    rows = curve[(curve["model"] == model) & (curve["index"] == index) & curve["value"].notna()]
    columns = rows[["tolerance", "value", "ci_low", "ci_high"]].itertuples(index=False, name=None)
    return sign_over_tolerances([(str(tolerance), Span(*span)) for tolerance, *span in columns])
