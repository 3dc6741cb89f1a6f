"""tuned-lens's prediction trajectories under any lens, for any model."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from tuned_lens.nn.lenses import Lens
from tuned_lens.plotting import PredictionTrajectory

from lensbench.streams.stream import ResidualStream


class _Words:
    """A tokenizer trained here, with the two methods that tuned-lens's trajectories call."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokenizer.id_to_token(int(i)) or "" for i in ids]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([int(i) for i in np.atleast_1d(ids)]))


def prediction_trajectory(
    lens: Lens,
    stream: "ResidualStream",
    ids: Tensor,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    targets: Tensor | None = None,
    last: int | None = None,
) -> PredictionTrajectory:
    """tuned-lens's trajectory of one text ``[T]`` under any lens, the shared one included, for any model.

    Unlike ``PredictionTrajectory.from_lens_and_model`` it reads the states that :class:`ResidualStream` verified, which
    are not what every model reports. ``targets`` ``[T]`` left out are the next tokens, the last one's being the model's own.
    With ``last`` the trajectory is that of so many tokens at the end: what it takes is (L+1) V floats for each.
    """
    return _read(lens, stream, ids, tokenizer, targets, last, ahead=False)[0]


def trajectory_in_place(
    lens: Lens,
    stream: "ResidualStream",
    ids: Tensor,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    last: int | None = None,
) -> tuple[PredictionTrajectory, NDArray[np.float64]]:
    """The trajectory of :func:`prediction_trajectory`, and what each layer's lens reads one layer later.

    The second, ``[L-1, n]``: the log-probability of each target under the lens of layer i at layer i + 1, nats. Less what
    that lens reads at its own layer, it is what block i adds in place.
    """
    return _read(lens, stream, ids, tokenizer, None, last, ahead=True)


def _read(
    lens: Lens,
    stream: "ResidualStream",
    ids: Tensor,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    targets: Tensor | None,
    last: int | None,
    *,
    ahead: bool,
) -> tuple[PredictionTrajectory, NDArray[np.float64]]:
    first = 0 if last is None else max(0, len(ids) - last)
    at = torch.arange(first, len(ids))
    with torch.no_grad():
        states, logits = stream.at(ids[None], torch.zeros_like(at), at)
        own = logits.float().log_softmax(-1)
        log_probs = np.empty((len(states), *own.shape), dtype=np.float32)
        for layer, h in enumerate(states[:-1]):
            log_probs[layer] = lens(h.float(), idx=layer).log_softmax(-1).cpu().numpy()
        log_probs[-1] = own.cpu().numpy()
        targets = torch.cat([ids[1:].cpu(), own[-1:].argmax(-1).cpu()]) if targets is None else targets.cpu()
        of = targets[first:, None]
        later = [
            lens(h.float(), idx=layer).log_softmax(-1).cpu().gather(-1, of)[:, 0].double().numpy()
            for layer, h in enumerate(states[1:-1] if ahead else [])
        ]
    words: Any = _Words(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
    inputs = ids[first:].cpu().numpy()
    trajectory = PredictionTrajectory(log_probs, inputs, targets=targets[first:].numpy(), tokenizer=words)
    return trajectory, np.stack(later) if later else np.empty((0, len(inputs)))
