"""What a run says at its end: baselines, indices with intervals, one sentence per model."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from lensbench.measures.indices import OF_SIMILARITY, SHOWN, tolerance_order
from lensbench.measures.verdict import SCOPES
from lensbench.results.folder import Run
from lensbench.results.schema import unit
from lensbench.studies.curves import ALL, BOUND, shown_curves
from lensbench.studies.regression import shown

FACTS = ("layers", "rotated_rank")


def number(value: float) -> str:
    """Three decimals, or three digits where that would hide a large number's size."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 100 else f"{value:.3g}"  # + 0.0: no minus before a zero


def with_interval(row: Any, value: str = "value", low: str = "ci_low", high: str = "ci_high") -> str:
    if pd.isna(row[value]):
        return "undefined"
    if pd.isna(row[low]):
        return f"{row[value]:g}"
    return f"{number(row[value])} [{number(row[low])}, {number(row[high])}]"


def with_refits(row: Any) -> str:
    """Value and interval, and below them the range over refits."""
    if pd.isna(row["value"]) or pd.isna(row["fit_low"]):
        return with_interval(row)
    return f"{with_interval(row)}\n      ({number(row['fit_low'])}, {number(row['fit_high'])})"


def shown_seeds(indices: pd.DataFrame) -> pd.DataFrame:
    """The rows over all seeds where there are several, else the one seed's."""
    several = indices.groupby("model")["seed"].transform(lambda seeds: (seeds == "all").any())
    return indices[(indices["seed"] == "all") | ~several]


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


def learning_table(run: Run) -> Table | None:
    """Held-out cross-entropy by training budget, over the whole context and its parts; None where no curve was measured."""
    curves = shown_curves(run.tables["curves.csv"])
    if curves.empty:
        return None
    seconds: dict[Any, float] = run.tables["timings.csv"].groupby(["model", "train_tokens"])["seconds"].mean().to_dict()
    parts = list(dict.fromkeys(curves["positions"]))
    table = Table(
        Column("model", no_wrap=True), "tokens", "seconds", *(f"positions {p}" if p != ALL else p for p in parts),
        title="learning curves: held-out cross-entropy, nats/token [95 %]; each budget a training of its own",
    )  # fmt: skip
    for (model, budget), rows in curves.groupby(["model", "train_tokens"], sort=False):
        of = rows.set_index("positions")
        took = f"{seconds[model, budget]:.0f}" if (model, budget) in seconds else ""
        cells = (with_interval(of.loc[part], "ce", "ce_ci_low", "ce_ci_high") for part in parts)
        table.add_row(str(model), f"{budget:,}", took, *cells)
    return table


PLACES = {
    "read_out_ce": "CE read out, nats/token",
    "true_error_rms": "rms of the error",
    "error_cosine": "cosine of carried and true error",
    "subtracted_cosine": "cosine of what is subtracted",
    "subtracted_share": "share that is subtracted",
}


OF_WHOLE_MODELS = {"uniform_kl": "KL to the uniform variant, nats", "uniform_ce_rise": "its CE above the model's, nats"}
"""Quantities of the probe ``known_places``, and what its table calls them."""


def places_table(run: Run) -> Table | None:
    """What lies at the known places of predictive-coding models, layer by layer; None where nothing was measured."""
    probes = run.tables["probes.csv"]
    found = shown_seeds(probes[(probes["probe"] == "known_places") & probes["value"].notna()])
    if found.empty:
        return None
    layers = sorted(found["layer"].dropna().astype(int).unique())
    title = "at the known places: means over held-out tokens, by layer [95 %]"
    table = Table(Column("model", no_wrap=True), Column("quantity", no_wrap=True), *map(str, layers), title=title)
    told: set[tuple[float, ...]] = set()
    for model, rows in found.groupby("model", sort=False):
        if (values := tuple(rows["value"])) in told:
            continue  # two views of a model have the same places
        told.add(values)
        for quantity, name in PLACES.items():
            cells = rows[rows["quantity"] == quantity].set_index("layer")
            if len(cells):
                shown = (with_interval(cells.loc[k]) if k in cells.index else "" for k in layers)
                table.add_row(str(model), name, *shown)
        for quantity, name in OF_WHOLE_MODELS.items():
            for _, row in rows[rows["quantity"] == quantity].iterrows():
                table.add_row(str(model), name, with_interval(row))
    return table


