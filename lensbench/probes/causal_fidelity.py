"""Is what a lens reads used? States are moved along its directions, and the output's change held against the lens's own.

After the causal experiments of the tuned-lens paper (arXiv 2303.08112, section 4): a *stimulus* is the change of what a lens
reads at a layer, a *response* the change of the model's output that the same move makes, and they are compared as
log-ratios weighted by the model's probabilities (Aitchison geometry).
"""

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.registry import probe
from lensbench.probes.subject import Subject
from lensbench.probes.tools.crossfit import FoldSums, centred
from lensbench.probes.tools.interventions import entering
from lensbench.probes.tools.predictions import Directions, batches
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream

FIRST = 2


COVARIANCE_WINDOWS = 64


WINDOWS = 96
"""Windows at most; each gives the state behind one prefix."""


DIRECTIONS = 4
"""Directions of each kind at a layer."""


MOVES_AT_ONCE = 32


CACHED_TOLERANCE = 1e-3
"""Largest relative difference between logits of one token behind a cache and of the whole prefix."""


@probe
def causal_fidelity(subject: Subject) -> Measured:
    """Per layer l: a token's ``h_l`` is moved by one standard deviation along a direction; does the output move as read?

    Directions of the shared lens are those that move its logits most, among moves that are equally usual (of Mahalanobis
    length 1 under the layer's covariance); random ones are equally usual. ``fidelity`` is the mean cosine of stimulus
    (shared lens) and response along the lens's directions, ``fidelity_null`` that with the response to another of them,
    ``fidelity_own`` and ``fidelity_logit`` with the stimulus as the layer's own lens (headline) and the logit lens read it,
    ``fidelity_random`` (shared lens) along random directions. ``response_slope``: of response on stimulus, 1 where the
    output moves as far as was read. ``stimulus_ratio`` and ``response_ratio``: mean square along the lens's directions by
    that along random ones, as read and as answered: where the second is above 1, what the lens reads is used more than
    what else varies; where it is below the first, less than was read.
    """
    name = "causal_fidelity"
    stream, windows = subject.stream, subject.windows
    if subject.rotated:
        return Measured(name, reason="a rotated view has no states of its own to move")
    if not stream.blocks:
        return Measured(name, reason="its layers are not blocks of their own, whose inputs could be moved")
    few = windows.spread(WINDOWS)
    moves = directions(subject)  # [L, 2 D, d]: the lens's, then random ones
    kinds = moves.shape[1]
    layers = torch.arange(stream.layers).repeat_interleave(kinds)
    steps = moves.flatten(0, 1)
    shape = (len(few.ids), stream.layers, kinds)
    names = ("shared", "own", "logit", "null", "covariance", "stimulus", "response")
    scores = {name: np.zeros(shape) for name in names}
    for row, ids in enumerate(few.ids):
        last = int(few.positions[row][few.valid[row]].max())
        prefix = torch.from_numpy(ids[: last + 1])[None].to(stream.input_device)
        states, logits = stream.at(prefix, torch.zeros(1, dtype=torch.long), torch.tensor([last]))
        before = logits.float().log_softmax(-1)[0]
        p = before.exp()
        answer = responses(stream, prefix, layers, steps, before) - before  # [L K, V]
        # Of the other directions of the kind at the same layer, in turn.
        other = answer.unflatten(0, (-1, 2, kinds // 2)).roll(1, 2).flatten(0, 2)
        for start in range(0, len(layers), MOVES_AT_ONCE):
            some = slice(start, start + MOVES_AT_ONCE)
            of, h = layers[some], states[layers[some], 0].float()
            read_as = {
                "shared": stimulus(stream.readout, h, steps[some], subject.shared, torch.zeros_like(of)),
                "own": stimulus(stream.readout, h, steps[some], subject.lenses, of),
                "logit": stimulus(stream.readout, h, steps[some], None, of),
            }
            at = row, of.numpy(), (torch.arange(start, start + len(of)) % kinds).numpy()
            for what, change in read_as.items():
                covariance, left, right = aitchison(change, answer[some], p)
                scores[what][at] = (covariance / (left * right).sqrt()).numpy()
                if what == "shared":
                    scores["covariance"][at], scores["stimulus"][at], scores["response"][at] = (
                        x.numpy() for x in (covariance, left, right)
                    )
            covariance, left, right = aitchison(read_as["shared"], other[some], p)
            scores["null"][at] = (covariance / (left * right).sqrt()).numpy()
        subject.report(name, row + 1, len(few.ids))
    one = np.ones(len(few.ids))
    sums = Sums(name, few, one)
    read, random = slice(0, kinds // 2), slice(kinds // 2, None)
    for layer in range(stream.layers):
        at_layer = {name: values[:, layer] for name, values in scores.items()}
        for quantity, what, which in (
            ("fidelity", "shared", read),
            ("fidelity_null", "null", read),
            ("fidelity_own", "own", read),
            ("fidelity_logit", "logit", read),
            ("fidelity_random", "shared", random),
        ):
            sums.add(quantity, np.nan_to_num(at_layer[what][:, which]).mean(1), one, layer=layer)
        size = {
            (name, kind): at_layer[name][:, which].sum(1)
            for name in ("covariance", "stimulus", "response")
            for kind, which in (("read", read), ("random", random))
        }
        sums.add("response_slope", size["covariance", "read"], size["stimulus", "read"], layer=layer)
        sums.add("stimulus_ratio", size["stimulus", "read"], size["stimulus", "random"], layer=layer)
        sums.add("response_ratio", size["response", "read"], size["response", "random"], layer=layer)
    return sums.measured()


def directions(subject: Subject) -> Tensor:
    """Moves ``[L, 2 D, d]`` of Mahalanobis length 1: the D that the shared lens reads most, then D random ones.

    How usual a move is, is the covariance of the layer's states over all positions of some windows; what is read most, the
    variance of the lens's logits under the text's frequencies of tokens.
    """
    stream, readout = subject.stream, subject.stream.readout
    d = stream.d_model
    gain = readout.gain(d)
    read = subject.shared.matrix[0].double().cpu()
    if gain is not None:
        read = gain.double().cpu() @ read
    weight = readout.weight.double().cpu()
    counts = np.bincount(subject.words.fit_windows.ids[subject.words.fit_windows.inside], minlength=len(weight)) + 1.0
    p = torch.from_numpy(counts / counts.sum())
    mean = p @ weight
    metric = weight.T @ (p[:, None] * weight) - mean[:, None] * mean
    sums = FoldSums(1)
    for batch in batches(stream, subject.windows.spread(COVARIANCE_WINDOWS), Directions.none(stream)):
        looked = batch.inside.clone()
        looked[:, :FIRST] = False
        h = batch.states[:-1, looked]
        sums.add(0, torch.cat([torch.ones_like(h[..., :1]), h], -1))
    total = sums.sums[0]
    covariances = centred(total) / total[:, :1, :1]
    generator = torch.Generator().manual_seed(0)
    found = []
    for covariance in covariances:
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        seen = root @ read.T @ metric @ read @ root
        leading = torch.linalg.eigh(seen).eigenvectors[:, -DIRECTIONS:].flip(1).T
        random = F.normalize(torch.randn(DIRECTIONS, d, generator=generator, dtype=torch.float64), dim=-1)
        found.append(torch.cat([leading, random]) @ root)
    return torch.stack(found).float().to(stream.device)


def stimulus(readout: ReadOut, h: Tensor, move: Tensor, maps: AffineMaps | None, which: Tensor) -> Tensor:
    """Change of what the lenses ``which`` ``[n]`` read in states ``[n, d]`` when these move: log-ratios ``[n, V]``."""

    def read(x: Tensor) -> Tensor:
        if maps is not None:
            matrix, offset = maps.matrix.to(x)[which], maps.offset.to(x)[which]
            x = torch.einsum("nde,ne->nd", matrix, x) + offset
        return readout(x).float().log_softmax(-1)

    with torch.no_grad():
        return read(h + move) - read(h)


def aitchison(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance under p ``[V]`` of log-ratios ``[n, V]``, and both variances: ``[n]`` each, float64, nats squared."""
    a, b, p = a.double().cpu(), b.double().cpu(), p.double().cpu()
    p = p / p.sum()
    a, b = a - (a @ p)[:, None], b - (b @ p)[:, None]
    return (a * b) @ p, (a * a) @ p, (b * b) @ p


@torch.no_grad()
def responses(stream: ResidualStream, ids: Tensor, layers: Tensor, moves: Tensor, before: Tensor) -> Tensor:
    """The model's log-probabilities ``[n, V]`` behind a prefix ``[1, T]`` whose last state before block ``layers[i]`` moved.

    Where the model keeps a cache of the prefix, and gives with it the log-probabilities ``before`` ``[V]`` that it gives
    without, only the last token is computed again.
    """
    cached = cache_of(stream, ids)
    if cached is not None:
        off = (behind(stream, ids, cached, 1).float().log_softmax(-1)[0] - before).abs().max()
        if not off < CACHED_TOLERANCE * before.abs().max():
            cached = None
    found = []
    for start in range(0, len(layers), MOVES_AT_ONCE):
        of, move = (x[start : start + MOVES_AT_ONCE] for x in (layers, moves))
        count = len(of)
        with entering(stream, partial(moved, layers=of, moves=move)):
            if cached is not None:
                logits = behind(stream, ids, cached, count)
            else:
                last = torch.full((count,), ids.shape[1] - 1)
                _, logits = stream.at(ids.expand(count, -1), torch.arange(count), last)
        found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


def cache_of(stream: ResidualStream, ids: Tensor) -> tuple[str, Any] | None:
    """The cache of all tokens ``[1, T]`` but the last, and what the model calls it; None for a model that hands out none."""
    if ids.shape[1] < 2:
        return None
    out = stream.model(input_ids=ids[:, :-1], use_cache=True, return_dict=True)
    for name in ("cache", "past_key_values"):
        cache = getattr(out, name, None)
        if hasattr(cache, "reorder_cache"):
            return name, cache
    return None


def behind(stream: ResidualStream, ids: Tensor, cached: tuple[str, Any], count: int) -> Tensor:
    """Logits ``[count, V]`` of the last token of ``[1, T]``, as often as ``count``, behind a cache of the others."""
    name, cache = cached[0], copy.deepcopy(cached[1])
    cache.reorder_cache(torch.zeros(count, dtype=torch.long, device=ids.device))
    last = ids[:, -1:].expand(count, 1)
    out = stream.model(input_ids=last, use_cache=True, return_dict=True, **{name: cache})
    return out.logits[:, -1].to(stream.device)


def moved(layer: int, h: Tensor, layers: Tensor, moves: Tensor) -> Tensor | None:
    """States ``[n, T, d]`` in which the last one of sequence i moved by ``moves[i]``, where ``layers[i]`` is this one."""
    here = (layers == layer).nonzero()[:, 0]
    if not len(here):
        return None
    change = torch.zeros_like(h)
    change[here.to(h.device), -1, : moves.shape[1]] = moves[here].to(h)
    return h + change
