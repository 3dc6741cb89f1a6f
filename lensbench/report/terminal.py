"""What a run says at its end: baselines, indices with intervals, one sentence per model."""

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench.measures.indices import OF_SIMILARITY, SHOWN, tolerance_order
from lensbench.measures.verdict import SCOPES
from lensbench.report.formatting import number, shown_seeds, with_interval, with_refits
from lensbench.report.probe_tables import places_table, probe_tables
from lensbench.report.study_tables import learning_table
from lensbench.results.folder import Run
from lensbench.results.schema import unit

FACTS = ("layers", "rotated_rank")


def baseline_table(run: Run) -> Table:
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
    """With the tokenizer where there are several: nats per token of one are not those of another."""
    if table["tokenizer"].nunique() == 1:
        return table["baseline"]
    return table["baseline"] + ", tokens of " + table["tokenizer"]


def index_table(run: Run) -> Table:
    indices = shown_seeds(run.tables["indices.csv"])
    names = list(dict.fromkeys(indices["model"]))
    table = Table(
        Column("index", no_wrap=True),
        *names,
        title="indices: value [95 % interval over documents; several seeds: over seeds] (range over refits)",
    )
    for index in (*SHOWN, *(name for name in OF_SIMILARITY if (indices["index"] == name).any()), *FACTS):
        cells = []
        for name in names:
            row = indices[(indices["model"] == name) & (indices["index"] == index)]
            cells.append(with_refits(row.iloc[0]) if len(row) else "")
        table.add_row(index, *cells)
    return table


def tolerance_table(run: Run) -> Table:
    """How gain visibility depends on the loss that a lens's ridge may cost on its own layer."""
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


def sentences(run: Run) -> list[str]:
    """One sentence per model: what its consistency, visibility and movement say together."""
    indices, curve = shown_seeds(run.tables["indices.csv"]), run.tables["tolerances.csv"]
    return [
        sentence(str(name), rows.set_index("index"), curve[curve["model"] == name])
        for name, rows in indices.groupby("model", sort=False)
    ]


def sign_over_tolerances(curve: pd.DataFrame, index: str) -> str:
    """What to add to a statement on the sign of an index that does not hold at every loss a ridge may cost; else nothing."""
    rows = curve[(curve["index"] == index) & curve["value"].notna()]
    if not len(rows) or (rows["ci_low"] > 0).all() or (rows["ci_high"] < 0).all():
        return ""
    rows = rows.sort_values("value")
    lowest, highest = rows.iloc[0], rows.iloc[-1]
    return (
        f"; but not so at every loss that a lens's ridge may cost ({with_interval(lowest)} at {lowest['tolerance']}, "
        f"{with_interval(highest)} at {highest['tolerance']}): no verdict from it"
    )


def sentence(name: str, rows: pd.DataFrame, curve: pd.DataFrame) -> str:
    consistency, visibility, movement = (rows.loc[i] for i in ("shared_consistency", "gain_visibility", "movement"))
    kept = f"one lens keeps {with_interval(rows.loc['shared_retention'])} of what a lens per layer reads"
    if pd.isna(consistency["value"]):
        against = f"consistency is {consistency['reason']}"
    else:
        null = with_interval(rows.loc["rotated_retention"])
        against = f"random bases {null}, so its consistency is {with_interval(consistency)}"
    if pd.isna(visibility["value"]):
        return f"{name}: {kept} ({against}); gain visibility is {visibility['reason']}."
    seen = with_interval(visibility)
    later = rows.loc["gain_visibility_without_layer0"]
    if pd.notna(later["value"]):
        seen += f", without layer 0 {with_interval(later)}"
    if pd.notna(visibility["tolerance"]):
        seen += f", lenses within {visibility['tolerance']:.0%} of their best"
    if visibility["ci_high"] < 0 < later["ci_low"]:
        meaning = (
            f"from layer 1 on, fixed lenses see later layers improve; layer 0 is in another representation, and with it "
            f"the balance is negative (gain visibility {seen})"
            + sign_over_tolerances(curve, "gain_visibility_without_layer0")
        )
    elif visibility["ci_low"] > 0:
        meaning = f"fixed lenses see later layers improve (gain visibility {seen}): refinement shows"
        meaning += sign_over_tolerances(curve, "gain_visibility")
    elif visibility["ci_high"] < 0:
        meaning = (
            f"a lens fixed at one layer reads later layers worse (gain visibility {seen}): the representation changes, "
            "or new information overlaps what is carried along"
        ) + sign_over_tolerances(curve, "gain_visibility")
    elif movement["ci_high"] < 0.05:
        meaning = (
            f"fixed lenses see no change at all (gain visibility {seen}, movement near 0): information is carried along"
        )
    else:
        meaning = f"fixed lenses see change but no net gain (gain visibility {seen}): no verdict"
    return f"{name}: {kept} ({against}); {meaning}."


