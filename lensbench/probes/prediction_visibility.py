"""Is what a model had predicted of a token still visible in its stream at that token?"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import RIDGES, Estimates, Jackknifed, cross_fitted, in_folds
from lensbench.probes.tools.predictions import BigramPredictions, Constant, Directions, MeansByToken, after, batches
from lensbench.statistics import Array, few_clusters

FIRST = 2
"""First position looked at: it needs a prediction, made at a position that has a token before it."""


@probe
@torch.no_grad()
def prediction_visibility(subject: Subject) -> Jackknifed:
    """Per layer l: share of the variance of ``ebar_{s-1}``, and of the surprise at s, that ``h_l[s]`` tells linearly.

    Cross-fitted ridge regressions, all on the same tokens. The baseline knows the token at s and the one before it (their
    input embeddings), the expectation and surprise of an interpolated bigram (Kneser-Ney, train split), and the means of
    what the model itself predicted of the same token and of the same pair of tokens (fit split, interpolated). What a
    function of these two tokens can tell is no prediction that the stream keeps.

    ``prediction_baseline_r2``, and per layer ``prediction_r2`` with the state beside the baseline, ``prediction_gain`` the
    difference and ``prediction_gain_of_rest`` the share of what the baseline leaves; the same four of ``surprise``.
    ``expectation_r2`` is that of what is predicted *next*, ``ebar_s``, from baseline and state together: how much can be
    seen at all. ``prediction_directions`` is the share of the unembedding's variance in the directions that expectations are
    seen in.
    """
    name = "prediction_visibility"
    if subject.rotated:
        # An own rotation changes no regression from the state.
        return Jackknifed(name, reason="the same as in the view that is not rotated, whose states it turns")
    stream = subject.stream
    directions = Directions.of(stream, subject.words.fit_windows)
    means = _means(subject, directions)
    bigram = BigramPredictions(subject.words.bigram(), directions)
    windows, fold = in_folds(subject.windows)
    if fold.max() < 2:
        return Jackknifed(name, reason="its windows come from fewer than three documents: nothing to cross-fit on")
    embedding = stream.model.get_input_embeddings()
    sums: VisibilitySums | None = None
    constant = Constant()
    for batch in batches(stream, windows, directions, report=partial(subject.report, name)):
        constant.add(batch)
        ids, previous = batch.ids, after(batch.ids)
        targets = torch.cat([after(batch.expected), batch.surprise[..., None], batch.expected], -1)
        tokens = [embedding(x.to(stream.input_device)).float().to(ids.device) for x in (ids, previous)]
        bigrams = [bigram.expected[previous], bigram.surprise(ids)[..., None]]
        known = torch.cat([*tokens, *bigrams, means.at(ids, previous)], -1)
        looked = batch.inside.clone()
        looked[:, :FIRST] = False
        if sums is None:
            sums = VisibilitySums(int(fold.max()) + 1, stream.layers + 1, known.shape[-1], targets.shape[-1])
        for k in np.unique(fold[batch.rows]):
            chosen = looked & torch.from_numpy(fold[batch.rows] == k).to(looked.device)[:, None]
            sums.add(int(k), known[chosen], targets[chosen], batch.states[:, chosen])
    assert sums is not None
    warning = constant.warning() or few_clusters(len(np.unique(windows.clusters)))
    found = Estimates(name, sums.folds, warning)
    found.add("prediction_directions", directions.share)
    rank = directions.rows.shape[1]
    parts = {"prediction": slice(0, rank), "surprise": slice(rank, rank + 1), "expectation": slice(rank + 1, None)}
    base, total = sums.cross_fitted(None)
    for what in ("prediction", "surprise"):
        top, bottom = (total - base)[:, parts[what]].sum(1), total[:, parts[what]].sum(1)
        found.share(f"{what}_baseline_r2", top, bottom)
    for layer in range(stream.layers + 1):
        full, _ = sums.cross_fitted(layer)
        for what in ("prediction", "surprise"):
            b, f, t = (x[:, parts[what]].sum(1) for x in (base, full, total))
            found.share(f"{what}_r2", t - f, t, layer=layer)
            found.share(f"{what}_gain", b - f, t, layer=layer)
            found.share(f"{what}_gain_of_rest", b - f, b, layer=layer)
        f, t = (x[:, parts["expectation"]].sum(1) for x in (full, total))
        found.share("expectation_r2", t - f, t, layer=layer)
    return found.done()


def _means(subject: Subject, directions: Directions) -> MeansByToken:
    """Of the fit split's tokens: what the model had predicted of them."""
    ids, previous, values = [], [], []
    for batch in batches(
        subject.stream,
        subject.words.fit_windows,
        directions,
        report=partial(subject.report, "prediction_visibility-means"),
    ):
        looked = batch.inside.clone()
        looked[:, :FIRST] = False
        ids.append(batch.ids[looked])
        previous.append(after(batch.ids)[looked])
        values.append(torch.cat([after(batch.expected), batch.surprise[..., None]], -1)[looked])
    return MeansByToken.of(torch.cat(ids), torch.cat(previous), torch.cat(values), subject.stream.vocab_size)


class VisibilitySums:
    """Second moments by fold of ``[1, baseline, targets]``, of these with every layer's state, and of each state alone.

    The baseline's are the same for all layers and kept once. float64; columns are shifted and scaled by the first tokens'.
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
        """n tokens: ``[n, B]``, ``[n, O]`` and ``[L+1, n, d]``."""
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

    def cross_fitted(self, layer: int | None) -> tuple[Array, Array]:
        """Held-out squared errors and totals ``[K, O]`` from the baseline, with the state of a layer if one is given."""
        known = torch.arange(1, 1 + self.known)
        outputs = torch.arange(1 + self.known, self.common.shape[-1])
        if layer is None:
            return cross_fitted(self.common, known, outputs, RIDGES)
        cross, own = self.cross[layer], self.own[layer]
        whole = torch.cat(
            [torch.cat([self.common, cross.transpose(1, 2)], 2), torch.cat([cross, own], 2)],
            1,
        )
        return cross_fitted(whole, torch.cat([known, torch.arange(self.common.shape[-1], whole.shape[-1])]), outputs)
