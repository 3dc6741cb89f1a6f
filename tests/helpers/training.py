"""A small model to train, its recipe and its stream of tokens."""

import numpy as np
import torch

from lensbench.data.recipe import TrainingRecipe
from lensbench.models import build

SHAPE = {"vocab_size": 50, "d_model": 16, "layers": 2, "heads": 2, "context": 16}
STREAM = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)


CPU = torch.device("cpu")


def recipe(steps=10, **changes):
    return TrainingRecipe(**{"tokens": steps * 64, "length": 16, "batch": 4, "checkpoint_every": 3, **changes})


def model_of(family="gpt", parameters=12_000, seed=0, **changes):
    return build(family, parameters=parameters, seed=seed, **{**SHAPE, **changes})
