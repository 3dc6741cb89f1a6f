"""Log-partitions in chunks, with products in half precision, against all logits at once in float64."""

import copy

import pytest
import torch
from helpers.synthetic import read_out

from lensbench.streams import partition
from lensbench.streams.kl import moment_and_partition
from lensbench.streams.partition import (
    LADDER,
    LOWEST,
    agreeing_products,
    exponentials_,
    online_log_partition,
    probabilities_,
)
from lensbench.streams.products import choose_products
from lensbench.streams.readout import HalfProducts, in_terms

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


BF16, FP16 = torch.bfloat16, torch.float16
BOUNDS = {
    None: 2e-6,
    (BF16, 1): 2e-2,
    (BF16, 2): 2e-2,
    (BF16, 3): 3e-5,
    (FP16, 1): 2e-3,
    (FP16, 2): 2e-3,
    (FP16, 3): 3e-6,
}
"""Data type and number of products -> what the mean error of a log-partition stays below, nats"""


def by(half, readout):
    return readout.with_products(None if half is None else HalfProducts(*half))


def test_the_ladder_has_every_way_and_fewer_products_first():
    assert [(one.dtype, one.terms) for one in LADDER] == [
        (BF16, 1), (FP16, 1), (BF16, 2), (FP16, 2), (BF16, 3), (FP16, 3),
    ]  # fmt: skip
    assert [str(one) for one in LADDER[1:3]] == ["1 product in float16", "2 products in bfloat16"]


@pytest.mark.parametrize("more", [{}, {"bias": True}, {"softcap": 5.0}], ids=["plain", "bias", "softcap"])
@pytest.mark.parametrize("half", BOUNDS, ids=str)
def test_log_partitions_and_largest_logits_of_chunks_are_those_of_all_logits(more, half):
    readout = read_out(D, V, logits=4.0, bias="bias" in more)
    readout.softcap = more.get("softcap")
    n = states(readout)
    log_z, largest = online_log_partition(by(half, readout), n)
    expected, top = exact(readout, n)
    assert (log_z - expected).abs().mean() < BOUNDS[half]
    assert (largest - top).abs().max() < (1e-4 if half is None or half[1] == 3 else 0.1)
    assert log_z.dtype == largest.dtype == torch.float32


def error_of(half, readout):
    n = states(readout)
    return float((online_log_partition(by(half, readout), n)[0] - exact(readout, n)[0]).abs().mean())


def test_each_further_product_and_float16_make_log_partitions_more_exact():
    readout = read_out(D, V, logits=4.0)
    errors = {half: error_of(half, readout) for half in BOUNDS if half}
    assert errors[BF16, 1] > 1.1 * errors[BF16, 2] > 100 * errors[BF16, 3]
    # Three more digits in base two: an eighth of the error.
    assert errors[FP16, 1] == pytest.approx(errors[BF16, 1] / 8, rel=0.3)


def test_weights_that_are_bfloat16_numbers_need_no_third_product():
    readout = copy.deepcopy(read_out(D, V, logits=4.0))
    with torch.no_grad():
        readout.unembedding.weight.copy_(readout.unembedding.weight.bfloat16().float())
    assert error_of((BF16, 2), readout) < 3e-5
    n = states(readout)
    assert agreeing_products(readout, n, tolerance=1e-4) == HalfProducts(BF16, 2)
    assert agreeing_products(read_out(D, V, logits=4.0), n, tolerance=1e-4) == HalfProducts(BF16, 3)


def test_the_first_products_that_agree_are_taken_and_none_where_none_does():
    readout = read_out(D, V, logits=4.0)
    n = states(readout)
    assert agreeing_products(readout, n, tolerance=1.0) == HalfProducts(BF16, 1)
    assert agreeing_products(readout, n, tolerance=0.6 * error_of((BF16, 1), readout)) == HalfProducts(FP16, 1)
    assert agreeing_products(readout, n, tolerance=0.0) is None
    assert choose_products(readout, n) is None, "not on a processor"
    assert readout.products is None


def test_states_that_may_leave_the_range_of_float16_are_not_given_to_it():
    readout = copy.deepcopy(read_out(D, V, logits=4.0))
    n = states(readout)
    between = 0.6 * error_of((BF16, 1), readout)
    scale = 65504 / float(n.abs().max()) / D**0.5
    with torch.no_grad():  # the same logits from larger states and smaller weights
        readout.unembedding.weight.div_(1.01 * scale)
    found = agreeing_products(readout, n * 1.01 * scale, tolerance=between)
    assert found is not None
    assert found.dtype == BF16


@pytest.mark.parametrize(("dtype", "digits"), [(BF16, 16), (FP16, 21)])
def test_a_number_is_the_sum_of_its_terms(dtype, digits):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(min=0.5)
    high, low = in_terms(x, 2, dtype)
    assert high.dtype == low.dtype == dtype
    assert torch.equal(in_terms(x, 1, dtype)[0], high)
    assert ((high.double() + low.double() - x) / x).abs().max() < 2**-digits


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


def test_no_exponential_is_subnormal_and_none_that_counts_is_changed():
    """Numbers below the normal range of float32 take a processor a hundred times as long."""
    x = torch.linspace(-400.0, 0.0, 4001)
    found, true = exponentials_(x.clone()), x.double().exp()
    assert float(found.min()) > torch.finfo(torch.float32).tiny
    assert float((found.double() - true).abs().max()) < 1e-6
    chances = probabilities_(x.clone())
    assert not chances[x < LOWEST].any()
    torch.testing.assert_close(chances[x > LOWEST + 1], found[x > LOWEST + 1], rtol=0, atol=0)


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_moments_and_partitions_of_logits_far_apart_are_those_of_float64(spread):
    random = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(20, 500, generator=random)
    weight = torch.randn(500, 7, generator=random)
    moment, log_z = moment_and_partition(logits.clone(), weight)
    wide = logits.double()
    torch.testing.assert_close(log_z.double(), wide.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(moment.double(), wide.softmax(-1) @ weight.double(), rtol=1e-4, atol=1e-5)
