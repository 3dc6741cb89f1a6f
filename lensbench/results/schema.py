"""The tables of a run folder and what each of their columns means.

Everything after a run (figures, comparisons, pages) reads these tables and never a model.
"""

from collections.abc import Iterator

import pandas as pd

from lensbench.lenses.kinds import kinds_in_words
from lensbench.measures.indices import catalogue_table, curve_indices, indices_table
from lensbench.measures.update.verdict import VERDICT_GATES

_WHO = {
    "model": "The model's name in the suite; MODEL+rotated is its first rotated view, whose tuned rows check the algebra.",
    "seed": "The seed of initialisation, batches and rotations; 'all' is the mean over seeds, with a Student-t interval.",
}


_HOW = {
    "stage": "How lenses were fitted: closed (ridge), refined (on KL), backward (Jacobian), loaded (another's), or none.",
    "prior": "What the ridge shrinks the map towards: zero or identity.",
}


_PAD = (
    "The pad (norm correction) chosen on dev: length added to the predicted state, against a norm that would re-inflate it, "
    "along the direction that the unembedding sees least; in rms of the final state."
)


def _bounds(name: str = "", of: str = "its 95 % interval") -> dict[str, str]:
    """The two columns of an interval."""
    prefix = f"{name}_" if name else ""
    return {f"{prefix}ci_low": f"The lower end of {of}.", f"{prefix}ci_high": f"The upper end of {of}."}


_OVER_DOCUMENTS = "the 95 % interval: paired bootstrap over documents with the fitted lens held fixed"
_OR_SEEDS = f"{_OVER_DOCUMENTS}; for seed 'all', Student's t over seeds"
_OF_PROBES = "the 95 % interval: bootstrap or jackknife over documents; for seed 'all', Student's t over seeds"
_OF_CURVES = "the 95 % interval: bootstrap over documents; for seed 'all', Student's t over seeds"


_OF_UPDATES = "its 95 % interval: bootstrap over documents, and refits on resampled fitting documents"


_OF_PAIR = {
    **_WHO,
    "from_layer": "The earlier layer i.",
    "to_layer": "The later layer j.",
    "metric": "The metric of readings: fisher (with the slope of the cap, where logits are soft-capped), logit, euclidean "
    "or whitened.",
    "ridge": "The ridge of lens i, the strongest within the tolerance, in median eigenvalues of its fold's covariance.",
    "gate": "Why the shares of this pair are undetermined: no fall (of KL and cross-entropy), no room, not kept; empty "
    "where it passes.",
    "carried": "c: the share of what was added (and of error taken off) that lies elsewhere; 1 - c is added in place.",
    **_bounds("carried", _OF_UPDATES),
    "persistence": "S: how much of the signal in reading i is there at j, growth of the stream included.",
    **_bounds("persistence", _OF_UPDATES),
    "clarity": "How much of reading i at layer j the readings of both layers explain, beyond chance.",
    **_bounds("clarity", _OF_UPDATES),
    "room": "1 - B: the share of lens i's error loading that lens j no longer has.",
    **_bounds("room", _OF_UPDATES),
    "kept_low": "The least that is kept: clarity, or 0 where S is within chance.",
    **_bounds("kept_low", _OF_UPDATES),
    "kept_high": "The most that is kept: S up to 1, or 0 where S is within chance.",
    **_bounds("kept_high", _OF_UPDATES),
    "carried_chance": "Standard deviation of c, were what was added in random directions (analytic; no error of sampling).",
    "persistence_chance": "Standard deviation of S, were layer j in a random basis (analytic).",
    "drowned": "1 - clarity where persistence is at least 1.",
    "news": "The share of the gain in explained power that lies where lens i explains less than a tenth.",
    **_bounds("news", "its 95 % interval: bootstrap over documents"),
    "readable_gain": "V: the share of the cross-entropy gain from i to j that lens i can read at j; empty for "
    "pairs that were not looked at, and where there is no gain.",
    **_bounds("readable_gain", "its 95 % interval: bootstrap over documents"),
    "commission": "The share of lens i's error that is loading on what is no signal.",
}


