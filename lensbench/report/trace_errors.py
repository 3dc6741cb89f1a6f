"""What prediction errors did to the last prediction of a text, in a predictive-coding model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.models.predictive_coding import PredictiveCodingForCausalLM, PredictiveCodingLayer
from lensbench.streams.parts import evaluating

MOST_MOVES = 10
"""Errors that are named."""


@dataclass(frozen=True)
class PredictionErrors:
    """Prediction errors of one text ``[T]`` in a predictive-coding model, and what they did to its last prediction.

    ``size`` ``[L, T]``: length of the error that token s reveals to layer l, of embeddings of rms 1. ``surprisal``
    ``[L, T]``: nats of token s under layer l's own prediction, made at s-1; NaN at 0. ``moved`` ``[L, T]``: what the error
    revealed by token s added, in layer l, to the logit of the model's own next token ``word`` (less the mean logit of all
    words, which a softmax does not see). Exactly additive, the final norm's scale held fixed: ``moved[l].sum()`` is what
    layer l's update did to that logit, and ``start`` (of z_0) + ``moved.sum()`` + ``written`` (of the relaxed form's MLPs)
    is the logit.
    """

    size: NDArray[np.float64]
    surprisal: NDArray[np.float64]
    moved: NDArray[np.float64]
    start: float
    written: float
    word: int


@torch.no_grad()
def errors_of(model: PredictiveCodingForCausalLM, ids: Tensor) -> PredictionErrors:
    """What errors did in a text of token ids ``[T]``.

    Raises :class:`LensbenchError` for variants of the model whose update is not a sum over errors.
    """
    config = model.config
    if config.error == "none":
        raise LensbenchError("this predictive-coding model is the control without errors: there is none to show")
    if config.delta_rule or not config.causal:
        raise LensbenchError("with the delta rule, or without causality, an update is no sum over earlier errors")
    with evaluating(model):
        output = model(ids[None].to(model.device), output_hidden_states=True)
    assert output.predictions is not None
    assert output.errors is not None
    assert output.hidden_states is not None
    final, d = output.predictions[-1][0, -1], config.hidden_size
    word = int(output.logits[0, -1].argmax())
    embedding = model.lm_head.weight
    scale = torch.rsqrt(final.pow(2).mean() + model.norm.eps)
    along = (embedding[word] - embedding.mean(0)) * model.norm.weight * scale  # [d]: of z to the centred logit
    size, surprisal, moved = [], [], []
    for number, (z, error) in enumerate(zip(output.predictions, output.errors, strict=False)):
        layer = cast(PredictiveCodingLayer, model.layers[number % len(model.layers)])
        u = output.hidden_states[number + 1][..., d : 2 * d]  # features are renewed before they weigh errors
        query, key = layer.queries_and_keys(u)
        last = query.shape[2] - 1
        weights = layer.weights(query[:, :, last:], key, last)[0, :, 0]  # [H, T]
        value = layer.split(layer.value_output(error))[0]  # [H, T, d/H]
        output_map = layer.value_output.weight if layer.output is None else layer.output.weight
        seen = (output_map @ along).view(layer.heads, -1)  # [H, d/H]
        moved.append((weights * torch.einsum("htk,hk->ht", value, seen)).sum(0))
        size.append(error[0].norm(dim=-1))
        chances = model.read_out(z)[0, :-1].float().log_softmax(-1)
        own = -chances.gather(-1, ids[1:, None].to(chances.device))[:, 0]
        surprisal.append(torch.cat([own.new_full((1,), torch.nan), own]))
    written = sum((w[0, -1] @ along for w in output.writes), torch.zeros(())) if output.writes else torch.zeros(())
    sizes, nats, moves = (torch.stack(x).double().cpu().numpy() for x in (size, surprisal, moved))
    return PredictionErrors(sizes, nats, moves, float(output.predictions[0][0, -1] @ along), float(written), word)


def largest_moves(errors: PredictionErrors, most: int = MOST_MOVES) -> list[tuple[int, int, float]]:
    """(layer, position, change of the logit) of the errors that moved the last prediction most, the largest first."""
    order = np.argsort(-np.abs(errors.moved), axis=None, kind="stable")[:most]
    found = [divmod(int(k), errors.moved.shape[1]) for k in order]
    return [(layer, s, float(errors.moved[layer, s])) for layer, s in found if errors.moved[layer, s] != 0]


def moved_title(errors: PredictionErrors, words: Sequence[str], word: str) -> str:
    """What the logit of ``word``, the model's next one, is made of."""
    written = f", {errors.written:+.3f} from MLPs" if errors.written else ""
    layers = " ".join(f"{change:+.3f}" for change in errors.moved.sum(1))
    return (
        f'what moved the logit (less the mean logit of all words) of the next word "{word}": {errors.moved.sum():+.3f} by '
        f"errors in all (by layer {layers}), {errors.start:+.3f} from the start{written}; after {len(words)} tokens"
    )
