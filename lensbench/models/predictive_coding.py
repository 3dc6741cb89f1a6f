"""The predictive-coding language model: explicit predictions and prediction errors, corrected layer by layer.

Every position i holds a prediction latent ``z_i``. The tied head reads it out at any layer,
``p_i = softmax(E (g * rms(z_i)))``. Token i+1 reveals the error of that prediction,

    eps_i = (E[x_{i+1}] - E^T p_i) / rms(E).

This is minus the gradient of the prediction's cross-entropy with respect to the latent, without the Jacobian of the norm.
A layer changes z by one update, the same at all positions: a kernel on features carries every error seen so far to
position n,

    z_n += sum_h V_h^T eta_h sum_{i<n} gamma_h^(n-1-i) k_h(c_i, c_n) V_h eps_i,   c = Q_h f / |Q_h f|.

With ``k = <c_i, c_n>`` this is one preconditioned (V^T V) step of gradient descent on a linear read-out, in its dual form
(arXiv 2212.07677, 2102.11174). With ``k = exp(beta (<c_i, c_n> - 1))`` it is the same step in the feature space of that
kernel.

This is the strict form: nothing else writes to z. The stream is the whole state ``[z; u; e]``: predictions, features, and
embeddings of the tokens. Norm and head see z alone. :class:`PredictiveCodingConfig` lists the variants.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

# Half-lives of about 2, 14, 100 and 700 tokens, spread over the heads; learned from there.
INITIAL_DECAYS = (0.73, 0.95, 0.993, 0.999)


CONVOLUTION_WIDTH = 3


# Of the exp kernel. Without gradients [B, H, 256, T] is in memory, with gradients all causal pairs are.
QUERIES_AT_ONCE = 256


CHUNK = {"cpu": 64, "cuda": 256}  # tokens that the linear kernel handles between two updates of its state


# Logits at once when the error is not differentiated: as many as a processor's cache or a GPU's memory holds.
ENTRIES_AT_ONCE = {"cpu": 2**19, "cuda": 2**27}


SWITCHES = (
    "error_gradient", "decay", "delta_rule", "relaxed", "tied_layers", "causal", "tie_query_key", "tie_value_output",
)  # fmt: skip


# The name of the cache among the arguments of generate; before transformers 5.2 it was another.
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


class PredictiveCodingConfig(PreTrainedConfig):
    """Sizes and variants of :class:`PredictiveCodingForCausalLM`. Raises ``ValueError`` for values that exclude each other.

    ``error``: ``softmax`` is the error above. ``linear`` is a cheap one, ``rms(E[x_{i+1}]) - A_l rms(z_i)``,
    with a learned map for each layer. ``none`` is the control, ``E[x_{i+1}] / rms(E)``: no prediction is subtracted, all
    else is equal.
    ``error_gradient``: whether training differentiates the softmax error. If not, the error is data, as in the gradient
    step that the update stands for, and errors cost half as much in training.
    ``kernel``: ``exp``, ``linear`` (memory and time linear in the length) or ``softmax`` (normalised over i: attention).
    ``decay``: False makes every gamma 1.
    ``delta_rule`` (linear kernel): a head's memory W receives ``V eps_i - W c_i`` instead of ``V eps_i``, with step size
    ``1 - exp(-eta)`` (arXiv 2102.11174, 2406.06484).
    ``relaxed``: the MLP of the features also writes to z.
    ``tied_layers``: one layer, applied ``num_hidden_layers`` times.
    ``causal``: False sums over all i, later ones included (decay by distance). Such a model can be measured, but not
    trained: it sees the tokens that it predicts.
    ``tie_query_key``: False gives keys their own map; k is then no longer a true kernel.
    ``tie_value_output``: False gives the output its own map; the preconditioner is then no longer positive semi-definite.
    ``layer_loss_weight``: with ``labels``, weight of the head's mean cross-entropy at layers 1..L-1, added to that of the
    last layer.
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
        error_gradient: bool = True,
        kernel: str = "exp",
        decay: bool = True,
        delta_rule: bool = False,
        relaxed: bool = False,
        tied_layers: bool = False,
        causal: bool = True,
        tie_query_key: bool = True,
        tie_value_output: bool = True,
        layer_loss_weight: float = 0.0,
        initial_eta: float = math.exp(-2),
        initial_beta: float = math.exp(2),
        initial_decays: tuple[float, ...] = INITIAL_DECAYS,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size  # width of the feature MLPs
        self.prediction_size = prediction_size  # width of the bigram MLP that makes z^0
        self.error = error
        self.error_gradient = error_gradient
        self.kernel = kernel
        self.decay = decay
        self.delta_rule = delta_rule
        self.relaxed = relaxed
        self.tied_layers = tied_layers
        self.causal = causal
        self.tie_query_key = tie_query_key
        self.tie_value_output = tie_value_output
        self.layer_loss_weight = layer_loss_weight
        self.initial_eta = initial_eta
        self.initial_beta = initial_beta
        self.initial_decays = list(initial_decays)
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        self._check_variant()
        super().__init__(**kwargs)

    def _check_variant(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.error not in ("softmax", "linear", "none"):
            raise ValueError(f"error must be 'softmax', 'linear' or 'none', not {self.error!r}")
        if self.kernel not in ("exp", "linear", "softmax"):
            raise ValueError(f"kernel must be 'exp', 'linear' or 'softmax', not {self.kernel!r}")
        for name in SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
        for name in ("initial_eta", "initial_beta"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                raise ValueError(f"{name} must be a positive number, not {number!r}")
        if self.delta_rule and (self.kernel != "linear" or not self.causal):
            raise ValueError("delta_rule needs the causal linear kernel: no other kernel has one memory to correct")
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true: the errors are those of a read-out by the embedding")
        if not self.initial_decays or not all(0 < gamma < 1 for gamma in self.initial_decays):
            raise ValueError(f"initial_decays must lie between 0 and 1, not {self.initial_decays}")
        if self.layer_loss_weight < 0:
            raise ValueError(f"layer_loss_weight must not be negative: {self.layer_loss_weight}")


@dataclass
class PredictiveCodingCache:
    """What the model keeps of the tokens so far, for a batch of B sequences.

    ``layers[l]``: the last two inputs of each convolution ``[B, 2, d]``, the last prediction ``z`` (the next token reveals
    its error) and its key. The linear kernel also has its state ``[B, H, d/H, d/H]``; the other kernels have all keys and
    values (errors after V) ``[B, H, T, d/H]``. ``embedded``: the last two embeddings. ``mask`` ``[B, T]``: 0 is padding.
    """

    layers: list[dict[str, Tensor]] = field(default_factory=list)
    embedded: Tensor | None = None
    mask: Tensor | None = None
    is_compileable = False  # transformers asks for it

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.get_seq_length()} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen so far."""
        del layer_idx
        return 0 if self.mask is None else self.mask.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences of the batch, in this order (beam search)."""
        assert self.embedded is not None
        assert self.mask is not None
        self.layers = [{name: x[beam_idx] for name, x in memory.items()} for memory in self.layers]
        self.embedded, self.mask = self.embedded[beam_idx], self.mask[beam_idx]


@dataclass
class PredictiveCodingOutput(CausalLMOutput):
    """A :class:`CausalLMOutput` with the predictions, errors and updates of every layer.

    ``hidden_states``: L+1 states ``[z; u; e]``, each ``[B, T, 3d]``, all before the final norm.
    ``predictions``: L+1 latents z, ``[B, T, d]``; :meth:`PredictiveCodingForCausalLM.read_out` gives the logits of each.
    ``errors``: L errors, ``[B, T, d]``. Token s reveals ``errors[l][:, s]``, the error of ``predictions[l][:, s-1]``; it is
    zero at position 0. With ``error="none"`` these are the embeddings that the control carries instead.
    ``updates``: L changes of z by the errors, ``[B, T, d]``.
    ``writes``: L changes of z by the MLP, ``[B, T, d]``; None in the strict form.
    ``predictions[l+1] = predictions[l] + updates[l] + writes[l]``.

    ``output_hidden_states`` asks for these five, ``use_cache`` for ``cache``.
    """

    cache: PredictiveCodingCache | None = None
    predictions: tuple[Tensor, ...] | None = None
    errors: tuple[Tensor, ...] | None = None
    updates: tuple[Tensor, ...] | None = None
    writes: tuple[Tensor, ...] | None = None


class PredictionNorm(nn.Module):
    """``g * rms(z)`` of the first d entries z of a state; the entries after them have no effect."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, state: Tensor) -> Tensor:
        """The normalised leading entries: (..., >= d) -> (..., d)."""
        d = self.weight.shape[0]
        return F.rms_norm(state[..., :d], (d,), self.weight, self.eps)


class CausalConvolution(nn.Module):
    """Depthwise convolution over a token and the two tokens before it."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CONVOLUTION_WIDTH, d))

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """The convolution of ``x`` (B, T, d); ``before`` (B, 2, d) are the two inputs before it, by default zero."""
        if before is not None:
            y: Tensor = self(torch.cat([before, x], 1))[:, before.shape[1] :]
            return y
        y = x * self.weight[0]
        for lag in range(1, CONVOLUTION_WIDTH):
            y = y + F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] * self.weight[lag]
        return y


