"""The predictive-coding language model: predictions and their errors at known places, corrected layer by layer.

Every position i holds a prediction latent ``z_i`` that any layer can read out with the one tied head,
``p_i = softmax(E (g * rms(z_i)))``. Token i+1 reveals the error of that prediction,

    eps_i = (E[x_{i+1}] - E^T p_i) / rms(E),

minus the gradient of its cross-entropy with respect to the latent (the norm's Jacobian dropped). A layer changes z
by one update, the same for all positions: every error seen so far is carried to position n by a kernel on features,

    z_n += sum_h V_h^T eta_h sum_{i<n} gamma_h^(n-1-i) exp(beta_h (<c_i, c_n> - 1)) V_h eps_i,   c = Q_h f / |Q_h f|,

which is one preconditioned (V^T V) gradient step on a linear read-out in the kernel's feature space: the dual form of
gradient descent (arXiv 2212.07677 and 2102.11174 for its relatives). This is the strict form: nothing else writes to z.
The stream is the whole state ``[z; u; e]``; norm and head are blind outside z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

# Half-lives of about 2, 14, 100 and 700 tokens, spread over the heads; learned from there.
INITIAL_DECAYS = (0.73, 0.95, 0.993, 0.999)
CONVOLUTION_WIDTH = 3


class PredictiveCodingConfig(PreTrainedConfig):
    """Sizes and variants of :class:`PredictiveCodingForCausalLM`.

    ``error`` is ``softmax`` (the error above) or ``none``, the control that carries ``E[x_{i+1}] / rms(E)`` without
    subtracting the prediction, everything else equal.
    """

    model_type = "lensbench-predictive-coding"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 128,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        prediction_size: int = 512,
        error: str = "softmax",
        initial_eta: float = math.exp(-2),
        initial_beta: float = math.exp(2),
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        if error not in ("softmax", "none"):
            raise ValueError(f"error must be 'softmax' or 'none', not {error!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size  # width of the feature MLPs
        self.prediction_size = prediction_size  # width of the bigram MLP that makes z^0
        self.error = error
        self.initial_eta = initial_eta
        self.initial_beta = initial_beta
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)


@dataclass
class PredictiveCodingOutput(CausalLMOutput):
    """A :class:`CausalLMOutput` with the known places.

    ``hidden_states``: L+1 states ``[z; u; e]``, each ``[B, T, 3d]``, all before the final norm.
    ``predictions``: L+1 latents z, ``[B, T, d]``. ``errors``: L errors, ``[B, T, d]``; entry s is the error, revealed
    by token s, of the prediction made at s-1 (zero at position 0). ``updates``: L changes of z, ``[B, T, d]``.
    All four are given when ``output_hidden_states`` is set.
    """

    predictions: tuple[Tensor, ...] | None = None
    errors: tuple[Tensor, ...] | None = None
    updates: tuple[Tensor, ...] | None = None


class PredictionNorm(nn.Module):
    """``g * rms(z)`` for the leading d entries of a state; blind to whatever stands behind them."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, state: Tensor) -> Tensor:  # (..., >= d) -> (..., d)
        d = self.weight.shape[0]
        return F.rms_norm(state[..., :d], (d,), self.weight, self.eps)


