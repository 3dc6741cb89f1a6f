"""The run folder: tidy tables, their schema, a manifest with checksums, and atomic writes.

Everything downstream of a run (figures, comparisons) reads these files and never a model.
"""

import pandas as pd

_WHO = {
    "model": "name in the suite; MODEL+rotated is its first rotated view, whose tuned rows check the algebra alone",
    "seed": "seed of initialisation, batches and rotations; 'all' is the mean over seeds with a Student-t interval",
}


_HOW = {
    "stage": "closed (ridge), refined (KL), loaded (lenses of others), or none where nothing is fitted",
    "prior": "what the ridge shrinks the map towards: zero or identity",
}


SCHEMA: dict[str, dict[str, str]] = {
    "models.csv": {
        **_WHO,
        "family": "how it was built: of a pretrained model its model type",
        "source": "where a pretrained model comes from; empty for models trained here",
        "dtype": "what the model computes in; lenses are float32",
        "parameters": "tied tensors counted once",
        "layers": "blocks L",
        "d_model": "width of the stream that the lenses read",
        "vocab_size": "V",
        "train_tokens": "tokens visited in training; empty for pretrained models",
        "ce": "held-out cross-entropy, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "bits_per_byte": "the same in bits per byte of the scored tokens",
        "bits_per_byte_ci_low": "",
        "bits_per_byte_ci_high": "",
        "scored_tokens": "held-out tokens scored",
        "clusters": "documents they come from, or top folders of them; under 64 the intervals are not to be trusted",
    },
    "baselines.csv": {
        "tokenizer": "whose tokens: trained here (on the train split), or a model that brings its own",
        "baseline": "unigram, or bigram (interpolated Kneser-Ney), counted on the train split",
        "train_tokens": "",
        "ce": "on the same tokens as the models, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "bits_per_byte": "",
        "bits_per_byte_ci_low": "",
        "bits_per_byte_ci_high": "",
    },
    "lenses.csv": {
        **_WHO,
        "lens": "logit, tuned (per layer), shared, shared_bias (one bias per layer), shared_loo (fitted without the layer)",
        "layer": "stream layer it is read at",
        **_HOW,
        "ridge": "chosen on dev, in median eigenvalues of the input covariance",
        "pad": "chosen on dev, in rms of the final state",
        "kl": "held-out KL(p || q), nats/token",
        "kl_ci_low": "",
        "kl_ci_high": "",
        "ce": "held-out cross-entropy, nats/token",
        "ce_ci_low": "",
        "ce_ci_high": "",
        "fit_kl": "KL on the fitting tokens",
        "dev_kl": "KL on the dev tokens",
    },
    "transfer.csv": {
        **_WHO,
        "lens_layer": "layer i that the lens was fitted at; L is the identity, the logit lens",
        "stream_layer": "layer j that it is read at",
        **_HOW,
        "ridge": "of lens i, the strongest within the tolerance, in median eigenvalues",
        "tolerance": "allowed dev loss of lens i on its own layer, share of K_0 - best",
        "kl": "K_ij, nats/token",
        "ce": "C_ij, nats/token",
        "movement_kl": "D_ij = E KL(q_ii || q_ij)",
        "top1_agreement": "share of tokens at which the lens's most probable word is the model's",
        "top1_agreement_ci_low": "",
        "top1_agreement_ci_high": "",
        "penalty_kl": "K_ij - K_jj",
        "penalty_kl_ci_low": "",
        "penalty_kl_ci_high": "",
        "penalty_ce": "C_ij - C_jj, the published transfer penalty",
        "penalty_ce_ci_low": "",
        "penalty_ce_ci_high": "",
    },
    "tolerances.csv": {
        **_WHO,
        "tolerance": "allowed dev loss of a lens on its own layer, share of K_0 - best; 1se: one standard error; loaded",
        "index": "gain visibility or movement, over the pairs of these layers",
        "layers": "the layers of the lenses and of the stream",
        **_HOW,
        "ridge": "of each lens, in median eigenvalues",
        "own_kl": "mean held-out KL of the lenses on their own layers, nats/token",
        "own_kl_ci_low": "",
        "own_kl_ci_high": "",
        "value": "empty where undefined",
        "ci_low": "95 % paired bootstrap over documents, the fitted lens held fixed",
        "ci_high": "",
        "fit_low": "value plus the smallest change by a refit on document-resampled fit data, at the headline's tolerance",
        "fit_high": "plus the largest",
        "reason": "why it is undefined, or a warning",
    },
    "pairs.csv": {
        **_WHO,
        "layer_i": "first of the two layers that the lens is fitted to",
        "layer_j": "second",
        "ridge": "chosen on dev, in median eigenvalues of the pooled covariance",
        "pad": "chosen on dev, in rms of the final state",
        "kl_i": "held-out KL of the lens as it reads layer i, nats/token",
        "kl_j": "as it reads layer j",
        "penalty": "M_ij: mean excess of the two over the per-layer lenses' own (closed, prior zero)",
        "penalty_ci_low": "",
        "penalty_ci_high": "",
        "rotated_penalty": "the same where each layer has a random basis of its own, mean over views",
        "rotated_penalty_ci_low": "",
        "rotated_penalty_ci_high": "",
    },
    "verdicts.csv": {
        **_WHO,
        "scope": "all layers, or without layer 0",
        "known": "what is known of the model by construction; empty where it is to be found out",
        "verdict": "refinement, carry-along, re-representation or cannot tell, by the suite's rule; seeds must agree",
        "reason": "the indices that it rests on, their intervals widened by refits",
    },
    "probes.csv": {
        **_WHO,
        "probe": "what measured it, as a suite names it",
        "quantity": "what was measured; described in lensbench/probes",
        "layer": "layer or block (from 0) that it belongs to",
        "other": "the second layer or block, the head, or how many",
        "value": "empty where undefined",
        "ci_low": "95 %, bootstrap over documents or jackknife over eight groups of them; seed = all: Student-t over seeds",
        "ci_high": "",
        "reason": "why it is undefined, or why the probe does not apply",
    },
    "curves.csv": {
        **_WHO,
        "train_tokens": "budget of a training of its own, with its own schedule",
        "positions": "part of the context that is scored: positions from and to that predictions are read at, or all",
        "ce": "held-out cross-entropy at every position of it, nats/token",
        "ce_ci_low": "95 % bootstrap over documents; seed = all: Student-t over seeds",
        "ce_ci_high": "",
        "reason": "a warning",
    },
    "timings.csv": {
        **_WHO,
        "train_tokens": "budget, as in curves.csv",
        "seconds": "median time of a training step then, times the steps: measured, so the one table that no two runs share",
    },
    "indices.csv": {
        **_WHO,
        "index": "as in the README's table",
        "value": "empty where undefined",
        "ci_low": "95 % paired bootstrap over documents, the fitted lens held fixed; seed = all: Student-t over seeds",
        "ci_high": "",
        "fit_low": "value plus the smallest change by a refit on document-resampled fit data; empty if refits leave it out",
        "fit_high": "plus the largest",
        "stage": "",
        "tolerance": "of the matrix that the index is read off",
        "reason": "why it is undefined, or a warning",
    },
}


