"""Held-out families of synthetic streams whose tokens differ in loudness, or that hide a part of the answer by a sign.

A token's **loudness** multiplies all its states, the last one included. The final norm undoes it, so every token counts
alike in the prediction, while loud tokens decide second moments. A **hidden sign** multiplies a part of the answer at all
layers before the last. Half of the tokens have sign -1, so no linear reading sees that part before the last block undoes
the sign. A direction of its own holds the sign: nothing but products is needed to undo it.

Channels are those of :mod:`lensbench.studies.channels`; answers, documents and read-outs are those of
:mod:`lensbench.studies.held_out`. States are not normal here: there are neither declared shares nor moments in closed form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensbench.measures.update.verdict import ADDED, CARRIED, MIXED, REPRESENTED, UNDETERMINED
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.studies.channels import Channel, copied, rebased
from lensbench.studies.held_out import (
    LOUDER,
    NEARLY_ALL,
    NOISES,
    REFINES,
    SHARED,
    VOCAB,
    Range,
    Sizes,
    drawn_sizes,
)
from lensbench.studies.synthetic import answers, capture_of, read_out

Loudness = Literal["even", "log-normal", "minority", "heavy tails"]
"""'even': 1. 'log-normal': ``exp(spread z)``. 'minority': ``loudness`` with probability ``loud``, else 1. 'heavy tails':
``sqrt(4 / chi2)`` with 4 degrees of freedom, so answer and noise have together a multivariate t distribution."""

DEGREES = 4
"""Degrees of freedom of 'heavy tails'"""


@dataclass(frozen=True)
class Holder:
    """A channel, the entries of the answer that it holds, and the tokens of which it holds them."""

    channel: Channel
    first: int = 0
    """The first of its entries in the answer"""
    apart: bool = False
    """Whether its room lies apart from the place of its entries in the answer"""
    of: Literal["all", "loud", "quiet"] = "all"
    signed: bool = False
    """Whether the hidden sign multiplies it before the last layer"""
    grows: bool = True
    """Whether the stream's growth multiplies it; copies get louder by themselves, by the same factor"""


@dataclass(frozen=True)
class Hidden:
    """A sample's hidden parts, N tokens."""

    answer: Tensor  # [N, width]: before loudness
    loudness: Tensor  # [N]
    loud: Tensor  # bool [N]: tokens of the loud minority; none where there is no such minority
    sign: Tensor  # [N]: 1 or -1
    gain: Tensor  # [L, N]: of each token and layer before the last
    held: list[Tensor]  # for each holder [L, N, room]: before loudness, gain, growth, sign and choice of tokens