SCHEMA: dict[str, dict[str, str]] = {
    "models.csv": {
        **_WHO,
        "family": "How the model is built; for a pretrained model, its model type.",
        "source": "Where a pretrained model comes from; empty for models trained here.",
        "weights": "What tells models of one name apart: the first 12 hex digits of a SHA-256 over the files of a "
        "checkpoint (weights, config, tokenizer), its commit on the hub, or the weights of a model trained here; empty in "
        "Python.",
        "dtype": "The data type that the model computes in; lenses are always float32.",
        "parameters": "The number of parameters, tied tensors counted once.",
        "layers": "The number of blocks, L.",
        "d_model": "The width of the stream that the lenses read.",
        "vocab_size": "The number of tokens (or classes) that are predicted, V.",
        "train_tokens": "The tokens visited in training; empty for pretrained models.",
        "begin_token": "The token that the model's text begins with, as its tokenizer spells it; empty where there is none.",
        "begin": "Where it stands: every window, first window (of each document), or none; empty for images.",
        "begin_gain": "What it is worth on a few dev windows: cross-entropy without it minus with it in front of each "
        "window, on the same tokens, nats/token; empty for models trained here.",
        **_bounds("begin_gain", "the 95 % interval: paired bootstrap over documents"),
        "ce": "Held-out cross-entropy, nats/token.",
        **_bounds("ce"),
        "bits_per_byte": "Held-out cross-entropy in bits per byte of the scored tokens; empty for images.",
        **_bounds("bits_per_byte"),
        "scored_tokens": "The number of held-out tokens scored.",
        "clusters": "How many documents (or top folders) these come from; below 64, do not trust the intervals.",
    },
    "baselines.csv": {
        "tokenizer": "Whose tokens are counted: those trained here (on the train split), or those of a model with its own.",
        "baseline": "unigram, or bigram (interpolated Kneser-Ney), counted on the train split.",
        "train_tokens": "How many tokens were counted.",
        "ce": "Cross-entropy on the same tokens as the models', nats/token.",
        **_bounds("ce"),
        "bits_per_byte": "The same in bits per byte.",
        **_bounds("bits_per_byte"),
    },
    "lenses.csv": {
        **_WHO,
        "lens": f"{kinds_in_words()}.",
        "layer": "The stream layer that the lens reads.",
        **_HOW,
        "ridge": "The ridge chosen on dev, in median eigenvalues of the input covariance.",
        "pad": _PAD,
        "kl": "Held-out KL(p || q) of the model's distribution p and the lens's q, nats/token.",
        **_bounds("kl"),
        "ce": "Held-out cross-entropy, nats/token.",
        **_bounds("ce"),
        "top1": "The share of tokens at which the lens's most probable word is the model's; where evaluate.top asks.",
        **_bounds("top1"),
        "top10": "The share at which the model's most probable word is among the lens's ten (arXiv 2504.13984); likewise.",
        **_bounds("top10"),
        "fit_kl": "KL on the fitting tokens.",
        "dev_kl": "KL on the dev tokens.",
        "jacobian_error": "Of a Jacobian lens the standard error of its matrix, over prompts and random vectors, by the "
        "norm of J itself (Frobenius); inf where the estimate is no longer than its noise. A column where a suite fits such "
        "lenses to more than one prompt. Earlier tables have `relative_error`, r by the norm of the estimate: this is "
        "r / sqrt(1 - r^2).",
    },
    "transfer.csv": {
        **_WHO,
        "lens": "tuned, logit (row L) or jacobian: a column where evaluate.jacobian_matrix asks for the last.",
        "lens_layer": "The layer i that the lens was fitted at; L is the identity, the logit lens.",
        "stream_layer": "The layer j that it reads.",
        **_HOW,
        "ridge": "The ridge of lens i, the strongest within the tolerance, in median eigenvalues.",
        "tolerance": "The dev loss that lens i may have on its own layer, as a share of K_0 - best.",
        "kl": "K_ij, nats/token.",
        "ce": "C_ij, nats/token.",
        "movement_kl": "D_ij = E KL(q_ii || q_ij), nats/token.",
        "top1_agreement": "The share of tokens at which the lens's most probable word is the model's.",
        **_bounds("top1_agreement"),
        "penalty_kl": "K_ij - K_jj.",
        **_bounds("penalty_kl"),
        "penalty_ce": "C_ij - C_jj, the published transfer penalty.",
        **_bounds("penalty_ce"),
    },
    "tolerances.csv": {
        **_WHO,
        "tolerance": "The dev loss allowed to a lens on its own layer: a share of K_0 - best, 1se (standard error), loaded.",
        "index": "The index, over the pairs of these layers: one of {curve}.",
        "layers": "The layers of the lenses and of the stream.",
        **_HOW,
        "ridge": "The ridge of each lens, in median eigenvalues.",
        "own_kl": "The mean held-out KL of the lenses on their own layers, nats/token.",
        **_bounds("own_kl"),
        "value": "The value; empty where it is undefined.",
        **_bounds("", _OVER_DOCUMENTS),
        "fit_low": "The value plus the smallest change by a refit on resampled documents, at the matrix's tolerance.",
        "fit_high": "The value plus the largest change by such a refit.",
        "reason": "Why the index is undefined, or a warning.",
    },
    "pairs.csv": {
        **_WHO,
        "layer_i": "The first of the two layers that the lens is fitted to.",
        "layer_j": "The second of them.",
        "ridge": "The ridge chosen on dev, in median eigenvalues of the pooled covariance.",
        "pad": _PAD,
        "kl_i": "Held-out KL of the lens as it reads layer i, nats/token.",
        "kl_j": "Held-out KL of the lens as it reads layer j, nats/token.",
        "penalty": "M_ij: the mean excess of the two over the per-layer lenses' own KL (closed, prior zero).",
        **_bounds("penalty"),
        "rotated_penalty": "M_ij where each layer has a random basis of its own, mean over bases.",
        **_bounds("rotated_penalty"),
    },
    "update.csv": _OF_PAIR,
    "blocks.csv": {
        **_OF_PAIR,
        "blocks": "How many blocks the row is of: neighbours are merged on dev until there is room.",
    },
    "distances.csv": {
        **_WHO,
        "distance": "The distance j - i of two decomposed layers, in positions; layer 0 is left out.",
        "pairs": "How many pairs of layers have it.",
        "passed": "How many of them pass the gates.",
        "in_place": "1 - c over the pairs that pass, weighted as the index; empty where none does.",
        **_bounds("in_place"),
        "clarity": "Clarity, mean over all pairs of this distance.",
        **_bounds("clarity"),
        "persistence": "S, mean over all pairs of this distance.",
        **_bounds("persistence"),
        "news": "The share of the gain in explained power that is news, over all pairs of this distance.",
        **_bounds("news"),
        "reason": "Why a value is missing, or a warning.",
    },
    "variants.csv": {
        **_WHO,
        "setting": "What is set another way: tolerance (dev loss allowed to a ridge), metric (of readings), units "
        "(states over the scale of the final norm, so that every token counts alike), massive (tokens with a massive "
        "activation are left out), or interval (that of documents alone, without lens refits).",
        "at": "The tolerance, the metric, whose units, or the norm, in medians of the layer, from which on a token is left "
        "out.",
        "index": "The index of the update decomposition, over the pairs that pass the gates at the reported setting; or "
        "fit_tokens_left_out and so on, a share of tokens.",
        "value": "The value there; empty where it is undefined.",
        **_bounds("", _OVER_DOCUMENTS),
        "difference": "The value minus the reported one.",
        **_bounds("difference", _OVER_DOCUMENTS + ", paired"),
        "reason": "Why the index is undefined, or a warning.",
    },
    "landmarks.csv": {
        **_WHO,
        "landmark": "A null or landmark made of the model's own states: rotated (every layer in a random basis), carried "
        "(every layer's state added in a random basis of its own), drifting (the basis turns by 45 degrees in all), "
        "shuffled (every block's update from a token of another document).",
        "known": "What is known of it: re-represented, carried along, mixed, or undetermined.",
        "index": "The index of the update decomposition, as in indices.csv; layers count from the view's first. "
        "in_place_losses_aside is in_place over all pairs that have room and keep the signal, whether losses fall or not.",
        "value": "The value; empty where it is undefined.",
        **_bounds("", "the 95 % interval: bootstrap over documents"),
        "verdict": "The verdict on the view by the suite's rule, over the same layers as the index.",
        "gate": "Why that verdict is undetermined; empty where it is not.",
        "participation": "The participation ratio of each layer's covariance, and of the end's; - for constant states.",
        "reason": "Why the index is undefined, or what is to be known of the view.",
    },
    "verdicts.csv": {
        **_WHO,
        "scope": "What the verdict is on: all layers, or without layer 0.",
        "known": "What is known of the model by construction; empty where nothing is.",
        "verdict": "By the update decomposition and the suite's rule: added up in one representation, carried along, "
        "re-represented, mixed, or undetermined; seeds must agree.",
        "sentence": "What was found, in words, whatever the verdict is.",
        "gate": "Why the verdict is undetermined: {gates}; empty where it is not.",
        "of_refits": "The share of lens refits in the variance of what is added in place; the rest is that of documents.",
        "fixed_lens_verdict": "By lenses held fixed (consistency, movement, gain visibility): refinement, carry-along, "
        "re-representation or cannot tell; seeds must agree.",
        "fixed_lens_reason": "The indices that this verdict rests on, their intervals widened by refits.",
    },
    "probes.csv": {
        **_WHO,
        "probe": "The probe that measured it, as a suite names it.",
        "quantity": "What was measured; described in lensbench/probes.",
        "layer": "The layer or block (from 0) that it belongs to.",
        "other": "The second layer or block, the head, or how many.",
        "value": "The value; empty where it is undefined.",
        **_bounds("", _OF_PROBES),
        "reason": "Why the quantity is undefined, or why the probe does not apply.",
    },
    "curves.csv": {
        **_WHO,
        "train_tokens": "The budget of a training of its own, with its own schedule.",
        "positions": "The part of the context that is scored: its first and last position, or all.",
        "ce": "Held-out cross-entropy at every position of this part, nats/token.",
        **_bounds("ce", _OF_CURVES),
        "reason": "A warning.",
    },
    "timings.csv": {
        **_WHO,
        "train_tokens": "The budget, as in curves.csv.",
        "seconds": "The median time of a training step, times the steps. It is measured: no two runs share this table.",
    },
    "indices.csv": {
        **_WHO,
        "index": "The name of the index; indices.md says what each is.",
        "value": "The value; empty where it is undefined.",
        **_bounds("", _OR_SEEDS),
        "fit_low": "The value plus the smallest change by a refit on resampled documents; empty if refits leave it out.",
        "fit_high": "The value plus the largest change by such a refit.",
        "stage": "How its lenses were fitted: closed (ridge), refined (on KL), loaded (someone else's), or none.",
        "tolerance": "The tolerance of the transfer matrix, if the index is read off it.",
        "reason": "Why the index is undefined, or a warning.",
    },
}


