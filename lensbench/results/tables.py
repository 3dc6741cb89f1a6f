"""The tables of a run folder, from the per-sequence sums of its models: means, penalties, indices, with intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.torch import load_file

from lensbench import statistics
from lensbench.data.corpus import clusters_of
from lensbench.lenses.fit import FitSummary, LensRecord, pairs_of
from lensbench.measures import indices
from lensbench.measures.indices import (
    INDICES,
    OF_SIMILARITY,
    OF_THE_MATRIX,
    ON_THE_CURVE,
    Estimate,
    Means,
    distance_estimates,
    nothing_to_gain,
    of_layers,
    of_the_matrix,
    pair_penalty,
    seed_of_rotations,
    similarity_estimates,
    tolerance_order,
)
from lensbench.measures.verdict import SCOPES, Span, Verdict, VerdictRule, decide_on, over_seeds, spans_on
from lensbench.probes.measured import Measured
from lensbench.probes.registry import Found
from lensbench.probes.tools.crossfit import COLUMNS
from lensbench.results.sums import ClusterSums, by_document, clustered
from lensbench.statistics import bootstrap_weights, interval, ratio_with_interval


@dataclass(frozen=True)
class Part:
    """What the tables need of one model and seed, read back from its stages."""

    model: str
    seed: int
    sequences: pd.DataFrame
    facts: dict[str, Any]
    fit: FitSummary
    refits: dict[str, NDArray[np.float64]]
    probes: Sequence[Found] = ()
    known: str | None = None
    clusters: Mapping[str, str] | None = None
    """Cluster of every scored document: probes look at some of them."""

    @classmethod
    def load(
        cls,
        model: str,
        seed: int,
        fitting: Path,
        scoring: Path,
        origin: dict[str, Any],
        probes: Sequence[Found] = (),
        known: str | None = None,
    ) -> "Part":
        """From the stages of a model and seed; ``origin``: what is known of where the model comes from.

        ``known``: what its construction says of its stream.
        """
        kept = {name: values.numpy() for name, values in load_file(scoring / "refits.safetensors").items()}
        sequences = pd.read_parquet(scoring / "sequences.parquet")
        return cls(
            model,
            seed,
            sequences,
            json.loads((scoring / "model.json").read_text()) | {k: v for k, v in origin.items() if v is not None},
            FitSummary.load(fitting / "fit.json"),
            kept,
            probes,
            known,
            clusters_of(sequences["document"].astype(str).unique()),
        )


def baseline_table(
    ce: dict[str, NDArray[np.float64]],
    document: NDArray[np.int64],
    target_bytes: NDArray[np.int32],
    train_tokens: int,
    draws: int,
) -> pd.DataFrame:
    """``baselines.csv`` from each baseline's nats per scored token ``[N]``."""
    counts = np.bincount(document).astype(float)
    sizes = np.bincount(document, weights=target_bytes).astype(float)
    weights = bootstrap_weights(len(counts), draws, 0)
    rows = []
    for name, nats in ce.items():
        sums = np.bincount(document, weights=nats).astype(float)
        row: dict[str, Any] = {"baseline": name, "train_tokens": train_tokens}
        rows.append(row | ce_columns(sums, counts, sizes, weights))
    return pd.DataFrame(rows)


def ce_columns(sums, tokens, sizes, weights) -> dict[str, float]:
    """Cross-entropy in nats/token and bits/byte, with intervals; images have no bytes of text, and no bits of them."""
    low, mean, high = ratio_with_interval(sums, tokens, weights)
    unknown = np.full((), np.nan)
    of_bytes = ratio_with_interval(sums / np.log(2), sizes, weights) if sizes.any() else (unknown,) * 3
    byte_low, byte_mean, byte_high = of_bytes
    return {
        "ce": float(mean), "ce_ci_low": float(low), "ce_ci_high": float(high),
        "bits_per_byte": float(byte_mean), "bits_per_byte_ci_low": float(byte_low),
        "bits_per_byte_ci_high": float(byte_high),
    }  # fmt: skip


