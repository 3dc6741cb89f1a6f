"""Is what a model had predicted of a token still visible in its stream at that token?"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lensbench.data.windows import Windows
from lensbench.probes.catalogue import SAME_TOKENIZER, Panel, Probe, Quantity
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import RIDGES, Estimates, Jackknifed, in_folds, joined_clusters, refitted
from lensbench.probes.tools.predictions import (
    BigramPredictions,
    Constant,
    Directions,
    MeansByToken,
    PredictionBatch,
    after,
    batches,
)
from lensbench.statistics import Array, effective_clusters, few_clusters

FIRST = 2
"""First position that is used: its prediction was made at a position that has a token before it"""


@torch.no_grad()
def prediction_visibility(subject: Subject) -> Jackknifed:
    """Share of the variance of ``ebar_{s-1}``, and of the surprise at s, that ``h_l[s]`` gives linearly, for every layer l.

    All are cross-fitted ridge regressions on the same tokens. The baseline knows the token at s and the one before it: their
    input embeddings, the expectation and surprise of an interpolated bigram (Kneser-Ney, train split), and the means of what
    the model itself predicted of the same token and the same pair of tokens (fit split, interpolated). What a function of
    these two tokens can give is no prediction that the stream keeps. Of tokens that are rare in the fit split the means know
    little, so a stream that holds which token came before can gain a little, though it keeps no prediction.

    Intervals are those of a jackknife that fits all maps again without each fold of documents, at the same ridges.
    """
    name = "prediction_visibility"
    if subject.rotated:
        # A rotation of each layer changes no regression from its state.
        return Jackknifed(name, reason="the same as in the view that is not rotated, whose states it turns")
    directions = Directions.of(subject.stream, subject.words.fit_windows)
    baseline = Baseline.of(subject, directions)
    windows, fold = in_folds(subject.windows)
    if fold.max() < 2:
        return Jackknifed(name, reason="its windows come from fewer than three documents: nothing to cross-fit on")
    sums, constant = _gathered(subject, directions, baseline, windows, fold)
    clusters = effective_clusters(joined_clusters(windows))
    warning = constant.warning() or few_clusters(clusters)
    found = Estimates(name, sums.folds, warning, groups=effective_clusters(fold), clusters=clusters)
    found.add("prediction_directions", directions.share)
    rank = directions.rows.shape[1]
    parts = {"prediction": slice(0, rank), "surprise": slice(rank, rank + 1), "expectation": slice(rank + 1, None)}
    base, total = sums.held_out(None)
    for what in ("prediction", "surprise"):
        top, bottom = (total - base)[..., parts[what]].sum(-1), total[..., parts[what]].sum(-1)
        found.refitted_share(f"{what}_baseline_r2", top, bottom)
    for layer in range(subject.stream.layers + 1):
        full, _ = sums.held_out(layer)
        for what in ("prediction", "surprise"):
            b, f, t = (x[..., parts[what]].sum(-1) for x in (base, full, total))
            found.refitted_share(f"{what}_r2", t - f, t, layer=layer)
            found.refitted_share(f"{what}_gain", b - f, t, layer=layer)
            found.refitted_share(f"{what}_gain_of_rest", b - f, b, layer=layer)
        f, t = (x[..., parts["expectation"]].sum(-1) for x in (full, total))
        found.refitted_share("expectation_r2", t - f, t, layer=layer)
    return found.done()


def used(batch: PredictionBatch) -> Tensor:
    """Whether a position of a batch is used ``[B, T]``: a token, from position :data:`FIRST` on."""
    inside = batch.inside.clone()
    inside[:, :FIRST] = False
    return inside


@dataclass(frozen=True)
class Baseline:
    """What two tokens tell of a prediction: their embeddings, a bigram, and means of the model's own predictions."""

    embedding: nn.Module
    device: torch.device
    bigram: BigramPredictions
    means: MeansByToken

    @classmethod
    def of(cls, subject: Subject, directions: Directions) -> "Baseline":
        """Means from the fit split, the bigram from the train split."""
        stream, windows = subject.stream, subject.words.fit_windows
        ids, previous, values = [], [], []
        with subject.task("prediction_visibility-means", windows) as task:
            for batch in batches(stream, windows, directions, task=task):
                chosen = used(batch)
                ids.append(batch.ids[chosen])
                previous.append(after(batch.ids)[chosen])
                values.append(torch.cat([after(batch.expected), batch.surprise[..., None]], -1)[chosen])
        means = MeansByToken.of(torch.cat(ids), torch.cat(previous), torch.cat(values), stream.vocab_size)
        bigram = BigramPredictions(subject.words.bigram(), directions)
        return cls(stream.model.get_input_embeddings(), stream.input_device, bigram, means)

    def inputs(self, ids: Tensor) -> Tensor:
        """The inputs ``[B, T, I]`` of the baseline's regression for tokens ``[B, T]``."""
        previous = after(ids)
        tokens = [self.embedding(x.to(self.device)).float().to(ids.device) for x in (ids, previous)]
        bigrams = [self.bigram.expected[previous], self.bigram.surprise(ids)[..., None]]
        return torch.cat([*tokens, *bigrams, self.means.at(ids, previous)], -1)


