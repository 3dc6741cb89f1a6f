"""All lenses of one view of a model, fitted, scored and turned into the tables of a run folder."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.closed import (
    Fitted,
    choices_of,
    fit_each,
    fit_rotated,
    fit_shared,
    fit_shared_bias,
    fit_within,
    ridge_paths,
    solve_as_chosen,
)
from lensbench.lenses.maps import AffineMaps, rotated_maps
from lensbench.lenses.moments import Moments
from lensbench.lenses.read import own_layer_sums
from lensbench.lenses.recipe import ONE_STANDARD_ERROR, FitRecipe, Prior, Stage, spread_layers
from lensbench.lenses.refine import refine
from lensbench.lenses.search import Choice, DevSearch, pad_direction
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView

Report = Callable[[int, str], None]


class LensRecord(BaseModel):
    """How one kind of lens was fitted: per layer, what dev chose and the KL on fitting and dev tokens, nats/token.

    For lenses of some layers or of pairs the lists go with those, and their KLs are left out.
    """

    model_config = ConfigDict(extra="forbid")

    lens: str
    stage: str
    prior: str
    tolerance: float
    ridge: list[float | None]
    pad: list[float | None]
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
    pair_rotations: int
    refits: int
    layers: list[int]
    """The layers of the dear parts: curve over tolerances, leave-one-out, pairs, refits of the matrix."""
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

    ``transfer``: the headline matrix's lenses (prior identity, within the tolerance; or loaded ones). ``own``, ``shared``,
    ``shared_bias``: prior zero, best ridge. ``own_refined``, ``shared_refined``. Of the chosen layers S alone:
    ``transfer@T``: lenses within another tolerance T; ``shared_loo``; ``pair``: one lens for each pair of them.
    ``view{k}``: rotations of view k; ``rotated{k}``, ``pair_rotated{k}``: its shared lens and its lenses of pairs, as maps
    of rotated states; ``rotated_own``: per-layer lenses refitted on view 0, as maps of plain states.
    ``refit{n}.NAME``: closed forms on document-resampled fit data, ``transfer`` for the layers S.
    """

    maps: dict[str, AffineMaps]
    summary: FitSummary

    @property
    def constant(self) -> Tensor:
        """Mean of p over the fitting tokens, ``[V]``."""
        return torch.tensor(self.summary.constant)


def tolerance_labels(recipe: FitRecipe) -> list[str]:
    """The tolerances of the curve beside the headline's, as tables call them."""
    labels = [f"{t:g}" for t in recipe.tolerances]
    return [label for label in labels if label != f"{recipe.tolerance:g}"] + [ONE_STANDARD_ERROR]


def pairs_of(layers: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.combinations(layers, 2))


def fit_steps(recipe: FitRecipe, layers: int, *, loaded: bool = False) -> int:
    """How many lenses a fit makes, for its progress bar."""
    some = len(spread_layers(layers, recipe.layers))
    curve = 0 if loaded else len(tolerance_labels(recipe))
    pairs = some * (some - 1) // 2 * (1 + min(recipe.pair_rotations, recipe.rotations))
    return 3 * layers + 3 + some + curve + pairs + recipe.rotations + recipe.refits