def tables(
    parts: list[Part], *, draws: int, largest_ridge: float | None = None, rule: VerdictRule | None = None
) -> dict[str, pd.DataFrame]:
    """The CSV tables of a run, but for the baselines.

    Lenses at the ``largest_ridge`` of the path are told; verdicts are made by ``rule``.
    """
    rows: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in (
            "models.csv",
            "lenses.csv",
            "transfer.csv",
            "indices.csv",
            "tolerances.csv",
            "pairs.csv",
        )  # fmt: skip
    }
    found: dict[str, list[dict[str, Estimate]]] = {}
    headlines = {part.model: part.fit.records["transfer"] for part in parts}
    for part in (replace(part, sequences=clustered(part.sequences)) for part in parts):
        sums = ClusterSums.of(part.sequences)
        weights = bootstrap_weights(len(sums.tokens), draws, 0)
        who = {"model": part.model, "seed": part.seed}
        ce = by_document(part.sequences, lens="model")["ce"].to_numpy(float)
        rows["models.csv"].append(
            who
            | part.facts
            | ce_columns(ce, sums.tokens, sums.bytes, weights)
            | {"scored_tokens": int(sums.tokens.sum()), "clusters": len(sums.tokens)}
        )
        # The first of the null's views stands beside its model, unless the suite has the rotated view as a model.
        beside = f"{part.model}+rotated" not in headlines
        rows["lenses.csv"] += lens_rows(part, weights, beside=beside)
        rows["transfer.csv"] += transfer_rows(part, sums, weights)
        point = Means.of_clusters(sums.totals, sums.tokens)
        drawn = Means.of_clusters(sums.totals, sums.tokens, weights)
        estimates = indices.estimates(
            point, drawn, seed=seed_of_rotations(part.model, part.seed), clusters=len(sums.tokens)
        )
        estimates |= distance_estimates(point, drawn, len(sums.tokens))
        similarity = similarity_of(part)
        if similarity is not None:
            estimates |= similarity_estimates(point, drawn, similarity, len(sums.tokens))
        rows["tolerances.csv"] += [
            who | row for row in tolerance_rows(part, sums, point, drawn, weights, largest_ridge)
        ]
        rows["pairs.csv"] += [who | row for row in pair_rows(part, point, drawn)]
        found.setdefault(part.model, []).append(estimates)
        rows["indices.csv"] += [who | row for row in index_rows(estimates, part)]
    for model, per_seed in found.items():
        if len(per_seed) > 1:
            means = rows_over_seeds(per_seed, headlines[model])
            rows["indices.csv"] += [{"model": model, "seed": "all"} | row for row in means]
    found_tables = {name: pd.DataFrame(content) for name, content in rows.items()}
    known = {part.model: part.known for part in parts}
    found_tables["verdicts.csv"] = verdict_table(found_tables["indices.csv"], known, rule or VerdictRule())
    return found_tables | {"probes.csv": probe_table(parts, draws)}


def verdict_table(table: pd.DataFrame, known: Mapping[str, str | None], rule: VerdictRule) -> pd.DataFrame:
    """``verdicts.csv`` from ``indices.csv``: intervals over documents, widened by what refits change; seeds must agree.

    ``known``: model -> what its construction says of it.
    """
    rows: list[dict[str, Any]] = []
    for key, indexed in table.groupby(["model", "seed"], sort=False):
        model, seed = cast(tuple[str, Any], key)
        span = partial(span_of, indexed.set_index("index"))
        for scope in SCOPES:
            if seed == "all":
                each = [r for r in rows if (r["model"], r["scope"]) == (model, scope)]
                verdicts = [Verdict(r["verdict"], r["reason"]) for r in each]
                verdict = over_seeds(verdicts, spans_on(scope, span))
            else:
                verdict = decide_on(rule, scope, span)
            who = {"model": model, "seed": seed, "scope": scope, "known": known.get(model)}
            rows.append(who | {"verdict": verdict.answer, "reason": verdict.reason})
    return pd.DataFrame(rows, columns=["model", "seed", "scope", "known", "verdict", "reason"])


def span_of(indexed: pd.DataFrame, name: str) -> Span | None:
    """An index of one model and seed; ``indexed``: its rows of ``indices.csv`` by index."""
    columns = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    numbers = indexed.loc[[name], columns].to_numpy(float)[0].tolist()
    value, low, high, fit_low, fit_high = (None if np.isnan(x) else x for x in numbers)
    if value is None or low is None or high is None:
        return None
    return Span(value, low, high).wider(fit_low, fit_high)


