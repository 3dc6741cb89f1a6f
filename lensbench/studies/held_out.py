"""Held-out families of synthetic streams: random sizes, known shares, for measures that were tuned on other families.

The answer's entries are divided among channels (:mod:`lensbench.studies.channels`), independent of each other and in rooms
of their own. Declared shares (:mod:`lensbench.studies.shares`) say in which channels the gain lies, and what becomes of it.

Answers of a document correlate by :data:`SHARED`; noises do not. Layer L is the answer where the read-out looks, and every
state of layer l is multiplied by ``growth^l``.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lensbench.measures.update.verdict import ADDED, CARRIED, MIXED, REPRESENTED, UNDETERMINED
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.studies.channels import (
    REFINED,
    Array,
    Channel,
    arriving,
    copied,
    decay,
    drifting,
    in_place,
    rebased,
    sliced,
)
from lensbench.studies.shares import DeclaredShares, declared
from lensbench.studies.synthetic import answers, capture_of, read_out

VOCAB = 200
SHARED = 0.2
"""Correlation of the answers of two tokens of a document"""
NEARLY_ALL = 0.9
"""A mixture of which more than this share is of one kind may be called that kind"""
METRIC_TOKENS, METRIC_SEED = 4096, 999_999_937

Range = tuple[int, int] | tuple[float, float] | tuple[str, ...]
"""Whole numbers or real numbers from the first to the second, or one of several words"""

Drawn = dict[str, float | int | str]


@dataclass(frozen=True)
class Parts:
    """A sample's hidden parts, before growth."""

    answer: Tensor  # [N, width]
    held: list[Tensor]  # for each channel [L, N, room]