def fit_all(
    readout: ReadOut,
    captured: Capture,
    dev: Capture,
    recipe: FitRecipe,
    *,
    seed: int,
    loaded: AffineMaps | None = None,
    pieces: Pieces = NOTHING_KEPT,
    report: Report | None = None,
) -> Fit:
    """Every lens of one view, from its fitting and dev tokens; ``report(done, what)`` after each.

    ``loaded``: per-layer lenses of others, used for the headline matrix instead of fitting it. Finished ``pieces`` are
    taken up.
    """
    done = 0

    def tick(what: str, count: int = 1) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(done, what)

    layers = list(range(captured.layers))
    some = spread_layers(captured.layers, recipe.layers)
    pairs = pairs_of(some)
    moments = Moments.of(captured)
    search = DevSearch(readout, dev, recipe, pad_direction(readout, captured.states[-1], captured.ranks))
    fitted: dict[str, Fitted] = {}

    def keep(name: str, fit: Callable[[], Fitted]) -> Fitted:
        fitted[name] = _kept(pieces, name, fit)
        return fitted[name]

    if loaded is not None:
        fitted["transfer"] = Fitted(loaded, (), (), "identity", "loaded")
        tick("per layer, loaded", len(layers))
    else:
        _fit_matrix(search, moments, recipe, some, keep, tick, pieces)
    keep("own", lambda: fit_each(search, moments, "zero"))
    tick("per layer, prior zero", len(layers))
    keep("shared", lambda: fit_shared(search, moments, layers))
    (shared,) = choices_of(fitted["shared"])
    tick("shared")
    keep("shared_bias", lambda: fit_shared_bias(search, moments))
    tick("shared, one bias per layer")
    without = []
    for left_out in some:
        rest = [layer for layer in layers if layer != left_out]
        # From the middle of the path: no choice, and no place that it begins from, has seen the layer.
        without.append(_kept(pieces, f"shared_loo-{left_out}", partial(fit_shared, search, moments, rest)))
        tick(f"shared without layer {left_out}")
    fitted["shared_loo"] = joined(without)

    views = [
        RotatedView.random(moments.covariance, seed=1000 * seed + k, variance=recipe.variance)
        for k in range(recipe.rotations)
    ]
    pair_rotations = min(recipe.pair_rotations, recipe.rotations)
    turned = {}  # those that are wanted again: each takes as much memory as the moments themselves
    for k, view in enumerate(views):
        rotated = moments.rotated(view)
        keep(f"rotated{k}", partial(fit_rotated, search, rotated, view, near=shared))
        if k < max(1, pair_rotations):
            turned[k] = rotated
        del rotated
        tick(f"shared, rotated view {k}")

    # Per-layer lenses fitted to rotated moments and chosen on rotated dev states. They are scored with the rotation folded
    # into the map, as all rotated lenses are: agreement with `own` checks the algebra, it is no second measurement.
    def refit_rotated() -> Fitted:
        rotated_search = DevSearch(readout, views[0].apply(dev), recipe, search.pad)
        refitted = fit_each(rotated_search, turned[0], "zero")
        return Fitted(rotated_maps(refitted.maps, views[0]), refitted.ridges, refitted.pads, "zero", "closed")

    keep("rotated_own", refit_rotated)

    def fit_pairs(name: str, fit: Callable[..., Fitted]) -> None:
        each = []
        for a, b in pairs:
            each.append(_kept(pieces, f"{name}-{a}-{b}", partial(fit, layers=[a, b], near=shared)))
            tick(f"{name.replace('_', ', ')}, layers {a} and {b}")
        fitted[name] = joined(each)

    fit_pairs("pair", partial(fit_shared, search, moments))
    for k in range(pair_rotations):
        fit_pairs(f"pair_rotated{k}", partial(fit_rotated, search, turned[k], views[k]))

    maps: dict[str, AffineMaps] = {}
    for n in range(recipe.refits):
        resample = _kept_maps(
            pieces,
            f"refit{n}",
            partial(resampled, search, captured, fitted, views, some, seed, n),
        )
        maps |= {f"refit{n}.{name}": m for name, m in resample.items()}
        tick(f"refit {n} on resampled documents")

    endings = _refined(search, captured, moments, fitted, layers, seed, pieces, tick)
    for name, (refined, _) in endings.items():
        fitted[name] = refined
    maps |= {name: f.maps for name, f in fitted.items()}
    maps |= {f"view{k}": AffineMaps(view.maps, torch.zeros(view.maps.shape[:2])) for k, view in enumerate(views)}

    records = {}
    fit_sample, dev_sample = (thinned(c, RECORD_TOKENS) for c in (captured, dev))
    for name, f in fitted.items():
        records[name] = record(name, f, len(layers))
        # Of the rotated views the tables tell about the first.
        if name in ("transfer", "rotated0", "rotated_own") or name.startswith(("own", "shared")):
            own = rotated_maps(f.maps, views[0]) if name == "rotated0" else f.maps
            where = some if name == "shared_loo" else layers
            for key, tokens in (("fit_kl", fit_sample), ("dev_kl", dev_sample)):
                setattr(records[name], key, _mean_kls(readout, tokens, own, where, pieces, f"{key}-{name}"))
    for name, (_, ended) in endings.items():
        records[name].iterations = [e[0] for e in ended]
        records[name].ended = [e[1] for e in ended]
    summary = FitSummary(
        records=records,
        fit_tokens=captured.tokens,
        dev_tokens=dev.tokens,
        rotated_rank=views[0].rank,
        rotations=recipe.rotations,
        pair_rotations=pair_rotations,
        refits=recipe.refits,
        layers=some,
        dev_constant_kl=search.constant_kl,
        constant=captured.mean_p.tolist(),
    )
    return Fit({name: AffineMaps(m.matrix.float().cpu(), m.offset.float().cpu()) for name, m in maps.items()}, summary)


