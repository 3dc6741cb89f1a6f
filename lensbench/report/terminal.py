"""What a run prints at its end: the answer, where the report is, tables, and the verdict on each model in words."""

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench.measures.indices import (
    INDICES,
    fact_indices,
    shown_indices,
    similarity_indices,
    tolerance_order,
    variants_of,
)
from lensbench.measures.update.sentences import advice_in
from lensbench.measures.update.verdict import NOT_MEASURED
from lensbench.measures.verdict import INDEX_OF, SCOPES
from lensbench.report.formatting import is_left_out, number, shown_seeds, with_interval, with_refits
from lensbench.report.in_width import show
from lensbench.report.probe_tables import places_table, probe_tables
from lensbench.report.profile_table import profile_table
from lensbench.report.study_tables import learning_table
from lensbench.report.verdicts import HEADLINE, statements, update_statements
from lensbench.results.folder import PAGE, Run
from lensbench.results.schema import unit


def baseline_table(run: Run) -> Table:
    """Held-out cross-entropy of baselines and models, and accuracy where it was measured."""
    of, hits = unit(run.tables["models.csv"]), accuracies(run)
    more = ["bits/byte"] * (of != "image") + ["accuracy"] * bool(hits)
    title = "held-out cross-entropy, 95 % intervals"
    table = Table("model", "seed", "parameters", f"nats/{of}", *more, title=title)
    rows = [
        *run.tables["baselines.csv"].assign(model=baseline_names, seed="", parameters="").iterrows(),
        *run.tables["models.csv"].iterrows(),
    ]
    for _, row in rows:
        ce = with_interval(row, "ce", "ce_ci_low", "ce_ci_high")
        cells = [with_interval(row, "bits_per_byte", "bits_per_byte_ci_low", "bits_per_byte_ci_high")] * (of != "image")
        cells += [hits.get((row["model"], str(row["seed"])), "")] * bool(hits)
        table.add_row(row["model"], str(row["seed"]), str(row["parameters"]), ce, *cells)
    for model in dict.fromkeys(model for model, seed in hits if seed == "all"):
        table.add_row(model, "all", "", "", *([""] * (of != "image")), hits[model, "all"])
    return table


def accuracies(run: Run) -> dict[tuple[str, str], str]:
    """Held-out accuracy of each model and seed (or all), with its interval; nothing where it was not measured."""
    rows = run.tables["probes.csv"]
    rows = rows[rows["quantity"] == "accuracy"]
    return {(row["model"], str(row["seed"])): with_interval(row) for _, row in rows.iterrows()}


def baseline_names(table: pd.DataFrame) -> pd.Series:
    """Names of baselines, with the tokenizer where there are several: nats per token of two tokenizers do not compare."""
    if table["tokenizer"].nunique() == 1:
        return table["baseline"]
    return table["baseline"] + ", tokens of " + table["tokenizer"]


NOT_ALONE = ("gain_tracking",)
"""Indices that must not be read alone: they are in ``indices.csv``, next to those that they belong to"""


def index_table(run: Run) -> Table:
    """Every shown index that some model has, with those of the other models, and the facts of its stream."""
    indices = shown_seeds(run.tables["indices.csv"])
    names = list(dict.fromkeys(indices["model"]))
    over = f"over {units(run)}" + "; several seeds: over seeds" * bool((indices["seed"] == "all").any())
    refits = " (range over refits)" if indices["fit_low"].notna().any() else ""
    table = Table(Column("index", no_wrap=True), *names, title=f"indices: value [95 % interval {over}]{refits}")
    measured = (name for name in similarity_indices() if (indices["index"] == name).any())
    absent = left_out(indices) | undefined_everywhere(indices)
    for index in (*shown_indices(), *measured, *fact_indices()):
        if index in NOT_ALONE or index in absent:
            continue
        cells = []
        for name in names:
            row = indices[(indices["model"] == name) & (indices["index"] == index)]
            cells.append(with_refits(row.iloc[0]) if len(row) else "")
        table.add_row(index, *cells)
    return table


