"""A model's lenses and their tables in a few lines of Python, without a run folder.

The functions are those that a suite calls: every number is the one that a run writes for the same tokens.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lensbench.data.corpus import FRACTIONS, clusters_of, load_corpus
from lensbench.data.inputs import Texts
from lensbench.data.tokens import BeginSetting
from lensbench.data.windows import DOCUMENT_SHARE, Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit
from lensbench.lenses.fit import fit as fit_lenses
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.evaluate import evaluate as evaluate_lenses
from lensbench.measures.transfer import transfer_sums
from lensbench.measures.update import UpdateRecipe, UpdateResult, UpdateRule
from lensbench.measures.update.measure import in_clusters, measure_updates
from lensbench.models import count_parameters
from lensbench.models.pretrained import Pretrained, check_context, load_pretrained
from lensbench.report.figures.blocks import frame_of
from lensbench.report.figures.profile import profile_over_depth
from lensbench.report.figures.style import style
from lensbench.report.figures.transfer import transfer_penalty
from lensbench.results import folder, tables
from lensbench.results.folder import Run
from lensbench.results.matrix import matrix_rows
from lensbench.results.schema import OF_UPDATES, no_rows
from lensbench.results.sums import MatrixSums
from lensbench.results.tables import Part
from lensbench.results.updates import Updates
from lensbench.runtime.bars import Bars
from lensbench.runtime.environment import choose_device, dtype_named
from lensbench.runtime.progress import QUIET, Progress
from lensbench.statistics import bootstrap_weights
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream

__all__ = [
    "Lenses",
    "UpdateRecipe",
    "UpdateRule",
    "Updates",
    "decompose",
    "evaluate",
    "fit",
    "load",
    "plot",
    "plot_profile",
    "read_run",
    "transfer_matrix",
]

QUICK = FitRecipe(sequences=256, positions=16, dev_sequences=128, refits=2, refine_passes=6)
"""What lenses are fitted by where nobody says otherwise"""

UPDATE, RULE = UpdateRecipe(), UpdateRule()
"""The decomposition and its rule of a suite that sets nothing"""


def load(source: str, *, dtype: str = "float32", device: str = "auto") -> Pretrained:
    """A causal language model with its tokenizer: hub:ORG/NAME, path:FOLDER, gguf:FILE or package:NAME.

    Raises :class:`LensbenchError` for a source that cannot be read.
    """
    return load_pretrained(source, dtype=dtype_named(dtype), device=choose_device(device))


@dataclass(frozen=True, repr=False)
class Lenses:
    """Lenses that :func:`fit` fitted to a model, with the text whose eval split they are evaluated on."""

    name: str
    """Of the model, in tables and figures"""
    stream: ResidualStream
    fitted: Fit
    """Every lens by its id, with its maps and what dev chose"""
    texts: Texts
    recipe: FitRecipe
    seed: int

    def __repr__(self) -> str:
        """One line."""
        kinds = len(self.fitted.lenses)
        stream = self.stream
        return (
            f"Lenses({self.name!r}, {stream.layers} layers of width {stream.d_model}, {kinds} fits, seed {self.seed})"
        )

    def held_out(self, sequences: int, positions: int) -> tuple[Windows, Capture]:
        """Windows of the eval split, and what the model's stream holds at their scored positions."""
        samples = self.texts.samples("eval", sequences, positions, share=DOCUMENT_SHARE)
        return samples, capture(self.stream, samples, constant=self.fitted.constant)


def shown(progress: bool) -> AbstractContextManager[Progress]:
    """Bars while a ``with`` block runs on a terminal; nothing elsewhere, or without ``progress``."""
    bars = Bars()
    return bars if progress and bars.live else nullcontext(QUIET)