RECORD_TOKENS = 512
"""Fitting and dev tokens at most that ``fit_kl`` and ``dev_kl`` of the tables are means over, drawn at random."""


def thinned(captured: Capture, tokens: int) -> Capture:
    """At most so many tokens, drawn at random: every n-th one would be the same place of every sequence."""
    drawn = torch.randperm(captured.tokens, generator=torch.Generator().manual_seed(0))[:tokens]
    return captured.chosen(drawn.sort().values)


def _kept(pieces: Pieces, name: str, fit: Callable[[], Fitted]) -> Fitted:
    """A fit, taken up from the piece of its name where that is finished."""

    def content() -> dict[str, Tensor]:
        f = fit()
        how = {"prior": PRIORS.index(f.prior), "stage": STAGES.index(f.stage), "tolerance": f.tolerance}
        numbers = {"ridges": f.ridges, "pads": f.pads, **{k: (v,) for k, v in how.items()}}
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        return {"matrix": f.maps.matrix, "offset": f.maps.offset, **tensors}

    found = pieces.get(name, content)
    prior, stage = PRIORS[int(found["prior"])], STAGES[int(found["stage"])]
    ridges, pads = tuple(found["ridges"].tolist()), tuple(found["pads"].tolist())
    maps = AffineMaps(found["matrix"], found["offset"])
    return Fitted(maps, ridges, pads, prior, stage, float(found["tolerance"]))


PRIORS: tuple[Prior, ...] = ("zero", "identity")


STAGES: tuple[Stage, ...] = ("closed", "refined", "loaded")


def _kept_maps(pieces: Pieces, name: str, fit: Callable[[], dict[str, AffineMaps]]) -> dict[str, AffineMaps]:
    def content() -> dict[str, Tensor]:
        maps = fit()
        return {f"{k}.{part}": tensor for k, m in maps.items() for part, tensor in vars(m).items()}

    found = pieces.get(name, content)
    return {
        k: AffineMaps(found[f"{k}.matrix"], found[f"{k}.offset"])
        for k in dict.fromkeys(n.rpartition(".")[0] for n in found)
    }


def _fit_matrix(
    search: DevSearch,
    moments: Moments,
    recipe: FitRecipe,
    some: list[int],
    keep: Callable[[str, Callable[[], Fitted]], Fitted],
    tick: Callable[..., None],
    pieces: Pieces,
) -> None:
    """The lenses of the headline matrix and, for some layers, those of the curve over tolerances."""
    paths = []
    for layer in range(len(moments.mean)):

        def path(layer: int = layer) -> dict[str, Tensor]:
            (choices,) = ridge_paths(search, moments.layer([layer]), "identity", [layer])
            return {"path": torch.tensor([[c.ridge, c.pad, c.dev_kl] for c in choices], dtype=torch.float64)}

        paths.append([Choice(*row) for row in pieces.get(f"path-{layer}", path)["path"].tolist()])
        tick(f"layer {layer}, prior identity")
    keep("transfer", lambda: fit_within(search, moments, "identity", paths, recipe.tolerance))
    for label in tolerance_labels(recipe):
        tolerance: float | Literal["1se"] = ONE_STANDARD_ERROR if label == ONE_STANDARD_ERROR else float(label)
        keep(
            f"transfer@{label}",
            partial(fit_within, search, moments, "identity", paths, tolerance, some),
        )
        tick(f"tolerance {label}")