class CausalConvolution(nn.Module):
    """Depthwise convolution over the present and the two tokens before it."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CONVOLUTION_WIDTH, d))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        y = x * self.weight[0]
        for lag in range(1, CONVOLUTION_WIDTH):
            y = y + F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] * self.weight[lag]
        return y


class PredictiveCodingLayer(nn.Module):
    """Features, then one update of every position's prediction by the errors seen so far."""

    def __init__(self, config: PredictiveCodingConfig):
        super().__init__()
        d, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.eps = heads, config.rms_norm_eps
        self.conv_u, self.conv_z = CausalConvolution(d), CausalConvolution(d)
        self.up = nn.Linear(2 * d, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)
        self.query_key = nn.Linear(d, d, bias=False)  # one map for both: a true kernel
        self.value_output = nn.Linear(d, d, bias=False)  # V; its transpose writes: a positive semi-definite step
        self.log_eta = nn.Parameter(torch.empty(heads))
        self.log_beta = nn.Parameter(torch.empty(heads))
        self.decay_logit = nn.Parameter(torch.empty(heads))

    def features(self, u: Tensor, z: Tensor) -> Tensor:
        d = u.shape[-1]
        seen = torch.cat(
            [self.conv_u(F.rms_norm(u, (d,), eps=self.eps)), self.conv_z(F.rms_norm(z, (d,), eps=self.eps))], -1
        )
        return u + self.down(F.gelu(self.up(seen)))

    def kernel(self, u: Tensor) -> Tensor:
        """``eta gamma^(n-s) exp(beta (<c_{s-1}, c_n> - 1))`` for query n and revealing token s <= n: (B, H, T, T)."""
        batch, length, d = u.shape
        f = F.rms_norm(u, (d,), eps=self.eps)
        c = F.normalize(self.query_key(f).view(batch, length, self.heads, -1), dim=-1).transpose(1, 2)  # (B, H, T, dk)
        # The error that token s reveals belongs to the features that made the prediction: those of s-1.
        key = F.pad(c, (0, 0, 1, 0))[:, :, :-1]
        n = torch.arange(length, device=u.device)
        lag = n[:, None] - n[None, :]
        beta = self.log_beta.exp()[:, None, None]
        log_decay = F.logsigmoid(self.decay_logit)[:, None, None]
        offset = (log_decay * lag + self.log_eta[:, None, None] - beta).masked_fill(lag < 0, -torch.inf)
        # One fused product and one exponential: the passes over T x T entries are what this layer costs.
        exponent = torch.baddbmm(
            offset.repeat(batch, 1, 1), (beta * c).flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)
        )
        return torch.exp(exponent).view(batch, self.heads, length, length)

    def update(self, u: Tensor, error: Tensor) -> Tensor:
        """Change of z at every position, given the error that each token reveals: (B, T, d)."""
        batch, length, d = u.shape
        value = self.value_output(error).view(batch, length, self.heads, -1).transpose(1, 2)
        carried = (self.kernel(u) @ value).transpose(1, 2).reshape(batch, length, d)
        return carried @ self.value_output.weight

    def forward(self, state: Tensor, error_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """State ``[z; u; e]`` (B, T, 3d) -> the next one, the errors that this layer saw, and its change of z."""
        z, u, e = state.chunk(3, -1)
        u = self.features(u, z)
        error = error_of(z)
        update = self.update(u, error)
        return torch.cat([z + update, u, e], -1), error, update


class PredictiveCodingForCausalLM(PreTrainedModel, GenerationMixin):
    """Strict predictive-coding language model (see the module's docstring for the equations)."""

    config_class = PredictiveCodingConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _no_split_modules = ["PredictiveCodingLayer"]

    def __init__(self, config: PredictiveCodingConfig):
        super().__init__(config)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.first_up = nn.Linear(d, config.prediction_size, bias=False)
        self.first_down = nn.Linear(config.prediction_size, d, bias=False)
        self.conv_e = CausalConvolution(d)
        self.layers = nn.ModuleList(PredictiveCodingLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = PredictionNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, CausalConvolution):
            bound = CONVOLUTION_WIDTH**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, PredictionNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PredictiveCodingLayer):
            # Blocks start small: the sum of L feature updates then has the size of one.
            module.down.weight.mul_(self.config.num_hidden_layers**-0.5)
            decays = torch.tensor(INITIAL_DECAYS).repeat(math.ceil(module.heads / len(INITIAL_DECAYS)))[: module.heads]
            module.decay_logit.copy_(torch.logit(decays))
            module.log_eta.fill_(math.log(self.config.initial_eta))
            module.log_beta.fill_(math.log(self.config.initial_beta))

    def error(self, z: Tensor, input_ids: Tensor) -> Tensor:
        """Error, revealed by each token, of the prediction made one position earlier: (B, T, d), zero at position 0."""
        # Detached: the error is a signal that the layers use, not a second path by which to train the embedding.
        embedding = self.embed_tokens.weight.detach()
        scale = embedding.pow(2).mean().rsqrt()
        error = F.embedding(input_ids[:, 1:], embedding)
        if self.config.error == "softmax":
            logits = F.linear(self.norm(z[:, :-1]), embedding)  # (B, T-1, V)
            error = error - logits.softmax(-1) @ embedding
        return F.pad(error * scale, (0, 0, 1, 0))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> PredictiveCodingOutput | tuple:
        """Next-token logits ``[B, T, V]``; with ``labels`` (-100 is ignored) also their mean cross-entropy, nats/token.

        ``attention_mask`` ``[B, T]`` marks padding with 0, on either side; padded positions reveal no error.
        """
        d = self.config.hidden_size
        e = F.rms_norm(self.embed_tokens(input_ids), (d,), eps=1e-12)
        revealed = None
        if attention_mask is not None and not bool(attention_mask.all()):
            # No layer has a bias, so a position whose e is zero stays zero in u and z.
            e = e * attention_mask[..., None].to(e.dtype)
            both = attention_mask[:, 1:] * attention_mask[:, :-1]
            revealed = F.pad(both, (1, 0))[..., None].to(e.dtype)
        state = torch.cat([self.first_down(F.gelu(self.first_up(e))), self.conv_e(e), e], -1)

        def error_of(z: Tensor) -> Tensor:
            error = self.error(z, input_ids)
            return error if revealed is None else error * revealed

        states, errors, updates = [state], [], []
        for layer in self.layers:
            state, error, update = layer(state, error_of)
            if output_hidden_states:
                states.append(state)
                errors.append(error)
                updates.append(update)
        logits = self.lm_head(self.norm(state))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        output = PredictiveCodingOutput(loss=loss, logits=logits)
        if output_hidden_states:
            output.hidden_states = tuple(states)
            output.predictions = tuple(state[..., :d] for state in states)
            output.errors = tuple(errors)
            output.updates = tuple(updates)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> dict:
        # Without a cache every step reads the whole prefix.
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(PredictiveCodingConfig.model_type, PredictiveCodingConfig)
AutoModelForCausalLM.register(PredictiveCodingConfig, PredictiveCodingForCausalLM)
