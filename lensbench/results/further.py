"""Tables that commands other than ``run`` write, and the Parquet files of a run: what each of their columns means."""

import re

_SHARE = "its 95 % interval (Wilson)"
_WHO = {
    "set": "tune, held_out or uneven: what the families were used for.",
    "family": "The family of synthetic streams.",
}
_STREAM = {**_WHO, "number": "The number of the stream in its family."}
_OF_LENS = {
    "model": "The model's name in the suite.",
    "seed": "The seed.",
    "lens": "What kind of lens it is, as in lenses.csv; model is the model itself, constant the best constant prediction.",
    "lens_layer": "The layer that the lens was fitted at.",
    "layer": "The layer that it reads.",
    "stage": "How it was fitted, as in lenses.csv.",
    "prior": "What the ridge shrinks its map towards: zero or identity.",
    "view": "The number of the random basis; -1: the stream's own.",
}
_SUMS = {
    "tokens": "How many tokens were scored.",
    "bytes": "How many bytes of text they are.",
    "kl": "The sum of KL(p || q), nats.",
    "ce": "The sum of cross-entropy, nats.",
    "movement": "The sum of KL between what the lens says at its own layer and here, nats.",
}


def _ends(name: str = "", of: str = "its 95 % interval") -> dict[str, str]:
    prefix = f"{name}_" if name else ""
    return {f"{prefix}ci_low": f"The lower end of {of}.", f"{prefix}ci_high": f"The upper end of {of}."}


