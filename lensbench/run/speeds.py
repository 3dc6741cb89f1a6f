"""How fast a model that is trained here passes forward and trains: a few of its own steps, measured.

Small models are bound by their operations and not by FLOPs, and a model of one layer in a loop has few parameters for the
work that it does. Nothing but the model itself says what it takes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lensbench.data.recipe import TrainingRecipe
from lensbench.models.training import backward, draw_step, optimizers_of
from lensbench.run.costs import Shape, forward
from lensbench.runtime.rates import Rates, Stopwatch, per_second
from lensbench.streams.parts import find_readout

SECONDS = 0.2
"""What a step, and what a forward pass, is measured for; each at least once, after a first time"""

WORTH = 0.3
"""Seconds of FLOPs that a measured step has at most: of a larger batch some sequences are measured"""

SEQUENCES = 16
"""Sequences of a forward pass, as :func:`lensbench.streams.capture.capture` reads them"""


@dataclass(frozen=True)
class Speed:
    """What a model does in a second."""

    sequences: float
    """Of the training's length, in forward passes"""
    steps: float
    """Of its training; infinitely many of a model that is not trained"""

    def within(self, rates: Rates, shape: Shape, length: int) -> Rates:
        """``rates`` with those of this model: FLOPs of its passes, as they are counted for ``shape``, and steps."""
        return replace(rates, model=self.sequences * forward(shape, 1, length, 0).model, steps=self.steps)


def measured_speed(
    network: PreTrainedModel, shape: Shape, recipe: TrainingRecipe, rates: Rates, device: torch.device, trains: bool
) -> Speed:
    """The speed of a model on random tokens. ``network`` is of no use after that.

    ``rates`` of products say how many sequences can be measured at once.
    """
    watch = Stopwatch(device)
    torch.nn.Module.to(network, device)
    allowed = max(1, int(WORTH * rates.model / (3 * forward(shape, 1, recipe.length, recipe.length).model)))
    rng = np.random.default_rng(0)

    def ids(count: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, shape.vocabulary, (count, recipe.length))).to(device)

    some = ids(min(SEQUENCES, allowed))
    network.eval()
    with torch.inference_mode():
        sequences = len(some) * per_second(lambda: network(some, output_hidden_states=True), watch, SECONDS)
    if not trains:
        return Speed(sequences, float("inf"))
    return Speed(sequences, 1 / seconds_of_step(network, ids(min(recipe.batch, allowed)), recipe, watch))


def seconds_of_step(network: PreTrainedModel, batch: Tensor, recipe: TrainingRecipe, watch: Stopwatch) -> float:
    """Seconds of a training step, of which ``batch`` is a part, or all.

    What a model draws anew at each step, it draws here, so that several steps stand for their mean.
    """
    network.train()
    readout = find_readout(network) if recipe.deep_supervision else None
    if recipe.read_out_alone:
        network.requires_grad_(False)
        find_readout(network).requires_grad_(True)
    optimizers = optimizers_of(network, recipe)
    number = 0

    def gradients() -> None:
        nonlocal number
        draw_step(network, 0, number)
        number += 1
        backward(network, batch, readout, recipe, len(batch), len(batch))
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)

    def update() -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()

    passes = 1 / per_second(gradients, watch, SECONDS)
    return passes * recipe.batch / len(batch) + 1 / per_second(update, watch, SECONDS / 4)