def _gathered(
    subject: Subject, directions: Directions, baseline: Baseline, windows: Windows, fold: NDArray[np.int64]
) -> "tuple[VisibilitySums, Constant]":
    """The sums of all regressions from one pass over the windows, of which ``fold`` ``[S]`` names the folds."""
    stream, constant = subject.stream, Constant()
    sums: VisibilitySums | None = None
    with subject.task("prediction_visibility", windows) as task:
        for batch in batches(stream, windows, directions, task=task):
            constant.add(batch)
            targets = torch.cat([after(batch.expected), batch.surprise[..., None], batch.expected], -1)
            known, looked = baseline.inputs(batch.ids), used(batch)
            if sums is None:
                sums = VisibilitySums(int(fold.max()) + 1, stream.layers + 1, known.shape[-1], targets.shape[-1])
            for k in np.unique(fold[batch.rows]):
                chosen = looked & torch.from_numpy(fold[batch.rows] == k).to(looked.device)[:, None]
                sums.add(int(k), known[chosen], targets[chosen], batch.states[:, chosen])
    assert sums is not None
    return sums, constant


class VisibilitySums:
    """Second moments by fold, float64: of ``[1, baseline, targets]``, of these with every layer's state, of each state.

    Those of baseline and targets are the same for all layers and kept once. Columns are shifted and scaled by mean and
    spread of the first tokens.
    """

    def __init__(self, folds: int, layers: int, known: int, targets: int):
        self.folds, self.known, self.targets = folds, known, targets
        self.common = torch.zeros(folds, 1 + known + targets, 1 + known + targets, dtype=torch.float64)
        self.cross: list[Tensor] = []
        self.own: list[Tensor] = []
        self.layers = layers
        self._common: tuple[Tensor, Tensor] | None = None
        self._states: tuple[Tensor, Tensor] | None = None

    def add(self, fold: int, known: Tensor, targets: Tensor, states: Tensor) -> None:
        """Add n tokens to a fold: inputs of the baseline ``[n, I]``, targets ``[n, O]`` and states ``[L+1, n, d]``."""
        if not len(known):
            return  # windows of one or two tokens
        known, targets = known.double().cpu(), targets.double().cpu()
        if self._common is None:
            spread = torch.cat([known.std(0), torch.ones(self.targets, dtype=torch.float64)])
            self._common = torch.cat([known.mean(0), targets.mean(0)]), torch.where(spread > 1e-12, spread, 1.0)
            mean, std = states.double().mean(1).cpu(), states.double().std(1).cpu()
            self._states = mean, torch.where(std > 1e-12, std, 1.0)
            d = states.shape[-1]
            self.cross = [torch.zeros(self.folds, d, self.common.shape[-1], dtype=torch.float64) for _ in states]
            self.own = [torch.zeros(self.folds, d, d, dtype=torch.float64) for _ in states]
        assert self._states is not None
        both = (torch.cat([known, targets], 1) - self._common[0]) / self._common[1]
        x = torch.cat([torch.ones(len(both), 1, dtype=torch.float64), both], 1)
        self.common[fold] += x.T @ x
        for layer, state in enumerate(states):
            h = (state.double().cpu() - self._states[0][layer]) / self._states[1][layer]
            self.cross[layer][fold] += h.T @ x
            self.own[layer][fold] += h.T @ h

    def held_out(self, layer: int | None) -> tuple[Array, Array]:
        """Held-out squared errors and totals ``[K, K, O]`` of the baseline, or of baseline and state of a layer.

        Those of fold j by maps fitted without j and k, see :func:`refitted`.
        """
        known = torch.arange(1, 1 + self.known)
        outputs = torch.arange(1 + self.known, self.common.shape[-1])
        # Directions of one prediction share a ridge; the surprise, which is a number, has its own.
        rank = self.targets // 2
        together = [0] * rank + [1] + [2] * rank
        if layer is None:
            return refitted(self.common, known, outputs, RIDGES, together)
        cross, own = self.cross[layer], self.own[layer]
        whole = torch.cat([torch.cat([self.common, cross.transpose(1, 2)], 2), torch.cat([cross, own], 2)], 1)
        inputs = torch.cat([known, torch.arange(self.common.shape[-1], whole.shape[-1])])
        return refitted(whole, inputs, outputs, RIDGES, together)


