"""Small models that choose mask and rotary embedding by layer, and their blocks called by hand one by one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.architectures import small_model

SLIDING = 4
"""Tokens that a block of sliding attention sees: fewer than any window of the tests holds"""

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

MIXED = {
    "gemma3_text": {"layer_types": KINDS, "sliding_window": SLIDING},
    "gemma2": {"layer_types": KINDS, "sliding_window": SLIDING},
    "olmo3": {"layer_types": KINDS, "sliding_window": SLIDING},
    "smollm3": {
        "layer_types": KINDS, "sliding_window": SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"], "vocab_size": 128, "hidden_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    },
}  # fmt: skip
"""Architecture -> what mixes its blocks"""


def mixed_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Four blocks of two kinds, with weights so large that each block matters."""
    model = small_model(architecture, seed, num_hidden_layers=4, **MIXED[architecture])
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5, generator=generator)
    return model


def _mask(kind: str, length: int) -> Tensor | None:
    """Additive mask ``[1, 1, T, T]``, written out."""
    if kind == "conv":
        return None
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = key <= query
    if kind == "sliding_attention":
        seen = seen & (key > query - SLIDING)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def logits_by_hand(
    model: PreTrainedModel,
    ids: Tensor,
    order: Sequence[int],
    enter: Callable[[int, Tensor], Tensor] = lambda block, h: h,
    *,
    by_place: bool = False,
) -> Tensor:
    """Logits ``[B, T, V]`` of the blocks ``order``; block k receives ``enter(k, h)``.

    Each is of its own kind, or ``by_place`` of the kind of the block that stands there in the model: the fault.
    """
    inner, config = model.model, model.config
    h = inner.embed_tokens(ids)
    if config.model_type == "gemma2" and not hasattr(inner.embed_tokens, "embed_scale"):
        h = h * torch.tensor(config.hidden_size**0.5)
    places = torch.arange(ids.shape[1])[None]
    for place, k in enumerate(order):
        kind = config.layer_types[place if by_place else k]
        by_kind = config.model_type in ("gemma3_text", "olmo3")
        rotary = inner.rotary_emb(h, places, *([kind] if by_kind else []))
        out = inner.layers[k](
            enter(k, h), attention_mask=_mask(kind, ids.shape[1]), position_embeddings=rotary, position_ids=places
        )
        h = out[0] if isinstance(out, tuple) else out
    norm = inner.embedding_norm if config.model_type == "lfm2" else inner.norm
    logits = model.lm_head(norm(h))
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
