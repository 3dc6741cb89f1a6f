"""What is decodable against what is used, and J of other text: closed forms, Stein's lemma, plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.jacobians import windows_of_ids
from helpers.known_blocks import drawn, known_model
from helpers.planted import words

from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.recipe import JacobianRecipe
from lensbench.measures.update.metric import Metric
from lensbench.probes.decodable_used import decodable_used
from lensbench.probes.jacobian_halves import jacobian_halves, kl_between
from lensbench.probes.measured import Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.halves import Halves
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream

WORDS, WIDTH, LENGTH = 3000, 4, 20
RECIPE = JacobianRecipe(method="random", prompts=100, probes=4, skip_first=0, skip_last=0, rows=50)


def windows(ids):
    """Every position but the last is scored; three documents of two windows share a folder."""
    made, places = windows_of_ids(ids), np.tile(np.arange(ids.shape[1] - 1), (len(ids), 1))
    names = tuple(f"folder{k // 6}/document{k // 2}.{k % 2}" for k in range(len(ids)))
    ones = np.ones_like(places)
    return replace(made, positions=places, valid=ones.astype(bool), next_bytes=ones, document_names=names)


def subject(blocks, first, ids=None, recipe=RECIPE):
    """Words drawn independently of each other, each once in fitting and held-out text together."""
    stream = ResidualStream(known_model(blocks, first).double())
    if ids is None:
        ids = torch.randperm(len(first), generator=torch.Generator().manual_seed(0)).reshape(-1, LENGTH)
    half = len(ids) // 2
    made = Subject.plain(stream, windows(ids[half:]), windows(ids[:half]), words())
    return replace(made, jacobians=lambda prompts: JacobianSource(stream, prompts, recipe))


def values(measured):
    rows = measured.frame(200).to_dict("records")
    return {(q, layer): row for q, layer, row in zip(measured.quantity, measured.layer, rows, strict=True)}


def blocks(d=WIDTH):
    m = drawn(5, d, d)
    return [lambda h, _: h + torch.tanh(h @ m.to(h).T) + 0.2 * torch.tanh(h.cumsum(1) - h), lambda h, _: 2 * h]


def test_gaussian_states_that_are_independent_across_positions_use_what_is_decodable():
    """Stein's lemma: ``Cov(f(h), h) Cov(h)^-1 = E f'(h)``; of words that are no Gaussians the two differ."""
    gaussian = drawn(3, WORDS, WIDTH) @ (torch.eye(WIDTH) + 0.2 * drawn(4, WIDTH, WIDTH))
    found = values(decodable_used(subject(blocks(), gaussian)))
    skewed = values(decodable_used(subject(blocks(), torch.sign(gaussian) * gaussian.abs() ** 3)))
    assert abs(found["decodable_used_distance", 0]["value"]) < 0.01
    assert found["decodable_used_slope", 0]["value"] == pytest.approx(1, abs=0.03)
    assert skewed["decodable_used_distance", 0]["ci_low"] > 0.05
    # After the second block, a linear one, nothing is left to chance.
    assert abs(found["decodable_used_distance", 1]["value"]) < 1e-9
    assert abs(skewed["decodable_used_distance", 1]["value"]) < 1e-9
    for one in (found, skewed):
        slope, size = (one[f"decodable_used_{name}", 0]["value"] for name in ("slope", "size"))
        assert one["decodable_used_distance", 0]["value"] == pytest.approx(1 - 2 * slope + size)


def test_a_suite_without_jacobians_is_told_why_nothing_is_measured():
    plain = replace(subject(blocks(), drawn(3, 400, WIDTH)), jacobians=None)
    for probe in (decodable_used, jacobian_halves):
        assert "fit.lenses" in probe(plain).reason


def test_halves_by_source_share_no_source_and_halves_by_window_share_all_of_enough_windows():
    made = windows(torch.zeros(60, LENGTH, dtype=torch.long))
    halves = Halves.of(made)
    for cluster in range(10):
        own = made.clusters == cluster
        assert len(set(halves.source[own])) == 1
    assert halves.source.sum() == 30
    for half in (0, 1):
        assert halves.window[halves.source == half].sum() == 15
    one = replace(made, document_names=("one",), documents=np.zeros(60, dtype=np.int64))
    assert Halves.of(one) is None


def test_jacobians_of_sources_with_words_of_their_own_differ_by_source_and_not_by_window():
    """A block whose slope depends on the word: words of a folder are steep or flat."""
    ids = torch.arange(400 * 10).reshape(200, LENGTH) % 60
    folder = torch.arange(200) // 6
    ids = ids + 60 * (folder % 2)[:, None]
    step = lambda h, tokens: h * (1 + (tokens >= 60)[..., None].to(h))  # noqa: E731
    recipe = RECIPE.model_copy(update={"method": "exact", "prompts": 400, "rows": 4})
    made = subject([step, lambda h, _: h], drawn(3, 120, WIDTH), ids, recipe)
    found = values(jacobian_halves(made))
    fitted, halves = made.words.fit_windows, Halves.of(made.words.fit_windows)
    slope = 1.0 + (fitted.ids[:, 0] >= 60)
    quarter = {(s, w): slope[(halves.source == s) & (halves.window == w)].mean() for s in (0, 1) for w in (0, 1)}
    length = (sum(quarter.values()) ** 2 - sum(q**2 for q in quarter.values())) / 12
    by_source = ((quarter[0, 0] + quarter[0, 1] - quarter[1, 0] - quarter[1, 1]) / 2) ** 2 / length
    by_window = ((quarter[0, 0] + quarter[1, 0] - quarter[0, 1] - quarter[1, 1]) / 2) ** 2 / length
    assert by_source > 1e-3
    for name, expected in (
        ("sources", by_source),
        ("windows", by_window),
        ("sources_minus_windows", by_source - by_window),
    ):
        assert found[f"jacobian_halves_{name}", 0]["value"] == pytest.approx(expected, abs=1e-9), name
    assert abs(found["jacobian_halves_sources", 1]["value"]) < 1e-12
    assert found["jacobian_halves_kl", 1]["value"] < 1e-9


def test_noise_of_the_quarters_does_not_lengthen_what_distances_are_divided_by(monkeypatch):
    """Quarters that are J and noise as long as J: halves of two are then apart by the square of J, not by less."""
    made, draws = subject(blocks(), drawn(3, 200, WIDTH)), []
    truth, count = drawn(5, 2, WIDTH, WIDTH).double(), 40

    def noisy(*_):
        generator = torch.Generator().manual_seed(len(draws))
        noise = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
        draws.append(noise * truth.square().mean().sqrt())
        return truth + draws[-1]

    monkeypatch.setattr("lensbench.probes.jacobian_halves.jacobians_of", noisy)
    held = []
    monkeypatch.setattr(Sums, "add", lambda self, name, values, by=None, **at: held.append((name, at, values, by)))
    monkeypatch.setattr(Sums, "measured", lambda self: None)
    for _ in range(count):
        jacobian_halves(made)
    lengths = [by.sum() for name, at, _, by in held if name.endswith("_sources") and at["layer"] == 0]
    mean, states = made.fit.states[0].mean(0, dtype=torch.float64), made.eval.states[0].double()
    factor = Metric.of("fisher", made.stream.readout, made.fit).factor
    expected = float(((states - mean) @ (factor @ truth[0]).T).square().sum())
    spread = np.std(lengths) / count**0.5
    assert abs(np.mean(lengths) - expected) < 3 * spread
    assert 3 * spread < 0.25 * expected  # what the noise would add to a square


def test_a_vector_that_all_words_share_is_in_no_metric():
    """The mean over the vocabulary is removed before any geometry: it changes no distribution."""
    found = []
    for shift in (0.0, 3.0):
        model = known_model(blocks(), drawn(3, 60, WIDTH))
        with torch.no_grad():
            model.get_output_embeddings().weight.add_(shift * drawn(8, 1, WIDTH))
        stream = ResidualStream(model.double())
        captured = capture(stream, windows(torch.arange(200).reshape(10, LENGTH) % 60))
        factors = [Metric.of(kind, stream.readout, captured).factor for kind in ("fisher", "logit")]
        found.append([factor.T @ factor for factor in factors])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


def test_the_kl_between_two_lenses_is_that_of_their_distributions_both_ways_round():
    stream = ResidualStream(known_model(blocks(), drawn(3, 50, WIDTH)).double())
    h, one, other = drawn(1, 7, WIDTH).double(), drawn(2, WIDTH, WIDTH).double(), drawn(6, WIDTH, WIDTH).double()
    found = kl_between(stream.readout, h.float(), one, other)
    for k, state in enumerate(h):
        p, q = (
            np.exp(x - np.logaddexp.reduce(x))
            for x in (stream.readout((state @ j.T).float()).detach().double().numpy() for j in (one, other))
        )
        expected = ((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()) / 2
        assert float(found[k]) == pytest.approx(expected, rel=1e-4)
