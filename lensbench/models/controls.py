"""Control models of known answer: one GPT, with one property changed at a time.

The plain form is the stronger baseline, ``gpt-conv``: a pre-norm decoder with rotary positions, a causal width-3
convolution before every attention and a normalised embedding. The predictive-coding model has the same three. One setting
makes each of the other forms:

- ``partitioned``: block l < L writes into a slice of the stream that no other block writes to. The last block writes the
  slice that norm and head see. What a lens of an earlier layer sees can then not change: carry-along by construction.
- ``tied_layers``: all layers share one block (Universal Transformer, arXiv 1807.03819).
- ``skip``: each of a block's two skip connections multiplies its input by ``skip``, so a block passes on ``skip`` squared
  of its input. 0 removes the skip connections.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lensbench.models.predictive_coding import CausalConvolution, PredictionNorm

ROTARY_BASE = 10_000.0


class ControlGPTConfig(PreTrainedConfig):
    """Sizes and variant of :class:`ControlGPTForCausalLM`. Raises ``ValueError`` for settings that exclude each other.

    ``read_size`` R: norm and head see the first R entries of the stream; the embedding has R entries. In the partitioned
    form the stream is ``[read-out; embedding; slice of block 1; ...; slice of block L-1]``. The slices share the
    ``hidden_size - 2 R`` entries equally (they differ by at most one entry), and R is by default 3/8 of ``hidden_size``. In
    the other forms R is ``hidden_size``. ``attention_size``: width of all heads together; by default that of the stream,
    in the partitioned form about R, so that a wide stream does not spend its parameters on attention.
    """

    model_type = "lensbench-control-gpt"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 96,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        partitioned: bool = False,
        read_size: int | None = None,
        attention_size: int | None = None,
        tied_layers: bool = False,
        skip: float = 1.0,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        size = read_size or (3 * hidden_size // 8 if partitioned else hidden_size)
        pairs = 2 * num_attention_heads  # rotary positions turn pairs of entries
        inner = attention_size or (max(1, size // pairs) * pairs if partitioned else hidden_size)
        if inner % num_attention_heads or inner // num_attention_heads % 2:
            raise ValueError(f"attention of size {inner} does not divide into {num_attention_heads} heads of even size")
        if partitioned:
            left, slices = hidden_size - 2 * size, num_hidden_layers - 1
            if left < slices:
                raise ValueError(
                    f"hidden_size {hidden_size} minus twice read_size {size} leaves {left} entries for {slices} slices"
                )
            if tied_layers or skip != 1:
                raise ValueError("a partitioned stream needs a block for every layer and skip = 1")
        elif size != hidden_size:
            raise ValueError("read_size is for the partitioned form: elsewhere norm and head see the whole stream")
        if not 0 <= skip <= 1:
            raise ValueError(f"skip must lie in 0..1, not {skip:g}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.partitioned = partitioned
        self.read_size = size
        self.attention_size = inner
        self.tied_layers = tied_layers
        self.skip = skip
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    def written_by(self, block: int) -> slice:
        """The entries of the stream that a block 1..L writes; block 0 is the embedding."""
        if not self.partitioned:
            return slice(0, self.hidden_size)
        if block == self.num_hidden_layers:
            return slice(0, self.read_size)
        if block == 0:
            return slice(self.read_size, 2 * self.read_size)
        left, slices = self.hidden_size - 2 * self.read_size, self.num_hidden_layers - 1
        start, stop = (2 * self.read_size + k * left // slices for k in (block - 1, block))
        return slice(start, stop)

    @property
    def summed_blocks(self) -> int:
        """How many blocks add to the stream one after another."""
        return self.num_hidden_layers


def rotate(x: Tensor) -> Tensor:
    """``x`` (B, H, T, dk) with rotary positions (arXiv 2104.09864): each pair of entries turned by position x frequency."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ControlGPTBlock(nn.Module):
    """Attention over convolved states, then an MLP; both write to the entries ``written`` of the stream."""

    def __init__(self, config: ControlGPTConfig, written: slice):
        super().__init__()
        d, inner, size = config.hidden_size, config.attention_size, written.stop - written.start
        self.heads, self.written, self.skip = config.num_attention_heads, written, config.skip
        self.norm_attention = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.convolution = CausalConvolution(d)
        self.query_key_value = nn.Linear(d, 3 * inner, bias=False)
        self.attention_output = nn.Linear(inner, size, bias=False)
        self.norm_mlp = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.up = nn.Linear(d, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, size, bias=False)

    def add(self, h: Tensor, change: Tensor) -> Tensor:
        """The stream ``h`` (B, T, d) plus ``change`` (B, T, size) at the block's entries."""
        if change.shape[-1] == h.shape[-1]:
            return (h if self.skip == 1 else self.skip * h) + change
        return h + F.pad(change, (self.written.start, h.shape[-1] - self.written.stop))

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """The next states (B, T, d); ``mask`` (B, T) is 0 at padding, None without padding."""
        batch, length, _ = h.shape
        seen = self.norm_attention(h)
        if mask is not None:
            seen = seen * mask[..., None].to(h.dtype)  # otherwise the convolution would mix padding in
        q, k, v = (
            x.view(batch, length, self.heads, -1).transpose(1, 2)
            for x in self.query_key_value(self.convolution(seen)).chunk(3, -1)
        )
        allowed = None
        if mask is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()
            # A padded position attends to itself: a row without a key would be NaN.
            itself = torch.eye(length, dtype=torch.bool, device=h.device)
            allowed = (causal & mask[:, None, None].bool()) | itself
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=allowed, is_causal=mask is None)
        h = self.add(h, self.attention_output(mixed.transpose(1, 2).flatten(2)))
        return self.add(h, self.down(F.gelu(self.up(self.norm_mlp(h)))))


class ControlGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT of known answer, or the baseline of one (see the module's docstring)."""

    config_class: type[PreTrainedConfig] = ControlGPTConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (as transformers declares it)
    _no_split_modules = ["ControlGPTBlock"]  # noqa: RUF012 (as transformers declares it)
    _supports_sdpa = True

    def __init__(self, config: ControlGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.read_size)
        blocks = 1 if config.tied_layers else config.num_hidden_layers
        self.layers = nn.ModuleList(ControlGPTBlock(config, config.written_by(k + 1)) for k in range(blocks))
        self.norm = PredictionNorm(config.read_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.read_size, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, CausalConvolution):
            bound = len(module.weight) ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, PredictionNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ControlGPTBlock) and self.config.skip == 1:
            # Blocks start small, so that the sum of L changes has the size of one. Without skips nothing is summed.
            for output in (module.attention_output, module.down):
                output.weight.mul_((2 * self.config.summed_blocks) ** -0.5)

    def states(self, e: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The states h_0..h_L ``[B, T, d]`` of embedded tokens e, all before the final norm."""
        states = [e]
        for block in range(self.config.num_hidden_layers):
            states.append(self.layers[block % len(self.layers)](states[-1], mask))
        return states

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Next-token logits ``[B, T, V]``; with ``labels`` (-100 is ignored) also their mean cross-entropy, nats/token.

        ``hidden_states``: L+1 states ``[B, T, d]``, all before the final norm. ``attention_mask`` ``[B, T]`` is 0 at
        padding, on either side.
        """
        config = self.config
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        e = F.rms_norm(self.embed_tokens(input_ids), (config.read_size,), eps=1e-12)
        if config.partitioned:
            place = config.written_by(0)
            e = F.pad(e, (place.start, config.hidden_size - place.stop))
        states = self.states(e, mask)
        logits = self.lm_head(self.norm(states[-1]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits)
        if output_hidden_states:
            output.hidden_states = tuple(states)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of the next step of generation. There is no cache: every step reads the whole prefix."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(ControlGPTConfig.model_type, ControlGPTConfig)
AutoModelForCausalLM.register(ControlGPTConfig, ControlGPTForCausalLM)
