"""Mean Jacobians against definitions written out: torch's whole Jacobians, products of blocks, Stein's lemma."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.architectures import small_model
from helpers.jacobians import jacobian_by_definition, windows_of_ids
from helpers.known_blocks import V, drawn, known_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianSource, by_the_norm_of_j, cheaper
from lensbench.lenses.moments import MomentSums
from lensbench.lenses.recipe import JacobianRecipe
from lensbench.lenses.ridge import RidgePath
from lensbench.models import FAMILIES, build
from lensbench.streams.stream import ResidualStream

# The reference puts a state in front of a block; in gpt-looped an adapter stands between the two: it has a test of its own.
TEXT = [name for name, family in FAMILIES.items() if not family.images and name != "gpt-looped"]
EXACT = JacobianRecipe(method="exact", prompts=2, positions=1000, skip_first=2, skip_last=1, rows=5)


def texts(count, length, words=60, seed=0):
    return torch.randint(words, (count, length), generator=torch.Generator().manual_seed(seed))


def check_against_autograd(stream, ids, targets, layers, tolerance=1e-9):
    found = JacobianSource(stream, windows_of_ids(ids), EXACT).estimate(targets).mean
    inside = range(2, ids.shape[1] - 1)
    for layer in layers:
        expected = jacobian_by_definition(stream, ids, layer, inside, later=targets == "later")
        assert (found[layer] - expected).abs().max() <= tolerance * expected.abs().max(), layer


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """Llama's norm, which computes in float32 whatever it is given, in the type that it is given."""

    def forward(self, h):
        return self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.parametrize("targets", ["later", "current"])
def test_the_jacobian_is_that_of_autograd(targets):
    model = build("gpt-conv", parameters=2_000, vocab_size=60, d_model=4, layers=2, heads=1, context=16).double()
    check_against_autograd(ResidualStream(model), texts(1, 6), targets, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["later", "current"])
@pytest.mark.parametrize("family", TEXT)
def test_the_jacobian_of_every_family_is_that_of_autograd(family, targets):
    model = build(family, parameters=5_000, vocab_size=60, d_model=4, layers=2, heads=1, context=16).double()
    stream = ResidualStream(model)
    check_against_autograd(stream, texts(2, 8), targets, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["later", "current"])
