"""Log-partitions in chunks, with products in bfloat16, against all logits at once in float64."""

import copy

import pytest
import torch
from helpers.synthetic import read_out

from lensbench.streams import partition
from lensbench.streams.partition import TERMS, agreeing_terms, choose_product_terms, in_terms, online_log_partition

D, V, N = 64, 2500, 300


def states(readout, seed=1):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    return readout.final_norm(x)


def exact(readout, n):
    """By definition, in float64."""
    bias = 0 if readout.bias is None else readout.bias.double()
    logits = n.double() @ readout.weight.double().T + bias
    cap = readout.softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.exp().sum(-1).log(), logits.amax(-1)


@pytest.mark.parametrize("more", [{}, {"bias": True}, {"softcap": 5.0}], ids=["plain", "bias", "softcap"])
@pytest.mark.parametrize("terms", [0, *TERMS])
def test_log_partitions_and_largest_logits_of_chunks_are_those_of_all_logits(more, terms):
    readout = read_out(D, V, logits=4.0, bias="bias" in more)
    readout.softcap = more.get("softcap")
    n = states(readout)
    log_z, largest = online_log_partition(readout.with_product_terms(terms), n)
    expected, top = exact(readout, n)
    error = (log_z - expected).abs().mean()
    assert error < {0: 2e-6, 1: 2e-2, 2: 2e-2, 3: 3e-5}[terms]
    assert (largest - top).abs().max() < (1e-4 if terms in (0, 3) else 0.1)
    assert log_z.dtype == largest.dtype == torch.float32


def test_each_further_product_makes_log_partitions_more_exact():
    """States are of 24 bits: what rounding takes off them, and off the weights, is most of the error."""
    readout = read_out(D, V, logits=4.0)
    n = states(readout)
    expected = exact(readout, n)[0]
    errors = [float((online_log_partition(readout.with_product_terms(t), n)[0] - expected).abs().mean()) for t in TERMS]
    assert errors[0] > 1.1 * errors[1] > 100 * errors[2]


def test_weights_that_are_bfloat16_numbers_need_no_third_product():
    readout = copy.deepcopy(read_out(D, V, logits=4.0))
    with torch.no_grad():
        readout.unembedding.weight.copy_(readout.unembedding.weight.bfloat16().float())
    n = states(readout)
    two = online_log_partition(readout.with_product_terms(2), n)[0]
    assert (two - exact(readout, n)[0]).abs().mean() < 3e-5
    assert agreeing_terms(readout, n) == 2
    assert agreeing_terms(read_out(D, V, logits=4.0), n) == 3


def test_the_fewest_products_that_agree_are_taken_and_none_where_none_does():
    readout = read_out(D, V, logits=4.0)
    n = states(readout)
    assert agreeing_terms(readout, n, tolerance=1.0) == 1
    assert agreeing_terms(readout, n, tolerance=0.0) == 0
    assert choose_product_terms(readout, n) == 0, "not on a processor"
    assert readout.product_terms == 0


def test_a_number_is_the_sum_of_its_terms():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 1000)
    high, low = in_terms(x, 2)
    assert high.dtype == low.dtype == torch.bfloat16
    assert torch.equal(in_terms(x, 1)[0], high)
    assert ((high.double() + low.double() - x) / x).abs().max() < 2**-16


def test_what_is_worked_on_does_not_grow_with_the_vocabulary(monkeypatch):
    """The largest tensor that a pass makes, seen by the reduction that it is handed to."""
    seen = []

    def watching(logits, *rest):
        seen.append(tuple(logits.shape))
        return partition.reduced(logits, *rest)

    for words in (V, 4 * V):
        readout = read_out(D, words)
        online_log_partition(readout, states(readout), watching)
    assert {shape for shape in seen if shape[1] == partition.VOCABULARY_BLOCK} == {(N, partition.VOCABULARY_BLOCK)}
    assert max(shape[1] for shape in seen) == partition.VOCABULARY_BLOCK


def test_no_compiled_reduction_without_triton(monkeypatch):
    monkeypatch.setattr(partition.importlib.util, "find_spec", lambda _: None)
    partition.compiled.cache_clear()
    assert partition.compiled() is None
    partition.compiled.cache_clear()


def test_a_compiler_that_fails_is_named_in_a_warning(monkeypatch):
    """No GPU is at hand here: torch then fails at the first tensor, as it does for a driver that is too old."""
    if torch.cuda.is_available():
        pytest.skip("this GPU compiles")
    monkeypatch.setattr(partition.importlib.util, "find_spec", lambda _: object())
    partition.compiled.cache_clear()
    with pytest.warns(UserWarning, match="not compiled for this GPU"):
        assert partition.compiled() is None
    partition.compiled.cache_clear()
