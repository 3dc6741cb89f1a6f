"""Read-outs by products in float16, as a processor makes them, against float64."""

import copy

import pytest
import torch
from helpers.synthetic import in_double, read_out

from lensbench.lenses.search import log_partition_of_pads
from lensbench.streams import products
from lensbench.streams.kl import Tokens, partition_and_largest, token_kl
from lensbench.streams.products import LARGEST_BIAS, ON_CPU, agrees_on_average, centred, choose_products
from lensbench.streams.words import Words

D, V, N = 64, 2500, 400
KINDS = {"plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 5.0}}


def made(softcap=None, **more):
    readout = copy.deepcopy(read_out(D, V, logits=4.0, **more))
    readout.softcap = softcap
    return readout


def states(readout, seed=1, shared=0.0):
    random = torch.Generator().manual_seed(seed)
    return readout.final_norm(torch.randn(N, D, generator=random) + shared * torch.randn(D, generator=random))


def exact(readout, n):
    """Log-partitions and largest logits by definition."""
    wide = in_double(readout)
    logits = wide.logits(n.double())
    return logits.logsumexp(-1), logits.amax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_log_partitions_and_largest_logits_are_those_of_float64_with_little_noise_and_no_bias(kind):
    readout = made(**KINDS[kind])
    n = states(readout)
    log_z, largest = partition_and_largest(readout.with_products(ON_CPU), n)
    expected, top = exact(readout, n)
    error = log_z.double() - expected
    assert log_z.dtype == torch.float32
    assert 1e-6 < error.abs().max() < 1e-2
    assert abs(error.mean()) < 3 * error.std() / N**0.5 + 1e-5
    # Of the word that rounded logits name, the logit itself is exact; two words may be as near as rounding.
    assert (largest - top).abs().max() < 1e-2
    assert (largest - top).abs().median() < 1e-5
    assert torch.equal(log_z, partition_and_largest(readout.with_products(ON_CPU), n, want_largest=False)[0])


def test_what_all_states_share_is_not_rounded():
    readout = made()
    n = states(readout, shared=3.0)
    left, base, apart = centred(n, readout.weight, readout.longest)
    assert not len(apart)
    by_parts = (
        left.double() @ readout.weight.half().double().T + base.double()
    ) - n.double() @ readout.weight.double().T
    plain = n.half().double() @ readout.weight.half().double().T - n.double() @ readout.weight.double().T
    assert by_parts.mean(0).abs().mean() < 0.1 * plain.mean(0).abs().mean()
    assert by_parts.square().mean() < 0.3 * plain.square().mean()


def test_states_beyond_the_range_of_float16_are_read_out_in_float32():
    readout = made()
    n = states(readout)
    others = torch.arange(N) != 5
    usual = partition_and_largest(readout.with_products(ON_CPU), n)[0] - exact(readout, n)[0]
    n[5] *= 1e4
    log_z, largest = partition_and_largest(readout.with_products(ON_CPU), n)
    expected, top = exact(readout, n)
    assert log_z[5] == pytest.approx(float(expected[5]), rel=1e-5)
    assert largest[5] == pytest.approx(float(top[5]), rel=1e-5)
    # One such row does not spoil the others.
    assert (log_z - expected)[others].square().mean() < 2 * usual.square().mean()
    words = Words.draw(readout.with_products(ON_CPU), torch.full((V,), 1 / V), 500, torch.Generator().manual_seed(0))
    plain = Words.draw(readout, torch.full((V,), 1 / V), 500, torch.Generator().manual_seed(0))
    found, known = (w.partition_and_largest(n)[0] for w in (words, plain))
    assert found[5] == pytest.approx(float(known[5]), rel=1e-5)
    assert (found - known)[others].abs().max() < 2e-2


def test_a_row_that_is_not_a_number_spoils_no_other():
    readout = made()
    n = states(readout)
    n[3] = torch.nan
    log_z = partition_and_largest(readout.with_products(ON_CPU), n)[0]
    assert log_z.isnan().nonzero().flatten().tolist() == [3]


def test_a_kl_of_capped_logits_errs_no_more_than_the_log_partition():
    """p must sum to 1 whatever the error of its log-partition, or the mean logit multiplies it."""
    readout = made(softcap=30.0)
    n = states(readout)
    final = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    tokens = Tokens(torch.zeros(N, D), torch.zeros(N), final)
    kl, known = (token_kl(readout.with_products(way), n, tokens) for way in (ON_CPU, None))
    log_z = [partition_and_largest(readout.with_products(way), n)[0] for way in (ON_CPU, None)]
    assert (kl - known).square().mean() < 2 * (log_z[0] - log_z[1]).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_words_by_these_products_are_words(kind):
    readout = made(**KINDS[kind])
    n = states(readout)
    mean = readout.logits(n).softmax(-1).mean(0)
    plain, half = (
        Words.draw(readout.with_products(way), mean, 500, torch.Generator().manual_seed(0)) for way in (None, ON_CPU)
    )
    for ours, expected in zip(half.partition_and_largest(n), plain.partition_and_largest(n), strict=True):
        assert 0 < (ours - expected).abs().max() < 1e-2
    moments, expected = half.softmax_moment(n)[0], plain.softmax_moment(n)[0]
    assert (moments - expected).norm() < 3e-3 * expected.norm()
    if readout.linear:
        log_z = partition_and_largest(half.as_readout(), n)[0]
        assert (log_z - plain.partition_and_largest(n)[0]).abs().max() < 1e-2


def test_pads_by_these_products_and_states_of_any_length():
    readout = made()
    random = torch.Generator().manual_seed(2)
    u = 1e5 * torch.randn(N, D, generator=random)
    inverse = 1 / u.norm(dim=-1).div(D**0.5).repeat(3, 1)
    direction, pads = 1e5 * torch.randn(D, generator=random), [0.0, 0.3, 0.6]
    both = [
        log_partition_of_pads(readout.with_products(way), u, direction, torch.zeros(D), inverse, pads)
        for way in (None, ON_CPU)
    ]
    assert 0 < (both[1] - both[0]).abs().max() < 3e-2
    assert abs((both[1] - both[0]).mean()) < 1e-3


@pytest.mark.parametrize("way", [None, ON_CPU])
@pytest.mark.parametrize("loud", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_pads_are_those_of_float64_also_where_the_last_words_are_far_louder_than_the_first(way, loud, constant):
    """Beyond exp(88) a shift by the first block's largest logit would be infinite."""
    readout = made(bias=constant)
    random = torch.Generator().manual_seed(3)
    if loud:
        readout.unembedding.weight.data[-3:] *= 40
    if constant:  # which softmax does not see, but a sum of exponentials does
        readout.unembedding.bias.data -= 200
    u, direction = (torch.randn(n, D, generator=random) for n in (600, 1))
    direction, pads = direction[0], [0.0, 0.5, 1.5]
    offset = torch.randn(D, generator=random) if constant else torch.zeros(D)
    inverse = 0.5 + torch.rand(3, 600, generator=random)
    found = log_partition_of_pads(readout.with_products(way), u, direction, offset, inverse, pads)
    bias = 0 if readout.bias is None else readout.bias.double()
    expected = torch.stack(
        [
            (((u + a * direction).double() * i[:, None] + offset) @ readout.weight.double().T + bias).logsumexp(-1)
            for a, i in zip(pads, inverse, strict=True)
        ]
    ).detach()
    assert bool((expected.amax() - expected.amin() > 100) == loud)
    # Float16 knows a logit of some hundreds to an eighth.
    atol, rtol = (1e-4, 1e-5) if way is None else (0.15 if loud else 3e-2, 2e-3)
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


@pytest.fixture
def small_and_fast(monkeypatch):
    monkeypatch.setattr(products, "half_is_fast", lambda: True)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)


def test_they_are_chosen_on_a_processor_that_is_fast_at_them(small_and_fast):
    readout = made()
    assert choose_products(readout, states(readout)) == ON_CPU
    assert readout.products is None


@pytest.mark.parametrize("why", ["not fast", "small unembedding", "bias", "noise", "range", "one layer"])
def test_they_are_not_chosen_where_they_gain_nothing_or_do_not_agree(why, small_and_fast, monkeypatch):
    readout = made()
    n = states(readout)
    if why == "not fast":
        monkeypatch.setattr(products, "half_is_fast", lambda: False)
    elif why == "small unembedding":
        monkeypatch.setattr(products, "LEAST_WEIGHTS", D * V + 1)
    elif why == "noise":  # logits of hundreds
        with torch.no_grad():
            readout.unembedding.weight.mul_(100)
        assert not agrees_on_average(readout, n[None])
    elif why == "range":
        with torch.no_grad():
            readout.unembedding.weight[0, 0] = 1e5
    elif why == "one layer":  # one of many whose logits are large
        with torch.no_grad():
            readout.unembedding.weight.mul_(60)
        n = torch.stack([n, *[n / 1000] * 30])
        assert agrees_on_average(readout, n[1:])
    else:
        monkeypatch.setattr(products, "LARGEST_BIAS", 0.0)
        monkeypatch.setattr(products, "CHANCE", 0.0)
    assert choose_products(readout, n) is None


def test_a_bias_is_what_is_judged(small_and_fast, monkeypatch):
    """Log-partitions that are all a little too large."""
    readout = made()
    n = states(readout)
    true = products.half_log_partition

    def shifted(by):
        return lambda *call: (true(*call)[0] + by, None)

    monkeypatch.setattr(products, "half_log_partition", shifted(0.5 * LARGEST_BIAS))
    assert choose_products(readout, n) == ON_CPU
    monkeypatch.setattr(products, "half_log_partition", shifted(2 * LARGEST_BIAS))
    assert choose_products(readout, n) is None