class HeldOutStream:
    """A stream of a family of :data:`HELD_OUT_FAMILIES`; sizes and directions follow from ``seed``.

    Samples of any number of tokens share them, and the read-out. Raises ValueError for an unknown family.
    """

    def __init__(self, family: str, *, seed: int = 0):
        if family not in HELD_OUT_FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(HELD_OUT_FAMILIES)}")
        self.family, self.made = family, HELD_OUT_FAMILIES[family]
        self.drawn, rng = drawn_sizes(family, self.made.ranges, seed)
        directions = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.layers = int(self.drawn["layers"])
        self.channels: Sequence[Channel] = self.made.build(Sizes(self.drawn), directions)
        self.growth = float(self.drawn.get("growth", 1.0))
        self.width = sum(channel.entries for channel in self.channels)  # of the answer
        self.extra = sum(channel.room for channel in self.channels if _has_room(channel))
        self.d = self.width + self.extra
        norm = "layer" if self.made.layer_norm else "rms"
        self.readout: ReadOut = read_out(
            self.d,
            VOCAB,
            norm=norm,
            read=None if self.made.layer_norm else self.width,
            logits=self.made.logits,
            seed=int(rng.integers(2**31)),
        )

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Verdicts that suit this stream: its family's, and a pure one that more than :data:`NEARLY_ALL` of the gain is."""
        pure = {ADDED: "in_place", CARRIED: "carried", REPRESENTED: "represented"}
        if self.made.verdicts != (MIXED,):
            return self.made.verdicts
        return (MIXED, *(verdict for verdict, name in pure.items() if self.shares.overall(name) > NEARLY_ALL))

    @property
    def size(self) -> Tensor:
        """Standard deviations of the answer's entries, ``[width]``."""
        return torch.cat([channel.size for channel in self.channels])

    def parts(self, tokens: int, *, seed: int, per_document: int = 8) -> Parts:
        """A sample's answers, and what each channel holds of them."""
        random = torch.Generator().manual_seed(seed)
        answer = answers(tokens, self.width, random, per_document=per_document, shared=SHARED) * self.size
        pieces = answer.split([channel.entries for channel in self.channels], -1)
        held = [torch.stack(c.draw(y, random)) for c, y in zip(self.channels, pieces, strict=True)]
        return Parts(answer, held)

    def assembled(self, parts: Parts) -> Tensor:
        """States ``[L+1, tokens, d]`` of a sample's parts: the places of the answer first, then the rooms of channels."""
        h = torch.zeros(self.layers + 1, len(parts.answer), self.d)
        place, room = 0, self.width
        for channel, held in zip(self.channels, parts.held, strict=True):
            start = room if _has_room(channel) else place
            h[:-1, :, start : start + channel.room] = held
            if _has_room(channel):
                h[-1, :, start : start + channel.room] = held[-1]
                room += channel.room
            place += channel.entries
        h[-1, :, : self.width] = parts.answer
        return h * (self.growth ** torch.arange(self.layers + 1))[:, None, None]

    def states(self, tokens: int, *, seed: int, per_document: int = 8) -> Tensor:
        """A sample of the stream's states, ``[L+1, tokens, d]``."""
        return self.assembled(self.parts(tokens, seed=seed, per_document=per_document))

    def capture(self, tokens: int, *, seed: int, per_document: int = 8, constant: Tensor | None = None) -> Capture:
        """A sample of :meth:`states` with what the read-out predicts from it; see :func:`capture_of`."""
        parts = self.parts(tokens, seed=seed, per_document=per_document)
        states = self.assembled(parts)
        captured = capture_of(self.readout, states, per_document=per_document, constant=constant, seed=seed)
        if all(channel.predicts for channel in self.channels):
            return captured
        # Next tokens that depend on some channels alone; the model's own prediction stays what its read-out says.
        p = self.target_logits(parts.answer).double().softmax(-1)
        targets = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        own = self.readout(states[-1]).double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return replace(captured, targets=targets, model_ce=(-own).to(states.dtype))

    @cached_property
    def directions(self) -> Tensor:
        """``W D`` ``[V, width]``: logits of answers, but for the norm's scale, its bias and the head's."""
        gain = self.readout.gain(self.d)
        assert gain is not None
        made: Tensor = (self.readout.weight @ gain[:, : self.width]).detach() / gain.abs().max()
        return made

    def target_logits(self, answer: Tensor) -> Tensor:
        """Logits ``[tokens, V]`` of next tokens that some channels do not predict: ``sharpness`` times the others' part."""
        useful = torch.cat([torch.full((c.entries,), float(c.predicts)) for c in self.channels])
        # The read-out's scale for a state of the mean size, so that logits are those of the model, made sharper.
        probe = torch.eye(self.width) * 1e3
        padded = torch.nn.functional.pad(probe, (0, self.extra))
        rms = self.size.square().mean().sqrt()
        weights = self.readout(padded).T / (self.width**0.5 * rms)
        logits: Tensor = float(self.drawn["sharpness"]) * (answer * useful) @ weights.T
        return logits

    @cached_property
    def metric(self) -> Array:
        """The metric G ``[width, width]`` of :mod:`lensbench.studies.shares`; p of :data:`METRIC_TOKENS` answers."""
        random = torch.Generator().manual_seed(METRIC_SEED)
        answer = answers(METRIC_TOKENS, self.width, random, per_document=8, shared=SHARED) * self.size
        state = torch.nn.functional.pad(answer, (0, self.extra))
        p = self.readout(state).double().softmax(-1).numpy()
        seen = self.directions.double().numpy()
        expected = p @ seen
        return np.asarray((seen.T * p.mean(0)) @ seen - expected.T @ expected / len(p))

    @cached_property
    def shares(self) -> DeclaredShares:
        """The declared shares of this stream."""
        return declared(self.channels, self.metric)


def _has_room(channel: Channel) -> bool:
    """Whether a channel's room lies apart from the place of its entries in the answer."""
    return channel.room != channel.entries


def drawn_sizes(family: str, ranges: Mapping[str, Range], seed: int) -> tuple[Drawn, np.random.Generator]:
    """Sizes of a stream, drawn from their ranges, and the generator that drew them; family and seed decide."""
    of_family = int.from_bytes(hashlib.sha256(family.encode()).digest()[:4])
    rng = np.random.default_rng([seed, of_family])
    return {name: _one_of(limits, rng) for name, limits in ranges.items()}, rng


def _one_of(limits: Range, rng: np.random.Generator) -> float | int | str:
    if isinstance(limits[0], str):
        return str(limits[rng.integers(len(limits))])
    low, high = limits
    if isinstance(low, int) and isinstance(high, int):
        return int(rng.integers(low, high + 1))
    return float(rng.uniform(float(low), float(high)))


class Sizes:
    """A stream's random sizes, as the builders of families need them."""

    def __init__(self, drawn: Mapping[str, float | int | str]):
        self.drawn = drawn
        self.layers = int(drawn["layers"])
        self.sigma = list(np.geomspace(float(drawn["first_noise"]), float(drawn["last_noise"]), self.layers))

    def __getitem__(self, name: str) -> float:
        return float(self.drawn[name])

    def entries(self, *shares: float) -> list[int]:
        """Numbers of entries of the answer for shares that sum to 1, at least 2 each; the last takes what is left."""
        width = int(self.drawn["width"])
        first = [max(2, round(width * share)) for share in shares[:-1]]
        return [*first, width - sum(first)]

    def refined(self, size: Tensor) -> Channel:
        """Entries that get better in place, in the way that was drawn."""
        return in_place(size, self.sigma, str(self.drawn["how"]))


