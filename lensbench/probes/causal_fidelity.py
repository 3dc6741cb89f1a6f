"""Does the model use what a lens reads? States are moved along the lens's directions, and the two changes are compared.

This follows the causal experiments of the tuned-lens paper (arXiv 2303.08112, section 4). A *stimulus* is the change of
what a lens reads at a layer. A *response* is the change of the model's output by the same move. Both are log-ratios,
weighted by the model's probabilities (Aitchison geometry).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbench.lenses.maps import AffineMaps
from lensbench.probes.catalogue import WITH_ITS_NULL, Panel, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject, no_blocks
from lensbench.probes.tools.crossfit import FoldSums, centred
from lensbench.probes.tools.interventions import MOVES_AT_ONCE, after_moves
from lensbench.probes.tools.predictions import Directions, batches
from lensbench.statistics import Array
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream

FIRST = 2
"""First position whose state counts in a covariance"""


COVARIANCE_WINDOWS = 64
"""Windows from which the covariance of each layer's states is computed, at most"""


WINDOWS = 96
"""Windows that are looked at, at most; each gives the state after one prefix"""


DIRECTIONS = 4
"""Directions of each kind at a layer: of the shared lens, and random ones"""


def causal_fidelity(subject: Subject) -> Measured:
    """For every layer l: ``h_l`` of a token is moved by one standard deviation; does the output move as the lens reads?

    The shared lens's directions are those that move its logits most, among moves that are equally usual (of Mahalanobis
    length 1 under the layer's covariance). Random directions are equally usual, and each window draws its own, so that
    intervals over windows hold what the draw matters. The sign of a direction means nothing, so the null, of the response to
    another direction, is the mean size of its cosines. A direction along which neither the reading nor the output moves has
    no cosine; one along which only one of them moves has 0.
    """
    name = "causal_fidelity"
    stream = subject.stream
    if subject.rotated:
        return Measured(name, reason="a rotated view has no states of its own to move")
    if not stream.blocks:
        return Measured(name, reason=f"{no_blocks(stream)}: there are no inputs to move")
    few = subject.windows.spread(WINDOWS)
    moves = Moves.of(subject)
    scores = {what: np.zeros((len(few.ids), stream.layers, 2 * DIRECTIONS)) for what in SCORES}
    with subject.task(name, few) as task:
        for row, ids in enumerate(few.ids):
            last = int(few.positions[row][few.valid[row]].max())
            prefix = torch.from_numpy(ids[: last + 1])[None].to(stream.input_device)
            for what, values in scores_after(subject, prefix, moves.of_window(row)).items():
                scores[what][row] = values
            task.update(row + 1)
    sums = Sums(name, few, np.ones(len(few.ids)))
    for layer in range(stream.layers):
        _add_layer(sums, {what: values[:, layer] for what, values in scores.items()}, layer)
    return sums.measured()


SCORES = ("shared", "own", "logit", "null", "covariance", "stimulus", "response")
"""What is kept of each moved state: four cosines, and the parts of the first one"""


