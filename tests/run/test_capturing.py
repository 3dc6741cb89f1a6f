"""Capturing changes nothing that others read with."""

import pytest
import torch
from helpers.gpt_windows import windows
from helpers.pretrained import run
from helpers.suites import without_figures

from lensbench.models import build
from lensbench.run import capturing
from lensbench.run.context import Context
from lensbench.runtime.environment import choose_device
from lensbench.runtime.stages import Stages
from lensbench.streams.kl import log_partition
from lensbench.streams.products import choose_products
from lensbench.streams.readout import HalfProducts
from lensbench.streams.stream import ResidualStream
from lensbench.suite.files import load_suite

HALF = HalfProducts(torch.bfloat16, 2)


def small_stream() -> ResidualStream:
    shape = {"vocab_size": 61, "d_model": 16, "layers": 2, "heads": 2, "context": 32, "parameters": 20_000}
    return ResidualStream(build("gpt", seed=0, **shape).eval())


def test_the_choice_of_products_is_returned_and_the_streams_readout_stays(tiny_suite, tmp_path, monkeypatch):
    stream = small_stream()
    monkeypatch.setattr(capturing, "products_for", lambda *_: HALF)
    context = Context(load_suite(str(tiny_suite)), Stages(tmp_path / "stages"), choose_device("cpu"))
    _, readout = capturing.captured_states(context, stream, windows(), name="capture")
    assert readout.products == HALF
    assert stream.readout.products is None
    assert readout.unembedding is stream.readout.unembedding


def test_nothing_in_half_precision_is_chosen_on_a_cpu_and_a_copy_reads_the_same():
    readout = small_stream().readout
    n = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    assert choose_products(readout, n) is None
    other = readout.with_products(HALF).with_products(None)
    assert torch.equal(log_partition(other, n), log_partition(readout, n))
    assert readout.with_products(None) is readout


@pytest.mark.run
def test_a_user_who_forbids_float16_gets_float32_of_models_trained_here_too(tiny_suite, tmp_path, monkeypatch):
    """Finished stages of one way are not those of the other; the training is that of both."""
    monkeypatch.setattr("lensbench.streams.products.half_is_fast", lambda: True)
    monkeypatch.setattr("lensbench.streams.products.LEAST_WEIGHTS", 0)
    said = {}
    with without_figures():
        for folder, way in (("both", "true"), ("both", "false"), ("fresh", "false")):
            ended = run(
                "run", tiny_suite, "--only", "gpt", "--out", tmp_path / folder, "--set", f"evaluate.half_products={way}"
            )
            assert ended.exit_code == 0, ended.output
            said[folder, way] = ended.stderr
            if folder == "both":
                (tmp_path / way).write_bytes((tmp_path / folder / "lenses.csv").read_bytes())
    assert said["both", "true"].count("log-partitions use 1 product in float16") == 1
    assert "float16" not in said["both", "false"]
    assert "train-gpt-seed0: reused" in said["both", "false"]
    assert (tmp_path / "true").read_bytes() != (tmp_path / "false").read_bytes()
    assert (tmp_path / "false").read_bytes() == (tmp_path / "fresh" / "lenses.csv").read_bytes()
