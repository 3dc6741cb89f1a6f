"""The numbers of run folders, for templates: means over seeds, paired differences, verdicts, claims, tables of models."""

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.texts.numbers import Condition, Number, TextError, UndefinedNumber, markdown
from lensbench.report.claims import claim_rows, p_text
from lensbench.report.joining import joined
from lensbench.report.landmarks import landmark_table
from lensbench.report.settings import REPORTED, doubt_frame, settings_frame
from lensbench.report.verdicts import rule_of
from lensbench.results.folder import Run, read_run
from lensbench.results.sums import by_document, clustered
from lensbench.statistics import bootstrap_weights, interval, mean_over_seeds

LATER = "without layer 0"
ABSENT = "-"
"""What tables show where a number is undefined"""


@cache
def run_of(folder: Path) -> Run:
    """A run folder, read once."""
    return read_run(folder)


class Results:
    """Some run folders under one root, read as one. Numbers are means over seeds where there are several.

    Every method raises :class:`TextError` where a table has no such row, :class:`UndefinedNumber` where it has no value.
    """

    def __init__(self, root: Path, names: Sequence[str]):
        for name in names:
            if not (root / name).is_dir():
                raise TextError(f"results/{name} is missing")
        self.names, self.folders = names, [root / name for name in names]

    @cached_property
    def runs(self) -> list[Run]:
        """The runs, checked."""
        return [run_of(folder) for folder in self.folders]

    @property
    def windows(self) -> str:
        """The fitting windows of the first run and its held-out ones, each times the positions that are looked at."""
        suite = self.runs[0].manifest.content()["suite"]
        parts = [(suite[part]["sequences"], suite[part]["positions"]) for part in ("fit", "evaluate")]
        return ", ".join(f"{windows} x {positions}" for windows, positions in parts)

    @property
    def train_tokens(self) -> str:
        """The training tokens of the first run's text, in millions."""
        return f"{self.runs[0].manifest.content()['corpus']['tokens']['train'] / 1e6:.1f} million"

    @property
    def epochs(self) -> str:
        """How often its trainings read them."""
        return f"{self.runs[0].manifest.content()['corpus']['epochs']:.1f}"

    @property
    def largest(self) -> int:
        """The parameters of the largest model."""
        return int(self.table("models.csv")["parameters"].max())

    @property
    def held_out(self) -> int:
        """The held-out windows of the first run."""
        return self.runs[0].manifest.suite.evaluate.sequences

    @property
    def probe_windows(self) -> int:
        """The held-out windows that the probes of the first run read."""
        evaluate = self.runs[0].manifest.suite.evaluate
        return min(evaluate.sequences, evaluate.probe_sequences)

    def weights(self, model: str) -> list[str]:
        """What a model's weights are known by, at every seed."""
        known = self.runs[0].manifest.weights
        return [known[name] for name in sorted(known) if name.rpartition("-seed")[0] == model]

    @property
    def minutes(self) -> str:
        """What the stages of the longest of these runs took."""
        return f"{max(sum(run.manifest.seconds.values()) for run in self.runs) / 60:.0f} minutes"

    @property
    def memory(self) -> str:
        """The peak memory of the runs' processes."""
        return f"{max(run.manifest.peak_gib or 0 for run in self.runs):.1f} GiB"

    @property
    def landmarks(self) -> str:
        """The models as landmarks, as CSV."""
        return landmark_table(self.runs).to_csv(index=False, lineterminator="\n")

    @cache  # noqa: B019 (as long as the environment, which is as long as the command)
    def table(self, name: str) -> pd.DataFrame:
        """A table of all folders."""
        found = pd.concat([run.tables[name] for run in self.runs], ignore_index=True)
        return found.assign(seed=found["seed"].astype(str)) if "seed" in found else found

    def rows(self, name: str, **keys: Any) -> pd.DataFrame:
        """The rows of a table with these values; keys that are None do not count."""
        rows = self.table(name)
        for key, value in keys.items():
            if value is not None:
                rows = rows[rows[key] == value]
        if rows.empty:
            said = ", ".join(f"{key} {value}" for key, value in keys.items() if value is not None)
            raise TextError(f"{' and '.join(self.names)}: {name} has no row with {said}")
        return rows

    def over_seeds(self, rows: pd.DataFrame, what: str, value: str = "value") -> Number:
        """The number of the rows of one quantity: that of all seeds, of the one seed, or the mean over seeds."""
        low, high = ("ci_low", "ci_high") if value == "value" else (f"{value}_ci_low", f"{value}_ci_high")
        several = rows[rows["seed"] == "all"]
        rows = several if len(several) else rows
        undefined = rows[rows[value].isna()]
        if len(undefined):
            reason = undefined["reason"].iloc[0] if "reason" in rows else ""
            raise UndefinedNumber(f"{what} is undefined: {reason}")
        if len(rows) > 1:
            if rows["seed"].duplicated().any():
                raise TextError(f"{what}: {len(rows)} rows, of which a template must choose one")
            return Number(*mean_over_seeds([float(x) for x in rows[value]]), what)
        row = rows.iloc[0]
        ends = [None if pd.isna(row[end]) else float(row[end]) for end in (low, high)]
        return Number(float(row[value]), *ends, what)

    # Numbers of one model
    def index(self, model: str, name: str) -> Number:
        """An index of ``indices.csv``."""
        return self.over_seeds(self.rows("indices.csv", model=model, index=name), f"{name} of {model}")

    def warning(self, model: str, name: str) -> str:
        """What the table warns of an index; empty where it warns of nothing."""
        reason = self.rows("indices.csv", model=model, index=name)["reason"].iloc[0]
        return reason if isinstance(reason, str) else ""

    def loss(self, model: str, name: str = "ce") -> Number:
        """Held-out ``ce`` (nats/token) or ``bits_per_byte``."""
        return self.over_seeds(self.rows("models.csv", model=model), f"{name} of {model}", name)

    def fact(self, model: str, column: str) -> Any:
        """A column of ``models.csv`` that is the same at every seed."""
        values = self.rows("models.csv", model=model)[column].unique()
        if len(values) != 1:
            raise TextError(f"{column} of {model} is not the same at every seed")
        return values[0]

    def probe(self, model: str, quantity: str, layer: int | None = None, other: int | None = None) -> Number:
        """What a probe measured."""
        rows = self.rows("probes.csv", model=model, quantity=quantity, layer=layer, other=other)
        at = "" if layer is None else f" at layer {layer}" + ("" if other is None else f", {other}")
        return self.over_seeds(rows, f"{quantity} of {model}{at}")

    def cell(self, table: str, model: str, column: str, **keys: Any) -> Number:
        """A column of one row of a table, with its interval."""
        at = " ".join(f"{key} {value}" for key, value in keys.items())
        return self.over_seeds(self.rows(table, model=model, **keys), f"{column} of {model}, {at}", column)

    def probe_or_none(self, model: str, quantity: str) -> Number | str:
        """What a probe measured, or a dash for a model that it was not asked of."""
        rows = self.table("probes.csv")
        asked = ((rows["model"] == model) & (rows["quantity"] == quantity)).any()
        return self.probe(model, quantity) if asked else ABSENT

    def curve(self, model: str, tokens: int, positions: str = "all") -> Number:
        """Held-out cross-entropy after a training on so many tokens."""
        rows = self.rows("curves.csv", model=model, train_tokens=tokens, positions=positions)
        return self.over_seeds(rows, f"cross-entropy of {model} at {tokens} tokens, positions {positions}", "ce")

    def landmark(self, model: str, landmark: str, name: str) -> Number:
        """An index of a landmark, mean over the seeds at which it is defined."""
        rows = self.rows("landmarks.csv", model=model, landmark=landmark, index=name)
        return self.over_seeds(rows[(rows["seed"] != "all") & rows["value"].notna()], f"{name} of {model}+{landmark}")

    def seeds(self, model: str) -> int:
        """How many seeds a model has."""
        return len(self.rows("models.csv", model=model))

    # Differences, paired by seed
    def _gap(self, table: str, value: str, model: str, against: str, what: str, **keys: Any) -> Number:
        sides = [
            self.rows(table, model=name, **keys).query("seed != 'all'").set_index("seed")[value]
            for name in (model, against)
        ]
        gaps = (sides[0] - sides[1]).dropna()
        if len(gaps) < 2:
            raise TextError(f"{what} of {model} and {against}: a difference over seeds needs two in common")
        return Number(*mean_over_seeds([float(x) for x in gaps]), f"{what} of {model} less that of {against}")

    def index_difference(self, model: str, against: str, name: str) -> Number:
        """An index of one model less that of another, as ``lensbench compare`` has it."""
        return self._gap("indices.csv", "value", model, against, name, index=name)

    def loss_difference(self, model: str, against: str) -> Number:
        """The same of cross-entropy; of models with one seed paired by document."""
        if self.seeds(model) > 1:
            return self._gap("models.csv", "ce", model, against, "cross-entropy")
        return self._by_document(model, against)

    def curve_difference(self, model: str, against: str, tokens: int, positions: str = "all") -> Number:
        """The same of cross-entropy after a training on so many tokens."""
        return self._gap(
            "curves.csv",
            "ce",
            model,
            against,
            f"cross-entropy at {tokens} tokens",
            train_tokens=tokens,
            positions=positions,
        )

    def tolerance_difference(self, model: str, against: str, index: str, tolerance: str) -> Number:
        """The same of an index at another loss that a lens's ridge may cost on its own layer."""
        what = f"{index} at tolerance {tolerance}"
        return self._gap("tolerances.csv", "value", model, against, what, index=index, tolerance=tolerance)

    def _by_document(self, model: str, against: str) -> Number:
        (run,) = self.runs
        sums = run.sums()
        of = [by_document(clustered(sums[sums["model"] == name]), lens="model") for name in (model, against)]
        if list(of[0].index) != list(of[1].index):
            raise TextError(f"{model} and {against} were not scored on the same documents")
        tokens, gap = of[0]["tokens"].to_numpy(float), (of[0]["ce"] - of[1]["ce"]).to_numpy(float)
        weights = bootstrap_weights(len(tokens), run.manifest.suite.evaluate.draws, 0)
        low, high = interval((weights @ gap) / (weights @ tokens))
        return Number(
            float(gap.sum() / tokens.sum()), float(low), float(high), f"cross-entropy of {model} less that of {against}"
        )

    # Verdicts
    def verdict(self, model: str, scope: str = LATER) -> str:
        """The verdict of the update decomposition on a model, over all its seeds."""
        return str(self._verdict(model, scope)["verdict"])

    def fixed_lens_verdict(self, model: str, scope: str = LATER) -> str:
        """The verdict by lenses held fixed."""
        return str(self._verdict(model, scope)["fixed_lens_verdict"])

    def sentence(self, model: str, scope: str = LATER) -> str:
        """What the decomposition says of a model, in words."""
        return str(self._verdict(model, scope)["sentence"])

    def first_words(self, model: str, scope: str = LATER) -> str:
        """The sentence up to its first two statements."""
        return "; ".join(self.sentence(model, scope).rstrip(".").split("; ")[:2])

    def verdict_cell(self, model: str, scope: str = LATER) -> str:
        """The verdict as tables have it: its short name, and why it is undetermined."""
        row = self._verdict(model, scope)
        if row["verdict"] != "undetermined":
            return short(row["verdict"])
        if row["gate"] != "seeds differ":
            return f"undetermined ({row['gate']})"
        rows = self.rows("verdicts.csv", model=model, scope=scope).query("seed != 'all'")
        counts = rows.loc[rows["verdict"] != "undetermined", "verdict"].value_counts()
        said = ", ".join(f"{n} of {len(rows)} seeds {short(name)}" for name, n in counts.items())
        return f"undetermined ({said})"

    def fixed_lens_cell(self, model: str) -> str:
        """The verdict by lenses held fixed, and the other one without layer 0 where it says more."""
        whole, later = (self.fixed_lens_verdict(model, scope) for scope in ("all layers", LATER))
        return whole if whole != "cannot tell" or whole == later else f"{whole}; {later} {LATER}"

    def verdicts_are(self, models: Sequence[str], verdict: str, scope: str = LATER) -> Condition:
        """Whether every one of some models gets this verdict."""
        others = [f"{model} is {found}" for model in models if (found := self.verdict(model, scope)) != verdict]
        return Condition(not others, ", ".join(others))

    def no_sentence_says(self, words: str, scope: str = LATER) -> Condition:
        """Whether the sentence of no model's verdict holds some words."""
        found = [model for model in self.models() if words in self.sentence(model, scope)]
        return Condition(not found, f"{words!r} is said of {', '.join(found)}")

    def known(self, model: str) -> str:
        """What is known of a model by its construction."""
        known = self._verdict(model, LATER)["known"]
        return known if isinstance(known, str) else ABSENT

    def _verdict(self, model: str, scope: str) -> Any:
        rows = self.rows("verdicts.csv", model=model, scope=scope)
        several = rows[rows["seed"] == "all"]
        return (several if len(several) else rows).iloc[0]

    def decomposed(self, model: str | None = None) -> bool:
        """Whether these runs have the update decomposition (of a model)."""
        names = self.table("blocks.csv")["model"].unique()
        return model in names if model else len(names) > 0

    def models(self, first: Sequence[str] = ()) -> list[str]:
        """The names of all models: ``first`` those that are named, then the others in the order of the tables."""
        there = list(dict.fromkeys(self.table("models.csv")["model"]))
        if missing := [name for name in first if name not in there]:
            raise TextError(f"{' and '.join(self.names)} have no model {missing[0]}")
        return [*first, *(name for name in there if name not in first)]

    def told_landmarks(self, landmark: str, verdict: str, leave_out: Sequence[str] = ()) -> tuple[int, int]:
        """Of how many models and seeds a landmark gets this verdict without layer 0, and of how many there are."""
        rows = self.rows("landmarks.csv", landmark=landmark, index="in_place_without_layer0")
        rows = rows[~rows["model"].isin(list(leave_out))]
        return int((rows["verdict"] == verdict).sum()), len(rows)

    def landmark_cell(self, model: str, landmark: str) -> str:
        """The verdict without layer 0 on a landmark of a model of one seed, and why it is undetermined."""
        row = self.rows("landmarks.csv", model=model, landmark=landmark, index="in_place_without_layer0").iloc[0]
        undetermined = row["verdict"] == "undetermined" and isinstance(row["gate"], str)
        return f"undetermined ({row['gate']})" if undetermined else short(row["verdict"])

    def block_table(self, models: Sequence[str], columns: Sequence[tuple[str, str]]) -> str:
        """Blocks of models of one seed as a Markdown table: from, to, and columns of ``blocks.csv``."""
        body = []
        for model in models:
            for row in self.rows("blocks.csv", model=model).to_dict("records"):
                cells = [cell_of(row, name) for _, name in columns]
                body.append([f"`{model}`", f"{row['from_layer']:.0f} to {row['to_layer']:.0f}", *cells])
        return markdown(["model", "layers", *(head for head, _ in columns)], body)

    def change_table(self, base: str, labels: Mapping[str, str]) -> str:
        """Of models of one seed: cross-entropy less that of ``base``, paired by document, the largest first."""
        gaps = {name: self.loss_difference(name, base) for name in self.models() if name != base}
        ordered = sorted(gaps.items(), key=lambda pair: -pair[1].value)
        return markdown(["change", "nats/token"], [[labels.get(name, f"`{name}`"), str(gap)] for name, gap in ordered])

    def heads_found(self, model: str) -> int:
        """How many heads are found to carry errors."""
        return int((self.rows("probes.csv", model=model, quantity="error_transport_found")["value"] == 1).sum())

    # Claims
    @cached_property
    def claims(self) -> pd.DataFrame:
        """What became of the claims that the suite declared, corrected together, as ``lensbench compare`` has it."""
        return pd.DataFrame(claim_rows(joined(self.runs)))

    def claim_of(self, model: str, index: str, against: str | None = None) -> Any:
        """One declared claim: its value as ``number``, ``p`` and ``p_holm`` as numbers, its ``outcome``."""
        rows = self.claims[(self.claims["model"] == model) & (self.claims["index"] == index)]
        if against is not None:
            rows = rows[rows["against_model"] == against]
        if len(rows) != 1:
            raise TextError(f"{' and '.join(self.names)}: {len(rows)} claims about {index} of {model}")
        row = rows.iloc[0]
        number = Number(*(float(row[key]) for key in ("value", "ci_low", "ci_high")), str(row["claim"]))
        return row.to_dict() | {"number": number, "p_text": p_text(row["p_holm"])}

    def claims_table(self, indices: str) -> str:
        """The claims on indices whose names match a pattern, as Markdown."""
        body = []
        for row in self.claims.to_dict("records"):
            if re.search(indices, str(row["index"])):
                ends = (None if pd.isna(row[key]) else float(row[key]) for key in ("ci_low", "ci_high"))
                value = ABSENT if pd.isna(row["value"]) else str(Number(float(row["value"]), *ends, row["claim"]))
                status = ABSENT if pd.isna(row["status"]) else row["status"]
                body.append([in_words(row["claim"]), value, p_text(row["p_holm"]), row["outcome"], status])
        if not body:
            raise TextError(f"{' and '.join(self.names)}: no claim on {indices}")
        return markdown(["claim", "value", "p (Holm)", "outcome", "declared"], body)

    # Tables
    def by_model(self, models: Sequence[str], columns: Sequence[tuple[Any, ...]]) -> str:
        """A Markdown table: a row per model, columns of (heading, method, argument, ...).

        A number that is undefined is shown as a dash; one that is missing raises.
        """
        return markdown(["model", *(column[0] for column in columns)], [self._row(model, columns) for model in models])

    def _row(self, model: str, columns: Sequence[tuple[Any, ...]]) -> list[str]:
        cells = [f"`{model}`"]
        for _, method, *arguments in columns:
            try:
                cells.append(str(getattr(self, method)(model, *arguments)))
            except UndefinedNumber:
                cells.append(ABSENT)
        return cells

    @cache  # noqa: B019
    def settings(self, index: str) -> pd.DataFrame:
        """An index at other settings (:func:`lensbench.report.settings.settings_frame`)."""
        return settings_frame(self.runs, index)

    def largest_change(self, model: str, index: str, setting: str) -> Number:
        """The largest difference of an index from the reported one over the values of a setting, paired by seed."""
        frame = self.settings(index)
        of = frame[(frame["model"] == model) & (frame["setting"] == setting) & (frame["setting"] != REPORTED)]
        of = of.dropna(subset=["difference"])
        if of.empty:
            raise UndefinedNumber(f"{model} has no {index} at another {setting}")
        row = of.loc[of["difference"].abs().idxmax()]
        ends = [float(row[f"difference_ci_{end}"]) for end in ("low", "high")]
        return Number(float(row["difference"]), *ends, f"change of {index} of {model} at {setting} {row['at']}")

    def changes_within(self, index: str, setting: str, bound: float) -> Condition:
        """Whether no model's index moves by a bound over the values of a setting."""
        frame = self.settings(index)
        of = frame[frame["setting"] == setting].dropna(subset=["difference"])
        beyond = of[of["difference"].abs() >= bound]
        said = ", ".join(
            f"{row['model']} at {row['at']} by {row['difference']:.3f}" for row in beyond.to_dict("records")
        )
        return Condition(len(of) > 0 and beyond.empty, f"{index} changes more: {said}")

    def fixed_threshold(self, name: str) -> float:
        """A threshold of the rule on lenses held fixed."""
        return float(getattr(rule_of(self.runs[0]), name))

    def settings_stay_on_side(self, index: str, bound: float) -> Condition:
        """Whether every model's index lies on one side of a bound at every setting."""
        frame = self.settings(index).dropna(subset=["value"])
        sides = (frame["value"] > bound).groupby(frame["model"]).nunique()
        return Condition(bool((sides == 1).all()), f"{index} crosses {bound:g} in {', '.join(sides[sides > 1].index)}")

    def threshold(self, name: str) -> float:
        """A threshold of the rule on the update decomposition by which these runs were judged."""
        return float(getattr(rule_of(self.runs[0]).update, name))

    def doubt(self, model: str, index: str, part: str) -> float:
        """The standard deviation of an index ``between_seeds``, over ``documents`` or by ``refits``."""
        frame = doubt_frame(self.runs, index).set_index("model")
        if model not in frame.index or pd.isna(frame.loc[model, part]):
            raise TextError(f"{model} has no standard deviation of {index}: {part}")
        return float(frame.loc[model, part])

    def count(self, table: str, **keys: Any) -> int:
        """How many rows a table has with these values."""
        try:
            return len(self.rows(table, **keys))
        except TextError:
            return 0

    def spread(self, models: Sequence[str], index: str) -> tuple[Number, Number]:
        """The lowest and the highest value of an index among some models."""
        numbers = sorted((self.index(model, index) for model in models), key=lambda number: number.value)
        return numbers[0], numbers[-1]


IN_WORDS = {
    "injection_survival, mean_survival_error": "share of an injected error that is left,",
    "_without_layer0": " from layer 1 on",
    "in_place": "added in place",
    "gain_visibility": "gain visibility",
    "shared_consistency": "consistency",
    "shared_retention": "retention",
}
"""Names as claims have them -> words"""


def short(verdict: str) -> str:
    """The short name of a verdict."""
    return {"added up in one representation": "added up"}.get(verdict, verdict)


def cell_of(row: dict[Any, Any], name: str) -> str:
    """A column of a row with its interval, where it has one; a dash where it is empty."""
    if pd.isna(row[name]):
        return ABSENT
    if isinstance(row[name], str):
        return row[name]
    ends = [row.get(f"{name}_ci_{end}") for end in ("low", "high")]
    low, high = (None if end is None or np.isnan(end) else float(end) for end in ends)
    return str(Number(float(row[name]), low, high, name))


def in_words(claim: str) -> str:
    """A claim as the report has it, with the names of models and indices marked."""
    for name, words in IN_WORDS.items():
        claim = claim.replace(name, words)
    return claim.replace("|", r"\|")