OPENING = """# What a run's tables hold

Written from `lensbench/results.py` (`lensbench schema > results/README.md`); a test holds the two together. Tables are CSV,
UTF-8, one header line; an empty cell is what is unknown, and `reason` says why. Losses are in nats/token (of image models
nats/image) unless a column says otherwise. A mean has its 95 % interval in `_ci_low` and `_ci_high`: bootstrap over
documents (or clusters of them) with the fitted lens held fixed; rows with `seed` = `all` are means over seeds with
Student's t. `manifest.json` has the suite, seeds, versions, hardware, corpus checksum,
code revision, and the SHA-256 of every table and of itself.

Folders here are what `lensbench run SUITE`, `lensbench sweep`, `lensbench calibrate`, `lensbench in-context` and
`lensbench regression` wrote, unedited; `speed/` is described in `benchmarks/README.md`.
"""


def schema_text() -> str:
    """The schema of all tables as Markdown."""
    parts = [OPENING]
    for name, columns in SCHEMA.items():
        parts.append(f"## `{name}`\n\n| column | meaning |\n|---|---|\n")
        parts += [f"| `{column}` | {meaning.replace('|', chr(92) + '|')} |\n" for column, meaning in columns.items()]
        parts.append("\n")
    return "".join(part if part != OPENING else part + "\n" for part in parts).rstrip() + "\n"


def unit(models: pd.DataFrame) -> str:
    """What the models of ``models.csv`` predict once for each of: a token, an image (it has no bytes of text), or either."""
    images = models["bits_per_byte"].isna()
    return "image" if images.all() else "prediction" if images.any() else "token"


def no_rows(name: str) -> pd.DataFrame:
    """A table of a folder that has nothing to say there."""
    return pd.DataFrame(columns=list(SCHEMA[name]))


TEXT_COLUMNS = {
    "model", "seed", "family", "baseline", "tokenizer", "lens", "stage", "prior", "index", "reason", "dtype", "source",
    "probe", "quantity", "scope", "verdict", "known", "positions",
}  # fmt: skip


TEXT_COLUMNS_OF = {"tolerances.csv": {"tolerance", "layers", "ridge"}}


ON_REQUEST = ("curves.csv", "timings.csv")
"""Tables that are written where a suite asks for learning curves."""


ADDED = ("verdicts.csv", "probes.csv", *ON_REQUEST)
"""Tables that a folder may be without, being of an earlier version or not asked for them: read as empty."""


WRITTEN = tuple(name for name in SCHEMA if name not in ON_REQUEST)
"""Tables of every run."""


MEASURED_TIME = ("timings.csv",)
"""Tables that no two runs have alike."""


ADDED_COLUMNS = {"verdicts.csv": ("known",)}
"""Columns of text that they do not have."""
