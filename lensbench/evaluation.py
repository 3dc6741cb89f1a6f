"""All lenses of one view of a model, fitted, scored and turned into the tables of a run folder."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from lensbench import indices
from lensbench.corpus import Windows
from lensbench.errors import LensbenchError
from lensbench.fitting import (
    Choice,
    DevSearch,
    FitRecipe,
    Fitted,
    Moments,
    fit_each,
    fit_rotated,
    fit_shared,
    fit_shared_bias,
    pad_direction,
    refine,
    rotated_maps,
    solve_as_chosen,
)
from lensbench.indices import Means
from lensbench.lenses import AffineMaps
from lensbench.stream import Capture, ReadOut, RotatedView
from lensbench.transfer import own_layer_sums, sum_by_window, transfer_sums

Report = Callable[[int, str], None]


class LensRecord(BaseModel):
    """How one kind of lens was fitted: per layer, what dev chose and the KL on fitting and dev tokens, nats/token."""

    model_config = ConfigDict(extra="forbid")

    lens: str
    stage: str
    prior: str
    tolerance: float
    ridge: list[float]
    pad: list[float]
    fit_kl: list[float]
    dev_kl: list[float]
    iterations: list[int] = []
    ended: list[str] = []


class FitSummary(BaseModel):
    """What a fit says about itself beside its maps."""

    model_config = ConfigDict(extra="forbid")

    records: dict[str, LensRecord]
    fit_tokens: int
    dev_tokens: int
    rotated_rank: int
    rotations: int
    refits: int
    dev_constant_kl: float
    constant: list[float]

    @classmethod
    def load(cls, path: Path) -> "FitSummary":
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise LensbenchError(f"{path} is damaged; delete its folder to fit anew") from error


@dataclass(frozen=True)
class Fit:
    """The maps of every lens by name, and their summary.

    ``transfer``: the headline matrix's lenses (prior identity, within the tolerance). ``own``, ``shared``,
    ``shared_bias``, ``shared_loo``: prior zero, best ridge. ``own_refined``, ``shared_refined``. ``rotated{k}``: the
    shared lens of rotated view k, and ``rotated_own``: per-layer lenses refitted on view 0, all as maps of plain states.
    ``refit{n}.NAME``: closed forms on document-resampled fit data.
    """

    maps: dict[str, AffineMaps]
    summary: FitSummary

    @property
    def constant(self) -> Tensor:
        """Mean of p over the fitting tokens, ``[V]``."""
        return torch.tensor(self.summary.constant)


def fit_steps(recipe: FitRecipe, layers: int) -> int:
    """How many lenses a fit makes, for its progress bar."""
    return 4 * layers + 3 + recipe.rotations + recipe.refits


def score_steps(recipe: FitRecipe) -> int:
    """How many steps a scoring has, for its progress bar."""
    return 2 + recipe.refits


def fit_all(
    readout: ReadOut, captured: Capture, dev: Capture, recipe: FitRecipe, *, seed: int, report: Report | None = None
) -> Fit:
    """Every lens of one view, from its fitting and dev tokens; ``report(done, what)`` after each."""
    done = 0

    def tick(what: str, count: int = 1) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(done, what)

    layers = list(range(captured.layers))
    moments = Moments.of(captured)
    search = DevSearch(readout, dev, recipe, pad_direction(readout, captured.states[-1]))
    fitted: dict[str, Fitted] = {}
    fitted["transfer"] = fit_each(search, moments, "identity", tolerance=recipe.tolerance)
    tick("per layer, prior identity", len(layers))
    fitted["own"] = fit_each(search, moments, "zero")
    tick("per layer, prior zero", len(layers))
    fitted["shared"] = fit_shared(search, moments, layers)
    tick("shared")
    fitted["shared_bias"] = fit_shared_bias(search, moments)
    tick("shared, one bias per layer")
    without = []
    for left_out in layers:
        without.append(fit_shared(search, moments, [layer for layer in layers if layer != left_out]))
        tick(f"shared without layer {left_out}")
    fitted["shared_loo"] = joined(without)

    views = [
        RotatedView.random(moments.covariance, seed=1000 * seed + k, variance=recipe.variance)
        for k in range(recipe.rotations)
    ]
    for k, view in enumerate(views):
        fitted[f"rotated{k}"] = fit_rotated(search, moments, view)
        tick(f"shared, rotated view {k}")
    # Per-layer lenses fitted to rotated moments and chosen on rotated dev states. They are scored with the rotation folded
    # into the map, as all rotated lenses are: agreement with `own` checks the algebra, it is no second measurement.
    rotated_search = DevSearch(readout, views[0].apply(dev), recipe, search.pad)
    refitted = fit_each(rotated_search, moments.rotated(views[0]), "zero")
    fitted["rotated_own"] = Fitted(
        rotated_maps(refitted.maps, views[0]), refitted.ridges, refitted.pads, "zero", "closed"
    )

    maps = {name: f.maps for name, f in fitted.items()}
    for n in range(recipe.refits):
        maps |= {f"refit{n}.{name}": m for name, m in resampled(search, captured, fitted, views, seed, n).items()}
        tick(f"refit {n} on resampled documents")

    reported = 0

    def refining(updates: int, limit: int) -> None:
        nonlocal reported
        at = (len(layers) + 1) * updates // max(1, limit)
        tick(f"refining, update {updates} of at most {limit}", at - reported)
        reported = at

    refined = refine(
        search,
        captured,
        Moments.stack([moments, moments.pooled(layers)]),
        AffineMaps.stack([fitted["own"].maps, fitted["shared"].maps]),
        [*fitted["own"].ridges, *fitted["shared"].ridges],
        [*([layer] for layer in layers), layers],
        seed=seed,
        report=refining,
    )
    tick("refined", len(layers) + 1 - reported)
    endings = {"own": refined[:-1], "shared": refined[-1:]}
    for name, ended in endings.items():
        fitted[f"{name}_refined"] = Fitted(
            AffineMaps.stack([r.maps for r in ended]), fitted[name].ridges, fitted[name].pads, "zero", "refined"
        )
    maps |= {name: f.maps for name, f in fitted.items()}

    records = {name: record(readout, name, f, captured, dev) for name, f in fitted.items()}
    for name, ended in endings.items():
        records[f"{name}_refined"].iterations = [r.iterations for r in ended]
        records[f"{name}_refined"].ended = [r.ended for r in ended]
    summary = FitSummary(
        records=records,
        fit_tokens=len(captured),
        dev_tokens=len(dev),
        rotated_rank=views[0].rank,
        rotations=recipe.rotations,
        refits=recipe.refits,
        dev_constant_kl=search.constant_kl,
        constant=captured.mean_p.tolist(),
    )
    return Fit({name: AffineMaps(m.matrix.float().cpu(), m.offset.float().cpu()) for name, m in maps.items()}, summary)


def joined(parts: list[Fitted]) -> Fitted:
    """Single lenses of one kind as a stack."""
    return Fitted(
        AffineMaps.stack([p.maps for p in parts]),
        tuple(r for p in parts for r in p.ridges),
        tuple(a for p in parts for a in p.pads),
        parts[0].prior,
        parts[0].stage,
    )


def resampled(
    search: DevSearch, captured: Capture, fitted: dict[str, Fitted], views: list[RotatedView], seed: int, refit: int
) -> dict[str, AffineMaps]:
    """The closed forms again on documents drawn with replacement, at the ridges and pads chosen before."""
    documents = int(captured.document.max()) + 1
    counts = np.random.default_rng([seed, refit]).multinomial(documents, np.full(documents, 1 / documents))
    moments = Moments.of(captured, torch.from_numpy(counts[captured.document]))
    layers = list(range(captured.layers))

    def solve(name: str, regressions: Moments, rows: slice = slice(None)) -> AffineMaps:
        chosen = fitted[name]
        choices = [Choice(r, p, 0.0) for r, p in zip(chosen.ridges[rows], chosen.pads[rows], strict=True)]
        return solve_as_chosen(search, regressions, chosen.prior, choices).maps

    maps = {
        "transfer": solve("transfer", moments),
        "own": solve("own", moments),
        "shared": solve("shared", moments.pooled(layers)),
        "shared_loo": AffineMaps.stack(
            [solve("shared_loo", moments.pooled([k for k in layers if k != j]), slice(j, j + 1)) for j in layers]
        ),
    }
    for k, view in enumerate(views):
        shared = solve(f"rotated{k}", moments.rotated(view).pooled(layers), slice(0, 1))
        maps[f"rotated{k}"] = rotated_maps(shared, view)
    return maps


def record(readout: ReadOut, name: str, fitted: Fitted, captured: Capture, dev: Capture) -> LensRecord:
    layers = list(range(captured.layers))

    def kl(tokens: Capture) -> list[float]:
        sums, _ = own_layer_sums(readout, tokens, fitted.maps, layers)
        return [float(v) for v in sums.sum(0) / len(tokens)]

    repeat = len(layers) if len(fitted.ridges) == 1 else 1
    return LensRecord(
        lens=LENS_NAMES[name.rstrip("0123456789")],
        stage=fitted.stage,
        prior=fitted.prior,
        tolerance=fitted.tolerance,
        ridge=list(fitted.ridges) * repeat,
        pad=list(fitted.pads) * repeat,
        fit_kl=kl(captured),
        dev_kl=kl(dev),
    )


LENS_NAMES = {
    "transfer": "tuned",
    "own": "tuned",
    "own_refined": "tuned",
    "shared": "shared",
    "shared_refined": "shared",
    "shared_bias": "shared_bias",
    "shared_loo": "shared_loo",
    "rotated": "shared",
    "rotated_own": "tuned",
}


@dataclass(frozen=True)
class Scored:
    """Per-window sums of everything that was scored on the eval split, and mean KLs of the refits.

    ``matrix``: ``kl, ce, movement, top1`` ``[S, L+1, L+1]``. ``layers``: name of a fit's maps -> (kl, ce), each ``[S, L]``.
    ``constant``, ``model_ce``, ``tokens``, ``bytes`` ``[S]``. ``refits``: fields of :class:`Means` stacked over refits.
    """

    matrix: dict[str, NDArray[np.float64]]
    layers: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    constant: NDArray[np.float64]
    model_ce: NDArray[np.float64]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    refits: dict[str, NDArray[np.float64]]
    fit: FitSummary

    def frame(self, windows: Windows, *, model: str, seed: int) -> pd.DataFrame:
        """``per_sequence.parquet``'s rows of one model and seed."""
        names = np.array(windows.document_names, dtype=object)[windows.documents]
        count = len(names)
        layers = self.matrix["kl"].shape[-1] - 1
        blocks: list[pd.DataFrame] = []

        def add(
            lens: str, lens_layer: int, layer: int, stage: str, prior: str, kl: Any, ce: Any,
            movement: Any = np.nan, view: int = -1, top1: Any = np.nan,
        ) -> None:  # fmt: skip
            columns = {
                "lens": lens,
                "lens_layer": lens_layer,
                "layer": layer,
                "stage": stage,
                "prior": prior,
                "view": view,
            }
            values = {"tokens": self.tokens, "bytes": self.bytes, "kl": kl, "ce": ce, "movement": movement}
            values["top1"] = top1
            blocks.append(
                pd.DataFrame({"document": names, "sequence": windows.sequence, **columns, **values}, range(count))
            )

        add("constant", -1, -1, "none", "none", self.constant, np.nan)
        add("model", -1, layers, "none", "none", 0.0, self.model_ce)
        headline = self.fit.records["transfer"]
        for i in range(layers + 1):
            tuned = ("tuned", i) if i < layers else ("logit", i)
            how = (headline.stage, headline.prior) if i < layers else ("none", "none")
            for j in range(layers + 1):
                kl, ce, movement, top1 = (self.matrix[k][:, i, j] for k in ("kl", "ce", "movement", "top1"))
                add(*tuned, j, *how, kl, ce, movement, top1=top1)
        for name, (kl, ce) in self.layers.items():
            kept = self.fit.records[name]
            view = int(name.removeprefix("rotated")) if name.removeprefix("rotated").isdigit() else 0
            view = view if name.startswith("rotated") else -1
            for layer in range(layers):
                add(kept.lens, layer if kept.lens == "tuned" else -1, layer, kept.stage, kept.prior,
                    kl[:, layer], ce[:, layer], view=view)  # fmt: skip
        frame = pd.concat(blocks, ignore_index=True)
        frame.insert(0, "model", model)
        frame.insert(1, "seed", seed)
        kinds = dict.fromkeys(("model", "document", "lens", "stage", "prior"), "category")
        sizes = dict.fromkeys(("seed", "sequence", "tokens", "bytes"), "int32")
        sizes |= dict.fromkeys(("lens_layer", "layer", "view"), "int16") | dict.fromkeys(
            ("kl", "ce", "movement", "top1"), "float32"
        )
        return frame.astype(kinds | sizes)


