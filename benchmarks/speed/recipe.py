"""The published recipe: tuned-lens's training loop, its mathematics step by step, in float32.

Belrose et al. 2023 (arXiv 2303.08112) as tuned-lens 0.2.0 ships it: translators from zero, SGD with Nesterov momentum
(or Adam with amsgrad), 250 steps of 2^18 tokens, gradients clipped to norm 1, learning rate falling linearly to 0, the
model's log-probabilities and every lens's computed anew at every step. Departures: gradients are clipped lens by lens (the
package clips the norm over all lenses together); each lens may have a rate of its own; Adam warms up over a fifth of the
steps, as the package documents (it compares an enum with a string and never does) and falls to 0 at the last step, not
before it; and everything is in float32, on both sides of a comparison, where the package runs its lenses under bfloat16
autocast: more exact, and slower on a processor whose bfloat16 products are fast (descriptions give both rates).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup
from tuned_lens.nn.lenses import TunedLens, TunedLensConfig

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.refine import LogPartition
from lensbench.streams.readout import ReadOut

OptimizerName = Literal["sgd", "adam"]
STEPS = 250
TOKENS_PER_STEP = 2**18


@dataclass(frozen=True)
class Setting:
    """An optimizer and what its default rate (1.0 for SGD, 1e-3 for Adam) is multiplied by."""

    optimizer: OptimizerName
    lr_scale: float

    def __str__(self) -> str:
        return f"{self.optimizer} x{self.lr_scale:g}"


class RecipeLens:
    """One translator of tuned-lens's ``TunedLens`` with the optimizer and schedule that the package gives it."""

    def __init__(self, readout: ReadOut, d: int, setting: Setting, steps: int):
        self.readout = readout
        self.lens = TunedLens(readout, TunedLensConfig("recipe", d_model=d, num_hidden_layers=1))
        parameters = list(self.lens.layer_translators.parameters())
        momentum, decay = 0.9, 1e-3
        self.optimizer: torch.optim.Optimizer
        if setting.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, lr=setting.lr_scale * (1 - momentum), momentum=momentum, nesterov=True, weight_decay=decay
            )
            warmup = 0
        else:
            self.optimizer = torch.optim.Adam(
                parameters, lr=setting.lr_scale * 1e-3, betas=(momentum, 0.999), amsgrad=True, weight_decay=decay
            )
            warmup = min(1000, steps // 5)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, steps)

    def step(self, loss: Tensor) -> float:
        """One update from a loss that was computed with this lens."""
        loss.backward()
        return self.update(loss)

    def update(self, loss: Tensor) -> float:
        """The loss, in nats, after one update from the gradients that it left."""
        torch.nn.utils.clip_grad_norm_(self.lens.layer_translators.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.scheduler.step()
        return float(loss.detach())

    def published_loss(self, h: Tensor, log_p: Tensor) -> Tensor:
        """Mean KL as the package writes it, from the model's log-probabilities ``[N, V]``."""
        logits = self.lens(h, idx=0)
        return torch.sum(log_p.exp() * (log_p - logits.log_softmax(-1)), dim=-1).mean()

    def cached_loss(self, h: Tensor, expected: Tensor, entropy_term: Tensor) -> Tensor:
        """The same loss and gradient from ``e = W^T p`` and ``sum p log p``: what long runs use, where only KL counts."""
        if not self.readout.linear:
            raise LensbenchError("cached_loss needs logits without a soft cap")
        n = self.readout.final_norm(self.lens.transform_hidden(h, 0))
        log_z = LogPartition.apply(n, self.readout.weight, self.readout.bias)
        return (entropy_term - (expected * n).sum(-1) + log_z).mean()

    def maps(self) -> AffineMaps:
        """The lens as one affine map."""
        translator = self.lens.layer_translators[0]
        weight = translator.weight.detach().clone()
        return AffineMaps((weight + torch.eye(len(weight)).to(weight))[None], translator.bias.detach().clone()[None])

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {
            "lens": self.lens.layer_translators.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def restore(self, state: dict[str, dict]) -> None:
        """Take up what :meth:`state` returned."""
        self.lens.layer_translators.load_state_dict(state["lens"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def visits(tokens: int, per_step: int, steps: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Indices of the tokens of each step: the pool in a random order, and again in another when it is used up."""
    # One permutation per epoch, drawn from its own seed, so that a resumed run sees what an undisturbed one sees.
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    for step in range(start, steps):
        wanted = torch.arange(step * per_step, (step + 1) * per_step)
        parts = []
        for number in (wanted // tokens).unique().tolist():
            if number != epoch:
                epoch = number
                order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
            parts.append(order[wanted[wanted // tokens == number] % tokens])
        yield torch.cat(parts)