def ruler_table(run: Run) -> Table:
    """Every model on the ruler: the three indices that a verdict rests on, what is known of it, and the verdicts."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    judged = shown_seeds(run.tables["verdicts.csv"]).set_index(["model", "scope"])
    names = ("shared_consistency", "gain_visibility", "gain_visibility_without_layer0", "movement")
    table = Table(
        Column("model", no_wrap=True), "known by construction", "consistency", "gain visibility", "without layer 0",
        "movement", "verdict", "without layer 0", title="the ruler [95 % intervals]",
    )  # fmt: skip
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        cells = [with_interval(shown.loc[model, name]) for name in names]
        rows = [judged.loc[(model, scope)] for scope in SCOPES if (model, scope) in judged.index]
        known = next((row["known"] for row in rows if pd.notna(row["known"])), "")
        table.add_row(model, known, *cells, *(row["verdict"] for row in rows))
    return table


def span_of_fact(run: Run, model: str, fact: str) -> str:
    """Number of layers, or rank of the rotations, which may differ from seed to seed."""
    indices = run.tables["indices.csv"]
    values = indices.loc[(indices["model"] == model) & (indices["index"] == fact), "value"]
    return f"{values.min():.0f}" + (f" to {values.max():.0f}" if values.nunique() > 1 else "")


def retention_table(run: Run) -> Table:
    """What consistency is made of, and the size of the stream, without which it does not compare across models."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    names = {
        "shared_retention": "R",
        "rotated_retention": "R in random bases",
        "shared_consistency_without_layer0": "consistency without layer 0",
        "pair_consistency": "pair consistency",
        "pair_consistency_without_layer0": "without layer 0",
    }
    table = Table(Column("model", no_wrap=True), "L", "rank", *names.values(), title="one lens for all layers, for two")
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        table.add_row(
            str(model),
            *(span_of_fact(run, model, fact) for fact in FACTS),
            *(with_interval(shown.loc[model, name]) for name in names),
        )
    return table


BESIDE = {
    "similarity_correlation": "penalty with covariance similarity",
    "similarity_correlation_given_distance": "given distance",
    "distance_trend": "penalty with distance",
    "distance_trend_forward": "forward",
    "distance_trend_backward": "backward",
}
"""Index -> what the table beside the ruler calls it: rank correlations over pairs of layers."""


def beside_table(run: Run) -> Table | None:
    """What the tuned-lens paper reports of transfer penalties, and gradient alignment; None where nothing was measured."""
    shown = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
    probes = run.tables["probes.csv"]
    aligned = probes[probes["quantity"] == "gradient_alignment_beyond_null"]
    if aligned.empty and not any((shown.index.get_level_values(1) == name).any() for name in OF_SIMILARITY):
        return None
    aligned = shown_seeds(aligned).drop_duplicates("model", keep="last").set_index("model")
    table = Table(
        Column("model", no_wrap=True), *BESIDE.values(), "gradient alignment beyond its null",
        title="beside the ruler: rank correlations over pairs of layers, mean cosine over blocks [95 %]",
    )  # fmt: skip
    for model in dict.fromkeys(shown.index.get_level_values(0)):
        cells = [with_interval(shown.loc[model, name]) if (model, name) in shown.index else "" for name in BESIDE]
        table.add_row(str(model), *cells, with_interval(aligned.loc[model]) if model in aligned.index else "")
    return table