def score_all(readout: ReadOut, captured: Capture, fit: Fit, *, report: Report | None = None) -> Scored:
    """Every lens of a fit on the held-out tokens."""
    layers = list(range(captured.layers))
    tick = report or (lambda done, what: None)
    matrix = transfer_sums(readout, captured, fit.maps["transfer"])
    tick(1, "transfer matrix")
    by_layer = {
        name: own_layer_sums(readout, captured, fit.maps[name], layers)
        for name in fit.summary.records
        if name != "transfer"
    }
    tick(2, "other lenses")
    tokens = sum_by_window(torch.ones(len(captured)), captured)
    starts = np.flatnonzero(np.diff(captured.window, prepend=-1))
    refits = []
    for n in range(fit.summary.refits):
        maps = {k.removeprefix(f"refit{n}."): m for k, m in fit.maps.items() if k.startswith(f"refit{n}.")}
        sums = transfer_sums(readout, captured, maps["transfer"])
        closed = {k: own_layer_sums(readout, captured, m, layers)[0] for k, m in maps.items() if k != "transfer"}
        none = np.full_like(closed["own"], np.nan)  # refinement is not refitted
        refits.append(
            Means(
                constant=sum_by_window(captured.constant_kl, captured),
                transfer=sums.kl,
                transfer_ce=sums.ce,
                movement=sums.movement,
                own=closed["own"],
                shared=closed["shared"],
                shared_loo=closed["shared_loo"],
                rotated=np.stack([closed[f"rotated{k}"] for k in range(fit.summary.rotations)], 1),
                own_refined=none,
                shared_refined=none,
            )
        )
        tick(3 + n, f"refit {n}")
    means = [Means.of_clusters(sums, tokens) for sums in refits]
    return Scored(
        matrix={"kl": matrix.kl, "ce": matrix.ce, "movement": matrix.movement, "top1": matrix.top1},
        layers=by_layer,
        constant=sum_by_window(captured.constant_kl, captured),
        model_ce=sum_by_window(captured.model_ce, captured),
        tokens=tokens,
        bytes=np.add.reduceat(captured.target_bytes.astype(float), starts),
        refits={name: np.stack([getattr(m, name) for m in means]) for name, _ in means[0].items()} if means else {},
        fit=fit.summary,
    )


