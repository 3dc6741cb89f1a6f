"""Standard GPTs: the Llama and GPT-2 classes of transformers, built from a config."""

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def llama(
    *, vocab_size: int, d_model: int, layers: int, heads: int, width: int, context: int, initializer_range: float = 0.02
) -> PreTrainedModel:
    """A randomly initialised Llama: RMSNorm, rotary positions, gated MLP of ``width``, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=width,
            max_position_embeddings=context,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def gpt2(
    *, vocab_size: int, d_model: int, layers: int, heads: int, width: int, context: int, initializer_range: float = 0.02
) -> PreTrainedModel:
    """A randomly initialised GPT-2: LayerNorm, learned positions, MLP of ``width``, tied embeddings, no dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=d_model,
            n_layer=layers,
            n_head=heads,
            n_inner=width,
            n_positions=context,
            initializer_range=initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
