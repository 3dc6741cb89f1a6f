"""The read-out of a model, from its last state to logits: final norm, unembedding, bias, scale, soft cap."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tuned_lens.nn.unembed import Unembed


@dataclass(frozen=True)
class HalfProducts:
    """Products in half precision that stand for one in float32.

    A float32 number is then one number of ``dtype``, or the sum of two: its rounded value and what rounding took off. The
    first product is of rounded states and weights, the second of what rounding took off the states, the third of what it
    took off the weights; weights that are bfloat16 numbers, as many models have, need no third.
    """

    dtype: torch.dtype
    """bfloat16, or float16, which has three more digits in base two and a smaller range"""
    terms: int
    """How many products: 1, 2 or 3"""

    def __str__(self) -> str:
        """How many, and in what."""
        return f"{self.terms} product{'s' * (self.terms > 1)} in {str(self.dtype).removeprefix('torch.')}"


def in_terms(x: Tensor, terms: int, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of ``dtype`` that add up to x: its rounded value and, of two ``terms`` or more, what rounding took off."""
    high = x.to(dtype)
    return [high, (x - high.to(x.dtype)).to(dtype)] if terms > 1 else [high]


def frozen(module: nn.Module) -> nn.Module:
    """A module with the same weights, in the same memory, that take no gradient; the given one stays as it is."""
    other: nn.Module = module.__new__(type(module))
    other.__dict__ = module.__dict__.copy()
    other._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    other._buffers = module._buffers.copy()
    other._modules = {name: None if child is None else frozen(child) for name, child in module._modules.items()}
    return other


class ReadOut(Unembed):
    """``R(h) = head(norm(h))`` of any model; it can replace the ``Unembed`` of tuned-lens.

    ``final_norm`` maps ``[..., d]`` to ``[..., d_read]``, ``unembedding`` maps that to logits ``[..., V]``. They are
    multiplied by ``scale`` and capped, ``softcap tanh(. / softcap)``, where the model does so. The modules are the model's
    own, as they are; see :meth:`frozen`.
    """

    def __init__(self, final_norm: nn.Module, unembedding: nn.Linear, scale: float = 1.0, softcap: float | None = None):
        nn.Module.__init__(self)  # the constructor of Unembed knows seven architectures and copies weights
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.scale, self.softcap = scale, softcap
        self.products: HalfProducts | None = None
        """Of log-partitions; None: in the states' own type"""
        self._halves: tuple[Tensor, ...] | None = None
        self._longest: float | None = None
        self._scaled: tuple[Tensor, Tensor | None] | None = None
        self._gains: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}

    @property
    def linear(self) -> bool:
        """Whether logits are affine in ``norm(h)``; then a KL divergence needs only ``e = W^T p`` and the entropy of p."""
        return self.softcap is None

    @property
    def weight(self) -> Tensor:
        """Unembedding W ``[V, d_read]``, multiplied by the scale of the logits."""
        return self.unembedding.weight if self.scale == 1 else self._folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the unembedding ``[V]``, multiplied by the scale of the logits."""
        return self.unembedding.bias if self.scale == 1 else self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        if self._scaled is None or self._scaled[0].device != weight.device or self._scaled[0].dtype != weight.dtype:
            self._scaled = weight * self.scale, None if bias is None else bias * self.scale
        return self._scaled

    def frozen(self) -> "ReadOut":
        """This read-out with weights that take no gradient, in the same memory; the model's own modules stay as they are."""
        other = copy.copy(self)
        other._scaled, other._halves, other._longest, other._gains = None, None, None, {}
        other._modules = {name: frozen(module) for name, module in self._modules.items() if module is not None}
        return other

    def in_float32(self) -> "ReadOut":
        """This read-out if it is in float32, else a float32 copy of it."""
        if self.unembedding.weight.dtype == torch.float32 and all(
            p.dtype == torch.float32 for p in self.final_norm.parameters()
        ):
            return self
        wide = ReadOut(
            copy.deepcopy(self.final_norm).float(), copy.deepcopy(self.unembedding).float(), self.scale, self.softcap
        )
        return wide.frozen()

    def with_products(self, products: HalfProducts | None) -> "ReadOut":
        """This read-out, its modules shared, with log-partitions of these products; None: in the states' own type."""
        if products == self.products:
            return self
        other = copy.copy(self)
        other.products, other._halves = products, None
        return other

    @property
    def weight_in_terms(self) -> tuple[Tensor, ...]:
        """W in half precision, of three products also what rounding took off it; kept, half the size of a float32 W each."""
        assert self.products is not None
        if self._halves is None:
            self._halves = tuple(in_terms(self.weight, 2 if self.products.terms == 3 else 1, self.products.dtype))
        return self._halves

    @property
    def longest(self) -> float:
        """Length of the longest row of W; kept."""
        if self._longest is None:
            self._longest = max(float(rows.norm(dim=-1).max()) for rows in self.weight.split(2**14))
        return self._longest

    def cap_(self, logits: Tensor) -> Tensor:
        """``logits``, soft-capped in place where the model does so."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, n: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normalised states ``[..., d_read]``."""
        scaled = F.linear(n.to(self.weight.dtype), self.weight, self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``."""
        return self.logits(self.final_norm(h))

    def gain(self, d: int) -> Tensor | None:
        """Matrix G ``[d_read, d]`` with ``norm(x) = G x / scale(x) + norm(0)``, up to a factor; None if no matrix does that.

        G is measured with unit vectors, so RMSNorm, LayerNorm, norms without gain and norms of a part of the state need no
        cases. It is then checked on random states.
        """
        weight = self.unembedding.weight
        key = d, weight.dtype, weight.device
        if key not in self._gains:
            self._gains[key] = self._find_gain(d, weight.dtype, weight.device)
        return self._gains[key]

    @staticmethod
    def inverse_scale(unscaled: Tensor, normalised: Tensor, offset: Tensor) -> Tensor:
        """``1 / scale(x)`` of states x, ``[n]``, up to the factor of G, where ``norm(x) = G x / scale(x) + norm(0)``.

        ``unscaled`` ``[n, d_read]``: ``G x``; ``normalised``: ``norm(x)``; ``offset`` ``[d_read]``: ``norm(0)``. By least
        squares over the entries.
        """
        return ((normalised - offset) * unscaled).sum(-1) / unscaled.pow(2).sum(-1)

    def _find_gain(self, d: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        offset = self.final_norm(torch.zeros(d, dtype=dtype, device=device))
        # Long vectors make the norm's epsilon negligible; directions that the norm does not see give the offset.
        gain = (self.final_norm(1e3 * torch.eye(d, dtype=dtype, device=device)) - offset).T
        x = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cosine = F.cosine_similarity(x @ gain.T, self.final_norm(x) - offset, dim=-1)
        return gain if bool((cosine > 1 - 1e-4).all()) else None
