"""Views of a stream's own states, against their definitions written out in numpy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.gpt_windows import windows
from helpers.synthetic import SyntheticStream, capture_of, in_double, read_out
from helpers.two_processes import in_two
from PIL import Image

from lensbench.data.images import Images, ImageSet, pixels_of_size
from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.streams.capture import capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream
from lensbench.streams.views import (
    BasisView,
    ShuffledView,
    covariances,
    donors,
    random_bases,
    shuffled,
    spectrum,
    turning_bases,
)
from lensbench.streams.views.bases import sized

STREAM = SyntheticStream("added", d=13, layers=4, vocab=50)
CAPTURED = STREAM.capture(600, seed=1)
LAYERS = tuple(range(STREAM.layers))
COVARIANCE = torch.from_numpy(np.stack([np.cov(h.T.double().numpy(), bias=True) for h in CAPTURED.states[:-1]]))


def states_of(captured):
    return captured.states.double().numpy()


def same(a, b, *but):
    """Every field of two captures is the same to the bit, except for some."""
    for name, value in vars(a).items():
        if name not in but:
            other = vars(b)[name]
            assert np.array_equal(value, other) if isinstance(value, np.ndarray | torch.Tensor) else value == other, (
                name
            )


# Bases


def test_random_bases_are_rotations_within_the_principal_subspace_and_within_the_rest():
    d, rank = 12, 6
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    variances = np.where(np.arange(d) < rank - 1, 10.0, 1e-3)  # five large ones, and a sixth for an even number
    covariance = torch.from_numpy(directions * variances @ directions.T).expand(3, d, d)
    maps = random_bases(covariance, seed=0, variance=0.99).numpy()
    np.testing.assert_allclose(maps @ maps.transpose(0, 2, 1), np.broadcast_to(np.eye(d), (3, d, d)), atol=1e-12)
    principal = directions[:, : rank - 1]
    inside = np.linalg.norm(principal.T @ maps @ principal, axis=(1, 2)) ** 2
    assert (inside > (rank - 1) - 1).all(), "five directions go to five of six; all but one have to stay among them"
    rest = directions[:, rank:]
    assert (np.linalg.norm(rest.T @ maps @ principal, axis=(1, 2)) < 0.95 * (rank - 1) ** 0.5).all()
    assert np.abs(maps[0] - maps[1]).max() > 0.1
    # On average over bases a direction is at a right angle to itself, whichever direction it is.
    many = random_bases(covariance[:1].expand(2000, d, d), seed=1).numpy()
    for direction in (directions[:, 0], directions[:, -1]):
        assert abs(np.einsum("d,nde,e->n", direction, many, direction).mean()) < 0.05


def test_a_rotated_view_reads_the_same_within_a_layer_and_keeps_all_but_the_states():
    view = BasisView(LAYERS, random_bases(COVARIANCE, seed=3))
    turned = view.apply(CAPTURED)
    same(CAPTURED, turned, "states")
    target, before, after = states_of(CAPTURED)[-1], states_of(CAPTURED), states_of(turned)
    np.testing.assert_array_equal(before[-1], after[-1])
    for h, rotated in zip(before[:-1], after[:-1], strict=True):
        assert np.abs(h - rotated).max() > 0.5

        def read(x):
            x = x - x.mean(0)
            return x @ np.linalg.solve(x.T @ x + 5 * np.eye(x.shape[1]), x.T @ target)

        np.testing.assert_allclose(read(h), read(rotated), atol=1e-4)


def test_who_knows_the_bases_finds_every_copy_in_a_carried_stream_with_the_interference_of_all_others():
    d, tokens, layers = 24, 4000, 4
    h = torch.randn(layers + 1, tokens, d, generator=torch.Generator().manual_seed(0))
    captured = capture_of(read_out(d, 40), h)
    bases = random_bases(torch.eye(d, dtype=torch.float64).expand(layers, d, d), seed=1)
    sizes = np.array([1.0, 1.5, 1.5, 3.0])
    view = BasisView(tuple(range(layers)), sized(bases, sizes), carries=True)
    x, q, copies = states_of(view.apply(captured)), bases.numpy(), states_of(captured)
    for j in range(layers):
        written = sum(sizes[k] * copies[k] @ q[k].T for k in range(j + 1))
        np.testing.assert_allclose(x[j], written, atol=1e-4)
        for i in range(j + 1):
            found = x[j] @ q[i] / sizes[i]
            interference = (np.square(sizes[: j + 1]).sum() - sizes[i] ** 2) / sizes[i] ** 2
            assert np.square(found - copies[i]).mean() == pytest.approx(interference, abs=1e-6, rel=0.05)


def test_a_drifting_view_turns_every_plane_by_45_degrees_in_all_and_in_equal_steps():
    maps = turning_bases(COVARIANCE, seed=2).numpy()

    def angles(a, b):
        return np.degrees(np.abs(np.angle(np.linalg.eigvals(a.T @ b))))

    even = COVARIANCE.shape[1] - 1  # d is odd: one direction stays
    np.testing.assert_allclose(np.sort(angles(maps[0], maps[-1])), [0, *[45] * even], atol=1e-6)
    for a, b in itertools.pairwise(maps):
        np.testing.assert_allclose(np.sort(angles(a, b)), [0, *[15] * even], atol=1e-6)
    np.testing.assert_allclose(maps[0], np.eye(even + 1), atol=1e-12)


@pytest.mark.parametrize("carries", [False, True])
def test_of_some_layers_a_view_has_these_and_the_last_in_memory_or_in_a_file(carries):
    maps = random_bases(COVARIANCE[[0, 2]], seed=3)
    view = BasisView((0, 2), maps, carries)
    found = view.apply(CAPTURED)
    h, q = states_of(CAPTURED), maps.numpy()
    wanted = [h[0] @ q[0].T, h[2] @ q[1].T + carries * h[0] @ q[0].T, h[-1]]
    np.testing.assert_allclose(states_of(found), wanted, atol=1e-5)
    same(found, view.apply(CAPTURED, memory_gib=0))
    again = BasisView.of_tensors(view.tensors())
    same(found, again.apply(CAPTURED))


# Shuffled updates


@pytest.mark.parametrize("sizes", [[5] * 20, [1] * 9, [10, 10], [10, 1, 9], [30, 20, 7, 2, 1], [2, 1, 1]])
def test_every_token_gives_once_and_to_another_document(sizes):
    document = np.repeat(np.arange(len(sizes)), sizes)
    order = donors(document, np.random.default_rng(0))
    assert sorted(order) == list(range(len(document)))
    assert (document[order] != document).all()


@pytest.mark.parametrize(
    ("sizes", "says"),
    [([8], "all tokens are of one document"), ([5, 4], None), ([], "no token"), ([3, 1], "holds 3 of 4")],
)
def test_documents_between_which_nothing_can_be_shuffled_are_refused_in_one_line(sizes, says):
    document = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.raises(LensbenchError, match=says or "holds 5 of 9 tokens, more than half") as refused:
        donors(document, np.random.default_rng(0))
    assert len(str(refused.value).splitlines()) == 1
    if sizes == [8]:
        one = replace(CAPTURED, document=np.zeros(len(CAPTURED), int))
        with pytest.raises(LensbenchError, match=says):
            ShuffledView.fitted(one, STREAM.readout, layers=LAYERS, seed=0)


def test_a_shuffled_stream_ends_in_the_sum_of_updates_of_other_documents():
    view = ShuffledView.fitted(CAPTURED, STREAM.readout, layers=LAYERS, seed=0)
    found, h = states_of(view.apply(CAPTURED, "fit")), states_of(CAPTURED)
    np.testing.assert_array_equal(found[0], h[0])
    moved = 0
    for block, (a, b) in enumerate(itertools.pairwise(found)):
        given, update = b - a, h[block + 1] - h[block]
        distance = np.square(given[:, None] - update).sum(-1)  # whose update is it?
        donor = distance.argmin(1)
        assert sorted(donor) == list(range(len(donor)))
        assert (CAPTURED.document[donor] != CAPTURED.document).all()
        np.testing.assert_allclose(given, update[donor], atol=1e-5)
        np.testing.assert_allclose(given.T @ given, update.T @ update, rtol=1e-4, atol=1e-3)
        moved += (donor != np.arange(len(donor))).mean()
    assert moved == STREAM.layers


def by_definition(readout, end, targets, constant):
    """What a read-out says of last states, in float64 and all at once."""
    log_p = in_double(readout)(end.double()).log_softmax(-1).detach()
    p = log_p.exp()
    entropy = (p * log_p).sum(-1)
    bias = readout.bias
    return {
        "expected": p @ readout.weight.double(),
        "entropy_term": entropy if bias is None or not readout.linear else entropy - p @ bias.double(),
        "top": log_p.argmax(-1),
        "model_ce": -log_p.gather(-1, targets[:, None])[:, 0],
        "constant_kl": entropy - p @ constant.double().log(),
        "mean_p": p.mean(0),
    }


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_what_the_read_out_says_of_the_new_end_is_as_defined_block_by_block(bias, cap, monkeypatch):
    monkeypatch.setattr(shuffled, "LOGITS", 50 * 64)
    plain = read_out(13, 50, bias=bias, norm="layer")
    readout = ReadOut(plain.final_norm, plain.unembedding, softcap=cap).requires_grad_(False)
    fit = capture_of(readout, CAPTURED.states)
    dev = capture_of(readout, STREAM.states(300, seed=5), constant=fit.mean_p)
    view = ShuffledView.fitted(fit, readout, layers=LAYERS, seed=0)
    new_fit, new_dev = view.apply(fit, "fit"), view.apply(dev, "dev")
    torch.testing.assert_close(new_fit.mean_p, view.constant)
    for old, new in ((fit, new_fit), (dev, new_dev)):
        wanted = by_definition(readout, new.states[-1], old.targets, new_fit.mean_p)
        same(old, new, "states", *wanted)
        if new is new_fit:  # as in a capture of fitting tokens: right in the mean
            torch.testing.assert_close(
                new.constant_kl.double().mean(), wanted.pop("constant_kl").mean(), rtol=1e-5, atol=0
            )
        for name, values in wanted.items():
            torch.testing.assert_close(vars(new)[name].double(), values.double(), rtol=1e-4, atol=1e-5, msg=name)
        assert float(new.model_ce.mean()) > float(old.model_ce.mean()) + 0.3
    # Worse than knowing nothing but how often words come: predictions are of other tokens.
    frequencies = np.bincount(dev.targets, minlength=50) / len(dev)
    chance = -(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum()
    assert float(new_dev.model_ce.mean()) > chance


def test_shuffles_are_the_same_for_a_seed_and_differ_between_splits_blocks_and_seeds():
    view, again, other = (ShuffledView.fitted(CAPTURED, STREAM.readout, layers=LAYERS, seed=s) for s in (0, 0, 1))
    first = view.apply(CAPTURED, "fit")
    same(first, again.apply(CAPTURED, "fit"))
    same(first, ShuffledView.of_tensors(view.tensors(), STREAM.readout).apply(CAPTURED, "fit", memory_gib=0))
    for changed in (view.apply(CAPTURED, "dev"), other.apply(CAPTURED, "fit")):
        assert (changed.states[1] != first.states[1]).any(-1).float().mean() > 0.9
    some = ShuffledView.fitted(CAPTURED, STREAM.readout, layers=(0, 3), seed=0).apply(CAPTURED, "fit")
    torch.testing.assert_close(some.states, first.states[[0, 3, 4]])
    torch.testing.assert_close(some.expected, first.expected)


@pytest.mark.parametrize("first", [200, 0])
def test_processes_that_share_the_tokens_have_the_same_views_as_one(first):
    alone = ShuffledView.fitted(CAPTURED, STREAM.readout, layers=LAYERS, seed=0)
    whole, shapes, bases = alone.apply(CAPTURED, "fit"), spectrum(CAPTURED), random_bases(COVARIANCE, seed=1)

    def work(own):
        view = ShuffledView.fitted(own, STREAM.readout, layers=LAYERS, seed=0)
        return view.apply(own, "fit"), view.constant, covariances(own, LAYERS)[0], spectrum(own)

    found = in_two(work, (CAPTURED, first))
    torch.testing.assert_close(torch.cat([f[0].states for f in found], 1), whole.states)
    for name in ("expected", "entropy_term", "model_ce", "constant_kl"):
        torch.testing.assert_close(
            torch.cat([vars(f[0])[name] for f in found]), vars(whole)[name], rtol=1e-4, atol=1e-5
        )
    for new, constant, covariance, spectra in found:
        torch.testing.assert_close(new.mean_p, whole.mean_p)
        torch.testing.assert_close(constant, alone.constant)
        torch.testing.assert_close(random_bases(covariance, seed=1), bases, rtol=1e-3, atol=1e-5)
        assert [s.effective_rank for s in spectra] == pytest.approx([s.effective_rank for s in shapes])


# Spectra, models


def test_a_spectrum_counts_directions_and_growth():
    variances = np.array([[4.0, 4, 4, 0], [1.0, 0, 0, 0], [8.0, 4, 2, 2]])
    noise = np.random.default_rng(0).normal(size=(5000, 4))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T, bias=True))).T
    mean = np.array([3.0, 0, 0, 0])
    states = torch.from_numpy(np.stack([white * v**0.5 + mean for v in variances]))
    found = spectrum(replace(CAPTURED, states=states))
    assert [s.participation for s in found] == pytest.approx([3, 1, 16**2 / (64 + 16 + 4 + 4)])
    share = variances[2] / 16
    assert [s.effective_rank for s in found] == pytest.approx([3, 1, np.exp(-(share * np.log(share)).sum())])
    assert [s.rms for s in found] == pytest.approx([21**0.5, 10**0.5, 5])
    assert [s.growth for s in found[1:]] == pytest.approx([(10 / 21) ** 0.5, (25 / 10) ** 0.5])
    assert np.isnan(found[0].growth)


def gpt_capture():
    shape = {"vocab_size": 61, "d_model": 16, "layers": 3, "heads": 2, "context": 20}
    stream = ResidualStream(build("gpt", parameters=14_000, **shape).eval())
    return stream, capture(stream, windows())


def image_capture():
    shape = {"vocab_size": 5, "d_model": 16, "layers": 3, "heads": 2, "context": 8, "channels": 1}
    stream = ResidualStream(build("vit", parameters=20_400, **shape).eval())
    rng = np.random.default_rng(0)
    pixels = [Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(60)]
    names, labels = tuple(map(str, range(60))), rng.integers(5, size=60)
    pictures = ImageSet("noise", "", names, labels, tuple("abcde"), {}, lambda k: pixels[k])
    samples = Images(pictures, np.arange(60), pixels_of_size(channels=1, height=8, width=8), labels)
    return stream, capture(stream, samples)


@pytest.mark.parametrize("kind", [gpt_capture, image_capture])
def test_the_views_of_a_models_states_are_read_by_its_own_read_out(kind):
    stream, captured = kind()
    covariance, _ = covariances(captured, range(3))
    for carries in (False, True):
        view = BasisView((0, 1, 2), random_bases(covariance, seed=0), carries)
        seen = view.apply(captured)
        same(captured, seen, "states")
        torch.testing.assert_close(stream.readout(seen.states[-1]), stream.readout(captured.states[-1]))
    view = ShuffledView.fitted(captured, stream.readout, layers=(0, 1, 2), seed=0)
    moved = view.apply(captured, "fit")
    wanted = by_definition(stream.readout, moved.states[-1], captured.targets, view.constant)
    for name in ("expected", "model_ce", "entropy_term", "mean_p"):
        torch.testing.assert_close(vars(moved)[name].double(), wanted[name].double(), rtol=1e-4, atol=1e-5, msg=name)