def similarity_of(part: Part) -> NDArray[np.float64] | None:
    """Covariance similarity of every two layers 0..L-1, ``[L, L]``, where the suite's probes measure it."""
    found = next((m for m in part.probes if isinstance(m, Measured) and "covariance_similarity" in m.quantity), None)
    if found is None:
        return None
    layers = len(part.fit.records["own"].ridge)
    matrix = np.eye(layers)
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # other quantities of the probe may have nothing to be a share of
        value = found.top.sum(0) / found.bottom.sum(0)
    for k, name in enumerate(found.quantity):
        if name == "covariance_similarity":
            i, j = cast(tuple[int, int], (found.layer[k], found.other[k]))
            matrix[i, j] = matrix[j, i] = value[k]
    return matrix


OF_HEADS = ("error_transport", "head_weights")
"""Probes whose rows of single heads have no mean over seeds: head 2 of another training is another head."""


def probe_table(parts: list[Part], draws: int) -> pd.DataFrame:
    """``probes.csv``; for a model with several seeds also the mean over them, with its Student-t interval."""
    frames = []
    for part in parts:
        for found in part.probes:
            frame = found.frame(draws, part.clusters)
            frame.insert(0, "model", part.model)
            frame.insert(1, "seed", part.seed)
            frames.append(frame)
    columns = ["model", "seed", *COLUMNS]
    if not frames:
        return pd.DataFrame(columns=columns)
    table = pd.concat([f.astype(object) for f in frames], ignore_index=True)
    over = []
    what = ["model", "probe", "quantity", "layer", "other"]
    for key, rows in table.groupby(what, dropna=False, sort=False):
        known = rows["value"].dropna().astype(float)
        if len(rows) < 2 or (rows["probe"].iloc[0] in OF_HEADS and rows["layer"].notna().any()):
            continue
        row = dict(zip(what, cast(tuple[Any, ...], key), strict=True)) | {"seed": "all", "reason": ""}
        if len(known) < len(rows):
            row["reason"] = f"undefined for {len(rows) - len(known)} of {len(rows)} seeds"
        else:
            row["value"], row["ci_low"], row["ci_high"] = statistics.over_seeds(list(known))
        over.append(row)
    if over:
        table = pd.concat([table, pd.DataFrame(over, columns=columns).astype(object)], ignore_index=True)
    return table[columns]