FURTHER: dict[str, dict[str, str]] = {
    "compare --out": {
        "kind": "value, fact (layers, parameters), verdict, difference, claim, claim at tolerance, or learning curve.",
        "run": "The run folder.",
        "model": "The model.",
        "seed": "Its seed; all: over seeds.",
        "index": "The loss, index, fact or scope of the verdict that the row is about.",
        "value": "The value, or model minus against_model; empty where it is undefined.",
        **_ends(),
        "against_run": "The run folder of the model that is subtracted.",
        "against_model": "The model that is subtracted.",
        "against_seed": "Its seed.",
        "paired": "Whether both scored the same text, so that draws are paired; over seeds: paired by seed.",
        "seeds": "How many seeds a row over seeds has.",
        "p": "Of a claim or of a difference over seeds; uncorrected.",
        "p_holm": "p corrected over all claims of the suite (Holm).",
        "note": "Why a value is undefined, why a difference is not paired, warnings of the tables; of other kinds what they "
        "are at (tolerance, budget, gate of a verdict).",
        "landmark": "The landmark that a claim is about.",
        "probe": "The probe that a claim is about.",
        "claim": "The claim in words.",
        "status": "What was known before: new, or seen in a prototype.",
        "outcome": "Of a claim holds, does not hold or not tested; of a verdict the verdict.",
    },
    "sweep.csv": {
        "model": "The model.",
        "trial": "The number of the trial.",
        "settings": "What the trial set, as KEY=VALUE.",
        "dev_ce": "Cross-entropy on the dev split, nats/token.",
        **_ends("dev_ce"),
        "chosen": "Whether it is the model's best.",
    },
    "task.csv": {
        "task": "The task of known Bayes predictor.",
        "model": "The model; bayes: the exact predictor itself.",
        "seed": "The seed; all: over seeds.",
        "positions": "The part of the document that is scored, or all.",
        "ce": "Held-out cross-entropy, nats/token.",
        **_ends("ce"),
        "excess": "Cross-entropy above the Bayes predictor's, nats/token.",
        **_ends("excess"),
        "learning_rate": "The learning rate chosen on dev.",
        "at_edge": "Whether it lies at an end of those tried.",
        "reason": "A warning.",
    },
    "differences.csv": {
        "task": "The task.",
        "model": "The model.",
        "against": "The model that is subtracted.",
        "positions": "The part of the document, or all.",
        "value": "Difference in cross-entropy, paired by seed, nats/token.",
        **_ends("", "its 95 % interval (Student t)"),
        "seeds": "How many seeds both have.",
        "p": "Of the paired t-test.",
        "p_holm": "p corrected over the claims (Holm); empty where nothing is claimed.",
    },
    "regression.csv": {
        "layers": "Layers of self-attention, or steps of gradient descent.",
        "attention": "Which attention: linear or softmax.",
        "seed": "The seed; all: over seeds.",
        "against": "What it is held against; empty: the model itself.",
        "quantity": "squared_error, prediction_distance or sensitivity_cosine.",
        "value": "The value.",
        **_ends(),
    },
    "calibration.csv": {
        "set": "tune or held_out.",
        "by": "What the streams are grouped by; all: not at all.",
        "value": "Which group.",
        "streams": "How many streams.",
        "committed": "How many of them got a verdict other than cannot tell.",
        "right_when_committed": "The share of those that are right.",
        **_ends("right_when_committed", _SHARE),
        "cannot_tell": "The share without a verdict.",
        **_ends("cannot_tell", _SHARE),
        "committed_without_layer0": "As committed, for verdicts without layer 0.",
        "right_when_committed_without_layer0": "The share of those that are right.",
        **_ends("right_when_committed_without_layer0", _SHARE),
        "cannot_tell_without_layer0": "The share without a verdict.",
        **_ends("cannot_tell_without_layer0", _SHARE),
        "covered_INDEX": "The share of streams whose interval holds the true index (INDEX_own_views: in the bases drawn).",
        **_ends("covered_INDEX", _SHARE),
    },
    "streams.csv of calibration": {
        **_STREAM,
        "truth": "What is true of it by construction.",
        "seed": "The seed of the stream.",
        "d": "Width.",
        "layers": "Layers.",
        "vocab": "Words.",
        "first_noise": "Noise of the first layer.",
        "last_noise": "Noise of the last layer.",
        "tokens": "Tokens that lenses were fitted to.",
        "INDEX": "An index of lenses held fixed.",
        **_ends("INDEX"),
        "INDEX_true": "The same lenses on many times as many fresh tokens.",
        "verdict": "The verdict by the frozen rule.",
        "reason": "What it rests on.",
        "verdict_without_layer0": "The verdict without layer 0.",
        "reason_without_layer0": "What that rests on.",
    },
    "thresholds.csv": {
        "threshold": "The threshold of the rule.",
        "pure": "The value of the pure streams next to it.",
        "other": "The value of the others next to it.",
        "midpoint": "The middle of both: what the tune streams suggest.",
    },
    "streams.csv.gz of update-calibration": {
        **_STREAM,
        "layers": "Layers.",
        "d": "Width.",
        "growth": "How much the stream grows from its first to its last layer.",
        "right": "The verdicts that are right of it.",
        "gates": "A letter for each pair of layers: a dot where it passes the gates.",
        "of_refits": "The share of lens refits in the variance of what is added in place.",
        "reason": "Why it has no verdict.",
        "QUANTITY": "A quantity of the update decomposition from layer 1 on.",
        **_ends("QUANTITY"),
        "QUANTITY_lenses": "Its value for the lenses that were fitted, on many fresh tokens.",
        "QUANTITY_population": "Its value for the lenses of the population.",
        "QUANTITY_declared": "Its value by the construction of the stream.",
        "QUANTITY_reason": "Why it is undefined, or a warning.",
        "in_place_all_layers": "What is added in place over all layers.",
    },
    "blocks.csv.gz of update-calibration": {
        **_STREAM,
        "from_layer": "The layer before the block.",
        "to_layer": "The layer after it.",
        "gate": "Why it is undetermined; empty where it is not.",
        "QUANTITY": "persistence, clarity or kept_high.",
        **_ends("QUANTITY"),
        "persistence_chance": "Standard deviation of persistence, were the later layer in a random basis.",
    },
    "verdicts.csv of update-calibration": {
        **_STREAM,
        "right": "The verdicts that are right.",
        "verdict": "The verdict.",
        "gate": "Why it is undetermined; empty where it is not.",
        "between": "Of an undetermined one, the answers that are both possible.",
    },
    "coverage.csv": {
        "quantity": "The quantity of the update decomposition.",
        "truth": "Held against which truth: that of the fitted lenses, the population's, or the declared one.",
        **_WHO,
        "streams": "How many streams have both.",
        "covered": "The share of intervals that hold the truth.",
        **_ends("covered", _SHARE),
        "rms": "Root mean square of value minus truth.",
        "bias": "Its mean.",
        "width": "The mean length of an interval.",
    },
    "right.csv": {
        **_WHO,
        "streams": "How many streams.",
        "committed": "The share that got a verdict.",
        **_ends("committed", _SHARE),
        "right_when_committed": "The share of those that are right.",
        **_ends("right_when_committed", _SHARE),
        "VERDICT": "How many streams got this verdict.",
    },
    "points.csv": {
        "family": "The family of synthetic streams.",
        "d": "Width.",
        "number": "The number of the stream.",
        "fit_tokens": "Tokens of the fit split.",
        "dev_tokens": "Tokens of the dev split.",
        "eval_tokens": "Tokens of the eval split.",
        "gates": "A letter for each pair of layers: a dot where it passes the gates.",
        "passed": "How many pairs pass.",
        "in_place": "What is added in place from layer 1 on.",
        **_ends("in_place"),
        "half_width": "Half the length of its interval.",
        "of_refits": "The share of lens refits in its variance.",
        "in_place_population": "Its value for the lenses of the population.",
        "error": "The value minus that one.",
        "covered": "Whether the interval holds it.",
        "reason": "Why there is no value.",
        "seconds": "What it took.",
        "peak_gib": "The memory that it took.",
    },
    "tokens.csv": {
        "family": "The family of synthetic streams.",
        "d": "Width.",
        "fit_tokens": "Tokens of the fit split.",
        "per_d": "The same per direction of the stream.",
        "streams": "How many streams.",
        "passed": "The mean number of pairs that pass the gates.",
        "intervals": "How many streams have an interval.",
        "half_width": "The mean of half its length.",
        **_ends("half_width"),
        "of_refits": "The mean share of lens refits in the variance.",
        "truths": "How many streams have a value and a truth.",
        "rms": "Root mean square of the errors.",
        "bias": "Their mean.",
        "covered": "The share of intervals that hold the truth.",
        **_ends("covered", _SHARE),
        "seconds": "The median of what a stream took.",
    },
    "needed.csv": {
        "family": "The family of synthetic streams.",
        "d": "Width.",
        "asked": "The half-width asked for.",
        "points": "How many points were measured.",
        "intervals": "How many of them have an interval.",
        "tokens": "Tokens of the fit split that give it.",
        **_ends("tokens"),
        "per_d": "The same per direction of the stream.",
        "how": "How that was found: between points, or beyond them.",
        "reason": "Why there is no number.",
        "slope": "Of log half-width on log tokens.",
        **_ends("slope"),
        "interval_at": "The fewest tokens at which there is an interval.",
        "no_pair_at": "The most tokens at which no pair passes the gates.",
        "a_pair_at": "The fewest tokens at which one does.",
    },
    "settings.csv": {
        "model": "The model.",
        "seeds": "How many seeds have the index there.",
        "index": "The index of the update decomposition.",
        "setting": "What is set another way, as in variants.csv; reported: the setting of the run.",
        "at": "At what.",
        "value": "The value there, mean over seeds.",
        **_ends(),
        "difference": "The value minus the reported one.",
        **_ends("difference"),
    },
    "doubt.csv": {
        "model": "The model.",
        "seeds": "How many seeds.",
        "index": "The index.",
        "value": "Its value.",
        "between_seeds": "Standard deviation between seeds.",
        "documents": "Standard deviation over documents, within a seed.",
        "refits": "Standard deviation by lens refits, within a seed.",
    },
    "cluster_sums.parquet": {
        **_OF_LENS,
        "cluster": "The cluster of documents.",
        **_SUMS,
    },
    "per_sequence.parquet": {
        **_OF_LENS,
        "document": "The document.",
        "sequence": "The number of the sequence.",
        **_SUMS,
        "top1": "The number of tokens at which the lens's most probable word is the model's.",
    },
    "update_draws.parquet": {
        "model": "The model.",
        "seed": "The seed.",
        "index": "The index of the update decomposition.",
        "value": "Its value at a bootstrap draw; draws in their order.",
    },
}
"""Name of the table (and what writes it, where two have one name) -> column -> meaning. A word in capitals in a column
stands for the name of an index, a quantity or a verdict."""


def describes(name: str, column: str) -> bool:
    """Whether the schema of a table of :data:`FURTHER` has a column, by itself or by a word in capitals."""
    return any(re.fullmatch(re.sub(r"[A-Z]{2,}", "[a-z0-9_ -]+", known), column) for known in FURTHER[name])


def further_text() -> str:
    """The schema of :data:`FURTHER`, as Markdown."""
    parts = [
        "# Tables of other commands, and Parquet files\n\nWritten by `lensbench schema --further > results/tables.md`. "
        "A word in capitals in the name of a\ncolumn stands for the name of an index, a quantity or a verdict.\n"
    ]
    for name, columns in FURTHER.items():
        parts.append(f"\n## `{name}`\n\n| column | meaning |\n|---|---|\n")
        parts += [f"| `{column}` | {meaning} |\n" for column, meaning in columns.items()]
    return "".join(parts)
