"""Capturing changes nothing that others read with."""

import torch
from helpers.gpt_windows import windows

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
    monkeypatch.setattr(capturing, "choose_products", lambda *_: HALF)
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
