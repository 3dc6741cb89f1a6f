"""Every lens of a fit read at every layer of the eval split."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.lenses.fit import Fit, FitSummary, Report, pairs_of
from lensbench.lenses.maps import AffineMaps, rotated_maps
from lensbench.lenses.read import own_layer_sums
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.means import Means
from lensbench.measures.transfer import TransferSums, transfer_sums
from lensbench.runtime.stages import NOTHING_KEPT, Pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sums_of_all
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView


def score_steps(recipe: FitRecipe, layers: int) -> int:
    """How many steps a scoring has, for its progress bar."""
    return layers + 3 + recipe.refits  # the matrix has L + 1 columns


@dataclass(frozen=True)
class Scored:
    """Per-window sums of everything that was scored on the eval split, and mean KLs of the refits.

    ``matrix``: ``kl, ce, movement, top1`` ``[S, L+1, L+1]``. ``curve``: tolerance -> the same of the chosen layers,
    ``[S, n, n]``. ``layers``: name of a fit's maps -> (kl, ce), each ``[S, L]`` (leave-one-out: ``[S, n]``). ``pairs``: name
    -> (kl, ce), ``[S, pairs, 2]``, at the first and the second layer of each. ``constant``, ``model_ce``, ``tokens``,
    ``bytes`` ``[S]``. ``refits``: fields of :class:`Means` stacked over the fit itself and its refits, on the refits'
    tokens.
    """

    matrix: dict[str, NDArray[np.float64]]
    curve: dict[str, dict[str, NDArray[np.float64]]]
    layers: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    pairs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    constant: NDArray[np.float64]
    model_ce: NDArray[np.float64]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    refits: dict[str, NDArray[np.float64]]
    fit: FitSummary

    def frame(self, samples: Samples, *, model: str, seed: int) -> pd.DataFrame:
        """``per_sequence.parquet``'s rows of one model and seed."""
        names = np.array(samples.document_names, dtype=object)[samples.documents]
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
                pd.DataFrame({"document": names, "sequence": samples.sequence, **columns, **values}, range(count))
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
        some = self.fit.layers
        for label, sums in self.curve.items():
            for (a, i), (b, j) in itertools.product(enumerate(some), repeat=2):
                # Visibility and movement are all that is followed over tolerances, and rows enough.
                kl, movement = sums["kl"][:, a, b], sums["movement"][:, a, b]
                add(f"tuned@{label}", i, j, "closed", "identity", kl, np.nan, movement)
        for name, (kl, ce) in self.layers.items():
            kept = self.fit.records[name]
            if kept.stage == "refined" and not any(kept.iterations):
                continue  # without an update they are the closed ones
            where = some if name == "shared_loo" else range(layers)
            for k, layer in enumerate(where):
                add(kept.lens, layer if kept.lens == "tuned" else -1, layer, kept.stage, kept.prior,
                    kl[:, k], ce[:, k], view=view_of(name))  # fmt: skip
        for name, (kl, _) in self.pairs.items():
            for p, (a, b) in enumerate(pairs_of(some)):
                # The lens of a and b stands at [a, b] as it reads b, at [b, a] as it reads a.
                for at, (i, j) in enumerate(((b, a), (a, b))):
                    add("pair", i, j, "closed", "zero", kl[:, p, at], np.nan, view=view_of(name))
        frame = pd.concat(blocks, ignore_index=True)
        frame.insert(0, "model", model)
        frame.insert(1, "seed", seed)
        kinds = dict.fromkeys(("model", "document", "lens", "stage", "prior"), "category")
        sizes = dict.fromkeys(("seed", "sequence", "tokens", "bytes"), "int32")
        sizes |= dict.fromkeys(("lens_layer", "layer", "view"), "int16") | dict.fromkeys(
            ("kl", "ce", "movement", "top1"), "float32"
        )
        return frame.astype(kinds | sizes)


def view_of(name: str) -> int:
    """Number of the rotated view that maps of this name belong to; -1 for plain ones."""
    number = name.removeprefix("pair_").removeprefix("rotated")
    return -1 if "rotated" not in name else int(number) if number.isdigit() else 0


