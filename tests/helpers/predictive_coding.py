"""Small predictive-coding models and their tokens."""

import numpy as np
import torch

from lensbench.models import build
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM

VARIANTS = ("softmax", "none")
V, D, L, H, T = 40, 16, 3, 4, 11


def tiny(error="softmax", seed=0, dtype=torch.float64, **changes):
    """A model none of whose parameters sits at a special value: gains, decays, eta and beta differ everywhere."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H}
    sizes |= {"intermediate_size": 24, "prediction_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    # Without the norms' epsilon the equations hold to rounding.
    exact = {"initializer_range": 1.0, "rms_norm_eps": 1e-12}
    config = PredictiveCodingConfig(error=error, **(sizes | exact | changes))
    model = PredictiveCodingForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        for layer in model.layers:
            for parameter in (layer.log_eta, layer.log_beta, layer.decay_logit):
                if parameter is None:
                    continue
                parameter.add_(0.5 * torch.randn(H, dtype=dtype))
    return model


def tokens(batch=2, length=T, seed=1):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def rms(x):
    return x / np.sqrt(np.mean(x**2))


def array(parameter):
    return parameter.detach().double().numpy()


def any_model(name):
    if name in VARIANTS:
        return tiny(name, dtype=torch.float32, rms_norm_eps=1e-6)
    return build(
        name, parameters=12_000, vocab_size=V, d_model=D, layers=L, heads=H, context=T, initializer_range=0.3
    ).eval()
