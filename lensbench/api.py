"""A model's lenses and their matrix in a few lines of Python, without a run folder.

The same functions as a suite calls: every number here is one that a run would have written of the same tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lensbench.data.corpus import FRACTIONS, clusters_of, load_corpus
from lensbench.data.inputs import Texts
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit
from lensbench.lenses.fit import fit as fit_lenses
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.evaluate import evaluate
from lensbench.models import count_parameters
from lensbench.models.pretrained import Pretrained, check_context, load_pretrained
from lensbench.report.figures.style import style
from lensbench.report.figures.transfer import transfer_penalty
from lensbench.results import tables
from lensbench.results.tables import Part
from lensbench.runtime.environment import choose_device, dtype_named
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream

__all__ = ["Lenses", "fit", "load", "measure", "plot", "transfer_matrix"]


def load(source: str, *, dtype: str = "float32", device: str = "auto") -> Pretrained:
    """A causal language model with its tokenizer: hub:ORG/NAME, path:FOLDER, gguf:FILE or package:NAME.

    Raises :class:`LensbenchError` for a source that cannot be read.
    """
    return load_pretrained(source, dtype=dtype_named(dtype), device=choose_device(device))


@dataclass(frozen=True)
class Lenses:
    """What :func:`fit` fitted to a model's stream, and the text that it may be measured on."""

    name: str
    stream: ResidualStream
    fitted: Fit
    """Every lens by its id: maps, and what dev chose"""
    texts: Texts
    seed: int


def fit(
    model: Pretrained,
    text: str = "stdlib",
    *,
    length: int = 128,
    recipe: FitRecipe | None = None,
    view: str = "state",
    seed: int = 0,
    max_bytes: int | None = 20_000_000,
    fractions: Mapping[str, float] | None = None,
) -> Lenses:
    """Per-layer lenses, one shared lens, their leave-one-out fits, pairs and nulls, on the fit split of a text.

    ``text``: stdlib, file:PATH or hf:NAME, in windows of ``length`` tokens. ``fractions`` split it; left out, what a suite
    trains models on is fitted on too, since this model was trained elsewhere. ``view``: as of :class:`ResidualStream`.
    Raises :class:`LensbenchError` for a text or model that cannot be read.
    """
    if fractions is None:
        fractions = {**FRACTIONS, "train": 0.0, "fit": FRACTIONS["train"] + FRACTIONS["fit"]}
        if model.trained_here:
            fractions = FRACTIONS
    recipe = recipe or FitRecipe(sequences=256, positions=16, dev_sequences=128, refits=2, refine_passes=6)
    check_context(model.source, model.model.config, length, "set length to {} or less")
    read = load_corpus(text, fractions=fractions, max_bytes=max_bytes)
    texts = Texts(read, model.source, "", lambda: model.tokenizer, length, 1)
    texts.within(model.model)
    stream = ResidualStream(model.model, view)
    if stream.layers < 2:
        raise LensbenchError(f"{model.source} has one layer: there is nothing to transfer a lens to")
    found = capture(stream, texts.samples("fit", recipe.sequences, recipe.positions), memory_gib=recipe.memory_gib)
    dev = capture(stream, texts.samples("dev", recipe.dev_sequences, recipe.dev_positions), constant=found.mean_p)
    name = model.source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return Lenses(name, stream, fit_lenses(FitContext.of(stream.readout, found, dev, recipe, seed=seed)), texts, seed)


def measure(lenses: Lenses, *, sequences: int = 256, positions: int = 16, draws: int = 1000) -> dict[str, pd.DataFrame]:
    """Every lens on every layer of held-out text: the tables of a run (``transfer.csv``, ``indices.csv``, ...) by name.

    Columns are described in :data:`lensbench.results.schema.SCHEMA`; losses in nats/token, intervals over documents.
    """
    stream = lenses.stream
    samples = lenses.texts.samples("eval", sequences, positions, share=0.02)
    assert isinstance(samples, Windows)
    captured = capture(stream, samples, constant=lenses.fitted.constant)
    scored = evaluate(stream.readout, captured, lenses.fitted)
    frame = scored.frame(samples, model=lenses.name, seed=lenses.seed)
    facts: dict[str, Any] = {
        "family": stream.model.config.model_type,
        "source": lenses.texts.name,
        "dtype": str(stream.model.dtype).removeprefix("torch."),
        "train_tokens": np.nan,
        "parameters": count_parameters(stream.model),
        "layers": stream.layers,
        "d_model": stream.d_model,
        "vocab_size": stream.vocab_size,
    }
    clusters = clusters_of(frame["document"].astype(str).unique())
    fitted = lenses.fitted.summary
    part = Part(lenses.name, lenses.seed, frame, facts, fitted, scored.refits, (), None, clusters)
    return tables.tables([part], draws=draws)


def transfer_matrix(lenses: Lenses, *, sequences: int = 256, positions: int = 16, draws: int = 1000) -> pd.DataFrame:
    """The transfer matrix as a tidy frame: a row for each lens and layer, nats/token, with intervals (``transfer.csv``)."""
    with torch.no_grad():
        return measure(lenses, sequences=sequences, positions=positions, draws=draws)["transfer.csv"]


def plot(cells: pd.DataFrame) -> Figure:
    """Heatmaps of transfer penalties, one for each model of :func:`transfer_matrix`'s frame (of several, put together)."""
    with style():
        return transfer_penalty(cells[cells["penalty_ce"].notna()])