@dataclass(frozen=True)
class Part:
    """What the tables need of one model and seed, read back from its stages."""

    model: str
    seed: int
    sequences: pd.DataFrame
    facts: dict[str, Any]
    fit: FitSummary
    refits: dict[str, NDArray[np.float64]]

    @classmethod
    def load(cls, model: str, seed: int, fitting: Path, scoring: Path) -> "Part":
        kept = {name: values.numpy() for name, values in load_file(scoring / "refits.safetensors").items()}
        return cls(
            model,
            seed,
            pd.read_parquet(scoring / "sequences.parquet"),
            json.loads((scoring / "model.json").read_text()),
            FitSummary.load(fitting / "fit.json"),
            kept,
        )


@dataclass(frozen=True)
class ClusterSums:
    """Sums over the documents of one model and seed: what every interval resamples.

    ``tokens``, ``bytes`` ``[clusters]``; ``totals`` holds the fields of :class:`Means` as ``[clusters, ...]`` sums.
    """

    documents: tuple[str, ...]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    totals: Means
    top1: NDArray[np.float64]
    """``[clusters, L+1, L+1]``: tokens at which the lens's most probable word is the model's"""

    @classmethod
    def of(cls, sequences: pd.DataFrame) -> "ClusterSums":
        """From the rows of ``per_sequence.parquet`` that belong to one model and seed."""
        documents = tuple(sorted(sequences["document"].astype(str).unique()))
        model = by_document(sequences, lens="model")
        constant = by_document(sequences, lens="constant")["kl"].to_numpy(float)
        layers = int(sequences["layer"].max())
        tuned = sequences[(sequences["lens"] == "tuned") & (sequences["prior"] == "identity")]
        logit = sequences[sequences["lens"] == "logit"]
        matrix = pd.concat([tuned, logit])

        def grid(column: str) -> NDArray[np.float64]:
            table = matrix.pivot_table(
                index="document", columns=["lens_layer", "layer"], values=column, aggfunc="sum", observed=True
            )
            return table.sort_index().to_numpy(float).reshape(len(documents), layers + 1, layers + 1)

        def per_layer(lens: str, stage: str = "closed", view: int = -1) -> NDArray[np.float64]:
            rows = sequences[(sequences["lens"] == lens) & (sequences["stage"] == stage) & (sequences["view"] == view)]
            rows = rows[rows["prior"] == "zero"]
            table = rows.pivot_table(index="document", columns="layer", values="kl", aggfunc="sum", observed=True)
            return table.sort_index().to_numpy(float)

        views = range(int(sequences["view"].max()) + 1)
        totals = Means(
            constant=constant,
            transfer=grid("kl"),
            transfer_ce=grid("ce"),
            movement=grid("movement"),
            own=per_layer("tuned"),
            shared=per_layer("shared"),
            shared_loo=per_layer("shared_loo"),
            rotated=np.stack([per_layer("shared", view=k) for k in views], axis=1),
            own_refined=per_layer("tuned", "refined"),
            shared_refined=per_layer("shared", "refined"),
        )
        return cls(documents, model["tokens"].to_numpy(float), model["bytes"].to_numpy(float), totals, grid("top1"))