def lens_rows(part: Part, weights: NDArray[np.float64], *, beside: bool = True) -> Iterator[dict[str, Any]]:
    """``lenses.csv``: every lens at the layers it is meant for, ``beside`` them those of the null's first view."""
    kept = part.sequences[part.sequences["lens"].isin(["logit", "tuned", "shared", "shared_bias", "shared_loo"])]
    headline = (kept["lens"] == "tuned") & (kept["prior"] == "identity")
    kept = kept[~headline & (kept["view"] <= (0 if beside else -1))]
    records = {
        (r.lens, r.stage): r
        for name, r in part.fit.records.items()
        if not name.startswith(("rotated", "transfer", "pair"))
    }
    rotated = {part.fit.records[name].lens: part.fit.records[name] for name in ("rotated_own", "rotated0")}

    def where(lens: str, layer: int) -> int:
        return part.fit.layers.index(layer) if lens == "shared_loo" else layer

    keys = ["view", "lens", "stage", "prior", "layer"]
    for key, group in kept.groupby(keys, observed=True, sort=True):
        view, lens, stage, prior, layer = cast(tuple[int, str, str, str, int], key)
        sums = group.groupby("document", observed=True)[["tokens", "kl", "ce"]].sum().sort_index()
        tokens = sums["tokens"].to_numpy(float)
        row = {"model": part.model + ("+rotated" if view == 0 else ""), "seed": part.seed, "lens": lens, "layer": layer}
        row |= {"stage": stage, "prior": prior}
        for name in ("kl", "ce"):
            low, mean, high = ratio_with_interval(sums[name].to_numpy(float), tokens, weights)
            row |= {name: float(mean), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
        chosen = rotated.get(lens) if view == 0 else records.get((lens, stage))
        for column in ("ridge", "pad", "fit_kl", "dev_kl"):
            row[column] = None if chosen is None else getattr(chosen, column)[where(lens, layer)]
        yield row


def transfer_rows(part: Part, sums: ClusterSums, weights: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """``transfer.csv``: the headline matrix."""
    headline = part.fit.records["transfer"]
    layers = len(headline.ridge)
    values = {}
    for name, array in (
        ("kl", sums.totals.transfer),
        ("ce", sums.totals.transfer_ce),
        ("movement_kl", sums.totals.movement),
        ("top1_agreement", sums.top1),
    ):
        low, values[name], high = ratio_with_interval(array, sums.tokens, weights)
        if name == "top1_agreement":
            values |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
        if name in ("kl", "ce"):
            penalty = array - np.diagonal(array, axis1=1, axis2=2)[:, None, :]
            low, mean, high = ratio_with_interval(penalty, sums.tokens, weights)
            values |= {f"penalty_{name}": mean, f"penalty_{name}_ci_low": low, f"penalty_{name}_ci_high": high}
    for i in range(layers + 1):
        for j in range(layers + 1):
            fitted = i < layers
            yield {
                "model": part.model,
                "seed": part.seed,
                "lens_layer": i,
                "stream_layer": j,
                "stage": headline.stage,
                "prior": headline.prior,
                "ridge": headline.ridge[i] if fitted else None,
                "tolerance": headline.tolerance if headline.stage == "closed" else None,
                **{name: float(array[i, j]) for name, array in values.items()},
            }


def tolerance_rows(
    part: Part,
    sums: ClusterSums,
    point: Means,
    drawn: Means,
    weights: NDArray[np.float64],
    largest_ridge: float | None = None,
) -> Iterator[dict[str, Any]]:
    """``tolerances.csv``: what a fixed lens sees, over the loss that its ridge may cost on its own layer."""
    some, headline = part.fit.layers, part.fit.records["transfer"]
    block = np.ix_(range(len(sums.tokens)), some, some)
    label = f"{headline.tolerance:g}" if headline.stage == "closed" else headline.stage
    matrices = {label: (sums.totals.transfer, sums.totals.movement)} | sums.curve
    for tolerance, (kl, moved) in sorted(matrices.items(), key=lambda item: tolerance_order(item[0])):
        record = part.fit.records["transfer" if tolerance == label else f"transfer@{tolerance}"]
        ridges = [record.ridge[k] for k in some] if tolerance == label else record.ridge
        ended = sum(r == largest_ridge for r in ridges if r is not None)
        at_the_end = f"{ended} of {len(some)} lenses at the end of the ridge path: they may cost less" if ended else ""
        own = np.diagonal(kl[block], axis1=1, axis2=2).mean(1)
        own_low, own_kl, own_high = ratio_with_interval(own, sums.tokens, weights)
        per = sums.tokens.sum(), (weights @ sums.tokens)[:, None, None]
        flat = [weights @ x[block].reshape(len(sums.tokens), -1) for x in (kl, moved)]
        at_draws = [x.reshape(len(weights), len(some), len(some)) / per[1] for x in flat]
        here = of_layers(point, *(x[block].sum(0) / per[0] for x in (kl, moved)))
        there = of_layers(drawn, *at_draws)
        refitted = None
        if tolerance == label and part.refits and headline.stage == "closed":
            means = Means(**part.refits)
            of_refits = (x[np.ix_(range(len(x)), some, some)] for x in (means.transfer, means.movement))
            refitted = of_layers(means, *of_refits)
        for name in ON_THE_CURVE:
            stage, function = INDICES[name]
            with np.errstate(divide="ignore", invalid="ignore"):
                values = function(here), function(there)
                spread = None if refitted is None else function(refitted).value
            found = indices.estimate(*values, float(point.constant), len(sums.tokens), nothing_to_gain(point))
            yield {
                "tolerance": tolerance,
                "index": name,
                "layers": " ".join(map(str, some)),
                "stage": headline.stage if tolerance == label else stage,
                "prior": record.prior,
                "ridge": " ".join("" if r is None else f"{r:g}" for r in ridges),
                "own_kl": float(own_kl),
                "own_kl_ci_low": float(own_low),
                "own_kl_ci_high": float(own_high),
                "value": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                **refit_range(found, spread),
                "reason": "; ".join(filter(None, (found.reason, at_the_end))),
            }


def refit_range(found: Estimate, spread: NDArray[np.float64] | None) -> dict[str, float | None]:
    """The value plus the smallest and the largest change that refits make; ``spread`` is the fit itself, then its refits."""
    if found.value is None or spread is None or not np.isfinite(spread).all():
        return {"fit_low": None, "fit_high": None}
    change = spread[1:] - spread[0]
    return {"fit_low": float(found.value + change.min()), "fit_high": float(found.value + change.max())}


def pair_rows(part: Part, point: Means, drawn: Means) -> Iterator[dict[str, Any]]:
    """``pairs.csv``: the cost of one lens for two layers, and of one for the two in random bases."""
    layers = point.own.shape[-1]
    position = {pair: k for k, pair in enumerate(pairs_of(range(layers)))}

    def penalties(m: Means) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rotated = pair_penalty(m.own[..., None, :], m.pair_rotated)
        return pair_penalty(m.own, m.pair), rotated.mean(-2)

    here, there = penalties(point), penalties(drawn)
    record = part.fit.records["pair"]
    for p, (i, j) in enumerate(pairs_of(part.fit.layers)):
        row: dict[str, Any] = {"layer_i": i, "layer_j": j, "ridge": record.ridge[p], "pad": record.pad[p]}
        row |= {"kl_i": float(point.pair[j, i]), "kl_j": float(point.pair[i, j])}
        for name, value, draws in zip(("penalty", "rotated_penalty"), here, there, strict=True):
            low, high = interval(draws[..., position[i, j]])
            row |= {name: float(value[position[i, j]]), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
        yield row


def index_rows(estimates: dict[str, Estimate], part: Part) -> Iterator[dict[str, Any]]:
    """``indices.csv`` of one model and seed."""
    refitted: dict[str, NDArray[np.float64]] = {}
    headline = part.fit.records["transfer"]
    if part.refits:
        means = Means(**part.refits)
        with np.errstate(divide="ignore", invalid="ignore"):
            refitted = {name: function(means).value for name, (_, function) in INDICES.items()}
        for suffix in ("", "_without_layer0"):
            kept, null = refitted[f"shared_retention{suffix}"], refitted[f"rotated_retention{suffix}"]
            refitted[f"shared_consistency{suffix}"] = (kept - null) / (1 - null)
        if headline.stage == "loaded":  # refits leave the matrix's lenses as they are
            refitted = {name: spread for name, spread in refitted.items() if name not in OF_THE_MATRIX}
    for name, estimate in estimates.items():
        yield index_row(name, estimate, headline) | refit_range(estimate, refitted.get(name))
    facts = {"layers": float(part.facts["layers"]), "rotated_rank": float(part.fit.rotated_rank)}
    for name, value in facts.items():
        yield index_row(name, Estimate(value, None, None, "a fact of the stream, not an estimate"), headline)


def index_row(name: str, estimate: Estimate, headline: LensRecord) -> dict[str, Any]:
    """One row; ``headline`` is how the lenses of the matrix were fitted."""
    tolerance: float | None = 0.0
    stage = INDICES[name][0] if name in INDICES else "none"
    if name in OF_SIMILARITY:
        stage, tolerance = headline.stage, headline.tolerance if headline.stage == "closed" else None
    if name.startswith("shared_consistency"):
        stage = "closed"
    if of_the_matrix(name):
        stage, tolerance = headline.stage, headline.tolerance if headline.stage == "closed" else None
    return {
        "index": name,
        "value": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "fit_low": None,
        "fit_high": None,
        "stage": stage,
        "tolerance": tolerance,
        "reason": estimate.reason,
    }


def rows_over_seeds(per_seed: list[dict[str, Estimate]], headline: LensRecord) -> Iterator[dict[str, Any]]:
    """``seed = all``: the mean over seeds with a Student-t interval; undefined where it is undefined for a seed."""
    for name in per_seed[0]:
        values = [e[name].value for e in per_seed]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            reason = f"undefined for {len(values) - len(known)} of {len(values)} seeds"
            yield index_row(name, Estimate(None, None, None, reason), headline)
        else:
            mean, low, high = statistics.over_seeds(known)
            yield index_row(name, Estimate(mean, low, high), headline)
