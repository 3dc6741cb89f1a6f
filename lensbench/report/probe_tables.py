"""What probes measured, as tables of the terminal."""

from collections.abc import Iterator

from rich.table import Column, Table

from lensbench.report.formatting import shown_seeds, with_interval
from lensbench.results.folder import Run

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
