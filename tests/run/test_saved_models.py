"""What is measured is the model that was trained: a saved one loads as itself, or the run refuses it."""

import pytest
import torch
from helpers.suites import write_suite

from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.run.context import Context
from lensbench.run.training import save
from lensbench.runtime.stages import Stages
from lensbench.suite.files import load_suite

SHAPE = {"vocab_size": 50, "d_model": 16, "layers": 2, "heads": 2, "context": 16}


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(load_suite(str(write_suite(tmp_path))), Stages(tmp_path / "stages"), torch.device("cpu"))


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt-conv", "predictive-coding"])
def test_a_saved_model_loads_as_itself(family, context, tmp_path):
    save(context, build(family, parameters=12_000, **SHAPE), tmp_path / "saved", 16)
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_network_that_was_changed_after_it_was_built_is_refused(context, tmp_path):
    network = build("gpt", parameters=12_000, **SHAPE)
    for layer in network.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(LensbenchError, match="loads as another model"):
        save(context, network, tmp_path / "saved", 16)
