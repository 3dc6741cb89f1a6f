"""Second moments of a synthetic stream from its construction: what more and more of its tokens would come to.

Every state of :mod:`lensbench.studies.synthetic` and :mod:`lensbench.studies.held_out` is a linear function of independent
standard normal variables. Its matrix is read off by passing one-hot vectors in their place, and covariances of any two
layers are products of two such matrices: exact, for no token at all.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lensbench.lenses.moments import Moments
from lensbench.measures.update.metric import Metric, factor_of
from lensbench.streams.readout import ReadOut
from lensbench.studies.channels import Channel
from lensbench.studies.held_out import HeldOutStream, Parts
from lensbench.studies.synthetic import STREAM_FAMILIES, SyntheticStream

METRIC_TOKENS, METRIC_BLOCK = 65_536, 2048
"""Final states whose predictions the metric is a mean of, and how many are drawn at once"""


@dataclass(frozen=True)
class Population:
    """Covariances of a stream's layers 0..L-1 and of its final state, float64; all means are 0."""

    maps: Tensor
    """``[L+1, m, d]``: each layer's state as a linear function of m independent standard normal variables"""

    @classmethod
    def of(cls, stream: SyntheticStream | HeldOutStream) -> "Population":
        """That of a stream of either kind."""
        maps = of_held_out(stream) if isinstance(stream, HeldOutStream) else of_synthetic(stream)
        return cls(maps.double())

    @property
    def layers(self) -> int:
        """How many layers stand before the final state."""
        return len(self.maps) - 1

    @cached_property
    def own(self) -> Tensor:
        """``[L, d, d]``: Cov h_j."""
        before = self.maps[:-1]
        return before.transpose(-1, -2) @ before

    @cached_property
    def goal(self) -> Tensor:
        """``[L, d, d]``: Cov(h_j, h_L)."""
        return self.maps[:-1].transpose(-1, -2) @ self.maps[-1]

    @cached_property
    def last(self) -> Tensor:
        """``[d, d]``: Cov h_L."""
        return self.maps[-1].T @ self.maps[-1]

    def later(self, i: int) -> Tensor:
        """Cov(h_j, h_i) of the later layers j, ``[L - 1 - i, d, d]``."""
        return self.maps[i + 1 : -1].transpose(-1, -2) @ self.maps[i]

    def readings(self, read: Tensor) -> None:
        """None: there are no tokens to read."""

    @cached_property
    def moments(self) -> Moments:
        """The regressions of every layer, and last of the final state itself, to the final state."""
        zero = self.maps.new_zeros(self.layers + 1, self.maps.shape[-1])
        cross = torch.cat([self.goal.transpose(-1, -2), self.last[None]])
        return Moments(zero, torch.cat([self.own, self.last[None]]), cross, zero[0])

    @torch.no_grad()
    def metric(self, readout: ReadOut, *, seed: int, tokens: int = METRIC_TOKENS) -> Metric:
        """The read-out's mean Fisher metric of so many final states, drawn block by block."""
        random = torch.Generator().manual_seed(seed)
        values, vectors = torch.linalg.eigh(self.last)
        root = (vectors * values.clamp(min=0).sqrt()).float()
        weight, p_sum = readout.weight.double(), torch.zeros(len(readout.weight), dtype=torch.float64)
        aims = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for start in range(0, tokens, METRIC_BLOCK):
            count = min(METRIC_BLOCK, tokens - start)
            p = readout(torch.randn(count, root.shape[1], generator=random) @ root.T).softmax(-1)
            expected = p @ readout.weight
            p_sum += p.sum(0, dtype=torch.float64)
            aims += (expected.T @ expected).double()
        gain = readout.gain(self.maps.shape[-1])
        assert gain is not None
        inner = weight.T @ ((p_sum / tokens)[:, None] * weight) - aims / tokens
        return Metric("fisher", factor_of(gain.double().T @ inner @ gain.double()))


def of_synthetic(stream: SyntheticStream) -> Tensor:
    """:attr:`Population.maps` of a stream of the families of :mod:`lensbench.studies.synthetic`."""
    draw, width = STREAM_FAMILIES[stream.family].draw, stream.width
    calls = 0

    def count() -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(1, width)

    draw(stream, torch.zeros(1, width), count)
    one_hot = iter(torch.eye(width * (calls + 1)).split(width, 1))
    return torch.stack(draw(stream, next(one_hot), lambda: next(one_hot)))


def of_held_out(stream: HeldOutStream) -> Tensor:
    """:attr:`Population.maps` of a stream of the families of :mod:`lensbench.studies.held_out`."""
    widths = [stream.width, *(c.entries for c in stream.channels for _ in range(stream.layers))]
    answer, *noises = torch.eye(sum(widths)).split(widths, 1)
    answer = answer * stream.size
    held = []
    for number, (channel, y) in enumerate(
        zip(stream.channels, answer.split([c.entries for c in stream.channels], 1), strict=True)
    ):
        own = noises[number * stream.layers : (number + 1) * stream.layers]
        held.append(held_by(channel, y, own))
    return stream.assembled(Parts(answer, held))


def held_by(channel: Channel, answer: Tensor, noises: list[Tensor]) -> Tensor:
    """What a channel holds ``[L, N, room]`` of answers ``[N, entries]``, given each layer's noise ``[N, entries]``."""
    x, states = torch.zeros(len(answer), channel.room), []
    for keep, write, noise, drawn in zip(channel.keep, channel.write, channel.noise, noises, strict=True):
        x = keep * x + answer @ write.T + drawn @ noise.T
        states.append(x)
    return torch.stack(states)
