"""Held-out streams keep what they declare: their moments, shares and cross-entropies, by numpy from hidden parts."""

import hashlib
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lensbench.studies.held_out import CARRIED, HELD_OUT_FAMILIES, REPRESENTED, SHARED, HeldOutStream, Parts

FAMILIES = sorted(HELD_OUT_FAMILIES)
MIXTURES = ("place-copied", "place-sliced", "place-drifting", "three-way", "three-way-drifting")
SMALL = ("small-copied", "small-rebased")
QUICK = ("place-copied", "three-way-drifting", "news", "small-rebased")
N = 5000


def some(families):
    """Parameters of a test: a few families at every run, all of them among the slow tests."""
    return [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in families]


@cache
def sample(family: str, seed: int = 0) -> tuple[HeldOutStream, Parts]:
    """A stream and many tokens of it, each a document of its own: errors of means are those of independent tokens."""
    stream = HeldOutStream(family, seed=seed)
    return stream, stream.parts(N, seed=5, per_document=1)


def best_reading(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, float]:
    """Least-squares matrix ``[w, n]`` of y on x, and the factor that undoes what its fit to N tokens gains by chance."""
    x, y = x.double().numpy(), y.double().numpy()
    weights, _, rank, _ = np.linalg.lstsq(x, y, rcond=1e-8)
    return weights, len(x) / (len(x) - rank)


def fisher_metric(stream: HeldOutStream, answer: torch.Tensor) -> np.ndarray:
    """Mean Fisher metric of the answer's entries without the norm's scale, from the modules of the read-out."""
    states = F.pad(answer, (0, stream.d - stream.width))
    p = stream.readout(states).double().softmax(-1).numpy()
    gain = torch.diag(getattr(stream.readout.final_norm, "gain", getattr(stream.readout.final_norm, "weight", None)))
    if isinstance(stream.readout.final_norm, torch.nn.LayerNorm):
        gain = gain @ (torch.eye(stream.d) - 1 / stream.d)
    w = (stream.readout.unembedding.weight @ gain)[:, : stream.width].double().numpy()
    return w.T @ (np.diag(p.mean(0)) - p.T @ p / len(p)) @ w


def test_tokens_of_a_document_correlate_as_declared_and_documents_do_not():
    stream = HeldOutStream("growing", seed=1)
    answer = stream.parts(16_000, seed=2).answer.view(2000, 8, -1)
    within = (answer[:, :-1] * answer[:, 1:]).mean()
    between = (answer[:-1, -1] * answer[1:, 0]).mean()
    assert within.item() == pytest.approx(SHARED, abs=0.015)
    assert between.item() == pytest.approx(0, abs=0.015)
    states = stream.states(16_000, seed=2)
    new = (states[0] - states[0].mean(0)).view(2000, 8, -1)
    signal = np.diagonal(stream.channels[0].moments[0][0]).mean()
    assert (new[:, 0] * new[:, 5]).mean().item() == pytest.approx(SHARED * signal**2, abs=0.015)


@pytest.mark.parametrize("family", some(FAMILIES))
def test_states_have_the_declared_signal_and_noise(family):
    stream, parts = sample(family)
    start = 0
    for channel, held in zip(stream.channels, parts.held, strict=True):
        y = parts.answer[:, start : start + channel.entries]
        start += channel.entries
        signals, covariances = channel.moments
        for layer in (0, stream.layers // 2, stream.layers - 1):
            left = (held[layer] - y @ torch.tensor(signals[layer].T).float()).double().numpy()
            size = np.trace(covariances[layer]) + 1e-12
            assert np.linalg.norm(left.T @ left / N - covariances[layer]) < 0.2 * size
            assert np.trace(left.T @ left) / N == pytest.approx(size, rel=0.03)
            assert np.abs(left.T @ y.numpy() / N).max() < 0.1 * (size * float(channel.size.max()) ** 2) ** 0.5 + 1e-6


@pytest.mark.parametrize("family", ["growing", "shrinking", "growing-copied"])
def test_streams_grow_and_shrink_as_drawn(family):
    stream, parts = sample(family)
    (channel,), states = stream.channels, stream.assembled(parts)
    signals, covariances = channel.moments
    variance = channel.size.double().numpy() ** 2
    power = [np.trace((b * variance) @ b.T + n) for b, n in zip(signals, covariances, strict=True)]
    for layer in range(stream.layers):
        measured = states[layer].square().sum(-1).mean().item()
        assert measured == pytest.approx(power[layer] * stream.growth ** (2 * layer), rel=0.04)
    low, high = HELD_OUT_FAMILIES[family].ranges["growth"]
    assert low <= stream.growth <= high
    assert states[-1, :, : stream.width].square().sum(-1).mean().item() == pytest.approx(
        stream.width * stream.growth ** (2 * stream.layers), rel=0.03
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("anisotropic")])
def test_the_spectrum_of_the_answer_falls_with_the_drawn_exponent(family):
    stream, parts = sample(family)
    variance = np.sort(parts.answer.numpy().var(0))[::-1]
    slope = np.polyfit(np.log(np.arange(1, stream.width + 1)), np.log(variance), 1)[0]
    assert -slope == pytest.approx(stream.drawn["exponent"], abs=0.05)
    assert variance.mean() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("how", ["fresh", "removed", "averaged", "added"])