def left_out(indices: pd.DataFrame) -> set[str]:
    """The indices that no model has because the suite did not ask for what they are made of."""
    absent = is_left_out(indices)
    return set(indices["index"]) - set(indices.loc[~absent, "index"])


def undefined_everywhere(indices: pd.DataFrame) -> set[str]:
    """The indices that have no value in any model."""
    return set(indices["index"]) - set(indices.loc[indices["value"].notna(), "index"])


def undefined_line(run: Run) -> list[str]:
    """Which shown indices are undefined in every model, in a line; none where each has a value somewhere."""
    indices = shown_seeds(run.tables["indices.csv"])
    nowhere = undefined_everywhere(indices) - left_out(indices) - set(NOT_ALONE)
    names = [name for name in shown_indices() if name in nowhere]
    every = "every model" if indices["model"].nunique() > 1 else str(indices["model"].iloc[0])
    return [f"undefined in {every} (why: the column reason of indices.csv): {', '.join(names)}"] if names else []


def units(run: Run) -> str:
    """What an interval of one seed resamples."""
    return "images" if unit(run.tables["models.csv"]) == "image" else "documents"


def tolerance_table(run: Run) -> Table | None:
    """How gain visibility depends on the loss that a lens's ridge may cost on its own layer; None without a matrix."""
    if run.tables["tolerances.csv"].empty:
        return None
    rows = run.tables["tolerances.csv"]
    pairs = {"gain_visibility": "all", "gain_visibility_without_layer0": "without 0"}
    rows = rows[rows["index"].isin(pairs)]
    labels = sorted(rows["tolerance"].unique(), key=tolerance_order)
    several = rows["seed"].nunique() > 1
    table = Table(
        *(Column(name, no_wrap=True) for name in ("model (layers)", "pairs", *labels)),
        title="gain visibility by the dev loss allowed on the own layer (share of K_0 - best; 1se: one standard error)",
    )  # fmt: skip
    for (model, seed, layers, index), group in rows.groupby(["model", "seed", "layers", "index"], sort=False):
        cells = group.set_index("tolerance")
        shown = [with_interval(cells.loc[label]) if label in cells.index else "" for label in labels]
        who = f"{model}, seed {seed}" if several else str(model)
        table.add_row(f"{who} ({layers})", pairs[str(index)], *shown)
    return table


def ruler_table(run: Run) -> Table:
    """Every model on the ruler: its size, what is known of it, the verdicts on it, and the indices of both rules."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    judged = shown_seeds(run.tables["verdicts.csv"]).set_index(["model", "scope"])
    sizes = run.tables["models.csv"].drop_duplicates("model").set_index("model")
    absent = left_out(run.tables["indices.csv"])
    names = [name for name in RULER if (shown.index.get_level_values(1) == name).any() and name not in absent]
    fixed_columns = [] if INDEX_OF["visibility"] in absent else list(FIXED)
    known = bool(judged["known"].notna().any())
    table = Table(
        Column("model", no_wrap=True), "parameters", "layers", *["known by construction"] * known, "verdict",
        "verdict without layer 0", *(INDICES[name].label for name in names), *fixed_columns,
        title="the ruler [95 % intervals]",
    )  # fmt: skip
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        size = [f"{sizes.loc[model, column]:,.0f}" for column in ("parameters", "layers")]
        rows = [judged.loc[(model, scope)] for scope in SCOPES if (model, scope) in judged.index]
        told = [next((row["known"] for row in rows if pd.notna(row["known"])), "")] * known
        cells = [with_interval(shown.loc[model, name]) if (model, name) in shown.index else "" for name in names]
        fixed = [row["fixed_lens_verdict"] for row in rows] if fixed_columns else []
        table.add_row(model, *size, *told, *map(verdict_cell, rows), *cells, *fixed)
    return table


FIXED = ("by lenses held fixed", "by lenses held fixed, without layer 0")
"""Columns of the ruler for the verdicts by lenses held fixed"""

RULER = (
    "in_place_without_layer0", "clarity_without_layer0", INDEX_OF["consistency"], INDEX_OF["visibility"],
    "gain_visibility_without_layer0", INDEX_OF["movement"],
)  # fmt: skip
"""Indices of the ruler: those of the update decomposition, then those of lenses held fixed"""


def verdict_cell(row: Any) -> str:
    """A verdict of ``verdicts.csv``; an undetermined one with its gate."""
    if row["gate"] == NOT_MEASURED:
        return NOT_MEASURED
    return f"{row['verdict']} ({row['gate']})" if isinstance(row["gate"], str) else str(row["verdict"])


def span_of_fact(run: Run, model: str, fact: str) -> str:
    """Number of layers, or rank of the rotations, which may differ from seed to seed."""
    indices = run.tables["indices.csv"]
    values = indices.loc[(indices["model"] == model) & (indices["index"] == fact), "value"]
    return f"{values.min():.0f}" + (f" to {values.max():.0f}" if values.nunique() > 1 else "")


def retention_table(run: Run) -> Table:
    """What consistency is made of, and the size of the stream, without which it does not compare across models."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    labelled = ("shared_retention", "rotated_retention", "shared_consistency_without_layer0", "pair_consistency")
    names = {name: INDICES[name].label for name in labelled}
    names |= {index.name: index.variant for index in variants_of("pair_consistency")}
    facts = [INDICES[fact].label for fact in fact_indices()]
    title = "one lens for all layers, for two"
    table = Table(Column("model", no_wrap=True), *facts, *names.values(), title=title)
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        table.add_row(
            str(model),
            *(span_of_fact(run, model, fact) for fact in fact_indices()),
            *(with_interval(shown.loc[model, name]) for name in names),
        )
    return table