OPENING = """# The tables of a run, column by column

`lensbench schema` prints this page and the next, [indices](indices.md), from `lensbench/results/schema.py` and the
catalogue of indices. How to read a run: [results](README.md).

- Tables are CSV, UTF-8, with one header line. Numbers have nine digits. An empty cell is unknown, and `reason` says
  why.
- Losses are in nats/token (of image models nats/image) unless a column says otherwise.
- `model` is the name in the suite; MODEL+rotated is its first view in random bases, whose own lenses check the
  algebra. `seed` is that of initialisation, batches and rotations; `all` is the mean over seeds.
- `X_ci_low` and `X_ci_high` are the ends of the 95 % interval of X: bootstrap over documents (or clusters of them)
  with the fitted lens held fixed, unless said. For seed `all` it is Student's t over seeds.
- `manifest.json` has the suite, seeds, versions, hardware, checksum of the texts, code revision, and SHA-256 of tables.
  In a light folder, `exported` has those of each CSV and says what the sums were made of.
- `cluster_sums.parquet`: what comparisons read. A row for each `model`, `seed`, `lens`, `lens_layer` (where it was
  fitted), `layer` (that it reads), `stage`, `prior`, `view` (random basis; -1: none) and `cluster` of documents, with
  its `tokens`, `bytes`, and sums of `kl`, `ce` and `movement` in nats, rounded so that a mean over N tokens moves
  by about 0.0003 / sqrt(N).
- `update_draws.parquet`: `model`, `seed`, `index`, `value`; 500 bootstrap draws of each index of the update
  decomposition, over the same documents for every model, in steps of at most a 64th of their spread.
- `estimated` in the manifest is there where a suite computes a share of the log-partitions (`evaluate.exact_share` below
  1, or auto). For each model and seed it has `share`; found on dev, it is the mean of `of_layers`, the shares of layers
  0..L; `widest` is the kind of interval that asks for most, `ratio` the variance that a share of one half would add to
  it; then come the `tokens`, `documents` and `intervals` looked at. Losses are then unbiased estimates: a KL near 0 may
  be negative, and intervals hold the added variance.
- `half_passes` in the manifest: models whose passes multiplied in float16, and how far that is from float32: `kl` of
  predictions, `state_error` of states.
"""


