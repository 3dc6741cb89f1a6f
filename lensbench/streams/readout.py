"""How a model turns its last state into logits: final norm, unembedding, bias, soft cap."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tuned_lens.nn.unembed import Unembed


class ReadOut(Unembed):
    """``R(h) = head(norm(h))``, found by hooks instead of by a list of classes; usable wherever tuned-lens wants an Unembed.

    ``final_norm`` maps ``[..., d]`` to ``[..., d_read]`` and ``unembedding`` maps that to logits ``[..., V]``, multiplied by
    ``scale`` and bent by ``softcap tanh(. / softcap)`` where the model does so. The modules are the model's own (never
    copied), frozen.
    """

    def __init__(self, final_norm: nn.Module, unembedding: nn.Linear, scale: float = 1.0, softcap: float | None = None):
        nn.Module.__init__(self)  # Unembed's own constructor knows seven architectures and copies the weights
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.scale, self.softcap = scale, softcap
        self.product_dtype: torch.dtype | None = None  # of log-partitions on a GPU; None: that of the states
        self.requires_grad_(False)
        self._scaled: tuple[Tensor, Tensor | None] | None = None
        self._gains: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}

    @property
    def linear(self) -> bool:
        """Whether logits are affine in ``norm(h)``, so that ``e = W^T p`` says all about the model's distribution."""
        return self.softcap is None

    @property
    def weight(self) -> Tensor:
        """Unembedding W with the scale of the logits folded in, ``[V, d_read]``."""
        return self.unembedding.weight if self.scale == 1 else self._folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the unembedding with the scale of the logits folded in, ``[V]``."""
        return self.unembedding.bias if self.scale == 1 else self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        if self._scaled is None or self._scaled[0].device != weight.device or self._scaled[0].dtype != weight.dtype:
            self._scaled = weight * self.scale, None if bias is None else bias * self.scale
        return self._scaled

    def in_float32(self) -> "ReadOut":
        """This read-out, or a float32 copy of it where the model computes in another type."""
        if self.unembedding.weight.dtype == torch.float32 and all(
            p.dtype == torch.float32 for p in self.final_norm.parameters()
        ):
            return self
        return ReadOut(
            copy.deepcopy(self.final_norm).float(), copy.deepcopy(self.unembedding).float(), self.scale, self.softcap
        )

    def with_products_in(self, dtype: torch.dtype | None) -> "ReadOut":
        """This read-out, its modules shared, with the products of log-partitions in ``dtype``; None: that of the states."""
        if dtype == self.product_dtype:
            return self
        other = copy.copy(self)
        other.product_dtype = dtype
        return other

    def cap_(self, logits: Tensor) -> Tensor:
        """Soft-capping in place, where the model has it."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, n: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normalised states ``[..., d_read]``."""
        scaled = F.linear(n.to(self.weight.dtype), self.weight, self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``."""
        return self.logits(self.final_norm(h))

    def gain(self, d: int) -> Tensor | None:
        """Matrix G ``[d_read, d]`` with ``norm(x) = G x / scale(x) + norm(0)``, up to a constant; None if there is none.

        Read off the norm's answers to unit vectors, so that RMSNorm, LayerNorm, norms without gain and norms that look at
        a part of the state need no case of their own. The claim is checked on random states before it is used.
        """
        weight = self.unembedding.weight
        key = d, weight.dtype, weight.device
        if key not in self._gains:
            self._gains[key] = self._find_gain(d, weight.dtype, weight.device)
        return self._gains[key]

    def _find_gain(self, d: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        offset = self.final_norm(torch.zeros(d, dtype=dtype, device=device))
        # Long vectors, so that the norm's epsilon does not count; unseen directions map to the offset itself.
        gain = (self.final_norm(1e3 * torch.eye(d, dtype=dtype, device=device)) - offset).T
        x = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cosine = F.cosine_similarity(x @ gain.T, self.final_norm(x) - offset, dim=-1)
        return gain if bool((cosine > 1 - 1e-4).all()) else None