Build = Callable[[Sizes, torch.Generator], Sequence[Channel]]


@dataclass(frozen=True)
class HeldOutFamily:
    """A family of held-out streams: what it is, the verdicts that suit it, and what its random sizes are drawn from."""

    what: str
    verdicts: tuple[str, ...]
    """The verdict that the construction asks for; where there are more, any of them is right"""
    build: Build
    ranges: dict[str, Range]
    layer_norm: bool = False
    logits: float = 2.0
    """Standard deviation of the read-out's logits"""
    falls: bool = True
    """Whether the next token's cross-entropy falls at every step"""


def _place_and(other: Callable[[Sizes, Tensor, torch.Generator], Channel]) -> Build:
    """Two channels: ``share`` of the entries in place, the others as ``other`` says and ``loudness`` times as large."""

    def build(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
        here, there = s.entries(s["share"], 1 - s["share"])
        return s.refined(torch.ones(here)), other(s, torch.full((there,), s["loudness"]), random)

    return build


def _three(last: Callable[[Sizes, Tensor, torch.Generator], Channel]) -> Build:
    """Three channels: in place, copied on top of each other, and as ``last`` says."""

    def build(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
        first = s["share"]
        second = (1 - first) * s["second_share"]
        here, over, rest = s.entries(first, second, 1 - first - second)
        return (
            s.refined(torch.ones(here)),
            copied(torch.ones(over), s.sigma, s["louder"], over, random),
            last(s, torch.full((rest,), s["loudness"]), random),
        )

    return build


def _copies(s: Sizes, size: Tensor, random: torch.Generator) -> Channel:
    return copied(size, s.sigma, s["louder"], round(s["room"] * len(size)), random)


def _slices(s: Sizes, size: Tensor, random: torch.Generator) -> Channel:
    return sliced(size, s.sigma, random)


def _drift(s: Sizes, size: Tensor, random: torch.Generator) -> Channel:
    return drifting(size, s.sigma, np.deg2rad(s["degrees"]), random)


def _new_bases(s: Sizes, size: Tensor, random: torch.Generator) -> Channel:
    return rebased(size, s.sigma, random)


def _all(how: Callable[[Sizes, Tensor, torch.Generator], Channel]) -> Build:
    """One channel, whose spectrum falls by the ``exponent`` where one was drawn."""

    def build(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
        size = torch.ones(int(s["width"]))
        return (how(s, decay(size, s["exponent"], random) if "exponent" in s.drawn else size, random),)

    return build


def _place(s: Sizes, size: Tensor, random: torch.Generator) -> Channel:
    return s.refined(size)


def _news_in_place(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
    new, old = s.entries(s["new"], 1 - s["new"])
    return s.refined(torch.ones(old)), arriving(torch.ones(new), s["last_noise"], s.layers)


def _standstill(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
    return (in_place(torch.ones(int(s["width"])), [s["first_noise"]] * s.layers, "fresh"),)


def _small(other: Callable[[Sizes, Tensor, torch.Generator], Channel]) -> Build:
    """Most of the power: increments of other tokens, added in place. The next token depends on a small channel alone."""

    def build(s: Sizes, random: torch.Generator) -> Sequence[Channel]:
        few, many = int(s["few"]), int(s["width"])
        small = (s["share"] / (1 - s["share"]) * many / few) ** 0.5
        large = in_place(torch.ones(many), s.sigma, "added", name="other tokens'")
        return replace(large, predicts=False), other(s, torch.full((few,), small), random)

    return build


NOISES: dict[str, Range] = {"first_noise": (1.0, 2.0), "last_noise": (0.2, 0.8)}
DEEP: dict[str, Range] = {"layers": (4, 12), **NOISES}
REFINES: dict[str, Range] = {"how": REFINED}
TWO: dict[str, Range] = {"share": (0.15, 0.85), "loudness": (0.8, 1.25), **REFINES}
THREE: dict[str, Range] = {"share": (0.2, 0.6), "second_share": (0.3, 0.7), "loudness": (0.8, 1.25), **REFINES}
LOUDER: dict[str, Range] = {
    "layers": (4, 10),
    "first_noise": (1.5, 2.0),
    "last_noise": (0.2, 0.5),
    "louder": (1.4, 1.8),
}
SMALL: dict[str, Range] = {
    "few": (6, 10), "width": (24, 60), "share": (0.12, 0.25), "sharpness": (8.0, 11.0),
    "first_noise": (2.0, 3.0), "last_noise": (0.4, 0.6),
}  # fmt: skip

HELD_OUT_FAMILIES: dict[str, HeldOutFamily] = {
    "place-copied": HeldOutFamily(
        "a share is refined in place, the rest copied on top of older copies", (MIXED,), _place_and(_copies),
        {**DEEP, **TWO, **LOUDER, "width": (24, 40), "room": (1.0, 1.5)},
    ),
    "place-sliced": HeldOutFamily(
        "a share is refined in place, the rest copied to slices of their own", (MIXED,), _place_and(_slices),
        {"layers": (4, 6), **NOISES, **TWO, "share": (0.4, 0.85), "width": (16, 20)},
    ),
    "place-drifting": HeldOutFamily(
        "a share is refined in place, the basis of the rest turns", (MIXED, ADDED), _place_and(_drift),
        {**DEEP, **TWO, "width": (24, 96), "degrees": (45.0, 90.0)},
    ),
    "three-way": HeldOutFamily(
        "refined in place, copied on top of older copies, and in new bases", (MIXED,), _three(_new_bases),
        {**DEEP, **THREE, **LOUDER, "width": (30, 96)},
    ),
    "three-way-drifting": HeldOutFamily(
        "refined in place, copied on top of older copies, and in a basis that turns", (MIXED,), _three(_drift),
        {**DEEP, **THREE, **LOUDER, "width": (30, 96), "degrees": (45.0, 90.0)},
    ),
    "growing": HeldOutFamily(
        "refined in place, the stream grows", (ADDED,), _all(_place),
        {**DEEP, **REFINES, "width": (24, 96), "growth": (1.1, 1.6)},
    ),
    "shrinking": HeldOutFamily(
        "refined in place, the stream shrinks; LayerNorm", (ADDED,), _all(_place),
        {**DEEP, **REFINES, "width": (24, 96), "growth": (0.6, 0.9)}, layer_norm=True,
    ),
    "growing-copied": HeldOutFamily(
        "copied on top of older copies, the stream grows", (CARRIED,), _all(_copies),
        {**DEEP, **LOUDER, "width": (24, 32), "room": (1.0, 2.0), "growth": (1.1, 1.6)},
    ),
    "anisotropic": HeldOutFamily(
        "refined in place, the spectrum falls", (ADDED,), _all(_place),
        {**DEEP, **REFINES, "width": (24, 96), "exponent": (0.3, 1.5)},
    ),
    "anisotropic-sliced": HeldOutFamily(
        "copied to slices of their own, the spectrum falls", (CARRIED,), _all(_slices),
        {"layers": (4, 8), **NOISES, "width": (8, 10), "exponent": (0.3, 1.5)},
    ),
    "anisotropic-rebased": HeldOutFamily(
        "a new basis at every layer, the spectrum falls", (REPRESENTED,), _all(_new_bases),
        {**DEEP, "width": (24, 96), "exponent": (0.3, 1.5)},
    ),
    "news": HeldOutFamily(
        "refined in place, and a share of the entries arrives block by block", (ADDED,), _news_in_place,
        {**DEEP, **REFINES, "width": (24, 96), "new": (0.15, 0.4)},
    ),
    "standstill": HeldOutFamily(
        "new noise of the same size at every layer", (UNDETERMINED,), _standstill,
        {**DEEP, "width": (24, 96)}, falls=False,
    ),
    "small-copied": HeldOutFamily(
        "large increments of other tokens in place; a small channel that predicts, copied on top of older copies",
        (UNDETERMINED, MIXED, CARRIED), _small(_copies),
        {**DEEP, **LOUDER, **SMALL, "louder": (1.6, 2.0), "room": (2.5, 3.5)}, logits=0.8,
    ),
    "small-rebased": HeldOutFamily(
        "large increments of other tokens in place; a small channel that predicts, in new bases",
        (UNDETERMINED, MIXED, REPRESENTED), _small(_new_bases), {**DEEP, **SMALL}, logits=0.8,
    ),
}  # fmt: skip
"""Name of a held-out family -> the family"""