BY_LAYER = {
    "logit_accuracy": "accuracy, logit lens",
    "tuned_accuracy": "accuracy, own lens",
    "shared_accuracy": "accuracy, shared lens",
    "gradient_alignment": "gradient alignment of block",
    "gradient_alignment_null": "its null",
    "prediction_gain": "last prediction, gain of R^2",
    "prediction_gain_of_rest": "the same, share of the rest",
    "surprise_gain": "surprise, gain of R^2",
    "expectation_r2": "next prediction, R^2",
    "fidelity": "fidelity, shared lens",
    "fidelity_null": "fidelity, null",
    "fidelity_own": "fidelity, own lens",
    "fidelity_random": "fidelity, random directions",
    "response_slope": "real by read change",
    "stimulus_ratio": "read change, by random",
    "response_ratio": "real change, by random",
    "gradient_step_error": "distance from a gradient step",
}
"""Quantities of probes that have one value a layer, and what their table calls them."""


OF_MODELS = {
    "accuracy": "held-out accuracy",
    "prediction_baseline_r2": "last prediction, R^2 of the baseline",
    "surprise_baseline_r2": "surprise, R^2 of the baseline",
    "prediction_directions": "variance in the directions looked at",
    "heads_found": "share of heads found to carry errors",
    "heads_beyond_permutation": "share of heads beyond the permutation alone",
    "error_score_top": "highest error score",
    "error_score_median": "median error score",
    "few_shot_learned": "few-shot: p of the mapped label",
    "few_shot_alpha_same": "few-shot, same query: alpha (logits)",
    "few_shot_ratio_same": "few-shot, same query: beta / alpha",
    "few_shot_error_gain_same": "few-shot, same query: gain over copying",
    "few_shot_error_gain_null_same": "few-shot, same query: its null",
    "few_shot_alpha_other": "few-shot, other query: alpha (logits)",
    "few_shot_ratio_other": "few-shot, other query: beta / alpha",
    "few_shot_error_gain_other": "few-shot, other query: gain over copying",
    "full_kl": "non-causal update: KL of the whole from the prefix",
    "full_ce_change": "non-causal update: change of CE by a future",
}
"""Quantities of probes that have one value a model."""


OF_HEADS = {
    "error_score": "error score",
    "error_ratio": "beta / alpha",
    "error_alignment": "alignment",
    "copying_gain": "copying, gain of R^2",
    "error_gain": "gain of a free beta",
    "error_gain_beyond_null": "the same beyond its null",
    "error_transport_p": "p, Holm",
    "weights_identity": "weights: identity",
    "weights_bigram": "weights: bigram",
    "weights_previous_bigram": "weights behind previous token: bigram",
}
"""Quantities of probes that have one value a head."""


SHOWN_LAYERS, SHOWN_HEADS = 8, 5


def probe_tables(run: Run) -> Iterator[Table]:
    """Probes of predictions and errors: by layer (of many, some), of whole models, and the heads that score highest."""
    probes = run.tables["probes.csv"]
    told = {*BY_LAYER, *OF_MODELS}
    found = shown_seeds(probes[probes["quantity"].isin(told)])
    by_layer = found[found["quantity"].isin(BY_LAYER) & found["value"].notna()]
    if len(by_layer):
        every = sorted(by_layer["layer"].astype(int).unique())
        spread = {every[round(k * (len(every) - 1) / (SHOWN_LAYERS - 1))] for k in range(SHOWN_LAYERS)}
        layers = every if len(every) <= SHOWN_LAYERS else sorted(spread)
        title = "probes by layer [95 %]"
        table = Table(Column("model", no_wrap=True), Column("quantity", no_wrap=True), *map(str, layers), title=title)
        for model, rows in by_layer.groupby("model", sort=False):
            for quantity, name in BY_LAYER.items():
                cells = rows[rows["quantity"] == quantity].set_index("layer")
                if len(cells):
                    table.add_row(
                        str(model), name, *(with_interval(cells.loc[k]) if k in cells.index else "" for k in layers)
                    )
        yield table
    whole = found[found["quantity"].isin(OF_MODELS)]
    if len(whole):
        models = list(dict.fromkeys(whole["model"]))
        table = Table(Column("quantity", no_wrap=True), *models, title="probes of whole models [95 %]")
        for quantity, name in OF_MODELS.items():
            cells = whole[whole["quantity"] == quantity].drop_duplicates("model").set_index("model")
            if len(cells):
                table.add_row(name, *(with_interval(cells.loc[m]) if m in cells.index else "" for m in models))
        yield table
    heads = probes[probes["quantity"].isin(OF_HEADS) & probes["layer"].notna()]
    heads = heads.drop_duplicates(["model", "quantity", "layer", "other"])
    if len(heads):
        title = f"heads with the {SHOWN_HEADS} highest error scores, first seed [95 %]"
        table = Table(Column("model", no_wrap=True), "head", "found", *OF_HEADS.values(), title=title)
        hits = probes[probes["quantity"] == "error_transport_found"].drop_duplicates(["model", "layer", "other"])
        for model, rows in heads.groupby("model", sort=False):
            score = rows[rows["quantity"] == "error_score"].astype({"value": float}).nlargest(SHOWN_HEADS, "value")
            hit = hits[hits["model"] == model].set_index(["layer", "other"])["value"]
            for layer, head in zip(score["layer"].astype(int), score["other"].astype(int), strict=True):
                of = rows[(rows["layer"] == layer) & (rows["other"] == head)].drop_duplicates("quantity")
                cells = of.set_index("quantity")
                shown = (with_interval(cells.loc[q]) if q in cells.index else "" for q in OF_HEADS)
                table.add_row(str(model), f"L{layer}.H{head}", f"{hit[layer, head]:.2g}", *shown)
        yield table