def verdict_lines(run: Run) -> list[str]:
    """One line per model: the verdict of the suite's rule, on all layers and without the first."""
    lines = []
    for model, rows in shown_seeds(run.tables["verdicts.csv"]).groupby("model", sort=False):
        told = ", ".join(f"{row['verdict']} ({row['scope']})" for _, row in rows.iterrows())
        lines.append(f"{model}: verdict by the suite's rule: {told}")
    return lines


def doubts(run: Run) -> list[str]:
    """What a reader should know before believing: models worse than word counts, and refits beside their interval."""
    lines = []
    baselines = run.tables["baselines.csv"]
    least = baselines["baseline"].isin(["unigram", "class frequencies"])
    unigram = baselines[least].set_index("tokenizer")["ce"]
    of = unit(run.tables["models.csv"])
    for _, row in run.tables["models.csv"].drop_duplicates("model").iterrows():
        of_its_own = row["model"] in unigram.index
        counted = unigram.get(row["model"] if of_its_own else "images" if of == "image" else "trained here")
        if counted is not None and row["ce"] > counted:
            what, other = ("class", "are the classes") if of == "image" else ("word", "the tokenizer")
            lines.append(
                f"note: {row['model']} predicts worse ({number(row['ce'])} nats/{of}) than {what} frequencies do "
                f"({number(counted)}): is it untrained, or {other} another model's?"
            )
    indices = run.tables["indices.csv"]
    amount = "many images" if of == "image" else "much text"
    beside = indices[(indices["fit_low"] > indices["ci_high"]) | (indices["fit_high"] < indices["ci_low"])]
    for model, rows in beside.groupby("model", sort=False):
        lines.append(
            f"note: {model} {', '.join(rows['index'])}: all refits on resampled documents, of which fewer are distinct, "
            f"lie on one side of the interval: the value depends on how {amount} the lenses were fitted to"
        )
    return lines


def print_run(run: Run, console: Console) -> None:
    """The tables, then the sentences, then every warning once."""
    scored = (run.manifest or {}).get("scored", {})
    if scored and scored["sequences"] < scored["sequences_asked"] and unit(run.tables["models.csv"]) == "image":
        held = (
            f"{scored['sequences']} images were scored, not the {scored['sequences_asked']} asked for: the eval split"
        )
        console.print(f"note: {held} has no more", highlight=False, markup=False)
    elif scored and scored["sequences"] < scored["sequences_asked"]:
        held = f"{scored['sequences']} of the {scored['sequences_asked']} sequences asked for were scored"
        why = f"the eval split has {scored['documents']} documents, and none may give more than its share (max_share); "
        why += "give a longer text, or raise evaluate.positions or evaluate.max_share"
        console.print(f"note: {held}: {why}", highlight=False, markup=False)
    console.print(baseline_table(run))
    console.print(index_table(run))
    console.print(tolerance_table(run))
    for table in (learning_table(run), places_table(run), *probe_tables(run)):
        if table is not None:
            console.print(table)
    for line in [*sentences(run), *doubts(run)]:
        console.print(line, highlight=False, markup=False)
    for line in verdict_lines(run):
        console.print(line, highlight=False, markup=False)
    reasons = run.tables["indices.csv"].dropna(subset=["reason"])
    for reason, rows in reasons[reasons["ci_low"].notna() | reasons["value"].isna()].groupby("reason", sort=False):
        of = [f"{model} {', '.join(r['index'])}" for model, r in rows.groupby("model", sort=False)]
        where = "; ".join(of) if len(rows) <= 12 else f"{len(rows)} indices"
        console.print(f"note: {where}: {reason}", highlight=False, markup=False)
