"""Lenses between models, against closed forms, scipy, and float64 written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.synthetic import SyntheticStream, orthogonal, random_maps
from scipy.linalg import orthogonal_procrustes
from torch import nn

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.measures.between import (
    AFFINE,
    NONE,
    ORTHOGONAL,
    OWN_HEAD,
    STATES_HEAD,
    Peer,
    Read,
    affine_maps,
    equal_depth,
    losses,
    orthogonal_map,
    pairings,
    read_between,
)
from lensbench.streams.readout import ReadOut

D, L, V = 16, 3, 40


def head_of(weight):
    linear = nn.Linear(weight.shape[1], V, bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    norm = nn.RMSNorm(weight.shape[1], eps=1e-6)
    norm.requires_grad_(False)
    return ReadOut(norm, linear)


@pytest.fixture(scope="module")
def peer():
    """A stream of known answer that is read out through a norm without gains, which any rotation leaves as it is."""
    stream = SyntheticStream("fresh", d=D, layers=L, vocab=V)
    readout = head_of(stream.readout.weight.detach())
    stream.readout = readout
    fit, dev, held_out = (stream.capture(n, seed=k) for k, n in enumerate((800, 300, 400)))
    return Peer(readout, random_maps(L, D, seed=3, spread=0.2), fit, dev, held_out)


def turned(peer, q):
    """The same model in another basis: states Q h, lenses Q A Q^T, head W Q^T; its predictions are the same."""

    def of(captured):
        return replace(captured, states=captured.states @ q.T)

    lenses = AffineMaps(q @ peer.lenses.matrix @ q.T, peer.lenses.offset @ q.T)
    readout = head_of(peer.readout.weight @ q.T)
    return Peer(readout, lenses, of(peer.fit), of(peer.dev), of(peer.held_out))


@pytest.fixture(scope="module")
def rotation():
    return orthogonal(D, torch.Generator().manual_seed(5))


def test_a_rotated_copy_of_a_model_has_no_penalty_after_procrustes_and_its_null_does(peer, rotation):
    found = read_between(turned(peer, rotation), peer, maps=[NONE, ORTHOGONAL, AFFINE], ridges=(1e-6, 1.0))
    tokens = len(peer.held_out)
    for k, reading in enumerate(found.readings):
        own, through, null, same = (
            found.sums[f"kl_{name}"][k].sum() / tokens for name in ("own", "through", "null", "same_tokens")
        )
        assert same == pytest.approx(own, abs=1e-4), "a rotated copy predicts the same"
        if reading.map == NONE:
            assert through - own > 0.05
            assert np.isnan(null)
        else:
            assert through == pytest.approx(own, abs=1e-3), reading
            assert null - own > 0.05, reading
    assert [r.lens_layer for r in found.readings] == [k for k in range(L) for _ in range(3)]


def test_the_same_model_read_by_its_own_lenses_has_no_penalty_at_all(peer):
    found = read_between(peer, peer, maps=[NONE], heads=[OWN_HEAD, STATES_HEAD])
    for loss in ("kl", "ce"):
        assert np.array_equal(found.sums[f"{loss}_own"], found.sums[f"{loss}_through"])
        assert np.array_equal(found.sums[f"{loss}_own"], found.sums[f"{loss}_same_tokens"])


def test_losses_are_those_written_out_in_float64(peer, rotation):
    other = turned(peer, rotation)
    found = read_between(other, peer, maps=[NONE], heads=[OWN_HEAD, STATES_HEAD])
    held_out = peer.held_out

    def log_q(readout, x):
        seen = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (seen @ readout.weight.double().T).log_softmax(-1)

    p = log_q(peer.readout, held_out.states[-1].double())
    for k, reading in enumerate(found.readings):
        h = held_out.states[reading.states_layer].double()
        lens = other.lenses[[reading.lens_layer]]
        q = log_q(
            other.readout if reading.head == OWN_HEAD else peer.readout,
            h @ lens.matrix[0].double().T + lens.offset[0].double(),
        )
        kl = (p.exp() * (p - q)).sum(-1)
        ce = -q.gather(1, held_out.targets[:, None])[:, 0]
        assert found.sums["kl_through"][k].sum() == pytest.approx(float(kl.sum()), rel=1e-4)
        assert found.sums["ce_through"][k].sum() == pytest.approx(float(ce.sum()), rel=1e-4)


def test_losses_of_several_reads_are_those_of_each_alone(peer, rotation):
    other = turned(peer, rotation)
    both = [Read(p.readout, p.held_out.states[k], p.lenses[[k]]) for k, p in enumerate((peer, other))]
    together = losses(both, peer, peer.held_out)
    for k, read in enumerate(both):
        for found, alone in zip(together, losses([read], peer, peer.held_out), strict=True):
            assert torch.equal(found[k], alone[0])


def test_the_orthogonal_map_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(2.0, 1.0, (60, 7)), rng.normal(-1.0, 2.0, (60, 7))
    expected, _ = orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    found = orthogonal_map(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found.matrix[0].numpy(), expected.T, atol=1e-10)
    np.testing.assert_allclose(found.read(0, torch.from_numpy(x)).mean(0), y.mean(0), atol=1e-10)


def test_affine_maps_solve_the_normal_equations_of_their_ridge():
    rng = np.random.default_rng(1)
    x, y = rng.normal(1.0, 1.0, (80, 5)), rng.normal(0.0, 1.0, (80, 3))
    found = affine_maps(torch.from_numpy(x), torch.from_numpy(y), (0.0, 2.0))
    xc, yc = x - x.mean(0), y - y.mean(0)
    unit = np.sort(np.linalg.eigvalsh(xc.T @ xc / 80))[2]
    for k, ridge in enumerate((0.0, 2.0)):
        expected = np.linalg.solve(xc.T @ xc / 80 + ridge * unit * np.eye(5), xc.T @ yc / 80).T
        np.testing.assert_allclose(found.matrix[k].numpy(), expected, atol=1e-10)
    plain = np.linalg.lstsq(np.c_[x, np.ones(80)], y, rcond=None)[0]
    np.testing.assert_allclose(found.offset[0].numpy(), plain[-1], atol=1e-9)


def test_a_wider_copy_is_read_through_an_affine_map_and_by_nothing_else(peer):
    embed = orthogonal(2 * D, torch.Generator().manual_seed(6))[:, :D]

    def of(captured):
        return replace(captured, states=captured.states @ embed.T)

    wide = Peer(
        head_of(peer.readout.weight @ embed.T * 2**-0.5),  # the norm of zeros next to a state is smaller
        AffineMaps(embed @ peer.lenses.matrix @ embed.T, peer.lenses.offset @ embed.T),
        of(peer.fit), of(peer.dev), of(peer.held_out),
    )  # fmt: skip
    found = read_between(peer, wide, maps=[AFFINE], ridges=(1e-6, 1.0))
    penalty = (found.sums["kl_through"] - found.sums["kl_own"]).sum(1) / len(peer.held_out)
    assert np.abs(penalty).max() < 2e-3
    with pytest.raises(LensbenchError, match="states of width 32 go to width 16 through an affine map"):
        read_between(peer, wide, maps=[ORTHOGONAL])


def test_layers_are_paired_at_equal_relative_depth():
    assert equal_depth(6, 6) == [(k, k) for k in range(6)]
    assert equal_depth(12, 6) == [(2 * k, k) for k in range(6)]
    assert equal_depth(3, 6) == [(0, 0), (0, 1), (1, 2), (2, 3), (2, 4), (2, 5)]


def test_pairings_are_permutations_and_the_same_again():
    first, second = list(pairings(50)), list(pairings(50))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(sorted(order.tolist()) == list(range(50)) for order in first)
    assert not torch.equal(*first)


def test_models_that_read_other_tokens_are_refused(peer):
    other = replace(peer, held_out=replace(peer.held_out, targets=peer.held_out.targets + 1))
    with pytest.raises(LensbenchError, match="did not read the same tokens"):
        read_between(other, peer, maps=[NONE])