def test_the_jacobian_of_a_looped_model_is_that_of_autograd(targets):
    """An adapter joins the input to the state of every loop: the state is the first half of what it reads.

    h_0 is the input itself: J of layer 0 is the whole derivative, through the adapter of every loop too.
    """
    shape = {"vocab_size": 60, "d_model": 4, "layers": 3, "heads": 1, "context": 16}
    model = build("gpt-looped", parameters=5_000, **shape).double().eval()
    stream, ids, inside = ResidualStream(model), texts(2, 8), range(2, 7)
    found = JacobianSource(stream, windows_of_ids(ids), EXACT).estimate(targets).mean

    def looped(first, h, e):
        for _ in range(first, 3):
            h = model.layers[0](h[None], e[None], None)[0]
        return h

    for layer in range(3):
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for one in ids:
            with torch.no_grad():
                states = stream.graph(one[None])[0]
            e = states[0][0]
            assert torch.allclose(looped(layer, states[layer][0], e), states[-1][0])
            run = (lambda h: looped(0, h, h)) if layer == 0 else (lambda h, k=layer, e=e: looped(k, h, e))
            with torch.enable_grad():
                j = torch.autograd.functional.jacobian(run, states[layer][0])
            for t in inside:
                for target in inside if targets == "later" else [t]:
                    if target >= t:
                        expected += j[target, :, t] / len(inside) / len(ids)
        assert (found[layer] - expected).abs().max() <= 1e-9 * expected.abs().max(), layer


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["later", "current"])
def test_the_jacobian_of_a_view_is_that_of_the_entries_it_shows(targets):
    shape = {"vocab_size": 60, "d_model": 4, "layers": 2, "heads": 1, "context": 16}
    stream = ResidualStream(build("predictive-coding", parameters=5_000, **shape).double(), "prediction")
    assert stream.d_model == 4
    check_against_autograd(stream, texts(2, 8), targets, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma3_text", "falcon"])
def test_the_jacobian_of_transformers_architectures_is_that_of_autograd(architecture):
    # Many compute norms and rotations in float32, so that the two agree to its digits.
    stream = ResidualStream(small_model(architecture).double())
    check_against_autograd(stream, texts(2, 8), "later", [1], tolerance=1e-5)


# Closed forms
def linear_model(layers=3, d=6, seed=0):
    """A model whose block k is ``h + M_k h`` at each position, and the products of its blocks from every layer on."""
    matrices = [drawn(seed + 1 + k, d, d) / d for k in range(layers)]
    steps = [lambda h, _, m=m: h + h @ m.to(h).T for m in matrices]
    products = []
    for first in range(layers):
        product = torch.eye(d, dtype=torch.float64)
        for m in matrices[first:]:
            product = (torch.eye(d, dtype=torch.float64) + m.double()) @ product
        products.append(product)
    return known_model(steps, drawn(seed, V, d)).double(), torch.stack(products)


@pytest.mark.parametrize("targets", ["later", "current"])
def test_the_jacobian_of_a_linear_residual_network_is_the_product_of_its_blocks(targets):
    model, products = linear_model()
    found = JacobianSource(ResidualStream(model), windows_of_ids(texts(2, 8, V)), EXACT).estimate(targets)
    assert torch.allclose(found.mean, products, rtol=0, atol=1e-12)
    assert max(found.facts.error) < 1e-6
    assert found.facts.method == "exact"


def test_later_positions_are_added_to_the_current_one():
    """A block that adds to each position the sum of those before it: J counts the positions that are left."""
    step = lambda h, _: h + (h.cumsum(1) - h)  # noqa: E731
    stream = ResidualStream(known_model([step, lambda h, _: h], drawn(0, V, 6)).double())
    recipe = EXACT.model_copy(update={"skip_first": 3, "skip_last": 2})
    source = JacobianSource(stream, windows_of_ids(texts(1, 10, V)), recipe)
    places = 10 - 3 - 2
    later = np.mean([1 + (places - 1 - k) for k in range(places)])
    for targets, factor in (("later", later), ("current", 1.0)):
        found = source.estimate(targets).mean
        assert torch.allclose(found[0], factor * torch.eye(6, dtype=torch.float64))
        assert torch.allclose(found[1], torch.eye(6, dtype=torch.float64))


def test_prompts_of_unequal_length_count_equally():
    step = lambda h, _: h + (h.cumsum(1) - h)  # noqa: E731
    stream = ResidualStream(known_model([step, lambda h, _: h], drawn(0, V, 6)).double())
    lengths = [10, 7]
    for method in ("exact", "random"):
        recipe = EXACT.model_copy(update={"method": method, "probes": 600})
        found = JacobianSource(stream, windows_of_ids(texts(2, 10, V), lengths), recipe).estimate("later").mean[0]
        expected = np.mean([np.mean(range(1, 1 + n - 3)) for n in lengths])
        off = (found - expected * torch.eye(6)).norm() / (expected * 6**0.5)
        assert off < (1e-12 if method == "exact" else 0.3), method


def test_a_control_variate_that_is_the_jacobian_leaves_nothing_to_chance():
    model, products = linear_model()
    recipe = JacobianRecipe(method="random", prompts=3, probes=1, skip_first=1)
    source = JacobianSource(ResidualStream(model), windows_of_ids(texts(3, 8, V)), recipe)
    for targets in ("later", "current"):
        found = source.estimate(targets, control=2 * products)
        assert torch.allclose(found.mean, products, rtol=0, atol=1e-10)
        assert np.allclose(found.facts.control, 0.5)
        assert max(found.facts.error) < 1e-6


def nonlinear_model(d=6, seed=0):
    """Blocks that are no linear maps and mix positions."""

    def step(m):
        return lambda h, _: h + torch.tanh(h @ m.to(h).T) + 0.3 * torch.tanh(h.cumsum(1) - h)

    return known_model([step(drawn(seed + k, d, d)) for k in range(2)], drawn(seed + 9, V, d)).double()


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["later", "current"])
@pytest.mark.parametrize("with_control", [False, True])
def test_the_random_estimate_lies_within_its_error_bars_as_often_as_it_should(targets, with_control):
    stream = ResidualStream(nonlinear_model())
    windows = windows_of_ids(texts(1, 10, V).expand(40, -1).clone())  # nothing but the random vectors differs
    truth = JacobianSource(stream, windows, EXACT).estimate(targets).mean
    control = truth + 0.5 * drawn(5, *truth.shape) if with_control else None
    recipe = EXACT.model_copy(update={"method": "random", "prompts": 40, "probes": 1, "rows": 40})
    off, claimed, total = [], [], torch.zeros_like(truth)
    for seed in range(60):
        found = JacobianSource(stream, windows, recipe, seed=seed).estimate(targets, control)
        total += found.mean
        off.append((found.mean - truth).square().sum((1, 2)))
        claimed.append(torch.tensor(found.facts.error).square() * found.mean.square().sum((1, 2)))
    ratio = torch.stack(off).mean(0) / torch.stack(claimed).mean(0)
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all()), ratio
    bias = 60 * (total / 60 - truth).square().sum((1, 2)) / torch.stack(claimed).mean(0)
    assert bool((bias < 2).all()), bias