def test_a_refined_channel_gets_better_in_the_way_that_it_names(how):
    """Noise of each layer by the texts' own words, not by the recursion that draws it."""
    seed = next(s for s in range(40) if HeldOutStream("growing", seed=s).drawn["how"] == how)
    stream = HeldOutStream("growing", seed=seed)
    parts = stream.parts(N, seed=4)
    held, y, layers = parts.held[0], parts.answer, stream.layers
    steps = torch.arange(1, layers + 1) / (layers + 1)
    noise = held - (steps if how == "added" else torch.ones(layers))[:, None, None] * y
    sigma = np.geomspace(stream.drawn["first_noise"], stream.drawn["last_noise"], layers)
    after = noise[1:].square().mean((1, 2)).numpy()
    along = (noise[1:] * noise[:-1]).mean((1, 2)).numpy()
    first = noise[0].square().mean().item()
    if how == "added":
        last = steps.numpy()
        assert first == pytest.approx(last[0] * (1 - last[0]), rel=0.05)
        assert after == pytest.approx(last[1:] * (1 - last[1:]), rel=0.05)
        increments = torch.diff(torch.cat([held, y[None]]), dim=0)
        assert (increments[0] * increments[-1]).mean().item() == pytest.approx(0, abs=0.01)
    elif how == "fresh":
        assert after == pytest.approx(sigma[1:] ** 2, rel=0.05)
        assert along == pytest.approx(0, abs=0.05)
    elif how == "removed":
        assert after == pytest.approx(sigma[1:] ** 2, rel=0.05)
        assert along == pytest.approx(sigma[1:] ** 2, rel=0.1)
    else:
        assert after == pytest.approx(first / np.arange(2, layers + 1), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", some(name for name in FAMILIES if name != "standstill"))
def test_declared_shares_are_those_of_regressions_on_hidden_parts(family):
    stream, parts = sample(family)
    metric = fisher_metric(stream, parts.answer)
    layers, start, explained = stream.layers, 0, []
    for channel, held in zip(stream.channels, parts.held, strict=True):
        place = slice(start, start := start + channel.entries)
        y, g = parts.answer[:, place], metric[place, place]
        kinds = []
        for x in held:
            weights, factor = best_reading(x, y)
            left = y.double().numpy() - x.double().numpy() @ weights
            kinds.append(
                np.trace(g @ (y.double().T @ y.double() / N).numpy()) - factor * np.trace(g @ left.T @ left) / N
            )
        explained.append(kinds)
    gain = np.diff(np.array(explained)[:, [1, layers - 1]], axis=1)[:, 0]
    of_channel = gain / gain.sum()
    shown, elsewhere = (np.array([getattr(c, f)[1, -1] for c in stream.channels]) for f in ("shown", "elsewhere"))
    shares = stream.shares
    assert shares.in_place[1, -1] == pytest.approx(of_channel @ shown, abs=0.03)
    assert shares.carried[1, -1] == pytest.approx(of_channel @ elsewhere, abs=0.03)
    sums = shares.in_place + shares.carried + shares.represented
    assert sums[np.triu_indices(layers, 1)] == pytest.approx(1)
    seen = np.array(explained)[:, 1]
    assert shares.kept[1, -1] == pytest.approx(seen @ (shown + elsewhere) / seen.sum(), abs=0.03)


@pytest.mark.parametrize(
    "family", ["growing", "growing-copied", "anisotropic-sliced", "anisotropic-rebased", "place-drifting"]
)
def test_an_old_reading_meets_its_own_signal_and_error_again_as_declared(family):
    """Carried: the old signal and error are there in full. New basis: no signal. Turned: the cosine of the signal."""
    stream, parts = sample(family)
    channel, held = stream.channels[-1], parts.held[-1].double().numpy()
    y = parts.answer[:, -channel.entries :].double().numpy()
    old, new = held[1], held[-1]
    error = old - y @ np.linalg.lstsq(y, old, rcond=None)[0]
    persists = np.sum(error * new) / np.sum(error * old)
    signal = [np.linalg.lstsq(y, x, rcond=None)[0] for x in (old, new)]
    share = np.sum(signal[0] * signal[1]) / np.sum(signal[0] ** 2)
    if channel.elsewhere[1, -1] == 1:
        assert persists == pytest.approx(1, abs=0.1)
    elif family == "growing":
        assert channel.shown[1, -1] == 1
        assert share > 0.95
    else:
        assert persists == pytest.approx(0, abs=0.1)
        assert share == pytest.approx(channel.shown[1, -1], abs=4 / channel.entries)


def test_news_is_declared_where_entries_arrive_in_unread_places():
    stream, parts = sample("news")
    new = stream.channels[1]
    assert (parts.held[1][0] == 0).all()
    assert ((parts.held[1][-1] - parts.answer[:, -new.entries :]).std() / stream.drawn["last_noise"]).item() == (
        pytest.approx(1, rel=0.02)
    )
    power = np.diagonal(new.explained, axis1=1, axis2=2).sum(1)
    old = np.trace(stream.channels[0].explained, axis1=1, axis2=2)
    last = stream.layers - 1
    # By the last layer every arrival is news to layer 0; in the channel that is refined, what layer 0 reads under .1.
    at_least = (power[last] - power[0]) / (power[last] - power[0] + old[last] - old[0])
    assert stream.shares.news[0, last] >= at_least - 1e-9
    assert HeldOutStream("anisotropic-sliced", seed=0).shares.overall("news") == pytest.approx(0, abs=0.05)


def cross_entropies(features: list[torch.Tensor], answer: torch.Tensor, logits, targets):
    """Cross-entropies (nats/token) of linear readings of ``features``, fitted on the first half of the tokens."""
    half, found = len(answer) // 2, []
    for x in features:
        weights, _ = best_reading(x[:half], answer[:half])
        found.append(
            F.cross_entropy(logits((x[half:].double() @ torch.tensor(weights)).float()), targets[half:]).item()
        )
    return np.array(found)


def model_logits(stream: HeldOutStream):
    """Logits of an answer, by the read-out's weights, with the scale of the mean final state."""
    norm, head = stream.readout.final_norm, stream.readout.unembedding
    if isinstance(norm, torch.nn.LayerNorm):
        scale = (stream.size.square().mean() * (1 - 1 / stream.d)).sqrt()
        return lambda y: head((y - y.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias)
    return lambda y: head(y / stream.size.square().mean().sqrt() * norm.gain)


@pytest.mark.parametrize("family", some(f for f in FAMILIES if HELD_OUT_FAMILIES[f].falls and f not in SMALL))
@torch.no_grad()
def test_the_cross_entropy_of_the_best_linear_reading_falls_with_depth(family):
    stream, _ = sample(family)
    captured, answer = stream.capture(N, seed=8), stream.parts(N, seed=8).answer
    layers = sorted({0, stream.layers // 2, stream.layers - 1})
    ce = cross_entropies(list(captured.states[layers]), answer, model_logits(stream), captured.targets)
    assert (np.diff(ce) < -0.01).all()
    assert captured.model_ce.mean().item() < ce[-1]


@pytest.mark.parametrize("family", sorted(HELD_OUT_FAMILIES))
def test_explained_power_rises_at_every_step_where_the_family_promises_it(family):
    stream, made = HeldOutStream(family, seed=2), HELD_OUT_FAMILIES[family]
    rises = all((np.diff(np.trace(c.explained, axis1=1, axis2=2)) > 0).all() for c in stream.channels)
    assert rises == made.falls
    assert np.isnan(stream.shares.overall("in_place")) == (not made.falls)
    assert ("in_place" in stream.shares.why_not) == (not made.falls)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(HELD_OUT_FAMILIES))
def test_every_stream_of_a_calibration_gains_at_every_step(family):
    for seed in range(50):
        stream = HeldOutStream(family, seed=seed)
        start, explained = 0, 0
        for channel in stream.channels:
            place = slice(start, start := start + channel.entries)
            if channel.predicts:
                explained = explained + np.einsum("ab,lba->l", stream.metric[place, place], channel.explained)
        assert (np.diff(explained) > 0).all() == HELD_OUT_FAMILIES[family].falls


@pytest.mark.parametrize("family", some(SMALL))
@torch.no_grad()
def test_the_cross_entropy_gain_of_an_adversary_lies_in_its_small_channel_and_its_power_elsewhere(family):
    stream, _ = sample(family)
    large, small = stream.channels
    captured, parts = stream.capture(N, seed=8), stream.parts(N, seed=8)
    ends, targets = [0, stream.layers - 1], captured.targets

    def read(features: list[torch.Tensor]) -> float:
        first, last = cross_entropies(features, parts.answer, stream.target_logits, targets)
        return first - last

    whole = read([captured.states[layer] for layer in ends])
    assert whole > 0.5
    assert read([parts.held[1][layer] for layer in ends]) > 0.95 * whole
    assert read([parts.held[0][layer] for layer in ends]) < 0.02 * whole
    assert stream.shares.power[large.name] > 0.7
    assert stream.shares.overall("in_place") > 0.6
    assert stream.shares.in_place_of_cross_entropy == 0
    # Read by the model's own read-out, as a lens does, both together lower the cross-entropy: the gate is passed.
    as_lens = cross_entropies([captured.states[layer] for layer in ends], captured.states[-1], stream.readout, targets)
    assert as_lens[1] < as_lens[0] - 0.05
    assert small.predicts
    assert not large.predicts
    assert "added up in one representation" not in stream.verdicts


def test_verdicts_of_pure_streams_are_their_families_and_mixtures_follow_their_shares():
    assert HeldOutStream("growing-copied").verdicts == (CARRIED,)
    assert HeldOutStream("anisotropic-rebased").verdicts == (REPRESENTED,)
    for family in MIXTURES:
        stream = HeldOutStream(family, seed=1)
        assert stream.verdicts[0] == "mixed"
        assert np.isnan(stream.shares.in_place_of_cross_entropy)
        assert "in_place_of_cross_entropy" in stream.shares.why_not


def test_means_of_shares_are_over_pairs_from_a_layer_on_and_blocks_are_neighbours():
    shares = HeldOutStream("three-way", seed=1).shares
    layers = len(shares.carried)
    pairs = [(i, j) for i in range(1, layers) for j in range(i + 1, layers)]
    assert shares.overall("carried") == pytest.approx(np.mean([shares.carried[pair] for pair in pairs]))
    pairs += [(0, j) for j in range(1, layers)]
    assert shares.overall("carried", first=0) == pytest.approx(np.mean([shares.carried[pair] for pair in pairs]))
    assert shares.by_block("kept") == pytest.approx([shares.kept[i, i + 1] for i in range(layers - 1)])
    stays = shares.in_place[1, 2] / (1 - shares.represented[1, 2])
    assert shares.in_place_of_kept[1, 2] == pytest.approx(stays)
    assert np.isnan(HeldOutStream("anisotropic-rebased").shares.in_place_of_kept).all()


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="unknown family 'copied'"):
        HeldOutStream("copied")


def fingerprint(family: str) -> tuple[str, float]:
    """A digest of the sizes of the first stream, and a weighted sum over its read-out and some of its states."""
    stream = HeldOutStream(family, seed=0)
    sizes = {name: round(value, 9) if isinstance(value, float) else value for name, value in stream.drawn.items()}
    states = stream.states(16, seed=0).double()
    weights = torch.cos(torch.arange(states.numel(), dtype=torch.float64)).view_as(states)
    total = (states / states.square().mean((1, 2), keepdim=True).sqrt() * weights).sum().item()
    head = stream.readout.weight.double()
    total += (head * torch.cos(torch.arange(head.numel(), dtype=torch.float64)).view_as(head)).sum().item()
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:12], total


FROZEN: dict[str, tuple[str, float]] = {
    "anisotropic": ("2e59f63fa716", -49.3347),
    "anisotropic-rebased": ("086261eb459d", 13.2035),
    "anisotropic-sliced": ("4b7521902e37", -22.2167),
    "growing": ("799aafc0730f", -4.9575),
    "growing-copied": ("d1e6fa6c9cd0", 29.2528),
    "news": ("7a3157292657", 16.1787),
    "place-copied": ("26f551fc0b1d", 182.9250),
    "place-drifting": ("2421a4e2d977", 17.1964),
    "place-sliced": ("9be193aa3e18", 21.3264),
    "shrinking": ("3a1f44435b8d", 1.4339),
    "small-copied": ("b6e5085da788", 37.2129),
    "small-rebased": ("4ecfe6bfd76e", -29.3189),
    "standstill": ("33f454fd8927", -66.8375),
    "three-way": ("979729b88d94", 1.4391),
    "three-way-drifting": ("0ca610e3cdca", -26.6895),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_streams_are_those_that_were_frozen(family):
    """They were frozen before any measure was run on them; a changed family needs another name."""
    digest, total = fingerprint(family)
    assert digest == FROZEN[family][0]
    assert total == pytest.approx(FROZEN[family][1], abs=1e-3)