def last_two(x: Tensor, before: Tensor | None) -> Tensor:
    """The last two entries of ``x`` (B, T, d), which a convolution needs for the next tokens: (B, 2, d)."""
    width = CONVOLUTION_WIDTH - 1
    return (F.pad(x, (0, 0, width, 0)) if before is None else torch.cat([before, x], 1))[:, -width:]


def one_later(x: Tensor, last: Tensor | None) -> Tensor:
    """``x`` (..., T, d) moved by one position: entry s is ``x`` at s-1; the first entry is ``last``, or zero."""
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :] if last is None else torch.cat([last, x[..., :-1, :]], -2)


def expected_embedding(latent: Tensor, embedding: Tensor) -> Tensor:
    """``E^T softmax(E y)`` of latents y ``[N, d]`` and an embedding E ``[V, d]``; no gradient, and never all ``[N, V]``."""
    rows = max(1, ENTRIES_AT_ONCE.get(latent.device.type, 2**19) // len(embedding))
    with torch.no_grad():
        return torch.cat([(part @ embedding.T).softmax(-1) @ embedding for part in latent.split(rows)])


class PredictiveCodingLayer(GradientCheckpointingLayer):
    """Features, then one update of every position's prediction by the errors seen so far."""

    def __init__(self, config: PredictiveCodingConfig):
        super().__init__()
        d, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.eps = heads, config.rms_norm_eps
        self.kernel_name, self.causal, self.delta_rule = config.kernel, config.causal, config.delta_rule
        self.conv_u, self.conv_z = CausalConvolution(d), CausalConvolution(d)
        self.up = nn.Linear(2 * d, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)
        self.query_key = nn.Linear(d, d, bias=False)  # one map for queries and keys: a true kernel
        self.value_output = nn.Linear(d, d, bias=False)  # V; V^T writes to z: a positive semi-definite step
        self.log_eta = nn.Parameter(torch.empty(heads))
        self.log_beta = None if config.kernel == "linear" else nn.Parameter(torch.empty(heads))
        self.decay_logit = nn.Parameter(torch.empty(heads)) if config.decay else None
        self.key = None if config.tie_query_key else nn.Linear(d, d, bias=False)
        self.output = None if config.tie_value_output else nn.Linear(d, d, bias=False)
        self.write = nn.Linear(config.intermediate_size, d, bias=False) if config.relaxed else None
        self.predicted = nn.Linear(d, d, bias=False) if config.error == "linear" else None  # A of the linear error

    def forward(
        self,
        state: Tensor,
        error_of: Callable[["PredictiveCodingLayer", Tensor, Tensor | None], Tensor],
        revealed: Tensor | None = None,
        present: Tensor | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The next state ``[z; u; e]`` (B, T, 3d), the errors of z, the update of z by them, and the MLP's write to z.

        ``revealed`` (B, P+T) marks tokens that reveal an error; None means all but the first. ``present`` (B, T, 1) is 0 at
        padding, whose state stays zero; None means no padding. ``memory`` is read and updated in place.
        """
        z, u, e = state.chunk(3, -1)
        u, written = self.features(u, z, memory)
        error = error_of(self, z, (memory or {}).get("z"))
        update = self.update(u, error, revealed, memory)
        if present is not None:
            update = update * present
        if memory is not None:
            memory["z"] = z[:, -1:]
        moved = z + update if written is None else z + update + written
        return torch.cat([moved, u, e], -1), error, update, written

    def features(self, u: Tensor, z: Tensor, memory: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """The next features (B, T, d), and the MLP's write to z (None in the strict form)."""
        d = u.shape[-1]
        normed = {"conv_u": F.rms_norm(u, (d,), eps=self.eps), "conv_z": F.rms_norm(z, (d,), eps=self.eps)}
        kept = memory or {}
        seen = torch.cat(
            [self.conv_u(normed["conv_u"], kept.get("conv_u")), self.conv_z(normed["conv_z"], kept.get("conv_z"))], -1
        )
        if memory is not None:
            memory.update({name: last_two(x, kept.get(name)) for name, x in normed.items()})
        hidden = F.gelu(self.up(seen))
        return u + self.down(hidden), None if self.write is None else self.write(hidden)

    def update(
        self,
        u: Tensor,
        error: Tensor,
        revealed: Tensor | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The change of z at every position (B, T, d), given the error that each token reveals."""
        query, key = self.queries_and_keys(u, memory)
        value = self.split(self.value_output(error))
        if self.kernel_name == "linear" and self.causal:
            carried = self.carried_in_chunks(query, key, value, memory)
        else:
            if memory is not None:
                # Errors of earlier tokens do not change when later tokens arrive.
                key, value = (
                    torch.cat([memory[name], new], 2) if name in memory else new
                    for name, new in (("keys", key), ("values", value))
                )
                memory.update(keys=key, values=value)
            whole = self.kernel_name == "softmax" and self.causal
            carried = (self.attended if whole else self.carried)(query, key, value, revealed)
        written = value_map.weight if (value_map := self.output) is not None else self.value_output.weight
        return carried.transpose(1, 2).flatten(2) @ written

    def split(self, x: Tensor) -> Tensor:
        """``x`` divided into heads: (B, T, d) -> (B, H, T, d/H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def queries_and_keys(self, u: Tensor, memory: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The query ``c_n`` of every position n, and the key ``c_{s-1}`` of the error that every token s reveals."""
        f = F.rms_norm(u, (u.shape[-1],), eps=self.eps)
        eps = max(1e-12, torch.finfo(f.dtype).tiny)  # in half precision 1e-12 is zero, and padding would be 0 / 0
        query = own = F.normalize(self.split(self.query_key(f)), dim=-1, eps=eps)
        if self.key is not None:
            own = F.normalize(self.split(self.key(f)), dim=-1, eps=eps)
        last = None if memory is None else memory.get("key")
        if memory is not None:
            memory["key"] = own[:, :, -1:]
        return query, one_later(own, last)

    @property
    def log_decay(self) -> Tensor:
        """``log gamma`` of every head: (H,)."""
        return torch.zeros_like(self.log_eta) if self.decay_logit is None else F.logsigmoid(self.decay_logit)

    def kernel(self, u: Tensor) -> Tensor:
        """``eta gamma^(n-s) k(c_{s-1}, c_n)`` for query n and revealing token s <= n: (B, H, T, T)."""
        return self.weights(*self.queries_and_keys(u), 0)

    def weights(self, query: Tensor, key: Tensor, first: int, revealed: Tensor | None = None) -> Tensor:
        """:meth:`kernel` of queries at positions ``first``, ``first`` + 1, ... and keys at 0, 1, ...: (B, H, Tq, Tk)."""
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        s = torch.arange(keys, device=query.device)
        lag = torch.arange(first, first + queries, device=query.device)[:, None] - s
        unseen = lag < 0 if self.causal else torch.zeros_like(lag, dtype=torch.bool)
        lag = lag if self.causal else lag.abs()
        decay, eta = self.log_decay[:, None, None] * lag, self.log_eta[:, None, None]
        if self.log_beta is None:
            return (query @ key.transpose(-1, -2)) * (decay + eta).masked_fill(unseen, -torch.inf).exp()
        beta = self.log_beta.exp()[:, None, None]
        if self.kernel_name == "exp":
            offset = (decay + eta - beta).masked_fill(unseen, -torch.inf)
            # One fused product and one exponential: passes over Tq x Tk entries dominate the cost of this layer.
            exponent = torch.baddbmm(
                offset.repeat(batch, 1, 1), (beta * query).flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)
            )
            return torch.exp(exponent).view(batch, heads, queries, keys)
        hidden = unseen | ~(s > 0) if revealed is None else unseen | ~revealed[:, None, None]
        exponent = ((beta * query) @ key.transpose(-1, -2) + decay).masked_fill(hidden, -torch.inf)
        # A query without any known error has nothing to normalise over: its weights are zero.
        return eta.exp() * exponent.softmax(-1).masked_fill(hidden, 0.0)

    def carried(self, query: Tensor, key: Tensor, value: Tensor, revealed: Tensor | None) -> Tensor:
        """The weighted sum of values for every query, (B, H, T, d/H), computed for some queries at a time."""
        first, parts = key.shape[2] - query.shape[2], []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            some = query[:, :, start : start + QUERIES_AT_ONCE]
            seen = first + start + some.shape[2] if self.causal else key.shape[2]
            known = None if revealed is None else revealed[:, :seen]
            parts.append(self.weights(some, key[:, :, :seen], first + start, known) @ value[:, :, :seen])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, revealed: Tensor | None) -> Tensor:
        """:meth:`carried` of the causal softmax kernel, as one fused attention: no T x T matrix for each head."""
        queries, keys = query.shape[2], key.shape[2]
        assert self.log_beta is not None
        # In a softmax, gamma^(n-s) is a bias that depends on s alone. It enters as two more entries of queries and keys:
        # the bias rounded to the precision, and the remainder.
        wide = torch.promote_types(key.dtype, torch.float32)
        bias = self.log_decay.to(wide)[:, None] * torch.arange(keys - 1, -1, -1, device=query.device)
        coarse = bias.to(key.dtype)
        fine = (bias - coarse).to(key.dtype)
        query = F.pad((self.log_beta.exp()[:, None, None] * query).to(key.dtype), (0, 2), value=1.0)
        key = torch.cat([key, torch.stack([coarse, fine], -1).expand(len(key), -1, -1, 2)], -1)
        value = F.pad(value, (0, 2)).to(key.dtype)
        if revealed is None and queries == keys:
            # Without the first token: it reveals no error and, as a query, has seen none.
            seen = F.scaled_dot_product_attention(
                query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], is_causal=True, scale=1.0
            )
            carried = F.pad(seen, (0, 0, 1, 0))
        else:
            s = torch.arange(keys, device=query.device)
            n = s[keys - queries :, None]
            known = (s > 0)[None] if revealed is None else revealed
            # A query without a known error sees its own token, whose value is zero, so that every row has a key.
            allowed = (known[:, None] & (s <= n)) | ((s == n) & ~known[:, None])
            carried = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], scale=1.0)
        return self.log_eta.exp()[:, None, None] * carried[..., :-2]

    def carried_in_chunks(
        self, query: Tensor, key: Tensor, value: Tensor, memory: dict[str, Tensor] | None = None
    ) -> Tensor:
        """:meth:`carried` of the linear kernel, in time linear in T; each chunk hands a state ``[B, H, d/H, d/H]`` on.

        The state is the read-out W that the steps of gradient descent have built: ``carried = W c``.
        """
        batch, heads, length, size = query.shape
        state = (memory or {}).get("state")
        if state is None:
            state = query.new_zeros(batch, heads, size, size)
        log_decay, eta = self.log_decay[:, None, None], self.log_eta.exp()[:, None, None]
        chunk = CHUNK.get(query.device.type, 64)
        steps = torch.arange(min(length, chunk), device=query.device)
        lag = steps[:, None] - steps
        within = (log_decay * lag).masked_fill(lag < 0, -torch.inf).exp()  # (H, C, C)
        since = (log_decay * (steps[:, None] + 1)).exp()  # (H, C, 1): decay of the incoming state
        parts = []
        for start in range(0, length, chunk):
            q, k, v = (x[:, :, start : start + chunk] for x in (query, key, value))
            n = q.shape[2]
            reach, left = within[:, :n, :n], since[:, :n]
            if self.delta_rule:
                # w_t = b (v_t - W_{t-1} k_t), where W_{t-1} holds the w of this chunk so far: a triangular system.
                b = -torch.expm1(-eta)
                system = b * ((k @ k.transpose(-1, -2)) * reach).tril(-1)
                right = b * (v - left * (k @ state))
                if right.dtype.itemsize < 4:  # the solver has no half precision
                    system, right = system.float(), right.float()
                solved = torch.linalg.solve_triangular(system, right.to(system.dtype), upper=False, unitriangular=True)
                v = solved.to(v.dtype)
            else:
                v = eta * v
            parts.append(((q @ k.transpose(-1, -2)) * reach) @ v + left * (q @ state))
            kept = (log_decay * (n - 1 - steps[:n, None])).exp()  # (H, n, 1)
            state = left[:, -1:] * state + (kept * k).transpose(-1, -2) @ v
        if memory is not None:
            memory["state"] = state
        return torch.cat(parts, 2)


def refuse_inputs(kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for inputs of transformers that this model cannot use; drop those that are None."""
    for name in ("position_ids", "inputs_embeds", "past_key_values"):
        if kwargs.pop(name, None) is not None:
            reason = "errors need token ids, one sequence a row, and a cache of their own"
            raise ValueError(f"this model takes no {name}: {reason}")


def whole_mask(mask: Tensor | None, input_ids: Tensor, cache: PredictiveCodingCache | None) -> Tensor | None:
    """The attention mask of the cached tokens and these ``[B, P+T]``; None without padding."""
    past = 0 if cache is None else cache.get_seq_length()
    if past and (mask is None or mask.shape[1] == input_ids.shape[1]):
        assert cache is not None
        assert cache.mask is not None
        mask = torch.cat([cache.mask, torch.ones_like(input_ids) if mask is None else mask], 1)
    return None if mask is not None and bool(mask.all()) else mask


class PredictiveCodingForCausalLM(PreTrainedModel, GenerationMixin):
    """Predictive-coding language model: the module's docstring has the equations, the config the variants.

    It reads sequences of any length, also longer than those of training: nothing depends on an absolute position.
    """

    config_class = PredictiveCodingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (as transformers declares it)
    _no_split_modules = ["PredictiveCodingLayer"]  # noqa: RUF012 (as transformers declares it)
    _is_stateful = True  # a token's effect on the state cannot be undone: no assisted generation

    def __init__(self, config: PredictiveCodingConfig):
        super().__init__(config)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.first_up = nn.Linear(d, config.prediction_size, bias=False)
        self.first_down = nn.Linear(config.prediction_size, d, bias=False)
        self.conv_e = CausalConvolution(d)
        count = 1 if config.tied_layers else config.num_hidden_layers
        self.layers = nn.ModuleList(PredictiveCodingLayer(config) for _ in range(count))
        self.norm = PredictionNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

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
            # Blocks start small, so that the sum of L feature updates has the size of one.
            for linear in (module.down, module.write):
                if linear is not None:
                    linear.weight.mul_(self.config.num_hidden_layers**-0.5)
            module.log_eta.fill_(math.log(self.config.initial_eta))
            if module.log_beta is not None:
                module.log_beta.fill_(math.log(self.config.initial_beta))
            if module.decay_logit is not None:
                decays = self.config.initial_decays
                spread = torch.tensor(decays).repeat(math.ceil(module.heads / len(decays)))[: module.heads]
                module.decay_logit.copy_(torch.logit(spread))

    def read_out(self, prediction: Tensor) -> Tensor:
        """Logits ``[..., V]`` of a prediction latent ``[..., d]`` of any layer, or of a whole state ``[..., 3d]``."""
        logits: Tensor = self.lm_head(self.norm(prediction))
        return logits

    def error(
        self,
        z: Tensor,
        input_ids: Tensor,
        layer: PredictiveCodingLayer | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The error that each token reveals, of the prediction one position earlier: (B, T, d), zero at position 0.

        ``layer`` has the map of the linear error. ``last`` (B, 1, d) is the prediction before the first token, if any.
        """
        # Detached: layers use the error as a signal; it is not a second path of gradients to the embedding.
        embedding = self.embed_tokens.weight.detach()
        before = z[:, :-1] if last is None else torch.cat([last, z[:, :-1]], 1)
        error = F.embedding(input_ids if last is not None else input_ids[:, 1:], embedding)
        if self.config.error == "linear":
            assert layer is not None, "the linear error needs the map of its layer"
            assert layer.predicted is not None
            d, eps = self.config.hidden_size, self.config.rms_norm_eps
            error = F.rms_norm(error, (d,), eps=1e-12) - layer.predicted(F.rms_norm(before, (d,), eps=eps))
        else:
            if self.config.error == "softmax":
                latent = self.norm(before)
                if self.config.error_gradient:
                    expected = F.linear(latent, embedding).softmax(-1) @ embedding
                else:
                    expected = expected_embedding(latent.flatten(0, 1), embedding).view_as(latent)
                error = error - expected
            error = error * embedding.pow(2).mean().rsqrt()
        return error if last is not None else F.pad(error, (0, 0, 1, 0))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        cache: PredictiveCodingCache | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> PredictiveCodingOutput | tuple[Any, ...]:
        """Next-token logits ``[B, T, V]``; with ``labels`` (-100 is ignored) also their mean cross-entropy, nats/token.

        ``attention_mask`` ``[B, T]`` (with a cache also ``[B, P+T]``) is 0 at padding, on either side; padding reveals no
        error. ``cache``: that of the P tokens before these, or an empty one. It is updated in place and, with
        ``use_cache``, returned. Training with gradient checkpointing uses no cache. ``logits_to_keep``: number of last
        positions to give logits for; 0 means all. Raises ``ValueError`` for labels or a cache with ``causal=False``, which
        sees the tokens that it predicts, and for ``position_ids`` (packed sequences), ``inputs_embeds`` and
        ``past_key_values``.
        """
        config = self.config
        refuse_inputs(kwargs)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict
        use_cache, cache = self._cache_of(use_cache, cache, labels)
        past = 0 if cache is None else cache.get_seq_length()
        mask = whole_mask(attention_mask, input_ids, cache)
        e = F.rms_norm(self.embed_tokens(input_ids), (config.hidden_size,), eps=1e-12)
        revealed = present = None
        if mask is not None:
            # No layer has a bias: a position with e = 0 that is not updated stays zero in u and z.
            present = mask[:, past:, None].to(e.dtype)
            e = e * present
            revealed = F.pad(mask[:, 1:] * mask[:, :-1], (1, 0)).bool()
        before = None if cache is None else cache.embedded
        state = torch.cat([self.first_down(F.gelu(self.first_up(e))), self.conv_e(e, before), e], -1)

        def error_of(layer: PredictiveCodingLayer, z: Tensor, last: Tensor | None) -> Tensor:
            error = self.error(z, input_ids, layer, last)
            return error if revealed is None else error * revealed[:, past:, None].to(error.dtype)

        if cache is not None:
            if not cache.layers:
                cache.layers = [{} for _ in range(config.num_hidden_layers)]
            cache.embedded = last_two(e, before)
            cache.mask = mask if mask is not None else input_ids.new_ones(len(e), past + e.shape[1])
        states, errors, updates, writes = [state], [], [], []
        for number in range(config.num_hidden_layers):
            memory = None if cache is None else cache.layers[number]
            layer = self.layers[number % len(self.layers)]
            state, error, update, written = layer(state, error_of, revealed, present, memory)
            states.append(state)
            errors.append(error)
            updates.append(update)
            writes.append(written)
        logits = self.read_out(state[:, -logits_to_keep:] if logits_to_keep else state)
        loss = None if labels is None else self._loss(logits, states, labels, **kwargs)
        output = PredictiveCodingOutput(loss=loss, logits=logits)
        if use_cache:
            output.cache = cache
        if output_hidden_states:
            output.hidden_states = tuple(states)
            output.predictions = tuple(state[..., : config.hidden_size] for state in states)
            output.errors = tuple(errors)
            output.updates = tuple(updates)
            output.writes = tuple(writes) if config.relaxed else None
        return output if return_dict else output.to_tuple()

    def _cache_of(
        self, use_cache: bool | None, cache: PredictiveCodingCache | None, labels: Tensor | None
    ) -> tuple[bool | None, PredictiveCodingCache | None]:
        """Whether to return a cache, and the cache to use."""
        if self.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in self.layers):
            return False, None  # the layers run twice, and the second time the cache would already be updated
        if not self.config.causal and (labels is not None or use_cache or cache is not None):
            raise ValueError("causal=False sees the tokens that it predicts: it has neither a loss nor a cache")
        return use_cache, PredictiveCodingCache() if cache is None and use_cache else cache

    def _loss(self, logits: Tensor, states: list[Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        """The mean cross-entropy, plus that of layers 1..L-1 with the weight that the config gives it."""
        size, weight = self.config.vocab_size, self.config.layer_loss_weight
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        if weight and len(states) > 2:
            inner = [
                self.loss_function(logits=self.read_out(h), labels=labels, vocab_size=size, **kwargs)
                for h in states[1:-1]
            ]
            loss = loss + weight * torch.stack(inner).mean()
        return loss

    # Generation. The caches of transformers hold keys and values only.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of the next step of generation: the tokens after those of the cache, and the cache."""
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("cache") is not None:
            model_kwargs[CACHE] = outputs["cache"]
        return model_kwargs


AutoConfig.register(PredictiveCodingConfig.model_type, PredictiveCodingConfig)
AutoModelForCausalLM.register(PredictiveCodingConfig, PredictiveCodingForCausalLM)