def by_document(sequences: pd.DataFrame, *, lens: str) -> pd.DataFrame:
    rows = sequences[sequences["lens"] == lens]
    columns = ["tokens", "bytes", "kl", "ce"]
    return rows.groupby("document", observed=True)[columns].sum().sort_index()


def ratio_with_interval(
    sums: NDArray[np.float64], per: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``sum(sums) / sum(per)`` over clusters with its 95 % interval: (low, value, high), each of ``sums.shape[1:]``."""
    flat = sums.reshape(len(sums), -1)
    low, high = indices.interval((weights @ flat) / (weights @ per)[:, None])
    shape = sums.shape[1:]
    return low.reshape(shape), (flat.sum(0) / per.sum()).reshape(shape), high.reshape(shape)


def mean_with_interval(values: Tensor, document: NDArray[np.int64], draws: int) -> tuple[float, float, float]:
    """Mean over tokens ``[N]`` with its 95 % interval over documents: (low, mean, high)."""
    sums = np.bincount(document, weights=values.double().cpu().numpy()).astype(float)
    counts = np.bincount(document).astype(float)
    low, mean, high = ratio_with_interval(sums, counts, indices.bootstrap_weights(len(counts), draws, 0))
    return float(low), float(mean), float(high)


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
    weights = indices.bootstrap_weights(len(counts), draws, 0)
    rows = []
    for name, nats in ce.items():
        sums = np.bincount(document, weights=nats).astype(float)
        row: dict[str, Any] = {"baseline": name, "train_tokens": train_tokens}
        rows.append(row | ce_columns(sums, counts, sizes, weights))
    return pd.DataFrame(rows)


def ce_columns(sums, tokens, sizes, weights) -> dict[str, float]:
    """Cross-entropy in nats/token and bits/byte, with intervals."""
    low, mean, high = ratio_with_interval(sums, tokens, weights)
    byte_low, byte_mean, byte_high = ratio_with_interval(sums / np.log(2), sizes, weights)
    return {
        "ce": float(mean), "ce_ci_low": float(low), "ce_ci_high": float(high),
        "bits_per_byte": float(byte_mean), "bits_per_byte_ci_low": float(byte_low),
        "bits_per_byte_ci_high": float(byte_high),
    }  # fmt: skip


def tables(parts: list[Part], recipe: FitRecipe, *, draws: int) -> dict[str, pd.DataFrame]:
    """The CSV tables of a run, but for the baselines."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("models.csv", "lenses.csv", "transfer.csv", "indices.csv")
    }
    found: dict[str, list[dict[str, indices.Estimate]]] = {}
    for part in parts:
        sums = ClusterSums.of(part.sequences)
        weights = indices.bootstrap_weights(len(sums.tokens), draws, 0)
        who = {"model": part.model, "seed": part.seed}
        ce = by_document(part.sequences, lens="model")["ce"].to_numpy(float)
        rows["models.csv"].append(
            who
            | part.facts
            | ce_columns(ce, sums.tokens, sums.bytes, weights)
            | {"scored_tokens": int(sums.tokens.sum()), "clusters": len(sums.tokens)}
        )
        rows["lenses.csv"] += lens_rows(part, weights)
        rows["transfer.csv"] += transfer_rows(part, sums, weights)
        point = Means.of_clusters(sums.totals, sums.tokens)
        estimates = indices.estimates(
            point, Means.of_clusters(sums.totals, sums.tokens, weights), seed=part.seed, clusters=len(sums.tokens)
        )
        found.setdefault(part.model, []).append(estimates)
        rows["indices.csv"] += [who | row for row in index_rows(estimates, part, recipe)]
    for model, per_seed in found.items():
        if len(per_seed) > 1:
            rows["indices.csv"] += [{"model": model, "seed": "all"} | row for row in rows_over_seeds(per_seed, recipe)]
    return {name: pd.DataFrame(content) for name, content in rows.items()}


