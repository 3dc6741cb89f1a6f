"""Small randomly initialised models of many architectures of transformers, for tests."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

V, D, L, CONTEXT = 128, 32, 3, 64

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    **_SPECIAL,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEAD_SIZE = {**_GROUPED, "head_dim": 8}
_GPT = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": 4, "n_positions": CONTEXT, **_SPECIAL}
_BLOOM = {"vocab_size": V, "hidden_size": D, "n_layer": L, "n_head": 4, **_SPECIAL}
_MAMBA = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "state_size": 8, **_SPECIAL}
_DECODER = {"vocab_size": V, "d_model": D, "ffn_dim": 64, "max_position_embeddings": CONTEXT, **_SPECIAL}
_OPT = {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": D}
_OPT.pop("intermediate_size")

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neo": {
        "vocab_size": V, "hidden_size": D, "num_layers": L, "num_heads": 4, "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local", "global"], 1]], "window_size": 8, **_SPECIAL,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": _COMMON,
    "opt": _OPT,
    "bloom": _BLOOM,
    "codegen": {**_GPT, "rotary_dim": 4},
    "falcon": {**_BLOOM, "num_hidden_layers": L, "num_attention_heads": 4},
    "mpt": {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 4, "max_seq_len": CONTEXT, "expansion_ratio": 2},
    "llama": _GROUPED,
    "mistral": _HEAD_SIZE,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen2": _GROUPED,
    "qwen3": _HEAD_SIZE,
    "gemma": _HEAD_SIZE,
    "gemma2": _HEAD_SIZE,
    "gemma3_text": _HEAD_SIZE,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "cohere": _GROUPED,
    "granite": {**_GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "persimmon": _COMMON,
    "xglm": {**_DECODER, "num_layers": L, "attention_heads": 4},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {
        "vocab_size": V, "hidden_size": D, "attention_hidden_size": D, "num_hidden_layers": L,
        "intermediate_size": 64, "context_length": CONTEXT, **_SPECIAL,
    },
    "recurrent_gemma": {**_GROUPED, "lru_width": D, "attention_window_size": 16},
    "smollm3": _GROUPED,
    "deepseek_v3": {
        **_COMMON, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        **_HEAD_SIZE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "cohere2": _GROUPED,
    "falcon_mamba": _MAMBA,
    "nemotron": _GROUPED,
    "nanochat": _GROUPED,
    "olmo3": _GROUPED,
    "olmoe": _GROUPED,
    "qwen2_moe": _GROUPED,
    "qwen3_moe": _HEAD_SIZE,
    "openai-gpt": _GPT,
    "opt (post-norm, projected)": {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt (projected)": {**_OPT, "word_embed_proj_dim": 16},
}  # fmt: skip
"""The architecture as the documentation's table calls it -> its config; the model type is its first word."""


def small_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """With gains and biases that are not all one and zero, so that a norm left out would show."""
    config = AutoConfig.for_model(architecture.split()[0], **{**CONFIGS.get(architecture, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model
