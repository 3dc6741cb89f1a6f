"""What a GPU computes is what the CPU does, within stated tolerances; skipped, and said so, where there is none."""

import numpy as np
import pytest
import torch
from helpers.gpt_windows import windows

from lensbench.data.recipe import TrainingRecipe
from lensbench.lenses.fit import fit as fit_lenses
from lensbench.lenses.moments import Moments
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.evaluate import evaluate
from lensbench.models import build
from lensbench.models.training import train
from lensbench.streams.capture import capture
from lensbench.streams.products import choose_products
from lensbench.streams.stream import ResidualStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA is not compared with the CPU")
RECIPE = FitRecipe(
    ridges=(1e-2, 0.1, 1.0), pads=(0.0, 0.3), rotations=2, pair_rotations=1, refits=1, refine_tokens=32, refine_passes=2
)


def scored(device: str, dtype: torch.dtype = torch.float32):
    model = build(
        "gpt-conv", seed=5, vocab_size=61, d_model=24, layers=4, heads=2, context=32, parameters=40_000
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    stream = ResidualStream(model.to(device, dtype))
    fit, dev = capture(stream, windows(0, 40)), capture(stream, windows(1, 20))
    products = choose_products(stream.readout, stream.readout.final_norm(fit.states[-1]))
    readout = stream.readout.with_products(products)
    lenses = fit_lenses(FitContext.of(readout, fit, dev, RECIPE, seed=0))
    return Moments.of(fit), evaluate(readout, dev, lenses)


def test_moments_and_matrices_agree_with_the_cpu():
    (here, ours), (there, theirs) = scored("cuda"), scored("cpu")
    for name in ("mean", "covariance", "cross"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=1e-4, atol=1e-4)
    tokens = theirs.tokens[:, None, None]
    for name in ("kl", "ce"):
        difference = np.abs(ours.matrix(name) - theirs.matrix(name)).sum(0) / tokens.sum()
        assert difference.max() < 5e-3, name  # nats per token; log-partitions may be made in bfloat16


def test_a_model_in_bfloat16_is_read_in_float32_where_it_matters():
    (_, half), (_, whole) = scored("cuda", torch.bfloat16), scored("cpu")
    difference = np.abs(half.model_ce - whole.model_ce).sum() / whole.tokens.sum()
    assert difference < 0.05
    assert np.isfinite(half.matrix("kl")).all()


def test_a_few_training_steps_agree_with_the_cpu(tmp_path):
    recipe = TrainingRecipe(tokens=4 * 64, length=16, batch=4)
    stream = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
    shape = {"vocab_size": 50, "d_model": 16, "layers": 2, "heads": 2, "context": 16, "parameters": 12_000}
    losses = {}
    for device in ("cpu", "cuda"):
        told: list[float] = []
        train(
            build("gpt", seed=0, **shape), stream, recipe, seed=0, checkpoints=tmp_path / device,
            device=torch.device(device), report=lambda at, told=told: told.append(at.loss),
        )  # fmt: skip
        losses[device] = told
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
