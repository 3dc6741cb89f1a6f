"""Small language models whose blocks do what a closed form says, each with a part that the token alone decides."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.architectures import small_model
from helpers.planted import V

WIDTH = 16

Step = Callable[[Tensor, Tensor], Tensor]
"""States ``[B, T, d]`` and token ids ``[B, T]`` -> states"""


class _Known(LlamaDecoderLayer):  # of this class, or transformers would not report its states
    """A block that is a function of the states and of the tokens at their places."""

    def __init__(self, model: PreTrainedModel, step: Step):
        nn.Module.__init__(self)
        self.owner, self.step = [model], step

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the step makes of the states."""
        return self.step(hidden_states, self.owner[0].tokens)  # not a module of this one


def known_model(steps: list[Step], first: Tensor, seed: int = 0) -> PreTrainedModel:
    """A Llama whose block k is ``steps[k]``; ``first`` ``[V, d]`` are its embeddings."""
    model = small_model(
        "llama", seed, vocab_size=len(first), hidden_size=first.shape[1], num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=len(steps), tie_word_embeddings=False,
    )  # fmt: skip

    forward = model.forward

    @wraps(forward)
    def remembering(input_ids: Tensor, **kwargs: Any) -> Any:
        model.tokens = input_ids
        return forward(input_ids=input_ids, **kwargs)

    model.forward = remembering
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(first)
        model.get_output_embeddings().weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed + 1))
    for k, step in enumerate(steps):
        model.model.layers[k] = _Known(model, step)
    return model


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observations(layers: int, noise: Tensor | float = 1.0, seed: int = 0) -> list[Tensor]:
    """L + 1 noisy views ``[V, d]`` of what each token means."""
    return [drawn(seed, V, WIDTH) + noise * drawn(seed + 1 + k, V, WIDTH) for k in range(layers + 1)]