@pytest.mark.parametrize("spread", [0.0, 0.7])
@pytest.mark.parametrize(
    ("prompts", "probes"), [(8, 1), (4, 4), pytest.param(60, 4, marks=pytest.mark.slow)]
)  # fmt: skip
def test_the_stated_relative_error_is_that_by_the_norm_of_the_true_jacobian(spread, prompts, probes):
    """Large errors and small ones, with J known: many draws of prompts, each with a Jacobian of its own, and of vectors."""
    d, draws = 8, 30
    truth = drawn(1, d, d).double()
    stream = ResidualStream(linear_model(layers=1, d=d)[0])
    recipe = JacobianRecipe(method="random", prompts=prompts, probes=probes, skip_first=0, skip_last=0, rows=100)
    windows, off, stated = windows_of_ids(torch.arange(prompts)[:, None]), [], []
    for draw in range(draws):
        own = truth + spread * drawn(100 + draw, prompts, d, d).double()

        @contextmanager
        def known(_, ids, own=own):
            yield lambda vectors: [torch.einsum("mta,mab->mtb", vectors, own[ids[:, 0]])]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lensbench.lenses.jacobian.linearised", known)
            found = JacobianSource(stream, windows, recipe, seed=draw).estimate("later")
        off.append(float((found.mean[0] - truth).norm() / truth.norm()))
        stated.append(found.facts.relative_error[0])
    assert np.median(off) == pytest.approx(np.median(stated), rel=0.2)
    assert 0.3 < np.mean(np.array(off) <= stated) < 0.85  # somewhat more than half are below their root mean square


def test_an_estimate_no_longer_than_its_noise_has_an_infinite_error():
    assert [by_the_norm_of_j(r) for r in (0.0, 1.0, 1.2)] == [0.0, math.inf, math.inf]
    assert by_the_norm_of_j(0.6) == pytest.approx(0.75)


def test_auto_takes_the_cheaper_method():
    d, prompts = 32, 8
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(2, d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    v = torch.sign(torch.randn(4, d, generator=generator, dtype=torch.float64))

    def pilot(spread):
        own = j[:, None] + spread * torch.randn(2, prompts, d, d, generator=generator, dtype=torch.float64) / math.sqrt(
            d
        )
        return torch.einsum("lmab,ka->klmb", own, v)

    alike, unlike = pilot(0.01), pilot(20.0)
    assert cheaper(alike, alike, 0.05, d, 1000).probes == 0
    assert cheaper(alike, alike, 0.05, d, 1000).prompts == 2
    assert cheaper(alike, 1e-3 * alike, 0.05, d, 1000).probes > 0  # the control variate leaves nearly nothing
    assert cheaper(unlike, unlike, 2.0, d, 10**6).probes > 0  # prompts differ so much that many are needed


def test_the_jacobian_of_the_current_position_is_the_ridge_map_for_independent_gaussian_states():
    """Stein's lemma: ``Cov(f(h), h) Cov(h)^-1 = E f'(h)`` for Gaussian h, here 6,000 words drawn independently."""
    d, words = 4, 6000
    first = drawn(3, words, d) @ (torch.eye(d) + 0.2 * drawn(4, d, d))
    m = drawn(5, d, d)
    blocks = [lambda h, _: h + torch.tanh(h @ m.to(h).T) + 0.2 * torch.tanh(h.cumsum(1) - h), lambda h, _: 2 * h]
    stream = ResidualStream(known_model(blocks, first).double())
    ids = torch.randperm(words, generator=torch.Generator().manual_seed(0)).reshape(300, 20)
    recipe = JacobianRecipe(method="random", prompts=300, probes=4, skip_first=0, skip_last=0, rows=100)
    local = JacobianSource(stream, windows_of_ids(ids), recipe).estimate("current").mean
    sums = MomentSums()
    with torch.no_grad():
        sums.add(torch.stack(stream.graph(ids)[0]).flatten(1, 2))
    ridge = RidgePath(sums.moments(), "zero").solve(torch.full((2,), 1e-9, dtype=torch.float64)).matrix
    assert (local[0] - 2 * torch.eye(d)).abs().max() > 0.5  # there is something to find
    assert (ridge - local).abs().max() < 0.1


def test_prompts_that_are_too_short_are_refused_with_what_is_left_out():
    stream = ResidualStream(linear_model()[0])
    with pytest.raises(LensbenchError, match="first 16 and the last 1"):
        JacobianSource(stream, windows_of_ids(texts(2, 17, V)), JacobianRecipe())
