"""The tables of a run folder, from the per-sequence sums of its models: means, penalties, indices, with intervals."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lensbench.data.corpus import clusters_of
from lensbench.lenses.fit import FIT_SUMMARY, FitSummary
from lensbench.lenses.kinds import layer_kinds
from lensbench.lenses.lens import LensId
from lensbench.lenses.pairs import PAIR_LENS, pairs_of
from lensbench.lenses.recipe import LensStage, Prior, Tolerance
from lensbench.measures.formulas import pair_penalty
from lensbench.measures.indices import (
    INDICES,
    curve_indices,
    distance_estimates,
    estimates,
    fact_indices,
    find_index,
    seed_of_rotations,
    similarity_estimates,
    tolerance_order,
    values_of,
    without_the_matrix,
)
from lensbench.measures.means import Estimate, Means, estimate, nothing_to_gain, of_layers
from lensbench.measures.top_words import TOP
from lensbench.measures.update import UpdateResult
from lensbench.measures.update.summary import WITHOUT_LAYER_0
from lensbench.measures.update.verdict import SUFFIXES
from lensbench.measures.update.views import LANDMARKS
from lensbench.measures.verdict import VerdictRule
from lensbench.probes.measured import Measured, Measurement
from lensbench.results.matrix import structure_estimates, sums_of_jacobians, transfer_rows
from lensbench.results.probes import probe_table
from lensbench.results.schema import ADDED_COLUMNS, OF_UPDATES, no_rows
from lensbench.results.sums import ClusterSums, by_document, clustered
from lensbench.results.verdicts import landmark_verdicts, verdict_table
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.texts import read_json
from lensbench.statistics import bootstrap_weights, interval, mean_over_seeds, ratio_with_interval


@dataclass(frozen=True)
class Part:
    """What the tables need of one model and seed, read back from its stages."""

    model: str
    seed: int
    sequences: pd.DataFrame
    facts: dict[str, Any]
    fit: FitSummary
    refits: dict[str, NDArray[np.float64]]
    probes: Sequence[Measurement] = ()
    known: str | None = None
    clusters: Mapping[str, str] | None = None
    """Cluster of every scored document: probes look at some of them."""
    updates: UpdateResult | None = None
    """The update decomposition, where the suite asks for it"""

    @classmethod
    def load(
        cls,
        model: str,
        seed: int,
        fitting: Path,
        scoring: Path,
        origin: dict[str, Any],
        probes: Sequence[Measurement] = (),
        known: str | None = None,
        updates: UpdateResult | None = None,
    ) -> "Part":
        """From the stages of a model and seed; ``origin``: what is known of where the model comes from.

        ``known``: what its construction says of its stream.
        """
        kept = {name: values.numpy() for name, values in read_tensors(scoring / "refits.safetensors").items()}
        sequences = pd.read_parquet(scoring / "sequences.parquet")
        return cls(
            model,
            seed,
            sequences,
            read_json(scoring / "model.json") | {k: v for k, v in origin.items() if v is not None},
            FitSummary.load(fitting / FIT_SUMMARY),
            kept,
            probes,
            known,
            clusters_of(sequences["document"].astype(str).unique()),
            updates,
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


def ce_columns(
    sums: NDArray[np.float64], tokens: NDArray[np.float64], sizes: NDArray[np.float64], weights: NDArray[np.float64]
) -> dict[str, float]:
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
    """The CSV tables of a run, other than the baselines.

    ``largest_ridge``: the end of the ridge path; lenses that lie there are named. ``rule``: what verdicts are made by.
    """
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("models.csv", "lenses.csv", "transfer.csv", "indices.csv", "tolerances.csv", "pairs.csv")
    }
    if any(part.updates is not None for part in parts):
        rows |= {name: [] for name in OF_UPDATES}
    rule = rule or VerdictRule()
    found: dict[str, list[dict[str, Estimate]]] = {}
    names = {part.model for part in parts}
    for part in (replace(part, sequences=clustered(part.sequences)) for part in parts):
        sample = Sample.of(part, draws)
        who = {"model": part.model, "seed": part.seed}
        rows["models.csv"].append(who | model_row(part, sample))
        # The null's first random basis stands next to its model, unless the suite has the rotated view as a model.
        rows["lenses.csv"] += lens_rows(part, sample.weights, with_null=f"{part.model}+rotated" not in names)
        jacobians = sums_of_jacobians(part.sequences)
        rows["transfer.csv"] += [who | row for row in transfer_rows(part.fit, sample.sums, sample.weights, jacobians)]
        if not without_the_matrix(sample.point):
            rows["tolerances.csv"] += [who | row for row in tolerance_rows(part, sample, largest_ridge)]
        rows["pairs.csv"] += [who | row for row in pair_rows(part, sample.point, sample.drawn)]
        of_part = index_estimates(part, sample) | structure_estimates(
            sample.sums, sample.point, sample.drawn, sample.weights, jacobians
        )
        if part.updates is not None:
            for name, of_table in update_rows(part.updates, rule).items():
                rows[name] += [who | row for row in of_table]
        found.setdefault(part.model, []).append(of_part)
        rows["indices.csv"] += [who | row for row in index_rows(of_part, part)]
    matrices = {part.model: part.fit.headline for part in parts}
    for model, per_seed in found.items():
        if len(per_seed) > 1:
            means = rows_over_seeds(per_seed, matrices[model])
            rows["indices.csv"] += [{"model": model, "seed": "all"} | row for row in means]
    found_tables = {name: pd.DataFrame(content) if content else no_rows(name) for name, content in rows.items()}
    known = {part.model: part.known for part in parts}
    found_tables["probes.csv"] = probe_table([(p.model, p.seed, p.probes, p.clusters) for p in parts], draws)
    of_refits = {
        (part.model, part.seed, scope): part.updates.of_refits.get(f"in_place{suffix}")
        for part in parts
        for scope, suffix in SUFFIXES.items()
        if part.updates is not None
    }
    empty = {name: no_rows(name) for name in OF_UPDATES}
    found_tables["verdicts.csv"] = verdict_table(empty | found_tables, known, rule, of_refits)
    return found_tables


@dataclass(frozen=True)
class Sample:
    """The scores of one model and seed by cluster, and their means: at the point estimate and at bootstrap draws."""

    sums: ClusterSums
    weights: NDArray[np.float64]
    """``[draws, clusters]``"""
    point: Means
    drawn: Means

    @classmethod
    def of(cls, part: Part, draws: int) -> "Sample":
        """From a part whose documents are clusters."""
        sums = ClusterSums.of(part.sequences)
        weights = bootstrap_weights(len(sums.tokens), draws, 0)
        point = Means.of_clusters(sums.totals, sums.tokens)
        return cls(sums, weights, point, Means.of_clusters(sums.totals, sums.tokens, weights))

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len(self.sums.tokens)


def update_rows(updates: UpdateResult, rule: VerdictRule) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables :data:`OF_UPDATES` of one model and seed."""
    return {
        "update.csv": updates.pairs,
        "blocks.csv": updates.blocks,
        "distances.csv": updates.distances,
        "variants.csv": updates.variants,
        "landmarks.csv": list(landmark_rows(updates, rule)),
    }