def _refined(
    search: DevSearch,
    captured: Capture,
    moments: Moments,
    fitted: dict[str, Fitted],
    layers: list[int],
    seed: int,
    pieces: Pieces,
    tick: Callable[..., None],
) -> dict[str, tuple[Fitted, list[tuple[int, str]]]]:
    """The per-layer lenses and the shared one refined on KL, with the updates and the ending of each."""
    reported = 0

    def refining(updates: int, limit: int) -> None:
        nonlocal reported
        at = (len(layers) + 1) * updates // max(1, limit)
        tick(f"refining, update {updates} of at most {limit}", at - reported)
        reported = at

    def content() -> dict[str, Tensor]:
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
        maps = AffineMaps.stack([r.maps for r in refined])
        how = torch.tensor([(r.iterations, ENDINGS.index(r.ended)) for r in refined])
        return {"matrix": maps.matrix, "offset": maps.offset, "how": how}

    found = pieces.get("refined", content)
    tick("refined", len(layers) + 1 - reported)
    how = [(updates, ENDINGS[ending]) for updates, ending in found["how"].tolist()]
    maps, result = AffineMaps(found["matrix"], found["offset"]), {}
    for name, rows in (("own", slice(0, len(layers))), ("shared", slice(len(layers), None))):
        refined = Fitted(maps[rows], fitted[name].ridges, fitted[name].pads, "zero", "refined")
        result[f"{name}_refined"] = refined, how[rows]
    return result


ENDINGS = ("converged", "dev rose", "pass limit")


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
    search: DevSearch,
    captured: Capture,
    fitted: dict[str, Fitted],
    views: list[RotatedView],
    some: list[int],
    seed: int,
    refit: int,
) -> dict[str, AffineMaps]:
    """The closed forms again on documents drawn with replacement, at the ridges and pads chosen before; float32.

    The lenses of the matrix for the layers ``some`` alone; loaded ones stay as they are.
    """
    documents = captured.ranks.most(int(captured.document.max())) + 1
    counts = np.random.default_rng([seed, refit]).multinomial(documents, np.full(documents, 1 / documents))
    moments = Moments.of(captured, torch.from_numpy(counts[captured.document]))
    layers = list(range(captured.layers))

    def solve(name: str, regressions: Moments, rows: Sequence[int] | None = None) -> AffineMaps:
        chosen = fitted[name]
        at = range(len(chosen.ridges)) if rows is None else rows
        choices = [Choice(chosen.ridges[k], chosen.pads[k], 0.0) for k in at]
        return solve_as_chosen(search, regressions, chosen.prior, choices).maps

    matrix = fitted["transfer"]
    maps = {
        "transfer": matrix.maps[some] if matrix.stage == "loaded" else solve("transfer", moments.layer(some), some),
        "own": solve("own", moments),
        "shared": solve("shared", moments.pooled(layers)),
        "shared_loo": AffineMaps.stack(
            [
                solve("shared_loo", moments.pooled([k for k in layers if k != left_out]), [at])
                for at, left_out in enumerate(some)
            ]
        ),
    }
    for k, view in enumerate(views):
        maps[f"rotated{k}"] = solve(f"rotated{k}", moments.rotated(view).pooled(layers))
    return {name: AffineMaps(m.matrix.float(), m.offset.float()) for name, m in maps.items()}


def _mean_kls(
    readout: ReadOut, tokens: Capture, maps: AffineMaps, layers: list[int], pieces: Pieces, name: str
) -> list[float]:
    def content() -> dict[str, Tensor]:
        return {"kl": torch.from_numpy(own_layer_sums(readout, tokens, maps, layers)[0].sum(0) / tokens.tokens)}

    return [float(v) for v in pieces.get(name, content)["kl"]]


def record(name: str, fitted: Fitted, layers: int) -> LensRecord:
    """What dev chose, a value per lens; that of one lens for all layers is repeated for each of them."""
    repeat = layers if len(fitted.maps) == 1 else 1
    unknown = [None] * len(fitted.maps)
    return LensRecord(
        lens=LENS_NAMES[name.partition("@")[0].rstrip("0123456789")],
        stage=fitted.stage,
        prior=fitted.prior,
        tolerance=fitted.tolerance,
        ridge=(list(fitted.ridges) or unknown) * repeat,
        pad=(list(fitted.pads) or unknown) * repeat,
        fit_kl=[],
        dev_kl=[],
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
    "pair": "pair",
    "pair_rotated": "pair",
}
