"""Every lens on every layer, against plain loops over tuned-lens's own classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.synthetic import SyntheticStream, capture_of, orthogonal, random_maps, read_out, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench.lenses import read
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.read import own_layer_sums, score
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.tuned import tuned_lens
from lensbench.measures import transfer
from lensbench.measures.transfer import transfer_sums
from lensbench.streams import kl
from lensbench.streams.capture import capture
from lensbench.streams.kl import log_partition, softmax_moment, sum_by_window
from lensbench.streams.partition import online_log_partition
from lensbench.streams.readout import HalfProducts

D, LAYERS, V = 10, 3, 50


HEADS = {"plain": {}, "scaled": {"scale": 0.3}, "capped": {"softcap": 2.0}, "both": {"scale": 0.7, "softcap": 1.5}}
"""What a model may do to its head's output."""


def random_setting(seed=0, tokens=42, head="plain", **how):
    readout = read_out(D, V, seed=seed, **how)
    for name, value in HEADS[head].items():
        setattr(readout, name, value)
    states = 2 * torch.randn(LAYERS + 1, tokens, D, generator=torch.Generator().manual_seed(seed))
    return readout, capture_of(readout, states, per_document=6), random_maps(LAYERS, D, seed=seed)


def slow_transfer(readout, captured, maps):
    """KL, cross-entropy and movement per window, one lens, layer and window at a time."""
    lens = tuned_lens(readout, maps, model_name="none")

    def log_q(i, j):
        logits = lens(captured.states[j], i) if i < LAYERS else readout(captured.states[j])
        return logits.log_softmax(-1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    windows = np.unique(captured.window)
    out = {name: np.zeros((len(windows), LAYERS + 1, LAYERS + 1)) for name in ("kl", "ce", "movement")}
    log_p = readout(captured.states[-1]).log_softmax(-1)
    for i in range(LAYERS + 1):
        for j in range(LAYERS + 1):
            here = log_q(i, j)
            per_token = {
                "kl": kl(log_p, here),
                "ce": -here[torch.arange(len(here)), captured.targets],
                "movement": kl(log_q(i, i), here),
            }
            for name, values in per_token.items():
                for s, window in enumerate(windows):
                    out[name][s, i, j] = values[captured.window == window].double().sum()
    return out


@pytest.mark.parametrize(("head", "how"), [(head, how) for k, head in enumerate(HEADS) for how in (k, 7 - k)])
def test_matrix_is_that_of_the_published_loops(head, how, monkeypatch):
    """Every head with both norms, with and without a bias, in whole and in small blocks: the three bits of ``how``."""
    norm, bias, blocks = ("rms", "layer")[how & 1], bool(how & 2), [(1024, 2048, 1024), (5, 7, 4)][how // 4]
    for name, size in zip(("TOKEN_BLOCK", "VOCABULARY_BLOCK", "ROW_BLOCK"), blocks, strict=True):
        for module in (kl, read, transfer):
            monkeypatch.setattr(module, name, size, raising=False)
    readout, captured, maps = random_setting(norm=norm, bias=bias, head=head)
    with torch.no_grad():
        slow = slow_transfer(readout, captured, maps)
    fast = transfer_sums(readout, captured, maps)
    for name, expected in slow.items():
        np.testing.assert_allclose(getattr(fast, name), expected, atol=1e-4, rtol=1e-5)


def test_last_row_is_the_logit_lens_and_the_model_knows_itself():
    readout, captured, maps = random_setting(bias=True)
    sums = transfer_sums(readout, captured, maps)
    for j in range(LAYERS + 1):
        log_q = readout(captured.states[j]).log_softmax(-1)
        ce = -log_q.gather(-1, captured.targets[:, None])[:, 0]
        np.testing.assert_allclose(sums.ce[:, LAYERS, j], sum_by_window(ce, captured), atol=1e-4)
    assert np.abs(sums.kl[:, LAYERS, LAYERS]).max() < 1e-4
    np.testing.assert_allclose(sums.ce[:, -1, -1], sum_by_window(captured.model_ce, captured), atol=1e-4)


def test_nothing_moves_on_a_lens_own_layer():
    readout, captured, maps = random_setting()
    movement = transfer_sums(readout, captured, maps).movement
    assert np.abs(np.diagonal(movement, axis1=1, axis2=2)).max() < 1e-4
    assert movement.min() > -1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("block", [1, 7, 50, 64])
def test_log_partition_survives_large_logits_in_any_block(bias, offset, block, monkeypatch):
    monkeypatch.setattr(kl, "VOCABULARY_BLOCK", block)
    readout = read_out(D, V, bias=True)
    random = torch.Generator().manual_seed(0)
    n = torch.randn(20, D, generator=random)
    with torch.no_grad():
        readout.unembedding.weight.mul_(300)
        readout.unembedding.bias.add_(offset)
    if not bias:
        readout.unembedding.bias = None
        n = n * (1 + abs(offset) / 300)  # logits of about 1e4 of either sign, rising and falling over the blocks
    logits = n.double() @ readout.weight.double().T
    if bias:
        logits = logits + readout.bias.double()
    found = log_partition(readout, n)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), logits.logsumexp(-1), rtol=2e-6, atol=1e-4)