def landmark_rows(updates: UpdateResult, rule: VerdictRule) -> Iterator[dict[str, Any]]:
    """``landmarks.csv`` of one model and seed; each row has the verdict on its scope."""
    verdicts = {(name, SUFFIXES[scope]): one for name, scope, one in landmark_verdicts(rule, updates)}
    for name, found in updates.landmarks.items():
        ratios = " ".join("-" if ratio is None else f"{ratio:.3g}" for ratio in found.participation)
        for index, (value, low, high, reason) in (found.indices | found.losses_aside).items():
            verdict = verdicts[name, WITHOUT_LAYER_0 if index.endswith(WITHOUT_LAYER_0) else ""]
            row = {"landmark": name, "known": LANDMARKS[name].truth, "index": index, "value": value}
            row |= {"ci_low": low, "ci_high": high, "participation": ratios}
            row |= {"verdict": verdict.verdict, "gate": verdict.gate or None}
            yield row | {"reason": "; ".join(said for said in (reason, found.note) if said)}


def model_row(part: Part, sample: Sample) -> dict[str, Any]:
    """``models.csv`` of one model and seed."""
    sums = sample.sums
    ce = by_document(part.sequences, lens="model")["ce"].to_numpy(float)
    scored = {"scored_tokens": int(sums.tokens.sum()), "clusters": sample.clusters}
    known = dict.fromkeys(ADDED_COLUMNS["models.csv"]) | {k: v for k, v in part.facts.items() if k != "half_passes"}
    return known | ce_columns(ce, sums.tokens, sums.bytes, sample.weights) | scored