def in_context_tables(written: dict[str, pd.DataFrame]) -> Iterator[Table]:
    """Distance from the Bayes predictor by task, model and part of the document, and the differences of models."""
    table, gaps = written["task.csv"], written["differences.csv"]
    parts = list(dict.fromkeys(table["positions"]))
    named = [f"positions {p}" if p != ALL else p for p in parts]
    title = "cross-entropy above the exact Bayes predictor's, nats/token [95 %]"
    shown = Table("task", "model", "learning rate", *named, title=title)
    for (task, model), rows in shown_curves(table, "task").groupby(["task", "model"], sort=False):
        of = rows.drop_duplicates("positions").set_index("positions")
        if model == BOUND:
            cells = [with_interval(of.loc[p], "ce", "ce_ci_low", "ce_ci_high") for p in parts]
            shown.add_row(str(task), f"{BOUND} (its own CE)", "", *cells)
            continue
        cells = [with_interval(of.loc[p], "excess", "excess_ci_low", "excess_ci_high") for p in parts]
        at = f"{of['learning_rate'].iloc[0]:g}" + (" (at the edge)" if of["at_edge"].iloc[0] else "")
        shown.add_row(str(task), str(model), at, *cells)
    yield shown
    if len(gaps):
        title = "differences, paired by seed [95 %, Student t; but for the claim uncorrected]"
        shown = Table("task", "difference", *named, "p of the claim, Holm", title=title)
        for (task, model, against), rows in gaps.groupby(["task", "model", "against"], sort=False):
            of = rows.set_index("positions")
            holm = of["p_holm"].dropna()
            corrected = f"{holm.iloc[0]:.2g}" if len(holm) else ""
            shown.add_row(str(task), f"{model} - {against}", *(with_interval(of.loc[p]) for p in parts), corrected)
        yield shown


def regression_table(table: pd.DataFrame) -> Table:
    """Losses of trained attention and of its rivals, and how far apart their predictions are."""
    title = "in-context linear regression: trained self-attention beside the best-tuned gradient steps [95 %]"
    written = Table(
        "attention", "layers", "beside", "squared error", "prediction distance", "cosine of sensitivities", title=title
    )
    for (attention, layers, against), of in shown(table).groupby(["attention", "layers", "against"], sort=False):
        by = of.set_index("quantity")
        cells = [
            with_interval(by.loc[q], "value", "ci_low", "ci_high") if q in by.index else ""
            for q in ("squared_error", "prediction_distance", "sensitivity_cosine")
        ]
        written.add_row(str(attention), str(layers), str(against) or "(itself)", *cells)
    return written


SHARES = {
    "right_when_committed": "right when committed",
    "cannot_tell": "cannot tell",
    "right_when_committed_without_layer0": "right, without layer 0",
    "cannot_tell_without_layer0": "cannot tell, without layer 0",
    "covered_gain_visibility": "covered: visibility",
    "covered_movement": "movement",
    "covered_shared_consistency": "consistency",
    "covered_shared_retention": "R",
}
"""Share of ``calibration.csv`` -> what its table calls it."""


def calibration_table(summary: pd.DataFrame) -> Table:
    """How often verdicts are right and intervals cover, with 95 % Wilson intervals."""
    columns = (Column(name) for name in ("streams", "n", "committed", *SHARES.values()))
    table = Table(*columns, title="verdicts and intervals on streams of known answer: share [95 %]")
    for _, row in summary.iterrows():
        who = row["set"] if row["by"] == "all" else f"{row['set']}, {row['by']} {row['value']}".replace(" all", "")
        counts = (f"{row[name]:.0f}" if pd.notna(row[name]) else "" for name in ("streams", "committed"))
        shares = [with_interval(row, k, f"{k}_ci_low", f"{k}_ci_high") if pd.notna(row[k]) else "" for k in SHARES]
        table.add_row(who, *counts, *shares)
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
