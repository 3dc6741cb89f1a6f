"""Passes of a model with products in float16, on a processor that is fast at them and where they agree with float32.

Products of matrices take nearly all the time of a pass, and processors with instructions for half precision make them
several times faster than in float32. The residual stream and the norms stay in float32; attention and MLPs work in float16
between their products. The model's own predictions are read out in float32.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lensbench.data.samples import Samples
from lensbench.runtime.rates import half_is_fast
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream

LEAST_PARAMETERS = 2**25
"""Of smaller models the time goes elsewhere"""

LARGEST_KL = 1e-4
"""Largest mean KL of the model's predictions, passes in float32 against passes in float16, nats/token"""

LARGEST_ERROR = 5e-3
"""Largest relative error of states, in the layer where it is largest"""

INPUTS, POSITIONS = 4, 64
"""Inputs that both kinds of passes read, and places in each that are compared"""

LOGITS = 2**24
"""Logits that are compared, at most"""


@dataclass(frozen=True)
class HalfAgreement:
    """How far passes in float16 are from passes in float32."""

    kl: float
    """Mean KL of the predictions, nats/token"""
    state_error: float
    """Median over positions of ``|h16 - h32| / |h32 - mean h32|``, in the layer where it is largest"""

    @property
    def good(self) -> bool:
        """Whether both are within their limits; not where float16 overflows."""
        return self.kl <= LARGEST_KL and self.state_error <= LARGEST_ERROR

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says."""
        return {"passes": "float16", **asdict(self)}


def half_agreement(stream: ResidualStream, samples: Samples) -> HalfAgreement:
    """Passes over some inputs in both precisions, compared at their scored positions."""
    inputs, rows, at = (torch.from_numpy(x) for x in samples.scored(slice(None)))
    step = -(-len(at) * stream.vocab_size // LOGITS)
    rows, at = rows[::step], at[::step]
    exact, half = (stream.states_at(inputs, rows, at, half=half) for half in (False, True))
    centred = (exact - exact.mean(1, keepdim=True)).norm(dim=-1)
    errors = ((half - exact).norm(dim=-1) / centred.clamp(min=1e-30)).median(dim=-1).values
    kl = mean_kl(stream.readout, exact[-1], half[-1])
    finite = bool(torch.isfinite(half).all())
    return HalfAgreement(kl if finite else float("inf"), float(errors.max()) if finite else float("inf"))


def mean_kl(readout: ReadOut, of: Tensor, other: Tensor) -> float:
    """Mean KL of the read-outs of two states ``[n, d]`` each, nats/token."""
    p, q = (readout(h).double().log_softmax(-1) for h in (of, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def choose_half(stream: ResidualStream, samples: Callable[[], Samples]) -> HalfAgreement | None:
    """How well passes in float16 agree, where they are worth it and agree well enough; None where they are not used.

    They are used for large models in float32 on a processor that is fast at them.
    """
    large = sum(p.numel() for p in stream.model.parameters()) >= LEAST_PARAMETERS
    if not (large and stream.float32 and stream.device.type == "cpu" and half_is_fast()):
        return None
    found = half_agreement(stream, samples())
    return found if found.good else None