def scores_after(subject: Subject, prefix: Tensor, moves: Tensor) -> dict[str, Array]:
    """Each of :data:`SCORES` ``[L, 2 D]`` of moves ``[L, 2 D, d]`` of the last state of a prefix ``[1, T]``."""
    stream = subject.stream
    kinds = moves.shape[1]
    layers = torch.arange(len(moves)).repeat_interleave(kinds)
    steps = moves.flatten(0, 1)
    states, logits = stream.at(prefix, torch.zeros(1, dtype=torch.long), torch.tensor([prefix.shape[1] - 1]))
    before = logits.float().log_softmax(-1)[0]
    p = before.exp()
    answer = responses(stream, prefix, layers, steps, before) - before  # [2 L D, V]
    # The response to the next direction of the same kind at the same layer.
    other = answer.view(-1, 2, kinds // 2, answer.shape[-1]).roll(1, 2).flatten(0, 2)
    found = {name: np.zeros(len(layers)) for name in SCORES}
    for start in range(0, len(layers), MOVES_AT_ONCE):
        some = slice(start, start + MOVES_AT_ONCE)
        of, h = layers[some], states[layers[some], 0].float()
        read_as = {
            "shared": stimulus(stream.readout, h, steps[some], subject.shared, torch.zeros_like(of)),
            "own": stimulus(stream.readout, h, steps[some], subject.lenses, of),
            "logit": stimulus(stream.readout, h, steps[some], None, of),
        }
        for what, change in read_as.items():
            covariance, left, right = aitchison(change, answer[some], p)
            found[what][some] = cosine(covariance, left, right).numpy()
            if what == "shared":
                found["covariance"][some], found["stimulus"][some], found["response"][some] = (
                    x.numpy() for x in (covariance, left, right)
                )
        covariance, left, right = aitchison(read_as["shared"], other[some], p)
        found["null"][some] = cosine(covariance, left, right).abs().numpy()
    return {name: values.reshape(len(moves), kinds) for name, values in found.items()}


def cosine(covariance: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Cosines ``[n]`` of stimulus and response from their covariance and variances ``[n]``.

    It is 0 where one of the two does not move at all, not a number where neither does, and infinite where one overflows.
    """
    size = left + right
    found = torch.where((left * right == 0) & (size > 0), 0.0, covariance / (left * right).sqrt())
    return torch.where(size.isfinite(), found, torch.inf)


def _add_layer(sums: Sums, scores: dict[str, Array], layer: int) -> None:
    """Add the quantities of a layer from its scores ``[S, 2 D]``: the lens's directions first, then random ones.

    Cosines that are not a number count for nothing.
    """
    directions = scores["shared"].shape[1] // 2
    read, random = slice(0, directions), slice(directions, None)
    for quantity, what, which in (
        ("fidelity", "shared", read),
        ("fidelity_null", "null", read),
        ("fidelity_own", "own", read),
        ("fidelity_logit", "logit", read),
        ("fidelity_random", "shared", random),
    ):
        defined = ~np.isnan(scores[what][:, which])
        sums.add(quantity, scores[what][:, which].sum(1, where=defined), defined.sum(1).astype(float), layer=layer)
    covariance, stimulus, response = (scores[name] for name in ("covariance", "stimulus", "response"))
    stimulus_read, stimulus_random = stimulus[:, read].sum(1), stimulus[:, random].sum(1)
    sums.add("response_slope", covariance[:, read].sum(1), stimulus_read, layer=layer)
    sums.add("stimulus_ratio", stimulus_read, stimulus_random, layer=layer)
    sums.add("response_ratio", response[:, read].sum(1), response[:, random].sum(1), layer=layer)


@dataclass(frozen=True)
class Moves:
    """Moves of Mahalanobis length 1: the D that the shared lens reads most at each layer, and what makes random ones.

    ``leading`` ``[L, D, d]``; ``root`` ``[L, d, d]`` is the root of each layer's covariance.
    """

    leading: Tensor
    root: Tensor

    @classmethod
    def of(cls, subject: Subject) -> "Moves":
        """The moves at all layers.

        The length is under the covariance of the layer's states over all positions of some windows. What the lens reads most
        is what gives its logits the largest variance under the text's token frequencies. The largest entry of a direction is
        positive: its sign, which means nothing, is then the same on all machines.
        """
        metric = _read_metric(subject)
        leading, roots = [], []
        for covariance in _covariances(subject):
            values, vectors = torch.linalg.eigh(covariance)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            most = torch.linalg.eigh(root @ metric @ root).eigenvectors[:, -DIRECTIONS:].flip(1).T
            largest = most.gather(1, most.abs().argmax(1, keepdim=True))
            leading.append(most * largest.sign() @ root)
            roots.append(root)
        return cls(torch.stack(leading).float(), torch.stack(roots).float())

    def of_window(self, number: int) -> Tensor:
        """Moves ``[L, 2 D, d]`` of a window: the lens's, then random ones of its own."""
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(self.leading.shape, generator=generator)
        return torch.cat([self.leading, F.normalize(drawn, dim=-1) @ self.root], 1)


def _read_metric(subject: Subject) -> Tensor:
    """Quadratic form ``[d, d]`` of moves of a state: the variance of the shared lens's logits over the text's tokens."""
    readout, d = subject.stream.readout, subject.stream.d_model
    gain = readout.gain(d)
    read = subject.shared.matrix[0].double().cpu()
    if gain is not None:
        read = gain.double().cpu() @ read
    weight = readout.weight.double().cpu()
    counts = np.bincount(subject.words.fit_windows.ids[subject.words.fit_windows.inside], minlength=len(weight)) + 1.0
    p = torch.from_numpy(counts / counts.sum())
    mean = p @ weight
    return read.T @ (weight.T @ (p[:, None] * weight) - mean[:, None] * mean) @ read


def _covariances(subject: Subject) -> Tensor:
    """Covariances ``[L, d, d]`` of the states before each block, over all positions of some windows."""
    stream, sums = subject.stream, FoldSums(1)
    for batch in batches(stream, subject.windows.spread(COVARIANCE_WINDOWS), Directions.none(stream)):
        looked = batch.inside.clone()
        looked[:, :FIRST] = False
        h = batch.states[:-1, looked]
        sums.add(0, torch.cat([torch.ones_like(h[..., :1]), h], -1))
    total = sums.sums[0]
    return centred(total) / total[:, :1, :1]


def stimulus(readout: ReadOut, h: Tensor, move: Tensor, maps: AffineMaps | None, which: Tensor) -> Tensor:
    """Log-ratios ``[n, V]`` by which moves ``[n, d]`` of states ``[n, d]`` change what lenses ``which`` ``[n]`` read."""

    def read(x: Tensor) -> Tensor:
        if maps is not None:
            matrix, offset = maps.matrix.to(x)[which], maps.offset.to(x)[which]
            x = torch.einsum("nde,ne->nd", matrix, x) + offset
        logits: Tensor = readout(x)
        return logits.float().log_softmax(-1)

    with torch.no_grad():
        return read(h + move) - read(h)


def aitchison(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance under p ``[V]`` of log-ratios ``[n, V]``, and both variances: ``[n]`` each, float64, nats squared."""
    a, b, p = a.double().cpu(), b.double().cpu(), p.double().cpu()
    p = p / p.sum()
    a, b = a - (a @ p)[:, None], b - (b @ p)[:, None]
    return (a * b) @ p, (a * a) @ p, (b * b) @ p


def responses(stream: ResidualStream, ids: Tensor, layers: Tensor, moves: Tensor, before: Tensor) -> Tensor:
    """The model's log-probabilities ``[n, V]`` after a prefix ``[1, T]`` whose last state before block ``layers[i]`` moved.

    ``before`` ``[V]`` are those without a move; see :func:`after_moves`.
    """
    return torch.cat([log_p for _, log_p in after_moves(stream, ids, layers, moves, [before])])


CAUSAL_FIDELITY = Probe(
    "causal_fidelity",
    causal_fidelity,
    "per layer, states moved along a lens's directions: change as read against change of the output (arXiv 2303.08112)",
    (
        Quantity(
            "fidelity",
            "fidelity, shared lens",
            "mean cosine of stimulus (as the shared lens reads it) and response along the shared lens's directions",
            "layer",
            "At 1, the output moves as the lens reads.",
            table="layers",
            panel=Panel("layer moved", "cosine of read and real change", null="fidelity_null"),
        ),
        Quantity(
            "fidelity_null",
            "fidelity, null",
            "mean size of the cosine of stimulus and response to another direction of the lens",
            "layer",
            "It is a mean of absolute values, since the sign of a direction means nothing.",
            WITH_ITS_NULL,
            "layers",
        ),
        Quantity(
            "fidelity_own",
            "fidelity, own lens",
            "as `fidelity`, the stimulus as the layer's own lens of the transfer matrix reads it",
            "layer",
            "Above `fidelity`, the own lens reads these directions better.",
            table="layers",
        ),
        Quantity(
            "fidelity_logit",
            "fidelity, logit lens",
            "as `fidelity`, the stimulus as the logit lens reads it",
            "layer",
            "Near 1, the rest of the model passes these directions on unchanged.",
        ),
        Quantity(
            "fidelity_random",
            "fidelity, random directions",
            "as `fidelity`, along four random directions that each window draws anew",
            "layer",
            "Below `fidelity`, the lens reads its own directions best.",
            table="layers",
        ),
        Quantity(
            "response_slope",
            "real by read change",
            "slope of response on stimulus, along the shared lens's directions",
            "layer",
            "At 1, the output moves as far as was read.",
            table="layers",
            panel=Panel("layer moved", "real by read change"),
        ),
        Quantity(
            "stimulus_ratio",
            "read change, by random",
            "mean square of the stimulus along the lens's directions by that along random ones",
            "layer",
            "Above 1, the lens reads more of its directions than of random ones of the same Mahalanobis length.",
            table="layers",
        ),
        Quantity(
            "response_ratio",
            "real change, by random",
            "mean square of the response along the lens's directions by that along random ones",
            "layer",
            "Above 1 the model uses what the lens reads more than what else varies; below `stimulus_ratio`, less than that.",
            table="layers",
        ),
    ),
    control="response to another direction; random directions",
    topic="what is used",
    version=2,
)
