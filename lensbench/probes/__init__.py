"""Measurements next to the lenses: one file per probe. Each is a function of a model's stream."""

from lensbench.probes import (
    accuracy,
    causal_fidelity,
    error_transport,
    few_shot,
    gradient_steps,
    gradients,
    head_weights,
    paths,
    places,
    prediction_visibility,
    representation,
)

__all__ = [
    "accuracy",
    "causal_fidelity",
    "error_transport",
    "few_shot",
    "gradient_steps",
    "gradients",
    "head_weights",
    "paths",
    "places",
    "prediction_visibility",
    "representation",
]