def fit(
    model: Pretrained,
    text: str = "stdlib",
    *,
    length: int = 128,
    recipe: FitRecipe | None = None,
    view: str = "state",
    seed: int = 0,
    max_bytes: int | None = 20_000_000,
    begin: BeginSetting = "auto",
    fractions: Mapping[str, float] | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Lenses:
    """Per-layer lenses, one shared lens, their leave-one-out fits, pairs and nulls, on the fit split of a text.

    ``text``: stdlib, file:PATH or hf:NAME, in windows of ``length`` tokens. ``fractions``: shares of the splits; by default
    those of a suite, and a model that was trained elsewhere is fitted on the train split, too. ``view``: as of
    :class:`ResidualStream`. ``begin``: the windows that begin with the model's beginning-of-text token, as
    ``evaluate.begin`` of a suite. ``name``: of the model, in place of the end of its source. ``progress``: a bar on a
    terminal. Raises :class:`LensbenchError` for a text or model that cannot be read.
    """
    stream, texts = _read(model, text, length, view, max_bytes, begin, fractions)
    if stream.layers < 2:
        raise LensbenchError(f"{model.source} has one layer: there is nothing to transfer a lens to")
    recipe = recipe or QUICK
    with shown(progress) as to:
        found = capture(stream, texts.samples(**recipe.of_fit), memory_gib=recipe.memory_gib)
        dev = capture(stream, texts.samples(**recipe.of_dev), constant=found.mean_p)
        fitted = fit_lenses(FitContext.of(stream.readout, found, dev, recipe, seed=seed, progress=to))
    return Lenses(name or _name_of(model), stream, fitted, texts, recipe, seed)


def _read(
    model: Pretrained,
    text: str,
    length: int,
    view: str,
    max_bytes: int | None,
    begin: BeginSetting,
    fractions: Mapping[str, float] | None,
) -> tuple[ResidualStream, Texts]:
    """The stream of a model, and a text in its tokens; see :func:`fit`."""
    if fractions is None:
        fractions = {**FRACTIONS, "train": 0.0, "fit": FRACTIONS["train"] + FRACTIONS["fit"]}
        if model.trained_here:
            fractions = FRACTIONS
    check_context(model.source, model.model.config, length, "set length to {} or less")
    read = load_corpus(text, fractions=fractions, max_bytes=max_bytes)
    texts = Texts(read, model.source, "", lambda: model.tokenizer, length, 1, begin)
    texts.within(model.model)
    return ResidualStream(model.model, view), texts


def _name_of(model: Pretrained) -> str:
    return model.source.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def decompose(
    model: Pretrained,
    text: str = "stdlib",
    *,
    length: int = 128,
    recipe: FitRecipe | None = None,
    update: UpdateRecipe = UPDATE,
    rule: UpdateRule = RULE,
    sequences: int = 256,
    positions: int = 16,
    view: str = "state",
    seed: int = 0,
    max_bytes: int | None = 20_000_000,
    begin: BeginSetting = "auto",
    fractions: Mapping[str, float] | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Updates:
    """The update decomposition of a model: of what later layers add to the prediction, how much shows where it was kept.

    The first numbers of a run, and their verdict, without the lenses of :func:`fit`. ``recipe``: tokens, ridges and the
    tolerance of the lenses that it fits. ``update``: its own settings; ``UpdateRecipe(landmarks=False)`` leaves out the
    landmarks made of the model's own states. ``rule``: what the verdict is made by. ``sequences`` windows of the eval split
    with ``positions`` tokens each are measured on. The others are those of :func:`fit`. Where the decomposition is
    undefined (a norm that is no gain over a scale, a single layer) the verdict is undetermined and its sentence says why.

    Raises :class:`LensbenchError` for a text or model that cannot be read.
    """
    stream, texts = _read(model, text, length, view, max_bytes, begin, fractions)
    who = name or _name_of(model)
    with shown(progress) as to:
        windows = texts.samples("eval", sequences, positions, share=DOCUMENT_SHARE)
        found = _updates(stream, texts, windows, recipe or QUICK, update, name=who, seed=seed, progress=to)
    return Updates(who, seed, stream.layers, found, rule)


def _updates(
    stream: ResidualStream,
    texts: Texts,
    windows: Windows,
    recipe: FitRecipe,
    settings: UpdateRecipe,
    *,
    name: str,
    seed: int,
    progress: Progress,
) -> UpdateResult:
    """The decomposition as it is measured on ``windows`` of the eval split."""
    on_fit = texts.samples(**recipe.of_fit)
    fitted_to = capture(stream, on_fit, memory_gib=recipe.memory_gib)
    dev, held_out = (
        in_clusters(capture(stream, samples, constant=fitted_to.mean_p), samples)
        for samples in (texts.samples(**recipe.of_dev), windows)
    )
    return measure_updates(
        stream.readout, in_clusters(fitted_to, on_fit), dev, held_out, recipe, settings,
        name=name, seed=seed, progress=progress,
    )  # fmt: skip


def evaluate(
    lenses: Lenses,
    *,
    sequences: int = 256,
    positions: int = 16,
    draws: int = 1000,
    update: UpdateRecipe | bool = True,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Every lens on every layer of held-out text: the tables of a run (``transfer.csv``, ``indices.csv``, ...) by name.

    ``sequences`` windows with ``positions`` scored tokens each. Columns are described in
    :data:`lensbench.results.schema.SCHEMA`; losses are in nats/token, intervals from ``draws`` resamples of documents.
    ``update``: whether updates are decomposed, too, as by default in a suite: the headline number and its verdict are from
    there, and it takes about as long as :func:`fit`; or the settings to do so by. :func:`decompose` does nothing else.
    """
    stream = lenses.stream
    samples, captured = lenses.held_out(sequences, positions)
    updates = None
    with shown(progress) as to:
        evaluated = evaluate_lenses(stream.readout, captured, lenses.fitted, progress=to)
        if update:
            how = UPDATE if update is True else update
            updates = _updates(
                stream, lenses.texts, samples, lenses.recipe, how, name=lenses.name, seed=lenses.seed, progress=to
            )
    frame = evaluated.frame(samples, model=lenses.name, seed=lenses.seed)
    facts: dict[str, Any] = {
        "family": stream.model.config.model_type,
        "source": lenses.texts.name,
        "weights": None,
        "dtype": str(stream.model.dtype).removeprefix("torch."),
        "train_tokens": np.nan,
        "parameters": count_parameters(stream.model),
        "layers": stream.layers,
        "d_model": stream.d_model,
        "vocab_size": stream.vocab_size,
        **lenses.texts.beginning.facts,
    }
    clusters = clusters_of(frame["document"].astype(str).unique())
    fitted = lenses.fitted.summary
    part = Part(lenses.name, lenses.seed, frame, facts, fitted, evaluated.refits, (), None, clusters, updates)
    return tables.tables([part], draws=draws)


@torch.no_grad()
def transfer_matrix(lenses: Lenses, *, sequences: int = 256, positions: int = 16, draws: int = 1000) -> pd.DataFrame:
    """The transfer matrix as a tidy frame: a row for each lens and layer, nats/token, with intervals (``transfer.csv``).

    Nothing else is computed: shared lenses, nulls and refits are left to :func:`evaluate`, whose numbers these are.
    """
    samples, captured = lenses.held_out(sequences, positions)
    sums = transfer_sums(lenses.stream.readout, captured, lenses.fitted.headline.maps)
    names = np.array(samples.document_names, dtype=object)[samples.documents]
    of = clusters_of(names)
    _, cluster = np.unique([of[name] for name in names], return_inverse=True)

    def by_cluster(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros((cluster.max() + 1, *values.shape[1:]))
        np.add.at(total, cluster, values)
        return total

    tokens = by_cluster(np.bincount(captured.window, minlength=len(names)).astype(float))
    # Rows of a run hold sums by window in float32: the same numbers need the same rounding.
    rounded = (getattr(sums, name).astype(np.float32).astype(float) for name in ("kl", "ce", "movement", "top1"))
    matrix = MatrixSums(*map(by_cluster, rounded))
    rows = matrix_rows(lenses.fitted.summary, matrix, tokens, bootstrap_weights(len(tokens), draws, 0))
    who = {"model": lenses.name, "seed": lenses.seed}
    return pd.DataFrame([who | row for row in rows])


def read_run(path: str | Path) -> Run:
    """A finished run folder: its tables by name, checked against the manifest.

    Raises :class:`LensbenchError` for a folder that holds no finished run, or one whose files were changed.
    """
    return folder.read_run(Path(path))


def plot(cells: pd.DataFrame) -> Figure:
    """Heatmaps of transfer penalties, one for each model of :func:`transfer_matrix`'s frame.

    Frames of several models are put together with :func:`pandas.concat`.
    """
    with style():
        return transfer_penalty(cells[cells["penalty_ce"].notna()])


def plot_profile(found: Run | Updates | Mapping[str, pd.DataFrame]) -> Figure:
    """The profile over depth: what each block keeps, adds in place, adds elsewhere and brings.

    Of what :func:`decompose` found, of the tables of :func:`evaluate`, or of a run that :func:`read_run` read. Raises
    :class:`LensbenchError` where no model was decomposed.
    """
    given = found if isinstance(found, Mapping) else found.tables
    frame = frame_of({name: no_rows(name) for name in OF_UPDATES} | dict(given))
    if frame.empty:
        if isinstance(found, Updates):
            raise LensbenchError(f"there is no block of {found.name} to draw: {found.result.reason}")
        where = f"{found.folder} has" if isinstance(found, Run) else "the tables have"
        raise LensbenchError(f"{where} no row in blocks.csv: run its suite with the update decomposition")
    with style():
        return profile_over_depth(frame)