PREDICTION_VISIBILITY = Probe(
    "prediction_visibility",
    prediction_visibility,
    "per layer, R^2 of what had been predicted of a token, and of its surprise, from the stream at that token",
    (
        Quantity(
            "prediction_baseline_r2",
            "last prediction, R^2 of the baseline",
            "R^2 of `ebar_{s-1}` from the baseline",
            "model",
            "It is what the two tokens tell of the prediction without the stream.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "surprise_baseline_r2",
            "surprise, R^2 of the baseline",
            "R^2 of the surprise at s from the baseline",
            "model",
            "It is what the two tokens tell of the surprise without the stream.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "prediction_directions",
            "variance in the directions looked at",
            "share of the unembedding's variance in the directions in which expectations are seen",
            "model",
            "Near 1, the directions miss little of what is predicted.",
            SAME_TOKENIZER,
            "models",
        ),
        Quantity(
            "prediction_r2",
            "last prediction, R^2",
            "R^2 of `ebar_{s-1}` from baseline and state at s",
            "layer",
            "Read it against the baseline's.",
            SAME_TOKENIZER,
        ),
        Quantity(
            "prediction_gain",
            "last prediction, gain of R^2",
            "`prediction_r2` minus the baseline's",
            "layer",
            "Above 0, the stream at a token still holds what had been predicted of it.",
            SAME_TOKENIZER,
            "layers",
            Panel("layer", "gain of $R^2$: last prediction"),
        ),
        Quantity(
            "prediction_gain_of_rest",
            "the same, share of the rest",
            "`prediction_gain` as a share of what the baseline leaves",
            "layer",
            "At 1, the stream tells all that the two tokens do not.",
            SAME_TOKENIZER,
            "layers",
        ),
        Quantity(
            "surprise_r2",
            "surprise, R^2",
            "R^2 of the surprise at s from baseline and state at s",
            "layer",
            "Read it against the baseline's.",
            SAME_TOKENIZER,
        ),
        Quantity(
            "surprise_gain",
            "surprise, gain of R^2",
            "`surprise_r2` minus the baseline's",
            "layer",
            "Above 0, the stream at a token holds how surprising it was.",
            SAME_TOKENIZER,
            "layers",
            Panel("layer", "gain of $R^2$: surprise"),
        ),
        Quantity(
            "surprise_gain_of_rest",
            "surprise, share of the rest",
            "`surprise_gain` as a share of what the baseline leaves",
            "layer",
            "At 1, the stream tells all that the two tokens do not.",
            SAME_TOKENIZER,
        ),
        Quantity(
            "expectation_r2",
            "next prediction, R^2",
            "R^2 of the next expectation, `ebar_s`, from baseline and state at s together",
            "layer",
            "It says how much of an expectation can be seen at all, not what the state adds.",
            SAME_TOKENIZER,
            "layers",
        ),
    ),
    control="a baseline that knows both tokens: embeddings, bigram, means of the model's predictions. Layer 0 holds no more",
    topic="what stays visible",
    version=3,
)