def correlation_table(run: Run) -> Table | None:
    """What the tuned-lens paper reports of transfer penalties, and gradient alignment; None where nothing was measured."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    probes = run.tables["probes.csv"]
    aligned = probes[probes["quantity"] == "gradient_alignment_beyond_null"]
    if aligned.empty and not any((shown.index.get_level_values(1) == name).any() for name in similarity_indices()):
        return None
    aligned = shown_seeds(aligned).drop_duplicates("model", keep="last").set_index("model")
    names: dict[str, str] = {}
    for name in ("similarity_correlation", "distance_trend"):
        names |= {name: INDICES[name].label} | {index.name: index.variant for index in variants_of(name)}
    table = Table(
        Column("model", no_wrap=True), *names.values(), "gradient alignment beyond its null",
        title="next to the ruler: rank correlations over pairs of layers, mean cosine over blocks [95 %]",
    )  # fmt: skip
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        cells = [with_interval(shown.loc[model, name]) if (model, name) in shown.index else "" for name in names]
        table.add_row(str(model), *cells, with_interval(aligned.loc[model]) if model in aligned.index else "")
    return table


def doubts(run: Run) -> list[str]:
    """What a reader should know before believing a run: models worse than word counts, and refits outside their interval."""
    return [*worse_than_counting(run), *refits_outside(run)]


def worse_than_counting(run: Run) -> list[str]:
    """A note for every model that predicts worse than the frequencies of words, or of classes."""
    lines = []
    baselines = run.tables["baselines.csv"]
    least = baselines["baseline"].isin(["unigram", "class frequencies"])
    unigram = baselines[least].set_index("tokenizer")["ce"]
    of = unit(run.tables["models.csv"])
    what, other = ("class", "are the classes") if of == "image" else ("word", "the tokenizer")
    for _, row in run.tables["models.csv"].drop_duplicates("model").iterrows():
        of_its_own = row["model"] in unigram.index
        counted = unigram.get(row["model"] if of_its_own else "images" if of == "image" else "trained here")
        if counted is not None and row["ce"] > counted:
            lines.append(
                f"note: {row['model']} predicts worse ({number(row['ce'])} nats/{of}) than {what} frequencies do "
                f"({number(counted)}): is it untrained, or {other} another model's?"
            )
    return lines


def refits_outside(run: Run) -> list[str]:
    """A note for every model with indices whose refits all lie on one side of the interval."""
    lines = []
    indices = run.tables["indices.csv"]
    amount = "many images" if unit(run.tables["models.csv"]) == "image" else "much text"
    outside = indices[(indices["fit_low"] > indices["ci_high"]) | (indices["fit_high"] < indices["ci_low"])]
    for model, rows in outside.groupby("model", sort=False):
        lines.append(
            f"note: {model} {', '.join(rows['index'])}: all refits on resampled documents, of which fewer are distinct, "
            f"lie on one side of the interval: the value depends on how {amount} the lenses were fitted to"
        )
    return lines


def too_few_scored(run: Run) -> list[str]:
    """A note where fewer sequences or images were scored than the suite asked for."""
    scored = run.manifest.scored
    if scored.sequences >= scored.sequences_asked:
        return []
    if unit(run.tables["models.csv"]) == "image":
        held = f"{scored.sequences} images were scored, not the {scored.sequences_asked} asked for"
        return [f"note: {held}: the eval split has no more"]
    held = f"{scored.sequences} of the {scored.sequences_asked} sequences asked for were scored"
    why = f"the eval split has {scored.documents} documents, and none may give more than its share (max_share); "
    return [f"note: {held}: {why}give a longer text, or raise evaluate.positions or evaluate.max_share"]


def undefined_indices(run: Run) -> list[str]:
    """A note for every reason why indices are undefined, or warned of, with the indices."""
    lines = []
    reasons = run.tables["indices.csv"].dropna(subset=["reason"])
    for reason, rows in reasons[reasons["ci_low"].notna() | reasons["value"].isna()].groupby("reason", sort=False):
        of = [f"{model} {', '.join(r['index'])}" for model, r in rows.groupby("model", sort=False)]
        where = "; ".join(of) if len(rows) <= 12 else f"{len(rows)} indices"
        lines.append(f"note: {where}: {reason}")
    return lines


def answer_lines(run: Run) -> list[str]:
    """The answer, two lines a model: the verdict from layer 1 on (and over all layers), and what it rests on."""
    lines = []
    for model, rows in shown_seeds(run.tables["verdicts.csv"]).groupby("model", sort=False):
        by_scope: dict[Any, Any] = rows.set_index("scope").to_dict("index")
        scope = HEADLINE if HEADLINE in by_scope else next(iter(by_scope))
        main = by_scope[scope]
        if main["gate"] == NOT_MEASURED:
            lines.append(
                f"{model}: {main['fixed_lens_verdict']}, by lenses held fixed; the update decomposition was not run"
            )
            continue
        others = [verdict_cell(row) for name, row in by_scope.items() if name != scope]
        also = f"; over all layers: {others[0]}" if others and others[0] != verdict_cell(main) else ""
        lines.append(f"{model}: {verdict_cell(main)}{also}")
        said, advice = main["sentence"], advice_in(main["sentence"])
        first = clauses(said)[0].removesuffix(".")
        lines.append(f"  {first}; {advice}." if advice else f"  {first}.")
    return lines


def clauses(sentence: str) -> list[str]:
    """The parts of a long sentence of ``verdicts.csv``, each to stand on a line of its own."""
    return [part.strip() for part in sentence.split("; ")]


def print_run(run: Run, console: Console) -> None:
    """Print the answer and where the report is; then tables, the verdicts in words, and every warning once."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    for text in answer_lines(run):
        line(text)
    page = run.folder / PAGE
    line(f"Report: {page}" if page.is_file() else f"Report: lensbench report {run.folder}")
    for text in (*too_few_scored(run), *worse_than_counting(run)):
        line(text)
    profile = profile_table(run, bars=console.is_terminal and console.encoding.startswith("utf"))
    if profile is not None:
        show(profile, console, keys=2)
    show(baseline_table(run), console)
    show(index_table(run), console)
    for text in undefined_line(run):
        line(text)
    shown = (tolerance_table, learning_table, places_table)
    for table in (*(make(run) for make in shown), *probe_tables(run)):
        if table is not None:
            show(table, console)
    for said in update_statements(run):
        line(f"{said.model} ({said.scope}): {said.answer}")
        for part in filter(None, [*clauses(said.said), said.landmarks]):
            line(f"  - {part}")
    for text in (*map(str, statements(run)), *refits_outside(run), *undefined_indices(run)):
        line(text)