OF_INDICES = """# The indices

`indices.csv` has a row for each of them. First how to read each, then its definition.

"""


OF_DEFINITIONS = """
## Definitions

In the order of their rows. *Lenses*: how the lenses were fitted that an index is read from; *matrix* means those of
the transfer matrix. *Compares*: what its values can be compared between. Letters: K_ij is the KL of lens i at layer
j, C_ij its cross-entropy, K_0 the KL of the best prediction that does not depend on the input, which is the mean
prediction; r_i is what lens i reads at its own layer, s_ij at layer j, f_i the part of r_i that is signal.

"""


def tables_text() -> str:
    """The schema of all tables, as Markdown."""
    parts = [OPENING]
    for name, columns in SCHEMA.items():
        parts.append(f"\n## `{name}`\n\n| column | meaning |\n|---|---|\n")
        shared = "update.csv" if name == "blocks.csv" else ""
        if shared:
            parts.append(f"| all of `{shared}` | The same, of blocks. |\n")
            columns = {column: meaning for column, meaning in columns.items() if column not in SCHEMA[shared]}
        parts += [f"| {names} | {meaning} |\n" for names, meaning in _column_rows(columns)]
    return "".join(parts)


def _column_rows(columns: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names and meaning of columns; the two ends of an interval in one row, what every table has in none of its own."""
    who = [column for column in _WHO if column in columns]
    if who:
        yield ", ".join(f"`{column}`" for column in who), "As in every table."
    for column, meaning in columns.items():
        if column in who or column.endswith("ci_high"):
            continue
        names, words = f"`{column}`", meaning
        if column.endswith("ci_low"):
            names += f", `{column.removesuffix('low')}high`"
            words = words.replace("The lower end of", "The ends of")
        words = words.replace("{curve}", ", ".join(curve_indices())).replace("{gates}", ", ".join(VERDICT_GATES))
        yield names, words.replace("|", r"\|")


def indices_text() -> str:
    """How to read every index, and its definition, as Markdown."""
    return "".join([OF_INDICES, indices_table(), OF_DEFINITIONS, catalogue_table()])


def schema_text() -> str:
    """The schema of all tables, and the catalogue of indices, as Markdown."""
    return f"{tables_text()}\n{indices_text()}"


def unit(models: pd.DataFrame) -> str:
    """What the models of ``models.csv`` predict: ``token``, ``image`` (it has no bytes), or if both, ``prediction``."""
    images = models["bits_per_byte"].isna()
    return "image" if images.all() else "prediction" if images.any() else "token"


def columns_of(name: str, table: pd.DataFrame) -> list[str]:
    """The columns of a table's schema in their order, without those that nobody asked for."""
    asked = ASKED_COLUMNS.get(name, ())
    return [
        column for column in SCHEMA[name] if column not in asked or (column in table and table[column].notna().any())
    ]


def of_the_matrix(transfer: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``transfer.csv`` that are of the fit's own transfer matrix: not of Jacobian lenses."""
    return transfer[transfer["stage"] != "backward"]


def no_rows(name: str) -> pd.DataFrame:
    """An empty table with its columns."""
    return pd.DataFrame(columns=list(SCHEMA[name]))


TEXT_COLUMNS = {
    "model", "seed", "family", "baseline", "tokenizer", "lens", "stage", "prior", "index", "reason", "dtype", "source",
    "probe", "quantity", "scope", "metric", "gate", "landmark", "setting", "at",
    "participation", "verdict", "known", "sentence", "fixed_lens_verdict", "fixed_lens_reason", "positions",
    "begin_token", "begin", "weights",
}  # fmt: skip


TEXT_COLUMNS_OF = {"tolerances.csv": {"tolerance", "layers", "ridge"}}


OF_UPDATES = ("update.csv", "blocks.csv", "distances.csv", "variants.csv", "landmarks.csv")
"""Tables of the update decomposition, which a suite may leave out."""


ON_REQUEST = ("curves.csv", "timings.csv")
"""Tables that are written where a suite asks for learning curves."""


ADDED = ("verdicts.csv", "probes.csv", *OF_UPDATES, *ON_REQUEST)
"""Tables that a folder may lack, because it is of an earlier version or nobody asked for them: read as empty."""


WRITTEN = tuple(name for name in SCHEMA if name not in ON_REQUEST)
"""Tables of every run; one that leaves the update decomposition out has none of its three."""


MEASURED_TIME = ("timings.csv",)
"""Tables that are not the same in any two runs."""


ASKED_COLUMNS = {
    "lenses.csv": ("top1", "top1_ci_low", "top1_ci_high", "top10", "top10_ci_low", "top10_ci_high", "jacobian_error"),
    "transfer.csv": ("lens",),
}
"""Columns that a table has where a suite asks for them; read as empty from other tables."""


ADDED_COLUMNS = {
    **ASKED_COLUMNS,
    "models.csv": ("weights", "begin_token", "begin", "begin_gain", "begin_gain_ci_low", "begin_gain_ci_high"),
    "verdicts.csv": ("known",),
    "landmarks.csv": ("verdict", "gate"),
}
"""Columns that older tables lack: read as empty."""