def index_estimates(part: Part, sample: Sample) -> dict[str, Estimate]:
    """Every index of one model and seed but the facts."""
    point, drawn = sample.point, sample.drawn
    found = estimates(point, drawn, seed=seed_of_rotations(part.model, part.seed), clusters=sample.clusters)
    found |= distance_estimates(point, drawn, sample.clusters)
    similarity = similarity_of(part)
    if part.updates is not None:
        found = part.updates.estimates() | found
    if similarity is not None:
        found |= similarity_estimates(point, drawn, similarity, sample.clusters)
    return found


def similarity_of(part: Part) -> NDArray[np.float64] | None:
    """Covariance similarity of every two layers 0..L-1, ``[L, L]``, where the suite's probes measure it."""
    found = next((m for m in part.probes if isinstance(m, Measured) and "covariance_similarity" in m.quantity), None)
    if found is None:
        return None
    layers = part.fit.depth
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


def lens_rows(part: Part, weights: NDArray[np.float64], *, with_null: bool = True) -> Iterator[dict[str, Any]]:
    """``lenses.csv``: every lens at the layers it is meant for, and ``with_null`` those of the null's first random basis."""
    kept = part.sequences[part.sequences["lens"].isin([kind.name for kind in layer_kinds()])]
    of_the_matrix = (kept["lens"] == "tuned") & (kept["prior"] == "identity")
    kept = kept[~of_the_matrix & (kept["view"] <= (0 if with_null else -1))]
    keys = ["view", "lens", "stage", "prior", "layer"]
    columns = ["kl", "ce", *(TOP if "top10" in kept else ())]
    for key, group in kept.groupby(keys, observed=True, sort=True):
        view, lens, stage, prior, layer = cast(tuple[int, str, str, str, int], key)
        sums = group.groupby("document", observed=True)[["tokens", *columns]].sum().sort_index()
        tokens = sums["tokens"].to_numpy(float)
        row = {"model": part.model + ("+rotated" if view == 0 else ""), "seed": part.seed, "lens": lens, "layer": layer}
        row |= {"stage": stage, "prior": prior}
        for name in columns:
            low, mean, high = ratio_with_interval(sums[name].to_numpy(float), tokens, weights)
            row |= {name: float(mean), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
        chosen = part.fit.records.get(LensId(lens, cast(Prior, prior), cast(LensStage, stage), view=view))
        for column in ("ridge", "pad", "fit_kl", "dev_kl"):
            row[column] = None if chosen is None else chosen.at(layer, column)
        if chosen is not None and chosen.jacobian is not None and chosen.jacobian.error:
            row["jacobian_error"] = chosen.jacobian.relative_error[layer]
        yield row


def tolerance_rows(part: Part, sample: Sample, largest_ridge: float | None = None) -> Iterator[dict[str, Any]]:
    """``tolerances.csv``: what a fixed lens sees, over the loss that its ridge may cost on its own layer."""
    matrix, sums = part.fit.headline, sample.sums
    label = matrix.tolerance_label
    matrices = {label: (sums.totals.transfer, sums.totals.movement)} | sums.curve
    for tolerance, (kl, moved) in sorted(matrices.items(), key=lambda item: tolerance_order(item[0])):
        of_the_matrix = tolerance == label
        how, at_the_end = how_at_tolerance(part, tolerance, largest_ridge)
        own = np.diagonal(kl[block_of(part, sums.tokens)], axis1=1, axis2=2).mean(1)
        own_low, own_kl, own_high = ratio_with_interval(own, sums.tokens, sample.weights)
        here, there = means_of_block(part, sample, kl, moved)
        refitted = refits_of_block(part) if of_the_matrix and matrix.stage == "closed" else None
        for name in curve_indices():
            value = INDICES[name].value
            with np.errstate(divide="ignore", invalid="ignore"):
                values = value(here), value(there)
                spread = None if refitted is None else value(refitted).value
            found = estimate(*values, float(sample.point.constant), sample.clusters, nothing_to_gain(sample.point))
            yield {
                "tolerance": tolerance,
                "index": name,
                **how,
                "own_kl": float(own_kl),
                "own_kl_ci_low": float(own_low),
                "own_kl_ci_high": float(own_high),
                "value": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                **refit_range(found, spread),
                "reason": "; ".join(filter(None, (found.reason, at_the_end))),
            }


def block_of(part: Part, rows: Sized) -> tuple[NDArray[np.int_], ...]:
    """The chosen layers of matrices ``[rows, L+1, L+1]``, as an index."""
    return np.ix_(range(len(rows)), part.fit.layers, part.fit.layers)


def how_at_tolerance(part: Part, tolerance: str, largest_ridge: float | None) -> tuple[dict[str, Any], str]:
    """How the lenses at a tolerance were fitted, and a warning where some lie at the end of the ridge path."""
    some = part.fit.layers
    lens = next(x for x in (part.fit.headline, *part.fit.curve()) if x.tolerance_label == tolerance)
    ridges = [part.fit.records[lens].at(layer, "ridge") for layer in some]
    ended = sum(r == largest_ridge for r in ridges if r is not None)
    how = {
        "layers": " ".join(map(str, some)),
        "stage": lens.stage,
        "prior": lens.prior,
        "ridge": " ".join("" if r is None else f"{r:g}" for r in ridges),
    }
    return how, f"{ended} of {len(some)} lenses at the end of the ridge path: they may cost less" if ended else ""


def means_of_block(
    part: Part, sample: Sample, kl: NDArray[np.float64], moved: NDArray[np.float64]
) -> tuple[Means, Means]:
    """Means with the matrices of the chosen layers, from sums ``[clusters, L+1, L+1]``: at the point, and at every draw."""
    tokens, weights, count = sample.sums.tokens, sample.weights, len(part.fit.layers)
    block = block_of(part, tokens)
    per = tokens.sum(), (weights @ tokens)[:, None, None]
    flat = [weights @ x[block].reshape(len(tokens), -1) for x in (kl, moved)]
    at_draws = [x.reshape(len(weights), count, count) / per[1] for x in flat]
    return (
        of_layers(sample.point, *(x[block].sum(0) / per[0] for x in (kl, moved))),
        of_layers(sample.drawn, *at_draws),
    )


def refits_of_block(part: Part) -> Means | None:
    """Means of the fit itself and of its refits, with the matrices of the chosen layers; None without refits."""
    if not part.refits:
        return None
    means = Means(**part.refits)
    return of_layers(means, *(x[block_of(part, x)] for x in (means.transfer, means.movement)))


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
    record = part.fit.records.get(PAIR_LENS)
    if record is None:
        return
    for p, (i, j) in enumerate(pairs_of(part.fit.layers)):
        row: dict[str, Any] = {"layer_i": i, "layer_j": j, "ridge": record.ridge[p], "pad": record.pad[p]}
        row |= {"kl_i": float(point.pair[j, i]), "kl_j": float(point.pair[i, j])}
        for name, value, draws in zip(("penalty", "rotated_penalty"), here, there, strict=True):
            low, high = interval(draws[..., position[i, j]])
            row |= {name: float(value[position[i, j]]), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
        yield row


def index_rows(found: dict[str, Estimate], part: Part) -> Iterator[dict[str, Any]]:
    """``indices.csv`` of one model and seed."""
    matrix = part.fit.headline
    refitted = {name: value.value for name, value in values_of(Means(**part.refits)).items()} if part.refits else {}
    if matrix.stage == "loaded":  # refits leave the matrix's lenses as they are
        refitted = {name: spread for name, spread in refitted.items() if INDICES[name].stage != "matrix"}
    for name, one in found.items():
        yield index_row(name, one, matrix) | refit_range(one, refitted.get(name))
    facts = {"layers": float(part.facts["layers"]), "rotated_rank": float(part.fit.rotated_rank)}
    for name in fact_indices():
        yield index_row(name, Estimate(facts[name], None, None, "a fact of the stream, not an estimate"), matrix)


def index_row(name: str, one: Estimate, matrix: LensId) -> dict[str, Any]:
    """One row; ``matrix``: the lenses of the transfer matrix."""
    index = find_index(name)
    stage: str = index.stage
    tolerance: Tolerance | None = 0.0
    if index.stage == "matrix":
        stage, tolerance = matrix.stage, matrix.tolerance
    return {
        "index": name,
        "value": one.value,
        "ci_low": one.low,
        "ci_high": one.high,
        "fit_low": None,
        "fit_high": None,
        "stage": stage,
        "tolerance": tolerance,
        "reason": one.reason,
    }


def rows_over_seeds(per_seed: list[dict[str, Estimate]], matrix: LensId) -> Iterator[dict[str, Any]]:
    """``seed = all``: the mean over seeds with a Student-t interval; undefined where it is undefined for a seed."""
    for name in per_seed[0]:
        values = [e[name].value for e in per_seed]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            reason = f"undefined for {len(values) - len(known)} of {len(values)} seeds"
            yield index_row(name, Estimate(None, None, None, reason), matrix)
        else:
            mean, low, high = mean_over_seeds(known)
            yield index_row(name, Estimate(mean, low, high), matrix)