def test_one_word_far_above_the_others_may_stand_in_any_block(monkeypatch):
    monkeypatch.setattr(kl, "VOCABULARY_BLOCK", 8)
    for at in range(0, V, 9):
        readout = read_out(D, V, bias=True)
        with torch.no_grad():
            readout.unembedding.bias[at] = 1e4
        n = torch.randn(4, D)
        expected = (n.double() @ readout.weight.double().T + readout.bias.double()).logsumexp(-1)
        torch.testing.assert_close(log_partition(readout, n).double(), expected, rtol=1e-6, atol=1e-5)


def logits_in_double(readout, n):
    """Logits by definition: head, scale, cap."""
    weight, bias = readout.unembedding.weight.double(), readout.unembedding.bias
    logits = readout.scale * (n.double() @ weight.T + (0 if bias is None else bias.double()))
    return logits if readout.softcap is None else readout.softcap * torch.tanh(logits / readout.softcap)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("vocab", "block"), [(50, 1024), (50, 50), (50, 16), (50, 25), (51, 50), (1, 1024), (1, 1)])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_log_partition_is_logsumexp_whatever_the_blocks(rows, vocab, block, bias, head, monkeypatch):
    monkeypatch.setattr(kl, "VOCABULARY_BLOCK", block)
    monkeypatch.setattr(kl, "ROW_BLOCK", 4)
    readout = read_out(D, vocab, bias=bias)
    for name, value in HEADS[head].items():
        setattr(readout, name, value)
    n = 3 * torch.randn(rows, D, generator=torch.Generator().manual_seed(1))
    given = n.clone()
    found = log_partition(readout, n)
    assert found.shape == (rows,)
    assert torch.equal(n, given)
    torch.testing.assert_close(found.double(), logits_in_double(readout, n).logsumexp(-1), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("high", [70.0, 85.0, 95.0, 130.0, 5e3])
@pytest.mark.parametrize("by", ["weight", "bias"])
def test_rows_whose_later_logits_tower_over_the_first_block_lose_nothing(by, high, monkeypatch):
    """Beside them stand rows that need no second look, and rows whose logits fall just as far."""
    monkeypatch.setattr(kl, "VOCABULARY_BLOCK", 16)
    readout = read_out(D, V, bias=True)
    later = slice(20, V)
    n = torch.randn(12, D, generator=torch.Generator().manual_seed(0))
    n[:, 0] = torch.tensor([1.0, 0.0, -1.0]).repeat(4)
    with torch.no_grad():
        if by == "weight":
            readout.unembedding.weight[:, 0] = 0
            readout.unembedding.weight[later, 0] = high
        else:
            readout.unembedding.bias[later] += high
    logits = logits_in_double(readout, n)
    above = logits[:, later].amax(-1) - logits[:, :16].amax(-1)
    assert above.max() > 0.9 * high
    if by == "weight":
        assert above.min() < -0.9 * high
        assert above.abs().min() < 20
    found = log_partition(readout, n)
    torch.testing.assert_close(found.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_hugely_negative_logits_lose_nothing(monkeypatch):
    monkeypatch.setattr(kl, "VOCABULARY_BLOCK", 16)
    for words in (slice(0, 16), slice(16, V), slice(0, V)):
        readout = read_out(D, V, bias=True)
        with torch.no_grad():
            readout.unembedding.bias[words] -= 1e30
        n = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
        expected = logits_in_double(readout, n).logsumexp(-1)
        torch.testing.assert_close(log_partition(readout, n).double(), expected, rtol=1e-6, atol=1e-5)


class Remembered:
    """A stream that hands on states and logits it was given, one position per window."""

    def __init__(self, readout, states, float32=True):
        self.readout, self.states, self.vocab_size = readout, states, len(readout.weight)
        self.device, self.layers, self.d_model = torch.device("cpu"), len(states) - 1, states.shape[-1]
        self.float32, self.half = float32, None

    def states_at(self, ids, rows, columns, *, half):
        assert not half
        return self.at(ids, rows, columns, read_out=False)[0]

    def at(self, ids, rows, columns, *, read_out=True):
        h = self.states[:, ids[rows, 0]]
        assert read_out == self.float32  # a head in another precision is not asked for logits that lenses cannot meet
        return h, self.readout(h[-1]) if read_out else self.readout(h[-1, :0])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("float32", [True, False])
def test_what_is_captured_gives_the_kl_by_definition(float32, bias, head):
    """From ``capture`` to ``score``: their notions of the entropy term agree, whatever the head."""
    readout, known, maps = random_setting(bias=bias, head=head)
    windows = windows_of(known)
    count = len(known) // windows.valid.shape[1]
    ids = torch.arange(count)[:, None].expand(-1, windows.ids.shape[1]).numpy().copy()
    one = np.arange(windows.valid.shape[1]) == 0
    windows = replace(windows, ids=ids, valid=windows.valid & one)
    captured = capture(Remembered(readout, known.states, float32), windows, batch=4)
    assert torch.equal(captured.states, known.states[:, :count])
    log_p = logits_in_double(readout, readout.final_norm(captured.states[-1])).log_softmax(-1)
    scores = score(readout, captured.states[1], maps, captured)
    for m in range(LAYERS):
        x = captured.states[1] @ maps.matrix[m].T + maps.offset[m]
        log_q = logits_in_double(readout, readout.final_norm(x)).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(scores.kl[m].double(), kl, rtol=1e-4, atol=1e-5)
        top1 = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        assert torch.equal(scores.top1[m], top1)


@pytest.mark.parametrize("bias", [False, True])
def test_moment_and_entropy_are_those_of_the_softmax(bias):
    readout = read_out(D, V, bias=bias, dtype=torch.float64)
    n = torch.randn(9, D, dtype=torch.float64)
    moment, entropy = softmax_moment(readout, n)
    log_q = readout.unembedding(n).log_softmax(-1)
    q = log_q.exp()
    torch.testing.assert_close(moment, q @ readout.weight)
    own = (q * log_q).sum(-1) - (q @ readout.bias if bias else 0)
    torch.testing.assert_close(entropy, own)


def permuted(captured, maps, order):
    states = torch.cat([captured.states[:-1][order], captured.states[-1:]])
    return replace(captured, states=states), maps[order]


@given(st.permutations(range(LAYERS)), st.integers(0, 100))
@settings(deadline=None, max_examples=15)
def test_permuting_layers_permutes_rows_and_columns(order, seed):
    readout, captured, maps = random_setting(seed)
    plain, changed = transfer_sums(readout, captured, maps), transfer_sums(readout, *permuted(captured, maps, order))
    order = [*order, LAYERS]
    for name in ("kl", "ce", "movement"):
        expected = getattr(plain, name)[:, order][:, :, order]
        np.testing.assert_allclose(getattr(changed, name), expected, atol=1e-4)


@given(st.integers(0, 100), st.sampled_from(["zero", "identity"]))
@settings(deadline=None, max_examples=15)
def test_the_same_rotation_of_all_layers_and_the_read_out_changes_nothing(seed, prior):
    readout, captured, _ = random_setting(seed, tokens=120, gain=False)
    q = orthogonal(D, torch.Generator().manual_seed(seed))
    turned_readout = read_out(D, V, gain=False, seed=seed)
    with torch.no_grad():
        turned_readout.unembedding.weight.copy_(readout.weight @ q.T)
    turned = replace(captured, states=captured.states @ q.T, expected=captured.expected @ q.T)

    def matrix(r, c):
        maps = RidgePath(Moments.of(c), prior).solve(0.1)
        return transfer_sums(r, c, AffineMaps(maps.matrix.float(), maps.offset.float()))

    plain, changed = matrix(readout, captured), matrix(turned_readout, turned)
    for name in ("kl", "ce", "movement"):
        np.testing.assert_allclose(getattr(changed, name), getattr(plain, name), atol=2e-4, rtol=1e-4)


@given(st.integers(0, 100), st.integers(0, LAYERS - 1), st.floats(-20, 20))
@settings(deadline=None, max_examples=15)
def test_a_constant_added_to_a_layer_changes_no_own_kl_after_refitting(seed, layer, size):
    readout, captured, _ = random_setting(seed, tokens=120)
    shift = torch.zeros_like(captured.states)
    shift[layer] = size * torch.randn(D, generator=torch.Generator().manual_seed(seed))
    moved = replace(captured, states=captured.states + shift)

    def own(c):
        maps = RidgePath(Moments.of(c), "zero").solve(0.1)
        return own_layer_sums(readout, c, maps, range(LAYERS))[0]

    np.testing.assert_allclose(own(moved), own(captured), atol=1e-3, rtol=1e-4)


def test_a_constant_added_to_every_layer_changes_no_shared_kl_after_refitting():
    readout, captured, _ = random_setting(tokens=120)
    shift = torch.randn(D)
    moved = replace(captured, states=torch.cat([captured.states[:-1] + shift, captured.states[-1:]]))

    def shared(c):
        maps = RidgePath(Moments.of(c).pooled(range(LAYERS)), "zero").solve(0.1)
        return own_layer_sums(readout, c, maps, range(LAYERS))[0]

    np.testing.assert_allclose(shared(moved), shared(captured), atol=1e-3, rtol=1e-4)


def test_shared_and_own_lenses_are_scored_on_the_layers_named():
    readout, captured, maps = random_setting()
    full = transfer_sums(readout, captured, maps)
    kl, ce = own_layer_sums(readout, captured, maps, range(LAYERS))
    diagonal = np.arange(LAYERS)
    np.testing.assert_allclose(kl, full.kl[:, diagonal, diagonal], atol=1e-4)
    np.testing.assert_allclose(ce, full.ce[:, diagonal, diagonal], atol=1e-4)
    kl, _ = own_layer_sums(readout, captured, maps[[1]], [2, 0])
    np.testing.assert_allclose(kl, full.kl[:, 1, [2, 0]], atol=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_sums_by_window_take_windows_of_any_length(sizes, seed):
    _, captured, _ = random_setting(tokens=sum(sizes) + sum(sizes) % 2)
    tokens = captured.take(torch.arange(sum(sizes)))
    tokens = replace(tokens, window=np.repeat(np.arange(len(sizes)), sizes))
    values = np.random.default_rng(seed).normal(size=(2, 3, sum(sizes)))
    sums = sum_by_window(torch.from_numpy(values), tokens)
    ends = np.cumsum(sizes)
    for s, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        np.testing.assert_allclose(sums[..., s], values[..., end - size : end].sum(-1))


def test_scores_of_many_lenses_are_those_of_each_alone():
    stream = SyntheticStream("overlapping", d=24, layers=3, vocab=40)
    captured = stream.capture(64, seed=0)
    maps = random_maps(4, 24)
    together = score(stream.readout, captured.states[1], maps, captured)
    assert together.movement is None
    for m in range(4):
        alone = score(stream.readout, captured.states[1], maps[[m]], captured)
        torch.testing.assert_close(together.kl[m], alone.kl[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.ce[m], alone.ce[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_the_largest_logit_is_told_in_full_where_products_are_in_half_precision(biased):
    """Else a logit of three digits is held against one of seven, and the model's own word is half the time not on top."""
    readout = read_out(32, 600, bias=biased, logits=4.0)
    n = readout.final_norm(torch.randn(400, 32, generator=torch.Generator().manual_seed(1)))
    logits = readout.logits(n)
    log_z, largest = online_log_partition(readout.with_products(HalfProducts(torch.bfloat16, 1)), n)
    exact = logits.amax(-1)
    # The word found may be another one only where two logits agree to bfloat16's three digits.
    assert bool((exact - largest <= 2 * 2**-8 * exact.abs().clamp(min=1)).all())
    close = (largest - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)
    assert float(close.float().mean()) > 0.95
    torch.testing.assert_close(log_z, logits.logsumexp(-1), atol=0.05, rtol=0.01)
