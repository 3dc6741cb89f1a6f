"""What the construction of a synthetic stream declares: where each pair of layers gains, and what becomes of the gain.

Channels (:mod:`lensbench.studies.channels`) are independent and have rooms of their own, so the error that the best
reading of layer l leaves is a sum over channels. A channel's **gain** from layer i to j is ``tr G (X_j - X_i)``. X_l is the
covariance of ``E[y | x_l]``, in closed form. G is the read-out's mean Fisher metric without the norm's scale,
``D^T (W^T diag(mean p) W - mean(e e^T)) D`` with ``e = W^T p`` and D the norm's gain. A channel says for every pair which
share of its gain the old reading shows (1 in place, the cosine of a turned basis, 0 in a new basis) and which goes
elsewhere (1 where copies are carried). Shares of the stream are those of its channels, weighted by their gains. No lens
is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lensbench.studies.channels import Array, Channel

UNSEEN = 0.1
"""A direction of which less than this share is explained brings news"""


@dataclass(frozen=True)
class DeclaredShares:
    """What the construction declares; pairs ``[L, L]`` of layers i < j, NaN elsewhere and where ``why_not`` has a reason."""

    in_place: Array
    """Share of the gain that the old reading shows as the new one does"""
    carried: Array
    """Share of the gain that goes where the old reading does not look, while what it reads stays"""
    represented: Array
    """Share of the gain in a basis that the old reading does not follow; the three sum to 1"""
    kept: Array
    """Share of what layer i explains that its reading still shows at layer j, growth apart (cosine of a turned basis)"""
    news: Array
    """Share of the gain in explained power (each direction of the answer counts the same) where layer i explains < 10 %"""
    in_place_of_cross_entropy: float
    """Share of the cross-entropy gain that lies in channels in place"""
    power: dict[str, float]
    """Channel -> its share of the answer's power, in the metric G"""
    why_not: dict[str, str] = field(default_factory=dict)
    """Field that is NaN -> why"""

    @property
    def in_place_of_kept(self) -> Array:
        """In place / (in place + carried), what is in place of gains whose basis stays; NaN where no basis stays."""
        stays = self.in_place + self.carried
        return np.where(stays > 1e-9, self.in_place / np.where(stays > 1e-9, stays, 1), np.nan)

    def overall(self, name: str, *, first: int = 1) -> float:
        """Mean over pairs ``first <= i < j``; without layer 0 unless said."""
        value: Array = getattr(self, name)
        i, j = np.triu_indices(len(value), 1)
        return float(value[i, j][i >= first].mean())

    def by_block(self, name: str) -> Array:
        """Values ``[L-1]`` of the blocks i -> i + 1."""
        value: Array = getattr(self, name)
        return np.diagonal(value, 1).copy()


def declared(channels: Sequence[Channel], metric: Array) -> DeclaredShares:
    """The shares that follow from the channels of a stream and the metric G ``[width, width]`` of its answer."""
    layers = len(channels[0].keep)
    pairs = np.triu(np.ones((layers, layers), bool), 1)
    gained = {name: np.zeros((layers, layers)) for name in ("in_place", "carried", "represented", "news", "power")}
    kept, seen, white = np.zeros((layers, layers)), np.zeros((layers, 1)), np.zeros((layers, layers))
    power, start = {}, 0
    for channel in channels:
        own = metric[start : start + channel.entries, start : start + channel.entries]
        start += channel.entries
        explained = np.einsum("ab,lba->l", own, channel.explained)
        gain = explained - explained[:, None]
        gained["in_place"] += gain * channel.shown
        gained["carried"] += gain * channel.elsewhere
        gained["represented"] += gain * (1 - channel.shown - channel.elsewhere)
        gained["power"] += gain
        kept += explained[:, None] * (channel.shown + channel.elsewhere)
        seen += explained[:, None]
        news, all_new = _news(channel)
        gained["news"] += news
        white += all_new
        variance = channel.size.double().numpy() ** 2
        power[channel.name] = float((own.diagonal() * variance).sum())
    total = gained["power"]
    grows = pairs & (total > 1e-9 * sum(power.values()))
    of_gain = {
        name: np.where(grows, gained[name] / np.where(grows, total, 1), np.nan)
        for name in ("in_place", "carried", "represented")
    }
    why_not = {}
    if not grows[pairs].all():
        why_not = dict.fromkeys((*of_gain, "news"), "some pair of layers gains nothing")
    nats, why = _of_cross_entropy(channels, gains=bool(grows[pairs].all()))
    return DeclaredShares(
        **of_gain,
        kept=np.where(pairs, kept / seen, np.nan),
        news=np.where(grows, gained["news"] / np.where(grows, white, 1), np.nan),
        in_place_of_cross_entropy=nats,
        power={name: value / sum(power.values()) for name, value in power.items()},
        why_not=why_not | ({"in_place_of_cross_entropy": why} if why else {}),
    )


def _news(channel: Channel) -> tuple[Array, Array]:
    """Gain in explained power of the whitened entries, for pairs ``[L, L]``: where layer i explains little, and all."""
    size = channel.size.double().numpy()
    white = channel.explained / size[:, None] / size
    news = np.zeros((len(white), len(white)))
    for i, known in enumerate(white):
        values, vectors = np.linalg.eigh((known + known.T) / 2)
        unseen = vectors[:, values < UNSEEN]
        news[i] = np.einsum("ak,lab,bk->l", unseen, white - known, unseen)
    trace = np.trace(white, axis1=1, axis2=2)
    return news, trace - trace[:, None]


def _of_cross_entropy(channels: Sequence[Channel], *, gains: bool) -> tuple[float, str]:
    """The share of the cross-entropy gain in place, or NaN and why the construction does not say."""
    predicting = [channel.shown for channel in channels if channel.predicts]
    if not gains:
        return np.nan, "cross-entropy does not fall"
    for all_of in (0.0, 1.0):
        if all((shown == all_of).all() for shown in predicting):
            return all_of, ""
    return np.nan, "channels share a softmax, so their gains in nats do not add up"