def score_all(
    readout: ReadOut,
    captured: Capture,
    fit: Fit,
    *,
    refit_positions: int | None = None,
    memory_gib: float = float("inf"),
    pieces: Pieces = NOTHING_KEPT,
    report: Report | None = None,
) -> Scored:
    """Every lens of a fit on the held-out tokens; refits on at most ``refit_positions`` of each window.

    What movement is measured from is as large as the states, and beyond ``memory_gib`` kept on disk as they are.
    Finished ``pieces`` are taken up.
    """
    layers, some = list(range(captured.layers)), fit.summary.layers
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, what)

    def kept(name: str, tokens: Capture, maps: AffineMaps, where: Sequence[int]) -> tuple[Any, Any]:
        def content() -> dict[str, Tensor]:
            kl, ce = own_layer_sums(readout, tokens, maps, where)
            return {"kl": torch.from_numpy(kl), "ce": torch.from_numpy(ce)}

        found = pieces.get(name, content)
        return found["kl"].numpy(), found["ce"].numpy()

    def matrix_of(name: str, tokens: Capture, some_maps: AffineMaps) -> TransferSums:
        """The matrix of the chosen layers."""
        whole = AffineMaps(fit.maps["transfer"].matrix.clone(), fit.maps["transfer"].offset.clone())
        whole.matrix[some], whole.offset[some] = some_maps.matrix, some_maps.offset
        return transfer_sums(
            readout, tokens, whole, lenses=some, layers=some, memory_gib=memory_gib, pieces=pieces, name=name
        )

    matrix = transfer_sums(
        readout,
        captured,
        fit.maps["transfer"],
        memory_gib=memory_gib,
        pieces=pieces,
        name="matrix",
        report=lambda j: tick(f"matrix, layer {j}"),
    )
    views = {
        k: RotatedView(fit.maps[f"view{k}"].matrix, fit.summary.rotated_rank) for k in range(fit.summary.rotations)
    }
    by_layer, pairs = {}, {}
    for name in fit.summary.records:
        if name.startswith("pair"):
            maps, each = fit.maps[name], []
            for p, (a, b) in enumerate(pairs_of(some)):
                own = maps[[p]] if name == "pair" else rotated_maps(maps[[p]], views[view_of(name)])[[a, b]]
                each.append(kept(f"{name}-{a}-{b}", captured, own, [a, b]))
            pairs[name] = np.stack([e[0] for e in each], 1), np.stack([e[1] for e in each], 1)
        elif not name.startswith("transfer"):
            rotated = name.startswith("rotated") and name != "rotated_own"
            maps = rotated_maps(fit.maps[name], views[view_of(name)]) if rotated else fit.maps[name]
            by_layer[name] = kept(f"own-{name}", captured, maps, some if name == "shared_loo" else layers)
    tick("other lenses")
    curve = {
        name.partition("@")[2]: vars(matrix_of(f"curve-{name}", captured, fit.maps[name]))
        for name in fit.summary.records
        if name.startswith("transfer@")
    }
    tick("curve over tolerances")
    tokens = sums_of_all(torch.ones(len(captured)), captured)
    sample = captured if refit_positions is None else thinned_windows(captured, refit_positions)
    sample_tokens = sums_of_all(torch.ones(len(sample)), sample)

    def means(prefix: str) -> Means:
        """Of the fit itself (no prefix) or of a refit, on the refits' tokens."""
        maps = {k.removeprefix(prefix): m for k, m in fit.maps.items() if k.startswith(prefix)}
        who = prefix.rstrip(".") or "fit"
        chosen = maps["transfer"] if prefix else maps["transfer"][some]
        sums = matrix_of(f"{who}-matrix", sample, chosen)
        closed = {k: kept(f"{who}-{k}", sample, maps[k], layers)[0] for k in ("own", "shared")}
        left_out = kept(f"{who}-loo", sample, maps["shared_loo"], some)[0]
        rotated = [
            kept(f"{who}-rotated{k}", sample, rotated_maps(maps[f"rotated{k}"], view), layers)[0]
            for k, view in views.items()
        ]
        unknown = np.full(
            (len(sample_tokens), len(layers) + 1, len(layers) + 1), np.nan
        )  # neither refined nor in pairs
        block = np.ix_(range(len(sample_tokens)), some, some)
        whole = {name: unknown.copy() for name in ("kl", "ce", "movement")}
        for name, values in whole.items():
            values[block] = getattr(sums, name)
        loo = unknown[:, :-1, 0].copy()
        loo[:, some] = left_out
        total = Means(
            constant=sums_of_all(sample.constant_kl, sample),
            transfer=whole["kl"],
            transfer_ce=whole["ce"],
            movement=whole["movement"],
            own=closed["own"],
            shared=closed["shared"],
            shared_loo=loo,
            rotated=np.stack(rotated, 1),
            own_refined=unknown[:, :-1, 0],
            shared_refined=unknown[:, :-1, 0],
            pair=unknown[:, :-1, :-1],
            pair_rotated=unknown[:, None, :-1, :-1],
        )
        return Means.of_clusters(total, sample_tokens)

    refits = []
    if fit.summary.refits:
        refits.append(means(""))
        for n in range(fit.summary.refits):
            refits.append(means(f"refit{n}."))
            tick(f"refit {n}")
    return Scored(
        matrix=vars(matrix),
        curve=curve,
        layers=by_layer,
        pairs=pairs,
        constant=sums_of_all(captured.constant_kl, captured),
        model_ce=sums_of_all(captured.model_ce, captured),
        tokens=tokens,
        bytes=sums_of_all(torch.from_numpy(captured.target_bytes), captured),
        refits={name: np.stack([getattr(m, name) for m in refits]) for name, _ in refits[0].items()} if refits else {},
        fit=fit.summary,
    )


def thinned_windows(captured: Capture, positions: int) -> Capture:
    """At most ``positions`` tokens of each window, evenly spread over those that it has."""
    _, rank, counts = np.unique(captured.window, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    within, size = np.arange(len(captured)) - first[rank], counts[rank]
    wanted = np.minimum(positions, size)
    return captured.take(torch.from_numpy(np.flatnonzero((within + 1) * wanted // size > within * wanted // size)))
