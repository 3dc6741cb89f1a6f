"""How many directions does a lens need? Per-layer lenses, the shared lens and the best lens of one layer, cut to a rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.recipe import spread_layers
from lensbench.lenses.search import pad_direction, padded_kl, thinned
from lensbench.measures.update.metric import SMALLEST_EIGENVALUE, Metric, covariance_of
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity, Table
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.layer_lenses import PROBED
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import Tokens, sum_by_window, token_kl
from lensbench.streams.partition import rows_at_once
from lensbench.streams.readout import ReadOut

LAYERS = 8
"""Layers at most, evenly spread, that lenses are of and that are read"""

DEV_TOKENS = 128
"""Dev tokens at most that choices are made on, at each layer"""

PADS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Lengths of the pad that a lens cut to a rank may get in addition, in rms of the final state"""

ROWS = 256
"""Rows of logits in memory at once on a processor"""

SINGLE = "single"

SETS = {kind: PROBED[kind] for kind in ("tuned", "shared")}
SETS |= {SINGLE: "best lens of one layer"}
SETS |= {kind: PROBED[kind] for kind in ("jacobian", "shared_jacobian")}
"""Which maps read the layers -> their name in tables; the last two are read where a suite asks for such lenses"""


def lens_rank(subject: Subject) -> Measured:
    """KL and precision against the model's own output, of lenses cut to every rank of a sweep.

    Linear shortcuts of low rank (arXiv 2504.13984), with the model's own distribution as the truth. Per-layer lenses read
    their own layers; the shared lens, and the lens of the one layer whose mean KL over all layers is lowest on dev at this
    rank, read all of them. Jacobian lenses are read where the subject holds some. A rank is that of :class:`Cut`: the best
    in the read-out's Fisher metric for the states that are read. A lens with fewer directions is surer than it should be,
    since the final norm makes up for the length that it lost; so each rank gets its own length of the pad, chosen on dev.
    Rank 0 is the constant that the lens reads on average, rank d the lens itself.

    Ranks are 0, the powers of two below d, and d. Products with the unembedding: 3 maps (5 with
    Jacobian lenses) times ranks times layers times tokens, and on dev layers squared times ranks times 128.
    """
    name, readout = "lens_rank", subject.stream.readout
    layers = spread_layers(subject.stream.layers, LAYERS)
    try:
        metric = Metric.of("fisher", readout, subject.fit)
    except LensbenchError as error:  # a norm that is no gain over a scale
        return Measured(name, reason=str(error))
    cuts = cuts_of(subject, layers, metric.factor)
    scored, dev = subject.eval, thinned(subject.dev, DEV_TOKENS)
    pad = pad_direction(readout, subject.fit.states[-1])
    sums = Sums(name, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    ranks = ranks_of(subject.stream.d_model)
    named = f"{name}-{subject.name}" if subject.name else name
    with subject.progress.task(named, len(ranks), "ranks") as task:
        for number, rank in enumerate(ranks):
            choice = Choices.of(readout, dev, layers, cuts, rank, pad)
            found = {
                kind: [scores(readout, scored, layer, read) for layer, read in zip(layers, reads, strict=True)]
                for kind, reads in choice.readers(cuts, len(layers)).items()
            }
            add_rank(sums, scored, layers, found, rank)
            sums.add("single_layer", layers[choice.single] * sums.tokens, other=rank)
            task.update(number + 1)
    return sums.measured()


def ranks_of(d: int) -> list[int]:
    """0, the powers of two below d, and d."""
    return [0, *(2**k for k in range(d.bit_length()) if 2**k < d), d]


@dataclass(frozen=True)
class Cut:
    """An affine map ``B h + c`` that can be read with fewer directions, float64.

    The best map of rank r for states of mean m and covariance ``C = R R^T``, in the metric ``F^T F`` of the read-out, is
    ``B_r = B R V_r V_r^T R^+``, V_r the first r right singular vectors of ``F B R``: it has the least
    ``E |F (B - B_r)(h - m)|^2`` (Eckart and Young in these metrics, as in reduced-rank regression: Izenman 1975). A cut of
    B's own singular values would keep directions that no state has, or that the read-out does not see. What the map reads
    on average stays as it is.
    """

    matrix: Tensor
    """B ``[d, d]``"""
    offset: Tensor
    """c ``[d]``"""
    mean: Tensor
    """m ``[d]``"""
    write: Tensor
    """``B R V`` ``[d, k]``, the direction that matters most first"""
    see: Tensor
    """``V^T R^+`` ``[k, d]``"""

    @classmethod
    def of(cls, maps: AffineMaps, mean: Tensor, covariance: Tensor, factor: Tensor) -> "Cut":
        """Of one map, the moments of the states that it reads, and a factor F ``[., d]`` of the metric; all on the CPU."""
        matrix, offset = maps.matrix[0].double().cpu(), maps.offset[0].double().cpu()
        values, vectors = torch.linalg.eigh(covariance)
        there = values > SMALLEST_EIGENVALUE * values[-1].clamp(min=0)
        root = vectors[:, there] * values[there].sqrt()
        _, _, right = torch.linalg.svd(factor @ matrix @ root, full_matrices=True)
        inverse = vectors[:, there] / values[there].sqrt()
        return cls(matrix, offset, mean, matrix @ root @ right.T, right @ inverse.T)

    def read(self, h: Tensor, rank: int) -> Tensor:
        """What it makes of states ``[n, d]`` with so many directions, in their precision; with d, what the map makes."""
        wide = h.double()
        matrix, offset, mean = (x.to(h.device) for x in (self.matrix, self.offset, self.mean))
        if rank >= len(matrix):
            x: Tensor = wide @ matrix.T + offset
        else:
            write, see = self.write[:, :rank].to(h.device), self.see[:rank].to(h.device)
            x = (matrix @ mean + offset) + (wide - mean) @ see.T @ write.T
        return x.to(h.dtype)


def cuts_of(subject: Subject, layers: Sequence[int], factor: Tensor) -> dict[str, list[Cut]]:
    """Kind of lens -> a cut for each of some layers, for its own states; or one, for the states of all of them together."""
    states = subject.fit.states
    covariances = [covariance_of(states[layer]) for layer in layers]
    means = torch.stack([states[layer].mean(0, dtype=torch.float64).cpu() for layer in layers])
    mean = means.mean(0)
    shift = means - mean
    pooled = torch.stack(covariances).mean(0) + shift.T @ shift / len(layers)
    found = {}
    for kind, maps in {"tuned": subject.own, "shared": subject.shared, **subject.further}.items():
        if kind not in SETS:
            continue
        if kind in PER_LAYER:
            each = zip(layers, means, covariances, strict=True)
            found[kind] = [Cut.of(maps[[layer]], m, covariance, factor) for layer, m, covariance in each]
        else:
            found[kind] = [Cut.of(maps, mean, pooled, factor)]
    return found


PER_LAYER = ("tuned", "jacobian")
"""Kinds with a lens for each layer"""


@dataclass(frozen=True)
class Read:
    """A map cut to a rank, with a length of the pad."""

    cut: Cut
    rank: int
    pad: Tensor
    """``[d]``"""

    def __call__(self, h: Tensor) -> Tensor:
        """What it makes of states ``[n, d]``."""
        return self.cut.read(h, self.rank) + self.pad.to(h)


@dataclass(frozen=True)
class Choices:
    """What dev chose at one rank: lengths of the pad, and the layer whose lens reads all others best."""

    rank: int
    pad: Tensor
    """Of length 1, ``[d]``"""
    lengths: dict[str, tuple[float, ...]]
    """Kind of lens -> length of the pad of each of its maps"""
    single: int
    """Number of the layer"""
    of_single: float
    """Length of the pad of its lens"""

    @classmethod
    def of(
        cls,
        readout: ReadOut,
        dev: Capture,
        layers: Sequence[int],
        cuts: dict[str, list[Cut]],
        rank: int,
        pad: Tensor,
    ) -> "Choices":
        """The lowest KL on dev, each from :data:`PADS`; the whole lens has the pad that it was fitted with."""
        pads = (0.0,) if rank >= len(pad) else PADS

        def kl(cut: Cut, at: Sequence[int]) -> Tensor:  # [layers, pads]
            return torch.stack([dev_kl(readout, dev, layer, cut, rank, pad, pads) for layer in at])

        every = torch.stack([kl(cut, layers) for cut in cuts["tuned"]])  # [lens, layer, pad]
        single, of_single = divmod(int(every.mean(1).argmin()), len(pads))
        lengths = {}
        for kind, maps in cuts.items():
            if kind == "tuned":
                chosen = every.diagonal().T
            elif kind in PER_LAYER:
                chosen = torch.cat([kl(cut, [layer]) for cut, layer in zip(maps, layers, strict=True)])
            else:
                chosen = kl(maps[0], layers).mean(0, keepdim=True)
            lengths[kind] = tuple(pads[int(k)] for k in chosen.argmin(-1))
        return cls(rank, pad, lengths, single, pads[of_single])

    def readers(self, cuts: dict[str, list[Cut]], count: int) -> dict[str, list[Read]]:
        """Kind of :data:`SETS` -> what reads each of ``count`` layers."""
        found = {}
        for kind, maps in cuts.items():
            read = [Read(cut, self.rank, a * self.pad) for cut, a in zip(maps, self.lengths[kind], strict=True)]
            found[kind] = read if kind in PER_LAYER else read * count
        found[SINGLE] = [Read(cuts["tuned"][self.single], self.rank, self.of_single * self.pad)] * count
        return found


@torch.no_grad()
def dev_kl(
    readout: ReadOut, dev: Capture, layer: int, cut: Cut, rank: int, pad: Tensor, pads: Sequence[float]
) -> Tensor:
    """Mean KL on dev of a cut lens at one layer, with each length of the pad: ``[P]``, nats/token."""
    x = cut.read(dev.states[layer], rank)
    tokens = Tokens(dev.expected, dev.entropy_term, dev.states[-1])
    return padded_kl(readout, x, tokens, pad, pads).mean(-1)


@dataclass(frozen=True)
class Scores:
    """Against the model's own output, per token ``[N]``; NaN where logits overflow."""

    kl: Tensor
    """Nats"""
    top1: Tensor
    """1 where the model's top-1 is the lens's"""
    top10: Tensor
    """1 where it is among the lens's ten most probable words"""


@torch.no_grad()
def scores(readout: ReadOut, captured: Capture, layer: int, read: Read) -> Scores:
    """The scores of a lens at one layer."""
    h = captured.states[layer]

    def one(rows: slice) -> tuple[Tensor, Tensor]:
        n = readout.final_norm(read(h[rows]))
        logits = readout.logits(n)
        log_z = logits.logsumexp(-1)
        best = logits.gather(-1, captured.top[rows, None].to(logits.device))
        above = torch.where(log_z.isfinite(), (logits > best).sum(-1).to(log_z.dtype), torch.nan)
        tokens = Tokens(captured.expected[rows], captured.entropy_term[rows], captured.states[-1][rows])
        return token_kl(readout, n, tokens, log_z), above

    size = rows_at_once(h, len(readout.weight), ROWS)
    parts = list(in_pieces(slice(0, len(h)), size, one, what="a token of a read-out"))
    kl, above = (torch.cat(part) for part in zip(*parts, strict=True))

    def within(count: int) -> Tensor:
        return torch.where(above.isnan(), above, (above < count).to(above.dtype))

    return Scores(kl, within(1), within(10))


def add_rank(sums: Sums, scored: Capture, layers: Sequence[int], found: dict[str, list[Scores]], rank: int) -> None:
    """Add what was found of each kind of lens at one rank; differences are of the same tokens."""
    by_kind = {}
    for kind, each in found.items():
        for what in MEASURES:
            by_layer = np.stack([sum_by_window(getattr(one, what), scored) for one in each])
            by_kind[kind, what] = by_layer.mean(0)
            sums.add(f"rank_{what}_{kind}", by_kind[kind, what], other=rank)
            if what == "top1":
                for layer, values in zip(layers, by_layer, strict=True):
                    sums.add(f"rank_top1_by_layer_{kind}", values, layer=layer, other=rank)
    for one, other in DIFFERENCES:
        for what in ("kl", "top1") if one in found else ():
            sums.add(f"rank_{what}_{one}_minus_{other}", by_kind[one, what] - by_kind[other, what], other=rank)


MEASURES = {
    "kl": ("KL", "KL to the model's output (nats/token)", "The rank at which it stops falling is what the lens needs."),
    "top1": ("top-1", "share of tokens whose top-1 is the model's", "Precision at 1."),
    "top10": (
        "top-10",
        "share of tokens at which the model's top-1 is among the lens's ten most probable words",
        "Precision at 10.",
    ),
}

DIFFERENCES = {
    ("shared", "tuned"): "What is lost by one map for all layers.",
    ("single", "shared"): "What a lens fitted to all layers gains.",
    ("jacobian", "tuned"): "How far what can be decoded from a layer differs from the effect of moving it.",
    ("shared_jacobian", "shared"): "The same difference with one map for all layers.",
}
"""Which kinds are compared -> how to read it"""


def quantities() -> Iterator[Quantity]:
    """All quantities: means over the layers at each rank, top-1 at each layer, and differences."""
    for kind, lens in SETS.items():
        for what, (label, formula, reading) in MEASURES.items():
            yield _of_rank(
                f"rank_{what}_{kind}", f"{label} by rank, {lens}", f"{formula}, {lens}, mean over layers", reading
            )
        yield Quantity(
            f"rank_top1_by_layer_{kind}",
            f"top-1 by layer and rank, {lens}",
            f"share of tokens of a layer whose top-1 through the {lens} is the model's; `other` is the rank",
            "layer and rank",
            "If it is equal over layers, one map serves all exits alike.",
            SAME_TOKENIZER,
        )
    for (one, other), reading in DIFFERENCES.items():
        for what in ("kl", "top1"):
            label, formula, _ = MEASURES[what]
            yield _of_rank(
                f"rank_{what}_{one}_minus_{other}",
                f"{label} by rank, {SETS[one]} - {SETS[other]}",
                f"{formula}, {SETS[one]} minus {SETS[other]}, same tokens, mean over layers",
                reading,
            )
    yield _of_rank(
        "single_layer",
        "best layer by rank",
        "the layer whose lens, cut to this rank, has the lowest mean KL over all layers on dev",
        "It was not chosen on the tokens that are scored.",
    )


def _of_rank(name: str, label: str, formula: str, reading: str, table: Table | None = None) -> Quantity:
    return Quantity(name, label, f"{formula}; `other` is the rank", "rank", reading, SAME_TOKENIZER, table)


LENS_RANK = Probe(
    "lens_rank",
    lens_rank,
    "KL and precision of per-layer lenses, the shared lens and the best lens of one layer, cut to each rank of a sweep",
    tuple(quantities()),
    images=True,
    control="rank 0: the constant that a lens reads on average",
)