def lens_rows(part: Part, weights: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """``lenses.csv``: every lens at the layers it is meant for."""
    kept = part.sequences[~part.sequences["lens"].isin(["constant", "model"])]
    headline = (kept["lens"] == "tuned") & (kept["prior"] == "identity")
    kept = kept[~headline & (kept["view"] <= 0)]
    records = {
        (r.lens, r.stage): r for name, r in part.fit.records.items() if not name.startswith(("rotated", "transfer"))
    }
    rotated = {part.fit.records[name].lens: part.fit.records[name] for name in ("rotated_own", "rotated0")}
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
            row[column] = None if chosen is None else getattr(chosen, column)[layer]
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
                "tolerance": headline.tolerance,
                **{name: float(array[i, j]) for name, array in values.items()},
            }


def index_rows(estimates: dict[str, indices.Estimate], part: Part, recipe: FitRecipe) -> Iterator[dict[str, Any]]:
    """``indices.csv`` of one model and seed."""
    refitted: dict[str, NDArray[np.float64]] = {}
    if part.refits:
        means = Means(**part.refits)
        refitted = {name: function(means).value for name, (_, function) in indices.INDICES.items()}
        for suffix in ("", "_without_layer0"):
            kept, null = refitted[f"shared_retention{suffix}"], refitted[f"rotated_retention{suffix}"]
            refitted[f"shared_consistency{suffix}"] = (kept - null) / (1 - null)
    for name, estimate in estimates.items():
        spread = refitted.get(name)
        known = estimate.value is not None and spread is not None and bool(np.isfinite(spread).all())
        yield index_row(name, estimate, recipe) | {
            "fit_low": float(spread.min()) if known and spread is not None else None,
            "fit_high": float(spread.max()) if known and spread is not None else None,
        }
    facts = {"layers": float(part.facts["layers"]), "rotated_rank": float(part.fit.rotated_rank)}
    for name, value in facts.items():
        yield index_row(name, indices.Estimate(value, None, None, "a fact of the stream, not an estimate"), recipe)


def index_row(name: str, estimate: indices.Estimate, recipe: FitRecipe) -> dict[str, Any]:
    stage = (
        indices.INDICES[name][0]
        if name in indices.INDICES
        else ("closed" if name.startswith("shared_consistency") else "none")
    )
    return {
        "index": name,
        "value": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "fit_low": None,
        "fit_high": None,
        "stage": stage,
        "tolerance": recipe.tolerance if name in indices.OF_THE_MATRIX else 0.0,
        "reason": estimate.reason,
    }


def rows_over_seeds(per_seed: list[dict[str, indices.Estimate]], recipe: FitRecipe) -> Iterator[dict[str, Any]]:
    """``seed = all``: the mean over seeds with a Student-t interval; undefined where it is undefined for a seed."""
    for name in per_seed[0]:
        values = [e[name].value for e in per_seed]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            reason = f"undefined for {len(values) - len(known)} of {len(values)} seeds"
            yield index_row(name, indices.Estimate(None, None, None, reason), recipe)
        else:
            mean, low, high = indices.over_seeds(known)
            yield index_row(name, indices.Estimate(mean, low, high), recipe)