class UnevenStream:
    """A stream of a family of :data:`UNEVEN_FAMILIES`; sizes and directions follow from ``seed``.

    It can be measured where a :class:`~lensbench.studies.held_out.HeldOutStream` can. Samples of any number of tokens share
    sizes, directions and the read-out. Raises ValueError for an unknown family.
    """

    shares: None = None
    """There are no declared shares: states are not normal, so the closed forms do not hold"""

    def __init__(self, family: str, *, seed: int = 0):
        if family not in UNEVEN_FAMILIES:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(UNEVEN_FAMILIES)}")
        self.family, self.made = family, UNEVEN_FAMILIES[family]
        self.drawn, rng = drawn_sizes(family, self.made.ranges, seed)
        directions = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.layers = int(self.drawn["layers"])
        self.holders: Sequence[Holder] = self.made.build(Sizes(self.drawn), directions)
        self.growth = float(self.drawn.get("growth", self.drawn.get("louder", 1.0)))
        self.width = max(holder.first + holder.channel.entries for holder in self.holders)  # of the answer
        self.signed = any(holder.signed for holder in self.holders)
        rooms = sum(holder.channel.room for holder in self.holders if holder.apart)
        self.d = self.width + rooms + self.signed
        self.readout: ReadOut = read_out(
            self.d,
            VOCAB,
            norm="layer" if self.made.layer_norm else "rms",
            read=None if self.made.layer_norm else self.width,
            seed=int(rng.integers(2**31)),
        )

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Verdicts that suit this stream: its family's, and that of its quiet tokens where nearly all are quiet."""
        nearly_all = self.made.quiet is not None and 1 - float(self.drawn["loud"]) > NEARLY_ALL
        return (*self.made.verdicts, self.made.quiet) if nearly_all and self.made.quiet else self.made.verdicts

    @property
    def size(self) -> Tensor:
        """Standard deviations of the answer's entries before loudness, ``[width]``."""
        made = torch.zeros(self.width)
        for holder in self.holders:
            made[_places(holder)] = holder.channel.size
        return made

    def parts(self, tokens: int, *, seed: int, per_document: int = 8) -> Hidden:
        """A sample's hidden parts."""
        random = torch.Generator().manual_seed(seed)
        answer = answers(tokens, self.width, random, per_document=per_document, shared=SHARED) * self.size
        loudness, loud = self._loudness(tokens, random)
        sign = 1.0 - 2.0 * torch.randint(2, (tokens,), generator=random)
        spread = float(self.drawn.get("spread_of_layers", 0.0))
        gain = torch.exp(spread * torch.randn(self.layers, tokens, generator=random))
        held = [torch.stack(h.channel.draw(answer[:, _places(h)], random)) for h in self.holders]
        return Hidden(answer, loudness, loud, sign, gain, held)

    def _loudness(self, tokens: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loudness ``[tokens]``, and which tokens are of the loud minority."""
        normal = torch.randn(tokens, DEGREES, generator=random)
        loud = torch.zeros(tokens, dtype=torch.bool)
        if self.made.loudness == "log-normal":
            return torch.exp(float(self.drawn["spread"]) * normal[:, 0]), loud
        if self.made.loudness == "heavy tails":
            return normal.square().mean(-1).rsqrt(), loud
        if self.made.loudness == "minority":
            loud = torch.rand(tokens, generator=random) < float(self.drawn["loud"])
            return torch.where(loud, float(self.drawn["loudness"]), 1.0), loud
        return torch.ones(tokens), loud

    def assembled(self, parts: Hidden) -> Tensor:
        """States ``[L+1, N, d]``: places of the answer first, then rooms, last the direction that holds the sign."""
        h = torch.zeros(self.layers + 1, len(parts.answer), self.d)
        growth = self.growth ** torch.arange(self.layers + 1)
        room = self.width
        for holder, held in zip(self.holders, parts.held, strict=True):
            x = held * growth[:-1, None, None] if holder.grows else held
            x = x * parts.sign[:, None] if holder.signed else x
            # What a holder does not hold is left at 0, not taken off: other holders may share its place.
            chosen = {"all": torch.ones_like(parts.loud), "loud": parts.loud, "quiet": ~parts.loud}[holder.of]
            start = room if holder.apart else holder.first
            h[:-1, :, start : start + holder.channel.room] += x * (parts.gain * chosen)[..., None]
            if holder.apart:
                h[-1, :, start : start + holder.channel.room] = x[-1] * chosen[:, None]
                room += holder.channel.room
        if self.signed:
            h[..., -1] = growth[:, None] * parts.sign
        h[-1, :, : self.width] = growth[-1] * parts.answer
        return h * parts.loudness[:, None]

    def states(self, tokens: int, *, seed: int, per_document: int = 8) -> Tensor:
        """A sample of the stream's states, ``[L+1, tokens, d]``."""
        return self.assembled(self.parts(tokens, seed=seed, per_document=per_document))

    def capture(self, tokens: int, *, seed: int, per_document: int = 8, constant: Tensor | None = None) -> Capture:
        """A sample of :meth:`states` with what the read-out predicts from it; see :func:`capture_of`."""
        states = self.states(tokens, seed=seed, per_document=per_document)
        return capture_of(self.readout, states, per_document=per_document, constant=constant, seed=seed)


def _places(holder: Holder) -> slice:
    return slice(holder.first, holder.first + holder.channel.entries)


Build = Callable[[Sizes, torch.Generator], Sequence[Holder]]


@dataclass(frozen=True)
class UnevenFamily:
    """A family of uneven streams: what it is, the verdicts that suit it, and what its random sizes are drawn from."""

    what: str
    verdicts: tuple[str, ...]
    """The verdict that the construction asks for; where there are more, any of them is right"""
    build: Build
    ranges: dict[str, Range]
    loudness: Loudness = "even"
    quiet: str | None = None
    """The verdict of the quiet tokens alone, where loud tokens are held in another way"""
    layer_norm: bool = False


def _place(s: Sizes, size: Tensor, random: torch.Generator) -> Holder:
    return Holder(s.refined(size))


def _copies(s: Sizes, size: Tensor, random: torch.Generator) -> Holder:
    room = round(s["room"] * len(size))
    return Holder(copied(size, s.sigma, s["louder"], room, random), apart=True, grows=False)


def _new_bases(s: Sizes, size: Tensor, random: torch.Generator) -> Holder:
    return Holder(rebased(size, s.sigma, random))


How = Callable[[Sizes, Tensor, torch.Generator], Holder]


def _all(how: How) -> Build:
    def build(s: Sizes, random: torch.Generator) -> Sequence[Holder]:
        return (how(s, torch.ones(int(s["width"])), random),)

    return build


def _by_loudness(loud: How, quiet: How) -> Build:
    """Loud tokens one way, quiet tokens another; one of the two apart, so that a linear reading can see both."""

    def build(s: Sizes, random: torch.Generator) -> Sequence[Holder]:
        size = torch.ones(int(s["width"]))
        first, second = loud(s, size, random), quiet(s, size, random)
        return (
            Holder(first.channel, apart=first.apart, of="loud", grows=first.grows),
            Holder(second.channel, apart=not first.apart, of="quiet", grows=second.grows),
        )

    return build


def _behind_a_sign(s: Sizes, random: torch.Generator) -> Sequence[Holder]:
    """Entries in place that all can see, and behind a sign ``share`` of the answer's power, in the way that was drawn."""
    width, share = int(s["width"]), s["share"]
    hidden = max(2, round(width * share))
    seen = width - hidden
    # Numbers of entries are whole, so the power is set by their size.
    size = torch.full((hidden,), (share / (1 - share) * seen / hidden) ** 0.5)
    how: dict[str, How] = {"copied": _copies, "rebased": _new_bases, "in place": _place}
    other = how[str(s.drawn["hidden"])](s, size, random)
    return (
        _place(s, torch.ones(seen), random),
        Holder(other.channel, first=seen, apart=other.apart, signed=True, grows=other.grows),
    )


DEEP: dict[str, Range] = {"layers": (4, 10), **NOISES, **REFINES}
WIDE: dict[str, Range] = {"width": (24, 96)}
SPREAD: dict[str, Range] = {"spread": (0.3, 1.0)}
COPIED: dict[str, Range] = {**LOUDER, "louder": (1.4, 1.6), "width": (24, 32), "room": (1.0, 2.0)}
LOUD: dict[str, Range] = {"loud": (0.15, 0.45), "loudness": (2.5, 5.0)}
"""Loud tokens are a minority, and hold more than half of the power at any of these"""

UNEVEN_FAMILIES: dict[str, UnevenFamily] = {
    "log-normal-place": UnevenFamily(
        "refined in place, log-normal loudness", (ADDED,), _all(_place),
        {**DEEP, **WIDE, **SPREAD, "growth": (0.9, 1.4)}, "log-normal",
    ),
    "minority-place": UnevenFamily(
        "refined in place, a minority of the tokens is loud; LayerNorm", (ADDED,), _all(_place),
        {**DEEP, **WIDE, "loud": (0.05, 0.5), "loudness": (2.0, 5.0)}, "minority", layer_norm=True,
    ),
    "heavy-tails-place": UnevenFamily(
        "refined in place, answer and noise have together a t distribution", (ADDED,), _all(_place),
        {**DEEP, **WIDE, "growth": (0.9, 1.4)}, "heavy tails",
    ),
    "log-normal-copied": UnevenFamily(
        "copied on top of older copies, log-normal loudness", (CARRIED,), _all(_copies),
        {**COPIED, **SPREAD}, "log-normal",
    ),
    "log-normal-rebased": UnevenFamily(
        "a new basis at every layer, log-normal loudness", (REPRESENTED,), _all(_new_bases),
        {"layers": (4, 10), **NOISES, **WIDE, **SPREAD}, "log-normal",
    ),
    "loud-place-quiet-copied": UnevenFamily(
        "loud tokens are refined in place; the quiet majority is copied on top of older copies",
        (MIXED, UNDETERMINED), _by_loudness(_place, _copies), {**DEEP, **COPIED, **LOUD}, "minority", quiet=CARRIED,
    ),
    "loud-copied-quiet-place": UnevenFamily(
        "loud tokens are copied on top of older copies; the quiet majority is refined in place",
        (MIXED, UNDETERMINED), _by_loudness(_copies, _place),
        {**DEEP, **COPIED, **LOUD, "loud": (0.05, 0.45)}, "minority", quiet=ADDED,
    ),
    "loud-place-quiet-rebased": UnevenFamily(
        "loud tokens are refined in place; the quiet majority is in a new basis at every layer",
        (MIXED, UNDETERMINED), _by_loudness(_place, _new_bases),
        {**DEEP, "width": (16, 48), **LOUD}, "minority", quiet=REPRESENTED,
    ),
    "much-hidden": UnevenFamily(
        "a part is refined in place; much of the answer is behind a sign, copied or in new bases",
        (UNDETERMINED, MIXED), _behind_a_sign,
        {**DEEP, **COPIED, "width": (24, 36), "share": (0.4, 0.7), "hidden": ("copied", "rebased")},
    ),
    "little-hidden": UnevenFamily(
        "nearly all is refined in place; a little of the answer is behind a sign", (ADDED, MIXED), _behind_a_sign,
        {**DEEP, "width": (24, 95), "share": (0.03, 0.1), "hidden": ("in place", "rebased")},
    ),
    "uneven-layers": UnevenFamily(
        "refined in place, each token and layer before the last with a gain of its own", (ADDED,), _all(_place),
        {**DEEP, **WIDE, "spread_of_layers": (0.3, 0.8)},
    ),
}  # fmt: skip
"""Name of a family of uneven streams -> the family; no name is one of the first held-out families'"""
