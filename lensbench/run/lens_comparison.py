"""Anybody's lens files side by side with a model's own lenses: every one at every layer, on the same held-out tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lensbench.data.corpus import FRACTIONS, load_corpus
from lensbench.data.inputs import Texts
from lensbench.data.windows import DOCUMENT_SHARE, Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import fit_some
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.jacobian_files import jacobian_path, read_jacobian, write_jacobian
from lensbench.lenses.jacobian_kinds import (
    JACOBIAN_LENS,
    SHARED_JACOBIAN_LENS,
    SHARED_JACOBIAN_LOO_LENS,
    linear,
)
from lensbench.lenses.lens import FittedLens, LensId
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext
from lensbench.lenses.read import score
from lensbench.lenses.recipe import FitRecipe, JacobianRecipe
from lensbench.lenses.refined import OWN_REFINED, SHARED_REFINED
from lensbench.lenses.shared import SHARED_LENS
from lensbench.lenses.tuned import lens_files, load_tuned_lens, maps_of
from lensbench.measures.top_words import TOP, top_word_ranks
from lensbench.models.pretrained import (
    Pretrained,
    check_context,
    commit_of,
    identity,
    load_config,
    load_tokenizer,
    locate,
)
from lensbench.results.folder import claimed, write_csv
from lensbench.results.manifest import write_manifest
from lensbench.run.studies import code_facts
from lensbench.runtime.files import sha256
from lensbench.runtime.progress import QUIET, Progress
from lensbench.statistics import bootstrap_weights, few_clusters, ratio_with_interval
from lensbench.streams.capture import capture
from lensbench.streams.kl import sums_of_all
from lensbench.streams.stream import ResidualStream

TABLE = "lens_comparison.csv"

DIGITS = {"float16": "three", "bfloat16": "two"}
"""Short types of files -> decimal digits of their entries"""

QUANTITIES = ("kl", "ce", *TOP)


@dataclass(frozen=True)
class LensComparison:
    """What is compared: lens files, and how many tokens our own lenses are fitted to and all are measured on."""

    files: tuple[str, ...]
    """``FILE.pt`` or ``hub:OWNER/NAME/FILE.pt`` of a Jacobian lens; ``path:FOLDER`` or ``hub:RESOURCE`` of a tuned lens"""
    corpus: str = "stdlib"
    length: int = 128
    sequences: int = 64
    """Held-out windows"""
    positions: int = 16
    fit_sequences: int = 96
    """Windows that our own lenses are fitted to; 0: none are"""
    prompts: int = 0
    """Prompts of our own Jacobian lens; 0: it is not estimated"""
    refine_passes: int = 0
    seed: int = 0
    max_bytes: int | None = 20_000_000
    draws: int = 1000

    @property
    def fit(self) -> FitRecipe:
        """How our own lenses are fitted."""
        return FitRecipe(
            sequences=max(1, self.fit_sequences), positions=32, dev_sequences=64, dev_positions=8, rotations=1, refits=0,
            ridges=(1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0), pooled_dev_tokens=2048, refine_passes=self.refine_passes,
            lenses=("jacobian", "shared_jacobian") if self.prompts else (),
            jacobian=JacobianRecipe(prompts=max(2, self.prompts), rows=8),
        )  # fmt: skip


@dataclass(frozen=True)
class ReadLens:
    """One lens as it is compared: maps of some layers, and what it says of itself."""

    name: str
    source: str
    """The file; empty for one of our own"""
    kind: str
    stage: str
    maps: dict[int, AffineMaps]
    """Layer -> one map"""
    note: str = ""


@dataclass
class Comparison:
    """What was compared: the table, and what a user has to know of the lenses."""

    table: pd.DataFrame
    notes: list[str]


def file_lens(source: str, stream: ResidualStream, model: str, commit: str = "") -> ReadLens:
    """A lens of others, checked against the model; raises :class:`LensbenchError` for one of another model."""
    path = jacobian_path(source)
    if path is None:
        tuned = maps_of(load_tuned_lens(stream.readout, tuned_source(source)))
        if tuned.offset.shape != (stream.layers, stream.d_model):
            raise LensbenchError(
                f"{source}: the lens has {len(tuned)} layers of width {tuned.offset.shape[1]}, the model {stream.layers} of "
                f"{stream.d_model}"
            )
        name = Path(source.partition(":")[2] or source).name
        return ReadLens(name, source, "tuned", "loaded", {k: tuned[[k]] for k in range(len(tuned))})
    found = read_jacobian(source)
    unsure = found.check(stream.layers, stream.d_model, model, commit)
    missing = [layer for layer in range(stream.layers) if layer not in found.matrices]
    note = f"{source}: mean over {found.prompts} prompts, stored in {found.dtype}"
    if found.dtype in DIGITS:
        note += f", {DIGITS[found.dtype]} digits"
    if missing:
        note += f"; without layer{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    note += f"; {unsure}" if unsure else ""
    maps = {layer: linear(matrix[None]) for layer, matrix in found.matrices.items()}
    return ReadLens(path.stem, source, "jacobian", "loaded", maps, note)


def fitted_lens(lens: FittedLens, context: FitContext) -> ReadLens:
    """A lens of our own, as one map for each layer that it reads."""
    maps = {}
    for number, own in enumerate(lens.reads):
        plain = lens.to_plain(number, context.views)
        for k, layer in enumerate(own):
            maps[layer] = plain[[k if len(plain) > 1 else 0]]
    name = lens.id.kind + (" refined" if lens.id.stage == "refined" else "")
    facts, note = lens.record.jacobian, ""
    if facts is not None:
        note = f"our {name} lens: {facts.method}, {facts.prompts} prompts"
        if errors := facts.relative_error:
            note += f", relative standard error {min(errors):.2g} to {max(errors):.2g} over layers"
    if lens.id.view >= 0:
        name += ", random bases"
    return ReadLens(name, "", lens.id.kind, lens.id.stage, maps, note)


def text_of(source: str, recipe: LensComparison) -> Texts:
    """The text in the tokens of the model of ``source``, which is not loaded; of its files, the tokenizer is.

    A model that was trained elsewhere is fitted on the train split, too. Raises :class:`LensbenchError` for a lens that is
    missing, and for a text that is empty, or too short for a window of each split that is read.
    """
    for lens in recipe.files:
        if jacobian_path(lens) is None:
            lens_files(tuned_source(lens))
    check_context(source, load_config(source), recipe.length, "set --length to {} or less")
    fractions = {**FRACTIONS, "train": 0.0, "fit": FRACTIONS["train"] + FRACTIONS["fit"]}
    trained_here = locate(source).own_tokenizer is not None
    corpus = load_corpus(recipe.corpus, fractions=FRACTIONS if trained_here else fractions, max_bytes=recipe.max_bytes)
    texts = Texts(corpus, source, "", lambda: load_tokenizer(source), recipe.length, 1, "auto")
    try:
        held_out(texts, recipe)
        if recipe.fit_sequences:
            texts.samples(**recipe.fit.of_fit)
            texts.samples(**recipe.fit.of_dev)
    except LensbenchError as error:
        raise LensbenchError(f"{recipe.corpus} is too short: {error}; give a longer text with --corpus") from error
    return texts


def held_out(texts: Texts, recipe: LensComparison) -> Windows:
    """The windows that all lenses are measured on."""
    return texts.samples("eval", recipe.sequences, recipe.positions, share=DOCUMENT_SHARE)


def tuned_source(source: str) -> str:
    """A tuned lens as ``path:FOLDER`` or ``hub:RESOURCE``; ``path:`` may be left out on the command line."""
    return source if source.partition(":")[0] in ("path", "hub") else f"path:{source}"


@dataclass(frozen=True)
class Comparing:
    """A comparison at work: the model, its text, and the settings."""

    model: Pretrained
    recipe: LensComparison
    texts: Texts
    """The text in the model's tokens"""
    progress: Progress = QUIET

    @cached_property
    def stream(self) -> ResidualStream:
        """The model's stream."""
        return ResidualStream(self.model.model)

    @cached_property
    def commit(self) -> str:
        """The commit of a model of the hub; empty for others."""
        source = self.model.source
        return commit_of(identity(source)) if source.startswith("hub:") else ""

    def own(self, folder: Path) -> Iterator[ReadLens]:
        """The logit lens, and our own lenses where they are fitted; our Jacobian lens is left in ``folder``."""
        recipe, stream, layers = self.recipe, self.stream, range(self.stream.layers)
        identity = AffineMaps.identity(stream.d_model)
        yield ReadLens("logit", "", "logit", "none", dict.fromkeys(layers, identity))
        if not recipe.fit_sequences:
            return
        how = recipe.fit
        windows = self.texts.samples(**how.of_fit)
        found = capture(stream, windows, memory_gib=how.memory_gib)
        dev = capture(stream, self.texts.samples(**how.of_dev), constant=found.mean_p)
        source = JacobianSource(stream, windows, how.jacobian, recipe.seed) if how.lenses else None
        context = FitContext.of(
            stream.readout, found, dev, how, seed=recipe.seed, jacobians=source, progress=self.progress
        )
        wanted: list[LensId] = [OWN, SHARED_LENS, SHARED_LENS.of_view(0)]
        wanted += [OWN_REFINED, SHARED_REFINED] if how.refine_passes else []
        if how.lenses:
            wanted += [JACOBIAN_LENS, SHARED_JACOBIAN_LENS, SHARED_JACOBIAN_LOO_LENS, SHARED_JACOBIAN_LENS.of_view(0)]
        lenses = fit_some(context, wanted)
        if (ours := lenses.get(JACOBIAN_LENS)) is not None and ours.record.jacobian is not None:
            path = folder / "jacobian_lens.pt"
            facts, name = ours.record.jacobian, self.model.source
            write_jacobian(path, ours.maps.matrix, facts, model=name, commit=self.commit)
        for lens in lenses.values():
            yield fitted_lens(lens, context)

    @torch.no_grad()
    def rows(self, lenses: Sequence[ReadLens]) -> Iterator[dict[str, Any]]:
        """A row for each lens and layer: means over held-out tokens with intervals over clusters of documents."""
        recipe, stream = self.recipe, self.stream
        samples = held_out(self.texts, recipe)
        captured = capture(stream, samples)
        _, cluster = np.unique(samples.clusters, return_inverse=True)

        def summed(values: torch.Tensor) -> NDArray[np.float64]:
            return np.bincount(cluster, sums_of_all(values.float(), captured)).astype(float)

        tokens = summed(torch.ones(len(captured)))
        weights = bootstrap_weights(len(tokens), recipe.draws, 0)
        with self.progress.task("score", stream.layers, "layers") as shown:
            for layer in range(stream.layers):
                h, logit = captured.states[layer], None
                for lens in (lens for lens in lenses if layer in lens.maps):
                    maps = lens.maps[layer].to(h)
                    found = score(stream.readout, h, maps, captured)
                    ranks = top_word_ranks(stream.readout, h, maps, 0, captured)
                    sums = {"kl": found.kl[0], "ce": found.ce[0]}
                    sums |= {precision: ranks < most for precision, most in TOP.items()}
                    by = {name: summed(values) for name, values in sums.items()}
                    logit = by["kl"] if lens.kind == "logit" else logit
                    assert logit is not None
                    row = {
                        "lens": lens.name,
                        "source": lens.source,
                        "kind": lens.kind,
                        "stage": lens.stage,
                        "layer": layer,
                    }
                    for name, values in (*by.items(), ("kl_minus_logit", by["kl"] - logit)):
                        low, mean, high = ratio_with_interval(values, tokens, weights)
                        row |= {name: float(mean), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
                    yield row | {"scored_tokens": int(tokens.sum()), "clusters": len(tokens)}
                shown.update(layer + 1)


def distinct(lenses: Sequence[ReadLens]) -> list[ReadLens]:
    """Lenses whose names differ: of two files of one name the second has its number."""
    seen: dict[str, int] = {}
    named = []
    for lens in lenses:
        count = seen[lens.name] = seen.get(lens.name, 0) + 1
        named.append(lens if count == 1 else ReadLens(**{**vars(lens), "name": f"{lens.name} {count}"}))
    return named


def compare_lenses(
    model: Pretrained, recipe: LensComparison, texts: Texts, folder: Path, *, progress: Progress = QUIET
) -> Comparison:
    """Lens files and our own lenses at every layer of a model, written to ``lens_comparison.csv`` with its manifest.

    ``texts`` are those of :func:`text_of`. Files are read and checked before anything is computed. Raises
    :class:`LensbenchError` for a file that is not a lens or belongs to another model, and for a folder that holds
    something else.
    """
    texts.within(model.model)
    comparing = Comparing(model, recipe, texts, progress)
    given = [file_lens(source, comparing.stream, model.source, comparing.commit) for source in recipe.files]
    with claimed(folder, "compare-lenses"):
        lenses = distinct([*comparing.own(folder), *given])
        table = pd.DataFrame(list(comparing.rows(lenses)))
        order = {lens.name: k for k, lens in enumerate(lenses)}
        table = table.sort_values(["lens", "layer"], key=lambda c: c.map(order) if c.name == "lens" else c)
        write_csv(folder / TABLE, table)
        manifest = {"lens_comparison": asdict(recipe), "suite_name": "compare-lenses", "model": model.source}
        files = {name: sha256(folder / name) for name in (TABLE, "jacobian_lens.pt") if (folder / name).is_file()}
        manifest |= {**code_facts(), "files": files}
        manifest["lenses"] = {str(k): sha256(path) for k in recipe.files if (path := jacobian_path(k)) is not None}
        write_manifest(folder, manifest)
    notes = [lens.note for lens in lenses if lens.note]
    notes += [few] if (few := few_clusters(float(table["clusters"].iloc[0]))) else []
    return Comparison(table, notes)
