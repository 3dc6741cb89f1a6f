"""A GPT of recurrent depth: one group of blocks, applied loop after loop, with the input injected at every loop.

With the embedded input e and the state h_k after k loops,

    h_{k+1} = norm(blocks(A [h_k; e])),   h_0 = e.

The model is that of Geiping et al. (arXiv 2502.05171) in small: an adapter A of state and input, blocks, and a norm that
scales what a loop returns. The state after every loop is a layer of the stream, and norm and head read each of them. In
training the number of loops is drawn anew at every step, and gradients go back through the last few loops alone. Two things
differ from the paper: there are no blocks before and after the loops, and loops begin at e rather than at noise, so that a
text always gives the same states.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lensbench.models.controls import ControlGPTBlock, ControlGPTConfig, ControlGPTForCausalLM


class LoopedGPTConfig(ControlGPTConfig):
    """Sizes of :class:`LoopedGPTForCausalLM`. Raises ``ValueError`` for values out of range.

    ``num_hidden_layers``: the number of loops in evaluation, the mean rate at which training draws them.
    ``blocks_per_loop``: blocks of the group. ``loops_spread``: standard deviation of the logarithm of that rate; with 0 it
    is the same at every step. ``backward_loops``: gradients go back through so many of the last loops.
    """

    model_type = "lensbench-looped-gpt"

    def __init__(
        self, blocks_per_loop: int = 2, loops_spread: float = 0.5, backward_loops: int = 8, **kwargs: Any
    ) -> None:
        for name, value in (("blocks_per_loop", blocks_per_loop), ("backward_loops", backward_loops)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        if isinstance(loops_spread, bool) or not isinstance(loops_spread, int | float) or not 0 <= loops_spread <= 2:
            raise ValueError(f"loops_spread must lie in 0..2, not {loops_spread!r}")
        self.blocks_per_loop = blocks_per_loop
        self.loops_spread = loops_spread
        self.backward_loops = backward_loops
        super().__init__(**kwargs)

    @property
    def summed_blocks(self) -> int:
        """How many blocks add to the stream before a norm scales it."""
        return self.blocks_per_loop


class Loop(nn.Module):
    """One loop: the adapter of state and input, the group of blocks, and the norm of what they return."""

    def __init__(self, config: LoopedGPTConfig):
        super().__init__()
        d, whole = config.hidden_size, slice(0, config.hidden_size)
        self.adapter = nn.Linear(2 * d, d, bias=False)
        self.blocks = nn.ModuleList(ControlGPTBlock(config, whole) for _ in range(config.blocks_per_loop))
        self.norm = nn.RMSNorm(d, eps=config.rms_norm_eps)

    def forward(self, h: Tensor, e: Tensor, mask: Tensor | None) -> Tensor:
        """The next state ``[B, T, d]`` of a state h and the embedded input e; ``mask`` ``[B, T]`` is 0 at padding."""
        x = self.adapter(torch.cat([h, e], -1))
        for block in self.blocks:
            x = block(x, mask)
        scaled: Tensor = self.norm(x)
        return scaled


class LoopedGPTForCausalLM(ControlGPTForCausalLM):
    """A GPT of one group of blocks in a loop (see the module's docstring)."""

    config_class: type[PreTrainedConfig] = LoopedGPTConfig
    _no_split_modules = ["Loop"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: LoopedGPTConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([Loop(config)])
        self.drawn: int | None = None
        """The number of loops of the next training step; None: that of the config"""
        PreTrainedModel.post_init(self)

    def draw(self, rng: np.random.Generator) -> None:
        """Draw the number of loops of a training step: ``r ~ Poisson(exp(t)) + 1``, ``t ~ N(log L - s^2 / 2, s)``.

        L and s are ``num_hidden_layers`` and ``loops_spread`` of the config (arXiv 2502.05171, section 3.3).
        """
        spread = self.config.loops_spread
        rate = math.exp(math.log(self.config.num_hidden_layers) - spread**2 / 2 + spread * float(rng.standard_normal()))
        self.drawn = int(rng.poisson(rate)) + 1

    def states(self, e: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The states before the first loop and after each ``[B, T, d]``, all before the final norm."""
        loops = self.drawn if self.training and self.drawn is not None else self.config.num_hidden_layers
        states = [e]
        for number in range(loops):
            followed = torch.is_grad_enabled() and (not self.training or number >= loops - self.config.backward_loops)
            with torch.set_grad_enabled(followed):
                states.append(self.layers[0](states[-1], e, mask))
        return states


def can_loop(model: nn.Module) -> bool:
    """Whether a model applies one layer again and again, so that it can do so more often than it was trained to."""
    config = getattr(model, "config", None)
    return isinstance(config, LoopedGPTConfig) or bool(getattr(config, "tied_layers", False))


@contextmanager
def looping(model: PreTrainedModel, loops: int) -> Iterator[None]:
    """A context in which a model of one layer (:func:`can_loop`) applies it ``loops`` times in evaluation."""
    before = model.config.num_hidden_layers
    model.config.num_hidden_layers = loops
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


AutoConfig.register(LoopedGPTConfig.model_type, LoopedGPTConfig)
AutoModelForCausalLM.register(LoopedGPTConfig, LoopedGPTForCausalLM)
